"""DINOv2 on CIFAR-10, in one file: a Vision Transformer learns to see without labels.

    python dinov2_cifar.py --quick                                  # built-in pictures, three minutes, no download
    python dinov2_cifar.py                                          # CIFAR-10 with the constants of Config below
    python dinov2_cifar.py --dataset pictures/ --total-epochs 50    # your own folder; every constant is a flag
    torchrun --nproc-per-node 2 dinov2_cifar.py                     # on two GPUs

A student network looks at small and masked crops of a picture and predicts what a teacher network, the running
average of the student, makes of the large ones. No label is used in training; at the end labels measure what the
features are worth (k nearest neighbours, linear probe) beside raw pixels and the untrained network.

The method: DINOv2 (arXiv 2304.07193), which joins DINO (2104.14294) and iBOT (2111.07832), with Sinkhorn-Knopp
targets (SwAV, 2006.09882) and the KoLeo regulariser (1806.03198); registers from 2309.16588, RankMe from 2210.02885.

Letters in shapes: B pictures of a batch, G global and L local crops of each, V = G + L views, S side of a crop in
pixels, N patches of a crop, T = 1 + registers + N tokens, D width, K prototypes, M masked patches of a batch.
"""

import argparse
import ctypes
import errno
import io
import json
import math
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from copy import deepcopy
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------

class InputError(ValueError):
    """Something that the user gave cannot work; the message says what, with its value and the remedy."""


def plain(text):
    """→ the text in one line, without characters that would steer a terminal: files may come from strangers."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in str(text)).split())


def brief(error):
    """→ what an exception says, in 200 characters at most."""
    return plain(error)[:200] or type(error).__name__


def fail(message):
    """Ends the program with exit code 2 and one line."""
    print("error:", plain(message), file=sys.stderr)
    sys.exit(2)


def best_device():
    """→ "cuda", else "mps", else "cpu": what this machine has."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


