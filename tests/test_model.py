"""The model: Vision Transformer, projection heads, student and teacher."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from torch import nn
from torchvision.transforms.v2 import functional as TF

from dinov2_cifar import DINOv2, ProjectionHead, TransformerBlock, VisionTransformer


@torch.no_grad()
def randomized(module):
    """Return module in eval mode with random parameters: no zero or one hides a fault."""
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    return module.eval()


def vit(**options):
    """Return a network of 4 x 4 patches of 8 pixels, 32 wide, with 2 blocks and 2 heads."""
    return randomized(VisionTransformer(32, 8, 3, 32, 2, 2, **options))


# Backbone


def weights_of(module):
    return {name: weight.double().cpu() for name, weight in module.state_dict().items()}


def slow_linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def slow_norm(w, name, x, dim=-1, eps=1e-6):
    x = x - x.mean(dim, keepdim=True)
    x = x / (x.square().mean(dim, keepdim=True) + eps).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def slow_gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def slow_attention(w, name, x, heads=2):
    """Attend token by token and head by head: (T,D) -> (T,D)."""
    q, k, v = slow_linear(w, f"{name}.qkv", x).chunk(3, 1)
    out, width = torch.zeros_like(x), x.shape[1] // heads
    for own in torch.arange(x.shape[1]).chunk(heads):
        for t in range(len(x)):
            scores = [((q[t, own] * key[own]).sum() / math.sqrt(width)).exp() for key in k]
            mixed = sum(score * value[own] for score, value in zip(scores, v, strict=True))
            out[t, own] = mixed / sum(scores)
    return slow_linear(w, f"{name}.proj", out)


def slow_vit(w, image, mask, p=8):
    """Turn one image (3,H,W) into a class token (D,) and patch tokens (N,D)."""
    side = math.isqrt(w["pos_embed"].shape[1] - 1)
    rows, columns = (length // p for length in image.shape[1:])
    grid = w["pos_embed"][0, 1:].T.unflatten(1, (side, side))
    grid = TF.resize(grid, [rows, columns], TF.InterpolationMode.BICUBIC)  # (D,rows,columns)
    tokens = [w["cls_token"][0, 0] + w["pos_embed"][0, 0], *w.get("register_tokens", [[]])[0]]
    prefix = len(tokens)
    for n in range(rows * columns):
        y, x = n // columns, n % columns
        pixels = image[:, y * p : y * p + p, x * p : x * p + p].double()
        patch = (w["patch_embed.proj.weight"] * pixels).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
        tokens.append((w["mask_token"][0] if mask[n] else patch) + grid[:, y, x])
    x = torch.stack(tokens)
    for name in ("blocks.0", "blocks.1"):
        y = slow_attention(w, f"{name}.attn", slow_norm(w, f"{name}.norm1", x))
        x = x + w.get(f"{name}.ls1.gamma", 1) * y
        y = slow_gelu(slow_linear(w, f"{name}.mlp.fc1", slow_norm(w, f"{name}.norm2", x)))
        x = x + w.get(f"{name}.ls2.gamma", 1) * slow_linear(w, f"{name}.mlp.fc2", y)
    x = slow_norm(w, "norm", x)
    return x[0], x[prefix:]


@torch.no_grad()
@pytest.mark.parametrize("registers, layer_scale", [(0, 0.0), (2, 0.5)])
@pytest.mark.parametrize("height, width", [(32, 32), (16, 40), (8, 64)])
def test_vit_equals_slow_reference(device, height, width, registers, layer_scale):
    net = vit(register_tokens=registers, layer_scale=layer_scale).to(device)
    x, mask = torch.rand(2, 3, height, width), torch.rand(2, height * width // 64) < 0.3
    outputs = net(x.to(device), mask.to(device))
    for i in range(2):
        for ours, slow in zip(outputs, slow_vit(weights_of(net), x[i], mask[i]), strict=True):
            close(ours[i], slow, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("leading", [(6,), (2, 3, 4)])
def test_head_equals_slow_reference(device, leading, batch_norm):
    """Batch norm uses the statistics of the batch in eval mode too."""
    head = randomized(ProjectionHead(16, 10, 24, 8, batch_norm)).to(device)
    x = 3 + 2 * torch.randn(*leading, 16)
    w, y = weights_of(head), x.double().flatten(0, -2)
    for i in (0, 3, 6):
        y = slow_linear(w, f"mlp.{i}", y)
        y = slow_norm(w, f"mlp.{i + 1}", y, 0, 1e-5) if batch_norm else y
        y = slow_gelu(y) if i < 6 else y
    expected = F.cosine_similarity(y.unsqueeze(1), w["prototypes"], dim=-1)
    for mode in (True, False):
        close(head.train(mode)(x.to(device)), expected.view(*leading, 10), 1e-4)


def test_vit_refuses_sizes_that_do_not_divide():
    for height, width in ((33, 32), (32, 36), (4, 8)):
        with pytest.raises(ValueError, match=rf"{height}, {width}.*patch size 8"):
            vit()(torch.zeros(1, 3, height, width))
    with pytest.raises(ValueError, match="10.*3"):
        TransformerBlock(10, 3)


def timm_vit(layer_scale, registers):
    timm = pytest.importorskip("timm")
    options = {"global_pool": "token", "init_values": layer_scale or None}
    options |= {"reg_tokens": registers, "no_embed_class": registers > 0, "dynamic_img_size": True}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**size, num_classes=0, **options)


def assert_same_features(ours, theirs, registers):
    for height, width in ((32, 32), (16, 64)):
        x = torch.randn(3, 3, height, width)
        class_token, patches = ours.eval()(x)
        features = theirs.eval().forward_features(x)
        close(class_token, features[:, 0], 1e-4)
        close(patches, features[:, 1 + registers :], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
@pytest.mark.parametrize("registers", [0, 4])
def test_state_dict_loads_into_timm(layer_scale, registers):
    theirs = timm_vit(layer_scale, registers)
    ours = vit(layer_scale=layer_scale, register_tokens=registers)
    state, unexpected = ours.state_dict(), {"mask_token", "pixel_mean", "pixel_std"}
    if registers:  # in timm, registers and class token have no position
        timm = pytest.importorskip("timm")
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, theirs)
        unexpected.remove("mask_token")
    result = theirs.load_state_dict(state, strict=False)
    assert not result.missing_keys and set(result.unexpected_keys) == unexpected
    assert_same_features(ours, theirs, registers)


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
@pytest.mark.parametrize("registers", [0, 4])
def test_weights_in_metas_layout_load_and_give_timms_features(layer_scale, registers):
    theirs = randomized(timm_vit(layer_scale, registers))
    state = {**theirs.state_dict(), "mask_token": torch.randn(1, 32)}
    if registers:  # Meta adds a position to the class token, which timm has added already
        position = torch.randn(1, 1, 32)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
        state["register_tokens"] = state.pop("reg_token")
    ours = vit(layer_scale=layer_scale, register_tokens=registers)
    result = ours.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {"pixel_mean", "pixel_std"} and not result.unexpected_keys
    assert_same_features(ours, theirs, registers)


@pytest.mark.parametrize("registers, layer_scale", [(0, 0.0), (3, 0.5)])
def test_patch_indices_select_outputs_and_gradients_of_the_whole(device, registers, layer_scale):
    net = vit(register_tokens=registers, layer_scale=layer_scale).to(device)
    x, mask = torch.randn(3, 3, 16, 32, device=device), torch.rand(3, 8, device=device) < 0.4
    mask[0], mask[1, 7] = False, True
    indices = mask.flatten().nonzero().squeeze(1)
    class_tokens, patches = net(x, mask)
    whole, partial = (class_tokens, patches[mask]), net(x, mask, indices)
    directions = [torch.randn_like(part) for part in whole]
    gradients = []
    for outputs in (whole, partial):
        loss = sum((y * direction).sum() for y, direction in zip(outputs, directions, strict=True))
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for ours, wanted in zip((*partial, *gradients[1]), (*whole, *gradients[0]), strict=True):
        close(ours, wanted, 1e-4)
    assert net(x, None, indices[:0])[1].shape == (0, 32)


def test_patch_indices_and_drop_path_skip_the_same_images(device):
    net, x = vit(drop_path=0.5).to(device).train(), torch.randn(16, 3, 16, 16, device=device)
    indices = torch.randperm(64, device=device)[:50]
    torch.manual_seed(0)
    class_tokens, patches = net(x)
    torch.manual_seed(0)
    partial = net(x, None, indices)
    close(partial[0], class_tokens)
    close(partial[1], patches.flatten(0, 1)[indices])
    assert not torch.allclose(net.eval()(x)[0], class_tokens, atol=1e-2)


# Dropout, starting values, precision


@pytest.mark.parametrize("layer", ["attn", "mlp"])
def test_dropout_acts_in_training_only(layer):
    layer, x = getattr(TransformerBlock(16, 2, dropout=0.5), layer), torch.randn(2, 5, 16)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize("bf16", [False, True])
def test_dropout_acts_on_attention_weights(bf16):
    attention = TransformerBlock(64, 1, dropout=0.5).attn
    nn.init.zeros_(attention.qkv.weight)  # all tokens are attended to alike
    nn.init.eye_(attention.qkv.weight[128:].data)
    nn.init.eye_(attention.proj.weight)
    nn.init.zeros_(attention.proj.bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = attention(torch.ones(64, 50, 64)).float()
    sums = y[y > 0] / 2  # what output dropout leaves, it doubles
    assert sums.std() > 0.1 and abs(sums.mean() - 1) < 0.02  # means of 50 times 0 or 2


def test_drop_path_skips_whole_images_and_keeps_the_expectation(device):
    for layer in ("attn.proj", "mlp.fc2"):  # leave one of the two branches
        block = randomized(TransformerBlock(8, 2, drop_path=0.25)).to(device)
        for parameter in block.get_submodule(layer).parameters():
            nn.init.zeros_(parameter)
        x = torch.randn(1, 3, 8, device=device).expand(4000, -1, -1)
        full, added = block(x) - x, block.train()(x) - x
        skipped = (added == 0).all(2).all(1)
        close(added[~skipped], full[~skipped] / 0.75, 1e-4)
        assert 0.22 < skipped.float().mean() < 0.28


def test_drop_path_rises_linearly_from_zero():
    net = VisionTransformer(32, 8, 3, 32, 5, 2, drop_path=0.2)
    rates = [getattr(block.drop_path, "p", 0) for block in net.blocks]
    close(torch.tensor(rates), [0, 0.05, 0.1, 0.15, 0.2])


def test_layer_scale_starts_at_its_value():
    weights = VisionTransformer(32, 8, 3, 32, 2, 2, layer_scale=1e-5).state_dict()
    gammas = torch.stack([weight for name, weight in weights.items() if name.endswith("gamma")])
    close(gammas, torch.full((4, 32), 1e-5), 1e-9)


def test_head_starts_with_small_weights_and_zero_biases():
    head = ProjectionHead(64, 256, bottleneck_dim=32, batch_norm=True)
    linears = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linears] == [256, 256, 32]  # hidden: 4 x input
    assert not any(layer.bias.any() for layer in linears)
    for weight in (*(layer.weight for layer in linears), head.prototypes):
        assert 0.015 < weight.std() < 0.025


def test_attention_in_bf16_has_the_gradients_of_fp32():
    attention = randomized(TransformerBlock(24, 4, qkv_bias=True).attn)
    x = torch.randn(2, 7, 24, requires_grad=True)
    inputs, direction = [x, *attention.parameters()], torch.randn(2, 7, 24)
    wanted = torch.autograd.grad((attention(x) * direction).sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad((attention(x) * direction).sum(), inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("layer_scale, inner", [(0.0, torch.bfloat16), (1e-5, torch.float32)])
def test_autocast_runs_blocks_in_bf16_but_norm_and_layer_scale_in_fp32(device, layer_scale, inner):
    """In bfloat16, branches scaled by 1e-5 would be lost."""
    net, seen = vit(layer_scale=layer_scale).to(device), []
    net.blocks[0].register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    x = torch.randn(2, 3, 32, 32, device=device)
    with torch.autocast(device, torch.bfloat16):
        outputs = net(x)
    assert seen == [inner] and {y.dtype for y in outputs} == {torch.float32}
    assert (outputs[0] - net(x)[0]).abs().max() < 0.1


def test_head_logits_are_fp32_products_under_autocast(device):
    head, seen = ProjectionHead(32, 64, 32, 16).to(device), []
    head.mlp.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.autocast(device, torch.bfloat16):
        logits = head(torch.randn(8, 32, device=device))
    assert seen[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
    close(logits, F.cosine_similarity(seen[0].float().unsqueeze(1), head.prototypes, dim=-1))


# Student and teacher


def pairs(model):
    """Return every teacher parameter with the student parameter that it follows."""
    for name in ("", "_img_head", "_patch_head"):
        teacher, student = getattr(model, f"teacher{name}"), getattr(model, name[1:] or "student")
        yield from zip(teacher.parameters(), student.parameters(), strict=True)


def test_teacher_starts_as_an_exact_copy_with_its_own_memory(small):
    model = DINOv2(small(REGISTER_TOKENS=2, LAYER_SCALE=0.1))
    for teacher, student in pairs(model):
        assert torch.equal(teacher, student)
        assert student.requires_grad and not teacher.requires_grad
    memory = [p.data_ptr() for p in model.parameters()]
    assert len(set(memory)) == len(memory) == 2 * len(list(pairs(model)))
    assert not torch.equal(model.img_head.prototypes, model.patch_head.prototypes)


def test_teacher_stays_in_eval_mode(small):
    model = DINOv2(small(DROPOUT=0.3, DROP_PATH=0.3))
    for mode in (True, False, True):
        model.train(mode)
        for name, module in model.named_modules():
            assert module.training == (mode and not name.startswith("teacher"))


@pytest.mark.parametrize("m", [0.0, 0.3, 1.0])
def test_teacher_is_the_moving_average_of_backbone_and_heads(small, device, m):
    model = DINOv2(small(REGISTER_TOKENS=1, DEVICE=device)).to(device)
    with torch.no_grad():
        for _, student in pairs(model):
            student.normal_()
    before = [(teacher.clone(), student.clone()) for teacher, student in pairs(model)]
    model.update_teacher(m)
    for (teacher, student), (old_teacher, old_student) in zip(pairs(model), before, strict=True):
        close(teacher, m * old_teacher + (1 - m) * old_student, 1e-6)
        assert torch.equal(student, old_student)
