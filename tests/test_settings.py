"""The settings: what Config accepts and refuses; every constant is a flag and has an effect."""

import ast
import json
from copy import deepcopy
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

import dinov2_cifar
from dinov2_cifar import (
    CONSTANTS,
    QUICK,
    Config,
    Images,
    InputError,
    best_device,
    main,
    make_model,
    make_shapes,
    parse_arguments,
    prepare_images,
    train_dinov2,
)

FIXED_NAMES = """MODEL_SIZE PATCH_SIZE IMAGE_SIZE MODEL_DIMS PROJECTION_DIM BATCH_SIZE
    LEARNING_RATE WEIGHT_DECAY TOTAL_EPOCHS GLOBAL_CROPS_NUMBER LOCAL_CROPS_NUMBER GLOBAL_CROP_SIZE
    LOCAL_CROP_SIZE LAMBDA_IMG LAMBDA_PATCH LAMBDA_KOLEO EMA_START EMA_END MASK_RATIO DEVICE
    DATA_PATH DATASET TRAIN_IMAGES OUTPUT_DIR SEED RESUME EVAL_EVERY SAVE_EVERY PRECISION
    COMPILE""".split()
PUBLIC_NAMES = """Config QUICK InputError MultiCropTransform MultiCropDataset PatchEmbedding MLP
    MultiHeadAttention TransformerBlock VisionTransformer ProjectionHead DINOv2 CosineScheduler
    sinkhorn_knopp_centering dino_loss ibot_loss koleo_regularizer generate_random_mask
    generate_block_mask train_dinov2 save_checkpoint load_checkpoint load_backbone extract_features
    knn_accuracy linear_probe rank_me make_shapes""".split()
MEAN_STD = [0.5] * 3, [0.2] * 3


def dims(dim, depth, heads):
    return {"dim": dim, "depth": depth, "heads": heads}


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


def comments():
    """Return the comment on each constant's first line, found without a regular expression."""
    source = (ROOT / "dinov2_cifar.py").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assignments = [
        node
        for node in next(node for node in classes if node.name == "Config").body
        if isinstance(node, ast.Assign)
    ]
    lines = source.splitlines()
    return {node.targets[0].id: lines[node.lineno - 1].partition("  # ")[2] for node in assignments}


# Config


def test_import_star_gives_the_public_names_only():
    names = {}
    exec("from dinov2_cifar import *", names)
    assert set(names) - {"__builtins__"} == set(PUBLIC_NAMES)


def test_config_has_the_fixed_names_and_starting_values():
    assert set(FIXED_NAMES) <= set(CONSTANTS) and Config.RESUME == ""
    assert Config.MODEL_DIMS == {
        "tiny": dims(192, 6, 3),
        "small": dims(384, 6, 6),
        "base": dims(768, 12, 12),
        "large": dims(1024, 24, 16),
    }
    assert (Config.OUTPUT_DIR, Config.SAVE_EVERY, Config.TRAIN_IMAGES) == ("checkpoints", 10, 0)
    assert Config.DEVICE == best_device() == torch.zeros(1).to(Config.DEVICE).device.type


def test_config_reads_the_class_constants_at_that_moment(monkeypatch):
    before = Config()
    monkeypatch.setattr(Config, "TOTAL_EPOCHS", 77)
    assert Config().TOTAL_EPOCHS == 77 != before.TOTAL_EPOCHS
    assert Config(TOTAL_EPOCHS=3).TOTAL_EPOCHS == 3 and Config.TOTAL_EPOCHS == 77


