"""The objective: Sinkhorn-Knopp targets, three losses, masks, and all joined in DINOv2.forward."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinov2_cifar import (
    DINOv2, dino_loss, draw_masks, generate_block_mask, generate_random_mask, ibot_loss,
    koleo_regularizer, masked_patch_counts, multi_crop_dino_loss, sinkhorn_knopp_centering,
    soft_cross_entropy, target_diagnostics)


def close(a, b, tolerance=1e-5):
    b = torch.as_tensor(b, dtype=a.dtype, device=a.device)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def distributions(*shape):
    return torch.randn(*shape).softmax(-1)


def entropy(targets):
    return torch.special.entr(targets).sum(-1)


# ---- Sinkhorn-Knopp

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
    return q * samples


@pytest.mark.parametrize("rounds", [1, 3, 10])
@pytest.mark.parametrize("samples, prototypes", [(12, 5), (5, 12), (1, 4), (4, 1)])
def test_sinkhorn_is_the_published_formula(device, samples, prototypes, rounds):
    logits = torch.randn(samples, prototypes).clamp(-2, 2)
    targets = sinkhorn_knopp_centering(logits.to(device), rounds, 0.1).cpu()
    close(targets, slow_sinkhorn(logits, rounds, 0.1), 1e-4)


def extreme_logits():
    x = torch.randn(32, 16)
    low_row, high_row, low_column = x.clone(), x.clone(), x.clone()
    low_row[0], high_row[0], low_column[:, 0] = -1e4, 1e4, -1e4
    return {
        "cosines": x.clamp(-1, 1), "±1e4": 1e4 * x.sign(), "up to 1e4": 1e4 * torch.rand(32, 16),
        "a row far below": low_row, "a row far above": high_row, "a column far below": low_column,
        "constant rows": x[:, :1].expand(-1, 16), "equal rows": x[:1].expand(32, -1),
        "zeros": torch.zeros(32, 16), "bfloat16": x.bfloat16(),
        "float16 at its end": (65504 * x.sign()).half(),
        "fp32 at its end": torch.finfo(torch.float32).max * x.sign()}


@pytest.mark.parametrize("kind", extreme_logits())
def test_sinkhorn_rows_are_fp32_distributions_for_any_finite_logits(device, kind):
    q = sinkhorn_knopp_centering(extreme_logits()[kind].to(device))
    assert q.dtype == torch.float32 and q.isfinite().all() and q.min() >= 0
    close(q.sum(1), torch.ones(32), 1e-5)


def test_sinkhorn_balances_prototypes_nearly_in_three_rounds_and_exactly_in_many():
    logits = torch.randn(64, 16).clamp(-2, 2) + torch.linspace(-1, 1, 16)  # some are favored
    unbalanced = (logits / 0.2).softmax(1).sum(0)
    three, many = (sinkhorn_knopp_centering(logits, n, 0.2).sum(0) for n in (3, 200))
    assert (unbalanced - 4).abs().max() > 4 and (three - 4).abs().max() < 1
    close(many, torch.full((16,), 64 / 16), 1e-3)


def test_sinkhorn_without_a_round_is_a_softmax():
    logits = torch.randn(6, 4)
    close(sinkhorn_knopp_centering(logits, 0, 0.1), (logits / 0.1).softmax(1))


def test_sinkhorn_gives_equal_samples_the_uniform_target():
    close(sinkhorn_knopp_centering(torch.randn(1, 8).expand(20, -1)), torch.full((20, 8), 1 / 8))


def test_sinkhorn_passes_no_gradient_and_keeps_its_input():
    logits = torch.randn(6, 4, requires_grad=True)
    before = logits.detach().clone()
    assert not sinkhorn_knopp_centering(logits).requires_grad and torch.equal(logits, before)


def test_sinkhorn_follows_permutations_of_samples_and_prototypes():
    logits, rows, columns = torch.randn(12, 8), torch.randperm(12), torch.randperm(8)
    permuted = sinkhorn_knopp_centering(logits)[rows][:, columns]
    close(sinkhorn_knopp_centering(logits[rows][:, columns]), permuted)


def test_sinkhorn_ignores_a_shift_of_one_sample_or_of_all():
    logits = torch.randn(12, 8)
    close(sinkhorn_knopp_centering(logits + 30), sinkhorn_knopp_centering(logits), 1e-3)
    balanced, shifted = (sinkhorn_knopp_centering(z, 50, 0.5)  # once it has converged
                         for z in (logits, logits + torch.randn(12, 1)))
    close(shifted, balanced, 1e-4)


def balance_a_part(rank, folder, logits, sizes):
    torch.distributed.init_process_group(
        "gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    torch.save(sinkhorn_knopp_centering(logits.split(sizes)[rank]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sinkhorn_in_two_processes_gives_the_same_targets(tmp_path):
    logits, sizes = torch.randn(12, 8), [8, 4]
    logits[8:] += 5 * torch.linspace(-1, 1, 8)  # alone, the second part would be balanced otherwise
    together = sinkhorn_knopp_centering(logits)
    torch.multiprocessing.spawn(balance_a_part, (tmp_path, logits, sizes), nprocs=2)
    close(torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]), together)
    assert not torch.allclose(sinkhorn_knopp_centering(logits[8:]), together[8:], atol=1e-2)


# ---- Image-level loss

def test_dino_loss_by_hand():
    student = torch.tensor([[0.0, 0.1 * math.log(3)]])          # at temperature 0.1: probabilities 1/4 and 3/4
    teacher = torch.tensor([[0.5 * math.log(2), 0.0]])          # at temperature 0.5: probabilities 2/3 and 1/3
    close(dino_loss(student, teacher, 0.5, 0.1), -(2 / 3 * math.log(1 / 4) + 1 / 3 * math.log(3 / 4)))
    close(dino_loss(student, torch.tensor([[1.0, 0.0]]), None, 0.1), math.log(4))


def test_dino_loss_of_a_uniform_student_is_log_k():
    close(dino_loss(torch.zeros(6, 50), torch.randn(6, 50)), math.log(50))


def test_dino_loss_is_torchs_cross_entropy_with_soft_targets(device):
    student, teacher = torch.randn(3, 5, 9, device=device), torch.randn(3, 5, 9, device=device)
    expected = F.cross_entropy(student.flatten(0, 1) / 0.2, (teacher / 0.05).softmax(-1).flatten(0, 1))
    close(dino_loss(student, teacher, 0.05, 0.2), expected)
    close(dino_loss(student, (teacher / 0.05).softmax(-1), None, 0.2), expected)


def test_dino_loss_softens_no_distribution_by_a_second_softmax():
    targets = F.one_hot(torch.tensor([2, 0]), 4).float()
    confident = 10 * targets
    assert dino_loss(confident, targets, None) < 1e-6 < 1 < dino_loss(confident, targets, 1.0)


def test_dino_loss_of_the_best_student_is_the_entropy_of_the_targets():
    targets = distributions(6, 9)
    close(dino_loss(targets.log() * 0.1, targets, None, 0.1), entropy(targets).mean())


def test_soft_cross_entropy_is_fp32_and_finite_for_half_precision_and_large_logits(device):
    logits = torch.tensor([[100.0, -100.0], [0.0, 100.0]], device=device).bfloat16().requires_grad_()
    losses = soft_cross_entropy(logits, torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device), 0.1)
    assert losses.dtype == torch.float32
    close(losses, [0.0, 1000.0])
    losses.sum().backward()
    close(logits.grad, [[0.0, 0.0], [-10.0, 10.0]])
    half, targets = torch.randn(5, 9, device=device).bfloat16(), distributions(5, 9).to(device)
    expected = -(targets.double() * (half.double() / 0.3).log_softmax(-1)).sum(-1)
    close(soft_cross_entropy(half, targets, 0.3), expected.float())


@pytest.mark.parametrize("num_global", [2, 3])
@pytest.mark.parametrize("num_local", [0, 3])
def test_multi_crop_dino_loss_averages_pairs_of_different_views(device, num_global, num_local):
    student = torch.randn(num_global + num_local, 5, 7)
    targets = distributions(num_global, 5, 7)
    pairs = [(v, t) for v in range(num_global + num_local) for t in range(num_global) if v != t]
    assert num_global > 2 or len(pairs) == 2 + 2 * num_local
    expected = sum(dino_loss(student[v], targets[t], None, 0.2) for v, t in pairs) / len(pairs)
    close(multi_crop_dino_loss(student.to(device), targets.to(device), 0.2), expected)


def test_multi_crop_dino_loss_gives_no_view_its_own_target():
    student, targets = torch.randn(3, 5, 7, requires_grad=True), distributions(2, 5, 7)
    other = torch.stack([distributions(5, 7), targets[1]])  # another target of view 0
    gradient, = torch.autograd.grad(multi_crop_dino_loss(student, targets), student)
    changed, = torch.autograd.grad(multi_crop_dino_loss(student, other), student)
    close(changed[0], gradient[0], 1e-6)
    assert all((changed[v] - gradient[v]).abs().max() > 1e-3 for v in (1, 2))


# ---- Patch-level loss

def test_ibot_loss_by_hand():
    """One masked patch in the first of four crops, two in the second, none in the others."""
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = mask[1, 2] = True
    student = torch.tensor([[0, 0], [0, math.log(3)], [0, math.log(3)]])  # 1/2; 1/4, 3/4; the same
    targets = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    expected = (math.log(2) + (math.log(4) + math.log(4 / 3)) / 2) / 4
    close(ibot_loss(student, targets, mask, None, 1.0), expected)


def slow_ibot(student, targets, mask, temperature):
    """A loop over the masked patches of each crop, then the mean over all crops."""
    crops, used = [], 0
    for row in mask:
        losses = [torch.tensor(0.0)]
        for _ in range(int(row.sum())):
            log_probability = (student[used] / temperature).log_softmax(-1)
            losses.append(-(targets[used] * log_probability).sum().cpu())
            used += 1
        crops.append(sum(losses) / max(1, len(losses) - 1))
    return sum(crops) / len(crops)


@pytest.mark.parametrize("counts", [[3, 0, 1, 5], [0, 0, 0, 2], [6, 6, 6, 6]])
def test_ibot_loss_averages_patches_then_all_crops(device, counts):
    mask = generate_block_mask(torch.tensor(counts), 2, 3)
    student, teacher = torch.randn(sum(counts), 7), torch.randn(sum(counts), 7)
    expected = slow_ibot(student, (teacher / 0.05).softmax(-1), mask, 0.2)
    student, teacher, mask = student.to(device), teacher.to(device), mask.to(device)
    close(ibot_loss(student, teacher, mask, 0.05, 0.2), expected)
    close(ibot_loss(student, (teacher / 0.05).softmax(-1), mask, None, 0.2), expected)


def test_ibot_loss_without_a_masked_patch_is_zero_and_has_a_gradient():
    student = torch.zeros(0, 7, requires_grad=True)
    loss = ibot_loss(student, torch.zeros(0, 7), torch.zeros(4, 6, dtype=torch.bool), None)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 7)


# ---- KoLeo

@pytest.mark.parametrize("kind, features, value", [
    ("nearest", [[1.0, 0], [-1, 0]], -math.log(2)), ("nearest", [[1.0, 0], [0, 1]], -math.log(2) / 2),
    ("nearest", [[1.0, 0], [1, 0]], -math.log(1e-8)), ("nearest", [[1.0, 0], [0, 1], [-1, 0]], -math.log(2) / 2),
    ("cosine", [[1.0, 0], [-1, 0]], 1), ("cosine", [[1.0, 0], [0, 1]], 0), ("cosine", [[1.0, 0], [1, 0]], 1),
    ("cosine", [[1.0, 0], [0, 1], [-1, 0]], 1 / 3), ("nearest", [[3.0, 4]], 0), ("cosine", [[3.0, 4]], 0)])
def test_koleo_by_hand(device, kind, features, value):
    close(koleo_regularizer(torch.tensor(features, device=device), kind), value)


def test_koleo_gradient_is_the_same_each_time_with_two_threads():
    """At the default size, 128 x 384: gradients of indexing are summed in the threads' order."""
    threads, x, gradients = torch.get_num_threads(), torch.randn(128, 384), []
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            leaf = x.clone().requires_grad_()
            koleo_regularizer(leaf, "nearest").backward()
            gradients.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("kind", ["nearest", "cosine"])
