"""Two processes with half of a batch each are one with the whole; they stop and resume as one."""

import math
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, close, read_records

import dinov2_cifar as dinov2
from dinov2_cifar import Config, make_shapes, read_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork server"),
]
LAST = "dinov2_last.pth"


def start(function, *args, count=2):
    """Call function(*args) in as many processes, with torchrun's environment."""
    context = multiprocessing.get_context("forkserver")  # it imports torch once, then forks
    context.set_forkserver_preload(["torch", "dinov2_cifar"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    processes = []
    for rank in range(count):
        variables = {**group, "WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(context.Process(target=call, args=(variables, function, *args)))
        processes[-1].start()
    return processes


def call(variables, function, *args):
    os.environ.update({name: str(value) for name, value in variables.items()})
    function(*args)


def finish(processes, code=0):
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [code] * len(processes)


# Two with half of a batch each are one with the whole


def take_steps(folder, batches, batch_size, changes):
    """Take three steps of two micro-batches; in the last, one process has an infinite loss."""
    settings = {"CLIP_GRAD": 0.5, "ACCUMULATE": 2, "BATCH_SIZE": batch_size, **changes}
    hparams = {"lr": 0.01, "prototype_lr": 0.01, "weight_decay": 0.04, "momentum": 0.5}
    hparams["teacher_temp"] = 0.05
    with dinov2.setup_processes(Config(**{**SMALL, **settings})) as c:
        rank, last = dinov2.rank(), dinov2.world_size() - 1
        torch.manual_seed(1)
        model = dinov2.DINOv2(c)
        model.teacher.patch_embed.proj.weight += 0.1 * torch.randn(32, 3, 8, 8)  # not the student
        optimizer, wrapped, rows = dinov2.make_optimizer(model), dinov2.wrap_ddp(model), []
        for group in optimizer.param_groups:
            group["eps"] = 1e-3  # Adam takes full steps of gradients that are only rounding
        if last:
            split = [[t.unflatten(0, (-1, 16)).chunk(2, 1)[rank] for t in b] for b in batches]
            batches = [[t.flatten(0, 1) for t in batch] for batch in split]
        *views, mask = batches[0]
        indices = mask.flatten().nonzero()[:, 0]
        targets = model.teacher_targets(torch.cat(views[:2]), indices, 0.05)
        loss = dinov2.multi_crop_dino_loss
        for step in range(3):
            with pytest.MonkeyPatch.context() as patch:  # gradients stay finite
                more = math.inf if step == 2 and rank == last else 0.0
                patch.setattr(dinov2, "multi_crop_dino_loss", lambda *a, m=more: loss(*a) + m)
                pair = [(views, mask) for *views, mask in batches[2 * step : 2 * step + 2]]
                values = dinov2.train_step(wrapped, optimizer, pair, hparams)
            rows.append({name: value.item() for name, value in values.items()})
            if step == 0:
                gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        states = [*gradients, *(p.detach() for p in model.parameters())]
        torch.save((targets, rows, torch.cat([t.flatten() for t in states])), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    "changes", [{}, {"KOLEO_KIND": "cosine", "HEAD_BATCH_NORM": False, "MASK_RATIO": 0.0}], ids=str
)
def test_two_processes_equal_one_with_the_double_batch(changes, tmp_path):
    c, batches = Config(**{**SMALL, **changes}), []
    for _ in range(6):
        halves = [dinov2.draw_masks(c, "cpu")[0].unflatten(0, (2, 8)) for _ in range(2)]
        views = [torch.randn(16, 3, size, size) for size in (32, 32, 16, 16)]
        batches.append([*views, torch.cat(halves, 1).flatten(0, 1)])
    take_steps(tmp_path, batches, 16, changes)
    (img_targets, patch_targets), rows, states = torch.load(tmp_path / "0.pt")
    finish(start(take_steps, tmp_path, batches, 8, changes))
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    close(torch.cat([half[0][0] for half in halves], 1), img_targets)  # (G,B,K)
    mask = batches[0][-1]
    owner = torch.arange(2).repeat_interleave(8).repeat(2)[:, None].expand_as(mask)[mask]  # (M,)
    for rank, half in enumerate(halves):
        close(half[0][1], patch_targets[owner == rank])
        close(half[2], states)
    for row, *of_halves in zip(rows[:2], *(half[1][:2] for half in halves), strict=True):
        for name, value in row.items():
            close(sum(half[name] for half in of_halves) / 2, value)
        assert row["grad_norm"] > 0.5  # clipped
    assert [half[1][2]["skipped"] for half in halves] == [1, 1]


def test_processes_share_out_the_same_images(monkeypatch):
    """Two with 2 * 8 images each use in every step those of one with 2 * 16."""
    one, two = (Config(**{**SMALL, "BATCH_SIZE": size, "ACCUMULATE": 2}) for size in (16, 8))
    for step in range(6):
        expected, found = torch.cat(dinov2.step_indices(70, one, step)), []
        with monkeypatch.context() as patch:
            patch.setattr(dinov2, "world_size", lambda: 2)
            for rank in (0, 1):
                patch.setattr(dinov2, "rank", lambda rank=rank: rank)
                found += dinov2.step_indices(70, two, step)
        assert [len(indices) for indices in found] == [8] * 4
        assert sorted(torch.cat(found).tolist()) == sorted(expected.tolist())


# Whole runs


def run(folder, changes, counts=(64, 64)):
    """Train as the command line does, on as many images; print into a file."""
    rank = int(os.environ["RANK"])
    sys.stdout = sys.stderr = open(folder / f"{rank}.txt", "w", buffering=1)
    settings = {"DROPOUT": 0.1, "DROP_PATH": 0.2, "OUTPUT_DIR": str(folder / "out"), **changes}
    config = Config(**{**SMALL, **settings})
    dinov2.parse_arguments = lambda argv: config
    dinov2.load_images = lambda config: dinov2.Images(make_shapes(counts[rank], 32)[0])
    dinov2.main([])


def printed(folder):
    return [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]


def run_with_a_slow_disk(folder):
    """Note the newest checkpoint's step when a process goes on, and a random number."""
    write_file, save_run, rank = dinov2.write_file, dinov2.save_run, os.environ["RANK"]

    def save(model, optimizer, logger):
        save_run(model, optimizer, logger)
        step, number = read_checkpoint(folder / "out" / LAST)["step"], torch.rand(()).item()
        torch.save((logger.step, step, number), folder / f"{rank}-{logger.step}.pt")

    dinov2.write_file = lambda *args: time.sleep(0.3) or write_file(*args)
    dinov2.save_run = save
    run(folder, {"TOTAL_EPOCHS": 2})


def test_processes_wait_for_saves_and_draw_different_numbers(tmp_path):
    finish(start(run_with_a_slow_disk, tmp_path))
    for step in (4, 8):
        (*first, number), (*second, other) = (torch.load(tmp_path / f"{r}-{step}.pt") for r in "01")
        assert first == second == [step, step] and number != other


def test_processes_with_unequal_images_are_one_error(tmp_path):
    finish(start(run, tmp_path, {}, (48, 64)), code=2)
    assert all("error: processes have 48 to 64 training images" in p for p in printed(tmp_path))


def wait_for_save(folder, step=0):
    """Wait for a checkpoint of a later step."""
    path, deadline = folder / "out" / LAST, time.monotonic() + 60
    while not path.exists() or read_checkpoint(path)["step"] <= step:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_signal_to_one_process_stops_both_and_resume_is_bit_identical(tmp_path):
    settings, step = {"TOTAL_EPOCHS": 15, "SAVE_EVERY_MINUTES": 1e-9}, 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    finish(start(run, whole, settings))
    for resume, signaled in (("", 1), ("newest", 0)):
        processes = start(run, cut, {**settings, "RESUME": resume})
        wait_for_save(cut, step)
        os.kill(processes[signaled].pid, signal.SIGTERM)
        finish(processes, code=143)
        step, (out, silent) = read_checkpoint(cut / "out" / LAST)["step"], printed(cut)
        assert f"stopped and saved at step {step}; --resume" in out and "step" not in silent
        assert 0 < step < 60
    finish(start(run, cut, {**settings, "RESUME": "newest"}))
    assert f"step {step} of 60\n" in printed(cut)[0]
    states, wanted = (
        read_checkpoint(folder / "out" / "dinov2_final.pth") for folder in (cut, whole)
    )
    for key in (key for key in wanted if key.endswith("state_dict")):
        state, expected = (s[key].get("state", s[key]) for s in (states, wanted))
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_resume_with_another_number_of_processes(tmp_path):
    for epochs, count in ((1, 1), (2, 2), (3, 1)):
        changes = {"TOTAL_EPOCHS": epochs, "RESUME": "newest"}
        finish(start(run, tmp_path, changes, count=count))
    rows = read_records(tmp_path / "out", "epoch")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 8), (2, 16), (3, 24)]
    assert "step 16 of 24\n" in printed(tmp_path)[0]


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_process_ends_the_other_and_leaves_a_checkpoint(lost, tmp_path):
    processes = start(run, tmp_path, {"TOTAL_EPOCHS": 1000, "SAVE_EVERY_MINUTES": 1e-9})
    wait_for_save(tmp_path)
    processes[lost].kill()
    processes[1 - lost].join(120)
    assert processes[1 - lost].exitcode not in (0, None)
    assert read_checkpoint(tmp_path / "out" / LAST)["step"] > 0
