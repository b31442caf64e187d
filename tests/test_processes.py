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
from conftest import SMALL, close, read_records
from test_checkpoints import LAST, assert_same_run

import dinov2_cifar as dinov2
from dinov2_cifar import Config, make_shapes, read_checkpoint

no_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork server")
# Of a micro-batch, with and without masks: batch norm, Sinkhorn-Knopp, KoLeo, diagnostics
ALL_REDUCES = {True: 18 + 8 + 4 + 2, False: 9 + 4 + 4 + 2}
pytestmark = [pytest.mark.slow, no_fork]


def start(function, folder, *args, count=2):
    """Call function(folder, *args) in as many processes, with torchrun's environment."""
    context = multiprocessing.get_context("forkserver")  # it imports torch once, then forks
    context.set_forkserver_preload(["torch", "dinov2_cifar"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    variables = [{**group, "WORLD_SIZE": count, "RANK": r, "LOCAL_RANK": r} for r in range(count)]
    processes = [context.Process(target=call, args=(v, function, folder, *args)) for v in variables]
    for process in processes:
        process.start()
    return processes


def call(variables, function, folder, *args):
    os.environ.update({name: str(value) for name, value in variables.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    sys.stdout = sys.stderr = open(folder / f"{variables['RANK']}.txt", "w", buffering=1)
    function(folder, *args)


def finish(processes, folder, code=0):
    for process in processes:
        process.join(120)
    printed = [(folder / f"{rank}.txt").read_text() for rank in range(len(processes))]
    assert [process.exitcode for process in processes] == [code] * len(processes), printed
    return printed


def take_steps(folder, batches, size, changes):
    """Take three steps of two micro-batches; in the last, one process has an infinite loss."""
    config = Config(**{**SMALL, "CLIP_GRAD": 0.5, "ACCUMULATE": 2, "BATCH_SIZE": size, **changes})
    hparams = dict(lr=0.01, prototype_lr=0.01, weight_decay=0.04, momentum=0.5, teacher_temp=0.05)
    with dinov2.setup_processes(config) as c, pytest.MonkeyPatch.context() as patch:
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
        targets = model.teacher_targets(torch.cat(views[:2]), mask.flatten().nonzero()[:, 0], 0.05)
        loss, all_reduce, calls = dinov2.multi_crop_dino_loss, torch.distributed.all_reduce, []
        patch.setattr(dinov2.dist, "all_reduce", lambda *a: calls.append(a) or all_reduce(*a))
        for step in range(3):
            if step == 2 and rank == last:  # the gradients stay finite
                patch.setattr(dinov2, "multi_crop_dino_loss", lambda *a: loss(*a) + math.inf)
            pair = [(views, mask) for *views, mask in batches[2 * step : 2 * step + 2]]
            values = dinov2.train_step(wrapped, optimizer, pair, hparams)
            rows.append({name: value.item() for name, value in values.items()})
            micro_batches = 2 * (step + 1)
            assert len(calls) == (micro_batches * ALL_REDUCES[c.MASK_RATIO > 0] + step + 1) * last
        states = [p.grad for p in model.parameters() if p.grad is not None]
        states = torch.cat([t.detach().flatten() for t in (*states, *model.parameters())])
        torch.save((targets, rows, states), folder / f"{rank}.pt")


UNIFORM = {"KOLEO_KIND": "uniform", "KOLEO_FEATURES": "bottleneck", "MASK_RATIO": 0.0}


@pytest.mark.parametrize("changes", [{}, UNIFORM], ids=str)
def test_two_processes_equal_one_with_the_double_batch(changes, tmp_path):
    c, batches = Config(**{**SMALL, **changes}), []
    for _ in range(6):
        halves = [dinov2.MaskGenerator(c).draw()[0].unflatten(0, (2, 8)) for _ in range(2)]
        views = [torch.randn(16, 3, size, size) for size in (32, 32, 16, 16)]
        batches.append([*views, torch.cat(halves, 1).flatten(0, 1)])
    take_steps(tmp_path, batches, 16, changes)
    (img_targets, patch_targets), rows, states = torch.load(tmp_path / "0.pt")
    finish(start(take_steps, tmp_path, batches, 8, changes), tmp_path)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    close(torch.cat([half[0][0] for half in halves], 1), img_targets)  # (G,B,K)
    owner = torch.arange(2).repeat_interleave(8).repeat(2).repeat_interleave(batches[0][-1].sum(1))
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
    expected, found = [torch.cat(dinov2.step_indices(70, one, step)) for step in range(6)], []
    monkeypatch.setattr(dinov2, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dinov2, "rank", lambda rank=rank: rank)
        found.append([torch.cat(dinov2.step_indices(70, two, step)) for step in range(6)])
    for whole, *halves in zip(expected, *found, strict=True):
        assert [len(half) for half in halves] == [16, 16]
        assert torch.equal(torch.cat(halves).sort().values, whole.sort().values)


def run(folder, changes, counts=(64, 64)):
    """Train as the command line does, on as many images."""
    settings = {"DROPOUT": 0.1, "HEAD_BATCH_NORM": False, "RESUME": "newest", **changes}
    config = Config(**{**SMALL, "OUTPUT_DIR": str(folder / "out"), **settings})
    images = dinov2.Images(make_shapes(counts[int(os.environ["RANK"])], 32)[0])
    dinov2.parse_flags = lambda argv: (config.to_dict(), {})
    dinov2.load_images = lambda config: images
    dinov2.plot_figures = lambda *args: None
    dinov2.main([])


def run_with_a_slow_disk(folder, frozen):
    """Note the newest step on disk when a process goes on, a random number, the prototypes."""
    write_file, save_run, rank = dinov2.write_file, dinov2.save_run, os.environ["RANK"]

    def save(model, optimizer, logger):
        save_run(model, optimizer, logger)
        prototypes = model.img_head.prototypes.detach()
        values = read_checkpoint(folder / "out" / LAST)["step"], torch.rand(()).item(), prototypes
        torch.save(values, folder / f"{rank}-{logger.step}.pt")

    dinov2.write_file = lambda *args: time.sleep(0.3) or write_file(*args)
    dinov2.save_run = save
    run(folder, {"TOTAL_EPOCHS": 2, "FREEZE_PROTOTYPES": frozen})


@pytest.mark.parametrize("frozen", [0.0, 0.5])  # thawed after the first step, of which lr is 0
def test_processes_wait_for_saves_and_draw_different_numbers(frozen, tmp_path):
    finish(start(run_with_a_slow_disk, tmp_path, frozen), tmp_path)
    for step in (4, 8):
        values = zip(*(torch.load(tmp_path / f"{rank}-{step}.pt") for rank in "01"), strict=True)
        saved, (number, other), (prototypes, others) = values
        assert saved == (step, step) and number != other
        assert torch.equal(prototypes, others)
        assert torch.equal(prototypes, torch.load(tmp_path / "0-4.pt")[2]) == (step == 4)


def run_from_weights(folder, weights):
    save_run, rank = dinov2.save_run, os.environ["RANK"]

    def save(model, optimizer, logger):
        save_run(model, optimizer, logger)
        torch.save(model.student.state_dict(), folder / f"{rank}-{logger.step}.pt")

    dinov2.save_run = save
    run(folder, {"TOTAL_EPOCHS": 2, "INIT_FROM": weights, "FREEZE_BACKBONE": 0.5})


def test_processes_thaw_given_weights_together(tmp_path):
    weights = dinov2.build_backbone(Config(**SMALL)).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    finish(start(run_from_weights, tmp_path, str(tmp_path / "weights.pth")), tmp_path)
    for step in (4, 8):
        states = [torch.load(tmp_path / f"{rank}-{step}.pt") for rank in "01"]
        for name, parameter in weights.items():
            ours, other = (state[name] for state in states)
            assert torch.equal(ours, other)
            trained = step == 8 and not name.startswith("pixel")
            assert torch.equal(ours, parameter) != trained, name


def test_processes_with_unequal_images_are_one_error(tmp_path):
    printed = finish(start(run, tmp_path, {}, (48, 64)), tmp_path, code=2)
    assert all("error: processes have 48 to 64 training images\n" in text for text in printed)


def wait_for_save(folder, step=0):
    path, deadline = folder / "out" / LAST, time.monotonic() + 60
    while not path.exists() or read_checkpoint(path)["step"] <= step:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_signal_to_one_process_stops_both_and_resume_is_bit_identical(tmp_path):
    (tmp_path / "whole").mkdir()
    finish(start(run, tmp_path / "whole", {"TOTAL_EPOCHS": 5}), tmp_path / "whole")
    changes, step = {"TOTAL_EPOCHS": 5, "SAVE_EVERY_MINUTES": 1e-9}, 0
    for signaled, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        processes = start(run, tmp_path, changes)
        wait_for_save(tmp_path, step)
        os.kill(processes[signaled].pid, number)
        printed = finish(processes, tmp_path, code=128 + number)
        step = read_checkpoint(tmp_path / "out" / LAST)["step"]
        assert f"stopped and saved at step {step}; --resume" in printed[0]
        assert "step" not in printed[1] and 0 < step < 20
    assert f"step {step} of 20\n" in finish(start(run, tmp_path, changes), tmp_path)[0]
    assert_same_run(tmp_path / "out", tmp_path / "whole" / "out")


def test_resume_with_another_number_of_processes(tmp_path):
    for epochs, count in ((1, 1), (2, 2), (3, 1)):
        printed = finish(start(run, tmp_path, {"TOTAL_EPOCHS": epochs}, count=count), tmp_path)
    rows = read_records(tmp_path / "out", "epoch")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 8), (2, 16), (3, 24)]
    assert "step 16 of 24\n" in printed[0]


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_process_ends_the_other_and_leaves_a_checkpoint(lost, tmp_path):
    processes = start(run, tmp_path, {"TOTAL_EPOCHS": 1000, "SAVE_EVERY_MINUTES": 1e-9})
    wait_for_save(tmp_path)
    processes.pop(lost).kill()
    processes[0].join(120)
    assert processes[0].exitcode not in (0, None)
    assert read_checkpoint(tmp_path / "out" / LAST)["step"] > 0
