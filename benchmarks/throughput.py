"""Speed and memory of whole training steps, eager and compiled, beside lightly's DINOv2 parts.

    python benchmarks/throughput.py                          # about ten minutes on two cores
    python benchmarks/throughput.py --device cuda --batch-size 512
    pip install lightly==1.6.0 timm==1.0.31                  # for the rows of lightly

A step: views, masks, forward and backward passes, AdamW, teacher. Each measurement is a process of
its own; the contenders take turns, --rounds times, so that a machine that slows down slows all.
A number is the median of all repeats after a warm-up, with (least..most). Stages come from further
steps that wait for the device around each stage. MFU: the step's matrix products and attention, as
torch counts them while it executes, over its time and the highest rate of a matrix product here.
lightly's parts (lightly_baseline.py) get our views and masks, and are not compiled.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from lightly_baseline import HAS_LIGHTLY, ROOT, dinov2, install
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

SIZES = dinov2.Config.MODEL_DIMS
STAGES = ("views", "masks", "forward + backward", "optimizer + teacher")


def environment(config):
    """Return what a reader must know to compare numbers: machine, versions, commit, command."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    features, device = torch.cpu.get_capabilities(), torch.device(config.DEVICE)
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": names[0] if names else platform.processor(),
        "cpu_features": [name for name in ("avx512_bf16", "amx_bf16") if features.get(name)],
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
        "precision": "bf16" if dinov2.use_bf16(config) else "fp32",
        "commit": commit or None,
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# ---- Measurements ----


def synchronize(device):
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def time_blocks(function, repeats, device):
    """Return the seconds of a call, one number per block: one call, or ten on an accelerator."""
    calls, seconds = 1 if torch.device(device).type == "cpu" else 10, []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / calls)
    return seconds


