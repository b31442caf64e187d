"""Mask IoU of a linear probe on patch features, on the built-in shapes.

    python benchmarks/dense_probe.py checkpoints/dinov2_final.pth

Prints the IoU of the trained teacher and of an untrained network of the checkpoint's config. The
probe predicts from each patch token alone which pixels of the patch belong to the shape.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from lightly_baseline import dinov2  # which finds it, one folder up


def mean_iou(prediction, target):
    """Return the mean IoU, 0..1, of foreground and background of bool tensors of one shape."""
    pairs = ((prediction, target), (~prediction, ~target))
    return sum(((a & b).sum() / (a | b).sum().clamp(min=1)).item() for a, b in pairs) / 2


def dense_probe(train_patches, train_masks, test_patches, test_masks):
    """Return the test IoU, 0..1, of a linear probe of patch tokens (B,N,D) for masks bool (B,H,W).

    A logistic regression per pixel of a patch; held-out images choose its L2 penalty.
    """
    side, masks = math.isqrt(train_patches.shape[1]), (train_masks, test_masks)
    mean, std = train_patches.mean((0, 1)), train_patches.std((0, 1)) + 1e-6
    x, x_test = (train_patches - mean) / std, (test_patches - mean) / std
    y, y_test = (rearrange(y, "b (h p) (w q) -> b (h w) (p q)", h=side, w=side) for y in masks)

    def iou(penalty, x, y, x_test, y_test):
        weight = torch.zeros(x.shape[-1] + 1, y.shape[-1], device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = x @ weight[:-1] + weight[-1]  # the last row is the bias
            loss = F.binary_cross_entropy_with_logits(logits, y.float())
            loss = loss + penalty * weight[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return mean_iou(x_test @ weight[:-1] + weight[-1] > 0, y_test)

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[: len(x) // 5], order[len(x) // 5 :]
    scores = {p: iou(p, x[rest], y[rest], x[held], y[held]) for p in (1e-4, 1e-3, 1e-2, 1e-1)}
    return iou(max(scores, key=scores.get), x, y, x_test, y_test)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a file written by dinov2_cifar.py")
    parser.add_argument("--images", type=int, default=2048, help="for training; a quarter for test")
    parser.add_argument("--device", default=dinov2.Config.DEVICE, help="[%(default)s]")
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
            patches = dinov2.extract_features(backbone, images, patches=True)
            data += [patches, masks.to(given.device)]
        print(f"{name:18}mask IoU {dense_probe(*data):.1%}", flush=True)


if __name__ == "__main__":
    main()
