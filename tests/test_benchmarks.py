"""benchmarks/: what they count and print, and that a stopped ablation continues."""

import json
import signal
import time
from unittest.mock import Mock

import ablation
import curve
import numpy as np
import peers
import pytest
import throughput
import torch
from conftest import SMALL, close, read_records
from dense_probe import dense_probe, mean_iou
from lightly_baseline import LightlyDINOv2, dinov2, make_optimizer


@pytest.mark.parametrize("base", [[], ["--quick"], ["--local-crop-size", "32"]])
def test_ablation_rows_are_their_flags(base):
    default = dinov2.parse_arguments(base).to_dict()
    for name in ablation.ROWS:
        settings = ablation.changes(name, base)
        config = dinov2.Config(**default | settings).to_dict()
        for words in ([*base, *ablation.flags(settings)], ablation.flags(config)):
            assert dinov2.parse_arguments(words).to_dict() == config, name
        if "lightly" not in name:
            chosen = name == "default" or not settings.items() <= default.items()
            assert ablation.choose_rows([name], base) == [name] * chosen


def test_ablation_table():
    baseline = {"knn": 0.3, "linear": 0.35, "rank": 60.0, "raw_pixels_knn": 0.384}
    values = {"linear": 0.5, "rank": 99.6, "epoch": 4, "seconds": 1234.5, "baseline": baseline}
    rows = [("default", 0.4), ("default", 0.42), ("a", 0.43), ("a", 0.41), ("b", 0.3)]
    results = [{"row": row, "flags": f"--{row} 0", "knn": knn, **values} for row, knn in rows]
    results += [{"row": "c", "seed": 1, "failed": "exit code 2: x | y"}]
    assert ablation.markdown(results).splitlines()[2:] == [
        "| raw pixels |  | 38.4 | -2.6 |  |  |  |  |",
        "| untrained network |  | 30.0 | -11.0 | 35.0 | 60 |  |  |",
        "| default | `--default 0` | 41.0 (40.0..42.0) |  | 50.0 | 100 | 4 | 1,234 |",
        "| a | `--a 0` | 42.0 (41.0..43.0) | (+1.0) | 50.0 | 100 | 4 | 1,234 |",
        "| b | `--b 0` | 30.0 | -11.0 | 50.0 | 100 | 4 | 1,234 |",
        "| c, seed 1 | failed: exit code 2: x / y |",
    ]


def test_curve_has_a_point_a_length():
    runs = [("default", 25, 3400, 0.64), ("default", 4, 540, 0.5), ("default", 25, 3200, 0.63)]
    runs += [("simclr", 29, 3480, 0.65)]
    keys = ("row", "epoch", "seconds", "knn")
    runs = [dict(zip(keys, run, strict=True)) for run in runs]
    found = curve.points(runs, "knn")
    assert found == {"default": [(9, 50, 50, 50), (55, 63.5, 63, 64)], "simclr": [(58, 65, 65, 65)]}


