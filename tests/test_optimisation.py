"""The optimisation: schedules as functions of the step, parameter groups, and the training step."""

import math
from itertools import pairwise

import pytest
import torch

from dinov2_cifar import CosineScheduler, DINOv2, Schedules, make_optimizer, train_step

SETTINGS = {"lr": 1e-3, "prototype_lr": 1e-3, "weight_decay": 0.04, "momentum": 0.9, "teacher_temp": 0.04}


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Run:
    """A small model with its optimizer and one fixed batch; step(lr=…) is one training step on it."""

    def __init__(self, config, batch=4):
        torch.manual_seed(config.SEED)
        self.model = DINOv2(config).to(config.DEVICE)
        self.optimizer = make_optimizer(self.model)
        sizes = ([config.GLOBAL_CROP_SIZE] * config.GLOBAL_CROPS_NUMBER
                 + [config.LOCAL_CROP_SIZE] * config.LOCAL_CROPS_NUMBER)
        self.views = [torch.randn(batch, 3, size, size, device=config.DEVICE) for size in sizes]
        self.mask = torch.zeros(config.GLOBAL_CROPS_NUMBER * batch, 16, dtype=torch.bool, device=config.DEVICE)
        self.mask[::2, :6] = True
        self.masked_patches = int(self.mask.sum())

    def step(self, **settings):
        return train_step(self.model, self.optimizer, [(self.views, self.mask)], {**SETTINGS, **settings}, self.masked_patches)

    def group(self, name):
        return next(group for group in self.optimizer.param_groups if group["name"] == name)

    def copy(self, *parts):
        """→ the parameters of these parts (all, without any), as they stand."""
        return [p.detach().clone() for part in (parts or (self.model,)) for p in part.parameters()]


# ---- Schedules

def test_the_cosine_schedule_by_hand():
    schedule = CosineScheduler(2.0, 1.0, 9)                     # the last step is 8
    values = [schedule.get_value(step) for step in (0, 2, 4, 6, 8, 9, 1000)]
    quarter = math.sqrt(0.5) / 2
    assert values == pytest.approx([2, 1.5 + quarter, 1.5, 1.5 - quarter, 1, 1, 1]) and isinstance(values[0], float)


@pytest.mark.parametrize("start, end", [(2.0, 1.0), (0.04, 0.4), (1.0, 1.0)])
def test_the_cosine_schedule_goes_one_way_and_is_steepest_in_the_middle(start, end):
    values = [CosineScheduler(start, end, 100).get_value(step) for step in range(100)]
    steps = [abs(b - a) for a, b in pairwise(values)]
    assert values == sorted(values, reverse=start > end) and steps[49] == max(steps)
    assert values[0] == pytest.approx(start) and values[-1] == end


def test_the_warm_up_is_linear_and_the_cosine_takes_what_is_left():
    schedule = CosineScheduler(1.0, 0.2, 15, warmup_steps=4, warmup_val=0.5)                     # peak at 4, end at 14
    assert [schedule.get_value(step) for step in range(5)] == pytest.approx([0.5, 0.625, 0.75, 0.875, 1])
    assert [schedule.get_value(step) for step in (9, 14, 15)] == pytest.approx([0.6, 0.2, 0.2])


@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 1), (2, 1), (2, 2), (3, 0)])
def test_the_shortest_runs_have_finite_values_and_reach_the_end(total, warmup):
    schedule = CosineScheduler(1.0, 0.2, total, warmup)
    assert all(0 <= schedule.get_value(step) <= 1 for step in range(total))
    assert schedule.get_value(total) == pytest.approx(0.2)
    assert warmup or schedule.get_value(total - 1) == pytest.approx(0.2)