def peak_memory(device):
    """Return the GiB that torch had allocated at most on CUDA, else the process (on Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # getrusage counts what the parent process had
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) / 2**20 if found else 0.0


def count_operations(function):
    """Return the floating-point operations of matrix products and attention in a call."""

    def forward(q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten  # torch counts the attention of GPUs only
    formulas = {aten._scaled_dot_product_flash_attention_for_cpu: forward}
    formulas[aten._scaled_dot_product_flash_attention_for_cpu_backward] = backward
    with torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            function()
    return counter.get_total_flops()


def measure_step(by, settings, repeats):
    """Return seconds of steps, their peak memory and operations, and the seconds of stages.

    by: "ours" or "lightly". Learning rates and the like are those of step 100 of 1,000.
    """
    c = dinov2.Config(**settings)
    if by == "lightly":
        install()
    torch.manual_seed(0)
    images = torch.randint(256, (2048, 3, c.IMAGE_SIZE, c.IMAGE_SIZE), dtype=torch.uint8)
    images = dinov2.prepare_images(c, images)
    mean, std = dinov2.channel_mean_std(images.train_images)
    model = dinov2.make_model(c, mean, std)
    optimizer = dinov2.make_optimizer(model)
    sizes = (c.GLOBAL_CROP_SIZE, c.LOCAL_CROP_SIZE, c.GLOBAL_CROPS_NUMBER, c.LOCAL_CROPS_NUMBER)
    crops = dinov2.MultiCropDataset(images, dinov2.MultiCropTransform(*sizes, c, mean, std))
    hparams, clock = dinov2.hyperparameters(c, 100, 1000), None

    def timed(stage, function):
        def wrapper(*args):
            if clock is None:  # whole steps do not wait for the device
                return function(*args)
            synchronize(c.DEVICE)
            start = time.perf_counter()
            result = function(*args)
            synchronize(c.DEVICE)
            clock[stage] = clock.get(stage, 0) + time.perf_counter() - start
            return result

        return wrapper

    @partial(timed, "views")
    def draw_views():
        return crops.__getitems__(torch.randperm(len(crops))[: c.BATCH_SIZE])

    @partial(timed, "masks")
    def draw_masks():
        return dinov2.draw_masks(c, c.DEVICE)

    @partial(timed, "forward + backward")
    def train(views, masks):
        dinov2.train_step(model, optimizer, [(views, *masks)], hparams)

    def step():
        train(draw_views(), draw_masks())

    optimizer.step = timed("optimizer + teacher", optimizer.step)
    model.update_teacher = timed("optimizer + teacher", model.update_teacher)
    time_blocks(step, 2, c.DEVICE)
    if torch.device(c.DEVICE).type == "cuda":
        torch.cuda.reset_peak_memory_stats(c.DEVICE)
    seconds, peak = time_blocks(step, repeats, c.DEVICE), peak_memory(c.DEVICE)
    batch, rows = (draw_views(), draw_masks()), []
    operations = count_operations(lambda: train(*batch))
    for _ in range(1 + repeats):  # the first warms up
        clock = {}
        step()
        clock["forward + backward"] -= clock["optimizer + teacher"]
        rows.append(clock)
    stages = {stage: median(row[stage] for row in rows[1:]) for stage in STAGES}
    return {"seconds": seconds, "peak_gib": peak, "operations": operations, "stages": stages}


def measure_rates(widths, batch_size, device, bf16, repeats):
    """Return {shape: operations a second, one per repeat} of products m x k x n.

    A large square, and the linear layers of a block of each width.
    """
    dtype, side = (torch.bfloat16 if bf16 else torch.float32), 2048 if device == "cpu" else 8192
    tokens, rates = 2 * batch_size * 65, {}
    shapes = [(tokens, k * d, n * d) for d in widths for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))]
    for m, k, n in [(side, side, side), *shapes]:
        x, weight = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))
        out = torch.empty(m, n, device=device, dtype=dtype)
        multiply = partial(torch.matmul, x, weight.T, out=out)
        time_blocks(multiply, 2, device)
        seconds = time_blocks(multiply, repeats, device)
        rates[f"{m} x {k} x {n}"] = [2 * m * k * n / s for s in seconds]
    return rates


def run_worker(*job):
    """Return what measure_step does, in a process of its own; or "failed" and why."""
    words = [sys.executable, __file__, "--job", json.dumps(job)]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        return {"failed": (process.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(process.stdout.splitlines()[-1])


# ---- The table ----


def spread(values):
    """Return "median (least..most)" with three significant digits."""
    numbers = [float(f"{v:.3g}") for v in (median(values), min(values), max(values))]
    return "{:,g} ({:,g}..{:,g})".format(*numbers)


def table_row(row, highest_rate):
    """Return the Markdown line of a row: of results of measure_step, or of what failed."""
    cells = [row["network"], row["crops"], row["by"]]
    if "failed" in row:
        return f"| {' | '.join([*cells, 'failed: ' + row['failed'].replace('|', '/')])} |"
    rate = row["operations"] / median(row["seconds"])
    cells.append(spread([row["batch_size"] / s for s in row["seconds"]]))
    cells += [f"{row['peak_gib']:.2f}", f"{100 * rate / highest_rate:.0f}"]
    cells += [f"{1000 * row['stages'][stage]:.1f}" for stage in STAGES]
    return f"| {' | '.join(cells)} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=dinov2.Config.DEVICE, help="[%(default)s]")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--crops", nargs="+", type=int, default=[16, 32], help="LOCAL_CROP_SIZEs")
    parser.add_argument("--batch-size", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each [%(default)s]")
    parser.add_argument("--repeats", type=int, default=4, help="blocks a turn [%(default)s]")
    parser.add_argument("--output", type=Path, help="[benchmarks/results/speed-<device>.json]")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.job:
        return print("\n" + json.dumps(measure_step(*given.job)))
    kind = torch.device(given.device).type
    output = given.output or ROOT / "benchmarks" / "results" / f"speed-{kind}.json"

    contenders = {"ours": ("ours", {})}
    if kind == "cuda":
        contenders = {"ours, compiled": ("ours", {}), "ours, eager": ("ours", {"COMPILE": False})}
    if HAS_LIGHTLY:
        contenders["lightly"] = ("lightly", {"COMPILE": False})
    else:
        print("lightly is left out; to have it: pip install lightly==1.6.0 timm==1.0.31")

    here, repeats = environment(dinov2.Config(DEVICE=given.device)), given.rounds * given.repeats
    widths = [SIZES[size]["dim"] for size in given.sizes]
    bf16 = here["precision"] == "bf16"
    rates = measure_rates(widths, given.batch_size, given.device, bf16, repeats)
    results, highest = {**here, "rates": rates, "rows": []}, max(map(median, rates.values()))
    title = f"{here['device']} ({here['cpu']}), torch {here['torch']}, batch {given.batch_size}"
    print(f"{title}; highest {here['precision']} rate {highest / 1e12:.3g} TFLOP/s\n")
    head = ["network", "crops", "by", "images/s", "peak GiB", "MFU %"]
    head += [f"{stage}, ms" for stage in STAGES]
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n", flush=True)
    for size, crop in product(given.sizes, given.crops):
        settings = {"MODEL_SIZE": size, "LOCAL_CROP_SIZE": crop, "BATCH_SIZE": given.batch_size}
        settings["DEVICE"], found = given.device, {by: [] for by in contenders}
        for _, by in product(range(given.rounds), contenders):
            parts, changes = contenders[by]
            found[by].append(run_worker(parts, settings | changes, given.repeats))
        for by, turns in found.items():
            row = {"network": size, "crops": f"2 x 32 + 6 x {crop} px", "by": by}
            row |= {"batch_size": given.batch_size, **turns[0], **turns[-1]}
            row["seconds"] = [s for turn in turns for s in turn.get("seconds", [])]
            results["rows"].append(row)
            print(table_row(row, highest), flush=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{output}")


if __name__ == "__main__":
    main()
