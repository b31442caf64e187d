"""Schedules, parameter groups and the training step, against values done by hand."""

import math
from copy import deepcopy

import pytest
import torch
from conftest import close

from dinov2_cifar import CosineScheduler, DINOv2, hyperparameters, make_optimizer, train_step

HPARAMS = {"lr": 1e-3, "prototype_lr": 1e-3, "weight_decay": 0.04}
HPARAMS |= {"momentum": 0.9, "teacher_temp": 0.04}


class Run:
    """A small model, its optimizer and a fixed batch; step(lr=...) is a training step on it."""

    def __init__(self, config, batch=4):
        c = config
        torch.manual_seed(0)
        self.model = DINOv2(c).to(c.DEVICE)
        self.optimizer = make_optimizer(self.model)
        sizes = [c.GLOBAL_CROP_SIZE] * c.GLOBAL_CROPS_NUMBER
        sizes += [c.LOCAL_CROP_SIZE] * c.LOCAL_CROPS_NUMBER
        self.views = [torch.randn(batch, 3, size, size, device=c.DEVICE) for size in sizes]
        self.mask = torch.zeros(c.GLOBAL_CROPS_NUMBER * batch, 16, dtype=torch.bool)
        self.mask[::2, :6] = True
        indices = self.mask.flatten().nonzero()[:, 0]
        self.mask, self.indices = self.mask.to(c.DEVICE), indices.to(c.DEVICE)

    def step(self, *micro_batches, **hparams):
        batches = micro_batches or [(self.views, self.mask, self.indices)]
        return train_step(self.model, self.optimizer, iter(batches), {**HPARAMS, **hparams})

    def student(self):
        """Return the student's parameters by name, like img_head.mlp.0.weight."""
        return {n: p for n, p in self.model.named_parameters() if not n.startswith("teacher")}


def copy(parameters):
    return [p.detach().clone() for p in parameters]


def equal(parameters, others):
    """Return for each pair of tensors whether they are equal."""
    return [torch.equal(a, b) for a, b in zip(parameters, others, strict=True)]


# Schedules

Q = math.sqrt(0.5) / 2


@pytest.mark.parametrize(
    "arguments, values",
    [
        ((0.996, 1.0, 100), {50: 0.998, 100: 1.0, 101: 1.0}),
        ((2.0, 1.0, 8), {0: 2, 2: 1.5 + Q, 4: 1.5, 6: 1.5 - Q, 8: 1, 9: 1, 1000: 1}),
        ((1.0, 0.2, 14, 4, 0.5), {0: 0.5, 1: 0.625, 3: 0.875, 4: 1, 9: 0.6, 14: 0.2, 15: 0.2}),
        ((1.0, 0.2, 4, 4), {0: 0, 1: 0.25, 3: 0.75, 4: 0.2}),
        ((1.0, 0.2, 1, 1), {0: 0, 1: 0.2}),
    ],
)
def test_cosine_scheduler_values(arguments, values):
    schedule = CosineScheduler(*arguments)
    found = [schedule.get_value(step) for step in values]
    assert found == pytest.approx(list(values.values()), abs=1e-15)


@pytest.mark.parametrize("total", [100, 10_000])
def test_hyperparameters_depend_on_the_fraction_of_the_run(small, total):
    recipe = {"LEARNING_RATE": 0.02, "LEARNING_RATE_END": 2e-4, "WARMUP": 0.1}
    recipe |= {"WEIGHT_DECAY": 0.04, "WEIGHT_DECAY_END": 0.4, "EMA_START": 0.9, "EMA_END": 1.0}
    recipe |= {"TEACHER_TEMP_START": 0.04, "TEACHER_TEMP_END": 0.07, "TEACHER_TEMP_WARMUP": 0.3}
    c = small(BATCH_SIZE=256, FREEZE_PROTOTYPES=0.02, **recipe)  # sqrt(256 / 1024) is 0.5
    curves = {
        "lr": {0: 0, 0.05: 0.005, 0.1: 0.01, 0.55: 0.00505, 1: 1e-4, 2: 1e-4},
        "weight_decay": {0: 0.04, 0.5: 0.22, 1: 0.4, 2: 0.4},
        "momentum": {0: 0.9, 0.5: 0.95, 1: 1, 2: 1},
        "teacher_temp": {0: 0.04, 0.1: 0.05, 0.2: 0.06, 0.3: 0.07, 0.7: 0.07, 1: 0.07},
    }
    for name, points in curves.items():
        values = [hyperparameters(c, round(f * total), total)[name] for f in points]
        assert values == pytest.approx(list(points.values())), name
    frozen, free = (hyperparameters(c, round(0.02 * total) - i, total) for i in (1, 0))
    assert frozen["prototype_lr"] == 0 < frozen["lr"]
    assert free["prototype_lr"] == free["lr"] > 0


@pytest.mark.parametrize("batch, accumulate", [(16, 1), (1024, 1), (16, 4)])
def test_learning_rate_scales_with_root_of_images_per_step(small, batch, accumulate):
    c = small(BATCH_SIZE=batch, ACCUMULATE=accumulate, LEARNING_RATE=0.01, WARMUP=0.0)
    expected = 0.01 * math.sqrt(batch * accumulate / 1024)
    assert hyperparameters(c, 0, 50)["lr"] == pytest.approx(expected)


# Parameter groups and the step by hand


