"""Settings: what Config accepts, and that every constant is a flag and has an effect."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, read_records

import dinov2_cifar
from dinov2_cifar import (
    CONSTANTS,
    QUICK,
    Config,
    InputError,
    main,
    make_shapes,
    parse_arguments,
    train_dinov2,
)

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # of Linux
ON_REQUEST = PAGES.exists() and "[madvise]" in PAGES.read_text()
DIMS = {"dim": 32, "depth": 2, "heads": 2}
SIZES = {"tiny": DIMS, "small": {**DIMS, "dim": 48}}
BASE = {**SMALL, "MODEL_DIMS": SIZES}
WEIGHTS = dict(  # for each constant a value, not BASE's, that gives other weights after two steps
    MODEL_SIZE="small", MODEL_DIMS={"tiny": {**DIMS, "depth": 3}}, IMAGE_SIZE=16, PATCH_SIZE=4,
    REGISTER_TOKENS=2, LAYER_SCALE=0.1, DROP_PATH=0.5, DROPOUT=0.2, PROJECTION_DIM=24,
    HEAD_HIDDEN_DIM=48, HEAD_BOTTLENECK_DIM=24, HEAD_BATCH_NORM=False, GLOBAL_CROPS_NUMBER=3,
    LOCAL_CROPS_NUMBER=1, GLOBAL_CROP_SIZE=16, LOCAL_CROP_SIZE=8, GLOBAL_CROPS_SCALE=(0.7, 1.0),
    LOCAL_CROPS_SCALE=(0.15, 0.2), FLIP=False, COLOR_JITTER=(0.4, 0.4, 0.2, 0.0),
    COLOR_JITTER_PROB=0.1, GRAYSCALE_PROB=0.8, LAMBDA_IMG=0.5, LAMBDA_PATCH=1.0, LAMBDA_KOLEO=0.5,
    KOLEO_KIND="cosine", KOLEO_FEATURES="bottleneck", MASK_KIND="random", MASK_RATIO=0.3,
    MASK_PROB=0.8, STUDENT_TEMP=0.2,
    TEACHER_TEMP_START=0.025, TEACHER_TEMP_END=0.1, TEACHER_TEMP_WARMUP=0.9, SINKHORN_ITERATIONS=1,
    BATCH_SIZE=4, ACCUMULATE=2, LEARNING_RATE=1e-3, LEARNING_RATE_END=1e-4, WARMUP=0.5,
    WEIGHT_DECAY=0.2, WEIGHT_DECAY_END=0.8, EMA_START=0.5, EMA_END=0.9, FREEZE_PROTOTYPES=0.0,
    CLIP_GRAD=0.01, TOTAL_EPOCHS=2, TRAIN_IMAGES=8, VALIDATION_IMAGES=8, SEED=2**60,
    PRECISION="bf16",
)  # fmt: skip
FILES = dict(EVAL_EVERY=2, SAVE_EVERY=1, SAVE_EVERY_MINUTES=1e-9, RESUME="newest", OUTPUT_DIR="x")
PLACES = dict(DATASET="cifar100", DATA_PATH="some/where", DEVICE="cpu:0", COMPILE=True)
PLACES |= dict(INIT_FROM="weights.pth", FREEZE_BACKBONE=0.5, TENSORBOARD=True)  # test_exchange.py


def to_flags(settings):
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else [value]
        values = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        flag = ("no-" if value is False else "") + name.lower().replace("_", "-")
        words += [f"--{flag}", *([] if isinstance(value, bool) else values)]
    return words


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return run(**settings) -> weights, and what was done, by the setting that changes it."""
    images, labels = make_shapes(16, 32)
    dataset = (images, labels, images[:4], labels[:4])

    def train(**settings):
        folder, save = tmp_path_factory.mktemp("run"), Mock(wraps=dinov2_cifar.save_run)
        config = Config(**{**BASE, "OUTPUT_DIR": str(folder), **settings})
        slow = {"plot_figures": Mock(), "linear_probe": Mock(return_value=0.5)}
        with patch.multiple(dinov2_cifar, save_run=save, **slow):
            model = dinov2_cifar.train_dinov2(config, dataset)
        epochs = read_records(config.OUTPUT_DIR, "epoch")
        done = {"EVAL_EVERY": ["knn" in e for e in epochs], "SAVE_EVERY_MINUTES": save.call_count}
        done["SAVE_EVERY"] = {path.name for path in Path(config.OUTPUT_DIR).glob("*.pth")}
        done["skipped"] = sum(epoch["skipped"] for epoch in epochs)
        return torch.cat([value.flatten() for value in model.state_dict().values()]), done

    train.baseline, _ = train()
    return train


