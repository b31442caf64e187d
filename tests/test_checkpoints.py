"""Checkpoints: what is in them, files that are none, and resuming as if the run was never cut."""

import itertools
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import SMALL, read_records

import dinov2_cifar as dinov2
from dinov2_cifar import Config, InputError, make_shapes, read_checkpoint, train_dinov2

LAST, EACH_STEP = "dinov2_last.pth", {"SAVE_EVERY_MINUTES": 1e-9}
MODULES = "student teacher img_head patch_head teacher_img_head teacher_patch_head optimizer"
STATES = {f"{name}_state_dict" for name in MODULES.split()}


def train(folder, name="shapes", **changes):
    """Train for two epochs of eight steps on 64 images without labels."""
    settings = {"TOTAL_EPOCHS": 2, "DROP_PATH": 0.2, "DROPOUT": 0.1, "OUTPUT_DIR": str(folder)}
    images = dinov2.Images(make_shapes(64, 32, seed=name == "others")[0], name=name)
    return train_dinov2(Config(**{**SMALL, **settings, **changes}), images)


def files(folder):
    """Return the contents of a run's checkpoints and metrics."""
    paths = [p for p in folder.iterdir() if p.suffix in (".pth", ".jsonl")]
    return {p.name: p.read_bytes() for p in paths}


def assert_same_run(folder, other):
    states, wanted = (read_checkpoint(f / "dinov2_final.pth") for f in (folder, other))
    for key in STATES:
        state, expected = (s[key].get("state", s[key]) for s in (states, wanted))
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    epochs, expected = (read_records(f, "epoch") for f in (folder, other))
    assert [{**r, "seconds": 0} for r in epochs] == [{**r, "seconds": 0} for r in expected]


def crash(*args):
    raise ArithmeticError


def at_step(patch, wanted, action):
    """Call action at the beginning of this step, counted from 1."""
    schedule = dinov2.hyperparameters

    def hyperparameters(config, step, total_steps):
        return (step + 1 == wanted and action()) or schedule(config, step, total_steps)

    patch.setattr(dinov2, "hyperparameters", hyperparameters)


