"""The evaluation: features, nearest neighbours, the linear probe, the effective rank, and raw pixels as the measure."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2_cifar import (Config, DINOv2, Pictures, VisionTransformer, collapse_signs, dense_probe, evaluate, extract_features, knn_accuracy,
                          linear_probe, make_shapes, rank_me, raw_pixel_accuracy)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def clusters(rows, classes=4, width=8, spread=0.1):
    """→ features (rows, width) near one unit vector a class, and their labels, all classes alike often."""
    labels = torch.arange(rows) % classes
    return torch.eye(width)[labels] + spread * torch.randn(rows, width), labels


@pytest.fixture
def model(small):
    """A DINOv2 that knows its pixels' statistics and whose teacher differs from its student."""
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

def test_features_are_the_teachers_class_tokens_of_the_normalised_pixels(model, images):
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]]).view(2, 3, 1, 1)
    pixels = (images.float() / 255 - mean) / std
    expected = model.teacher(pixels)[0]
    features = extract_features(model, images)
    assert features.shape == (11, 32) and features.dtype == torch.float32 and not features.requires_grad
    close(features, expected.detach())
    close(extract_features(model, pixels), features)            # floats are used as they are
    close(extract_features(model.teacher, images), features)
    assert not torch.allclose(extract_features(model.student, images), features, atol=1e-2)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 500])
def test_features_do_not_depend_on_the_batch_size(model, images, batch_size):
    close(extract_features(model, images, batch_size), extract_features(model, images))


def test_features_are_computed_without_compiling_for_every_size_of_a_batch(model, images):
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


# ---- k nearest neighbours

def slow_knn(train, train_labels, test, test_labels, k, temperature):
    """Loops in float64: the k most similar rows vote with exp(similarity / temperature)."""
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


def test_nearer_rows_outvote_more_rows_when_the_temperature_is_low():
    angle = torch.tensor([0.0, 1.0, 1.0])                       # one row of class 0 at hand, two of class 1 farther off
    train, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.1]])                           # exp(Δcos / T) against 2: T = 0.07 yes, T = 10 no
    assert knn_accuracy(train, labels, test, labels[:1], k=3) == 1
    assert knn_accuracy(train, labels, test, labels[:1], k=3, temperature=10.0) == 0


def test_at_the_lowest_temperatures_the_nearest_row_decides():
    angle = torch.tensor([0.3, 0.1, 0.2])
    train, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 1, 2])
    for test in (torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.9, 0.4]])):                        # all near, all far
        nearest = labels[(test @ train.T).argmax()].view(1)
        for temperature in (0.02, 0.005, 1e-4):
            assert knn_accuracy(train, labels, test, nearest, k=3, temperature=temperature) == 1


def test_knn_looks_at_directions_alone():
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

def test_the_probe_separates_what_a_plane_separates_and_nothing_else(device):
    train, test = torch.randn(400, 2), torch.randn(400, 2)
    train, test = (t[t[:, 0].sub(0.3).abs() > 0.1].to(device) for t in (train, test))
    plane = lambda t: (t[:, 0] > 0.3).long()  # noqa: E731
    assert linear_probe(train, plane(train), test, plane(test)) > 0.99
    checkers = lambda t: (t[:, 0] * t[:, 1] > 0).long()  # noqa: E731
    assert linear_probe(train, checkers(train), test, checkers(test)) < 0.65


def test_the_probe_is_perfect_on_clusters():
    score = linear_probe(*clusters(200), *clusters(100))
    assert type(score) is float and score == 1


def noisy():
    return (*clusters(300, spread=0.8), *clusters(400, spread=0.8))


def test_the_probe_is_deterministic_and_draws_no_random_number():
    four, state = noisy(), torch.get_rng_state()
    first = linear_probe(*four)
    assert torch.equal(torch.get_rng_state(), state) and 0.4 < first < 0.95
    torch.manual_seed(5)
    assert linear_probe(*four) == first


def test_the_probe_does_not_see_the_features_scale_and_place():
    train, labels, test, test_labels = noisy()
    scale, place = 10 ** torch.linspace(-2, 3, 8), 100 * torch.randn(8)
    close(torch.tensor(linear_probe(train * scale + place, labels, test * scale + place, test_labels)),
          torch.tensor(linear_probe(train, labels, test, test_labels)), 0.0101)
    dead = F.pad(train, (0, 1), value=3.0), labels, F.pad(test, (0, 1), value=3.0), test_labels
    assert abs(linear_probe(*dead) - linear_probe(train, labels, test, test_labels)) <= 0.01      # nor a constant one


