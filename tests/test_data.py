"""The data: built-in shapes, archives, folders, CIFAR with and without a network, your own data."""

import json
import socket
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from filelock import FileLock, Timeout
from PIL import Image

import dinov2_cifar
from dinov2_cifar import (
    Config,
    Images,
    InputError,
    as_images,
    channel_mean_std,
    load_images,
    make_shapes,
    prepare_images,
    train_dinov2,
)


def prepare(dataset=None, **settings):
    return prepare_images(Config(**{**SMALL, "BATCH_SIZE": 2, **settings}), dataset)


def noise(count, height=32, width=32, seed=0):
    """Return uint8 (count,height,width,3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def to_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def expect_error(*words, **settings):
    """Check that these settings' images raise an InputError of one line with these words."""
    with pytest.raises(InputError) as caught:
        prepare(**settings)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


# The built-in shapes


@pytest.fixture(scope="module")
def built_in():
    return load_images(Config(**{**SMALL, "IMAGE_SIZE": 16}))


def test_shapes_are_2048_and_512_images_of_ten_balanced_classes(built_in):
    train_images, train_labels, test_images, test_labels, name = built_in
    assert train_images.shape == (2048, 3, 16, 16) and test_images.shape == (512, 3, 16, 16)
    assert [part.dtype for part in built_in[:4]] == [torch.uint8, torch.int64] * 2
    assert name == "shapes"
    for labels in (train_labels, test_labels):
        counts = labels.bincount()
        assert len(counts) == 10 and counts.max() - counts.min() <= 1
        assert len(labels[:100].unique()) == 10  # not sorted by class
    train, test = ({image.numpy().tobytes() for image in part} for part in built_in[:4:2])
    assert not train & test


def test_shapes_follow_from_their_seed_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    one, two, other = make_shapes(20, 16, 5), make_shapes(20, 16, 5), make_shapes(20, 16, 6)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_shapes_masks_are_where_the_shapes_are():
    """Pixels within a mask have one color, up to noise; within the mirrored mask they have not."""
    images, _, masks = make_shapes(100, 32, seed=3, masks=True)
    assert torch.equal(images, make_shapes(100, 32, seed=3)[0])
    assert masks.shape == (100, 32, 32) and masks.dtype == torch.bool

    def deviation(image, mask):
        pixels = image[:, mask].float()
        return (pixels - pixels.median(1, keepdim=True).values).abs().mean()

    inside, mirrored = (
        torch.stack(list(map(deviation, images, where))) for where in (masks, masks.flip(2))
    )
    assert inside.median() < 15 < mirrored.median()  # of 255


COLORS = {
    "mean": lambda x: x.mean((2, 3)),
    "border": lambda x: torch.cat(
        [side.mean(2) for side in (x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1])], 1
    ),
    "lightest": lambda x: x.flatten(2).quantile(0.97, 2),
}


def variance_ratio(features, labels):
    """Return each column's F statistic: variance between classes over that within; 1 by chance."""
    means = torch.stack([features[labels == c].mean(0) for c in range(10)])
    between = (labels.bincount().view(-1, 1) * (means - features.mean(0)) ** 2).sum(0) / 9
    return between / (((features - means[labels]) ** 2).sum(0) / (len(features) - 10))


@pytest.mark.parametrize("name", COLORS)
def test_colors_carry_no_label(name, built_in):
    """By chance F(9, 2038) exceeds 3.8 once in 10,000; 4 gray levels more per class would show."""
    images, labels = built_in.train_images.double(), built_in.train_labels
    assert variance_ratio(COLORS[name](images), labels).max() < 3.8
    biased = images + 4 * labels.view(-1, 1, 1, 1)
    assert variance_ratio(COLORS[name](biased), labels).min() > 3.8


@pytest.mark.parametrize("name", COLORS)
def test_the_nearest_mean_color_guesses_at_chance(name, built_in):
    train, test = (COLORS[name](images.float()) for images in built_in[:4:2])
    means = torch.stack([train[built_in.train_labels == c].mean(0) for c in range(10)])
    correct = torch.cdist(test, means).argmin(1) == built_in.test_labels
    assert correct.float().mean() < 0.155  # 0.10 and four standard deviations of 512 guesses


