"""Data: built-in shapes, archives, folders, CIFAR with and without network, datasets in memory."""

import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, close, no_cuda, read_records
from filelock import FileLock, Timeout
from PIL import Image
from torchvision import datasets
from torchvision import transforms as T

import dinov2_cifar
from dinov2_cifar import Config, InputError, as_images, make_shapes, prepare_images, train_dinov2


def prepare(dataset=None, **settings):
    return prepare_images(Config(**{**SMALL, "BATCH_SIZE": 2, **settings}), dataset)


def noise(n, h=32, w=32):
    return torch.from_numpy(np.random.default_rng(n).integers(256, size=(n, 3, h, w), dtype="u1"))


def arrays(images):
    return images.permute(0, 2, 3, 1).numpy()


def save(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays(images)):
        Image.fromarray(array).save(folder / f"{i}.png")


def check(images, x, y=None, x_test=None, y_test=None, name=None):
    for actual, expected in zip(images, (x, y, x_test, y_test), strict=False):
        assert actual is expected is None or torch.equal(actual.cpu(), expected)
    assert name is None or images.name == name


def expect_error(*words, dataset=None, **settings):
    with pytest.raises(InputError, match="^.+$") as caught:  # one line
        prepare(dataset, **settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_make_shapes_is_balanced_shuffled_and_seeded():
    train, y, test, y_test, name, *_ = prepare(IMAGE_SIZE=16, TRAIN_IMAGES=2500)
    assert train.shape == (2500, 3, 16, 16) and test.shape == (2048, 3, 16, 16) and name == "shapes"
    assert (y.bincount() - 250).abs().max() < 2 and (y_test.bincount() - 204.8).abs().max() < 1
    assert len(torch.cat([train, test]).unique(dim=0)) == 4548 and len(y[:100].unique()) == 10
    check(make_shapes(2500, 16, masks=True)[:2], train, y)  # drawn in two parts
    assert not torch.equal(*make_shapes(4096, 8)[0].split(2048))
    assert len(prepare(IMAGE_SIZE=8, TRAIN_IMAGES=10**9)[0]) == 19456
    x, y, held_out, *_ = prepare(IMAGE_SIZE=8, TRAIN_IMAGES=50, VALIDATION_IMAGES=30)
    assert len(x) == len(y) == 50 and len(held_out) == 30
    assert torch.equal(prepare(IMAGE_SIZE=8, VALIDATION_IMAGES=30)[2], held_out)
    expect_error("IMAGE_SIZE (72)", "64", IMAGE_SIZE=72)


def test_make_shapes_masks_agree_and_classes_differ_in_shape_alone():
    images, labels, masks = make_shapes(1500, 28, seed=0, masks=True)
    assert all(map(torch.equal, make_shapes(1500, 28, seed=0), (images, labels)))
    for image, mask in zip(images / 255, masks, strict=True):
        inside, outside = image[:, mask], image[:, ~mask]
        assert (inside.mean(1) - outside.mean(1)).norm() > 0.2 and inside.std(1).max() < 0.16
    areas = [2.545, 2.011, 2.56, 1.89, 1.347, 1.814, 1.232, 1.529, 1.458, 1.788]  # at radius 1
    mask, area = masks.unsqueeze(1), masks.sum((1, 2)).unsqueeze(1)
    radius = (area / torch.tensor(areas)[labels].unsqueeze(1)).sqrt() / 28
    assert 0.19 < radius.min() < 0.21 and 0.39 < radius.max() < 0.41
    color, background = ((images * m).sum((2, 3)) / m.sum((2, 3)) for m in (mask, ~mask))
    grid = torch.stack(torch.meshgrid(*[torch.arange(28.0)] * 2, indexing="ij"))
    place, others = (mask * grid).sum((2, 3)) / area, torch.cat([radius, color, background], 1)
    for x, classes in ((others, range(10)), (place, [0, 1, 2, 3, 5, 8])):  # the symmetric ones
        for bias in (0.0, 0.1):  # in standard deviations from class to class
            groups = [x[labels == c] + bias * i * x.std(0) for i, c in enumerate(classes)]
            between = torch.stack([group.mean(0) for group in groups]).var(0)
            f = 150 * between / torch.stack([group.var(0) for group in groups]).mean(0)
            assert f.min() > 3.8 if bias else f.max() < 3.8  # 1 by chance


def npz(path, **changed):
    parts = {"x_train": arrays(noise(6)), "y_train": np.arange(6)}
    parts |= {"x_test": arrays(noise(4, 50, 40)), "y_test": np.arange(4, dtype=np.uint8), **changed}
    np.savez(path, **{key: value for key, value in parts.items() if value is not None})
    return str(path)


def test_npz_is_loaded_or_refused(tmp_path):
    path, x = tmp_path / "a.npz", arrays(noise(6))
    resized = as_images(noise(4, 50, 40), 32).train_images
    check(prepare(DATASET=npz(path)), noise(6), torch.arange(6), resized, torch.arange(4), "a.npz")
    for bad in (None, x * 2.0, x.astype(int), x[0], np.array([{}] * 6, object)):
        expect_error("a.npz", DATASET=npz(path, x_train=bad))
    for bad, value in (
        (np.arange(5), "5 labels"),
        (np.arange(6) - 5, "-5"),
        (np.arange(6.0) + 0.5, "0.5"),
    ):
        expect_error("a.npz", value, DATASET=npz(path, y_train=bad))


def test_folder_of_classes_gives_labels(tmp_path):
    places = ["train/dog", "train/cat", "train/cat/deeper", "test/cat", "test/eel"]
    for level, place in enumerate(places):  # the gray level says what became of a file
        save(tmp_path / "pets" / place, torch.full((1, 3, 32, 32), level, dtype=torch.uint8))
    x, y, x_test, y_test, _, obstacle, _ = prepare(DATASET=str(tmp_path / "pets"))
    assert y[x[:, 0, 0, 0].argsort()].tolist() == [1, 0, 0] and y_test is None and "eel" in obstacle
    (tmp_path / "pets" / "test" / "eel").rename(tmp_path / "pets" / "test" / "DOG")
    x, y, x_test, y_test, *_ = prepare(DATASET=str(tmp_path / "pets"))
    assert y_test[x_test[:, 0, 0, 0].argsort()].tolist() == [0, 1]
    (tmp_path / "pets" / "test").rename(tmp_path / "elsewhere")
    assert prepare(DATASET=str(tmp_path / "pets"))[2:5] == (None, None, "pets")


@pytest.mark.parametrize("where", ["", "train", "deep/er"])
def test_folder_of_loose_images_has_no_labels(tmp_path, where, capsys):
    save(tmp_path / where, noise(3))
    save(tmp_path / ".thumbnails", noise(2))  # hidden, as the next
    (tmp_path / where / "._0.png").write_bytes(b"")
    (tmp_path / where / "notes.txt").write_text("no image")
    check(prepare(DATASET=str(tmp_path)), noise(3))
    assert not capsys.readouterr().err


def test_folder_follows_links_and_names_what_it_leaves_out(tmp_path, capsys):
    folder, other = tmp_path / "photos", tmp_path / "elsewhere"
    save(folder, noise(2))
    save(other / "class", noise(3))
    (folder / "linked").symlink_to(other)
    (folder / "linked.png").symlink_to(other / "class" / "2.png")
    (folder / "lost.png").symlink_to("nowhere.png")
    (folder / "up").symlink_to(tmp_path)  # a circle
    for name in ("a.jpg", "b.jpg", "c.JPG", "d.jpg"):
        (folder / name).write_text("no image")
    (folder / "notes.txt").write_text("no image")
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(folder / "nan.tif")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    assert len(prepare(DATASET=str(folder)).train_images) == 2 + 3 + 1  # each once
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: 7 files are left out: ") and "0.png" not in line
    for reason in ("4 cannot identify image file (photos/a.jpg, ", "1 image file is truncated ("):
        assert reason in line
    assert "1 No such file or directory (photos/lost.png)" in line and "nan.tif)" in line
    assert "d.jpg" not in line and "notes" not in line and str(tmp_path) not in line


def test_folder_reads_every_format_mode_and_orientation(tmp_path):
    image, exif = Image.new("RGB", (32, 32)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 16, 16))  # the top left quarter
    for suffix in "BMP gif jpeg jpg png ppm webp".split():
        image.save(tmp_path / f"a.{suffix}")
    for mode in "1 CMYK L LA P RGBA".split():
        image.convert(mode).save(tmp_path / f"b{mode}.tif")
    for exif[0x0112] in (3, 6, 8):
        image.save(tmp_path / f"c{exif[0x0112]}.jpg", exif=exif)
    quarters = F.avg_pool2d(prepare(DATASET=str(tmp_path)).train_images.float(), 16).flatten(2)
    expected = 255 * F.one_hot(torch.tensor([0] * 13 + [3, 1, 2])).unsqueeze(1)  # as one reads
    assert (quarters - expected).abs().max() < 3


