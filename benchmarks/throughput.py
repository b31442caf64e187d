"""Speed and memory of whole training steps, eager and compiled, beside lightly's DINOv2 parts.

    python benchmarks/throughput.py                          # 13 minutes on two cores
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

import numpy as np
import torch
from lightly_baseline import HAS_LIGHTLY, ROOT, dinov2, install
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._triton import has_triton
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

SIZES = dinov2.Config.MODEL_DIMS
CONTENDERS = {  # options of torch.compile, None: eager
    "ours, compiled": {},
    "ours, CUDA graphs": {"mode": "reduce-overhead"},
    "ours, eager": None,
    "ours, 2 processes": None,
    "lightly": None,  # with our views
    "lightly, its loader": None,
}
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
        "precision": "bf16" if dinov2.use_bf16(config.DEVICE, config.PRECISION) else "fp32",
        "commit": commit or None,
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# ---- Measurements ----


def synchronize(device):
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


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
    """Return the GiB that torch had reserved at most on CUDA, else the process (on Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30  # graphs have pools of their own
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


class OperationCounter(TorchDispatchMode):
    """Count what runs on the device: operations but views of tensors and allocations."""

    FREE = set(
        """_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like
        empty_strided expand lift_fresh new_empty new_empty_strided permute select slice split
        split_with_sizes squeeze t transpose unbind unfold unsqueeze view""".split()
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names += [] if name in self.FREE else [name]
        return function(*args, **(kwargs or {}))


def profile_kernels(function, device):
    """Return the names and seconds of a call's kernels (on a CPU, operations), and launches."""
    with torch.profiler.profile() as profile:
        function()
        synchronize(device)
    kind, events = torch.device(device).type, profile.events()
    launches = sum(bool(re.search("Launch(Kernel|.*Graph)|GraphLaunch", e.name)) for e in events)
    if kind == "cpu":
        return [(event.name, event.self_cpu_time_total / 1e6) for event in events], launches
    events = [e for e in events if e.device_type.name == kind.upper() and not e.is_user_annotation]
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events], launches


def lightly_loader(config):
    """Yield batches of lightly's views, of PIL images by as many workers as there are cores."""
    from lightly.transforms import DINOTransform

    c = config
    sizes = {"global_crop_size": c.GLOBAL_CROP_SIZE, "local_crop_size": c.LOCAL_CROP_SIZE}
    scales = {"global_crop_scale": c.GLOBAL_CROPS_SCALE, "local_crop_scale": c.LOCAL_CROPS_SCALE}
    transform = DINOTransform(**sizes, **scales, n_local_views=c.LOCAL_CROPS_NUMBER)
    pixels = np.random.default_rng(0).integers(0, 256, (c.IMAGE_SIZE, c.IMAGE_SIZE, 3), np.uint8)
    images = TransformedImages([Image.fromarray(pixels)] * 64 * c.BATCH_SIZE, transform)
    options = {"num_workers": os.cpu_count(), "persistent_workers": True, "drop_last": True}
    options["pin_memory"] = torch.device(c.DEVICE).type == "cuda"
    loader = torch.utils.data.DataLoader(images, c.BATCH_SIZE, **options)
    while True:
        for views in loader:
            yield [view.to(c.DEVICE, non_blocking=True) for view in views]


class TransformedImages(torch.utils.data.Dataset):
    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])


