"""Nothing is lost: a run that was stopped, killed or out of disk space, and resumed, is bit for bit
the run that was never stopped; an earlier run's files are kept; numbers that are not finite."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL

import dinov2_cifar
from dinov2_cifar import (
    Config,
    InputError,
    find_checkpoint,
    lock_output_dir,
    main,
    make_model,
    make_optimizer,
    make_shapes,
    read_checkpoint,
    save_checkpoint,
    train_dinov2,
)

EACH_STEP = 1e-9  # SAVE_EVERY_MINUTES


def train(folder, **changes):
    """Train for three epochs of eight steps on 64 images."""
    settings = {"TOTAL_EPOCHS": 3, "EVAL_EVERY": 2, "DROP_PATH": 0.2, "DROPOUT": 0.1}
    config = Config(**{**SMALL, **settings, "OUTPUT_DIR": str(folder), **changes})
    return train_dinov2(config, (*make_shapes(64, 32, seed=0), *make_shapes(32, 32, seed=1)))


def records(folder, *events):
    """Return the records of metrics.jsonl without times."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    times = ("images_per_second", "seconds")
    rows = [{key: value for key, value in row.items() if key not in times} for row in rows]
    return [row for row in rows if row["event"] in events]


def assert_same_run(folder, other):
    """Two finished runs are equal: all networks, the optimizer, and the epochs' records."""
    states, wanted = (read_checkpoint(Path(f, "dinov2_final.pth")) for f in (folder, other))
    parts = [key for key in wanted if key.endswith("state_dict")]
    assert len(parts) == 7 and states.keys() == wanted.keys() and states["step"] == wanted["step"]
    for key in parts:
        state, expected = (s[key].get("state", s[key]) for s in (states, wanted))
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    events = ("baseline", "epoch", "final")
    assert records(folder, *events) == records(other, *events)


def at_step(monkeypatch, wanted, action):
    """Call action(model) at the beginning of the n-th step that is done from now on."""
    step, count = dinov2_cifar.train_step, [0]

    def train_step(model, *rest):
        count[0] += 1
        if count[0] == wanted:
            action(model)
        return step(model, *rest)

    monkeypatch.setattr(dinov2_cifar, "train_step", train_step)


class Crash(Exception):
    pass


def crash(*args):
    raise Crash


def crash_at(step, folder, **changes):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(Crash):
            train(folder, **changes)


def files(folder):
    """Return the contents of an output folder's checkpoints and metrics."""
    return {
        p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix in (".pth", ".jsonl")
    }


