"""The objective: Sinkhorn-Knopp targets, three losses, masks, and all joined in DINOv2.forward."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from torch.special import entr

import dinov2_cifar
from dinov2_cifar import DINOv2, MaskGenerator, dino_loss, ibot_loss, multi_crop_dino_loss
from dinov2_cifar import koleo_regularizer as koleo
from dinov2_cifar import sinkhorn_knopp_centering as sinkhorn


def slow_sinkhorn(logits, rounds, temperature):
    """The published formula, with exp, in float64."""
    q = (logits.double() / temperature).exp()
    samples, prototypes = q.shape
    q /= q.sum()
    for _ in range(rounds):
        for k in range(prototypes):
            q[:, k] /= q[:, k].sum() * prototypes
        for b in range(samples):
            q[b] /= q[b].sum() * samples
    return q / q.sum(1, keepdim=True)  # a softmax without a round


@pytest.mark.parametrize("rounds", [0, 1, 3, 10])
@pytest.mark.parametrize("samples, prototypes", [(12, 5), (5, 12), (1, 4), (4, 1)])
def test_sinkhorn_equals_published_formula(device, samples, prototypes, rounds):
    logits = torch.randn(samples, prototypes).clamp(-2, 2).requires_grad_()
    before = logits.detach().clone()
    targets = sinkhorn(logits.to(device), rounds, 0.1)
    close(targets, slow_sinkhorn(before, rounds, 0.1), 1e-4)
    assert not targets.requires_grad and torch.equal(logits, before)


def test_sinkhorn_balances_prototypes_nearly_in_three_rounds_and_exactly_in_many():
    logits = torch.randn(64, 16).clamp(-2, 2) + torch.linspace(-1, 1, 16)  # some are favored
    none, three, many = (sinkhorn(logits, rounds, 0.2).sum(0) - 4 for rounds in (0, 3, 200))
    assert many.abs().max() < 1e-3 < three.abs().max() < 1 < 4 < none.abs().max()


def test_sinkhorn_is_in_fp32_under_autocast_and_keeps_what_a_row_far_below_prefers(device):
    logits = torch.randn(12, 5)
    logits[0] -= 8  # 80 nats
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        targets = sinkhorn(logits.to(device), 3, 0.1)
    close(targets, slow_sinkhorn(logits, 3, 0.1), 1e-4)


def extreme_rows():
    """Return finite features or logits by name."""
    x, i, k = torch.randn(32, 16), torch.arange(32).view(-1, 1), torch.arange(16)
    powers, shuffled = torch.linspace(-30, 30, 32).view(-1, 1), torch.randperm(512).view(32, 16)
    return {
        "zeros": torch.zeros(32, 16),
        "±1e4": 1e4 * x.sign(),
        "one row below": torch.where(i == 0, -1e4, x),
        "one column below": torch.where(k == 0, -1e4, x),
        "constant rows": x[:, :1].expand(32, 16),
        "equal rows": x[:1].expand(32, 16),
        "one-hot rows": x * (k == i % 16),
        "rows of all magnitudes": x * 10**powers,
        "numbers of all magnitudes": x.sign() * 10 ** torch.linspace(-30, 30, 512)[shuffled],
        "one row": x[:1],
        "one column": x[:, :1],
        "bf16": x.bfloat16(),
    }


@pytest.mark.parametrize("kind", extreme_rows())
def test_sinkhorn_gives_fp32_distributions_for_extreme_logits(device, kind):
    x = extreme_rows()[kind].to(device)
    for logits in (x, x.sign() * torch.finfo(x.dtype).max, x.clamp(-6e4, 6e4).half()):
        for rounds, temperature in ((3, 0.05), (5, 1e-3), (0, 1e-3)):
            q = sinkhorn(logits, rounds, temperature)
            assert q.dtype == torch.float32 and (q >= 0).all()
            close(q.sum(1), torch.ones(len(q)), 1e-4)


@pytest.mark.parametrize("kind", extreme_rows())
def test_losses_and_gradients_are_finite_for_extreme_inputs(device, kind):
    x = extreme_rows()[kind].to(device).requires_grad_()
    head = dinov2_cifar.ProjectionHead(8, 4, 8, x.shape[1]).to(device)
    head.mlp = torch.nn.Identity()
    targets, mask = sinkhorn(x.flip(0)), torch.ones(len(x), 1, dtype=torch.bool, device=device)
    views, both = torch.stack([x, x.flip(0), -x]), torch.stack([targets, targets.flip(0)])
    losses = [dino_loss(x, x.detach().flip(1), 1e-3, 1e-3), multi_crop_dino_loss(views, both, 1e-3)]
    losses += [ibot_loss(x, targets, mask, None, 1e-3), head(x).sum() / 0.02]
    losses += [koleo(x, "nearest"), koleo(x, "cosine")]
    for loss in losses:
        gradients = torch.autograd.grad(loss, [x, head.prototypes], allow_unused=True)
        assert loss.isfinite() and all(g is None or g.isfinite().all() for g in gradients)
    assert head(x).abs().max() < 1.001


# Losses


def test_dino_loss_by_hand():
    student = torch.tensor([[0.0, 0.1 * math.log(3)]])  # at temperature 0.1: 1/4 and 3/4
    teacher = torch.tensor([[0.5 * math.log(2), 0.0]])  # at temperature 0.5: 2/3 and 1/3
    close(dino_loss(student, teacher, 0.5, 0.1), 2 / 3 * math.log(4) + 1 / 3 * math.log(4 / 3))
    close(dino_loss(student, torch.tensor([[1.0, 0.0]]), None, 0.1), math.log(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dino_loss_is_torchs_fp32_cross_entropy_with_soft_targets(device, dtype):
    student, teacher = torch.randn(2, 3, 5, 9, device=device).to(dtype).unbind()
    targets = (teacher.float() / 0.05).softmax(-1)
    expected = F.cross_entropy(student.float().flatten(0, 1) / 0.2, targets.flatten(0, 1))
    close(dino_loss(student, teacher, 0.05, 0.2), expected)
    close(dino_loss(student, targets, None, 0.2), expected)


@pytest.mark.parametrize("num_global, num_local", [(2, 0), (2, 3), (3, 0), (3, 3)])
def test_multi_crop_dino_loss_averages_pairs_of_different_views(device, num_global, num_local):
    student = torch.randn(num_global + num_local, 5, 7)
    targets = torch.randn(num_global, 5, 7).softmax(-1)
    pairs = [(v, t) for v in range(num_global + num_local) for t in range(num_global) if v != t]
    expected = sum(dino_loss(student[v], targets[t], None, 0.2) for v, t in pairs) / len(pairs)
    close(multi_crop_dino_loss(student.to(device), targets.to(device), 0.2), expected)


def test_multi_crop_dino_loss_gives_no_view_its_own_target():
    student, targets = torch.randn(3, 5, 7, requires_grad=True), torch.randn(2, 5, 7).softmax(-1)
    other = torch.stack([targets[0].flip(0), targets[1]])  # another target of view 0
    gradients = []
    for given in (targets, other):
        gradients += torch.autograd.grad(multi_crop_dino_loss(student, given), student)
    change = (gradients[1] - gradients[0]).abs().amax((1, 2))
    assert change[0] < 1e-6 and change[1:].min() > 1e-3


def test_ibot_loss_by_hand():
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = mask[1, 2] = True  # none in the last two crops
    student = torch.tensor([[0, 0], [0, math.log(3)], [0, math.log(3)]])  # 1/2; 1/4, 3/4; the same
    targets = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    expected = (math.log(2) + (math.log(4) + math.log(4 / 3)) / 2) / 4
    close(ibot_loss(student, targets, mask, None, 1.0), expected)


def slow_ibot(student, targets, mask, temperature):
    """The mean over all crops of the mean over each crop's masked patches."""
    rows = zip(student, targets, strict=True)
    losses = torch.stack([dino_loss(*row, None, temperature) for row in rows])
    crops = losses.split(mask.sum(1).tolist())
    return sum(crop.sum() / max(1, len(crop)) for crop in crops) / len(crops)


