"""The evaluation: features, k-NN, linear probe, effective rank, raw pixels, signs of a collapse."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2_cifar import (
    Config, DINOv2, Images, VisionTransformer, collapse_warnings, evaluate, extract_features,
    knn_accuracy, linear_probe, make_shapes, rank_me, raw_pixel_knn)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def clusters(rows, classes=4, width=8, spread=0.1):
    """Return features (rows, width) near one unit vector per class, and their labels."""
    labels = torch.arange(rows) % classes
    return torch.eye(width)[labels] + spread * torch.randn(rows, width), labels


@pytest.fixture
def model(small):
    """Return a DINOv2 with pixel statistics, whose teacher differs from its student."""
    model = DINOv2(small(DROPOUT=0.3, DROP_PATH=0.3))
    for backbone in (model.student, model.teacher):
        backbone.pixel_mean.copy_(torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))
        backbone.pixel_std.copy_(torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))
    for parameter in model.teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def images():
    return torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8)


# ---- Features

def test_features_are_class_tokens_of_the_teacher_for_normalized_pixels(model, images):
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]]).view(2, 3, 1, 1)
    pixels = (images.float() / 255 - mean) / std
    expected, patches = model.teacher(pixels)
    features = extract_features(model, images)
    close(extract_features(model, images, 4, patches=True), patches.detach())
    assert features.shape == (11, 32) and features.dtype == torch.float32 and not features.requires_grad
    close(features, expected.detach())
    close(extract_features(model, pixels), features)            # floats are used as they are
    close(extract_features(model.teacher, images), features)
    assert not torch.allclose(extract_features(model.student, images), features, atol=1e-2)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 500])
def test_features_do_not_depend_on_the_batch_size(model, images, batch_size):
    close(extract_features(model, images, batch_size), extract_features(model, images))


def test_features_are_computed_without_compiling(model, images):
    compiled, before = [], extract_features(model, images)
    model.teacher.compile(backend=lambda graph, inputs: compiled.append(1) or graph.forward)
    assert torch.equal(extract_features(model, images, 4), before) and not compiled
    model.teacher(torch.randn(2, 3, 32, 32))                     # here it does
    assert compiled


@pytest.mark.parametrize("training", [True, False])
def test_features_are_taken_in_eval_mode_and_the_mode_is_restored(model, images, training):
    backbone = model.student.train(training)
    assert torch.equal(extract_features(backbone, images), extract_features(backbone, images))
    assert all(module.training == training for module in backbone.modules())
    model.train(training)
    extract_features(model, images)
    assert model.student.training == training and not model.teacher.training


def test_features_are_fp32_under_autocast_and_from_a_bfloat16_network(images):
    net = VisionTransformer(32, 8, 3, 32, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert extract_features(net, images).dtype == torch.float32
    assert extract_features(net.bfloat16(), images.bfloat16()).dtype == torch.float32


# ---- k-NN

def slow_knn(train, train_labels, test, test_labels, k, temperature):
    """Loops in float64: the k most similar rows vote with exp(cosine / temperature)."""
    train, test = (np.asarray(t, np.float64) / np.linalg.norm(t, axis=1, keepdims=True) for t in (train, test))
    right = 0
    for row, label in zip(test, test_labels.tolist()):
        similarity = train @ row
        votes = dict.fromkeys(train_labels.tolist(), 0.0)
        for i in np.argsort(-similarity)[:k]:
            votes[int(train_labels[i])] += math.exp(similarity[i] / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(test)


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 10.0])
def test_knn_is_a_weighted_vote_of_the_nearest_rows(device, k, temperature):
    train, train_labels = clusters(60, spread=0.6)
    test, test_labels = clusters(200, spread=0.6)
    score = knn_accuracy(*(t.to(device) for t in (train, train_labels, test, test_labels)), k, temperature)
    assert type(score) is float and 0.3 < score < 1
    assert score == pytest.approx(slow_knn(train, train_labels, test, test_labels, k, temperature), abs=1e-6)


def test_knn_prefers_nearer_rows_to_more_rows_at_a_low_temperature():
    angle = torch.tensor([0.0, 1.0, 1.0])  # one near row of class 0, two far ones of class 1
    train, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.1]])                           # exp(Δcos / T) against 2: T = 0.07 yes, T = 10 no
    assert knn_accuracy(train, labels, test, labels[:1], k=3) == 1
    assert knn_accuracy(train, labels, test, labels[:1], k=3, temperature=10.0) == 0


def test_knn_at_the_lowest_temperatures_uses_the_nearest_row():
    angle = torch.tensor([0.3, 0.1, 0.2])
    train, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 1, 2])
    for test in (torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.9, 0.4]])):  # all near, all far
        nearest = labels[(test @ train.T).argmax()].view(1)
        for temperature in (0.02, 0.005, 1e-4):
            assert knn_accuracy(train, labels, test, nearest, k=3, temperature=temperature) == 1


def test_knn_ignores_the_length_of_features():
    train, labels = clusters(60, spread=0.5)
    test, test_labels = clusters(200, spread=0.5)
    score = knn_accuracy(train, labels, test, test_labels)
    assert 0.5 < score < 1
    train, test = (t * torch.rand(len(t), 1).add(0.1) for t in (train, test))
    assert knn_accuracy(train, labels, test, test_labels) == score


def test_knn_is_perfect_on_clusters_at_chance_on_noise_and_wrong_on_wrong_labels():
    train, labels = clusters(100)
    test, test_labels = clusters(3000)                          # more than are compared at once
    assert knn_accuracy(train, labels, test, test_labels) == 1
    assert knn_accuracy(train, labels, test, (test_labels + 1) % 4) == 0
    assert 0.2 < knn_accuracy(torch.randn(400, 8), torch.arange(400) % 4, torch.randn(3000, 8), test_labels) < 0.3


# ---- Linear probe

def test_linear_probe_separates_what_a_plane_separates_and_nothing_else(device):
    train, test = torch.randn(400, 2), torch.randn(400, 2)
    train, test = (t[t[:, 0].sub(0.3).abs() > 0.1].to(device) for t in (train, test))
    plane = lambda t: (t[:, 0] > 0.3).long()  # noqa: E731
    assert linear_probe(train, plane(train), test, plane(test)) > 0.99
    checkers = lambda t: (t[:, 0] * t[:, 1] > 0).long()  # noqa: E731
    assert linear_probe(train, checkers(train), test, checkers(test)) < 0.65


def test_linear_probe_is_perfect_on_clusters():
    score = linear_probe(*clusters(200), *clusters(100))
    assert type(score) is float and score == 1


def noisy():
    return (*clusters(300, spread=0.8), *clusters(400, spread=0.8))


def test_linear_probe_is_deterministic_and_draws_no_random_number():
    four, state = noisy(), torch.get_rng_state()
    first = linear_probe(*four)
    assert torch.equal(torch.get_rng_state(), state) and 0.4 < first < 0.95
    torch.manual_seed(5)
    assert linear_probe(*four) == first


def test_linear_probe_ignores_scale_and_offset_of_features():
    train, labels, test, test_labels = noisy()
    score = linear_probe(train, labels, test, test_labels)
    scale, offset = 10 ** torch.linspace(-2, 3, 8), 100 * torch.randn(8)
    scaled = linear_probe(train * scale + offset, labels, test * scale + offset, test_labels)
    constant = [F.pad(x, (0, 1), value=3.0) for x in (train, test)]
    padded = linear_probe(constant[0], labels, constant[1], test_labels)
    assert (scaled, padded) == pytest.approx((score, score), abs=0.0101)


def test_linear_probe_learns_nothing_from_the_test_labels():
    train, labels, test, test_labels = noisy()
    classes = [torch.full_like(test_labels, c) for c in range(4)]
    by_class = [linear_probe(train, labels, test, labels_) for labels_ in classes]
    assert sum(by_class) == pytest.approx(1)  # the same predictions for any labels
    parts = [linear_probe(train, labels, test[i:i + 200], test_labels[i:i + 200]) for i in (0, 200)]
    assert sum(parts) / 2 == pytest.approx(linear_probe(train, labels, test, test_labels))


def slow_logistic_accuracy(penalty, x, labels, x_test, test_labels):
    """Newton's method for two classes; the last weight is the bias, without a penalty."""
    x, x_test = (F.pad(t, (0, 1), value=1.0) for t in (x, x_test))
    weight = torch.zeros(x.shape[1], dtype=torch.double)
    penalty = torch.full_like(weight, penalty)
    penalty[-1] = 0
    for _ in range(30):
        p = (x @ weight).sigmoid()
        gradient = x.T @ (p - labels.double()) / len(x) + penalty * weight
        hessian = (x.T * p * (1 - p)) @ x / len(x) + penalty.diag()
        weight -= torch.linalg.solve(hessian, gradient)
    assert gradient.norm() < 1e-8
    return ((x_test @ weight > 0) == test_labels).double().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linear_probe_is_logistic_regression_with_the_best_held_out_penalty(seed):
    """One feature is useful, 49 are noise, so that each penalty has another accuracy."""
    torch.manual_seed(seed)
    labels, test_labels = torch.arange(60) % 2, torch.arange(2000) % 2
    train, test = torch.randn(60, 50), torch.randn(2000, 50)
    train[:, 0] += 3 * labels
    test[:, 0] += 3 * test_labels
    x, x_test = (((t - train.mean(0)) / train.std(0)).double() for t in (train, test))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    held, rest = order[:12], order[12:]
    penalties = (1e-4, 1e-3, 1e-2, 1e-1)
    best = max(penalties, key=lambda penalty: slow_logistic_accuracy(
        penalty, x[rest], labels[rest], x[held], labels[held]))
    expected = slow_logistic_accuracy(best, x, labels, x_test, test_labels)
    assert linear_probe(train, labels, test, test_labels) == pytest.approx(expected, abs=0.0011)


