"""The model: layers, Vision Transformer, weights of timm and Meta, heads, student and teacher."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2_cifar import (
    DINOv2, MLP, MultiHeadAttention, PatchEmbedding, ProjectionHead, TransformerBlock,
    VisionTransformer)


@torch.no_grad()
def randomized(module):
    """Return module in eval mode with random parameters: no zero or one hides a fault."""
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    return module.eval()


def vit(**options):
    """Return a network of 4 x 4 patches of 8 pixels, 32 wide, with 2 blocks and 2 heads."""
    return randomized(VisionTransformer(32, 8, 3, 32, 2, 2, **options))


def make_views(config, batch=4):
    c = config
    sizes = [c.GLOBAL_CROP_SIZE] * c.GLOBAL_CROPS_NUMBER
    sizes += [c.LOCAL_CROP_SIZE] * c.LOCAL_CROPS_NUMBER
    return [torch.randn(batch, 3, size, size, device=c.DEVICE) for size in sizes]


def half_mask(config, batch=4):
    """Return a mask (R,N) of every other patch of every other crop."""
    patches = (config.GLOBAL_CROP_SIZE // config.PATCH_SIZE) ** 2
    mask = torch.zeros(config.GLOBAL_CROPS_NUMBER * batch, patches, dtype=torch.bool)
    mask[::2, ::2] = True
    return mask.to(config.DEVICE)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- PatchEmbedding

@pytest.mark.parametrize("height, width", [(32, 32), (16, 48), (64, 32)])
def test_patch_embedding_is_a_strided_convolution(device, height, width):
    embed = randomized(PatchEmbedding(32, 8, in_channels=2, embed_dim=24)).to(device)
    x = torch.randn(3, 2, height, width, device=device)
    expected = embed.proj(x).flatten(2).mT
    assert embed.num_patches == 16 and expected.shape == (3, height * width // 64, 24)
    close(embed(x), expected, 1e-4)


@pytest.mark.parametrize("height, width", [(33, 32), (32, 36), (4, 8)])
def test_patch_embedding_refuses_a_size_that_patches_do_not_fill(height, width):
    with pytest.raises(ValueError, match=rf"{height}, {width}.*patch size 8"):
        vit()(torch.zeros(1, 3, height, width))


# ---- Attention, MLP, block

@torch.no_grad()
def test_attention_equals_loops_over_heads_and_tokens():
    attention = randomized(MultiHeadAttention(12, 3, qkv_bias=True))
    x = torch.randn(2, 5, 12)
    q, k, v = (x @ w.T + b for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)))
    out = torch.zeros(2, 5, 12)
    for b in range(2):
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            for t in range(5):
                score = torch.tensor([float(q[b, t, own] @ k[b, s, own]) / 2 for s in range(5)])  # √4 = 2
                weights = score.exp() / score.exp().sum()
                out[b, t, own] = sum(weights[s] * v[b, s, own] for s in range(5))
    close(attention(x), attention.proj(out))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_torch_with_the_same_weights(device, bias):
    ours = randomized(MultiHeadAttention(24, 4, qkv_bias=bias)).to(device)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True).to(device)
    qkv_bias = ours.qkv.bias if bias else torch.zeros(72)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": qkv_bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    x = torch.randn(2, 7, 24, device=device)
    close(ours(x), theirs(x, x, x, need_weights=False)[0], 1e-4)


def test_attention_uses_the_fused_kernel_unless_bfloat16_needs_gradients(device, monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **rest: calls.append(q.shape) or real(q, k, v, **rest))
    attention = randomized(MultiHeadAttention(24, 4)).to(device)
    x = torch.randn(2, 7, 24, device=device)
    attention(x)
    assert calls == [(2, 4, 7, 6)]
    with torch.autocast(device, torch.bfloat16):
        with torch.no_grad():
            fused = attention(x)
        assert len(calls) == 2
        close(attention(x), fused, 0.05)
    assert len(calls) == (2 if device == "cpu" else 3)


def test_attention_in_bfloat16_has_the_gradients_of_the_fused_kernel():
    """The kernel computes those in fp32."""
    attention = randomized(MultiHeadAttention(24, 4, qkv_bias=True))
    x = torch.randn(2, 7, 24, requires_grad=True)
    inputs, direction = [x, *attention.parameters()], torch.randn(2, 7, 24)
    wanted = torch.autograd.grad((attention(x) * direction).sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad((attention(x) * direction).sum(), inputs)
    for ours, theirs in zip(found, wanted):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_attention_drops_weights_in_training_only():
    attention = MultiHeadAttention(64, 1, dropout=0.5)
    nn.init.zeros_(attention.qkv.weight)                        # so all tokens are attended to alike
    nn.init.eye_(attention.qkv.weight[128:].data)
    nn.init.eye_(attention.proj.weight)
    nn.init.zeros_(attention.proj.bias)
    x = torch.ones(64, 50, 64)
    close(attention.eval()(x), x)
    attention.proj.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    sums = []
    attention.train()(x)
    assert sums[0].std() > 0.1 and abs(sums[0].mean() - 1) < 0.02                                 # mean of 50 × (0 or 2)


def test_attention_refuses_a_width_that_is_no_multiple_of_the_heads():
    with pytest.raises(ValueError, match="10.*3"):
        MultiHeadAttention(10, 3)


@pytest.mark.parametrize("hidden, out", [(None, None), (7, None), (7, 3)])
def test_mlp_is_two_linear_layers_around_a_gelu(hidden, out):
    mlp = randomized(MLP(5, hidden, out))
    x = torch.randn(2, 3, 5)
    assert mlp(x).shape == (2, 3, out or 5) and mlp.fc1.out_features == (hidden or 5)
    hidden = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    close(mlp(x), F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias))


@pytest.mark.parametrize("layer", [MultiHeadAttention(16, 2, dropout=0.5), MLP(16, 32, dropout=0.5)])
def test_dropout_acts_in_training_only(layer):
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
def test_block_normalizes_before_each_branch(layer_scale):
    block = TransformerBlock(16, 2, mlp_ratio=3, qkv_bias=True, layer_scale=layer_scale)
    x = torch.randn(2, 5, 16)
    randomized(block)
    scales = (block.ls1.gamma, block.ls2.gamma) if layer_scale else (1.0, 1.0)
    norm = lambda x, layer: F.layer_norm(x, (16,), layer.weight, layer.bias, 1e-6)  # noqa: E731
    y = x + scales[0] * block.attn(norm(x, block.norm1))
    close(block(x), y + scales[1] * block.mlp(norm(y, block.norm2)))
    assert block.mlp.fc1.out_features == 48


def test_layer_scale_starts_at_its_value_and_nearly_closes_the_branches():
    plain, scaled = (TransformerBlock(16, 2, layer_scale=s).eval() for s in (0.0, 1e-5))
    x = torch.randn(2, 5, 16)
    assert scaled.ls1.gamma.tolist() == scaled.ls2.gamma.tolist() == [pytest.approx(1e-5)] * 16
    assert 0 < (scaled(x) - x).abs().max() < 1e-4 < 1e-2 < (plain(x) - x).abs().max()
    loaded = plain.load_state_dict(scaled.state_dict(), strict=False)
    assert not loaded.missing_keys and loaded.unexpected_keys == ["ls1.gamma", "ls2.gamma"]


def test_drop_path_skips_whole_samples_and_keeps_the_expectation(device):
    for layer in ("attn.proj", "mlp.fc2"):  # leave one of the two branches
        block = randomized(TransformerBlock(8, 2, drop_path=0.25)).to(device)
        for parameter in block.get_submodule(layer).parameters():
            nn.init.zeros_(parameter)
        x = torch.randn(1, 3, 8, device=device).expand(4000, -1, -1)
        full = block(x) - x
        assert torch.equal(block(x), block(x))
        added = block.train()(x) - x
        skipped = (added == 0).all(2).all(1)
        close(added[~skipped], full[~skipped] / 0.75, 1e-4)  # a sample is skipped as a whole or not
        assert 0.22 < skipped.float().mean() < 0.28
        close(added.mean(0), full[0], 0.05)


def test_drop_path_rises_linearly_from_zero():
    blocks = VisionTransformer(32, 8, 3, 32, 5, 2, drop_path=0.2).blocks
    rates = [getattr(block.drop_path, "p", 0) for block in blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5}])
def test_block_with_token_indices_returns_those_of_the_whole(device, options):
    block = randomized(TransformerBlock(16, 2, **options)).to(device)
    x = torch.randn(4, 5, 16, device=device)
    indices = torch.tensor([3, 0, 19, 7, 8], device=device)
    close(block(x, indices), block(x).flatten(0, 1)[indices])


# ---- VisionTransformer

@pytest.mark.parametrize("registers", [0, 3])
def test_patch_indices_select_outputs_of_the_whole_with_its_gradients(device, registers):
    net = vit(register_tokens=registers).to(device)
    x, mask = torch.randn(3, 3, 16, 32, device=device), torch.rand(3, 8, device=device) < 0.4
    mask[0], mask[1, 7] = False, True
    indices = mask.flatten().nonzero().squeeze(1)
    full, partial = net(x, mask), net(x, mask, indices)
    whole = full[0], full[1][mask]
    directions = [torch.randn_like(part) for part in whole]
    gradients = []
    for outputs in (whole, partial):
        loss = sum((part * direction).sum() for part, direction in zip(outputs, directions))
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for ours, wanted in zip(partial, whole):
        close(ours, wanted)
    assert partial[1].shape == (int(mask.sum()), 32)
    for ours, wanted in zip(*gradients):
        close(ours, wanted, 1e-4)
    assert net(x, None, indices[:0])[1].shape == (0, 32)


def test_patch_indices_and_drop_path_skip_the_same_images(device):
    net, x = vit(drop_path=0.5).to(device).train(), torch.randn(16, 3, 16, 16, device=device)
    indices = torch.randperm(64, device=device)[:50]
    torch.manual_seed(0)
    class_token, patches = net(x)
    torch.manual_seed(0)
    for ours, wanted in zip(net(x, None, indices), (class_token, patches.flatten(0, 1)[indices])):
        close(ours, wanted)
    assert not torch.allclose(net.eval()(x)[0], class_token, atol=1e-2)


def test_autocast_runs_the_blocks_in_bfloat16_and_the_last_norm_in_fp32(device):
    net, seen = vit(register_tokens=1).to(device), []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    x = torch.randn(2, 3, 32, 32, device=device)
    with torch.autocast(device, torch.bfloat16):
        class_token, patches = net(x)
    assert set(seen) == {torch.bfloat16} and class_token.dtype == patches.dtype == torch.float32
    assert (class_token - net(x)[0]).abs().max() < 0.1
    assert seen.clear() or net(x)[0].dtype == torch.float32 and set(seen) == {torch.float32}


def test_autocast_keeps_the_residual_stream_in_fp32_with_layer_scale(device):
    with torch.autocast(device, torch.bfloat16):
        block = TransformerBlock(16, 2, layer_scale=1e-5).to(device)
        x = torch.ones(2, 3, 16, device=device, dtype=torch.bfloat16)
        assert block(x).dtype == torch.float32 and (block(x) != x).any()


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("height, width", [(32, 32), (16, 48), (8, 8), (64, 40)])
def test_vit_takes_any_size_of_whole_patches(device, height, width, registers):
    net = vit(register_tokens=registers).to(device)
    class_token, patches = net(torch.randn(2, 3, height, width, device=device))
    assert class_token.shape == (2, 32) and patches.shape == (2, height * width // 64, 32)


def test_registers_influence_the_output_but_are_not_in_it():
    net, x = vit(register_tokens=3), torch.randn(2, 3, 32, 32)
    before = net(x)
    tokens = net.prepare_tokens(x)
    assert tokens.shape[1] == 1 + 3 + 16
    close(tokens[:, 1:4], net.register_tokens.expand(2, -1, -1))      # without a place
    close(tokens[:, 4:], net.patch_embed(x) + net.pos_embed[:, 1:])
    for block in net.blocks:
        tokens = block(tokens)
    close(before[1], net.norm(tokens)[:, 4:])
    close(before[0], net.norm(tokens)[:, 0])
    with torch.no_grad():
        net.register_tokens[:, 1].normal_()
    assert all((a - b).abs().amax(-1).min() > 1e-4 for a, b in zip(before, net(x)))


def test_images_of_a_batch_do_not_see_each_other():
    net, x = vit(), torch.randn(3, 3, 32, 32)
    close(net(x)[0][1:2], net(x[1:2])[0])


def test_mask_hides_its_pixels_and_no_others(device):
    net, x = vit().to(device), torch.rand(2, 3, 32, 32, device=device)
    mask = torch.zeros(2, 16, dtype=torch.bool, device=device)
    mask[:, [3, 6]] = True
    before = torch.cat([part.flatten(1) for part in net(x, mask)], 1)
    for patch in range(16):
        changed = x.clone()
        row, column = patch // 4 * 8, patch % 4 * 8
        changed[:, :, row:row + 8, column:column + 8] += torch.rand(1, device=device)
        after = torch.cat([part.flatten(1) for part in net(changed, mask)], 1)
        assert torch.equal(before, after) == (patch in (3, 6))


def test_mask_token_replaces_patches_before_the_position_is_added():
    net, x = vit(), torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [0, 5]] = mask[1, 9] = True
    tokens, plain = net.prepare_tokens(x, mask)[:, 1:], net.prepare_tokens(x)[:, 1:]
    close(tokens[mask], (net.mask_token + net.pos_embed[:, 1:]).expand(2, -1, -1)[mask])
    assert torch.equal(tokens[~mask], plain[~mask])
    assert not torch.allclose(net(x, mask)[1][0, 0], net(x, mask)[1][0, 5], atol=1e-2)
    everything = torch.ones(2, 16, dtype=torch.bool)            # then nothing of the image is left
    assert torch.equal(net(x, everything)[1], net(x + 1, everything)[1])


def test_mask_that_is_empty_changes_nothing():
    net, x = vit(), torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(net(x), net(x, torch.zeros(2, 16, dtype=torch.bool))))


def test_mask_token_starts_at_zero():
    assert VisionTransformer(32, 8, 3, 32, 1, 2).mask_token.abs().max() == 0


@pytest.mark.parametrize("registers", [0, 2])
def test_state_dict_has_the_names_of_timm_and_meta(registers):
    names = set(vit(register_tokens=registers, layer_scale=0.1).state_dict())
    expected = """cls_token mask_token pos_embed patch_embed.proj.weight patch_embed.proj.bias
        norm.weight norm.bias pixel_mean pixel_std""".split()
    expected += ["register_tokens"] * (registers > 0)
    layers = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()
    for i in range(2):
        for kind in ("weight", "bias"):
            expected += [f"blocks.{i}.{layer}.{kind}" for layer in layers]
        expected += [f"blocks.{i}.ls1.gamma", f"blocks.{i}.ls2.gamma"]
    assert names == set(expected)


# ---- Weights of timm and of Meta's DINOv2

def timm_vit(patch_size, layer_scale, registers):
    """Return timm's network of the size of vit(), or with 2 x 2 times the patches."""
    timm = pytest.importorskip("timm")
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=patch_size, embed_dim=32, depth=2, num_heads=2, num_classes=0,
        global_pool="token", class_token=True, init_values=layer_scale or None,
        reg_tokens=registers, no_embed_class=registers > 0)