def write_every_five_steps(patch):
    """Steps are written in groups, as in a long run, so that a cut falls between two records."""
    stride = property(lambda self: 5, lambda self, value: None)
    patch.setattr(dinov2_cifar.MetricLogger, "stride", stride, raising=False)


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
    write_every_five_steps(monkeypatch)


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts the tests in the background lets them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that was never stopped, with a checkpoint of each epoch."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
        write_every_five_steps(patch)
        train(folder, SAVE_EVERY=1)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """Return a copy of the run that was never stopped."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


# Cuts at every kind of moment


@pytest.mark.parametrize(
    "step, number, resume",  # within an epoch, at its end, within the second epoch, at the very end
    [
        (3, signal.SIGINT, "newest"),
        (8, signal.SIGTERM, "newest"),
        (13, signal.SIGTERM, "out/dinov2_last.pth"),
        (24, signal.SIGINT, "newest"),
    ],
)
def test_a_run_stopped_by_a_signal_and_resumed_is_the_run_never_stopped(
    step, number, resume, whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda model: signal.raise_signal(number))
        error = KeyboardInterrupt if number == signal.SIGINT else SystemExit
        with pytest.raises(error) as caught:
            train("out")
    assert number == signal.SIGINT or caught.value.code == 143
    assert signal.getsignal(number) == before
    assert f"stopped and saved at step {step}; --resume continues" in capsys.readouterr().out
    torch.rand(3), np.random.rand(3), random.random()  # a resumed run does not depend on these
    train("out", RESUME=resume)
    verb = "already finished" if step == 24 else "resuming"
    assert f"{verb}: out/dinov2_last.pth, step {step} of 24\n" in capsys.readouterr().out
    assert_same_run("out", whole)
    assert not list(Path("out").glob("earlier-*"))


@pytest.mark.parametrize("minutes, saved", [(EACH_STEP, 11), (10.0, 8), (0.0, 8)])
def test_a_crash_loses_what_came_after_the_last_save(minutes, saved, whole, tmp_path):
    crash_at(12, tmp_path, SAVE_EVERY_MINUTES=minutes)
    assert read_checkpoint(tmp_path / "dinov2_last.pth")["step"] == saved
    train(tmp_path, RESUME="newest")
    assert_same_run(tmp_path, whole)


def test_a_run_that_crashes_in_its_figures_is_finished_by_resuming(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(dinov2_cifar, "plot_figures", crash)
        with pytest.raises(Crash):
            train(tmp_path)
    train(tmp_path, RESUME="newest")
    assert_same_run(tmp_path, whole)


def train_until_killed(folder, seconds, save):
    """Resume, save after each step; SIGKILL comes after some seconds, or in the n-th save."""

    def kill(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    fsync, count = os.fsync, [0]

    def killing_fsync(file):
        count[0] += 1
        kill() if count[0] == save else fsync(file)

    os.fsync = killing_fsync  # then the temporary file is written and not yet renamed
    if seconds:
        threading.Timer(seconds, kill).start()
    dinov2_cifar.plot_figures = lambda *args: None
    train(folder, RESUME="newest", SAVE_EVERY_MINUTES=EACH_STEP)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork server")
def test_ten_kills_at_random_moments_and_in_saves_lose_nothing(whole, tmp_path):
    """A run that ends between two kills is compared, and the next one begins."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dinov2_cifar"])

    def run(seconds=0.0, save=0):
        process = context.Process(target=train_until_killed, args=(tmp_path / "out", seconds, save))
        process.start()
        process.join(120)
        return process.exitcode

    choose, kills, in_saves = random.Random(0), 0, 0
    while kills < 10:
        moment = (
            {"save": choose.randint(2, 6)} if kills % 2 else {"seconds": choose.uniform(0.3, 1)}
        )
        code = run(**moment)
        in_saves += bool(list((tmp_path / "out").glob("*.tmp")))
        if code == 0:
            assert_same_run(tmp_path / "out", whole)
            shutil.rmtree(tmp_path / "out")
        else:
            assert code == -signal.SIGKILL
            kills += 1
    assert in_saves >= 5
    assert run() == 0
    assert_same_run(tmp_path / "out", whole)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_two_signals_at_once_are_one_and_a_later_one_ends_the_program(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(dinov2_cifar, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises(KeyboardInterrupt):
        with dinov2_cifar.StopRequest() as stop:
            assert stop.signal == 0
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
            clock[0] += 3
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the third one is late: it must interrupt")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with dinov2_cifar.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == stop.note
    assert not stop.signal and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# What is resumed


def test_metrics_of_a_resumed_run_are_the_checkpoints_history_and_go_on(tmp_path):
    crash_at(12, tmp_path, SAVE_EVERY_MINUTES=EACH_STEP)
    history = json.loads(json.dumps(read_checkpoint(tmp_path / "dinov2_last.pth")["history"]))
    assert [row["event"] for row in history[:2]] == ["start", "baseline"]
    assert history[-1]["event"] == "step" and history[-1]["step"] == 11
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "step": 12}\nhalf a li')
    train(tmp_path, RESUME="newest")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[: len(history)] == history and rows[-1]["event"] == "final"
    steps = [row["step"] for row in rows if row["event"] == "step"]
    assert steps == sorted(set(steps)) and steps[-1] == 24
    assert sum(row["steps"] for row in rows if row["event"] == "step") == 24
    assert [row["seconds"] for row in rows if "seconds" in row] == sorted(
        row["seconds"] for row in rows if "seconds" in row
    )
    last = json.loads(json.dumps(read_checkpoint(tmp_path / "dinov2_last.pth")["history"]))
    assert last == rows[:-1]


def test_changed_settings_are_listed_and_a_run_can_be_made_longer(finished, capsys):
    train(finished, TOTAL_EPOCHS=4, LAMBDA_IMG=0.5, RESUME="newest")
    printed = capsys.readouterr().out
    changed = ("LAMBDA_IMG: saved 1.0, now 0.5\n", "TOTAL_EPOCHS: saved 3, now 4\n")
    assert all(text in printed for text in changed) and printed.count(": saved") == 3
    assert [row["epoch"] for row in records(finished, "epoch")] == [1, 2, 3, 4]
    assert len(records(finished, "final")) == 1


def test_a_checkpoint_that_does_not_fit_the_run_is_refused(finished, shapes):
    def refused(match, dataset=shapes, **changes):
        settings = {**SMALL, "TOTAL_EPOCHS": 4, "OUTPUT_DIR": str(finished), "RESUME": "newest"}
        with pytest.raises(InputError, match=match):
            train_dinov2(Config(**{**settings, **changes}), dataset)

    before = files(finished)
    for epochs in (1, 2):
        refused(rf"TOTAL_EPOCHS \({epochs}\).* 3\b.*raise it", TOTAL_EPOCHS=epochs)
    refused("last.pth is of your images.* others", dinov2_cifar.Images(*shapes, "others"))
    refused("last.pth does not fit this model", PROJECTION_DIM=32)
    refused("'nowhere.pth'", RESUME="nowhere.pth")
    assert files(finished) == before and not list(finished.glob("earlier-*"))


def test_newest_is_the_last_checkpoint_and_where_there_is_none_a_run_starts_afresh(
    small, finished, capsys
):
    assert find_checkpoint(small()) is None
    assert capsys.readouterr().out == ""
    assert find_checkpoint(small(RESUME="newest")) is None
    assert "dinov2_last.pth: starting afresh" in capsys.readouterr().out
    config = small(RESUME="newest", OUTPUT_DIR=str(finished))
    os.utime(finished / "dinov2_last.pth", (1000, 1000))  # a copy's times say nothing
    assert find_checkpoint(config) == finished / "dinov2_last.pth"


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(tmp_path):
    crash_at(13, tmp_path, SAVE_EVERY_MINUTES=EACH_STEP)
    with pytest.raises(InputError, match=r"TOTAL_EPOCHS \(1\)"):
        train(tmp_path, TOTAL_EPOCHS=1, RESUME="newest")


@pytest.mark.parametrize("cut", [8, 14])
def test_another_batch_size_continues_at_the_same_fraction_of_the_run(cut, tmp_path, capsys):
    crash_at(cut + 1, tmp_path, SAVE_EVERY_MINUTES=EACH_STEP)
    train(tmp_path, BATCH_SIZE=16, RESUME="newest")
    assert f"step {cut // 2} of 12\n" in capsys.readouterr().out
    assert [row["step"] for row in records(tmp_path, "epoch")] == [4, 8, 12]
    steps = [row["step"] for row in records(tmp_path, "step")]
    assert steps == sorted(steps) and steps[-1] == 12
    assert read_checkpoint(tmp_path / "dinov2_final.pth")["step"] == 12


# An earlier run's files


def test_an_older_checkpoint_is_kept_and_the_newer_files_are_archived(finished, whole, capsys):
    before = files(finished)
    train(finished, SAVE_EVERY=1, RESUME=str(finished / "dinov2_epoch_1.pth"))
    assert_same_run(finished, whole)
    (archive,) = finished.glob("earlier-*")
    assert files(finished).keys() == before.keys()
    assert (finished / "dinov2_epoch_1.pth").read_bytes() == before.pop("dinov2_epoch_1.pth")
    assert files(archive) == before and str(archive) in capsys.readouterr().out


def test_a_crash_before_the_first_save_after_going_back_loses_no_step(finished, whole):
    crash_at(3, finished, SAVE_EVERY=1, RESUME=str(finished / "dinov2_epoch_1.pth"))
    assert read_checkpoint(finished / "dinov2_last.pth")["epoch"] == 1
    train(finished, SAVE_EVERY=1, RESUME="newest")
    assert_same_run(finished, whole)


@pytest.mark.parametrize("folder", ["here", "elsewhere"])
def test_a_finished_checkpoint_given_by_its_path_changes_no_file(folder, finished, tmp_path):
    out = finished if folder == "here" else tmp_path / "out"
    if folder == "elsewhere":
        train(out, TOTAL_EPOCHS=1, SEED=1)
    before = files(out)
    train(out, RESUME=str(finished / "dinov2_final.pth"))
    assert files(out) == before and not list(out.glob("earlier-*"))


def test_resuming_from_elsewhere_archives_the_run_that_was_here(finished, tmp_path):
    elsewhere = Path(shutil.copytree(finished, tmp_path / "elsewhere"))
    train(tmp_path / "here", TOTAL_EPOCHS=1, SEED=1)
    before = files(tmp_path / "here")
    train(tmp_path / "here", TOTAL_EPOCHS=4, RESUME=str(elsewhere / "dinov2_last.pth"))
    (archive,) = (tmp_path / "here").glob("earlier-*")
    assert files(archive) == before and files(elsewhere) == files(finished)
    assert [row["epoch"] for row in records(tmp_path / "here", "epoch")] == [1, 2, 3, 4]


def test_the_last_checkpoint_in_another_spelling_archives_nothing(finished):
    train(finished, TOTAL_EPOCHS=4, RESUME=str(finished / ".." / "run" / "dinov2_last.pth"))
    assert not list(finished.glob("earlier-*"))


def test_a_new_run_archives_an_earlier_one_after_its_first_step_and_not_before(
    finished, monkeypatch
):
    before = files(finished)

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.raises(InputError):
        train(finished, BATCH_SIZE=128)  # more than there are images
    for name in ("measure_baseline", "train_step"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(dinov2_cifar, name, interrupt)
            train(finished, SEED=1)
    assert files(finished) == before and not list(finished.glob("earlier-*"))
    crash_at(2, finished, SEED=1)
    (archive,) = finished.glob("earlier-*")
    assert files(archive) == before
    assert files(finished).keys() == {"metrics.jsonl"}
    assert len(records(finished, "start", "baseline", "step")) == 3


# A folder belongs to one run, and the disk may fill up


def test_a_folder_in_use_is_refused(finished, small):
    before = files(finished)
    with lock_output_dir(small(OUTPUT_DIR=str(finished))):
        with pytest.raises(InputError, match=r"OUTPUT_DIR \(.*run\) is in use by another run"):
            train(finished)
    assert files(finished) == before
    with lock_output_dir(small(OUTPUT_DIR=str(finished))):  # the lock is given back
        pass


def test_a_write_that_fails_leaves_the_old_checkpoint_whole(small, monkeypatch, tmp_path):
    model = make_model(small(), [0.5] * 3, [0.2] * 3)
    path, optimizer = tmp_path / "x.pth", make_optimizer(model)
    save_checkpoint(path, model, optimizer, 1, 8)

    def full(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"x.pth cannot be written; .*use --resume \(disk full\)"):
        save_checkpoint(path, model, optimizer, 2, 16)
    assert read_checkpoint(path)["epoch"] == 1


@pytest.mark.skipif(os.name == "nt", reason="no limits of a file's size there")
@pytest.mark.parametrize("minutes", [EACH_STEP, 0.0])
def test_a_full_disk_ends_in_one_line_and_leaves_what_was_saved(
    minutes, finished, whole, monkeypatch, capsys
):
    """The limit is too small for a checkpoint, then for the second new record of the metrics."""
    import resource

    (finished / "dinov2_last.pth").write_bytes((finished / "dinov2_epoch_1.pth").read_bytes())
    before = (finished / "dinov2_last.pth").read_bytes()
    shapes = (*make_shapes(64, 32, seed=0), *make_shapes(32, 32, seed=1))
    monkeypatch.setattr(dinov2_cifar, "load_images", lambda config: dinov2_cifar.Images(*shapes))
    settings = {**SMALL, "TOTAL_EPOCHS": 3, "EVAL_EVERY": 2, "DROP_PATH": 0.2, "DROPOUT": 0.1}
    settings |= {"OUTPUT_DIR": str(finished), "RESUME": "newest", "SAVE_EVERY_MINUTES": minutes}
    monkeypatch.setattr(dinov2_cifar, "parse_arguments", lambda argv: Config(**settings))
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    of_history = [line for line in lines if json.loads(line).get("step", 0) <= 8][:-1]
    limit = 100_000 if minutes else len("\n".join(of_history)) + 900
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SystemExit) as caught:
            main([])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert "File too large" in error and ("dinov2_last.pth cannot be written" in error) == bool(
        minutes
    )
    assert (finished / "dinov2_last.pth").read_bytes() == before
    main([])
    assert_same_run(finished, whole)


# Numbers that are not finite


def spoil(monkeypatch, steps, value=math.nan):
    """The image loss of these steps, counted from 1, is not finite."""
    loss, count = dinov2_cifar.multi_crop_dino_loss, [0]

    def spoiled(*args):
        count[0] += 1
        return loss(*args) * (value if count[0] in steps else 1.0)

    monkeypatch.setattr(dinov2_cifar, "multi_crop_dino_loss", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(value, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(dinov2_cifar.MetricLogger, "stride")  # a record of each step
    spoil(monkeypatch, {3, 4}, value)
    weights, step = [], dinov2_cifar.train_step

    def watch(model, *args):
        values = step(model, *args)
        student = [p for module in model.student_modules() for p in module.parameters()]
        weights.append(torch.cat([p.detach().flatten() for p in student]))
        return values

    monkeypatch.setattr(dinov2_cifar, "train_step", watch)
    model = train(tmp_path, TOTAL_EPOCHS=1)
    assert [torch.equal(a, b) for a, b in zip(weights, weights[1:])] == [
        False, True, True, False, False, False, False,
    ]  # fmt: skip
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    rows, (epoch,) = records(tmp_path, "step"), records(tmp_path, "epoch")
    good = [row["img"] for row in rows if not row["skipped"]]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert epoch["skipped"] == 2 and epoch["steps"] == 8
    assert epoch["img"] == pytest.approx(sum(good) / 6) and min(good) > 0
    assert "skipped 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "in_a_row, batch_size, stopped", [(10, 4, True), (9, 4, False), (8, 8, True)]
)
def test_ten_such_steps_in_a_row_or_an_epoch_of_them_stop_the_run(
    in_a_row, batch_size, stopped, tmp_path, monkeypatch
):
    monkeypatch.delattr(dinov2_cifar.MetricLogger, "stride")
    spoil(monkeypatch, {2, *range(17, 17 + in_a_row)})
    if not stopped:
        train(tmp_path, BATCH_SIZE=batch_size, SAVE_EVERY_MINUTES=EACH_STEP)
        assert [row["skipped"] for row in records(tmp_path, "epoch")] == [1, 9, 0]
        return
    with pytest.raises(InputError, match=f"^{in_a_row} steps in a row .*finite.*LEARNING_RATE"):
        train(tmp_path, BATCH_SIZE=batch_size)
    assert read_checkpoint(tmp_path / "dinov2_last.pth")["step"] == 16


@pytest.mark.parametrize("evaluated", [False, True])
def test_weights_that_are_not_finite_are_not_saved(evaluated, whole, tmp_path, monkeypatch):
    def spoil_weights(model):
        model.student.cls_token.data.fill_(math.inf)

    for step in (15, 3):
        with monkeypatch.context() as patch:
            at_step(patch, step, spoil_weights)
            with pytest.raises(InputError, match="weights are not finite at step .*LEARNING_RATE"):
                train(tmp_path / str(step), EVAL_EVERY=int(evaluated))
    assert read_checkpoint(tmp_path / "15" / "dinov2_last.pth")["step"] == 8
    assert not list((tmp_path / "3").glob("*.pth"))
    if not evaluated:
        train(tmp_path / "15", RESUME="newest")
        assert_same_run(tmp_path / "15", whole)
