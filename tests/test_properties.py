"""The objective on extreme finite inputs: random sizes, magnitudes and patterns."""

import math

import pytest
import torch

from dinov2_cifar import (
    ProjectionHead, dino_loss, ibot_loss, koleo_regularizer, multi_crop_dino_loss,
    sinkhorn_knopp_centering, soft_cross_entropy, target_diagnostics)

TRIALS = 300


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def integer(low, high):
    return int(torch.randint(low, high + 1, ()))


def extreme_rows(count, width, limit=30):
    """Return (count, width) numbers of magnitudes 10^-limit to 10^limit, some rows of a pattern."""
    x = torch.randn(count, width)
    if torch.rand(()) < 0.5:  # every row has its own magnitude
        x = x / x.abs().amax().clamp(min=1) * 10 ** torch.empty(count, 1).uniform_(-limit, limit)
    else:  # every number has
        low, high = sorted(uniform(-limit, limit) for _ in range(2))
        x = x.sign() * 10 ** torch.empty(count, width).uniform_(low, high)
    if torch.rand(()) < 0.7:
        for i in range(count):
            one_hot = x[i] * (torch.arange(width) == i % width)
            rows = (x[i], x[i] * 0, x[i, 0].expand(width), x[0], -x[0], one_hot)
            x[i] = rows[integer(0, len(rows) - 1)].clone()
    return x


def temperature():
    return 10 ** uniform(-3, 1)


def finite_with_gradient(loss, x):
    """Check that loss(x) and its gradient are finite; return the loss."""
    x = x.clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()
    return value.item()


def test_sinkhorn_gives_distributions_for_extreme_logits():
    for _ in range(TRIALS):
        x = extreme_rows(integer(1, 64), integer(1, 64))
        q = sinkhorn_knopp_centering(x, integer(0, 5), temperature())
        assert q.shape == x.shape and (q >= 0).all()
        assert torch.allclose(q.sum(1), torch.ones(len(q)), atol=1e-4)
        values = target_diagnostics(q.unsqueeze(0), torch.tensor(0.0))
        for name in ("teacher_entropy", "mean_entropy"):
            assert -1e-4 <= values[name] <= math.log(q.shape[1]) + 1e-3


def test_head_logits_are_cosines_with_finite_gradients_for_extreme_features():
    """Zeros too: else one dead output would have every step skipped."""
    for _ in range(TRIALS):
        x = extreme_rows(integer(1, 64), integer(1, 64)).requires_grad_()
        head = ProjectionHead(8, 4, 8, x.shape[1])
        head.mlp = torch.nn.Identity()
        logits = head(x)
        (logits / 0.02).sum().backward()
        assert logits.isfinite().all() and logits.abs().max() < 1.001
        assert all(tensor.grad.norm().isfinite() for tensor in (x, head.prototypes))


@pytest.mark.parametrize("kind", ["nearest", "cosine"])
def test_koleo_is_finite_for_extreme_features(kind):
    low, high = (-math.log(2), -math.log(1e-8)) if kind == "nearest" else (0, 1)
    for _ in range(TRIALS):
        x = extreme_rows(integer(1, 64), integer(1, 64))
        value = finite_with_gradient(lambda x: koleo_regularizer(x, kind), x)
        assert low - 1e-3 <= value <= high + 1e-3


def test_image_loss_is_finite_for_extreme_logits():
    for _ in range(TRIALS):
        count, width = integer(1, 64), integer(1, 64)
        student, teacher = extreme_rows(count, width), extreme_rows(count, width)
        student_temp, teacher_temp = temperature(), temperature()
        finite_with_gradient(lambda s: dino_loss(s, teacher, teacher_temp, student_temp), student)
        targets = sinkhorn_knopp_centering(teacher, 3, teacher_temp)
        both = torch.stack([targets, targets.flip(0)])
        views = torch.stack([student, student.flip(0), -student])
        finite_with_gradient(lambda s: multi_crop_dino_loss(s, both, student_temp), views)
        assert (soft_cross_entropy(student.clamp(-1, 1), targets, 1.0) > -1e-4).all()


def test_patch_loss_is_finite_for_extreme_logits():
    for _ in range(TRIALS):
        count, width, crops, temp = integer(1, 64), integer(1, 64), integer(1, 8), temperature()
        student, teacher = extreme_rows(count, width), extreme_rows(count, width)
        mask = torch.zeros(crops * 64, dtype=torch.bool)
        mask[torch.randperm(crops * 64)[:count]] = True
        finite_with_gradient(lambda s: ibot_loss(s, teacher, mask.view(crops, 64), temp), student)