def test_linear_probe_works_inside_no_grad():
    with torch.no_grad():
        assert linear_probe(*clusters(100), *clusters(40)) == 1


# ---- Effective rank

@pytest.mark.parametrize("values", [[1.0], [3.0, 1.0], [5.0, 5.0, 5.0], [4.0, 2.0, 1.0, 1.0]])
def test_rank_me_by_hand(values):
    p = [v / sum(values) for v in values]
    left, right = (torch.linalg.qr(torch.randn(size, len(values))).Q for size in (9, 6))
    expected = math.exp(-sum(q * math.log(q) for q in p))
    assert rank_me(left * torch.tensor(values) @ right.T) == pytest.approx(expected, rel=1e-3)


def test_rank_me_counts_directions(device):
    x = torch.randn(30, 5, device=device)
    assert rank_me(torch.eye(7, device=device)) == pytest.approx(7)
    assert rank_me(x[:, :1] @ x[:1]) == pytest.approx(1, abs=1e-3)
    assert type(rank_me(x)) is float and 4 < rank_me(x) <= 5
    assert (rank_me(1000 * x), rank_me(x.T)) == pytest.approx((rank_me(x), rank_me(x)), rel=1e-4)
    assert rank_me(torch.zeros(4, 3)) == pytest.approx(1)       # no error


