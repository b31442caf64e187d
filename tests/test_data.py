"""The data: the built-in shapes, archives, folders, CIFAR with and without a network, and what is refused."""

import os
import pickle
import socket
import threading
import time
import warnings
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

import dinov2_cifar
from dinov2_cifar import (Config, InputError, Pictures, as_pictures, load_pictures, load_shapes, make_shapes,
                          pixel_statistics, prepare_pictures, require_memory, train_dinov2)


def prepare(dataset=None, **settings):
    return prepare_pictures(Config(**{**SMALL, "BATCH_SIZE": 2, **settings}), dataset)


def noise(count, height=32, width=32, seed=0):
    """→ uint8 (count, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def refusal(*words, **settings):
    """Loading these settings' pictures must raise an InputError of one line with these words in it."""
    with pytest.raises(InputError) as caught:
        prepare(**settings)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


# The built-in shapes

@pytest.fixture(scope="module")
def built_in():
    return load_shapes(16)


def test_shapes_are_2048_and_512_pictures_of_ten_balanced_classes(built_in):
    train_images, train_labels, test_images, test_labels, name, *masks = built_in
    assert train_images.shape == (2048, 3, 16, 16) and test_images.shape == (512, 3, 16, 16) and name == "shapes"
    assert {t.dtype for t in built_in[:4]} == {torch.uint8, torch.int64}
    assert [(m.shape, m.dtype) for m in masks] == [((2048, 16, 16), torch.bool), ((512, 16, 16), torch.bool)]
    for labels in (train_labels, test_labels):
        counts = labels.bincount()
        assert len(counts) == 10 and counts.max() - counts.min() <= 1
        assert len(labels[:100].unique()) == 10                  # not sorted by class
    assert not {p.numpy().tobytes() for p in train_images} & {p.numpy().tobytes() for p in test_images}


def test_shapes_are_the_same_for_the_same_seed_only():
    torch.manual_seed(1)
    np.random.seed(1)
    one, two, other = make_shapes(20, 16, 5), make_shapes(20, 16, 5), make_shapes(20, 16, 6)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], other[0])


COLOURS = {
    "mean": lambda x: x.mean((2, 3)),
    "border": lambda x: torch.cat([side.mean(2) for side in (x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1])], 1),
    "lightest": lambda x: x.flatten(2).quantile(0.97, 2)}


def variance_ratio(features, labels):
    """F statistic of each column: variance between the ten classes over that within them; 1 on average by chance."""
    means = torch.stack([features[labels == c].mean(0) for c in range(10)])
    between = (labels.bincount().view(-1, 1) * (means - features.mean(0)) ** 2).sum(0) / 9
    return between / (((features - means[labels]) ** 2).sum(0) / (len(features) - 10))


@pytest.mark.parametrize("name", COLOURS)
def test_colours_carry_no_label(name, built_in):
    """By chance F(9, 2038) is above 3.8 once in 10,000; four gray levels of 255 more a class would show."""
    images, labels = built_in.train_images.double(), built_in.train_labels
    assert variance_ratio(COLOURS[name](images), labels).max() < 3.8
    assert variance_ratio(COLOURS[name](images + 4 * labels.view(-1, 1, 1, 1)), labels).min() > 3.8


@pytest.mark.parametrize("name", COLOURS)
def test_the_nearest_mean_colour_guesses_at_chance(name, built_in):
    features, queries = COLOURS[name](built_in.train_images.float()), COLOURS[name](built_in.test_images.float())
    means = torch.stack([features[built_in.train_labels == c].mean(0) for c in range(10)])
    right = torch.cdist(queries, means).argmin(1) == built_in.test_labels
    assert right.float().mean() < 0.155                          # 0.10 and four standard deviations of 512 guesses


