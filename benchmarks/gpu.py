"""Check, time, train and profile on a GPU, in pieces of so many minutes.

    python benchmarks/gpu.py check speed profile --minutes 10
    python benchmarks/gpu.py train --run --dataset cifar.npz --batch-size 512 --total-epochs 85
    python benchmarks/gpu.py check speed --device cpu --minutes 2    # in small, to try the script

check: runs the tests of this device, compares a step with the CPU's, and looks for operations that
wait for the device and for graphs that are compiled again. speed: times steps of throughput.py for
many batch sizes. train: trains with the flags after --run. profile: lists the longest kernels.
Results are in results/gpu-<device>/<section>.json. The same command goes on with what is missing
there; results of other code, device or torch are kept under another name. Exits with 1 if a check
has failed.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import throughput
import torch
from lightly_baseline import ROOT, dinov2
from throughput import OperationCounter, Step, environment, profile_kernels

COMPILED, EAGER = "ours, compiled", "ours, eager"
SPEED = [("small", n) for n in (512, 128, 256, 1024, 2048)]
SPEED += [("tiny", n) for n in (512, 2048, 128)] + [("base", n) for n in (256, 512, 128)]


def small_config(device, **settings):
    return dinov2.Config(**{"MODEL_SIZE": "tiny", "BATCH_SIZE": 16, **settings, "DEVICE": device})


# ---- check ----


def run_tests(device, seconds):
    """Return the exit code and last line of the tests with this device as their parameter."""
    words = ["-m", "pytest", "-m", "not slow", "-k", device, "-p", "no:cacheprovider"]
    command = [sys.executable, *words]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [1, f"not ended within {seconds:.0f} s"]
    if found.returncode:
        print(found.stdout[-6000:], found.stderr[-2000:])
    lines = [line for line in found.stdout.splitlines() if " passed" in line or " failed" in line]
    return [found.returncode, lines[-1] if lines else "no tests ran"]


def compare_with_cpu(device, by, **settings):
    """Return how far losses and gradients of a step here are from the CPU's, in its units."""
    batch, results = None, []
    for where, kind in (("cpu", EAGER), (device, by)):
        fp32 = {"PRECISION": "fp32", "FREEZE_PROTOTYPES": 0.0}
        step = Step(small_config(**{**settings, **fp32, "device": where}), kind)
        batch = batch or (step.views(), step.masks())
        views, masks = ([tensor.to(where) for tensor in part] for part in batch)
        values = torch.stack([*step.train(views, masks).values()]).cpu()
        gradients = [p.grad.flatten().cpu() for p in step.model.student.parameters()]
        results.append((values, torch.cat(gradients)))
    return [float((here - cpu).norm() / cpu.norm()) for cpu, here in zip(*results, strict=True)]


def find_wait(device):
    """Run 20 steps in which waiting for the device is an error; return the error."""
    step = Step(small_config(device), COMPILED)
    for _ in range(3):
        step()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(20):
            dinov2.seed_step(0, i)
            step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return "none in 20 steps"


def count_graphs(device, **settings):
    """Return the graphs of a first step, of five more after an evaluation, and the breaks."""
    counters, counts = torch._dynamo.utils.counters, []
    counters.clear()
    step = Step(small_config(device, **settings), COMPILED)
    for i in range(6):
        step.train(step.views(), step.masks(), 100 * i)
        counts.append(counters["stats"]["unique_graphs"])
        if i == 0:
            dinov2.extract_features(step.model, step.crops.images[:24])
    breaks = sum(counters["graph_break"].values())
    return {"first step": counts[0], "later": counts[-1] - counts[0], "breaks": breaks}


def count_operations(device, **settings):
    """Return how many operations the parts of an eager step issue."""
    step = Step(small_config(device, **{"MODEL_SIZE": "small", "BATCH_SIZE": 8, **settings}), EAGER)
    step()  # creates the optimizer's moments
    step.optimizer.zero_grad()

    def count(function):
        with OperationCounter() as counter:
            result = function()
        return result, len(counter.names)

    counts = {}
    views, counts["views"] = count(step.views)
    masks, counts["masks"] = count(step.masks)
    temperature = torch.full((), 0.02, device=device)
    with dinov2.autocast(step.config.DEVICE, step.config.PRECISION):
        losses, counts["forward"] = count(
            lambda: step.model(views, masks[0], temperature, masks[1])
        )
    _, counts["backward"] = count(losses["loss"].backward)
    _, total = count(lambda: step.train(views, masks))
    counts["update"] = total - counts["forward"] - counts["backward"]
    return {**counts, "all": sum(counts.values())}


