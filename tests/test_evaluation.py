"""Evaluation: features, k-NN, linear probe, effective rank, raw pixels, signs of a collapse."""

import math
import re
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, close
from PIL import Image

import dinov2_cifar
from dinov2_cifar import (
    DINOv2,
    Images,
    InputError,
    VisionTransformer,
    as_images,
    extract_features,
    knn_accuracy,
    linear_probe,
    make_shapes,
    rank_me,
)

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(256, size=(11, 3, 32, 32), dtype="u1"))
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))


@pytest.fixture
def model(small):
    """Return a DINOv2 with pixel statistics, whose teacher differs from its student."""
    model = DINOv2(small(DROPOUT=0.3, DROP_PATH=0.3))
    for backbone in (model.student, model.teacher):
        backbone.pixel_mean.copy_(MEAN)
        backbone.pixel_std.copy_(STD)
    for parameter in model.teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def clusters(rows, spread):
    """Return features (rows,8) near one unit vector for each of four classes, and their labels."""
    labels = torch.arange(rows) % 4
    return torch.eye(8)[labels] + spread * torch.randn(rows, 8), labels


def test_extract_features_gives_the_teacher_s_tokens_of_normalized_pixels(model):
    extract = partial(extract_features, precision="fp32")
    pixels = (IMAGES / 255 - MEAN) / STD
    tokens, patches = (t.detach() for t in model.teacher(pixels))
    assert not extract(model, IMAGES).requires_grad
    for batch_size in (1, 4, 500):
        close(extract(model, IMAGES, batch_size), tokens)
        close(extract(model, IMAGES, batch_size, patches=True), patches)
        both = torch.cat([tokens, patches.mean(1)], 1)
        close(extract(model, IMAGES, batch_size, avgpool=True), both)
    close(extract(model.teacher, pixels), tokens)  # floats are used as they are
    student = extract(model.student, IMAGES)
    close(student, model.student.eval()(pixels)[0].detach())
    assert (student - tokens).abs().max() > 0.01
    assert extract_features(model.bfloat16(), pixels.bfloat16()).dtype == torch.float32


def test_extract_features_computes_as_evaluate_does(model):
    assert model.teacher.precision == "fp32"  # of its config
    model.teacher.precision = "auto"
    images = Images(IMAGES, torch.arange(len(IMAGES)) % 2, IMAGES, torch.arange(len(IMAGES)) % 2)
    assert dinov2_cifar.evaluate(model, images)["rank"] == rank_me(extract_features(model, IMAGES))
    exact, rough = (extract_features(model, IMAGES, precision=name) for name in ("fp32", "bf16"))
    assert exact.dtype == rough.dtype == torch.float32
    assert 1e-5 < (exact - rough).abs().max() < 0.1


def test_extract_features_takes_images_of_every_form(model):
    arrays = IMAGES.permute(0, 2, 3, 1).numpy()
    pil = [Image.fromarray(array) for array in arrays]
    expected = extract_features(model, IMAGES)
    for images in (arrays, pil, [*arrays], arrays / 255, IMAGES / 255):
        close(extract_features(model, images), expected)
    for image in (pil[0], arrays[0], IMAGES[0], IMAGES[0] / 255, IMAGES[0].double() / 255):
        close(extract_features(model, image), expected[:1])
    large = [image.resize((96, 80)) for image in pil]  # as training would resize them
    close(extract_features(model, large), extract_features(model, as_images(large, 32)[0]))
    deep = Image.fromarray(np.full((32, 32), 999.0, np.float32))
    for wrong in (IMAGES[:, 0], IMAGES[:, :2], "a.png", [1], arrays[..., :2], deep, IMAGES.float()):
        with pytest.raises(InputError, match="^.+$"):
            extract_features(model, wrong)


def test_extract_features_runs_uncompiled(model):
    compiled, before = [], extract_features(model, IMAGES)
    model.teacher.compile(backend=lambda graph, inputs: compiled.append(1) or graph.forward)
    assert torch.equal(extract_features(model, IMAGES, 4), before) and not compiled
    model.teacher(torch.randn(2, 3, 32, 32))
    assert compiled  # here it is