RECIPE = dict(LEARNING_RATE=0.01, LEARNING_RATE_END=1e-4, WARMUP=0.1, WEIGHT_DECAY=0.04, WEIGHT_DECAY_END=0.4,
              EMA_START=0.9, EMA_END=1.0, TEACHER_TEMP_START=0.04, TEACHER_TEMP_END=0.07,
              TEACHER_TEMP_WARMUP=0.3, FREEZE_PROTOTYPES=0.02)


@pytest.mark.parametrize("total", [100, 10_000])
def test_every_schedule_is_a_function_of_the_share_of_the_run(small, total):
    schedules, scale = Schedules(small(BATCH_SIZE=256, **RECIPE), total), 0.5                    # √(256 / 1024)
    at = lambda share: schedules.at(round(share * total))  # noqa: E731
    assert at(0) == pytest.approx({"lr": 0, "prototype_lr": 0, "weight_decay": 0.04, "momentum": 0.9, "teacher_temp": 0.04})
    assert schedules.at(total - 1) == pytest.approx({"lr": 1e-4 * scale, "prototype_lr": 1e-4 * scale, "weight_decay": 0.4,
                                                     "momentum": 1.0, "teacher_temp": 0.07})
    assert schedules.at(total + 5) == schedules.at(total - 1)
    assert at(0.05)["lr"] == pytest.approx(0.005 * scale) and at(0.1)["lr"] == pytest.approx(0.01 * scale)
    assert at(0.55)["lr"] == pytest.approx((0.01 + 1e-4) / 2 * scale, rel=0.03)
    assert at(0.5)["weight_decay"] == pytest.approx(0.22, rel=0.03) and at(0.5)["momentum"] == pytest.approx(0.95, rel=0.01)
    assert [at(share)["teacher_temp"] for share in (0.1, 0.2, 0.3, 0.7)] == pytest.approx([0.05, 0.06, 0.07, 0.07])
    assert at(0.02 - 1 / total)["prototype_lr"] == 0 < at(0.02 - 1 / total)["lr"]
    assert at(0.02)["prototype_lr"] == at(0.02)["lr"] > 0


@pytest.mark.parametrize("batch", [16, 64, 1024])
def test_the_learning_rate_goes_with_the_root_of_the_batch(small, batch):
    peak = max(Schedules(small(BATCH_SIZE=batch, LEARNING_RATE=0.01), 50).at(step)["lr"] for step in range(50))
    assert peak == pytest.approx(0.01 * math.sqrt(batch / 1024))


def test_without_freeze_and_warm_up_the_first_step_moves_everything(small):
    first = Schedules(small(FREEZE_PROTOTYPES=0.0, WARMUP=0.0, LEARNING_RATE=0.01, BATCH_SIZE=1024), 50).at(0)
    assert first["lr"] == first["prototype_lr"] == pytest.approx(0.01)


# ---- The optimizer's groups

@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_optimizer_holds_every_student_parameter_once_and_no_teacher(small, batch_norm):
    run = Run(small(REGISTER_TOKENS=2, LAYER_SCALE=0.1, HEAD_BATCH_NORM=batch_norm))
    held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    model = run.model
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for part in (model.student, model.img_head, model.patch_head) for p in part.parameters()}
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}