@pytest.mark.parametrize("counts", [[3, 0, 1, 5], [0, 0, 0, 2], [6, 6, 6, 6]])
def test_ibot_loss_averages_patches_then_all_crops(device, counts):
    mask = dinov2_cifar.generate_block_mask(torch.tensor(counts), 2, 3).to(device)
    student, teacher = torch.randn(2, sum(counts), 7, device=device)
    targets = (teacher / 0.05).softmax(-1)
    expected = slow_ibot(student, targets, mask, 0.2)
    close(ibot_loss(student, teacher, mask, 0.05, 0.2), expected)
    close(ibot_loss(student, targets, mask, None, 0.2), expected)


POINTS = [([[1.0, 0], [-1, 0]], -math.log(2), 1), ([[1.0, 0], [0, 1]], -math.log(2) / 2, 0)]
POINTS += [([[1.0, 0], [1, 0]], -math.log(1e-8), 1), ([[3.0, 4]], 0, 0)]
POINTS += [([[1.0, 0], [0, 1], [-1, 0]], -math.log(2) / 2, 1 / 3)]
POINTS += [([[1.0, 0], [1, 1e-3], [-1, 0], [-1, 1e-3]], -math.log(1e-3), 1)]  # equal in bf16


@pytest.mark.parametrize("points, nearest, cosine", POINTS)
def test_koleo_by_hand(device, points, nearest, cosine):
    x = torch.tensor(points, device=device)
    with torch.autocast(device, torch.bfloat16):
        close(koleo(x, "nearest"), nearest)
        close(koleo(x, "cosine"), cosine)