@pytest.mark.parametrize("training", [True, False])
def test_extract_features_in_eval_mode_then_restores_the_mode(model, training):
    backbone = model.student.train(training)  # with dropout
    assert torch.equal(extract_features(backbone, IMAGES), extract_features(backbone, IMAGES))
    assert all(module.training == training for module in backbone.modules())
    model.train(training)
    extract_features(model, IMAGES)
    assert model.student.training == training and not model.teacher.training


def slow_knn(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """The k most similar rows vote with exp(cosine / temperature), in float64."""
    train, test = (t / t.norm(dim=1, keepdim=True) for t in (train.double(), test.double()))
    correct = 0
    for row, label in zip(test, test_labels.tolist(), strict=True):
        votes, cosine = np.zeros(10), (train @ row).tolist()
        for i in np.argsort(cosine)[::-1][:k]:
            votes[train_labels[i]] += math.exp(cosine[i] / temperature)
        correct += votes.argmax() == label
    return correct / len(test)


@pytest.mark.parametrize("arguments", [(), (1,), (5, 10.0), (20, 0.01), (1000, 0.07)], ids=str)
def test_knn_agrees_with_a_slow_vote(device, arguments):
    train, train_labels, test, test_labels = *clusters(60, 0.6), *clusters(1100, 0.6)
    train, test = (10 ** torch.randn(len(x), 1) * x for x in (train, test))  # lengths do not count
    data = train, train_labels, test, test_labels
    score = knn_accuracy(*(t.to(device) for t in data), *arguments)
    assert type(score) is float and 0.3 < score < 1
    assert score == pytest.approx(slow_knn(*data, *arguments), abs=1e-6)


def test_knn_at_low_temperature_is_the_nearest_row():
    """Without the largest cosine subtracted, exp would overflow or underflow."""
    angle, labels = torch.tensor([0.3, 0.1, 0.2]), torch.tensor([0, 1, 2])
    train = torch.stack([angle.cos(), angle.sin()], 1)
    for test in (torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.9, 0.4]])):  # all near, all far
        nearest = labels[(test @ train.T).argmax()].view(1)
        for temperature in (0.02, 0.005, 1e-4):
            assert knn_accuracy(train, labels, test, nearest, 3, temperature) == 1


def test_linear_probe_separates_what_a_plane_separates_alone(device):
    train, test = torch.randn(2, 400, 2, device=device)
    train, test = (t[(t[:, 0] - 0.3).abs() > 0.1] for t in (train, test))
    assert linear_probe(train, (train[:, 0] > 0.3).long(), test, (test[:, 0] > 0.3).long()) > 0.99
    assert linear_probe(train, (train.prod(1) > 0).long(), test, (test.prod(1) > 0).long()) < 0.65


def test_linear_probe_is_deterministic_and_draws_no_random_number():
    data = (*clusters(300, 0.8), *clusters(400, 0.8))
    state = torch.get_rng_state()
    score = linear_probe(*data)
    assert type(score) is float and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    with torch.no_grad():
        assert linear_probe(*data) == score


def test_linear_probe_ignores_scale_offset_and_constant_features():
    train, labels, test, test_labels = *clusters(300, 0.8), *clusters(400, 0.8)
    score = linear_probe(train, labels, test, test_labels)
    scale, offset = 10 ** torch.linspace(-2, 3, 8), 100 * torch.randn(8)
    train, test = (F.pad(x * scale + offset, (0, 1), value=3.0) for x in (train, test))
    assert linear_probe(train, labels, test, test_labels) == pytest.approx(score, abs=0.0101)


