"""benchmarks/recipe.py: its rows, equal time, what it runs again and goes on with, the table, lightly's parts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

sys.path.insert(0, str(ROOT / "benchmarks"))
import recipe  # noqa: E402, it lies in another folder
from dinov2_cifar import Config, InputError, as_images, channel_mean_std  # noqa: E402
from dinov2_cifar import parse_arguments, prepare_images  # noqa: E402

BASES = {"defaults": {}, "tiny": {"MODEL_SIZE": "tiny", "PATCH_SIZE": 8, "TRAIN_IMAGES": 10_000}}


# The rows

@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_every_row_differs_from_the_default_in_what_it_names_and_in_nothing_else(base):
    rows, lines = recipe.choose_rows([row.name for row in recipe.ROWS], base)
    default = Config(**base).to_dict()
    for row in rows:
        settings = Config(**{**base, **recipe.changes(row, base)}).to_dict()
        changed = {name for name in settings if settings[name] != default[name]}
        assert changed <= set(row.settings), row.name
        assert changed or row.name in ("default", "lightly"), row.name
    assert all("it is the default" in line or "pip install" in line for line in lines), lines
    assert len(rows) > 30


def test_names_are_unique_and_the_telling_rows_exist():
    names = [row.name for row in recipe.ROWS]
    assert len(set(names)) == len(names) and set(recipe.CPU_ROWS) <= set(names) and names[0] == "default"


def test_a_rows_command_line_says_what_its_settings_say():
    for row in recipe.ROWS:
        base = {**BASES["tiny"], "DATASET": "shapes", "SEED": 3,
                "MODEL_DIMS": SMALL["MODEL_DIMS"]}
        settings = {**base, **recipe.changes(row, base)}
        assert parse_arguments(recipe.flags(settings)).to_dict() == Config(**settings).to_dict(), row.name


def test_a_row_that_cannot_be_run_is_named_with_its_reason():
    rows, lines = recipe.choose_rows(["default", "local-size-32", "koleo-0.05"],
                                     {"LAMBDA_KOLEO": 0.05, "PATCH_SIZE": 12, "IMAGE_SIZE": 36,
                                      "GLOBAL_CROP_SIZE": 36, "LOCAL_CROP_SIZE": 12})
    assert [row.name for row in rows] == ["default"]
    assert lines == ["koleo-0.05 is left out: it is the default",
                     "local-size-32 is left out: LOCAL_CROP_SIZE (32) must be a multiple of PATCH_SIZE (12)"]


def test_lightlys_parts_are_left_out_where_a_shared_setting_would_not_reach_them(monkeypatch):
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: True)
    for base, lacking in (({}, ""), ({"LAMBDA_PATCH": 1.0, "BATCH_SIZE": 64}, ""), ({"MASK_RATIO": 0.3, "FLIP": False}, "FLIP, MASK_RATIO")):
        rows, lines = recipe.choose_rows(["lightly"], base)
        assert [row.name for row in rows] == ["lightly"] * (not lacking)
        assert lines == [f"lightly is left out: {lacking} would not reach its parts"] * bool(lacking)
    assert set(recipe.NOT_LIGHTLYS) <= set(Config().to_dict())


def test_base_flags_are_shared_and_those_of_a_single_run_are_not():
    arguments = recipe.parse(["--data", "x.npz", "--device", "cpu", "--base", "--model-size", "tiny", "--seed", "7", "--total-epochs", "9"])
    assert recipe.shared_settings(arguments) == {"MODEL_SIZE": "tiny", "TRAIN_IMAGES": 10_000, "DATASET": "x.npz", "DEVICE": "cpu"}
    arguments = recipe.parse(["--data", "x.npz", "--device", "cpu", "--base", "--train-images", "0"])
    assert recipe.shared_settings(arguments) == {"DATASET": "x.npz", "DEVICE": "cpu"}


# Equal time

@pytest.mark.parametrize("budget, seconds, steps, epochs", [(60, 0.5, 32, 4), (300, 0.4, 78, 10), (5, 1, 100, 1), (180, 0.01, 390, 46)])
def test_epochs_come_closest_to_the_budget(budget, seconds, steps, epochs):
    assert recipe.epochs_for(budget, seconds, steps) == epochs


def test_a_curve_has_about_five_points():
    for epochs in range(3, 500):
        every = recipe.evaluation_interval(epochs)
        assert 3 <= len({*range(every, epochs + 1, every), epochs}) <= 7


def metrics(starts=((0, 16),), every=2, per_epoch=4, batch=10, step=1.0, first=50.0, evaluation=100.0):
    """Return the records of a run, where steps but for the first of a start take `step` seconds.

    Saving ends a record, so a start is at one's end. A record that is still open at the end of an
    epoch is written after the evaluation.
    """
    config = {"BATCH_SIZE": batch // 2, "ACCUMULATE": 2, "PROJECTION_DIM": 8}
    records = [{"event": "start", "config": config},
               {"event": "baseline", "knn": 0.1, "rank": 5.0, "raw_pixels_knn": 0.25, "linear": 0.2}]
    for begin, end in starts:
        count, seconds = 0, 0.0
        for i in range(begin + 1, end + 1):
            count, seconds = count + 1, seconds + (step if i > begin + 1 else first)
            full = i % every == 0 or i == 1
            if full or i % per_epoch == 0 or i == end:
                seconds += evaluation * (i % per_epoch == 0 and not full)
                speed = {"images_per_second": count * batch / seconds}
                records.append({"event": "step", "step": i, "steps": count, **speed})
                count, seconds = 0, 0.0
            if i % per_epoch == 0:
                scores = {"knn": 0.01 * i, "rank": 6.0, **({"linear": 0.5} if i == 16 else {})}
                records.append({"event": "epoch", "epoch": i // per_epoch, "step": i,
                                "teacher_entropy": 1.0, **scores})
    return records


def test_training_time_leaves_out_evaluations_and_the_first_step_which_compiles():
    for every in (1, 2, 3):
        clock = recipe.training_clock(metrics(every=every), [0])
        assert {step: pytest.approx(step) for step in clock} == clock and max(clock) == 16


@pytest.mark.parametrize("starts", [[0, 8], [0, 5], [0, 3, 10], [0, 6, 7, 15]], ids=str)
def test_training_time_goes_on_after_an_interruption(starts):
    """At an epoch's end and within one."""
    clock = recipe.training_clock(metrics(starts=zip(starts, [*starts[1:], 16])), starts)
    assert {step: pytest.approx(step) for step in clock} == clock and max(clock) == 16


