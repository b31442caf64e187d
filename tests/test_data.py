"""Data: built-in shapes, archives, folders, CIFAR with and without network, datasets in memory."""

import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, close, read_records
from filelock import FileLock, Timeout
from PIL import Image
from torchvision import transforms as T

import dinov2_cifar
from dinov2_cifar import Config, InputError, as_images, make_shapes, prepare_images


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
    assert name in (None, images[-1])


def expect_error(*words, dataset=None, **settings):
    with pytest.raises(InputError, match="^.+$") as caught:  # one line
        prepare(dataset, **settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_make_shapes_is_balanced_shuffled_and_seeded():
    train, y, test, y_test, name = prepare(IMAGE_SIZE=16, TRAIN_IMAGES=2500)
    assert train.shape == (2500, 3, 16, 16) and test.shape == (2048, 3, 16, 16) and name == "shapes"
    assert (y.bincount() - 250).abs().max() < 2 and (y_test.bincount() - 204.8).abs().max() < 1
    assert len(torch.cat([train, test]).unique(dim=0)) == 4548 and len(y[:100].unique()) == 10
    check(make_shapes(2500, 16, masks=True)[:2], train, y)  # drawn in two parts
    assert not torch.equal(*make_shapes(4096, 8)[0].split(2048))
    assert len(prepare(IMAGE_SIZE=8, TRAIN_IMAGES=10**9)[0]) == 19456
    x, y, held_out, _, _ = prepare(IMAGE_SIZE=8, TRAIN_IMAGES=50, VALIDATION_IMAGES=30)
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
    for bad in (None, x / 255, noise(6).numpy(), x[..., 0], np.array([{}] * 6, object)):
        expect_error("a.npz", "x_train", DATASET=npz(path, x_train=bad))
    for bad in (np.arange(5), np.arange(6) - 1, np.arange(6.0), np.arange(6)[:, None]):
        expect_error("labels", "6 integers", DATASET=npz(path, y_train=bad))


def test_folder_of_classes_gives_labels(tmp_path):
    places = ["train/dog", "train/cat", "train/cat/deeper", "test/cat", "test/eel"]
    for level, place in enumerate(places):  # the gray level says what became of a file
        save(tmp_path / "pets" / place, torch.full((1, 3, 32, 32), level, dtype=torch.uint8))
    x, y, x_test, y_test, _ = prepare(DATASET=str(tmp_path / "pets"))
    levels, labels = torch.cat([x, x_test])[:, 0, 0, 0], torch.cat([y, y_test])
    assert labels[levels.argsort()].tolist() == [1, 0, 0, 0, 2] and len(x) == 3
    (tmp_path / "pets" / "test").rename(tmp_path / "elsewhere")
    assert prepare(DATASET=str(tmp_path / "pets"))[2:] == (None, None, "pets")


@pytest.mark.parametrize("where", ["", "train", "deep/er"])
def test_folder_of_loose_images_has_no_labels(tmp_path, where, capsys):
    save(tmp_path / where, noise(3))
    save(tmp_path / ".thumbnails", noise(2))  # hidden, as the next
    (tmp_path / where / "._0.png").write_bytes(b"")
    (tmp_path / where / "notes.txt").write_text("no image")
    check(prepare(DATASET=str(tmp_path)), noise(3))
    assert not capsys.readouterr().err


def test_folder_leaves_out_and_names_what_is_no_8_bit_image(tmp_path, capsys):
    folder, other = tmp_path / "photos", tmp_path / "elsewhere"
    save(folder, noise(2))
    save(other / "class", noise(3))
    (folder / "linked").symlink_to(other)
    (folder / "linked.png").symlink_to(other / "class" / "2.png")
    (folder / "lost.png").symlink_to("nowhere.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    for kind in (np.uint16, np.int32, np.float32):  # Pillow would clip them at 255
        Image.fromarray(np.full((32, 32), 999, kind)).save(folder / f"{kind.__name__}.tif")
    assert len(prepare(DATASET=str(folder)).train_images) == 2 + 3 + 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: 5 files are left out: ") and "0.png" not in line
    assert "cut.png (" in line and "float32.tif (" in line and "8 bits" in line


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
        return SimpleNamespace(data=arrays(noise(5 + train)), targets=[*range(5 + train)])

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
    assert start["data"] == checkpoint["data_name"] == "shapes (no CIFAR-10)"


def test_train_images_is_a_fixed_random_subset():
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(40, 3, 32, 32)
    dataset = (images, torch.arange(40) * 2, images, torch.arange(40))
    x, y, *test, _ = prepare(dataset, TRAIN_IMAGES=10)
    assert len(y.unique()) == 10 and y.max() > 40 and torch.equal(x[:, 0, 0, 0] * 2, y)
    check((x, y, *test), *prepare(dataset, TRAIN_IMAGES=10, SEED=1)[:2], *dataset[2:])
    for n in (0, 40, 41):
        check(prepare(dataset, TRAIN_IMAGES=n, BATCH_SIZE=40), *dataset)
    expect_error("BATCH_SIZE (5)", "there are 4", dataset=dataset, BATCH_SIZE=5, TRAIN_IMAGES=4)


def test_validation_images_are_training_images_in_place_of_test_images():
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(40, 3, 32, 32)
    for test in (images + 100, torch.arange(40)), ():
        dataset = (images, torch.arange(40) * 2, *test)
        held_out = prepare(dataset, VALIDATION_IMAGES=12)[2]
        for n, left in (0, 28), (10, 10), (30, 28):
            x, y, x_test, y_test, _ = prepare(dataset, VALIDATION_IMAGES=12, TRAIN_IMAGES=n, SEED=n)
            assert len(x) == left and torch.equal(x_test, held_out)
            assert len(torch.cat([x, x_test])[:, 0, 0, 0].unique()) == left + 12
            close(torch.cat([y, y_test]), 2 * torch.cat([x, x_test])[:, 0, 0, 0].long())
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


def test_datasets_of_every_form_become_images(shapes):
    x, y, *_ = shapes
    for dataset in (x, list(x), [Image.fromarray(array) for array in arrays(x)]):
        check(as_images(dataset), x)
    for kind in (torch.uint8, torch.uint16, torch.uint64, torch.int8, torch.int64):
        check(as_images((x, y.to(kind))), x, y)
    check(as_images(shapes), *shapes)
    check(as_images(dinov2_cifar.Images(x, name="mine")), x, name="mine")
    fake = dinov2_cifar.datasets.FakeData(6, (3, 32, 32))  # torchvision's PIL images and labels
    x = torch.stack([T.PILToTensor()(fake[i][0]) for i in range(6)])
    check(as_images(fake), x, torch.tensor([fake[i][1] for i in range(6)]))


def test_bad_dataset_is_refused_before_a_network_is_built(small, shapes, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "make_model", lambda *args: pytest.fail("built a network"))
    (x, y), *pil = shapes[:2], Image.new("RGB", (0, 0)), Image.new("F", (32, 32))
    bad = [[], x[:0], x / 255, x.permute(0, 2, 3, 1), x[0], x.numpy(), ["a.png"] * 9, 5, iter(x)]
    bad += [(x, y[:3]), (x, y / 2), (x, y[:, None]), (x, y.tolist()), (x, y - 1), (x, y + 2**16)]
    bad += [(x, y, x), (y, x), (x, y, x[:0], y[:0]), [(image, "cat") for image in x]]
    for i, dataset in enumerate(bad + [[image] * 9 for image in pil]):
        with pytest.raises(InputError, match="^.+$"):
            dinov2_cifar.train_dinov2(small(), dataset=dataset)
            pytest.fail(f"{i} is accepted")
