"""Mask IoU of a linear probe on patch features, on the built-in shapes.

    python benchmarks/dense_probe.py checkpoints/dinov2_final.pth

Prints the IoU of the trained teacher and of an untrained network of the checkpoint's config. The
probe predicts from each patch token alone which pixels of the patch belong to the shape.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dinov2_cifar as dinov2  # noqa: E402, one folder up


def mean_iou(prediction, target):
    """Return the mean IoU, 0..1, of foreground and background of bool tensors of one shape."""
    pairs = ((prediction, target), (~prediction, ~target))
    return sum(((a & b).sum() / (a | b).sum().clamp(min=1)).item() for a, b in pairs) / 2


def fit_linear(x, target, penalty):
    """Return the weight (D+1,P), bias last, of P logistic regressions from x (...,D), by L-BFGS."""
    weight = torch.zeros(x.shape[-1] + 1, target.shape[-1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight[:-1] + weight[-1], target.float())
        loss = loss + penalty * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def dense_probe(train_patches, train_masks, test_patches, test_masks):
    """Return the test IoU, 0..1, of a linear probe of patch tokens (B,N,D) for masks bool (B,H,W).

    The L2 penalty is the best of four on a held-out fifth of the training images.
    """
    side = math.isqrt(train_patches.shape[1])
    mean, std = train_patches.mean((0, 1)), train_patches.std((0, 1)) + 1e-6
    x, x_test = (train_patches - mean) / std, (test_patches - mean) / std
    y, y_test = (rearrange(masks, "b (h p) (w q) -> b (h w) (p q)", h=side, w=side)
                 for masks in (train_masks, test_masks))

    def score(weight, x, y):
        return mean_iou(x @ weight[:-1] + weight[-1] > 0, y)

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: len(x) // 5], order[len(x) // 5 :]
    scores = {penalty: score(fit_linear(x[rest], y[rest], penalty), x[held_out], y[held_out])
              for penalty in (1e-4, 1e-3, 1e-2, 1e-1)}
    return score(fit_linear(x, y, max(scores, key=scores.get)), x_test, y_test)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a file written by dinov2_cifar.py")
    parser.add_argument("--images", type=int, default=2048, help="for training; a quarter for test")
    parser.add_argument("--device", default=dinov2.best_device(), help="[%(default)s]")
    given = parser.parse_args(argv)

    try:
        trained = dinov2.load_backbone(given.checkpoint, given.device)
    except dinov2.InputError as error:
        parser.error(error)
    config = dinov2.Config(**dinov2.read_checkpoint(given.checkpoint)["config"])
    torch.manual_seed(config.SEED)
    untrained = dinov2.build_backbone(config).to(given.device)
    untrained.pixel_mean, untrained.pixel_std = trained.pixel_mean, trained.pixel_std

    counts, size = (given.images, given.images // 4), config.IMAGE_SIZE
    shapes = [dinov2.make_shapes(n, size, seed, masks=True) for seed, n in enumerate(counts)]
    for name, backbone in (("untrained network", untrained), ("trained teacher", trained)):
        data = []
        for images, _, masks in shapes:
            images, masks = images.to(given.device), masks.to(given.device)
            data += [dinov2.extract_features(backbone, images, patches=True), masks]
        print(f"{name:18}mask IoU {dense_probe(*data):.1%}", flush=True)


if __name__ == "__main__":
    main()