def test_koleo_is_a_loop_over_the_rows_and_ignores_their_length(kind):
    x, rows = torch.randn(9, 4), range(9)
    unit = [row / row.norm() for row in x]
    nearest = [min(float((unit[i] - unit[j]).norm()) for j in rows if i != j) for i in rows]
    squares = [float(unit[i] @ unit[j]) ** 2 for i in rows for j in rows if i != j]
    expected = -sum(map(math.log, nearest)) / 9 if kind == "nearest" else sum(squares) / 72
    close(koleo_regularizer(x, kind), expected, 1e-4)
    close(koleo_regularizer(x * 10 ** torch.linspace(-6, 6, 9)[:, None], kind), expected, 1e-4)


@pytest.mark.parametrize("kind", ["nearest", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_koleo_and_its_gradient_are_finite_with_duplicates_under_autocast(device, kind, dtype):
    x = torch.randn(4, 8, device=device).to(dtype).repeat(2, 1).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        loss = koleo_regularizer(x, kind)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()
    assert kind == "cosine" or abs(loss.item() + math.log(1e-8)) < 1e-3


def test_koleo_under_autocast_sees_neighbors_closer_than_bfloat16():
    x = torch.tensor([[1.0, 0], [1, 1e-3], [-1, 0], [-1, 1e-3]])
    with torch.autocast("cpu", torch.bfloat16):
        close(koleo_regularizer(x, "nearest"), -math.log(1e-3), 1e-3)


@pytest.mark.parametrize("kind", ["nearest", "cosine"])
def test_koleo_gradient_spreads_the_rows(kind):
    x = (torch.tensor([1.0, 0, 0]) + 0.1 * torch.randn(6, 3)).requires_grad_()
    spread = lambda: torch.pdist(F.normalize(x.detach(), dim=1)).mean()  # noqa: E731
    before = spread()
    koleo_regularizer(x, kind).backward()
    with torch.no_grad():
        x -= 0.05 * x.grad
    assert spread() > before


# ---- Masks

@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("patches", [1, 16, 49])
def test_random_masks_have_the_exact_count_in_every_row(device, patches, ratio):
    mask = generate_random_mask(20, patches, ratio, device)
    assert mask.shape == (20, patches) and mask.dtype == torch.bool and mask.device.type == device
    assert (mask.sum(1) == int(ratio * patches)).all()


def test_random_masks_differ_between_rows_and_reach_every_patch_alike():
    mask = generate_random_mask(4000, 16, 0.25)
    assert len(mask.unique(dim=0)) > 1000
    close(mask.float().mean(0), torch.full((16,), 0.25), 0.05)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 6), (4, 4), (8, 8), (5, 9)])
