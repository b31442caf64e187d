"""The views: operations against torchvision's, one pipeline for single images and batches."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import dinov2_cifar
from dinov2_cifar import (
    InputError, MultiCropDataset, MultiCropTransform, adjust_brightness, adjust_contrast,
    adjust_hue, adjust_saturation, make_shapes, random_crop_boxes, resize_matrix, resized_crop,
    rgb_to_grayscale)

STILL = dict(flip=False, jitter_prob=0.0, grayscale_prob=0.0)    # a crop and nothing else
PLAIN = dict(mean=(0.0,) * 3, std=(1.0,) * 3)                    # not normalized


def column(values, device="cpu"):
    return torch.tensor(values, device=device).view(-1, 1, 1, 1)


def colorful(count, height, width, device="cpu"):
    """Return random images with some gray, black, white and primary pixels, the corners of hue."""
    images = torch.rand(count, 3, height, width)
    corners = [[0, 0, 0], [1, 1, 1], [0.5] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0],
               [0.2, 0.7, 0.7]]
    corners = torch.tensor(corners)
    images[:, :, 0, :len(corners)] = corners.T
    return images.to(device)


def crops_of(images, seed=0, **settings):
    torch.manual_seed(seed)
    return MultiCropTransform(**settings)(images)


# Each operation is torchvision's

# All are a few fp32 operations on numbers up to 1 (6e-8 each); hue divides by the chroma, up to 1/6 of 1e-5.
@pytest.mark.parametrize("ours, theirs, factors, tolerance", [
    (adjust_brightness, TF.adjust_brightness, [0.0, 0.3, 1.0, 1.7], 1e-6),
    (adjust_contrast, TF.adjust_contrast, [0.0, 0.3, 1.0, 1.7], 1e-6),
    (adjust_saturation, TF.adjust_saturation, [0.0, 0.3, 1.0, 1.7], 1e-6),
    (adjust_hue, TF.adjust_hue, [-0.5, -0.08, 0.0, 0.31], 1e-5),
], ids=["brightness", "contrast", "saturation", "hue"])
def test_color_adjustments_are_torchvisions(ours, theirs, factors, tolerance, device):
    images = colorful(len(factors), 9, 13, device)
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, factors)])
    torch.testing.assert_close(ours(images, column(factors, device)), expected, atol=tolerance, rtol=0)


def test_rgb_to_grayscale_is_torchvisions():
    images = colorful(3, 9, 13)
    expected = TF.rgb_to_grayscale(images)
    torch.testing.assert_close(rgb_to_grayscale(images), expected, atol=1e-6, rtol=0)


def test_color_adjustments_by_hand():
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert torch.allclose(adjust_hue(red, column([1 / 3])).flatten(), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)
    assert torch.allclose(adjust_hue(red, column([0.5])).flatten(), torch.tensor([0.0, 1.0, 1.0]), atol=1e-6)
    assert torch.allclose(adjust_saturation(red, column([0.0])).flatten(), torch.tensor(0.2989).expand(3))
    assert torch.equal(adjust_brightness(red * 0.4, column([2.0])).flatten(), torch.tensor([0.8, 0.0, 0.0]))
    halves = torch.tensor([0.2, 0.6]).expand(1, 3, 1, 2)         # mean 0.4, here a gray of 0.39996
    assert torch.allclose(adjust_contrast(halves, column([0.5]))[0, 0, 0], torch.tensor([0.3, 0.5]), atol=1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (37, 29), (20, 64)], ids=str)
@pytest.mark.parametrize("size", [8, 32, 48])
@pytest.mark.parametrize("scale", [(0.02, 0.2), (0.3, 1.0)], ids=str)
def test_resized_crop_is_torchvisions_with_a_flip(shape, size, scale, device):
    count = 8
    images, flip = colorful(count, *shape, device), torch.arange(count, device=device) % 2 == 1
    boxes = random_crop_boxes(count, *shape, scale, device)
    expected = []
    for image, flipped, *box in zip(images, flip, *boxes):
        crop = TF.resized_crop(image, *map(int, box), [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
        expected.append((TF.hflip(crop) if flipped else crop).clamp(0, 1))
    # Two sums of up to 64 fp32 products each, whose weights are up to 1: 1e-5 is 80 times their rounding
    crops = resized_crop(images, *boxes, flip, size)
    torch.testing.assert_close(crops, torch.stack(expected), atol=1e-5, rtol=0)


def test_resize_matrix_rows_sum_to_1_and_stay_inside_the_box():
    start, length = torch.tensor([0.0, 3.0, 10.0]), torch.tensor([20.0, 1.0, 7.0])
    weights = resize_matrix(start, length, 20, 6)
    assert weights.shape == (3, 6, 20) and torch.allclose(weights.sum(2), torch.ones(3, 6))
    pixel = torch.arange(20)
    outside = (pixel < start[:, None]) | (pixel >= (start + length)[:, None])
    assert not weights.transpose(1, 2)[outside].any()
    assert torch.equal(resize_matrix(torch.zeros(1), torch.full((1,), 5.0), 5, 5)[0], torch.eye(5))


# Boxes

@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.4, 1.0)), (32, 32, (0.1, 0.4)), (48, 90, (0.05, 0.5)),
                                                  (90, 48, (0.2, 0.3))])
def test_boxes_lie_inside_and_keep_their_area_and_ratio(height, width, scale):
    top, left, h, w = random_crop_boxes(5000, height, width, scale, "cpu")
    for start, length, side in ((top, h, height), (left, w, width)):
        assert (start >= 0).all() and (length >= 1).all() and (start + length <= side).all()
        assert torch.equal(start, start.round()) and torch.equal(length, length.round())
    # Sides are rounded to whole pixels, by half a pixel at most, which moves area and aspect as far as these corners say
    area = height * width
    assert ((h + 0.5) * (w + 0.5) >= scale[0] * area).all() and ((h - 0.5) * (w - 0.5) <= scale[1] * area).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    fraction = h * w / area
    low, high = fraction.min().item(), fraction.max().item()
    assert low < scale[0] + 0.1 * (scale[1] - scale[0]) and high > scale[1] - 0.1 * (scale[1] - scale[0])
    shape = (w / h).log()
    assert abs(shape.mean()) < 0.03 and shape.max() > 0.2 > -0.2 > shape.min()


def test_boxes_have_uniform_areas_and_reach_every_place():
    top, left, h, w = random_crop_boxes(4000, 64, 64, (0.1, 0.5), "cpu")
    assert ((h * w / 64 ** 2).sort().values - torch.linspace(0.1, 0.5, 4000)).abs().max() < 0.02   # five standard errors
    for start, length in ((top, h), (left, w)):
        place = start / (64 - length)
        assert place.min() == 0 and place.max() == 1 and abs(place.mean() - 0.5) < 0.03


@pytest.mark.parametrize("height, width, expected", [(10, 100, (10, 13)), (100, 10, (13, 10)), (30, 36, (30, 36))])
def test_boxes_where_none_fits_are_the_largest_centered_ones(height, width, expected):
    # By hand: 10 * 4/3 = 13.3
    top, left, h, w = random_crop_boxes(3, height, width, (0.999, 1.0), "cpu")
    assert h.tolist() == [expected[0]] * 3 and w.tolist() == [expected[1]] * 3
    for start, length, side in ((top, h, height), (left, w, width)):
        assert ((2 * start + length - side).abs() <= 1).all()    # the margins differ by a pixel at most


def test_global_crops_see_more_of_the_image_than_local_ones():
    """Channels rise to the right and downwards, so that the range of values is what is seen."""
    ramp = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    image = torch.stack([ramp, ramp.T, torch.zeros_like(ramp)])
    views = crops_of(image.expand(16, -1, -1, -1), **STILL, **PLAIN)
    seen = [((v.amax((2, 3)) - v.amin((2, 3)))[:, :2].prod(1)).mean().item() for v in views]
    assert len(seen) == 8 and min(seen[:2]) > 2 * max(seen[2:])
    assert 0.5 < min(seen[:2]) and 0.15 < min(seen[2:]) and max(seen[2:]) < 0.35


# One pipeline, every image with its own random numbers

@pytest.fixture(scope="module")
def images():
    return make_shapes(8, 32, seed=3)[0]


def test_transform_gives_the_same_crops_of_an_image_a_tensor_and_a_batch(images):
    settings = dict(global_size=32, local_size=16, global_crops=2, local_crops=3)
    batch = crops_of(images[:1], **settings)
    assert [tuple(view.shape) for view in batch] == [(1, 3, 32, 32)] * 2 + [(1, 3, 16, 16)] * 3
    for image in (images[0], Image.fromarray(images[0].permute(1, 2, 0).numpy())):
        views = crops_of(image, **settings)
        assert isinstance(views, list) and {view.dtype for view in views} == {torch.float32}
        assert all(torch.equal(view, one[0]) for view, one in zip(views, batch, strict=True))


@pytest.mark.parametrize("shape", [(3, 20, 50), (3, 3, 40, 24)], ids=str)
def test_transform_gives_square_crops_of_images_of_any_shape(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    views = crops_of(images, global_size=24, local_size=8, local_crops=1)
    assert [tuple(view.shape) for view in views] == [(*shape[:-2], s, s) for s in (24, 24, 8)]
    assert all(torch.isfinite(view).all() for view in views)


def test_transform_stays_on_the_device_of_the_batch(device, images):
    assert {view.device.type for view in crops_of(images.to(device))} == {device}


def test_transform_of_one_image_does_not_depend_on_the_others(images):
    changed = images.clone()
    changed[5] = 255 - changed[5]
    for before, after in zip(crops_of(images), crops_of(changed), strict=True):
        others = torch.arange(8) != 5
        assert torch.equal(before[others], after[others])
        assert not torch.allclose(before[5], after[5], atol=0.1)


OPERATIONS = {  # what makes copies of one image differ, all else being off
    "box": dict(global_scale=(0.2, 0.9)), "flip": dict(flip=True), "grayscale": dict(grayscale_prob=0.5),
    "whether there is jitter": dict(jitter=(0.0, 0.0, 0.0, 0.5), jitter_prob=0.5),
    **{name: dict(jitter=tuple(0.4 * (i == j) for j in range(4)), jitter_prob=1.0)
       for i, name in enumerate(("brightness", "contrast", "saturation", "hue"))}}


@pytest.mark.parametrize("name", OPERATIONS)
def test_transform_draws_anew_for_every_image_of_a_batch(name, images):
    settings = {**STILL, **PLAIN, "global_scale": (1.0, 1.0), **OPERATIONS[name]}
    copies = images[:1].expand(16, -1, -1, -1)
    crops = crops_of(copies, global_crops=1, local_crops=0, **settings)[0]
    kinds = len(crops.unique(dim=0))
    assert kinds == 2 if name in ("flip", "grayscale") else kinds > 4, kinds


def test_transform_draws_anew_for_every_view(images):
    views = crops_of(images[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_transform_follows_the_seed(images):
    one, two, other = (torch.stack(crops_of(images, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_transform_without_randomness_returns_the_image(images):
    """Of the whole area only the square box fits, drawn in ten attempts or taken afterwards."""
    settings = dict(global_crops=1, local_crops=0, global_scale=(1.0, 1.0), **STILL, **PLAIN)
    whole = crops_of(images, **settings)[0]
    torch.testing.assert_close(whole, images / 255, atol=1e-6, rtol=0)


def test_transform_normalizes_by_mean_and_std(images):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    normalized = crops_of(images, mean=mean, std=std)
    for plain, normal in zip(crops_of(images, **PLAIN), normalized, strict=True):
        assert 0 <= plain.min() and plain.max() <= 1
        restored = normal * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        assert torch.allclose(restored, plain, atol=1e-6)


def fraction_of(crops, test):
    return torch.stack([test(crop) for crop in crops]).float().mean().item()


def test_flip_mirrors_half_of_the_crops():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[..., 4:] = 255                                       # bright on the right
    for flip, expected in ((True, 0.5), (False, 0.0)):
        settings = dict(global_crops=1, local_crops=0, global_scale=(0.9, 1.0), **{**STILL, "flip": flip})
        crops = crops_of(image.expand(2000, -1, -1, -1), **settings)[0]
        mirrored = fraction_of(crops, lambda crop: crop[:, :, 0].mean() > crop[:, :, -1].mean())
        assert abs(mirrored - expected) < (0.05 if flip else 1e-9)   # four and a half standard deviations of 2,000 coins


@pytest.mark.parametrize("prob", [0.0, 0.2, 1.0])
def test_grayscale_has_its_fraction_and_equal_channels(prob):
    image = colorful(1, 8, 8).mul(255).byte().expand(1500, -1, -1, -1)
    settings = {**STILL, **PLAIN, "grayscale_prob": prob}
    crops = crops_of(image, global_crops=1, local_crops=0, **settings)[0]
    gray = fraction_of(crops, lambda crop: ((crop[0] == crop[1]) & (crop[1] == crop[2])).all())
    assert abs(gray - prob) < (0.05 if 0 < prob < 1 else 1e-9)


@pytest.mark.parametrize("prob", [0.0, 0.8, 1.0])
def test_color_jitter_has_its_fraction_and_strength(prob):
    image = torch.full((1500, 3, 8, 8), 100, dtype=torch.uint8)
    brightness_only = {**STILL, "jitter": (0.4, 0.0, 0.0, 0.0), "jitter_prob": prob}
    crops = crops_of(image, global_crops=1, local_crops=0, **brightness_only, **PLAIN)[0]
    factor = crops.mean((1, 2, 3)) / (100 / 255)
    changed = ((factor - 1).abs() > 1e-4).float().mean().item()
    assert abs(changed - prob) < (0.05 if 0 < prob < 1 else 0.01)
    assert factor.min() > 0.6 - 1e-4 and factor.max() < 1.4 + 1e-4
    assert prob == 0 or factor.min() < 0.62 and factor.max() > 1.38


def test_color_adjustments_come_in_every_order(monkeypatch):
    called = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        spy = lambda x, factor, name=name: called.append(name) or x  # noqa: E731
        monkeypatch.setattr(dinov2_cifar, f"adjust_{name}", spy)
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    crops_of(image, global_size=2, global_crops=300, local_crops=0)
    orders = {tuple(called[i:i + 4]) for i in range(0, len(called), 4)}
    assert len(called) == 1200 and len(orders) == math.factorial(4) and all(len(set(order)) == 4 for order in orders)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8),
                                   torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8),
                                   torch.zeros(2, 3, 8, 8, dtype=torch.int64),
                                   torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), np.zeros((3, 8, 8), np.uint8),
                                   "image.png", None],
                         ids=lambda w: f"{getattr(w, 'dtype', w)} {tuple(getattr(w, 'shape', ()))}")
def test_transform_refuses_anything_but_an_image_or_a_uint8_batch(wrong):
    with pytest.raises(InputError, match="uint8"):
        MultiCropTransform()(wrong)


# The dataset of crops

def test_dataset_returns_the_crops_of_one_image_or_of_many(images):
    crops = MultiCropDataset(images, MultiCropTransform(32, 16, 2, 3))
    assert len(crops) == 8
    assert [tuple(view.shape) for view in crops[0]] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    for indices in ([6, 1, 1], torch.tensor([6, 1, 1])):
        shapes = [tuple(view.shape) for view in crops.__getitems__(indices)]
        assert shapes == [(3, 3, 32, 32)] * 2 + [(3, 3, 16, 16)] * 3
    assert len(list(iter(crops))) == 8


def test_dataset_crops_the_images_asked_for():
    levels = (torch.arange(8) * 30).byte()
    crops = MultiCropDataset(levels.view(8, 1, 1, 1).expand(8, 3, 32, 32), MultiCropTransform(8, 8, 1, 1, **STILL, **PLAIN))
    for view in crops.__getitems__([6, 1, 3]):
        assert torch.allclose(view.mean((1, 2, 3)) * 255, levels[[6, 1, 3]].float(), atol=1e-3)
    assert torch.allclose(crops[5][1] * 255, torch.tensor(150.0), atol=1e-3)


@pytest.mark.parametrize("kind", ["pairs", "images", "labeled tensors", "tensor"])
def test_dataset_takes_pil_images_pairs_and_tensors(kind, images):
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    given = {"pairs": [(p, 1) for p in pil], "images": pil,
             "labeled tensors": (images, torch.arange(8)), "tensor": images}[kind]
    assert torch.equal(MultiCropDataset(given, MultiCropTransform()).images, images)


@pytest.mark.parametrize("local_size", [32, 16])
def test_dataset_works_in_a_data_loader(local_size, images):
    crops = MultiCropDataset(images, MultiCropTransform(32, local_size, 2, 1))
    loader = torch.utils.data.DataLoader(
        crops, batch_size=3, shuffle=True, drop_last=True, collate_fn=lambda views: views)
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    for views in batches:
        assert [len(view) for view in views] == [3, 3, 3] and views[2].shape[-1] == local_size
