"""In and out: weights to start from, export, other libraries' networks, embeddings, figures."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, close, read_records
from matplotlib import colormaps
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import dinov2_cifar
from dinov2_cifar import (
    QUICK,
    Config,
    DINOv2,
    InputError,
    VisionTransformer,
    load_backbone,
    main,
    make_shapes,
    parse_arguments,
    train_dinov2,
)

TEACHER = str(ROOT / "checkpoints" / "dinov2_tiny_cifar10.pth")


def vit(**options):
    torch.manual_seed(1)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = VisionTransformer(**{**sizes, **options}).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.requires_grad_(False)


def has(*names):
    return all(importlib.util.find_spec(name) for name in names)


@pytest.fixture
def checkpoint(small, tmp_path):
    """Return a checkpoint of a network that has learned something."""
    config = small(OUTPUT_DIR=str(tmp_path / "first"), TOTAL_EPOCHS=2, LEARNING_RATE=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)
        train_dinov2(config, make_shapes(64, 32, seed=7)[0])  # of other means than shapes
    return str(tmp_path / "first" / "dinov2_final.pth")


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda *args: None)


def started(small, path, **changes):
    """Return the network that a run with INIT_FROM starts from."""
    model = DINOv2(small(INIT_FROM=str(path), **changes))
    dinov2_cifar.load_weights(str(path), model)
    return model


def save(path, states):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(states, path)
    else:
        torch.save(states, path)
    return path


def test_init_from_a_checkpoint_takes_teacher_heads_and_normalization(small, checkpoint, capsys):
    model, states = started(small, checkpoint), dinov2_cifar.read_checkpoint(checkpoint)
    for name in ("student", "teacher", "img_head", "teacher_img_head", "patch_head"):
        source = name if "teacher" in name else f"teacher_{name}".replace("_student", "")
        for key, value in getattr(model, name).state_dict().items():
            assert torch.equal(value, states[f"{source}_state_dict"][key]), (name, key)
    assert "fresh: none; left: none" in capsys.readouterr().out
    model = started(small, checkpoint, PROJECTION_DIM=24)
    assert "fresh: img_head, patch_head; left: none" in capsys.readouterr().out
    assert len(model.img_head.prototypes) == 24


@pytest.mark.parametrize("registers", [0, 1, 4])
def test_init_from_resizes_positions_and_keeps_registers(small, tmp_path, registers, capsys):
    theirs = vit(register_tokens=2)
    path = save(tmp_path / "meta.pth", theirs.state_dict())
    ours = started(small, path, IMAGE_SIZE=48, REGISTER_TOKENS=registers).teacher
    close(ours.pos_embed, theirs.interpolate_pos_encoding(torch.zeros(1), 48, 48))
    close(ours.cls_token, theirs.cls_token)
    if registers:
        n = min(registers, 2)
        close(ours.register_tokens[:, :n], theirs.register_tokens[:, :n])
    out = capsys.readouterr().out
    assert f"4x4 positions, {min(registers, 2)} of {registers} registers" in out
    assert ("left: register_tokens" in out) == (not registers)


def test_init_from_our_weights_keeps_their_normalization(small, tmp_path):
    theirs = vit()
    theirs.pixel_mean.fill_(0.3)
    for name in ("weights.pth", "weights.safetensors"):
        ours = started(small, save(tmp_path / name, theirs.state_dict())).teacher
        assert torch.equal(ours.pixel_mean, theirs.pixel_mean)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("layout", ["meta", "meta's training", "chunks", "timm", "timm registers"])
def test_init_from_weights_of_others_gives_their_features(small, tmp_path, layout, ending, capsys):
    registers = 3 * ("registers" in layout)
    theirs = vit(layer_scale=0.1, register_tokens=registers)
    if "timm" in layout:
        timm = pytest.importorskip("timm").models.vision_transformer
        options = {"reg_tokens": registers, "no_embed_class": registers > 0, "init_values": 0.1}
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        theirs = timm.VisionTransformer(**sizes, **options, num_classes=10).eval()
        for parameter in theirs.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    states = {k: t.contiguous() for k, t in theirs.state_dict().items() if "pixel" not in k}
    if layout in ("chunks", "meta's training"):  # of Meta's networks for FSDP
        states = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", k): t for k, t in states.items()}
    if layout == "meta's training":
        if ending == "safetensors":
            pytest.skip("is a dict of dicts")
        states = {f"backbone.{k}": t for k, t in states.items()}
        states = {"teacher": {**states, "dino_head.mlp.0.weight": torch.zeros(3, 3)}}
    path = save(tmp_path / f"weights.{ending}", states)
    ours = started(small, path, LAYER_SCALE=0.1, REGISTER_TOKENS=registers).teacher
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs.forward_features(x)[:, 0] if "timm" in layout else theirs(x)[0]
        close(ours(x)[0], wanted, 1e-4)
    close(ours.pixel_mean[:, 0, 0], [0.485, 0.456, 0.406])
    assert "normalizing as for ImageNet" in capsys.readouterr().out


def test_init_from_what_does_not_fit_is_refused_before_the_data_is_read(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(dinov2_cifar, "prepare_images", lambda *args: pytest.fail("read"))
    cases = [
        (vit(embed_dim=48, num_heads=3).state_dict(), "size mismatch"),
        (vit(depth=3).state_dict(), "blocks.2.norm1.weight"),
        (vit(layer_scale=0.1).state_dict(), "blocks.0.ls1.gamma"),
        (vit(patch_size=4).state_dict(), "size mismatch"),
        ({"conv1.weight": torch.zeros(1)}, "conv1.weight, but no pos_embed"),
        ([1], "list"),
        ({**vit().state_dict(), "pos_embed": torch.zeros(1, 21, 32)}, "not of a square"),
    ]
    for i, (states, message) in enumerate(cases):
        path = save(tmp_path / f"{i}.pth", states)
        with pytest.raises(InputError, match=rf"INIT_FROM .*{i}\.pth.*{message}"):
            train_dinov2(small(INIT_FROM=str(path)))
    with pytest.raises(InputError, match="INIT_FROM .'nowhere'. is not a file"):
        train_dinov2(small(INIT_FROM="nowhere"))
    folder = Path(small().OUTPUT_DIR)  # whose checkpoints a new run moves
    for name in "dinov2_last.pth", "dinov2_epoch_10.pth":
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
        with pytest.raises(InputError, match=rf"INIT_FROM .*{name}.. is moved .* OUTPUT_DIR"):
            train_dinov2(small(INIT_FROM=str(folder / name)))


def test_init_from_a_checkpoint_of_another_number_of_heads_is_refused(small, checkpoint):
    dims = {"tiny": {"dim": 32, "depth": 2, "heads": 4}}
    with pytest.raises(InputError, match="it has 2 attention heads, not 4"):
        started(small, checkpoint, MODEL_DIMS=dims)


def test_the_backbone_s_rate_rises_linearly_from_the_end_of_its_freeze(small):
    c = small(FREEZE_BACKBONE=0.3, INIT_FROM="x")
    rates = [dinov2_cifar.hyperparameters(c, step, 100) for step in (0, 29, 30, 50, 99)]
    expected = [0, 0, 0, 20 / 70, 69 / 70]
    assert [r["backbone_lr"] for r in rates] == pytest.approx(
        [r["lr"] * part for r, part in zip(rates, expected, strict=True)]
    )
    assert "backbone_lr" not in dinov2_cifar.hyperparameters(small(FREEZE_BACKBONE=0.3), 0, 100)


def test_freeze_backbone_keeps_weights_for_a_part_of_the_run(small, checkpoint, shapes, no_figures):
    given = dinov2_cifar.read_checkpoint(checkpoint)["teacher_state_dict"]

    def learned(freeze):
        model = train_dinov2(small(INIT_FROM=checkpoint, FREEZE_BACKBONE=freeze), shapes[0])
        fresh = DINOv2(model.config)
        assert not torch.equal(model.img_head.mlp[0].weight, fresh.img_head.mlp[0].weight)
        return (model.student.blocks[0].attn.qkv.weight - given["blocks.0.attn.qkv.weight"]).norm()

    distances = [learned(freeze) for freeze in (1.0, 0.5, 0.0)]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_a_run_from_weights_starts_with_their_accuracy_and_resumes(
    small, checkpoint, shapes, capsys
):
    config = small(INIT_FROM=checkpoint, PRECISION="fp32")
    train_dinov2(config, shapes)
    assert "network at start" in capsys.readouterr().out
    (baseline,) = read_records(config.OUTPUT_DIR, "baseline")
    teacher = load_backbone(checkpoint)
    assert [r["backbone_lr"] for r in read_records(config.OUTPUT_DIR, "step")][0] == 0
    x, x_test = (
        dinov2_cifar.extract_features(teacher, shapes[i], precision="fp32") for i in (0, 2)
    )
    assert baseline["knn"] == dinov2_cifar.knn_accuracy(x, shapes[1], x_test, shapes[3])
    assert baseline["rank"] == pytest.approx(dinov2_cifar.rank_me(x_test), rel=1e-4)
    Path(checkpoint).rename(checkpoint + ".moved")  # not needed any more
    longer = small(INIT_FROM=checkpoint, RESUME="newest", TOTAL_EPOCHS=2)
    model = train_dinov2(longer, shapes)  # goes on, and does not start again
    assert len(read_records(config.OUTPUT_DIR, "epoch")) == 2
    close(model.teacher.pixel_mean, teacher.pixel_mean)


@pytest.mark.slow
def test_fresh_heads_do_not_destroy_a_trained_backbone(tmp_path, no_figures):
    images = (*make_shapes(2048, 32, seed=0), *make_shapes(1024, 32, seed=1))
    first = {**QUICK, "TOTAL_EPOCHS": 3, "EVAL_EVERY": 0, "OUTPUT_DIR": str(tmp_path / "first")}
    train_dinov2(Config(**first), images)
    weights = str(tmp_path / "first" / "dinov2_final.pth")
    then = {"TOTAL_EPOCHS": 1, "INIT_FROM": weights, "PROJECTION_DIM": 512}
    train_dinov2(Config(**{**first, **then, "OUTPUT_DIR": str(tmp_path / "then")}), images)
    start, end = (r["knn"] for r in read_records(tmp_path / "then", "baseline", "epoch"))
    assert start > 0.2 and end > start - 0.02


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
def test_exported_network_takes_any_batch_height_and_width(registers):
    network, dynamic = vit(register_tokens=registers), torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    exported = torch.export.export(network, (torch.randn(2, 3, 32, 40),), dynamic_shapes=shapes)
    for shape in ((1, 3, 32, 32), (3, 3, 32, 32), (2, 3, 64, 24), (5, 3, 16, 16)):
        x = torch.randn(shape)
        for actual, expected in zip(exported.module()(x), network(x), strict=True):
            close(actual, expected)


@torch.no_grad()
@pytest.mark.skipif(not has("onnx", "onnxruntime", "onnxscript"), reason="no onnxruntime")
def test_onnx_takes_any_batch(tmp_path):
    runtime, network = pytest.importorskip("onnxruntime"), vit()
    path, example = str(tmp_path / "model.onnx"), (torch.randn(2, 3, 32, 32),)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(network, example, path, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path)
    for n in (1, 2, 7):
        x = torch.randn(n, 3, 32, 32)
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for actual, expected in zip(outputs, network(x), strict=True):
            close(actual, expected)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_ahead_of_time_inductor_gives_the_same_features(tmp_path):
    network, dynamic = vit(), torch.export.Dim.DYNAMIC
    exported = torch.export.export(
        network, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: dynamic},)
    )
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=path)
    x = torch.randn(5, 3, 32, 32)
    for actual, expected in zip(
        torch._inductor.aoti_load_package(path)(x), network(x), strict=True
    ):
        close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("registers, layer_scale", [(0, 0.0), (0, 0.1), (2, 0.1)])
def test_transformers_gives_the_same_features(registers, layer_scale, tmp_path):
    pytest.importorskip("transformers")
    from to_transformers import to_transformers

    network = vit(register_tokens=registers, layer_scale=layer_scale)
    x = torch.randn(2, 3, 32, 32)
    theirs = to_transformers(network)
    theirs.save_pretrained(tmp_path)
    for model in (theirs, type(theirs).from_pretrained(tmp_path)):
        tokens = model(x).last_hidden_state
        close(tokens[:, 0], network(x)[0], 1e-5)
        close(tokens[:, 1 + registers :], network(x)[1], 1e-5)


def embedded(folder, *words):
    main(["--embed", str(folder), "--resume", TEACHER, "--device", "cpu", *words])
    return np.load("checkpoints/features.npz", allow_pickle=False)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Return a folder with images of two classes in two splits, and some that are not readable."""
    monkeypatch.chdir(tmp_path)
    images, i = make_shapes(13, 40, seed=3)[0].permute(0, 2, 3, 1).numpy(), iter(range(13))
    for folder, count in {"train/a": 5, "train/b": 4, "test/b": 3, "test": 1}.items():
        Path("in", folder).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            Image.fromarray(images[n := next(i)]).save(f"in/{folder}/{n}.png")
    Path("in/train/a/cut.png").write_bytes(Path("in/train/a/0.png").read_bytes()[:200])
    return Path("in")