def test_shapes_can_be_told_apart_by_their_pixels(built_in):
    """The nearest neighbor in normalized gray beats chance by ten standard deviations."""

    def contrast(images):
        gray = images.float().mean(1).flatten(1)
        return F.normalize(gray - gray.mean(1, keepdim=True), dim=1)

    nearest = (contrast(built_in.test_images) @ contrast(built_in.train_images).T).argmax(1)
    correct = built_in.train_labels[nearest] == built_in.test_labels
    assert correct.float().mean() > 0.23


# Archives


def npz(path, **changed):
    parts = {"x_train": noise(6), "y_train": np.arange(6)}
    parts |= {"x_test": noise(4, seed=1), "y_test": np.arange(4), **changed}
    np.savez(path, **{key: value for key, value in parts.items() if value is not None})
    return str(path)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_an_archive_is_loaded(tmp_path, kind):
    images = prepare(DATASET=npz(tmp_path / "mine.npz", y_train=np.arange(6).astype(kind)))
    assert torch.equal(images.train_images, to_tensor(noise(6)))
    assert torch.equal(images.test_images, to_tensor(noise(4, seed=1)))
    assert torch.equal(images.train_labels, torch.arange(6))
    assert torch.equal(images.test_labels, torch.arange(4))
    assert images.name == "mine.npz"


def test_an_archive_s_images_are_resized(tmp_path):
    path = npz(tmp_path / "a.npz", x_train=noise(6, 50, 40), x_test=noise(4, 20, 64))
    images = prepare(DATASET=path)
    assert images.train_images.shape == (6, 3, 32, 32)
    assert images.test_images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(y_test=None), "wrong.npz y_test"),
        (dict(x_train=None), "wrong.npz x_train"),
        (dict(x_train=noise(6).astype(np.float32)), "wrong.npz float32 uint8"),
        (dict(x_train=noise(6).transpose(0, 3, 1, 2)), "wrong.npz (6, 32, 3, 32)"),
        (dict(x_test=noise(4)[..., 0]), "wrong.npz"),
        (dict(x_test=noise(0), y_test=np.arange(0)), "(N,3,H,W) N > 0"),
        (dict(y_train=np.arange(6.0)), "labels 6 integers"),
        (dict(y_train=np.arange(5)), "labels 6 integers"),
        (dict(y_train=np.arange(6)[:, None]), "labels 6 integers"),
        (dict(y_train=np.array([0, 1, 2, 3, 4, -1])), "labels 6 integers"),
        (dict(y_train=np.array(["a"] * 6)), "wrong.npz"),
        (dict(y_train=np.array([{}] * 6, object)), "wrong.npz pickle"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else v,
)
def test_a_wrong_archive_is_refused(tmp_path, changed, words):
    expect_error(*words.split(), DATASET=npz(tmp_path / "wrong.npz", **changed))


# Folders


def save(path, pixels, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)


def save_noise(folder, count=2):
    for n in range(count):
        save(folder / f"{n}.png", noise(1, seed=n)[0])


def test_a_folder_of_classes_is_loaded_with_its_labels(tmp_path):
    levels = {}  # of gray, which say what became of a file
    places = [("train", "dog"), ("train", "cat"), ("test", "cat"), ("test", "eel")]
    for i, (split, name) in enumerate([*places, ("train", "cat/deeper")]):
        for n in range(2):
            level = levels[split, name, n] = 20 * i + 5 * n
            save(tmp_path / "pets" / split / name / f"{n}.PNG", Image.new("L", (32, 32), level))
    images = prepare(DATASET=str(tmp_path / "pets"))
    assert images.name == "pets"
    for split, x, y in (("train", *images[:2]), ("test", *images[2:4])):
        classes = ["cat", "dog", "eel"]
        expected = {v: classes.index(k[1][:3]) for k, v in levels.items() if k[0] == split}
        assert len(x) == len(expected)
        assert dict(zip(x[:, 0, 0, 0].tolist(), y.tolist(), strict=True)) == expected


