"""The benchmark's own arithmetic: a wrong count of operations would be a wrong MFU."""

import importlib.util

import pytest
import torch
from conftest import ROOT, SMALL
from torch.utils.flop_counter import FlopCounterMode

import dense_probe
from dinov2_cifar import DINOv2, make_model, make_optimizer, make_shapes, save_checkpoint

spec = importlib.util.spec_from_file_location("throughput", ROOT / "benchmarks" / "throughput.py")
throughput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(throughput)


@pytest.mark.parametrize("patch_size, registers", [(4, 0), (8, 2)])
def test_the_formula_counts_what_torch_counts_for_networks_that_leave_nothing_out(small, patch_size, registers):
    dims = {"tiny": {"dim": 64, "depth": 3, "heads": 2}}
    c = small(MODEL_DIMS=dims, PATCH_SIZE=patch_size, REGISTER_TOKENS=registers,
              LOCAL_CROPS_NUMBER=3)
    model = DINOv2(c)
    crops, small_crops, masked = torch.randn(2 * 8, 3, 32, 32), torch.randn(3 * 8, 3, 16, 16), 20
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:        # torch counts no fused attention
        model.student(crops), model.img_head(torch.randn(16, 64)), model.patch_head(torch.randn(masked, 64))
        forwards = counter.get_total_flops()
        model.student(small_crops), model.img_head(torch.randn(24, 64))
    student = counter.get_total_flops()
    assert throughput.standard_operations(model, masked) == pytest.approx(3 * student + forwards, rel=0.02)


@pytest.fixture
def job(tmp_path):
    torch.save(make_shapes(32)[0], tmp_path / "images.pt")
    config = {name: value for name, value in SMALL.items() if name != "DATASET"}
    return {"config": config, "images": tmp_path / "images.pt", "by": "ours", "repeats": 2,
            "device": "cpu"}


def test_a_step_executes_less_than_the_standard_network_but_for_what_torch_does_not_count(job):
    count = throughput.work_operations(job)
    assert 0.5 * count["standard"] < count["executed"] < count["standard"]


def test_a_step_is_taken_apart_into_its_stages(job, monkeypatch):
    monkeypatch.setattr(throughput.dinov2, "draw_masks", throughput.dinov2.draw_masks)            # so that the clocks are taken off again
    monkeypatch.setattr(throughput.dinov2, "train_step", throughput.dinov2.train_step)
    found = throughput.work_step({**job, "details": 3})
    stages = found["details"]["stages"]
    assert len(found["seconds"]) == 2 and all(seconds > 0 for seconds in stages.values()) and found["above_start"] > -0.01
    assert list(stages) == ["views", "masks", "teacher", "student", "heads and losses", "backward and clipping", "AdamW and EMA"]


def test_a_spread_is_shown_as_its_median_between_its_ends():
    assert throughput.shown(throughput.spread([3.0, 1.0, 2.0])) == "2.00 (1.00..3.00)"
    assert [throughput.shown(value) for value in (12345.6, 0.012345, 0.0, "ours")] == ["12,346", "0.0123", "0.0", "ours"]


def test_dense_probe_finds_the_masks_of_the_same_images_only():
    masks = torch.rand(200, 1, 4, 4).round().bool()
    masks = masks.expand(200, 2, 4, 4).reshape(200, 8, 4)[:, :4]  # (200,4,4)
    patches = masks.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2).float()  # (200,4,4)
    features = torch.cat([1 - 2 * patches, torch.randn(200, 4, 2)], 2)
    train, test = slice(0, 150), slice(150, 200)
    probe_data = (features[train], masks[train], features[test])
    assert dense_probe.dense_probe(*probe_data, masks[test]) == 1.0
    assert dense_probe.dense_probe(*probe_data, masks[test].flip(0)) < 0.5


def test_dense_probe_prints_the_iou_of_both_networks(small, tmp_path, capsys):
    c = small()
    model = make_model(c, [0.5] * 3, [0.25] * 3)
    torch.nn.init.zeros_(model.teacher.norm.weight)  # all patch tokens are equal
    save_checkpoint(tmp_path / "c.pth", model, make_optimizer(model), epoch=0, step=0)
    dense_probe.main([str(tmp_path / "c.pth"), "--images", "200", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    untrained, trained = (float(line.split()[-1].rstrip("%")) for line in lines)
    assert lines[0].startswith("untrained network") and lines[1].startswith("trained teacher")
    background = 1 - make_shapes(50, 32, 1, masks=True)[2].float().mean().item()
    assert trained == pytest.approx(50 * background, abs=0.1) and untrained > trained + 2
    with pytest.raises(SystemExit, match="2"):
        dense_probe.main([str(tmp_path / "missing.pth")])
