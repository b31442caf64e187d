"""Several processes: two with half of a batch each are one with the whole, runs go on with another number, a lost process ends the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from recipe import flags

import dinov2_cifar
from dinov2_cifar import (Config, DINOv2, draw_masks, load_checkpoint, make_optimizer, make_shapes, read_checkpoint, read_metrics,
                          save_checkpoint, train_step)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")]
in_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")


def network(batch_size, **changes):
    """→ a DINOv2 whose teacher is not its student, the same on every call."""
    torch.manual_seed(1)
    model = DINOv2(Config(**{**SMALL, "BATCH_SIZE": batch_size, **changes}))
    for part in model.teacher_parts():
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def measure(model, views, mask, wrap=lambda model: model):
    """→ losses and diagnostics, targets, and gradients by name, of one backward pass."""
    wrapped = wrap(model)                                        # must outlive the backward pass
    positions = dinov2_cifar.masked_positions(mask, int(mask.sum()))
    targets = model.teacher_targets(views, positions, 0.05)
    values = wrapped(views, mask, 0.05)
    values["loss"].backward()
    return ({name: value.item() for name, value in values.items()}, targets,
            {name: full(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None})


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrap(model):
    """As a run does it: sharded where SHARD says so, else with DDP; sharded means that each has about half."""
    if model.config.SHARD:
        before = sum(p.numel() for p in model.parameters())
        dinov2_cifar.shard(model)
        assert 0.4 * before < sum(p.numel() for p in dinov2_cifar.local_tensors(model)) < 0.6 * before
    return dinov2_cifar.distribute(model)


def work_on_a_share(rank, folder, views, mask, changes):
    """One of two processes, with its half of the pictures."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    model = network(len(views[0]) // 2, **changes)
    share = mask.unflatten(0, (model.config.GLOBAL_CROPS_NUMBER, -1)).chunk(2, 1)[rank].flatten(0, 1)
    torch.save(measure(model, [view.chunk(2)[rank] for view in views], share, wrap), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("changes", [{}, {"KOLEO_KIND": "cosine", "HEAD_BATCH_NORM": False}, {"MASK_RATIO": 0.0}, {"SHARD": True},
                                     {"SHARD": True, "REGISTER_TOKENS": 2, "MASK_RATIO": 0.0}], ids=str)
def test_two_processes_are_one_with_the_whole_batch(changes, tmp_path):
    config = Config(**{**SMALL, "BATCH_SIZE": 16, **changes})
    views = [torch.randn(16, 3, size, size) for size in (32, 32, 16, 16)]
    mask = draw_masks(config, "cpu")
    values, targets, gradients = measure(network(16, **{**changes, "SHARD": False}), views, mask)
    torch.multiprocessing.spawn(work_on_a_share, (tmp_path, views, mask, changes), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, value in values.items():
        assert sum(part[0][name] for part in parts) / 2 == pytest.approx(value, abs=1e-5), name
    assert torch.allclose(torch.cat([part[1][0] for part in parts], 1), targets[0], atol=1e-5)    # (G,B,K) of pictures
    of_mask = mask.unflatten(0, (2, -1)).chunk(2, 1)
    rows = [torch.nonzero(torch.zeros_like(mask).unflatten(0, (2, -1)).index_copy(1, torch.arange(8) + 8 * rank, of_mask[rank]).flatten()[mask.flatten()])
            for rank in (0, 1)]                                  # where each process's masked patches stand among all
    for part, mine in zip(parts, rows):
        assert torch.allclose(part[1][1], targets[1][mine.squeeze(1)], atol=1e-5)
        assert part[2].keys() >= gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(part[2][name], gradient, atol=1e-5), name


UNLIKE_ACTIVATIONS = {"MODEL_DIMS": {"tiny": (136, 2, 2)}}      # no other tensor has its weights' shapes


def keep_a_share(rank, folder, views, mask):
    """Saves how many bytes of the blocks' matrices stay between forward and backward pass."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    model = network(len(views[0]) // 2, PRECISION="bf16", SHARD=True, LAYER_SCALE=1e-5, **UNLIKE_ACTIVATIONS)
    shapes = {tuple(p.shape) for p in model.student.blocks.parameters() if p.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    wrapped, kept, share = wrap(model), [], mask.unflatten(0, (2, -1)).chunk(2, 1)[rank].flatten(0, 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), dinov2_cifar.autocast(model.config):
        values = wrapped([view.chunk(2)[rank] for view in views], share, 0.05)
    weights = [t for t in kept if tuple(t.shape) in shapes]
    alive = sum(t.untyped_storage().size() for t in weights)
    values["loss"].backward()
    torch.save((values["loss"].item(), len(weights), alive), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_sharded_block_gives_its_weights_back_also_in_bf16(tmp_path):
    views, mask = [torch.randn(16, 3, size, size) for size in (32, 32, 16, 16)], draw_masks(Config(**{**SMALL, "BATCH_SIZE": 16}), "cpu")
    torch.multiprocessing.spawn(keep_a_share, (tmp_path, views, mask), nprocs=2)
    losses, weights, alive = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    assert min(weights) > 0 == max(alive)
    model = network(16, PRECISION="bf16", LAYER_SCALE=1e-5, **UNLIKE_ACTIVATIONS)  # which bfloat16 would swallow
    with dinov2_cifar.autocast(model.config):
        assert sum(losses) / 2 == pytest.approx(model(views, mask, 0.05)["loss"].item(), rel=1e-3)


def three_steps(model, views, mask, folder):
    """Two steps, a checkpoint, and a third step of another network and optimizer that were loaded from it → gradient norms."""
    norms, settings = [], {"lr": 1e-2, "prototype_lr": 1e-2, "weight_decay": 0.04, "momentum": 0.5, "teacher_temp": 0.05}
    for steps in (2, 1):
        trained, optimizer = wrap(model), make_optimizer(model)
        for group in optimizer.param_groups:
            group["eps"] = 1e-3                                  # Adam makes full steps of gradients that are 0 but for rounding
        if steps == 1:
            load_checkpoint(folder / "2.pth", model, optimizer)
        norms += [train_step(trained, optimizer, [(views, mask)], settings)["grad_norm"].item() for _ in range(steps)]
        save_checkpoint(folder / f"{steps}.pth", model, optimizer, epoch=1, step=len(norms))
        dinov2_cifar.of_all("saved")                             # process 0 writes
        last, model = model, DINOv2(model.config)
        del trained, last
    return norms


def step_on_a_share(rank, folder, views, mask, changes):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    torch.manual_seed(0)
    dinov2_cifar.seed_apart(0)
    drawn = torch.rand(3)
    share = mask.unflatten(0, (2, -1)).chunk(2, 1)[rank].flatten(0, 1)
    norms = three_steps(network(len(views[0]) // 2, **changes), [view.chunk(2)[rank] for view in views], share, folder)
    torch.save((norms, drawn), folder / f"norms{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shard", [False, True])
def test_steps_and_checkpoints_of_two_processes_are_those_of_one(shard, tmp_path):
    changes = {"BATCH_SIZE": 16, "CLIP_GRAD": 0.5}
    views, mask = [torch.randn(16, 3, size, size) for size in (32, 32, 16, 16)], draw_masks(Config(**{**SMALL, **changes}), "cpu")
    (tmp_path / "one").mkdir()
    norms = three_steps(network(16, CLIP_GRAD=0.5), views, mask, tmp_path / "one")
    assert min(norms) > 0.5                                      # clipped
    torch.multiprocessing.spawn(step_on_a_share, (tmp_path, views, mask, {"CLIP_GRAD": 0.5, "SHARD": shard}), nprocs=2)
    (first, drawn), (second, other) = (torch.load(tmp_path / f"norms{rank}.pt") for rank in (0, 1))
    assert first == pytest.approx(norms, rel=1e-4) == second and not torch.equal(drawn, other)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    for name in ("2.pth", "1.pth"):
        one, two = read_checkpoint(tmp_path / "one" / name), read_checkpoint(tmp_path / name)
        for key in dinov2_cifar.STATE_KEYS.values():
            for part, value in one[key].items():
                assert torch.allclose(two[key][part], value, atol=1e-5), (name, key, part)
        moments, others = (states["optimizer_state_dict"]["state"] for states in (one, two))
        assert moments.keys() == others.keys()
        for i in moments:
            assert all(torch.allclose(others[i][kind], moments[i][kind], atol=1e-5) for kind in ("step", "exp_avg", "exp_avg_sq")), (name, i)


def test_the_processes_share_out_the_same_order(monkeypatch):
    config = Config(**{**SMALL, "ACCUMULATE": 2})
    monkeypatch.setattr(dinov2_cifar, "world_size", lambda: 2)
    each = []
    for number in (0, 1):
        monkeypatch.setattr(dinov2_cifar, "rank", lambda: number)
        each.append(dinov2_cifar.epoch_batches(70, config, 3))
    assert [len(steps) for steps in each] == [2, 2]
    for steps in zip(*each):
        pictures = torch.cat([batch for step in steps for batch in step])
        assert len(pictures) == 32 and len(pictures.unique()) == 32
    monkeypatch.undo()
    assert {int(i) for steps in each for step in steps for batch in step for i in batch} == {
        int(i) for step in dinov2_cifar.epoch_batches(70, config, 3) for batch in step for i in batch}


def train_with_a_slow_disk(rank, folder, pictures):
    """Process 0 takes its time to write; saves at which step the newest checkpoint is when each may leave."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    write, save, found = dinov2_cifar.write_safely, dinov2_cifar.save_epoch, []
    dinov2_cifar.write_safely = lambda *args: time.sleep(0.3) or write(*args)

    def saved(*args):
        save(*args)
        found.append((args[3].step, read_checkpoint(folder / "dinov2_last.pth")["step"]))

    dinov2_cifar.save_epoch = saved
    dinov2_cifar.train_dinov2(Config(**{**SMALL, "OUTPUT_DIR": str(folder), "TOTAL_EPOCHS": 2}), dataset=pictures)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_no_process_leaves_before_the_checkpoint_is_written(shapes, tmp_path):
    torch.multiprocessing.spawn(train_with_a_slow_disk, (tmp_path, shapes), nprocs=2)
    assert all(torch.load(tmp_path / f"{rank}.pt") == [(4, 4), (8, 8)] for rank in (0, 1))


def train_on_ones_own(rank, folder, pictures):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    for number, own in enumerate(pictures[rank]):
        with pytest.raises(dinov2_cifar.InputError) as caught:
            dinov2_cifar.train_dinov2(Config(**{**SMALL, "OUTPUT_DIR": str(folder / str(number))}), dataset=own)
        (folder / f"{rank}-{number}.txt").write_text(str(caught.value))
    torch.distributed.destroy_process_group()


def test_processes_with_different_pictures_are_refused(shapes, tmp_path):
    x, y, *test = shapes
    others = [(x.flip(3).sub(1), y, *test), (x[:48], y[:48], *test), (x, y)]                      # others, fewer, none to test on
    torch.multiprocessing.spawn(train_on_ones_own, (tmp_path, [[shapes] * len(others), others]), nprocs=2)
    said = [path.read_text() for path in tmp_path.glob("*-*.txt")]
    assert len(said) == 2 * len(others) and all("the processes have different pictures" in text for text in said)


# Whole runs, started as users start them

@pytest.fixture
def pictures(tmp_path):
    (x_train, y_train), (x_test, y_test) = make_shapes(64, 32, seed=0), make_shapes(32, 32, seed=1)
    path = tmp_path / "shapes.npz"
    np.savez(path, x_train=x_train.permute(0, 2, 3, 1), y_train=y_train, x_test=x_test.permute(0, 2, 3, 1), y_test=y_test)
    return path


def command(processes, out, pictures, **changes):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    return [sys.executable, *launcher, str(ROOT / "dinov2_cifar.py"), *flags({**SMALL, "DATASET": str(pictures), "OUTPUT_DIR": str(out), **changes})]


def start(*words, **changes):
    return subprocess.Popen(command(*words, **changes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_goes_on_with_two_processes_and_with_one_again(shard, pictures, tmp_path):
    out, said = tmp_path / "out", []
    for epochs, processes in ((1, 1), (2, 2), (3, 1)):
        process = start(processes, out, pictures, TOTAL_EPOCHS=epochs, SHARD=shard and processes > 1, **{"RESUME": "newest"} if epochs > 1 else {})
        said.append(process.communicate(timeout=300)[0])
        assert process.returncode == 0, said[-1]
    assert said[1].count("an epoch has 4 steps now, not 8: going on at the beginning of epoch 2") == 1, said[1]
    assert "8 steps of 16" in said[1] and "an epoch has 8 steps now, not 4" in said[2]
    rows = read_metrics(out / "metrics.jsonl")
    assert [(row["epoch"], row["step"]) for row in rows if row["event"] == "epoch"] == [(1, 8), (2, 16), (3, 24)]
    states = read_checkpoint(out / "dinov2_previous.pth")["random_states"]                        # of the two
    assert [row["event"] for row in rows].count("final") == 1 and len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])


def worker(process, rank):
    """→ the number of the process that torchrun started as this rank."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)


@pytest.mark.parametrize("only", [None, *[pytest.param(rank, marks=in_proc) for rank in (0, 1)]])
def test_a_request_to_stop_ends_all_processes_at_one_step(only, pictures, tmp_path):
    process = start(2, tmp_path, pictures, TOTAL_EPOCHS=1000, EVAL_EVERY=0, SAVE_EVERY_MINUTES=1e-9)
    wait_for(tmp_path / "dinov2_previous.pth", process)
    if only is None:
        process.send_signal(signal.SIGTERM)                      # torchrun hands it on to both, not quite at once
    else:
        os.kill(worker(process, only), signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and said.count("stopped and saved at step") == 1, said
    step = int(said.split("stopped and saved at step ")[1].split(" of ")[0].replace(",", ""))
    assert read_checkpoint(tmp_path / "dinov2_last.pth")["step"] == step


@in_proc
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run_with_a_message(lost, pictures, tmp_path):
    process = start(2, tmp_path, pictures, TOTAL_EPOCHS=1000, EVAL_EVERY=0, SAVE_EVERY_MINUTES=1e-9)
    wait_for(tmp_path / "dinov2_previous.pth", process)
    os.kill(worker(process, lost), signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and f"error: process {1 - lost} of 2 lost another one" in said, said
    assert json.dumps(read_checkpoint(tmp_path / "dinov2_last.pth")["step"])                      # whole
