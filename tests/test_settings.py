"""The settings: what Config takes and refuses, that every constant is a flag, and that every constant has an effect."""

import ast
import json
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

import dinov2_cifar
from dinov2_cifar import (CONSTANTS, QUICK, Config, InputError, Pictures, best_device, can_compile, main, make_model,
                          make_shapes, parse_arguments, prepare_pictures, train_dinov2)

FIXED_NAMES = """MODEL_SIZE PATCH_SIZE IMAGE_SIZE MODEL_DIMS PROJECTION_DIM BATCH_SIZE LEARNING_RATE WEIGHT_DECAY
    TOTAL_EPOCHS GLOBAL_CROPS_NUMBER LOCAL_CROPS_NUMBER GLOBAL_CROP_SIZE LOCAL_CROP_SIZE LAMBDA_IMG LAMBDA_PATCH
    LAMBDA_KOLEO EMA_START EMA_END MASK_RATIO DEVICE DATA_PATH DATASET TRAIN_IMAGES OUTPUT_DIR SEED RESUME EVAL_EVERY
    SAVE_EVERY PRECISION COMPILE""".split()


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


def comments():
    """→ the comment on each constant's line, found without a regular expression over the names."""
    source = (ROOT / "dinov2_cifar.py").read_text(encoding="utf-8")
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Config").body
    lines = source.splitlines()
    return {node.targets[0].id: lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
            for node in body if isinstance(node, ast.Assign)}


# Config

