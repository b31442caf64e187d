"""DINOv2 in one file: train a Vision Transformer on CIFAR-10 without labels.

    python dinov2_cifar.py --quick                # built-in images, three minutes
    python dinov2_cifar.py --hour                 # CIFAR-10 on a CPU, an hour of one core
    python dinov2_cifar.py                        # CIFAR-10 on a GPU, settings as in Config
    python dinov2_cifar.py --dataset photos/      # your images
    torchrun --nproc-per-node 2 dinov2_cifar.py   # two GPUs

A student network sees local crops of an image, and global crops, half of them masked. It predicts
what a teacher network, a moving average of the student, outputs for the global crops. Labels are
for evaluation.

k-NN accuracy of the frozen features after --quick on two CPU cores, mean of 3 seeds: 76.7 % (raw
pixels 44.1 %, untrained network 14.5 %). README.md has CIFAR-10.

DINOv2 (arXiv 2304.07193) combines DINO (2104.14294) and iBOT (2111.07832) with Sinkhorn-Knopp
centering (SwAV, 2006.09882) and the KoLeo regularizer (1806.03198). Registers: 2309.16588.

Shapes: B images in a batch, G global and L local crops of each, V = G + L views, R = G * B global
crops, S side, N patches (from Evaluation on: images), T tokens, D width, K prototypes, M masked
patches.
"""

import argparse
import difflib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps
from torch import nn
from torch.utils._triton import has_triton
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# ---- Settings ----


class Config:
    """All settings, one per line. The comment beside a setting is also its --help text.

    Edit the constants, pass them (Config(TOTAL_EPOCHS=1)), or use flags (--total-epochs 1).
    Config() copies the current constants, and raises InputError for an invalid one.
    """

    # Network
    MODEL_SIZE = "small"  # key of MODEL_DIMS
    MODEL_DIMS = {  # width, blocks and attention heads of each size
        "tiny": {"dim": 192, "depth": 6, "heads": 3},
        "small": {"dim": 384, "depth": 6, "heads": 6},
        "base": {"dim": 768, "depth": 12, "heads": 12},
        "large": {"dim": 1024, "depth": 24, "heads": 16},
    }
    IMAGE_SIZE = 32  # pixels; images are resized and center-cropped
    PATCH_SIZE = 4  # pixels; 8: 3x faster, coarser
    REGISTER_TOKENS = 0  # extra tokens for global information
    LAYER_SCALE = 0.0  # initial LayerScale; 1e-5 for large models, 0: none
    DROP_PATH = 0.0  # stochastic depth rate of the last block, rising linearly from 0
    DROPOUT = 0.0  # dropout rate in the student's attention and MLPs; published: 0
    # Projection heads
    PROJECTION_DIM = 1024  # number of prototypes K; published: 65536 and more
    HEAD_HIDDEN_DIM = 512  # width of the two hidden layers; published: 2048
    HEAD_BOTTLENECK_DIM = 64  # width before the prototypes; published: 256
    HEAD_BATCH_NORM = True  # batch norm in the heads; published: off
    # Views
    GLOBAL_CROPS_NUMBER = 2  # crops that both networks see; at least 2
    LOCAL_CROPS_NUMBER = 6  # crops that only the student sees; 0: none
    GLOBAL_CROP_SIZE = 32  # pixels, a multiple of PATCH_SIZE
    LOCAL_CROP_SIZE = 16  # pixels, a multiple of PATCH_SIZE
    GLOBAL_CROPS_SCALE = (0.4, 1.0)  # range of the area, as a fraction of the image
    LOCAL_CROPS_SCALE = (0.15, 0.5)  # range of the area, as a fraction of the image
    FLIP = True  # mirror half of the crops
    COLOR_JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue (<= 0.5)
    COLOR_JITTER_PROB = 0.8  # fraction of the crops with color jitter
    GRAYSCALE_PROB = 0.2  # fraction of the crops without color
    # Objective
    LAMBDA_IMG = 1.0  # weight of the image-level loss (DINO)
    LAMBDA_PATCH = 0.4  # weight of the patch-level loss (iBOT); published: 1.0
    LAMBDA_KOLEO = 0.15  # weight of KoLeo, which spreads the features; published: 0.1
    KOLEO_KIND = "nearest"  # "nearest": KoLeo; "cosine" and "uniform": all images repel each other
    KOLEO_FEATURES = "class"  # what it spreads: "class" tokens or the image head's "bottleneck"
    MASK_KIND = "block"  # "block": mask rectangles of patches; "random": single ones
    MASK_RATIO = 0.15  # masked fraction of the global crops' patches, <= 0.6 * MASK_PROB; 0: none
    MASK_PROB = 0.5  # fraction of the global crops that are masked
    STUDENT_TEMP = 0.1  # temperature of the student's softmax
    TEACHER_TEMP_START = 0.02  # teacher temperature at the first step; published: 0.04
    TEACHER_TEMP_END = 0.03  # teacher temperature after its warm-up; published: 0.07
    TEACHER_TEMP_WARMUP = 0.3  # fraction of the run in which the temperature rises linearly
    SINKHORN_ITERATIONS = 3  # rounds of Sinkhorn-Knopp; 0: softmax alone
    # Optimization
    BATCH_SIZE = 128  # images per process in one forward pass
    ACCUMULATE = 1  # batches whose gradients are averaged in one step
    LEARNING_RATE = 2e-3  # peak; multiplied by sqrt(images per step / 1024)
    LEARNING_RATE_END = 1e-6  # at the end of the run; multiplied likewise
    WARMUP = 0.1  # fraction of the run in which the learning rate rises linearly
    WEIGHT_DECAY = 0.04  # at the first step; none on biases, norms and tokens
    WEIGHT_DECAY_END = 0.4  # at the end of the run, reached by a cosine
    EMA_START = 0.9  # teacher momentum at the first step; DINOv2: 0.992, DINO: 0.996
    EMA_END = 1.0  # teacher momentum at the end of the run, reached by a cosine
    FREEZE_PROTOTYPES = 1.0  # fraction of the run with frozen prototypes; published: 0.01
    FREEZE_BACKBONE = 0.3  # fraction with frozen weights of INIT_FROM; then their rate rises
    CLIP_GRAD = 3.0  # maximum norm of the gradient; 0: no clipping
    TOTAL_EPOCHS = 2  # passes over the training images; schedules stretch with it
    # Run
    DATASET = "auto"  # cifar10, else shapes; or cifar100, shapes, a folder, a .npz or .npy file
    DATA_PATH = "data"  # folder for the CIFAR download
    TRAIN_IMAGES = 0  # number of training images, a fixed random subset; 0: all
    VALIDATION_IMAGES = 0  # training images held out, and evaluated in place of the test images
    OUTPUT_DIR = "checkpoints"  # for checkpoints, metrics.jsonl and figures
    SEED = 0  # the same seed gives the same weights, bit for bit on a CPU
    DEVICE = str(torch.accelerator.current_accelerator(True) or "cpu")  # cuda, cuda:1, mps or cpu
    PRECISION = "auto"  # "bf16" autocast, "fp32", or "auto": bf16 where it is fast
    COMPILE = True  # torch.compile views, masks, networks, losses; on CUDA with Triton only
    EVAL_EVERY = 1  # epochs between evaluations; 0: only at the end
    TENSORBOARD = False  # also log to OUTPUT_DIR/tensorboard, for the package of this name
    SAVE_EVERY = 10  # epochs between checkpoints that are kept; 0: only the last
    SAVE_EVERY_MINUTES = 10.0  # minutes between saves within an epoch; 0: none
    INIT_FROM = ""  # weights to start from: a checkpoint, or timm's or Meta's .pth or .safetensors
    RESUME = ""  # checkpoint to resume; bare --resume: "newest", OUTPUT_DIR/dinov2_last.pth

    def __init__(self, **overrides):
        for name in [*filter(str.isupper, dir(type(self))), *overrides]:
            require(name in CONSTANTS, f"{name} is not a setting of Config; --help lists them")
        for name, default in CONSTANTS.items():
            value = overrides.get(name, getattr(type(self), name))
            setattr(self, name, coerce(name, value, default))
        validate(self)

    def to_dict(self):
        """Return the settings as plain values; Config(**d) restores them."""
        return {name: deepcopy(getattr(self, name)) for name in CONSTANTS}


CONSTANTS = {name: value for name, value in vars(Config).items() if name.isupper()}

# ---- Views: random crops of each image (multi-crop, DINO section 3.1) ----


class MultiCropTransform:
    """Turn images into V normalized views, global crops first.

    An image (see to_uint8) -> V times (3,S,S); a batch -> V times (B,3,S,S), each image with its
    own box, flip and colors. config: scales, flip and colors. mean, std: of channels, in 0..1.
    """

    def __init__(
        self,
        global_size=32,
        local_size=32,
        global_crops=2,
        local_crops=6,
        config=None,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ):
        c = self.config = config or Config()
        self.crops = [(global_crops, global_size, c.GLOBAL_CROPS_SCALE)]
        self.crops += [(local_crops, local_size, c.LOCAL_CROPS_SCALE)]
        self.mean, self.std = (torch.as_tensor(values).view(3, 1, 1) for values in (mean, std))

    def __call__(self, images):
        images, views = to_uint8(images), []
        if images.ndim == 3:
            return [view[0] for view in self(images.unsqueeze(0))]
        self.mean, self.std = (t.to(images.device) for t in (self.mean, self.std))  # copied once
        for number, size, scale in self.crops:
            if number:
                x = self.random_views(images, number, size, scale)
                views += ((x - self.mean) / self.std).chunk(number)
        return views

    def random_views(self, images, number, size, scale):
        """Draw number views of each uint8 image (B,3,H,W): (number*B,3,size,size), in 0..1."""
        c, device, count = self.config, images.device, number * len(images)
        flip, jitter, gray = torch.rand(3, count, 1, 1, 1, device=device)
        boxes = random_crop_boxes(count, *images.shape[2:], scale, device)
        x = resized_crop(images / 255, *boxes, flip < 0.5 * c.FLIP, size)
        jitter = jitter < c.COLOR_JITTER_PROB
        changes = [jitter * torch.empty_like(gray).uniform_(-a, a) for a in c.COLOR_JITTER]
        x = color_jitter(x, torch.stack(changes))
        return torch.where(gray < c.GRAYSCALE_PROB, TF.rgb_to_grayscale(x), x)


def make_transform(config, backbone):
    """Return config's MultiCropTransform, which normalizes as backbone does."""
    c = config
    sizes = (c.GLOBAL_CROP_SIZE, c.LOCAL_CROP_SIZE, c.GLOBAL_CROPS_NUMBER, c.LOCAL_CROPS_NUMBER)
    return MultiCropTransform(*sizes, c, backbone.pixel_mean, backbone.pixel_std)


class MultiCropDataset(torch.utils.data.Dataset):
    """The V views of each image of a dataset (see as_images), drawn on device or its own.

    [i]: a list of (3,S,S). __getitems__(indices): a list of (B,3,S,S), in one vectorized call.
    """

    def __init__(self, dataset, transform, device=None):
        dataset = dataset if isinstance(dataset, Images) else as_images(dataset)
        self.images, self.transform = dataset.train_images, transform
        self.device = device or self.images.device

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index].to(self.device))

    def __getitems__(self, indices):
        indices = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
        return self.transform(self.images[indices].to(self.device, non_blocking=True))


# ---- Model: a pre-norm Vision Transformer (2010.11929) and the projection heads ----


class PatchEmbedding(nn.Module):
    """Project each patch of images: (B,C,H,W) -> (B,N,D), row by row."""

    def __init__(self, img_size, patch_size, in_channels=3, embed_dim=384):
        super().__init__()
        self.patch_size, self.num_patches = patch_size, (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)

    def forward(self, x):
        p = self.patch_size
        if x.shape[-2] % p or x.shape[-1] % p:
            raise InputError(f"H and W of {tuple(x.shape)} must be multiples of patch size {p}")
        # The strided convolution as one matrix product, which is faster on a CPU
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention: (B,T,D) -> (B,T,D), or (n,D) for n token_indices."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, dropout=0.0):
        super().__init__()
        require(dim % num_heads == 0, f"width {dim} must be a multiple of the {num_heads} heads")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, token_indices=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B,T,D) each
        q, k, v = (rearrange(t, "b t (h d) -> b h t d", h=self.num_heads) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
            # For so few tokens in bfloat16, torch's fused CPU kernel takes three times as long
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, T, T)
            x = F.dropout(weights, dropout) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = select_tokens(rearrange(x, "b h t d -> b t (h d)"), token_indices)
        return F.dropout(self.proj(x), dropout)


def select_tokens(x, indices):
    """Return tokens (B,T,D), or those of x.flatten(0, 1) with these indices (n,), as (n,D)."""
    return x if indices is None else x.flatten(0, 1).index_select(0, indices)


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x)))
        return self.dropout(self.fc2(x))


class LayerScale(nn.Module):
    """Scale each channel by a learned factor (2103.17239)."""

    def __init__(self, dim, init_value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x):
        return x * self.gamma


