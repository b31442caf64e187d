"""A run: its files, records and output, what it learns, and steps that are not finite."""

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, read_records
from PIL import Image

import dinov2_cifar
from dinov2_cifar import Config, DINOv2, InputError, read_checkpoint, step_indices, train_dinov2

LOSSES = {"loss", "img", "patch", "koleo", "kl", "teacher_entropy", "mean_entropy", "prototypes"}
MEANS = LOSSES | {"grad_norm", "skipped"}
HPARAMS = {"lr", "prototype_lr", "weight_decay", "momentum", "teacher_temp"}
FIGURES = "views attention pca neighbours map curves"


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """Return the network, config and folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"TOTAL_EPOCHS": 2, "SAVE_EVERY": 1, "OUTPUT_DIR": str(folder)}
    config = Config(**{**SMALL, **changes})
    return train_dinov2(config, shapes), config, folder


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)


def test_run_writes_the_promised_files(run):
    model, _, folder = run
    assert isinstance(model, DINOv2) and not model.training
    names = {f"dinov2_{name}.pth" for name in ("epoch_1", "epoch_2", "final", "last")}
    assert {p.name for p in folder.iterdir()} == names | {"metrics.jsonl", "figures", ".lock"}
    figures = {p.name: Image.open(p).convert("L") for p in Path(folder, "figures").iterdir()}
    assert {*figures} == {f"{name}.png" for name in FIGURES.split()}
    assert all(len(figure.getcolors()) > 50 for figure in figures.values())


def test_each_epoch_of_each_seed_shuffles_all_images(small):
    def order(seed, epoch):
        steps = range(8 * epoch, 8 * epoch + 8)
        return torch.cat([i for s in steps for i in step_indices(64, small(SEED=seed), s)]).tolist()

    orders = [list(range(64)), order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(sorted(indices) == orders[0] for indices in orders)
    assert len(set(map(tuple, orders))) == 5


def test_each_step_of_each_seed_has_its_own_random_numbers(small, shapes, monkeypatch, no_figures):
    seeds, train_step = [], dinov2_cifar.train_step

    def watch(*args):
        seeds.append(torch.initial_seed())
        return train_step(*args)

    monkeypatch.setattr(dinov2_cifar, "train_step", watch)
    for seed in (0, 1):
        train_dinov2(small(TOTAL_EPOCHS=2, SEED=seed), shapes)
    assert len(seeds) == len(set(seeds)) == 32


def test_run_writes_the_promised_records(run):
    _, config, folder = run
    records = read_records(folder)
    events = [*["step"] * 8, "epoch"] * 2
    assert [r.pop("event") for r in records] == ["start", "baseline", *events]
    start, baseline, *records = records
    assert Config(**start["config"]).to_dict() == config.to_dict()
    assert baseline.keys() == {"knn", "rank", "linear", "raw_pixels_knn", "raw_pixels_linear"}
    assert [r["step"] for r in records] == [*range(1, 9), 8, *range(9, 17), 16]
    for rows, epoch in ((records[:8], records[8]), (records[9:17], records[17])):
        for row in rows:
            assert row.keys() == MEANS | HPARAMS | {"step", "images_per_second", "seconds"}
        assert epoch.keys() - {"linear"} == MEANS | {"epoch", "step", "knn", "rank", "seconds"}
        for name in LOSSES:
            assert epoch[name] == pytest.approx(sum(row[name] for row in rows) / 8)
    assert "linear" in records[17] and "linear" not in records[8]


def test_run_of_images_without_labels_is_not_evaluated(small, shapes, capsys):
    train_dinov2(small(), shapes[0])
    out = capsys.readouterr().out
    assert "no evaluation" in out and "k-NN" not in out
    start, baseline, *_, epoch = read_records(small().OUTPUT_DIR)
    assert baseline == {"event": "baseline"} and "knn" not in epoch
    assert len(list(Path(small().OUTPUT_DIR, "figures").glob("*.png"))) == len(FIGURES.split())


def test_output_is_80_columns_wide_without_a_bar(monkeypatch, tmp_path, capsys, no_figures):
    monkeypatch.chdir(tmp_path)
    draw = dinov2_cifar.make_shapes
    monkeypatch.setattr(dinov2_cifar, "make_shapes", lambda n, *a, **k: draw(min(n, 64), *a, **k))
    longer = {"RESUME": "newest", "TOTAL_EPOCHS": 2, "LAMBDA_IMG": 0.5}
    runs = [
        ({}, "k-NN: raw pixels"),
        (longer, "LAMBDA_IMG: saved 1.0, now 0.5"),
        (longer, "already finished: checkpoints/dinov2_last.pth, step 16 of 16"),
        ({"DATASET": "auto", "DATA_PATH": "/dev/null/x"}, "moved an earlier run to checkpoints/"),
        ({"TEACHER_TEMP_START": 1e3, "TEACHER_TEMP_END": 1e3, "OUTPUT_DIR": "b"}, "COLLAPSED: "),
    ]
    for changes, expected in runs:
        train_dinov2(Config(**{**SMALL, **changes}))
        out, err = capsys.readouterr()
        assert expected in out and "trained teacher" in out
        assert "BUILT-IN SHAPES" in err if "DATASET" in changes else err == ""
        assert max(map(len, out.splitlines())) <= 80


def test_bar_counts_images_on_a_terminal(small, shapes, monkeypatch, capsys, no_figures):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train_dinov2(small(), shapes[0])
    assert "64/64 [" in capsys.readouterr().err


def test_import_has_no_side_effects(tmp_path):
    code = """