@pytest.mark.parametrize("batch_norm", [True, False])
def test_optimizer_holds_each_student_parameter_once(small, batch_norm):
    run = Run(small(REGISTER_TOKENS=2, LAYER_SCALE=0.1, HEAD_BATCH_NORM=batch_norm))
    held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in run.model.parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained) == sorted(id(p) for p in run.student().values())


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_train_step_is_adamw_by_hand(small, clip):
    """In float64, from the gradients of a copy: decay by name, prototypes that are frozen first."""
    run = Run(small(CLIP_GRAD=clip, REGISTER_TOKENS=1, LAYER_SCALE=0.1))
    moments = {name: (0.0, 0.0, 0) for name in run.student()}
    for lr, prototype_lr, decay in [(0.02, 0.0, 0.3), (0.01, 0.005, 0.4), (0.02, 0.04, 0.0)]:
        twin = deepcopy(run.model)
        for head in (twin.img_head, twin.patch_head):
            head.prototypes.requires_grad_(prototype_lr > 0)
        twin(run.views, run.mask, HPARAMS["teacher_temp"])["loss"].backward()
        twin = {name: p for name, p in twin.named_parameters() if name in moments}
        grads = {name: p.grad.double() for name, p in twin.items() if p.grad is not None}
        assert len(twin) - len(grads) == (0 if prototype_lr else 2)
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        values = run.step(lr=lr, prototype_lr=prototype_lr, weight_decay=decay)
        assert float(values["grad_norm"]) == pytest.approx(norm, rel=1e-5) and norm > 0.5
        for name, new in run.student().items():
            if name not in grads:  # frozen: no decay, no moments
                assert torch.equal(new, twin[name])
                continue
            old, g = twin[name].detach().double(), grads[name]
            g = g * min(1, clip / norm) if clip else g
            rate = prototype_lr if name.endswith("prototypes") else lr
            m, v, t = moments[name]
            m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
            moments[name] = m, v, t
            exempt = name.endswith(("bias", "gamma", "token", "register_tokens")) or "norm" in name
            old = old * (1 - rate * (0 if exempt or old.ndim == 1 else decay))
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            close(new.detach(), old - rate * update, 2e-6)


def test_teacher_is_the_moving_average_of_the_updated_student(small, device):
    run = Run(small(DEVICE=device, REGISTER_TOKENS=1))
    teacher = [p for module in run.model.teacher_modules for p in module.parameters()]
    for momentum in (0.5, 0.8):
        before = copy(teacher)
        run.step(lr=0.01, momentum=momentum)
        for old, new, student in zip(before, teacher, run.student().values(), strict=True):
            close(new, momentum * old.double() + (1 - momentum) * student.detach().double(), 1e-6)
    assert not any(equal(teacher, run.student().values()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["views", "gradient"])
def test_train_step_skips_what_is_not_finite(small, part, value):
    run = Run(small())
    run.step()
    before, view = copy(run.student().values()), run.views[0].clone()
    if part == "views":
        run.views[0][0, 0, 0, 0] = value
        values = run.step()
        run.views[0] = view
    else:  # of a finite loss
        hook = run.model.img_head.mlp[0].bias.register_hook(lambda grad: grad * value)
        values = run.step()
        hook.remove()
        assert values["loss"].isfinite()
    assert values["skipped"] == 1 and all(equal(before, run.student().values()))
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert run.step(prototype_lr=0.01)["skipped"] == 0
    assert not any(equal(before, run.student().values()))


def test_accumulated_gradients_are_those_of_the_big_batch(small):
    """Where an image's loss depends on no other image: no Sinkhorn-Knopp, batch norm, KoLeo."""
    alone = {"SINKHORN_ITERATIONS": 0, "HEAD_BATCH_NORM": False, "LAMBDA_KOLEO": 0.0}
    big, parts = (Run(small(ACCUMULATE=n, **alone), batch=8) for n in (1, 2))
    halves = zip(*(view.chunk(2) for view in parts.views), strict=True)
    masks = parts.mask.unflatten(0, (2, 8)).chunk(2, 1)
    batches = [(list(v), mask.flatten(0, 1)) for v, mask in zip(halves, masks, strict=True)]
    expected, values = big.step(), parts.step(*batches)
    for name in ("loss", "img", "patch", "grad_norm"):
        close(values[name], expected[name])
    for a, b in zip(parts.student().values(), big.student().values(), strict=True):
        close(a.grad, b.grad)
    assert {int(state["step"]) for state in parts.optimizer.state.values()} == {1}


def test_train_step_never_waits_for_the_device(small, device, monkeypatch, request):
    run = Run(small(DEVICE=device))
    values = run.step().values()  # the first one may set things up
    assert {(v.ndim, v.device.type, v.requires_grad) for v in values} == {(0, device, False)}

    def waits(*args, **options):
        raise AssertionError("a value was read from the device")

    methods = "item tolist cpu numpy nonzero __bool__ __int__ __float__ __index__ new_tensor"
    functions = "nonzero masked_select unique tensor as_tensor"
    for owner, names in ((torch.Tensor, methods), (torch, functions)):
        for name in names.split():
            monkeypatch.setattr(owner, name, waits)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    run.step()
    with pytest.raises(AssertionError, match="read from the device"):
        run.step((run.views, run.mask))  # without indices, it must look for them


def test_train_step_in_bf16_keeps_losses_and_parameters_in_fp32(small, device):
    run, seen = Run(small(PRECISION="bf16", DEVICE=device)), []
    layer = run.model.student.blocks[0].mlp.fc1
    layer.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    values, plain = run.step(), Run(small(PRECISION="fp32", DEVICE=device)).step()
    assert set(seen) == {torch.bfloat16}
    assert {v.dtype for v in (*values.values(), *run.model.parameters())} == {torch.float32}
    assert values["loss"] != plain["loss"]
    close(values["loss"], plain["loss"], 0.05)