def test_a_finished_run_is_read_and_an_unfinished_one_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in metrics()))
    run = recipe.read_run(tmp_path, [0], 4)
    assert (run["knn"], run["linear"], run["steps"]) == (0.16, 0.5, 16) and run["seconds"] == pytest.approx(16)
    assert run["curve"][0] == [0.0, 0.1] and run["curve"][-1] == [pytest.approx(16 / 60), 0.16] and len(run["curve"]) == 5
    assert run["images_per_second"] == pytest.approx(10)
    assert run["entropy"] == pytest.approx(1 / 2.0794, rel=1e-3)
    with open(path, "a") as file:
        file.write('{"event": "fin')  # a crash may leave part of a line
    assert recipe.read_run(tmp_path, [0], 4) == run
    assert recipe.read_run(tmp_path, [0], 5) is None and recipe.read_run(tmp_path / "empty", [0], 4) is None


# What is run, run again, and gone on with

@pytest.fixture
def bench(monkeypatch, tmp_path):
    """→ benchmark(*flags), which runs nothing but writes the metrics of a run of 16 steps, and the list of its calls."""
    calls = []

    def call(words, folder):
        calls.append([folder.name, "--resume" in words])
        if "--job" in words:
            return json.dumps({"seconds_a_step": 0.15})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics()))
        (folder / "dinov2_last.pth").touch()
        return ""

    monkeypatch.setattr(recipe, "call", call)
    monkeypatch.setattr(recipe, "data_mark", lambda base: {"name": base["DATASET"], "train": 512, "test": 64, "checksum": "0"})
    monkeypatch.setattr(recipe, "draw", lambda summary, path: None)
    fixed = ["--device", "cpu", "--output", str(tmp_path / "recipe.json"), "--rows", "default", "koleo-0", "--minutes", "0.04", "--data"]
    return lambda *flags, data="shapes": recipe.main([*fixed, data, *flags]), calls