def test_config_copies_class_constants_when_called(monkeypatch):
    before, given = Config(), {"small": {**DIMS}}
    monkeypatch.setattr(Config, "MODEL_DIMS", given)
    now = Config()
    given["small"]["dim"] = now.to_dict()["MODEL_DIMS"]["small"]["dim"] = 64
    assert before.MODEL_DIMS == CONSTANTS["MODEL_DIMS"] and now.MODEL_DIMS["small"] == DIMS
    assert Config().MODEL_DIMS["small"]["dim"] == 64 and Config(**BASE).MODEL_DIMS == SIZES
    monkeypatch.setattr(Config, "LERNING_RATE", 1, raising=False)
    with pytest.raises(InputError, match="LERNING_RATE"):
        Config()


def test_config_round_trips_through_dict_checkpoint_and_json(tmp_path):
    settings = Config(GLOBAL_CROPS_SCALE=[0.3, 1], LEARNING_RATE=1, MODEL_DIMS=SIZES).to_dict()
    assert all(type(settings[name]) is type(default) for name, default in CONSTANTS.items())
    torch.save(settings, tmp_path / "config.pth")
    for copy in torch.load(tmp_path / "config.pth"), json.loads(json.dumps(settings)):
        assert Config(**copy).to_dict() == settings


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_is_flag_of_one_type(name):
    settings, kind = {**BASE, name: {**WEIGHTS, **FILES, **PLACES}[name]}, type(CONSTANTS[name])
    assert parse_arguments(to_flags(settings)).to_dict() == Config(**settings).to_dict()
    for value in (None, True, 1j, (1,), [], {}, "1", b"x", object(), np.float32(1), np.int64(8)):
        if type(value) is not kind or kind is tuple:
            with pytest.raises(InputError, match=f"{name}.*{kind.__name__}"):
                Config(**{name: value})


BAD = [  # settings, and words of the message: the name, the value, what is possible
    (dict(TOTAL_EPOCH=1), "TOTAL_EPOCH Config --help"),
    (dict(BATCH_SIZE=1), "BATCH_SIZE (1) 2"),
    (dict(BATCH_SIZE=17), "BATCH_SIZE (17) 16 TRAIN_IMAGES lower"),
    (dict(SEED=-1), "SEED (-1) 0"),
    (dict(LEARNING_RATE=float("nan")), "LEARNING_RATE (nan) 0"),
    (dict(EMA_START=1.5), "EMA_START (1.5) 0 to 1"),
    (dict(LOCAL_CROPS_SCALE=(0.1, float("inf"))), "LOCAL_CROPS_SCALE (inf) 0.001 to 1"),
    (dict(GLOBAL_CROPS_SCALE=(1.0, 0.4)), "GLOBAL_CROPS_SCALE 1.0 0.4 not decrease"),
    (dict(COLOR_JITTER=(0.1, 0.1, 0.1, 0.6)), "COLOR_JITTER 0.6 hue 0.5"),
    (dict(LOCAL_CROP_SIZE=18), "LOCAL_CROP_SIZE (18) multiple PATCH_SIZE"),
    (dict(MODEL_SIZE="huge"), "MODEL_SIZE huge tiny small"),
    (dict(MODEL_DIMS={"tiny": {**DIMS, "heads": 3}}), "MODEL_DIMS 32 3 multiple heads"),
    (dict(MODEL_DIMS={"tiny": [384, 6, 6]}), "MODEL_DIMS [384, like 'heads'"),
    (dict(MASK_RATIO=0.5, MASK_PROB=0.5), "MASK_RATIO (0.5) at most 0.6 MASK_PROB"),
    (dict(MASK_RATIO=5e-4, MASK_PROB=1e-3), "MASK_PROB (0.001) no crop"),
    (dict(LAMBDA_IMG=0, LAMBDA_KOLEO=0, MASK_RATIO=0), "LAMBDA_IMG LAMBDA_PATCH MASK_RATIO 0"),
    (dict(LAMBDA_KOLEO=1e20), "2 in a row not finite PRECISION fp32 lower LEARNING_RATE"),
    (dict(DEVICE="cpu:1"), "DEVICE ('cpu:1') available cpu"),
]


