"""A whole run: its files, its output on the terminal, checkpoints, the command line, and every
command that the README shows."""

import json
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
from recipe import flags

import dinov2_cifar
from dinov2_cifar import (
    Config,
    DINOv2,
    InputError,
    extract_features,
    load_backbone,
    load_checkpoint,
    main,
    make_model,
    make_optimizer,
    save_checkpoint,
    train_dinov2,
)


def records(folder, event=None):
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if event in (None, row["event"])]


def write_npz(path, shapes):
    x_train, y_train, x_test, y_test = (part.numpy() for part in shapes)
    x_train, x_test = x_train.transpose(0, 2, 3, 1), x_test.transpose(0, 2, 3, 1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(path)


def test_an_import_prints_nothing_writes_nothing_draws_nothing_and_changes_no_setting(tmp_path):
    code = """
import random, sys, numpy, torch, socket
def state():
    return (random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_num_threads(),
            torch.get_rng_state().numpy().tobytes(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.flash_sdp_enabled(),
            torch.are_deterministic_algorithms_enabled(), socket.getdefaulttimeout(),
            'matplotlib.pyplot' in sys.modules, torch.multiprocessing.get_sharing_strategy(),
            numpy.geterr())
before = state()
import dinov2_cifar
changed = [i for i, (a, b) in enumerate(zip(before, state())) if a != b]
assert not changed, changed
"""
    cache = str(tmp_path / "cache")  # a new machine: matplotlib would write its list of fonts here
    homes = {"HOME": cache, "MPLCONFIGDIR": cache, "XDG_CACHE_HOME": cache}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **homes},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# The run


def test_a_run_leaves_checkpoints_metrics_and_figures(small, shapes):
    config = small(TOTAL_EPOCHS=2, SAVE_EVERY=1)
    model, out = train_dinov2(config, dataset=shapes), Path(config.OUTPUT_DIR)
    assert isinstance(model, DINOv2) and not model.training
    checkpoints = [
        "dinov2_epoch_1.pth",
        "dinov2_epoch_2.pth",
        "dinov2_final.pth",
        "dinov2_last.pth",
    ]
    figures = ["attention.png", "curves.png", "pca.png", "views.png"]
    assert {p.name for p in out.iterdir()} == {*checkpoints, "metrics.jsonl", "figures", ".lock"}
    assert sorted(p.name for p in (out / "figures").iterdir()) == figures

    events = [row["event"] for row in records(out) if row["event"] != "step"]
    assert events == ["start", "baseline", "epoch", "epoch", "final"]
    (start,), (baseline,), (final,) = (records(out, e) for e in ("start", "baseline", "final"))
    assert start["config"] == json.loads(json.dumps(config.to_dict()))
    assert {"knn", "rank", "linear", "raw_pixels_knn"} <= set(baseline)
    epochs, steps = records(out, "epoch"), records(out, "step")
    assert all(0 <= row["knn"] <= 1 and row["rank"] >= 1 for row in epochs)
    assert final["knn"] == epochs[1]["knn"] and final["linear"] == epochs[1]["linear"]
    losses = {
        "loss",
        "img",
        "patch",
        "koleo",
        "teacher_entropy",
        "mean_entropy",
        "kl",
        "prototypes",
    }
    counts, times = {"steps", "skipped", "step"}, {"images_per_second", "seconds"}
    hparams = {"lr", "prototype_lr", "weight_decay", "momentum", "teacher_temp"}
    keys = losses | counts | times | hparams | {"grad_norm"}
    assert [set(row) - {"event"} for row in steps] == [keys] * 16
    for epoch, rows in zip(epochs, (steps[:8], steps[8:])):
        assert epoch["steps"] == 8 and epoch["step"] == rows[-1]["step"]
        for name in losses:
            assert epoch[name] == pytest.approx(sum(row[name] for row in rows) / 8)


