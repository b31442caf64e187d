"""Nothing lost: a run that was cut anywhere and resumed is the run that was never cut; signals, full disks, numbers that go wrong."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

import dinov2_cifar
from dinov2_cifar import InputError, find_checkpoint, make_shapes, read_checkpoint, train_dinov2


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    for name in ("draw_views", "draw_curves", "draw_attention", "draw_pca"):
        monkeypatch.setattr(dinov2_cifar, name, lambda *args: None)


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts the tests in the background lets them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def told(folder):
    """→ the records of metrics.jsonl without what a clock says."""
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key not in ("pictures_per_second", "seconds")} for line in lines]
    return [row for row in rows if row["event"] != "start"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(monkeypatch, wanted, action):
    """The action is done in the middle of step number wanted, counted from here."""
    step, count = dinov2_cifar.train_step, [0]

    def train_step(*args):
        count[0] += 1
        if count[0] == wanted:
            action()
        return step(*args)

    monkeypatch.setattr(dinov2_cifar, "train_step", train_step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """→ weights and records of three epochs of eight steps that were never cut; few records, so that a cut falls between two."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_views", "draw_curves", "draw_attention", "draw_pca"):
            patch.setattr(dinov2_cifar, name, lambda *args: None)
        patch.setattr(dinov2_cifar.Report, "every", property(lambda self: 5, lambda self, value: None), raising=False)
        model = train_dinov2(settings(out), dataset=(*make_shapes(64, 32, seed=0), *make_shapes(32, 32, seed=1)))
    return model.state_dict(), told(out)


def settings(out, **changes):
    return dinov2_cifar.Config(**{**SMALL, "TOTAL_EPOCHS": 3, "DROP_PATH": 0.2, "OUTPUT_DIR": str(out), **changes})


@pytest.fixture
def rarely(monkeypatch):
    monkeypatch.setattr(dinov2_cifar.Report, "every", property(lambda self: 5, lambda self, value: None), raising=False)


class Crash(Exception):
    pass


def crash():
    raise Crash


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("step", [3, 8, 13, 15, 24])             # within an epoch, at its end, within the next after one record and two, at the end
def test_a_signal_finishes_the_step_saves_and_the_resumed_run_is_the_whole_one(step, number, error, whole, shapes, tmp_path, monkeypatch, capsys, rarely):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: (signal.raise_signal(number), signal.raise_signal(number)))
        with pytest.raises(error) as caught:
            train_dinov2(settings(tmp_path), dataset=shapes)
    assert error is KeyboardInterrupt or caught.value.code == 143
    assert signal.getsignal(number) == before
    assert f"stopped and saved at step {step} of 24; the same command with --resume goes on" in capsys.readouterr().out
    np.random.rand(3), random.random(), torch.rand(3)            # the resumed run must not depend on what happened between
    model = train_dinov2(settings(tmp_path, RESUME="newest"), dataset=shapes)
    assert same(model.state_dict(), whole[0]) and told(tmp_path) == whole[1]


@pytest.mark.parametrize("step", [2, 12, 24])
def test_a_crash_loses_at_most_what_came_after_the_last_save(step, whole, shapes, tmp_path, monkeypatch, rarely):
    every_step = 1e-9                                            # minutes
    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(Crash):
            train_dinov2(settings(tmp_path, SAVE_EVERY_MINUTES=every_step), dataset=shapes)
    assert read_checkpoint(tmp_path / "dinov2_last.pth")["step"] == step - 1
    model = train_dinov2(settings(tmp_path, RESUME="newest"), dataset=shapes)
    assert same(model.state_dict(), whole[0]) and told(tmp_path) == whole[1]


def test_nothing_is_saved_within_an_epoch_before_its_time(shapes, tmp_path, monkeypatch):
    for minutes in (0.0, 10.0):
        with monkeypatch.context() as patch:
            at_step(patch, 7, crash)
            with pytest.raises(Crash):
                train_dinov2(settings(tmp_path, SAVE_EVERY_MINUTES=minutes), dataset=shapes)
        assert not list(tmp_path.glob("*.pth"))


