"""How fast dinov2_cifar.py trains, how much memory it takes and how both grow, beside lightly's DINOv2.

    python benchmarks/throughput.py                            # everything: a quarter of an hour on two cores
    python benchmarks/throughput.py --sections views growth    # some of step, rate, views, growth, epochs
    pip install lightly==1.6.0 timm==1.0.31                    # what the rows of lightly need

Prints tables and writes the same figures to benchmarks/results/throughput-<device>.json. Each contender runs in a
process of its own; a figure is the median of its repeats after warm-up, with (least..most). Ours and lightly's take
turns, two rounds each, so that a machine that slows down slows both. A step is a whole one: views, masks, networks,
losses, gradients, AdamW, teacher. Peak memory is torch's on CUDA, else the process's, with what the loader's workers
alone hold; "above start" leaves out what was there before the model: Python, libraries, images.

lightly's side is its published example (examples/pytorch/dinov2.py) with the sizes of our Config: the same network,
heads, batch norm, prototypes, crops, augmentations, shares of masked patches, precision and clipping. Its own are timm's
layers, targets that are centred instead of balanced by Sinkhorn-Knopp, and PIL images from a
DataLoader on all cores.
"views ready" is its speed when that loader costs nothing. On CUDA ours is compiled, as COMPILE has it, with a fused AdamW;
lightly's runs as its example has it, neither compiled nor fused.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import lru_cache
from importlib.metadata import version
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dinov2_cifar as dinov2  # noqa: E402, it lies one folder up

SIZES, LOCAL_CROP_SIZES = ("tiny", "small"), (16, 32)
NO_AMX = (("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"),)  # an environment in which a CPU does without its matrix unit


# ----------------------------------------------------------------------------------------------------------------------
# Clock and memory
# ----------------------------------------------------------------------------------------------------------------------

def is_cuda(device):
    return torch.device(device).type == "cuda"


def synchronize(device):
    getattr(torch, torch.device(device).type).synchronize(*[device] * is_cuda(device))


def time_blocks(step, repeats, device):
    """→ seconds a step, one number a block: one step, or ten on CUDA, where only the ends of a block wait for the device."""
    steps, seconds = 10 if is_cuda(device) else 1, []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / steps)
    return seconds


def spread(values):
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def memory_now(device):
    """→ GiB: torch's on CUDA, else what the process holds in memory."""
    if is_cuda(device):
        return torch.cuda.memory_allocated(device) / 2 ** 30
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 30 if statm.exists() else memory_peak(device)


