"""Draw accuracy against minutes of training, from records of ablation.py.

    cd benchmarks/results
    python ../curve.py cifar10-five-minutes.json cifar10-hour-26-epochs*.json

A point is the end of runs of a length, each with a schedule of that length: the mean of its seeds,
and a bar from the least to the greatest. The records must be of the same images and --base.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

STYLES = {"default": ("DINOv2, this file", "o-", "#0072b2"), "simclr": ("SimCLR", "s--", "#d55e00")}
PANELS = {"knn": "k-NN accuracy, %", "linear": "accuracy of a linear probe, %"}


def points(runs, key):
    """Return {row: [(minutes, mean, least, greatest in %) of runs of as many epochs]}, in order."""
    lengths, found = {}, {}
    for run in runs:
        lengths.setdefault((run["row"], run["epoch"]), []).append(run)
    for (row, _), seeds in sorted(lengths.items()):
        values = [100 * run[key] for run in seeds]
        point = mean(run["seconds"] / 60 for run in seeds), mean(values), min(values), max(values)
        found.setdefault(row, []).append(point)
    return found


def draw(runs, path):
    figure = Figure(figsize=(8.4, 3.6), dpi=150, layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for row, places in points(runs, key).items():
            x, y, low, high = zip(*places, strict=True)
            name, style, color = STYLES[row]
            axis.plot(x, y, style, label=name, color=color)
            axis.vlines(x, low, high, color)
        for name, before in ("untrained", key), ("raw pixels", f"raw_pixels_{key}"):
            value = 100 * runs[0]["baseline"][before]
            axis.axhline(value, color="gray", linestyle=":")
            axis.text(1, value, name, va="bottom", ha="right", transform=axis.get_yaxis_transform())
        ticks = [5, 10, 20, 60, 120, 300]
        axis.set(title=title, xlabel="minutes of one CPU core", xscale="log")
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axis.legend(loc="center right")
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("records", nargs="+", type=Path, help="JSON files of ablation.py")
    parser.add_argument("--output", type=Path, default="curve.png", help="[curve.png]")
    given = parser.parse_args()
    runs = [run for path in given.records for run in json.loads(path.read_text())["runs"]]
    runs = [run for run in runs if run["row"] in STYLES and "failed" not in run]
    if not runs:
        parser.error(
            f"no finished run of {' or '.join(STYLES)} in {', '.join(map(str, given.records))}"
        )
    draw(runs, given.output)
