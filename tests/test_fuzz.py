"""Bad input, widely: 2,000 random command lines and edits of Config. Each takes a step, saves and stops, or exits with 2 and one line."""

import json
import signal


import numpy as np
import pytest
import torch
from conftest import SMALL

import dinov2_cifar
from dinov2_cifar import CONSTANTS, Config, make_shapes

CASES, GROUPS = 2000, 20

FITTING = dict(                                                  # values that may do, alone or with others; the rest is derived
    MODEL_SIZE=["tiny", "small", "base"], IMAGE_SIZE=[8, 16, 24, 32, 48], PATCH_SIZE=[1, 2, 4, 8, 16], REGISTER_TOKENS=[0, 1, 7],
    MODEL_DIMS=[{"tiny": [8, 1, 2]}, {"tiny": [12, 3, 3], "small": [8, 1, 1]}, {}, {"tiny": []}, {"tiny": [8, 1, 3]}, {"": [8, 1, 1]}],
    GLOBAL_CROPS_NUMBER=[2, 3, 5], LOCAL_CROPS_NUMBER=[0, 1, 3], GLOBAL_CROP_SIZE=[8, 16, 24, 32], LOCAL_CROP_SIZE=[8, 16, 24],
    PROJECTION_DIM=[2, 3, 64], HEAD_HIDDEN_DIM=[2, 8, 33], HEAD_BOTTLENECK_DIM=[2, 5, 16], BATCH_SIZE=[2, 3, 8, 16, 17, 10 ** 6],
    ACCUMULATE=[1, 2, 3, 10 ** 6], TOTAL_EPOCHS=[1, 2, 10 ** 6], SINKHORN_ITERATIONS=[0, 1, 9], KOLEO_KIND=["nearest", "cosine"],
    MASK_KIND=["block", "random"], PRECISION=["auto", "bf16", "fp32"], DATASET=["shapes", "cifar10", "cifar100"], DEVICE=["cpu", "cpu:0", "cuda", "mps"],
    RESUME=["newest"], SEED=[0, 1, 2 ** 31 - 1], TRAIN_IMAGES=[0, 1, 8, 10 ** 9])
EDGES = {
    int: [0, -1, 1, 2 ** 31, 2 ** 63, 10 ** 30, 4097],
    float: [0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, 1e308, float("inf"), float("nan"), 10.0, 0.001],
    str: ["", " ", "nonsense", "/", ".", "..", "~", "/dev/null", "x" * 5000, "a\nb", "\udcff", "日本", "%s%d{}", "--seed", "meta", "cuda:99", "cpu:-1",
          "/proc/self/mem", "a/b/c.npz", "cpu" * 9],
    dict: [{"tiny": [10 ** 30, 1, 1]}, {"tiny": [8, 10 ** 30, 1]}, {"tiny": [8.5, 1, 1]}, {"tiny": None}, {"tiny": {"a": 1}}, {"tiny": [0, 0, 0]}]}
OTHERS = [None, True, (), (1,), [], {}, "1", b"x", 1j, object(), float, np.float32(1), np.int64(8), torch.tensor(1.0), torch.device("cpu"), "a\0b"]
WORDS = ["", "0x10", "1e999", "--", "-", "[" * 100_000, "{" * 3, '{"tiny": [NaN, 1, 1]}', "null", "1" * 5000, "--no-such-flag", "-1", "²", "1_000"]


@pytest.fixture
def quickly(monkeypatch, tmp_path):
    """Little to compute, nothing to download, and after its first step a run is asked to stop."""
    images, labels = make_shapes(16, 32)
    real, steps = dinov2_cifar.train_step, []

    def one_step(*args, **options):
        steps.append(real(*args, **options))
        signal.raise_signal(signal.SIGTERM)
        return steps[-1]

    def offline(root, train, download=False):
        raise OSError("no network") if download else RuntimeError("not found")

    for name in ("CIFAR10", "CIFAR100"):
        offline.filename = "archive"
        monkeypatch.setattr(dinov2_cifar.datasets, name, offline)
    monkeypatch.setattr(dinov2_cifar, "make_shapes", lambda count, size, seed, masks: make_shapes(16, size, seed, masks))
    monkeypatch.setattr(dinov2_cifar, "linear_probe", lambda *four: 0.5)
    monkeypatch.setattr(dinov2_cifar, "dense_probe", lambda *four: 0.5)
    monkeypatch.setattr(dinov2_cifar, "train_step", one_step)
    monkeypatch.chdir(tmp_path)
    for name, value in SMALL.items():
        monkeypatch.setattr(Config, name, value)
    return steps


def draw(rng, name):
    """→ a value for a constant: one that may do, one at an edge of its type, one that may do for another, or anything at all."""
    default, kind = CONSTANTS[name], rng.random()
    one = lambda values: values[rng.integers(len(values))]  # noqa: E731
    if kind < 0.06:
        return one(OTHERS)
    if isinstance(default, bool):
        return bool(rng.integers(2))
    if kind < 0.65 and name in FITTING:
        return one(FITTING[name])
    if isinstance(default, tuple):
        return tuple(one([default[i % len(default)] if kind < 0.8 else one(EDGES[float]), round(rng.random(), 3)])
                     for i in range(len(default) + (kind > 0.95)))
    if isinstance(default, float) and kind < 0.75:
        return round(rng.random() * one([default, 1, 1]), 4)
    return one(EDGES[type(default)])


def words(rng, name, value):
    """→ a constant and its value as they stand on a command line, and sometimes not quite so."""
    flag, kind = "--" + name.lower().replace("_", "-"), rng.random()
    if kind < 0.02:
        flag = flag[:-1]
    if kind > 0.97:
        value = WORDS[rng.integers(len(WORDS))]
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, (tuple, list)):
        return [flag, *map(str, value)]
    text = (json.dumps(value) if isinstance(value, dict) else str(value)).replace("\0", "")       # no shell can pass it on
    return [flag] if kind < 0.04 else [f"{flag}={text}"] if kind < 0.5 else [flag, text]


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("way", ["flags", "constants"])
def test_whatever_is_asked_for_a_run_takes_a_step_or_says_in_one_line_why_not(way, group, quickly, capsys, tmp_path):
    stepped = 0
    for case in range(CASES // 2 // GROUPS):
        rng = np.random.default_rng([way == "flags", group, case])
        names = rng.choice(list(CONSTANTS), rng.integers(1, 4), replace=False)
        settings = {str(name): draw(rng, name) for name in names}
        argv = [word for name, value in settings.items() for word in words(rng, name, value)] if way == "flags" else []
        out = str(tmp_path / f"out{case}")
        quickly.clear()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(Config, "OUTPUT_DIR", out)
            for name, value in settings.items() if way == "constants" else ():
                patch.setattr(Config, name, value)
            dinov2_cifar.main(argv)
        said = capsys.readouterr()
        what = f"{settings if way == 'constants' else argv}: {caught.value.code}\n{said.out}{said.err}"[:3000]
        assert caught.value.code == (143 if quickly else 2), what
        if quickly:
            stepped += 1
            assert len(quickly) == 1 and "stopped and saved at step 1 of" in said.out + said.err, what
        else:
            assert said.err.splitlines()[-1].startswith("error: ") and said.err.count("error: ") == 1 and "Traceback" not in said.err, what
            assert len(said.err.splitlines()) == 1 or "!!!" in said.err, what                     # but for the warning of "auto"
    assert 0.2 < stepped / (CASES // 2 // GROUPS) < 0.9          # neither kind is left out