def test_shapes_are_told_apart_by_their_pixels(built_in):
    """A class is more than noise: the nearest neighbour in normalised gray beats chance by ten standard deviations."""
    def contrast(images):
        gray = images.float().mean(1).flatten(1)
        return torch.nn.functional.normalize(gray - gray.mean(1, keepdim=True), dim=1)

    nearest = (contrast(built_in.test_images) @ contrast(built_in.train_images).T).argmax(1)
    assert (built_in.train_labels[nearest] == built_in.test_labels).float().mean() > 0.23


# Archives

def npz(path, **changed):
    parts = dict(x_train=noise(6), y_train=np.arange(6), x_test=noise(4, seed=1), y_test=np.arange(4))
    np.savez(path, **{key: value for key, value in {**parts, **changed}.items() if value is not None})
    return str(path)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_an_archive_is_loaded(tmp_path, kind):
    pictures = prepare(DATASET=npz(tmp_path / "mine.npz", y_train=np.arange(6).astype(kind)))
    assert torch.equal(pictures.train_images, torch.from_numpy(noise(6)).permute(0, 3, 1, 2))
    assert torch.equal(pictures.test_images, torch.from_numpy(noise(4, seed=1)).permute(0, 3, 1, 2))
    assert torch.equal(pictures.train_labels, torch.arange(6)) and torch.equal(pictures.test_labels, torch.arange(4))
    assert pictures.name == "mine.npz"