def test_embed_writes_features_names_and_labels_of_a_folder(pictures, capsys, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "islice", lambda items, n: islice(items, 4))
    found = embedded(pictures, "--patches")
    assert sorted(found.files) == ["features", "labels", "names", "patch_features"]
    teacher = load_backbone(TEACHER)
    assert len(found["names"]) == 13 and "cut.png" in capsys.readouterr().err
    for i, name in enumerate(found["names"]):
        image, parts = Image.open(pictures / name), Path(name).parts
        close(found["features"][i], dinov2_cifar.extract_features(teacher, image)[0], 0.05)
        z = dinov2_cifar.extract_features(teacher, image, patches=True)[0]
        close(found["patch_features"][i], z, 0.1)
        assert found["labels"][i] == (parts[1] if len(parts) == 3 else "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="lists of mapped files: Linux")
def test_embed_maps_no_file_that_it_removes(pictures, monkeypatch):
    class Folder(tempfile.TemporaryDirectory):
        def __exit__(self, *exception):
            assert self.name not in Path("/proc/self/maps").read_text()
            super().__exit__(*exception)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Folder)
    assert len(embedded(pictures, "--patches")["names"]) == 13


@pytest.mark.parametrize("words, values", [([], 192), (["--patches"], 17 * 192)], ids=str)
def test_embed_without_room_is_refused_and_leaves_nothing(
    words, values, pictures, capsys, monkeypatch
):
    room = 2 * 4 * 14 * values  # of the 14 files' tables, and of the archive
    usage = lambda folder: shutil._ntuple_diskusage(10**9, 0, room)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(SystemExit, match="2"):
        embedded(pictures, *words)
    assert "OUTPUT_DIR (checkpoints) has 0 MB left, saving takes 0" in capsys.readouterr().err
    assert os.listdir("checkpoints") == [".lock"]
    room += 1
    assert len(embedded(pictures, *words)["names"]) == 13


