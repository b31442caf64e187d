"""The optimization: schedules as functions of the step, parameter groups, and the training step."""

import math
from itertools import pairwise

import pytest
import torch

from dinov2_cifar import CosineScheduler, DINOv2, Schedules, make_optimizer, train_step

HPARAMS = {"lr": 1e-3, "prototype_lr": 1e-3, "weight_decay": 0.04, "momentum": 0.9,
           "teacher_temp": 0.04}


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Run:
    """A small model, its optimizer and a fixed batch; step(lr=...) is one training step on it."""

    def __init__(self, config, batch=4):
        c = config
        torch.manual_seed(c.SEED)
        self.model = DINOv2(c).to(c.DEVICE)
        self.optimizer = make_optimizer(self.model)
        sizes = [c.GLOBAL_CROP_SIZE] * c.GLOBAL_CROPS_NUMBER
        sizes += [c.LOCAL_CROP_SIZE] * c.LOCAL_CROPS_NUMBER
        self.views = [torch.randn(batch, 3, size, size, device=c.DEVICE) for size in sizes]
        mask = torch.zeros(c.GLOBAL_CROPS_NUMBER * batch, 16, dtype=torch.bool)
        mask[::2, :6] = True
        self.mask = mask.to(c.DEVICE)
        self.patch_indices = self.mask.flatten().nonzero().squeeze(1)

    def step(self, **hparams):
        micro_batches = [(self.views, self.mask, self.patch_indices)]
        return train_step(self.model, self.optimizer, micro_batches, {**HPARAMS, **hparams})

    def group(self, name):
        return next(group for group in self.optimizer.param_groups if group["name"] == name)

    def copy(self, *modules):
        """Return copies of the parameters of these modules, by default of all."""
        return [p.detach().clone() for m in modules or (self.model,) for p in m.parameters()]


# ---- Schedules

def test_cosine_schedule_by_hand():
    schedule = CosineScheduler(2.0, 1.0, 8)
    values = [schedule.get_value(step) for step in (0, 2, 4, 6, 8, 9, 1000)]
    quarter = math.sqrt(0.5) / 2
    assert values == pytest.approx([2, 1.5 + quarter, 1.5, 1.5 - quarter, 1, 1, 1])
    assert isinstance(values[0], float)


def test_cosine_schedule_is_exact_in_the_middle_and_at_the_end():
    schedule = CosineScheduler(0.996, 1.0, 100)
    assert schedule.get_value(50) == pytest.approx(0.998, abs=1e-15)
    assert schedule.get_value(100) == 1.0


@pytest.mark.parametrize("start, end", [(2.0, 1.0), (0.04, 0.4), (1.0, 1.0)])
def test_cosine_schedule_is_monotonic_and_steepest_in_the_middle(start, end):
    values = [CosineScheduler(start, end, 99).get_value(step) for step in range(100)]
    steps = [abs(b - a) for a, b in pairwise(values)]
    assert values == sorted(values, reverse=start > end) and steps[49] == max(steps)
    assert values[0] == pytest.approx(start) and values[-1] == end


def test_warmup_is_linear_and_the_cosine_takes_the_rest():
    schedule = CosineScheduler(1.0, 0.2, 14, warmup_steps=4, warmup_val=0.5)
    values = [schedule.get_value(step) for step in (0, 1, 2, 3, 4, 9, 14, 15)]
    assert values == pytest.approx([0.5, 0.625, 0.75, 0.875, 1, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 1), (2, 1), (2, 2), (3, 0), (0, 0)])
def test_cosine_schedule_of_the_shortest_runs_is_finite_and_reaches_its_end(total, warmup):
    schedule = CosineScheduler(1.0, 0.2, total, warmup)
    assert all(0 <= schedule.get_value(step) <= 1 for step in range(total))
    assert schedule.get_value(total) == 0.2


RECIPE = dict(LEARNING_RATE=0.01, LEARNING_RATE_END=1e-4, WARMUP=0.1, WEIGHT_DECAY=0.04, WEIGHT_DECAY_END=0.4,
              EMA_START=0.9, EMA_END=1.0, TEACHER_TEMP_START=0.04, TEACHER_TEMP_END=0.07,
              TEACHER_TEMP_WARMUP=0.3, FREEZE_PROTOTYPES=0.02)