class TransformerBlock(nn.Module):
    """Attention and MLP in residual branches: (B,T,D) -> (B,T,D). drop_path: 1603.09382."""

    def __init__(
        self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, dropout=0.0, layer_scale=0, drop_path=0
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MultiHeadAttention(dim, num_heads, qkv_bias, dropout)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = StochasticDepth(drop_path, mode="row") if drop_path else nn.Identity()

    def forward(self, x, token_indices=None):
        """With token_indices (n,), return only these of the B*T tokens; all are attended to."""
        branch = self.drop_path(self.ls1(self.attn(self.norm1(x), token_indices)))
        x = select_tokens(x, token_indices) + branch
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images (B,C,H,W) -> class token (B,D) and patch tokens (B,N,D).

    H and W: any multiples of patch_size. Parameter names are those of timm and of Meta's DINOv2;
    the buffers pixel_mean and pixel_std let extract_features normalize images.
    """

    def __init__(
        self,
        img_size=32,
        patch_size=4,
        in_channels=3,
        embed_dim=384,
        depth=6,
        num_heads=6,
        mlp_ratio=4.0,
        qkv_bias=True,
        dropout=0.0,
        layer_scale=0.0,
        drop_path=0.0,
        register_tokens=0,
    ):
        super().__init__()
        self.num_prefix_tokens, self.drop_path = 1 + register_tokens, drop_path
        self.patch_embed = PatchEmbedding(img_size, patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        registers = 0.02 * torch.randn(1, register_tokens, embed_dim)
        self.register_tokens = nn.Parameter(registers) if register_tokens else None
        # As strong as the patches, so that short runs use positions from the start
        positions = 0.5 * torch.randn(1, 1 + self.patch_embed.num_patches, embed_dim)
        self.pos_embed = nn.Parameter(positions)
        options = (embed_dim, num_heads, mlp_ratio, qkv_bias, dropout, layer_scale)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(*options, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.register_buffer("pixel_mean", torch.zeros(in_channels, 1, 1))
        self.register_buffer("pixel_std", torch.ones(in_channels, 1, 1))
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                # The published standard deviation of 0.02 stalls narrow networks
                nn.init.xavier_uniform_(layer.weight.detach().flatten(1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def interpolate_pos_encoding(self, x, w, h):
        """Return the position embedding (1,1+N,D) of images of w x h pixels."""
        p = self.patch_embed.patch_size
        return resize_pos_embed(self.pos_embed, (h // p, w // p))

    def prepare_tokens(self, x, mask=None):
        """Embed images (B,C,H,W) as (B,T,D): class token, registers, patches."""
        batch, _, height, width = x.shape
        x = self.patch_embed(x)  # (B,N,D)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        pos = self.interpolate_pos_encoding(x, width, height)
        tokens = (self.cls_token + pos[:, :1], self.register_tokens, x + pos[:, 1:])
        # Keep autocast's bfloat16, which halves the memory traffic. LayerScale's fp32 gamma makes
        # the blocks return fp32: bfloat16 would lose branches scaled by 1e-5
        tokens = [t.to(x.dtype).expand(batch, -1, -1) for t in tokens if t is not None]
        return torch.cat(tokens, 1)

    def forward(self, x, mask=None, patch_indices=None):
        """Return the class token (B,D) and the patch tokens (B,N,D).

        mask (B,N) bool: patches replaced by the mask token (iBOT, section 3.1). patch_indices (M,):
        return only these of the B*N patches, as (M,D), and compute no others in the last MLP.
        """
        x = self.prepare_tokens(x, mask)
        for block in self.blocks[:-1]:
            x = block(x)
        last, prefix, dtype = self.blocks[-1], self.num_prefix_tokens, self.norm.weight.dtype
        if patch_indices is None:
            x = self.norm(last(x).to(dtype))
            return x[:, 0], x[:, prefix:]
        # Indices in x.flatten(0, 1) of all class tokens, then of the patches
        batch, num_tokens, _ = x.shape
        image = patch_indices // (num_tokens - prefix)
        class_indices = torch.arange(batch, device=x.device) * num_tokens
        indices = torch.cat([class_indices, patch_indices + (image + 1) * prefix])
        # Drop path drops whole images: then select tokens after the block
        drops_images = self.training and self.drop_path > 0
        x = select_tokens(last(x), indices) if drops_images else last(x, indices)
        x = self.norm(x.to(dtype))
        return x[:batch], x[batch:]


def resize_pos_embed(pos_embed, size):
    """Return a position embedding (1,1+N,D) of a square for rows x columns of patches."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if not torch.compiler.is_exporting() and size == (side, side):  # an export takes any size
        return pos_embed
    grid = rearrange(pos_embed[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
    antialias = pos_embed.device.type != "mps"  # not implemented there
    grid = F.interpolate(grid, size=size, mode="bicubic", antialias=antialias)
    return torch.cat([pos_embed[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], 1)


def build_backbone(config):
    c, dims = config, config.MODEL_DIMS[config.MODEL_SIZE]
    size = (c.IMAGE_SIZE, c.PATCH_SIZE, 3, dims["dim"], dims["depth"], dims["heads"])
    options = {"layer_scale": c.LAYER_SCALE, "drop_path": c.DROP_PATH, "dropout": c.DROPOUT}
    backbone = VisionTransformer(*size, register_tokens=c.REGISTER_TOKENS, **options)
    backbone.precision = c.PRECISION  # default of extract_features
    return backbone


class ProjectionHead(nn.Module):
    """An MLP, then cosines with K prototypes (DINO, appendix C): (...,D) -> (...,K) in -1..1.

    batch_norm: after the MLP's linear layers.
    """

    def __init__(
        self, input_dim, output_dim, hidden_dim=None, bottleneck_dim=256, batch_norm=False
    ):
        super().__init__()
        hidden_dim = hidden_dim or 4 * input_dim
        norm = BatchNorm if batch_norm else nn.Identity
        layers = []
        for width_in, width_out in pairwise([input_dim, hidden_dim, hidden_dim, bottleneck_dim]):
            layers += [nn.Linear(width_in, width_out), norm(width_out), nn.GELU()]
            nn.init.trunc_normal_(layers[-3].weight, std=0.02)
            nn.init.zeros_(layers[-3].bias)
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = nn.Parameter(0.02 * torch.randn(output_dim, bottleneck_dim))

    def forward(self, x):
        return self.compare(self.embed(x))

    def embed(self, x):
        """Return the bottleneck (...,bottleneck_dim), normalized."""
        return F.normalize(self.mlp(x).float(), dim=-1, eps=1e-6)

    def compare(self, x):
        """Return cosines of embeddings with the prototypes."""
        # Divided by a temperature of 0.02, errors of bfloat16 would grow to 0.2
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, F.normalize(self.prototypes, dim=-1, eps=1e-6))


# ---- Objective: targets and losses ----


@torch.no_grad()
def sinkhorn_knopp_centering(features, num_iters=3, epsilon=0.05):
    """Assign samples to prototypes evenly (SwAV, section 3.1; DINOv2, section 4).

    features (B,K): logits; epsilon: temperature. Returns fp32 (B,K) without gradient: rows sum to
    1, columns to about B / K over all processes. Each round scales the columns, then the rows.
    """
    log_q = (features.float() / epsilon).clamp_(-1e30, 1e30)
    if not num_iters:
        return log_q.softmax(1)
    # exp of the logits overflows, but the scales absorb any factor of a column or row. Below e^-40
    # nothing counts in fp32, and denormal numbers take a CPU 50 times as long
    log_q -= all_reduce(log_q.amax(0), "MAX")  # in place: new memory costs a CPU more
    peak = log_q.amax(1, keepdim=True)  # (B,1)
    q, row_scale = log_q.sub_(peak).clamp_(min=-40).exp_(), peak.clamp(min=-40).exp()
    with torch.autocast(q.device.type, enabled=False):
        for _ in range(num_iters):
            mass = all_reduce(row_scale.T @ q)  # (1,K)
            column_scale = mass.amin() / mass  # prototypes have equal mass
            row_scale = 1 / (q @ column_scale.T)  # (B,1): samples have mass 1
    return q.mul_(row_scale).mul_(column_scale)


def soft_cross_entropy(logits, targets, temperature, target_temp=None):
    """Return -sum(targets * log_softmax(logits / temperature)): (...,K) twice -> fp32 (...)."""
    targets = targets.float()
    if target_temp is not None:
        targets = (targets / target_temp).softmax(-1)
    return -(targets * (logits.float() / temperature).log_softmax(-1)).sum(-1)


def dino_loss(student_output, teacher_output, teacher_temp=0.04, student_temp=0.1):
    """Loss of matching rows (DINO, equation 2; see multi_crop_dino_loss): (...,K) twice -> scalar.

    With teacher_temp None, teacher_output holds distributions, such as Sinkhorn-Knopp's.
    """
    return soft_cross_entropy(student_output, teacher_output, student_temp, teacher_temp).mean()


def multi_crop_dino_loss(student_output, targets, student_temp=0.1):
    """Mean loss over pairs of a teacher view and a different student view (DINO, equation 3).

    student_output (V,B,K): logits, global views first; targets (G,B,K): distributions.
    """
    G, L = len(targets), len(student_output) - len(targets)
    # Cross-entropy is linear in the target, so add up the targets of a student view first
    total = targets.sum(0)  # (B,K)
    targets = total - targets
    if L:  # without local crops, cat would only copy
        targets = torch.cat([targets, total.expand(L, -1, -1)])  # (V,B,K)
    losses = soft_cross_entropy(student_output, targets, student_temp)  # (V,B)
    return losses.mean(1).sum() / (G * (G - 1 + L))


def ibot_loss(student_output, teacher_output, mask, teacher_temp=0.04, student_temp=0.1):
    """Patch-level loss at the masked positions (iBOT, section 3.1): a scalar.

    student_output, teacher_output: (M,K), in the order of mask.flatten(). mask (R,N) bool. Mean
    over all R crops of each crop's mean, 0 for an unmasked crop. teacher_temp: see dino_loss.
    """
    losses = soft_cross_entropy(student_output, teacher_output, student_temp, teacher_temp)
    masked = mask.sum(1)  # (R,) patches of each crop
    weights = (1 / masked).repeat_interleave(masked, output_size=len(losses))  # (M,)
    return (weights * losses).sum() / len(mask)


def koleo_regularizer(features, kind="cosine"):
    """Return a scalar, lower for features (B,D) that spread more evenly; 0 for one row.

    "nearest": -mean log(distance to the nearest other row) of all processes' normalized rows
    (KoLeo, 1806.03198, equation 2). "cosine": mean squared cosine of different rows. "uniform":
    mean over rows of log(mean over other rows of exp(4 * cosine)) (2005.10242, theorem 1).
    """
    x = all_gather_rows(F.normalize(features.float(), dim=-1, eps=1e-6))
    n = len(x)
    if n < 2:
        return x.sum() * 0
    with torch.autocast(x.device.type, enabled=False):  # 1e-8 vanishes in half precision
        cosine = x @ x.T
        if kind == "cosine":
            return (cosine.square().sum() - cosine.diagonal().square().sum()) / (n * (n - 1))
        if kind == "uniform":
            logits = 4 * cosine - 1e4 * torch.eye(n, device=x.device)
            return logits.logsumexp(1).mean() - math.log(n - 1)
        nearest = (cosine.detach() - 3 * torch.eye(n, device=x.device)).argmax(1)
        # index_select: on a CPU, the gradient of x[nearest] depends on the threads' order
        return -((x - x.index_select(0, nearest)).norm(dim=1) + 1e-8).log().mean()


# ---- Student and teacher ----


class DINOv2(nn.Module):
    """Student and teacher: each a backbone, a head for images and one for patches."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        width = c.MODEL_DIMS[c.MODEL_SIZE]["dim"]
        sizes = (width, c.PROJECTION_DIM, c.HEAD_HIDDEN_DIM, c.HEAD_BOTTLENECK_DIM)
        self.student = build_backbone(c)
        self.img_head = ProjectionHead(*sizes, c.HEAD_BATCH_NORM)
        self.patch_head = ProjectionHead(*sizes, c.HEAD_BATCH_NORM)
        # The teacher starts as a copy of the student and gets no gradients
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.teacher_img_head = deepcopy(self.img_head).requires_grad_(False)
        self.teacher_patch_head = deepcopy(self.patch_head).requires_grad_(False)
        self.train()

    def set_pixel_statistics(self, mean, std):
        """Store the channels' mean and standard deviation, in 0..1."""
        for backbone in (self.student, self.teacher):
            backbone.pixel_mean.copy_(torch.tensor(mean).view(3, 1, 1))
            backbone.pixel_std.copy_(torch.tensor(std).view(3, 1, 1))

    @property
    def student_modules(self):
        return self.student, self.img_head, self.patch_head

    @property
    def teacher_modules(self):
        return self.teacher, self.teacher_img_head, self.teacher_patch_head

    def train(self, mode=True):
        """Set the student's mode; the teacher stays in eval mode: no dropout, no drop path."""
        super().train(mode)
        for module in self.teacher_modules:
            module.eval()
        return self

    def forward(self, views, mask, teacher_temp, patch_indices=None):
        """Return a dict of scalars: the losses, and diagnostics of the targets.

        views: V times (B,3,S,S), global crops first. mask (R,N) bool: patches of the global crops
        that the student does not see. patch_indices (M,): where mask.flatten() is True, as
        MaskGenerator draws; finding them here would synchronize with a GPU.
        """
        c, G = self.config, self.config.GLOBAL_CROPS_NUMBER
        if patch_indices is None:
            patch_indices = mask.flatten().nonzero()[:, 0]
        crops, local = torch.cat(views[:G]), views[G:]  # crops: (R,3,S,S)
        own = self.is_own_teacher and not local and not len(patch_indices)
        targets = None if own else self.teacher_targets(crops, patch_indices, teacher_temp)
        features, img_logits, patch_logits = self.student_outputs(crops, local, mask, patch_indices)
        if own:
            known = img_logits.flatten(0, 1)  # (R,K)
            targets = self.teacher_targets(crops, patch_indices, teacher_temp, known)
        img_targets, patch_targets = targets
        img = multi_crop_dino_loss(img_logits, img_targets, c.STUDENT_TEMP)
        patch = ibot_loss(patch_logits, patch_targets, mask, None, c.STUDENT_TEMP)
        # One KoLeo per global crop, summed: two views of an image must not repel each other
        koleo = sum(koleo_regularizer(x, c.KOLEO_KIND) for x in features[:G])
        loss = c.LAMBDA_IMG * img + c.LAMBDA_PATCH * patch + c.LAMBDA_KOLEO * koleo
        parts = {"img": img.detach(), "patch": patch.detach(), "koleo": koleo.detach()}
        return {"loss": loss, **parts, **target_diagnostics(img_targets, img)}

    @property
    def is_own_teacher(self):
        """Whether the teacher always equals the student: momentum 0, as in SwAV, and no dropout.

        Without masks and local crops, which batch norm would see, one forward pass then gives both.
        """
        c = self.config
        return not any((c.EMA_START, c.EMA_END, c.DROPOUT, c.DROP_PATH))

    @torch.no_grad()
    def teacher_targets(self, crops, patch_indices, temperature, logits=None):
        """Return image targets (G,B,K) and patch targets (M,K), each centered over all rows.

        logits (R,K): the teacher's for the class tokens, if already computed.
        """
        G, rounds = self.config.GLOBAL_CROPS_NUMBER, self.config.SINKHORN_ITERATIONS
        if logits is None:
            class_tokens, patches = self.teacher(crops, None, patch_indices)  # (R,D), (M,D)
            logits = self.teacher_img_head(class_tokens)
        img_targets = sinkhorn_knopp_centering(logits, rounds, temperature)
        patch_targets = img_targets[:0]
        if len(patch_indices):
            logits = self.teacher_patch_head(patches)
            patch_targets = sinkhorn_knopp_centering(logits, rounds, temperature)
        return img_targets.unflatten(0, (G, -1)), patch_targets

    def student_outputs(self, crops, local_crops, mask, patch_indices):
        """Return features for KoLeo (V,B,...), image logits (V,B,K), patch logits (M,K)."""
        tokens, patches = self.student(crops, mask, patch_indices)
        if local_crops:
            local_tokens, _ = self.student(torch.cat(local_crops), None, patch_indices[:0])
            tokens = torch.cat([tokens, local_tokens])
        embeddings = self.img_head.embed(tokens)
        img_logits = self.img_head.compare(embeddings)  # (V*B,K)
        features = tokens if self.config.KOLEO_FEATURES == "class" else embeddings
        patch_logits = self.patch_head(patches) if len(patch_indices) else img_logits[:0]
        V = self.config.GLOBAL_CROPS_NUMBER + len(local_crops)
        return features.unflatten(0, (V, -1)), img_logits.unflatten(0, (V, -1)), patch_logits

    @torch.no_grad()
    def update_teacher(self, m):
        """Set teacher = m * teacher + (1 - m) * student (DINO, section 3.1)."""
        for teacher, student in zip(self.teacher_modules, self.student_modules, strict=True):
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - m)


# ---- Optimization: all that changes during a run is computed from the step ----


class CosineScheduler:
    """Half a cosine from start_val to end_val, after a linear warm-up."""

    def __init__(self, start_val, end_val, total_steps, warmup_steps=0, warmup_val=0.0):
        self.start_val, self.end_val, self.total_steps = start_val, end_val, total_steps
        self.warmup_steps, self.warmup_val = warmup_steps, warmup_val

    def get_value(self, step):
        if step >= self.total_steps:
            return self.end_val
        if step < self.warmup_steps:
            return self.warmup_val + (self.start_val - self.warmup_val) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0
        return self.end_val + (self.start_val - self.end_val) * cosine


def hyperparameters(config, step, total_steps):
    """Return a step's learning rates, weight decay, teacher momentum and temperature."""
    c, n = config, total_steps
    lr = CosineScheduler(c.LEARNING_RATE, c.LEARNING_RATE_END, n, round(c.WARMUP * n))
    lr = lr.get_value(step) * math.sqrt(images_per_step(c) / 1024)
    start, end, warmup = c.TEACHER_TEMP_START, c.TEACHER_TEMP_END, c.TEACHER_TEMP_WARMUP
    rates = {"lr": lr, "prototype_lr": 0.0 if step < round(c.FREEZE_PROTOTYPES * n) else lr}
    if c.INIT_FROM:  # gradients of fresh heads would destroy a trained backbone
        left = (n - step) / n / max(1 - c.FREEZE_BACKBONE, 1e-9)  # from above 1 to 0
        rates["backbone_lr"] = lr * max(0.0, 1 - left)
    return {
        **rates,
        "weight_decay": CosineScheduler(c.WEIGHT_DECAY, c.WEIGHT_DECAY_END, n).get_value(step),
        "momentum": CosineScheduler(c.EMA_START, c.EMA_END, n).get_value(step),
        "teacher_temp": CosineScheduler(end, end, n, round(warmup * n), start).get_value(step),
    }


def make_optimizer(model):
    """Return AdamW for the student; biases, norms and single tokens have no weight decay."""
    groups = {(decays, name): [] for decays in (True, False) for name in ("backbone_lr", "lr")}
    groups[True, "prototype_lr"] = []
    for module in model.student_modules:
        for name, parameter in module.named_parameters():
            rate = "backbone_lr" if module is model.student else "lr"
            decays = parameter.ndim > 1 and name.endswith((".weight", "pos_embed"))
            key = (True, "prototype_lr") if name == "prototypes" else (decays, rate)
            groups[key].append(parameter)
    groups = [{"params": p, "decays": key[0], "rate": key[1]} for key, p in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def set_hyperparameters(optimizer, hparams):
    """Set learning rates and weight decay; freeze a group while its own learning rate is 0."""
    for group in optimizer.param_groups:
        group["lr"] = hparams.get(group["rate"], hparams["lr"])
        group["weight_decay"] = hparams["weight_decay"] * group["decays"]
        if group["rate"] != "lr" and group["rate"] in hparams:
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] > 0)


def train_step(model, optimizer, micro_batches, hparams):
    """Run one optimization step and update the teacher; return a dict of scalars on the device.

    micro_batches: ACCUMULATE tuples (views, mask[, patch_indices]). If a loss or gradient is not
    finite, the student stays as it is, and "skipped" is 1.
    """
    network = getattr(model, "module", model)  # without DistributedDataParallel
    c = network.config
    set_hyperparameters(optimizer, hparams)

    # Forward and backward; processes average gradients in the last micro-batch only
    optimizer.zero_grad(set_to_none=True)
    values = {}
    for i, (views, mask, *patch_indices) in enumerate(micro_batches):
        # A tensor: torch.compile would recompile for each new float
        temperature = torch.full((), hparams["teacher_temp"], device=mask.device)
        skip_sync = i + 1 < c.ACCUMULATE and model is not network
        with model.no_sync() if skip_sync else nullcontext():
            with autocast(c.DEVICE, c.PRECISION):
                outputs = model(views, mask, temperature, *patch_indices)
            (outputs["loss"] / c.ACCUMULATE).backward()
        for name, value in outputs.items():
            values[name] = values.get(name, 0) + value.detach() / c.ACCUMULATE

    # Update the student with the clipped gradients, then the teacher with the student
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values["grad_norm"] = nn.utils.clip_grad_norm_(parameters, c.CLIP_GRAD or math.inf)
    finite = torch.isfinite(values["loss"] + values["grad_norm"])
    values["skipped"] = all_reduce(1 - finite.float(), "MAX")
    optimizer.found_inf = values["skipped"]  # as GradScaler sets it; 1 skips the step
    if finite.device.type != "mps" or not values["skipped"]:  # which ignores found_inf
        optimizer.step()
    network.update_teacher(hparams["momentum"])
    return values


# ---- Training ----


def train_dinov2(config=None, dataset=None):
    """Train on config's images, or on dataset (see as_images), and return the DINOv2.

    Writes checkpoints, metrics and figures to OUTPUT_DIR. Raises InputError for unusable input, or
    if losses stay non-finite. Ctrl-C (SIGTERM) saves, then raises KeyboardInterrupt (SystemExit).
    """
    with setup_processes(config or Config()) as c, lock_output_dir(c):
        checkpoint = find_checkpoint(c)

        # Networks and optimizer; random numbers follow from SEED, step and process
        seed_step(c.SEED, 0)
        model = DINOv2(c).to(c.DEVICE)
        optimizer = make_optimizer(model)
        require_room(c, 4 * sum(p.nbytes for p in model.parameters()))  # two files, with moments
        if checkpoint:
            states = load_checkpoint(checkpoint, model, optimizer)
        elif c.INIT_FROM:
            load_weights(c.INIT_FROM, model)

        # Data
        images = prepare_images(c, dataset)
        if not checkpoint and not c.INIT_FROM:
            model.set_pixel_statistics(*channel_mean_std(images.train_images))
        transform = make_transform(c, model.teacher)
        crops, masks = MultiCropDataset(images, transform, c.DEVICE), MaskGenerator(c)
        steps_per_epoch = count_steps(len(crops), c)

        # Resume a run, or first measure raw pixels and the network as it starts
        logger = MetricLogger(c, describe_images(images), steps_per_epoch)
        work = f"{len(crops):,} images, {logger.total_steps:,} steps of {images_per_step(c):,}"
        print(f"{images.name[-20:]}: {work}; {c.MODEL_SIZE} on {c.DEVICE}", flush=True)
        if checkpoint:
            logger.restore(states, checkpoint)
            del states  # to free as much memory as networks and optimizer take
        else:
            logger.log("start", data=images.name, torch=str(torch.__version__), config=c.to_dict())
            logger.log("baseline", **measure_baseline(model, images))

        frozen = None  # rates that are 0; when they change, DistributedDataParallel is built anew
        with StopRequest() as stop, logger, compiled_step(model, transform, masks):
            for step in range(logger.step, logger.total_steps):
                seed_step(c.SEED, step + 1, rank())
                hparams = hyperparameters(c, step, logger.total_steps)
                frozen_now = [name for name in hparams if "_lr" in name and hparams[name] == 0]
                if frozen != frozen_now:
                    frozen = frozen_now
                    set_hyperparameters(optimizer, hparams)
                    wrapped_model = wrap_ddp(model)
                batches = step_indices(len(crops), c, step)  # ACCUMULATE times (B,)
                micro_batches = ((crops.__getitems__(i), *masks.draw()) for i in batches)
                logger.add(train_step(wrapped_model, optimizer, micro_batches, hparams), hparams)

                # Evaluate at the end of an epoch
                epoch, steps_into_epoch = divmod(step + 1, steps_per_epoch)
                if steps_into_epoch == 0:
                    logger.flush()
                    last = step + 1 == logger.total_steps
                    due = last or (c.EVAL_EVERY and epoch % c.EVAL_EVERY == 0)
                    logger.end_epoch(epoch, evaluate(model, images, linear=last) if due else {})

                # Save, and stop if a signal has asked for it
                stop_signal, save_is_due = max_over_processes(stop.signal, logger.save_is_due())
                if steps_into_epoch == 0 or save_is_due or stop_signal:
                    save_run(model, optimizer, logger)
                if stop_signal:
                    print(f"\nstopped and saved at step {logger.step:,}; --resume continues")
                    interrupted = stop_signal == signal.SIGINT
                    raise KeyboardInterrupt if interrupted else SystemExit(128 + int(stop_signal))

        if rank() == 0:
            if logger.owns_folder:
                plot_figures(model.teacher, images, c, logger.history)
                logger.show_figures()
            print_summary(logger)
        return model.eval()


# == Above: the method. Below: evaluation, image operations, masks, data, processes, files, CLI. ==

# ---- Evaluation ----


@torch.no_grad()
def extract_features(model, images, batch_size=512, patches=False, avgpool=False, precision=None):
    """Return fp32 class tokens (N,D), or patch tokens (N,patches,D), in eval mode.

    model: a VisionTransformer, or a DINOv2, for its teacher.
    images: (N,3,H,W), uint8, floats in 0..1, or normalized; uint8 or arrays also
    (N,H,W,3); one (3,H,W) or (H,W,3); PIL's or a list of images, resized to the size of training.
    avgpool: return class token and mean patch token, (N,2*D). precision: see PRECISION; None:
    that of the run; "auto" for other VisionTransformers.
    """
    backbone = getattr(model, "teacher", model)
    device, mode, features = backbone.pixel_mean.device, backbone.training, []
    precision = precision or getattr(backbone, "precision", "auto")
    if isinstance(images, (list, tuple, Image.Image)):
        side = math.isqrt(backbone.patch_embed.num_patches) * backbone.patch_embed.patch_size
        images = [images] if isinstance(images, Image.Image) else images
        images = torch.stack([to_uint8(x, side) for x in images] or [torch.empty(0)])
    elif not torch.is_tensor(images) or not images.is_floating_point():
        images = to_uint8(images)
    images = images.unsqueeze(0) if images.ndim == 3 else images
    fits = images.ndim == 4 and images.shape[1] == 3 and len(images)
    require(fits, f"images must be (N,3,H,W), not {tuple(images.shape)}")
    scale = 255  # of uint8; 0: normalized already
    if images.is_floating_point():
        low, high = images.aminmax()
        outside, found = max(-low, high - 1), f"{low:.4g}..{high:.4g}"
        scale, fits = int(outside <= 0), outside <= 0 or 0.25 < outside < 19  # resizing overshoots
        require(fits, f"floats must be normalized or in 0..1 (clamp pixels), not {found}")
    backbone.eval()
    batch_size = min(batch_size, 2**21 // images[0, 0].numel() or 1)  # fewer of over 64 x 64
    with autocast(device, precision), torch.compiler.set_stance("force_eager"):  # any batch size
        for x in images.split(batch_size):
            x = x.to(device)
            if scale:
                x = (x / scale - backbone.pixel_mean) / backbone.pixel_std
            x = x.to(backbone.pixel_mean.dtype)
            tokens = backbone(x)
            x = torch.cat([tokens[0], tokens[1].mean(1)], 1) if avgpool else tokens[int(patches)]
            features.append(x.to(torch.float32, copy=True))  # a view would keep all tokens
    backbone.train(mode)
    return torch.cat(features)


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07):
    """Return the accuracy, 0..1, of weighted nearest neighbors (DINO, section 3.2)."""
    bank, correct = F.normalize(train_features.float(), dim=1), 0
    for x, y in zip(test_features.split(1024), test_labels.split(1024), strict=True):
        cosine, nearest = (F.normalize(x.float(), dim=1) @ bank.T).topk(min(k, len(bank)))
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = torch.zeros(len(x), int(train_labels.max()) + 1, device=x.device)
        votes.scatter_add_(1, train_labels[nearest], weights)
        correct += int((votes.argmax(1) == y).sum())
    return correct / len(test_labels)


def linear_probe(train_features, train_labels, test_features, test_labels):
    """Return the test accuracy, 0..1, of logistic regression; held-out features choose its L2."""
    mean, std = train_features.mean(0), train_features.std(0) + 1e-6
    classes = int(train_labels.max()) + 1

    def accuracy(penalty, x, y, x_test, y_test):
        weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight, y) + penalty * weight[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return ((x_test @ weight).argmax(1) == y_test).float().mean().item()

    # Standardized, with a column of ones: the last row of weight is the bias
    standard = ((t - mean) / std for t in (train_features, test_features))
    x, x_test = (F.pad(t, (0, 1), value=1.0) for t in standard)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, n = x[order], train_labels[order], len(x) // 5
    penalties = (1e-4, 1e-3, 1e-2, 1e-1)
    best = max(penalties, key=lambda p: accuracy(p, x[n:], y[n:], x[:n], y[:n]))
    return accuracy(best, x, y, x_test, test_labels)


def rank_me(features):
    """Return the effective rank, 1..min(N,D), of features (N,D) (2210.02885, equation 1)."""
    values = torch.linalg.svdvals(features.float().cpu())
    values = values / values.sum().clamp(min=1e-30)
    return torch.special.entr(values).sum().exp().item()


def labeled(images, labels, most):
    """Return batches of the labeled images, and labels; at most `most`, evenly spaced."""
    known = (labels >= 0).nonzero()[:, 0]
    known = known[:: math.ceil(len(known) / most) or 1]
    return (images[i] for i in known.to(images.device).split(512)), labels[known]


def evaluate(model, images, linear=False):
    """Return "knn", "rank" and, if asked for, "linear" of the teacher; {} without labels.

    knn and rank are of the class tokens, linear of class and mean patch tokens, as in DINOv2.
    """
    if images.train_labels is None or images.test_labels is None:
        return {}
    (x, y), (x_test, y_test) = (labeled(*images[i : i + 2], 100_000) for i in (0, 2))
    if not len(y) or not len(y_test):
        return {}
    train, test = (
        torch.cat([extract_features(model, batch, avgpool=True) for batch in batches])
        for batches in (x, x_test)
    )
    require(test.isfinite().all(), f"features are not finite; {REMEDY}")
    x, x_test = (features[:, : features.shape[1] // 2] for features in (train, test))
    scores = {"knn": knn_accuracy(x, y, x_test, y_test), "rank": rank_me(x_test)}
    return {**scores, "linear": linear_probe(train, y, test, y_test)} if linear else scores


def raw_pixel_scores(images, mean, std):
    """Return the k-NN accuracy of at most 32 x 32 pixels, the linear one of at most 8 x 8."""
    data, coarse, side = [], [], images[0].shape[-1]
    for batches, y in (labeled(*images[i : i + 2], 50_000) for i in (0, 2)):
        y = y.cpu() if y.device.type == "mps" else y  # where sides must be divisible
        x = (TF.normalize(x.to(y.device) / 255, mean, std) for x in batches)
        x = torch.cat([F.adaptive_avg_pool2d(x, min(32, side)) for x in x])
        data += [x.flatten(1), y]
        coarse += [F.adaptive_avg_pool2d(x, min(8, side)).flatten(1), y]
    return {"raw_pixels_knn": knn_accuracy(*data), "raw_pixels_linear": linear_probe(*coarse)}


@torch.no_grad()
def target_diagnostics(targets, cross_entropy):
    """Return statistics of image targets (G,B,K): the loss alone does not show a collapse."""
    targets = targets.flatten(0, 1)
    entropy = torch.special.entr(targets).sum(1).mean()
    mean = all_reduce(targets.mean(0)) / world_size()
    used = all_reduce(torch.zeros_like(mean).index_fill(0, targets.argmax(1), 1), "MAX")
    values = {"teacher_entropy": entropy, "mean_entropy": torch.special.entr(mean).sum()}
    prototypes = used.sum() / min(len(mean), len(targets) * world_size())  # of the usable ones
    return {**values, "kl": cross_entropy.detach() - entropy, "prototypes": prototypes}


def collapse_warnings(scores, means, baseline, config):
    """Return a sentence for each sign of a collapse; means: of target_diagnostics."""
    c, log_k = config, math.log(config.PROJECTION_DIM)
    most = min(log_k, math.log(c.GLOBAL_CROPS_NUMBER * c.BATCH_SIZE * world_size()))
    entropy, mean_entropy = means["teacher_entropy"], means["mean_entropy"]
    rank, first_rank = scores["rank"], baseline["rank"]
    signs = {
        f"all images get one target (mean entropy {mean_entropy:.2f})": mean_entropy < 0.5 * most,
        f"the targets are uniform (entropy {entropy:.2f})": entropy > 0.99 * log_k,
        f"the rank fell from {first_rank:.1f} to {rank:.1f}": rank < 0.5 * first_rank,
    }
    return [sign for sign, found in signs.items() if found]


# ---- Image operations, torchvision's with parameters for each image; masks ----


def resize_matrix(start, length, size_in, size_out):
    """Return matrices (...,size_out,size_in) that resize boxes (...), bicubic and antialiased."""
    start, length = start[..., None, None], length[..., None, None]
    pixel = torch.arange(size_in, device=start.device) - start  # (...,1,size_in)
    pixel = pixel.masked_fill((pixel < 0) | (pixel >= length), math.inf)
    scale = length / size_out
    center = (torch.arange(size_out, device=start.device).view(-1, 1) + 0.5) * scale
    width = scale.clamp(min=1)
    u = (1 - ((pixel + 0.5) / width - center / width).abs()).clamp(min=-1)
    near = u.clamp(min=0)
    weights = u * (u + 1) ** 2 + near**2 * (2 - 4 * near)  # Keys's cubic, a = -0.5, times two
    return weights / weights.sum(-1, keepdim=True)


def resized_crop(images, top, left, height, width, flip, size):
    """Crop boxes (n*B,), row n * B + b of image b, from (B,3,H,W); mirror where flip, resize."""
    (B, _, H, W), count = images.shape, len(top)
    starts, lengths = torch.stack([top, left]), torch.stack([height, width])
    weights_y, weights_x = resize_matrix(starts, lengths, max(H, W), size)  # (n*B,size,max(H,W))
    weights_x = torch.where(flip.view(-1, 1, 1), weights_x.flip(1), weights_x)
    x = images.flatten(1, 2)
    x = torch.cat([x @ weights.mT for weights in weights_x[..., :W].split(B)])  # (n*B,3*H,size)
    x = weights_y[..., :H].unsqueeze(1) @ x.view(count, 3, H, size)
    return x.clamp(0, 1)  # bicubic interpolation overshoots


def random_crop_boxes(batch, height, width, scale, device, ratio=(3 / 4, 4 / 3), attempts=10):
    """Draw top, left, height, width, each (B,), like torchvision's RandomResizedCrop."""
    area = height * width * torch.empty(batch, attempts, device=device).uniform_(*scale)
    log_ratio = torch.empty(batch, attempts, device=device).uniform_(*map(math.log, ratio))
    w, h = (area * log_ratio.exp()).sqrt().round(), (area / log_ratio.exp()).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first, fitted = fits.int().argmax(1, keepdim=True), fits.any(1)
    w = torch.where(fitted, w.gather(1, first)[:, 0], min(width, round(height * ratio[1])))
    h = torch.where(fitted, h.gather(1, first)[:, 0], min(height, round(width / ratio[0])))
    y, x = torch.where(fitted, torch.rand(2, batch, device=device), 0.5)
    return (y * (height - h + 1)).floor(), (x * (width - w + 1)).floor(), h, w


def color_jitter(x, changes):
    """Adjust brightness, contrast, saturation and hue of each image in a random order.

    x (B,3,H,W) in 0..1. changes (4,B,1,1,1): added to the hue, and to the factors, which are 1.
    """
    # Hue takes longest, so it is adjusted once, for all; what comes before it is random
    rows = math.ceil(len(x) / 4) * 4
    shuffled = torch.rand(rows, device=x.device).argsort()
    order, indices = torch.rand(3, rows, 1, 1, 1, device=x.device).argsort(0), shuffled % len(x)
    return adjust_colors(x[indices], changes[:, indices], order)[shuffled.argsort()[: len(x)]]


def adjust_colors(x, changes, order):
    """Adjust images (4n,3,H,W), overwriting x; quarter q gets its hue after q other adjustments.

    order (3,4n,1,1,1): of the other three; the last q come before the hue.
    """
    factors, quarter = (1 + changes[:3]).clamp(min=0).gather(0, order), len(x) // 4
    is_contrast, is_brightness = order == 1, order == 0

    def blend(part, i):
        """Blend some images with black, their mean gray, or each pixel's gray."""
        gray = TF.rgb_to_grayscale(x[part])
        base = torch.where(is_contrast[i, part], gray.mean((2, 3), keepdim=True), gray)
        base = base.masked_fill(is_brightness[i, part], 0)
        x[part] = torch.lerp(base, x[part], factors[i, part]).clamp(0, 1)

    for i in range(3):
        blend(slice((3 - i) * quarter, None), i)  # the last quarter thrice, the first never
    x = adjust_hue(x, changes[3])
    for i in range(3):
        blend(slice(0, (3 - i) * quarter), i)
    return x


def adjust_hue(images, shift):
    """Rotate the hue of images (B,3,H,W) by shift (B,1,1,1), -0.5..0.5 of a circle."""
    r, g, b = images.split(1, 1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    safe = chroma.clamp(min=1e-6)
    hue = torch.where(value == g, b - r + 2 * safe, r - g + 4 * safe)
    hue = torch.where(value == r, g - b, hue) / safe + 6 * shift  # in sixths of a circle
    offset = 5 - 2 * torch.arange(3, device=images.device).view(1, 3, 1, 1)  # of r, g, b
    k = (offset + hue) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def generate_random_mask(batch_size, num_patches, mask_ratio, device="cpu"):
    """Return bool (batch_size,num_patches), int(mask_ratio * num_patches) True in each row."""
    counts = torch.full((batch_size,), int(mask_ratio * num_patches), device=device)
    return generate_block_mask(counts, 1, num_patches, blocks=0)


def generate_block_mask(counts, height, width, blocks=10):
    """Mask counts (R,) patches by rectangles (BEiT, 2106.08254, algorithm 1). Bool (R,N).

    Rectangles of 4 patches to a whole count, of aspect ratio 0.3 to 1 / 0.3, are drawn until they
    cover the count; the last one is cut off. If all blocks do not, random patches are added.
    """
    device, rows = counts.device, len(counts)
    random = torch.rand(4, rows, blocks, 1, device=device)
    area = 4 + random[0] * (counts.view(-1, 1, 1) - 4).clamp(min=0)
    aspect = (math.log(0.3) * (1 - 2 * random[1])).exp()
    h = (area * aspect).sqrt().round().clamp(1, height)
    w = (area / aspect).sqrt().round().clamp(1, width)
    top, left = (random[2] * (height - h + 1)).floor(), (random[3] * (width - w + 1)).floor()
    y, x = (torch.arange(size, device=device) for size in (height, width))
    in_rows, in_columns = (y >= top) & (y < top + h), (x >= left) & (x < left + w)
    covered = (in_rows.unsqueeze(3) & in_columns.unsqueeze(2)).flatten(2)  # (R,blocks,N)
    # Order patches by the first block that covers them, the others last and at random
    order = blocks + torch.rand(rows, height * width, device=device)
    number = torch.arange(blocks, device=device).view(-1, 1)
    order = torch.where(covered, number, order.unsqueeze(1)).amin(1) if blocks else order
    mask = order.argsort(dim=1, stable=True).argsort(1) < counts.unsqueeze(1)
    # The last block's upper rows come first: turn half of the masks upside down
    return torch.where(torch.rand(rows, 1, device=device) < 0.5, mask.flip(1), mask)


def masked_patch_counts(crops, num_patches, mask_ratio, mask_prob):
    """Return each crop's number of masked patches: 0, or 1/3 to 5/3 of ratio / prob (0.1..0.5)."""
    n = round(crops * mask_prob) if mask_ratio else 0
    ratios = [mask_ratio / mask_prob * (1 / 3 + 4 / 3 * (i + 0.5) / n) for i in range(n)]
    counts = [min(num_patches, max(1, round(ratio * num_patches))) for ratio in ratios]
    return counts + [0] * (crops - n)


class MaskGenerator:
    """Masks (R,N) of a batch's global crops, and the indices (M,) of what is masked.

    Each batch has the same M, known without waiting for the device.
    """

    def __init__(self, config):
        c, self.side = config, config.GLOBAL_CROP_SIZE // config.PATCH_SIZE
        crops, self.blocks = c.GLOBAL_CROPS_NUMBER * c.BATCH_SIZE, 10 * (c.MASK_KIND == "block")
        counts = masked_patch_counts(crops, self.side**2, c.MASK_RATIO, c.MASK_PROB)
        self.counts, self.num_masked = torch.tensor(counts, device=c.DEVICE), sum(counts)

    def draw(self):
        counts = self.counts[torch.rand(self.counts.shape, device=self.counts.device).argsort()]
        mask = generate_block_mask(counts, self.side, self.side, self.blocks)
        indices = mask.flatten().byte().argsort(descending=True, stable=True)
        return mask, indices[: self.num_masked]


# ---- Data: objects, files and folders become Images ----


class Images(NamedTuple):
    """Images uint8 (N,3,H,W), labels int64 (N,), -1 where unknown; None where there are none."""

    train_images: torch.Tensor
    train_labels: torch.Tensor = None
    test_images: torch.Tensor = None
    test_labels: torch.Tensor = None
    name: str = "your images"
    obstacle: str = "no training labels"  # why nothing can be evaluated
    classes: tuple = ()  # original labels, by number


def as_images(dataset, size=None, train_images=0, validation_images=0):
    """Return a dataset as Images, resized and center-cropped to size, classes numbered from 0.

    dataset: images, (images, labels), (images, labels, test_images, test_labels), a pair of
    training and test datasets, or a mapping with train and test, or x_train, y_train, x_test and
    y_test. Images are an array or tensor (N,3,H,W), (N,H,W,3) or gray (N,H,W), uint8 or floats in
    0..1; or a sequence of paths, of images, of (image, label), or of rows with image and label.
    A label is an integer from 0 on or a string; -1 or None: unknown.
    train_images, validation_images: see Config; no others are read.
    """
    name = dataset.name if isinstance(dataset, Images) else Images._field_defaults["name"]
    (x, y), (x_test, y_test) = find_splits(dataset)
    x, x_test = as_sequence(x), x_test if x_test is None else as_sequence(x_test)
    # torchvision's datasets have class names, which fit only their own labels
    names = class_names(x if y is None else dataset)
    test_names = class_names(x_test) if y_test is None else names
    chosen, held_out = choose_images(len(x), train_images, validation_images)
    if held_out:
        x_test, y_test, test_names = x, y, names
    x, y, levels = read_split(x, y, size, chosen)
    if x_test is not None:
        x_test, y_test, _ = read_split(x_test, y_test, size, held_out, levels)
        if names and test_names and names != test_names:  # one number, two classes
            y, y_test = name_labels(y, names), name_labels(y_test, test_names)
    y_test = [] if x_test is None else y_test
    y, y_test, obstacle, classes = number_labels(y, y_test, bool(held_out))
    return Images(x, y, x_test, y_test, name, obstacle, tuple(name_labels(classes, names)))


def as_sequence(images):
    """Return images, refused if they have no length and [i]; a list of a column of pandas."""
    is_column = getattr(images, "ndim", 0) == 1 and not torch.is_tensor(images)
    images = images.tolist() if is_column else images  # whose [0] need not be the first
    with input_errors("the dataset", "is not a sequence of images or (image, label)"):
        require(len(images), "one of its parts is empty")
        images[0]
    return images


def choose_images(total, train_images, validation_images):
    """Return the indices of a training subset, or None for all, and of those held out."""
    rest = total - validation_images
    require(rest > 0, f"VALIDATION_IMAGES ({validation_images}) must be below the {total} images")
    count = min(train_images or rest, rest)
    if count == total:
        return None, []
    # At random: files are sorted by class. The held-out ones are always the same
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return [i.sort().values.tolist() for i in (order[:count], order[rest:])]


def class_names(dataset):
    while isinstance(dataset, torch.utils.data.Subset) and not hasattr(dataset, "classes"):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", ())
    return [*names] if isinstance(names, (list, tuple)) else []


def name_labels(labels, names):
    """Return numbers, or None, as names; labels as they are, if one has no name."""
    known = all(i is None or (isinstance(i, int) and i < len(names)) for i in labels)
    return [i if i is None else names[i] for i in labels] if known else labels


SPLITS = ("train", "test", "val", "valid", "validation")


def names_of_split(split):
    """Return names of a split's images, and of its labels, in a mapping, .npz or .npy files."""
    return (f"x_{split}", f"{split}_images", split), (f"y_{split}", f"{split}_labels")


def find_splits(dataset):
    """Return (images, labels) of training and test, as given or None.

    Of several test splits, the first whose labels are all in training; else one with labels.
    """
    splits = as_splits(dataset)
    train = next((x for x in names_of_split("train")[0] if x in splits), None)
    if train is None:  # only a mapping can lack it
        names = ", ".join(map(str, dataset))
        raise InputError(f"it needs x_train, train_images or train, and has {names}")

    def unfit(name):
        labels = known_labels(*splits[name])
        return not labels, splits[train][1] is not None and not labels <= known

    tests = [x for split in SPLITS[1:] for x in names_of_split(split)[0] if x in splits]
    if len(tests) > 1:
        known = known_labels(*splits[train])
        tests.sort(key=unfit)
    unused = [f"{x} ({len(splits[x][0]):,} images)" for x in splits if x not in (train, *tests[:1])]
    if unused:
        print(f"not used: {', '.join(unused)}", flush=True)
    return splits[train], splits[tests[0]] if tests else (None, None)


def as_splits(dataset):
    """Return a dataset as {one of the names above: (images, labels)}."""
    require(not isinstance(dataset, (str, Path)), f"a path, {dataset}, is a DATASET of Config")
    if isinstance(dataset, Mapping):
        data = {str(key).casefold(): value for key, value in dataset.items() if value is not None}
        splits = {}
        for names, label_names in map(names_of_split, SPLITS):
            names = [name for name in names if name in data]
            label_names = [name for name in label_names if names and name in data][:1]
            labels = [data.pop(name) for name in label_names]
            splits |= {name: as_pair(data.pop(name), *labels) for name in names}
        if data and splits:
            print(f"not used: {', '.join([*data][:5])}", flush=True)
        return splits
    parts = dataset[:4] if isinstance(dataset, Images) else dataset
    if isinstance(parts, list) and all(isinstance(x, torch.utils.data.Dataset) for x in parts):
        parts = tuple(parts) or parts  # of random_split
    if not isinstance(parts, tuple):
        return {"train": (parts, None)}
    require(len(parts) in (2, 4), f"a dataset is a tuple of 2 or 4, not {len(parts)}")
    if len(parts) == 2 and are_labels(parts[1]):
        return {"train": parts}
    train, test = (parts[:2], parts[2:]) if len(parts) == 4 else map(as_pair, parts)
    return {"train": train, "test": test}


def as_pair(images, labels=None):
    return images if isinstance(images, tuple) and len(images) == 2 else (images, labels)


def known_labels(images, labels):
    """Return the set of a split's known labels, case-folded; for rows, the first one's."""
    if labels is None:
        labels = [split_item(images[0])[1]] if len(images) else ()
    return {str(label).casefold() for label in map(plain_label, labels) if label is not None}


def are_labels(values):
    """Return whether the second part of a tuple is labels, and not a dataset."""
    if not hasattr(values, "__getitem__"):
        return values is None
    first = next(iter(values), ())
    if isinstance(first, str):
        return Path(first).suffix.lower() not in IMAGE_SUFFIXES
    if isinstance(first, (int, float)) or str(first) in UNKNOWN:
        return True
    if isinstance(values, tuple):
        return getattr(first, "ndim", 1) == 0
    return getattr(first, "ndim", 2) < 2 or (isinstance(first, list) and len(first) == 1)


def read_split(images, labels, size, indices=None, levels=None):
    """Return images uint8 (N,3,H,W), a list of labels, and levels (see stack_images).

    indices: of the images to read; None: all.
    """
    labels, is_array = check_split(images, labels), isinstance(images, (np.ndarray, torch.Tensor))
    if indices:
        images = images[indices] if is_array else torch.utils.data.Subset(images, indices)
        labels = labels and [labels[i] for i in indices]
    count = len(images)
    if is_array:
        x, labels = images[:, None] if images.ndim == 3 else images, labels or [None] * count
        as_is = to_uint8(x[:1], size).shape == to_uint8(x[:1]).shape
        if as_is and x.dtype in (np.uint8, torch.uint8):
            return to_uint8(x), labels, levels  # a view: it may be memory-mapped
        parts = (to_uint8(x[i : i + 256], size) for i in range(0, count, 256))
        items = zip((image for part in parts for image in part), labels, strict=True)
    else:
        items = read_items(images, labels, size)
    disable = True if rank() else None  # None: only on a terminal
    return stack_images(tqdm(items, "reading", count, False, disable=disable), count, levels)


def check_split(images, labels):
    """Return the labels as plain values, or None for None; refuse what is no batch of images."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        shape = tuple(images.shape)
        single = len(shape) == 3 and (shape[0] in (1, 3) or shape[2] < 5)
        wanted = f"images must be (N,3,H,W), (N,H,W,3) or gray (N,H,W), not {shape}"
        wanted += ", which may be one image: add an axis" * single
        require(len(shape) in (3, 4) and not single, wanted)
    if labels is None:
        return None
    labels = [*map(plain_label, labels.tolist() if hasattr(labels, "tolist") else labels)]
    require(len(labels) == len(images), f"there are {len(images)} images, but {len(labels)} labels")
    return labels


def read_items(dataset, labels, size):
    """Yield image and label of each item; of files, leave out and report the unreadable ones."""
    are_files, left_out = isinstance(split_item(dataset[0])[0], (str, Path)), {}

    def read(i):
        image = None
        try:
            item, label = split_item(dataset[i])
            label, image = labels[i] if labels else plain_label(label), item
            is_open = isinstance(image, ImageFile.ImageFile) and image.tile and not image.tell()
            if is_open and image.format in FORMATS and os.path.isfile(image.filename):
                image = os.fsdecode(image.filename)  # the object would keep its decoded pixels
            return read_image(image, size), label
        except Exception as error:  # Pillow raises many kinds
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            require(are_files and image is not None, f"item {i} of the dataset: {reason}")
            file = "/".join(Path(str(image)).parts[-2:])
            left_out.setdefault(re.sub(r" ?(\(.*?\)|'.*'|\d+)", "", reason), []).append(file)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(dataset), 1024):  # in parts, to limit memory
            numbers = range(start, min(start + 1024, len(dataset)))
            results = pool.map(read, numbers) if are_files else map(read, numbers)
            yield from (item for item in results if item)
    reasons = sorted(left_out.items())
    text = "; ".join(f"{len(n)} {reason} ({', '.join(sorted(n)[:3])})" for reason, n in reasons)
    count = sum(map(len, left_out.values()))
    require(count < len(dataset), f"no readable image: {text}")
    if count and rank() == 0:
        print(f"WARNING: {count} files are left out: {text}", file=sys.stderr)


def split_item(item):
    """Return image and label of (image,), (image, label), or a row as Hugging Face has it."""
    if not isinstance(item, Mapping):
        return (*item, None)[:2] if isinstance(item, tuple) else (item, None)
    images = [key for key in item if key in ("image", "img")]
    labels = [key for key in item if key == "label"] or [key for key in item if "label" in key]
    wanted = f"of {', '.join(item)}, one must be image or img, and at most one a label"
    require(len(images) == 1 and len(labels) < 2, wanted)
    return item[images[0]], item[labels[0]] if labels else None


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # EPS would start a program


def read_image(image, size=None):
    """Return to_uint8 of one image or file; of more than 8 bits, floats (1,H,W) as they are."""
    if isinstance(image, (str, Path)):
        with Image.open(image, formats=FORMATS) as file:
            if size:  # decode a large JPEG at a half, a quarter or an eighth of its size
                file.draft(None, (2 * size, 2 * size))
            return read_image(file, size)
    if not isinstance(image, Image.Image) or image.mode[0] not in "IF":
        x = to_uint8(image, size)
        require(x.ndim == 3, f"{tuple(x.shape)} is not one image; images and labels are a tuple")
        return x
    x = torch.from_numpy(np.array(ImageOps.exif_transpose(image), np.float32)).unsqueeze(0)
    require(x.isfinite().any(), "no pixel is a number")
    low, high = x[x.isfinite()].aminmax()
    return resize_square(x.nan_to_num(low.item(), high.item(), low.item()), size)


def to_uint8(image, size=None):
    """Return an image or a batch as uint8 (...,3,H,W), resized and center-cropped to size.

    PIL's, or an array or tensor: (H,W), (...,3,H,W), (...,H,W,3), or with one channel; uint8 or
    floats in 0..1.
    """
    if isinstance(image, Image.Image):
        require(image.mode[0] not in "IF", f"mode {image.mode} has over 8 bits; use RGB")
        image = TF.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    with input_errors("images", "must be PIL's, or arrays or tensors of uint8 or floats in 0..1"):
        is_array = isinstance(image, (list, tuple)) or hasattr(image, "__array__")
        require(is_array, f"not {type(image).__name__}")  # NumPy would read a whole data set
        if isinstance(image, np.memmap):  # not copied; torch warns that it cannot be written to
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = torch.from_numpy(image)
        elif not torch.is_tensor(image):
            image = torch.from_numpy(np.require(image, None, "CW"))
    x = image.unsqueeze(0) if image.ndim == 2 else image
    if x.ndim > 2 and x.shape[-3] not in (1, 3) and x.shape[-1] in (1, 3):
        x = x.movedim(-1, -3)
    fits = x.ndim in (3, 4) and x.shape[-3] in (1, 3) and x.numel()
    wanted = "images must be (H,W), (3,H,W) or (H,W,3), or batches (N,3,H,W) or (N,H,W,3)"
    require(fits, f"{wanted}, not {tuple(x.shape)}")
    if x.is_floating_point():
        low, high = x.aminmax()
        require(low >= 0 and high <= 1, f"floats must be in 0..1, not {low:.4g}..{high:.4g}")
        x = (x * 255).round().to(torch.uint8)
    require(x.dtype == torch.uint8, f"images must be uint8 or floats in 0..1, not {x.dtype}")
    return resize_square(x.expand(*x.shape[:-3], 3, -1, -1), size)


def resize_square(x, size):
    if size is None or x.shape[-2:] == (size, size):
        return x
    square = TF.center_crop(x, min(x.shape[-2:]))
    return TF.resize(square, [size, size], TF.InterpolationMode.BICUBIC)


def stack_images(items, count, levels=None):
    """Return the images of items, uint8 (n,3,H,W), n <= count, their labels, and levels.

    items: image and label. An image is uint8 (3,H,W) or, of more than 8 bits, floats (1,H,W), of
    which levels become 0 and 255: 0.1 % of all values are below and above.
    """
    images, labels, floats = None, [], {}
    for i, (x, label) in enumerate(items):
        if images is None:
            shape = (count, 3, *x.shape[1:])
            need = f"need {math.prod(shape) / 1e9:,.1f} GB; lower IMAGE_SIZE or TRAIN_IMAGES"
            with input_errors(f"{count:,} images", need):
                images = torch.empty(shape, dtype=torch.uint8)
        sizes = tuple(images.shape[2:]), tuple(x.shape[1:])
        require(sizes[0] == sizes[1], f"images have {sizes[0]} and {sizes[1]} pixels: give a size")
        if x.is_floating_point():
            floats[i] = x
        else:
            images[i] = x
        labels.append(label)
    if floats:
        # An odd step, so that all columns are sampled
        step = math.ceil(sum(x.numel() for x in floats.values()) / 1e7) | 1
        values = torch.cat([x.flatten()[::step] for x in floats.values()]).numpy()
        low, high = levels = levels or np.quantile(values, (0.001, 0.999)).tolist()
        for i, x in floats.items():
            images[i] = ((x - low) / max(high - low, 1e-9) * 255).round().clamp(0, 255)
    return images[: len(labels)], labels, levels


UNKNOWN = ("None", "-1", "nan", "<NA>")  # labels, as text


def plain_label(label):
    """Return a label as an integer from 0 on, a string, or None for an unknown one."""
    label = label.tolist() if hasattr(label, "tolist") else label
    label = label[0] if isinstance(label, list) and len(label) == 1 else label  # MedMNIST
    label = int(label) if isinstance(label, float) and label.is_integer() else label
    known = isinstance(label, str) or (isinstance(label, int) and label >= 0)
    wanted = "an integer from 0 on, a string, or -1 for unknown; images alone will do"
    require(known or str(label) in UNKNOWN, f"label {str(label)[:40]} must be {wanted}")
    return label if known else None


def number_labels(labels, test_labels, held_out=False):
    """Return labels as tensors from 0 on, or None; what prevents an evaluation, or ""; classes.

    held_out: of a rare class, training may have none; then those test labels become unknown.
    """
    parts, known = (labels, test_labels), {*labels} - {None}
    folded = {label.casefold() if isinstance(label, str) else label for label in known}
    if len(folded) == len(known):  # upper and lower case are one, unless both are in training
        parts = [[i.casefold() if isinstance(i, str) else i for i in part] for part in parts]
        known = folded
    classes = sorted(known, key=lambda label: (isinstance(label, str), label))
    others, unknown = {*parts[1]} - {None, *classes}, {None}
    if held_out and others:
        lost = sum(label in others for label in parts[1])
        print(f"not evaluated: {lost:,} held-out images of classes training lacks")
        others, unknown = (), {None, *others}
    number = {label: i for i, label in enumerate(classes)}
    y, y_test = (torch.tensor([number.get(label, -1) for label in part]) for part in parts)
    if len(classes) < 2:
        y, obstacle = None, Images._field_defaults["obstacle"]
        obstacle = f"all training labels are {classes[0]}" if classes else obstacle
    elif not {*parts[1]} - unknown:
        obstacle = "no labeled test images; VALIDATION_IMAGES can hold some out of training"
    else:
        names = ", ".join(sorted(map(str, others))[:3])
        obstacle = f"test labels {names} are not among the {len(classes)} of training"
        obstacle = obstacle if others else ""
    return y, None if obstacle else y_test, obstacle, tuple(classes)


SHAPES = "disc ring square frame triangle plus star crescent bow-tie ell".split()


def is_inside(label, x, y):
    """Return whether points are in the shape of a class, which is about 2 wide. y points down."""
    r, larger, smaller = np.hypot(x, y), np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    shapes = {
        "disc": lambda: r < 0.9,
        "ring": lambda: (r < 1) & (r > 0.6),
        "square": lambda: larger < 0.8,
        "frame": lambda: (larger < 0.85) & (larger > 0.5),
        "triangle": lambda: (y < 0.7) & (y > 1.9 * abs(x) - 0.9),
        "plus": lambda: (smaller < 0.28) & (larger < 0.95),
        "star": lambda: r < 0.4 + 0.6 * (2 * abs(np.arctan2(x, -y) * 2.5 / np.pi % 1 - 0.5)) ** 2,
        "crescent": lambda: (r < 1) & (np.hypot(x - 0.5, y) > 0.8),
        "bow-tie": lambda: (abs(y) < 0.9 * abs(x)) & (abs(x) < 0.9),
        "ell": lambda: (larger < 0.85) & ~((x > -0.2) & (y < 0.2)),
    }
    return shapes[SHAPES[label]]()


def make_shapes(count, size=32, seed=0, masks=False):
    """Draw ten shapes: images uint8 (count,3,size,size), labels int64 (count,).

    Classes differ only in shape. masks: also return where the shape is, bool (count,size,size).
    """
    if count > 2048:  # in parts: all at once need too much memory
        counts = [min(2048, count - i) for i in range(0, count, 2048)]
        with ThreadPoolExecutor(4) as pool:
            seeds = [(seed, i) for i in range(len(counts))]
            parts = list(pool.map(make_shapes, counts, repeat(size), seeds, repeat(masks)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    radius = rng.uniform(0.2, 0.4, (count, 1, 1))  # as a fraction of the side
    center = [rng.uniform(radius, 1 - radius) for _ in "xy"]
    tilt = rng.uniform(-np.pi / 12, np.pi / 12, (count, 1, 1))
    grid = (np.arange(3 * size) + 0.5) / (3 * size)  # 3 x 3 samples per pixel
    inside = np.zeros((count, 3 * size, 3 * size), bool)
    for label in range(10):
        i = labels == label
        x, y = (grid - center[0][i]) / radius[i], (grid[:, None] - center[1][i]) / radius[i]
        sin, cos = np.sin(tilt[i]), np.cos(tilt[i])
        inside[i] = is_inside(label, cos * x + sin * y, cos * y - sin * x)
    coverage = inside.reshape(count, size, 3, size, 3).mean((2, 4))[:, None]  # (count,1,size,size)
    color, start, end = rng.uniform(0, 1, (3, count, 3, 1, 1))  # of shape and background
    middle = (start + end) / 2
    too_close = np.linalg.norm(color - middle, axis=1, keepdims=True) < 0.5
    color = np.where(too_close, (middle + 0.5) % 1, color)
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1, 1))
    position = (np.arange(size) + 0.5) / size - 0.5
    slope = 0.5 + 0.7 * (np.cos(angle) * position + np.sin(angle) * position[:, None])
    pixels = coverage * color + (1 - coverage) * (start + slope * (end - start) * 0.5)
    pixels = (pixels + rng.normal(0, 0.03, pixels.shape)).clip(0, 1)
    images = torch.from_numpy((pixels * 255).round().astype(np.uint8))
    result = (images, torch.from_numpy(labels), torch.from_numpy(coverage[:, 0] >= 0.5))
    return result if masks else result[:2]


def load_cifar(name, root):
    """Return CIFAR-10 or CIFAR-100; torchvision downloads what is not in root."""
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # or a dead connection blocks forever
    try:
        with input_errors(name, f"is not in DATA_PATH ({root!r}); put {source.filename} there"):
            try:
                splits = [source(root, train) for train in (True, False)]
            except RuntimeError:  # missing or incomplete: one process downloads, the others wait
                Path(root).mkdir(parents=True, exist_ok=True)
                with FileLock(Path(root, ".lock")):
                    splits = [source(root, train, download=True) for train in (True, False)]
    finally:
        socket.setdefaulttimeout(timeout)
    x, x_test = (torch.from_numpy(split.data).permute(0, 3, 1, 2) for split in splits)
    y, y_test = (torch.tensor(split.targets) for split in splits)
    return Images(x, y, x_test, y_test, name, classes=tuple(splits[0].classes))


def load_arrays(path):
    """Return the arrays of a .npz, or of a .npy and its companions, memory-mapped."""
    path = Path(path)
    with input_errors(path, "is not a .npz or .npy of numbers"):
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        names = {name for split in SPLITS for names in names_of_split(split) for name in names}
        files = [f for f in path.parent.glob("*.[nN][pP][yY]") if f.stem.casefold() in names]
        files = files if path.stem.casefold() in names_of_split("train")[0] else []
        return {f.stem: np.load(f, "r") for f in files} or {"x_train": np.load(path, "r")}


IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe")
TEXT_SUFFIXES = ".csv .tsv .json .txt .md .xml .yaml .html .py .mat .pdf .zip".split()


def find_files(root):
    """Yield all files below root, sorted, without hidden ones; follow links that lead out of it."""
    seen = {root}
    for folder, names, files in os.walk(root, onerror=print, followlinks=True):
        places = {name: Path(folder, name).resolve() for name in sorted(names) if name[0] != "."}
        names.clear()  # os.walk descends into what is left here
        for name, place in places.items():
            inside = root in place.parents or place in root.parents
            if place not in seen and not (inside and Path(folder, name).is_symlink()):
                seen.add(place)
                names.append(name)
        yield from (Path(folder, name) for name in sorted(files) if name[0] != ".")


def load_folder(path):
    """Return paths and labels, of train/<class>/ and test/<class>/, or of <class>/.

    Two folders are splits if their names differ in train(ing) and test, val or the like alone; or
    else all folders of a folder, if each has such a word in its name.
    """
    root = Path(path).resolve()
    files = [*find_files(root)]
    all_images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    known = (*IMAGE_SUFFIXES, *TEXT_SUFFIXES * bool(all_images))
    kinds = [file.suffix.lower() or file.name for file in files]
    kinds = Counter(kind for kind in kinds if kind not in known)
    others = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    is_cifar = {"data_batch_1", "meta"} & {*kinds}  # of 10 or 100 classes
    hint = "; for CIFAR use --dataset cifar10 (or 100) --data-path" if is_cifar else ""
    require(all_images, f"no readable image in {path}, but {others or 'no files'}{hint}")

    images = without_masks(all_images)
    root = Path(os.path.commonpath([file.parent for file in images]))
    deeper = [file.parent for file in images if file.parent != root] or [root]
    found, splits = find_split_folders(images) or {"train": [root]}, {}
    below = {folder: [] for folders in found.values() for folder in folders}
    for file in images:
        folder = next((parent for parent in file.parents if parent in below), None)
        below.get(folder, []).append(file)
    for name, folders in found.items():
        paths, labels = splits[name] = [], []
        for folder in folders:
            top = folder if folder != root else Path(os.path.commonpath(deeper))
            paths += below[folder]
            labels += folder_labels(top, below[folder])
    used = {f: y for pair in splits.values() for f, y in zip(*pair, strict=True)}
    unused = [f for f in all_images if f not in used]
    loose = [f for f, y in used.items() if y is None]
    for text, some, total in ("used", unused, all_images), ("in a class folder", loose, used):
        if 0 < len(some) < len(total):
            print(f"not {text}: {len(some):,} images, such as {some[0]}", flush=True)
    if others:
        print(f"no images: {others}", flush=True)
    return splits


def find_word(folder, words):
    """Return a folder's name with * for one of some words (not in "trainer"), or None."""
    pattern = rf"(?<![a-z])({words})(?=set|image|data|[^a-z]|$)"
    name, count = re.subn(pattern, "*", folder.name.lower())
    return name if count else None


def find_siblings(files):
    """Return {folder: the folders in it that are above files, sorted}."""
    folders, found = {file.parent for file in files}, {}
    for folder in sorted(folders.union(*(folder.parents for folder in folders))):
        found.setdefault(folder.parent, []).append(folder)
    return found


def without_masks(files):
    """Return files without those of masks/ or the like, where only such and images/ are beside."""
    words = "(mask|label|annotation|trimap)s?|segmentations?(class|object)?|ground_?truth|gt|depth"
    masks, folders = set(), {file.parent for file in files}
    for siblings in find_siblings(files).values():
        images = [find_word(f, "images?|imgs?|jpegimages") for f in siblings]
        names = {f: find_word(f, words) for f in siblings}
        if all(map(any, zip(images, names.values(), strict=True))):
            masks.update(f for f, name in names.items() if name and name in images)
    folders = {f for f in folders if masks.isdisjoint((f, *f.parents))}
    return [file for file in files if file.parent in folders]


def find_split_folders(files):
    """Return {"train": folders, "test" or "val" or both: folders}, by their names, or {}."""
    words = {"train": "train(ing|val)?", "test": "test(ing|s)?"}
    words["val"] = "val(id(ation)?)?|eval(uation)?|dev"
    found = {}
    for parent, folders in find_siblings(files).items():
        names = {s: {find_word(f, words[s]): f for f in folders} for s in words}
        if "*1" in names["test"]:  # test1/ beside train/
            names["test"].setdefault("*", names["test"]["*1"])
        alike = [n for s in ("test", "val") for n in names[s] if n and n in names["train"]]
        kinds = {f: s for s in reversed(words) for f in folders if find_word(f, words[s])}
        if alike:
            found[parent] = {s: [names[s][alike[0]]] for s in words if alike[0] in names[s]}
        elif len(kinds) == len(folders) and {"train"} < {*kinds.values()}:
            some = [s for s in words if s in kinds.values()]
            found[parent] = {s: [f for f in folders if kinds[f] == s] for s in some}
    least = min((len(parent.parts) for parent in found), default=0)
    highest = [splits for parent, splits in found.items() if len(parent.parts) == least]
    tests = [f for splits in highest for split, (f, *_) in splits.items() if split != "train"]
    names = ", ".join(sorted("/".join(f.parts[-2:]) for f in tests)[:4])
    require(len(highest) < 2, f"several splits: {names}; give a folder with one of them")
    return highest[0] if highest else {}


def folder_labels(split, files):
    """Return the class of each file, or None: its folder, or what tiny-imagenet's table says."""
    table = split / "val_annotations.txt"
    if table.is_file():
        rows = [line.split() for line in table.read_text(errors="replace").splitlines()]
        rows = {row[0]: row[1] for row in rows if len(row) > 1}
        return [rows.get(file.name) for file in files]
    n = len(split.parts)
    parts = [file.parts[n:] if file.parts[:n] == split.parts else ("",) for file in files]
    for _ in range(2):  # skip images/ and a repeated name of the split
        names = {part[0] for part in parts if len(part) > 1}
        if names and names <= {split.name, "images"}:
            parts = [part[1:] if len(part) > 1 else part for part in parts]
    return [part[0] if len(part) > 1 else None for part in parts]


def load_images(config):
    """Return the dataset (see as_images) that config.DATASET names."""
    name, size = config.DATASET, config.IMAGE_SIZE
    if name in ("cifar10", "cifar100"):
        return load_cifar(name, config.DATA_PATH)
    if name == "auto":
        try:
            return load_cifar("cifar10", config.DATA_PATH)
        except InputError as error:
            line, name = "!" * 80, "shapes (no CIFAR-10)"
            warning = f"WARNING: {error}.\nTraining on the BUILT-IN SHAPES: no CIFAR-10 numbers."
            print(line, warning, line, sep="\n", file=sys.stderr)
    if name in ("shapes", "shapes (no CIFAR-10)"):
        require(size <= 64, f"IMAGE_SIZE ({size}) of shapes must be at most 64")
        count = 19456
        if config.TRAIN_IMAGES and not config.VALIDATION_IMAGES:  # draw no more than that
            count = min(count, config.TRAIN_IMAGES)
        splits = *make_shapes(count, size, seed=0), *make_shapes(2048, size, seed=1)
        return Images(*splits, name, classes=SHAPES)
    if Path(name).is_dir():
        return load_folder(name)
    known = "a folder, a .npz or .npy file, auto, cifar10, cifar100 or shapes"
    is_file = Path(name).is_file() and name.lower().endswith((".npz", ".npy"))
    require(is_file, f"DATASET ({name!r}) must be {known}")
    return load_arrays(name)


def prepare_images(config, dataset=None):
    """Return dataset, or DATASET, as Images on DEVICE."""
    c, name = config, "the dataset"
    if dataset is None:
        print(f"loading {c.DATASET[-60:]} ...", flush=True)
        dataset, name = load_images(c), f"DATASET ({c.DATASET!r})"
    with input_errors(name, "cannot be used"):
        images = as_images(dataset, c.IMAGE_SIZE, c.TRAIN_IMAGES, c.VALIDATION_IMAGES)
    if isinstance(dataset, dict) and name != "the dataset":
        images = images._replace(name=Path(c.DATASET).resolve().name)
    count = len(images.train_images)
    most, least = max_over_processes(count, -count)
    require(most == -least, f"processes have {-least:.0f} to {most:.0f} training images")
    x, y, x_test, *_ = images
    names = ", ".join(map(str, images.classes[:3])) + ", ..." * (len(images.classes) > 3)
    classes = "" if y is None else f" of {len(images.classes)} classes ({names})"
    tests = 0 if x_test is None else len(x_test)
    print(f"train {count:,} images{classes}, test {tests:,}", flush=True)
    # On the device, unless they would fill a GPU's memory: then batches are copied
    device, size = torch.device(c.DEVICE), x.numel() + (0 if x_test is None else x_test.numel())
    large = device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2
    if large:
        print(f"{size / 2**30:.1f} GiB of images stay in the host's memory", flush=True)
    return Images(
        *(t.to(device) if torch.is_tensor(t) and (t.ndim == 1 or not large) else t for t in images)
    )


def describe_images(images):
    """Return the training images' name, count and, for 64 of them, means of the pixels."""
    x = images.train_images
    places = torch.linspace(0, len(x) - 1, 64, dtype=torch.double).long()
    sample = x[places].float().mean((1, 2, 3))
    return {"name": images.name, "count": len(x), "means": sample.tolist()}


def channel_mean_std(images):
    """Return the channels' mean and standard deviation, in 0..1, of uint8 images (N,3,H,W)."""
    images = images[:: math.ceil(images.numel() / 2**28)]  # a sample of very many
    channels = images.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(c.int(), minlength=256).cpu() for c in channels]).double()
    level = torch.arange(256, dtype=torch.double) / 255  # counts (3,256) are small and exact
    mean = (counts * level).sum(1) / counts.sum(1)
    variance = (counts * (level - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return mean.tolist(), variance.sqrt().clamp(min=1e-3).tolist()


# ---- Processes, precision, randomness ----


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Return this process's number; 0 writes files and prints."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(tensor, operation="SUM"):
    """Sum or maximum ("MAX") over all processes, in place, without gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


class AllReduceSum(torch.autograd.Function):
    """all_reduce with a gradient: what one process adds changes the loss of all."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.clone(memory_format=torch.contiguous_format))


def all_gather_rows(x):
    """Return the rows (B,D) of all W processes, (W*B,D), with gradient."""
    if world_size() == 1:
        return x
    before, after = rank() * len(x), (world_size() - 1 - rank()) * len(x)
    return AllReduceSum.apply(F.pad(x, (0, 0, before, after)))


def max_over_processes(*numbers):
    """Return the largest of each number, so that all processes take the same branch."""
    return all_reduce(torch.tensor(numbers, dtype=torch.double), "MAX").tolist()


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of the last dimension, by the batches of all processes."""

    def __init__(self, features):
        super().__init__(features, track_running_stats=False)

    def forward(self, x):
        rows = x.flatten(0, -2)
        if world_size() == 1:
            return super().forward(rows).view_as(x) if len(rows) > 1 else x
        rows = rows.float()
        variance, mean = (t.double() for t in torch.var_mean(rows, 0, correction=0))
        # In double precision: the difference of two large numbers follows
        moments = torch.stack([mean, variance + mean.square()])
        mean, square = AllReduceSum.apply(moments) / world_size()
        scale = (square - mean.square() + self.eps).rsqrt()
        return ((rows - mean.float()) * scale.float() * self.weight + self.bias).view_as(x)


@contextmanager
def setup_processes(config):
    """Join torchrun's processes, if any; yield config with this one's DEVICE."""
    require(isinstance(config, Config), f"config must be a Config, not {type(config).__name__}")
    has_board = not config.TENSORBOARD or find_spec("tensorboard")
    require(has_board, "TENSORBOARD needs a package: pip install tensorboard")
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or dist.is_initialized():
        yield config
        return
    device, backend = torch.device(config.DEVICE), "gloo"
    require(device.type != "mps", "DEVICE ('mps') is for one process; add --device cpu")
    if device.type == "cuda":  # gloo: for numbers on the host
        index = int(os.environ.get("LOCAL_RANK", device.index or 0))
        device, backend = torch.device("cuda", index), "cpu:gloo,cuda:nccl"
    config = Config(**{**config.to_dict(), "DEVICE": str(device)})
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    with open(os.devnull, "w") as null, redirect_stdout(null) if rank() else nullcontext():
        yield config
    dist.destroy_process_group()


def wrap_ddp(model):
    """With several processes, wrap model: they average gradients of what is trained now."""
    if world_size() == 1:
        return model
    unused = not model.config.MASK_RATIO  # the patch head, without masks
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    wrapped.broadcast_buffers = False  # they are equal
    return wrapped


def can_compile(config):
    """Return whether COMPILE pays and works: on CUDA with Triton."""
    return config.COMPILE and torch.device(config.DEVICE).type == "cuda" and has_triton()


@contextmanager
def compiled_step(model, transform, masks, **options):
    """Inside, views, masks and objective are compiled, each function as a whole."""
    methods = [(transform, "random_views"), (masks, "draw"), (model, "forward")]
    if world_size() > 1:  # the heads and losses contain collectives
        methods[2:] = [(model.student, "forward"), (model.teacher, "forward")]
    methods = methods if can_compile(model.config) else []
    if methods:
        print("compiling in the first step; --no-compile starts at once", flush=True)
        torch._dynamo.reset()  # graphs of earlier models count towards a limit
    for owner, name in methods:
        function = torch.compile(getattr(owner, name), fullgraph=True, dynamic=False, **options)
        setattr(owner, name, function)
    yield
    for owner, name in methods:
        delattr(owner, name)


def use_bf16(device, precision):
    """Return whether matrix products are in bfloat16; precision "auto": where it is fast."""
    device = torch.device(device)
    if precision != "auto" or device.type not in ("cuda", "cpu"):
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def autocast(device, precision):
    enabled = use_bf16(device, precision)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def images_per_step(config):
    return config.BATCH_SIZE * config.ACCUMULATE * world_size()


def count_steps(count, config):
    """Return an epoch's steps; an incomplete last step is left out."""
    n, c = images_per_step(config), config
    needs = f"needs {n} images per step, there are {count} (TRAIN_IMAGES {c.TRAIN_IMAGES})"
    require(n <= count, f"BATCH_SIZE ({c.BATCH_SIZE}) {needs}; lower it")
    return count // n


def seed_step(seed, step, process=0):
    """Seed torch from (seed, step, process), so that a resumed run repeats bit for bit."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0]))


@lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    """Return a random order of count images, which follows from (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def step_indices(count, config, step):
    """Return this process's ACCUMULATE index tensors (B,); all share one order."""
    size = images_per_step(config)
    epoch, i = divmod(step, count // size)
    indices = epoch_order(count, config.SEED, epoch)[i * size : (i + 1) * size]
    return indices.split(config.BATCH_SIZE)[rank() :: world_size()]


# ---- Checkpoints ----

HEADS = ("img_head", "patch_head")
STATES = ("student", "teacher", *HEADS, *(f"teacher_{head}" for head in HEADS))


def write_file(path, data):
    """Write bytes to a temporary file, flush it, rename it: never half a file."""
    temporary = Path(f"{path}.tmp")
    with input_errors(path, "cannot be written; make room, then use --resume"):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def require_room(config, size):
    """Raise InputError where OUTPUT_DIR has no room for so many bytes."""
    folder = config.OUTPUT_DIR
    free = shutil.disk_usage(folder).free
    text = f"OUTPUT_DIR ({folder}) has {free / 1e6:,.0f} MB left, saving takes {size / 1e6:,.0f}"
    require(free > size, f"{text}; make room")


def save_checkpoint(path, model, optimizer, epoch, step, **run_state):
    """Save all that is needed to resume; run_state: plain values, of MetricLogger."""
    states = {f"{name}_state_dict": getattr(model, name).state_dict() for name in STATES}
    states["optimizer_state_dict"] = optimizer.state_dict()
    states.update(epoch=epoch, step=step, config=model.config.to_dict(), **run_state)
    buffer = io.BytesIO()
    torch.save(states, buffer)
    write_file(path, buffer.getbuffer())


def read_file(path):
    """Return what torch.save or safetensors wrote, on the CPU; nothing in it is executed."""
    if Path(path).suffix.lower() == ".safetensors":
        with input_errors("safetensors", "is needed: pip install safetensors"):
            from safetensors.torch import load_file
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # of many kinds
        raise InputError("it is truncated, or holds other Python objects than weights") from None


def read_checkpoint(path, states=None):
    """Return a checkpoint's dict, on the CPU. states: what read_file has read already."""
    with input_errors(path, "is not a checkpoint of this program"):
        states = read_file(path) if states is None else states
        names = [*map(str, states)] if isinstance(states, dict) else [type(states).__name__]
        kind = f"it holds {', '.join(names[:3])}; needed are config and teacher_state_dict"
        if any(name.endswith("pos_embed") for name in names):
            kind = "it holds weights for timm's or Meta's models; INIT_FROM takes them"
        require({"config", "teacher_state_dict"} <= {*names}, kind)
        states["config"] = Config(**{**states["config"], "DEVICE": "cpu"}).to_dict()
        for key in states.keys() & {f"{name}_state_dict" for name in STATES}:
            states[key] = {WRAPPERS.sub("", name): t for name, t in states[key].items()}
        return states


# What torch.compile, DistributedDataParallel and Meta's training put before or into names
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|backbone\.)+|_orig_mod\.|(?<=\bblocks)\.\d+(?=\.\d)")


def read_weights(path):
    """Return weights by our names, of projection heads, and the number of attention heads.

    Of a checkpoint all three, of timm's or Meta's networks, or a backbone's state dict, the first.
    """
    states = read_file(path)
    require(isinstance(states, dict), f"it holds a {type(states).__name__}")
    if "teacher_state_dict" in states:
        states = read_checkpoint(path, states)
        heads = {name: states.get(f"teacher_{name}_state_dict", {}) for name in HEADS}
        dims = states["config"]["MODEL_DIMS"][states["config"]["MODEL_SIZE"]]
        return states["teacher_state_dict"], heads, dims["heads"]
    states = states.get("teacher", states.get("model", states))
    weights = {WRAPPERS.sub("", str(name)): value for name, value in states.items()}
    require("pos_embed" in weights, f"it holds {', '.join([*weights][:3])}, but no pos_embed")
    if "reg_token" in weights:
        weights["register_tokens"] = weights.pop("reg_token")
    if math.isqrt(weights["pos_embed"].shape[1]) ** 2 == weights["pos_embed"].shape[1]:
        weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))  # the class token has none
    if "pixel_mean" not in weights:
        print("normalizing as for ImageNet; add pixel_mean and pixel_std (3,1,1) for others")
    weights.setdefault("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    weights.setdefault("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    return weights, {}, None


def load_weights(path, model):
    """Start student and teacher from weights (see read_weights) of networks of this size.

    The position embedding is resized; registers and heads are taken where they fit.
    """
    own, fits = model.teacher.state_dict(), []
    with input_errors(f"INIT_FROM ({path})", "cannot be used"):
        weights, heads, number = read_weights(path)
        known = model.teacher.blocks[0].attn.num_heads
        require(number in (None, known), f"it has {number} attention heads, not {known}")
        sides = [math.isqrt(t["pos_embed"].shape[1] - 1) for t in (weights, own)]
        square = sides[0] ** 2 == weights["pos_embed"].shape[1] - 1
        require(square, "its position embedding is not of a square of patches")
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], (sides[1], sides[1]))
        none = torch.zeros(1, 0, 1)
        registers = [t.get("register_tokens", none).shape[1] for t in (weights, own)]
        if "register_tokens" in own:
            tokens = [t["register_tokens"].cpu() for t in (weights, own) if "register_tokens" in t]
            weights["register_tokens"] = torch.cat(tokens, 1)[:, : tokens[-1].shape[1]]
        for backbone in (model.student, model.teacher):
            fresh, left = backbone.load_state_dict(weights, strict=False)
        wrong = [name for name in left if not re.search("^register_tokens|head", name)]
        wrong += [name for name in fresh if name != "mask_token"]
        require(not wrong, f"only one of the two has {', '.join(wrong[:3])}")
        for name, state in heads.items():
            modules = getattr(model, name), getattr(model, f"teacher_{name}")
            shapes = [{n: t.shape for n, t in s.items()} for s in (modules[0].state_dict(), state)]
            fits += [name] * (shapes[0] == shapes[1])
            for module in modules if name in fits else ():
                module.load_state_dict(state)
    fresh += [name for name in HEADS if name not in fits]
    parts = f"fresh: {', '.join(fresh) or 'none'}; left: {', '.join(left[:3]) or 'none'}"
    taken = f"{sides[0]}x{sides[0]} positions, {min(registers)} of {registers[1]} registers"
    print(f"weights of {path[-60:]}\n{taken}; {parts}", flush=True)


def load_checkpoint(path, model, optimizer=None):
    """Load a checkpoint into a model of its size, and its optimizer; return its dict."""
    states = read_checkpoint(path)
    with input_errors(path, "does not fit this model"):
        for name in STATES:
            getattr(model, name).load_state_dict(states[f"{name}_state_dict"])
        if optimizer is not None:
            moments = states["optimizer_state_dict"]["state"]
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return states


def load_backbone(path, device="cpu", states=None):
    """Return a checkpoint's teacher, a VisionTransformer in eval mode on device.

    Of the file, config and teacher_state_dict are enough. states: of read_checkpoint, if read.
    """
    states = read_checkpoint(path) if states is None else states
    backbone = build_backbone(Config(**states["config"]))
    with input_errors(path, "does not fit its own config"):
        backbone.load_state_dict(states["teacher_state_dict"])
    return backbone.to(device).eval()


def find_checkpoint(config):
    """Return the checkpoint to resume, or None to start afresh."""
    last = Path(config.OUTPUT_DIR, "dinov2_last.pth")
    if config.RESUME == "newest" and not last.is_file():
        print(f"no {last}: starting afresh")
    elif config.RESUME:
        path = last if config.RESUME == "newest" else Path(config.RESUME)
        require(path.is_file(), f"RESUME ({config.RESUME!r}) is not a file")
        return path
    path, text = Path(config.INIT_FROM), f"INIT_FROM ({config.INIT_FROM!r}) is"
    require(not config.INIT_FROM or path.is_file(), f"{text} not a file")
    moves = re.fullmatch(r"dinov2_(last|final|epoch_\d.*)\.pth", path.name)
    moves = moves and path.parent.resolve() == Path(config.OUTPUT_DIR).resolve()
    require(not moves, f"{text} moved by a run in its OUTPUT_DIR; give another one")


@contextmanager
def lock_output_dir(config):
    """Create OUTPUT_DIR and keep other runs out of it."""
    folder = Path(config.OUTPUT_DIR)
    with input_errors(f"OUTPUT_DIR ({folder})", "is in use by another run, or not writable"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = nullcontext() if rank() else FileLock(folder / ".lock").acquire(timeout=0)
    with lock:
        yield


def archive_previous_run(folder, keep=None):
    """Move an earlier run's checkpoints, metrics and figures, except keep, to a new folder."""
    names = [f"dinov2_{name}.pth" for name in ("last", "final", "epoch_[0-9]*")]
    names += ["metrics.jsonl", "figures", "tensorboard"]
    files = [file for name in names for file in folder.glob(name)]
    files = [file for file in files if file.exists() and not (keep and file.samefile(keep))]
    if files:
        archive = folder / f"{time.strftime('earlier-%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}"
        archive.mkdir()
        for file in files:
            file.rename(archive / file.name)
        print(f"moved an earlier run to {archive}")


def save_run(model, optimizer, logger):
    """Save metrics.jsonl, dinov2_last.pth and, as they are due, dinov2_epoch_{n} and _final."""
    logger.flush()
    finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    require(finite, f"weights are not finite at step {logger.step}; {REMEDY}")
    c, (epoch, steps_into_epoch) = model.config, divmod(logger.step, logger.steps_per_epoch)
    names = ["final"] if logger.step == logger.total_steps else []
    if steps_into_epoch == 0 and c.SAVE_EVERY and epoch % c.SAVE_EVERY == 0:
        names.append(f"epoch_{epoch}")
    if rank() == 0:
        logger.write_metrics()
        paths = [Path(c.OUTPUT_DIR, f"dinov2_{name}.pth") for name in [*names, "last"]]
        names_of_state = ("data", "steps_per_epoch", "history", "epoch_rows")
        state = {name: getattr(logger, name) for name in names_of_state}
        save_checkpoint(paths[0], model, optimizer, epoch, logger.step, **state)
        for path in paths[1:]:  # the last one comes last: where it is, the others are
            write_file(path, paths[0].read_bytes())
    max_over_processes(0)  # no process leaves before the files are complete
    logger.saved_at = time.perf_counter()


# ---- Metrics, figures, summary ----

REMEDY = "set PRECISION fp32 or lower LEARNING_RATE, and --resume from the last save"


class MetricLogger:
    """Collect metrics. Until flush they stay on the device, so that no step waits."""

    def __init__(self, config, data, steps_per_epoch):
        self.config, self.data, self.steps_per_epoch = config, data, steps_per_epoch
        self.total_steps = steps_per_epoch * config.TOTAL_EPOCHS
        self.stride = max(1, min(50, self.total_steps // 100))  # steps between flushes
        self.history, self.epoch_rows, self.pending = [], [], []  # of run, epoch, stride
        self.step, self.checkpoint, self.owns_folder = 0, None, False
        self.board = None  # of TensorBoard

    def restore(self, states, path):
        """Resume a run; if images per step changed, at the same point of the epochs."""
        c, self.checkpoint = self.config, Path(path)
        with input_errors(path, "cannot be resumed"):
            require({"data", "epoch_rows"} <= states.keys(), "no run of this version has saved it")
            data, per_epoch = states["data"], states["steps_per_epoch"]
            names = [f"{d['count']:,} images of {d['name']}" for d in (data, self.data)]
            change = max(abs(a - b) for a, b in zip(data["means"], self.data["means"], strict=True))
            # JPEG decoders differ by less than 1
            same = data["count"] == self.data["count"] and change < 1
            require(same, f"it has learned from {names[0]}; these are other images: {names[1]}")
            self.history, self.epoch_rows = states["history"], states["epoch_rows"]
            for record in (states, *self.history):
                if "step" in record:
                    record["step"] = record["step"] * self.steps_per_epoch // per_epoch
            self.step = states["step"]
            same_length = states["config"]["TOTAL_EPOCHS"] == c.TOTAL_EPOCHS
            fits = self.step < self.total_steps + same_length  # a finished run prints its table
            done = self.step / self.steps_per_epoch
            require(fits, f"it has done {done:.4g} epochs; raise TOTAL_EPOCHS ({c.TOTAL_EPOCHS})")
            if self.step < self.total_steps:
                self.find("start")["config"] = c.to_dict()  # which --config reads
        last = Path(c.OUTPUT_DIR, "dinov2_last.pth")
        self.owns_folder = last.resolve() == self.checkpoint.resolve()
        verb = "resuming" if self.step < self.total_steps else "already finished:"
        print(f"{verb} {path}, step {self.step:,} of {self.total_steps:,}")
        for name, value in states["config"].items():
            if value != getattr(c, name) and name not in ("RESUME", "DEVICE", "OUTPUT_DIR"):
                print(f"{name}: saved {value}, now {getattr(c, name)}")

    def log(self, event, **values):
        self.history.append({"event": event, **values})
        self.show(self.history[-1:])

    def show(self, records):
        """Send records to TensorBoard, if it is wanted and this run has written something."""
        if self.config.TENSORBOARD and self.owns_folder and not rank():
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(self.config.OUTPUT_DIR, "tensorboard")
            if self.board is None:  # purge what it wrote, and write all records anew
                self.board, records = SummaryWriter(folder, purge_step=0), self.history
            for row in records:
                for name, value in row.items():
                    if isinstance(value, float):
                        self.board.add_scalar(f"{row['event']}/{name}", value, row.get("step", 0))

    def show_figures(self):
        for path in Path(self.config.OUTPUT_DIR, "figures").glob("*.png") if self.board else ():
            pixels = np.array(Image.open(path).convert("RGB"))
            self.board.add_image(path.stem, pixels, self.step, dataformats="HWC")
        if self.board:
            self.board.close()

    def find(self, event):
        return next((r for r in reversed(self.history) if r["event"] == event), {})

    def __enter__(self):
        self.clock = self.saved_at = time.perf_counter()
        self.started = self.clock - self.find("step").get("seconds", 0.0)
        options = {"unit": " images", "unit_scale": images_per_step(self.config)}
        options["disable"] = True if rank() else None  # None: where there is no terminal
        self.bar = tqdm(total=self.total_steps, initial=self.step, dynamic_ncols=True, **options)
        return self

    def __exit__(self, *exception):
        self.bar.close()
        self.write_metrics()

    def write_metrics(self):
        if rank() == 0 and self.owns_folder:
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            write_file(Path(self.config.OUTPUT_DIR, "metrics.jsonl"), lines.encode())

    def add(self, values, hparams):
        self.step, self.hparams = self.step + 1, hparams
        self.pending.append(values)
        if self.step % self.stride == 0 or not self.owns_folder:
            self.flush()
        self.bar.update()

    def flush(self):
        """Log the means of the pending steps; the first time, archive an earlier run."""
        if not self.pending:
            return
        if rank() == 0 and not self.owns_folder:
            folder = Path(self.config.OUTPUT_DIR)
            archive_previous_run(folder, keep=self.checkpoint)
            if self.checkpoint:  # so that --resume finds this run until its first save
                write_file(folder / "dinov2_last.pth", self.checkpoint.read_bytes())
        self.owns_folder, now = True, time.perf_counter()
        table = torch.stack([torch.stack(list(values.values())) for values in self.pending])
        table = (all_reduce(table) / world_size()).tolist()
        rows = [dict(zip(self.pending[0], row, strict=True)) for row in table]
        means, speed = mean_of_steps(rows), len(rows) * images_per_step(self.config)
        timing = {"images_per_second": speed / (now - self.clock), "seconds": now - self.started}
        self.log("step", step=self.step, **means, **self.hparams, **timing)
        self.bar.set_postfix_str(f"loss {means.get('loss', math.nan):.2f}")
        self.epoch_rows += rows
        self.pending, self.clock = [], now
        n, limit = sum(r["skipped"] for r in self.epoch_rows[-10:]), min(10, self.steps_per_epoch)
        require(n < limit, f"{n:.0f} steps in a row are not finite; {REMEDY}")

    def end_epoch(self, epoch, scores):
        """Log and print the means over the epoch's steps, and the scores."""
        means, baseline, self.epoch_rows = mean_of_steps(self.epoch_rows), self.find("baseline"), []
        seconds = time.perf_counter() - self.started
        self.log("epoch", epoch=epoch, step=self.step, **means, **scores, seconds=seconds)
        line = f"epoch {epoch:3}/{self.config.TOTAL_EPOCHS}"
        for name in ("img", "patch", "koleo", "kl"):
            line += f"  {name} {means[name]:.2f}"
        if scores:
            line += f"  k-NN {scores['knn']:.1%}  rank {scores['rank']:.0f}"
        tqdm.write(line)
        if means["skipped"]:
            tqdm.write(f"skipped {means['skipped']} steps with non-finite losses or gradients")
        if scores and baseline:
            for sign in collapse_warnings(scores, means, baseline, self.config):
                tqdm.write(f"COLLAPSED: {sign}")
        sys.stdout.flush()
        self.clock = time.perf_counter()

    def save_is_due(self):
        minutes = (time.perf_counter() - self.saved_at) / 60
        return 0 < self.config.SAVE_EVERY_MINUTES < minutes


def mean_of_steps(rows):
    """Return the means of steps' metrics, without skipped steps, which are counted."""
    used = [row for row in rows if not row["skipped"]]
    means = {name: sum(row[name] for row in used) / len(used) for name in rows[0] if used}
    return {**means, "skipped": len(rows) - len(used)}


def measure_baseline(model, images):
    """Return evaluate's scores of the network as it starts, and of raw pixels; print k-NN."""
    start = name_of_start(model.config)
    print(f"measuring raw pixels and the {start} ...", flush=True)
    scores = evaluate(model, images, linear=True)
    if not scores:
        print(f"no evaluation: {images.obstacle}", flush=True)
        return {}
    teacher = model.teacher
    pixels = raw_pixel_scores(images, teacher.pixel_mean.tolist(), teacher.pixel_std.tolist())
    knn = pixels["raw_pixels_knn"]
    print(f"k-NN: raw pixels {knn:.1%}, {start} {scores['knn']:.1%}", flush=True)
    return {**scores, **pixels}


def name_of_start(config):
    return "network at start" if config.INIT_FROM else "untrained network"


def print_summary(logger):
    baseline, scores = logger.find("baseline"), logger.find("epoch")
    if "linear" in scores and "linear" in baseline:
        print(f"\n{'':18}{'k-NN':>8}{'linear':>8}{'RankMe':>8}")
        names = [name for name in ("raw_pixels_knn", "raw_pixels_linear") if name in baseline]
        print(f"{'raw pixels':18}{''.join(f'{baseline[name]:8.1%}' for name in names)}")
        start = name_of_start(logger.config)
        for name, row in ((start, baseline), ("trained teacher", scores)):
            print(f"{name:18}{row['knn']:8.1%}{row['linear']:8.1%}{row['rank']:8.1f}")
    folder = f"; files in {logger.config.OUTPUT_DIR}" if logger.owns_folder else ""
    print(f"{scores['seconds'] / 60:.1f} minutes{folder}")


def draw_checkpoint(config, path):
    """Draw the figures of a checkpoint's teacher, for DATASET, in a folder of OUTPUT_DIR."""
    states = read_checkpoint(path)
    backbone, history = load_backbone(path, config.DEVICE, states), states.get("history", [])
    backbone.precision = config.PRECISION
    with lock_output_dir(config):
        taken = Path(config.OUTPUT_DIR, "figures").exists()  # by a run
        folder = f"figures-{Path(path).stem}" if taken else "figures"
        plot_figures(backbone, prepare_images(config), config, history, folder)
    print(f"figures in {Path(config.OUTPUT_DIR, folder)}")


def plot_figures(backbone, images, config, history=(), folder="figures"):
    """Save PNG files in a folder of OUTPUT_DIR: what a teacher makes of images, a run's curves."""
    folder = Path(config.OUTPUT_DIR, folder)
    folder.mkdir(parents=True, exist_ok=True)
    bank, labels = spaced(images.train_images, images.train_labels, 10_000)
    tests = images[2:4] if images.test_images is not None else images[:2]
    x, y = spaced(*tests, 400)
    some, _ = spaced(x, None, 8)
    plot_views(backbone, some, config, folder / "views.png")
    plot_attention(backbone, some, folder / "attention.png")
    classes = y[y >= 0].unique().tolist()[:3]
    groups = {str(images.classes[i]): x[y == i][:8] for i in classes} or {"image": some}
    plot_patches(backbone, groups, folder / "pca.png")
    features = (extract_features(backbone, t).cpu() for t in (bank, x))
    z, z_test = (F.normalize(t, dim=1) for t in features)
    sets, names = ((bank, z, labels), (x, z_test, y)), [*map(str, images.classes), ""]
    plot_neighbors(*sets, names, folder / "neighbours.png")
    plot_map(*sets, names, folder / "map.png")
    if any(row["event"] == "step" for row in history):
        plot_curves(history, folder / "curves.png")


def spaced(images, labels, most):
    """Return at most so many images, evenly spaced, and their labels, on the CPU."""
    indices = torch.linspace(0, len(images) - 1, min(most, len(images)), dtype=torch.double).long()
    labels = torch.full((len(images),), -1) if labels is None else labels.cpu()
    return images[indices.to(images.device)].cpu(), labels[indices]


def save_grid(rows, title, path):
    """Save rows (name, images (n,3,h,w) in 0..1[, n captions and colors of frames]) as a PNG."""
    width, left, head = 1260, 110 * any(name for name, *_ in rows), 26  # pixels
    step = min((width - left) // max(len(images) for _, images, *_ in rows), 240)
    line = step + head * (len(rows[0]) > 2)
    canvas = Image.new("RGB", (width, 2 * head + line * len(rows)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    draw.text((width // 2, 4), title, "black", font, "ma")
    for r, (name, images, *captions) in enumerate(rows):
        bottom = 2 * head + line * (r + 1)
        draw.text((0, bottom - step // 2), name[:11], "black", font, "lm")
        for i, image in enumerate(images.float().clamp(0, 1)):
            tile = TF.to_pil_image(image).resize((step - 12, step - 12), Image.Resampling.NEAREST)
            x, y = left + i * step + 6, bottom - step + 6
            canvas.paste(tile, (x, y))
            for text, color in captions[0][i : i + 1] if captions else ():
                draw.text((x + step // 2 - 6, y - 8), text, color, font, "ms")
                draw.rectangle((x - 4, y - 4, x + step - 9, y + step - 9), outline=color, width=5)
    canvas.save(path)


def plot_views(backbone, x, config, path):
    c = config
    transform = make_transform(c, backbone)
    side = c.GLOBAL_CROP_SIZE // c.PATCH_SIZE
    masks = MaskGenerator(c).draw()[0].cpu().view(-1, 1, side, side)
    masks = F.interpolate(masks.float(), scale_factor=float(c.PATCH_SIZE)) > 0  # (R,1,S,S)
    rows = [("image", x / 255)]
    for v, view in enumerate(transform(x)):
        name, view = f"local {v + 1 - c.GLOBAL_CROPS_NUMBER}", view * transform.std + transform.mean
        if v < c.GLOBAL_CROPS_NUMBER:
            crops = torch.arange(len(x)) + v * c.BATCH_SIZE
            name, view = f"global {v + 1}", torch.where(masks[crops % len(masks)], 0.5, view)
        rows.append((name, view))
    save_grid(rows, "What the networks see of each image; gray: masked from the student", path)


def enlarge(backbone, images):
    """Return images of four times as many patches a side, at most 32, and that number."""
    p, side = backbone.patch_embed.patch_size, images.shape[-1] // backbone.patch_embed.patch_size
    side = max(side, min(4 * side, 32))
    return TF.resize(images, [side * p, side * p], TF.InterpolationMode.BICUBIC), side


def plot_attention(backbone, x, path):
    from matplotlib import colormaps

    attention, qkv = backbone.blocks[-1].attn, []
    hook = attention.qkv.register_forward_hook(lambda *args: qkv.append(args[-1].float().cpu()))
    large, side = enlarge(backbone, x)
    extract_features(backbone, large)
    hook.remove()
    q, k, _ = rearrange(torch.cat(qkv), "b t (n h d) -> n b h t d", n=3, h=attention.num_heads)
    weights = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0]  # (8,heads,T)
    maps = weights[..., backbone.num_prefix_tokens :].unflatten(-1, (side, side))
    maps = torch.cat([maps.mean(1, keepdim=True), maps[:, :6]], 1)
    maps = maps / maps.amax((2, 3), keepdim=True)
    colors = torch.from_numpy(colormaps["inferno"](maps.numpy())[..., :3])
    gray, rows = 0.3 * TF.rgb_to_grayscale(large / 255, 3), [("image", x / 255)]
    for i, color in enumerate(colors.movedim(-1, 2).unbind(1)):  # (8,3,side,side)
        name = f"head {i}" if i else "mean"
        rows.append((name, gray + 0.7 * F.interpolate(color, gray.shape[2:])))
    save_grid(rows, "Where the class token looks in the last block; brighter: more", path)


def plot_patches(backbone, groups, path):
    """Plot three principal components of the patch features of each group's images together."""
    rows = []
    for name, x in groups.items():
        large, side = enlarge(backbone, x)
        z = extract_features(backbone, large, patches=True).cpu().unflatten(1, (side, side))
        depth = torch.minimum(torch.arange(side), torch.arange(side).flip(0))
        depth = torch.minimum(depth[:, None], depth)  # (side,side): patches from the border
        middle, edge = (z[:, part].mean((0, 1)) for part in (depth >= side // 4, depth == 0))
        inside = (z - (middle + edge) / 2) @ (middle - edge) > 0  # (8,side,side)
        inside |= ~inside.any()
        z = z - z[inside].mean(0)
        colors = z @ torch.linalg.svd(z[inside], full_matrices=False).Vh[:3].T
        colors = F.pad(colors, (0, 3))[..., :3]  # a width below 3
        low, high = colors[inside].quantile(torch.tensor([0.02, 0.98]), 0)
        colors = ((colors - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        rows += [(name, x / 255), ("patches", (colors * inside.unsqueeze(-1)).movedim(-1, 1))]
    text = "black: more like the images' border than their middle"
    save_grid(rows, f"Principal components of patch features as colors; {text}", path)


def plot_neighbors(bank, queries, names, path):
    (x, z, y), (x_test, z_test, y_test) = bank, queries
    rows, columns = [], torch.linspace(0, len(x_test) - 1, min(6, len(x_test))).long()
    for i in columns.tolist():
        cosine, nearest = (z_test[i] @ z.T).topk(min(6, len(z)))
        first = int(torch.equal(x[nearest[0]], x_test[i]))  # the image itself, without test images
        cosine, nearest = cosine[first : first + 5], nearest[first : first + 5]
        captions = [(names[y_test[i]][:11], "black")]
        for similarity, label in zip(cosine, y[nearest], strict=True):
            mark, color = ("=", "#0072b2") if label == y_test[i] else ("x", "#d55e00")
            mark, color = (mark, color) if min(label, y_test[i]) >= 0 else ("", "black")
            captions.append((f"{mark} {names[label][:11]} {similarity:.2f}", color))
        rows.append(("", torch.cat([x_test[i : i + 1], x[nearest]]) / 255, captions))
    title = "Images and training images of similar features; cosine; =: same class, x: another"
    save_grid(rows, title, path)


def plot_map(bank, queries, names, path):
    (_, z, y), (x_test, z_test, _) = bank, queries
    means = {name: z[y == i].mean(0) for i, name in enumerate(names[:-1]) if (y == i).any()}
    points = torch.stack([*means.values()]) if len(means) > 2 else z
    axes = torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh[:2].T  # (D,2)
    low, high = (z_test @ axes).quantile(torch.tensor([0.01, 0.99]), 0)
    canvas, tile, font = Image.new("RGB", (1260, 900), "white"), 36, ImageFont.load_default(20)
    draw = ImageDraw.Draw(canvas)

    def place(features):
        place = ((features @ axes - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        return (place * torch.tensor([1260 - 120, 900 - 100]) + torch.tensor([60, 60])).tolist()

    for image, features in zip(x_test, z_test, strict=True):
        picture, (u, v) = TF.to_pil_image(image).resize((tile, tile)), place(features)
        canvas.paste(picture, (round(u) - tile // 2, round(v) - tile // 2))
    for name, mean in means.items() if len(means) <= 20 else ():
        name = name[:11]
        box = draw.textbbox(place(mean), name, font, "mm")
        draw.rectangle((box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4), "white", "black")
        draw.text(place(mean), name, "black", font, "mm")
    kind = "their features" if points is z else "the features' class means"
    draw.text((630, 4), f"Images by two principal components of {kind}", "black", font, "ma")
    canvas.save(path)


def plot_curves(history, path):
    from matplotlib.figure import Figure  # its import may write a font cache

    panels = {
        "img": "image loss (nats)",
        "patch": "patch loss (nats)",
        "koleo": "KoLeo",
        "kl": "KL from targets (nats)",
        "knn": "k-NN accuracy",
        "rank": "RankMe (dimensions)",
        "teacher_entropy": "target entropy (nats)",
        "prototypes": "prototypes in use / usable",
        "lr": "learning rate",
        "momentum": "teacher momentum",
        "teacher_temp": "teacher temperature",
        "weight_decay": "weight decay",
    }
    figure = Figure(figsize=(8.4, 6), dpi=150, layout="constrained")
    axes = figure.subplots(3, 4)
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        events = ("baseline", "epoch") if key in ("knn", "rank") else ("step",)
        points = [(r.get("step", 0), r[key]) for r in history if r["event"] in events and key in r]
        style = ".-" if len(points) < 30 else "-"
        axis.plot([x for x, _ in points], [y for _, y in points], style, color="#0072b2")
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
        for row in history if key == "knn" else ():
            if "raw_pixels_knn" in row:
                axis.axhline(row["raw_pixels_knn"], color="gray", linestyle="--")
                axis.text(0, row["raw_pixels_knn"], "raw pixels", fontsize=7, va="bottom")
    figure.savefig(path)


def embed_images(config, source, patches=False):
    """Save features of a folder's, .npz's or .npy's images in OUTPUT_DIR/features.npz, in parts.

    features (n,D): class tokens of RESUME's teacher; with patches also patch_features (n,N,D).
    names (n,): files below source, or such as x_train[0]; labels (n,), "" or -1 where unknown.
    Files with over 8 bits: the first 512 give the scale. PRECISION auto: that of its run.
    """
    path, output = find_checkpoint(config), Path(config.OUTPUT_DIR, "features.npz")
    require(path, "--embed needs --resume CHECKPOINT")
    require(not output.exists(), f"{output} exists; move it, or give another --output-dir")
    backbone, root = load_backbone(path, config.DEVICE), Path(source).resolve()
    if config.PRECISION != "auto":  # else that of its run
        backbone.precision = config.PRECISION
    grid, splits = backbone.patch_embed, {}
    is_folder = root.is_dir()
    if is_folder:
        splits = load_folder(root)
    elif root.is_file():
        splits = {x: pair for x, pair in as_splits(load_arrays(root)).items() if len(pair[0])}
    require(splits, f"{source!r} is not a folder, .npz (see as_images) or .npy of images")
    splits = {name: (x, check_split(x, y) or [None] * len(x)) for name, (x, y) in splits.items()}
    count, size = sum(len(x) for x, _ in splits.values()), math.isqrt(grid.num_patches)
    shapes = {"features": (count, backbone.cls_token.shape[-1])}
    if patches:
        shapes["patch_features"] = (count, grid.num_patches, shapes["features"][1])
    names, labels, levels, tables = [], [], None, {}
    options = {"dir": output.parent, "ignore_cleanup_errors": True}
    with lock_output_dir(config), tempfile.TemporaryDirectory(**options) as folder:
        # Tables and the archive made of them; a full disk would kill the process
        require_room(config, 8 * sum(map(math.prod, shapes.values())))
        for name, shape in shapes.items():
            tables[name] = np.lib.format.open_memmap(Path(folder, name), "w+", np.float32, shape)
        for split, (x, y) in splits.items():
            items = read_items(x, range(len(x)), size * grid.patch_size)
            items = iter(tqdm(items, split, len(x), disable=None))
            while part := [*islice(items, 512)]:
                batch, indices, levels = stack_images(part, len(part), levels)
                for name, table in tables.items():
                    z = extract_features(backbone, batch, patches=name != "features")
                    table[len(names) : len(names) + len(z)] = z.cpu().numpy()
                labels += [y[i] for i in indices]
                for i in indices:
                    names.append(str(x[i].relative_to(root)) if is_folder else f"{split}[{i}]")
        unknown = "" if any(isinstance(label, str) for label in labels) else -1
        labels = [unknown if label is None else label for label in labels]
        arrays = {name: table[: len(names)] for name, table in tables.items()}
        np.savez(Path(folder, "all.npz"), **arrays, names=np.array(names), labels=np.array(labels))
        Path(folder, "all.npz").replace(output)
        del tables, table, arrays  # or NFS and Windows cannot remove their files
    print(f"features of {len(names):,} images in {output}")


# ---- Command line ----


class InputError(ValueError):
    """A setting, a file or a dataset cannot be used."""


def require(condition, message):
    if not condition:
        raise InputError(message)


@contextmanager
def input_errors(name, message):
    """Raise an InputError for whatever is raised inside: files go wrong in many ways."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise InputError(f"{name} {message} ({reason[:300]})") from None


# Settings of --hour, in which the number of steps counts most: large patches, small crops, no local
# ones, no masks, and with momentum 0 no forward pass of the teacher; but many prototypes
HOUR = {
    "MODEL_SIZE": "tiny",
    "PATCH_SIZE": 8,
    "GLOBAL_CROP_SIZE": 24,
    "LOCAL_CROPS_NUMBER": 0,
    "PROJECTION_DIM": 8192,
    "LAMBDA_KOLEO": 0.5,
    "KOLEO_KIND": "uniform",
    "KOLEO_FEATURES": "bottleneck",
    "MASK_RATIO": 0.0,
    "BATCH_SIZE": 256,
    "LEARNING_RATE": 4e-3,
    "EMA_START": 0.0,
    "EMA_END": 0.0,
    "TOTAL_EPOCHS": 26,
    "DATASET": "cifar10",
    "EVAL_EVERY": 13,
}
# Settings of --quick. Color says nothing about a shape: distort it strongly. A part of a shape is
# another shape: no small crops, and no masks
QUICK = {
    **HOUR,
    "MODEL_DIMS": {**Config.MODEL_DIMS, "tiny": {"dim": 192, "depth": 2, "heads": 3}},
    "GLOBAL_CROPS_NUMBER": 3,
    "GLOBAL_CROP_SIZE": 32,
    "PROJECTION_DIM": 1024,
    "GLOBAL_CROPS_SCALE": (0.85, 1.0),
    "COLOR_JITTER": (0.6, 0.6, 0.6, 0.5),
    "COLOR_JITTER_PROB": 0.95,
    "GRAYSCALE_PROB": 0.5,
    "BATCH_SIZE": 64,
    "EMA_START": 0.9,
    "EMA_END": 0.97,
    "TOTAL_EPOCHS": 4,
    "DATASET": "shapes",
    "EVAL_EVERY": 2,
}

RANGES = {  # of numbers; the others are at least 0
    "PATCH_SIZE GLOBAL_CROP_SIZE LOCAL_CROP_SIZE TOTAL_EPOCHS": (1, math.inf),
    "HEAD_HIDDEN_DIM HEAD_BOTTLENECK_DIM ACCUMULATE": (1, math.inf),
    "IMAGE_SIZE GLOBAL_CROPS_NUMBER BATCH_SIZE PROJECTION_DIM": (2, math.inf),
    "STUDENT_TEMP TEACHER_TEMP_START TEACHER_TEMP_END": (1e-3, math.inf),
    "GLOBAL_CROPS_SCALE LOCAL_CROPS_SCALE": (1e-3, 1),
    "DROP_PATH DROPOUT": (0, 0.99),
    "COLOR_JITTER_PROB GRAYSCALE_PROB MASK_PROB MASK_RATIO": (0, 1),
    "TEACHER_TEMP_WARMUP WARMUP EMA_START EMA_END FREEZE_PROTOTYPES FREEZE_BACKBONE": (0, 1),
}
RANGES = {name: ends for names, ends in RANGES.items() for name in names.split()}


def coerce(name, value, default):
    """Return value in default's type; an int will do for a float, a list for a tuple."""
    kind = type(default)
    if kind is tuple and isinstance(value, (tuple, list)) and len(value) == len(default):
        return tuple(coerce(name, v, d) for v, d in zip(value, default, strict=True))
    value = float(value) if kind is float and type(value) is int else value
    fits = type(value) is kind and kind is not tuple
    require(fits, f"{name} ({value!r}) must be of type {kind.__name__}, like {default!r}")
    return deepcopy(value)


def validate(c):
    """Raise InputError for the first setting of config c that cannot work."""
    for name, value in c.to_dict().items():
        low, high = RANGES.get(name, (0, math.inf))
        for n in value if isinstance(value, tuple) else (value,):
            fits = not isinstance(n, (int, float)) or (low <= n <= high and n < math.inf)
            require(fits, f"{name} ({n}) must be a finite number from {low} to {high}")
    kinds = {"KOLEO_KIND": ["nearest", "cosine", "uniform"], "MASK_KIND": ["block", "random"]}
    kinds["KOLEO_FEATURES"] = ["class", "bottleneck"]
    kinds |= {"PRECISION": ["auto", "bf16", "fp32"], "MODEL_SIZE": list(c.MODEL_DIMS)}
    for name, known in kinds.items():
        value = getattr(c, name)
        require(value in known, f"{name} ({value!r}) must be one of {known}")
    dims, example = c.MODEL_DIMS[c.MODEL_SIZE], CONSTANTS["MODEL_DIMS"]["tiny"]
    fits = isinstance(dims, dict) and dims.keys() == example.keys()
    fits = fits and all(type(n) is int and n > 0 for n in dims.values())
    fits = fits and dims["dim"] % dims["heads"] == 0
    require(fits, f"MODEL_DIMS: {dims} must be like {example}, dim a multiple of heads")
    sizes = ("IMAGE_SIZE", "GLOBAL_CROP_SIZE", "LOCAL_CROP_SIZE")
    for name in sizes if c.LOCAL_CROPS_NUMBER else sizes[:2]:
        side, p = getattr(c, name), c.PATCH_SIZE
        require(side % p == 0, f"{name} ({side}) must be a multiple of PATCH_SIZE ({p})")
    for name in ("GLOBAL_CROPS_SCALE", "LOCAL_CROPS_SCALE"):
        low, high = getattr(c, name)
        require(low <= high, f"{name} ({low} {high}) must not decrease")
    ratio, prob, crops = c.MASK_RATIO, c.MASK_PROB, c.GLOBAL_CROPS_NUMBER * c.BATCH_SIZE
    require(ratio <= 0.6 * prob, f"MASK_RATIO ({ratio}) must be at most 0.6 * MASK_PROB ({prob})")
    require(round(crops * prob) or not ratio, f"MASK_PROB ({prob}) masks no crop of a batch")
    require(c.COLOR_JITTER[3] <= 0.5, f"COLOR_JITTER {c.COLOR_JITTER}: the hue is above 0.5")
    weights = c.LAMBDA_IMG + c.LAMBDA_PATCH * bool(ratio) + c.LAMBDA_KOLEO
    require(weights, "LAMBDA_IMG, LAMBDA_PATCH (or MASK_RATIO), LAMBDA_KOLEO are 0: raise one")
    with input_errors(f"DEVICE ({c.DEVICE!r})", "is not available; set another, such as cpu"):
        device = torch.device(c.DEVICE)
        count = torch.get_device_module(device).device_count()
        require((device.index or 0) < count, f"there are {count} such devices")


def read_settings(path):
    """Return a run's settings, from its checkpoint or metrics.jsonl, without paths and device."""
    with input_errors(path, "has no settings of a run"):
        if Path(path).suffix in (".json", ".jsonl"):
            text = Path(path).read_text(encoding="utf-8")
            first = json.loads(text.splitlines()[0] if path.endswith("l") else text)
            settings = first.get("config", first)
        else:
            settings = read_checkpoint(path)["config"]
        left = ("OUTPUT_DIR", "DEVICE", "RESUME")
        return {name: value for name, value in settings.items() if name not in left}


def parse_flags(argv=None):
    """Return the settings and the task (draw, embed) that command-line flags give."""
    source = Path(__file__).read_text(encoding="utf-8").split("class Config:")[1].split("def ")[0]
    usage = "dinov2_cifar.py [--quick | --hour | --config FILE] [--SETTING X]..."
    options = {"description": __doc__.split("\n")[0], "usage": usage, "allow_abbrev": False}
    parser = argparse.ArgumentParser(**options, argument_default=argparse.SUPPRESS)
    parser.error = exit_with_error
    presets = parser.add_mutually_exclusive_group()
    fixed = {"action": "store_const", "dest": "preset"}
    presets.add_argument("--quick", const=QUICK, help="tiny network on shapes; see QUICK", **fixed)
    presets.add_argument("--hour", const=HOUR, help="CIFAR-10 on a CPU; see HOUR", **fixed)
    text = "settings of a run: its checkpoint or metrics.jsonl"
    presets.add_argument("--config", dest="preset", metavar="FILE", help=text)
    presets.add_argument("--draw", metavar="CHECKPOINT", help="only draw a checkpoint's figures")
    text = "only save features.npz of a folder or .npz, by the network of --resume"
    presets.add_argument("--embed", metavar="FOLDER", help=text)
    parser.add_argument("--patches", action="store_true", help="with --embed: patch tokens, too")
    kinds = {
        bool: {"action": argparse.BooleanOptionalAction},
        tuple: {"type": float, "nargs": "+", "metavar": "X"},
        dict: {"type": json.loads, "metavar": "JSON"},
    }
    group = parser
    lines = re.findall(r"^    (?:# (.*)|([A-Z_]+) = .*?  # (.*))$", source, re.M)
    for title, name, comment in lines:
        if title:
            group = parser.add_argument_group(title)
            continue
        kind, value = type(CONSTANTS[name]), getattr(Config, name)
        options = dict(kinds.get(kind, {"type": kind, "metavar": kind.__name__.upper()}))
        options |= {"nargs": "?", "const": "newest"} if name == "RESUME" else {}
        shown = {tuple: lambda v: " ".join(map(str, v)), dict: json.dumps}.get(kind, str)(value)
        text = f"{comment} [{shown}]".removesuffix(" []").replace("%", "%%")
        group.add_argument("--" + name.lower().replace("_", "-"), help=text, **options)
    given, unknown = parser.parse_known_args(argv)
    known = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(unknown[0].split("=")[0], known, 1) if unknown else []
    hint = f"; did you mean {close[0]}?" if close else ""
    require(not unknown, f"unrecognized arguments: {' '.join(unknown)}{hint}")
    given = {name.upper(): value for name, value in vars(given).items()}
    task = {name: given.pop(name) for name in ("DRAW", "EMBED", "PATCHES") if name in given}
    require("PATCHES" not in task or "EMBED" in task, "--patches belongs to --embed")
    preset = given.pop("PRESET", task.get("DRAW", {}))
    return {**(read_settings(preset) if isinstance(preset, str) else preset), **given}, task


def parse_arguments(argv=None):
    """Return the Config of command-line flags, one for each constant."""
    return Config(**parse_flags(argv)[0])


class StopRequest:
    """Store Ctrl-C or SIGTERM in signal, else 0; a second one, over 2 s later, ends the program."""

    def __enter__(self):
        self.signal, self.deadline, self.handlers = 0, math.inf, {}
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as Ctrl-C is in the background
                    self.handlers[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def note(self, number, frame):
        if time.monotonic() > self.deadline:
            self.__exit__()
            signal.raise_signal(number)
        # Not at once: the timeout command sends two signals together
        self.signal, self.deadline = number, min(self.deadline, time.monotonic() + 2)


def exit_with_error(message):
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    """Exit with 0, or with 2 and one line where the input cannot be used."""
    # For file names that it cannot encode; stdout of a notebook has no such method
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: faster steps on a CPU
    try:
        settings, task = parse_flags(argv)
        if "DRAW" in task:
            draw_checkpoint(Config(**settings), task["DRAW"])
        elif "EMBED" in task:
            embed_images(Config(**settings), task["EMBED"], task.get("PATCHES", False))
        else:
            train_dinov2(Config(**settings))
    except (InputError, OSError) as error:
        exit_with_error(error)
    except RuntimeError as error:  # torch has no type for a CPU out of memory
        if not re.search("out of memory|allocate memory|enough memory", str(error)):
            raise
        exit_with_error(f"{error}; lower BATCH_SIZE, and raise ACCUMULATE instead")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


__all__ = """Config HOUR QUICK InputError MultiCropTransform MultiCropDataset PatchEmbedding
    MultiHeadAttention MLP TransformerBlock VisionTransformer ProjectionHead DINOv2
    sinkhorn_knopp_centering dino_loss multi_crop_dino_loss ibot_loss koleo_regularizer
    generate_random_mask generate_block_mask MaskGenerator CosineScheduler train_dinov2
    save_checkpoint load_checkpoint load_backbone extract_features knn_accuracy linear_probe
    rank_me make_shapes""".split()

if __name__ == "__main__":
    main()
