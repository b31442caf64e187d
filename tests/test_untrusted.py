"""Nothing let in: checkpoints and pictures from strangers, broken at random or on purpose, are refused in plain words."""

import io
import math
import os
import pickle
import random
import warnings
import zipfile
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

import dinov2_cifar
from dinov2_cifar import Config, InputError, load_backbone, load_checkpoint, load_folder, main, make_model, make_optimizer, save_checkpoint, train_dinov2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """→ a whole checkpoint's bytes, and the model and optimizer that it belongs to."""
    path, config = tmp_path_factory.mktemp("whole") / "whole.pth", Config(**SMALL)
    model = make_model(config, [0.5] * 3, [0.2] * 3)
    optimizer = make_optimizer(model)
    for parameter in (p for part in model.student_parts() for p in part.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_checkpoint(path, model, optimizer, 1, 8, "shapes", 8)
    return path.read_bytes(), model, optimizer


def tries(path, model, optimizer):
    """→ the messages of the InputErrors when it is loaded in both ways; any other exception gets through."""
    messages = []
    for load in (lambda: load_backbone(path), lambda: load_checkpoint(path, model, optimizer)):
        try:
            load()
        except InputError as error:
            messages.append(str(error))
    return messages


def test_a_whole_checkpoint_is_taken(checkpoint, tmp_path):
    (tmp_path / "x.pth").write_bytes(checkpoint[0])
    assert not tries(tmp_path / "x.pth", *checkpoint[1:])


@pytest.mark.slow
def test_two_hundred_broken_checkpoints_are_refused_or_loaded_but_never_a_traceback(checkpoint, tmp_path):
    draw, path, refused = random.Random(0), tmp_path / "x.pth", 0
    for case in range(200):
        data = bytearray(checkpoint[0])
        if case % 2:
            del data[draw.randrange(len(data)):]
        else:
            for _ in range(draw.choice((1, 3, 30))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        messages = tries(path, *checkpoint[1:])
        assert all(str(path) in message and "\n" not in message for message in messages), messages
        assert messages or not case % 2                          # none that is cut short is taken
        refused += bool(messages)
    assert refused > 190                                         # a bit may fall between the parts of the file


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, 7, "text", [], {}, {"x": 1}, torch.zeros(3), float("nan"), -1], ids=str)
def test_a_checkpoint_with_wrong_contents_is_refused(wrong, checkpoint, tmp_path):
    whole = torch.load(io.BytesIO(checkpoint[0]), weights_only=True)
    path = tmp_path / "x.pth"
    torch.save(wrong, path)
    assert len(tries(path, *checkpoint[1:])) == 2
    for key in whole:
        states = {**deepcopy(whole), key: wrong}
        torch.save(states, path)
        for message in tries(path, *checkpoint[1:]):
            assert str(path) in message, message
        if key.endswith("state_dict") and key != "optimizer_state_dict" or key == "config" and not (isinstance(wrong, dict) and not wrong):
            assert tries(path, *checkpoint[1:]), key
    for name in whole["config"]:
        torch.save({**whole, "config": {**whole["config"], name: wrong}}, path)
        tries(path, *checkpoint[1:])


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_a_checkpoint_that_would_do_something_is_refused_and_does_nothing(checkpoint, tmp_path, capsys):
    victim = tmp_path / "created"
    pickle.loads(pickle.dumps(Malicious(victim)))                # the attack works where it is let in
    assert victim.exists()
    victim.unlink()
    whole = torch.load(io.BytesIO(checkpoint[0]), weights_only=True)
    torch.save({**whole, "data": Malicious(victim)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(victim)))
    np.savez(tmp_path / "x.npz", x_train=np.array([Malicious(victim)], dtype=object))
    for name in ("zip.pth", "plain.pth"):
        assert len(tries(tmp_path / name, *checkpoint[1:])) == 2
        with pytest.raises(SystemExit, match="2"):
            main(["--dataset", "shapes", "--resume", str(tmp_path / name), "--output-dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", str(tmp_path / "x.npz"), "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("error: ") and "not a readable" in line for line in said), said
    assert not victim.exists()


def moments(states):
    return states["optimizer_state_dict"]["state"][0]


HOSTILE = {  # what each does to a whole checkpoint, and what is said of it
    "nothing": (lambda s: None, None),
    "a negative epoch": (lambda s: s.update(epoch=-1), "does not come after"), "a negative step": (lambda s: s.update(step=-5), "does not come after"),
    "a step far away": (lambda s: s.update(step=10 ** 12), "does not come after"), "no steps": (lambda s: s.pop("steps_per_epoch"), "no steps_per_epoch"),
    "steps of text": (lambda s: s.update(steps_per_epoch="x"), "no steps_per_epoch"), "saved outside a run": (lambda s: s.update(steps_per_epoch=0), "by a run"),
    "no time": (lambda s: s.pop("saved_at"), "no saved_at"), "a time of no number": (lambda s: s.update(saved_at=math.nan), "saved at nan"),
    "untold text": (lambda s: s.update(untold=["x"]), "no checkpoint"), "untold names": (lambda s: s.update(untold=[{"skipped": 0.0}]), "untold"),
    "untold words": (lambda s: s.update(untold=[dict.fromkeys(dinov2_cifar.STEP_VALUES, "x")]), "untold"),
    "moments of another shape": (lambda s: moments(s).update(exp_avg=torch.zeros(3)), "not of its shape"),
    "half of the moments": (lambda s: moments(s).pop("exp_avg"), "not of its shape"),
    "moments of one number": (lambda s: moments(s).update(exp_avg=torch.zeros(1).expand(moments(s)["exp_avg"].shape)), "not of its shape"),
    "moments of another kind": (lambda s: moments(s).update(exp_avg=moments(s)["exp_avg"].double()), "not of its shape"),
    "moments of text": (lambda s: moments(s).update(step="x"), "no state to go on from"),
    "moments of nothing": (lambda s: s["optimizer_state_dict"]["state"].update({999: moments(s)}), "of which there is none"),
    "moments from behind": (lambda s: s["optimizer_state_dict"]["state"].update({-1: moments(s)}), "of which there is none"),
    "NumPy beyond its numbers": (lambda s: s.update(random_states=[{**s["random_states"][0], "numpy": (*s["random_states"][0]["numpy"][:2], 10 ** 8, 0, 0.0)}]),
                                 "no place in its 624"),
    "weights that are not finite": (lambda s: s["student_state_dict"]["cls_token"].fill_(math.nan), "not a tensor of finite"),
    "weights of one number": (lambda s: s["student_state_dict"].update(cls_token=torch.zeros(1).expand(10 ** 9)), "not a tensor of finite"),
    "sparse weights": (lambda s: s["student_state_dict"].update(cls_token=s["student_state_dict"]["cls_token"].to_sparse()), "no checkpoint"),
    "no weights": (lambda s: s["student_state_dict"].clear(), "another size"),
    "a deep setting": (lambda s: s["config"].update(SEED=deep(50)), "settings that cannot be used"),
    "other heads": (lambda s: s["config"].update(MODEL_DIMS={"tiny": (32, 2, 4)}), "another size")}


def deep(levels):
    return [deep(levels - 1)] if levels else []


@pytest.mark.slow
@pytest.mark.parametrize("change, said", HOSTILE.values(), ids=HOSTILE.keys())
def test_nothing_hostile_is_gone_on_from(change, said, checkpoint, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "finish", lambda *args: None)
    states = torch.load(io.BytesIO(checkpoint[0]), weights_only=True)
    states.update(data="your pictures")
    change(states)
    torch.save(states, tmp_path / "x.pth")
    config = Config(**{**SMALL, "OUTPUT_DIR": str(tmp_path / "out"), "RESUME": str(tmp_path / "x.pth"), "TOTAL_EPOCHS": 2})
    with pytest.raises(InputError, match=f"x.pth.*{said}") if said else nullcontext():
        train_dinov2(config, dataset=shapes)


def test_settings_of_the_optimizer_are_the_runs_own(checkpoint, tmp_path):
    states = torch.load(io.BytesIO(checkpoint[0]), weights_only=True)
    for group in states["optimizer_state_dict"]["param_groups"]:
        group.update(maximize=True, betas=("x",), amsgrad=True, params=[])
    torch.save(states, tmp_path / "x.pth")
    model = make_model(Config(**SMALL), [0.5] * 3, [0.2] * 3)
    own, optimizer = make_optimizer(model).state_dict()["param_groups"], make_optimizer(model)
    load_checkpoint(tmp_path / "x.pth", model, optimizer)
    assert optimizer.state_dict()["param_groups"] == own and optimizer.state_dict()["state"]


def test_other_sizes_are_refused_by_their_settings_names(checkpoint, tmp_path):
    (tmp_path / "x.pth").write_bytes(checkpoint[0])
    for name, value in (("MODEL_DIMS", {"tiny": (32, 2, 4)}), ("PATCH_SIZE", 4), ("PROJECTION_DIM", 32), ("LAYER_SCALE", 0.1), ("REGISTER_TOKENS", 1)):
        model = make_model(Config(**{**SMALL, name: value}), [0.5] * 3, [0.2] * 3)
        with pytest.raises(InputError, match=rf"of another size than this model: {name}: saved .*, now "):
            load_checkpoint(tmp_path / "x.pth", model)


def test_a_checkpoint_cannot_ask_for_more_memory_than_it_is_long(checkpoint, tmp_path, monkeypatch):
    path, states = tmp_path / "x.pth", torch.load(io.BytesIO(checkpoint[0]), weights_only=True)
    with zipfile.ZipFile(io.BytesIO(checkpoint[0])) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    assert all("unpack to more than it is" in message for message in tries(path, *checkpoint[1:])) and len(tries(path, *checkpoint[1:])) == 2
    assert dinov2_cifar.saved_at(path) == math.inf               # not unpacked for that either
    torch.save({**states, "config": {**states["config"], "MODEL_DIMS": {"tiny": (16384, 900, 2)}}}, path)  # 2.9 trillion weights
    assert all("of another size than" in message for message in tries(path, *checkpoint[1:])) and len(tries(path, *checkpoint[1:])) == 2


def test_names_from_files_do_not_steer_the_terminal(tmp_path, capsys):
    name = "\x1b]0;owned\x07\x1b[2J.png"
    (tmp_path / name).write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "\\x1b]0;owned\\x07" in load(tmp_path)[1]
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", "x\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err
    assert dinov2_cifar.plain("Grüße,\n 東京 \x1b[2J") == "Grüße, 東京 \\x1b[2J" and dinov2_cifar.brief(EOFError()) == "EOFError"


def broken_pictures(folder, count, draw):
    """Writes so many pictures, cut short, with wrong bits, of noise, or under another kind's name."""
    for n in range(count):
        buffer, kind = io.BytesIO(), draw.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"))
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        if n % 4 == 0:
            del data[draw.randrange(len(data)):]
        elif n % 4 == 1:
            for _ in range(draw.choice((1, 5, 50))):
                data[draw.randrange(min(len(data), 200))] ^= 1 << draw.randrange(8)
        elif n % 4 == 2:
            data = bytearray(draw.randbytes(draw.randrange(300)))
        name = draw.choice(("png", "jpg", "gif", "bmp", "tif", "webp", "ppm")) if n % 4 == 3 else {"JPEG": "jpg"}.get(kind, kind.lower())
        (folder / f"broken{n:03}.{name}").write_bytes(data)


def load(folder):
    """→ the pictures of a folder and what the one warning says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pictures = load_folder(folder, 32, "cpu")
    assert len(caught) <= 1
    return pictures, str(caught[0].message) if caught else ""


def test_two_hundred_broken_pictures_are_left_out_and_named_or_read(tmp_path):
    broken_pictures(tmp_path, 200, random.Random(0))
    pictures, said = load(tmp_path)
    left_out = sum(f"broken{n:03}." in said for n in range(200))
    assert len(pictures.train_images) + left_out == 200 and 80 < left_out < 150
    assert said.startswith(f"{left_out} files left out")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_out_of_the_folder_are_not_followed_but_named(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "train" / "cat", outside):
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(folder / "picture.png")
    (inside / "train" / "cat" / "secret.png").symlink_to(outside / "picture.png")
    (inside / "train" / "cat" / "lost.png").symlink_to(outside / "nothing.png")
    (inside / "train" / "cat" / "loop.png").symlink_to("loop.png")
    (inside / "train" / "dog").symlink_to(outside)
    (inside / "train" / "cat" / "same.png").symlink_to("picture.png")                             # inside: taken
    pictures, said = load(inside)
    assert len(pictures.train_images) == 2
    assert all(name in said for name in ("secret.png", "lost.png", "loop.png")) and "dog" in said and "same.png" not in said
    assert said.count("a link out of the folder") >= 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_link_to_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b.png").symlink_to(tmp_path / "pipe")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    pictures, said = load(tmp_path)
    assert len(pictures.train_images) == 1 and "b.png (no file)" in said


def test_bombs_and_programs_in_the_clothes_of_pictures_are_left_out(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    for side, name in ((10_000, "large.png"), (14_000, "huge.png")):                              # 100 and 196 million pixels, some kilobytes
        Image.new("1", (side, side)).save(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 100_000
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    for name in ("program.eps", "program.png"):
        (tmp_path / name).write_bytes(postscript)
    (tmp_path / "notes.txt").write_text("no picture")
    pictures, said = load(tmp_path)
    assert len(pictures.train_images) == 1
    assert all(name in said for name in ("large.png", "huge.png", "program.eps", "program.png", "notes.txt"))