@pytest.mark.parametrize("settings, words", BAD, ids=str)
def test_bad_setting_raises_with_name_value_and_remedy(settings, words, run):
    with pytest.raises(InputError) as caught:
        run(**settings)
    message = str(caught.value)
    assert all(word in message for word in words.split()) and "\n" not in message, message


EXTREMES = [
    dict(MODEL_DIMS={"tiny": dict.fromkeys(DIMS, 1)}, MASK_RATIO=0.0, MASK_PROB=0.0),
    dict(PATCH_SIZE=32, LOCAL_CROPS_NUMBER=0, MASK_RATIO=1e-9, MASK_PROB=0.05, PROJECTION_DIM=2),
    dict(IMAGE_SIZE=8, PATCH_SIZE=1, GLOBAL_CROP_SIZE=8, LOCAL_CROP_SIZE=16, TRAIN_IMAGES=10**9),
    dict(GLOBAL_CROPS_NUMBER=5, LOCAL_CROPS_NUMBER=1, BATCH_SIZE=2, HEAD_BATCH_NORM=False),
    dict(GLOBAL_CROPS_SCALE=(1e-3, 1e-3), LOCAL_CROPS_SCALE=(1.0, 1.0), HEAD_HIDDEN_DIM=1),
    dict(COLOR_JITTER=(1e9, 1e9, 1e9, 0.5), COLOR_JITTER_PROB=1.0, MASK_RATIO=0.6, MASK_PROB=1.0),
    dict(STUDENT_TEMP=1e-3, TEACHER_TEMP_START=1e-3, TEACHER_TEMP_END=1e-3, CLIP_GRAD=1e-9),
    dict(STUDENT_TEMP=1e9, TEACHER_TEMP_END=1e9, SINKHORN_ITERATIONS=50, TEACHER_TEMP_WARMUP=1.0),
    dict(DROPOUT=0.99, DROP_PATH=0.99, EMA_START=0.0, EMA_END=0.0, WARMUP=1.0, CLIP_GRAD=0.0),
]


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_extreme_settings_train(settings, run):
    weights, done = run(**settings)
    assert weights.isfinite().all() and done["skipped"] == 0


@pytest.mark.parametrize("name", WEIGHTS)
def test_constant_changes_weights(name, run):
    assert not torch.equal(run(**{name: WEIGHTS[name]})[0], run.baseline)


@pytest.mark.parametrize("name", ["EVAL_EVERY", "SAVE_EVERY", "SAVE_EVERY_MINUTES"])
def test_constant_changes_records_or_files_alone(name, run):
    weights, done = run(TOTAL_EPOCHS=2)
    others, changed = run(TOTAL_EPOCHS=2, **{name: FILES[name]})
    assert torch.equal(weights, others)
    assert [key for key in done if done[key] != changed[key]] == [name]


def test_output_dir_and_resume_choose_checkpoint(run, tmp_path):
    for resume, saves in ("newest", 1), ("newest", 0), ("", 1):  # the first finds none
        weights, done = run(OUTPUT_DIR=str(tmp_path), RESUME=resume)
        assert torch.equal(weights, run.baseline) and done["SAVE_EVERY_MINUTES"] == saves


def test_dataset_and_data_path_choose_images(monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "load_cifar", lambda *args: args)
    for name, found in ("auto", "cifar10"), ("cifar10", "cifar10"), ("cifar100", "cifar100"):
        assert dinov2_cifar.load_images(Config(DATASET=name, DATA_PATH="x")) == (found, "x")


@pytest.mark.parametrize("device, triton", [("cuda", True), ("cuda", False), ("meta", True)])
@pytest.mark.parametrize("compile", [True, False])
def test_device_and_compile_choose_how_networks_run(compile, device, triton, monkeypatch):
    config, compiled = Config(**{**BASE, "COMPILE": compile}), []
    transform, masks = (
        dinov2_cifar.MultiCropTransform(config=config),
        dinov2_cifar.MaskGenerator(config),
    )
    config.DEVICE = device  # after validation
    monkeypatch.setattr(dinov2_cifar, "has_triton", lambda: triton)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or "compiled")
    model = dinov2_cifar.DINOv2(config)
    owners = {"random_views": transform, "draw": masks, "forward": model}
    for processes in (1, 2):
        monkeypatch.setattr(dinov2_cifar, "world_size", lambda n=processes: n)
        functions = [getattr(owner, name) for name, owner in owners.items()]
        networks = (
            [functions[2]] if processes == 1 else [model.student.forward, model.teacher.forward]
        )
        with dinov2_cifar.compiled_step(model, transform, masks):
            works = compile and device == "cuda" and triton
            assert compiled == ([*functions[:2], *networks] if works else [])
            assert (transform.random_views == "compiled") == works
        assert [getattr(owner, name) for name, owner in owners.items()] == functions
        compiled.clear()