class Config:
    """The settings. Edit them here, pass them (`Config(TOTAL_EPOCHS=1)`), or give them as flags (`--total-epochs 1`).

    `Config()` copies the class constants as they stand at that moment and checks them: InputError (a ValueError) names
    the setting, its value and the remedy. The comment beside a constant is its `--help` text.
    """
    # The network
    MODEL_SIZE = "small"  # size of the Vision Transformer, a key of MODEL_DIMS
    MODEL_DIMS = {"tiny": (192, 6, 3), "small": (384, 6, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # size: (width, depth, heads)
    IMAGE_SIZE = 32  # side of the stored pictures in pixels; other pictures are resized and centre-cropped to it
    PATCH_SIZE = 4  # side of a patch in pixels; 8 makes a quarter of the tokens, about 3 times as fast, and coarser
    REGISTER_TOKENS = 0  # extra tokens without a place, which keep global information out of the patches (0: none)
    LAYER_SCALE = 0.0  # starting value of LayerScale on every residual branch; large models use 1e-5 (0: no LayerScale)
    DROP_PATH = 0.0  # chance that the last block skips a sample in the student, rising linearly from 0 at the first
    DROPOUT = 0.0  # dropout in the student's attention and MLPs; 0 in the published recipe

    # The heads
    PROJECTION_DIM = 1024  # K, number of prototypes: more make finer targets; 512 to 4,096 for small pictures, 65,536 on ImageNet
    HEAD_HIDDEN_DIM = 512  # width of the heads' two hidden layers
    HEAD_BOTTLENECK_DIM = 64  # width of the heads' output before the prototypes
    HEAD_BATCH_NORM = True  # batch normalisation in the heads: removes what all features share

    # The views
    GLOBAL_CROPS_NUMBER = 2  # G, crops that the teacher sees too; at least 2
    LOCAL_CROPS_NUMBER = 6  # L, crops for the student alone (0: none)
    GLOBAL_CROP_SIZE = 32  # side of a global crop in pixels, a multiple of PATCH_SIZE
    LOCAL_CROP_SIZE = 16  # side of a local crop in pixels, a multiple of PATCH_SIZE
    GLOBAL_CROPS_SCALE = (0.4, 1.0)  # share of the picture's area that a global crop covers, least and most
    LOCAL_CROPS_SCALE = (0.15, 0.5)  # share of the picture's area that a local crop covers, least and most
    FLIP = True  # mirror half of the crops left to right
    COLOR_JITTER = (0.4, 0.4, 0.2, 0.1)  # strength of the changes in brightness, contrast, saturation and hue (hue: 0 to 0.5)
    COLOR_JITTER_PROB = 0.8  # share of the crops whose colours are changed
    GRAYSCALE_PROB = 0.2  # share of the crops that lose their colours

    # The objective
    LAMBDA_IMG = 1.0  # weight of the image-level loss (DINO)
    LAMBDA_PATCH = 0.2  # weight of the patch-level loss (iBOT); 1 in the published recipe, where runs are long
    LAMBDA_KOLEO = 0.3  # weight of the regulariser that spreads the class tokens; 0.1 in the published recipe, where runs are long
    KOLEO_KIND = "nearest"  # "nearest": log distance to the nearest other picture (KoLeo); "cosine": mean squared cosine
    MASK_KIND = "block"  # "block": patches are masked in rectangles; "random": one by one
    MASK_RATIO = 0.15  # mean share of masked patches over all global crops; a masked crop has 1/3 to 5/3 times MASK_RATIO / MASK_PROB
    MASK_PROB = 0.5  # share of the global crops that are masked
    STUDENT_TEMP = 0.1  # temperature of the student's softmax
    TEACHER_TEMP_START = 0.02  # temperature of the teacher's targets at the first step; lower is sharper
    TEACHER_TEMP_END = 0.03  # the same after TEACHER_TEMP_WARMUP; 0.07 in the published recipe
    TEACHER_TEMP_WARMUP = 0.3  # share of the run in which it goes linearly from start to end
    SINKHORN_ITERATIONS = 3  # rounds of Sinkhorn-Knopp that balance the targets (0: softmax alone, which collapses without KoLeo)

    # Optimisation
    BATCH_SIZE = 128  # B, pictures a micro-batch, each with all its crops; a step has B times ACCUMULATE times the number of processes
    ACCUMULATE = 1  # micro-batches whose gradients make one step; targets, KoLeo and batch normalisation see one of them at a time
    LEARNING_RATE = 2e-3  # peak rate at 1,024 pictures a step; the run uses it times sqrt(pictures a step / 1024)
    LEARNING_RATE_END = 1e-6  # rate at the last step, scaled likewise
    WARMUP = 0.1  # share of the run in which the rate rises linearly from 0
    WEIGHT_DECAY = 0.04  # weight decay of matrices at the first step; biases, norms and single tokens have none
    WEIGHT_DECAY_END = 0.4  # the same at the last step, reached by cosine
    EMA_START = 0.9  # momentum of the teacher at the first step: 0.9 for some thousand steps, 0.99 and more for long runs
    EMA_END = 1.0  # the same at the last step, reached by cosine
    FREEZE_PROTOTYPES = 1.0  # share of the run in which the heads' last layer stands still; in short runs learned prototypes are no better
    CLIP_GRAD = 3.0  # largest gradient norm; longer gradients are shortened to it (0: no clipping)
    TOTAL_EPOCHS = 2  # passes over the pictures; every schedule stretches with them

    # The run
    DATASET = "auto"  # "auto": CIFAR-10, else the built-in shapes; "cifar10", "cifar100", "shapes", a .npz file or a folder
    DATA_PATH = "data"  # folder where CIFAR is looked for and downloaded to
    TRAIN_IMAGES = 0  # use only so many training pictures, a fixed random choice (0: all)
    OUTPUT_DIR = "checkpoints"  # folder for checkpoints, metrics.jsonl and figures
    SEED = 0  # the same seed gives the same weights, bit for bit on a CPU
    DEVICE = best_device()  # "cuda", "cuda:1", "mps" or "cpu"; by default the fastest that is there
    PRECISION = "auto"  # "bf16": bfloat16 autocast; "fp32"; "auto": bf16 where the hardware multiplies it fast
    COMPILE = True  # torch.compile the networks where it pays, which is on CUDA; off by itself without Triton, and with SHARD
    SHARD = False  # several processes split weights, gradients and optimizer, for networks that outgrow a GPU (FSDP2); else each has all
    EVAL_EVERY = 1  # epochs between evaluations (0: only at the end)
    SAVE_EVERY = 10  # epochs between checkpoints that are kept (0: only the last one)
    SAVE_EVERY_MINUTES = 10.0  # minutes between saves within an epoch, from which a run can go on (0: only at an epoch's end)
    RESUME = ""  # checkpoint to go on from; "newest", or the flag alone: the newest in OUTPUT_DIR (empty: start afresh)

    def __init__(self, **overrides):
        cls = type(self)
        for name in [n for n in dir(cls) if n.isupper()] + list(overrides):
            if name not in CONSTANTS:
                near = get_close_matches(name, CONSTANTS, 1)
                raise InputError(f"{name} is no setting" + (f"; did you mean {near[0]}?" if near else " of Config"))
        for name, default in CONSTANTS.items():
            setattr(self, name, typed_like(default, name, overrides.get(name, getattr(cls, name))))
        self.check()
        self.MODEL_DIMS = {size: tuple(dims) for size, dims in self.MODEL_DIMS.items()}           # JSON has lists

    def to_dict(self):
        """→ dict of plain values (bool, int, float, str, tuple, dict); `Config(**d)` brings it back."""
        return {name: deepcopy(getattr(self, name)) for name in CONSTANTS}

    def check(self):
        """Raises InputError for the first setting that cannot work."""
        c = self

        def require(ok, message):
            if not ok:
                raise InputError(message)

        for names, low, high in RANGES:
            for name in names.split():
                for value in np.atleast_1d(getattr(c, name)).tolist():
                    require(low <= value <= high, f"{name} ({value}) must lie between {low} and {high}")
        for name, choices in {"KOLEO_KIND": ("nearest", "cosine"), "MASK_KIND": ("block", "random"),
                              "PRECISION": ("auto", "bf16", "fp32"), "MODEL_SIZE": tuple(c.MODEL_DIMS)}.items():
            require(getattr(c, name) in choices, f"{name} ({getattr(c, name)!r}) must be one of {', '.join(choices)}")
        for name in CONSTANTS:
            require("\0" not in str(getattr(c, name)), f"{name} ({getattr(c, name)!r}) holds a character that no name can have")
        for size, dims in c.MODEL_DIMS.items():
            require(isinstance(dims, (tuple, list)) and len(dims) == 3 and all(type(d) is int and 0 < d <= 2 ** 14 for d in dims) and dims[1] <= 1000,
                    f"MODEL_DIMS[{size!r}] ({dims}) must be three whole numbers: width (up to 16,384), depth (up to 1,000), heads")
            require(dims[0] % dims[2] == 0, f"MODEL_DIMS[{size!r}]: width {dims[0]} must be a multiple of its {dims[2]} heads")
        for name in ("IMAGE_SIZE", "GLOBAL_CROP_SIZE") + ("LOCAL_CROP_SIZE",) * (c.LOCAL_CROPS_NUMBER > 0):
            require(getattr(c, name) % c.PATCH_SIZE == 0,
                    f"{name} ({getattr(c, name)}) must be a multiple of PATCH_SIZE ({c.PATCH_SIZE})")
        for name in ("GLOBAL_CROPS_SCALE", "LOCAL_CROPS_SCALE"):
            low, high = getattr(c, name)
            require(low <= high, f"{name} ({low} {high}) must go from the smaller share to the larger")
        require(c.COLOR_JITTER[3] <= 0.5, f"COLOR_JITTER: hue ({c.COLOR_JITTER[3]}) must lie between 0 and 0.5")
        require(c.MASK_RATIO <= 0.6 * c.MASK_PROB, f"MASK_RATIO ({c.MASK_RATIO}) must be at most 0.6 times MASK_PROB "
                f"({c.MASK_PROB}): the most masked crop hides 5/3 of their quotient")
        masked = round(c.GLOBAL_CROPS_NUMBER * c.BATCH_SIZE * c.MASK_PROB)
        require(masked or not c.MASK_RATIO, f"MASK_PROB ({c.MASK_PROB}) masks none of the {c.GLOBAL_CROPS_NUMBER * c.BATCH_SIZE} global "
                "crops of a batch; raise it, or set MASK_RATIO 0")
        require(c.LAMBDA_IMG + c.LAMBDA_PATCH * bool(c.MASK_RATIO) + c.LAMBDA_KOLEO > 0, "LAMBDA_IMG, LAMBDA_KOLEO and LAMBDA_PATCH (or "
                "MASK_RATIO) are all 0: nothing is left to learn; raise one of them")
        try:
            torch.zeros(1, device=c.DEVICE)
        except Exception:  # torch raises several kinds: unknown name, not compiled in, no such index
            raise InputError(f"DEVICE ({c.DEVICE!r}) is not there; this machine has {best_device()!r}") from None
        require(torch.device(c.DEVICE).type in ("cpu", "cuda", "mps"), f"DEVICE ({c.DEVICE!r}) must be cpu, cuda or mps")


CONSTANTS = {name: value for name, value in vars(Config).items() if name.isupper()}

RANGES = (  # names, least, most
    ("IMAGE_SIZE PATCH_SIZE GLOBAL_CROP_SIZE LOCAL_CROP_SIZE", 1, 4096),
    ("PROJECTION_DIM HEAD_HIDDEN_DIM HEAD_BOTTLENECK_DIM BATCH_SIZE", 2, 2 ** 20),
    ("GLOBAL_CROPS_NUMBER", 2, 1000),
    ("TOTAL_EPOCHS ACCUMULATE", 1, 10 ** 6),
    ("LOCAL_CROPS_NUMBER REGISTER_TOKENS SINKHORN_ITERATIONS", 0, 1000),
    ("TRAIN_IMAGES EVAL_EVERY SAVE_EVERY", 0, 10 ** 9),
    ("SEED", 0, 2 ** 31 - 1),
    ("DROP_PATH DROPOUT", 0, 0.99),
    ("GLOBAL_CROPS_SCALE LOCAL_CROPS_SCALE", 0.001, 1),
    ("STUDENT_TEMP TEACHER_TEMP_START TEACHER_TEMP_END", 0.001, 10),
    ("LEARNING_RATE LEARNING_RATE_END COLOR_JITTER", 0, 10),
    ("WEIGHT_DECAY WEIGHT_DECAY_END LAMBDA_IMG LAMBDA_PATCH LAMBDA_KOLEO CLIP_GRAD LAYER_SCALE SAVE_EVERY_MINUTES", 0, 1e6),
    ("TEACHER_TEMP_WARMUP WARMUP FREEZE_PROTOTYPES EMA_START EMA_END COLOR_JITTER_PROB GRAYSCALE_PROB MASK_PROB MASK_RATIO", 0, 1),
)

QUICK = dict(MODEL_SIZE="tiny", MODEL_DIMS={**Config.MODEL_DIMS, "tiny": (192, 2, 3)},  # two blocks: fast steps are worth more in three minutes
             DATASET="shapes", PATCH_SIZE=8, BATCH_SIZE=64, LEARNING_RATE=4e-3, TOTAL_EPOCHS=36, EVAL_EVERY=12,
             LOCAL_CROPS_NUMBER=2, GLOBAL_CROPS_SCALE=(0.85, 1.0), LOCAL_CROPS_SCALE=(0.5, 0.8),
             COLOR_JITTER=(0.6, 0.6, 0.6, 0.5), COLOR_JITTER_PROB=0.95, GRAYSCALE_PROB=0.5)  # colour says nothing of a shape


def typed_like(default, name, value):
    """→ value in the type of its default; a whole number will do for a float, a list for a tuple. Else InputError."""
    if isinstance(default, tuple):
        if not isinstance(value, (tuple, list)) or len(value) != len(default):
            raise InputError(f"{name} ({value!r}) must be {len(default)} numbers")
        return tuple(typed_like(d, name, v) for d, v in zip(default, value))
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise InputError(f"{name} ({value!r}) must be of type {type(default).__name__}, like {default!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} ({value!r}) must be a finite number, like {default!r}")
    return deepcopy(value)


def parse_arguments(argv=None):
    """→ Config from command-line flags, one a constant; exits with code 2 and one line where they make no sense."""
    comments = dict(re.findall(r"^    ([A-Z_]+) = .*?  # (.*)$", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--quick", action="store_true", help="tiny model, built-in pictures, three minutes: "
                        + ", ".join(f"{k}={v}" for k, v in QUICK.items()))
    for name, default in CONSTANTS.items():
        flag = dict(help=f"{comments[name]} [{getattr(Config, name)}]".replace("%", "%%"), default=argparse.SUPPRESS)
        if isinstance(default, bool):
            flag.update(action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            flag.update(type=float, nargs=len(default), metavar="X")
        elif isinstance(default, dict):
            flag.update(type=json.loads, metavar="JSON")
        else:
            flag.update(type=type(default), metavar=type(default).__name__.upper())
        if name == "RESUME":
            flag.update(nargs="?", const="newest")
        parser.add_argument("--" + name.lower().replace("_", "-"), **flag)
    try:
        given = {name.upper(): value for name, value in vars(parser.parse_args(argv)).items()}
        return Config(**{**(QUICK if given.pop("QUICK") else {}), **given})
    except (InputError, RecursionError) as error:                # the latter for JSON in JSON in JSON
        fail(error)


# ----------------------------------------------------------------------------------------------------------------------
# Views: many random crops of every picture (DINO, section 3.1 "multi-crop"), drawn for a whole batch at once
# ----------------------------------------------------------------------------------------------------------------------

def resize_weights(start, length, size_in, size_out):
    """One axis of crop-and-resize as a matrix: boxes start, length (B,) in pixels → (B, size_out, size_in).

    Row i holds the weights with which the pixels of the box make output pixel i: bicubic with a = −0.5, widened when
    it shrinks (antialiasing), as Pillow and torchvision do it. Every row sums to 1.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    pixel = torch.arange(size_in, device=start.device) - start                                   # (B, 1, size_in)
    scale = length / size_out
    centre = (torch.arange(size_out, device=start.device).view(1, -1, 1) + 0.5) * scale          # (B, size_out, 1)
    x = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weights = weights * ((x < 2) & (pixel >= 0) & (pixel < length))
    return weights / weights.sum(2, keepdim=True)


def crop_and_resize(images, top, left, height, width, flip, size):
    """images (B,3,H,W) float, a box and a flip (B,) for each → (B,3,size,size): two products with small matrices."""
    weights_y = resize_weights(top, height, images.shape[2], size)
    weights_x = resize_weights(left, width, images.shape[3], size)
    weights_x = torch.where(flip.view(-1, 1, 1), weights_x.flip(1), weights_x)
    rows = images.flatten(1, 2) @ weights_x.mT                                                    # (B, 3·H, size)
    crops = weights_y.unsqueeze(1) @ rows.unflatten(1, images.shape[1:3])
    return crops.clamp(0, 1)                                                                      # bicubic overshoots


def random_boxes(batch, height, width, scale, device, ratio=(3 / 4, 4 / 3), attempts=10):
    """Boxes of random area and shape, as in torchvision's RandomResizedCrop → top, left, height, width, (B,) each.

    Of ten tries a picture takes the first that fits; where none does, the largest centred box of a permitted shape.
    """
    area = height * width * torch.empty(batch, attempts, device=device).uniform_(*scale)
    aspect = torch.empty(batch, attempts, device=device).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    fitted = fits.any(1)
    w = torch.where(fitted, w.gather(1, first).squeeze(1), min(width, round(height * ratio[1])))
    h = torch.where(fitted, h.gather(1, first).squeeze(1), min(height, round(width / ratio[0])))
    place = torch.where(fitted, torch.rand(2, batch, device=device), 0.5)
    return (place[0] * (height - h + 1)).floor(), (place[1] * (width - w + 1)).floor(), h, w


def to_gray(images):
    """(B,3,H,W) → (B,1,H,W), luma of ITU-R 601."""
    r, g, b = images.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def blend(images, other, factor):
    """factor 1 gives images, 0 gives other, more than 1 goes beyond; kept in 0..1."""
    return torch.lerp(other, images, factor).clamp(0, 1)


def adjust_brightness(images, factor):
    """images (B,3,H,W) in 0..1 and a factor (B,1,1,1) for each picture, like all four adjustments → (B,3,H,W)."""
    return (images * factor).clamp(0, 1)


def adjust_contrast(images, factor):
    return blend(images, to_gray(images).mean((2, 3), keepdim=True), factor)


def adjust_saturation(images, factor):
    return blend(images, to_gray(images), factor)


def adjust_hue(images, shift):
    """Turns the hue by shift (B,1,1,1) of a full circle, −0.5..0.5, through HSV; value and chroma stay."""
    r, g, b = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    channel = 5 - 2 * torch.arange(3, device=images.device).view(1, 3, 1, 1)                      # red, green, blue
    k = (channel + hue.unsqueeze(1) + 6 * shift) % 6                                              # sixths of a circle
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


class MultiCropTransform:
    """Global and local crops, each picture with its own box, flip, colours and grayscale.

    Called on a PIL picture or a (3,H,W) uint8 tensor → list of V float tensors (3,S,S); on a (B,3,H,W) uint8 batch →
    list of V float tensors (B,3,S,S) on its device. Global crops first. Values are normalised with mean and std (three
    numbers each, of pixels in 0..1). Random numbers come from torch's generator of that device.
    """

    def __init__(self, global_size=32, local_size=32, global_crops=2, local_crops=6, global_scale=(0.4, 1.0),
                 local_scale=(0.1, 0.4), flip=True, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, grayscale_prob=0.2,
                 mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)):
        self.views = [(global_size, global_scale)] * global_crops + [(local_size, local_scale)] * local_crops
        self.flip, self.jitter, self.jitter_prob, self.grayscale_prob = flip, jitter, jitter_prob, grayscale_prob
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __call__(self, images):
        if not (isinstance(images, torch.Tensor) and images.ndim == 4):
            return [view[0] for view in self(as_uint8(images).unsqueeze(0))]
        if images.dtype != torch.uint8 or images.shape[1] != 3:
            raise InputError(f"pictures must be uint8 of shape (B,3,H,W), not {images.dtype} {tuple(images.shape)}")
        pixels = images.float() / 255
        mean, std = (t.to(images.device, non_blocking=True) for t in (self.mean, self.std))
        return [(self.view(pixels, size, scale) - mean) / std for size, scale in self.views]

    def view(self, pixels, size, scale):
        """pixels (B,3,H,W) in 0..1 → (B,3,size,size) in 0..1: one random view of each picture."""
        (batch, _, height, width), device = pixels.shape, pixels.device
        flip = torch.rand(batch, device=device) < 0.5 * self.flip
        x = crop_and_resize(pixels, *random_boxes(batch, height, width, scale, device), flip, size)
        changed = torch.rand(batch, 1, 1, 1, device=device) < self.jitter_prob
        strength = [torch.where(changed, torch.empty(batch, 1, 1, 1, device=device).uniform_(-s, s), 0)
                    for s in self.jitter]
        for i in torch.randperm(4).tolist():                    # one order a view; drawn on the CPU: no wait for a GPU
            if self.jitter[i]:
                adjust = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)[i]
                x = adjust(x, strength[i] if i == 3 else (1 + strength[i]).clamp(min=0))
        gray = torch.rand(batch, 1, 1, 1, device=device) < self.grayscale_prob
        return torch.where(gray, to_gray(x), x)


class MultiCropDataset(torch.utils.data.Dataset):
    """Pictures, held as one uint8 tensor, that come out as crops.

    dataset: (N,3,H,W) uint8 tensor on any device, or anything else that `as_pictures` takes. `[i]` → list of V crops
    (3,S,S) of picture i; `__getitems__(indices)` → list of V batches (len(indices),3,S,S) in one vectorised call.
    """

    def __init__(self, dataset, transform):
        self.images, self.transform = as_pictures(dataset).train_images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])

    def __getitems__(self, indices):
        return self.transform(self.images[torch.as_tensor(indices).to(self.images.device, non_blocking=True)])


# ----------------------------------------------------------------------------------------------------------------------
# Data: where pictures come from
# ----------------------------------------------------------------------------------------------------------------------

class Pictures(NamedTuple):
    """A data set in memory: images uint8 (N,3,H,W), labels int64 (N,) or None, test images or None; a name for reports;
    where known, masks bool (N,H,W) of what is foreground."""
    train_images: torch.Tensor
    train_labels: torch.Tensor = None
    test_images: torch.Tensor = None
    test_labels: torch.Tensor = None
    name: str = "your pictures"
    train_masks: torch.Tensor = None
    test_masks: torch.Tensor = None


def as_uint8(picture, size=None):
    """A PIL picture of any mode, or a uint8 tensor (…,3,H,W) → uint8 tensor; with size, resized and centre-cropped to it."""
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":                              # 16 bits and more a pixel: Pillow would clip, not scale
            deep = np.asarray(picture, np.float32)
            picture = Image.fromarray((deep * (255 / max(deep.max(), 1))).astype(np.uint8))
        picture = picture.convert("RGB")
        if size and picture.size != (size, size):
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        return TF.pil_to_tensor(picture)
    if not isinstance(picture, torch.Tensor) or picture.dtype != torch.uint8 or picture.ndim not in (3, 4) or picture.shape[-3] != 3:
        raise InputError(f"a picture must be a PIL image or a uint8 tensor of shape (3,H,W) or (N,3,H,W), not "
                         f"{getattr(picture, 'dtype', type(picture).__name__)} {tuple(getattr(picture, 'shape', ()))}")
    if size and picture.shape[-2:] != (size, size):
        side = min(picture.shape[-2:])
        parts = picture.split(max(1, 2 ** 24 // max(side, size) ** 2)) if picture.ndim == 4 else [picture]  # resizing works in floats
        parts = [TF.resize(TF.center_crop(part, side), [size, size], TF.InterpolationMode.BICUBIC, antialias=True) for part in parts]
        picture = torch.cat(parts) if picture.ndim == 4 else parts[0]
    return picture


def as_pictures(dataset, size=None):
    """Whatever a notebook has → Pictures: a uint8 tensor (N,3,H,W), a tuple (images, labels) or (train images, train
    labels, test images, test labels), or a sequence of PIL pictures or of (PIL picture, label), such as torchvision's."""
    if isinstance(dataset, torch.Tensor):
        dataset = (dataset,)
    if not isinstance(dataset, tuple):                           # a sequence, read once
        try:
            items = [dataset[i] for i in range(len(dataset))]
            labelled = isinstance(items[0], tuple)
            dataset = (torch.stack([as_uint8(item[0] if labelled else item, size) for item in items]),
                       torch.tensor([int(item[1]) for item in items]) if labelled else None)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:                       # a generator, no number, nothing, two sizes
            raise InputError(f"the data set ({type(dataset).__name__}) must be a sequence of at least BATCH_SIZE pictures of a size, each "
                             f"alone or with its label as (picture, number): {brief(error)}") from None
    if not isinstance(dataset, Pictures) and len(dataset) not in (1, 2, 4):
        raise InputError(f"a tuple of {len(dataset)} is no data set; give (images, labels) or (train images, train labels, test images, test labels)")
    pictures = Pictures(*dataset)
    for split, images, labels, masks in (("training", *pictures[:2], pictures.train_masks), ("test", *pictures[2:4], pictures.test_masks)):
        if images is not None and not (isinstance(images, torch.Tensor) and images.ndim == 4 and images.numel()):
            raise InputError(f"{split} images must be a uint8 tensor (N,3,H,W) of at least one picture, not {type(images).__name__} "
                             f"{tuple(getattr(images, 'shape', ()))}")
        count = 0 if images is None else len(images)
        if labels is not None and (not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex()
                                   or labels.shape != (count,) or not count or not 0 <= labels.long().min() <= labels.long().max() < 2 ** 16):
            raise InputError(f"{split} labels must be a tensor of {count} whole numbers from 0 to 65,535, one a picture, not "
                             f"{getattr(labels, 'dtype', type(labels).__name__)} {tuple(getattr(labels, 'shape', ()))}")
        sides = () if images is None else (size, size) if size else images.shape[-2:]
        if masks is not None and tuple(getattr(masks, "shape", ())) != (count, *sides):
            raise InputError(f"{split} masks must be a tensor {(count, *sides)}, one a picture at IMAGE_SIZE, not {tuple(getattr(masks, 'shape', ()))}")
    pictures = pictures._replace(**{name: getattr(pictures, name).long() for name in ("train_labels", "test_labels")
                                    if getattr(pictures, name) is not None})
    return pictures._replace(train_images=as_uint8(pictures.train_images, size), test_images=None
                             if pictures.test_images is None else as_uint8(pictures.test_images, size))


def make_shapes(count, size=32, seed=0, masks=False):
    """Ten classes of shape, drawn with NumPy → images uint8 (count,3,size,size), labels int64 (count,); with masks also
    bool (count,size,size), true where the shape covers at least half of a pixel.

    Disc, ring, square, frame, triangle, plus, star, crescent, bow tie, ell: the class tells the shape and nothing else.
    Colours, size, place, a tilt of up to 15°, the background's gradient and its noise are drawn alike for all classes.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    column = (count, 1, 1)
    radius = rng.uniform(0.2, 0.4, column)                                                        # shares of the side
    centre = [rng.uniform(radius, 1 - radius) for _ in "xy"]
    tilt = rng.uniform(-np.pi / 12, np.pi / 12, column)
    grid = (np.arange(3 * size) + 0.5) / (3 * size)                                               # 3 × 3 samples a pixel
    x, y = (grid[None, None, :] - centre[0]) / radius, (grid[None, :, None] - centre[1]) / radius
    u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x               # v points down
    inside = np.zeros(u.shape, bool)
    for label in range(10):
        mine = labels == label
        a, b = u[mine], v[mine]
        r, larger, smaller = np.hypot(a, b), np.maximum(abs(a), abs(b)), np.minimum(abs(a), abs(b))
        ray = abs((np.arctan2(a, -b) * 5 / (2 * np.pi)) % 1 - 0.5) * 2                            # 1 on the star's five rays
        inside[mine] = (r < 0.9, (r < 1) & (r > 0.6), larger < 0.8, (larger < 0.85) & (larger > 0.5),
                        (b < 0.7) & (b > 1.9 * abs(a) - 0.9), (smaller < 0.28) & (larger < 0.95), r < 0.4 + 0.6 * ray ** 2,
                        (r < 1) & (np.hypot(a - 0.5, b) > 0.8), (abs(b) < 0.9 * abs(a)) & (abs(a) < 0.9),
                        (larger < 0.85) & ~((a > -0.2) & (b < 0.2)))[label]
    alpha = inside.reshape(count, size, 3, size, 3).mean((2, 4))[:, None]                         # (count, 1, size, size)
    colour = rng.uniform(0, 1, (3, count, 3, 1, 1))                                               # shape, background from, to
    near = np.linalg.norm(colour[0] - colour[1:].mean(0), axis=1, keepdims=True) < 0.5
    colour[0] = np.where(near, (colour[1:].mean(0) + 0.5) % 1, colour[0])                         # a shape must be visible
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1, 1))
    place = (np.arange(size) + 0.5) / size - 0.5
    slope = 0.5 + 0.7 * (np.cos(angle) * place + np.sin(angle) * place[:, None])
    pixels = alpha * colour[0] + (1 - alpha) * (colour[1] + slope * (colour[2] - colour[1]) * 0.5)
    pixels = pixels + rng.normal(0, 0.03, pixels.shape)
    images = torch.from_numpy((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return (images, torch.from_numpy(labels)) + (torch.from_numpy(alpha[:, 0] >= 0.5),) * masks


def memory_of(device):
    """→ bytes that are free on a GPU, or that the machine has; infinite where it does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):                # Windows
        return math.inf


def require_memory(count, size, device):
    """Raises InputError where count pictures of size × size pixels, at 3 bytes a pixel, leave no room on the device."""
    need, room = 3 * count * size ** 2, memory_of(device)
    if need > 0.5 * room:
        raise InputError(f"{count:,} pictures of {size} × {size} pixels take {need / 2 ** 30:.1f} GiB, more than half of "
                         f"the {room / 2 ** 30:.1f} GiB there; use fewer or a smaller IMAGE_SIZE ({size})")


@contextmanager
def network_timeout(seconds):
    """Inside, a dead network connection raises an error after so many seconds instead of never."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def load_cifar(name, root):
    """→ Pictures of CIFAR-10 or CIFAR-100 through torchvision, which checks its archive's md5; downloads it if missing."""
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        parts = [source(root, train) for train in (True, False)]
    except RuntimeError:                                         # not there, or not whole
        try:
            with network_timeout(10):
                parts = [source(root, train, download=True) for train in (True, False)]
        except Exception as error:                               # a network fails in many kinds
            raise InputError(f"{name} is not in DATA_PATH ({root!r}) and could not be downloaded ({error}); put "
                             f"{source.filename} there, or use --dataset shapes") from None
    return Pictures(*[t for part in parts for t in (torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))],
                    name=name)


def load_npz(path, size, device):
    """→ Pictures of a NumPy archive with x_train, y_train, x_test, y_test (uint8 NHWC, whole numbers)."""
    try:
        with zipfile.ZipFile(path) as archive:
            require_memory(sum(entry.file_size for entry in archive.infolist()) // 3, 1, device)
        with np.load(path, allow_pickle=False) as archive:
            parts = {key: archive[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: {error}; it must hold x_train, y_train, x_test and y_test") from None
    except Exception as error:                                   # NumPy and zlib raise many kinds for a broken file
        raise InputError(f"{path} is not a readable .npz file without pickled objects: {error}") from None
    for split in ("train", "test"):
        x, y = np.asarray(parts[f"x_{split}"]), np.asarray(parts[f"y_{split}"])
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or 0 in x.shape:
            raise InputError(f"{path}: x_{split} is {x.dtype} {x.shape}; it must be uint8 of shape (N, height, width, 3)")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0 or y.max() >= 2 ** 16:
            raise InputError(f"{path}: y_{split} is {y.dtype} {y.shape}; it must be {len(x)} whole numbers from 0 to 65,535, one a picture")
        require_memory(len(x), size, device)
        parts[f"x_{split}"] = as_uint8(torch.from_numpy(x).permute(0, 3, 1, 2), size)
        parts[f"y_{split}"] = torch.from_numpy(y.astype(np.int64))
    return Pictures(parts["x_train"], parts["y_train"], parts["x_test"], parts["y_test"], Path(path).name)


def load_folder(path, size, device):
    """→ Pictures of a folder: train/<class>/… and test/<class>/…, or any pictures below it, then without labels.

    Left out and named in a warning: what is no picture, broken or of far too many pixels, and links out of the folder.
    """
    formats = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow hands others, such as EPS, to outside programs
    endings = {ending for ending, name in Image.registered_extensions().items() if name in formats}
    unreadable, inside = [], Path(path).resolve()

    def read(file):
        try:
            if not file.resolve().is_relative_to(inside):
                raise ValueError("a link out of the folder")
            if not file.is_file():                               # a link to a pipe would be waited for
                raise ValueError("no file")
            if file.suffix.lower() not in endings:
                raise ValueError("its name does not end like a picture's")
            with Image.open(file, formats=formats) as picture:
                return as_uint8(picture, size)
        except Exception as error:                               # Pillow raises many kinds for a broken file
            unreadable.append(f"{file} ({error})")

    def gather(folder):
        files = sorted(f for f in folder.rglob("*") if (f.is_file() or f.is_symlink()) and not f.name.startswith("."))
        require_memory(len(files), size, device)
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:                             # around all threads: the
            warnings.simplefilter("ignore")                                                       # filters are the process's
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            found = [(f, image) for f, image in zip(files, pool.map(read, files)) if image is not None]
        if not found:
            raise InputError(f"{folder} holds no readable picture; give a folder of pictures or of train/<class>/… ones")
        return [f for f, _ in found], torch.stack([image for _, image in found])

    root = Path(path)
    if (root / "train").is_dir():
        classes = sorted({f.name for split in ("train", "test") for f in (root / split).glob("*") if f.is_dir()})
        splits = []
        for folder in [root / split for split in ("train", "test") if (root / split).is_dir()]:
            files, images = gather(folder)
            loose = [f for f in files if f.parent == folder]
            labels = None if loose else torch.tensor([classes.index(f.relative_to(folder).parts[0]) for f in files])
            splits += [images, labels]
        pictures = Pictures(*splits, **{"name": root.name})
    else:
        pictures = Pictures(gather(root)[1], name=root.name)
    if unreadable:
        warnings.warn(plain(f"{len(unreadable)} file{'s' * (len(unreadable) > 1)} left out: {', '.join(sorted(unreadable))}"))
    return pictures


def load_pictures(config):
    """→ Pictures on config.DEVICE from the source that config.DATASET names; InputError where there is none."""
    c, size = config, config.IMAGE_SIZE
    if c.DATASET in ("auto", "cifar10", "cifar100"):
        try:
            pictures = load_cifar("cifar10" if c.DATASET == "auto" else c.DATASET, c.DATA_PATH)
        except InputError as error:
            if c.DATASET != "auto":
                raise
            line = "!" * 100
            print(f"{line}\nWARNING: no CIFAR-10: {error}.\nTraining on the BUILT-IN SHAPES instead; no number below is "
                  f"a CIFAR-10 number.\n{line}", file=sys.stderr, flush=True)
            pictures = load_shapes(size)._replace(name="shapes (fallback: no CIFAR-10)")
    elif c.DATASET == "shapes":
        pictures = load_shapes(size)
    elif not Path(c.DATASET).exists():
        raise InputError(f"DATASET ({c.DATASET!r}) is neither a file nor a folder nor one of auto, cifar10, cifar100, shapes")
    elif Path(c.DATASET).is_dir():
        pictures = load_folder(c.DATASET, size, c.DEVICE)
    elif c.DATASET.endswith(".npz"):
        pictures = load_npz(c.DATASET, size, c.DEVICE)
    else:
        raise InputError(f"DATASET ({c.DATASET!r}) must be a .npz file or a folder")
    return pictures


def load_shapes(size):
    if size > 64:
        raise InputError(f"IMAGE_SIZE ({size}) is above the 64 pixels that the built-in shapes are drawn at; lower it or give pictures")
    train, test = make_shapes(2048, size, seed=0, masks=True), make_shapes(512, size, seed=1, masks=True)
    return Pictures(*train[:2], *test[:2], "shapes", train[2], test[2])


def prepare_pictures(config, dataset=None):
    """→ Pictures at IMAGE_SIZE on DEVICE, cut to TRAIN_IMAGES, from dataset or else from config.DATASET."""
    c = config
    pictures = load_pictures(c) if dataset is None else dataset
    pictures = as_pictures(pictures, c.IMAGE_SIZE)
    count = len(pictures.train_images)
    if 0 < c.TRAIN_IMAGES < count:                               # random, since files are often sorted by class
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:c.TRAIN_IMAGES].sort().values
        pictures = pictures._replace(**{name: getattr(pictures, name)[chosen] for name in ("train_images", "train_labels", "train_masks")
                                        if getattr(pictures, name) is not None})
    if pictures_per_step(c) > len(pictures.train_images):
        raise InputError(f"BATCH_SIZE ({c.BATCH_SIZE}) makes {pictures_per_step(c):,} pictures a step, more than there are for training "
                         f"({len(pictures.train_images):,}); lower it or ACCUMULATE ({c.ACCUMULATE}), or give more pictures")
    require_memory(len(pictures.train_images), c.IMAGE_SIZE, c.DEVICE)
    return Pictures(*[part.to(c.DEVICE) if isinstance(part, torch.Tensor) else part for part in pictures])


def pixel_statistics(images):
    """(N,3,H,W) uint8 → mean and standard deviation of each channel in 0..1, as two lists of three numbers."""
    flat = images.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(channel.int(), minlength=256) for channel in flat]).cpu().double()  # exact, small; MPS has no double
    level = torch.arange(256, dtype=torch.double) / 255
    mean = (counts * level).sum(1) / counts.sum(1)
    std = ((counts * (level - mean[:, None]) ** 2).sum(1) / counts.sum(1)).sqrt()
    return mean.tolist(), std.clamp(min=1e-3).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: every line but those that call these functions is written for one
# ----------------------------------------------------------------------------------------------------------------------

def world_size():
    """→ W, the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """→ this process's number, from 0; number 0 alone writes files and talks."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(tensor, operation="SUM"):
    """Sum or maximum over all processes, in place, without gradient; on one process the identity."""
    if world_size() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


class SumOverProcesses(torch.autograd.Function):
    """all_reduce with a gradient: what one process adds changes the loss of all of them."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format))


def gather_rows(x):
    """(B,D) on each of W processes → (W·B,D), in the order of the processes, with gradient; on one process x itself."""
    if world_size() == 1:
        return x
    return SumOverProcesses.apply(F.pad(x, (0, 0, rank() * len(x), (world_size() - 1 - rank()) * len(x))))


def largest(number):
    """→ the largest of all processes' numbers: what one of them wants, all do."""
    return all_reduce(torch.tensor(float(number)), "MAX").item()


def of_all(value):
    """→ list of every process's value, any that can be pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def whole(state):
    """→ a tensor, or all those of a nested dict, on the CPU; sharded ones put together (SHARD), on process 0 alone."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if not torch.is_tensor(state):
        return state
    full = state.full_tensor() if hasattr(state, "full_tensor") else state                        # all processes must ask
    return full.cpu() if rank() == 0 else None


def share_of(value, like):
    """→ this process's share of a whole tensor where `like` is sharded and of its shape; else the value itself."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)        # every process has read it


# ----------------------------------------------------------------------------------------------------------------------
# Model: a pre-norm Vision Transformer (2010.11929) and the projection heads
# ----------------------------------------------------------------------------------------------------------------------

class PatchEmbedding(nn.Module):
    """Cuts a picture into patches and projects each: (B,C,H,W) → (B,N,D), row by row from the top left."""

    def __init__(self, img_size, patch_size, in_channels=3, embed_dim=384):
        super().__init__()
        self.patch_size, self.num_patches = patch_size, (img_size // patch_size) ** 2
        self.projection = nn.Linear(in_channels * patch_size ** 2, embed_dim)

    def forward(self, x):
        p = self.patch_size
        if x.shape[-2] % p or x.shape[-1] % p:
            raise InputError(f"height and width {tuple(x.shape[-2:])} must be multiples of the patch size ({p})")
        return self.projection(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))


class MultiHeadAttention(nn.Module):
    """Self-attention, (B,T,D) → (B,T,D). One product makes queries, keys and values of all heads."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, dropout=0.0):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"width {dim} must be a multiple of the number of heads ({num_heads})")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)

    def heads(self, x):
        """→ queries, keys, values, (B, heads, T, D / heads) each."""
        return [rearrange(part, "b t (h d) -> b h t d", h=self.num_heads) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x, rows=None):
        q, k, v = self.heads(x)
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
            # For some dozens of tokens in bfloat16 torch's fused CPU kernel takes 3 times as long, backwards included
            x = F.dropout(self.weights(q, k), dropout) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = rearrange(x, "b h t d -> b t (h d)")
        x = x if rows is None else x.flatten(0, 1)[rows]                                          # (R,D)
        return F.dropout(self.projection(x), dropout)

    @staticmethod
    def weights(q, k):
        """(B, heads, T, D / heads) twice → (B, heads, T, T), rows sum to 1."""
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)

    def attention_weights(self, x):
        """(B,T,D) → (B, heads, T, T): how much each token (row) attends to each."""
        return self.weights(*self.heads(x)[:2])


class MLP(nn.Module):
    """Two linear layers with a GELU between, along the last dimension."""

    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0):
        super().__init__()
        self.expand = nn.Linear(in_features, hidden_features or in_features)
        self.contract = nn.Linear(hidden_features or in_features, out_features or in_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.contract(self.dropout(F.gelu(self.expand(x)))))


