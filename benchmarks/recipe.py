"""What each ingredient of dinov2_cifar.py brings: one change at a time, all for the same training time on the same data.

    python benchmarks/recipe.py --data cifar.npz                              # the telling rows on a CPU, all on CUDA
    python benchmarks/recipe.py --list                                        # every row: its flags, and why
    python benchmarks/recipe.py --data cifar10 --rows default koleo-0 --minutes 2 --seeds 0 1 2
    python benchmarks/recipe.py --data cifar.npz --at-once 2                  # two runs at a time, each with half of the cores
    python benchmarks/recipe.py --data cifar.npz --base --model-size tiny --patch-size 8    # --base comes last: all rows share it

Writes recipe-<device>.json, .md (the table) and .png (k-NN accuracy against minutes) into benchmarks/results. Stop it at
any time and give the same command again: a finished (row, seed) stays, an unfinished one
resumes. A row whose settings, data, minutes, machine or code (of dinov2_cifar.py, comments apart)
have changed is run again.

Equal time: a row first times some steps, which sets its TOTAL_EPOCHS: whole epochs, at least one, so look at the seconds.
Evaluation is not part of them. The records of steps in metrics.jsonl give the speed; records that
end with an evaluation or hold the first step, which compiles, count at the median of the others.
lightly's parts (throughput.py) train by the clock, so that they get the budget exactly; stopped, they begin again.

How to read the table: k-NN, linear and RankMe are of the teacher, the mean over seeds with (least..most). "To default" is
in points of k-NN; it is "within the seeds' spread" where it is no larger than most − least of the row or of the default.
H(t) / ln K is the entropy of the teacher's targets in the last epoch: near 1 they say nothing.

Weights of losses are in the published units: KoLeo is the sum over the global crops, and the patch
loss is divided by all of them. Tables up to commit 2cf02d1 had other units: their LAMBDA_KOLEO x is
x / 2 here, their LAMBDA_PATCH y is 2 y.
"""

import argparse
import ast
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import dinov2_cifar as dinov2  # noqa: E402, it lies one folder up
import throughput  # noqa: E402, it lies beside


# ----------------------------------------------------------------------------------------------------------------------
# The rows: each changes the default in what it names
# ----------------------------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    name: str
    group: str  # rows of a group share a panel of the figure
    settings: dict  # setting: value, or a function of the shared Config that gives the value
    why: str


# As in lightly's example, whose units of the losses are those of Config; 1e-3 at a batch of 64
LIGHTLY_OWN = dict(LEARNING_RATE=4e-3, WEIGHT_DECAY=0.04, WEIGHT_DECAY_END=0.4,
                   EMA_START=0.992, EMA_END=1.0,
                   LAMBDA_IMG=1.0, LAMBDA_PATCH=1.0, LAMBDA_KOLEO=0.1,
                   TEACHER_TEMP_START=0.04, TEACHER_TEMP_END=0.07, TEACHER_TEMP_WARMUP=0.6,
                   FREEZE_PROTOTYPES=0.02, HEAD_BATCH_NORM=False)