def test_an_archive_s_pictures_are_resized(tmp_path):
    pictures = prepare(DATASET=npz(tmp_path / "a.npz", x_train=noise(6, 50, 40), x_test=noise(4, 20, 64)))
    assert pictures.train_images.shape == (6, 3, 32, 32) and pictures.test_images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("changed, words", [
    (dict(y_test=None), "y_test"), (dict(x_train=None), "x_train"),
    (dict(x_train=noise(6).astype(np.float32)), "x_train float32 uint8"),
    (dict(x_train=noise(6).transpose(0, 3, 1, 2)), "x_train (6, 3, 32, 32)"),
    (dict(x_test=noise(4)[..., 0]), "x_test (4, 32, 32)"),
    (dict(x_test=noise(0), y_test=np.arange(0)), "x_test (0, 32, 32, 3)"),
    (dict(y_train=np.arange(6.0)), "y_train float64 whole"),
    (dict(y_train=np.arange(5)), "y_train (5,) 6"), (dict(y_train=np.eye(6, dtype=int)), "y_train (6, 6)"),
    (dict(y_train=np.array([0, 1, 2, 3, 4, -1])), "y_train"),
    (dict(y_train=np.array(["a"] * 6)), "y_train whole"), (dict(y_train=np.array([{}] * 6, object)), "pickle"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_archive_is_refused_with_the_array_s_name(tmp_path, changed, words):
    refusal("wrong.npz", *words.split(), DATASET=npz(tmp_path / "wrong.npz", **changed))


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_a_pickle_in_an_archive_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    path = npz(tmp_path / "evil.npz", x_train=np.array([Payload()], object))
    refusal("evil.npz", DATASET=path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", pickle.dumps(Payload()))
    refusal("evil.npz", DATASET=path)
    assert not (tmp_path / "executed").exists()


def damage_text(path):
    path.write_text("not a zip")


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 255
    path.write_bytes(content)


def damage_compressed(path):
    np.savez_compressed(path, x_train=noise(6) // 64, y_train=np.arange(6), x_test=noise(4), y_test=np.arange(4))
    content = bytearray(path.read_bytes())
    content[300:320] = b"\xff" * 20
    path.write_bytes(content)


def damage_empty_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", b"")


def damage_raw_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(key, b"hello")


@pytest.mark.parametrize("damage", [damage_text, damage_cut, damage_byte, damage_compressed, damage_empty_member,
                                    damage_raw_member])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    npz(tmp_path / "damaged.npz")
    damage(tmp_path / "damaged.npz")
    refusal("damaged.npz", DATASET=str(tmp_path / "damaged.npz"))


# Folders

def save(path, pixels, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)


def test_a_folder_of_classes_is_loaded_with_its_labels(tmp_path):
    levels = {}
    places = [("train", "dog"), ("train", "cat"), ("test", "cat"), ("test", "eel"), ("train", "cat/deeper")]
    for i, (split, name) in enumerate(places):
        for n in range(2):
            level = levels[split, name, n] = 20 * i + 5 * n
            save(tmp_path / "pets" / split / name / f"{n}.PNG", np.full((32, 32, 3), level, np.uint8))
    (tmp_path / "pets" / "train" / "notes.txt").write_text("no picture")
    pictures = prepare(DATASET=str(tmp_path / "pets"))
    assert pictures.name == "pets"
    for split, images, labels in (("train", *pictures[:2]), ("test", *pictures[2:4])):
        wanted = {level: ["cat", "dog", "eel"].index(name[:3]) for (s, name, _), level in levels.items() if s == split}
        assert len(images) == len(wanted) and dict(zip(images[:, 0, 0, 0].tolist(), labels.tolist())) == wanted


@pytest.mark.parametrize("where", ["", "train", "deep/er"])
def test_loose_pictures_have_no_labels(tmp_path, where):
    for n in range(3):
        save(tmp_path / where / f"{n}.png", noise(1, seed=n)[0])
    pictures = prepare(DATASET=str(tmp_path))
    assert pictures.train_images.shape == (3, 3, 32, 32) and pictures[1:4] == (None, None, None)


def test_training_classes_without_test_pictures_are_labelled(tmp_path):
    for name in "ab":
        save(tmp_path / "train" / name / "1.png", noise(1)[0])
    pictures = prepare(DATASET=str(tmp_path))
    assert pictures.train_labels.tolist() == [0, 1] and pictures.test_images is None


def flat(colour, mode):
    return Image.new(mode, (32, 32), colour)


def with_palette():
    image = flat(7, "P")
    image.putpalette([0] * 21 + [10, 200, 30] + [0] * 744)
    return image


MODES = {"L": (flat(77, "L"), (77, 77, 77)), "LA": (flat((77, 255), "LA"), (77, 77, 77)), "1": (flat(1, "1"), (255,) * 3),
         "RGBA": (flat((10, 200, 30, 255), "RGBA"), (10, 200, 30)), "P": (with_palette(), (10, 200, 30)),
         "CMYK": (flat((255, 0, 0, 0), "CMYK"), (0, 255, 255))}


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_becomes_its_rgb(tmp_path, mode):
    image, expected = MODES[mode]
    for n in range(2):
        save(tmp_path / f"{n}.tif", image, None)
    pictures = prepare(DATASET=str(tmp_path))
    assert pictures.train_images.shape == (2, 3, 32, 32)
    assert pictures.train_images[0].flatten(1).unique(dim=1).flatten().tolist() == list(expected)


@pytest.mark.parametrize("kind, top", [(np.uint16, 65535), (np.uint16, 4095), (np.int32, 100_000), (np.float32, 1.0)])
def test_a_deep_picture_is_scaled_not_clipped(tmp_path, kind, top):
    ramp = np.linspace(0, top, 32 * 32).reshape(32, 32).astype(kind)
    for n in range(2):
        save(tmp_path / f"{n}.tif", ramp, None)
    got = prepare(DATASET=str(tmp_path)).train_images[0]
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    assert (got[0].flatten().float() - torch.linspace(0, 255, 1024)).abs().max() <= 2      # rounding, twice


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0))])
def test_a_camera_s_orientation_is_followed(tmp_path, orientation, corner):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16] = 255                                       # light in the stored picture's top left quarter
    exif = Image.Exif()
    exif[0x0112] = orientation
    for n in range(2):
        save(tmp_path / f"{n}.png", pixels, exif=exif)
    image = prepare(DATASET=str(tmp_path)).train_images[0].float()
    quarters = image.mean(0).unflatten(0, (2, 16)).unflatten(2, (2, 16)).mean((1, 3))
    assert divmod(int(quarters.argmax()), 2) == corner and quarters.max() == 255 and quarters.sum() == 255