def test_only_matrices_and_prototypes_decay(small):
    run = Run(small(REGISTER_TOKENS=1, LAYER_SCALE=0.1))
    run.step(weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    for part in (run.model.student, run.model.img_head, run.model.patch_head):
        for name, parameter in part.named_parameters():
            exempt = name.endswith(("bias", "scale")) or "norm" in name or "token" in name or "registers" in name
            exempt |= parameter.ndim == 1
            assert decay[id(parameter)] == (0 if exempt else 0.3), name
    assert {id(p) for p in run.group("prototypes")["params"]} == {id(run.model.img_head.prototypes),
                                                                 id(run.model.patch_head.prototypes)}


def test_decay_shrinks_matrices_and_leaves_vectors_alone(small):
    run = Run(small(CLIP_GRAD=1e-30))                           # Adam without gradients: only the decay is left
    for group in run.optimizer.param_groups:
        group["eps"] = 1.0
    for p in run.group("vectors")["params"]:
        p.data += 1
    before = {group["name"]: [p.detach().clone() for p in group["params"]] for group in run.optimizer.param_groups}
    run.step(lr=0.5, prototype_lr=0.25, weight_decay=0.1)
    for name, factor in {"matrices": 0.95, "vectors": 1.0, "prototypes": 0.975}.items():
        for p, old in zip(run.group(name)["params"], before[name]):
            close(p.detach(), factor * old)


# ---- The step

def test_a_steps_settings_land_in_the_groups(small):
    run = Run(small())
    run.step(lr=0.02, prototype_lr=0.01, weight_decay=0.3)
    settings = {g["name"]: (g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups}
    assert settings == {"matrices": (0.02, 0.3), "vectors": (0.02, 0.0), "prototypes": (0.01, 0.3)}


def test_a_step_returns_detached_scalars_on_the_device(small, device):
    values = Run(small(DEVICE=device)).step()
    assert {"loss", "img", "patch", "koleo", "grad_norm"} <= set(values)
    for value in values.values():
        assert value.shape == () and value.device.type == device and not value.requires_grad and value.isfinite()


def test_the_prototypes_stand_still_while_frozen_and_move_after(small):
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


def test_a_longer_gradient_is_shortened_and_its_own_length_reported(small):
    free, clipped, off = (Run(small(CLIP_GRAD=limit)) for limit in (1e6, 1e-3, 0.0))
    norms = [run.step()["grad_norm"] for run in (free, clipped, off)]
    close(norms[0], gradient_norm(free), 1e-4)
    assert norms[0] == norms[1] == norms[2] > 1e-3
    close(gradient_norm(clipped), torch.tensor(1e-3), 1e-6)
    for a, b, c in zip(*(run.model.parameters() for run in (free, clipped, off))):
        if a.grad is not None:
            close(b.grad * norms[0] / 1e-3, a.grad, 1e-4)       # shortened, not turned
            assert torch.equal(a.grad, c.grad)


def test_gradients_do_not_pile_up(small):
    run = Run(small(CLIP_GRAD=0.0))
    first = run.step(lr=0.0, prototype_lr=0.0, momentum=1.0)["grad_norm"]
    close(run.step(lr=0.0, prototype_lr=0.0, momentum=1.0)["grad_norm"], first, 1e-4)


def test_the_teacher_follows_the_student_of_after_the_step(small, device):
    run = Run(small(DEVICE=device, REGISTER_TOKENS=1))
    teacher_parts = run.model.teacher, run.model.teacher_img_head, run.model.teacher_patch_head
    student_parts = run.model.student, run.model.img_head, run.model.patch_head
    run.step(momentum=0.5)
    before, old_student = run.copy(*teacher_parts), run.copy(*student_parts)
    run.step(momentum=0.8)
    for teacher, old, student, left in zip(run.copy(*teacher_parts), before, run.copy(*student_parts), old_student):
        close(teacher, 0.8 * old + 0.2 * student)
        assert not torch.equal(student, left)


def test_a_learning_rate_and_momentum_that_stand_still_change_nothing(small):
    run = Run(small())
    before = run.copy()
    run.step(lr=0.0, prototype_lr=0.0, momentum=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, run.copy()))


def test_a_step_never_waits_for_the_device(small, device, monkeypatch):
    run = Run(small(DEVICE=device))
    run.step()                                                  # the first one may set things up

    def waits(*_, **__):
        raise AssertionError("a value was read from the device")

    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__",
                         "__array__", "new_tensor"):       # a Python list that goes to a GPU waits as well
                patch.setattr(torch.Tensor, name, waits)
            for name in ("nonzero", "masked_select", "unique", "tensor", "as_tensor"):
                patch.setattr(torch, name, waits)
            run.step()
            with pytest.raises(AssertionError, match="read from the device"):
                train_step(run.model, run.optimizer, [(run.views, run.mask)], SETTINGS)               # counts the mask itself
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_losses_and_parameters_stay_fp32_under_bf16_autocast(small, device):
    run = Run(small(PRECISION="bf16", DEVICE=device))
    seen = []
    run.model.student.blocks[0].mlp.layer.expand.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    values = run.step()
    assert set(seen) == {torch.bfloat16} and all(value.dtype == torch.float32 for value in values.values())
    assert all(p.dtype == torch.float32 for p in run.copy())
    plain = Run(small(PRECISION="fp32", DEVICE=device)).step()
    assert values["loss"] != plain["loss"]
    close(values["loss"], plain["loss"], 0.05)


