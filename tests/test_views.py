"""Views: image operations against torchvision's, and random crops of single images and batches."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import close
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import dinov2_cifar
from dinov2_cifar import Config, InputError, MultiCropDataset, MultiCropTransform, make_shapes

OFF = {"FLIP": False, "COLOR_JITTER_PROB": 0.0, "GRAYSCALE_PROB": 0.0}  # a crop and nothing else
WHOLE = {**OFF, "GLOBAL_CROPS_SCALE": (1.0, 1.0)}  # of a square image, the image itself


def make_transform(sizes=(32, 16, 2, 3), mean=(0, 0, 0), std=(1, 1, 1), **settings):
    """sizes: global and local size, global and local crops."""
    return MultiCropTransform(*sizes, Config(**settings), mean, std)


def views_of(images, *args, seed=0, **options):
    torch.manual_seed(seed)
    return make_transform(*args, **options)(images)


def one_crop_of(images, size=32, **settings):
    return views_of(images, (size, size, 1, 0), **settings)[0]


def colorful(count, height, width, device="cpu"):
    """Return random images with some gray, black, white and primary pixels, the corners of hue."""
    images = torch.rand(count, 3, height, width)
    corners = [[0, 0, 0], [1, 1, 1], [0.5] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.7, 0.7]]
    images[:, :, 0, : len(corners)] = torch.tensor(corners).T
    return images.to(device)


@pytest.fixture(scope="module")
def images():
    return make_shapes(8, 32, seed=3)[0]


# Operations


def test_adjust_hue_equals_torchvision(device):
    x, shifts = colorful(4, 9, 13, device), [-0.5, -0.08, 0.0, 0.31]
    expected = [TF.adjust_hue(image, shift) for image, shift in zip(x, shifts, strict=True)]
    shifts = torch.tensor(shifts, device=device).view(-1, 1, 1, 1)
    close(dinov2_cifar.adjust_hue(x, shifts), torch.stack(expected))


def test_adjust_colors_equals_torchvision_in_every_order(device):
    """Quarter i of the images changes its hue after i other adjustments, of which there are 6."""
    x, order = colorful(24, 9, 13, device), torch.tensor([*permutations(range(3))] * 4)
    changes = torch.rand(4, 24) - 0.5
    changes[:, 3] = 0
    changes[:3, 4] = -2  # a factor below 0
    names, expected = ("brightness", "contrast", "saturation", "hue"), []
    for i, image in enumerate(x):
        kinds = order[i].tolist()
        for kind in [*kinds[: i // 6], 3, *kinds[i // 6 :]]:
            value = float(changes[kind, i] if kind == 3 else max(0, 1 + changes[kind, i]))
            image = getattr(TF, f"adjust_{names[kind]}")(image, value)
        expected.append(image)
    # The last i // 6 come first
    order = torch.stack([o.roll(-(i // 6)) for i, o in enumerate(order)], 1).view(3, 24, 1, 1, 1)
    changes = changes.view(4, 24, 1, 1, 1)
    found = dinov2_cifar.adjust_colors(x.clone(), changes.to(device), order.to(device))
    close(found, torch.stack(expected))
    close(found[3], x[3])


@pytest.mark.parametrize("scale", [(0.02, 0.2), (0.3, 1.0)], ids=str)
@pytest.mark.parametrize("shape, size", [((32, 32), 32), ((37, 29), 8), ((20, 64), 48)], ids=str)
def test_resized_crop_equals_torchvision(shape, size, scale, device):
    x, flip = colorful(4, *shape, device), torch.arange(8, device=device) % 3 == 1
    boxes = dinov2_cifar.random_crop_boxes(8, *shape, scale, device)
    expected = []
    for image, flipped, *box in zip([*x, *x], flip, *boxes, strict=True):
        crop = TF.resized_crop(image, *map(int, box), [size, size], TF.InterpolationMode.BICUBIC)
        expected.append((TF.hflip(crop) if flipped else crop).clamp(0, 1))
    close(dinov2_cifar.resized_crop(x, *boxes, flip, size), torch.stack(expected))


def kolmogorov_smirnov(a, b):
    """Return the largest difference of two samples' distribution functions."""
    values = torch.cat([a, b])
    cdf = [torch.searchsorted(x.sort().values, values, right=True) / len(x) for x in (a, b)]
    return float((cdf[0] - cdf[1]).abs().max())