@pytest.mark.parametrize("kind", ["nearest", "cosine", "uniform"])
def test_koleo_is_a_loop_over_rows_and_ignores_their_length(kind):
    x, rows = torch.randn(9, 4), range(9)
    unit = [row / row.norm() for row in x.double()]
    nearest = [min((unit[i] - unit[j]).norm() for j in rows if i != j) for i in rows]
    squares = [(unit[i] @ unit[j]) ** 2 for i in rows for j in rows if i != j]
    others = [[(4 * unit[i] @ unit[j]).exp() for j in rows if i != j] for i in rows]
    uniform = sum((sum(row) / 8).log() for row in others) / 9
    nearest, cosine = -sum(map(torch.log, nearest)) / 9, sum(squares) / 72
    expected = {"nearest": nearest, "cosine": cosine, "uniform": uniform}[kind]
    close(koleo(x * 10 ** torch.linspace(-4, 6, 9)[:, None], kind), expected, 1e-4)


def test_koleo_gradient_is_the_same_each_time_with_two_threads():
    """The first row is nearest to all: indexing would sum their gradients in any order."""
    threads, x = torch.get_num_threads(), torch.randn(128, 384)
    x = torch.cat([x[:1], x[:1] + x[1:]]).requires_grad_()
    torch.set_num_threads(2)
    gradients = [torch.autograd.grad(koleo(x, "nearest"), x)[0] for _ in range(30)]
    torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# Masks


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.99, 1.0])
def test_random_masks_have_the_exact_count_and_reach_every_patch(device, ratio):
    mask, count = dinov2_cifar.generate_random_mask(2000, 49, ratio, device), int(ratio * 49)
    assert mask.dtype == torch.bool and mask.device.type == device
    assert (mask.sum(1) == count).all()
    close(mask.float().mean(0), torch.full((49,), count / 49), 0.05)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 6), (4, 4), (5, 9)])
def test_block_masks_have_the_exact_count(device, height, width):
    counts = torch.arange(height * width + 1, device=device).repeat(5)
    mask = dinov2_cifar.generate_block_mask(counts, height, width)
    assert mask.shape == (len(counts), height * width) and mask.dtype == torch.bool
    assert torch.equal(mask.sum(1), counts)


def longest_runs(mask, dim):
    """Return the longest run of True along dim of each mask: (R,H,W) -> (R,)."""
    longest, run = torch.zeros(len(mask)), mask
    while run.any():
        longest += run.flatten(1).any(1)
        run = run.narrow(dim, 1, run.shape[dim] - 1) & mask.narrow(dim, 0, run.shape[dim] - 1)
    return longest


@pytest.mark.parametrize("count", [4, 60])
def test_block_masks_are_rectangles_within_the_bounds_of_beit(count):
    """One rectangle on a grid so large that other masked patches rarely touch it."""
    mask = dinov2_cifar.generate_block_mask(torch.full((200,), count), 200, 200, blocks=1)
    mask = mask.view(-1, 200, 200)
    quarters = F.avg_pool2d(mask.float().mean(0, keepdim=True), 100)
    assert quarters.min() > quarters.max() / 3
    h, w = longest_runs(mask, 1), longest_runs(mask, 2)
    placed = h * w <= count  # others are rounded to more, and cut off
    assert placed.float().mean() > 0.7
    h, w = h[placed], w[placed]
    area, aspect = h * w, (h / w).log()
    assert 0.85 * count < area.max() <= count and abs(area.mean() - (4 + count) / 2) < 4
    assert ((h - 0.5) / (w + 0.5) <= 1 / 0.3).all() and ((w - 0.5) / (h + 0.5) <= 1 / 0.3).all()
    assert aspect.min() < -0.8 and aspect.max() > 0.8 and abs(aspect.mean()) < 0.3


