"""Checkpoints, reporting, figures, the loop, the command line, and every command that the README shows."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

import dinov2_cifar
from dinov2_cifar import (Config, InputError, Pictures, find_checkpoint, load_backbone, load_checkpoint, main, make_model, make_optimizer,
                          read_checkpoint, save_checkpoint, train_dinov2)
from recipe import flags

SCRIPT = str(ROOT / "dinov2_cifar.py")


def records(folder, event=None):
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if event in (None, row["event"])]


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


# Importing

def test_an_import_prints_nothing_writes_nothing_draws_nothing_and_changes_no_setting(tmp_path):
    code = """
import random, sys, numpy, torch, socket
def state():
    return (random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes(), torch.get_default_dtype(),
            torch.get_num_threads(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.flash_sdp_enabled(), socket.getdefaulttimeout(), 'matplotlib.pyplot' in sys.modules,
            torch.multiprocessing.get_sharing_strategy(), numpy.geterr())
before = state()
import dinov2_cifar
changed = [i for i, (a, b) in enumerate(zip(before, state())) if a != b]
assert not changed, changed
"""
    cache = tmp_path / "cache"                                    # a new machine: matplotlib would write its list of fonts here
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": str(ROOT), "HOME": str(cache), "MPLCONFIGDIR": str(cache), "XDG_CACHE_HOME": str(cache)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# The loop

def test_a_run_leaves_checkpoints_metrics_and_figures(small, shapes, capsys):
    config = small(TOTAL_EPOCHS=2, SAVE_EVERY=1, EVAL_EVERY=1)
    model = train_dinov2(config, dataset=shapes)
    out = Path(config.OUTPUT_DIR)
    assert sorted(p.name for p in out.glob("*.pth")) == ["dinov2_epoch_1.pth", "dinov2_epoch_2.pth", "dinov2_final.pth", "dinov2_last.pth",
                                                              "dinov2_previous.pth"]
    assert sorted(p.name for p in (out / "figures").iterdir()) == ["attention.png", "curves.png", "pca.png", "views.png"]
    assert isinstance(model, dinov2_cifar.DINOv2)
    assert [row["event"] for row in records(out) if row["event"] != "step"] == ["start", "baseline", "epoch", "epoch", "final"]
    assert {"knn", "rank", "raw_pixels_knn"} <= set(records(out, "baseline")[0])
    assert all(0 <= row["knn"] <= 1 and row["rank"] >= 1 for row in records(out, "epoch"))
    assert records(out, "start")[0]["config"] == json.loads(json.dumps(config.to_dict()))
    assert {"img", "patch", "koleo", "teacher_entropy", "mean_entropy", "kl", "prototypes", "lr", "momentum", "grad_norm"} <= set(
        records(out, "step")[0])
    printed = capsys.readouterr().out
    assert "parameters" in printed and "steps" in printed and "untrained network" in printed and "estimated time" in printed


def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_does_not(small, shapes):
    runs = [weights(train_dinov2(small(SEED=seed, PRECISION="auto", EVAL_EVERY=0), dataset=shapes)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_notebook_cell_edits_a_constant_and_calls(monkeypatch, tmp_path, shapes):
    namespace = {}
    exec("from dinov2_cifar import *", namespace)
    for name, value in {**SMALL, "OUTPUT_DIR": str(tmp_path)}.items():
        monkeypatch.setattr(Config, name, value)
    monkeypatch.setattr(Config, "TOTAL_EPOCHS", 1)
    exec("Config.TOTAL_EPOCHS = 1\nmodel = train_dinov2(dataset=pictures)", {**namespace, "pictures": shapes} | (scope := {}), scope)
    assert isinstance(scope["model"], dinov2_cifar.DINOv2)
    assert len(records(tmp_path, "epoch")) == 1


def test_pictures_without_labels_are_trained_on_and_not_evaluated(small, shapes, capsys):
    config = small()
    train_dinov2(config, dataset=shapes[0])
    assert "evaluation is left out" in capsys.readouterr().out
    assert "knn" not in records(config.OUTPUT_DIR, "final")[0]
    assert len(list(Path(config.OUTPUT_DIR, "figures").iterdir())) == 4


def test_features_learn_the_difference_between_two_kinds_of_picture(small):
    """Stripes along or across, of any width, phase and colour: where the untrained network errs in one of five, the teacher must do better."""
    rng = np.random.default_rng(0)
    labels, width = np.arange(384) % 2, rng.uniform(0.7, 1.3, (384, 1))
    wave = np.sin(np.arange(32) * np.pi / 4 * width + rng.uniform(0, 2 * np.pi, (384, 1)))[:, :, None] * np.ones((1, 1, 32))
    wave = np.where(labels[:, None, None] == 1, wave.transpose(0, 2, 1), wave)
    ground, colour = rng.uniform(87, 167, (384, 3, 1, 1)), rng.choice([-60, 60], (384, 3, 1, 1))
    images = torch.from_numpy((ground + colour * wave[:, None] + rng.normal(0, 8, (384, 3, 32, 32))).clip(0, 255).astype(np.uint8))
    labels = torch.from_numpy(labels)
    config = small(TOTAL_EPOCHS=12, BATCH_SIZE=32, PROJECTION_DIM=128, EVAL_EVERY=0, LEARNING_RATE=1e-2, EMA_START=0.8,
                   COLOR_JITTER=(0.8, 0.8, 0.8, 0.5), GRAYSCALE_PROB=0.5)
    train_dinov2(config, dataset=(images[:256], labels[:256], images[256:], labels[256:]))
    before, after = records(config.OUTPUT_DIR, "baseline")[0], records(config.OUTPUT_DIR, "final")[0]
    assert after["knn"] > max(0.85, before["knn"] + 0.05)


# Checkpoints

def test_a_checkpoint_has_the_promised_keys_and_plain_values(small, shapes):
    config = small()
    train_dinov2(config, dataset=shapes)
    states = torch.load(Path(config.OUTPUT_DIR, "dinov2_final.pth"), weights_only=True)
    assert {"epoch", "student_state_dict", "teacher_state_dict", "img_head_state_dict", "patch_head_state_dict",
            "teacher_img_head_state_dict", "teacher_patch_head_state_dict", "optimizer_state_dict", "random_states", "config"} <= set(states)
    assert Config(**states["config"]).to_dict() == config.to_dict()


def test_load_backbone_is_the_teacher_whatever_the_class_constants_say_now(small, shapes, monkeypatch):
    config = small(REGISTER_TOKENS=2, LAYER_SCALE=0.1)
    model = train_dinov2(config, dataset=shapes)
    monkeypatch.setattr(Config, "MODEL_SIZE", "base")
    backbone = load_backbone(Path(config.OUTPUT_DIR, "dinov2_final.pth"))
    assert not backbone.training
    wanted = dinov2_cifar.extract_features(model, shapes[2])
    assert torch.equal(dinov2_cifar.extract_features(backbone, shapes[2]), wanted)


def test_a_run_cut_off_after_an_epoch_resumes_to_the_same_weights(small, shapes, monkeypatch):
    whole = weights(train_dinov2(small(TOTAL_EPOCHS=3, OUTPUT_DIR=small().OUTPUT_DIR + "-whole"), dataset=shapes))
    config = small(TOTAL_EPOCHS=3)
    save = dinov2_cifar.save_epoch

    def cut(model, optimizer, epoch, *rest):
        save(model, optimizer, epoch, *rest)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(dinov2_cifar, "save_epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        train_dinov2(config, dataset=shapes)
    monkeypatch.setattr(dinov2_cifar, "save_epoch", save)
    resumed = train_dinov2(small(TOTAL_EPOCHS=3, RESUME="newest"), dataset=shapes)
    assert torch.equal(weights(resumed), whole)
    assert [row["epoch"] for row in records(config.OUTPUT_DIR, "epoch")] == [1, 2, 3]
    steps = [row["step"] for row in records(config.OUTPUT_DIR, "step")]
    assert steps == sorted(set(steps)) and steps[-1] == 24


def test_a_fresh_start_puts_an_earlier_run_aside(small, shapes, capsys):
    config = small()
    train_dinov2(config, dataset=shapes)
    first = {p.name: p.read_bytes() for p in Path(config.OUTPUT_DIR).iterdir() if p.is_file() and p.name != ".lock"}
    train_dinov2(small(SEED=1), dataset=shapes)
    (aside,) = Path(config.OUTPUT_DIR).glob("earlier-*")
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == first
    assert "earlier" in capsys.readouterr().out
    assert len(records(config.OUTPUT_DIR, "start")) == 1


def test_resume_refuses_other_pictures_and_a_run_that_is_done(small, shapes, tmp_path):
    config = small()
    train_dinov2(config, dataset=shapes)
    with pytest.raises(InputError, match=r"TOTAL_EPOCHS \(1\)"):
        train_dinov2(small(RESUME="newest"), dataset=shapes)
    with pytest.raises(InputError, match="was trained on your pictures, these pictures are others"):
        train_dinov2(small(RESUME="newest", TOTAL_EPOCHS=2), dataset=Pictures(*shapes, "others"))


def test_resume_reads_the_history_beside_the_checkpoint_and_forgives_half_a_line(small, shapes):
    config = small()
    train_dinov2(config, dataset=shapes)
    with open(Path(config.OUTPUT_DIR, "metrics.jsonl"), "a") as file:
        file.write('{"event": "epo')
    elsewhere = config.OUTPUT_DIR + "-other"
    train_dinov2(small(RESUME=str(Path(config.OUTPUT_DIR, "dinov2_last.pth")), TOTAL_EPOCHS=2, OUTPUT_DIR=elsewhere), dataset=shapes)
    assert [row["epoch"] for row in records(elsewhere, "epoch")] == [1, 2]
    assert len(records(elsewhere, "baseline")) == 1


def test_resume_without_a_checkpoint_starts_afresh_with_a_word(small, capsys):
    assert find_checkpoint(small(RESUME="newest")) is None
    assert "starting afresh" in capsys.readouterr().out
    with pytest.raises(InputError, match="nowhere.pth"):
        find_checkpoint(small(RESUME="nowhere.pth"))


def test_a_write_that_fails_leaves_the_old_checkpoint_whole(small, monkeypatch, tmp_path):
    model = make_model(small(), [0.5] * 3, [0.2] * 3)
    path, optimizer = tmp_path / "x.pth", make_optimizer(model)
    save_checkpoint(path, model, optimizer, 1, 8)

    def full(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="x.pth cannot be written: disk full; what was saved before is whole"):
        save_checkpoint(path, model, optimizer, 2, 16)
    assert read_checkpoint(path)["epoch"] == 1 and os.listdir(tmp_path) == ["x.pth"]


def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_runs(small, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"config": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "broken.pth").write_bytes(b"no zip")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("trap.pth", "broken.pth", "other.pth", "missing.pth"):
        with pytest.raises(InputError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_another_size_is_refused(small, tmp_path):
    model = make_model(small(), [0.5] * 3, [0.2] * 3)
    save_checkpoint(tmp_path / "x.pth", model, make_optimizer(model), 1, 8)
    with pytest.raises(InputError, match="another size"):
        load_checkpoint(tmp_path / "x.pth", make_model(small(PROJECTION_DIM=32), [0.5] * 3, [0.2] * 3))


# The command line

@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    good = dict(x_train=np.zeros((16, 32, 32, 3), np.uint8), y_train=np.zeros(16, int), x_test=np.zeros((4, 32, 32, 3), np.uint8),
                y_test=np.zeros(4, int))
    np.savez(folder / "keys.npz", x_train=good["x_train"])
    np.savez(folder / "shape.npz", **{**good, "x_train": good["x_train"][..., :1]})
    np.savez(folder / "dtype.npz", **{**good, "x_test": good["x_test"].astype(np.float32)})
    return folder


@pytest.mark.parametrize("words, wanted", [
    (["--total-epoch", "1"], "--total-epoch"), (["--nonsense"], "--nonsense"), (["--patch-size", "5"], "PATCH_SIZE (5)"),
    (["--patch-size", "4", "--local-crop-size", "18"], "LOCAL_CROP_SIZE (18)"), (["--batch-size", "1"], "BATCH_SIZE (1)"),
    (["--dataset", "shapes", "--batch-size", "4096"], "BATCH_SIZE (4096)"), (["--learning-rate", "-1"], "LEARNING_RATE (-1"),
    (["--model-dims", '{"tiny": [30, 2, 4]}', "--model-size", "tiny"], "4 heads"), (["--dataset", "no/such/place"], "no/such/place"),
    (["--dataset", "{bad}/empty"], "empty"), (["--dataset", "{bad}/keys.npz", "--batch-size", "4"], "y_train"),
    (["--dataset", "{bad}/shape.npz", "--batch-size", "4"], "x_train"), (["--dataset", "{bad}/dtype.npz", "--batch-size", "4"], "x_test"),
    (["--device", "cuda:77"], "cuda:77"), (["--resume", "no.pth", "--dataset", "shapes"], "no.pth"), (["--output-dir", "{bad}/keys.npz"], "OUTPUT_DIR"),
])
def test_bad_input_ends_with_code_2_and_one_line_before_any_training(words, wanted, bad_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dinov2_cifar, "train_step", lambda *a, **k: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([word.replace("{bad}", str(bad_files)) for word in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and wanted in lines[0]


@pytest.mark.slow
def test_the_command_line_runs_as_a_process(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, *flags({**SMALL, "BATCH_SIZE": 256, "EVAL_EVERY": 0, "OUTPUT_DIR": str(tmp_path)})],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained teacher" in done.stdout
    assert records(tmp_path, "start")[0]["data"] == "shapes"


def test_a_run_whose_teacher_never_moves_says_so_and_a_usual_one_does_not(small, shapes, capsys):
    train_dinov2(small(EMA_START=1.0), dataset=shapes)
    assert "COLLAPSED: the teacher never moves" in capsys.readouterr().out
    train_dinov2(small(), dataset=shapes)
    train_dinov2(small(), dataset=shapes)
    assert "the teacher never moves" not in capsys.readouterr().out


# The README

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [part.strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
            for part in line.split("#")[0].split("&&") if part.strip()]


def test_every_command_of_the_readme_is_of_a_known_kind():
    known = ("pip install -r requirements.txt", "python -m pytest", "python dinov2_cifar.py", "python ../shared/data/unpack.py", "python benchmarks/throughput.py",
             "timeout 590 python benchmarks/recipe.py", "python benchmarks/recipe.py", "torchrun --nproc-per-node 2 dinov2_cifar.py", "pip install lightly==1.6.0 timm==1.0.31", "git clone", "cd ")
    assert COMMANDS and all(command.startswith(known) for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python dinov2_cifar.py")])
def test_every_training_command_of_the_readme_runs_in_small(command, tmp_path, monkeypatch, shapes, capsys):
    """With its own flags, then those that make it small: the later of two flags counts."""
    x_train, y_train, x_test, y_test = (part.numpy() for part in shapes)
    np.savez(tmp_path / "small.npz", x_train=x_train.transpose(0, 2, 3, 1), y_train=y_train, x_test=x_test.transpose(0, 2, 3, 1), y_test=y_test)
    monkeypatch.chdir(tmp_path)
    less = {**SMALL, "DATASET": str(tmp_path / "small.npz"), "OUTPUT_DIR": str(tmp_path / "out")}
    words = shlex.split(command)[2:]
    if words == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            main(words)
    else:
        main(words + flags(less))
    assert ("--total-epochs" if words == ["--help"] else "trained teacher") in capsys.readouterr().out


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, shapes):
    for name, value in {**SMALL, "OUTPUT_DIR": "checkpoints"}.items():
        monkeypatch.setattr(Config, name, value)
    monkeypatch.setattr(dinov2_cifar, "load_shapes", lambda size: dinov2_cifar.Pictures(*shapes))
    monkeypatch.chdir(tmp_path)
    code = [text for kind, text in BLOCKS if kind == "python"]
    assert code
    for text in code:
        exec(text, {})
    assert Path("checkpoints", "dinov2_final.pth").exists()


def test_the_readme_names_no_constant_that_is_not_there():
    names = set(re.findall(r"`([A-Z][A-Z]+(?:_[A-Z]+)+)`", README))
    assert names and names <= set(dinov2_cifar.CONSTANTS)