def test_path_without_an_image_is_refused(tmp_path):
    (tmp_path / "bare" / "train").mkdir(parents=True)
    expect_error("bare", "no readable image", DATASET=str(tmp_path / "bare"))
    (tmp_path / "bare" / "train" / "x.png").touch()
    expect_error("x.png", "no readable image", DATASET=str(tmp_path / "bare"))
    for name in ("nowhere", "bare/train/x.png"):
        expect_error(name, "cifar10", "shapes", ".npz", DATASET=str(tmp_path / name))


@pytest.fixture
def cifar(monkeypatch):
    def fake(root, train=True, download=False):  # for torchvision's classes
        fake.calls.append((train, download))
        assert 0 < socket.getdefaulttimeout() <= 60
        if download:
            with pytest.raises(Timeout):  # another process would wait
                FileLock(Path(root, ".lock")).acquire(timeout=0)
        elif not Path(root, fake.filename).exists():
            raise RuntimeError("Dataset not found or corrupted")
        if fake.error is not None:
            raise fake.error
        Path(root, fake.filename).touch()
        numbers = [*range(5 + train)]
        return SimpleNamespace(data=arrays(noise(5 + train)), targets=numbers, classes="abcdef")

    fake.filename, fake.error, fake.calls = "cifar-python.tar.gz", None, []
    monkeypatch.setattr(dinov2_cifar, "datasets", SimpleNamespace(CIFAR10=fake, CIFAR100=fake))
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
    return fake


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "auto"])
def test_cifar_is_downloaded_once_under_a_lock(cifar, dataset, capsys, tmp_path):
    root, name = tmp_path / "to be made" / "data", dataset.replace("auto", "cifar10")
    for _ in range(2):  # the second time nothing is downloaded or written
        (root / ".lock").unlink(missing_ok=True)
        images = prepare(DATASET=dataset, DATA_PATH=str(root))
        check(images, noise(6), torch.arange(6), noise(5), torch.arange(5), name)
        assert images.classes == tuple("abcdef")  # torchvision's names
    assert [call for call in cifar.calls if call[1]] == [(True, True), (False, True)]
    assert [*root.iterdir()] == [root / cifar.filename] and not capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("no route"), TimeoutError("timed out"), RuntimeError()])
