"""The objective on any finite input: hypothesis looks for sizes, magnitudes and patterns that make it inf or nan."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_cifar import (cross_entropy, dino_loss, ibot_loss, koleo_regularizer, multi_crop_dino_loss, sinkhorn_knopp_centering, target_diagnostics,
                          unit)

thorough = settings(max_examples=300, deadline=None, derandomize=True, database=None)
temperatures = st.floats(0.001, 10)                              # the range of the constants
sizes = st.integers(1, 64)


@st.composite
def rows(draw, count=sizes, width=sizes):
    """(count, width) numbers of magnitudes 1e-30 to 1e30, in which rows may be alike, opposite, all 0, all the same number, or one-hot."""
    count, width = draw(count), draw(width)
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    if draw(st.booleans()):                                      # every row of a magnitude of its own
        exponents = draw(st.lists(st.floats(-30, 30), min_size=1, max_size=4))
        x = x / x.abs().amax().clamp(min=1) * torch.tensor([10.0 ** exponents[i % len(exponents)] for i in range(count)]).unsqueeze(1)
    else:                                                        # every number
        low, high = sorted([draw(st.floats(-30, 30)), draw(st.floats(-30, 30))])
        x = x.sign() * 10 ** torch.linspace(low, high, x.numel())[torch.randperm(x.numel())].view_as(x)
    for i, kind in enumerate(draw(st.lists(st.sampled_from(["", "0", "same", "copy", "minus", "one"]), max_size=count))):
        x[i] = {"": x[i], "0": x[i] * 0, "same": x[i, 0], "copy": x[0], "minus": -x[0], "one": x[i] * (torch.arange(width) == i % width)}[kind]
    return x


def finite_with_gradient(loss, *inputs):
    """Calls loss on inputs that ask for a gradient; both must be finite → the loss."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    value.backward()
    assert torch.isfinite(value) and all(torch.isfinite(x.grad).all() for x in inputs)
    return value.item()


@thorough
@given(rows(), st.integers(0, 5), temperatures)
def test_sinkhorn_gives_distributions(x, rounds, temperature):
    q = sinkhorn_knopp_centering(x, rounds, temperature)
    assert q.shape == x.shape and (q >= 0).all() and torch.allclose(q.sum(1), torch.ones(len(q)), atol=1e-4)
    diagnostics = target_diagnostics(q, torch.tensor(0.0))
    assert all(-1e-4 <= diagnostics[name] <= math.log(q.shape[1]) + 1e-3 for name in ("teacher_entropy", "mean_entropy"))


@thorough
@given(rows())
def test_unit_vectors_have_length_one_whatever_they_had_before(x):
    length = unit(x).norm(dim=1)
    assert ((length - 1).abs() < 1e-3)[x.abs().amax(1) > 1e-12].all() and (length < 1.001).all()


@thorough
@given(rows())
def test_the_gradient_of_unit_vectors_has_a_finite_norm(x):
    """That of zeros has, too: else one dead output would have every step skipped."""
    x.requires_grad_()
    (unit(x) / 0.02).sum().backward()
    assert x.grad.norm().isfinite()


@thorough
@given(rows(), st.sampled_from(["nearest", "cosine"]))
def test_koleo_is_finite(x, kind):
    value = finite_with_gradient(lambda x: koleo_regularizer(x, kind), x)
    low, high = (-math.log(2), -math.log(1e-8)) if kind == "nearest" else (0, 1)
    assert low - 1e-3 <= value <= high + 1e-3


@st.composite
def logits_and_targets(draw, count=sizes):
    student = draw(rows(count))
    return student, draw(rows(st.just(len(student)), st.just(student.shape[1])))


@thorough
@given(logits_and_targets(), temperatures, temperatures)
def test_the_image_loss_is_finite(pair, teacher_temp, student_temp):
    student, teacher = pair
    assert finite_with_gradient(lambda s: dino_loss(s, teacher, teacher_temp, student_temp), student) > -1e30
    targets = sinkhorn_knopp_centering(teacher, 3, teacher_temp)
    finite_with_gradient(lambda s: multi_crop_dino_loss(torch.stack([s, s.flip(0), -s]), torch.stack([targets, targets.flip(0)]), student_temp), student)
    assert (cross_entropy(student.clamp(-1, 1), targets, 1.0) > -1e-4).all()


@thorough
@given(logits_and_targets(), temperatures, st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_patch_loss_is_finite(pair, temperature, crops, random):
    student, teacher = pair
    mask = torch.zeros(crops * 64, dtype=torch.bool)             # (R,N) with one True for each row, wherever it falls
    mask[random.sample(range(crops * 64), len(student))] = True
    finite_with_gradient(lambda s: ibot_loss(s, teacher, mask.view(crops, 64), temperature), student)
