"""Several processes: two with half of a batch each are one with the whole batch, a run stops at one
step for all, and continues with the same or another number of processes."""

import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL
from recipe import flags

import dinov2_cifar
from dinov2_cifar import (
    Config,
    DINOv2,
    InputError,
    draw_masks,
    load_checkpoint,
    make_optimizer,
    read_checkpoint,
    save_checkpoint,
    step_indices,
    train_dinov2,
    train_step,
    wrap_ddp,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]


# A server that has imported torch forks the processes at once; other systems start afresh
METHOD = "forkserver" if hasattr(os, "fork") else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(["torch", "dinov2_cifar"])


def on_two(function, folder, *args):
    """Call function(rank, folder, *args) in two processes that form a group."""
    args = (function, folder, *args)
    torch.multiprocessing.start_processes(join, args, nprocs=2, start_method=METHOD)


def join(rank, function, folder, *args):
    torch.set_num_threads(1)
    address = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    function(rank, folder, *args)
    dist.destroy_process_group()
    (folder / "meeting").unlink(missing_ok=True)


# Two with half of a batch each are one with the whole batch


def network(batch_size, **changes):
    """Return a DINOv2 whose teacher is not its student, the same on every call."""
    torch.manual_seed(1)
    model = DINOv2(Config(**{**SMALL, "BATCH_SIZE": batch_size, **changes}))
    for module in model.teacher_modules():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw_batch(**changes):
    """Return views and mask of 16 images; both halves have equally many masked patches."""
    config = Config(**{**SMALL, **changes})
    halves = [draw_masks(config, "cpu")[0].unflatten(0, (2, -1)) for _ in range(2)]  # (G,8,N)
    views = [torch.randn(16, 3, size, size) for size in (32, 32, 16, 16)]
    return views, torch.cat(halves, 1).flatten(0, 1)


def half_of(rank, views, mask):
    """Return one process's half of a batch."""
    mask = mask.unflatten(0, (2, -1)).chunk(2, 1)[rank].flatten(0, 1)
    return [view.chunk(2)[rank] for view in views], mask


def measure(model, views, mask):
    """Return losses and diagnostics, targets, and gradients by name, of one backward pass."""
    wrapped = wrap_ddp(model)
    indices = mask.flatten().nonzero()[:, 0]
    targets = model.teacher_targets(torch.cat(views[:2]), indices, 0.05)
    values = wrapped(views, mask, 0.05)
    values["loss"].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in values.items()}, targets, gradients