def test_cifar_missing_is_refused_and_auto_falls_back(cifar, error, capsys, small, tmp_path):
    cifar.error, root = error, str(tmp_path / "data")
    words = str(error) or type(error).__name__, "DATA_PATH", root, cifar.filename
    expect_error("cifar10", *words, DATASET="cifar10", DATA_PATH=root)
    assert socket.getdefaulttimeout() is None  # as before
    FileLock(Path(root, ".lock")).acquire(timeout=0).lock.release()
    dinov2_cifar.train_dinov2(small(DATASET="auto", DATA_PATH=root, TRAIN_IMAGES=8, IMAGE_SIZE=8))
    first, warning, fallback, last = capsys.readouterr().err.splitlines()[:4]
    assert first == last == "!" * 80 and "WARNING" in warning and "SHAPES" in fallback
    assert all(word in warning for word in words)
    (start,) = read_records(tmp_path / "out", "start")
    checkpoint = torch.load(tmp_path / "out" / "dinov2_last.pth", weights_only=True)
    assert start["data"] == checkpoint["data"]["name"] == "shapes (no CIFAR-10)"


def test_train_images_is_a_fixed_random_subset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(40, 3, 32, 32)
    dataset = (images, torch.arange(40) % 3, images, torch.arange(40) % 3)
    x, y, *test = prepare(dataset, TRAIN_IMAGES=10)[:4]
    assert len(x.unique()) == 10 and x.max() > 20 and torch.equal(x[:, 0, 0, 0] % 3, y)
    check((x, y, *test), *prepare(dataset, TRAIN_IMAGES=10, SEED=1)[:2], *dataset[2:])
    check(prepare(([*images], *dataset[1:]), TRAIN_IMAGES=10), x, y, *test)
    for n in (0, 40, 41):
        check(prepare(dataset, TRAIN_IMAGES=n, BATCH_SIZE=40), *dataset)
    save(tmp_path, images)
    read = []
    monkeypatch.setattr(dinov2_cifar, "read_image", lambda file, size: read.append(file) or x[0])
    prepare(DATASET=str(tmp_path), TRAIN_IMAGES=7, VALIDATION_IMAGES=5)
    assert len(read) == len({*read}) == 12  # no others
    with pytest.raises(InputError, match="BATCH_SIZE .5. needs 5 images per step, there are 4"):
        train_dinov2(Config(**{**SMALL, "BATCH_SIZE": 5, "TRAIN_IMAGES": 4}), dataset)