def test_block_masks_have_the_exact_count_in_every_row(device, height, width):
    counts = torch.arange(height * width + 1, device=device).repeat(5)
    mask = generate_block_mask(counts, height, width)
    assert mask.shape == (len(counts), height * width) and mask.dtype == torch.bool
    assert torch.equal(mask.sum(1), counts)


def masked_neighbors(mask, side):
    """Return the mean number of masked ones among the four neighbors of a masked patch."""
    grid = mask.view(-1, side, side).float()
    pairs = (grid[:, 1:] * grid[:, :-1]).sum() + (grid[:, :, 1:] * grid[:, :, :-1]).sum()
    return float(2 * pairs / grid.sum())


def test_block_masks_are_connected_and_random_ones_are_not():
    block = generate_block_mask(torch.full((400,), 16), 8, 8)
    alone = generate_random_mask(400, 64, 0.25)
    assert masked_neighbors(alone, 8) < 1
    assert masked_neighbors(block, 8) > 1.8 * masked_neighbors(alone, 8)
    assert len(block.unique(dim=0)) > 350                       # every crop has its own
    reached = block.view(400, 8, 8).float().mean(0)
    assert reached.min() > 0.05 and reached.max() < 0.5         # at every place
    close(reached.mean(0), reached.mean(1), 0.08)               # wide and tall alike