ROWS = [Row(*row) for row in (
    ("default", "default", {}, "the constants of Config, with what --base changes"),
    ("patch-loss-0", "losses", {"LAMBDA_PATCH": 0.0}, "nothing is learned from the patches; the student still sees masked crops"),
    ("patch-loss-2", "losses", {"LAMBDA_PATCH": 2.0}, "twice the published weight"),
    ("no-masks", "losses", {"MASK_RATIO": 0.0}, "neither patch loss nor masked crops, which also saves their time"),
    ("random-masks", "losses", {"MASK_KIND": "random"}, "patches masked one by one are easier to guess than blocks"),
    ("block-masks", "losses", {"MASK_KIND": "block"}, "as published"),
    ("koleo-nearest", "losses", {"KOLEO_KIND": "nearest"},
     "as published: the nearest other image repels"),
    ("koleo-cosine", "losses", {"KOLEO_KIND": "cosine"}, "all other images are pushed away"),
    ("koleo-0", "losses", {"LAMBDA_KOLEO": 0.0}, "nothing but the targets spreads the features"),
    ("koleo-0.05", "losses", {"LAMBDA_KOLEO": 0.05}, "half the published weight"),
    ("koleo-0.15", "losses", {"LAMBDA_KOLEO": 0.15}, "one and a half times the published weight"),
    ("koleo-0.5", "losses", {"LAMBDA_KOLEO": 0.5}, "five times the published weight"),
    ("koleo-1.5", "losses", {"LAMBDA_KOLEO": 1.5}, "spreading above all"),
    ("no-sinkhorn", "targets", {"SINKHORN_ITERATIONS": 0}, "softmax alone: nothing balances the prototypes"),
    ("teacher-temp-constant", "targets", {"TEACHER_TEMP_START": lambda c: c.TEACHER_TEMP_END}, "no warm-up of the temperature"),
    ("teacher-temp-published", "targets", {"TEACHER_TEMP_START": 0.04, "TEACHER_TEMP_END": 0.07}, "softer targets, as published"),
    ("prototypes-64", "targets", {"PROJECTION_DIM": 64}, "coarse targets"),
    ("prototypes-128", "targets", {"PROJECTION_DIM": 128}, "one per image of a batch of 128"),
    ("prototypes-1024", "targets", {"PROJECTION_DIM": 1024}, "finer targets"),
    ("prototypes-4096", "targets", {"PROJECTION_DIM": 4096},
     "the most that others use on small images"),
    ("learned-prototypes", "targets", {"FREEZE_PROTOTYPES": 0.01},
     "as published: frozen only at the start"),
    ("no-batch-norm", "targets", {"HEAD_BATCH_NORM": False}, "as published: features keep what they all share"),
    ("ema-0.5", "optimisation", {"EMA_START": 0.5}, "a teacher that follows at once"),
    ("ema-0.99", "optimisation", {"EMA_START": 0.99}, "an average over 100 steps"),
    ("ema-0.996", "optimisation", {"EMA_START": 0.996}, "DINO's start, an average over 250 steps"),
    ("weight-decay-constant", "optimisation", {"WEIGHT_DECAY_END": lambda c: c.WEIGHT_DECAY}, "no schedule of the weight decay"),
    ("learning-rate-half", "optimisation", {"LEARNING_RATE": lambda c: c.LEARNING_RATE / 2}, "is the default too high?"),
    ("learning-rate-double", "optimisation", {"LEARNING_RATE": lambda c: c.LEARNING_RATE * 2}, "is the default too low?"),
    ("batch-64", "optimisation", {"BATCH_SIZE": 64}, "more, emptier steps"),
    ("batch-128", "optimisation", {"BATCH_SIZE": 128}, "between the two"),
    ("batch-256", "optimisation", {"BATCH_SIZE": 256}, "fewer, fuller steps"),
    ("local-crops-0", "crops", {"LOCAL_CROPS_NUMBER": 0}, "global crops alone: fast steps"),
    ("local-crops-2", "crops", {"LOCAL_CROPS_NUMBER": 2}, "few small views a step"),
    ("local-crops-10", "crops", {"LOCAL_CROPS_NUMBER": 10}, "many small views a step"),
    ("local-size-32", "crops", {"LOCAL_CROP_SIZE": 32},
     "parts of an image, drawn large: 4x the tokens"),
    ("local-scale-0.05", "crops", {"LOCAL_CROPS_SCALE": (0.05, 0.4)}, "parts as small as the published ones"),
    ("global-scale-0.25", "crops", {"GLOBAL_CROPS_SCALE": (0.25, 1.0)},
     "smaller parts of an image as targets"),
    ("no-colour-jitter", "colours", {"COLOR_JITTER_PROB": 0.0}, "colour may be used as it is"),
    ("strong-colour-jitter", "colours", {"COLOR_JITTER": (0.6, 0.6, 0.6, 0.5), "COLOR_JITTER_PROB": 0.95}, "the --quick values: colour must be ignored"),
    ("grayscale-0", "colours", {"GRAYSCALE_PROB": 0.0}, "no view without colours"),
    ("grayscale-0.5", "colours", {"GRAYSCALE_PROB": 0.5}, "half of the views without colours"),
    ("drop-path-0.1", "network", {"DROP_PATH": 0.1}, "as published for smaller models"),
    ("layer-scale", "network", {"LAYER_SCALE": 1e-5}, "as published"),
    ("registers-4", "network", {"REGISTER_TOKENS": 4}, "as in DINOv2 with registers"),
    # Half the patch weight, as in the recorded results, in whose units the weights were equal
    ("lightly", "lightly", {"LAMBDA_PATCH": lambda c: c.LAMBDA_PATCH / 2},
     "lightly's parts with our constants and schedules, at equal size, crops and time"),
    ("lightly-own", "lightly", LIGHTLY_OWN, "the same with the constants of lightly's example"),
)]
CPU_ROWS = ("default", "patch-loss-0", "koleo-0", "koleo-0.5", "no-sinkhorn",
            "teacher-temp-published", "prototypes-128", "learned-prototypes", "no-batch-norm",
            "ema-0.996", "local-crops-0", "global-scale-0.25", "lightly")
NOT_LIGHTLYS = ("REGISTER_TOKENS", "LAYER_SCALE", "DROP_PATH", "DROPOUT", "FLIP", "KOLEO_KIND", "MASK_KIND", "MASK_RATIO", "MASK_PROB", "STUDENT_TEMP",
                "SINKHORN_ITERATIONS", "ACCUMULATE")  # settings that do not reach lightly's parts
OF_A_RUN = ("SEED", "TOTAL_EPOCHS", "OUTPUT_DIR", "RESUME", "EVAL_EVERY", "SAVE_EVERY", "SAVE_EVERY_MINUTES", "DATASET", "DATA_PATH")  # no part of a row's recipe