def assert_same_features(ours, theirs, registers):
    x = torch.randn(3, 3, 32, 32)
    class_token, patches = ours.eval()(x)
    features = theirs.eval().forward_features(x)
    close(class_token, features[:, 0])
    close(class_token, theirs(x))
    close(patches, features[:, 1 + registers:])


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [4, 8])
@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
@pytest.mark.parametrize("registers", [0, 4])
def test_state_dict_loads_into_timm(patch_size, layer_scale, registers):
    timm = pytest.importorskip("timm")
    options = dict(layer_scale=layer_scale, register_tokens=registers)
    ours = randomized(VisionTransformer(32, patch_size, 3, 32, 2, 2, **options))
    theirs, state = timm_vit(patch_size, layer_scale, registers), ours.state_dict()
    unexpected = {"mask_token", "pixel_mean", "pixel_std"}
    if registers:  # in timm, registers and class token have no position
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, theirs)
        unexpected.remove("mask_token")
    result = theirs.load_state_dict(state, strict=False)
    assert not result.missing_keys and set(result.unexpected_keys) == unexpected
    assert_same_features(ours, theirs, registers)


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
@pytest.mark.parametrize("registers", [0, 4])
def test_weights_in_metas_layout_load_and_give_timms_features(layer_scale, registers):
    theirs = randomized(timm_vit(8, layer_scale, registers))
    state = theirs.state_dict()
    state["mask_token"] = torch.randn(1, 32)
    if registers:  # Meta adds a position to the class token, which timm has added already
        position = torch.randn(1, 1, 32)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
        state["register_tokens"] = state.pop("reg_token")
    assert state["pos_embed"].shape == (1, 1 + 16, 32)
    ours = vit(layer_scale=layer_scale, register_tokens=registers)
    result = ours.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {"pixel_mean", "pixel_std"} and not result.unexpected_keys
    assert_same_features(ours, theirs, registers)