def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_does_not(small, shapes):
    def weights(seed):
        model = train_dinov2(small(SEED=seed, PRECISION="auto", EVAL_EVERY=0), dataset=shapes)
        return torch.cat([value.flatten() for value in model.state_dict().values()])

    first, second, other = map(weights, (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_a_notebook_cell_edits_a_constant_and_calls(monkeypatch, tmp_path, shapes):
    for name, value in {**SMALL, "OUTPUT_DIR": str(tmp_path), "TOTAL_EPOCHS": 7}.items():
        monkeypatch.setattr(Config, name, value)
    namespace = {"images": shapes}
    cell = "from dinov2_cifar import *\nConfig.TOTAL_EPOCHS = 1\n"
    exec(cell + "model = train_dinov2(dataset=images)", namespace)
    assert isinstance(namespace["model"], DINOv2) and len(records(tmp_path, "epoch")) == 1


def test_images_without_labels_are_trained_on_and_not_evaluated(small, shapes, capsys):
    config = small()
    train_dinov2(config, dataset=shapes[0])
    assert "no evaluation" in capsys.readouterr().out
    assert records(config.OUTPUT_DIR, "baseline") == [{"event": "baseline"}]
    assert "knn" not in records(config.OUTPUT_DIR, "final")[0]
    assert len(list(Path(config.OUTPUT_DIR, "figures").iterdir())) == 4


def test_features_learn_the_difference_between_two_kinds_of_image(small):
    """Stripes along or across, of any width, phase and color: where the untrained network is wrong
    for one image in five, the teacher must do better."""
    rng = np.random.default_rng(0)
    labels, width = np.arange(384) % 2, rng.uniform(0.7, 1.3, (384, 1))
    wave = np.sin(np.arange(32) * np.pi / 4 * width + rng.uniform(0, 2 * np.pi, (384, 1)))
    wave = wave[:, :, None] * np.ones((1, 1, 32))
    wave = np.where(labels[:, None, None] == 1, wave.transpose(0, 2, 1), wave)[:, None]
    background = rng.uniform(87, 167, (384, 3, 1, 1))
    pixels = background + rng.choice([-60, 60], (384, 3, 1, 1)) * wave
    pixels = pixels + rng.normal(0, 8, (384, 3, 32, 32))
    images = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
    labels = torch.from_numpy(labels)
    config = small(
        SEED=3,
        TOTAL_EPOCHS=24,
        BATCH_SIZE=32,
        PROJECTION_DIM=128,
        EVAL_EVERY=0,
        LEARNING_RATE=1e-2,
        EMA_START=0.8,
        COLOR_JITTER=(0.8, 0.8, 0.8, 0.5),
        GRAYSCALE_PROB=0.5,
    )
    train_dinov2(config, dataset=(images[:256], labels[:256], images[256:], labels[256:]))
    (before,), (after,) = (records(config.OUTPUT_DIR, event) for event in ("baseline", "final"))
    assert after["knn"] > max(0.9, before["knn"] + 0.1)


# Checkpoints


def test_a_checkpoint_has_the_promised_keys_and_plain_values(small, shapes):
    config = small()
    train_dinov2(config, dataset=shapes)
    states = torch.load(Path(config.OUTPUT_DIR, "dinov2_final.pth"), weights_only=True)
    modules = ("student", "teacher", "img_head", "patch_head", "teacher_img_head")
    modules += ("teacher_patch_head", "optimizer")
    assert set(states) == {f"{name}_state_dict" for name in modules} | {
        "epoch", "step", "config", "data_name", "steps_per_epoch", "history", "totals",
    }  # fmt: skip
    assert (states["epoch"], states["step"]) == (1, 8)
    assert Config(**states["config"]).to_dict() == config.to_dict()


def test_load_backbone_is_the_teacher_whatever_the_class_constants_say_now(
    small, shapes, monkeypatch
):
    config = small(REGISTER_TOKENS=2, LAYER_SCALE=0.1)
    model = train_dinov2(config, dataset=shapes)
    monkeypatch.setattr(Config, "MODEL_SIZE", "base")
    backbone = load_backbone(Path(config.OUTPUT_DIR, "dinov2_final.pth"))
    assert not backbone.training
    assert torch.equal(extract_features(backbone, shapes[2]), extract_features(model, shapes[2]))


@pytest.mark.parametrize(
    "change", [{"PROJECTION_DIM": 32}, {"REGISTER_TOKENS": 1}, {"HEAD_BATCH_NORM": False}], ids=str
)
def test_a_checkpoint_of_another_network_is_one_input_error(change, small, tmp_path):
    model = make_model(small(), [0.5] * 3, [0.2] * 3)
    save_checkpoint(tmp_path / "x.pth", model, make_optimizer(model), 1, 8)
    other = make_model(small(**change), [0.5] * 3, [0.2] * 3)
    with pytest.raises(InputError, match="x.pth does not fit this model"):
        load_checkpoint(tmp_path / "x.pth", other, make_optimizer(other))


# The terminal and the command line


@pytest.fixture
def command(shapes, monkeypatch, tmp_path):
    """Return what calls the command line in a folder of its own; the built-in shapes are few."""
    make_shapes = dinov2_cifar.make_shapes

    def few(count, *args, **options):
        return make_shapes(count // 32, *args, **options)

    monkeypatch.setattr(dinov2_cifar, "make_shapes", few)
    monkeypatch.chdir(tmp_path)
    return lambda **changes: main(flags({**SMALL, "DATASET": "shapes", **changes}))


def test_what_a_run_prints_fits_into_80_columns_and_has_no_bar_without_a_terminal(command, capsys):
    longer = {"RESUME": "newest", "TOTAL_EPOCHS": 2, "LAMBDA_IMG": 0.5}
    runs = [
        ({}, "untrained network"),
        (longer, "resuming: checkpoints"),
        (longer, "already finished"),
        ({"TEACHER_TEMP_START": 1e3, "TEACHER_TEMP_END": 1e3, "OUTPUT_DIR": "b"}, "COLLAPSED: "),
        ({"DATASET": "auto", "DATA_PATH": "/dev/null/x", "OUTPUT_DIR": "c"}, "no CIFAR-10)"),
        ({"RESUME": "newest", "OUTPUT_DIR": "d"}, "starting afresh"),
    ]
    for settings, expected in runs:
        command(**settings)
        out, err = capsys.readouterr()
        assert expected in out and "trained teacher" in out
        assert [line for line in out.splitlines() if len(line) > 80] == []
        assert "BUILT-IN SHAPES" in err if "CIFAR" in expected else err == ""


def test_what_is_archived_is_said_in_80_columns(command, capsys):
    command()
    command()
    out = capsys.readouterr().out
    assert "earlier-" in out and all(len(line) <= 80 for line in out.splitlines())
    (archive,) = Path("checkpoints").glob("earlier-*")
    assert len(list(archive.glob("figures/*.png"))) == 4


def test_a_bar_counts_images_on_a_terminal(command, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    command(EVAL_EVERY=0)
    assert "64/64 [" in capsys.readouterr().err


def test_resuming_a_finished_run_says_so_prints_its_table_and_changes_nothing(command, capsys):
    command()
    first, out = capsys.readouterr().out, Path("checkpoints")
    before = {p.name: p.read_bytes() for p in out.glob("*.pth")}
    metrics = records(out)
    command(RESUME="newest")
    second = capsys.readouterr().out
    assert "already finished: checkpoints/dinov2_last.pth, step 8 of 8" in second
    assert first.split("\n\n")[-1] == second.split("\n\n")[-1] and "trained teacher" in second
    assert {p.name: p.read_bytes() for p in out.glob("*.pth")} == before
    assert records(out) == metrics and not list(out.glob("earlier-*"))


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    good = {"x_train": np.zeros((16, 32, 32, 3), np.uint8), "y_train": np.zeros(16, int)}
    good |= {"x_test": np.zeros((4, 32, 32, 3), np.uint8), "y_test": np.zeros(4, int)}
    np.savez(folder / "keys.npz", x_train=good["x_train"])
    np.savez(folder / "shape.npz", **{**good, "x_train": good["x_train"][..., :1]})
    np.savez(folder / "dtype.npz", **{**good, "x_test": good["x_test"].astype(np.float32)})
    return folder


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--total-epoch 1", "--total-epoch"),
        ("--nonsense", "--nonsense"),
        ("--patch-size 5", "PATCH_SIZE (5)"),
        ("--batch-size 1", "BATCH_SIZE (1)"),
        ("--learning-rate -1", "LEARNING_RATE (-1"),
        ("--device cuda:77", "cuda:77"),
        ("--dataset shapes --batch-size 4096", "BATCH_SIZE (4096)"),
        ("--dataset no/such/place", "no/such/place"),
        ("--dataset {bad}/empty", "empty"),
        ("--dataset {bad}/keys.npz --batch-size 4", "y_train"),
        ("--dataset {bad}/shape.npz --batch-size 4", "shape.npz"),
        ("--dataset {bad}/dtype.npz --batch-size 4", "dtype.npz"),
        ("--dataset shapes --resume no.pth", "no.pth"),
        ("--dataset shapes --resume {bad}/keys.npz --model-size tiny", "keys.npz"),
        ("--dataset shapes --output-dir {bad}/keys.npz", "OUTPUT_DIR"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_line_before_any_training(
    words, expected, bad_files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(dinov2_cifar, "train_step", lambda *args: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words.replace("{bad}", str(bad_files)).split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and expected in lines[0]


@pytest.mark.slow
def test_the_command_line_runs_as_a_process(tmp_path, shapes):
    settings = {**SMALL, "DATASET": write_npz(tmp_path / "shapes.npz", shapes), "EVAL_EVERY": 0}
    words = [sys.executable, str(ROOT / "dinov2_cifar.py"), *flags(settings)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "trained teacher" in done.stdout
    assert records(tmp_path / "checkpoints", "start")[0]["data"] == "shapes.npz"


# The README

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    part.strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    for part in line.split("#")[0].split("&&")
    if part.strip()
]
TRAINING = [
    c for c in COMMANDS if re.match(r"(python|torchrun --nproc-per-node \d) dinov2_cifar", c)
]


def test_every_command_of_the_readme_is_of_a_known_kind():
    known = (
        "pip install -r requirements.txt",
        "python -m pytest",
        "python ../shared/data/unpack.py",
        "python benchmarks/throughput.py",
        "timeout 590 python benchmarks/recipe.py",
        "python benchmarks/recipe.py",
        "pip install lightly==1.6.0 timm==1.0.31",
        "git clone",
        "cd ",
    )
    assert TRAINING and all(c.startswith(known) for c in COMMANDS if c not in TRAINING)


@pytest.mark.parametrize("command", TRAINING)
def test_every_training_command_of_the_readme_runs_in_small(
    command, tmp_path, monkeypatch, shapes, capsys
):
    """With its own flags, then those that make it small: the later of two flags counts."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.split("dinov2_cifar.py")[1])
    if words == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            main(words)
        assert "--total-epochs" in capsys.readouterr().out
        return
    less = {**SMALL, "DATASET": write_npz(tmp_path / "small.npz", shapes), "OUTPUT_DIR": "out"}
    main(words + flags(less))
    assert "trained teacher" in capsys.readouterr().out


def run_cells(monkeypatch, folder, shapes, cells):
    for name, value in SMALL.items():
        monkeypatch.setattr(Config, name, value)
    monkeypatch.setattr(dinov2_cifar, "load_images", lambda c: dinov2_cifar.Images(*shapes))
    monkeypatch.chdir(folder)
    namespace = {}
    for text in cells:
        exec(text, namespace)
    assert Path("checkpoints", "dinov2_final.pth").exists()


CELLS = [text for kind, text in BLOCKS if kind == "python"]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, shapes):
    cells = [text for text in CELLS if "timm" not in text]
    assert cells
    run_cells(monkeypatch, tmp_path, shapes, cells)


def test_the_python_of_the_readme_with_timm_runs(tmp_path, monkeypatch, shapes):
    """In the same notebook; timm's network is made as small as ours."""
    pytest.importorskip("timm")
    code = "\n".join(CELLS)
    sizes = {"patch_size=4": "patch_size=8", "embed_dim=384": "embed_dim=32"}
    for default, small in {**sizes, "depth=6": "depth=2", "num_heads=6": "num_heads=2"}.items():
        assert default in code
        code = code.replace(default, small)
    run_cells(monkeypatch, tmp_path, shapes, [code])


def test_the_readme_names_no_constant_that_is_not_there():
    names = set(re.findall(r"`([A-Z][A-Z]+(?:_[A-Z]+)+)`", README))
    assert names and names <= set(dinov2_cifar.CONSTANTS)
