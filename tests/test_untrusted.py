"""Files from strangers: nothing in them is executed, and a broken file is one line of error."""

import io
import pickle
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

import dinov2_cifar
from dinov2_cifar import (
    Config,
    InputError,
    load_backbone,
    load_checkpoint,
    load_folder,
    load_images,
    main,
    make_model,
    make_optimizer,
    save_checkpoint,
    train_dinov2,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and Pillow, about these files
MEAN_STD = [0.5] * 3, [0.2] * 3


def make_run(**settings):
    model = make_model(Config(**{**SMALL, **settings}), *MEAN_STD)
    return model, make_optimizer(model)


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    """Return the bytes of the checkpoint of a run of one epoch."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
        train_dinov2(Config(**{**SMALL, "OUTPUT_DIR": str(folder)}), dataset=shapes[0])
    return (folder / "dinov2_last.pth").read_bytes()


def load_errors(path, run=None):
    """Return the messages of the InputErrors of both ways to load it; other errors pass."""
    messages = []
    for load in (load_backbone, lambda path: load_checkpoint(path, *(run or make_run()))):
        try:
            load(path)
        except InputError as error:
            messages.append(str(error))
    assert all(str(path) in message for message in messages), messages
    return messages


def resume_error(path, folder, data, **settings):
    """Return the message of the InputError of a run that resumes path, or None."""
    given = {**SMALL, "OUTPUT_DIR": str(folder), "RESUME": str(path), "TOTAL_EPOCHS": 2}
    try:
        train_dinov2(Config(**{**given, **settings}), dataset=data)
    except InputError as error:
        return str(error)


# Nothing is executed


class Malicious:
    """Its pickle creates a file where it is loaded."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.fixture
def malicious(tmp_path):
    """Return an object whose pickle creates a file; check that the file was not created."""
    victim = tmp_path / "created"
    pickle.loads(pickle.dumps(Malicious(victim)))  # the attack works where a pickle is trusted
    assert victim.exists()
    victim.unlink()
    yield Malicious(victim)
    assert not victim.exists()


def exits_with_one_line(capsys, *argv):
    with pytest.raises(SystemExit, match="2"):
        main(list(map(str, argv)))
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("form", ["in a checkpoint", "a zip", "a pickle"])
def test_a_malicious_checkpoint_is_refused_and_not_executed(
    form, malicious, checkpoint, tmp_path, capsys
):
    path = tmp_path / "x.pth"
    if form == "in a checkpoint":
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        torch.save({**states, "data_name": malicious}, path)
    elif form == "a zip":
        torch.save(malicious, path)
    else:
        path.write_bytes(pickle.dumps(malicious))
    assert len(load_errors(path)) == 2
    argv = "--dataset", "shapes", "--image-size", 8, "--global-crop-size", 8, "--device", "cpu"
    argv += "--model-size", "tiny", "--output-dir", tmp_path / "out", "--resume", path
    assert "x.pth" in exits_with_one_line(capsys, *argv)


@pytest.mark.parametrize("form", ["an array", "a pickle as an array", "a pickle"])
def test_a_malicious_archive_is_refused_and_not_executed(form, malicious, tmp_path, capsys):
    path, zeros = tmp_path / "x.npz", np.zeros((8, 32, 32, 3), np.uint8)
    if form == "an array":
        labels, evil = np.zeros(8, int), np.array([malicious], dtype=object)
        np.savez(path, x_train=evil, y_train=labels, x_test=zeros, y_test=labels)
    elif form == "a pickle":
        path.write_bytes(pickle.dumps(malicious))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("x_train", "y_train", "x_test", "y_test"):
                archive.writestr(f"{name}.npy", pickle.dumps(malicious))
    argv = "--dataset", path, "--output-dir", tmp_path / "out"
    assert "x.npz is not a .npz" in exits_with_one_line(capsys, *argv)


# Broken checkpoints


def test_a_whole_checkpoint_is_accepted(checkpoint, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
    (tmp_path / "x.pth").write_bytes(checkpoint)
    assert load_errors(tmp_path / "x.pth") == []
    assert resume_error(tmp_path / "x.pth", tmp_path / "out", shapes[0]) is None


@pytest.mark.parametrize("fraction", [0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_checkpoint_is_refused(fraction, checkpoint, tmp_path):
    (tmp_path / "x.pth").write_bytes(checkpoint[: int(fraction * len(checkpoint))])
    assert len(load_errors(tmp_path / "x.pth")) == 2


FOREIGN = {
    "missing": None,
    "text": b"not a checkpoint",
    "zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "image": lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"),
    "folder": Path.mkdir,
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a list": lambda path: torch.save([1, 2], path),
    "no keys": lambda path: torch.save({}, path),
    "weights alone": lambda path: torch.save({"student_state_dict": {}}, path),
    "another program's": lambda path: torch.save({"config": {"lr": 0.1}, "model": {}}, path),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_not_a_checkpoint(name, tmp_path):
    content, path = FOREIGN[name], tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content(path)
    messages = load_errors(path)
    assert len(messages) == 2 and all("not a checkpoint" in message for message in messages)


def test_a_bit_flipped_in_the_pickle_is_an_error_or_harmless(checkpoint, tmp_path):
    """Some bits are digits of a setting or a metric. No other exception may be raised."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("/data.pkl"))
        pickled = archive.read(entry)
    start = checkpoint.index(pickled)
    draw, run, refused = random.Random(0), make_run(), 0
    for _ in range(40):
        data = bytearray(checkpoint)
        data[start + draw.randrange(len(pickled))] ^= 1 << draw.randrange(8)
        (tmp_path / "x.pth").write_bytes(data)
        refused += bool(load_errors(tmp_path / "x.pth", run))
    assert refused > 10


RUN_STATE = ["epoch", "step", "data_name", "steps_per_epoch", "history", "totals"]


@pytest.mark.parametrize("key", RUN_STATE)
def test_a_checkpoint_without_what_a_run_needs_is_not_resumed(key, checkpoint, shapes, tmp_path):
    states, path = torch.load(io.BytesIO(checkpoint), weights_only=True), tmp_path / "x.pth"
    del states[key]
    torch.save(states, path)
    assert "x.pth" in (resume_error(path, tmp_path / "out", shapes[0]) or "")


def test_a_checkpoint_saved_outside_a_run_loads_and_cannot_be_resumed(shapes, tmp_path):
    path, (model, optimizer) = tmp_path / "x.pth", make_run()
    save_checkpoint(path, model, optimizer, 1, 8)
    assert load_errors(path) == []
    assert "x.pth" in (resume_error(path, tmp_path / "out", shapes[0]) or "")


@pytest.mark.parametrize(
    "settings",
    [
        dict(MODEL_DIMS={"tiny": {"dim": 64, "depth": 2, "heads": 2}}),
        dict(PATCH_SIZE=4),
        dict(PROJECTION_DIM=32),
        dict(LAYER_SCALE=0.1),
        dict(REGISTER_TOKENS=1),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_checkpoint_of_another_size_is_refused(settings, checkpoint, tmp_path):
    (tmp_path / "x.pth").write_bytes(checkpoint)
    with pytest.raises(InputError, match=r"x\.pth does not fit this model"):
        load_checkpoint(tmp_path / "x.pth", *make_run(**settings))


def test_the_optimizer_s_settings_are_the_run_s_own(checkpoint, tmp_path):
    states = torch.load(io.BytesIO(checkpoint), weights_only=True)
    for group in states["optimizer_state_dict"]["param_groups"]:
        group.update(maximize=True, betas=("x",), amsgrad=True, params=[])
    torch.save(states, tmp_path / "x.pth")
    model, optimizer = make_run()
    before = optimizer.state_dict()["param_groups"]
    load_checkpoint(tmp_path / "x.pth", model, optimizer)
    assert optimizer.state_dict()["param_groups"] == before and optimizer.state_dict()["state"]


# Broken archives and images


def good_archive(path, save=np.savez):
    images = np.random.default_rng(0).integers(0, 4, (8, 32, 32, 3), np.uint8)
    save(path, x_train=images, y_train=np.arange(8), x_test=images, y_test=np.arange(8))


def flip_bytes(path, start, count):
    data = bytearray(path.read_bytes())
    data[start : start + count] = (byte ^ 255 for byte in data[start : start + count])
    path.write_bytes(data)


def compressed_and_damaged(path):
    good_archive(path, np.savez_compressed)
    flip_bytes(path, 300, 20)


def empty_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", b"")


DAMAGE = {
    "text": lambda path: path.write_text("not a zip"),
    "nothing": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "a flipped byte": lambda path: flip_bytes(path, 10_000, 1),
    "compressed": compressed_and_damaged,
    "an empty member": empty_member,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_archive_is_refused(name, tmp_path):
    path = tmp_path / "x.npz"
    good_archive(path)
    config = Config(**{**SMALL, "DATASET": str(path)})
    assert len(load_images(config).train_images) == 8
    DAMAGE[name](path)
    with pytest.raises(InputError, match=r"x\.npz is not a \.npz with x_train, ") as caught:
        load_images(config)
    assert "\n" not in str(caught.value)


def broken_images(folder, count, draw):
    """Write images that are truncated, have wrong bits, or are noise, or have a wrong suffix."""
    suffixes = {"PNG": "png", "JPEG": "jpg", "BMP": "bmp", "TIFF": "tif"}
    suffixes |= {"WEBP": "webp", "PPM": "ppm"}
    for n in range(count):
        buffer, kind = io.BytesIO(), draw.choice(list(suffixes))
        pixels = np.random.default_rng(n).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, kind)
        data, suffix = bytearray(buffer.getvalue()), suffixes[kind]
        if n % 4 == 0:
            del data[draw.randrange(len(data)) :]
        elif n % 4 == 1:
            for _ in range(draw.choice((1, 5, 50))):
                data[draw.randrange(min(len(data), 200))] ^= 1 << draw.randrange(8)
        elif n % 4 == 2:
            data = draw.randbytes(draw.randrange(300))
        else:
            suffix = draw.choice(list(suffixes.values()))
        (folder / f"{n:03}.{suffix}").write_bytes(data)


def test_broken_images_are_read_or_left_out_and_counted(tmp_path):
    broken_images(tmp_path, 100, random.Random(0))
    with pytest.warns(UserWarning, match="files are left out") as caught:
        images = load_folder(tmp_path, 32)
    left_out = int(re.match(r"(\d+) files", str(caught[-1].message))[1])
    assert len(images.train_images) + left_out == 100 and 40 < left_out < 75


def test_a_program_that_looks_like_an_image_is_not_opened(tmp_path):
    """For an EPS, Pillow starts Ghostscript."""
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "program.png", "EPS")
    with pytest.warns(UserWarning, match=r"program\.png.*cannot identify image file"):
        assert len(load_folder(tmp_path, 32).train_images) == 1