def check(given, deadline, results):
    device = given.kind
    graphs = {"first step": 4, "later": 0, "breaks": 0}
    checks = {  # a function, and whether its result is right
        "eager: differences": (lambda: compare_with_cpu(device, EAGER), lambda d: max(d) < 1e-3),
        "compiled: differences": (
            lambda: compare_with_cpu(device, COMPILED),
            lambda d: max(d) < 1e-3,
        ),
        "waits": (lambda: find_wait(device), lambda found: found.startswith("none")),
        "graphs": (lambda: count_graphs(device), lambda found: found == graphs),
        "operations": (lambda: count_operations(device), lambda n: n["views"] + n["masks"] < 500),
        "tests": (
            lambda: run_tests(device, max(60, 0.6 * (deadline - time.monotonic()))),
            lambda found: found[0] == 0,
        ),
    }
    for name, (function, is_right) in checks.items():
        if results.get(name, ["FAILED"])[0] == "ok":
            continue
        try:
            found = function()
            verdict = "ok" if is_right(found) else "FAILED"
        except Exception as error:
            found, verdict = f"{type(error).__name__}: {error}"[:300], "FAILED"
        results[name] = [verdict, found]
        print(f"| {name} | {verdict} | {json.dumps(found)} |", flush=True)
        yield
    given.failed |= any(results[name][0] == "FAILED" for name in checks)


# ---- speed, train, profile ----


def speed(given, deadline, results):
    """Time each network, batch size and contender that has no result yet."""
    sizes, repeats = ([("tiny", 16)], 1) if given.kind == "cpu" else (SPEED, 4)
    rates = results.setdefault("rates", {})
    print(throughput.table_head(given.kind), flush=True)
    for size, batch in sizes:
        if size not in rates:
            width, bf16 = throughput.SIZES[size]["dim"], results["precision"] == "bf16"
            rates[size] = throughput.measure_rates([width], batch, given.device, bf16, repeats)
            torch.cuda.empty_cache()  # workers need it
        highest = max(map(median, rates[size].values()))
        for by in throughput.contenders(given.kind):
            name, left = f"{size}, batch {batch}, {by}", deadline - time.monotonic()
            if "seconds" in results.get(name, {}):
                continue
            if left < (90 if given.kind == "cuda" else 20):  # compiling takes 40 s
                raise TimeoutError(name)
            settings = {"MODEL_SIZE": size, "BATCH_SIZE": batch, "DEVICE": given.device}
            row = {"network": size, "patch_size": 4, "by": by, "batch_size": batch}
            results[name] = row | throughput.run_worker(by, settings, repeats, timeout=left)
            print(throughput.table_row(results[name], highest), flush=True)
            yield


def train(given, deadline, results):
    """Train until the deadline, or go on; dinov2_cifar.py saves when it is asked to stop."""
    folder = given.folder / f"run-{results['code']}"
    words = ["--device", given.device, "--output-dir", str(folder), "--resume", *given.run]
    process = subprocess.Popen([sys.executable, str(ROOT / "dinov2_cifar.py"), *words])
    try:
        process.wait(max(30, deadline - time.monotonic() - 30))
    except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):
        process.send_signal(signal.SIGTERM)
        process.wait()
    given.failed |= process.returncode not in (0, 143)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    speeds = [row["images_per_second"] for row in rows if row["event"] == "step"]
    results["records"] = [row for row in rows if row["event"] in ("start", "baseline", "epoch")]
    results |= {"exit code": process.returncode, "images_per_second": speeds[-20:]}
    yield