def changes(row, base):
    """→ dict of what the row sets, given the settings (dict) that all rows share."""
    config = dinov2.Config(**base)
    return {name: value(config) if callable(value) else value for name, value in row.settings.items()}


def is_lightly(row):
    return row.group == "lightly"


def choose_rows(names, base, at_once=1):
    """→ the rows that can be run, and a line for each that cannot: it is the default already, or Config refuses it."""
    config, rows, lines = dinov2.Config(**base), [], []
    for row in (row for row in ROWS if row.name in names):
        try:
            changed = dinov2.Config(**{**base, **changes(row, base)}).to_dict() != config.to_dict()
        except dinov2.InputError as error:
            lines.append(f"{row.name} is left out: {error}")
            continue
        if is_lightly(row) and not all(importlib.util.find_spec(name) for name in ("lightly", "timm")):
            lines.append(f"{row.name} is left out; to have it: pip install lightly==1.6.0 timm==1.0.31")
        elif is_lightly(row) and at_once > 1:
            lines.append(f"{row.name} is left out: its loader takes all cores, so it needs --at-once 1")
        elif is_lightly(row) and (config.GLOBAL_CROPS_NUMBER != 2 or not config.LOCAL_CROPS_NUMBER):
            lines.append(f"{row.name} is left out: it needs two global crops and some local ones")
        elif is_lightly(row) and (others := [name for name in NOT_LIGHTLYS if getattr(config, name) != getattr(dinov2.Config, name)]):
            lines.append(f"{row.name} is left out: {', '.join(others)} would not reach its parts")
        elif not changed and row.name != "default" and not is_lightly(row):
            lines.append(f"{row.name} is left out: it is the default")
        else:
            rows.append(row)
    return rows, lines