def neighbors(mask, height, width):
    """Return how many of masked patches' neighbors are masked, as a fraction."""
    mask, found = mask.view(-1, height, width).float(), []
    for a, b in ((mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])):
        found.append([2 * (a * b).sum(), a.sum() + b.sum()])
    both, either = torch.tensor(found).sum(0)
    return both / either


@pytest.mark.parametrize("side, fraction", [(4, 0.58), (8, 0.73), (14, 0.81)])
def test_block_masks_are_as_compact_as_those_of_meta(side, fraction):
    """fraction: of Meta's MaskingGenerator with these counts; random masks have a third."""
    counts = dinov2_cifar.masked_patch_counts(1000, side**2, 0.15, 0.5)[:500]
    mask = dinov2_cifar.generate_block_mask(torch.tensor(counts), side, side)
    assert abs(neighbors(mask, side, side) - fraction) < 0.045


@pytest.mark.parametrize("count", [2, 6])
def test_block_masks_have_no_side_that_they_prefer(count):
    mask = dinov2_cifar.generate_block_mask(torch.full((4000,), count), 4, 4)
    share = mask.float().mean(0).view(4, 4)
    for turned in (share.flip(0), share.flip(1), share.T):
        assert (share - turned).abs().max() < 0.03


def test_masked_patch_counts_are_stratified():
    counts = dinov2_cifar.masked_patch_counts
    assert counts(4, 60, 0.3, 1.0) == [9, 15, 21, 27]  # the middles of quarters of 0.1 to 0.5
    assert counts(6, 60, 0.2, 2 / 3) == [9, 15, 21, 27, 0, 0]
    assert counts(4, 1, 0.15, 0.5) == [1, 1, 0, 0]
    assert counts(4, 16, 0.0, 0.0) == [0, 0, 0, 0]
    many = torch.tensor(counts(128, 64, 0.15, 0.5))
    assert (many[:64] - torch.linspace(6.6, 31.8, 64)).abs().max() <= 0.5 and not many[64:].any()
    close(many.sum() / 128 / 64, 0.15, 1e-3)


@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_mask_generator_shuffles_the_same_counts_at_every_step(small, device, kind, ratio):
    c = small(MASK_KIND=kind, MASK_RATIO=ratio, PATCH_SIZE=4, BATCH_SIZE=16, DEVICE=device)
    counts, draw_masks = dinov2_cifar.masked_patch_counts(32, 64, ratio, 0.5), MaskGenerator(c).draw
    masks, indices = zip(*[draw_masks() for _ in range(3)], strict=True)
    for mask, masked in zip(masks, indices, strict=True):
        assert mask.shape == (32, 64) and mask.dtype == torch.bool and mask.device.type == device
        assert sorted(mask.sum(1).tolist()) == sorted(counts)
        assert torch.equal(masked, mask.flatten().nonzero().squeeze(1))
    if ratio:
        assert len({tuple(mask.sum(1).tolist()) for mask in masks}) == 3
        assert (neighbors(torch.cat(masks), 8, 8) > 0.6) == (kind == "block")


def make_batch(config):
    """Return random views of 4 images and a mask for half of the global crops."""
    n = config.GLOBAL_CROPS_NUMBER
    sizes = [32] * n + [16] * config.LOCAL_CROPS_NUMBER
    views = [torch.randn(4, 3, size, size, device=config.DEVICE) for size in sizes]
    counts = torch.tensor([9, 0, 5, 0]).repeat(n)
    return views, (torch.arange(16) < counts.unsqueeze(1)).to(config.DEVICE)