import random, socket, sys, numpy, torch
state = lambda: (random.getstate(), str(numpy.random.get_state()), numpy.geterr(),
    torch.get_rng_state().sum(), torch.get_num_threads(), torch.is_grad_enabled(),
    torch.get_default_dtype(), torch.get_float32_matmul_precision(),
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark,
    socket.getdefaulttimeout(), 'matplotlib.pyplot' in sys.modules)
before = state()
import dinov2_cifar
assert state() == before
"""
    homes = dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"), str(tmp_path / "cache"))
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT), **homes}, "cwd": tmp_path}
    words = [sys.executable, "-B", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_run_follows_its_seed_bit_for_bit(small, shapes, no_figures):
    changes = {"PRECISION": "auto", "DROPOUT": 0.1, "DROP_PATH": 0.1}
    models = [train_dinov2(small(SEED=seed, **changes), shapes[0]) for seed in (0, 0, 1)]
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_run_learns_stripes_better_than_untrained_network(small, no_figures):
    """Stripes along or across, of any width, phase and color, under strong color jitter."""
    labels, width = torch.arange(384) % 2, 0.7 + 0.6 * torch.rand(384, 1)
    waves = (torch.arange(32) * math.pi / 4 * width + 6.28 * torch.rand(384, 1)).sin()
    waves = waves.view(-1, 1, 1, 32).expand(-1, 3, 32, 32)
    waves = torch.where(labels.view(-1, 1, 1, 1) == 1, waves.mT, waves)
    middle, height = 87 + 80 * torch.rand(384, 3, 1, 1), 120 * torch.rand(384, 3, 1, 1).round() - 60
    x = (middle + height * waves + 8 * torch.randn(384, 3, 32, 32)).clamp(0, 255).byte()
    settings = {"TOTAL_EPOCHS": 12, "EVAL_EVERY": 0, "LEARNING_RATE": 2e-2, "EMA_START": 0.8}
    settings |= {"BATCH_SIZE": 16, "PROJECTION_DIM": 128}
    c = small(COLOR_JITTER=(0.8, 0.8, 0.8, 0.5), GRAYSCALE_PROB=0.5, **settings)
    train_dinov2(c, (x[:256], labels[:256], x[256:], labels[256:]))
    before, after = (read_records(c.OUTPUT_DIR, event)[-1] for event in ("baseline", "epoch"))
    assert after["knn"] > max(0.85, before["knn"] + 0.05)


def spoil(monkeypatch, steps, value=math.nan):
    """Make the image loss of these steps, counted from 1, nan or infinite; draw no figures."""
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
    loss, count = dinov2_cifar.multi_crop_dino_loss, iter(range(1, 10_000))
    factor = lambda: value if next(count) in steps else 1.0  # noqa: E731
    monkeypatch.setattr(dinov2_cifar, "multi_crop_dino_loss", lambda *a: loss(*a) * factor())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skipped_steps_are_counted(value, small, shapes, monkeypatch, capsys):
    spoil(monkeypatch, {3, 4}, value)
    train_dinov2(small(), shapes[0])
    rows, (epoch,) = (read_records(small().OUTPUT_DIR, event) for event in ("step", "epoch"))
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0, 0, 0]
    good = [row["img"] for row in rows if not row["skipped"]]
    assert epoch["img"] == pytest.approx(sum(good) / 6) and epoch["skipped"] == 2
    assert "skipped 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("skipped, batch, stops", [(10, 4, True), (9, 4, False), (8, 8, True)])
def test_ten_skipped_steps_stop_the_run(skipped, batch, stops, small, shapes, monkeypatch):
    """Or all of an epoch; the checkpoint before them stays."""
    spoil(monkeypatch, {2, *range(17, 17 + skipped)})
    c, words = small(BATCH_SIZE=batch, TOTAL_EPOCHS=3), f"^{skipped} steps in a row .*LEARNING_RATE"
    with pytest.raises(InputError, match=words) if stops else nullcontext():
        train_dinov2(c, shapes[0])
    last = read_checkpoint(Path(c.OUTPUT_DIR, "dinov2_last.pth"))
    assert last["step"] == (16 if stops else 48)