def flags(settings):
    """→ the command-line words that say the same as Config(**settings)."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.lower().replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, (tuple, list)) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [flag, *map(str, values)]
    return words


# ----------------------------------------------------------------------------------------------------------------------
# Equal time
# ----------------------------------------------------------------------------------------------------------------------

def epochs_for(budget, seconds_a_step, steps_per_epoch):
    """→ the whole number of epochs, at least 1, whose training comes closest to the budget in seconds."""
    return max(1, round(budget / (seconds_a_step * steps_per_epoch)))


def evaluation_interval(epochs):
    """→ EVAL_EVERY that makes about five points of a curve."""
    return max(1, round(epochs / 5))


def training_clock(records, starts):
    """records of metrics.jsonl → {step: seconds of training up to it}, without evaluations.

    starts: the steps at which the run was started: 0, and those of the resumed checkpoints.
    """
    config = next(r for r in records if r["event"] == "start")["config"]
    batch = dinov2.images_per_step(SimpleNamespace(**config))
    evaluated = {r["step"] for r in records if r["event"] == "epoch" and "knn" in r}
    windows, before = [], 0
    for r in (r for r in records if r["event"] == "step"):
        clean = before not in starts and r["step"] not in evaluated
        windows.append((r["step"], r["step"] - before, batch / r["images_per_second"], clean))
        before = r["step"]
    usual = median([seconds for *_, seconds, clean in windows if clean] or [windows[-1][2]])
    clock = {0: 0.0}
    for step, count, seconds, clean in windows:  # seconds of one step
        clock[step] = clock[step - count] + count * (seconds if clean else usual)
    return clock


def read_run(folder, starts, epochs):
    """→ the figures of a finished run from its metrics.jsonl, or None where its last epoch is not there yet."""
    path = Path(folder, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]  # whole lines
    scored = [r for r in records if r["event"] == "epoch" and "knn" in r]
    if not scored or scored[-1]["epoch"] < epochs:
        return None
    config, baseline = (next(r for r in records if r["event"] == event) for event in ("start", "baseline"))
    last, clock, config = scored[-1], training_clock(records, starts), config["config"]
    batch = dinov2.images_per_step(SimpleNamespace(**config))
    return {**{key: last[key] for key in ("knn", "linear", "rank") if key in last},
            "entropy": last["teacher_entropy"] / math.log(config["PROJECTION_DIM"]),
            "steps": last["step"], "seconds": clock[last["step"]],
            "images_per_second": last["step"] * batch / clock[last["step"]],
            "curve": [[0.0, baseline["knn"]], *([clock[r["step"]] / 60, r["knn"]] for r in scored)],
            "baseline": {key: value for key, value in baseline.items() if key != "event"}}


# ----------------------------------------------------------------------------------------------------------------------
# lightly's parts, made to learn
# ----------------------------------------------------------------------------------------------------------------------

class ScheduledLightly(throughput.Lightly):
    """throughput.Lightly with a teacher that starts as its student, and Config's schedules and weights of the losses."""

    def __init__(self, config, images, mean, std):
        super().__init__(config, images, mean, std)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher_heads.load_state_dict(self.student_heads.state_dict())
        self.teacher_heads.train()                               # batch norm by the batch: the average takes no running means along
        groups = {"matrices": [], "vectors": [], "prototypes": []}
        for name, parameter in [*self.student.named_parameters(), *self.student_heads.named_parameters()]:
            vector = parameter.ndim == 1 or parameter.shape[:2] == (1, 1)                         # biases, norms, single tokens
            groups["prototypes" if "last_layer" in name else "vectors" if vector else "matrices"].append(parameter)
        self.optimizer = torch.optim.AdamW([{"name": name, "params": parameters} for name, parameters in groups.items()], lr=0.0)

    def train_step(self):
        """A step with self.settings, which are what Schedules.at gives."""
        from lightly.models.utils import update_momentum
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["prototype_lr" if group["name"] == "prototypes" else "lr"]
            group["weight_decay"] = 0.0 if group["name"] == "vectors" else self.settings["weight_decay"]
        with dinov2.autocast(self.config):
            loss = self.losses([view.to(self.config.DEVICE, non_blocking=True) for view in self.views])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.CLIP_GRAD or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for student, teacher in ((self.student, self.teacher), (self.student_heads, self.teacher_heads)):
            update_momentum(student, teacher, m=self.settings["momentum"])

    def losses(self, views):
        """As throughput's, with this step's temperature and the weights of config."""
        from lightly.models.utils import random_block_mask
        c, temperature, side = self.config, self.settings["teacher_temp"], self.config.GLOBAL_CROP_SIZE // self.config.PATCH_SIZE
        global_views, local_views = torch.cat(views[:2]), torch.cat(views[2:])
        block_mask = random_block_mask((len(global_views), side, side), min_num_masks_per_block=min(4, side ** 2 // 10),  # 4 is too many of 16
                                       device=global_views.device)
        mask = nn.functional.pad(block_mask.flatten(1), (1, 0))  # never the class token
        with torch.no_grad():
            target = self.teacher.encode(global_views)
            target_images, target_patches = self.teacher_heads["image"](target[:, 0]), self.teacher_heads["patch"](target[mask])
        tokens = self.student.encode(global_views, mask=mask)
        class_tokens = tokens[:, 0]
        images = torch.cat([self.student_heads["image"](part) for part in (class_tokens, self.student.encode(local_views)[:, 0])])
        image_loss = self.dino_loss(target_images.chunk(2), images.chunk(len(views)), teacher_temp=temperature)
        patch_loss = self.ibot_loss(target_patches, self.student_heads["patch"](tokens[mask]), block_mask, teacher_temp=temperature)
        koleo = sum(self.koleo_loss(part) for part in class_tokens.chunk(2))
        return c.LAMBDA_IMG * image_loss + c.LAMBDA_PATCH * patch_loss + c.LAMBDA_KOLEO * koleo


class AsBackbone(nn.Module):
    """lightly's network as dinov2_cifar's evaluation takes one."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x):
        tokens = self.network.encode(x)
        return tokens[:, 0], tokens[:, 1:]


def work_lightly(job):
    """Trains lightly's parts for job["seconds"] → the figures that `read_run` gives of ours."""
    config, budget = dinov2.Config(**job["settings"]), job["seconds"]
    images = dinov2.prepare_images(config)
    pixels = dinov2.channel_mean_std(images.train_images)
    torch.manual_seed(config.SEED)
    peer, schedules = ScheduledLightly(config, images, *pixels), dinov2.Schedules(config, 1000)
    judged = SimpleNamespace(config=config, teacher=AsBackbone(peer.teacher, *pixels).to(config.DEVICE).eval())
    scores = baseline = dinov2.evaluate(judged, images, linear=True)
    curve, steps, seconds = [[0.0, baseline["knn"]]], 0, 0.0
    while seconds < budget:
        peer.settings = schedules.at(int(1000 * seconds / budget))
        start = time.perf_counter()
        peer.step()
        throughput.synchronize(config.DEVICE)
        steps, seconds = steps + 1, seconds + (time.perf_counter() - start) * (steps > 0)         # the first step starts the loader
        if seconds >= budget * len(curve) / 5:                   # meanwhile the loader prepares views, to lightly's advantage
            scores = dinov2.evaluate(judged, images, linear=seconds >= budget)
            curve.append([seconds / 60, scores["knn"]])
    peer.batches = None
    speed = steps * config.BATCH_SIZE / seconds
    return {**scores, "steps": steps, "seconds": seconds, "images_per_second": speed,
            "curve": curve, "baseline": baseline}


def work_speed(job):
    """→ seconds a step of ours, after a warm-up, on the very images."""
    config = dinov2.Config(**job["settings"])
    images = dinov2.prepare_images(config)
    ours = throughput.Ours(config, images, *dinov2.channel_mean_std(images.train_images))
    throughput.time_blocks(ours.step, ours.warm_up, config.DEVICE)
    return {"seconds_a_step": mean(throughput.time_blocks(ours.step, 8, config.DEVICE))}


# ----------------------------------------------------------------------------------------------------------------------
# Runs, each a process of its own
# ----------------------------------------------------------------------------------------------------------------------

class Setup(NamedTuple):
    """What all runs share."""
    base: dict  # settings
    minutes: float
    data: dict  # what `data_mark` gives
    machine: dict  # what throughput.describe gives
    work: Path  # folder with a folder a run
    at_once: int = 1  # runs at a time, each with its share of the cores

    def settings(self, row):
        return {**self.base, **changes(row, self.base)}

    def threads(self):
        return max(1, self.machine["cores"] // self.at_once)

    def folder(self, run):
        return self.work / f"{run['row']}-seed{run['seed']}"


class RunFailed(RuntimeError):
    """A run ended with an error; the message is its last line."""


CHILDREN = set()  # processes at work; they end with this program
STOPPING = threading.Event()  # from then on nothing may start


def call(words, folder):
    """Runs Python with these words, its progress and errors in folder/progress.txt → what it printed."""
    with open(folder / "progress.txt", "w") as progress:
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=progress, text=True)
        CHILDREN.add(process)
        if STOPPING.is_set():
            process.terminate()
        printed, _ = process.communicate()
        CHILDREN.discard(process)
    if process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM):
        raise SystemExit(143)                                    # stopped, by this program perhaps: not a failure of the row
    if process.returncode:
        last = re.split(r"[\r\n]+", (folder / "progress.txt").read_text().strip())[-1]
        raise RunFailed(last[:200] or f"exit code {process.returncode}")
    return printed