def memory_peak(device):
    """→ GiB, likewise, at most so far."""
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "win32":                                  # has no such figure
        return math.nan
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def private_memory(pid):
    """→ GiB that this process shares with no other; 0 where the system does not tell."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    return sum(int(n) for n in re.findall(r"^Private_\w+: +(\d+)", rollup.read_text(), re.M)) / 2 ** 20 if rollup.exists() else 0.0


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ----------------------------------------------------------------------------------------------------------------------
# The contenders: both have step() and details()
# ----------------------------------------------------------------------------------------------------------------------

class Ours:
    """The loop of train_dinov2 without its report, at the settings of step 100 of 1,000."""
    warm_up = 2

    def __init__(self, config, images, mean, std):
        c = self.config = config
        self.model = dinov2.make_model(c, mean, std)
        self.optimizer = dinov2.make_optimizer(self.model)
        self.crops = dinov2.MultiCropDataset(images, dinov2.make_transform(c, mean, std))
        self.settings = dinov2.Schedules(c, 1000).at(100)
        patches = (c.GLOBAL_CROP_SIZE // c.PATCH_SIZE) ** 2
        crops = c.GLOBAL_CROPS_NUMBER * c.BATCH_SIZE
        counts = dinov2.masked_patch_counts(crops, patches, c.MASK_RATIO, c.MASK_PROB)
        self.masked_patches = sum(counts)

    def step(self):
        views = self.crops.__getitems__(torch.randperm(len(self.crops))[:self.config.BATCH_SIZE])
        batch = (views, *dinov2.draw_masks(self.config, self.config.DEVICE))
        dinov2.train_step(self.model, self.optimizer, [batch], self.settings)

    def details(self, repeats):
        """→ seconds of each stage, from further steps that wait for the device around each."""
        model, rows = self.model, []
        seconds = self.watch((self.crops, "__getitems__"), (dinov2, "draw_masks"), (dinov2, "train_step"), (model, "forward"),
                             (self.optimizer, "step"), (model, "update_teacher"), student=model.student, teacher=model.teacher)
        for _ in range(1 + repeats):                             # the first warms up
            seconds.clear()
            self.step()
            s = dict(seconds)
            rows.append({"views": s["__getitems__"], "masks": s["draw_masks"], "teacher": s["teacher"], "student": s["student"],
                         "heads and losses": s["forward"] - s["teacher"] - s["student"],
                         "backward and clipping": s["train_step"] - s["forward"] - s["step"] - s["update_teacher"],
                         "AdamW and EMA": s["step"] + s["update_teacher"]})
        return {"stages": {stage: median(row[stage] for row in rows[1:]) for stage in rows[0]}}

    def watch(self, *functions, **backbones):
        """Puts a clock around each (owner, name) and each backbone → dict name: seconds, which adds up from then on."""
        seconds = defaultdict(float)

        def timed(function, stage):
            def wrapper(*args, **kwargs):
                synchronize(self.config.DEVICE)
                start = time.perf_counter()
                result = function(*args, **kwargs)
                synchronize(self.config.DEVICE)
                seconds[stage] += time.perf_counter() - start
                return result
            return wrapper

        for owner, name in functions:
            setattr(owner, name, timed(getattr(owner, name), name))
        for stage, backbone in backbones.items():                # the clock must not be compiled with it
            name = "forward" if backbone._compiled_call_impl is None else "_compiled_call_impl"
            setattr(backbone, name, timed(getattr(backbone, name), stage))
        return seconds


class PILImages(torch.utils.data.Dataset):
    """Images as lightly's transform takes them, one at a time."""

    def __init__(self, images, transform):
        self.images, self.transform = [TF.to_pil_image(image) for image in images], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])