@pytest.mark.parametrize("crops, patches, ratio, prob", [(128, 64, 0.15, 0.5), (16, 16, 0.15, 0.5), (10, 49, 0.3, 0.5),
                                                         (6, 64, 0.6, 1.0), (64, 64, 0.05, 0.25)])
def test_masked_patch_counts_are_stratified_over_their_interval(crops, patches, ratio, prob):
    counts = masked_patch_counts(crops, patches, ratio, prob)
    masked = [n for n in counts if n]
    assert len(counts) == crops and len(masked) == round(prob * crops)
    low, high = ratio / prob / 3 * patches, 5 * ratio / prob / 3 * patches
    for i, n in enumerate(sorted(masked)):                      # crop i lies in the i-th part of the interval
        step = (high - low) / len(masked)
        assert low + i * step - 0.5 <= n <= low + (i + 1) * step + 0.5
    assert sum(counts) / crops / patches == pytest.approx(ratio, abs=0.6 / patches)


@pytest.mark.parametrize("crops, patches, ratio, prob, counts", [
    (4, 16, 0.0, 0.5, [0, 0, 0, 0]), (4, 16, 0.0, 0.0, [0, 0, 0, 0]), (4, 1, 0.15, 0.5, [1, 1, 0, 0]),
    (1, 10, 0.3, 1.0, [3])])