def call_worker(work, folder, **job):
    """→ the figures of work_speed or work_lightly, from a fresh process."""
    return json.loads(call([__file__, "--job", json.dumps({"work": work, **job})], folder).splitlines()[-1])


def data_mark(base):
    """→ dict of name, numbers and checksum of the images; InputError where labels are missing."""
    images = dinov2.prepare_images(dinov2.Config(**{**base, "DEVICE": "cpu"}))
    parts, checksum = images[:4], 0
    if any(part is None for part in parts):
        folders = "train/<class>/… and test/<class>/…"
        raise dinov2.InputError(f"{images.name} must have labelled images in {folders}")
    for part in parts:
        checksum = zlib.crc32(part.contiguous().numpy(), checksum)
    counts = {"train": len(parts[0]), "test": len(parts[2])}
    return {"name": images.name, **counts, "checksum": f"{checksum:08x}"}


@lru_cache(maxsize=None)
def code_mark(*sources):
    """→ a checksum of Python sources that comments and docstrings do not change."""
    trees = [ast.parse(source) for source in sources]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    return f"{zlib.crc32(''.join(map(ast.dump, trees)).encode()):08x}"


def identity(row, setup):
    """→ dict of plain values, the same as long as a finished run of this row need not be repeated."""
    settings = dinov2.Config(**setup.settings(row)).to_dict()
    peer = [inspect.getsource(part) for part in (throughput.Lightly, ScheduledLightly, work_lightly)] if is_lightly(row) else []
    machine = setup.machine["device"] if torch.device(settings["DEVICE"]).type == "cuda" else [setup.machine["cpu"], setup.machine["cores"]]
    return json.loads(json.dumps({
        "settings": {name: value for name, value in settings.items() if name not in OF_A_RUN}, "data": setup.data, "minutes": setup.minutes,
        "machine": machine, "at once": setup.at_once, "code": code_mark((ROOT / "dinov2_cifar.py").read_text(), *peer)}))


def standing(run, same):
    """→ "new", "unfinished" or "finished": how a run (dict or None) stands to what identity gives now."""
    return "new" if run is None or run["identity"] != same else "finished" if "knn" in run else "unfinished"


def run_all(rows, seeds, runs, setup, save):
    """All rows with the first seed, then with the next. runs: dict "row seed": run, kept by save() at every change."""
    lock, waiting = threading.Lock(), []
    for seed in seeds:
        for row in rows:
            name, same = f"{row.name} {seed}", identity(row, setup)
            stands = standing(runs.get(name), same)
            if stands == "new":
                runs[name] = {"row": row.name, "seed": seed, "identity": same, "starts": [0]}
                shutil.rmtree(setup.folder(runs[name]), ignore_errors=True)
            if stands != "finished":
                runs[name].pop("error", None)
                waiting.append((row, runs[name]))

    def keep(run, **values):                                     # the one place where runs change while others are at work
        with lock:
            run.update(values)
            save()

    def work(pair):
        row, run = pair
        name = f"{row.name} {run['seed']}"
        setup.folder(run).mkdir(parents=True, exist_ok=True)
        try:
            (run_lightly if is_lightly(row) else run_ours)(row, run, runs, setup, keep)
            print(f"{name}: k-NN {run['knn']:.1%} after {run['seconds'] / 60:.1f} minutes of training", flush=True)
        except RunFailed as error:
            keep(run, error=str(error))
            print(f"{name}: failed: {error}", flush=True)

    pool = ThreadPoolExecutor(setup.at_once)
    STOPPING.clear()
    try:
        if setup.at_once == 1:
            list(map(work, waiting))
        else:
            os.environ["OMP_NUM_THREADS"] = str(setup.threads())  # for the runs
            for future in [pool.submit(work, pair) for pair in waiting]:
                future.result()
    finally:
        STOPPING.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(CHILDREN):
            process.terminate()