def slow_accuracy(penalty, x, labels, x_test, test_labels):
    """Newton's method for two classes; the last weight is the bias, without a penalty."""
    x, x_test = (F.pad(t, (0, 1), value=1.0) for t in (x, x_test))
    weight = torch.zeros(x.shape[1], dtype=torch.double)
    penalties = F.pad(torch.full_like(weight[1:], penalty), (0, 1))
    for _ in range(30):
        p = (x @ weight).sigmoid()
        gradient = x.T @ (p - labels.double()) / len(x) + penalties * weight
        hessian = (x.T * p * (1 - p)) @ x / len(x) + penalties.diag()
        weight -= torch.linalg.solve(hessian, gradient)
    assert gradient.norm() < 1e-8
    return ((x_test @ weight > 0) == test_labels).double().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linear_probe_is_logistic_regression_with_the_best_held_out_penalty(seed):
    """One feature is useful, 49 are noise, so that each penalty has another accuracy."""
    torch.manual_seed(seed)
    labels, test_labels = torch.arange(60) % 2, torch.arange(2000) % 2
    train, test = (torch.randn(len(y), 50) for y in (labels, test_labels))
    train[:, 0] += 3 * labels
    test[:, 0] += 3 * test_labels
    x, x_test = (((t - train.mean(0)) / train.std(0)).double() for t in (train, test))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    split = (x[order[12:]], labels[order[12:]], x[order[:12]], labels[order[:12]])
    best = max((1e-4, 1e-3, 1e-2, 1e-1), key=lambda penalty: slow_accuracy(penalty, *split))
    expected = slow_accuracy(best, x, labels, x_test, test_labels)
    assert linear_probe(train, labels, test, test_labels) == pytest.approx(expected, abs=0.0011)


@pytest.mark.parametrize("values", [[1.0], [3.0, 1.0], [5.0, 5.0, 5.0], [4.0, 2.0, 1.0, 1.0]])
def test_rank_me_by_hand(values, device):
    p = [v / sum(values) for v in values]
    left, right = (torch.linalg.qr(torch.randn(size, len(values))).Q for size in (9, 6))
    x = (left * torch.tensor(values) @ right.T).to(device)
    expected = math.exp(-sum(q * math.log(q) for q in p))
    assert (rank_me(x), rank_me(1000 * x.T)) == pytest.approx((expected, expected), rel=1e-3)
    assert rank_me(0 * x) == pytest.approx(1)  # no error


def test_raw_pixel_knn_normalizes():
    values = torch.tensor([100, 140, 105, 145], dtype=torch.uint8)  # on either side of 120
    x, y = values.view(4, 1, 1, 1).expand(-1, 3, 4, 4), torch.tensor([0, 1, 0, 1])
    data = Images(x[:2], y[:2], x[2:], y[2:])
    pixels = [dinov2_cifar.raw_pixel_scores(data, [m] * 3, [0.1] * 3) for m in (120 / 255, 0.0)]
    assert [scores["raw_pixels_knn"] for scores in pixels] == [1, 0.5]  # 0.5: all of one direction


def test_raw_pixels_linear_probe_sees_means_of_8_x_8_parts(monkeypatch):
    x, y = torch.randint(256, (6, 3, 32, 16), dtype=torch.uint8), torch.tensor([0, 1, -1, 1, 0, 1])
    probe = Mock(return_value=0.25)
    monkeypatch.setattr(dinov2_cifar, "linear_probe", probe)
    scores = dinov2_cifar.raw_pixel_scores(Images(x, y, x[:2], y[:2]), [0.5] * 3, [0.1] * 3)
    assert scores["raw_pixels_linear"] == 0.25
    parts = (
        ((x / 255 - 0.5) / 0.1).unflatten(3, (8, 2)).unflatten(2, (8, 4)).mean((3, 5)).flatten(1)
    )
    known = torch.tensor([0, 1, 3, 4, 5])
    for actual, expected in zip(
        probe.call_args[0], (parts[known], y[known], parts[:2], y[:2]), strict=True
    ):
        close(actual, expected, 1e-4)


def test_large_images_are_extracted_in_smaller_batches():
    network, sizes = VisionTransformer(64, 32, embed_dim=4, depth=1, num_heads=1), []
    network.patch_embed.register_forward_hook(lambda _, args, out: sizes.append(len(args[0])))
    for side in 1024, 2048, 64:
        extract_features(network, torch.zeros(3, 3, side, side, dtype=torch.uint8))
    assert sizes == [2, 1, 1, 1, 1, 3]


def test_floats_just_outside_of_0_to_1_are_refused(model):
    x = torch.rand(2, 3, 32, 32)
    for low, high in (-0.04, 1.05), (0, 1.2), (-0.2, 1), (-30, 3):
        with pytest.raises(InputError, match=r"normalized or in 0..1 \(clamp pixels\), not"):
            extract_features(model, x * (high - low) + low)
    for low, high in (-2, 2.5), (-0.3, 0.8), (0, 1.6):
        assert extract_features(model, x * (high - low) + low).isfinite().all()