class Lightly:
    """lightly's example, its loop body cut into methods; LayerScale, drop path and schedules, which cost time, left out."""

    def __init__(self, config, images, mean, std):
        from lightly import loss
        c = self.config = config
        self.student, self.student_heads = self.make_network()
        self.teacher, self.teacher_heads = self.make_network()
        for part in (self.teacher, self.teacher_heads):
            part.requires_grad_(False).eval()
        self.dino_loss, self.ibot_loss = loss.DINOLoss(c.PROJECTION_DIM).to(c.DEVICE), loss.IBOTPatchLoss(c.PROJECTION_DIM).to(c.DEVICE)
        self.koleo_loss = loss.KoLeoLoss()
        self.parameters = [*self.student.parameters(), *self.student_heads.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.001)
        workers = max(2, cores())
        self.batches = self.make_loader(images.train_images.cpu(), mean, std, workers)
        self.warm_up = 2 + 2 * workers * is_cuda(c.DEVICE)       # what was prepared ahead must be used up before the clock starts

    def make_network(self):
        """→ backbone and heads {image, patch} on the device; patches have a head of their own, as ours do."""
        from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer
        c, dims = self.config, self.config.MODEL_DIMS[self.config.MODEL_SIZE]
        vit = VisionTransformer(c.IMAGE_SIZE, c.PATCH_SIZE, num_classes=0, embed_dim=dims["dim"],
                                depth=dims["depth"], num_heads=dims["heads"],
                                pos_embed="learn", dynamic_img_size=True)
        backbone = MaskedVisionTransformerTIMM(vit, antialias=False, pos_embed_initialization="skip")
        sizes = (dims["dim"], c.HEAD_HIDDEN_DIM, c.HEAD_BOTTLENECK_DIM, c.PROJECTION_DIM,
                 c.HEAD_BATCH_NORM)
        heads = nn.ModuleDict({name: DINOv2ProjectionHead(*sizes) for name in ("image", "patch")})
        return backbone.to(c.DEVICE), heads.to(c.DEVICE)

    def make_loader(self, images, mean, std, workers):
        """→ an endless iterator over batches, without the blur and solarization that ours do not have either."""
        from lightly.transforms import DINOTransform
        c, (brightness, contrast, saturation, hue) = self.config, self.config.COLOR_JITTER
        dataset = PILImages(images, DINOTransform(
            c.GLOBAL_CROP_SIZE, c.GLOBAL_CROPS_SCALE, c.LOCAL_CROP_SIZE, c.LOCAL_CROPS_SCALE, c.LOCAL_CROPS_NUMBER,
            cj_prob=c.COLOR_JITTER_PROB, cj_strength=1, cj_bright=brightness, cj_contrast=contrast, cj_sat=saturation, cj_hue=hue,
            random_gray_scale=c.GRAYSCALE_PROB, gaussian_blur=(0, 0, 0), solarization_prob=0, normalize={"mean": mean, "std": std}))
        endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10 ** 6 * c.BATCH_SIZE)
        return iter(torch.utils.data.DataLoader(dataset, c.BATCH_SIZE, sampler=endless, num_workers=workers, pin_memory=is_cuda(c.DEVICE)))

    def step(self):
        self.views = next(self.batches)
        self.train_step()

    def train_step(self):
        from lightly.models.utils import update_momentum
        with dinov2.autocast(self.config):
            loss = self.losses([view.to(self.config.DEVICE, non_blocking=True) for view in self.views])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.CLIP_GRAD)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_momentum(self.student, self.teacher, m=0.99)
        update_momentum(self.student_heads, self.teacher_heads, m=0.99)

    def losses(self, views):
        from lightly.models.utils import random_block_mask
        global_views, local_views = torch.cat(views[:2]), torch.cat(views[2:])
        side = self.config.GLOBAL_CROP_SIZE // self.config.PATCH_SIZE
        block_mask = random_block_mask(size=(len(global_views), side, side), device=global_views.device)
        mask = nn.functional.pad(block_mask.flatten(1), (1, 0))  # never the class token
        with torch.no_grad():
            target = self.teacher.encode(global_views)
            target_images, target_patches = self.teacher_heads["image"](target[:, 0]), self.teacher_heads["patch"](target[mask])
        tokens = self.student.encode(global_views, mask=mask)
        class_tokens, local_tokens = tokens[:, 0], self.student.encode(local_views)[:, 0]
        images = torch.cat([self.student_heads["image"](class_tokens), self.student_heads["image"](local_tokens)])
        return (self.dino_loss(target_images.chunk(2), images.chunk(len(views)), teacher_temp=0.04)
                + self.ibot_loss(target_patches, self.student_heads["patch"](tokens[mask]), block_mask, teacher_temp=0.04)
                + 0.1 * sum(self.koleo_loss(part) for part in class_tokens.chunk(2)))

    def details(self, repeats):
        """→ the speed with the loader shut down and its last views used again and again."""
        self.batches = None
        return {"views ready": spread([self.config.BATCH_SIZE / s for s in time_blocks(self.train_step, repeats, self.config.DEVICE)])}


# ----------------------------------------------------------------------------------------------------------------------
# Workers: each takes a job (dict) in a fresh process and returns figures
# ----------------------------------------------------------------------------------------------------------------------

def work_images(job):
    """Draw the images once for all: in every worker, this would be the peak of its memory."""
    torch.save(dinov2.make_shapes(2048)[0], job["images"])


def prepare(job):
    """→ Config, Images on the device, mean, std."""
    config = dinov2.Config(DATASET="shapes", **job["config"])
    images = dinov2.prepare_images(config, torch.load(job["images"]))
    return config, images, *dinov2.channel_mean_std(images.train_images)