def test_a_finished_run_is_kept_and_a_changed_one_is_done_again(bench, tmp_path):
    run, calls = bench
    run("--seeds", "0", "1")
    names = [name for name, _ in calls]
    assert names == ["default-seed0", "default-seed0", "koleo-0-seed0", "koleo-0-seed0", "default-seed1", "koleo-0-seed1"]  # speed once a row
    calls.clear()
    run("--seeds", "0", "1")
    assert not calls
    run("--seeds", "0", "1", "2")
    kept = Path(tmp_path, "recipe.json").read_text()
    assert not list(tmp_path.glob("*-until-*"))
    assert {name for name, _ in calls} == {"default-seed2", "koleo-0-seed2"}
    calls.clear()
    run("--seeds", "0", "--base", "--model-size", "tiny")
    assert {name for name, _ in calls} == {"default-seed0", "koleo-0-seed0"}
    assert [path.read_text() for path in tmp_path.glob("recipe-until-*.json")] == [kept]          # they cost hours
    calls.clear()
    run("--seeds", "0", data="other.npz")
    assert {name for name, _ in calls} == {"default-seed0", "koleo-0-seed0"}
    assert not list(Path(tmp_path, "recipe").rglob("*.pth"))


def test_runs_at_once_give_the_same_table_and_are_no_runs_of_the_whole_machine(bench, monkeypatch, tmp_path):
    run, calls = bench
    monkeypatch.setattr(recipe.throughput, "cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    fake, working, most = recipe.call, [], []

    def call(words, folder):
        working.append(folder.name)
        most.append(len(working))
        time.sleep(0.05)
        working.remove(folder.name)
        return fake(words, folder)

    monkeypatch.setattr(recipe, "call", call)
    run("--seeds", "0", "1", "--at-once", "2")
    assert max(most) == 2 and recipe.os.environ["OMP_NUM_THREADS"] == "2"
    assert {name for name, _ in calls} == {f"{row}-seed{seed}" for row in ("default", "koleo-0") for seed in (0, 1)}
    table = Path(tmp_path, "recipe.md").read_text()
    assert table.startswith("0.04 minutes of training a run, 2 runs at a time, each with 2 of the cores;") and table.count("| 16.0 |") == 2
    calls.clear()
    run("--seeds", "0", "1", "--at-once", "2")
    assert not calls
    run("--seeds", "0")
    assert {name for name, _ in calls} == {"default-seed0", "koleo-0-seed0"}


def test_a_stopped_benchmark_ends_its_runs_and_calls_none_of_them_failed(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import recipe; recipe.throughput.cores = lambda: 2\n"
            f"recipe.call = lambda words, folder, call=recipe.call: call(['-c', 'import time; print(1); time.sleep(60)'], folder)\n"
            f"recipe.main(['--data', 'shapes', '--device', 'cpu', '--rows', 'default', 'koleo-0', '--seeds', '0', '--at-once', '2', '--output', "
            f"{str(tmp_path / 'recipe.json')!r}])")
    process = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(600):
        if (tmp_path / "recipe" / "koleo-0-seed0" / "progress.txt").exists():
            break
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    assert process.wait(30) == 143 and not Path(tmp_path, "recipe.json").exists()


def test_an_unfinished_run_goes_on_from_its_checkpoint(bench, monkeypatch, tmp_path):
    run, calls = bench
    fake = recipe.call

    def stop(words, folder):
        if "--job" in words:
            return fake(words, folder)
        (folder / "dinov2_last.pth").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "call", stop)
    monkeypatch.setattr(recipe.dinov2, "read_checkpoint", lambda path: {"step": 8})
    with pytest.raises(KeyboardInterrupt):
        run("--seeds", "0")
    monkeypatch.setattr(recipe, "call", fake)
    calls.clear()
    run("--seeds", "0")
    assert calls[0] == ["default-seed0", True] and calls[1:] == [["koleo-0-seed0", False], ["koleo-0-seed0", False]]
    assert json.loads(Path(tmp_path, "recipe.json").read_text())["runs"]["default 0"]["starts"] == [0, 8]


def test_a_failed_run_is_shown_as_such_and_the_others_go_on(bench, monkeypatch, tmp_path):
    run, _ = bench
    fake = recipe.call

    def fail(words, folder):
        if folder.name == "default-seed0":
            raise recipe.RunFailed("error: the loss is not finite | at step 3")
        return fake(words, folder)

    monkeypatch.setattr(recipe, "call", fail)
    run("--seeds", "0")
    table = Path(tmp_path, "recipe.md").read_text()
    assert "| default |  | failed: error: the loss is not finite / at step 3 |" in table and "| koleo-0 | `--lambda-koleo 0.0` | 16.0 |" in table


