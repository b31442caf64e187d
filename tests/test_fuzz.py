"""Random settings: a run takes its steps, or one InputError names a setting that was changed."""

import json
from math import inf, nan

import numpy as np
import pytest
import torch
from conftest import SMALL

import dinov2_cifar
from dinov2_cifar import CONSTANTS, Config, InputError, make_shapes, parse_arguments, train_dinov2

CASES, GROUPS = 200, 5
SIZES = [{"dim": 8, "depth": 1, "heads": 2}, {"dim": 12, "depth": 3, "heads": 3}]
POSSIBLE = dict(  # values that can be used, alone or with others
    MODEL_SIZE=["tiny", "small"],
    MODEL_DIMS=[{"tiny": SIZES[0]}, {"tiny": SIZES[1], "small": SIZES[0]}],
    IMAGE_SIZE=[8, 16, 24, 48],
    PATCH_SIZE=[1, 2, 4, 8, 16],
    REGISTER_TOKENS=[0, 1, 7],
    GLOBAL_CROPS_NUMBER=[2, 3, 5],
    LOCAL_CROPS_NUMBER=[0, 1, 3],
    GLOBAL_CROP_SIZE=[8, 16, 24, 32],
    LOCAL_CROP_SIZE=[8, 16, 24],
    PROJECTION_DIM=[2, 3, 64],
    HEAD_HIDDEN_DIM=[1, 8, 33],
    HEAD_BOTTLENECK_DIM=[1, 5, 16],
    BATCH_SIZE=[2, 3, 8],
    ACCUMULATE=[1, 2, 3],
    TOTAL_EPOCHS=[1, 2, 3],
    SINKHORN_ITERATIONS=[0, 1, 9],
    KOLEO_KIND=["nearest", "cosine"],
    MASK_KIND=["block", "random"],
    PRECISION=["auto", "bf16", "fp32"],
    DEVICE=["cpu", "cpu:0"],
    SEED=[0, 1, 2**32, 2**40],
    TRAIN_IMAGES=[0, 10**9],
    RESUME=["", "newest"],
    EVAL_EVERY=[0, 1, 7],
    SAVE_EVERY=[0, 1, 7],
)
EDGES = {  # values at the edges of a type, which some settings accept
    int: [0, -1, 1],
    float: [0.0, 1.0, -1.0, 0.5, 1e-3, 10.0, inf, nan, -inf],
    str: ["", " ", "nonsense", "cuda:99", "cpu:-1", "meta", "日本"],
    dict: [{}, {"tiny": None}, {"tiny": [8, 1, 2]}, {"tiny": {**SIZES[0], "dim": 9}}, {"a": "b"}],
}
ANYTHING = [None, True, (), (1,), [], {}, "1", b"x", 1j, float, np.float32(1), np.int64(8)]
ANYTHING += [torch.tensor(1.0), torch.device("cpu"), object()]


def draw(rng, name):
    """Return a value for a setting: possible, at an edge of its type, or anything at all."""
    default, kind = CONSTANTS[name], rng.random()

    def one_of(values):
        return values[rng.integers(len(values))]

    if kind < 0.1:
        return one_of(ANYTHING)
    if isinstance(default, bool):
        return bool(rng.integers(2))
    if isinstance(default, tuple):
        value = [one_of([d, rng.random(), one_of(EDGES[float])]) for d in default]
        return tuple(value) if kind < 0.95 else (*value, 0.5)
    if name in POSSIBLE:
        return one_of(POSSIBLE[name] if kind < 0.7 else EDGES[type(default)])
    if name in ("DATASET", "DATA_PATH", "OUTPUT_DIR"):
        return default
    return rng.random() if kind < 0.6 else one_of(EDGES[float])


RELATED = {"MODEL_DIMS": "MODEL_SIZE", "TRAIN_IMAGES": "BATCH_SIZE"}


def names_a_setting(message, settings):
    return any(name in message or RELATED.get(name, name) in message for name in settings)


def to_words(settings):
    """Return flags; all values are one word, so that none is taken for a flag."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.lower().replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [flag, *map(repr, value)]
        else:
            text = json.dumps(value) if isinstance(value, dict) else value
            words.append(f"{flag}={text}")
    return words


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_random_settings_train_or_give_an_error_that_names_one(group, tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
    images, _ = make_shapes(24, 32)
    trained = 0
    for case in range(CASES // GROUPS):
        rng = np.random.default_rng([group, case])
        names = rng.choice(list(CONSTANTS), rng.integers(1, 4), replace=False)
        settings = {str(name): draw(rng, name) for name in names}
        base = {**SMALL, "OUTPUT_DIR": str(tmp_path / str(case))}
        try:
            config = Config(**{**base, **settings})
            assert parse_arguments(to_words(config.to_dict())).to_dict() == config.to_dict()
            model = train_dinov2(config, dataset=images)
        except InputError as error:
            message = str(error)
            assert names_a_setting(message, settings) and "\n" not in message, (settings, message)
        except BaseException as error:
            raise AssertionError(settings) from error
        else:
            trained += 1
            weights = [p for module in model.student_modules() for p in module.parameters()]
            assert all(parameter.isfinite().all() for parameter in weights), settings
    assert 0.2 < trained / (CASES // GROUPS) < 0.8  # both happen