def run_ours(row, run, runs, setup, keep):
    """Trains, or resumes; puts the command and the figures into the run. RunFailed if it fails."""
    folder, checkpoint = setup.folder(run), setup.folder(run) / "dinov2_last.pth"
    if "epochs" not in run:
        # A stopped run resumes with as many
        keep(run, epochs=choose_epochs(row, run, runs, setup))
    settings = {**setup.settings(row), "SEED": run["seed"], "TOTAL_EPOCHS": run["epochs"], "EVAL_EVERY": evaluation_interval(run["epochs"]),
                "SAVE_EVERY": 0, "OUTPUT_DIR": os.path.relpath(folder)}
    if read_run(folder, run["starts"], run["epochs"]) is None:
        if checkpoint.exists():
            keep(run, starts=sorted({*run["starts"], dinov2.read_checkpoint(checkpoint)["step"]}))
        call([str(ROOT / "dinov2_cifar.py"), *flags(settings), *["--resume"] * checkpoint.exists()], folder)
    finish(run, keep, shlex.join(["python", "dinov2_cifar.py", *flags(settings)]), read_run(folder, run["starts"], run["epochs"]))
    for file in folder.glob("*.pth"):                            # of a hundred runs they would fill a disk
        file.unlink()


def finish(run, keep, command, figures):
    keep(run, command=command, **figures, commit=throughput.git("rev-parse", "--short", "HEAD"), date=time.strftime("%Y-%m-%d %H:%M"))


def choose_epochs(row, run, runs, setup):
    """→ TOTAL_EPOCHS of a run: as the row's other seeds have it, else from the speed of some steps."""
    for other in list(runs.values()):
        if other["row"] == row.name and other["identity"] == run["identity"] and "epochs" in other:
            return other["epochs"]
    settings = setup.settings(row)
    speed = call_worker("speed", setup.folder(run), settings=settings)["seconds_a_step"]
    steps_per_epoch = setup.data["train"] // dinov2.images_per_step(dinov2.Config(**settings))
    return epochs_for(60 * setup.minutes, speed, steps_per_epoch)


def run_lightly(row, run, runs, setup, keep):
    """The same for lightly's parts, whose command is this program's."""
    shared = {"TRAIN_IMAGES": 0, **{name: value for name, value in setup.base.items() if name not in ("DATASET", "DEVICE")}}
    command = shlex.join(["python", "benchmarks/recipe.py", "--data", setup.base["DATASET"], "--device", setup.base["DEVICE"], "--minutes",
                          f"{setup.minutes:g}", "--seeds", str(run["seed"]), "--rows", row.name, "--output", f"{setup.work}.json", "--base", *flags(shared)])
    finish(run, keep, command, call_worker("lightly", setup.folder(run), settings={**setup.settings(row), "SEED": run["seed"]},
                                           seconds=60 * setup.minutes))


# ----------------------------------------------------------------------------------------------------------------------
# The table and the figure
# ----------------------------------------------------------------------------------------------------------------------

MEASURED = ("knn", "linear", "rank", "entropy", "steps", "seconds", "images_per_second")


def spread(values):
    """→ dict with mean, min, max and each of the values; None where there are none."""
    values = [value for value in values if value is not None]
    return {"mean": mean(values), "min": min(values), "max": max(values), "each": values} if values else None


def summarise(rows, runs, setup):
    """→ a dict for raw pixels, the untrained network and each row, from its runs with settings, data and code as they are now."""
    found = []
    for row in rows:
        same = identity(row, setup)
        mine = [run for run in runs.values() if run["row"] == row.name and run["identity"] == same]
        done, errors = [run for run in mine if "knn" in run], [run["error"] for run in mine if "error" in run]
        if done or errors:
            points = [list(zip(*point)) for point in zip(*(run["curve"] for run in done))]       # (minutes of all seeds, their k-NN)
            found.append({"row": row.name, "group": row.group, "flags": shlex.join(flags(changes(row, setup.base))), "why": row.why,
                          "seeds": [run["seed"] for run in done], "errors": errors, "commands": [run["command"] for run in done],
                          "before": [run["baseline"] for run in done],
                          **{key: spread([run.get(key) for run in done]) for key in MEASURED},
                          "curve": [[mean(minutes), mean(knn), min(knn), max(knn)] for minutes, knn in points]})
    return baselines(found) + found