@pytest.mark.parametrize(
    "wrong, near",
    [("TOTAL_EPOCH", "TOTAL_EPOCHS"), ("LERNING_RATE", "LEARNING_RATE"), ("XYZZY", None)],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(monkeypatch, wrong, near):
    hint = rf"; did you mean {near}\?" if near else ""
    with pytest.raises(InputError, match=rf"^{wrong} is not a setting of Config{hint}$"):
        Config(**{wrong: 1})
    monkeypatch.setattr(Config, wrong, 1, raising=False)  # a notebook's Config.TOTAL_EPOCH = 1
    with pytest.raises(InputError, match=wrong):
        Config()


BAD = [  # the settings, and words of the message: the name, the value, what is possible
    (dict(PATCH_SIZE=5), "IMAGE_SIZE (32) PATCH_SIZE (5)"),
    (dict(PATCH_SIZE=0), "PATCH_SIZE (0)"),
    (dict(LOCAL_CROP_SIZE=18, PATCH_SIZE=4), "LOCAL_CROP_SIZE (18) PATCH_SIZE (4)"),
    (dict(GLOBAL_CROP_SIZE=30, PATCH_SIZE=4), "GLOBAL_CROP_SIZE (30) PATCH_SIZE (4)"),
    (dict(IMAGE_SIZE=33), "IMAGE_SIZE (33)"),
    (dict(IMAGE_SIZE="32"), "IMAGE_SIZE ('32') int"),
    (dict(BATCH_SIZE=1), "BATCH_SIZE (1) 2"),
    (dict(BATCH_SIZE=64.0), "BATCH_SIZE (64.0) int"),
    (dict(BATCH_SIZE=True), "BATCH_SIZE (True) int"),
    (dict(LOCAL_CROPS_NUMBER=-1), "LOCAL_CROPS_NUMBER (-1)"),
    (dict(GLOBAL_CROPS_NUMBER=1), "GLOBAL_CROPS_NUMBER (1) 2"),
    (dict(PROJECTION_DIM=1), "PROJECTION_DIM (1) 2"),
    (dict(TOTAL_EPOCHS=0), "TOTAL_EPOCHS (0)"),
    (dict(SINKHORN_ITERATIONS=-1), "SINKHORN_ITERATIONS (-1)"),
    (dict(TRAIN_IMAGES=-3), "TRAIN_IMAGES (-3)"),
    (dict(SEED=-1), "SEED (-1)"),
    (dict(SEED=None), "SEED (None) int"),
    (dict(COMPILE=1), "COMPILE (1) bool"),
    (dict(LEARNING_RATE=-1.0), "LEARNING_RATE (-1.0)"),
    (dict(LEARNING_RATE=float("nan")), "LEARNING_RATE (nan)"),
    (dict(WEIGHT_DECAY=float("inf")), "WEIGHT_DECAY (inf)"),
    (dict(LAMBDA_IMG=True), "LAMBDA_IMG (True) float"),
    (
        dict(LAMBDA_IMG=0.0, LAMBDA_PATCH=0.0, LAMBDA_KOLEO=0.0),
        "LAMBDA_IMG LAMBDA_PATCH LAMBDA_KOLEO 0",
    ),
    (
        dict(LAMBDA_IMG=0.0, LAMBDA_PATCH=1.0, LAMBDA_KOLEO=0.0, MASK_RATIO=0.0),
        "LAMBDA_IMG LAMBDA_PATCH MASK_RATIO 0",
    ),
    (dict(EMA_START=1.5), "EMA_START (1.5) 1"),
    (dict(EMA_END=-0.1), "EMA_END (-0.1)"),
    (dict(DROPOUT=1.0), "DROPOUT (1.0)"),
    (dict(DROP_PATH=1.0), "DROP_PATH (1.0)"),
    (dict(TEACHER_TEMP_START=0.0), "TEACHER_TEMP_START (0.0)"),
    (dict(MASK_RATIO=0.5, MASK_PROB=0.5), "MASK_RATIO (0.5) 0.6 MASK_PROB"),
    (dict(MASK_RATIO=0.001, MASK_PROB=0.001), "MASK_PROB (0.001)"),
    (dict(GLOBAL_CROPS_SCALE=(1.0, 0.4)), "GLOBAL_CROPS_SCALE 1.0 0.4"),
    (dict(LOCAL_CROPS_SCALE=(0.5, 0.4)), "LOCAL_CROPS_SCALE 0.5 0.4"),
    (dict(LOCAL_CROPS_SCALE=(0.0, 0.4)), "LOCAL_CROPS_SCALE (0.0)"),
    (dict(LOCAL_CROPS_SCALE=(0.1, float("nan"))), "LOCAL_CROPS_SCALE (nan)"),
    (dict(GLOBAL_CROPS_SCALE=(0.1, 0.2, 0.3)), "GLOBAL_CROPS_SCALE (0.1, 0.2, 0.3)"),
    (dict(GLOBAL_CROPS_SCALE=0.4), "GLOBAL_CROPS_SCALE (0.4) tuple"),
    (dict(GLOBAL_CROPS_SCALE=(0.4, "1")), "GLOBAL_CROPS_SCALE ('1') float"),
    (dict(COLOR_JITTER=(0.1, 0.1, 0.1, 0.6)), "COLOR_JITTER hue 0.5 0.6"),
    (dict(MODEL_SIZE="huge"), "MODEL_SIZE huge small"),
    (dict(MODEL_DIMS={"small": dims(10, 2, 3)}), "MODEL_DIMS 10 3 multiple"),
    (dict(MODEL_DIMS={"small": {"dim": 10, "depth": 2}}), "MODEL_DIMS 10 heads"),
    (dict(MODEL_DIMS={"small": dims(8.0, 2, 2)}), "MODEL_DIMS 8.0"),
    (dict(MODEL_DIMS={"small": dims(8, 0, 2)}), "MODEL_DIMS 'depth': 0"),
    (dict(MODEL_DIMS={"small": [384, 6, 6]}), "MODEL_DIMS [384, 6, 6] heads"),
    (dict(MODEL_DIMS=[384, 6, 6]), "MODEL_DIMS [384, 6, 6] dict"),
    (dict(KOLEO_KIND="far"), "KOLEO_KIND far nearest cosine"),
    (dict(MASK_KIND=""), "MASK_KIND block random"),
    (dict(PRECISION="fp16"), "PRECISION fp16 bf16"),
    (dict(DEVICE="cuda:99"), "DEVICE ('cuda:99')"),
    (dict(DEVICE="nonsense"), "DEVICE ('nonsense')"),
    (dict(DEVICE="meta"), "DEVICE ('meta')"),
    (dict(DEVICE=torch.device("cpu")), "DEVICE device str"),
    (dict(OUTPUT_DIR=Path("x")), "OUTPUT_DIR str"),
]


@pytest.mark.parametrize("settings, words", BAD, ids=lambda v: str(v)[:50])
def test_a_bad_value_is_refused_with_its_name_and_the_value(settings, words):
    with pytest.raises(InputError) as caught:
        Config(**settings)
    message = str(caught.value)
    assert all(word in message for word in words.split()) and "\n" not in message, message


@pytest.mark.parametrize(
    "settings",
    [
        dict(LEARNING_RATE=1),
        dict(GLOBAL_CROPS_SCALE=[0.5, 1]),
        dict(LOCAL_CROPS_NUMBER=0),
        dict(DEVICE="cpu"),
        dict(EMA_START=1.0),
        dict(MASK_PROB=0.0, MASK_RATIO=0.0),
        dict(GLOBAL_CROPS_SCALE=(0.5, 0.5)),
        dict(MASK_RATIO=0.3, MASK_PROB=0.5),
    ],
    ids=str,
)
def test_a_value_at_the_edge_is_accepted_in_the_type_of_its_default(settings):
    (name, value), *_ = settings.items()
    value = tuple(value) if isinstance(value, list) else value
    accepted = getattr(Config(**settings), name)
    assert type(accepted) is type(CONSTANTS[name]) and accepted == value


# Dictionaries


def is_plain(value):
    if type(value) is dict:
        return all(type(key) is str and is_plain(v) for key, v in value.items())
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in (bool, int, float, str)


def test_to_dict_is_plain_and_restores_the_config_also_from_files(tmp_path):
    given = dict(GLOBAL_CROPS_SCALE=(0.3, 0.9), MODEL_DIMS={"small": dims(8, 1, 2)})
    settings = Config(**given).to_dict()
    assert set(settings) == set(CONSTANTS) and is_plain(settings)
    torch.save(settings, tmp_path / "config.pth")
    loaded = torch.load(tmp_path / "config.pth", weights_only=True)
    for copy in (settings, loaded, json.loads(json.dumps(settings))):
        assert Config(**copy).to_dict() == settings


def test_dictionaries_are_not_shared():
    before, given = deepcopy(Config.MODEL_DIMS), {"small": dims(8, 1, 2)}
    one, two, three = Config(), Config(), Config(MODEL_DIMS=given)
    one.MODEL_DIMS["tiny"]["dim"] = one.to_dict()["MODEL_DIMS"]["small"]["dim"] = 1
    given["small"]["dim"] = 1
    assert Config.MODEL_DIMS == two.MODEL_DIMS == Config().MODEL_DIMS == before
    assert one.MODEL_DIMS["small"] == before["small"]
    assert three.MODEL_DIMS == {"small": dims(8, 1, 2)}


# Flags

WORDS = dict(
    MODEL_DIMS=[json.dumps({"tiny": dims(32, 2, 2), "small": dims(64, 2, 2)})],
    MODEL_SIZE=["tiny"],
    KOLEO_KIND=["cosine"],
    MASK_KIND=["random"],
    MASK_PROB=[".4"],
    PRECISION=["fp32"],
    DEVICE=["cpu"],
    GLOBAL_CROPS_SCALE=[".4", "1"],
    IMAGE_SIZE=["64"],
    PATCH_SIZE=["8"],
    GLOBAL_CROP_SIZE=["16"],
    LOCAL_CROP_SIZE=["16"],
)
WORDS_OF_A_TYPE = {int: ["5"], float: [".1"], str: ["some/where"], tuple: [".25"] * 4}


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_constant_is_a_flag_of_its_default_s_type(name):
    default, flag = CONSTANTS[name], flag_of(name)
    if isinstance(default, bool):
        assert getattr(parse_arguments([flag]), name) is True
        assert getattr(parse_arguments(["--no-" + flag[2:]]), name) is False
        return
    words = WORDS.get(name) or WORDS_OF_A_TYPE[type(default)]
    words = words[: len(default)] if isinstance(default, tuple) else words
    value = getattr(parse_arguments([flag, *words]), name)
    read = {dict: json.loads, tuple: float}.get(type(default), type(default))
    expected = tuple(map(read, words)) if isinstance(default, tuple) else read(words[0])
    assert type(value) is type(default) and json.dumps(value) == json.dumps(expected)


def test_without_flags_the_command_line_is_config(monkeypatch):
    monkeypatch.setattr(Config, "TOTAL_EPOCHS", 9)
    assert parse_arguments([]).to_dict() == Config().to_dict()
    given = "--total-epochs 1 --no-compile --global-crops-scale .4 1 --seed=3"
    expected = Config(TOTAL_EPOCHS=1, COMPILE=False, GLOBAL_CROPS_SCALE=(0.4, 1.0), SEED=3)
    assert parse_arguments(given.split()).to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    "line, value",
    [
        ("", ""),
        ("--resume", "newest"),
        ("--resume --seed 1", "newest"),
        ("--resume a.pth", "a.pth"),
    ],
)
def test_resume_without_a_path_is_the_newest(line, value):
    assert parse_arguments(line.split()).RESUME == value