def work_step(job):
    """→ seconds of blocks of whole steps, GiB of memory, and the contender's details where job asks for them."""
    config, *data = prepare(job)
    if job["by"] == "lightly":
        import lightly.loss, lightly.models.modules, lightly.transforms, timm  # noqa: E401, F401, before memory is read
    before = memory_now(config.DEVICE)
    contender = {"ours": Ours, "lightly": Lightly}[job["by"]](config, *data)
    for _ in range(contender.warm_up):
        contender.step()
    if "meeting" in job:                                         # a folder where workers that must run at once meet
        Path(job["meeting"], str(os.getpid())).touch()
        deadline = time.monotonic() + 300
        while len(os.listdir(job["meeting"])) < job["processes"] and time.monotonic() < deadline:
            time.sleep(0.01)
    seconds = time_blocks(contender.step, job["repeats"], config.DEVICE)
    peak = memory_peak(config.DEVICE) + sum(private_memory(child.pid) for child in active_children()) * (not is_cuda(config.DEVICE))
    details = contender.details(job["details"]) if job.get("details") else {}
    return {"seconds": seconds, "peak": peak, "above_start": peak - before, "details": details}


def work_operations(job):
    """→ floating-point operations of one step: those executed, and those of the standard network."""
    from torch.utils.flop_counter import FlopCounterMode
    contender = Ours(*prepare(job))
    with FlopCounterMode(display=False) as counter:
        contender.step()
    return {"executed": counter.get_total_flops(), "standard": standard_operations(contender.model, contender.masked_patches)}


def standard_operations(model, masked_patches):
    """A multiply-add is 2. Each parameter of a matrix takes 2 a token forwards, attention 4·T·T·D a block and crop, and both
    twice that backwards. The student sees all crops; the teacher the global ones, forwards; the heads what they must."""
    c = model.config
    dims = c.MODEL_DIMS[c.MODEL_SIZE]
    backbone, img_head, patch_head = (
        sum(p.numel() for name, p in module.named_parameters()
            if p.ndim > 1 and name.endswith(("weight", "prototypes")))
        for module in model.student_modules())

    def forward(crops, size):
        tokens = 1 + c.REGISTER_TOKENS + (size // c.PATCH_SIZE) ** 2
        attention = 4 * dims["depth"] * dims["dim"] * tokens ** 2
        return crops * c.BATCH_SIZE * (2 * (backbone * tokens + img_head) + attention)

    teacher = forward(c.GLOBAL_CROPS_NUMBER, c.GLOBAL_CROP_SIZE) + 2 * patch_head * masked_patches
    return 3 * (teacher + forward(c.LOCAL_CROPS_NUMBER, c.LOCAL_CROP_SIZE)) + teacher


def work_rate(job):
    """→ {precision: {shape: TFLOP/s, one number a repeat}} of matrix products into memory that is there already."""
    rates, device = {"bf16": {}, "fp32": {}}, job["device"]
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for m, k, n in job["shapes"]:
            a, b, out = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (n, k), (m, n)))
            multiply = lambda: torch.matmul(a, b.T, out=out)  # noqa: E731, b lies as the weight of a linear layer does
            times = math.ceil(0.03 / min(time_blocks(multiply, 2, device)))
            seconds = time_blocks(lambda: [multiply() for _ in range(times)], job["repeats"], device)
            rates[precision][f"{m} x {k} x {n}"] = [2e-12 * m * k * n * times / s for s in seconds]
    return rates


def torchvision_transforms(config, mean, std, pil):
    """→ one torchvision transform a view, as Config has it, for a PIL image or a uint8 tensor."""
    c = config
    views = [(c.GLOBAL_CROP_SIZE, c.GLOBAL_CROPS_SCALE)] * c.GLOBAL_CROPS_NUMBER + [(c.LOCAL_CROP_SIZE, c.LOCAL_CROPS_SCALE)] * c.LOCAL_CROPS_NUMBER
    return [v2.Compose([v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip(),
                        v2.RandomApply([v2.ColorJitter(*c.COLOR_JITTER)], c.COLOR_JITTER_PROB), v2.RandomGrayscale(c.GRAYSCALE_PROB),
                        *[v2.PILToTensor()] * pil, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]) for size, scale in views]


