"""Train SimCLR or VICReg with the images, views, network, optimizer and loop of our file.

    python benchmarks/peers.py simclr --output-dir DIR     # and the flags of dinov2_cifar.py
    python benchmarks/peers.py vicreg --output-dir DIR

What differs is the objective: two crops of each image and one head of three layers, with batch
norm after the first two. There is no teacher, the network itself is evaluated. HEAD_HIDDEN_DIM and
PROJECTION_DIM are widths of the head, STUDENT_TEMP is SimCLR's temperature; other settings of the
objective, the teacher and masks have no effect. Checkpoints and metrics are as of our runs.
"""

import sys

import torch
import torch.nn.functional as F
from lightly_baseline import dinov2  # which finds it, one folder up
from torch import nn


def nt_xent_loss(z1, z2, temperature):
    """Tell each row's other view from all other rows (SimCLR, 2002.05709, equation 1)."""
    z, n = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    rows = torch.arange(2 * n, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(rows == rows[:, None], -torch.inf)
    return F.cross_entropy(logits, (rows + n) % (2 * n))


def vicreg_loss(z1, z2, temperature=None):
    """Variance, invariance, covariance, weighted as in the authors' code (VICReg, 2105.04906)."""
    loss = 25 * F.mse_loss(z1, z2)
    for z in (z1, z2):
        deviation, covariance = (z.var(0) + 1e-4).sqrt(), z.T.cov()
        off_diagonal = covariance - covariance.diagonal().diag()
        loss = loss + 12.5 * F.relu(1 - deviation).mean() + off_diagonal.square().sum() / z.shape[1]
    return loss


LOSSES = {"simclr": nt_xent_loss, "vicreg": vicreg_loss}


class Peer(nn.Module):
    """A network and its head, with the interface of DINOv2; it is its own teacher."""

    set_pixel_statistics = dinov2.DINOv2.set_pixel_statistics

    def __init__(self, config, name):
        super().__init__()
        c, self.config, self.loss = config, config, LOSSES[name]
        dinov2.require(dinov2.world_size() == 1, f"{name} is for one process")
        fits = c.GLOBAL_CROPS_NUMBER == 2 and not c.LOCAL_CROPS_NUMBER
        dinov2.require(fits, f"{name} wants GLOBAL_CROPS_NUMBER 2 and LOCAL_CROPS_NUMBER 0")
        self.student = self.teacher = dinov2.build_backbone(c)
        width, hidden = c.MODEL_DIMS[c.MODEL_SIZE]["dim"], c.HEAD_HIDDEN_DIM
        layers = []
        for size in (width, hidden):
            layers += [nn.Linear(size, hidden), dinov2.BatchNorm(hidden), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Linear(hidden, c.PROJECTION_DIM))
        self.student_modules = (self.student, self.head)

    def forward(self, views, mask, teacher_temp, patch_indices=None):
        """Return what DINOv2.forward does, with 0 for what there is not."""
        tokens, _ = self.student(torch.cat(views), None, mask.new_zeros(0, dtype=torch.long))
        z = self.head(tokens).float()
        with torch.autocast(z.device.type, enabled=False):
            loss = self.loss(*z.chunk(2), self.config.STUDENT_TEMP)
        none = dict.fromkeys(["patch", "koleo", "kl", "teacher_entropy"], torch.zeros_like(loss))
        return {"loss": loss, "img": loss.detach(), **none}

    def update_teacher(self, m):
        """Do nothing: the network is its own teacher."""


def install(name):
    """Put a peer in the place of DINOv2 in dinov2_cifar."""
    dinov2.DINOv2, dinov2.STATES = lambda config: Peer(config, name), ("student", "teacher", "head")
    dinov2.collapse_warnings = lambda *args: []  # there are no targets
    dinov2.plot_figures = lambda *args: None


if __name__ == "__main__":
    if sys.argv[1:2] not in [[name] for name in LOSSES]:
        dinov2.exit_with_error(f"the first argument must be one of {', '.join(LOSSES)}")
    install(sys.argv[1])
    dinov2.main(sys.argv[2:])
