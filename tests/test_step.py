"""The whole step: how many operations it issues, its graphs, and what it copies to a GPU."""

import gpu
import pytest
import throughput
import torch
from conftest import SMALL
from throughput import OperationCounter, Step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import dinov2_cifar
from dinov2_cifar import Config, DINOv2, MaskGenerator, MultiCropDataset, MultiCropTransform


def test_views_and_masks_issue_few_operations():
    """Each crop of a size more costs one matrix product."""
    counts = {n: gpu.count_operations("cpu", **SMALL | {"LOCAL_CROPS_NUMBER": n}) for n in (6, 16)}
    assert counts[6]["views"] < 400 and counts[6]["masks"] < 100
    assert counts[16]["views"] == counts[6]["views"] + 10
    for name in ("masks", "forward", "backward", "update"):
        assert abs(counts[16][name] - counts[6][name]) <= 1, name


FEW = {"DROPOUT": 0.1, "DROP_PATH": 0.1, "REGISTER_TOKENS": 1, "LAYER_SCALE": 0.1}
FEW |= {"KOLEO_KIND": "cosine", "MASK_KIND": "random", "GLOBAL_CROPS_NUMBER": 3}
NONE = {"HEAD_BATCH_NORM": False, "MASK_RATIO": 0.0, "LOCAL_CROPS_NUMBER": 0}
NONE |= {"KOLEO_KIND": "uniform", "KOLEO_FEATURES": "bottleneck", "EMA_START": 0.0, "EMA_END": 0.0}
GRAPHS = [("aot_eager", {}, 4), ("eager", {"PRECISION": "bf16", **FEW}, 4), ("eager", NONE, 3)]


def test_step_of_each_new_model_is_four_graphs_that_are_compiled_once(monkeypatch):
    """Global views, local views, masks, objective; compiled as on CUDA, but without a compiler."""
    monkeypatch.setattr(dinov2_cifar, "can_compile", lambda config: True)
    # Of each function, torch keeps a limited number of graphs, also those of earlier models
    with torch._dynamo.config.patch(recompile_limit=2):
        for backend, changes, count in GRAPHS:
            monkeypatch.setitem(throughput.CONTENDERS, gpu.COMPILED, {"backend": backend})
            dims = {"tiny": {"dim": 32, "depth": 1, "heads": 2}}
            graphs = gpu.count_graphs("cpu", **SMALL | {"MODEL_DIMS": dims} | changes)
            assert graphs == {"first step": count, "later": 0, "breaks": 0}
    torch._dynamo.reset()


class Copies(OperationCounter):
    """Collect the sizes of what is copied between devices; reading a number raises an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        counted = [t for t in tensors if t.ndim or name in ("_to_copy", "copy_", "lift_fresh")]
        if len({t.device.type for t in counted}) > 1:
            self.names.append(counted[-1].numel())
        return result


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_step_copies_only_indices_to_a_gpu(monkeypatch):
    """With tensors that have a device but no data. Autograd cannot run on these."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda weight, std: weight)

    def backward(loss):
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    config = Config(**SMALL)
    config.DEVICE = "cuda"  # after validation
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            model, images = DINOv2(config), torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
        crops = MultiCropDataset.__new__(MultiCropDataset)
        crops.images, crops.transform = images, MultiCropTransform(32, 16, 2, 2, config)
        crops.device = config.DEVICE
        masks, optimizer = MaskGenerator(config), dinov2_cifar.make_optimizer(model)
        for sizes in ([8, 3, 3], [8]):  # at first also mean and std
            with Copies() as copies:
                batch = crops.__getitems__(torch.arange(8)), *masks.draw()
                hparams = dinov2_cifar.hyperparameters(config, 5, 10)
                values = dinov2_cifar.train_step(model, optimizer, [batch], hparams)
            assert copies.names == sizes
            assert values["loss"].device.type == "cuda"
            with pytest.raises(RuntimeError), Copies():
                values["loss"].item()


def test_step_of_benchmarks_trains(small):
    step = Step(small(), gpu.EAGER)
    before = [p.clone() for p in step.model.student.parameters()]
    assert step()["skipped"] == 0
    assert not all(map(torch.equal, before, step.model.student.parameters()))