def baselines(found):
    """→ the rows without training, from what the runs of the first row, the default if it was run, measured before theirs."""
    before = next((row["before"] for row in found if row["before"] and row["group"] != "lightly"), [])
    pixels = {"knn": spread([record.get("raw_pixels_knn") for record in before])}
    untrained = {key: spread([r.get(key) for r in before]) for key in ("knn", "linear", "rank")}
    return [{"row": name, "group": "baseline", "flags": "", **values}
            for name, values in (("raw pixels", pixels), ("untrained network", untrained)) if values["knn"]]


def difference(row, default):
    """→ the points of k-NN that a row is above the default, and whether that is within the seeds' spread."""
    if not row["knn"] or not default or not default["knn"] or row is default:
        return ""
    points = 100 * (row["knn"]["mean"] - default["knn"]["mean"])
    if row["group"] == "baseline":
        return f"{points:+.1f}"
    if min(len(part["knn"]["each"]) for part in (row, default)) < 2:
        return f"{points:+.1f}, one seed"
    widest = max(100 * (part["knn"]["max"] - part["knn"]["min"]) for part in (row, default))
    return f"{points:+.1f}" + ", within the seeds' spread" * (abs(points) <= widest + 1e-9)


def cell(value, form="{:.1f}", scale=1):
    """→ "mean (least..most)", the mean alone where all look the same, "–" where there is nothing."""
    if not value:
        return "–"
    middle, low, high = (form.format(scale * value[key]) for key in ("mean", "min", "max"))
    return middle if low == high else f"{middle} ({low}..{high})"


def markdown(summary, title):
    """→ the table and the commands as text."""
    default = next((row for row in summary if row["row"] == "default"), None)
    head = ["row", "flags", "k-NN %", "to default", "linear %", "RankMe", "H(t) / ln K", "steps",
            "seconds", "images/s"]
    lines = [title, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in summary:
        failed = "; ".join(f"failed: {error}" for error in dict.fromkeys(row.get("errors", []))).replace("|", "/")
        cells = [row["row"], f"`{row['flags']}`" if row["flags"] else "", "; ".join(filter(None, [row["knn"] and cell(row["knn"], scale=100), failed])),
                 difference(row, default), cell(row.get("linear"), scale=100), cell(row.get("rank"), "{:.0f}"),
                 cell(row.get("entropy"), "{:.2f}"),
                 *(cell(row.get(key), "{:,.0f}") for key in MEASURED[-3:])]
        lines.append(f"| {' | '.join(cells)} |")
    commands = [command for row in summary for command in row.get("commands", [])]
    return "\n".join([*lines, "", "The mean over the seeds, with (least..most). The commands:", "", "```bash", *commands, "```", ""])


def draw(summary, path):
    """k-NN accuracy against minutes: a panel a group, in each the default in black, around each line the seeds' spread."""
    curves = [row for row in summary if row.get("curve")]
    groups = list(dict.fromkeys(row["group"] for row in curves if row["group"] != "default")) or ["default"]
    columns = min(3, len(groups))
    size = (5 * columns, 4 * math.ceil(len(groups) / columns))
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(math.ceil(len(groups) / columns), columns, squeeze=False, sharey=True).flatten()
    for axis, group in zip(axes, groups):
        for row in (row for row in curves if row["group"] in ("default", group)):
            minutes, middle, low, high = zip(*[(point[0], *(100 * share for share in point[1:])) for point in row["curve"]])
            line, = axis.plot(minutes, middle, marker=".", label=row["row"], color="black" if row["group"] == "default" else None)
            axis.fill_between(minutes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for row in (row for row in summary if row["row"] == "raw pixels"):
            axis.axhline(100 * row["knn"]["mean"], color="gray", linestyle=":", label=row["row"])
        axis.set(title=group, xlabel="minutes of training", ylabel="k-NN accuracy, %")
        axis.legend(fontsize=7)
    for axis in axes[len(groups):]:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)


def save_results(rows, runs, setup, output):
    """Writes JSON, Markdown and figure; a stopped benchmark resumes from the JSON."""
    summary, temporary = summarise(rows, runs, setup), output.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": setup.machine, "minutes": setup.minutes, "data": setup.data, "rows": summary, "runs": runs}, indent=1))
    temporary.replace(output)
    machine, data, commits = setup.machine, setup.data, sorted({run["commit"] for run in runs.values() if run.get("commit")})
    together = f", {setup.at_once} runs at a time, each with {setup.threads()} of the cores" * (setup.at_once > 1)
    title = (f"{setup.minutes:g} minutes of training a run{together}; {data['name']}, "
             f"{data['train']:,} training and {data['test']:,} test images; "
             f"{machine['device']} ({machine['cpu']}, {machine['cores']} cores), {machine['precision']}, torch {machine['torch']}; "
             f"commit {', '.join(commits) or '–'}")
    output.with_suffix(".md").write_text(markdown(summary, title))
    if any(row.get("curve") for row in summary):
        draw(summary, output.with_suffix(".png"))


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="cifar10", help="as --dataset of dinov2_cifar.py: a .npz file, a folder, cifar10, shapes [%(default)s]")
    parser.add_argument("--minutes", type=float, help="training time of every run [5, on CUDA 3]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="[0 1]")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at a time, each with its share of the cores; small networks "
                        "train more in all than one after the other; not for lightly's parts, whose loader takes all cores [1]")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="NAME", help="see --list [the telling ones, on CUDA all]")
    parser.add_argument("--device", default=dinov2.best_device(), help="cuda, mps or cpu [%(default)s]")
    parser.add_argument("--output", type=Path, help="where the figures go, a .json [benchmarks/results/recipe-<device>.json]")
    parser.add_argument("--work", type=Path, help="folder for the runs [beside the output, its name without .json]")
    parser.add_argument("--list", action="store_true", help="print the rows, then stop")
    parser.add_argument("--base", nargs=argparse.REMAINDER, default=[], help="last: flags of dinov2_cifar.py that all rows share; TRAIN_IMAGES "
                        "is 10,000 on a CPU unless told; those of a single run, such as --seed, are left out")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.kind = arguments.device.split(":")[0]
    if arguments.minutes is None:
        arguments.minutes = 3 if arguments.kind == "cuda" else 5
    if not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes ({arguments.minutes}) must be above 0")
    if not 1 <= arguments.at_once <= throughput.cores():
        parser.error(f"--at-once ({arguments.at_once}) must lie between 1 and the number of cores ({throughput.cores()})")
    arguments.output = arguments.output or ROOT / "benchmarks" / "results" / f"recipe-{arguments.kind}.json"
    arguments.work = arguments.work or arguments.output.with_suffix("")
    return arguments