def test_the_probe_learns_nothing_from_the_test_labels():
    train, labels, test, test_labels = noisy()
    by_class = [linear_probe(train, labels, test, torch.full_like(test_labels, c)) for c in range(4)]
    assert sum(by_class) == pytest.approx(1)                    # the same guesses, whatever the labels say
    parts = [linear_probe(train, labels, test[i:i + 200], test_labels[i:i + 200]) for i in (0, 200)]
    assert sum(parts) / 2 == pytest.approx(linear_probe(train, labels, test, test_labels))


def test_the_probe_chooses_its_penalty_on_rows_held_out():
    train, labels = torch.randn(60, 50), torch.arange(60) % 2
    train[:, 0] += 3 * labels                                   # one telling feature among 49 that only invite overfitting
    test, test_labels = torch.randn(2000, 50), torch.arange(2000) % 2
    test[:, 0] += 3 * test_labels
    x, bias = (train - train.mean(0)) / train.std(0), torch.ones(60, 1)
    overfitted = torch.linalg.lstsq(torch.cat([x, bias], 1), 2.0 * labels[:, None] - 1).solution
    guess = (torch.cat([(test - train.mean(0)) / train.std(0), torch.ones(2000, 1)], 1) @ overfitted).squeeze(1) > 0
    assert linear_probe(train, labels, test, test_labels) > (guess == test_labels).float().mean() + 0.02


def test_the_probe_works_inside_no_grad():
    with torch.no_grad():
        assert linear_probe(*clusters(100), *clusters(40)) == 1


# ---- Effective rank

@pytest.mark.parametrize("values", [[1.0], [3.0, 1.0], [5.0, 5.0, 5.0], [4.0, 2.0, 1.0, 1.0]])
def test_the_rank_by_hand(values):
    p = [v / sum(values) for v in values]
    left, right = (torch.linalg.qr(torch.randn(size, len(values))).Q for size in (9, 6))
    entropy = -sum(q * math.log(q) for q in p)
    assert rank_me(left * torch.tensor(values) @ right.T) == pytest.approx(math.exp(entropy), rel=1e-3)


def test_the_rank_counts_directions_and_not_lengths(device):
    x = torch.randn(30, 5, device=device)
    assert rank_me(torch.eye(7, device=device)) == pytest.approx(7)
    assert rank_me(x[:, :1] @ x[:1]) == pytest.approx(1, abs=1e-3)
    assert type(rank_me(x)) is float and 4 < rank_me(x) <= 5
    assert rank_me(1000 * x) == pytest.approx(rank_me(x), rel=1e-4) == pytest.approx(rank_me(x.T), rel=1e-4)
    assert rank_me(torch.zeros(4, 3)) == pytest.approx(1)       # nothing at all is no error


# ---- Raw pixels, and all of it

def test_raw_pixels_tell_what_pixels_tell():
    colours = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200]], dtype=torch.uint8)
    labels = torch.arange(60) % 3
    plain = colours[labels].view(60, 3, 1, 1).expand(-1, -1, 8, 8)
    noise = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.3, 0.3, 0.3], [0.2, 0.2, 0.2]
    assert raw_pixel_accuracy(Pictures(plain, labels, plain[:30], labels[:30]), mean, std) == 1
    assert raw_pixel_accuracy(Pictures(noise, labels, noise.flip(0), labels.flip(0).roll(1)), mean, std) < 0.5


def test_raw_pixels_are_compared_after_normalisation():
    values = torch.tensor([100, 140, 105, 145], dtype=torch.uint8)
    pictures = values.view(4, 1, 1, 1).expand(-1, 3, 4, 4)      # dark and light, on either side of the mean
    labels = torch.tensor([0, 1, 0, 1])
    data = Pictures(pictures[:2], labels[:2], pictures[2:], labels[2:])
    assert raw_pixel_accuracy(data, [120 / 255] * 3, [0.1] * 3) == 1
    assert raw_pixel_accuracy(data, [0.0] * 3, [0.1] * 3) == 0.5  # then all point the same way


def test_evaluate_reports_the_teachers_scores(model, shapes):
    data = Pictures(*shapes)
    features, test = extract_features(model, data.train_images), extract_features(model, data.test_images)
    scores = evaluate(model, data, linear=True)
    assert scores == pytest.approx({"knn": knn_accuracy(features, data.train_labels, test, data.test_labels),
                                    "linear": linear_probe(features, data.train_labels, test, data.test_labels),
                                    "rank": rank_me(test)}, rel=1e-4)
    assert set(evaluate(model, data)) == {"knn", "rank"}