def test_quick_overrides_config_and_flags_override_quick():
    assert QUICK["MODEL_SIZE"] == "tiny" and QUICK["DATASET"] == "shapes"
    config = parse_arguments(["--quick"]).to_dict()
    assert config == Config(**QUICK).to_dict() != Config().to_dict()
    config = parse_arguments("--total-epochs 3 --quick --model-size base".split()).to_dict()
    assert config == Config(**{**QUICK, "TOTAL_EPOCHS": 3, "MODEL_SIZE": "base"}).to_dict()


def test_help_shows_every_constant_with_the_comment_on_its_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines anywhere
    assert caught.value.code == 0 and "--quick" in text
    assert set(comments()) == set(CONSTANTS)
    for name, comment in comments().items():
        assert len(comment) > 6 and flag_of(name) in text, name
        assert "".join(comment.split()) in text, name


MISTAKES = [
    ("--total-epoch 1", "--total-epoch"),
    ("--batch 8", "--batch"),
    ("--total-epochs one", "one"),
    ("stray", "stray"),
    ("--batch-size 1", "BATCH_SIZE"),
    ("--seed 1.5", "1.5"),
    ("--compile no", "no"),
    ("--device nonsense", "DEVICE"),
    ("--global-crops-scale .4", "0.4"),
    ("--global-crops-scale 1 .4", "GLOBAL_CROPS_SCALE"),
    ("--model-dims {small", "--model-dims"),
    ("--model-dims [1]", "MODEL_DIMS"),
    ("--learning-rate nan", "LEARNING_RATE"),
    ("--patch-size 5", "PATCH_SIZE"),
    ("--dataset no/such/place", "no/such/place"),
    ("--dataset shapes --resume no/such.pth", "RESUME ('no/such.pth')"),
]