def test_the_contract_s_names_are_there():
    assert set(FIXED_NAMES) <= set(CONSTANTS) and Config.RESUME == ""
    assert Config.MODEL_DIMS == {"tiny": (192, 6, 3), "small": (384, 6, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
    assert (Config.OUTPUT_DIR, Config.SAVE_EVERY, Config.TRAIN_IMAGES) == ("checkpoints", 10, 0)
    assert Config.DEVICE == best_device() and torch.zeros(1).to(Config.DEVICE).device.type == Config.DEVICE


def test_config_reads_the_class_constants_at_that_moment(monkeypatch):
    before = Config()
    monkeypatch.setattr(Config, "TOTAL_EPOCHS", 77)
    assert Config().TOTAL_EPOCHS == 77 != before.TOTAL_EPOCHS
    assert Config(TOTAL_EPOCHS=3).TOTAL_EPOCHS == 3 and Config.TOTAL_EPOCHS == 77


@pytest.mark.parametrize("wrong, near", [("TOTAL_EPOCH", "TOTAL_EPOCHS"), ("LERNING_RATE", "LEARNING_RATE"),
                                         ("XYZZY", None)])
def test_an_unknown_name_is_refused_with_the_near_match(monkeypatch, wrong, near):
    with pytest.raises(ValueError, match=rf"\b{wrong}\b.*{rf'mean {near}' if near else 'no setting'}"):
        Config(**{wrong: 1})
    monkeypatch.setattr(Config, wrong, 1, raising=False)         # a notebook's misspelt `Config.TOTAL_EPOCH = 1`
    with pytest.raises(ValueError, match=wrong):
        Config()


BAD = [  # the settings, and the words that the message must hold: the name and the value
    (dict(PATCH_SIZE=5), "PATCH_SIZE 5"),
    (dict(PATCH_SIZE=0), "PATCH_SIZE 0"),
    (dict(LOCAL_CROP_SIZE=18, PATCH_SIZE=4), "LOCAL_CROP_SIZE 18 PATCH_SIZE 4"),
    (dict(GLOBAL_CROP_SIZE=30, PATCH_SIZE=4), "GLOBAL_CROP_SIZE 30"),
    (dict(IMAGE_SIZE=33), "IMAGE_SIZE 33"),
    (dict(IMAGE_SIZE="32"), "IMAGE_SIZE '32'"),
    (dict(BATCH_SIZE=1), "BATCH_SIZE 1"),
    (dict(BATCH_SIZE=64.0), "BATCH_SIZE 64.0 int"),
    (dict(BATCH_SIZE=True), "BATCH_SIZE True int"),
    (dict(LOCAL_CROPS_NUMBER=-1), "LOCAL_CROPS_NUMBER -1"),
    (dict(GLOBAL_CROPS_NUMBER=1), "GLOBAL_CROPS_NUMBER 1"),
    (dict(TOTAL_EPOCHS=0), "TOTAL_EPOCHS 0"),
    (dict(SINKHORN_ITERATIONS=-1), "SINKHORN_ITERATIONS -1"),
    (dict(TRAIN_IMAGES=-3), "TRAIN_IMAGES -3"),
    (dict(SEED=-1), "SEED -1"),
    (dict(SEED=None), "SEED None"),
    (dict(COMPILE=1), "COMPILE 1 bool"),
    (dict(LEARNING_RATE=-1.0), "LEARNING_RATE -1"),
    (dict(LEARNING_RATE=float("nan")), "LEARNING_RATE nan"),
    (dict(WEIGHT_DECAY=float("inf")), "WEIGHT_DECAY inf"),
    (dict(LAMBDA_IMG=True), "LAMBDA_IMG True float"),
    (dict(LAMBDA_IMG=0.0, LAMBDA_PATCH=0.0, LAMBDA_KOLEO=0.0), "LAMBDA_IMG LAMBDA_PATCH LAMBDA_KOLEO 0"),
    (dict(EMA_START=1.5), "EMA_START 1.5"),
    (dict(EMA_END=-0.1), "EMA_END -0.1"),
    (dict(DROPOUT=1.0), "DROPOUT 1.0"),
    (dict(TEACHER_TEMP_START=0.0), "TEACHER_TEMP_START 0.0"),
    (dict(MASK_RATIO=0.5, MASK_PROB=0.5), "MASK_RATIO 0.5 MASK_PROB"),
    (dict(GLOBAL_CROPS_SCALE=(1.0, 0.4)), "GLOBAL_CROPS_SCALE 1.0 0.4"),
    (dict(LOCAL_CROPS_SCALE=(0.0, 0.4)), "LOCAL_CROPS_SCALE 0.0"),
    (dict(LOCAL_CROPS_SCALE=(0.1, float("nan"))), "LOCAL_CROPS_SCALE nan"),
    (dict(GLOBAL_CROPS_SCALE=(0.1, 0.2, 0.3)), "GLOBAL_CROPS_SCALE (0.1, 0.2, 0.3) 2"),
    (dict(GLOBAL_CROPS_SCALE=0.4), "GLOBAL_CROPS_SCALE 0.4"),
    (dict(COLOR_JITTER=(0.1, 0.1, 0.1, 0.6)), "COLOR_JITTER hue 0.6"),
    (dict(MODEL_SIZE="huge"), "MODEL_SIZE huge small"),
    (dict(MODEL_SIZE="small", MODEL_DIMS={"small": (10, 2, 3)}), "MODEL_DIMS small 10 3"),
    (dict(MODEL_SIZE="small", MODEL_DIMS={"small": (10, 2)}), "MODEL_DIMS small (10, 2)"),
    (dict(MODEL_SIZE="small", MODEL_DIMS={"small": (8.0, 2, 2)}), "MODEL_DIMS small 8.0"),
    (dict(MODEL_SIZE="small", MODEL_DIMS={"small": (8, 10 ** 9, 2)}), "MODEL_DIMS small 1000000000 depth 1,000"),
    (dict(MODEL_DIMS=[384, 6, 6]), "MODEL_DIMS [384, 6, 6]"),
    (dict(KOLEO_KIND="far"), "KOLEO_KIND far nearest cosine"),
    (dict(MASK_KIND=""), "MASK_KIND '' block random"),
    (dict(PRECISION="fp16"), "PRECISION fp16 bf16"),
    (dict(DEVICE="cuda:99"), "DEVICE cuda:99"),
    (dict(DEVICE="nonsense"), "DEVICE nonsense"),
    (dict(DEVICE="meta"), "DEVICE meta"),
    (dict(DEVICE=torch.device("cpu")), "DEVICE device str"),
    (dict(OUTPUT_DIR=Path("x")), "OUTPUT_DIR str"),
]


@pytest.mark.parametrize("settings, words", BAD, ids=lambda v: str(v)[:50] if isinstance(v, dict) else "")
def test_a_bad_value_is_refused_with_its_name_and_the_value(settings, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        Config(**settings)
    message = str(caught.value)
    assert all(word in message for word in words.split()), message
    assert "\n" not in message


@pytest.mark.parametrize("settings", [
    dict(LEARNING_RATE=1), dict(GLOBAL_CROPS_SCALE=[0.5, 1]), dict(LOCAL_CROPS_NUMBER=0), dict(DEVICE="cpu"),
    dict(EMA_START=1.0), dict(MASK_PROB=0.0, MASK_RATIO=0.0), dict(GLOBAL_CROPS_SCALE=(0.5, 0.5))], ids=str)
def test_a_value_at_the_edge_is_taken_in_the_type_of_its_default(settings):
    (name, value), *_ = settings.items()
    taken = getattr(Config(**settings), name)
    assert type(taken) is type(CONSTANTS[name]) and (list(taken) == value if isinstance(value, list) else taken == value)


# Dictionaries

def is_plain(value):
    if type(value) is dict:
        return all(type(k) is str and is_plain(v) for k, v in value.items())
    return all(map(is_plain, value)) if type(value) is tuple else type(value) in (bool, int, float, str)


def test_to_dict_is_plain_and_comes_back_also_through_files(tmp_path):
    settings = Config(GLOBAL_CROPS_SCALE=(0.3, 0.9), MODEL_SIZE="small", MODEL_DIMS={"small": (8, 1, 2)}).to_dict()
    assert set(settings) == set(CONSTANTS) and is_plain(settings)
    torch.save(settings, tmp_path / "config.pth")
    for copy in (settings, torch.load(tmp_path / "config.pth", weights_only=True), json.loads(json.dumps(settings))):
        assert Config(**copy).to_dict() == settings


def test_dictionaries_are_not_shared():
    one, two = Config(), Config()
    one.MODEL_DIMS["tiny"] = one.to_dict()["MODEL_DIMS"]["small"] = (1, 1, 1)
    given = {"small": (8, 1, 2)}
    three = Config(MODEL_SIZE="small", MODEL_DIMS=given)
    given["small"] = (1, 1, 1)
    assert Config.MODEL_DIMS["tiny"] == two.MODEL_DIMS["tiny"] == Config().MODEL_DIMS["tiny"] == (192, 6, 3)
    assert one.MODEL_DIMS["small"] == (384, 6, 6) and three.MODEL_DIMS["small"] == (8, 1, 2)


# Flags

WORDS = dict(MODEL_DIMS=['{"tiny": [32, 2, 2], "small": [64, 2, 2]}'], MODEL_SIZE=["tiny"], KOLEO_KIND=["cosine"],
             MASK_KIND=["random"], MASK_PROB=[".4"], PRECISION=["fp32"], DEVICE=["cpu"], GLOBAL_CROPS_SCALE=[".4", "1"],
             IMAGE_SIZE=["64"], PATCH_SIZE=["8"], GLOBAL_CROP_SIZE=["16"], LOCAL_CROP_SIZE=["16"])


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_constant_is_a_flag_of_its_default_s_type(name):
    default = CONSTANTS[name]
    words = WORDS.get(name) or {bool: [], int: ["5"], float: [".1"], str: ["some/where"], tuple: [".25"] * 4}[type(default)]
    if isinstance(default, bool):
        assert getattr(parse_arguments([flag_of(name)]), name) is True
        assert getattr(parse_arguments(["--no-" + flag_of(name)[2:]]), name) is False
        return
    words = words[:len(default)] if isinstance(default, tuple) else words
    value = getattr(parse_arguments([flag_of(name), *words]), name)
    read = {dict: json.loads, tuple: float}.get(type(default), type(default))
    expected = tuple(map(read, words)) if isinstance(default, tuple) else read(words[0])
    assert type(value) is type(default) and json.dumps(value) == json.dumps(expected)


def test_without_flags_the_command_line_is_config(monkeypatch):
    monkeypatch.setattr(Config, "TOTAL_EPOCHS", 9)
    assert parse_arguments([]).to_dict() == Config().to_dict()
    config = parse_arguments("--total-epochs 1 --no-compile --global-crops-scale .4 1 --seed=3".split())
    assert (config.TOTAL_EPOCHS, config.COMPILE, config.GLOBAL_CROPS_SCALE, config.SEED) == (1, False, (0.4, 1.0), 3)


def test_resume_alone_means_the_newest():
    assert [parse_arguments(words.split()).RESUME for words in ("", "--resume", "--resume --seed 1", "--resume a.pth")] == [
        "", "newest", "newest", "a.pth"]


def test_quick_overrides_and_flags_win():
    assert QUICK["MODEL_SIZE"] == "tiny" and QUICK["DATASET"] == "shapes"
    config = parse_arguments(["--quick"]).to_dict()
    assert config == Config(**QUICK).to_dict() != Config().to_dict()
    config = parse_arguments(["--total-epochs", "3", "--quick", "--model-size", "base"]).to_dict()
    assert config == Config(**{**QUICK, "TOTAL_EPOCHS": 3, "MODEL_SIZE": "base"}).to_dict()


def test_help_shows_every_constant_with_the_comment_on_its_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    text = "".join(capsys.readouterr().out.split())              # argparse breaks lines where it likes
    assert caught.value.code == 0 and "--quick" in text
    assert set(comments()) == set(CONSTANTS)
    for name, comment in comments().items():
        assert comment.startswith("  # ") and len(comment) > 10, name
        assert flag_of(name) in text and "".join(comment[4:].split()) in text, name


MISTAKES = [
    ("--total-epoch 1", "--total-epoch"), ("--batch 8", "--batch"), ("--total-epochs one", "one"), ("stray", "stray"),
    ("--batch-size 1", "BATCH_SIZE"), ("--seed 1.5", "1.5"), ("--compile no", "no"), ("--device nonsense", "DEVICE"),
    ("--global-crops-scale .4", "--global-crops-scale"), ("--global-crops-scale 1 .4", "GLOBAL_CROPS_SCALE"),
    ("--model-dims {small", "--model-dims"), ("--model-dims [1]", "MODEL_DIMS"), ("--learning-rate nan", "LEARNING_RATE"),
    ("--patch-size 5", "PATCH_SIZE"), ("--dataset no/such/place", "no/such/place"),
    ("--shard", "SHARD (True) needs several processes"), ("--head-hidden-dim 1048576 --head-bottleneck-dim 1048576", "weights"),
    ("--dataset shapes --batch-size 1048576", "activations; lower BATCH_SIZE (1048576)"), ("--model-dims " + "[" * 10 ** 5, "JSON"),
    ("--resume no/such.pth --dataset shapes --image-size 8 --patch-size 8 --batch-size 8 --model-size tiny", "no/such.pth"),
]


def exits_with_one_line(capsys, call):
    with pytest.raises(SystemExit) as caught:
        call()
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


@pytest.mark.parametrize("line, word", MISTAKES, ids=lambda v: v[:40])
def test_a_mistake_on_the_command_line_exits_with_2_and_one_line(line, word, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "load_shapes", lambda size: Pictures(make_shapes(64, size)[0]))
    assert word in exits_with_one_line(capsys, lambda: main([*line.split(), "--output-dir", str(tmp_path / "out")]))


@pytest.mark.parametrize("error, remedy", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has"), "BATCH_SIZE (8)"), (MemoryError(), "BATCH_SIZE (8)"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "BATCH_SIZE (8)"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), None)], ids=lambda e: type(e).__name__)
def test_memory_that_runs_out_in_a_run_is_said_in_one_line_and_other_errors_are_let_through(error, remedy, capsys, tmp_path, monkeypatch):
    def step(*args):
        raise error

    monkeypatch.setattr(dinov2_cifar, "load_shapes", lambda size: Pictures(make_shapes(64, size)[0]))
    monkeypatch.setattr(dinov2_cifar, "train_step", step)
    line = [word for name, value in SMALL.items() if name in ("BATCH_SIZE", "DATASET", "MODEL_SIZE") for word in (flag_of(name), str(value))]
    with pytest.raises(SystemExit if remedy else RuntimeError) as caught:
        main([*line, "--output-dir", str(tmp_path)])
    if remedy:
        last = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and last.startswith("error: out of memory") and remedy in last


def test_a_bad_constant_in_the_file_exits_with_2_and_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(Config, "PATCH_SIZE", 5)
    assert "PATCH_SIZE" in exits_with_one_line(capsys, lambda: main([]))


# Every constant has an effect: two runs of two epochs of three steps, which differ in one constant

DIMS = {"tiny": (32, 2, 2), "small": (48, 2, 2)}
WEIGHTS = dict(                                                  # constant: in the first run, in the second
    MODEL_SIZE=("tiny", "small"), MODEL_DIMS=(DIMS, {**DIMS, "tiny": (32, 3, 2)}), IMAGE_SIZE=(32, 16), PATCH_SIZE=(8, 4),
    REGISTER_TOKENS=(0, 2), LAYER_SCALE=(0.0, 0.1), DROP_PATH=(0.0, 0.5), DROPOUT=(0.0, 0.2),
    PROJECTION_DIM=(16, 24), HEAD_HIDDEN_DIM=(32, 48), HEAD_BOTTLENECK_DIM=(16, 24), HEAD_BATCH_NORM=(True, False),
    GLOBAL_CROPS_NUMBER=(2, 3), LOCAL_CROPS_NUMBER=(2, 1), GLOBAL_CROP_SIZE=(32, 16), LOCAL_CROP_SIZE=(16, 8),
    GLOBAL_CROPS_SCALE=((0.4, 1.0), (0.7, 1.0)), LOCAL_CROPS_SCALE=((0.1, 0.4), (0.1, 0.2)), FLIP=(True, False),
    COLOR_JITTER=((0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 0.2, 0.0)), COLOR_JITTER_PROB=(0.8, 0.1), GRAYSCALE_PROB=(0.2, 0.8),
    LAMBDA_IMG=(1.0, 0.5), LAMBDA_PATCH=(1.0, 0.5), LAMBDA_KOLEO=(0.1, 0.5), KOLEO_KIND=("nearest", "cosine"),
    MASK_KIND=("block", "random"), MASK_RATIO=(0.15, 0.3), MASK_PROB=(0.5, 0.8), STUDENT_TEMP=(0.1, 0.2),
    TEACHER_TEMP_START=(0.04, 0.06), TEACHER_TEMP_END=(0.07, 0.1), TEACHER_TEMP_WARMUP=(0.3, 0.9),
    SINKHORN_ITERATIONS=(3, 1), BATCH_SIZE=(8, 4), ACCUMULATE=(1, 2), LEARNING_RATE=(1e-3, 2e-3), LEARNING_RATE_END=(1e-6, 1e-4),
    WARMUP=(0.1, 0.5), WEIGHT_DECAY=(0.04, 0.2), WEIGHT_DECAY_END=(0.4, 0.8), EMA_START=(0.996, 0.9),
    EMA_END=(1.0, 0.99), FREEZE_PROTOTYPES=(0.0, 0.5), CLIP_GRAD=(3.0, 0.01), TOTAL_EPOCHS=(2, 1), TRAIN_IMAGES=(0, 16),
    SEED=(0, 1), PRECISION=("fp32", "bf16"))
WRITTEN = dict(EVAL_EVERY=(1, 2), SAVE_EVERY=(0, 1))             # they change files and leave the weights
OWN_TEST = ["DATASET", "DATA_PATH", "OUTPUT_DIR", "DEVICE", "COMPILE", "SHARD", "RESUME", "SAVE_EVERY_MINUTES"]


@pytest.fixture(scope="module", autouse=True)
def without_figures_and_linear_probe():
    """They take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_views", "draw_curves", "draw_attention", "draw_pca"):
            patch.setattr(dinov2_cifar, name, lambda *args: None)
        patch.setattr(dinov2_cifar, "linear_probe", lambda *four: 0.5)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """→ run(**settings) trains on 24 pictures → weights, epoch records, names of the checkpoints."""
    images, labels = make_shapes(24, 32)

    def train(**settings):
        out = tmp_path_factory.mktemp("run")
        first = {name: values[0] for name, values in {**WEIGHTS, **WRITTEN}.items()}
        config = Config(**{**first, "DEVICE": "cpu", "COMPILE": False, "OUTPUT_DIR": str(out), **settings})
        model = train_dinov2(config, dataset=(images, labels, images[:8], labels[:8]))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        epochs = [{k: v for k, v in row.items() if k != "pictures_per_second"} for row in rows if row["event"] == "epoch"]
        return model.state_dict(), epochs, sorted(path.name for path in out.glob("*.pth"))

    return train


@pytest.fixture(scope="module")
def baseline(run):
    return run()


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_tables_cover_every_constant_once():
    assert sorted([*WEIGHTS, *WRITTEN, *OWN_TEST]) == sorted(CONSTANTS)
    assert all(first != second for first, second in (*WEIGHTS.values(), *WRITTEN.values()))


def test_the_same_settings_give_the_same_run(run, baseline):
    again = run()
    assert same_weights(again[0], baseline[0]) and again[1:] == baseline[1:]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_constant_changes_the_weights(name, run, baseline):
    assert not same_weights(run(**{name: WEIGHTS[name][1]})[0], baseline[0])


@pytest.mark.parametrize("name, which", [("EVAL_EVERY", 1), ("SAVE_EVERY", 2)])
def test_a_constant_changes_what_is_written_and_nothing_else(name, which, run, baseline):
    changed = run(**{name: WRITTEN[name][1]})
    assert same_weights(changed[0], baseline[0])
    assert [changed[i] == baseline[i] for i in (1, 2)] == [i != which for i in (1, 2)]
    if name == "EVAL_EVERY":
        assert [["knn" in row for row in rows] for rows in (baseline[1], changed[1])] == [[True, True], [False, True]]
    else:
        assert changed[2] == sorted(baseline[2] + ["dinov2_epoch_1.pth", "dinov2_epoch_2.pth"])


def test_dataset_and_output_dir_say_what_is_trained_on_and_where_it_goes(tmp_path, monkeypatch):
    images, _ = make_shapes(16, 32)
    monkeypatch.setattr(dinov2_cifar, "load_shapes", lambda size: Pictures(images, name="shapes"))
    monkeypatch.setattr(dinov2_cifar, "load_cifar", lambda name, root: Pictures(255 - images, name=name))
    models = {}
    for name in ("shapes", "cifar100"):
        out = tmp_path / name
        models[name] = train_dinov2(Config(**{**SMALL, "DATASET": name, "OUTPUT_DIR": str(out)})).state_dict()
        assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["data"] == name
        assert torch.load(out / "dinov2_last.pth", weights_only=True)["data"] == name
    assert not same_weights(*models.values())


def test_data_path_is_where_cifar_is_looked_for(monkeypatch):
    asked = []
    found = Pictures(make_shapes(8, 32)[0])
    monkeypatch.setattr(dinov2_cifar, "load_cifar", lambda name, root: asked.append((name, root)) or found)
    for dataset in ("auto", "cifar10", "cifar100"):
        prepare_pictures(Config(**{**SMALL, "DATASET": dataset, "DATA_PATH": "some/where"}))
    assert asked == [("cifar10", "some/where"), ("cifar10", "some/where"), ("cifar100", "some/where")]


def test_device_is_where_the_network_and_the_pictures_go(shapes):
    config = Config(**SMALL)
    config.DEVICE = "meta"                                       # a device that every machine has, past the check
    model = make_model(config, (0.5,) * 3, (0.2,) * 3)
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {part.device.type for part in prepare_pictures(config, shapes)[:4]} == {"meta"}


@pytest.mark.parametrize("compile, device, triton, expected", [(True, "cuda", True, True), (False, "cuda", True, False),
                                                               (True, "cpu", True, False), (True, "cuda", False, False)])
def test_compile_follows_the_constant_the_device_and_triton(compile, device, triton, expected, monkeypatch, capsys):
    config = Config(**{**SMALL, "COMPILE": compile})
    config.DEVICE = device
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: triton)
    assert can_compile(config) is expected
    assert ("COMPILE" in capsys.readouterr().out) == (not triton)
    config.SHARD = True                                          # FSDP2 moves the weights about, and is not compiled
    assert can_compile(config) is False


@pytest.mark.parametrize("pays", [True, False])
def test_all_six_networks_are_compiled_where_that_pays(pays, monkeypatch):
    compiled = []
    monkeypatch.setattr(dinov2_cifar, "can_compile", lambda config: pays)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    model = make_model(Config(**SMALL), (0.5,) * 3, (0.2,) * 3)
    assert [id(m) for m in compiled] == [id(m) for m in (*model.student_parts(), *model.teacher_parts())] * pays


def test_resume_goes_on_where_the_run_stood_and_without_it_starts_afresh(tmp_path, capsys):
    same = dict(OUTPUT_DIR=str(tmp_path), SAVE_EVERY=1)
    images, _ = make_shapes(16, 32)

    def steps(**settings):
        train_dinov2(Config(**{**SMALL, **same, **settings}), dataset=images)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        events = " ".join(event for event, _ in groupby(row["event"] for row in rows))
        return events, "going on after epoch 1" in capsys.readouterr().out

    assert steps() == ("start baseline step epoch final", False)
    assert steps(TOTAL_EPOCHS=2, RESUME="newest") == ("start baseline step epoch step epoch final", True)
    assert steps(RESUME="") == ("start baseline step epoch final", False)
    assert steps(TOTAL_EPOCHS=2, RESUME=str(tmp_path / "dinov2_epoch_1.pth"))[1]


def test_a_checkpoint_that_is_not_there_is_refused_before_any_long_work(small, shapes, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "evaluate", lambda *args, **options: pytest.fail("evaluated first"))
    with pytest.raises(InputError, match="RESUME.*no/such.pth"):
        train_dinov2(small(RESUME="no/such.pth"), dataset=shapes)