@pytest.mark.parametrize("height, width", [(96, 64), (40, 90), (8, 8), (32, 33)])
def test_pictures_of_other_sizes_are_resized_and_their_middle_is_kept(tmp_path, height, width):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[3 * height // 8:5 * height // 8, 3 * width // 8:5 * width // 8] = 255
    for n in range(2):
        save(tmp_path / f"{n}.png", pixels)
    from_file = prepare(DATASET=str(tmp_path)).train_images[0].float()
    from_tensor = prepare(torch.from_numpy(pixels).permute(2, 0, 1).expand(2, -1, -1, -1)).train_images[0].float()
    for image in (from_file, from_tensor):
        assert image.shape == (3, 32, 32)
        assert image[:, 15:17, 15:17].mean() > 240 and image[:, [0, 0, -1, -1], [0, -1, 0, -1]].max() < 10
    assert (from_file - from_tensor).abs().mean() < 16           # they may cut a pixel apart


def test_unreadable_files_are_named_in_one_warning_and_left_out(tmp_path):
    for n in range(3):
        save(tmp_path / f"{n}.png", noise(1, seed=n)[0])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    with pytest.warns() as caught:
        pictures = prepare(DATASET=str(tmp_path))
    assert len(pictures.train_images) == 3 and len(caught) == 1
    message = str(caught[0].message)
    assert "broken.png" in message and "cut.png" in message and "0.png" not in message


def test_readable_folders_warn_of_nothing(tmp_path):
    for n in range(2):
        save(tmp_path / f"{n}.png", noise(1, seed=n)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(prepare(DATASET=str(tmp_path)).train_images) == 2


def test_reading_in_threads_leaves_the_warning_filters_alone(tmp_path, monkeypatch):
    """Of two threads the second begins while the first is at work, and ends after it; ten times, since threads may race."""
    for n in range(2):
        save(tmp_path / f"{n}.png", noise(1, seed=n)[0])
    original = dinov2_cifar.as_uint8
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for _ in range(10):
            second, begun = threading.Event(), iter(range(2))

            def slow(picture, size=None):
                if next(begun) == 0:
                    second.wait(2)
                else:
                    second.set()
                    time.sleep(0.05)
                return original(picture, size)

            monkeypatch.setattr(dinov2_cifar, "as_uint8", slow)
            dinov2_cifar.load_folder(tmp_path, 32, "cpu")
            assert not warnings.filters


@pytest.mark.parametrize("make", ["nothing", "texts", "broken", "empty train"])
def test_a_folder_without_a_picture_is_refused(tmp_path, make):
    folder = tmp_path / "bare"
    (folder / "train" if make == "empty train" else folder).mkdir(parents=True)
    if make in ("texts", "broken"):
        (folder / f"a.{'txt' if make == 'texts' else 'png'}").write_text("no picture")
    refusal("bare", "picture", DATASET=str(folder))


def test_a_place_that_is_not_there_or_holds_something_else_is_refused(tmp_path):
    refusal("nowhere", "cifar10", "shapes", DATASET=str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("")
    refusal("notes.txt", ".npz", "folder", DATASET=str(tmp_path / "notes.txt"))


# CIFAR

class FakeCifar:
    """torchvision's class as far as it matters: a RuntimeError where the data is not there, arrays where it is."""
    filename, here, network = "cifar-python.tar.gz", True, None
    calls = []

    def __init__(self, root, train=True, download=False):
        type(self).calls.append((root, train, download))
        if not self.here and not download:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        if not self.here and self.network is not None:
            raise self.network
        count = 6 if train else 4
        self.data, self.targets = noise(count, seed=int(train)), list(range(count))


@pytest.fixture
def cifar(monkeypatch):
    fake = type("Fake", (FakeCifar,), {"calls": []})
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(dinov2_cifar.datasets, name, fake)
    return fake


@pytest.mark.parametrize("dataset, name", [("cifar10", "cifar10"), ("cifar100", "cifar100"), ("auto", "cifar10")])
def test_cifar_that_is_there_is_loaded_without_a_download(cifar, dataset, name, capsys):
    pictures = prepare(DATASET=dataset, DATA_PATH="here")
    assert torch.equal(pictures.train_images, torch.from_numpy(noise(6, seed=1)).permute(0, 3, 1, 2))
    assert torch.equal(pictures.test_images, torch.from_numpy(noise(4, seed=0)).permute(0, 3, 1, 2))
    assert pictures.train_labels.tolist() == list(range(6)) and pictures.test_labels.tolist() == list(range(4))
    assert pictures.name == name and capsys.readouterr().err == ""
    assert cifar.calls == [("here", True, False), ("here", False, False)]


def test_cifar_that_is_not_there_is_downloaded(cifar):
    cifar.here = False
    assert len(prepare(DATASET="cifar10").train_images) == 6
    assert cifar.calls[-2:] == [("data", True, True), ("data", False, True)]


NETWORK = [URLError("no route"), OSError("disk full"), TimeoutError("timed out"), RuntimeError("not whole")]


@pytest.mark.parametrize("error", NETWORK, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_without_a_network_named_cifar_is_refused_with_the_remedy(cifar, dataset, error):
    cifar.here, cifar.network = False, error
    words = dataset, str(error), "DATA_PATH", "elsewhere", cifar.filename, "--dataset shapes"
    refusal(*words, DATASET=dataset, DATA_PATH="elsewhere")


@pytest.mark.parametrize("error", NETWORK, ids=lambda e: type(e).__name__)
def test_without_a_network_auto_takes_the_shapes_and_nobody_can_miss_it(cifar, error, capsys, monkeypatch):
    cifar.here, cifar.network = False, error
    monkeypatch.setattr(dinov2_cifar, "load_shapes", lambda size: Pictures(*make_shapes(8, size), name="shapes"))
    pictures = prepare(DATASET="auto")
    out, err = capsys.readouterr()
    assert "WARNING" in err and "BUILT-IN SHAPES" in err and "!" * 80 in err and str(error) in err and out == ""
    assert "shapes" in pictures.name and "CIFAR" in pictures.name and len(pictures.train_images) == 8


def test_the_fallback_is_recorded_in_the_checkpoint_and_the_metrics(cifar, small, monkeypatch, capsys):
    cifar.here, cifar.network = False, OSError("no network")
    monkeypatch.setattr(dinov2_cifar, "load_shapes", lambda size: Pictures(make_shapes(8, size)[0], name="shapes"))
    config = small(DATASET="auto")
    train_dinov2(config)
    lines = [line for line in open(f"{config.OUTPUT_DIR}/metrics.jsonl") if '"start"' in line or '"final"' in line]
    assert len(lines) == 2 and all("shapes (fallback" in line for line in lines)
    assert "fallback" in torch.load(f"{config.OUTPUT_DIR}/dinov2_last.pth", weights_only=True)["data"]
    assert "fallback" in capsys.readouterr().out


def test_a_download_that_hangs_is_given_up_and_the_time_limit_does_not_outlive_it(cifar, monkeypatch):
    limits, before = [], socket.getdefaulttimeout()
    cifar.here, cifar.network = False, OSError("timed out")
    monkeypatch.setattr(cifar, "__init__", lambda *args, **options: limits.append(socket.getdefaulttimeout())
                        or FakeCifar.__init__(*args, **options))
    refusal("timed out", DATASET="cifar10")
    assert 0 < limits[-1] <= 60 and socket.getdefaulttimeout() == before


# What is prepared for training

def test_a_subset_is_random_fixed_and_keeps_its_labels():
    count = 40
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 32, 32)
    labelled = images, torch.arange(count) * 2, images, torch.arange(count)
    subsets = [prepare(labelled, TRAIN_IMAGES=10, SEED=seed) for seed in (0, 1)]
    chosen = subsets[0].train_images[:, 0, 0, 0].long()
    assert len(chosen.unique()) == 10 and torch.equal(subsets[0].train_labels, chosen * 2)
    assert torch.equal(subsets[1].train_labels, chosen * 2)      # whatever the seed: runs can be compared
    assert chosen.tolist() != list(range(10)) and chosen.max() > 20
    assert len(subsets[0].test_images) == count
    for all_of_them in (0, count, count + 1):
        assert torch.equal(prepare(images, TRAIN_IMAGES=all_of_them).train_images, images)


@pytest.mark.parametrize("settings", [dict(BATCH_SIZE=9), dict(BATCH_SIZE=5, TRAIN_IMAGES=4)], ids=str)
def test_a_batch_above_the_number_of_pictures_is_refused(settings, shapes):
    refusal("BATCH_SIZE", *map(str, settings.values()), dataset=shapes[0][:8], **settings)


def test_too_many_pictures_for_the_memory_are_refused(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 2 ** 20, raising=False)                # 2^20 pages of 2^20 bytes
    require_memory(2 ** 20, 32, "cpu")                                                     # 3 GiB of 1,024
    with pytest.raises(InputError, match=r"1,000,000,000 pictures.*2861\.0 GiB.*1024\.0 GiB.*IMAGE_SIZE \(32\)"):
        require_memory(10 ** 9, 32, "cpu")
    monkeypatch.setattr(os, "sysconf", lambda name: 100)                                   # 10,000 bytes in all
    refusal("64 pictures", "GiB", "IMAGE_SIZE", dataset=shapes[0])
    refusal("GiB", DATASET=npz(tmp_path / "a.npz"))
    save(tmp_path / "folder" / "1.png", noise(1)[0])
    save(tmp_path / "folder" / "2.png", noise(1)[0])
    refusal("2 pictures", "GiB", DATASET=str(tmp_path / "folder"))
    monkeypatch.delattr(os, "sysconf")                                                     # Windows
    require_memory(10 ** 9, 32, "cpu")


@pytest.mark.parametrize("size", [16, 32, 48])
def test_any_data_set_is_resized_to_the_image_size(size, shapes):
    pictures = prepare(shapes, IMAGE_SIZE=size)
    assert pictures.train_images.shape == (64, 3, size, size) and pictures.test_images.shape == (32, 3, size, size)
    assert load_pictures(Config(**{**SMALL, "IMAGE_SIZE": 8})).train_images.shape[-2:] == (8, 8)
    means = [part.float().mean((2, 3)) for part in (pictures.train_images, shapes[0])]
    assert (means[0] - means[1]).abs().max() < 3                 # of 255: the pictures stay what they are


def test_what_is_prepared_lies_on_the_device(device, shapes):
    pictures = prepare(shapes, DEVICE=device)
    assert {part.device.type for part in pictures[:4]} == {device} and torch.equal(pictures.train_labels.cpu(), shapes[1])


def test_pixel_statistics_are_torch_s(device):
    images = torch.from_numpy(noise(20, 9, 7) // np.array([1, 2, 4], np.uint8)).permute(0, 3, 1, 2)
    mean, std = pixel_statistics(images.to(device))
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_pixel_statistics_of_one_colour_can_be_divided_by():
    mean, std = pixel_statistics(torch.full((4, 3, 8, 8), 51, dtype=torch.uint8))
    assert mean == pytest.approx([0.2] * 3) and min(std) > 0


# Whatever a notebook has

def pil(images):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def test_tensors_tuples_and_lists_of_pictures_become_pictures(shapes):
    images, labels, test_images, test_labels = (part[:6] for part in shapes)
    assert as_pictures(images)[:4] == (images, None, None, None)
    assert as_pictures((images, labels))[:4] == (images, labels, None, None)
    assert as_pictures((images, labels, test_images, test_labels))[:4] == (images, labels, test_images, test_labels)
    assert as_pictures(Pictures(images, name="mine")).name == "mine"
    bare, labelled = as_pictures(pil(images)), as_pictures(list(zip(pil(images), labels.tolist())))
    assert torch.equal(bare.train_images, images) and bare.train_labels is None
    assert torch.equal(labelled.train_images, images) and torch.equal(labelled.train_labels, labels)


def test_a_torchvision_data_set_becomes_pictures(shapes):
    class Dataset:                                               # a map-style data set: len and [i], nothing else
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return pil(shapes[0][index:index + 1])[0].resize((40, 36)), int(shapes[1][index])

    pictures = as_pictures(Dataset(), size=32)
    assert pictures.train_images.shape == (6, 3, 32, 32) and torch.equal(pictures.train_labels, shapes[1][:6])


@pytest.mark.parametrize("make", {
    "empty list": lambda images, labels: [],
    "empty tensor": lambda images, labels: images[:0],
    "floats": lambda images, labels: images / 255,
    "channels last": lambda images, labels: images.permute(0, 2, 3, 1),
    "one picture": lambda images, labels: images[0],
    "arrays": lambda images, labels: images.numpy(),
    "paths": lambda images, labels: ["a.png", "b.png"],
    "too few labels": lambda images, labels: (images, labels[:3]),
    "float labels": lambda images, labels: (images, labels / 2),
    "labels as a list": lambda images, labels: (images, [[0]] * len(images)),
    "a number": lambda images, labels: 5,
    "a generator": lambda images, labels: (image for image in images),
    "a dict": lambda images, labels: {"images": images},
    "words as labels": lambda images, labels: [(image, "cat") for image in pil(images)],
    "two sizes": lambda images, labels: [Image.new("RGB", (side, side)) for side in (0, 32)],
    "complex labels": lambda images, labels: (images, labels + 0j),
    "labels beyond all classes": lambda images, labels: (images, labels.long() + 2 ** 62),
    "five parts": lambda images, labels: (images, labels, images),
    "masks of another size": lambda images, labels: Pictures(images, labels, images, labels, train_masks=torch.zeros(64, 8, 8, dtype=torch.bool)),
    "labels first": lambda images, labels: (labels, images)}.items(), ids=lambda item: item[0])
def test_a_data_set_that_cannot_work_is_refused_before_any_long_work(make, small, shapes, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "make_model", lambda *args: pytest.fail("a network was built first"))
    data = make[1](*shapes[:2])
    if isinstance(data, tuple) and not isinstance(data, Pictures):
        data = (*data, *shapes[2:])
    with pytest.raises(InputError):
        train_dinov2(small(), dataset=data)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64, torch.bool], ids=str)
def test_labels_of_any_whole_kind_are_taken(kind, shapes):
    labels = shapes[1].clamp(max=1).to(kind)
    assert torch.equal(as_pictures((shapes[0], labels)).train_labels, shapes[1].clamp(max=1))


def test_a_test_set_of_nothing_is_refused(shapes):
    with pytest.raises(InputError, match="test images must be"):
        as_pictures((*shapes[:2], shapes[2][:0], shapes[3][:0]))


def test_settings_in_a_dict_are_refused_with_the_remedy():
    with pytest.raises(InputError, match="Config.*settings"):
        train_dinov2({"TOTAL_EPOCHS": 1})


def test_pictures_of_different_sizes_become_one_tensor_at_the_image_size():
    sizes = [Image.new("RGB", size, (9, 9, 9)) for size in ((40, 30), (32, 32), (8, 100))]
    assert prepare(sizes).train_images.shape == (3, 3, 32, 32)