@pytest.mark.parametrize("total", [100, 10_000])
def test_schedules_depend_on_the_fraction_of_the_run(small, total):
    schedules, scale = Schedules(small(BATCH_SIZE=256, **RECIPE), total), 0.5  # sqrt(256 / 1024)
    at = lambda fraction: schedules.at(round(fraction * total))  # noqa: E731
    first = {"lr": 0, "prototype_lr": 0, "weight_decay": 0.04, "momentum": 0.9,
             "teacher_temp": 0.04}
    end = {"lr": 1e-4 * scale, "prototype_lr": 1e-4 * scale, "weight_decay": 0.4, "momentum": 1.0,
           "teacher_temp": 0.07}
    assert at(0) == pytest.approx(first) and at(1) == pytest.approx(end) and at(2) == at(1)
    assert at(0.05)["lr"] == pytest.approx(0.005 * scale)
    assert at(0.1)["lr"] == pytest.approx(0.01 * scale)
    assert at(0.55)["lr"] == pytest.approx((0.01 + 1e-4) / 2 * scale)
    assert at(0.5)["weight_decay"] == pytest.approx(0.22)
    assert at(0.5)["momentum"] == pytest.approx(0.95)
    temperatures = [at(fraction)["teacher_temp"] for fraction in (0.1, 0.2, 0.3, 0.7)]
    assert temperatures == pytest.approx([0.05, 0.06, 0.07, 0.07])
    assert at(0.02 - 1 / total)["prototype_lr"] == 0 < at(0.02 - 1 / total)["lr"]
    assert at(0.02)["prototype_lr"] == at(0.02)["lr"] > 0


@pytest.mark.parametrize("batch, accumulate", [(16, 1), (64, 1), (1024, 1), (16, 4)])
def test_learning_rate_follows_the_square_root_of_the_images_per_step(small, batch, accumulate):
    c = small(BATCH_SIZE=batch, ACCUMULATE=accumulate, LEARNING_RATE=0.01)
    peak = max(Schedules(c, 50).at(step)["lr"] for step in range(50))
    assert peak == pytest.approx(0.01 * math.sqrt(batch * accumulate / 1024))


def test_learning_rate_without_freeze_and_warmup_starts_at_its_peak(small):
    c = small(FREEZE_PROTOTYPES=0.0, WARMUP=0.0, LEARNING_RATE=0.01, BATCH_SIZE=1024)
    first = Schedules(c, 50).at(0)
    assert first["lr"] == first["prototype_lr"] == pytest.approx(0.01)


# ---- The optimizer's groups

@pytest.mark.parametrize("batch_norm", [True, False])
def test_optimizer_holds_every_student_parameter_once_and_no_teacher(small, batch_norm):
    run = Run(small(REGISTER_TOKENS=2, LAYER_SCALE=0.1, HEAD_BATCH_NORM=batch_norm))
    held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    model = run.model
    assert len(held) == len(set(held))
    modules = model.student, model.img_head, model.patch_head
    assert set(held) == {id(p) for module in modules for p in module.parameters()}
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}


def test_weight_decay_is_for_matrices_and_prototypes_only(small):
    run = Run(small(REGISTER_TOKENS=1, LAYER_SCALE=0.1))
    run.step(weight_decay=0.3)
    decay = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    for module in (run.model.student, run.model.img_head, run.model.patch_head):
        for name, parameter in module.named_parameters():
            exempt = name.endswith(("bias", "gamma")) or "norm" in name or "token" in name
            assert decay[id(parameter)] == (0 if exempt or parameter.ndim == 1 else 0.3), name
    heads = run.model.img_head, run.model.patch_head
    assert {id(p) for p in run.group("prototypes")["params"]} == {id(h.prototypes) for h in heads}


def test_weight_decay_shrinks_matrices_and_no_vectors(small):
    run = Run(small(CLIP_GRAD=1e-30))                           # Adam without gradients: only the decay is left
    for group in run.optimizer.param_groups:
        group["eps"] = 1.0
    for p in run.group("vectors")["params"]:
        p.data += 1
    before = {group["name"]: [p.detach().clone() for p in group["params"]]
              for group in run.optimizer.param_groups}
    run.step(lr=0.5, prototype_lr=0.25, weight_decay=0.1)
    for name, factor in {"matrices": 0.95, "vectors": 1.0, "prototypes": 0.975}.items():
        for p, old in zip(run.group(name)["params"], before[name]):
            close(p.detach(), factor * old)