def test_embed_takes_archives_and_says_what_is_missing(pictures, capsys):
    x, y = make_shapes(6, 32)
    arrays = {"x_train": x.numpy()[:4], "y_train": y[:4], "x_test": x.numpy()[4:]}
    np.savez("in.npz", **arrays)
    np.savez("one.npz", x_train=x.numpy().transpose(0, 2, 3, 1)[0])
    np.savez("less.npz", **{**arrays, "y_train": y[:3]})
    np.savez("none.npz", images=x)
    found = embedded("in.npz")
    assert found["names"].tolist() == [
        *(f"x_train[{i}]" for i in range(4)),
        "x_test[0]",
        "x_test[1]",
    ]
    assert found["labels"].tolist() == [*y[:4].tolist(), -1, -1]
    close(found["features"], dinov2_cifar.extract_features(load_backbone(TEACHER), x), 0.05)
    for words, message in [
        (["--embed", "in"], "--resume CHECKPOINT"),
        (["--embed", "nowhere", "--resume", TEACHER, "--output-dir", "b"], "nowhere"),
        (["--embed", "in", "--resume", "nowhere"], "nowhere"),
        (["--embed", "in", "--resume", TEACHER], "features.npz exists"),
        (
            ["--embed", "one.npz", "--resume", TEACHER, "--output-dir", "b"],
            "images must be (N,3,H,W), (N,H,W,3) or gray (N,H,W), not (32, 32, 3)",
        ),
        (
            ["--embed", "less.npz", "--resume", TEACHER, "--output-dir", "b"],
            "4 images, but 3 labels",
        ),
        (["--embed", "none.npz", "--resume", TEACHER, "--output-dir", "b"], "none.npz"),
        (["--embed", "in", "--draw", TEACHER], "not allowed with"),
        (["--patches"], "--embed"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main([*words, "--device", "cpu"])
        assert message in capsys.readouterr().err


def test_draw_shows_a_checkpoint_s_figures(pictures, checkpoint):
    main(["--draw", checkpoint, "--dataset", "in", "--output-dir", "out", "--device", "cpu"])
    names = {path.name: path.stat().st_size for path in Path("out/figures").iterdir()}
    wanted = {"views", "attention", "pca", "neighbours", "map", "curves"}
    main(["--draw", TEACHER, "--dataset", "in", "--output-dir", "out", "--device", "cpu"])
    assert len([*Path("out/figures-dinov2_tiny_cifar10").iterdir()]) == 5  # beside the others
    assert {f"{name}.png" for name in wanted} == names.keys() and min(names.values()) > 5000
    for name in names:
        width, height = Image.open(Path("out/figures", name)).size
        assert width == 1260 and height < 3000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_embed_and_draw_compute_in_the_precision_of_their_flag(precision, pictures, monkeypatch):
    x, drawn = make_shapes(6, 32)[0], []
    np.savez("in.npz", x_train=x.numpy())
    found = torch.from_numpy(embedded("in.npz", "--precision", precision)["features"])
    features = {
        name: dinov2_cifar.extract_features(load_backbone(TEACHER), x, precision=name)
        for name in ("fp32", "bf16")
    }
    errors = {name: (found - expected).abs().max() for name, expected in features.items()}
    assert errors.pop(precision) < 1e-5 < 1e-3 < min(errors.values())
    monkeypatch.setattr(dinov2_cifar, "plot_figures", lambda b, *args: drawn.append(b.precision))
    for words, expected in (["--precision", precision], precision), ([], "auto"):
        main(["--draw", TEACHER, "--dataset", "in.npz", "--device", "cpu", *words])
        assert drawn.pop() == expected


@pytest.fixture
def grids(monkeypatch):
    """Return the rows that each figure is made of."""
    found = {}
    monkeypatch.setattr(
        dinov2_cifar, "save_grid", lambda rows, title, path: found.update({path: rows})
    )
    return found


def test_neighbours_are_the_most_similar_others_and_framed_by_class(grids):
    x, y = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20) % 3
    y[5:] = y[5:].where(y[5:] > 0, -1)
    z = torch.nn.functional.normalize(torch.randn(20, 4), dim=1)
    for queries in ((x, z, y), (x.flip(0) // 2, z.flip(0), y.flip(0))):
        dinov2_cifar.plot_neighbors((x, z, y), queries, ["a", "b", "c", ""], "path")
        assert len(grids["path"]) == 6
        for i, (_, images, captions) in zip((0, 3, 7, 11, 15, 19), grids["path"], strict=True):
            own = torch.equal(queries[0], x)
            order = (queries[1][i] @ z.T).argsort(descending=True)[own : 5 + own]
            assert torch.equal(images, torch.cat([queries[0][i : i + 1], x[order]]) / 255)
            label = queries[2][i]
            for j, (text, color) in zip(order, captions[1:], strict=True):
                known = min(label, y[j]) >= 0
                assert color == (("#d55e00", "#0072b2")[label == y[j]] if known else "black")
                name = ["a", "b", "c", ""][y[j]]
                mark = ("x", "=")[label == y[j]] if known else ""
                assert text == f"{mark} {name} {queries[1][i] @ z[j]:.2f}"


@torch.no_grad()
def test_attention_of_large_images_is_that_of_each(grids):
    network = vit(patch_size=32, img_size=256)
    x = torch.randint(256, (3, 3, 256, 256), dtype=torch.uint8)
    dinov2_cifar.plot_attention(network, x, "all")  # in batches of 2
    for i in range(3):
        dinov2_cifar.plot_attention(network, x[i : i + 1], "one")
        for (_, ours), (_, expected) in zip(grids["all"], grids["one"], strict=True):
            close(ours[i], expected[0], 0.02)


@torch.no_grad()
def test_attention_is_that_of_the_class_token_over_four_times_the_grid(grids):
    network, x = vit(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    qkv = network.blocks[-1].attn.qkv
    qkv.weight.zero_()  # equal attention to all
    dinov2_cifar.plot_attention(network, x, "path")
    names, images = zip(*grids["path"], strict=True)
    assert names == ("image", "mean", "head 1", "head 2") and images[1].shape == (2, 3, 128, 128)
    colors = images[1] - images[1].mean(1, keepdim=True)  # without the gray of the image
    assert colors.std((2, 3)).max() < 1e-3
    torch.manual_seed(0)
    qkv.weight.normal_()
    dinov2_cifar.plot_attention(network, x, "path")
    colors = grids["path"][2][1] - grids["path"][2][1].mean(1, keepdim=True)
    tiles = colors.unflatten(3, (16, 8)).unflatten(2, (16, 8))
    assert tiles.std((3, 5)).max() < 1e-3 < tiles.std((2, 4)).max()

    # By hand, head by head
    network.precision = "fp32"
    dinov2_cifar.plot_attention(network, x, "path")
    large = TF.resize(x, [128, 128], TF.InterpolationMode.BICUBIC)
    tokens = network.blocks[0](network.prepare_tokens(large / 255))
    q, k, _ = qkv(network.blocks[1].norm1(tokens)).chunk(3, dim=-1)
    gray = TF.rgb_to_grayscale(large / 255, 3)
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        scores = torch.stack([k[i, :, part] @ q[i, 0, part] for i in range(2)]) / 4
        weights = scores.softmax(1)[:, 1:].view(2, 16, 16)
        weights = weights / weights.amax((1, 2), keepdim=True)
        colors = torch.from_numpy(colormaps["inferno"](weights.numpy())[..., :3]).permute(
            0, 3, 1, 2
        )
        expected = 0.3 * gray + 0.7 * colors.repeat_interleave(8, 2).repeat_interleave(8, 3)
        assert (grids["path"][2 + head][1] - expected).abs().mean() < 1e-3  # 256 colors


def test_patches_show_what_differs_from_the_border(grids):
    class Pixels(torch.nn.Module):  # features are the patches' means
        patch_embed = type("", (), {"patch_size": 8, "num_patches": 16})

        def __init__(self):
            super().__init__()
            self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 3))
            self.pixel_mean, self.pixel_std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)

        def forward(self, x):
            patches = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((3, 5))
            return patches.mean((2, 3)), patches.flatten(2).mT

    x = torch.full((4, 3, 32, 32), 20, dtype=torch.uint8)
    x[:, :, 8:24, 8:24] = torch.randint(100, 256, (4, 3, 16, 16), dtype=torch.uint8)
    dinov2_cifar.plot_patches(Pixels(), {"a": x}, "path")
    (name, images), (_, colors) = grids["path"]
    assert name == "a" and torch.equal(images, x / 255) and colors.shape == (4, 3, 16, 16)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[5:11, 5:11] = True  # without the blurred edge
    assert (colors.amax(1)[:, inside] > 0).float().mean() > 0.9
    inside[3:13, 3:13] = True
    assert (colors[:, :, ~inside] == 0).all()


def test_tensorboard_gets_scalars_and_figures_and_shows_a_resumed_run_once(small, shapes):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_dinov2(small(TENSORBOARD=True), shapes[0])
    train_dinov2(small(TENSORBOARD=True, TOTAL_EPOCHS=2, RESUME="newest"), shapes[0])
    found = EventAccumulator(str(Path(small().OUTPUT_DIR, "tensorboard")), {"images": 0}).Reload()
    rows = read_records(small().OUTPUT_DIR, "step")
    for name in ("loss", "lr"):
        scalars = [(e.step, e.value) for e in found.Scalars(f"step/{name}")]
        assert scalars == [(r["step"], pytest.approx(r[name], rel=1e-5)) for r in rows]
    assert {"curves", "views"} <= {*found.Tags()["images"]}


def test_tensorboard_is_asked_for_by_name(small, monkeypatch):
    monkeypatch.setattr(dinov2_cifar, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        train_dinov2(small(TENSORBOARD=True))


def test_config_takes_the_settings_of_a_run(small, checkpoint, tmp_path, no_figures):
    states = dinov2_cifar.read_checkpoint(checkpoint)["config"]
    left = {"OUTPUT_DIR", "DEVICE", "RESUME"}
    for path in (checkpoint, str(Path(checkpoint).parent / "metrics.jsonl")):
        found = parse_arguments(["--config", path, "--seed", "5"]).to_dict()
        assert found["SEED"] == 5 and found["OUTPUT_DIR"] == "checkpoints"
        assert {k: v for k, v in found.items() if k not in left | {"SEED"}} == {
            k: v for k, v in states.items() if k not in left | {"SEED"}
        }
    folder = Path(checkpoint).parent
    longer = small(OUTPUT_DIR=str(folder), TOTAL_EPOCHS=3, RESUME="newest", LEARNING_RATE=0.01)
    train_dinov2(longer, make_shapes(64, 32, seed=7)[0])
    resumed = parse_arguments(["--config", str(folder / "metrics.jsonl")])
    assert resumed.TOTAL_EPOCHS == 3
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"SEED": 4}, indent=2))
    assert parse_arguments(["--config", str(settings)]).SEED == 4
    settings.write_text("{")
    with pytest.raises(InputError, match="settings.json has no settings"):
        parse_arguments(["--config", str(settings)])


def test_command_line_works_where_stdout_is_no_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=len, flush=dict))  # of a notebook
    with pytest.raises(SystemExit, match="2"):
        main(["--seed", "-1"])
    assert "SEED (-1)" in capsys.readouterr().err


def test_a_flag_that_does_not_exist_suggests_another():
    with pytest.raises(InputError, match="--locl-crop-size=3; did you mean --local-crop-size?"):
        parse_arguments(["--locl-crop-size=3"])


def test_help_has_groups_and_fits_80_columns():
    words = [sys.executable, str(ROOT / "dinov2_cifar.py"), "--help"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    for title in ("Network", "Projection heads", "Views", "Objective", "Optimization", "Run"):
        assert f"\n{title}:\n" in done.stdout
    assert '"tiny": {"dim": 192' in done.stdout  # as one would type it
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert len(done.stdout.split("\n\n")[0].splitlines()) <= 2