def save_shapes(path, count):
    x, y = (t.numpy() for t in dinov2.make_shapes(count))
    x = x.transpose(0, 2, 3, 1)
    np.savez(path, x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
    return str(path)


@pytest.mark.slow
def test_ablation_continues_after_sigterm(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "koleo-0-seed3"
    settings = {
        "DATASET": save_shapes(tmp_path / "s.npz", 160),
        "TOTAL_EPOCHS": 2,
        "SAVE_EVERY_MINUTES": 1e-6,
    }
    words = ["--rows", "koleo-0", "--seeds", "3", "--output", str(tmp_path / "a.json"), "--base"]
    words += ablation.flags(SMALL | settings)

    def stop_after_a_save(seconds, sleep=time.sleep):
        sleep(seconds)
        if (folder / "dinov2_last.pth").exists():
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(time, "sleep", stop_after_a_save)
    with pytest.raises(SystemExit, match="143"):
        ablation.main(words)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="0"):
        ablation.main(words)
    progress, last = (folder / "progress.txt").read_text(), read_records(folder, "epoch")[-1]
    assert "stopped and saved" in progress and "resuming" in progress
    (run,) = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert run["knn"] == last["knn"] and run["epoch"] == 2 and run["seconds"] < last["seconds"]
    monkeypatch.setattr(ablation.Run, "start", lambda run: 1 / 0)
    with pytest.raises(SystemExit, match="0"):  # finished, so not started
        ablation.main(words)
    with pytest.raises(ZeroDivisionError):
        ablation.main([*words, "--learning-rate", "0.1"])


def test_throughput_measures_a_step(tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(dinov2.Config, name, value)
    monkeypatch.setattr(throughput, "run_worker", throughput.measure_step)
    monkeypatch.setattr(throughput, "CONTENDERS", {"ours, eager": None})
    words = (
        "--device cpu --sizes tiny --patch-sizes 8 --batch-size 8 --rounds 2 --repeats 1 --output"
    )
    throughput.main([*words.split(), str(tmp_path / "t.json")])
    (row,) = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert len(row["seconds"]) == 2 and row["peak_gib"] > 0.1 and min(row["stages"].values()) > 0

    def forward(crops, n, selected):  # of embedding, linear layers, attention; width 32
        linear = 32**2 * (30 * crops * (n + 1) + 18 * selected)  # the last MLP: of the selected
        return np.array([384 * 32 * crops * n, linear, 8 * 32 * crops * (n + 1) ** 2])

    masked = len(dinov2.MaskGenerator(dinov2.Config(DEVICE="cpu")).draw()[1])
    teacher, local = forward(16, 16, 16 + masked), forward(16, 4, 16)
    student = [2, 3, 3.5] @ (teacher + local)  # images get no gradient
    heads = 5632 * (16 + masked + 3 * (32 + masked)) - 512 * (32 + masked)  # frozen prototypes
    koleo = 2 * (2 * 8 * 8 * 32)
    sinkhorn = 3 * (2 * 2 * 16) * (16 + masked)  # rounds of two products with 16 prototypes
    assert row["operations"] == teacher.sum() + student + heads + koleo + sinkhorn
    row |= {"operations": 3e9, "seconds": [0.01, 0.02, 0.04], "peak_gib": 1.234}
    row["stages"] = dict.fromkeys(throughput.STAGES, 0.0123)
    cells = "tiny | 8 | ours, eager | 400 (200..800) | 1.23 | 15" + 4 * " | 12.3"
    assert throughput.table_row(row, 1e12) == f"| {cells} |"


def test_dense_probe_reads_masks_from_patches():
    assert mean_iou(*torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()) == (1 / 4 + 0 / 3) / 2
    masks = torch.rand(200, 4, 4).round().bool()
    patches = masks.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2).float()  # (200,4,4)
    features = torch.cat([1 - 2 * patches, torch.randn(200, 4, 2)], 2)
    data = (features[:150], masks[:150], features[150:])
    assert dense_probe(*data, masks[150:]) == 1.0 and dense_probe(*data, ~masks[150:]) == 0.0


def test_lightly_losses_have_our_units(small):
    pytest.importorskip("lightly")
    model = LightlyDINOv2(small(LAMBDA_PATCH=0.7, LAMBDA_KOLEO=0.3))
    crops, local_views = torch.randn(2, 8, 3, 32, 32), torch.randn(2, 8, 3, 16, 16)
    mask, _ = dinov2.MaskGenerator(model.config).draw()
    blind, _ = model.student(crops.flatten(0, 1), torch.ones_like(mask))
    close(blind, blind[:1].expand_as(blind))  # no patch is seen
    tokens, patches = model.student(crops.flatten(0, 1), mask)
    local, _ = model.student(local_views.flatten(0, 1))
    logits = torch.cat([model.img_head(tokens), model.img_head(local)]).unflatten(0, (4, 8))
    target_tokens, target_patches = model.teacher(crops.flatten(0, 1))
    targets = (model.teacher_img_head(target_tokens) / 0.04).softmax(1).unflatten(0, (2, 8))
    img = dinov2.multi_crop_dino_loss(logits, targets)
    target_logits = model.teacher_patch_head(target_patches[mask])
    patch = dinov2.ibot_loss(model.patch_head(patches[mask]), target_logits, mask, 0.04)
    koleo = sum(dinov2.koleo_regularizer(x, "nearest") for x in tokens.chunk(2))
    losses = model([*crops, *local_views], mask, 0.04)
    found = torch.stack([losses[name] for name in ("loss", "img", "patch", "koleo")])
    close(found, torch.stack([img + 0.7 * patch + 0.3 * koleo, img, patch, koleo]), 1e-4)
    for group in make_optimizer(model).param_groups:
        rows = {len(parameter) for parameter in group["params"]}
        assert (rows == {16}) == (group["rate"] == "prototype_lr")
    features = dinov2.extract_features(model, crops[0], precision="fp32")  # as evaluate does
    close(features, model.teacher(crops[0])[0])


@pytest.mark.parametrize("name", peers.LOSSES)
def test_peer_loss_is_a_loop_over_rows(name, small):
    z1, z2 = torch.randn(2, 6, 4)
    z, n, total = torch.cat([z1, z2]), 6, 0.0
    if name == "simclr":
        for i in range(12):
            cosine = [torch.cosine_similarity(z[i], row, dim=0) / 0.3 for row in z]
            others = torch.stack([cosine[j] for j in range(12) if j != i])
            total += (others.logsumexp(0) - cosine[(i + n) % 12]) / 12
    else:
        total = 25 * sum((a - b).square().sum() for a, b in zip(z1, z2, strict=True)) / 24
        for x in (z1, z2):
            centered = x - x.mean(0)
            for i in range(4):
                deviation = (centered[:, i].square().sum() / 5 + 1e-4).sqrt()
                total += 25 * max(0, 1 - deviation) / 4 / 2
                for j in range(4):
                    if i != j:
                        total += ((centered[:, i] @ centered[:, j]) / 5) ** 2 / 4
    close(peers.LOSSES[name](z1, z2, 0.3), total)


@pytest.mark.slow
def test_row_of_a_peer_trains_for_given_minutes(tmp_path):
    settings = {**SMALL, "DATASET": save_shapes(tmp_path / "s.npz", 512)}  # two steps
    words = [*"--rows simclr --seeds 0 --minutes 0.1 --output".split(), f"{tmp_path}/a.json"]
    with pytest.raises(SystemExit, match="0"):
        ablation.main([*words, "--base", *ablation.flags(settings)])
    (run,) = json.loads((tmp_path / "a.json").read_text())["runs"]
    with pytest.raises(dinov2.InputError, match="simclr.*not finished"):
        ablation.Run("simclr", 1, ablation.flags(settings), tmp_path).epochs_in(1)
    records = [{"step": step, "seconds": 30 + 0.1 * step} for step in (1, 50)]
    pilot = Mock(has=lambda name: True, records=lambda event: records)
    assert [ablation.Run.epochs_in(pilot, t) for t in (60, 1, 80.5)] == [6, 1, 10]
    assert run["epoch"] > 3  # of about 0.1 s, not the one of settings
    pilot = ablation.Run("simclr", 0, ablation.flags(settings), tmp_path / "a" / "pilot-1", 1)
    assert run["epoch"] == pilot.epochs_in(6)
