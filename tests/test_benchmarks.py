"""The benchmark's own arithmetic: a wrong count of operations would be a wrong MFU."""

import importlib.util

import pytest
import torch
from conftest import ROOT, SMALL
from torch.utils.flop_counter import FlopCounterMode

from dinov2_cifar import DINOv2, make_shapes

spec = importlib.util.spec_from_file_location("throughput", ROOT / "benchmarks" / "throughput.py")
throughput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(throughput)


@pytest.mark.parametrize("patch_size, registers", [(4, 0), (8, 2)])
def test_the_formula_counts_what_torch_counts_for_networks_that_leave_nothing_out(small, patch_size, registers):
    c = small(MODEL_DIMS={"tiny": (64, 3, 2)}, PATCH_SIZE=patch_size, REGISTER_TOKENS=registers, LOCAL_CROPS_NUMBER=3)
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
    torch.save(make_shapes(32)[0], tmp_path / "pictures.pt")
    config = {name: value for name, value in SMALL.items() if name != "DATASET"}
    return {"config": config, "pictures": tmp_path / "pictures.pt", "by": "ours", "repeats": 2, "device": "cpu"}


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


def test_a_long_run_is_steady_where_neither_memory_nor_open_files_grow():
    import steady
    calm = [(500.0 + 900 * (i < 10) + i % 3, 4) for i in range(100)]                              # the warm-up may take what it likes
    assert steady.summary(calm, 10) == {"peak_mib": [1402.0] + 9 * [502.0], "median_mib": [1401.0] + 9 * [501.0], "open_files": 10 * [4],
                                        "spread_after_first": {"peak": 0.0, "median": 0.0}, "flat": True}
    assert not steady.summary([(500.0 + 0.2 * i, 4) for i in range(100)], 10)["flat"]             # 3.6 % between the second and the last
    assert steady.summary([(500.0 + 0.05 * i, 4) for i in range(100)], 10)["flat"]
    assert not steady.summary([(500.0, 4 + i // 50) for i in range(100)], 10)["flat"]