@pytest.mark.parametrize("height, width", [(32, 32), (90, 48), (20, 61)])
@pytest.mark.parametrize("scale", [(0.05, 0.3), (0.4, 1.0)], ids=str)
def test_crop_boxes_are_distributed_as_torchvision_draws_them(height, width, scale):
    n, image = 4000, torch.empty(3, height, width)
    boxes = dinov2_cifar.random_crop_boxes(n, height, width, scale, "cpu")
    draws = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]
    statistics = []
    for top, left, h, w in (boxes, torch.tensor(draws).float().T):
        bottom, right = top + h, left + w
        assert min(top.min(), left.min()) >= 0 and bottom.max() <= height and right.max() <= width
        statistics.append([top, left, h, w, bottom, right, h * w, w / h, top - left])
    assert all(torch.equal(x, x.round()) for x in boxes)
    for ours, theirs in zip(*statistics, strict=True):
        assert kolmogorov_smirnov(ours, theirs) < 1.95 * math.sqrt(2 / n)  # 0.1 % by chance


@pytest.mark.parametrize("height, width", [(12, 100), (100, 12), (32, 32)])
def test_crop_boxes_where_none_fits_are_torchvisions_central_ones(height, width):
    boxes = dinov2_cifar.random_crop_boxes(3, height, width, (1.0, 1.0), "cpu")
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), (1, 1), (3 / 4, 4 / 3))
    assert torch.stack(boxes, 1).tolist() == [list(theirs)] * 3


# Views of single images and of batches


def test_transform_returns_global_then_local_crops_of_their_scale():
    """Channels rise to the right and downwards: their range is what is seen of the image."""
    ramp = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    x = torch.stack([ramp, ramp.T, ramp]).expand(16, -1, -1, -1)
    scales = {"GLOBAL_CROPS_SCALE": (0.5, 0.6), "LOCAL_CROPS_SCALE": (0.1, 0.2)}
    views = views_of(x, **OFF, **scales)
    assert [view.shape[1:] for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    for view, (low, high) in zip(views, [(0.5, 0.6)] * 2 + [(0.1, 0.2)] * 3, strict=True):
        side = view.shape[-1]
        seen = (view.amax((2, 3)) - view.amin((2, 3)))[:, :2] * side / (side - 1)
        assert low - 0.02 < seen.prod(1).min() and seen.prod(1).max() < high + 0.02


@pytest.mark.parametrize("height, width", [(32, 32), (20, 50)])
def test_transform_gives_image_tensor_and_batch_the_same_views(height, width):
    x = (255 * colorful(1, height, width)).byte()
    batch = views_of(x)
    for image in (x[0], Image.fromarray(x[0].permute(1, 2, 0).numpy())):
        views = views_of(image)
        assert isinstance(views, list) and {view.dtype for view in views} == {torch.float32}
        assert all(torch.equal(view, one[0]) for view, one in zip(views, batch, strict=True))


def test_transform_returns_normalized_pixels_on_their_device(device, images):
    close(one_crop_of(images.to(device), **WHOLE), images / 255)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    plain, normalized = views_of(images.to(device)), views_of(images.to(device), mean=mean, std=std)
    for x, y in zip(plain, normalized, strict=True):
        assert y.device.type == device and 0 <= x.min() and x.max() <= 1
        close(y.cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1), x)


def test_transform_treats_each_image_on_its_own(images):
    changed = images.clone()
    changed[5] = 255 - changed[5]
    others = torch.arange(8) != 5
    for before, after in zip(views_of(images), views_of(changed), strict=True):
        assert torch.equal(before[others], after[others])
        assert not torch.allclose(before[5], after[5], atol=0.1)


JITTERS = [tuple(0.4 * (i == j) for j in range(4)) for i in range(4)]  # of one kind each
RANDOM = [({"GLOBAL_CROPS_SCALE": (0.2, 0.9)}, 16), ({"FLIP": True}, 2)]
RANDOM += [({"GRAYSCALE_PROB": 0.5}, 2), ({"COLOR_JITTER_PROB": 0.5}, 8)]
RANDOM += [({"COLOR_JITTER": jitter, "COLOR_JITTER_PROB": 1.0}, 16) for jitter in JITTERS]


@pytest.mark.parametrize("settings, kinds", RANDOM, ids=str)
def test_transform_draws_anew_for_each_image(settings, kinds, images):
    crops = one_crop_of(images[:1].expand(16, -1, -1, -1), **{**WHOLE, **settings})
    assert abs(len(crops.unique(dim=0)) - kinds) <= (4 if kinds == 8 else 0)


def test_transform_draws_anew_for_each_view_and_seed(images):
    one, two, other = (views_of(images[0], (32, 32, 2, 3), seed=seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, two))
    assert len(torch.stack(one + other).unique(dim=0)) == 10


FRACTIONS = [({"FLIP": True}, 0.5, TF.hflip), ({"COLOR_JITTER_PROB": 0.8}, 0.8, None)]
FRACTIONS += [({"GRAYSCALE_PROB": p}, p, TF.rgb_to_grayscale) for p in (0.2, 1.0)]
FRACTIONS += [({"COLOR_JITTER_PROB": 1.0}, 1.0, None)]
FRACTIONS += [({"COLOR_JITTER_PROB": 1.0, "COLOR_JITTER": (0.0,) * 4}, 0.0, None)]


