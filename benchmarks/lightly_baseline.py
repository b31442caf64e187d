"""Train lightly's DINOv2 parts with the images, views, masks, constants and loop of our file.

    pip install lightly==1.6.0 timm==1.0.31
    python benchmarks/lightly_baseline.py --output-dir DIR     # and the flags of dinov2_cifar.py

timm's network and lightly's heads, losses and moving average, put together as in its example
examples/pytorch/dinov2.py, but with a teacher that starts as its student. Targets are centered by
a moving mean, not balanced by Sinkhorn-Knopp. Checkpoints and metrics.jsonl are as of our runs.
"""

import importlib.util
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dinov2_cifar as dinov2  # noqa: E402, one folder up

HAS_LIGHTLY = all(importlib.util.find_spec(name) for name in ("lightly", "timm"))
IGNORED = ("KOLEO_KIND", "KOLEO_FEATURES", "SINKHORN_ITERATIONS", "DROPOUT", "REGISTER_TOKENS")


class LightlyBackbone(nn.Module):
    """timm's network, masked by lightly, with the interface of VisionTransformer."""

    def __init__(self, config):
        super().__init__()
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        c, dims = config, config.MODEL_DIMS[config.MODEL_SIZE]
        sizes = {"embed_dim": dims["dim"], "depth": dims["depth"], "num_heads": dims["heads"]}
        extras = {"init_values": c.LAYER_SCALE or None, "drop_path_rate": c.DROP_PATH}
        options = {"num_classes": 0, "dynamic_img_size": True}
        vit = VisionTransformer(c.IMAGE_SIZE, c.PATCH_SIZE, **sizes, **extras, **options)
        options = {"antialias": False, "pos_embed_initialization": "skip"}
        self.masked_vit = MaskedVisionTransformerTIMM(vit, **options)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))
        self.register_buffer("pixel_std", torch.ones(3, 1, 1))
        self.precision = c.PRECISION

    def forward(self, x, mask=None):
        mask = None if mask is None else F.pad(mask, (1, 0))  # never the class token
        tokens = self.masked_vit.encode(x, mask=mask)
        return tokens[:, 0], tokens[:, 1:]


class LightlyDINOv2(nn.Module):
    """lightly's parts with the interface of DINOv2."""

    set_pixel_statistics = dinov2.DINOv2.set_pixel_statistics

    def __init__(self, config):
        super().__init__()
        from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
        from lightly.models.modules import DINOv2ProjectionHead

        c = self.config = config
        for name in IGNORED:
            fits = getattr(c, name) == dinov2.CONSTANTS[name]
            dinov2.require(fits, f"{name} does not reach lightly's parts: leave it as it is")
        dinov2.require(c.MASK_RATIO, "MASK_RATIO must be above 0 for lightly's parts")
        sizes = (c.HEAD_HIDDEN_DIM, c.HEAD_BOTTLENECK_DIM, c.PROJECTION_DIM, c.HEAD_BATCH_NORM)
        width = c.MODEL_DIMS[c.MODEL_SIZE]["dim"]
        self.student, self.teacher = LightlyBackbone(c), LightlyBackbone(c)
        for name in ("img_head", "patch_head", "teacher_img_head", "teacher_patch_head"):
            setattr(self, name, DINOv2ProjectionHead(width, *sizes))
        self.student_modules = (self.student, self.img_head, self.patch_head)
        self.teacher_modules = (self.teacher, self.teacher_img_head, self.teacher_patch_head)
        for teacher, student in zip(self.teacher_modules, self.student_modules, strict=True):
            teacher.requires_grad_(False).load_state_dict(student.state_dict())
        self.img_loss = DINOLoss(c.PROJECTION_DIM, student_temp=c.STUDENT_TEMP)
        self.patch_loss = IBOTPatchLoss(c.PROJECTION_DIM, student_temp=c.STUDENT_TEMP)
        self.koleo_loss = KoLeoLoss()
        self.train()

    def train(self, mode=True):
        """Set the mode, also of the teacher's heads: no average is kept of batch norm's means."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, views, mask, teacher_temp, patch_indices=None):
        """Return what DINOv2.forward does; patch_indices are not needed."""
        c, n = self.config, self.config.GLOBAL_CROPS_NUMBER
        crops, local = torch.cat(views[:n]), views[n:]
        with torch.no_grad():
            class_tokens, patches = self.teacher(crops)
            img_targets = self.teacher_img_head(class_tokens)
            patch_targets = self.teacher_patch_head(patches[mask])
            targets = ((img_targets - self.img_loss.center[0]) / teacher_temp).softmax(-1)
        class_tokens, patches = self.student(crops, mask)
        img_logits, patch_logits = self.img_head(class_tokens), self.patch_head(patches[mask])
        if local:
            img_logits = torch.cat([img_logits, self.img_head(self.student(torch.cat(local))[0])])
        logits = list(img_logits.chunk(len(views)))
        img = self.img_loss(list(img_targets.chunk(n)), logits, teacher_temp)
        side = crops.shape[-1] // c.PATCH_SIZE
        mask = mask.unflatten(1, (side, side))
        patch = self.patch_loss(patch_targets, patch_logits, mask, teacher_temp)
        koleo = sum(self.koleo_loss(x) for x in class_tokens.chunk(n))
        loss = c.LAMBDA_IMG * img + c.LAMBDA_PATCH * patch + c.LAMBDA_KOLEO * koleo
        losses = {"loss": loss, "img": img, "patch": patch, "koleo": koleo}
        return losses | dinov2.target_diagnostics(targets.float().unflatten(0, (n, -1)), img)

    def update_teacher(self, m):
        from lightly.models.utils import update_momentum

        for teacher, student in zip(self.teacher_modules, self.student_modules, strict=True):
            update_momentum(student, teacher, m)


def make_optimizer(model):
    """Return AdamW with the groups of dinov2_cifar.make_optimizer."""
    groups = {(True, "lr"): [], (False, "lr"): [], (True, "prototype_lr"): []}
    for module in model.student_modules:
        for name, parameter in module.named_parameters():
            decays = parameter.ndim > 1 and parameter.shape[:2] != (1, 1)  # not a single token
            key = (True, "prototype_lr") if "last_layer" in name else (decays, "lr")
            groups[key].append(parameter)
    groups = [{"params": p, "decays": key[0], "rate": key[1]} for key, p in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def install():
    """Put lightly's parts in the place of ours in dinov2_cifar."""
    warnings.filterwarnings("ignore", "To copy construct from a tensor")  # the temperature
    dinov2.DINOv2, dinov2.make_optimizer = LightlyDINOv2, make_optimizer
    dinov2.STATES = (*dinov2.STATES, "img_loss", "patch_loss")  # the centers
    dinov2.plot_figures = lambda *args: None  # they need our network


if __name__ == "__main__":
    install()
    dinov2.main(["--no-compile", *sys.argv[1:]])  # not compiled, as its example