def test_validation_images_are_training_images_in_place_of_test_images():
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(40, 3, 32, 32)
    for test in (images + 100, torch.arange(40)), ():
        dataset = (images, torch.arange(40) // 10, *test)
        held_out = prepare(dataset, VALIDATION_IMAGES=12)[2]
        for n, left in (0, 28), (10, 10), (30, 28):
            settings = {"VALIDATION_IMAGES": 12, "TRAIN_IMAGES": n, "SEED": n}
            x, y, x_test, y_test, *_ = prepare(dataset, **settings)
            assert len(x) == left and torch.equal(x_test, held_out)
            assert len(torch.cat([x, x_test])[:, 0, 0, 0].unique()) == left + 12
            close(torch.cat([y, y_test]), torch.cat([x, x_test])[:, 0, 0, 0].long() // 10)
    expect_error(
        "VALIDATION_IMAGES (40)", "below the 40 images", dataset=dataset, VALIDATION_IMAGES=40
    )


@pytest.mark.parametrize("height, width, size", [(96, 64, 16), (40, 91, 48), (8, 8, 32)])
def test_images_are_center_cropped_and_resized_like_torchvision(tmp_path, height, width, size):
    x = F.interpolate(noise(2, 6, 6).float(), (height, width), mode="bilinear").byte()
    save(tmp_path, x)
    pil = [Image.fromarray(array) for array in arrays(x)]  # resized by Pillow
    steps = [T.CenterCrop(min(height, width)), T.Resize(size, T.InterpolationMode.BICUBIC)]
    expected = torch.stack([T.PILToTensor()(T.Compose(steps)(image)) for image in pil])
    for dataset in (None, x, pil, (x, None, x, None)):
        for ours in prepare(dataset, DATASET=str(tmp_path), IMAGE_SIZE=size)[:4:2]:
            assert ours is None or (ours.int() - expected.int()).abs().max() <= 2


def test_channel_mean_std_are_those_in_float64(device):
    dataset = (noise(20) // 2, torch.arange(20), noise(4), torch.arange(4))
    images = prepare(dataset, DEVICE=device)
    check(images, *dataset)
    assert {part.device.type for part in images[:4]} == {device}
    ours = torch.tensor(dinov2_cifar.channel_mean_std(images.train_images), dtype=torch.double)
    std, mean = torch.std_mean(dataset[0].double() / 255, (0, 2, 3), correction=0)
    close(ours, torch.stack([mean, std]), 1e-12)
    assert min(dinov2_cifar.channel_mean_std(images.train_images[:1] * 0)[1]) > 0  # of one color


X, Y = noise(6), torch.tensor([1, 0, 2, 1, 0, 2])
GRAY = X[:, :1].expand(-1, 3, -1, -1)
PIL = [Image.fromarray(array) for array in arrays(X)]


class Rows(list):
    """A dataset of rows or items, with a length and [i] alone."""


class Series(list):
    """Like a shuffled one of pandas: [i] is by a label and not by place."""

    ndim, tolist = 1, lambda self: [*self]  # noqa: E731

    def __getitem__(self, i):
        return list.__getitem__(self, 5 - i)


class Column(torch.utils.data.Dataset):
    """Like one of Hugging Face, whose data sets have a shape, too."""

    shape = (6, 2)

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.values[i].tolist() if self.values[i].ndim == 0 else self.values[i]


FORMS = {  # which become X, or X and Y
    "tensor": X,
    "channels last": X.permute(0, 2, 3, 1),
    "array": X.numpy(),
    "floats": X / 255,
    "float64 array, channels last": arrays(X) / 255,
    "PIL": PIL,
    "arrays of each": [*arrays(X)],
    "floats of each": [x / 255 for x in X],
    "TensorDataset": torch.utils.data.TensorDataset(X),
    "labels": (X, Y),
    "array of labels": (arrays(X), Y.numpy().astype(np.uint8)),
    "labels (N,1)": (arrays(X), Y.numpy()[:, None]),
    "list of labels": (PIL, Y.tolist()),
    "object array": (np.array([*PIL, None], object)[:6], Y.float()),
    "lists (N,1)": (PIL, Y[:, None].tolist()),
    "capital letters": {"X_TRAIN": X, "Y_Train": Y},
    "series": (Series(PIL), Series(Y.tolist())),
    "column": (Column(X), Column(Y)),
    "strings": (X, [["A", "b", "c"][y] for y in Y.tolist()]),
    "numbers": (X, Y * 30_000 + 7),
    "tuples": (tuple(PIL), tuple(Y.numpy())),
    "items": Rows(zip(PIL, Y.tolist(), strict=True)),
    "items of tensors": torch.utils.data.TensorDataset(X, Y),
    "subset": torch.utils.data.Subset([*zip(PIL, Y, strict=True), None], range(6)),
    "rows": Rows({"img": x, "label": y} for x, y in zip(PIL, Y.tolist(), strict=True)),
    "rows of CIFAR": Rows({"fine_label": y, "image": x} for x, y in zip(PIL, Y, strict=True)),
    "mapping": {"x_train": arrays(X), "y_train": Y.numpy()},
    "mapping of datasets": {"train": Rows(zip(PIL, Y, strict=True))},
}


UNLABELED = [*FORMS][: [*FORMS].index("labels")]


@pytest.mark.parametrize("form", FORMS)
def test_datasets_of_every_form_become_images(form):
    dataset = FORMS[form]
    labeled = form not in UNLABELED
    images = as_images(dataset, 32)
    check(images, X, Y if labeled else None)
    check(as_images(dataset), X, Y if labeled else None)
    if not isinstance(dataset, dict):  # as a pair of training and test
        expected = (X, Y, X, Y) if labeled else (X, None, X, None)
        check(as_images((dataset, dataset)), *expected)
        check(as_images({"train": dataset, "validation": dataset}), *expected)


def test_gray_images_get_three_equal_channels():
    gray = X[:, 0]
    for dataset in (gray, gray.numpy(), gray[:, None], gray[..., None].numpy(), [*gray.numpy()]):
        check(as_images(dataset, 32), GRAY)
    check(as_images({"train_images": gray.numpy(), "train_labels": Y[:, None].numpy()}), GRAY, Y)


def test_large_arrays_are_resized_in_parts_and_mapped_files_not_copied(tmp_path):
    x = noise(600, 40, 36)
    whole = dinov2_cifar.to_uint8(x, 16)
    check(as_images(x, 16), whole)
    check(as_images(arrays(x) / 255, 16), whole)
    np.save(tmp_path / "x_train.npy", arrays(X))
    np.save(tmp_path / "y_train.npy", Y)
    np.save(tmp_path / "x_test.npy", arrays(X)[:3])
    np.save(tmp_path / "y_test.npy", Y[:3])
    found = prepare(DATASET=str(tmp_path / "x_train.npy"))
    check(found, X, Y, X[:3], Y[:3], "x_train.npy")
    assert found.train_images.data_ptr() % 4096 == 128  # of a page, behind the header of the file
    mapped = np.load(tmp_path / "x_train.npy", mmap_mode="r")
    assert np.shares_memory(as_images(mapped, 32).train_images.numpy(), mapped)
    (tmp_path / "x_train.npy").rename(tmp_path / "PHOTOS.NPY")
    check(prepare(DATASET=str(tmp_path / "PHOTOS.NPY")), X)
    (alone,) = dinov2_cifar.load_arrays(tmp_path / "PHOTOS.NPY").values()
    assert isinstance(alone, np.memmap) and not alone.flags.writeable


def test_a_mapped_file_may_be_larger_than_the_memory(tmp_path):
    count = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (96 * 96 * 3)
    shape, path = (count, 96, 96, 3), tmp_path / "x_train.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, shape)  # of holes, which take no room
    images = as_images(dinov2_cifar.load_arrays(path), 96).train_images
    assert images.shape == (count, 3, 96, 96) and images[count - 2 :].sum() == 0


def test_of_several_test_splits_one_whose_labels_training_knows_is_used(capsys):
    x = {"train_images": arrays(X), "test_images": arrays(X)[:2], "val_images": arrays(X)[2:5]}
    y = {"train_labels": Y, "test_labels": np.array([7, 8]), "val_labels": Y[2:5]}
    check(as_images({**x, **y}), X, Y, X[2:5], Y[2:5])
    assert capsys.readouterr().out == "not used: test_images (2 images)\n"
    check(as_images({**x, **y, "test_labels": Y[:2]}), X, Y, X[:2], Y[:2])
    assert capsys.readouterr().out == "not used: val_images (3 images)\n"


@no_cuda
def test_images_that_would_fill_the_gpu_stay_in_host_memory(small, shapes, monkeypatch, capsys):
    settings = {"DEVICE": "cuda", "TOTAL_EPOCHS": 2}
    expected = dinov2_cifar.train_dinov2(small(**settings), shapes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    images = prepare(shapes, DEVICE="cuda")
    assert [part.device.type for part in images[:4]] == ["cpu", "cuda"] * 2
    capsys.readouterr()
    model = dinov2_cifar.train_dinov2(small(**settings), shapes)
    assert "images stay in the host's memory" in capsys.readouterr().out
    for ours, other in zip(model.parameters(), expected.parameters(), strict=True):
        close(ours.detach(), other.detach(), 1e-3)


def test_unknown_labels_are_minus_one_and_prevent_nothing():
    missing = type("NAType", (), {"__repr__": lambda self: "<NA>"})()  # of pandas
    for unknown in (-1, None, float("nan"), missing):
        labels = [unknown, 5, 7, unknown, 5, 7]
        found = as_images((X, labels, X, labels))
        expected = torch.tensor([-1, 0, 1, -1, 0, 1])
        check(found, X, expected, X, expected)
        assert not found.obstacle
        check(as_images((X, labels)), X, expected)
    check(as_images((X, [-1] * 6)), X)


@pytest.mark.parametrize(
    "y, y_test, words",
    [
        ([3] * 6, [3] * 6, "all training labels are 3"),
        ([0, 1] * 3, [0, 1, 2, 1, 0, 1], "test labels 2 are not among the 2"),
        (["cat", "dog"] * 3, ["Cat", "emu"] * 3, "test labels emu"),
        (None, [0, 1] * 3, "no training labels"),
        ([0, 1] * 3, [-1] * 6, "no labeled test images; VALIDATION_IMAGES"),
    ],
)
def test_obstacles_to_an_evaluation_are_named(y, y_test, words, small, capsys):
    model = dinov2_cifar.train_dinov2(small(BATCH_SIZE=6), (X, y, X, y_test))
    printed = capsys.readouterr().out
    assert f"no evaluation: {words}" in printed and "k-NN" not in printed and model


def test_subset_that_lacks_test_classes_is_not_evaluated():
    dataset = (X, torch.arange(6), X, torch.arange(6))
    found = prepare(dataset, TRAIN_IMAGES=4)
    assert found.test_labels is None and "are not among the" in found.obstacle
    found = prepare(dataset, VALIDATION_IMAGES=3)
    assert found.test_labels is None and "no labeled test images" in found.obstacle


def test_held_out_images_of_classes_that_training_lacks_have_no_label(capsys):
    labels = ["a", "b"] * 20 + [f"rare {i}" for i in range(9)]
    found = prepare((noise(49), labels), VALIDATION_IMAGES=20)
    rare = [i for i, x in enumerate(noise(49)) if (found.test_images == x).flatten(1).all(1).any()]
    rare = [labels[i] for i in rare if labels[i] not in "ab"]
    assert rare and (found.test_labels == -1).sum() == len(rare) and not found.obstacle
    assert f"not evaluated: {len(rare)} held-out images" in capsys.readouterr().out


def test_first_labeled_split_of_a_mapping_is_for_testing():
    unknown = Rows((image, -1) for image in PIL)
    known = Rows(zip(PIL[:4], Y, strict=False))
    check(as_images({"train": (X, Y), "validation": known, "test": unknown}), X, Y, X[:4], Y[:4])
    arrays = {"x_train": X, "y_train": Y, "x_test": X[:2], "x_val": X[:4], "y_val": Y[:4]}
    check(as_images(arrays), X, Y, X[:4], Y[:4])
    assert as_images({"x_train": X, "y_train": Y, "y_test": Y}).test_images is None


def test_named_classes_keep_their_names():
    y = torch.tensor([4, 2, 4, -1, 2, 4])
    images = dinov2_cifar.Images(noise(6), y, noise(6), y, classes=("a", "b", "c", "d", "e"))
    for _ in range(2):
        images = as_images(images)
        assert images.classes == ("c", "e")
        assert images.train_labels.tolist() == images.test_labels.tolist() == [1, 0, 1, -1, 0, 1]
    assert prepare(DATASET="shapes", TRAIN_IMAGES=64).classes == tuple(dinov2_cifar.SHAPES)
    dataset = Rows(zip(PIL, Y.tolist(), strict=True))
    numbers = 0, 1, 2
    for names, expected in ([*"abc"], ("a", "b", "c")), (["a"], numbers), (np.eye(3), numbers):
        dataset.classes = names
        for given in dataset, (dataset, dataset), {"train": dataset}:
            assert as_images(given).classes == expected
        assert as_images((dataset, Y.tolist())).classes == numbers  # labels of one's own


def test_classes_of_a_pair_go_by_name_where_their_numbers_differ(tmp_path):
    folders = "train/cat train/dog train/eel test/cat test/eel".split()
    write_tree(tmp_path, {f"{folder}/{i}.png": i for i, folder in enumerate(folders)})
    pair = tuple(datasets.ImageFolder(tmp_path / name) for name in ("train", "test"))
    part = torch.utils.data.Subset(torch.utils.data.Subset(pair[0], [0, 1, 2]), [0, 1, 2])
    for dataset in pair, {"train": pair[0], "val": pair[1]}, (part, pair[1]):
        found = as_images(dataset)
        assert found.classes == ("cat", "dog", "eel")
        assert found.train_labels.tolist() == [0, 1, 2] and found.test_labels.tolist() == [0, 2]


def test_classes_of_a_subset_are_its_own_or_those_of_the_whole():
    whole = Rows(zip(PIL, Y.tolist(), strict=True))
    whole.classes = [*"abc"]
    part = torch.utils.data.Subset(whole, range(6))
    assert as_images(part).classes == ("a", "b", "c")
    part.classes = [*"xyz"]
    assert as_images(part).classes == ("x", "y", "z")


def test_second_names_of_labels_are_not_used(capsys):
    check(as_images({"x_train": X, "y_train": Y, "train_labels": Y}), X, Y)
    assert "not used: train_labels" in capsys.readouterr().out
    for labels in Y, Y.tolist():
        check(as_images((X, Y, None, labels)), X, Y)


def test_classes_keep_capital_letters_where_two_differ_in_them_alone():
    labels = ["A", "a", "B"] * 2
    found = as_images((X, labels, X, labels))
    assert found.classes == ("A", "B", "a") and len(found.test_labels.unique()) == 3
    found = as_images((X, ["A", "B"] * 3, X, ["a", "b"] * 3))
    assert found.classes == ("a", "b") and torch.equal(found.train_labels, found.test_labels)


def write_tree(root, tree):
    """Write images of one gray level each: {path: level}."""
    for path, level in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), level).save(root / path)


TREES = {  # files, then levels of training with their classes, levels of test
    "capitals": ("Train/a/1.png Train/b/2.png TEST/A/3.png TEST/b/4.png", "1a 2b", "3a 4b"),
    "one level too deep": ("x/x/train/a/1.png x/x/train/b/2.png x/x/test/a/3.png", "1a 2b", "3a"),
    "below other images": (
        "logo/9.png x/train/a/1.png x/train/b/2.png x/val/a/3.png",
        "1a 2b",
        "3a",
    ),
    "a class called train": ("car/1.png bus/2.png train/3.png", "1car 2bus 3train", ""),
    "val": ("train/a/1.png train/b/2.png val/b/3.png", "1a 2b", "3b"),
    "validation": ("train/a/1.png train/b/2.png validation/b/3.png", "1a 2b", "3b"),
    "test without classes": (
        "train/a/1.png train/b/2.png test/images/4.png valid/b/3.png",
        "1a 2b",
        "3b",
    ),
    "test1": ("train/a/1.png train/b/2.png test1/a/3.png", "1a 2b", "3a"),
    "name twice": (
        "my_train/my_train/a/1.png my_train/my_train/b/2.png my_test/my_test/a/3.png",
        "1a 2b",
        "3a",
    ),
    "a stray image in test": (
        "train/a/1.png train/b/2.png test/9.png test/b/3.png val/a/4.png",
        "1a 2b",
        "3b 9",
    ),
    "a stray image beside data": ("9.png x/a/1.png x/b/2.png", "1a 2b 9", ""),
    "one class with folders": (
        "train/a/x/1.png train/a/y/2.png train/b/3.png test/a/4.png",
        "1a 2a 3b",
        "4a",
    ),
    "links": ("train/a/1.png train/b/2.png test/a/3.png >all:train >more/x:test", "1a 2b", "3a"),
    "words": ("trainer/1.png tester/2.png cook/3.png", "1trainer 2tester 3cook", ""),
    "trainval": ("trainval/a/1.png trainval/b/2.png test/a/3.png", "1a 2b", "3a"),
    "images in camel case": (
        "trainImages/a/1.png trainImages/b/2.png testImages/a/3.png",
        "1a 2b",
        "3a",
    ),
    "sets": (
        "train_set/train_set/a/1.png train_set/train_set/b/2.png test_set/a/3.png",
        "1a 2b",
        "3a",
    ),
    "years": ("train2017/a/1.png train2017/b/2.png val2017/a/3.png", "1a 2b", "3a"),
    "no train": ("a/1.png b/2.png test/3.png", "1a 2b 3test", ""),
    "hidden": ("a/1.png b/2.png .ipynb_checkpoints/3.png a/._4.png", "1a 2b", ""),
    "deep classes": ("train/a/images/1.png train/b/images/2.png test/a/x/3.png", "1a 2b", "3a"),
    "names that differ": ("train/a/1.png train/b/2.png test_images/a/3.png", "1a 2b", "3a"),
    "in parts": (
        "train.X1/a/1.png train.X2/b/2.png val.X/a/3.png val.Y/b/4.png",
        "1a 2b",
        "3a 4b",
    ),
    "words beside others": (
        "train/1.png test-tube/2.png cook/3.png",
        "1train 2test-tube 3cook",
        "",
    ),
    "numbers": ("train1/a/1.png train1/b/2.png test1/a/3.png test2/a/4.png", "1a 2b", "3a"),
    "test1 beside test": ("train/a/1.png train/b/2.png test/a/3.png test1/a/4.png", "1a 2b", "3a"),
    "test1 beside others": (
        "train/a/1.png train/b/2.png test1/a/3.png x/a/4.png",
        "1a 2b",
        "3a",
    ),
    "words twice": (
        "train.X1/a/1.png train.X2/b/2.png val/a/3.png dev/b/4.png",
        "1a 2b",
        "3a 4b",
    ),
    "train_val": ("train_val/a/1.png train_val/b/2.png test/a/3.png", "1a 2b", "3a"),
    "a stray image": ("train/a/1.png train/b/2.png train/9.png test/a/3.png", "1a 2b 9", "3a"),
}


@pytest.mark.parametrize("name", TREES)
def test_folders_of_every_layout(name, tmp_path, capsys):
    files, train, test = TREES[name]
    links = [text[1:].split(":") for text in files.split() if text[0] == ">"]
    files = [text for text in files.split() if text[0] != ">"]
    write_tree(tmp_path / "root", {path: int(Path(path).stem.strip("._")) for path in files})
    for link, target in links:
        (tmp_path / "root" / link).parent.mkdir(exist_ok=True)
        (tmp_path / "root" / link).symlink_to(tmp_path / "root" / target)
    x, y, x_test, y_test, _, obstacle, _ = prepare(DATASET=str(tmp_path / "root"), BATCH_SIZE=2)
    levels = [*map(int, re.findall(r"\d", train))]
    names = [text[1:] for text in train.split()]
    classes = sorted({*names} - {""})
    assert sorted(x[:, 0, 0, 0].tolist()) == sorted(levels)
    expected = {n: classes.index(c) if c else -1 for n, c in zip(levels, names, strict=True)}
    assert dict(zip(x[:, 0, 0, 0].tolist(), y.tolist(), strict=True)) == expected
    printed = capsys.readouterr().out
    if test:
        found = zip(x_test[:, 0, 0, 0].tolist(), y_test.tolist(), strict=True)
        assert dict(found) == {
            int(t[0]): classes.index(t[1]) if t[1:] else -1 for t in test.split()
        }
    else:
        assert x_test is None and obstacle
    shown = ", ".join(classes)
    count = f"train {len(x)} images of {len(classes)} classes ({shown}), test {len(test.split())}\n"
    assert count in printed
    unused = "below other images", "test without classes", "a stray image in test"
    unused += ("test1 beside others", "test1 beside test", "numbers")
    assert ("not used" in printed) == (name in unused)
    loose = "stray" in name or name == "test without classes"
    assert ("not in a class folder: 1 images, such as" in printed) == loose


@pytest.mark.parametrize(
    "names",
    [
        ("images", "masks"),
        ("Train_Images", "Train_Masks"),
        ("JPEGImages", "SegmentationClass"),
        ("imgs", "ground_truth"),
    ],
)
def test_masks_beside_images_are_left_out(names, tmp_path, capsys):
    write_tree(tmp_path, {f"x/{name}/{i}.png": i for i in (1, 2) for name in names})
    write_tree(tmp_path, {"labels/3.png": 3})  # without images/ beside it, a class
    images = prepare(DATASET=str(tmp_path))
    assert sorted(images.train_images[:, 0, 0, 0].tolist()) == [1, 2, 3]
    assert "not used: 2 images, such as" in capsys.readouterr().out
    write_tree(tmp_path, {"x/button/4.png": 4})  # all three are classes
    assert len(prepare(DATASET=str(tmp_path)).train_images) == 6


@pytest.mark.parametrize("parents", ["ab", ("bottle", "cable")])
def test_several_splits_are_refused(parents, tmp_path):
    for parent in parents:
        write_tree(tmp_path, {f"{parent}/train/good/1.png": 1, f"{parent}/test/bad/2.png": 2})
    expect_error(f"several splits: {parents[0]}/test, {parents[1]}/test", DATASET=str(tmp_path))


def test_tiny_imagenet_is_read_as_unzipped(tmp_path):
    write_tree(
        tmp_path, {f"train/n0{i}/images/n0{i}_{j}.JPEG": 9 * i + j for i in (1, 2) for j in (0, 1)}
    )
    write_tree(tmp_path, {f"val/images/val_{i}.JPEG": 50 + i for i in range(3)})
    write_tree(tmp_path, {f"test/images/test_{i}.JPEG": 90 + i for i in range(3)})
    rows = [f"val_{i}.JPEG\tn0{1 + i % 2}\t0\t32\t62\t44\n" for i in range(3)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    x, y, x_test, y_test, *_ = prepare(DATASET=str(tmp_path))
    assert y.tolist() == [0, 0, 1, 1] and x_test[:, 0, 0, 0].tolist() == [50, 51, 52]
    assert y_test.tolist() == [0, 1, 0]


def test_images_of_more_than_8_bits_share_one_robust_scale(tmp_path):
    """Of negative, infinite and missing values, too; two exposures stay apart."""
    ramp = np.linspace(-300, 700, 32 * 32).reshape(32, 32)
    hot, broken = ramp.copy(), ramp / 2
    hot[3, 3], broken[0, :3] = 60_000, (np.nan, np.inf, -np.inf)
    planes = [ramp, ramp / 2, hot, broken]
    for i, plane in enumerate(planes):
        Image.fromarray(plane.astype(np.float32)).save(tmp_path / f"{i}.tif")
    pil = [Image.fromarray(plane.astype(np.float32)) for plane in planes]
    low, high = np.quantile(
        np.nan_to_num(np.stack(planes), nan=-150, posinf=-150, neginf=-150), (0.001, 0.999)
    )
    for dataset in (None, pil):
        x = prepare(dataset, DATASET=str(tmp_path)).train_images
        expected = torch.from_numpy(((ramp - low) / (high - low) * 255).clip(0, 255))
        assert (x[0] - expected).abs().max() <= 1 and (x[2] - expected).abs().median() <= 1
        half = ((ramp / 2 - low) / (high - low) * 255).clip(0, 255)
        assert (x[1] - torch.from_numpy(half)).abs().max() <= 1 and torch.equal(
            x[3, :, 4:], x[1, :, 4:]
        )
    test = as_images((pil, [0] * 4, pil[1:2], [0]), 32)
    assert torch.equal(test.test_images[0], test.train_images[1])  # by the levels of training
    deep = [Image.fromarray((plane + 300).astype(np.uint16)) for plane in planes[:2]]
    x = as_images(deep).train_images.float()
    assert x[0, 0].max() == 255 and 110 < x[1, 0].max() - x[1, 0].min() < 140


def test_large_jpeg_files_are_decoded_small(tmp_path, monkeypatch):
    x = F.interpolate(noise(1, 6, 6).float(), (500, 700), mode="bicubic").clamp(0, 255).byte()
    Image.fromarray(arrays(x)[0]).save(tmp_path / "a.jpg", quality=95)
    found = prepare([tmp_path / "a.jpg"] * 2, IMAGE_SIZE=32).train_images[0].int()
    whole = dinov2_cifar.to_uint8(Image.open(tmp_path / "a.jpg"), 32).int()
    assert 0 < (found - whole).abs().max() <= 6 and (found - whole).float().abs().mean() < 1


def test_opened_files_do_not_keep_their_pixels(tmp_path):
    save(tmp_path, noise(3))
    opened = [Image.open(tmp_path / f"{i}.png") for i in range(3)]
    check(as_images(opened), noise(3))
    assert all(image.tile for image in opened)  # not decoded
    frames = [Image.fromarray(array) for array in arrays(noise(3))]
    frames[0].save(tmp_path / "all.tif", save_all=True, append_images=frames[1:])
    stack = [Image.open(tmp_path / "all.tif") for _ in frames]
    for i, frame in enumerate(stack):
        frame.seek(i)
    check(as_images(stack), noise(3))
    with open(tmp_path / "0.png", "rb") as file:  # without a name
        check(as_images([Image.open(file)]), noise(3)[:1])
    opened[1].paste((1, 2, 3), (0, 0, 32, 32))
    assert as_images(opened).train_images[1, :, 5, 5].tolist() == [1, 2, 3]


def test_items_with_paths_are_files_too(tmp_path, capsys):
    save(tmp_path, noise(3))
    paths = [str(tmp_path / f"{i}.png") for i in (0, 1, 9, 2)]
    for kind in zip, lambda *parts: [{"image": x, "label": y} for x, y in zip(*parts, strict=True)]:
        check(as_images([*kind(paths, [0, 1, 0, 1])]), noise(3), torch.tensor([0, 1, 1]))
        assert "1 No such file or directory (" in (text := capsys.readouterr().err)
        assert "9.png" in text
        with pytest.raises(InputError, match="item 3 of the dataset: label -5 must be"):
            as_images([*kind(paths, [0, 1, 0, -5])])


def test_parts_of_random_split_are_training_and_test_images():
    y = torch.arange(6) % 2
    dataset = torch.utils.data.TensorDataset(X, y)
    split = torch.utils.data.random_split(dataset, [4, 2], torch.Generator().manual_seed(0))
    i, j = (torch.tensor(part.indices) for part in split)
    check(as_images(split), X[i], y[i], X[j], y[j])


def test_names_that_are_not_used_are_printed(capsys):
    check(as_images({"train": X, "train_labels": Y, "y": Y, "test": X, "y_test": Y}), X, Y, X, Y)
    assert capsys.readouterr().out == "not used: y\n"


def test_images_without_room_in_memory_say_what_they_need(monkeypatch):
    monkeypatch.setattr(Endless, "__len__", lambda self: 10**8)
    with pytest.raises(InputError, match="100,000,000 images need 314,572.8 GB; lower IMAGE_SIZE"):
        as_images(Endless(), 1024)


def test_folder_without_images_names_what_is_in_it(tmp_path):
    for name in ("a.zip", "b.zip", "c.csv"):
        (tmp_path / name).touch()
    expect_error("no readable image", "but 2 .zip, 1 .csv", DATASET=str(tmp_path))


def test_cifar_s_own_folder_is_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in ("data_batch_1", "test_batch", "readme.html"):
        (tmp_path / "cifar-10-batches-py" / name).touch()
    expect_error("--dataset cifar10 (or 100) --data-path", DATASET=str(tmp_path))


class Endless(torch.utils.data.Dataset):
    """As long as one asks for items, there are some."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[0]


BAD = {  # a dataset, and words of its error
    "nothing": ([], "empty"),
    "no images": (X[:0], "empty"),
    "normalized": ((X / 255 - 0.5) / 0.25, "-2..2"),
    "floats to 255": (X.float(), "0..255"),
    "integers": (X.long(), "int64"),
    "one image": (X[0], "(3, 32, 32), which may be one image: add an axis"),
    "one image, channels last": (arrays(X)[0], "(32, 32, 3)"),
    "flat": (X.flatten(1).numpy(), "(6, 3072)"),
    "one-hot labels": ((X, np.eye(3)[Y]), "label [0.0, 1.0"),
    "several images": ([X[:3], X[3:]], "(3, 3, 32, 32) is not one image"),
    "path": ("photos", "DATASET of Config"),
    "paths twice": ((["a.png"], ["b.png"]), "No such file"),
    "alpha": (np.zeros((6, 32, 32, 4), "u1"), "32, 32, 4)"),
    "missing files": (["a.png"] * 9, "No such file"),
    "number": (5, "not a sequence"),
    "iterator": (iter(X), "not a sequence"),
    "few labels": ((X, Y[:3]), "6 images, but 3 labels"),
    "float labels": ((X, Y / 2), "label 0.5"),
    "label -5": ((X, Y - 5), "label -4"),
    "several labels": (Rows((x, [1, 2]) for x in PIL), "label [1, 2]"),
    "three parts": ((X, Y, X), "3"),
    "labels first": ((Y, X), "(6,)"),
    "no test images": ((X, Y, X[:0], Y[:0]), "one of its parts is empty"),
    "several test splits, one empty": ({"train": PIL, "val": [], "test": []}, "parts is empty"),
    "rows without images": (Rows({"text": "a"} for _ in range(6)), "text"),
    "rows with two labels": (
        Rows({"img": x, "fine_label": 1, "coarse_label": 2} for x in PIL),
        "fine_label, coarse_label",
    ),
    "sizes": ([PIL[0], PIL[1].resize((8, 8))], "(8, 8)"),
    "mapping": ({"images": X}, "x_train"),
    "data sets in a list": ([Endless(), Endless(), Endless()], "2 or 4, not 3"),
    "data sets as images": (Rows([(Endless(), 0)] * 6), "not Endless"),
    "empty image": ([Image.new("RGB", (0, 0))] * 9, "item 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_dataset_is_refused_before_anything_is_measured(name, small, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "measure_baseline", lambda *args: pytest.fail("measured"))
    dataset, words = BAD[name]
    with pytest.raises(InputError, match="^.+$") as caught:
        as_images(dataset) if name == "sizes" else dinov2_cifar.train_dinov2(small(), dataset)
    assert words in str(caught.value)