@pytest.mark.parametrize("options", [{}, {"LOCAL_CROPS_NUMBER": 0}, {"HEAD_BATCH_NORM": False, "KOLEO_KIND": "cosine"},
                                     {"LAMBDA_IMG": 0.0, "LAMBDA_KOLEO": 0.0}, {"LAMBDA_PATCH": 0.0}])
def test_a_few_dozen_steps_on_one_batch_reduce_the_loss(small, options):
    run = Run(small(**options))
    history = [run.step(lr=3e-3, prototype_lr=3e-3, momentum=0.99) for _ in range(30)]
    weights = run.model.config
    first, last = (sum(float(values["loss"]) for values in part) / 3 for part in (history[:3], history[-3:]))
    assert last < first - 0.3
    for name, weight in {"img": weights.LAMBDA_IMG, "patch": weights.LAMBDA_PATCH}.items():
        assert not weight or history[-1][name] < history[0][name] - 0.1
    assert all(value.isfinite() for value in history[-1].values())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(small):
    runs = [Run(small(SEED=seed, DROPOUT=0.1, DROP_PATH=0.1)) for seed in (3, 3, 4)]
    for run in runs:
        torch.manual_seed(run.model.config.SEED)
        for _ in range(3):
            run.step()
    first, same, other = (run.copy() for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, same)) and not torch.equal(first[-1], other[-1])


# ---- Several micro-batches a step

def test_accumulated_micro_batches_make_one_step_with_the_mean_gradient(small):
    a, b = Run(small(ACCUMULATE=2, CLIP_GRAD=0.0, BATCH_SIZE=4)), Run(small(CLIP_GRAD=0.0, BATCH_SIZE=4))
    second = [torch.randn_like(view) for view in a.views], a.mask.flip(0)
    parameters = [p for part in b.model.student_parts() for p in part.parameters() if p.requires_grad]
    gradients = []
    for views, mask in ((b.views, b.mask), second):
        b.model(views, mask, SETTINGS["teacher_temp"])["loss"].backward()
        gradients.append([parameter.grad for parameter in parameters])
        b.model.zero_grad(set_to_none=True)
    moves, update = [], a.model.update_teacher
    a.model.update_teacher = lambda momentum: (moves.append(momentum), update(momentum))
    values = train_step(a.model, a.optimizer, iter([(a.views, a.mask), second]), SETTINGS)            # lazily, as the loop gives them
    for parameter, *parts in zip((p for part in a.model.student_parts() for p in part.parameters() if p.requires_grad), *gradients):
        close(parameter.grad, sum(parts) / 2)
    assert moves == [SETTINGS["momentum"]] and {int(state["step"]) for state in a.optimizer.state.values()} == {1}
    losses = [b.model(views, mask, SETTINGS["teacher_temp"])["loss"] for views, mask in ((b.views, b.mask), second)]
    close(values["loss"], sum(losses).detach() / 2)


def test_the_rate_follows_the_pictures_of_a_step(small):
    assert Schedules(small(ACCUMULATE=4, WARMUP=0.0), 10).at(0)["lr"] == pytest.approx(2 * Schedules(small(WARMUP=0.0), 10).at(0)["lr"])