def profile(given, deadline, results):
    """Print the longest kernels of ten steps, stages, and how busy the device is in an epoch.

    On a CPU, kernels are operations.
    """
    if "busy" in results:
        return
    if deadline - time.monotonic() < 90 and given.kind == "cuda":
        raise TimeoutError("profile")
    batch, by, times = 16, EAGER, defaultdict(list)
    if given.kind == "cuda":
        batch, by = 512, COMPILED
    step = Step(small_config(given.device, MODEL_SIZE="small", BATCH_SIZE=batch), by)
    for _ in range(3):
        step()
    kernels, _ = profile_kernels(lambda: [step() for _ in range(10)], given.device)
    for name, seconds in kernels:
        times[name].append(seconds)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:20]
    print("| ms a step | calls a step | kernel |", "|---|---|---|", sep="\n")
    for name, values in longest:
        print(f"| {100 * sum(values):.3f} | {len(values) / 10:g} | {name[:90]} |")
    results["ms_a_step"] = 100 * sum(map(sum, times.values()))
    results["kernels"] = {name: [100 * sum(v), len(v) / 10] for name, v in longest}

    print("\n| stage | ms of kernels | kernels | launches |", "|---|---|---|---|", sep="\n")
    parts = step.views(), step.masks()
    stages = {"views": step.views, "masks": step.masks, "training": lambda: step.train(*parts)}
    for name, function in stages.items():
        kernels, launches = profile_kernels(function, given.device)
        results[name] = [1000 * sum(seconds for _, seconds in kernels), len(kernels), launches]
        print(f"| {name} | {results[name][0]:.3f} | {len(kernels)} | {launches} |")

    # The third epoch's steps with the save before them, of a run without evaluation
    steps = 100 if given.kind == "cuda" else 2
    with tempfile.TemporaryDirectory() as folder:
        settings = {"OUTPUT_DIR": folder, "TOTAL_EPOCHS": 3, "MODEL_SIZE": "small"}
        settings["COMPILE"] = given.kind == "cuda"
        config = small_config(given.device, BATCH_SIZE=batch, **settings)
        images = torch.randint(256, (steps * batch, 3, 32, 32), dtype=torch.uint8)
        dinov2.train_dinov2(config, images)
        rows = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        ends = [row["seconds"] for row in rows if row["event"] == "epoch"]
    results["busy"] = results["ms_a_step"] / 1000 * steps / (ends[2] - ends[1])
    print(f"busy in an epoch: {results['busy']:.0%}", flush=True)
    yield


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sections = {"check": check, "speed": speed, "train": train, "profile": profile}
    parser.add_argument("sections", nargs="+", choices=sections)
    parser.add_argument("--device", default=dinov2.Config.DEVICE, help="[%(default)s]")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all sections [%(default)s]")
    parser.add_argument("--folder", type=Path, help="[benchmarks/results/gpu-<device>]")
    parser.add_argument("--run", nargs=argparse.REMAINDER, default=[], help="flags of train, last")
    given = parser.parse_args(argv)
    deadline, given.failed = time.monotonic() + 60 * given.minutes, False
    given.kind = torch.device(given.device).type
    given.folder = given.folder or ROOT / "benchmarks" / "results" / f"gpu-{given.kind}"
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.kind == "cpu":  # compile without a compiler
        dinov2.can_compile = lambda config: config.COMPILE
        throughput.CONTENDERS[COMPILED] = {"backend": "aot_eager"}
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))
    files = [dinov2.__file__, *(ROOT / "benchmarks" / f"{n}.py" for n in ("gpu", "throughput"))]
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:8]
    for section in given.sections:
        path = given.folder / f"{section}.json"
        here = {"code": code, **environment(dinov2.Config(DEVICE=given.device))}
        print(f"\n== {section}: {here['device']}, torch {here['torch']}", flush=True)
        results = json.loads(path.read_text()) if path.exists() else here
        if any(results[name] != here[name] for name in ("code", "device", "torch")):
            path.rename(path.with_suffix(f".{results['code']}-{results['torch']}.json"))
            results = here
        try:
            for _ in sections[section](given, deadline, results):
                dinov2.write_file(path, json.dumps(results, indent=1).encode() + b"\n")
        except TimeoutError as error:
            print(f"{error}: no time is left; the same command goes on", flush=True)
    sys.exit(int(given.failed))


if __name__ == "__main__":
    main()