def shared_settings(arguments):
    """→ dict of the settings that all rows share: what --base changes, the data, the device."""
    given = dinov2.parse_arguments(arguments.base).to_dict()
    base = {name: value for name, value in given.items() if value != getattr(dinov2.Config, name) and name not in OF_A_RUN}
    if arguments.kind == "cpu" and not any(word.startswith("--train-images") for word in arguments.base):
        base["TRAIN_IMAGES"] = 10_000
    return {**base, "DATASET": arguments.data, "DEVICE": arguments.device}


def print_list(base):
    for row in ROWS:
        print(f"{row.name + '*' * (row.name in CPU_ROWS):24} {row.why}\n{'':24} {shlex.join(flags(changes(row, base))) or '(no flag)'}")
    print("* run by default on a CPU")


def benchmark(arguments):
    """The whole of it; InputError where the settings or the data cannot work."""
    base = shared_settings(arguments)
    if arguments.list:
        return print_list(base)
    rows, lines = choose_rows(arguments.rows or (CPU_ROWS if arguments.kind == "cpu" else [row.name for row in ROWS]), base, arguments.at_once)
    shown, _ = choose_rows([row.name for row in ROWS], base)     # earlier runs of rows that are not asked for now
    print("\n".join(lines), end="\n" * bool(lines))
    machine = throughput.describe(throughput.Setup(arguments.device, 0, "", any(is_lightly(row) for row in rows)))
    machine["precision"] = "bf16" if dinov2.use_bf16(dinov2.Config(**base)) else "fp32"
    del machine["repeats"]
    setup = Setup(base, arguments.minutes, data_mark(base), machine, arguments.work, arguments.at_once)
    setup.work.mkdir(parents=True, exist_ok=True)
    (setup.work / ".gitignore").write_text("*\n")
    runs = json.loads(arguments.output.read_text())["runs"] if arguments.output.exists() else {}
    now = [identity(row, setup) for row in shown]
    if any("knn" in run and run["identity"] not in now for run in runs.values()):                 # they cost hours
        for path in (arguments.output.with_suffix(ending) for ending in (".json", ".md", ".png")):
            if path.exists():
                shutil.copy(path, path.with_stem(path.stem + time.strftime("-until-%Y%m%d-%H%M%S")))
        print("finished runs of other settings or code are kept in", f"{arguments.output.stem}-until-….json")
    run_all(rows, arguments.seeds, runs, setup, lambda: save_results(shown, runs, setup, arguments.output))
    save_results(shown, runs, setup, arguments.output)
    print(f"\n{arguments.output.with_suffix('.md').read_text()}\n{arguments.output}")


def stop(number, frame):
    signal.signal(number, signal.SIG_IGN)                        # `timeout` sends it twice
    sys.exit(128 + number)


def main(argv=None):
    arguments = parse(argv)
    if arguments.job:
        print("\n" + json.dumps({"speed": work_speed, "lightly": work_lightly}[arguments.job["work"]](arguments.job)))
        return
    signal.signal(signal.SIGTERM, stop)                          # so that a run in progress ends with this program
    try:
        benchmark(arguments)
    except dinov2.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