def exits_with_one_line(capsys, argv):
    """Return the line on standard error of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: "), error
    assert error.count("\n") == 1 and error.endswith("\n"), error
    return error


@pytest.mark.parametrize("line, word", MISTAKES, ids=lambda v: v[:40])
def test_a_mistake_on_the_command_line_exits_with_2_and_one_line(line, word, capsys, tmp_path):
    argv = [*line.split(), "--output-dir", str(tmp_path / "out")]
    assert word in exits_with_one_line(capsys, argv)


def test_a_bad_constant_in_the_file_exits_with_2_and_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(Config, "PATCH_SIZE", 5)
    assert "PATCH_SIZE" in exits_with_one_line(capsys, [])


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_memory_that_runs_out_is_reported_in_one_line(error, capsys, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "train_dinov2", lambda config: throw(error))
    assert "lower BATCH_SIZE" in exits_with_one_line(capsys, [])


def test_other_errors_of_torch_are_not_caught(monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(dinov2_cifar, "train_dinov2", lambda config: throw(error))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main([])


def throw(error):
    raise error


# Every constant has an effect: runs of two epochs of three steps that differ in one constant

SIZES = {"tiny": dims(32, 2, 2), "small": dims(48, 2, 2)}
WEIGHTS = dict(  # a constant's value in the baseline and in the other run
    MODEL_SIZE=("tiny", "small"),
    MODEL_DIMS=(SIZES, {**SIZES, "tiny": dims(32, 3, 2)}),
    IMAGE_SIZE=(32, 16),
    PATCH_SIZE=(8, 4),
    REGISTER_TOKENS=(0, 2),
    LAYER_SCALE=(0.0, 0.1),
    DROP_PATH=(0.0, 0.5),
    DROPOUT=(0.0, 0.2),
    PROJECTION_DIM=(16, 24),
    HEAD_HIDDEN_DIM=(32, 48),
    HEAD_BOTTLENECK_DIM=(16, 24),
    HEAD_BATCH_NORM=(True, False),
    GLOBAL_CROPS_NUMBER=(2, 3),
    LOCAL_CROPS_NUMBER=(2, 1),
    GLOBAL_CROP_SIZE=(32, 16),
    LOCAL_CROP_SIZE=(16, 8),
    GLOBAL_CROPS_SCALE=((0.4, 1.0), (0.7, 1.0)),
    LOCAL_CROPS_SCALE=((0.1, 0.4), (0.1, 0.2)),
    FLIP=(True, False),
    COLOR_JITTER=((0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 0.2, 0.0)),
    COLOR_JITTER_PROB=(0.8, 0.1),
    GRAYSCALE_PROB=(0.2, 0.8),
    LAMBDA_IMG=(1.0, 0.5),
    LAMBDA_PATCH=(1.0, 0.5),
    LAMBDA_KOLEO=(0.1, 0.5),
    KOLEO_KIND=("nearest", "cosine"),
    MASK_KIND=("block", "random"),
    MASK_RATIO=(0.15, 0.3),
    MASK_PROB=(0.5, 0.8),
    STUDENT_TEMP=(0.1, 0.2),
    TEACHER_TEMP_START=(0.04, 0.06),
    TEACHER_TEMP_END=(0.07, 0.1),
    TEACHER_TEMP_WARMUP=(0.3, 0.9),
    SINKHORN_ITERATIONS=(3, 1),
    BATCH_SIZE=(8, 4),
    ACCUMULATE=(1, 2),
    LEARNING_RATE=(1e-3, 2e-3),
    LEARNING_RATE_END=(1e-6, 1e-4),
    WARMUP=(0.1, 0.5),
    WEIGHT_DECAY=(0.04, 0.2),
    WEIGHT_DECAY_END=(0.4, 0.8),
    EMA_START=(0.996, 0.9),
    EMA_END=(1.0, 0.99),
    FREEZE_PROTOTYPES=(0.0, 0.5),
    CLIP_GRAD=(3.0, 0.01),
    TOTAL_EPOCHS=(2, 1),
    TRAIN_IMAGES=(0, 16),
    SEED=(0, 1),
    PRECISION=("fp32", "bf16"),
)
FILES = dict(EVAL_EVERY=(1, 2), SAVE_EVERY=(0, 1))  # these change files, not the weights
OTHERS = "DATASET DATA_PATH OUTPUT_DIR DEVICE COMPILE RESUME SAVE_EVERY_MINUTES".split()


@pytest.fixture(scope="module", autouse=True)
def without_figures_and_linear_probe():
    """They take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
        patch.setattr(dinov2_cifar, "linear_probe", lambda *probe_data: 0.5)
        yield