@pytest.mark.parametrize("where", ["", "train", "deep/er"])
def test_loose_images_have_no_labels(tmp_path, where):
    save_noise(tmp_path / where, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = prepare(DATASET=str(tmp_path))
    assert images.train_images.shape == (3, 3, 32, 32) and images[1:4] == (None, None, None)


def test_training_classes_without_test_images_are_labeled(tmp_path):
    for name in "ab":
        save_noise(tmp_path / "train" / name, 1)
    images = prepare(DATASET=str(tmp_path))
    assert images.train_labels.tolist() == [0, 1] and images.test_images is None


def test_links_are_followed(tmp_path):
    save_noise(tmp_path / "elsewhere" / "class", 3)
    save_noise(tmp_path / "photos", 2)
    (tmp_path / "photos" / "file.png").symlink_to(tmp_path / "elsewhere" / "class" / "2.png")
    (tmp_path / "photos" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "lost.png").symlink_to("nowhere.png")
    with pytest.warns(UserWarning, match=r"^1 files are left out.*lost\.png"):
        assert len(prepare(DATASET=str(tmp_path / "photos")).train_images) == 2 + 1 + 3


def flat(color, mode):
    return Image.new(mode, (32, 32), color)


def with_palette():
    image = flat(7, "P")
    image.putpalette([0] * 21 + [10, 200, 30] + [0] * 744)
    return image


MODES = {
    "L": (flat(77, "L"), [77, 77, 77]),
    "LA": (flat((77, 255), "LA"), [77, 77, 77]),
    "1": (flat(1, "1"), [255, 255, 255]),
    "RGBA": (flat((10, 200, 30, 255), "RGBA"), [10, 200, 30]),
    "P": (with_palette(), [10, 200, 30]),
    "CMYK": (flat((255, 0, 0, 0), "CMYK"), [0, 255, 255]),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_becomes_its_rgb(tmp_path, mode):
    image, expected = MODES[mode]
    for n in range(2):
        save(tmp_path / f"{n}.tif", image, None)
    images = prepare(DATASET=str(tmp_path)).train_images
    assert images.shape == (2, 3, 32, 32)
    assert images[0].flatten(1).unique(dim=1).flatten().tolist() == expected


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_than_8_bits_is_refused(tmp_path, kind):
    """Pillow would clip it at 255."""
    deep = Image.fromarray(np.linspace(0, 60_000, 32 * 32).reshape(32, 32).astype(kind))
    save_noise(tmp_path)
    save(tmp_path / "deep.tif", deep, None)
    with pytest.warns(UserWarning, match=r"^1 files are left out.*deep\.tif.*8 bits"):
        assert len(prepare(DATASET=str(tmp_path)).train_images) == 2
    with pytest.raises(InputError, match="8 bits"):
        as_images([deep, deep])


@pytest.mark.parametrize(
    "orientation, corner", [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0))]
)
def test_a_camera_s_orientation_is_followed(tmp_path, orientation, corner):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16] = 255  # the top left quarter of the stored image is light
    exif = Image.Exif()
    exif[0x0112] = orientation
    for n in range(2):
        save(tmp_path / f"{n}.png", pixels, exif=exif)
    image = prepare(DATASET=str(tmp_path)).train_images[0].float()
    quarters = F.avg_pool2d(image, 16)[0]
    assert divmod(int(quarters.argmax()), 2) == corner
    assert quarters.max() == 255 and quarters.sum() == 255


@pytest.mark.parametrize("height, width", [(96, 64), (40, 90), (8, 8), (32, 33)])
def test_images_of_other_sizes_are_resized_and_center_cropped(tmp_path, height, width):
    pixels = np.zeros((height, width, 3), np.uint8)
    top, bottom, left, right = 3 * height // 8, 5 * height // 8, 3 * width // 8, 5 * width // 8
    pixels[top:bottom, left:right] = 255
    for n in range(2):
        save(tmp_path / f"{n}.png", pixels)
    from_file = prepare(DATASET=str(tmp_path)).train_images[0].float()
    from_tensor = prepare(to_tensor(np.stack([pixels] * 2))).train_images[0].float()
    for image in (from_file, from_tensor):
        assert image.shape == (3, 32, 32)
        assert image[:, 15:17, 15:17].mean() > 240
        assert image[:, [0, 0, -1, -1], [0, -1, 0, -1]].max() < 10
    assert (from_file - from_tensor).abs().mean() < 16  # the crops may differ by a pixel