class ResidualBranch(nn.Module):
    """x → x + scale · layer(norm(x)), left out for a random share drop_path of the samples in training.

    scale is LayerScale (2103.17239), one learned number a channel, or 1 where layer_scale is 0; kept samples are
    scaled up by 1 / (1 − drop_path), so that the expectation stays (stochastic depth, 1603.09382).
    """

    def __init__(self, dim, layer, layer_scale=0.0, drop_path=0.0):
        super().__init__()
        self.norm, self.layer, self.drop_path = nn.LayerNorm(dim, eps=1e-6), layer, drop_path
        self.scale = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None

    def forward(self, x, rows=None):
        if rows is None:
            branch = self.layer(self.norm(x))
        else:                                                    # of an attention, which must see all tokens
            branch, x = self.layer(self.norm(x), rows), x.flatten(0, 1)[rows]
        if self.scale is not None:
            branch = branch * self.scale
        if self.training and self.drop_path:
            kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
            branch = branch * kept / (1 - self.drop_path)
        return x + branch


class TransformerBlock(nn.Module):
    """Attention, then MLP, each a residual branch: (B,T,D) → (B,T,D).

    rows (R,): where only these tokens of x.flatten(0, 1) will be read → (R,D); all of them still are attended to.
    """

    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, dropout=0.0, layer_scale=0.0, drop_path=0.0):
        super().__init__()
        self.attention = ResidualBranch(dim, MultiHeadAttention(dim, num_heads, qkv_bias, dropout), layer_scale, drop_path)
        self.mlp = ResidualBranch(dim, MLP(dim, int(dim * mlp_ratio), dropout=dropout), layer_scale, drop_path)

    def forward(self, x, rows=None):
        if rows is None:
            return self.mlp(self.attention(x))
        if self.training and self.mlp.drop_path:                 # skips whole samples, which rows no longer tell apart
            return self.forward(x).flatten(0, 1)[rows]
        return self.mlp(self.attention(x, rows))


