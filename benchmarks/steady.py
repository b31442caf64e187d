"""Does a long run keep its memory? Trains for two hours and watches the process from outside. Linux only.

    python benchmarks/steady.py --data cifar.npz                              # two hours
    python benchmarks/steady.py --data cifar.npz --minutes 10 --windows 5     # a first look

Every second it reads the process's resident memory and counts its open files. The time is cut into windows, each long
enough for epochs, evaluations and saves; the first holds the warm-up and is left out. Memory is flat if the windows' peaks,
and their medians, lie within 2 % of one another. The run is ended by SIGTERM, which must give 143. Exits with 1 where one of
these fails. Writes steady-cpu.json into benchmarks/results.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


def sample(pid):
    """→ resident memory in MiB and the number of open files of a process."""
    resident = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(resident.split()[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def summary(samples, windows):
    """samples: (resident MiB, open files) in order of time → dict with each window's figures and their spread after the first."""
    size = len(samples) // windows
    parts = [samples[i * size:(i + 1) * size] for i in range(windows)]
    peaks, middles = ([round(f(memory for memory, _ in part), 1) for part in parts] for f in (max, median))
    files = [median(count for _, count in part) for part in parts]
    spreads = {name: round(max(values[1:]) / min(values[1:]) - 1, 4) for name, values in (("peak", peaks), ("median", middles))}
    return {"peak_mib": peaks, "median_mib": middles, "open_files": files, "spread_after_first": spreads,
            "flat": max(spreads.values()) <= 0.02 and max(files[1:]) <= files[1]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="shapes", help="as DATASET")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "steady-cpu.json"))
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        command = ["python", "dinov2_cifar.py", "--device", "cpu", "--dataset", given.data, "--model-size", "tiny", "--patch-size", "8",
                   "--train-images", "10000", "--total-epochs", "10000", "--eval-every", "1", "--save-every-minutes", "1", "--save-every", "0"]
        with open(Path(folder, "log"), "w") as log:
            run = subprocess.Popen([sys.executable, str(ROOT / command[1]), *command[2:], "--output-dir", folder], stdout=log, stderr=log)
            samples, end = [], time.monotonic() + 60 * given.minutes
            try:
                while time.monotonic() < end and run.poll() is None:
                    samples.append(sample(run.pid))
                    time.sleep(1)
            finally:
                run.send_signal(signal.SIGTERM)
                code = run.wait()
        if code != 143:
            sys.exit(f"the run ended with {code}:\n" + Path(folder, "log").read_text()[-2000:])
        records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    start, last = records[0], next(r for r in reversed(records) if r["event"] == "step")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {"command": " ".join(command), "data": start["data"], "torch": start["torch"], "commit": commit, "minutes": given.minutes,
              "samples": len(samples), "steps": last["step"], "skipped": sum(r["skipped"] for r in records if r["event"] == "step"),
              "epochs": sum(r["event"] == "epoch" for r in records), **summary(samples, given.windows)}
    Path(given.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(not result["flat"])


if __name__ == "__main__":
    main()
