"""Helpers of all tests: a network and a run that take seconds, and every device that is here."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small are slower with more

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dinov2_cifar import Config, make_shapes  # noqa: E402

SMALL = {
    "MODEL_SIZE": "tiny",
    "MODEL_DIMS": {"tiny": {"dim": 32, "depth": 2, "heads": 2}},
    "PATCH_SIZE": 8,
    "LOCAL_CROP_SIZE": 16,
    "LOCAL_CROPS_NUMBER": 2,
    "PROJECTION_DIM": 16,
    "HEAD_HIDDEN_DIM": 32,
    "HEAD_BOTTLENECK_DIM": 16,
    "BATCH_SIZE": 8,
    "TOTAL_EPOCHS": 1,
    "DEVICE": "cpu",
    "PRECISION": "fp32",
    "COMPILE": False,
    "DATASET": "shapes",
}
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


def close(actual, expected, tolerance=1e-5):
    """Assert that tensors agree, absolutely and relatively."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance
    )


def read_records(folder, *events):
    """Return the records of metrics.jsonl, of these events or all."""
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if not events or row["event"] in events]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_cuda)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def small(tmp_path):
    """Return a maker of small configs that write below a temporary folder: small(SEED=1)."""
    return lambda **overrides: Config(**{**SMALL, "OUTPUT_DIR": str(tmp_path / "out"), **overrides})


@pytest.fixture(scope="session")
def shapes():
    """Return 64 training and 32 test images with their labels, for train_dinov2."""
    return (*make_shapes(64, 32, seed=0), *make_shapes(32, 32, seed=1))