def test_comments_and_docstrings_are_no_change_of_the_code():
    first, second = 'def f():\n    """One."""\n    return 1  # why\n', 'def f():\n    """Another."""\n    return 1\n'
    third = 'def f():\n    """One."""\n    return 2\n'
    assert recipe.code_mark(first) == recipe.code_mark(second) != recipe.code_mark(third)


def test_the_data_are_told_apart_by_their_pixels_and_must_have_labels(monkeypatch, shapes):
    def mark(images):
        monkeypatch.setattr(recipe.dinov2, "load_images", lambda config: as_images(images))
        return recipe.data_mark({"BATCH_SIZE": 8})

    changed = shapes[0].clone()
    changed[0, 0, 0, 0] ^= 1
    assert mark(shapes) == mark(shapes) != mark((changed, *shapes[1:])) and mark(shapes)["train"] == 64
    with pytest.raises(InputError, match="labelled"):
        mark(shapes[0])


# The table

def row(name, *knn, group="losses"):
    return {"row": name, "group": group, "flags": f"--{name}", "knn": recipe.spread(knn), "commands": [f"python {name}"], "errors": []}


def test_differences_within_the_seeds_spread_are_marked():
    default = row("default", 0.40, 0.42, group="default")
    assert recipe.difference(row("a", 0.42, 0.43), default) == "+1.5, within the seeds' spread"
    assert recipe.difference(row("b", 0.43, 0.44), default) == "+2.5"
    assert recipe.difference(row("c", 0.30, 0.35), default) == "-8.5"
    assert recipe.difference(row("d", 0.50), default) == "+9.0, one seed"
    assert recipe.difference(row("raw pixels", 0.38, 0.38, group="baseline"), default) == "-3.0"
    assert recipe.difference(default, default) == recipe.difference(row("e"), default) == recipe.difference(row("a", 0.4), None) == ""


def test_the_table_shows_every_row_in_order_with_its_command():
    text = recipe.markdown([row("raw pixels", 0.386, 0.386, group="baseline"), row("default", 0.40, 0.42), row("koleo-0", 0.3, 0.31)], "Title")
    lines = text.splitlines()
    assert lines[0] == "Title" and [line.split(" | ")[0] for line in lines[4:7]] == ["| raw pixels", "| default", "| koleo-0"]
    assert "| 38.6 | -2.4 |" in lines[4] and "| 41.0 (40.0..42.0) |" in lines[5] and "| 30.5 (30.0..31.0) | -10.5 |" in lines[6]
    assert len({line.count("|") for line in lines[2:7]}) == 1 and "python koleo-0" in text


def test_the_figure_is_drawn(tmp_path):
    rows = [{**row(name, 0.4, 0.5, group=group), "curve": [[0, 0.1, 0.1, 0.1], [1, 0.4, 0.35, 0.45]]}
            for name, group in (("default", "default"), ("koleo-0", "losses"), ("ema-0.5", "optimisation"))]
    recipe.draw([row("raw pixels", 0.3, group="baseline"), *rows], tmp_path / "figure.png")
    recipe.draw(rows[:1], tmp_path / "alone.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and (tmp_path / "alone.png").exists()


# lightly's parts

def test_lightlys_parts_learn_by_our_schedules(shapes):
    pytest.importorskip("lightly")
    pytest.importorskip("timm")
    config = Config(**{**SMALL, "FREEZE_PROTOTYPES": 1.0})
    images = prepare_images(config, shapes)
    peer = recipe.ScheduledLightly(config, images, *channel_mean_std(images.train_images))
    before, prototypes = ([p.clone() for p in module.parameters()] for module in (peer.student, peer.student_heads["image"].last_layer))
    assert all(torch.equal(a, b) for a, b in zip(before, peer.teacher.parameters()))
    peer.settings = {"lr": 0.1, "prototype_lr": 0.0, "weight_decay": 0.04, "momentum": 0.5, "teacher_temp": 0.03}
    peer.step()
    peer.batches = None
    after, teacher = list(peer.student.parameters()), list(peer.teacher.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, after)]
    assert sum(moved) > len(moved) / 2
    assert all(torch.allclose(t, (a + b) / 2, atol=1e-6) for t, a, b in zip(teacher, before, after))
    assert all(torch.equal(a, b) for a, b in zip(prototypes, peer.student_heads["image"].last_layer.parameters()))