def work_views(job):
    """→ crops a second, one number a repeat."""
    config, images, mean, std = prepare(job)
    images = images.train_images[:config.BATCH_SIZE]
    if job["by"] == "ours":
        calls = [(dinov2.make_transform(config, mean, std), images)]
    else:
        images, pil = images[:32], job["by"] == "PIL"
        calls = [(transform, TF.to_pil_image(image) if pil else image) for image in images
                 for transform in torchvision_transforms(config, mean, std, pil)]

    def make():
        for transform, image in calls:
            transform(image)

    time_blocks(make, 2, config.DEVICE)
    crops = len(images) * (config.GLOBAL_CROPS_NUMBER + config.LOCAL_CROPS_NUMBER)
    return [crops / s for s in time_blocks(make, job["repeats"], config.DEVICE)]


def work_epochs(job):
    """→ GiB of memory at the end of every epoch of train_dinov2."""
    samples, save_run = [], dinov2.save_run

    def save_and_sample(*args):
        save_run(*args)
        samples.append(memory_now(job["device"]))

    dinov2.save_run = save_and_sample
    with tempfile.TemporaryDirectory() as folder:
        config = dinov2.Config(OUTPUT_DIR=folder, **job["config"])
        dinov2.train_dinov2(config, torch.load(job["images"]))
    return samples


def work(job):
    """The worker process: its figures are the last line that it prints."""
    torch.set_num_threads(job.get("threads", torch.get_num_threads()))
    torch.manual_seed(0)
    print("\n" + json.dumps(globals()[f"work_{job['work']}"](job)))


# ----------------------------------------------------------------------------------------------------------------------
# Sections: each → {title of a table: its rows as dicts of plain values}
# ----------------------------------------------------------------------------------------------------------------------

class Setup(NamedTuple):
    """What all measurements of a run share."""
    device: str
    repeats: int
    images: str  # file with the uint8 images (2048,3,32,32)
    lightly: bool  # it is installed

    @property
    def batch(self):
        return 512 if is_cuda(self.device) else 64


class WorkerFailed(RuntimeError):
    """A worker ended with an error, such as too little memory; the message is its last line."""


def say(text=""):
    """One line of progress on a terminal, which the next one wipes."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def start(setup, work, environment=(), config=None, **job):
    """→ the running process of one worker."""
    job = {"work": work, **setup._asdict(), "config": {"DEVICE": setup.device, **(config or {})}, **job}
    say(f"{work} {job.get('by', '')} {config or ''}"[:110])
    return subprocess.Popen([sys.executable, __file__, "--job", json.dumps(job)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, **dict(environment)})


def finish(process):
    """→ the figures of a worker."""
    output, errors = process.communicate()
    if process.returncode:
        raise WorkerFailed(f"exit code {process.returncode}: {(errors.strip().splitlines() or [''])[-1][:200]}")
    return json.loads(output.splitlines()[-1])


def run(*args, **job):
    return finish(start(*args, **job))


def step_figures(batch, rounds):
    """Pools the rounds of one contender's step worker; details come from the first."""
    seconds = [s for found in rounds for s in found["seconds"]]
    return {"images/s": spread([batch / s for s in seconds]), "s/step": spread(seconds),
            "peak GiB": max(found["peak"] for found in rounds),
            "above start": max(found["above_start"] for found in rounds), **rounds[0]["details"]}


@lru_cache(maxsize=None)
def compare(setup, size, local_crop_size, batch, environment=(), rounds=2):
    """Whole steps of ours and lightly's in turn → a row each; that of ours tells the ratios."""
    config = {"MODEL_SIZE": size, "PATCH_SIZE": 4, "LOCAL_CROP_SIZE": local_crop_size, "BATCH_SIZE": batch}
    found = {by: [] for by in ("ours", "lightly")[:1 + setup.lightly]}
    for i in range(rounds):
        for by in found:
            found[by].append(run(setup, "step", environment, config, by=by, repeats=len(range(i, setup.repeats, rounds)) or 1,
                                 details=min(3, setup.repeats) if i == 0 else 0))
    rows = [{"case": f"{size}, 2 x 32 + 6 x {local_crop_size} px", "batch": batch, "by": by, **step_figures(batch, found[by])} for by in found]
    if setup.lightly:
        ours, peer = rows
        ours.update({"times as fast": ours["images/s"]["median"] / peer["images/s"]["median"],
                     "times less above start": peer["above start"] / ours["above start"]})
    return rows