@pytest.mark.parametrize("side", [64, 32, 16])
def test_raw_pixels_are_at_most_32_x_32(side, monkeypatch):
    x, y = torch.randint(256, (6, 3, side, side), dtype=torch.uint8), torch.arange(6) % 2
    knn = Mock(return_value=0.5)
    monkeypatch.setattr(dinov2_cifar, "knn_accuracy", knn)
    dinov2_cifar.raw_pixel_scores(Images(x, y, x[:2], y[:2]), [0.5] * 3, [0.1] * 3)
    pixels = (x / 255 - 0.5) / 0.1
    if side == 64:
        pixels = pixels.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    close(knn.call_args[0][0], pixels.flatten(1), 1e-4)


def test_raw_pixels_need_the_memory_of_one_batch(monkeypatch):
    calls = []
    for owner, name in (dinov2_cifar.TF, "normalize"), (F, "adaptive_avg_pool2d"):
        function = getattr(owner, name)
        record = lambda x, *args, f=function: calls.append((len(x), f)) or f(x, *args)  # noqa: E731
        monkeypatch.setattr(owner, name, record)
    x, y = torch.zeros(1100, 3, 4, 4, dtype=torch.uint8), torch.arange(1100) % 2
    dinov2_cifar.raw_pixel_scores(Images(x, y, x[:4], y[:4]), [0.5] * 3, [0.1] * 3)
    assert [n for n, _ in calls] == [512, 512, 512, 512, 76, 76, 1100, 4, 4, 4]


def test_evaluate_gives_the_teacher_s_scores_or_nothing_without_labels(model, shapes, monkeypatch):
    images = Images(*shapes)
    options = {"precision": model.config.PRECISION}
    train, test = (extract_features(model, x, **options) for x in (images[0], images[2]))
    data = train, images.train_labels, test, images.test_labels
    expected = {"knn": knn_accuracy(*data), "rank": rank_me(test)}
    assert dinov2_cifar.evaluate(model, images) == pytest.approx(expected, rel=1e-4)
    both = [extract_features(model, x, avgpool=True, **options) for x in (images[0], images[2])]
    expected["linear"] = linear_probe(both[0], data[1], both[1], data[3])
    probe = Mock(wraps=linear_probe)
    monkeypatch.setattr(dinov2_cifar, "linear_probe", probe)
    assert dinov2_cifar.evaluate(model, images, linear=True) == pytest.approx(expected, rel=1e-4)
    close(probe.call_args[0][0], both[0])
    for name in ("train_labels", "test_labels"):
        assert dinov2_cifar.evaluate(model, images._replace(**{name: None}), linear=True) == {}


def test_evaluate_leaves_out_images_without_labels_and_bounds_the_bank(model, shapes, monkeypatch):
    images, expected = Images(*shapes), dinov2_cifar.evaluate(model, Images(*shapes), linear=True)
    more = [torch.cat([x.flip(0), x]) for x in (images[0], images[2])]
    labels = [torch.cat([0 * y - 1, y]) for y in (images[1], images[3])]
    images = Images(more[0], labels[0], more[1], labels[1])
    assert dinov2_cifar.evaluate(model, images, linear=True) == pytest.approx(expected, rel=1e-4)
    mean = [0.5] * 3
    pixels = dinov2_cifar.raw_pixel_scores(images, mean, mean)
    assert pixels == dinov2_cifar.raw_pixel_scores(Images(*shapes), mean, mean)
    assert dinov2_cifar.evaluate(model, images._replace(train_labels=0 * labels[0] - 1)) == {}
    batches, kept = dinov2_cifar.labeled(torch.arange(10), torch.arange(10) - 1, 4)  # 1, 4, 7
    assert torch.cat([*batches]).tolist() == [1, 4, 7] and kept.tolist() == [0, 3, 6]


def test_target_diagnostics_by_hand():
    targets = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], [[0, 0, 1, 0], [0.6, 0, 0.4, 0]]])
    values = dinov2_cifar.target_diagnostics(targets, torch.tensor(2.0, requires_grad=True))
    entropy = (-0.6 * math.log(0.6) - 0.4 * math.log(0.4) + math.log(2)) / 4
    mean_entropy = -sum(p * math.log(p) for p in (0.525, 0.125, 0.35))
    expected = {"teacher_entropy": entropy, "mean_entropy": mean_entropy, "kl": 2 - entropy}
    expected["prototypes"] = 0.5  # the first and the third are some row's largest, of four
    assert {k: v.item() for k, v in values.items()} == pytest.approx(expected, abs=1e-6)
    assert not any(value.requires_grad for value in values.values())
    values = dinov2_cifar.target_diagnostics(targets[:1, :1], torch.tensor(2.0))
    assert values["prototypes"] == 1  # one row can have no more than one