# ---- The step

def test_train_step_sets_the_hyperparameters_of_the_groups(small):
    run = Run(small())
    run.step(lr=0.02, prototype_lr=0.01, weight_decay=0.3)
    hparams = {g["name"]: (g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups}
    assert hparams == {"matrices": (0.02, 0.3), "vectors": (0.02, 0.0), "prototypes": (0.01, 0.3)}


def test_train_step_returns_detached_scalars_on_the_device(small, device):
    values = Run(small(DEVICE=device)).step()
    assert {"loss", "img", "patch", "koleo", "grad_norm"} <= set(values)
    for value in values.values():
        assert value.shape == () and value.device.type == device and not value.requires_grad and value.isfinite()


def test_prototypes_are_constant_while_frozen_and_move_afterwards(small):
    run = Run(small(REGISTER_TOKENS=1))
    heads = run.model.img_head, run.model.patch_head
    prototypes = lambda: [head.prototypes.detach().clone() for head in heads]  # noqa: E731
    start, rest = prototypes(), run.copy(run.model.student)
    for _ in range(3):
        run.step(prototype_lr=0.0, weight_decay=0.4)
    assert all(torch.equal(a, b) for a, b in zip(start, prototypes()))
    assert all(not torch.equal(a, b) for a, b in zip(rest, run.copy(run.model.student)))
    run.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, prototypes()))


def gradient_norm(run):
    return torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()


def test_clipping_shortens_gradients_and_reports_their_own_norm(small):
    free, clipped, off = (Run(small(CLIP_GRAD=limit)) for limit in (1e6, 1e-3, 0.0))
    norms = [run.step()["grad_norm"] for run in (free, clipped, off)]
    close(norms[0], gradient_norm(free), 1e-4)
    assert norms[0] == norms[1] == norms[2] > 1e-3
    close(gradient_norm(clipped), torch.tensor(1e-3), 1e-6)
    for a, b, c in zip(*(run.model.parameters() for run in (free, clipped, off))):
        if a.grad is not None:
            close(b.grad * norms[0] / 1e-3, a.grad, 1e-4)       # shorter, in the same direction
            assert torch.equal(a.grad, c.grad)


def test_gradients_do_not_accumulate_over_steps(small):
    run = Run(small(CLIP_GRAD=0.0))
    first = run.step(lr=0.0, prototype_lr=0.0, momentum=1.0)["grad_norm"]
    close(run.step(lr=0.0, prototype_lr=0.0, momentum=1.0)["grad_norm"], first, 1e-4)


def test_teacher_follows_the_updated_student(small, device):
    run = Run(small(DEVICE=device, REGISTER_TOKENS=1))
    teacher, student = run.model.teacher_modules(), run.model.student_modules()
    run.step(momentum=0.5)
    old_teacher, old_student = run.copy(*teacher), run.copy(*student)
    run.step(momentum=0.8)
    tensors = old_teacher, run.copy(*teacher), old_student, run.copy(*student)
    for teacher_before, teacher_after, student_before, student_after in zip(*tensors, strict=True):
        close(teacher_after, 0.8 * teacher_before + 0.2 * student_after)
        assert not torch.equal(student_before, student_after)


def test_train_step_with_learning_rate_0_and_momentum_1_changes_nothing(small):
    run = Run(small())
    before = run.copy()
    run.step(lr=0.0, prototype_lr=0.0, momentum=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, run.copy()))


@pytest.mark.parametrize("part, value", [
    ("views", math.nan), ("views", math.inf), ("gradient", math.nan), ("gradient", math.inf)])