def test_all_random_states_are_restored(small, shapes, tmp_path):
    model = dinov2_cifar.make_model(small(), [0.5] * 3, [0.2] * 3)
    optimizer = dinov2_cifar.make_optimizer(model)
    dinov2_cifar.save_checkpoint(tmp_path / "x.pth", model, optimizer, 0, 0)
    first = random.random(), np.random.rand(), torch.rand(1)
    dinov2_cifar.load_checkpoint(tmp_path / "x.pth", model, optimizer)
    assert (random.random(), np.random.rand(), torch.rand(1)) == first


def test_the_newest_usable_checkpoint_is_taken_and_a_broken_one_named(shapes, tmp_path, capsys):
    train_dinov2(settings(tmp_path), dataset=shapes)
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["dinov2_final.pth", "dinov2_last.pth", "dinov2_previous.pth"]
    assert [read_checkpoint(tmp_path / name)["epoch"] for name in names] == [3, 3, 2]
    for name in names[:2]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2000])
    assert find_checkpoint(settings(tmp_path, RESUME="newest")).name == "dinov2_previous.pth"
    said = capsys.readouterr().out
    assert "left out" in said and "dinov2_final.pth" in said and "dinov2_last.pth" in said


def test_newest_is_what_was_saved_last_also_in_a_copied_folder(shapes, tmp_path, monkeypatch):
    at_step(monkeypatch, 21, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train_dinov2(settings(tmp_path / "run", SAVE_EVERY=1), dataset=shapes)
    names = ["dinov2_last.pth", "dinov2_previous.pth", "dinov2_epoch_2.pth", "dinov2_epoch_1.pth"]
    assert [read_checkpoint(tmp_path / "run" / name)["step"] for name in names] == [21, 16, 16, 8]
    (tmp_path / "copy").mkdir()
    for name in names:                                           # the last is the oldest file now
        shutil.copyfile(tmp_path / "run" / name, tmp_path / "copy" / name)
        os.utime(tmp_path / "copy" / name, (1000 + names.index(name),) * 2)
    (tmp_path / "copy" / "dinov2_best.pth").symlink_to("gone.pth")
    assert find_checkpoint(settings(tmp_path / "copy", RESUME="newest")).name == names[0]


def test_lost_or_broken_records_do_not_stop_a_run_and_nothing_is_made_up(whole, shapes, tmp_path, monkeypatch, capsys, rarely):
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: signal.raise_signal(signal.SIGTERM))                            # the end of the epoch, not yet recorded
        with pytest.raises(SystemExit):
            train_dinov2(settings(tmp_path), dataset=shapes)
    shutil.copytree(tmp_path, tmp_path / "lost")
    (tmp_path / "lost" / "metrics.jsonl").unlink()
    model = train_dinov2(settings(tmp_path / "lost", RESUME="newest"), dataset=shapes)
    rows = told(tmp_path / "lost")
    assert same(model.state_dict(), whole[0]) and [row for row in rows if row["event"] == "baseline"] == [{"event": "baseline"}]
    assert next(row for row in rows if row["event"] == "epoch").keys() == {"event", "epoch", "step", "knn", "rank"}
    assert "before training" not in capsys.readouterr().out.split("going on after")[1]
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    odd = [b"3", b"[1]", b"{}", b'"text"', b'{"event": "step", "step": 1}', b'{"event": ["step"]}', b'{"event": "epoch", "epoch": "x", "step": 8}',
           b"\xff\xfe", b'{"event": "baseline", "knn": "x"}', b'{"event": "step"', b"[" * 100_000, lines[2].replace(b'"step": 1', b'"step": "1"')]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(odd + lines) + b"\n")
    model = train_dinov2(settings(tmp_path, RESUME="newest"), dataset=shapes)
    assert same(model.state_dict(), whole[0]) and told(tmp_path) == whole[1]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_in_the_folder_are_not_written_through(shapes, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    for name in (".lock", "dinov2_new.pth.tmp", "dinov2_final.pth.tmp", "metrics.jsonl.tmp"):
        (tmp_path / "out" / name).symlink_to(victim)
    train_dinov2(settings(tmp_path / "out", TOTAL_EPOCHS=1), dataset=shapes)
    assert victim.read_text() == "mine" and not (tmp_path / "out" / "dinov2_last.pth").is_symlink()


def test_a_run_killed_after_its_last_epoch_only_draws_the_end(whole, shapes, tmp_path, monkeypatch, rarely):
    with monkeypatch.context() as patch:
        patch.setattr(dinov2_cifar, "draw_pca", lambda *args: crash())
        with pytest.raises(Crash):
            train_dinov2(settings(tmp_path), dataset=shapes)
    model = train_dinov2(settings(tmp_path, RESUME="newest"), dataset=shapes)
    assert same(model.state_dict(), whole[0]) and told(tmp_path) == whole[1]


def test_a_crash_between_the_record_of_an_epoch_and_its_save_does_not_record_it_twice(whole, shapes, tmp_path, monkeypatch, rarely):
    with monkeypatch.context() as patch:
        save = dinov2_cifar.save_epoch
        patch.setattr(dinov2_cifar, "save_epoch", lambda *args: crash() if args[2] == 2 and args[3].step == 16 else save(*args))
        with pytest.raises(Crash):
            train_dinov2(settings(tmp_path, SAVE_EVERY_MINUTES=1e-9), dataset=shapes)
    assert [row["epoch"] for row in told(tmp_path) if row["event"] == "epoch"] == [1, 2] and read_checkpoint(tmp_path / "dinov2_last.pth")["epoch"] == 1
    model = train_dinov2(settings(tmp_path, RESUME="newest"), dataset=shapes)
    assert same(model.state_dict(), whole[0]) and told(tmp_path) == whole[1]


def test_changed_settings_are_listed_and_a_longer_run_says_what_that_does(shapes, tmp_path, capsys):
    train_dinov2(settings(tmp_path, TOTAL_EPOCHS=1), dataset=shapes)
    train_dinov2(settings(tmp_path, TOTAL_EPOCHS=2, LAMBDA_IMG=0.5, RESUME="newest"), dataset=shapes)
    said = capsys.readouterr().out
    assert "LAMBDA_IMG: saved 1.0, now 0.5\n" in said and "TOTAL_EPOCHS: saved 1, now 2: all schedules stretch with it" in said


def test_another_batch_size_goes_on_at_the_beginning_of_the_epoch(shapes, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 14, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train_dinov2(settings(tmp_path), dataset=shapes)
    train_dinov2(settings(tmp_path, BATCH_SIZE=16, RESUME="newest"), dataset=shapes)
    assert "an epoch has 4 steps now, not 8: going on at the beginning of epoch 2" in capsys.readouterr().out
    rows = told(tmp_path)
    assert rows[-1]["event"] == "final" and [row["step"] for row in rows if row["event"] == "epoch"] == [4, 8, 12]
    steps = [row["step"] for row in rows if row["event"] == "step"]
    assert steps == sorted(steps) and steps[-1] == 12


def test_going_back_to_an_older_checkpoint_puts_the_newer_ones_aside(whole, shapes, tmp_path, rarely):
    train_dinov2(settings(tmp_path), dataset=shapes)
    model = train_dinov2(settings(tmp_path, RESUME=str(tmp_path / "dinov2_previous.pth")), dataset=shapes)
    assert same(model.state_dict(), whole[0]) and told(tmp_path) == whole[1]
    (aside,) = tmp_path.glob("earlier-*")
    assert sorted(path.name for path in aside.iterdir()) == ["dinov2_final.pth", "dinov2_last.pth", "metrics.jsonl"] and told(aside) == whole[1]


def test_going_on_from_elsewhere_puts_the_run_that_was_here_aside(shapes, tmp_path):
    for name in ("a", "b"):
        train_dinov2(settings(tmp_path / name, TOTAL_EPOCHS=1, SEED=ord(name)), dataset=shapes)
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir() if path.suffix in (".pth", ".jsonl")}
    train_dinov2(settings(tmp_path / "b", TOTAL_EPOCHS=2, SEED=ord("a"), RESUME=str(tmp_path / "a" / "dinov2_last.pth")), dataset=shapes)
    (aside,) = (tmp_path / "b").glob("earlier-*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    with pytest.raises(InputError, match="has done 1 epochs"):
        train_dinov2(settings(tmp_path / "c", TOTAL_EPOCHS=1, RESUME=str(tmp_path / "a" / "dinov2_last.pth")), dataset=shapes)


def test_fewer_epochs_than_are_done_are_refused(shapes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 17, crash)
        with pytest.raises(Crash):
            train_dinov2(settings(tmp_path), dataset=shapes)
    for epochs in (1, 2):
        with pytest.raises(InputError, match=rf"has done 2 epochs of TOTAL_EPOCHS \({epochs}\)"):
            train_dinov2(settings(tmp_path, TOTAL_EPOCHS=epochs, RESUME="newest"), dataset=shapes)


def test_a_request_that_comes_twice_is_one_and_a_later_one_ends_the_program(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(dinov2_cifar, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises(KeyboardInterrupt):
        with dinov2_cifar.stop_requests() as asked:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert asked == [signal.SIGINT] * 2
            clock[0] += 3
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the third one is late: it must interrupt")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with dinov2_cifar.stop_requests() as asked:
        signal.raise_signal(signal.SIGINT)
    assert not asked and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# A folder is one run's, and the disk may fill up

def test_a_folder_in_use_is_refused(shapes, tmp_path):
    with dinov2_cifar.output_folder(str(tmp_path)):
        with pytest.raises(InputError, match="is in use by another run"):
            train_dinov2(settings(tmp_path), dataset=shapes)
    train_dinov2(settings(tmp_path, TOTAL_EPOCHS=1), dataset=shapes)


@pytest.mark.skipif(os.name == "nt", reason="the lock of other systems")
def test_a_file_system_without_locks_is_not_taken_for_a_folder_in_use(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with dinov2_cifar.output_folder(str(tmp_path)):
        pass


def test_a_folder_that_vanishes_ends_the_run_with_one_clear_error(shapes, tmp_path, monkeypatch):
    at_step(monkeypatch, 12, lambda: shutil.rmtree(tmp_path))
    with pytest.raises(InputError, match="(?s)cannot be written.*--resume"):
        train_dinov2(settings(tmp_path), dataset=shapes)


PROGRAM = textwrap.dedent("""
    import json, resource, signal, sys
    sys.path.insert(0, {tests!r})
    import conftest, dinov2_cifar
    from conftest import SMALL
    from dinov2_cifar import make_shapes
    for name in ("draw_views", "draw_curves", "draw_attention", "draw_pca"):
        setattr(dinov2_cifar, name, lambda *args: None)
    pictures = (*make_shapes(64, 32, seed=0), *make_shapes(32, 32, seed=1))
    def settings(out, **changes):
        return dinov2_cifar.Config(**{{**SMALL, "TOTAL_EPOCHS": 3, "DROP_PATH": 0.2, "OUTPUT_DIR": out, "SAVE_EVERY_MINUTES": 1e-9, **changes}})
""")


def python(code, *words):
    return subprocess.run([sys.executable, "-c", PROGRAM.format(tests=str(ROOT / "tests")) + textwrap.dedent(code), *map(str, words)],
                          capture_output=True, text=True, timeout=500)


@pytest.mark.skipif(os.name == "nt", reason="no limits of a file's size there")
@pytest.mark.parametrize("limit, named", [(100_000, ".pth"), (1_500, "metrics.jsonl")])
def test_a_full_disk_stops_with_one_line_and_leaves_what_was_saved(limit, named, shapes, tmp_path):
    train_dinov2(settings(tmp_path, TOTAL_EPOCHS=1), dataset=shapes)
    before = (tmp_path / "dinov2_last.pth").read_bytes()
    metrics = (tmp_path / "metrics.jsonl").stat().st_size
    done = python("""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)            # then a write beyond the limit is an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
        dinov2_cifar.prepare_pictures = lambda config, dataset=None: dinov2_cifar.as_pictures(pictures, 32)
        config = settings(sys.argv[1], TOTAL_EPOCHS=2, RESUME="newest", SAVE_EVERY_MINUTES=float(sys.argv[3]))
        dinov2_cifar.parse_arguments = lambda argv: config
        dinov2_cifar.main()
    """, tmp_path, *((limit, 1e-9) if named == ".pth" else (metrics + limit, 0)))
    last = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()][-1]
    assert done.returncode == 2 and last.startswith("error: ") and named in last and "cannot be written" in last and "Traceback" not in done.stderr
    assert find_checkpoint(settings(tmp_path, RESUME="newest")).read_bytes() == before or named == "metrics.jsonl"
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path, rarely):
    """Every other kill waits for a save: the child is stopped, and killed if a file is half written, else it goes on."""
    done = python("""
        import os, random, time
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        def train(out, **changes):
            sys.stdout = sys.stderr = open(os.devnull, "w")
            dinov2_cifar.train_dinov2(settings(out, **changes), dataset=pictures)
        def child(**changes):
            pid = os.fork()
            if pid == 0:
                try:
                    train(**changes)
                    os._exit(0)
                except BaseException as error:
                    os.write(2, repr(error).encode())
                    os._exit(1)
            return pid
        whole, cut = sys.argv[1], sys.argv[2]
        started = time.perf_counter()
        assert os.waitpid(child(out=whole), 0)[1] == 0
        seconds, kills, draw, in_a_save, equal = time.perf_counter() - started, 0, random.Random(0), 0, []
        def finished(out):
            return any(row["event"] == "final" for row in dinov2_cifar.read_metrics(Path(out, "metrics.jsonl")))
        def compare():
            weights = [torch.load(Path(out, "dinov2_final.pth"), weights_only=True) for out in (whole, cut)]
            parts = [key for key in weights[0] if key.endswith("head_state_dict") or key in ("student_state_dict", "teacher_state_dict")]
            equal.append(all(torch.equal(weights[0][part][name], weights[1][part][name]) for part in parts for name in weights[0][part]))
        while kills < 20 or not finished(cut):                   # a chain of kills that comes to its end is compared; then the next
            if finished(cut):
                compare()
                dinov2_cifar.put_aside(cut)
            pid = child(out=cut, RESUME="newest")
            if kills < 20:
                time.sleep(draw.uniform(0.05, 0.4) * seconds)
                ended, code = os.waitpid(pid, os.WNOHANG)
                while not ended and kills % 2:
                    os.kill(pid, signal.SIGSTOP)
                    ended, code = os.waitpid(pid, os.WUNTRACED)
                    if os.WIFSTOPPED(code):
                        ended = 0
                        if list(Path(cut).glob("*.tmp")):
                            break
                        os.kill(pid, signal.SIGCONT)
                        time.sleep(0.001)
                if not ended:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    kills += 1
                    in_a_save += bool(list(Path(cut).glob("*.tmp")))
                    code = 0
            else:
                code = os.waitpid(pid, 0)[1]
            assert code == 0, code
        compare()
        print(json.dumps({"kills": kills, "in a save": in_a_save, "chains": len(equal), "equal": all(equal)}))
    """, tmp_path / "whole", tmp_path / "cut")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 20 and result["in a save"] >= 10 and result["equal"], result
    assert told(tmp_path / "whole") == told(tmp_path / "cut")


# Numbers that go wrong

def spoil(monkeypatch, steps, value=math.nan):
    """The image loss of these steps, counted from 1, is not finite."""
    loss, count = dinov2_cifar.multi_crop_dino_loss, [0]

    def spoiled(*args):
        count[0] += 1
        return loss(*args) * (value if count[0] in steps else 1.0)

    monkeypatch.setattr(dinov2_cifar, "multi_crop_dino_loss", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_counted_and_said(value, shapes, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {3, 4}, value)
    seen = []
    step = dinov2_cifar.train_step

    def watch(model, *args):
        values = step(model, *args)
        seen.append(torch.cat([parameter.detach().flatten() for parameter in model.img_head.parameters()]))
        return values

    monkeypatch.setattr(dinov2_cifar, "train_step", watch)
    model = train_dinov2(settings(tmp_path, TOTAL_EPOCHS=1, WARMUP=0.0), dataset=shapes)
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[3], seen[4])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    said = capsys.readouterr().out
    assert "step 3 skipped: its loss or gradient is not finite (1 since the start)" in said and "step 4 skipped" in said and "(2 since" in said
    rows = [row for row in told(tmp_path) if row["event"] == "step"]
    (epoch,) = (row for row in told(tmp_path) if row["event"] == "epoch")
    good = [row["img"] for row in rows if not row["skipped"]]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0, 0, 0] and epoch["skipped"] == 2
    assert epoch["img"] == pytest.approx(sum(good) / 6) and min(good) > 0


def test_ten_such_steps_in_a_row_stop_the_run(shapes, tmp_path, monkeypatch):
    spoil(monkeypatch, {4, *range(11, 25)})
    with pytest.raises(InputError, match="ten steps in a row, up to step 20, are not finite, here in img, grad_norm") as caught:
        train_dinov2(settings(tmp_path), dataset=shapes)
    assert f"The last good checkpoint: {tmp_path / 'dinov2_last.pth'}, step 16. Go on with --resume and PRECISION fp32" in str(caught.value)
    assert read_checkpoint(tmp_path / "dinov2_last.pth")["step"] == 16


def test_a_save_looks_first_so_that_nothing_resumes_into_ten_bad_steps(shapes, tmp_path, monkeypatch, rarely):
    spoil(monkeypatch, range(7, 25))
    monkeypatch.setattr(dinov2_cifar.Report, "every", property(lambda self: 100, lambda self, value: None), raising=False)
    with pytest.raises(InputError, match="ten steps in a row, up to step 16"):
        train_dinov2(settings(tmp_path, SAVE_EVERY_MINUTES=1e-9), dataset=shapes)
    assert read_checkpoint(tmp_path / "dinov2_last.pth")["step"] == 15
    monkeypatch.undo()
    train_dinov2(settings(tmp_path, RESUME="newest"), dataset=shapes)
    epochs = [row for row in told(tmp_path) if row["event"] == "epoch"]
    assert [row["skipped"] for row in epochs] == [2, 7, 0] and all(math.isfinite(row["img"]) for row in epochs)


def test_weights_that_are_not_finite_are_neither_measured_nor_saved(shapes, tmp_path, monkeypatch):
    networks, make = [], dinov2_cifar.make_model
    monkeypatch.setattr(dinov2_cifar, "make_model", lambda *args: networks.append(make(*args)) or networks[0])
    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: networks[0].student.cls_token.data.fill_(math.inf))
        with pytest.raises(InputError, match=r"weights are not finite at step 16\. The last good checkpoint: .*dinov2_last.pth, step 8\. Go on"):
            train_dinov2(settings(tmp_path, CLIP_GRAD=0.0), dataset=shapes)
    assert find_checkpoint(settings(tmp_path, RESUME="newest")).name == "dinov2_last.pth" and read_checkpoint(tmp_path / "dinov2_last.pth")["step"] == 8
    networks.clear()
    assert all(torch.isfinite(p).all() for p in train_dinov2(settings(tmp_path, RESUME="newest"), dataset=shapes).parameters())
    networks.clear()
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: networks[0].student.cls_token.data.fill_(math.inf))
        with pytest.raises(InputError, match="There is no checkpoint yet. Begin again with PRECISION fp32"):
            train_dinov2(settings(tmp_path / "other"), dataset=shapes)