def test_masked_patch_counts_at_the_extremes(crops, patches, ratio, prob, counts):
    assert masked_patch_counts(crops, patches, ratio, prob) == counts


@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_draw_masks_has_the_same_counts_at_every_step_in_another_order(small, device, kind, ratio):
    c = small(MASK_KIND=kind, MASK_RATIO=ratio, PATCH_SIZE=4, BATCH_SIZE=16, DEVICE=device)
    masks, indices = zip(*[draw_masks(c, device) for _ in range(3)])
    for mask, masked in zip(masks, indices):
        assert mask.shape == (32, 64) and mask.dtype == torch.bool and mask.device.type == device
        assert sorted(mask.sum(1).tolist()) == sorted(masked_patch_counts(32, 64, ratio, 0.5))
        assert torch.equal(masked, mask.flatten().nonzero().squeeze(1))
    if ratio:
        assert len({tuple(mask.sum(1).tolist()) for mask in masks}) == 3
        assert len(torch.cat(masks).unique(dim=0)) > 45  # 48 rows are masked, 48 are empty


def test_draw_masks_kinds_differ_in_their_shape(small):
    block, alone = (draw_masks(small(MASK_KIND=kind, PATCH_SIZE=4, BATCH_SIZE=64), "cpu")[0]
                    for kind in ("block", "random"))
    assert masked_neighbors(block, 8) > 1.4 * masked_neighbors(alone, 8)


# ---- All together: DINOv2.forward