# ---- Raw pixels, and all of it

def test_raw_pixel_knn_sees_colors_and_no_more():
    colors = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200]], dtype=torch.uint8)
    labels = torch.arange(60) % 3
    plain = colors[labels].view(60, 3, 1, 1).expand(-1, -1, 8, 8)
    noise = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.3, 0.3, 0.3], [0.2, 0.2, 0.2]
    assert raw_pixel_knn(Images(plain, labels, plain[:30], labels[:30]), mean, std) == 1
    noisy = Images(noise, labels, noise.flip(0), labels.flip(0).roll(1))
    assert raw_pixel_knn(noisy, mean, std) < 0.5


def test_raw_pixel_knn_normalizes():
    values = torch.tensor([100, 140, 105, 145], dtype=torch.uint8)
    images = values.view(4, 1, 1, 1).expand(-1, 3, 4, 4)        # on either side of the mean
    labels = torch.tensor([0, 1, 0, 1])
    data = Images(images[:2], labels[:2], images[2:], labels[2:])
    assert raw_pixel_knn(data, [120 / 255] * 3, [0.1] * 3) == 1
    assert raw_pixel_knn(data, [0.0] * 3, [0.1] * 3) == 0.5     # all have the same direction


def test_evaluate_returns_the_scores_of_the_teacher(model, shapes):
    data = Images(*shapes)
    train, test = (extract_features(model, x) for x in (data.train_images, data.test_images))
    probe_data = train, data.train_labels, test, data.test_labels
    expected = {"knn": knn_accuracy(*probe_data), "linear": linear_probe(*probe_data),
                "rank": rank_me(test)}
    assert evaluate(model, data, linear=True) == pytest.approx(expected, rel=1e-4)
    del expected["linear"]
    assert evaluate(model, data) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("missing", ["train_labels", "test_labels"])
def test_evaluate_without_labels_returns_nothing(model, shapes, missing):
    assert evaluate(model, Images(*shapes)._replace(**{missing: None}), linear=True) == {}


def test_make_shapes_masks_cover_what_stands_out_from_the_background():
    images, labels, masks = make_shapes(40, 32, seed=3, masks=True)
    plain = make_shapes(40, 32, seed=3)
    assert torch.equal(images, plain[0]) and torch.equal(labels, plain[1]) and len(plain) == 2
    assert masks.shape == (40, 32, 32) and masks.dtype == torch.bool
    assert 0.05 < masks.float().mean() < 0.3
    for image, mask in zip(images.float() / 255, masks):        # of one color, with noise of 0.03
        difference = image[:, mask].median(1).values - image[:, ~mask].median(1).values
        assert difference.norm() > 0.1 and image[:, mask].std(1).max() < 0.2


HEALTHY = dict(scores={"rank": 100.0}, means={"mean_entropy": 4.0, "teacher_entropy": 3.0}, baseline={"rank": 60.0},
               config=dict(PROJECTION_DIM=128, BATCH_SIZE=128))


@pytest.mark.parametrize("change, word", [
    ({}, None), ({"means": {"mean_entropy": 0.1}}, "entropy 0.10"),
    ({"means": {"teacher_entropy": 4.85}}, "entropy 4.85"),
    ({"scores": {"rank": 20.0}}, "from 60.0 to 20.0"),
    # 64 rows cannot spread over 65,536 prototypes
    ({"config": {"PROJECTION_DIM": 65536, "BATCH_SIZE": 32}}, None)])
def test_collapse_warnings_tell_each_sign_and_none_of_a_healthy_run(change, word):
    given = {name: {**values, **change.get(name, {})} for name, values in HEALTHY.items()}
    sentences = collapse_warnings(**{**given, "config": Config(**given["config"])})
    assert len(sentences) == (word is not None) and all(word in s for s in sentences)