def crash_at(step, folder, **changes):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArithmeticError):
        at_step(patch, step, crash)
        train(folder, **changes)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Draw no figures; log every five steps, as long runs do, so that cuts fall between logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2, "plot_figures", lambda *args: None)
        stride = property(lambda self: 5, lambda self, value: None)
        patch.setattr(dinov2.MetricLogger, "stride", stride, raising=False)
        yield


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """Return the folder of a run that was never stopped, with a checkpoint of each epoch."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, SAVE_EVERY=1)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_checkpoint_has_the_promised_keys_and_plain_values(whole):
    states = torch.load(whole / LAST, weights_only=True)
    run = {"epoch", "step", "config", "data", "steps_per_epoch", "history", "epoch_rows"}
    assert states.keys() == STATES | run and (states["epoch"], states["step"]) == (2, 16)
    assert states["config"] == Config(**states["config"]).to_dict()


def test_load_backbone_gives_the_features_of_the_teacher(tmp_path, monkeypatch):
    model, x = train(tmp_path, REGISTER_TOKENS=2, LAYER_SCALE=0.1), make_shapes(16, 32)[0]
    monkeypatch.setattr(Config, "MODEL_SIZE", "base")  # the checkpoint's own settings count
    backbone, expected = dinov2.load_backbone(tmp_path / LAST), dinov2.extract_features(model, x)
    assert not backbone.training and torch.equal(dinov2.extract_features(backbone, x), expected)


def test_load_backbone_needs_config_and_teacher_alone_with_names_of_wrappers(whole, tmp_path):
    states, x = read_checkpoint(whole / LAST), make_shapes(8, 32)[0]
    expected = dinov2.extract_features(dinov2.load_backbone(whole / LAST), x)
    for before, within in ("module.", ""), ("_orig_mod.", ""), ("module._orig_mod.", "_orig_mod."):
        teacher = {
            before + name.replace("norm1.", f"norm1.{within}"): tensor
            for name, tensor in states["teacher_state_dict"].items()
        }
        content = {"config": states["config"], "teacher_state_dict": teacher}
        torch.save(content, tmp_path / "x.pth")
        backbone = dinov2.load_backbone(tmp_path / "x.pth")
        assert torch.equal(dinov2.extract_features(backbone, x), expected)


@pytest.mark.parametrize("kind", ["timm's or Meta's", "other Python objects", "model, epoch"])
def test_files_of_other_programs_are_named(kind, whole, tmp_path):
    backbone, path = dinov2.load_backbone(whole / LAST), tmp_path / "x.pth"
    contents = {"timm's or Meta's": backbone.state_dict(), "other Python objects": backbone}
    torch.save(contents.get(kind, {"model": {}, "epoch": 3}), path)
    with pytest.raises(InputError, match=f"x.pth is not a checkpoint of this program.*{kind}"):
        dinov2.load_backbone(path)


def test_output_dir_without_room_is_found_out_before_the_first_step(tmp_path, monkeypatch):
    model = train(tmp_path / "run", TOTAL_EPOCHS=1)
    sizes = [2 * (tmp_path / "run" / LAST).stat().st_size]
    sizes += [sum(4 * p.numel() * p.element_size() for p in model.parameters())]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)
    usage = lambda folder: shutil._ntuple_diskusage(10**9, 0, room)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(dinov2, "train_step", crash)
    room = sizes[1] - 1
    with pytest.raises(InputError, match="OUTPUT_DIR.*saving takes.*make room"):
        train(tmp_path / "run")
    room = sizes[1] + 1
    with pytest.raises(ArithmeticError):
        train(tmp_path / "run")


def test_run_resumes_with_the_same_images_alone_whatever_their_name(finished, monkeypatch):
    train(finished, name="renamed", RESUME="newest")
    for change in (lambda x: x[:-1], lambda x: x.flip(0), lambda x: x + 2):
        others = dinov2.Images(change(make_shapes(64, 32, seed=0)[0]), name="shapes")
        with pytest.raises(InputError, match="it has learned from 64 images of shapes"):
            train_dinov2(
                Config(**{**SMALL, "OUTPUT_DIR": str(finished), "RESUME": "newest"}), others
            )


def refused(path, content):
    """Write content; return whether both ways to load it raise one line of InputError."""
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    model, messages = dinov2.DINOv2(Config(**SMALL)), []
    for load, *arguments in (dinov2.load_backbone,), (dinov2.load_checkpoint, model):
        try:
            load(path, *arguments)
        except InputError as error:
            messages.append(str(error))
    assert all(str(path) in m and "\n" not in m for m in messages)
    return len(messages) == 2


@pytest.mark.parametrize("content", [b"text", {}, [1], {"config": {"lr": 1}}, 0.0, 0.5, 0.9999])
def test_truncated_and_foreign_files_are_refused(content, whole, tmp_path):
    data, cut = (whole / LAST).read_bytes(), isinstance(content, float)
    assert refused(tmp_path / "x.pth", data[: int(content * len(data))] if cut else content)


def test_flipped_bits_of_the_pickle_are_refused_or_harmless(whole, tmp_path):
    """It comes first in the file; some of its bits are digits of a metric."""
    draw, data, count = random.Random(0), (whole / LAST).read_bytes(), 0
    for i in draw.sample(range(15_000), 20):
        flipped = bytes([data[i] ^ 1 << draw.randrange(8)])
        count += refused(tmp_path / "x.pth", data[:i] + flipped + data[i + 1 :])
    assert count > 5


def test_payload_in_a_checkpoint_does_not_run(whole, tmp_path):
    victim = tmp_path / "created"
    payload = type("", (), {"__reduce__": lambda self: (Path.touch, (victim,))})()
    pickle.loads(pickle.dumps(payload))  # it works where a pickle is trusted
    victim.unlink()
    states = {**read_checkpoint(whole / LAST), "data": payload}
    for content in (states, payload, pickle.dumps(payload, protocol=2)):
        assert refused(tmp_path / "x.pth", content) and not victim.exists()


@pytest.mark.parametrize("step", [3, 8, 16])
@pytest.mark.parametrize("how", ["SIGTERM", "crash"])
def test_resumed_run_is_bit_identical(step, how, whole, tmp_path, monkeypatch, capsys):
    actions = {"crash": crash, "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM)}
    with monkeypatch.context() as patch, pytest.raises((ArithmeticError, SystemExit)) as caught:
        at_step(patch, step + (how == "crash"), actions[how])
        patch.setattr(dinov2, "plot_figures", crash)  # after the last step
        train(tmp_path, **(EACH_STEP if how == "crash" else {}))
    stopped = f"stopped and saved at step {step}; --resume" in capsys.readouterr().out
    assert (stopped and caught.value.code == 143) or how == "crash"
    states = read_checkpoint(tmp_path / LAST)
    for group in states["optimizer_state_dict"]["param_groups"]:
        group.update(maximize=True, betas=("x",), params=[])  # the program's own settings count
    torch.save(states, tmp_path / LAST)
    train(tmp_path, RESUME="newest")
    assert f"{LAST}, step {step} of 16\n" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)
    rows = read_records(tmp_path, "step")
    steps, seconds = ([row[name] for row in rows] for name in ("step", "seconds"))
    assert sorted({*steps}) == steps and {step, 16} <= {*steps} and sorted(seconds) == seconds
    assert not list(tmp_path.glob("earlier-*"))


@pytest.mark.parametrize("minutes, saved", [(1e-9, 11), (10.0, 8), (0.0, 8)])
def test_crash_loses_only_what_came_after_the_last_save(minutes, saved, tmp_path):
    crash_at(12, tmp_path, SAVE_EVERY_MINUTES=minutes)
    assert read_checkpoint(tmp_path / LAST)["step"] == saved


def train_until_killed(folder, save):
    """Resume and save after each step; SIGKILL comes before the n-th file is complete."""
    patch, fsync, count = pytest.MonkeyPatch(), os.fsync, itertools.count(1)
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    patch.setattr(os, "fsync", lambda file: kill() if next(count) == save else fsync(file))
    train(folder, RESUME="newest", **EACH_STEP)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork server")
def test_sigkill_during_a_save_loses_nothing(whole, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dinov2_cifar"])
    for save, step in ((4, 1), (3, 2), (6, 4)):  # checkpoint, metrics, checkpoint
        process = context.Process(target=train_until_killed, args=(tmp_path, save))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL and list(tmp_path.glob("*.tmp"))
        assert read_checkpoint(tmp_path / LAST)["step"] == step
    train(tmp_path, RESUME="newest")
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("cut, step", [(8, 4), (15, 7)])
def test_other_images_per_step_continue_at_the_same_fraction(cut, step, tmp_path, capsys):
    crash_at(cut + 1, tmp_path, **EACH_STEP)
    train(tmp_path, BATCH_SIZE=16, RESUME="newest")
    assert f"step {step} of 8\n" in capsys.readouterr().out
    assert [r["step"] for r in read_records(tmp_path, "epoch")] == [4, 8]
    steps = [r["step"] for r in read_records(tmp_path, "step")]
    assert steps == sorted(steps) and steps[-1] == 8


@pytest.mark.parametrize(
    "words, changes",
    [
        (f"{LAST}.*fit", {"REGISTER_TOKENS": 1}),
        (f"{LAST}.*64 images of shapes.*64 images of others", {"name": "others"}),
        ("TOTAL_EPOCHS", {"TOTAL_EPOCHS": 1, "RESUME": "dinov2_epoch_1.pth"}),
        ("nowhere.pth", {"RESUME": "nowhere.pth"}),
        ("partial.pth", {"RESUME": "partial.pth"}),
    ],
)
def test_checkpoint_that_does_not_fit_changes_no_file(words, changes, finished, monkeypatch):
    monkeypatch.chdir(finished)
    states = read_checkpoint(LAST).items()
    torch.save({name: value for name, value in states if name != "history"}, "partial.pth")
    before = files(finished)
    with pytest.raises(InputError, match=words):
        train(finished, **{"RESUME": "newest", **changes})
    assert files(finished) == before and not list(finished.glob("earlier-*"))


def test_folder_in_use_is_refused(finished):
    before, c = files(finished), Config(OUTPUT_DIR=str(finished))
    with dinov2.lock_output_dir(c), pytest.raises(InputError, match="OUTPUT_DIR.*in use"):
        train(finished)
    assert files(finished) == before
    train(finished, RESUME="newest")


def test_new_run_archives_an_earlier_one_after_its_first_step(finished, monkeypatch):
    before = files(finished)
    for name in ("measure_baseline", "train_step"):
        with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
            patch.setattr(dinov2, name, crash)
            train(finished, SEED=1)
    assert files(finished) == before and not list(finished.glob("earlier-*"))
    own = {"dinov2_mine.pth", "dinov2_epoch_best.pth"}  # of the user
    for name in own:
        (finished / name).touch()
    crash_at(2, finished, SEED=1)
    (archive,) = finished.glob("earlier-*")
    assert files(archive) == before
    assert files(finished).keys() == own | {"metrics.jsonl"}


def test_older_checkpoint_stays_and_newer_files_are_archived(finished, whole):
    before = files(finished)
    crash_at(11, finished, RESUME=str(finished / "dinov2_epoch_1.pth"))
    train(finished, SAVE_EVERY=1, RESUME="newest")  # from there, though nothing was saved since
    assert_same_run(finished, whole)
    (archive,) = finished.glob("earlier-*")
    assert files(archive) == {n: data for n, data in before.items() if n != "dinov2_epoch_1.pth"}


def test_checkpoint_of_another_folder_is_continued_here(finished, whole, tmp_path):
    train(finished, RESUME=str(whole / LAST))  # nothing is left to do
    train(finished, RESUME=str(finished / ".." / "run" / LAST))
    assert files(finished) == files(whole) and not list(finished.glob("earlier-*"))
    train(finished, TOTAL_EPOCHS=3, RESUME=str(whole / LAST))
    (archive,) = finished.glob("earlier-*")
    assert files(archive) == files(whole)
    assert [r["epoch"] for r in read_records(finished, "epoch")] == [1, 2, 3]


@pytest.mark.parametrize("limit, name", [(100_000, LAST), (1000, "metrics.jsonl")])
def test_full_disk_is_one_error_and_loses_nothing(limit, name, finished, whole):
    resource = pytest.importorskip("resource")
    before = shutil.copy(finished / "dinov2_epoch_1.pth", finished / LAST).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError, match=f"{name} cannot be written.*File too large"):
            train(finished, RESUME="newest", **EACH_STEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (finished / LAST).read_bytes() == before
    train(finished, RESUME="newest")
    assert_same_run(finished, whole)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    spoil = lambda model, m: model.student.cls_token.data.fill_(math.inf)  # noqa: E731
    monkeypatch.setattr(dinov2.DINOv2, "update_teacher", spoil)
    with pytest.raises(InputError, match="weights are not finite at step 1.*LEARNING_RATE"):
        train(tmp_path, **EACH_STEP)
    assert files(tmp_path).keys() == {"metrics.jsonl"}


def test_last_checkpoint_is_written_after_the_others(tmp_path, monkeypatch):
    names, write_file = [], dinov2.write_file

    def watch(path, data):
        names.append(path.name)
        write_file(path, data)

    monkeypatch.setattr(dinov2, "write_file", watch)
    train(tmp_path, SAVE_EVERY=1)
    last_save = [name for name in names if name.endswith(".pth")][-3:]
    assert last_save == ["dinov2_final.pth", "dinov2_epoch_2.pth", LAST]


def test_second_signal_within_two_seconds_is_ignored(monkeypatch, request):
    clock, number = [100.0], signal.SIGINT
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    before = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(number, before))
    with pytest.raises(KeyboardInterrupt), dinov2.StopRequest() as stop:
        for seconds in (0, 1.9, 0.2):
            clock[0] += seconds
            assert stop.signal == (number if seconds else 0)
            signal.raise_signal(number)
    assert signal.getsignal(number) is signal.default_int_handler
    signal.signal(number, signal.SIG_IGN)  # as a shell does for jobs in the background
    with dinov2.StopRequest() as stop:
        signal.raise_signal(number)
    assert not stop.signal