def test_networks_are_trained_on_device(small, monkeypatch):
    def watch(model):
        raise InputError(next(model.parameters()).device.type)

    monkeypatch.setattr(dinov2_cifar, "make_optimizer", watch)
    config = small()
    config.DEVICE = "meta"  # after validation
    with pytest.raises(InputError, match="meta"):
        train_dinov2(config)


@pytest.mark.parametrize("flag, preset", [("--quick", QUICK), ("--hour", dinov2_cifar.HOUR)])
def test_flags_override_presets_and_presets_override_config(flag, preset, monkeypatch):
    monkeypatch.setattr(Config, "SEED", 9)
    assert parse_arguments([]).to_dict() == Config().to_dict()
    config = parse_arguments(["--batch-size=5", flag, "--resume"]).to_dict()
    given = {"SEED": 9, "BATCH_SIZE": 5, "RESUME": "newest"}
    assert config == Config(**{**preset, **given}).to_dict()
    assert all(value != getattr(Config, name) for name, value in dinov2_cifar.HOUR.items())


def test_help_of_flag_is_comment_of_constant(capsys):
    source = (ROOT / "dinov2_cifar.py").read_text(encoding="utf-8")
    (config,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "Config")
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines anywhere
    for node in (node for node in config.body if isinstance(node, ast.Assign)):
        comment = source.splitlines()[node.lineno - 1].partition("  # ")[2]
        assert len(comment) > 6 and "".join(comment.split()) in text, node.targets[0].id


def error_line(words, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(words)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


MISTAKES = ["--total-epoch 3", "--seed 1.5", "--model-dims {small", "--batch-size 1"]
MISTAKES += ["--dataset no/such/place", "--dataset shapes --resume no/such.pth"]


@pytest.mark.parametrize("line", MISTAKES)
def test_mistake_exits_with_2_and_one_line_before_loading(line, capsys, small, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "as_images", lambda *args: pytest.fail("loaded images"))
    error = error_line(["--output-dir", small().OUTPUT_DIR, *line.split()], capsys)
    assert line.split()[-1] in error


@pytest.mark.parametrize("given", [None, "0"])
def test_command_line_asks_torch_for_huge_pages_unless_told_otherwise(given, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # restored in the end
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (given or "1")


@pytest.mark.skipif(not ON_REQUEST, reason="huge pages are not for those who ask for them")
@pytest.mark.parametrize("given", [None, "0"])
def test_large_tensors_get_huge_pages_on_the_command_line(given):
    """Torch reads the variable once: the import must not have made it do so."""
    code = """
import contextlib, dinov2_cifar, torch
with contextlib.suppress(SystemExit):
    dinov2_cifar.main(["--help"])
x = torch.ones(2**26)  # 256 MiB
print(open("/proc/self/smaps_rollup").read())
"""
    env = {"PYTHONPATH": str(ROOT), "THP_MEM_ALLOC_ENABLE": given}
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    text = subprocess.check_output([sys.executable, "-B", "-c", code], env=env, text=True)
    huge = int(re.search(r"AnonHugePages: +(\d+)", text)[1]) / 2**10  # MiB
    assert huge < 128 if given else huge > 128


def test_main_reports_lack_of_memory_or_disk_and_raises_other_errors(capsys, monkeypatch):
    memory = (torch.OutOfMemoryError("GPU 0\nout of memory"), RuntimeError("can't allocate memory"))
    for error in (*memory, OSError("no space left")):
        monkeypatch.setattr(dinov2_cifar, "train_dinov2", Mock(side_effect=error))
        assert ("lower BATCH_SIZE" in error_line([], capsys)) == (error in memory)
    monkeypatch.setattr(dinov2_cifar, "train_dinov2", Mock(side_effect=RuntimeError("illegal")))
    with pytest.raises(RuntimeError, match="illegal"):
        main([])