class Step:
    """A training step on random images, in parts. by: key of CONTENDERS."""

    def __init__(self, config, by):
        c, options = config, CONTENDERS[by]
        torch.manual_seed(0)
        n = max(2048, c.BATCH_SIZE)
        images = torch.randint(256, (n, 3, c.IMAGE_SIZE, c.IMAGE_SIZE), dtype=torch.uint8)
        images = dinov2.prepare_images(c, images)
        mean, std = dinov2.channel_mean_std(images.train_images)
        self.model = dinov2.DINOv2(c).to(c.DEVICE)
        self.model.set_pixel_statistics(mean, std)
        self.optimizer = dinov2.make_optimizer(self.model)
        sizes = (c.GLOBAL_CROP_SIZE, c.LOCAL_CROP_SIZE, c.GLOBAL_CROPS_NUMBER, c.LOCAL_CROPS_NUMBER)
        self.crops = dinov2.MultiCropDataset(
            images, dinov2.MultiCropTransform(*sizes, c, mean, std)
        )
        masks, self.config = dinov2.MaskGenerator(c), c
        self.loader = lightly_loader(c) if by == "lightly, its loader" else None
        if options is not None:
            parts = (self.model, self.crops.transform, masks)
            self.compiled = dinov2.compiled_step(*parts, **options)
            self.compiled.__enter__()
        self.masks = masks.draw
        dinov2.set_hyperparameters(self.optimizer, dinov2.hyperparameters(c, 100, 1000))
        self.network = dinov2.wrap_ddp(self.model)

    def views(self):
        if self.loader:
            return next(self.loader)
        return self.crops.__getitems__(torch.randperm(len(self.crops))[: self.config.BATCH_SIZE])

    def train(self, views, masks, step=100):
        """Train with the learning rates and the like of a step of 1,000."""
        hparams = dinov2.hyperparameters(self.config, step, 1000)
        return dinov2.train_step(self.network, self.optimizer, [(views, *masks)], hparams)

    def __call__(self):
        torch.compiler.cudagraph_mark_step_begin()
        return self.train(self.views(), self.masks())


def measure_step(by, settings, repeats):
    """Return seconds of steps, peak memory, operations, launches, and the seconds of stages."""
    if by.startswith("lightly"):
        install()
    settings["BATCH_SIZE"] //= int(os.environ.get("WORLD_SIZE", 1))
    with dinov2.setup_processes(dinov2.Config(**settings)) as c:
        return time_step(Step(c, by), c, repeats)


def time_step(step, c, repeats):
    clock = None

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

    step.views, step.masks = timed("views", step.views), timed("masks", step.masks)
    step.train = timed("forward + backward", step.train)
    step.optimizer.step = timed("optimizer + teacher", step.optimizer.step)
    step.model.update_teacher = timed("optimizer + teacher", step.model.update_teacher)
    time_blocks(step, 2, c.DEVICE)
    if torch.device(c.DEVICE).type == "cuda":
        torch.cuda.reset_peak_memory_stats(c.DEVICE)
    seconds, peak = time_blocks(step, repeats, c.DEVICE), peak_memory(c.DEVICE)
    batch, rows = (step.views(), step.masks()), []
    operations = count_operations(lambda: step.train(*batch)) * dinov2.world_size()
    for _ in range(1 + repeats):  # the first warms up
        clock = {}
        step()
        clock["forward + backward"] -= clock["optimizer + teacher"]
        rows.append(clock)
    stages = {stage: median(row[stage] for row in rows[1:]) for stage in STAGES}
    result = {"seconds": seconds, "peak_gib": peak, "operations": operations, "stages": stages}
    if torch.device(c.DEVICE).type == "cuda":
        kernels, launches = profile_kernels(lambda: [step() for _ in range(10)], c.DEVICE)
        busy = sum(seconds for _, seconds in kernels) / 10 / median(seconds)
        result |= {"kernels": len(kernels) / 10, "launches": launches / 10, "busy": busy}
    return result


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


def contenders(kind):
    """Return the contenders that this kind of device and the packages here allow."""
    compiled = [by for by, options in CONTENDERS.items() if options is not None]
    left_out = ["ours, 2 processes"] if kind == "cuda" and has_triton() else compiled
    names = [by for by in CONTENDERS if HAS_LIGHTLY or "lightly" not in by]
    return [by for by in names if by not in left_out]