def test_train_step_skips_what_is_not_finite(small, part, value):
    run = Run(small())
    run.step()
    modules, view = run.model.student_modules(), run.views[0].clone()
    before, bias = run.copy(*modules), run.model.img_head.mlp[0].bias
    if part == "views":
        run.views[0][0, 0, 0, 0] = value
        values = run.step()
    else:  # the loss is finite
        hook = bias.register_hook(lambda grad: grad * value)
        values = run.step()
        hook.remove()
        assert values["loss"].isfinite()
    assert values["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.copy(*modules), strict=True))
    assert all(p.isfinite().all() for p in run.copy())
    run.views[0] = view
    assert run.step()["skipped"] == 0
    assert not any(torch.equal(a, b) for a, b in zip(run.copy(run.model.student), before))


def test_train_step_never_waits_for_the_device(small, device, monkeypatch):
    run = Run(small(DEVICE=device))
    run.step()                                                  # the first one may set things up

    def waits(*_, **__):
        raise AssertionError("a value was read from the device")

    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__",
                         "__float__", "__index__", "__array__", "new_tensor"):  # from a list
                patch.setattr(torch.Tensor, name, waits)
            for name in ("nonzero", "masked_select", "unique", "tensor", "as_tensor"):
                patch.setattr(torch, name, waits)
            run.step()
            with pytest.raises(AssertionError, match="read from the device"):
                # without patch_indices, it must look for them
                train_step(run.model, run.optimizer, [(run.views, run.mask)], HPARAMS)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_train_step_in_bf16_keeps_losses_and_parameters_in_fp32(small, device):
    run = Run(small(PRECISION="bf16", DEVICE=device))
    seen = []
    layer = run.model.student.blocks[0].mlp.fc1
    layer.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    values = run.step()
    assert set(seen) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in values.values())
    assert all(p.dtype == torch.float32 for p in run.copy())
    plain = Run(small(PRECISION="fp32", DEVICE=device)).step()
    assert values["loss"] != plain["loss"]
    close(values["loss"], plain["loss"], 0.05)


@pytest.mark.parametrize("options", [{}, {"LOCAL_CROPS_NUMBER": 0}, {"HEAD_BATCH_NORM": False, "KOLEO_KIND": "cosine"},
                                     {"LAMBDA_IMG": 0.0, "LAMBDA_KOLEO": 0.0}, {"LAMBDA_PATCH": 0.0}])
def test_train_steps_on_one_batch_reduce_the_loss(small, options):
    run = Run(small(**options))
    history = [run.step(lr=3e-3, prototype_lr=3e-3, momentum=0.99) for _ in range(30)]
    weights = run.model.config
    first, last = (sum(float(values["loss"]) for values in part) / 3 for part in (history[:3], history[-3:]))
    assert last < first - 0.3
    for name, weight in {"img": weights.LAMBDA_IMG, "patch": weights.LAMBDA_PATCH}.items():
        assert not weight or history[-1][name] < history[0][name] - 0.1
    assert all(value.isfinite() for value in history[-1].values())


def test_train_steps_follow_the_seed_bit_for_bit(small):
    runs = [Run(small(SEED=seed, DROPOUT=0.1, DROP_PATH=0.1)) for seed in (3, 3, 4)]
    for run in runs:
        torch.manual_seed(run.model.config.SEED)
        for _ in range(3):
            run.step()
    first, same, other = (run.copy() for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, same)) and not torch.equal(first[-1], other[-1])


# ---- Several micro-batches a step

def test_train_step_averages_the_gradients_of_micro_batches(small):
    run, alone = (Run(small(ACCUMULATE=n, CLIP_GRAD=0.0, BATCH_SIZE=4)) for n in (2, 1))
    second = [torch.randn_like(view) for view in run.views], run.mask.flip(0)
    micro_batches = [(run.views, run.mask), second]
    gradients, losses = [], []
    for views, mask in micro_batches:
        loss = alone.model(views, mask, HPARAMS["teacher_temp"])["loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for m in alone.model.student_modules() for p in m.parameters()])
        alone.model.zero_grad(set_to_none=True)
    before = run.copy(*run.model.teacher_modules())
    values = train_step(run.model, run.optimizer, iter(micro_batches), HPARAMS)  # as a generator
    close(values["loss"], sum(losses) / 2)
    found = [p.grad for m in run.model.student_modules() for p in m.parameters()]
    for gradient, *parts in zip(found, *gradients, strict=True):
        close(gradient, sum(parts) / 2)
    # One step of the optimizer, one of the teacher
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {1}
    after, student = (run.copy(*modules) for modules in
                      (run.model.teacher_modules(), run.model.student_modules()))
    for a, b, s in zip(before, after, student, strict=True):
        close(b, HPARAMS["momentum"] * a + (1 - HPARAMS["momentum"]) * s)
