"""What README.md shows works: every command and every notebook cell, in small."""

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT, SMALL
from PIL import Image

import dinov2_cifar
from dinov2_cifar import CONSTANTS, Config, main, make_shapes, parse_arguments

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
LINES += "\n".join(re.findall(r"^    ((?:python|torchrun) .*)", dinov2_cifar.__doc__, re.MULTILINE))
COMMANDS = [shlex.split(part, comments=True) for part in re.split(r"\n|&&", LINES)]
SKIPPED = r"(python -m )?(pip|pytest)\b|python \S*unpack\.py |git clone |cd |$|.* --help$"
COMMANDS = [text for text in map(shlex.join, COMMANDS) if not re.match(SKIPPED, text)]
RULE = r"(?:timeout \d+ )?(?:python|torchrun .*?) (dinov2_cifar\.py|benchmarks/\w+\.py)(.*)"


@pytest.fixture(autouse=True)
def few_images(tmp_path, monkeypatch):
    """Run in an empty folder with 64 of the built-in images; no linear probe or figures."""
    few = lambda n, *args, **options: make_shapes(min(n, 64), *args, **options)  # noqa: E731
    monkeypatch.setattr(dinov2_cifar, "make_shapes", few)
    monkeypatch.setattr(dinov2_cifar, "linear_probe", lambda *args: 0.5)
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "checkpoints", "checkpoints")
    Path("checkpoints", "metrics.jsonl").write_text(
        json.dumps({"config": Config(**SMALL).to_dict()})
    )
    for i, image in enumerate(few(8)[0].permute(0, 2, 3, 1).numpy()):
        Path("photos").mkdir(exist_ok=True)
        Image.fromarray(image).save(f"photos/{i}.png")


def train_in_small(words, capsys):
    parse_arguments([*words, "--device=cpu"])  # as they are, they fit together
    if {"--draw", "--embed"} & {*words}:
        main([*words, "--device=cpu"])
        assert re.search("figures in|features of 8 images", capsys.readouterr().out)
        return
    left = {"COMPILE", "MODEL_DIMS"} if "--init-from" in words else {"COMPILE"}
    for name, value in SMALL.items():  # of equal flags, the last counts
        text = json.dumps(value) if isinstance(value, dict) else value
        words += [f"--{name.lower().replace('_', '-')}={text}"] if name not in left else []
    main(words)
    assert "trained teacher" in capsys.readouterr().out


def parse_flags(script, words, monkeypatch):
    """Run a benchmark until it has parsed its flags; those after --base are dinov2_cifar's."""
    parse = ArgumentParser.parse_args
    base = words[words.index("--base") + 1 :] if "--base" in words else []
    parse_arguments([*base, "--device=cpu"])
    monkeypatch.setattr(ArgumentParser, "parse_args", lambda *args: sys.exit(parse(*args)))
    monkeypatch.setattr(sys, "argv", [script, *words])
    with patch.dict(vars(dinov2_cifar)), pytest.raises(SystemExit, match="^Namespace"):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_readme_command_works(command, capsys, monkeypatch):
    if "--tensorboard" in command:
        pytest.importorskip("tensorboard")
    rule = re.fullmatch(RULE, command)
    assert rule, "no rule for this command"
    script, words = rule[1], shlex.split(rule[2])
    if script == "dinov2_cifar.py":
        train_in_small(words, capsys)
    else:
        parse_flags(script, words, monkeypatch)


def test_readme_cells_run_as_notebook(capsys, monkeypatch):
    for name, value in {"BATCH_SIZE": 4, "TRAIN_IMAGES": 8, "DEVICE": "cpu"}.items():
        monkeypatch.setitem(dinov2_cifar.QUICK, name, value)
    namespace = {}
    for text in (text for kind, text in BLOCKS if kind == "python"):
        needed = [name for name in ("timm", "onnx") if name in text]
        if all(map(importlib.util.find_spec, needed)):
            exec(text, namespace)
    assert Path("checkpoints/dinov2_final.pth").exists()
    assert "missing_keys=['" not in capsys.readouterr().out  # where timm loads our weights


def test_readme_names_exist():
    assert {kind for kind, _ in BLOCKS} <= {"bash", "python", "text"}
    names = re.findall(r"`([A-Z]+(?:_[A-Z]+)+|[A-Z]\w*[a-z]\w*)`", README)  # constants, classes
    assert [n for n in names if n not in CONSTANTS and not hasattr(dinov2_cifar, n)] == []
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_chinese_readme_has_the_same_code_numbers_and_links():
    chinese = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    rules = [r"\d+(?:[.,]\d+)*", r"\]\(([^)]+)\)", r"^#+ ", r"`([A-Z_]+)`"]
    link = "[English](README.md)"
    assert link in chinese and "[中文](README.zh-CN.md)" in README
    texts = README.replace("[中文](README.zh-CN.md)", ""), chinese.replace(link, "")
    for rule in rules:
        found, expected = (sorted(re.findall(rule, text, re.MULTILINE)) for text in texts)
        assert found == expected
    code = [
        re.sub(r" *# .*", "", "".join(re.findall(r"^```.*?^```", t, re.M | re.S))) for t in texts
    ]
    assert code[0] == code[1]