def test_files_that_cannot_be_read_are_left_out_with_one_warning(tmp_path):
    save_noise(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("no image, and not counted")
    (tmp_path / "z.png").write_bytes(b"")
    with pytest.warns() as caught:
        images = prepare(DATASET=str(tmp_path))
    assert len(images.train_images) == 3 and len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("3 files are left out") and "0.png" not in message
    assert "broken.png" in message and "cut.png" in message


@pytest.mark.parametrize("make", ["nothing", "texts", "broken", "empty train"])
def test_a_folder_without_an_image_is_refused(tmp_path, make):
    folder = tmp_path / "bare"
    (folder / "train" if make == "empty train" else folder).mkdir(parents=True)
    if make in ("texts", "broken"):
        (folder / f"a.{'txt' if make == 'texts' else 'png'}").write_text("no image")
    expect_error("bare", "no readable image", DATASET=str(folder))


def test_a_path_that_is_no_dataset_is_refused(tmp_path):
    expect_error("nowhere", "cifar10", "shapes", DATASET=str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("")
    expect_error("notes.txt", ".npz", "folder", DATASET=str(tmp_path / "notes.txt"))


# CIFAR


class FakeCifar:
    """What load_cifar needs of torchvision's classes: arrays, once they are downloaded."""

    filename, error, calls, there = "cifar-python.tar.gz", None, [], False

    def __init__(self, root, train=True, download=False):
        self.calls.append((root, train, download))
        if not download and not self.there:
            raise RuntimeError("Dataset not found or corrupted")
        if self.error is not None:
            raise self.error
        type(self).there = True
        count = 6 if train else 4
        self.data, self.targets = noise(count, seed=int(train)), list(range(count))


@pytest.fixture
def cifar(monkeypatch):
    fake = type("Fake", (FakeCifar,), {"calls": []})
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(dinov2_cifar.datasets, name, fake)
    return fake


@pytest.mark.parametrize(
    "dataset, name", [("cifar10", "cifar10"), ("cifar100", "cifar100"), ("auto", "cifar10")]
)
def test_cifar_is_loaded_or_downloaded(cifar, dataset, name, capsys, tmp_path):
    root = str(tmp_path / "to be made" / "data")
    images = prepare(DATASET=dataset, DATA_PATH=root)
    assert torch.equal(images.train_images, to_tensor(noise(6, seed=1)))
    assert torch.equal(images.test_images, to_tensor(noise(4, seed=0)))
    assert images.train_labels.tolist() == list(range(6))
    assert images.test_labels.tolist() == list(range(4))
    assert images.name == name and capsys.readouterr().err == ""
    assert cifar.calls == [(root, True, False), (root, True, True), (root, False, True)]
    (tmp_path / "to be made" / "data" / ".lock").unlink()
    prepare(DATASET=dataset, DATA_PATH=root)  # also from a folder that cannot be written to
    assert cifar.calls[3:] == [(root, True, False), (root, False, False)]
    assert not list((tmp_path / "to be made" / "data").iterdir())


def test_one_process_downloads_cifar_at_a_time_and_does_not_wait_forever(
    cifar, tmp_path, monkeypatch
):
    limits, before, load = [], socket.getdefaulttimeout(), cifar.__init__

    def downloading(*args, **options):
        limits.append(socket.getdefaulttimeout())
        if options:
            with pytest.raises(Timeout):
                FileLock(tmp_path / ".lock").acquire(timeout=0)
        load(*args, **options)

    monkeypatch.setattr(cifar, "__init__", downloading)
    prepare(DATASET="cifar10", DATA_PATH=str(tmp_path))
    cifar.error = OSError("timed out")
    expect_error("timed out", DATASET="cifar10", DATA_PATH=str(tmp_path))
    assert len(limits) == 4 and all(0 < limit <= 60 for limit in limits)
    assert socket.getdefaulttimeout() == before
    with FileLock(tmp_path / ".lock").acquire(timeout=0):
        pass


NETWORK = [URLError("no route"), OSError("disk full"), TimeoutError("timed out"), RuntimeError()]


@pytest.mark.parametrize("error", NETWORK, ids=lambda e: type(e).__name__)
def test_without_a_network_cifar_is_refused_with_the_remedy(cifar, error, tmp_path):
    cifar.error, root = error, str(tmp_path / "elsewhere")
    reason = str(error) or type(error).__name__
    for name in ("cifar10", "cifar100"):
        words = name, reason, "DATA_PATH", "elsewhere", cifar.filename
        expect_error(*words, DATASET=name, DATA_PATH=root)


@pytest.mark.parametrize("error", NETWORK, ids=lambda e: type(e).__name__)
def test_without_a_network_auto_is_the_shapes_with_a_prominent_warning(
    cifar, error, capsys, tmp_path
):
    cifar.error = error
    images = prepare(DATASET="auto", DATA_PATH=str(tmp_path), IMAGE_SIZE=8, TRAIN_IMAGES=8)
    out, err = capsys.readouterr()
    assert all(words in err for words in ("WARNING", "SHAPES", "!" * 80)) and out == "loading auto ...\n"
    assert (str(error) or type(error).__name__) in err
    assert "shapes" in images.name and "CIFAR" in images.name and len(images.train_images) == 8


def test_the_fallback_is_recorded_in_the_checkpoint_and_the_metrics(
    cifar, small, capsys, tmp_path, monkeypatch
):
    cifar.error = OSError("no network")
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
    monkeypatch.setattr(dinov2_cifar, "linear_probe", lambda *probe_data: 0.5)
    config = small(DATASET="auto", DATA_PATH=str(tmp_path), TRAIN_IMAGES=8, IMAGE_SIZE=8)
    train_dinov2(config)
    lines = Path(config.OUTPUT_DIR, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    names = [record["data"] for record in records if record["event"] in ("start", "final")]
    checkpoint = torch.load(Path(config.OUTPUT_DIR, "dinov2_last.pth"), weights_only=True)
    assert names + [checkpoint["data_name"]] == ["shapes (no CIFAR-10)"] * 3
    assert "fallback" in capsys.readouterr().out


# What is prepared for training


def test_a_subset_is_random_fixed_and_keeps_its_labels():
    count = 40
    levels = torch.arange(count, dtype=torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(count, 3, 32, 32)
    dataset = (images, torch.arange(count) * 2, images, torch.arange(count))
    subsets = [prepare(dataset, TRAIN_IMAGES=10, SEED=seed) for seed in (0, 1)]
    chosen = subsets[0].train_images[:, 0, 0, 0].long()
    assert len(chosen.unique()) == 10 and chosen.max() > 20
    assert chosen.tolist() != list(range(10))
    for subset in subsets:  # whatever the seed, so that runs can be compared
        assert torch.equal(subset.train_labels, chosen * 2)
        assert len(subset.test_images) == count
    for everything in (0, count, count + 1):
        assert torch.equal(prepare(images, TRAIN_IMAGES=everything).train_images, images)


@pytest.mark.parametrize(
    "settings, available",
    [(dict(BATCH_SIZE=9), 8), (dict(BATCH_SIZE=5, TRAIN_IMAGES=4), 4)],
    ids=str,
)
def test_a_batch_of_more_images_than_there_are_is_refused(settings, available, shapes):
    words = f"BATCH_SIZE ({settings['BATCH_SIZE']})", f"there are {available}"
    expect_error(*words, dataset=shapes[0][:8], **settings)


def test_shapes_of_any_size_up_to_64_can_be_made():
    assert load_images(Config(**{**SMALL, "IMAGE_SIZE": 8})).train_images.shape[-2:] == (8, 8)
    expect_error("IMAGE_SIZE (128)", "64", IMAGE_SIZE=128)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_any_dataset_is_resized_to_the_image_size(size, shapes):
    images = prepare(shapes, IMAGE_SIZE=size)
    assert images.train_images.shape == (64, 3, size, size)
    assert images.test_images.shape == (32, 3, size, size)
    means = [part.float().mean((2, 3)) for part in (images.train_images, shapes[0])]
    assert (means[0] - means[1]).abs().max() < 3  # of 255: what they show stays


def test_large_tensors_are_resized_in_parts_like_small_ones():
    images = to_tensor(noise(1030, 10, 12))
    resized = prepare(images, IMAGE_SIZE=8).train_images
    for part in (slice(0, 3), slice(1022, 1030)):
        assert torch.equal(resized[part], prepare(images[part], IMAGE_SIZE=8).train_images)


def test_prepared_images_and_labels_are_on_the_device(device, shapes):
    images = prepare(shapes, DEVICE=device)
    assert {part.device.type for part in images[:4]} == {device}
    assert torch.equal(images.train_labels.cpu(), shapes[1])


def test_channel_mean_std_are_torch_s(device):
    images = to_tensor(noise(20, 9, 7) // np.array([1, 2, 4], np.uint8))
    mean, std = channel_mean_std(images.to(device))
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_the_std_of_one_color_is_not_zero():
    mean, std = channel_mean_std(torch.full((4, 3, 8, 8), 51, dtype=torch.uint8))
    assert mean == pytest.approx([0.2] * 3) and min(std) > 0


# Your own data


def pil(images):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def test_tensors_tuples_and_lists_become_images(shapes):
    shapes = tuple(part[:6] for part in shapes)
    x, y = shapes[:2]
    assert as_images(x)[:4] == (x, None, None, None)
    assert as_images((x, y))[:4] == (x, y, None, None)
    assert as_images(shapes)[:4] == shapes
    assert as_images(Images(x, name="mine")).name == "mine"
    for dataset in (pil(x), list(x)):
        images = as_images(dataset)
        assert torch.equal(images.train_images, x) and images.train_labels is None
    images = as_images(list(zip(pil(x), y.tolist(), strict=True)))
    assert torch.equal(images.train_images, x) and torch.equal(images.train_labels, y)


def test_a_torchvision_dataset_becomes_images(shapes):
    class Dataset:  # a map-style dataset: len and [i], nothing else
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return pil(shapes[0][i : i + 1])[0].resize((40, 36)), int(shapes[1][i])

    images = as_images(Dataset(), size=32)
    assert images.train_images.shape == (6, 3, 32, 32)
    assert torch.equal(images.train_labels, shapes[1][:6])


def test_pil_images_of_different_sizes_become_one_tensor_at_the_image_size():
    images = [Image.new("RGB", size, (9, 9, 9)) for size in ((40, 30), (32, 32), (8, 100))]
    assert prepare(images).train_images.shape == (3, 3, 32, 32)


BAD_DATASETS = {
    "empty list": lambda x, y: [],
    "empty tensor": lambda x, y: x[:0],
    "floats": lambda x, y: x / 255,
    "channels last": lambda x, y: x.permute(0, 2, 3, 1),
    "one image": lambda x, y: x[0],
    "an array": lambda x, y: x.numpy(),
    "paths": lambda x, y: ["a.png", "b.png"],
    "a number": lambda x, y: 5,
    "a generator": lambda x, y: (image for image in x),
    "a dict": lambda x, y: {"images": x},
    "words as labels": lambda x, y: [(image, "cat") for image in pil(x)],
    "an image of no pixels": lambda x, y: [Image.new("RGB", (side, side)) for side in (0, 32)],
    "three parts": lambda x, y: (x, y, x),
    "too few labels": lambda x, y: (x, y[:3]),
    "float labels": lambda x, y: (x, y / 2),
    "labels of shape (N,1)": lambda x, y: (x, y[:, None]),
    "labels as a list of lists": lambda x, y: (x, y[:, None].tolist()),
    "labels as an array (N,1)": lambda x, y: (x, y[:, None].numpy()),
    "labels first": lambda x, y: (y, x),
    "no test images": lambda x, y: (x, y, x[:0], y[:0]),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_a_dataset_that_cannot_be_used_is_refused_before_any_long_work(
    name, small, shapes, monkeypatch
):
    monkeypatch.setattr(dinov2_cifar, "make_model", lambda *args: pytest.fail("built a network"))
    with pytest.raises(InputError):
        train_dinov2(small(), dataset=BAD_DATASETS[name](*shapes[:2]))


INTEGERS = [torch.uint8, torch.uint16, torch.uint64, torch.int8, torch.int16, torch.int32]
INTEGERS += [torch.int64, torch.bool]


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_labels_of_any_integer_type_are_accepted(kind, shapes):
    labels = shapes[1].clamp(max=1)
    assert torch.equal(as_images((shapes[0], labels.to(kind))).train_labels, labels)


def test_settings_in_a_dict_are_refused_with_the_remedy():
    with pytest.raises(InputError, match="must be a Config, not dict"):
        train_dinov2({"TOTAL_EPOCHS": 1})