@pytest.mark.parametrize("settings, fraction, operation", FRACTIONS, ids=str)
def test_transform_changes_the_fraction_of_its_setting(settings, fraction, operation):
    image = (255 * colorful(1, 8, 8)).byte()
    crops = one_crop_of(image.expand(2000, -1, -1, -1), 8, **{**WHOLE, **settings})
    changed = (crops - image / 255).abs().amax((1, 2, 3)) > 1e-4
    # Four and a half standard deviations of 2,000 coins; ends are exact
    assert abs(changed.float().mean() - fraction) <= 0.05 * (fraction % 1 > 0)
    if operation:
        close(crops[changed], operation(image / 255).expand_as(crops[changed]), 1e-4)


def test_transform_draws_changes_from_their_ranges_and_every_order(monkeypatch):
    calls = []
    monkeypatch.setattr(dinov2_cifar, "adjust_colors", lambda *args: calls.append(args) or args[0])
    settings = {"COLOR_JITTER": (1.5, 0.4, 0.2, 0.1), "COLOR_JITTER_PROB": 1.0}
    views_of(torch.zeros(3, 4, 4, dtype=torch.uint8), (2, 2, 500, 0), **settings)
    ((_, changes, order),) = calls
    orders = order.flatten(1).T.unique(dim=0)
    assert orders.tolist() == sorted(map(list, permutations(range(3))))
    for values, limit in zip(changes, settings["COLOR_JITTER"], strict=True):
        close(torch.stack([values.min(), values.max()]) / limit, [-1, 1], 0.02)
        assert values.abs().max() <= limit


@pytest.mark.parametrize("batch", [1, 3])
def test_transform_shuffles_views_into_the_quarters_of_color_jitter(batch, monkeypatch):
    """Also where the views are no multiple of four: each is in each quarter by chance."""

    def mark(x, changes, order):
        return torch.arange(len(x)).div(len(x) // 4, rounding_mode="floor").view(-1, 1, 1, 1) / x

    monkeypatch.setattr(dinov2_cifar, "adjust_colors", mark)
    level = torch.tensor([51, 102, 204], dtype=torch.uint8)[:batch]
    transform = make_transform((1, 1, 2, 1), **WHOLE, LOCAL_CROPS_SCALE=(1.0, 1.0))
    views = [transform(level.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)) for _ in range(2000)]
    views = torch.stack([torch.stack(view)[:, :, 0, 0, 0] for view in views])  # (2000,V,B)
    quarters = (views * level / 255).round().long()
    close(views * level / 255, quarters)  # no image is taken for another
    shares = torch.nn.functional.one_hot(quarters, 4).float().mean(0)
    close(shares, torch.full_like(shares, 0.25), 0.045)


SHAPES = [(8, 8, 4), (2, 2, 8, 8), (1, 2, 3, 8, 8), (3, 0, 8)]
WRONG = [torch.zeros(shape, dtype=torch.uint8) for shape in SHAPES]
WRONG += [torch.full((2, 3, 8, 8), -0.1), np.zeros((3, 8, 8), int), "image.png", None]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_transform_refuses_what_is_no_image(wrong):
    with pytest.raises(InputError, match="^images must be|^floats must be in 0..1, not -0.1"):
        MultiCropTransform()(wrong)


# The dataset of views


def test_dataset_views_the_images_asked_for():
    levels = (torch.arange(8) * 30).byte()
    x = levels.view(8, 1, 1, 1).expand(8, 3, 32, 32)
    dataset = MultiCropDataset(x, make_transform((8, 8, 1, 1), **OFF))
    assert len(dataset) == len(list(iter(dataset))) == 8
    close(torch.stack(dataset[5]) * 255, torch.full((2, 3, 8, 8), 150.0), 1e-3)
    for indices in ([6, 1, 1], torch.tensor([6, 1, 1])):
        for view in dataset.__getitems__(indices):
            assert view.shape == (3, 3, 8, 8)
            close(view.mean((1, 2, 3)) * 255, levels[[6, 1, 1]], 1e-3)


def test_dataset_of_labeled_pil_images_works_in_a_data_loader(images):
    pairs = [(Image.fromarray(image.permute(1, 2, 0).numpy()), 1) for image in images]
    dataset = MultiCropDataset(pairs, make_transform((32, 16, 2, 1)))
    assert torch.equal(dataset.images, images)
    options = {"shuffle": True, "drop_last": True, "collate_fn": lambda views: views}
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=3, **options))
    assert len(batches) == 2
    for views in batches:
        assert [tuple(view.shape[::3]) for view in views] == [(3, 32), (3, 32), (3, 16)]