# ---- Dense features, and the signs of a collapse

def test_shapes_masks_cover_what_stands_out_from_the_background():
    images, labels, masks = make_shapes(40, 32, seed=3, masks=True)
    plain = make_shapes(40, 32, seed=3)
    assert torch.equal(images, plain[0]) and torch.equal(labels, plain[1]) and len(plain) == 2
    assert masks.shape == (40, 32, 32) and masks.dtype == torch.bool and 0.05 < masks.float().mean() < 0.3
    pixels = images.float() / 255
    for picture, mask in zip(pixels, masks):                    # the shape has one colour, up to noise of 0.03
        assert picture[:, mask].median(1).values.sub(picture[:, ~mask].median(1).values).norm() > 0.1
        assert picture[:, mask].std(1).max() < 0.2


def test_dense_probe_is_perfect_where_tokens_are_the_masks_and_chance_where_they_are_noise():
    masks = make_shapes(60, 32, seed=4, masks=True)[2]
    tokens = masks.float().unflatten(1, (8, 4)).unflatten(3, (8, 4)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)  # (60, 64, 16)
    noise = torch.randn(60, 64, 16)
    assert dense_probe(tokens[:40], masks[:40], tokens[40:], masks[40:]) > 0.99
    background = (~masks[40:]).float().mean().item() / 2         # all background: its IoU, and 0 for the foreground
    assert dense_probe(noise[:40], masks[:40], noise[40:], masks[40:]) == pytest.approx(background, abs=0.02)


def test_dense_probe_puts_each_pixel_where_it_is():
    """One token tells two pixels apart: the left one is foreground where its first number is positive, the right one its second."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.rand(50, 1, 2, generator=generator) < 0.5      # one patch of 2 × 2 pixels
    masks = signs.expand(-1, 2, -1)
    tokens = signs.float() * 2 - 1
    assert dense_probe(tokens[:30], masks[:30], tokens[30:], masks[30:]) == 1
    assert dense_probe(tokens[:30], masks[:30], tokens[30:].flip(2), masks[30:]) < 0.8


def test_patch_features_are_the_networks_patch_tokens(small):
    model = DINOv2(small())
    images = make_shapes(10)[0]
    x = (images.float() / 255 - model.teacher.pixel_mean) / model.teacher.pixel_std
    torch.testing.assert_close(extract_features(model, images, 4, patches=True), model.teacher(x)[1])
    torch.testing.assert_close(extract_features(model, images, 4), model.teacher(x)[0])


HEALTHY = dict(scores={"rank": 100.0}, means={"mean_entropy": 4.0, "teacher_entropy": 3.0}, baseline={"rank": 60.0},
               config=dict(PROJECTION_DIM=128, BATCH_SIZE=128, EMA_START=0.9, EMA_END=1.0))


@pytest.mark.parametrize("change, word", [
    ({}, None), ({"means": {"mean_entropy": 0.1}}, "same target"), ({"means": {"teacher_entropy": 4.85}}, "say nothing"),
    ({"scores": {"rank": 20.0}}, "from 60.0 to 20.0"), ({"config": {"EMA_START": 1.0}}, "never moves"),
    ({"config": {"PROJECTION_DIM": 65536, "BATCH_SIZE": 32}}, None)])  # 64 rows cannot spread over 65,536 prototypes
def test_each_sign_of_a_collapse_is_told_and_a_healthy_run_has_none(change, word):
    given = {name: {**values, **change.get(name, {})} for name, values in HEALTHY.items()}
    signs = collapse_signs(**{**given, "config": Config(**given["config"])})
    assert len(signs) == (word is not None) and all(word in sign for sign in signs)


def test_evaluate_probes_the_patches_where_the_pictures_have_masks(small):
    parts = [make_shapes(n, 32, seed=n, masks=True) for n in (30, 20)]
    data = Pictures(*parts[0][:2], *parts[1][:2], "shapes", parts[0][2], parts[1][2])
    model = DINOv2(small())
    patches = [extract_features(model, part[0], patches=True) for part in parts]
    assert evaluate(model, data, linear=True)["iou"] == dense_probe(patches[0], parts[0][2], patches[1], parts[1][2])
    assert "iou" not in evaluate(model, data) and "iou" not in evaluate(model, data._replace(train_masks=None), linear=True)