def test_collapse_warnings_by_hand(small):
    config = small(PROJECTION_DIM=128, BATCH_SIZE=128)
    healthy = {"rank": 30.1, "mean_entropy": 2.43, "teacher_entropy": 4.80}  # log(128) is 4.852
    ill = {"rank": 29.9, "mean_entropy": 2.42, "teacher_entropy": 4.81}
    for name, phrase in zip(ill, ("rank fell from 60.0", "one target", "uniform"), strict=True):
        values = {**healthy, name: ill[name]}
        (sign,) = dinov2_cifar.collapse_warnings(values, values, {"rank": 60.0}, config)
        assert phrase in sign and str(ill[name]) in sign
    for c in (config, small(PROJECTION_DIM=2**16, BATCH_SIZE=32)):  # log(64) counts of 64 crops
        assert not dinov2_cifar.collapse_warnings(healthy, healthy, {"rank": 60.0}, c)


@pytest.mark.parametrize(
    "scale, bias, sign", [(5, 0, None), (0, 500, "one target"), (0, 0, "uniform")]
)
def test_collapse_warnings_name_a_collapsed_model_alone(scale, bias, sign, small):
    logits = scale * torch.randn(2, 32, 64) + bias * torch.eye(64)[0]
    values = dinov2_cifar.target_diagnostics(logits.softmax(-1), torch.tensor(4.0))
    values = {"rank": 1.0, **{name: value.item() for name, value in values.items()}}
    config = small(PROJECTION_DIM=64, BATCH_SIZE=32)
    signs = dinov2_cifar.collapse_warnings(values, values, values, config)
    assert len(signs) == bool(sign) and all(sign in s for s in signs)


# ---- The trained network of the repository ----

TEACHER = ROOT / "checkpoints" / "dinov2_tiny_cifar10.pth"
UNPACK = ROOT.parent / "shared" / "data" / "unpack.py"


def test_trained_teacher_is_small_and_knows_more_than_an_untrained_one_of_other_images():
    assert TEACHER.stat().st_size < 6e6
    teacher, (images, labels) = dinov2_cifar.load_backbone(TEACHER), make_shapes(2048, seed=5)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    untrained = dinov2_cifar.VisionTransformer(patch_size=8, embed_dim=192, depth=6, num_heads=3)
    for name in ("pixel_mean", "pixel_std"):
        getattr(untrained, name).copy_(getattr(teacher, name))
    features = (extract_features(network, images) for network in (teacher, untrained))
    y, y_test = labels.chunk(2)
    ours, others = (knn_accuracy(x[:1024], y, x[1024:], y_test) for x in features)
    assert ours > others + 0.06


@pytest.mark.skipif(not UNPACK.exists(), reason="no JPEG copy of CIFAR-10")
def test_trained_teacher_has_the_accuracy_of_its_card(tmp_path):
    counts = ["--train", "200", "--test", "50"]  # of each class
    subprocess.run([sys.executable, UNPACK, "npz", tmp_path / "few.npz", *counts], check=True)
    images = dinov2_cifar.as_images(dinov2_cifar.load_arrays(str(tmp_path / "few.npz")))
    teacher = dinov2_cifar.load_backbone(TEACHER)
    x, x_test = (extract_features(teacher, part) for part in (images[0], images[2]))
    found = [knn_accuracy(x, images.train_labels, x_test, images.test_labels)]
    pixels = dinov2_cifar.raw_pixel_scores(images, teacher.pixel_mean, teacher.pixel_std)
    found.append(pixels["raw_pixels_knn"])
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    card = re.search(r"k-NN\s+is\s+([\d.]+)\s+%\s+\(raw\s+pixels\s+([\d.]+)\s+%\)", card)
    assert found == pytest.approx([float(text) / 100 for text in card.groups()], abs=0.01)
