"""Effect of single changes of dinov2_cifar.py on the accuracy of its features, for several seeds.

    python benchmarks/ablation.py --list
    python benchmarks/ablation.py --seeds 0 1 2 --base --dataset cifar10 --total-epochs 10
    timeout 590 python benchmarks/ablation.py --rows default koleo-0 --base --device cuda
    python benchmarks/ablation.py --minutes 5 --rows default simclr --base --validation-images 5000

Flags after --base are those of dinov2_cifar.py, for all runs. Each run is a process with a folder
beside the output. It may be stopped at any time (Ctrl-C, SIGTERM, timeout): the runs save, and the
same command continues. A finished run stays, until its settings change; delete its folder after a
change of the code or the images. Writes JSON and, beside it, a Markdown table.

All rows have as many epochs, unless a row sets its own, or --minutes gives each as many as it has
time for, by a first run of one epoch. Seconds are those of training, without evaluation, and mean
something only if nothing else ran on the machine.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from lightly_baseline import HAS_LIGHTLY, ROOT, dinov2
from throughput import environment

# The constants of lightly's example, whose learning rate is 1e-3 for a batch of 64
LIGHTLY_OWN = {"LEARNING_RATE": 4e-3, "WEIGHT_DECAY": 0.04, "WEIGHT_DECAY_END": 0.4}
LIGHTLY_OWN |= {"LAMBDA_IMG": 1.0, "LAMBDA_PATCH": 1.0, "LAMBDA_KOLEO": 0.1, "EMA_START": 0.992}
LIGHTLY_OWN |= {"EMA_END": 1.0, "FREEZE_PROTOTYPES": 0.02, "HEAD_BATCH_NORM": False}
LIGHTLY_OWN |= {"TEACHER_TEMP_START": 0.04, "TEACHER_TEMP_END": 0.07, "TEACHER_TEMP_WARMUP": 0.6}
LIGHTLY_OWN |= {"COMPILE": False}
PUBLISHED_TEMP = {"TEACHER_TEMP_START": 0.04, "TEACHER_TEMP_END": 0.07}
STRONG_JITTER = {"COLOR_JITTER": (0.6, 0.6, 0.6, 0.5), "COLOR_JITTER_PROB": 0.95}
PEER = {"BATCH_SIZE": 256, "GLOBAL_CROPS_NUMBER": 2, "LOCAL_CROPS_NUMBER": 0, "MASK_RATIO": 0.0}
SIMCLR = {**PEER, "STUDENT_TEMP": 0.2, "PROJECTION_DIM": 128}
VICREG = {**PEER, "PROJECTION_DIM": 512}
NO_LOCAL_LONGER = {"LOCAL_CROPS_NUMBER": 0, "TOTAL_EPOCHS": lambda c: round(1.5 * c.TOTAL_EPOCHS)}

# name: settings (values, or functions of the config that --base gives), why. *: run by default
ROWS = {
    "default*": ({}, "the constants of Config, with the flags of --base"),
    # Losses
    "patch-loss-0*": ({"LAMBDA_PATCH": 0.0}, "the student sees masks, but learns only from images"),
    "patch-loss-2": ({"LAMBDA_PATCH": 2.0}, "twice the published weight"),
    "no-masks": ({"MASK_RATIO": 0.0}, "no patch loss, no masked crops, and less time"),
    "random-masks": ({"MASK_KIND": "random"}, "single patches are easier to guess than blocks"),
    "block-masks": ({"MASK_KIND": "block"}, "as published"),
    "koleo-nearest": ({"KOLEO_KIND": "nearest"}, "as published: the nearest other image repels"),
    "koleo-cosine": ({"KOLEO_KIND": "cosine"}, "all other images repel"),
    "koleo-0*": ({"LAMBDA_KOLEO": 0.0}, "nothing but the targets spreads the features"),
    "koleo-0.05": ({"LAMBDA_KOLEO": 0.05}, "half the published weight"),
    "koleo-0.15": ({"LAMBDA_KOLEO": 0.15}, "one and a half times the published weight"),
    "koleo-0.5*": ({"LAMBDA_KOLEO": 0.5}, "five times the published weight"),
    "koleo-1.5": ({"LAMBDA_KOLEO": 1.5}, "spreading above all"),
    # Targets
    "no-sinkhorn*": ({"SINKHORN_ITERATIONS": 0}, "softmax alone: nothing balances the prototypes"),
    "teacher-temp-constant": ({"TEACHER_TEMP_START": lambda c: c.TEACHER_TEMP_END}, "no warm-up"),
    "teacher-temp-published*": (PUBLISHED_TEMP, "softer targets, as published"),
    "prototypes-64": ({"PROJECTION_DIM": 64}, "coarse targets"),
    "prototypes-128*": ({"PROJECTION_DIM": 128}, "one per image of a batch of 128"),
    "prototypes-1024": ({"PROJECTION_DIM": 1024}, "finer targets"),
    "prototypes-4096": ({"PROJECTION_DIM": 4096}, "the most that others use on small images"),
    "learned-prototypes*": ({"FREEZE_PROTOTYPES": 0.01}, "as published: frozen at the start only"),
    "no-batch-norm*": ({"HEAD_BATCH_NORM": False}, "as published: features keep what all share"),
    # Optimization
    "ema-0.5": ({"EMA_START": 0.5}, "a teacher that follows at once"),
    "ema-0.99": ({"EMA_START": 0.99}, "an average over 100 steps"),
    "ema-0.996*": ({"EMA_START": 0.996}, "as in DINO: an average over 250 steps"),
    "weight-decay-constant": ({"WEIGHT_DECAY_END": lambda c: c.WEIGHT_DECAY}, "no schedule"),
    "learning-rate-half": ({"LEARNING_RATE": lambda c: c.LEARNING_RATE / 2}, "is it too high?"),
    "learning-rate-double": ({"LEARNING_RATE": lambda c: c.LEARNING_RATE * 2}, "is it too low?"),
    "batch-64": ({"BATCH_SIZE": 64}, "more, emptier steps"),
    "batch-128": ({"BATCH_SIZE": 128}, "between the two"),
    "batch-256": ({"BATCH_SIZE": 256}, "fewer, fuller steps"),
    # Views
    "local-crops-0*": ({"LOCAL_CROPS_NUMBER": 0}, "global crops alone: fast steps"),
    "local-crops-0-longer": (NO_LOCAL_LONGER, "the same for about the default's time"),
    "local-crops-2": ({"LOCAL_CROPS_NUMBER": 2}, "few small views per step"),
    "local-crops-10": ({"LOCAL_CROPS_NUMBER": 10}, "many small views per step"),
    "local-size-32": ({"LOCAL_CROP_SIZE": 32}, "parts of an image, enlarged: 4x the tokens"),
    "local-scale-0.05": ({"LOCAL_CROPS_SCALE": (0.05, 0.4)}, "parts as small as published"),
    "global-scale-0.25*": ({"GLOBAL_CROPS_SCALE": (0.25, 1.0)}, "targets from smaller parts"),
    "no-color-jitter": ({"COLOR_JITTER_PROB": 0.0}, "color may be used as it is"),
    "strong-color-jitter": (STRONG_JITTER, "as --quick: color must be ignored"),
    "grayscale-0": ({"GRAYSCALE_PROB": 0.0}, "no view without color"),
    "grayscale-0.5": ({"GRAYSCALE_PROB": 0.5}, "half of the views without color"),
    # Network
    "drop-path-0.1": ({"DROP_PATH": 0.1}, "as published for smaller models"),
    "layer-scale": ({"LAYER_SCALE": 1e-5}, "as published"),
    "registers-4": ({"REGISTER_TOKENS": 4}, "as in DINOv2 with registers"),
    # lightly_baseline.py instead of dinov2_cifar.py
    "lightly*": ({"COMPILE": False}, "lightly's parts, with our constants and schedules"),
    "lightly-own": (LIGHTLY_OWN, "the same with the constants of lightly's example"),
    # peers.py instead of dinov2_cifar.py
    "simclr": (SIMCLR, "pairs of views against all others of the batch"),
    "vicreg": (VICREG, "pairs of views, and decorrelated features"),
}
for peer in ("simclr", "vicreg"):  # the rest of their search
    settings = ROWS[peer][0]
    for change in ("half", "double"):
        rate = ROWS[f"learning-rate-{change}"][0]
        ROWS[f"{peer}-rate-{change}"] = ({**settings, **rate}, f"{change} the learning rate")
    ROWS[f"{peer}-scale-0.2"] = ({**settings, "GLOBAL_CROPS_SCALE": (0.2, 1.0)}, "smaller crops")
SCRIPTS = {  # of rows whose names start so, and its first words
    "lightly": ["benchmarks/lightly_baseline.py"],
    "simclr": ["benchmarks/peers.py", "simclr"],
    "vicreg": ["benchmarks/peers.py", "vicreg"],
}
TELLING = [name.rstrip("*") for name in ROWS if name.endswith("*")]
ROWS = {name.rstrip("*"): row for name, row in ROWS.items()}


def flags(settings):
    """Return the command-line words of Config(**settings)."""
    words = []
    for name, value in settings.items():
        flag = name.lower().replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        values = value if isinstance(value, (tuple, list)) else [value]
        words += [f"--{flag}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words


def changes(name, base):
    """Return the settings of a row, given the words of --base."""
    config = dinov2.parse_arguments(base)
    return {key: v(config) if callable(v) else v for key, v in ROWS[name][0].items()}


def choose_rows(names, base):
    """Return the names of the rows that can be run; print why the others cannot."""
    chosen, default = [], dinov2.parse_arguments(base).to_dict()
    for name in names:
        try:
            same = dinov2.Config(**default | changes(name, base)).to_dict() == default
            if name.startswith("lightly"):
                dinov2.require(HAS_LIGHTLY, "pip install lightly==1.6.0 timm==1.0.31")
            elif name.split("-")[0] not in SCRIPTS:
                dinov2.require(name == "default" or not same, "it is the default")
            chosen.append(name)
        except dinov2.InputError as error:
            print(f"{name} is left out: {error}")
    return chosen


# ---- Runs: each is a process with a folder ----


class Run:
    """The run of a row with a seed; its folder says how far it is."""

    def __init__(self, name, seed, base, work, epochs=None):
        self.name, self.seed, self.error = name, seed, None
        self.folder = work / f"{name}-seed{seed}"
        self.script = SCRIPTS.get(name.split("-")[0], ["dinov2_cifar.py"])
        own, last = changes(name, base), {"SEED": seed, "OUTPUT_DIR": os.path.relpath(self.folder)}
        if epochs:
            own.pop("TOTAL_EPOCHS", None)
            last["TOTAL_EPOCHS"] = epochs
        self.flags, first = shlex.join(flags(own)), ["--eval-every", "0", "--save-every", "0"]
        self.words = [*first, *base, *flags(own), *flags(last)]

    def records(self, event):
        path = self.folder / "metrics.jsonl"
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return [row for row in rows if row["event"] == event]

    def has(self, checkpoint):
        """Return whether the folder has this checkpoint, of a run with these settings."""
        settings = json.loads(json.dumps(dinov2.parse_arguments(self.words).to_dict()))
        saved = [row["config"] for row in self.records("start")]
        for config in (settings, *saved):
            config["OUTPUT_DIR"] = config["RESUME"] = ""
        return saved == [settings] and (self.folder / f"dinov2_{checkpoint}.pth").exists()

    def start(self):
        """Start or resume the process; its output goes to progress.txt."""
        resume = self.has("last")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            here = environment(dinov2.parse_arguments(self.words))
            (self.folder / "environment.json").write_text(json.dumps(here))
        script, *first = self.script
        command = [sys.executable, str(ROOT / script), *first, *self.words, *["--resume"] * resume]
        with open(self.folder / "progress.txt", "a") as progress:
            self.process = subprocess.Popen(command, stdout=progress, stderr=subprocess.STDOUT)
        return self

    def finish(self):
        """Note the error of the ended process, if any."""
        if code := self.process.returncode:
            lines = (self.folder / "progress.txt").read_text().strip().splitlines()
            self.error = f"exit code {code}: {lines[-1][-200:] if lines else 'no message'}"

    def epochs_in(self, seconds):
        """Return how many whole epochs like this finished one fit, at least one."""
        dinov2.require(self.has("final"), f"{self.name}: {self.error or 'has not finished'}")
        steps = self.records("step")
        first, last = steps[0], steps[-1]
        if len(steps) == 1:
            return max(1, int(seconds / last["seconds"]))
        step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
        start = first["seconds"] - first["step"] * step  # compiling
        return max(1, int((seconds - start) / (step * last["step"])))

    def result(self):
        """Return the numbers of a finished run, or its error, as plain values; None before."""
        command = shlex.join(["python", *self.script, *self.words])
        found = {"row": self.name, "seed": self.seed, "flags": self.flags, "command": command}
        if self.error:
            return found | {"failed": self.error}
        if not self.has("final"):
            return None
        (self.folder / "dinov2_last.pth").unlink(missing_ok=True)  # many runs would fill a disk
        here = json.loads((self.folder / "environment.json").read_text())
        found |= {key: here[key] for key in ("device", "cpu", "torch", "commit", "date")}
        epoch, baseline = self.records("epoch")[-1], self.records("baseline")[0]
        if "knn" not in epoch:
            return found | {"failed": "the images have no labels"}
        found |= {"baseline": baseline, "seconds": self.records("step")[-1]["seconds"]}
        return found | {key: epoch[key] for key in ("knn", "linear", "rank", "epoch")}


def run_all(runs, at_once, save):
    """Run what is not finished; SystemExit if a signal asks for it, when the runs have saved."""
    waiting, active = [run for run in runs if not run.has("final")], []
    with dinov2.StopRequest() as stop:
        while (waiting or active) and not stop.signal:
            for run in [run for run in active if run.process.poll() is not None]:
                active.remove(run)
                run.finish()
                print(f"{run.name}, seed {run.seed}: {run.error or 'done'}", flush=True)
                save()
            while waiting and len(active) < at_once:
                active.append(waiting.pop(0).start())
            time.sleep(0.1)
        for run in active:
            run.process.terminate()
        for run in active:
            run.process.wait()
    if stop.signal:
        print("stopped; the same command continues")
        sys.exit(128 + stop.signal)


# ---- The table ----

COLUMNS = {"linear": "{:.1%}", "rank": "{:.0f}", "epoch": "{:.0f}", "seconds": "{:,.0f}"}


def spread(values, form="{:.1%}"):
    """Return "mean (least..most)", percentages without their sign."""
    texts = [form.format(x).rstrip("%") for x in (mean(values), min(values), max(values))]
    return texts[0] if texts[1] == texts[2] else "{} ({}..{})".format(*texts)


def difference(knn, default):
    """Return the difference of the means in points, in parentheses if within a spread."""
    points = 100 * (mean(knn) - mean(default))
    noise = 100 * max(max(values) - min(values) for values in (knn, default))
    return f"({points:+.1f})" if abs(points) <= noise + 1e-9 else f"{points:+.1f}"


def markdown(results):
    """Return a Markdown table of what Run.result returns."""
    head = "row | flags | k-NN % | to default | linear % | RankMe | epochs | seconds"
    lines, rows = [f"| {head} |", "|---" * 8 + "|"], {}
    for result in results:
        rows.setdefault(result["row"], []).extend([result] * ("knn" in result))
    default = [result["knn"] for result in rows.get("default", [])]
    baselines = next(([result["baseline"] for result in row] for row in rows.values() if row), [])
    pixels = [{"knn": baseline["raw_pixels_knn"]} for baseline in baselines]
    for name, row in {"raw pixels": pixels, "untrained network": baselines, **rows}.items():
        if row:
            knn, words = [result["knn"] for result in row], row[0].get("flags")
            cells = [name, f"`{words}`" if words else "", spread(knn)]
            cells.append(difference(knn, default) if default and name != "default" else "")
            for key, form in COLUMNS.items():
                cells.append(spread([r[key] for r in row], form) if key in row[0] else "")
            lines.append(f"| {' | '.join(cells)} |")
    for result in results:
        if "failed" in result:
            text = result["failed"].replace("|", "/")
            lines.append(f"| {result['row']}, seed {result['seed']} | failed: {text} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the rows, then stop")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "all"], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="[0 1]")
    parser.add_argument("--minutes", type=float, help="of training, instead of equal epochs")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at a time [1]")
    parser.add_argument("--output", type=Path, help="[benchmarks/results/ablation-<device>.json]")
    parser.add_argument("--base", nargs=argparse.REMAINDER, default=[], help="last: flags of all")
    given = parser.parse_args(argv)
    if given.list:
        for name, (_, why) in ROWS.items():
            print(f"{name:24} {why}\n{'':24} {shlex.join(flags(changes(name, given.base)))}")
        return
    config = dinov2.parse_arguments(given.base)
    here, kind = environment(config), config.DEVICE.split(":")[0]
    output = given.output or ROOT / "benchmarks" / "results" / f"ablation-{kind}.json"
    work = output.with_suffix("")
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n")
    if given.at_once > 1:  # each run gets its share of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, here["cores"] // given.at_once)))
    names = choose_rows(ROWS if given.rows == ["all"] else given.rows or TELLING, given.base)
    epochs = dict.fromkeys(names)
    if given.minutes is not None:
        dinov2.require(given.minutes > 0, f"--minutes ({given.minutes}) must be above 0")
        pilots = [Run(name, 0, given.base, work / f"pilot-{given.at_once}", 1) for name in names]
        print("one epoch of each row, for its speed:")
        run_all(pilots, given.at_once, lambda: None)
        epochs = {run.name: run.epochs_in(60 * given.minutes) for run in pilots}
    pairs = [(name, seed) for seed in given.seeds for name in names]
    runs = [Run(name, seed, given.base, work, epochs[name]) for name, seed in pairs]

    def save():
        results = [result for run in runs if (result := run.result())]
        text = json.dumps({**here, "at_once": given.at_once, "runs": results}, indent=1)
        dinov2.write_file(output, text.encode())
        commits = ", ".join(sorted({str(r["commit"]) for r in results if "commit" in r}))
        title = f"{here['device']} ({here['cpu']}), {here['precision']}, torch {here['torch']}"
        table = f"{title}, commit {commits}. `{here['command']}`\n\n{markdown(results)}\n"
        dinov2.write_file(output.with_suffix(".md"), table.encode())

    run_all(runs, given.at_once, save)
    save()
    print(f"\n{output.with_suffix('.md').read_text()}\n{output}")
    sys.exit(int(any(run.error for run in runs)))


if __name__ == "__main__":
    try:
        main()
    except dinov2.InputError as error:
        dinov2.exit_with_error(error)