def batch_for(config, batch=4):
    """Return random views and a mask for half of the global crops, of config's sizes and device."""
    c, patches = config, (config.GLOBAL_CROP_SIZE // config.PATCH_SIZE) ** 2
    sizes = [c.GLOBAL_CROP_SIZE] * c.GLOBAL_CROPS_NUMBER
    sizes += [c.LOCAL_CROP_SIZE] * c.LOCAL_CROPS_NUMBER
    mask = torch.zeros(c.GLOBAL_CROPS_NUMBER * batch, patches, dtype=torch.bool)
    mask[::2, :5] = True
    mask[0, 5:9] = True
    views = [torch.randn(batch, 3, size, size, device=c.DEVICE) for size in sizes]
    return views, mask.to(c.DEVICE)


@pytest.mark.parametrize("num_global", [2, 3])
@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize("kind", ["nearest", "cosine"])
def test_forward_joins_the_losses_as_written_out(small, device, num_global, num_local, kind):
    c = small(DEVICE=device, GLOBAL_CROPS_NUMBER=num_global, LOCAL_CROPS_NUMBER=num_local, KOLEO_KIND=kind, LAMBDA_IMG=0.7,
              LAMBDA_PATCH=0.4, LAMBDA_KOLEO=0.2, STUDENT_TEMP=0.2, HEAD_BATCH_NORM=False)
    model = DINOv2(c).to(device)
    for parameter in model.teacher.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    views, mask = batch_for(c)
    values = model(views, mask, 0.05)
    assert set(values) == {"loss", "img", "patch", "koleo", "teacher_entropy", "mean_entropy", "kl", "prototypes"}
    assert all(value.shape == () and value.dtype == torch.float32 for value in values.values())
    assert [name for name, value in values.items() if value.requires_grad] == ["loss", "img", "patch", "koleo"]

    masks = mask.chunk(num_global)
    teacher = [model.teacher(view) for view in views[:num_global]]
    student = [model.student(view, *masks[i:i + 1]) for i, view in enumerate(views)]              # local crops have no mask
    teacher_logits = torch.cat([model.teacher_img_head(t) for t, _ in teacher])
    targets = sinkhorn_knopp_centering(teacher_logits, epsilon=0.05).chunk(num_global)
    logits = [model.img_head(s) for s, _ in student]
    pairs = [(v, t) for v in range(len(views)) for t in range(num_global) if v != t]
    terms = [dino_loss(logits[v], targets[t], None, 0.2) for v, t in pairs]
    close(values["img"], sum(terms) / len(terms), 1e-4)
    hidden = [torch.cat([p[m] for (_, p), m in zip(outputs, masks)]) for outputs in (student, teacher)]
    patch_targets = sinkhorn_knopp_centering(model.teacher_patch_head(hidden[1]), epsilon=0.05)
    close(values["patch"], slow_ibot(model.patch_head(hidden[0]), patch_targets, mask, 0.2), 1e-4)
    close(values["koleo"], sum(koleo_regularizer(s, kind) for s, _ in student[:num_global]), 1e-4)
    close(values["loss"], 0.7 * values["img"] + 0.4 * values["patch"] + 0.2 * values["koleo"])
    close(values["kl"], values["img"] - entropy(torch.cat(targets)).mean(), 1e-4)
    assert values["kl"] >= 0
    indices = mask.flatten().nonzero().squeeze(1)
    close(model(views, mask, 0.05, indices)["loss"], values["loss"])


@pytest.mark.parametrize("num_global", [2, 3])
@pytest.mark.parametrize("kind, of_equal_rows", [("nearest", -math.log(1e-8)), ("cosine", 1.0)])
def test_forward_sums_koleo_over_the_global_crops(small, num_global, kind, of_equal_rows):
    c = small(GLOBAL_CROPS_NUMBER=num_global, KOLEO_KIND=kind)
    model = DINOv2(c)
    torch.nn.init.zeros_(model.student.norm.weight)
    torch.nn.init.ones_(model.student.norm.bias)  # every class token is the same
    close(model(*batch_for(c), 0.05)["koleo"], num_global * of_equal_rows, 1e-4)


@pytest.mark.parametrize("kind", ["nearest", "cosine"])
def test_forward_never_repels_two_views_of_an_image(small, kind):
    c = small(KOLEO_KIND=kind)
    model, (views, mask) = DINOv2(c), batch_for(c)
    mask[:] = False
    views[1] = views[0]                                         # as near as views can be
    expected = 2 * koleo_regularizer(model.student(views[0])[0], kind)
    close(model(views, mask, 0.05)["koleo"], expected)


@pytest.mark.parametrize("masked", [0, 1])
def test_forward_works_with_no_masked_patch_and_with_one(small, masked):
    c = small()
    model, (views, mask) = DINOv2(c), batch_for(c)
    mask[:] = False
    mask[0, :masked] = True
    values = model(views, mask, 0.05)
    values["loss"].backward()
    assert values["loss"].isfinite() and (values["patch"] == 0 or masked)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_forward_compares_crops_of_the_same_image_only(small):
    c = small(HEAD_BATCH_NORM=False, LOCAL_CROPS_NUMBER=1)
    model, (views, mask) = DINOv2(c), batch_for(c)
    order = torch.tensor([2, 0, 3, 1])
    permuted_mask = mask.unflatten(0, (2, 4))[:, order].flatten(0, 1)
    together = model([v[order] for v in views], permuted_mask, 0.05)
    apart = model([views[0], views[1][order], views[2]], mask, 0.05)
    close(together["loss"], model(views, mask, 0.05)["loss"], 1e-4)  # the order is of no matter
    assert (apart["img"] - together["img"]).abs() > 1e-3             # the company is


def test_target_diagnostics_by_hand():
    targets = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], [[0, 0, 1, 0], [0.6, 0, 0.4, 0]]])
    loss = torch.tensor(2.0, requires_grad=True)
    values = target_diagnostics(targets, loss)
    mean_row = (-0.6 * math.log(0.6) - 0.4 * math.log(0.4) + math.log(2)) / 4
    close(values["teacher_entropy"], mean_row)
    close(values["mean_entropy"], -0.525 * math.log(0.525) - 0.125 * math.log(0.125) - 0.35 * math.log(0.35))
    close(values["kl"], 2 - mean_row)
    close(values["prototypes"], 0.5)                            # the first and the third are some row's largest
    assert not any(value.requires_grad for value in values.values())


def test_target_diagnostics_show_a_collapse():
    uniform = torch.full((2, 4, 4), 0.25)
    one = F.one_hot(torch.zeros(2, 4, dtype=torch.long), 4).float()
    close(target_diagnostics(uniform, torch.tensor(0.0))["teacher_entropy"], math.log(4))
    values = target_diagnostics(one, torch.tensor(0.0))
    close(torch.stack([values["mean_entropy"], values["prototypes"]]), [0.0, 0.25])