# ---- Position embedding

def positions(net, height, width):
    """Return the class token's part (D,) and the grid (rows, columns, D) for this size."""
    encoding = net.interpolate_pos_encoding(torch.zeros(1, 1, 32), width, height)
    assert encoding.shape == (1, 1 + height * width // 64, 32)
    return encoding[0, 0], encoding[0, 1:].unflatten(0, (height // 8, width // 8))


def test_position_grid_serves_its_own_size_unchanged():
    net = vit()
    assert torch.equal(net.interpolate_pos_encoding(torch.zeros(1, 17, 32), 32, 32), net.pos_embed)


@pytest.mark.parametrize("height, width", [(16, 64), (64, 16), (24, 40), (8, 8), (16, 32), (32, 16)])
def test_position_grid_is_resized_bicubically_for_another_size(device, height, width):
    net = vit().to(device)
    own = net.pos_embed[0, 1:].view(4, 4, 32).permute(2, 0, 1).unsqueeze(0)
    expected = F.interpolate(own, size=(height // 8, width // 8), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    class_part, grid = positions(net, height, width)
    assert torch.equal(class_part, net.pos_embed[0, 0])
    close(grid, expected)
    x = torch.randn(2, 3, height, width, device=device)         # and the tokens get it in this order
    close(net.prepare_tokens(x)[:, 1:], net.patch_embed(x) + expected.flatten(0, 1))


@pytest.mark.parametrize("height, width", [(16, 64), (64, 16), (48, 32)])
def test_position_grid_keeps_height_and_width_in_order(height, width):
    net = vit()
    with torch.no_grad():
        net.pos_embed[0, 1:] = torch.arange(4.0).repeat_interleave(4).unsqueeze(1)               # tells the row alone
    grid = positions(net, height, width)[1]
    close(grid, grid[:, :1].expand_as(grid))
    assert (grid.diff(dim=0) > 0.1).all()


def test_position_grid_is_fp32_under_autocast_and_passes_gradients():
    net = vit()
    with torch.autocast("cpu", torch.bfloat16):
        encoding = net.interpolate_pos_encoding(torch.zeros(1, 5, 32), 16, 16)
    assert encoding.dtype == torch.float32
    encoding.sum().backward()
    assert (net.pos_embed.grad[0, :, 0] != 0).all()


# ---- ProjectionHead

@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 3, 4)])
def test_head_logits_are_cosines_for_any_leading_dimensions(device, leading, batch_norm):
    head = randomized(ProjectionHead(16, 10, 24, 8, batch_norm)).to(device)
    x = 100 * torch.randn(*leading, 16, device=device)
    logits = head(x)
    bottleneck = head.mlp(x)
    assert logits.shape == (*leading, 10) and logits.abs().max() <= 1 + 1e-5
    close(logits, F.cosine_similarity(bottleneck.unsqueeze(-2), head.prototypes, dim=-1))
    close(head(x.flatten(0, -2)), logits.flatten(0, -2))


def test_head_ignores_the_length_of_prototypes():
    head, x = ProjectionHead(16, 10), torch.randn(6, 16)
    before = head(x)
    with torch.no_grad():
        head.prototypes *= torch.rand(10, 1) * 5 + 0.1
    close(head(x), before)
    assert head.mlp[0].out_features == 64                    # four times the input by default


def test_head_starts_with_small_weights_and_zero_biases():
    head = ProjectionHead(64, 256, 128, 32, batch_norm=True)
    for layer in (m for m in head.modules() if isinstance(m, nn.Linear)):
        assert layer.bias.abs().max() == 0 and 0.015 < layer.weight.std() < 0.025
    assert 0.015 < head.prototypes.std() < 0.025


def test_head_logits_are_fp32_products_under_autocast(device):
    """Divided by a temperature of 0.02, errors of bfloat16 would grow to 0.2."""
    head, seen = ProjectionHead(32, 64, 32, 16).to(device), []
    head.mlp.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.autocast(device, torch.bfloat16):
        logits = head(torch.randn(8, 32, device=device))
    assert seen[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
    close(logits, F.cosine_similarity(seen[0].float().unsqueeze(1), head.prototypes, dim=-1))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_uses_the_statistics_of_the_batch(device, training):
    head = ProjectionHead(16, 10, 24, 8, batch_norm=True).to(device).train(training)
    norm = head.mlp[1]
    x = 3 + 2 * torch.randn(4, 50, 24, device=device)
    y = norm(x).flatten(0, 1)
    close(y.mean(0), torch.zeros(24, device=device), 1e-4)
    close(y.std(0, unbiased=False), torch.ones(24, device=device), 1e-3)
    assert torch.equal(norm(x), norm(x)) and not list(norm.buffers())


def test_batch_norm_removes_what_all_rows_share():
    head, x = ProjectionHead(16, 10, 24, 8, batch_norm=True), torch.randn(32, 16)
    spread = head(x).std(0).mean()
    shared = 1000 * torch.ones(16)
    assert head(x + shared).std(0).mean() > 0.5 * spread
    plain = ProjectionHead(16, 10, 24, 8)
    assert plain(x + shared).std(0).mean() < 0.1 * plain(x).std(0).mean()


# ---- DINOv2: student and teacher

def pairs(model):
    """Return every teacher parameter with the student parameter that it follows."""
    names = ("img_head", "patch_head")
    modules = [(model.teacher, model.student)]
    modules += [(getattr(model, f"teacher_{name}"), getattr(model, name)) for name in names]
    return [pair for t, s in modules for pair in zip(t.parameters(), s.parameters(), strict=True)]


def test_teacher_starts_as_an_exact_copy_with_its_own_memory(small):
    model = DINOv2(small(REGISTER_TOKENS=2, LAYER_SCALE=0.1))
    for teacher, student in pairs(model):
        assert torch.equal(teacher, student) and teacher.data_ptr() != student.data_ptr()
        assert student.requires_grad and not teacher.requires_grad
    memory = [p.data_ptr() for p in model.parameters()]
    assert len(set(memory)) == len(memory) == 2 * len(pairs(model))
    assert not torch.equal(model.img_head.prototypes, model.patch_head.prototypes)              # untied


def test_teacher_stays_in_eval_mode(small):
    model = DINOv2(small(DROPOUT=0.3, DROP_PATH=0.3))
    for mode in (True, False, True):
        model.train(mode)
        assert model.student.training == model.img_head.training == model.patch_head.training == mode
        for part in (model.teacher, model.teacher_img_head, model.teacher_patch_head):
            assert not any(module.training for module in part.modules())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.teacher(x)[0], model.teacher(x)[0])
    assert not torch.equal(model.student(x)[0], model.student(x)[0])


@pytest.mark.parametrize("m", [0.0, 0.3, 0.996, 1.0])
def test_teacher_is_the_moving_average_of_backbone_and_heads(small, device, m):
    model = DINOv2(small(REGISTER_TOKENS=1, DEVICE=device)).to(device)
    with torch.no_grad():
        for _, student in pairs(model):
            student.normal_()
    before = [(t.clone(), s.clone()) for t, s in pairs(model)]
    model.update_teacher(m)
    for (teacher, student), (old_teacher, old_student) in zip(pairs(model), before):
        close(teacher, m * old_teacher + (1 - m) * old_student, 1e-6)
        assert torch.equal(student, old_student)
        assert m < 1 or torch.equal(teacher, old_teacher)
        assert m > 0 or torch.equal(teacher, old_student)


def test_teacher_sees_global_crops_and_student_all_crops_and_the_mask(small):
    config = small(LOCAL_CROPS_NUMBER=3)
    model, views, mask, calls = DINOv2(config), make_views(config), half_mask(config), []
    for module in (model.teacher, model.student):
        module.register_forward_pre_hook(lambda _, args: calls.append(args))
    model(views, mask, 0.04)
    teacher, student_global, student_local = calls
    masked = mask.flatten().nonzero().squeeze(1)
    assert torch.equal(teacher[0], torch.cat(views[:2])) and teacher[1] is None
    assert torch.equal(student_global[0], teacher[0]) and torch.equal(student_global[1], mask)
    assert torch.equal(teacher[2], masked) and torch.equal(student_global[2], masked)
    assert torch.equal(student_local[0], torch.cat(views[2:])) and student_local[1] is None
    assert len(student_local[2]) == 0


def test_mask_reaches_the_loss_through_the_student_only(small):
    config = small()
    model, views, mask = DINOv2(config), make_views(config), half_mask(config)
    with torch.no_grad():
        before = model(views, mask, 0.04)
        model.student.mask_token.normal_()
        after = model(views, mask, 0.04)
        model.teacher.mask_token.normal_()
        still = model(views, mask, 0.04)
    assert before["patch"] != after["patch"] and before["img"] != after["img"]
    assert before["teacher_entropy"] == after["teacher_entropy"] and after["loss"] == still["loss"]


@pytest.mark.parametrize("part, number", [("img_head", 0), ("patch_head", 1)])
def test_targets_come_from_the_own_heads_of_the_teacher(small, part, number):
    config = small()
    model, crops = DINOv2(config), torch.cat(make_views(config)[:2])
    targets = lambda: model.teacher_targets(crops, torch.arange(20), 0.04)  # noqa: E731
    before = targets()
    assert before[0].shape == (2, 4, 16) and before[1].shape == (20, 16) and not before[0].requires_grad
    randomized(getattr(model, part))
    randomized(model.student)
    assert all(torch.equal(a, b) for a, b in zip(before, targets()))
    randomized(getattr(model, "teacher_" + part))
    after = targets()
    assert not torch.allclose(before[number], after[number], atol=1e-2)
    assert torch.equal(before[1 - number], after[1 - number])


def test_gradients_reach_all_of_the_student_and_nothing_of_the_teacher(small):
    config = small(REGISTER_TOKENS=1)
    model = DINOv2(config)
    model(make_views(config), half_mask(config), 0.04)["loss"].backward()
    for teacher, student in pairs(model):
        assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0