@pytest.mark.parametrize("num_global, num_local", [(2, 0), (2, 3), (3, 3)])
@pytest.mark.parametrize("kind, features", [("nearest", "class"), ("uniform", "bottleneck")])
def test_forward_equals_slow_composition(small, device, num_global, num_local, kind, features):
    weights = {"LAMBDA_IMG": 0.7, "LAMBDA_PATCH": 0.4, "LAMBDA_KOLEO": 0.2, "KOLEO_KIND": kind}
    weights["KOLEO_FEATURES"] = features
    crops = {"GLOBAL_CROPS_NUMBER": num_global, "LOCAL_CROPS_NUMBER": num_local}
    c = small(DEVICE=device, STUDENT_TEMP=0.2, HEAD_BATCH_NORM=False, **weights, **crops)
    model = DINOv2(c).to(device)
    for parameter in model.parameters():  # all differ: teacher and student, heads, mask tokens
        parameter.data += 0.02 * torch.randn_like(parameter)
    views, mask = make_batch(c)
    masks = mask.chunk(num_global)  # local crops have none
    teacher = [model.teacher(view) for view in views[:num_global]]
    student = [model.student(view, *masks[i : i + 1]) for i, view in enumerate(views)]
    hidden = []
    for outputs in (student[:num_global], teacher):
        rows = zip(outputs, masks, strict=True)
        hidden.append(torch.cat([patches[m] for (_, patches), m in rows]))
    logits = [model.img_head(class_tokens) for class_tokens, _ in student]
    targets = torch.cat([model.teacher_img_head(class_tokens) for class_tokens, _ in teacher])
    targets = sinkhorn(targets, epsilon=0.05).chunk(num_global)
    pairs = [(v, t) for v in range(len(views)) for t in range(num_global) if v != t]
    img = sum(dino_loss(logits[v], targets[t], None, 0.2) for v, t in pairs) / len(pairs)
    patch_targets = sinkhorn(model.teacher_patch_head(hidden[1]), epsilon=0.05)
    patch = slow_ibot(model.patch_head(hidden[0]), patch_targets, mask, 0.2)
    rows = [class_tokens for class_tokens, _ in student[:num_global]]
    rows = rows if features == "class" else [model.img_head.mlp(x) for x in rows]
    spread = sum(koleo(x, kind) for x in rows)
    expected = {"img": img, "patch": patch, "koleo": spread}
    expected["loss"] = 0.7 * img + 0.4 * patch + 0.2 * spread
    expected["kl"] = img - entr(torch.cat(targets)).sum(1).mean()
    for options in ((), (mask.flatten().nonzero().squeeze(1),)):
        values = model(views, mask, 0.05, *options)
        for name, value in expected.items():
            close(values[name], value, 1e-4)


SHARED = {"EMA_START": 0.0, "EMA_END": 0.0, "MASK_RATIO": 0.0, "LOCAL_CROPS_NUMBER": 0}
APART = [{"EMA_START": 0.5}, {"EMA_END": 0.5}, {"LOCAL_CROPS_NUMBER": 1}, {"DROPOUT": 0.5}]
APART += [{"DROP_PATH": 0.5}, {"MASK_RATIO": 0.2}]


@pytest.mark.parametrize("changes", [{}, {"ACCUMULATE": 2}, *APART])
def test_student_gives_targets_only_where_the_teacher_would_give_the_same(
    small, monkeypatch, changes
):
    c, weights = small(BATCH_SIZE=4, WARMUP=0.0, **SHARED | changes), []
    shared = changes not in APART
    for reuse in (True, False):
        torch.manual_seed(0)
        model, passes = DINOv2(c), []
        model.teacher.register_forward_hook(lambda *args, passes=passes: passes.append(args))
        if not reuse:
            monkeypatch.setattr(DINOv2, "is_own_teacher", False)
        optimizer = dinov2_cifar.make_optimizer(model)
        for step in range(3):
            batches = [(make_batch(c)[0], *MaskGenerator(c).draw()) for _ in range(c.ACCUMULATE)]
            hparams = dinov2_cifar.hyperparameters(c, step, 3)
            dinov2_cifar.train_step(model, optimizer, batches, hparams)
        assert len(passes) == (0 if reuse and shared else 3 * c.ACCUMULATE)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(*weights)


@pytest.mark.parametrize("masked", [0, 1, 5])
def test_forward_gradients_reach_all_of_the_student_and_no_teacher(small, masked):
    c = small(REGISTER_TOKENS=1, HEAD_BATCH_NORM=False)
    model, (views, mask) = DINOv2(c), make_batch(c)
    values = model(views, torch.arange(mask.numel()).view_as(mask) < masked, 0.05)
    values["loss"].backward()
    assert values["loss"].isfinite() and (values["patch"] > 0) == (masked > 0)
    for name, parameter in model.named_parameters():
        unused = name.startswith("teacher") or (name.startswith("patch_head") and not masked)
        assert (parameter.grad is None) == unused
        assert unused or parameter.grad.isfinite().all()
        assert unused or masked < 5 or parameter.grad.abs().sum() > 0