def run_worker(*job, timeout=None):
    """Return what measure_step does, in a process of its own; or "failed" and why."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] * ("2 processes" in job[0])
    words = [sys.executable, *run, __file__, "--job", json.dumps(job)]
    try:
        process = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"not ended within {timeout:.0f} s"}
    if process.returncode:
        return {"failed": (process.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(process.stdout.splitlines()[-1])


# ---- The table ----


def spread(values):
    """Return "median (least..most)" with three significant digits."""
    numbers = [float(f"{v:.3g}") for v in (median(values), min(values), max(values))]
    return "{:,g} ({:,g}..{:,g})".format(*numbers)


def table_head(kind):
    head = ["network", "patch", "by", "images/s", "peak GiB", "MFU %"]
    head += [f"{stage}, ms" for stage in STAGES]
    head += ["kernels", "launches", "busy"] if kind == "cuda" else []
    return f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|"


def table_row(row, highest_rate):
    """Return the Markdown line of a row: of results of measure_step, or of what failed."""
    cells = [row["network"], str(row["patch_size"]), row["by"]]
    if "failed" in row:
        return f"| {' | '.join([*cells, 'failed: ' + row['failed'].replace('|', '/')])} |"
    rate = row["operations"] / median(row["seconds"])
    cells.append(spread([row["batch_size"] / s for s in row["seconds"]]))
    cells += [f"{row['peak_gib']:.2f}", f"{100 * rate / highest_rate:.0f}"]
    cells += [f"{1000 * row['stages'][stage]:.1f}" for stage in STAGES]
    if "launches" in row:
        cells += [f"{row['kernels']:,.0f}", f"{row['launches']:,.0f}", f"{row['busy']:.0%}"]
    return f"| {' | '.join(cells)} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=dinov2.Config.DEVICE, help="[%(default)s]")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--patch-sizes", nargs="+", type=int, default=[8, 4], help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each [%(default)s]")
    parser.add_argument("--repeats", type=int, default=4, help="blocks a turn [%(default)s]")
    parser.add_argument("--output", type=Path, help="[benchmarks/results/speed-<device>.json]")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as dinov2_cifar.main does
    if given.job:
        result = measure_step(*given.job)
        return None if int(os.environ.get("RANK", 0)) else print("\n" + json.dumps(result))
    kind = torch.device(given.device).type
    output = given.output or ROOT / "benchmarks" / "results" / f"speed-{kind}.json"

    if not HAS_LIGHTLY:
        print("lightly is left out; to have it: pip install lightly==1.6.0 timm==1.0.31")

    here, repeats = environment(dinov2.Config(DEVICE=given.device)), given.rounds * given.repeats
    widths = [SIZES[size]["dim"] for size in given.sizes]
    bf16 = here["precision"] == "bf16"
    rates = measure_rates(widths, given.batch_size, given.device, bf16, repeats)
    results, highest = {**here, "rates": rates, "rows": []}, max(map(median, rates.values()))
    title = f"{here['device']} ({here['cpu']}), torch {here['torch']}, batch {given.batch_size}"
    print(f"{title}; highest {here['precision']} rate {highest / 1e12:.3g} TFLOP/s\n")
    print(table_head(kind), flush=True)
    for size, patch in product(given.sizes, given.patch_sizes):
        settings = {"MODEL_SIZE": size, "PATCH_SIZE": patch, "BATCH_SIZE": given.batch_size}
        settings["DEVICE"], found = given.device, {by: [] for by in contenders(kind)}
        for _, by in product(range(given.rounds), found):
            found[by].append(run_worker(by, settings, given.repeats))
        for by, turns in found.items():
            row = {"network": size, "patch_size": patch, "by": by, "batch_size": given.batch_size}
            row |= {**turns[0], **turns[-1]}
            row["seconds"] = [s for turn in turns for s in turn.get("seconds", [])]
            results["rows"].append(row)
            print(table_row(row, highest), flush=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{output}")


if __name__ == "__main__":
    main()