def section_step(setup):
    """On CUDA also batches around the standard one, one round each, so that either side may have its best."""
    rows = []
    for size in SIZES:
        for local_crop_size in LOCAL_CROP_SIZES:
            rows += compare(setup, size, local_crop_size, setup.batch, ())
            if is_cuda(setup.device) and local_crop_size == LOCAL_CROP_SIZES[0]:
                rows += [row for batch in (64, 256, 1024) for row in compare(setup, size, local_crop_size, batch, (), rounds=1)]
    stages = []
    for row in rows:
        if row["by"] == "ours" and row["batch"] == setup.batch:
            seconds = row["stages"]
            for unit, scale in (("ms", 1000), ("%", 100 / sum(seconds.values()))):
                stages.append({"case": row["case"], "": unit, **{stage: scale * s for stage, s in seconds.items()}})
    return {"steps": rows, "stages": stages}


def precision(device):
    """→ "bf16" or "fp32", whichever PRECISION "auto" takes here."""
    with dinov2.autocast(dinov2.Config(DEVICE=device)):
        return "bf16" if torch.is_autocast_enabled(torch.device(device).type) else "fp32"


def section_rate(setup):
    """Matrix rates, operations of a step, and the share of the highest rate that whole steps reach (MFU)."""
    all_sizes = (*SIZES, "base") if is_cuda(setup.device) else SIZES
    tokens = 2 * setup.batch * 65
    widths = [dinov2.Config.MODEL_DIMS[size]["dim"] for size in all_sizes]
    shapes = [(side, side, side) for side in ((2048, 4096, 8192) if is_cuda(setup.device) else (2048,))]
    shapes += [(tokens, k * width, n * width) for width in widths for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))]    # a block's layers
    config, used = {"PATCH_SIZE": 4, "LOCAL_CROP_SIZE": 16, "BATCH_SIZE": setup.batch, "COMPILE": False}, precision(setup.device)
    operations = {size: run(setup, "operations", config={**config, "MODEL_SIZE": size}) for size in all_sizes}
    amx = not is_cuda(setup.device) and torch.cpu.get_capabilities().get("amx_bf16")
    rates, mfu, steps = defaultdict(dict), [], []
    for suffix, environment, sizes in [("", (), all_sizes)] + [(", no AMX", NO_AMX, ("small",))] * bool(amx):
        rounds = [run(setup, "rate", environment, shapes=shapes, repeats=math.ceil(setup.repeats / 2)) for _ in range(2)]
        for kind in rounds[0]:
            for shape in rounds[0][kind]:
                rates[shape].update({"case": shape, kind + suffix: spread([r for found in rounds for r in found[kind][shape]])})
        highest = max(row[used + suffix]["median"] for row in rates.values())
        for size in sizes:
            rows = compare(setup, size, 16, setup.batch, environment)
            achieved = operations[size]["executed"] / rows[0]["s/step"]["median"] / 1e12
            mfu.append({"case": size + suffix, **{f"{kind} GFLOP": count / 1e9 for kind, count in operations[size].items()},
                        "achieved TFLOP/s": achieved, "highest TFLOP/s": highest, "MFU %": 100 * achieved / highest})
        steps += rows if environment else []
    result = {"matrix products": list(rates.values()), "MFU": mfu}
    return {**result, "steps without AMX": steps} if steps else result