def measure_half(rank, folder, views, mask, changes):
    results = measure(network(8, **changes), *half_of(rank, views, mask))
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.parametrize(
    "changes",
    [{}, {"KOLEO_KIND": "cosine", "HEAD_BATCH_NORM": False}, {"MASK_RATIO": 0.0}],
    ids=str,
)
def test_two_processes_are_one_with_the_whole_batch(changes, tmp_path):
    views, mask = draw_batch(**changes)
    values, (img_targets, patch_targets), gradients = measure(network(16, **changes), views, mask)
    on_two(measure_half, tmp_path, views, mask, changes)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, value in values.items():
        assert sum(half[0][name] for half in halves) / 2 == pytest.approx(value, abs=1e-5), name
    img_targets_of_both = torch.cat([half[1][0] for half in halves], 1)  # (G,B,K)
    torch.testing.assert_close(img_targets_of_both, img_targets, rtol=0, atol=1e-5)
    owner = torch.arange(2).repeat_interleave(8).repeat(2)[:, None].expand_as(mask)[mask]  # (M,)
    for rank, half in enumerate(halves):
        torch.testing.assert_close(half[1][1], patch_targets[owner == rank], rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(half[2][name], gradient, rtol=1e-5, atol=1e-5)


def take_steps(model, batches, path):
    """Take two steps of two micro-batches, save; a loaded copy takes a third, in which the last
    process has an infinite loss. Return gradient norms and whether the steps were skipped."""
    hparams = {"lr": 1e-2, "prototype_lr": 1e-2, "weight_decay": 0.04, "momentum": 0.5}
    hparams["teacher_temp"] = 0.05
    rows = []

    def steps(model, optimizer, *all_micro_batches):
        wrapped = wrap_ddp(model)
        for group in optimizer.param_groups:
            group["eps"] = 1e-3  # Adam takes full steps of gradients that are only rounding
        for micro_batches in all_micro_batches:
            values = train_step(wrapped, optimizer, micro_batches, hparams)
            rows.append((values["grad_norm"].item(), values["skipped"].item()))
        return optimizer

    optimizer = steps(model, make_optimizer(model), batches[:2], batches[2:4])
    if dinov2_cifar.rank() == 0:
        save_checkpoint(path, model, optimizer, epoch=1, step=2)
    dinov2_cifar.max_over_processes(0)
    copy = DINOv2(model.config)
    copy_optimizer = make_optimizer(copy)
    load_checkpoint(path, copy, copy_optimizer)
    before = [parameter.clone() for parameter in copy.student.parameters()]
    loss = dinov2_cifar.multi_crop_dino_loss
    infinite = math.inf if dinov2_cifar.rank() == dinov2_cifar.world_size() - 1 else 0.0
    with pytest.MonkeyPatch.context() as patch:  # its gradients are finite
        patch.setattr(dinov2_cifar, "multi_crop_dino_loss", lambda *args: loss(*args) + infinite)
        steps(copy, copy_optimizer, batches[4:])
    assert all(map(torch.equal, before, copy.student.parameters()))
    return rows


def take_steps_with_half(rank, folder, batches, changes):
    batches = [half_of(rank, *batch) for batch in batches]
    torch.save(take_steps(network(8, **changes), batches, folder / "2.pth"), folder / f"{rank}.pt")


def test_steps_and_checkpoints_of_two_processes_are_those_of_one(tmp_path):
    changes = {"CLIP_GRAD": 0.5, "ACCUMULATE": 2}
    batches = [draw_batch() for _ in range(6)]
    (tmp_path / "one").mkdir()
    (first, second, third) = take_steps(network(16, **changes), batches, tmp_path / "one" / "2.pth")
    assert min(first[0], second[0]) > 0.5  # clipped
    assert [row[1] for row in (first, second, third)] == [0, 0, 1]
    on_two(take_steps_with_half, tmp_path, batches, changes)
    for rank in (0, 1):
        rows = torch.load(tmp_path / f"{rank}.pt")
        assert rows[:2] == [pytest.approx(first, rel=1e-4), pytest.approx(second, rel=1e-4)]
        assert rows[2][1] == 1
    one, two = read_checkpoint(tmp_path / "one" / "2.pth"), read_checkpoint(tmp_path / "2.pth")
    parts = [key for key in one if key.endswith("state_dict")]
    assert len(parts) == 7
    for key in parts:
        expected, state = (states[key].get("state", states[key]) for states in (one, two))
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


def test_processes_share_out_the_same_images(monkeypatch):
    """One process with 32 images a step uses those of two with 16 each, in the same steps."""
    one = Config(**{**SMALL, "BATCH_SIZE": 16, "ACCUMULATE": 2})
    whole = [torch.cat(step_indices(70, one, step)) for step in range(6)]
    two, steps = Config(**{**SMALL, "ACCUMULATE": 2}), [[] for _ in whole]
    monkeypatch.setattr(dinov2_cifar, "world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(dinov2_cifar, "rank", lambda number=number: number)
        for step, images in enumerate(steps):
            micro_batches = step_indices(70, two, step)
            assert [len(indices) for indices in micro_batches] == [8, 8]
            images += torch.cat(micro_batches).tolist()
    assert [sorted(images) for images in steps] == [sorted(images.tolist()) for images in whole]
    assert all(len(set(a + b)) == 64 for a, b in zip(steps[::2], steps[1::2]))
    assert sorted(steps[0] + steps[1]) != sorted(steps[2] + steps[3])


def train_with_a_slow_disk(rank, folder, images):
    """Save at which step the newest checkpoint is when each process goes on after a save."""
    write_file, save_run, steps, drawn = dinov2_cifar.write_file, dinov2_cifar.save_run, [], []
    draw = dinov2_cifar.draw_masks

    def slow(path, data):
        if path.suffix == ".pth":
            time.sleep(0.3)
        write_file(path, data)

    def save(model, optimizer, logger):
        save_run(model, optimizer, logger)
        steps.append((logger.step, read_checkpoint(folder / "out" / "dinov2_last.pth")["step"]))

    def draw_and_note(*args):
        mask, indices = draw(*args)
        drawn.append(mask)
        return mask, indices

    dinov2_cifar.write_file, dinov2_cifar.save_run = slow, save
    dinov2_cifar.draw_masks = draw_and_note
    config = Config(**{**SMALL, "OUTPUT_DIR": str(folder / "out"), "TOTAL_EPOCHS": 2})
    train_dinov2(config, images)
    torch.save((steps, torch.stack(drawn[:8])), folder / f"{rank}.pt")


def test_processes_draw_different_numbers_and_wait_for_saves(shapes, tmp_path):
    on_two(train_with_a_slow_disk, tmp_path, shapes)
    (steps, drawn), (other_steps, other_drawn) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert steps == other_steps == [(4, 4), (8, 8)]
    assert not any(map(torch.equal, drawn, other_drawn))


def train_on_fewer_images(rank, folder, images):
    config = Config(**{**SMALL, "OUTPUT_DIR": str(folder / "out")})
    with pytest.raises(InputError) as caught:
        train_dinov2(config, images[: 48 + 16 * rank])
    (folder / f"{rank}.txt").write_text(str(caught.value))


def test_processes_need_equally_many_images(shapes, tmp_path):
    on_two(train_on_fewer_images, tmp_path, shapes[0])
    for rank in range(2):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert message == "processes have 48 to 64 training images"


# Whole runs, started as users start them


@pytest.fixture
def images(tmp_path, shapes):
    x_train, y_train, x_test, y_test = (part.numpy() for part in shapes)
    x_train, x_test = x_train.transpose(0, 2, 3, 1), x_test.transpose(0, 2, 3, 1)
    path = tmp_path / "shapes.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def arguments(out, images, **changes):
    settings = {**SMALL, "DATASET": str(images), "OUTPUT_DIR": str(out)}
    return flags({**settings, "DROP_PATH": 0.2, "DROPOUT": 0.1, **changes})


def run_command(log, environment, words):
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    dinov2_cifar.main(words)


def start(processes, out, images, **changes):
    """Start the command line in as many processes, as torchrun does; each has an exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group["WORLD_SIZE"], started = str(processes), []
    for rank in range(processes):
        environment = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = (log_of(out, rank), environment, arguments(out, images, **changes))
        started.append(CONTEXT.Process(target=run_command, args=words))
        started[-1].start()
    return started


def log_of(out, rank):
    return out.with_name(f"{out.name}-{rank}.txt")


def finish(processes, out, code=0):
    """Return what the processes printed."""
    for process in processes:
        process.join(120)
    printed = [log_of(out, rank).read_text() for rank in range(len(processes))]
    assert [process.exitcode for process in processes] == [code] * len(processes), printed
    return printed


def wait_for_save(out, is_alive, after=0):
    """Wait for a checkpoint that is newer than a time in nanoseconds."""
    last = out / "dinov2_last.pth"
    while not last.exists() or last.stat().st_mtime_ns <= after:
        assert is_alive()
        time.sleep(0.02)


def epochs(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] == "epoch"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


SAVES = {"EVAL_EVERY": 0, "SAVE_EVERY_MINUTES": 1e-9}


def test_a_signal_to_one_process_stops_both_and_the_resumed_run_is_the_run_never_stopped(
    images, tmp_path
):
    settings = {"TOTAL_EPOCHS": 15, **SAVES}
    whole, cut, saved_at = tmp_path / "whole", tmp_path / "cut", 0
    finish(start(2, whole, images, **settings), whole)
    for resume, signaled in (("", 1), ("newest", 0)):
        processes = start(2, cut, images, RESUME=resume, **settings)
        wait_for_save(cut, processes[0].is_alive, saved_at)
        processes[signaled].terminate()  # SIGTERM
        printed = finish(processes, cut, code=143)
        step = read_checkpoint(cut / "dinov2_last.pth")["step"]
        assert 0 < step < 60 and printed[1].strip() == ""
        assert printed[0].count(f"stopped and saved at step {step}; --resume continues") == 1
        saved_at = (cut / "dinov2_last.pth").stat().st_mtime_ns
    printed = finish(start(2, cut, images, RESUME="newest", **settings), cut)
    assert f"resuming: {cut / 'dinov2_last.pth'}, step {step} of 60" in printed[0]
    states, wanted = (read_checkpoint(folder / "dinov2_final.pth") for folder in (cut, whole))
    for key in (key for key in wanted if key.endswith("state_dict")):
        state, expected = (s[key].get("state", s[key]) for s in (states, wanted))
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    assert epochs(cut) == epochs(whole)


def test_a_run_continues_with_two_processes_and_with_one_again(images, tmp_path):
    out, printed = tmp_path / "out", []
    for total, processes in ((1, 1), (2, 2), (3, 1)):
        resume = {"RESUME": "newest"} if total > 1 else {}
        printed += finish(start(processes, out, images, TOTAL_EPOCHS=total, **resume), out)
    assert "step 4 of 8" in printed[1] and printed[2].strip() == ""
    assert "8 steps of 16" in printed[1] and "step 16 of 24" in printed[3]
    assert [(row["epoch"], row["step"]) for row in epochs(out)] == [(1, 8), (2, 16), (3, 24)]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_and_leaves_a_whole_checkpoint(lost, images, tmp_path):
    processes = start(2, tmp_path / "out", images, TOTAL_EPOCHS=1000, **SAVES)
    wait_for_save(tmp_path / "out", processes[0].is_alive)
    processes[lost].kill()
    processes[1 - lost].join(120)
    assert processes[1 - lost].exitcode not in (0, None)
    assert read_checkpoint(tmp_path / "out" / "dinov2_last.pth")["step"] > 0


def test_torchrun_hands_a_signal_on_to_all(images, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [str(ROOT / "dinov2_cifar.py"), *arguments(out, images, TOTAL_EPOCHS=1000, **SAVES)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    wait_for_save(out, lambda: run.poll() is None)
    run.terminate()
    printed = run.communicate(timeout=120)[0]
    step = read_checkpoint(out / "dinov2_last.pth")["step"]
    assert run.returncode != 0 and printed.count(f"stopped and saved at step {step:,};") == 1