def read_metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return run(**settings), which trains on 24 images.

    It returns the weights, the records of the epochs and the names of the checkpoints.
    """
    images, labels = make_shapes(24, 32)

    def train(**settings):
        folder = tmp_path_factory.mktemp("run")
        first = {name: values[0] for name, values in {**WEIGHTS, **FILES}.items()}
        first |= {"DEVICE": "cpu", "COMPILE": False, "OUTPUT_DIR": str(folder)}
        dataset = (images, labels, images[:8], labels[:8])
        model = train_dinov2(Config(**{**first, **settings}), dataset)
        epochs = [record for record in read_metrics(folder) if record["event"] == "epoch"]
        for record in epochs:
            del record["seconds"]
        return model.state_dict(), epochs, sorted(path.name for path in folder.glob("*.pth"))

    return train


@pytest.fixture(scope="module")
def baseline(run):
    return run()


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_tables_hold_every_constant_once():
    assert sorted([*WEIGHTS, *FILES, *OTHERS]) == sorted(CONSTANTS)
    assert all(first != second for first, second in (*WEIGHTS.values(), *FILES.values()))


def test_the_same_settings_give_the_same_run(run, baseline):
    again = run()
    assert same_weights(again[0], baseline[0]) and again[1:] == baseline[1:]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_constant_changes_the_weights(name, run, baseline):
    assert not same_weights(run(**{name: WEIGHTS[name][1]})[0], baseline[0])


def test_eval_every_changes_the_records_only(run, baseline):
    changed = run(EVAL_EVERY=2)
    assert same_weights(changed[0], baseline[0]) and changed[2] == baseline[2]
    evaluated = [["knn" in record for record in result[1]] for result in (baseline, changed)]
    assert evaluated == [[True, True], [False, True]]


def test_save_every_changes_the_checkpoints_only(run, baseline):
    changed = run(SAVE_EVERY=1)
    assert same_weights(changed[0], baseline[0]) and changed[1] == baseline[1]
    assert changed[2] == sorted(baseline[2] + ["dinov2_epoch_1.pth", "dinov2_epoch_2.pth"])


@pytest.mark.parametrize("minutes, steps", [(0.0, [3, 6]), (1e-9, [1, 2, 3, 4, 5, 6])])
def test_save_every_minutes_changes_when_a_run_is_saved(minutes, steps, run, baseline, monkeypatch):
    saved, save = [], dinov2_cifar.save_checkpoint
    monkeypatch.setattr(
        dinov2_cifar,
        "save_checkpoint",
        lambda path, model, optimizer, epoch, step, **state: (
            saved.append(step),
            save(path, model, optimizer, epoch, step, **state),
        ),
    )
    assert same_weights(run(SAVE_EVERY_MINUTES=minutes)[0], baseline[0]) and saved == steps


def test_dataset_and_output_dir_say_what_is_trained_on_and_where_it_is_saved(tmp_path, monkeypatch):
    images, labels = make_shapes(16, 32)
    monkeypatch.setattr(dinov2_cifar, "make_shapes", lambda *args, **options: (images, labels))
    monkeypatch.setattr(
        dinov2_cifar, "load_cifar", lambda name, root: Images(255 - images, name=name)
    )
    models = []
    for name in ("shapes", "cifar100"):
        folder = tmp_path / name
        config = Config(**{**SMALL, "DATASET": name, "OUTPUT_DIR": str(folder)})
        models.append(train_dinov2(config).state_dict())
        assert read_metrics(folder)[0]["data"] == name
        checkpoint = torch.load(folder / "dinov2_last.pth", weights_only=True)
        assert checkpoint["data_name"] == name
    assert not same_weights(*models)


def test_data_path_is_where_cifar_is_searched(monkeypatch):
    calls, images = [], Images(make_shapes(8, 32)[0])
    monkeypatch.setattr(
        dinov2_cifar, "load_cifar", lambda name, root: calls.append((name, root)) or images
    )
    for dataset in ("auto", "cifar10", "cifar100"):
        prepare_images(Config(**{**SMALL, "DATASET": dataset, "DATA_PATH": "some/where"}))
    assert calls == [(name, "some/where") for name in ("cifar10", "cifar10", "cifar100")]


def test_device_is_where_the_network_and_the_images_are(shapes):
    config = Config(**SMALL)
    config.DEVICE = "meta"  # a device that every machine has, set after validation
    model = make_model(config, *MEAN_STD)
    tensors = [*model.parameters(), *model.buffers(), *prepare_images(config, shapes)[:4]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(
    "compile, device, triton, expected",
    [
        (True, "cuda", True, True),
        (False, "cuda", True, False),
        (True, "cpu", True, False),
        (True, "cuda", False, False),
    ],
)
def test_all_six_networks_are_compiled_on_cuda_with_triton_unless_compile_is_off(
    compile, device, triton, expected, monkeypatch
):
    config, compiled = Config(**{**SMALL, "COMPILE": compile}), []
    config.DEVICE = device
    monkeypatch.setattr(dinov2_cifar, "has_triton", lambda: triton)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    model = make_model(config, *MEAN_STD)
    networks = [*model.student_modules(), *model.teacher_modules()]
    assert list(map(id, compiled)) == list(map(id, networks if expected else []))


def test_resume_continues_a_run_and_without_it_a_run_starts_afresh(tmp_path, capsys):
    images, _ = make_shapes(16, 32)

    def train(**settings):
        given = {**SMALL, "OUTPUT_DIR": str(tmp_path), "SAVE_EVERY": 1, **settings}
        train_dinov2(Config(**given), dataset=images)
        events = [event for event, _ in groupby(r["event"] for r in read_metrics(tmp_path))]
        return " ".join(events), "resuming" in capsys.readouterr().out

    assert train() == ("start baseline step epoch final", False)
    resumed = train(TOTAL_EPOCHS=2, RESUME="newest")
    assert resumed == ("start baseline step epoch step epoch final", True)
    assert train(RESUME="") == ("start baseline step epoch final", False)
    assert train(TOTAL_EPOCHS=2, RESUME=str(tmp_path / "dinov2_epoch_1.pth"))[1]


def test_a_missing_checkpoint_is_refused_before_any_long_work(small, shapes, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "make_model", lambda *args: pytest.fail("built a network"))
    with pytest.raises(InputError, match="RESUME.*no/such.pth"):
        train_dinov2(small(RESUME="no/such.pth"), dataset=shapes)