def section_views(setup):
    batch = 512 if is_cuda(setup.device) else 128
    cases = [(f"ours, {batch} at a time, {setup.device}", dict(by="ours", config={"BATCH_SIZE": batch}))]
    single = {"ours": "ours, 128 at a time", "tensor": "torchvision v2, uint8 tensors one by one",
              "PIL": "torchvision v2, PIL images one by one"}
    cases += [(f"{title}, one thread", dict(by=by, threads=1, config={"DEVICE": "cpu", "BATCH_SIZE": 128})) for by, title in single.items()]
    return {"crops": [{"case": title, "crops/s": spread(run(setup, "views", **job))} for title, job in cases]}


def growth_row(setup, config, repeats=None):
    """→ figures of ours for one config, or what stopped it, such as too little memory."""
    c = dinov2.Config(**config)
    crops = ((c.GLOBAL_CROPS_NUMBER, c.GLOBAL_CROP_SIZE), (c.LOCAL_CROPS_NUMBER, c.LOCAL_CROP_SIZE))
    tokens = sum(number * (1 + (size // c.PATCH_SIZE) ** 2) for number, size in crops)
    row = {"case": f"{c.MODEL_SIZE}, patch {c.PATCH_SIZE}", "batch": c.BATCH_SIZE,
           "tokens/image": tokens}
    try:
        row.update(step_figures(c.BATCH_SIZE, [run(setup, "step", config=config, by="ours", repeats=repeats or setup.repeats)]))
    except WorkerFailed as failure:
        return {**row, "failed": str(failure)}
    rate = row["images/s"]["median"]
    return {**row, "ms/image": 1e3 / rate, "us/token": 1e6 / rate / tokens}


def exponent_row(rows, key):
    """→ a row with p where seconds a step ~ key to the power p, by least squares of the logarithms."""
    points = [(row[key], row["s/step"]["median"]) for row in rows if "s/step" in row]
    return {"case": f"exponent of s/step in {key}", **({"s/step": np.polyfit(*np.log(points).T, 1)[0]} if len(points) > 1 else {})}


def processes_row(setup, count, config):
    """Processes that run at once on one device and share the cores → images/s of all."""
    threads = max(1, cores() // count)
    with tempfile.TemporaryDirectory() as folder:
        workers = [start(setup, "step", config=config, by="ours", threads=threads, meeting=folder, processes=count) for _ in range(count)]
        rates = [config["BATCH_SIZE"] / median(finish(worker)["seconds"]) for worker in workers]
    return {"case": f"{count} of {config['MODEL_SIZE']}, patch {config['PATCH_SIZE']}", "batch each": config["BATCH_SIZE"], "threads each": threads,
            "images/s of all": sum(rates)}


def section_growth(setup):
    """On a CPU smaller cases: patches of 8 pixels save where the batch and the processes grow, and a batch of 8 for the sizes."""
    cuda = is_cuda(setup.device)
    tiny = {"MODEL_SIZE": "tiny", "PATCH_SIZE": 4 if cuda else 8}
    batches = (64, 128, 256, 512, 1024)
    images = [growth_row(setup, {**tiny, "BATCH_SIZE": batch}) for batch in batches]
    tokens = [growth_row(setup, {**tiny, "PATCH_SIZE": patch, "BATCH_SIZE": 64 if cuda else 16}) for patch in (8, 4, 2)]
    sizes = [growth_row(setup, {**tiny, "MODEL_SIZE": size, "BATCH_SIZE": 64 if cuda else 8}, None if cuda else min(3, setup.repeats))
             for size in dinov2.Config.MODEL_DIMS]
    return {"images": [*images, exponent_row(images, "batch")],
            "tokens": [*tokens, exponent_row(tokens, "tokens/image")], "sizes": sizes,
            "processes": [processes_row(setup, count, {**tiny, "BATCH_SIZE": setup.batch}) for count in (1, 2)]}


def section_epochs(setup):
    config = {"MODEL_SIZE": "tiny", "PATCH_SIZE": 8, "BATCH_SIZE": 16, "TRAIN_IMAGES": 64, "TOTAL_EPOCHS": 100, "EVAL_EVERY": 0, "SAVE_EVERY": 0}
    samples = run(setup, "epochs", config=config)
    return {"memory": [{"case": "tiny, patch 8, 64 images",
                        **{f"epoch {n}": samples[n - 1] for n in (10, 50, 100)},
                        "growth from 20 to 100, %": 100 * (samples[99] / samples[19] - 1), "every epoch": samples}]}


SECTIONS = {"step": section_step, "rate": section_rate, "views": section_views, "growth": section_growth, "epochs": section_epochs}
NOTES = {
    "steps": ": whole training steps, patches of 4 pixels",
    "stages": ": of ours, each with a wait for the device before and after",
    "matrix products": ": m x k x n, TFLOP/s",
    "MFU": ": achieved: executed operations over the time of whole steps, 2 x 32 + 6 x 16 px; highest: the best median of the products\n"
           "  executed: products of one step as torch's FlopCounterMode counts them (on a CPU it knows no fused attention: the teacher's is\n"
           "  left out); standard: by formula, nothing left out",
    "crops": ": the views alone, 2 x 32 + 6 x 16 px",
    "processes": ": independent ones at once on one device, the cores shared among them",
    "memory": ": at the end of an epoch of train_dinov2, GiB",
}


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------

def shown(value):
    """A value as a cell: three significant digits, a spread as "median (min..max)"."""
    if isinstance(value, dict):
        return f"{shown(value['median'])} ({shown(value['min'])}..{shown(value['max'])})"
    if isinstance(value, float) and value:
        return f"{value:,.{min(4, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"
    return str(value)


def print_table(title, rows):
    """The columns are the keys of the rows, the first to the left; lists and stages are for the file only."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if key != "stages" and not isinstance(value, list)))
    cells = [columns] + [[shown(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    say()
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))), flush=True)


def git(*arguments):
    """→ what git prints, or None where there is no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(setup):
    """→ dict of what a reader must know to compare these figures with others."""
    info, able, changed = Path("/proc/cpuinfo"), torch.cpu.get_capabilities(), git("status", "--porcelain", "--untracked-files=no")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    return {"device": torch.cuda.get_device_name(setup.device) if is_cuda(setup.device) else setup.device,
            "cpu": names[0] if names else platform.processor(),
            "cpu flags": [name for name in ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16") if able.get(name)],
            "cores": cores(), "threads": torch.get_num_threads(), "system": platform.platform(), "python": platform.python_version(),
            "torch": torch.__version__, **{name: version(name) for name in ("lightly", "timm") if setup.lightly},
            "precision": precision(setup.device), "commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed),
            "command": " ".join(sys.argv), "repeats": setup.repeats, "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=dinov2.best_device(), help="cuda, mps or cpu [%(default)s]")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS, metavar="NAME", help="some of %(choices)s [all]")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each figure; fewer than 5 are for trying out [%(default)s]")
    parser.add_argument("--output", help="where the figures go [benchmarks/results/throughput-<device>.json]")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.job:
        return work(arguments.job)
    output = Path(arguments.output or ROOT / "benchmarks" / "results" / f"throughput-{torch.device(arguments.device).type}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    lightly = all(importlib.util.find_spec(name) for name in ("lightly", "timm"))
    if not lightly:
        print("lightly's rows are left out; to have them: pip install lightly==1.6.0 timm==1.0.31")
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(arguments.device, arguments.repeats, str(Path(folder, "images.pt")), lightly)
        figures = {"machine": describe(setup), "sections": {}}
        print("\n".join(f"{key:10} {value}" for key, value in figures["machine"].items()))
        run(setup, "images")
        for name in arguments.sections:
            try:
                figures["sections"][name] = SECTIONS[name](setup)
            except WorkerFailed as failure:                      # the other sections may still run
                figures["sections"][name] = {"failed": [{"case": str(failure)}]}
            for table, rows in figures["sections"][name].items():
                print_table(f"{name}, {table}{NOTES.get(table, '')}", rows)
            output.write_text(json.dumps(figures, indent=1) + "\n")                               # now: a later section may fail
    print(f"\n{output}")


if __name__ == "__main__":
    main()