class VisionTransformer(nn.Module):
    """(B,C,H,W) → class token (B,D) and patch tokens (B,N,D), for any H and W that are multiples of patch_size.

    mask (B,N) bool: where it is True a learned token stands in for the patch (iBOT, section 3.2). positions (M,): where
    only these of the B·N patches will be read → class token and (M,D); the last block leaves the others out, which saves
    most of its work. `pixel_mean` and `pixel_std` travel with the weights, so that a loaded network can be given plain pictures by `extract_features`.
    """

    def __init__(self, img_size=32, patch_size=4, in_channels=3, embed_dim=384, depth=6, num_heads=6, mlp_ratio=4.0,
                 qkv_bias=True, dropout=0.0, layer_scale=0.0, drop_path=0.0, register_tokens=0):
        super().__init__()
        self.patch_embed = PatchEmbedding(img_size, patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.registers = nn.Parameter(torch.zeros(1, register_tokens, embed_dim), requires_grad=register_tokens > 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, dropout, layer_scale, rate)
                                    for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.register_buffer("pixel_mean", torch.zeros(in_channels, 1, 1))
        self.register_buffer("pixel_std", torch.ones(in_channels, 1, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)            # 0.02 is for widths of 768 and more: narrow networks stall
                nn.init.zeros_(layer.bias) if layer.bias is not None else None
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.registers, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.5)           # as strong as the patches: short runs must see places

    def interpolate_pos_encoding(self, x, w, h):
        """Position embedding for pictures of w × h pixels → (1,1+N,D): the learned grid, resized bicubically in fp32.

        x: the tokens that it is for, which tell the device. The class token's part stays as it is.
        """
        p, side = self.patch_embed.patch_size, math.isqrt(self.pos_embed.shape[1] - 1)
        if (h // p, w // p) == (side, side):
            return self.pos_embed
        grid = rearrange(self.pos_embed[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
        antialias = x.device.type != "mps"                       # not implemented there
        grid = F.interpolate(grid, size=(h // p, w // p), mode="bicubic", antialias=antialias, align_corners=False)
        return torch.cat([self.pos_embed[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], 1)

    def tokens(self, x, mask=None):
        """(B,C,H,W) → (B,T,D), the input of the first block: class token, registers, patches."""
        height, width = x.shape[-2:]
        x = self.patch_embed(x)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        place = self.interpolate_pos_encoding(x, width, height)
        first = torch.cat([self.cls_token + place[:, :1], self.registers], 1).expand(len(x), -1, -1)
        # In autocast's bfloat16 up to the last norm, so that the sum of all branches, too, is half as much to move. Only
        # with LayerScale it turns fp32 in the first block: bfloat16 would swallow branches of 1e-5
        return torch.cat([first.to(x.dtype), (x + place[:, 1:]).to(x.dtype)], 1)

    def forward(self, x, mask=None, positions=None):
        x, rows = self.tokens(x, mask), None
        (batch, tokens, _), first = x.shape, 1 + self.registers.shape[1]
        if positions is not None:
            classes = torch.arange(batch, device=x.device) * tokens
            rows = torch.cat([classes, positions + (positions // (tokens - first) + 1) * first])  # skips what is no patch
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.norm(self.blocks[-1](x, rows).to(self.norm.weight.dtype))
        return (x[:, 0], x[:, first:]) if rows is None else (x[:batch], x[batch:])

    def class_attention(self, x):
        """(B,C,H,W) → (B, heads, H / patch, W / patch): how much the last block's class token attends to each patch."""
        rows = x.shape[-2] // self.patch_embed.patch_size
        x = self.tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1].attention
        weights = last.layer.attention_weights(last.norm(x))[:, :, 0, 1 + self.registers.shape[1]:]
        return rearrange(weights, "b heads (h w) -> b heads h w", h=rows)


def build_backbone(config):
    """→ an untrained VisionTransformer with the sizes of config."""
    c, (width, depth, heads) = config, config.MODEL_DIMS[config.MODEL_SIZE]
    return VisionTransformer(c.IMAGE_SIZE, c.PATCH_SIZE, 3, width, depth, heads, dropout=c.DROPOUT,
                             layer_scale=c.LAYER_SCALE, drop_path=c.DROP_PATH, register_tokens=c.REGISTER_TOKENS)


def initialise_linear(module):
    """Weights from a normal distribution cut at two standard deviations of 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last dimension over all others, always with the statistics of the batch at hand, of all processes."""

    def __init__(self, features):
        super().__init__(features, track_running_stats=False)

    def forward(self, x):
        rows = x.flatten(0, -2)
        if world_size() > 1:
            return self.over_processes(rows.float()).view_as(x)
        return super().forward(rows).view_as(x) if len(rows) > 1 else x                           # one row has no statistics

    def over_processes(self, rows):
        count = all_reduce(torch.tensor(float(len(rows)), device=rows.device))
        centred = rows - SumOverProcesses.apply(rows.sum(0)) / count
        variance = SumOverProcesses.apply(centred.square().sum(0)) / count
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


class ProjectionHead(nn.Module):
    """Scores against K prototypes: (…,input_dim) → (…,output_dim) logits, cosines in −1..1 (DINO, appendix C).

    Three linear layers with GELU, L2 normalisation, then cosines to the rows of `prototypes`: a weight-normed layer
    without bias, whose magnitudes are frozen at 1. batch_norm normalises both hidden layers and the bottleneck.
    """

    def __init__(self, input_dim, output_dim, hidden_dim=None, bottleneck_dim=256, batch_norm=False):
        super().__init__()
        hidden_dim = hidden_dim or 4 * input_dim
        norm = BatchNorm if batch_norm else nn.Identity
        self.layers = nn.Sequential(nn.Linear(input_dim, hidden_dim), norm(hidden_dim), nn.GELU(),
                                    nn.Linear(hidden_dim, hidden_dim), norm(hidden_dim), nn.GELU(),
                                    nn.Linear(hidden_dim, bottleneck_dim), norm(bottleneck_dim))
        self.prototypes = nn.Parameter(torch.empty(output_dim, bottleneck_dim))
        self.apply(initialise_linear)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x):
        x = unit(self.layers(x))
        with torch.autocast(x.device.type, enabled=False):       # over a temperature of 0.02, bfloat16 would be off by 0.2
            return F.linear(x, unit(self.prototypes))


def unit(x):
    """x → x / |x| along the last dimension in fp32, for |x| from 1e-12 to the largest float: its largest entry is divided out before
    squares are taken. Shorter x come out shorter, so that a gradient grows by 1e12 at most."""
    x = x.float()
    return F.normalize(x / x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8), dim=-1, eps=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Objective: targets, losses and masks
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def sinkhorn_knopp_centering(features, num_iters=3, epsilon=0.05):
    """Balanced soft assignment of samples to prototypes (SwAV, section 3.1; DINOv2, section 4).

    features (B,K) logits of any finite size, epsilon the temperature → (B,K) fp32 without gradient. Every row sums to
    1, every prototype gets about B / K in all; without a round it is the softmax. In the log domain: exp would overflow,
    or leave rows of 0 / 0.
    """
    log_q = (features.float() / epsilon).clamp(-1e30, 1e30)      # so that no difference of two overflows
    for _ in range(num_iters):
        peak = all_reduce(log_q.amax(0), "MAX")                                                   # (K,)
        mass = all_reduce((log_q - peak).exp().sum(0))           # over the samples of all processes; at least 1
        log_q = log_q - peak - mass.log()                        # now every prototype has the same mass
        log_q = log_q.log_softmax(1)                             # now every sample has mass 1
    return log_q.exp() if num_iters else log_q.softmax(1)


def cross_entropy(logits, targets, temperature):
    """Cross-entropy −Σ_k t_k log softmax(s / τ)_k of each row in fp32: (…,K) logits, (…,K) distributions → (…)."""
    logits = logits.float() / temperature
    return logits.logsumexp(-1) - (targets * logits).sum(-1)     # the same, since Σ t_k = 1, without a (…,K) of logs


def entropy(probabilities):
    """(…,K) distributions → (…) in nats; 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum(-1)


def teacher_distribution(teacher_output, teacher_temp):
    """Logits → softmax(logits / teacher_temp); with teacher_temp None they are a distribution already."""
    return teacher_output.float() if teacher_temp is None else (teacher_output.float() / teacher_temp).softmax(-1)


def dino_loss(student_output, teacher_output, teacher_temp=0.04, student_temp=0.1):
    """Image-level loss of matching rows (DINO, equation 2): student logits (…,K), teacher logits (…,K) → scalar mean.

    With teacher_temp=None the teacher's rows already are distributions, such as Sinkhorn-Knopp's.
    """
    targets = teacher_distribution(teacher_output, teacher_temp)
    return cross_entropy(student_output, targets, student_temp).mean()


def multi_crop_dino_loss(student_output, targets, student_temp=0.1):
    """DINO loss over all pairs of a student view and a *different* teacher view of a picture (DINO, equation 3).

    student_output (V,B,K) logits, the G global views first; targets (G,B,K) distributions → scalar, the mean of the
    G·(G−1) + G·L terms. Cross-entropy is linear in its target, so a view's teachers are summed before, not after.
    """
    num_global, num_local = len(targets), len(student_output) - len(targets)
    total = targets.sum(0, keepdim=True)
    others = torch.cat([(total - targets) / (num_global - 1), (total / num_global).expand(num_local, -1, -1)])  # mean target
    views = cross_entropy(student_output, others, student_temp).mean(1)                           # (V,)
    terms = (num_global - 1) * views[:num_global].sum() + num_global * views[num_global:].sum()   # so many pairs a view
    return terms / (num_global * (num_global - 1 + num_local))


def ibot_loss(student_output, teacher_output, mask, teacher_temp=0.04, student_temp=0.1):
    """Patch-level loss at the masked positions (iBOT, equation 2): the student must tell what the teacher saw there.

    student_output, teacher_output (M,K) in the order of mask.flatten(); mask (R,N) bool of R crops → scalar: the mean
    over a crop's masked patches, then over the crops that have any. (Meta's code divides by all crops, so with half
    of them masked it shows half of this.) teacher_temp as in `dino_loss`. Nothing masked: 0.
    """
    targets = teacher_distribution(teacher_output, teacher_temp)
    counts = mask.sum(1)
    crop = masked_positions(mask, len(targets)) // mask.shape[1]
    losses = cross_entropy(student_output, targets, student_temp) / counts[crop]
    crops = all_reduce((counts > 0).sum().float()) / world_size()                                 # the mean over processes is over all crops
    return losses.sum() / crops.clamp(min=1 / world_size())


def koleo_regularizer(features, kind="cosine"):
    """Spreads features (B,D) over the sphere → scalar, lower is more even, 0 for one row.

    "nearest": −mean log(distance to the nearest other row + 1e-8) of the unit vectors (1806.03198, equation 2); −ln 2
    for two opposite ones. "cosine": mean squared cosine between different rows; 0 orthogonal, 1 identical. Of several
    processes the rows are one batch.
    """
    x = gather_rows(unit(features))
    rows = len(x)
    if rows < 2:
        return x.sum() * 0
    with torch.autocast(x.device.type, enabled=False):           # 1e-8 vanishes in half precision
        cosine = x @ x.T
        if kind == "cosine":
            return (cosine.square().sum() - cosine.diagonal().square().sum()) / (rows * (rows - 1))
        nearest = cosine.detach().fill_diagonal_(-2).argmax(1)
        return -((x - x[nearest]).norm(dim=1) + 1e-8).log().mean()


def masked_positions(mask, count):
    """(R,N) bool with count True entries in all → their positions in mask.flatten(), in order, (count,).

    A stable sort and a known count instead of `nonzero`, which would wait for the GPU to tell the size.
    """
    return mask.flatten().byte().argsort(descending=True, stable=True)[:count]


def fill_mask(mask, counts):
    """Masks more patches at random: (R,N) bool and the wanted numbers (R,) → (R,N) bool with exactly so many True."""
    order = torch.rand(mask.shape, device=mask.device) - mask.float()                             # what is masked stays first
    return order.argsort(1).argsort(1) < counts.unsqueeze(1)


def generate_random_mask(batch_size, num_patches, mask_ratio, device="cpu"):
    """→ bool (batch_size, num_patches), exactly int(mask_ratio · num_patches) True in each row, at random."""
    counts = torch.full((batch_size,), int(mask_ratio * num_patches), device=device)
    return fill_mask(torch.zeros(batch_size, num_patches, dtype=torch.bool, device=device), counts)


def generate_block_mask(counts, height, width, attempts=10):
    """Rectangles of masked patches (BEiT, algorithm 1), for all crops at once → bool (R, height · width).

    counts (R,): exactly so many True in each row. A rectangle has an area between 4 and what is missing, a log-uniform
    aspect of 0.3 to 1/0.3, a random place, and is left out where it would mask too many; the rest is filled at random.
    """
    device, mask = counts.device, torch.zeros(len(counts), height, width, dtype=torch.bool, device=counts.device)
    y, x = torch.arange(height, device=device).view(1, -1, 1), torch.arange(width, device=device).view(1, 1, -1)
    for _ in range(attempts):
        missing = counts - mask.sum((1, 2))
        draw = torch.rand(4, len(counts), 1, 1, device=device)
        area = 4 + draw[0] * (missing.view(-1, 1, 1) - 4)
        aspect = (math.log(0.3) * (1 - 2 * draw[1])).exp()
        h, w = (area.clamp(min=0) * aspect).sqrt().round(), (area.clamp(min=0) / aspect).sqrt().round()
        top, left = (draw[2] * (height - h + 1)).floor(), (draw[3] * (width - w + 1)).floor()
        block = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
        new = (block & ~mask).sum((1, 2))
        fits = (missing >= 4) & (new <= missing) & (h <= height).flatten() & (w <= width).flatten()
        mask |= block & fits.view(-1, 1, 1)
    return fill_mask(mask.flatten(1), counts)


def mask_counts(crops, num_patches, mask_ratio, mask_prob):
    """How many patches to mask in each of so many crops → list of ints, the same at every step, so that shapes stay.

    The share mask_prob of the crops is masked, crop i of the n masked ones by the middle of the i-th n-th of
    [1/3, 5/3] · mask_ratio / mask_prob (with 0.15 and 0.5 the published 0.1 to 0.5); the others have 0.
    """
    masked = round(crops * mask_prob)
    ratios = [mask_ratio / mask_prob * (1 / 3 + 4 / 3 * (i + 0.5) / masked) for i in range(masked)]
    return [min(num_patches, max(1, round(ratio * num_patches))) if mask_ratio else 0 for ratio in ratios] + [0] * (crops - masked)


def draw_masks(config, device):
    """→ bool (G·B, N) for the global crops of a batch; which crops are masked, and where, is random."""
    c, side = config, config.GLOBAL_CROP_SIZE // config.PATCH_SIZE
    counts = torch.tensor(mask_counts(c.GLOBAL_CROPS_NUMBER * c.BATCH_SIZE, side ** 2, c.MASK_RATIO, c.MASK_PROB))
    counts = counts[torch.randperm(len(counts))].to(device, non_blocking=True)
    if c.MASK_KIND == "block":
        return generate_block_mask(counts, side, side)
    return fill_mask(torch.zeros(len(counts), side ** 2, dtype=torch.bool, device=device), counts)


def local_tensors(module):
    """→ list of a module's parameters, or of this process's shares of them."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]


class DINOv2(nn.Module):
    """Student and teacher, each with its backbone and its own untied heads for pictures and for patches.

    `forward(views, mask, teacher_temp)`: the V crops as a list of (B,3,S,S), global ones first; the mask (G·B,N) of the
    global crops, view by view; the temperature → dict of scalars: losses `img`, `patch`, `koleo` and their weighted sum
    `loss`, and, without gradient, the diagnostics of the image targets. masked_patches: M, where it is known; counting it
    waits for the device.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.student = build_backbone(c)
        self.img_head, self.patch_head = (ProjectionHead(
            self.student.norm.normalized_shape[0], c.PROJECTION_DIM, c.HEAD_HIDDEN_DIM, c.HEAD_BOTTLENECK_DIM, c.HEAD_BATCH_NORM) for _ in range(2))
        self.teacher, self.teacher_img_head, self.teacher_patch_head = (
            deepcopy(part).requires_grad_(False) for part in self.student_parts())
        self.train()

    def student_parts(self):
        return self.student, self.img_head, self.patch_head

    def teacher_parts(self):
        return self.teacher, self.teacher_img_head, self.teacher_patch_head

    def train(self, mode=True):
        """The teacher stays in eval mode: no dropout, no drop path."""
        super().train(mode)
        for part in self.teacher_parts():
            part.eval()
        return self

    def forward(self, views, mask, teacher_temp, masked_patches=None):
        c = self.config
        positions = masked_positions(mask, int(mask.sum()) if masked_patches is None else masked_patches)  # (M,)
        img_targets, patch_targets = self.teacher_targets(views, positions, teacher_temp)
        class_tokens, img_logits, patch_logits = self.student_outputs(views, mask, positions)
        global_tokens = class_tokens.chunk(len(views))[:c.GLOBAL_CROPS_NUMBER]                    # G × (B,D)
        losses = {
            "img": multi_crop_dino_loss(img_logits, img_targets, c.STUDENT_TEMP),
            "patch": ibot_loss(patch_logits, patch_targets, mask, None, c.STUDENT_TEMP),
            # within a crop number only: two views of one picture must not be pushed apart
            "koleo": sum(koleo_regularizer(t, c.KOLEO_KIND) for t in global_tokens) / len(global_tokens)}
        loss = c.LAMBDA_IMG * losses["img"] + c.LAMBDA_PATCH * losses["patch"] + c.LAMBDA_KOLEO * losses["koleo"]
        return {"loss": loss, **losses, **target_diagnostics(img_targets.flatten(0, 1), losses["img"])}

    @torch.no_grad()
    def teacher_targets(self, views, positions, teacher_temp):
        """What the student must predict → image targets (G,B,K) and patch targets (M,K), both from Sinkhorn-Knopp.

        All global crops are balanced jointly, and so are all masked patches.
        """
        c = self.config
        class_tokens, patches = self.teacher(torch.cat(views[:c.GLOBAL_CROPS_NUMBER]), None, positions)  # (G·B,D), (M,D)
        img_logits = self.teacher_img_head(class_tokens)
        img_targets = sinkhorn_knopp_centering(img_logits, c.SINKHORN_ITERATIONS, teacher_temp)
        patch_targets = img_targets[:0]
        if len(positions):
            patch_logits = self.teacher_patch_head(patches)
            patch_targets = sinkhorn_knopp_centering(patch_logits, c.SINKHORN_ITERATIONS, teacher_temp)
        return img_targets.unflatten(0, (c.GLOBAL_CROPS_NUMBER, -1)), patch_targets

    def student_outputs(self, views, mask, positions):
        """→ class tokens (V·B,D) before the head, image logits (V,B,K), patch logits (M,K) at the masked positions."""
        c = self.config
        class_tokens, patches = self.student(torch.cat(views[:c.GLOBAL_CROPS_NUMBER]), mask, positions)
        if c.LOCAL_CROPS_NUMBER:
            local_crops = torch.cat(views[c.GLOBAL_CROPS_NUMBER:])
            class_tokens = torch.cat([class_tokens, self.student(local_crops, None, positions[:0])[0]])
        img_logits = self.img_head(class_tokens).unflatten(0, (len(views), -1))
        patch_logits = self.patch_head(patches) if len(positions) else img_logits[0, :0]
        return class_tokens, img_logits, patch_logits

    @torch.no_grad()
    def update_teacher(self, m):
        """Teacher ← m · teacher + (1 − m) · student, backbone and heads; m in 0..1 (DINO, section 3.1)."""
        for teacher, student in zip(self.teacher_parts(), self.student_parts()):
            torch._foreach_lerp_(local_tensors(teacher), local_tensors(student), 1 - m)


@torch.no_grad()
def target_diagnostics(targets, cross_entropy_value):
    """How the targets (R,K) look, since the loss alone does not show a collapse → dict of scalars.

    teacher_entropy: of one target, ln K where the teacher says nothing. mean_entropy: of the mean target, 0 where all
    pictures get the same one. kl: what the student still gets wrong. prototypes: share that is some row's largest.
    """
    teacher_entropy = entropy(targets).mean()
    used = all_reduce(torch.zeros_like(targets[0]).index_fill(0, targets.argmax(1), 1), "MAX")
    return {"teacher_entropy": teacher_entropy, "mean_entropy": entropy(all_reduce(targets.mean(0)) / world_size()),
            "kl": cross_entropy_value.detach() - teacher_entropy, "prototypes": used.mean()}


# ----------------------------------------------------------------------------------------------------------------------
# Optimisation: everything that changes in the course of a run is computed from the step
# ----------------------------------------------------------------------------------------------------------------------

class CosineScheduler:
    """From start_val at step 0 by half a cosine to end_val at step total_steps − 1, and end_val ever after.

    With warmup_steps it first rises linearly from warmup_val, and the cosine takes what is left.
    """

    def __init__(self, start_val, end_val, total_steps, warmup_steps=0, warmup_val=0.0):
        self.start_val, self.end_val, self.total_steps = start_val, end_val, total_steps
        self.warmup_steps, self.warmup_val = warmup_steps, warmup_val

    def get_value(self, step):
        if step < min(self.warmup_steps, self.total_steps - 1):
            return self.warmup_val + (self.start_val - self.warmup_val) * step / self.warmup_steps
        last = self.total_steps - 1 - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / last) if last > 0 else 1.0
        return self.end_val + (self.start_val - self.end_val) * (1 + math.cos(math.pi * progress)) / 2


class Schedules:
    """`at(step)` → dict with the step's lr, prototype_lr, weight_decay, momentum and teacher_temp."""

    def __init__(self, config, total_steps):
        c, scale = config, math.sqrt(pictures_per_step(config) / 1024)
        self.frozen_steps = round(c.FREEZE_PROTOTYPES * total_steps)
        self.lr = CosineScheduler(c.LEARNING_RATE * scale, c.LEARNING_RATE_END * scale, total_steps, round(c.WARMUP * total_steps))
        self.weight_decay = CosineScheduler(c.WEIGHT_DECAY, c.WEIGHT_DECAY_END, total_steps)
        self.momentum = CosineScheduler(c.EMA_START, c.EMA_END, total_steps)
        self.teacher_temp = CosineScheduler(c.TEACHER_TEMP_END, c.TEACHER_TEMP_END, total_steps,
                                            round(c.TEACHER_TEMP_WARMUP * total_steps), c.TEACHER_TEMP_START)

    def at(self, step):
        lr = self.lr.get_value(step)
        return {"lr": lr, "prototype_lr": lr * (step >= self.frozen_steps), "weight_decay": self.weight_decay.get_value(step),
                "momentum": self.momentum.get_value(step), "teacher_temp": self.teacher_temp.get_value(step)}


def pictures_per_step(config):
    """→ BATCH_SIZE pictures times ACCUMULATE micro-batches times the number of processes."""
    return config.BATCH_SIZE * config.ACCUMULATE * world_size()


def make_optimizer(model):
    """→ AdamW over the student and its heads in three groups: matrices, which decay; biases, norms and single tokens,
    which do not; prototypes, which decay and have a learning rate of their own."""
    groups = {"matrices": [], "vectors": [], "prototypes": []}
    for part in model.student_parts():
        for name, parameter in part.named_parameters():
            is_matrix = parameter.ndim == 2 or name == "pos_embed"                                # single tokens are (1,n,D)
            groups["prototypes" if name == "prototypes" else "matrices" if is_matrix else "vectors"].append(parameter)
    return torch.optim.AdamW([{"name": name, "params": parameters} for name, parameters in groups.items()], lr=0.0, fused=True)


def train_step(model, optimizer, micro_batches, settings, masked_patches=None):
    """One step: losses, gradients, AdamW, then the teacher → dict of 0-dimensional tensors; nothing waits for the device.

    model: a DINOv2, or what `distribute` made of it. micro_batches: ACCUMULATE pairs (views, mask), as DINOv2.forward takes
    them, in any iterable. settings: what `Schedules.at` gives. The losses are means over the micro-batches. Where they or
    the gradient are not finite, on any process, the student stays as it is, and `skipped` is 1.
    """
    network = getattr(model, "module", model)                    # without its wrapper
    c, parts = network.config, []
    for group in optimizer.param_groups:
        group["lr"] = settings["prototype_lr" if group["name"] == "prototypes" else "lr"]
        group["weight_decay"] = 0.0 if group["name"] == "vectors" else settings["weight_decay"]
    optimizer.zero_grad(set_to_none=True)
    for views, mask in micro_batches:
        alone = len(parts) + 1 < c.ACCUMULATE and model is not network                            # processes share the last sum only
        with model.no_sync() if alone else nullcontext():
            with autocast(c):
                values = model(views, mask, settings["teacher_temp"], masked_patches)
            (values["loss"] / c.ACCUMULATE).backward()
        parts.append({name: value.detach() for name, value in values.items()})
    values = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, c.CLIP_GRAD or math.inf)
    values["grad_norm"] = grad_norm.full_tensor() if c.SHARD else grad_norm
    values["skipped"] = all_reduce(1 - torch.isfinite(values["loss"] + values["grad_norm"]).float(), "MAX")
    optimizer.found_inf = values["skipped"]                      # with it the fused AdamW leaves all as it is
    if parameters[0].device.type != "mps" or not values["skipped"]:                               # which old versions do not heed there
        optimizer.step()
    network.update_teacher(settings["momentum"])
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: what the frozen features are worth
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def extract_features(model, images, batch_size=512, patches=False):
    """Class tokens of a DINOv2 (its teacher) or a VisionTransformer, in eval mode → float32 (N,D) on the images' device.

    With patches the patch tokens instead, (N,patches,D).
    images: uint8 (N,3,H,W), normalised here with the network's own pixel_mean and pixel_std; or floats, used as they are.
    """
    backbone = getattr(model, "teacher", model)
    was_training, features = backbone.training, []
    backbone.eval()
    with torch.compiler.set_stance("force_eager"):               # any batch size, without compiling for it
        for batch in images.split(batch_size):
            x = (batch.float() / 255 - backbone.pixel_mean) / backbone.pixel_std if batch.dtype == torch.uint8 else batch
            class_tokens, tokens = backbone(x)
            features.append((tokens if patches else class_tokens).float())
    backbone.train(was_training)
    return torch.cat(features)


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07):
    """Weighted k-nearest-neighbour classification by cosine similarity → share of right answers, 0..1.

    Every one of the k nearest training rows votes for its label with exp(cosine / temperature) (DINO, section 4.1).
    """
    bank, classes, right = unit(train_features), int(train_labels.max()) + 1, 0
    for queries, labels in zip(test_features.split(1024), test_labels.split(1024)):
        cosine, nearest = (unit(queries) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(queries), classes, device=bank.device)
        votes.scatter_add_(1, train_labels[nearest], ((cosine - cosine[:, :1]) / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test_labels)


def fit_linear(x, targets, outputs, loss, score):
    """A linear map of features x (N,…,D) to (N,…,outputs) that makes loss(logits, targets) small, by L-BFGS → the function.

    x is standardised. The L2 penalty whose score(logits, targets) is best on a fifth of the N, held out, fits them all.
    """
    mean, std = x.flatten(0, -2).mean(0), x.flatten(0, -2).std(0) + 1e-6
    x, order = (x - mean) / std, torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held_out, fitted = order[:len(x) // 5], order[len(x) // 5:]

    def fit(rows, penalty):
        weight = torch.zeros(x.shape[-1] + 1, outputs, device=x.device, requires_grad=True)     # the last row is the bias
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(x[rows] @ weight[:-1] + weight[-1], targets[rows]) + penalty * weight[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        return weight.detach()

    def held_out_score(penalty):
        weight = fit(fitted, penalty)
        return score(x[held_out] @ weight[:-1] + weight[-1], targets[held_out])

    weight = fit(order, max((1e-4, 1e-3, 1e-2, 1e-1), key=held_out_score))
    return lambda features: (features - mean) / std @ weight[:-1] + weight[-1]


def linear_probe(train_features, train_labels, test_features, test_labels):
    """Multinomial logistic regression on standardised features → share of right answers on the test rows, 0..1.

    The L2 penalty that does best on a fifth of the training rows, held out, is used to fit them all. Deterministic.
    """
    def accuracy(logits, labels):
        return (logits.argmax(-1) == labels).float().mean().item()

    classify = fit_linear(train_features, train_labels, int(train_labels.max()) + 1, F.cross_entropy, accuracy)
    return accuracy(classify(test_features), test_labels)


def dense_probe(train_patches, train_masks, test_patches, test_masks):
    """Linear probe of patch tokens (n,N,D) for foreground masks (n,H,W) bool → mean IoU of fore- and background, 0..1.

    A logistic regression tells from each patch's token alone which of its p × p pixels are foreground.
    """
    side = math.isqrt(train_patches.shape[1])

    def by_patch(masks):
        return rearrange(masks.float(), "n (h p) (w q) -> n (h w) (p q)", h=side, w=side)

    def mean_iou(logits, masks):
        found, wanted = logits > 0, masks > 0.5
        pairs = ((found, wanted), (~found, ~wanted))
        return sum(((a & b).sum() / (a | b).sum().clamp(min=1)).item() for a, b in pairs) / 2

    train, test = by_patch(train_masks), by_patch(test_masks)
    segment = fit_linear(train_patches, train, train.shape[2], F.binary_cross_entropy_with_logits, mean_iou)
    return mean_iou(segment(test_patches), test)


def rank_me(features):
    """Effective rank of features (N,D), 1..min(N,D): exp of the entropy of the normalised singular values (RankMe, eq. 1)."""
    values = torch.linalg.svdvals(features.float().cpu())
    return entropy(values / values.sum().clamp(min=1e-30)).exp().item()


def evaluate(model, pictures, linear=False):
    """→ dict with `knn` in 0..1 and `rank` of the teacher's class tokens on the test pictures; with linear also the
    probes: `linear` in 0..1, and `iou` of its patch tokens in 0..1 where the pictures have masks."""
    def features(patches):
        with autocast(model.config):
            return [extract_features(model, part, patches=patches) for part in (pictures.train_images, pictures.test_images)]

    train, test = features(patches=False)
    four = train, pictures.train_labels, test, pictures.test_labels
    result = {"knn": knn_accuracy(*four), "rank": rank_me(test)}
    if linear:
        result["linear"] = linear_probe(*four)
    if linear and pictures.train_masks is not None and pictures.test_masks is not None:
        train, test = features(patches=True)
        result["iou"] = dense_probe(train, pictures.train_masks, test, pictures.test_masks)
    return result


def collapse_signs(scores, means, baseline, config):
    """Plain sentences on how it shows that a run has collapsed, [] where it has not.

    scores, baseline: what `evaluate` gives, now and for the untrained network; means: of `target_diagnostics` over the last epoch.
    """
    most, signs = math.log(config.PROJECTION_DIM), []
    rows = config.GLOBAL_CROPS_NUMBER * config.BATCH_SIZE * world_size()                          # bound what the mean target can spread to
    if means["mean_entropy"] < 0.5 * min(most, math.log(rows)):
        signs.append(f"all pictures get much the same target (entropy of the mean target {means['mean_entropy']:.2f}, at most {most:.2f})")
    if means["teacher_entropy"] > 0.99 * most:
        signs.append(f"the targets say nothing (entropy of a target {means['teacher_entropy']:.2f} of ln K = {most:.2f})")
    if scores["rank"] < 0.5 * baseline["rank"]:
        signs.append(f"the features lie in few directions (their rank fell from {baseline['rank']:.1f} to {scores['rank']:.1f})")
    if config.EMA_START == config.EMA_END == 1:
        signs.append("the teacher never moves (its momentum, EMA_START, is 1), so its features are those of the untrained network")
    return signs


def raw_pixel_accuracy(pictures, mean, std):
    """k-NN accuracy of the normalised pixels themselves: what a network must beat to have learned anything.

    Floats take four times the room of pictures, so a bank of more than 50,000 is thinned to every n-th picture.
    """
    every = math.ceil(len(pictures.train_images) / 50_000)
    pictures = pictures._replace(train_images=pictures.train_images[::every], train_labels=pictures.train_labels[::every])
    mean, std = (torch.tensor(t, device=pictures.train_images.device).view(3, 1, 1) for t in (mean, std))
    train, test = (((part.float() / 255 - mean) / std).flatten(1) for part in (pictures.train_images, pictures.test_images))
    return knn_accuracy(train, pictures.train_labels, test, pictures.test_labels)


# ======================================================================================================================
# Above this line: tensors in, tensors out. Below: disk, devices and the screen.
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

STATE_KEYS = {"student": "student_state_dict", "teacher": "teacher_state_dict", "img_head": "img_head_state_dict",
              "patch_head": "patch_head_state_dict", "teacher_img_head": "teacher_img_head_state_dict",
              "teacher_patch_head": "teacher_patch_head_state_dict"}
STEP_VALUES = ("loss", "img", "patch", "koleo", "teacher_entropy", "mean_entropy", "kl", "prototypes", "grad_norm", "skipped")  # of train_step


def device_random_state(device, state=None):
    """→ the state of a GPU's generator, None on a CPU; given a state, sets it."""
    if device.type == "cpu":
        return None
    get, put = (getattr(getattr(torch, device.type), name) for name in ("get_rng_state", "set_rng_state"))
    which = [device] if device.type == "cuda" else []             # MPS has one generator
    return get(*which) if state is None else put(state, *which)


def write_safely(path, data):
    """Writes bytes beside the path's name, flushes them to the disk, then renames: no half file is ever seen under that name."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.unlink(missing_ok=True)                        # of a killed run, or a link that leads elsewhere
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        with suppress(OSError):                                  # not every system can: the new name survives a power cut
            folder = os.open(temporary.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with suppress(OSError):                                  # the folder is gone, or not ours any more
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error}; what was saved before is whole. Make room or give another "
                         "OUTPUT_DIR, then go on with --resume") from None


def random_states(device, states=None):
    """→ the states of Python's, NumPy's, torch's and the device's generators, in plain values; given these, sets them."""
    if states is None:
        kind, keys, *rest = np.random.get_state()
        return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(),
                "device": device_random_state(device)}
    version, keys, rest = states["python"]
    random.setstate((version, tuple(keys), rest))
    if len(states["numpy"][1]) != 624 or not 0 <= states["numpy"][2] <= 624:
        raise ValueError("NumPy's state has no place in its 624 numbers")                         # and NumPy would read beyond them
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if states["device"] is not None:
        device_random_state(device, states["device"].cpu())


def save_checkpoint(path, model, optimizer, epoch, step, data="", steps_per_epoch=0, untold=()):
    """Writes all that a run needs to go on. epoch: those done; untold: the steps that `Report` has not yet told, Report.untold."""
    states = {key: whole(getattr(model, part).state_dict()) for part, key in STATE_KEYS.items()}
    states.update(epoch=epoch, step=step, data=data, config=model.config.to_dict(), optimizer_state_dict=whole(optimizer.state_dict()),
                  steps_per_epoch=steps_per_epoch, untold=list(untold), saved_at=time.time(),
                  random_states=of_all(random_states(torch.device(model.config.DEVICE))))
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(states, buffer)
        write_safely(path, buffer.getbuffer())


def require_whole(states):
    """Raises ValueError where a checkpoint is not made as `save_checkpoint` makes it."""
    kinds = {"config": dict, "epoch": int, "step": int, "steps_per_epoch": int, "data": str, "untold": list, "random_states": list,
             "saved_at": float, "optimizer_state_dict": dict, **dict.fromkeys(STATE_KEYS.values(), dict)}
    for key, kind in kinds.items():
        if not isinstance(states, dict) or not isinstance(states.get(key), kind):
            raise ValueError(f"it has no {key}, or a broken one")
    epoch, step, steps_per_epoch = (states[key] for key in ("epoch", "step", "steps_per_epoch"))
    if epoch < 0 or not 0 <= step < 2 ** 53 or steps_per_epoch and not 0 <= step - epoch * steps_per_epoch <= steps_per_epoch:
        raise ValueError(f"step {step} does not come after {epoch} epochs of {steps_per_epoch} steps")
    if not 0 <= states["saved_at"] < 2 ** 53:
        raise ValueError(f"it was saved at {states['saved_at']} seconds")
    for row in states["untold"]:
        if row.keys() != set(STEP_VALUES) or not all(type(value) is float for value in row.values()):
            raise ValueError("its untold steps are broken")
    for key in STATE_KEYS.values():
        for name, value in states[key].items():
            if value.nbytes > value.untyped_storage().nbytes() or not value.isfinite().all():
                raise ValueError(f"in its {key}, {name} is not a tensor of finite numbers")


def open_checkpoint(path, **options):
    """→ what torch.load finds in a file that needs no more memory than it is long; nothing in it is executed."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
            raise ValueError("it would unpack to more than it is")
    return torch.load(path, map_location="cpu", weights_only=True, **options)


def read_checkpoint(path):
    """→ the checkpoint as a dict of plain values and tensors on the CPU; nothing in the file is executed. Else InputError."""
    try:
        states = open_checkpoint(path)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()                          # torch does not compare the checksums that it writes
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
    except Exception as error:                                   # torch raises many kinds for a missing, broken or unsafe file
        raise InputError(f"{path} is not a readable checkpoint: {brief(error)}") from None
    try:
        require_whole(states)
    except Exception as error:                                   # ValueError, or what an odd tensor cannot do
        raise InputError(f"{path} is no checkpoint of this program: {brief(error)}") from None
    try:
        states["config"] = Config(**{**states["config"], "DEVICE": "cpu"}).to_dict()
    except Exception as error:                                   # InputError, or a nest too deep to be shown
        raise InputError(f"{path} holds settings that cannot be used: {brief(error)}") from None
    return states


def sizes(config):
    """→ dict of the settings without which weights mean nothing, or something else."""
    names = ("PATCH_SIZE", "IMAGE_SIZE", "REGISTER_TOKENS", "PROJECTION_DIM", "HEAD_HIDDEN_DIM", "HEAD_BOTTLENECK_DIM", "HEAD_BATCH_NORM")
    return {"MODEL_DIMS": config.MODEL_DIMS[config.MODEL_SIZE], **{name: getattr(config, name) for name in names},
            "LAYER_SCALE": "none" if not config.LAYER_SCALE else "some"}


def load_checkpoint(path, model, optimizer=None):
    """Puts a checkpoint into a model of the same sizes, and into its optimizer and the random generators with it → the dict."""
    states = read_checkpoint(path)
    saved, now = sizes(Config(**states["config"])), sizes(model.config)
    if saved != now:
        raise InputError(f"{path} is of another size than this model: "
                         + "; ".join(f"{name}: saved {saved[name]}, now {now[name]}" for name in now if saved[name] != now[name]))
    for part, key in STATE_KEYS.items():
        fill(getattr(model, part), states[key], path)
    if optimizer is not None:
        try:
            parameters, moments = [p for group in optimizer.param_groups for p in group["params"]], {}
            for i, state in states["optimizer_state_dict"]["state"].items():
                if i not in range(len(parameters)):
                    raise ValueError(f"AdamW's moments of parameter {i}, of which there is none")
                shapes = {"step": (), "exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape}
                if {name: value.shape for name, value in state.items()} != shapes or any(
                        value.dtype != torch.float32 or not value.is_contiguous() for value in state.values()):
                    raise ValueError(f"AdamW's moments of parameter {i} are not of its shape")    # and AdamW would read beyond them
                moments[i] = {name: share_of(value, parameters[i]) for name, value in state.items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
            if rank() < len(states["random_states"]):
                random_states(torch.device(model.config.DEVICE), states["random_states"][rank()])
            else:                                                # saved by fewer processes
                seed_apart(model.config.SEED, states["step"])
        except Exception as error:                               # as many kinds as a stranger's file can be wrong in
            raise InputError(f"{path} holds no state to go on from: {brief(error)}") from None
    return states


def fill(module, state, path, assign=False):
    """Puts a state dict from the checkpoint at path into a module, or into the place of its tensors. InputError where it does not fit."""
    try:
        own = module.state_dict()
        module.load_state_dict({name: share_of(value, own.get(name)) for name, value in state.items()}, assign=assign)
    except Exception as error:                                   # RuntimeError for other sizes; others for what is no tensor
        raise InputError(f"{path} is of another size than this model: {brief(error)}") from None


def load_backbone(path, device="cpu"):
    """→ the teacher's VisionTransformer of a checkpoint, in eval mode on device, built from the checkpoint's own config."""
    states = read_checkpoint(path)
    with torch.device("meta"):                                   # without memory, for which the file could ask without bound
        backbone = build_backbone(Config(**{**states["config"], "DEVICE": str(device)}))
    fill(backbone, states["teacher_state_dict"], path, assign=True)
    return backbone.float().to(device).eval()


def saved_at(path):
    """→ when a checkpoint was written, in seconds, also if the file has been copied since; infinite where it does not tell."""
    with suppress(Exception):                                    # the kinds that read_checkpoint names
        return float(open_checkpoint(path, mmap=True)["saved_at"])
    return math.inf                                              # first in line, to be refused and named


def find_checkpoint(config):
    """→ the path that config.RESUME means, or None where the run starts afresh. "newest": the newest that can be read."""
    if config.RESUME not in ("", "newest"):
        if not Path(config.RESUME).is_file():
            raise InputError(f"RESUME ({config.RESUME!r}) is no file; give a checkpoint's path, or --resume alone for the newest")
        return Path(config.RESUME)
    found = [path for path in Path(config.OUTPUT_DIR).glob("dinov2_*.pth") if path.is_file()] if config.RESUME else []
    for path in sorted(found, key=lambda path: (saved_at(path), path.name), reverse=True):
        try:
            read_checkpoint(path)
            return path
        except InputError as error:
            print(plain(f"left out: {error}"))
    if config.RESUME:
        print(f"no checkpoint in {config.OUTPUT_DIR}: starting afresh")
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Reporting: the bar, one line an epoch, metrics.jsonl, and the pictures
# ----------------------------------------------------------------------------------------------------------------------

class Report:
    """The one place that tells how a run goes. Reads values from the device only every `self.every` steps."""

    def __init__(self, config, steps_per_epoch, first_step, history, untold=()):
        self.config, self.steps_per_epoch, self.first_step = config, steps_per_epoch, first_step
        self.total_steps, self.step = steps_per_epoch * config.TOTAL_EPOCHS, first_step
        self.every = max(1, min(50, self.total_steps // 100))
        self.path, self.history = Path(config.OUTPUT_DIR, "metrics.jsonl"), list(history)
        self.waiting, self.untold, self.skipped_in_a_row = [], list(untold), 0                    # steps' scalars on the device; then here
        self.last_good = ""                                      # the checkpoint to go back to
        self.skipped = sum(row["skipped"] for row in [r for r in history if r["event"] == "step"] + self.untold)
        if rank() == 0:
            write_safely(self.path, "".join(json.dumps(record) + "\n" for record in history).encode())

    def start(self):
        """The clock runs from here → the bar, to be closed by `with`."""
        self.started = time.perf_counter()
        self.bar = tqdm(total=self.total_steps, initial=self.first_step, unit="step", mininterval=0.5, dynamic_ncols=True,
                        disable=rank() > 0)
        return self.bar

    def record(self, event, **values):
        """Adds a line to metrics.jsonl and flushes it to the disk, or, where that is full, adds nothing."""
        self.history.append({"event": event, **values})
        if rank():
            return
        line = (json.dumps(self.history[-1]) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                written = file.write(line)
                if written < len(line):
                    file.truncate(file.tell() - written)
                    raise OSError("no space is left")
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error}; make room, then go on with --resume") from None

    def say(self, text):
        tqdm.write(text)

    def add(self, values, settings):
        """Takes a step's scalars, still on the device, and its settings."""
        self.step += 1
        self.waiting.append({name: value.float() for name, value in values.items()})
        done, due = self.step - self.first_step, self.step % self.every == 0 or self.step % self.steps_per_epoch == 0 or self.step in (1, 6)
        if due or done in (1, 6):
            self.look()
            speed = self.speed(done)
        if due:
            row = {"step": self.step, "steps": len(self.untold), **self.means(self.untold), **settings, "pictures_per_second": speed}
            self.untold = []
            self.record("step", **row)
            self.bar.set_postfix({"img": f"{row['img']:.2f}", "patch": f"{row['patch']:.2f}", "koleo": f"{row['koleo']:.2f}",
                                  "lr": f"{row['lr']:.1e}", "ema": f"{row['momentum']:.3f}", "pictures/s": f"{speed:.0f}"}, refresh=False)
        self.bar.update()

    def look(self):
        """Fetches the scalars that wait on the device; tells the skipped steps among them; InputError after ten in a row."""
        waiting, self.waiting, first = self.waiting, [], self.step - len(self.waiting) + 1
        values = [torch.stack(list(row.values())) for row in waiting]
        values = (all_reduce(torch.stack(values)) / world_size()).tolist() if waiting else []     # the mean of all processes
        for step, row in enumerate((dict(zip(waiting[0], row)) for row in values), first):
            self.untold.append(row)
            self.skipped += row["skipped"]
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if row["skipped"] else 0
            if row["skipped"]:
                self.say(f"step {step} skipped: its loss or gradient is not finite ({self.skipped:.0f} since the start)")
            if self.skipped_in_a_row == 10:
                wrong = [name for name in ("img", "patch", "koleo", "grad_norm") if not math.isfinite(row[name])]
                self.stop(f"ten steps in a row, up to step {step}, are not finite, here in {', '.join(wrong)}")

    def require_finite(self, model):
        """InputError where a weight is not finite: nothing can be learned, measured or saved any more."""
        parameters = [p for part in (*model.student_parts(), *model.teacher_parts()) for p in local_tensors(part)]
        if largest(not torch.stack([p.isfinite().all() for p in parameters]).all()):
            self.stop(f"the weights are not finite at step {self.step}")

    def stop(self, reason):
        way = f"The last good checkpoint: {self.last_good}. Go on with --resume and" if self.last_good else "There is no checkpoint yet. Begin again with"
        raise InputError(f"{reason}. {way} PRECISION fp32, or a lower LEARNING_RATE")

    @staticmethod
    def means(rows):
        """Dicts of steps or of records of several `steps` → their means, the skipped steps left out, and how many these were."""
        weights = [row.get("steps", 1) - row["skipped"] for row in rows]
        names = [name for name in rows[0] if name not in ("event", "step", "steps")]
        means = {name: sum(weight * row[name] for weight, row in zip(weights, rows) if weight) / max(sum(weights), 1) for name in names}
        return {**means, "skipped": sum(row["skipped"] for row in rows)}

    def speed(self, done):
        """→ pictures a second since the first step, which warms up; after six tells the whole run's time."""
        now = time.perf_counter()
        if done == 1:
            self.clock = now
            return pictures_per_step(self.config) / (now - self.started)
        per_step = (now - self.clock) / (done - 1)
        if done == 6 and self.step < self.total_steps:
            left = per_step * (self.total_steps - self.step)
            self.say(f"estimated time: {left / 60:.1f} minutes for the {self.total_steps - self.step:,} steps left")
            if left > 3600 and torch.device(self.config.DEVICE).type == "cpu":
                self.say("That is over an hour on this CPU. For a first look: --quick. To shorten the run, lower TOTAL_EPOCHS, "
                         "TRAIN_IMAGES or LOCAL_CROPS_NUMBER, or set MODEL_SIZE tiny and PATCH_SIZE 8.")
        return pictures_per_step(self.config) / per_step

    def end_epoch(self, epoch, scores):
        """One aligned line and one record: means over the epoch's steps, and the evaluation if there was one."""
        first = (epoch - 1) * self.steps_per_epoch
        rows = [row for row in self.history if row["event"] == "step" and row["step"] > first]
        if not rows:
            self.record("epoch", epoch=epoch, step=self.step, **scores)
            self.say(f"epoch {epoch:4d}  nothing is known of its steps: their records are lost")
            return
        means = self.means(rows)
        self.record("epoch", epoch=epoch, step=self.step, **means, **scores)
        self.say(f"epoch {epoch:4d}  img {means['img']:7.3f}  patch {means['patch']:7.3f}  koleo {means['koleo']:7.3f}  "
                 f"H(t) {means['teacher_entropy']:6.3f}  KL {means['kl']:6.3f}  prototypes {means['prototypes']:4.0%}"
                 + (f"  k-NN {scores['knn']:6.1%}  rank {scores['rank']:6.1f}" if scores else ""))
        baseline = next((r for r in self.history if r["event"] == "baseline" and "rank" in r), None)
        if scores and baseline:
            for sign in collapse_signs(scores, means, baseline, self.config):
                self.say(f"COLLAPSED: {sign}.")


def show(axes, image, title=""):
    """One picture, (3,H,W) in 0..1 or an (H,W) map, without ticks."""
    axes.imshow((image.permute(1, 2, 0).clamp(0, 1) if image.ndim == 3 else image).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()


def save_figure(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=120, bbox_inches="tight")
    write_safely(path, buffer.getbuffer())


def new_figure(width, height, **options):
    """→ a figure of so many inches, without pyplot, which needs a display and keeps global state."""
    from matplotlib.figure import Figure                         # only here: its import may write a font cache
    return Figure(figsize=(width, height), **options)


def grid_figure(rows, columns):
    """→ a figure and its (rows, columns) axes."""
    figure = new_figure(1.1 * columns, 1.2 * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_views(config, transform, images, path):
    """A row a picture: the picture, its global crops, the same as the student sees them with masked patches, its local crops."""
    c, count = config, min(6, len(images))
    views = [(view.cpu() * transform.std + transform.mean) for view in transform(images[:count])]
    masks = draw_masks(c, "cpu").view(c.GLOBAL_CROPS_NUMBER, c.BATCH_SIZE, -1)[:, torch.randperm(c.BATCH_SIZE)[:count]]
    side = c.GLOBAL_CROP_SIZE // c.PATCH_SIZE
    masks = masks.unflatten(2, (side, side)).repeat_interleave(c.PATCH_SIZE, 2).repeat_interleave(c.PATCH_SIZE, 3)
    figure, axes = grid_figure(count, 1 + 2 * c.GLOBAL_CROPS_NUMBER + c.LOCAL_CROPS_NUMBER)
    for i in range(min(count, c.BATCH_SIZE)):
        tiles = [(images[i].cpu() / 255, "picture")]
        for g in range(c.GLOBAL_CROPS_NUMBER):
            tiles += [(views[g][i], f"global {g + 1}"), (torch.where(masks[g, i], 0.5, views[g][i]), "masked")]
        tiles += [(view[i], f"local {n + 1}") for n, view in enumerate(views[c.GLOBAL_CROPS_NUMBER:])]
        for axis, (tile, title) in zip(axes[i], tiles):
            show(axis, tile, title if i == 0 else "")
    save_figure(figure, path)


def draw_curves(config, history, path):
    """Six panels over the steps: losses with ln K and the teacher's entropy, KoLeo, k-NN, rank, learning rate, momentum."""
    figure = new_figure(13, 6.5, layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    steps, epochs = ([r for r in history if r["event"] == event] for event in ("step", "epoch"))
    baseline = next((r for r in history if r["event"] == "baseline"), {})
    for axis, keys in zip(axes, (("img", "patch", "teacher_entropy", "mean_entropy"), ("koleo",), ("knn",), ("rank",), ("lr",), ("momentum",))):
        for key in keys:
            rows = [r for r in (epochs if key in ("knn", "rank") else steps) if key in r]
            axis.plot([r["step"] for r in rows], [r[key] for r in rows], label=key.replace("_", " "), marker="." if len(rows) < 30 else "")
    axes[0].axhline(math.log(config.PROJECTION_DIM), color="gray", linestyle=":", label=f"ln K = {math.log(config.PROJECTION_DIM):.2f}")
    for axis, key, label in ((axes[2], "raw_pixels_knn", "raw pixels"), (axes[2], "knn", "untrained network"), (axes[3], "rank", "untrained network")):
        if key in baseline:
            axis.axhline(baseline[key], color="gray", linestyle=":" if key == "knn" else "--", label=label)
    for axis, title in zip(axes, ("losses and entropies, nats", "KoLeo", "k-NN accuracy", "RankMe", "learning rate", "teacher momentum")):
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, path)


@torch.no_grad()
def draw_attention(backbone, images, path):
    """A row a picture: the picture and, for each head of the last block, where its class token looks."""
    images = images[:6]
    maps = backbone.class_attention((images.float() / 255 - backbone.pixel_mean) / backbone.pixel_std).float().cpu()
    figure, axes = grid_figure(len(images), 1 + maps.shape[1])
    for i, row in enumerate(axes):
        show(row[0], images[i].cpu() / 255, "" if i else "picture")
        for head, axis in enumerate(row[1:]):
            show(axis, maps[i, head], "" if i else f"head {head + 1}")
    save_figure(figure, path)


@torch.no_grad()
def draw_pca(backbone, images, path):
    """Pictures above, below them their patch tokens: the three main directions of all together as red, green and blue."""
    images = images[:10]
    _, patches = backbone((images.float() / 255 - backbone.pixel_mean) / backbone.pixel_std)
    flat = patches.float().cpu().flatten(0, 1)
    flat = flat - flat.mean(0)
    scores = F.pad(flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T, (0, 3))[:, :3]    # (pictures · N, 3)
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    colours = ((scores - low) / (high - low).clamp(min=1e-9)).unflatten(0, (len(images), -1))
    figure, axes = grid_figure(2, len(images))
    for i in range(len(images)):
        show(axes[0, i], images[i].cpu() / 255)
        show(axes[1, i], rearrange(colours[i], "(h w) c -> c h w", w=images.shape[-1] // backbone.patch_embed.patch_size))
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------

def bfloat16_is_fast(device):
    """True on GPUs and CPUs that multiply bfloat16 matrices in hardware."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if torch.device(device).type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def require_room(config):
    """Raises InputError where the least that a step must hold, of weights or of activations, is more than the device has."""
    c, (width, depth, _) = config, config.MODEL_DIMS[config.MODEL_SIZE]
    with torch.device("meta"):                                   # sizes without memory
        weights = sum(p.numel() for p in DINOv2(c).parameters())
    crops = c.GLOBAL_CROPS_NUMBER + c.LOCAL_CROPS_NUMBER
    needs = {f"the networks' weights, gradients and moments; lower MODEL_SIZE ({c.MODEL_SIZE!r}) or PROJECTION_DIM ({c.PROJECTION_DIM})":
             10 * weights / (world_size() if c.SHARD else 1),    # fp32; the student's four times, the teacher's once
             f"a batch's activations; lower BATCH_SIZE ({c.BATCH_SIZE}), the number of crops or PROJECTION_DIM ({c.PROJECTION_DIM})":
             20 * c.BATCH_SIZE * patches_per_picture(c) * width * depth + 8 * crops * c.BATCH_SIZE * c.PROJECTION_DIM}
    for what, need in needs.items():
        if need > memory_of(c.DEVICE):
            raise InputError(f"at least {need / 2 ** 30:,.1f} GiB, more than the {memory_of(c.DEVICE) / 2 ** 30:.1f} there, are needed for {what}")


def uses_bf16(config):
    """True where PRECISION means bfloat16 on this device."""
    return config.PRECISION == "bf16" or config.PRECISION == "auto" and bfloat16_is_fast(config.DEVICE)


def autocast(config):
    """→ the context in which networks run: bfloat16 for matrix products, or plain fp32 (PRECISION)."""
    return torch.autocast(torch.device(config.DEVICE).type, torch.bfloat16, enabled=uses_bf16(config))


def keep_freed_memory():
    """From now on this process keeps for its next step what tensors free; asking Linux for fresh pages took 7 % of a step of
    the tiny network with patches of 8. Without glibc, nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and mallopt(-3, 2 ** 30):                         # M_MMAP_THRESHOLD; old versions refuse so much
        mallopt(-1, -1)                                          # M_TRIM_THRESHOLD: never


def can_compile(config):
    """True where torch.compile pays and works: COMPILE without SHARD, CUDA, and Triton installed."""
    if config.COMPILE and not config.SHARD and torch.device(config.DEVICE).type == "cuda":
        from torch.utils._triton import has_triton
        if has_triton():
            return True
        print("no Triton here: COMPILE is off")
    return False


def epoch_batches(count, config, epoch):
    """The pictures of an epoch in random order → a list of steps: this process's ACCUMULATE index tensors (B,) of each; the
    incomplete last step is left out. All processes together take the same pictures, however many they are."""
    c, size = config, pictures_per_step(config)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(c.SEED * 1_000_003 + epoch))
    return [step.split(c.BATCH_SIZE)[rank()::world_size()] for step in order[:count - count % size].split(size)]


def seed_apart(seed, step=0):
    """Random numbers of this process that no other one draws; those of process 0 go on as they are."""
    if rank():
        torch.manual_seed(seed + 1_000_003 * rank() + 7 * step)


@contextmanager
def process_group(config):
    """Joins the processes that torchrun started, if it did → config with this one's DEVICE. InputError where one is lost."""
    if os.environ.get("WORLD_SIZE") in (None, "", "1") or "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield config
        return
    device = torch.device(config.DEVICE)
    if device.type == "mps":
        raise InputError(f"DEVICE ({config.DEVICE!r}) is for one process; start torchrun with --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    config = Config(**{**config.to_dict(), "DEVICE": str(device)})
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo for what is said on the host, such as a wish to stop, without waiting for a GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank() else nullcontext():
            yield config
    except RuntimeError as error:                                # gloo's have no kind of their own
        if not isinstance(error, dist.DistError) and not re.search("gloo|peer|[Tt]imed out", str(error)):
            raise
        raise InputError(f"process {rank()} of {world_size()} lost another one: {brief(error)}; what was saved is whole, so that --resume "
                         "goes on, with as many processes as you like") from error
    dist.destroy_process_group()


def shard(model):
    """Splits the weights over the processes, in place: those of each attention and each MLP come together for the moment in which
    it works (FSDP2), in bf16 where autocast is on, whose own copies would stay until the backward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")                  # into which nobody writes
    mesh = init_device_mesh(torch.device(model.config.DEVICE).type, (world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if uses_bf16(model.config) else MixedPrecisionPolicy()  # of weights, of gradients' sums
    for part in (*model.student_parts(), *model.teacher_parts()):
        for branch in (branch for block in getattr(part, "blocks", ()) for branch in (block.attention, block.mlp)):
            fully_shard(branch.layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)    # norms and LayerScale stay in fp32
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def distribute(model):
    """→ what `train_step` takes: on several processes, the network wrapped so that they share their gradients' mean, which
    one with SHARD does by itself."""
    if world_size() == 1 or model.config.SHARD:
        return model
    unused = not model.config.MASK_RATIO                         # without masks nothing asks the patch head
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    wrapped.broadcast_buffers = False                            # they are the same everywhere; new versions warn of it as an argument
    return wrapped


@contextmanager
def stop_requests():
    """Inside, Ctrl-C and SIGTERM are only noted, in the list that this gives; one over two seconds after the first ends the
    program at once. (`timeout` and others send one twice.) What is ignored, as Ctrl-C in the background, stays so."""
    asked, before, first = [], {}, []

    def note(number, frame):
        asked.append(number)
        first.append(time.monotonic())
        if first[-1] - first[0] > 2:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():    # elsewhere Python gives no signals
        handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, note)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_transform(config, mean, std):
    c = config
    return MultiCropTransform(c.GLOBAL_CROP_SIZE, c.LOCAL_CROP_SIZE, c.GLOBAL_CROPS_NUMBER, c.LOCAL_CROPS_NUMBER, c.GLOBAL_CROPS_SCALE,
                              c.LOCAL_CROPS_SCALE, c.FLIP, c.COLOR_JITTER, c.COLOR_JITTER_PROB, c.GRAYSCALE_PROB, mean, std)


def make_model(config, mean, std):
    """→ DINOv2 on config.DEVICE that knows the pixels' statistics, compiled where that pays."""
    model = DINOv2(config)
    for backbone in (model.student, model.teacher):
        backbone.pixel_mean.copy_(torch.tensor(mean).view(3, 1, 1))
        backbone.pixel_std.copy_(torch.tensor(std).view(3, 1, 1))
    if config.SHARD:
        shard(model)                                             # first: the whole of it may have no room on a GPU
    model.to(config.DEVICE)
    if can_compile(config):
        compiled = 3 if world_size() == 1 else 1                 # of several processes not the heads, which talk to one another
        for part in (*model.student_parts()[:compiled], *model.teacher_parts()[:compiled]):
            part.compile(dynamic=False)
    return model


def patches_per_picture(config):
    """→ the number of patches in all crops of a picture."""
    c = config
    return c.GLOBAL_CROPS_NUMBER * (c.GLOBAL_CROP_SIZE // c.PATCH_SIZE) ** 2 + c.LOCAL_CROPS_NUMBER * (c.LOCAL_CROP_SIZE // c.PATCH_SIZE) ** 2


def describe(config, model, pictures, steps):
    """→ the line before the first epoch: what is trained on what."""
    c = config
    million = [sum(p.numel() for p in part.parameters()) / 1e6 for part in model.student_parts()]
    return (f"{c.MODEL_SIZE} ViT of {million[0]:.1f} M parameters, heads {million[1]:.1f} + {million[2]:.1f} M; {patches_per_picture(c)} patches in "
            f"{c.GLOBAL_CROPS_NUMBER} + {c.LOCAL_CROPS_NUMBER} crops a picture; {len(pictures.train_images):,} pictures of {pictures.name}; "
            f"{steps:,} steps of {pictures_per_step(c):,}; {c.DEVICE}, {'bf16' if uses_bf16(c) else 'fp32'}")


def start_or_resume(config, path, model, optimizer, data, steps_per_epoch):
    """→ epochs and steps done, the records of metrics.jsonl that belong to them, and the steps not yet recorded; loads the
    checkpoint at path, if any.

    data: the pictures' name; a run does not go on with other ones. An earlier run's files, and those of later steps than
    path's, are put aside.
    """
    if path is None:
        if rank() == 0:
            put_aside(config.OUTPUT_DIR)
        return 0, 0, [], []
    states = load_checkpoint(path, model, optimizer)
    metrics = read_metrics(Path(path).with_name("metrics.jsonl"))
    epochs, step, untold = states["epoch"], states["step"], states["untold"]
    records = [r for r in metrics if r.get("step", 0) <= step and r.get("epoch", 0) <= epochs]
    if states["data"] != data:
        raise InputError(f"{path} was trained on {states['data']}, these pictures are {data}; give DATASET the same ones")
    saved, before = states["config"], states["steps_per_epoch"]
    if not before:
        raise InputError(f"{path} was not saved by a run, so that there is no place in an epoch to go on from; load_checkpoint takes it")
    here = Path(path).parent.resolve() == Path(config.OUTPUT_DIR).resolve()
    unfinished = here and config.TOTAL_EPOCHS == saved["TOTAL_EPOCHS"] and not any(r["event"] == "final" for r in records)
    if epochs > config.TOTAL_EPOCHS or epochs == config.TOTAL_EPOCHS and not unfinished:
        raise InputError(f"{path} has done {epochs} epochs of TOTAL_EPOCHS ({config.TOTAL_EPOCHS}); raise it to go on")
    now = config.to_dict()
    print(f"going on after epoch {epochs}, step {step:,}, of {path}")
    for name, value in saved.items():
        if name not in ("RESUME", "DEVICE", "OUTPUT_DIR") and now[name] != value:
            effect = ": all schedules stretch with it, so rates and momenta jump" if name == "TOTAL_EPOCHS" else ""
            print(plain(f"{name}: saved {value}, now {now[name]}{effect}"))
    if before != steps_per_epoch:                                # records of whole epochs stay, at their steps of now
        print(f"an epoch has {steps_per_epoch:,} steps now, not {before:,}: going on at the beginning of epoch {epochs + 1}")
        records = [{**r, "step": r["step"] * steps_per_epoch // before} if "step" in r else r for r in records if r.get("step", 0) <= epochs * before]
        step, untold = epochs * steps_per_epoch, []
    if rank() == 0 and config.RESUME != "newest":
        put_aside(config.OUTPUT_DIR, path if here else None, metrics)
    return epochs, step, [r for r in records if r["event"] != "final"], untold


def put_aside(folder, kept=None, metrics=()):
    """Moves an earlier run's checkpoints and metrics into a folder of their own, so that nothing is overwritten; given one to
    go on from, only checkpoints that are newer, with a copy of the metrics, since "newest" must not find them any more."""
    old = [p for p in (*Path(folder).glob("dinov2_*.pth"), Path(folder, "metrics.jsonl")) if p.exists() and p.stat().st_size]
    if kept is not None:
        since = saved_at(kept)
        old = [p for p in old if p.suffix == ".pth" and saved_at(p) > since]
    if old:
        aside = Path(tempfile.mkdtemp(prefix=time.strftime("earlier-%Y%m%d-%H%M%S-"), dir=folder))
        for path in old:
            path.rename(aside / path.name)
        if kept is not None:
            write_safely(aside / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in metrics).encode())
        print(f"an earlier run's checkpoints and metrics are now in {aside}" + "; --resume would have gone on from them" * (kept is None))


def read_metrics(path):
    """→ the records of a metrics.jsonl, [] where there is none; a line that is none, such as one cut short by a crash, is left out."""
    needs = {"start": {"config"}, "baseline": set(), "step": {"step", "steps", *STEP_VALUES}, "epoch": {"epoch", "step"}, "final": {"seconds"}}
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            record = json.loads(line)
            kinds = {type(value) for name, value in record.items() if name not in ("event", "data", "torch", "config")}
            if needs[record["event"]] <= record.keys() and kinds <= {int, float} and abs(record.get("steps", 0)) < 2 ** 53:
                records.append(record)
    return records


def train_dinov2(config=None, dataset=None):
    """Trains on config's pictures, or on dataset (whatever `as_pictures` takes), and returns the DINOv2.

    Writes checkpoints, metrics.jsonl and figures into config.OUTPUT_DIR. InputError before any long work where the
    settings, the data or the checkpoint to resume from cannot work. Ctrl-C (KeyboardInterrupt) and SIGTERM (SystemExit
    with 143) end it after the step, with all saved.
    """
    c = Config() if config is None else config
    if not isinstance(c, Config):
        raise InputError(f"config must be a Config, not {type(c).__name__}: Config(**settings) makes one of a dict")
    if torch.device(c.DEVICE).type == "cpu":
        keep_freed_memory()
    with process_group(c) as c, nullcontext() if rank() else output_folder(c.OUTPUT_DIR):
        try:
            return train_in_folder(c, dataset)
        except OSError as error:                                 # a rename, say, in a folder that someone took away
            raise InputError(f"{error}; what was saved before is whole. Mend that, then go on with --resume") from error
        except (RuntimeError, MemoryError) as error:             # torch has no kind of its own for a CPU's memory
            if isinstance(error, RuntimeError) and not re.search("out of memory|enough memory|allocate memory", str(error)):
                raise
            raise InputError(f"out of memory ({brief(error)}); lower BATCH_SIZE ({c.BATCH_SIZE}) and raise ACCUMULATE "
                             f"({c.ACCUMULATE}), or lower MODEL_SIZE ({c.MODEL_SIZE!r}) or PROJECTION_DIM ({c.PROJECTION_DIM})") from error


def train_in_folder(c, dataset):
    # Settings, pictures, network
    if c.SHARD and world_size() == 1:
        raise InputError("SHARD (True) needs several processes; start with torchrun --nproc-per-node 2, or more, or leave it out")
    require_room(c)
    checkpoint = of_all(None if rank() else find_checkpoint(c))[0]
    turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2                  # one of each machine may have to download
    for now in range(3):
        if now == turn:
            pictures = prepare_pictures(c, dataset)
        of_all("ready")
    torch.manual_seed(c.SEED)
    mean, std = pixel_statistics(pictures.train_images)
    seen = of_all((pictures.name, len(pictures.train_images), mean, std, *[None if part is None else len(part) for part in pictures[1:4]]))
    if seen != seen[:1] * len(seen):
        raise InputError(f"the processes have different pictures, if not in name and number then in pixels or test pictures: "
                         f"{'; '.join(f'{count:,} of {name}' for name, count, *_ in seen)}; give all machines the same DATASET, DATA_PATH and files")
    model = make_model(c, mean, std)
    seed_apart(c.SEED)
    optimizer, transform = make_optimizer(model), make_transform(c, mean, std)
    crops = MultiCropDataset(pictures, transform)
    steps_per_epoch = len(crops) // pictures_per_step(c)
    schedules = Schedules(c, steps_per_epoch * c.TOTAL_EPOCHS)
    masked_patches = sum(mask_counts(c.GLOBAL_CROPS_NUMBER * c.BATCH_SIZE, (c.GLOBAL_CROP_SIZE // c.PATCH_SIZE) ** 2, c.MASK_RATIO, c.MASK_PROB))

    # Where the run stands, and where the features stood before training
    epochs, step, history, untold = start_or_resume(c, checkpoint, model, optimizer, pictures.name, steps_per_epoch)
    history = of_all(history)[0]                                 # process 0 is the one that writes it again
    report = Report(c, steps_per_epoch, step, history, untold)
    if checkpoint:
        report.last_good = str(checkpoint)
    print(describe(c, model, pictures, report.total_steps))
    evaluates = pictures.train_labels is not None and pictures.test_labels is not None
    if not evaluates:
        print("no labelled training and test pictures: evaluation is left out")
    baseline = next((record for record in history if record["event"] == "baseline"), {})
    if not history:
        if evaluates and checkpoint is None:                     # else metrics.jsonl is lost, and the untrained network with it
            baseline = {**evaluate(model, pictures, linear=True), "raw_pixels_knn": raw_pixel_accuracy(pictures, mean, std)}
        report.record("start", data=pictures.name, torch=torch.__version__, config=c.to_dict())
        report.record("baseline", **baseline)
    if {"knn", "raw_pixels_knn"} <= baseline.keys():
        print(f"before training: k-NN {baseline['raw_pixels_knn']:.1%} on raw pixels, {baseline['knn']:.1%} on the untrained network")

    # The epochs
    trained = distribute(model)
    with stop_requests() as asked, report.start():
        saved = time.perf_counter()
        for epoch in range(epochs, c.TOTAL_EPOCHS):
            for step in epoch_batches(len(crops), c, epoch)[report.step - epoch * steps_per_epoch:]:
                settings = schedules.at(report.step)
                micro_batches = ((crops.__getitems__(indices), draw_masks(c, c.DEVICE)) for indices in step)  # one at a time in memory
                report.add(train_step(trained, optimizer, micro_batches, settings, masked_patches), settings)
                overdue = c.SAVE_EVERY_MINUTES and time.perf_counter() - saved > 60 * c.SAVE_EVERY_MINUTES
                wanted = largest(asked[0] if asked else 0.5 if overdue else 0)                    # a signal's number, 0.5 for a save alone
                if wanted:
                    save_epoch(model, optimizer, epoch, report, pictures.name)
                    saved = time.perf_counter()
                    leave_if(wanted, report)
            report.require_finite(model)                         # before it is measured
            due, last = c.EVAL_EVERY and (epoch + 1) % c.EVAL_EVERY == 0, epoch + 1 == c.TOTAL_EPOCHS
            report.end_epoch(epoch + 1, evaluate(model, pictures, linear=last) if evaluates and (due or last) else {})
            save_epoch(model, optimizer, epoch + 1, report, pictures.name)
            saved = time.perf_counter()
            leave_if(largest(asked[0] if asked else 0), report)
    finish(model, pictures, transform, report, baseline)
    return model.eval()


@contextmanager
def output_folder(folder):
    """Makes OUTPUT_DIR and keeps other runs out of it; the lock falls with the process, however that ends."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "metrics.jsonl").open("a").close()
        lock = open(Path(folder, ".lock"), "a")                  # a link's file stays as it is
    except OSError as error:
        raise InputError(f"OUTPUT_DIR ({folder!r}) cannot be written: {error}; give another folder") from None
    with lock:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:                                 # others mean a file system without locks
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise InputError(f"OUTPUT_DIR ({folder!r}) is in use by another run; wait for it, or give another folder") from None
        yield


def save_epoch(model, optimizer, epoch, report, data):
    """dinov2_last.pth, the one before it as dinov2_previous.pth; at the end of an epoch also dinov2_epoch_{n}.pth every SAVE_EVERY epochs,
    and dinov2_final.pth after the last. epoch: those done, evaluation included."""
    c, folder, ended = model.config, Path(model.config.OUTPUT_DIR), report.step == epoch * report.steps_per_epoch
    report.look()                                                # first: what can be gone on from has no ten bad steps in a row
    report.require_finite(model)
    new, last, previous = (folder / f"dinov2_{name}.pth" for name in ("new", "last", "previous"))
    kept = [f"epoch_{epoch}"] * bool(ended and c.SAVE_EVERY and epoch % c.SAVE_EVERY == 0) + ["final"] * (epoch == c.TOTAL_EPOCHS)
    first, *others = [folder / f"dinov2_{name}.pth" for name in kept] + [new]                     # what goes on from new has them
    save_checkpoint(first, model, optimizer, epoch, report.step, data, report.steps_per_epoch, report.untold)
    for path in others if rank() == 0 else ():
        write_safely(path, first.read_bytes())
    if rank() == 0:
        if last.exists():
            last.replace(previous)
        new.replace(last)                                        # at every moment there are two that are whole
    of_all("saved")                                              # a process that left before would have the others ended in mid-write
    report.last_good = f"{last}, step {report.step:,}"


def leave_if(wanted, report):
    """Ends the run where a signal of this number asked for it; all is saved."""
    if wanted >= 1:
        report.say(f"stopped and saved at step {report.step:,} of {report.total_steps:,}; the same command with --resume goes on")
        if wanted == signal.SIGTERM:
            sys.exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


def finish(model, pictures, transform, report, baseline):
    """The closing table, the final record and the four pictures."""
    if rank():
        return
    c, folder = model.config, Path(model.config.OUTPUT_DIR, "figures")
    scores = next((r for r in reversed(report.history) if r["event"] == "epoch"), {})
    seconds = time.perf_counter() - report.started
    images = pictures.train_images if pictures.test_images is None else pictures.test_images
    images = images[torch.linspace(0, len(images) - 1, 10).long()]                                # files are often sorted by class
    teacher = load_backbone(Path(c.OUTPUT_DIR, "dinov2_final.pth"), c.DEVICE)                     # whole, also with SHARD
    draw_views(c, transform, images, folder / "views.png")
    draw_curves(c, report.history, folder / "curves.png")
    draw_attention(teacher, images, folder / "attention.png")
    draw_pca(teacher, images, folder / "pca.png")
    report.record("final", data=pictures.name, seconds=seconds, **{k: scores[k] for k in ("knn", "linear", "iou", "rank") if k in scores})
    if "knn" in scores:
        rows = {"raw pixels": {"knn": baseline.get("raw_pixels_knn")}, "untrained network": baseline, "trained teacher": scores}
        print(f"\n{pictures.name}: {len(pictures.train_images):,} training and {len(pictures.test_images):,} test pictures\n"
              f"{'':20}{'k-NN':>8}{'linear':>8}{'RankMe':>8}" + f"{'mask IoU':>10}" * ("iou" in scores))
        for name, row in rows.items():
            print(f"{name:20}" + "".join(f"{row[key]:{form}}" for key, form in (("knn", "8.1%"), ("linear", "8.1%"), ("rank", "8.1f"), ("iou", "10.1%"))
                                         if row.get(key) is not None))
    print(f"{seconds / 60:.1f} minutes; checkpoints, metrics.jsonl and figures in {c.OUTPUT_DIR}")


def main(argv=None):
    """The command line: exit code 0, or 2 and one line where the input cannot work."""
    sys.stdout.reconfigure(errors="backslashreplace")            # not every screen can show every file's name
    try:
        train_dinov2(parse_arguments(argv))
    except InputError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
