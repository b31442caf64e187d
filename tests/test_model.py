"""The model: embeddings, attention, blocks, the Vision Transformer, the heads, and the pair of student and teacher."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2_cifar import (DINOv2, MLP, MultiHeadAttention, PatchEmbedding, ProjectionHead, ResidualBranch, TransformerBlock,
                          VisionTransformer)


@torch.no_grad()
def randomised(module):
    """The module in eval mode with every parameter random, so that a zero bias or a unit scale hides no fault."""
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    return module.eval()


def vit(**options):
    """A network of 4 × 4 patches of 8 pixels, 32 wide, 2 blocks, 2 heads."""
    return randomised(VisionTransformer(32, 8, 3, 32, 2, 2, **options))


def make_views(config, batch=4):
    sizes = [config.GLOBAL_CROP_SIZE] * config.GLOBAL_CROPS_NUMBER + [config.LOCAL_CROP_SIZE] * config.LOCAL_CROPS_NUMBER
    return [torch.randn(batch, 3, size, size, device=config.DEVICE) for size in sizes]


def half_mask(config, batch=4):
    """(G·B, N): every other patch of every other crop."""
    patches = (config.GLOBAL_CROP_SIZE // config.PATCH_SIZE) ** 2
    mask = torch.zeros(config.GLOBAL_CROPS_NUMBER * batch, patches, dtype=torch.bool)
    mask[::2, ::2] = True
    return mask.to(config.DEVICE)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- PatchEmbedding

@pytest.mark.parametrize("height, width", [(32, 32), (16, 48), (64, 32)])
def test_patch_embedding_is_a_strided_convolution(device, height, width):
    embed = randomised(PatchEmbedding(32, 8, in_channels=2, embed_dim=24)).to(device)
    x = torch.randn(3, 2, height, width, device=device)
    expected = F.conv2d(x, embed.projection.weight.view(24, 2, 8, 8), embed.projection.bias, stride=8).flatten(2).mT
    assert embed.num_patches == 16 and expected.shape == (3, height * width // 64, 24)
    close(embed(x), expected, 1e-4)


@pytest.mark.parametrize("height, width", [(33, 32), (32, 36), (4, 8)])
def test_a_size_that_patches_do_not_fill_is_refused_with_its_value(height, width):
    with pytest.raises(ValueError, match=rf"{height}, {width}.*\(8\)"):
        vit()(torch.zeros(1, 3, height, width))


# ---- Attention, MLP, block

@torch.no_grad()
def test_attention_equals_loops_over_heads_and_tokens():
    attention = randomised(MultiHeadAttention(12, 3, qkv_bias=True))
    x = torch.randn(2, 5, 12)
    q, k, v = (x @ w.T + b for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)))
    out, weights = torch.zeros(2, 5, 12), torch.zeros(2, 3, 5, 5)
    for b in range(2):
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            for t in range(5):
                score = torch.tensor([float(q[b, t, own] @ k[b, s, own]) / 2 for s in range(5)])  # √4 = 2
                weights[b, head, t] = score.exp() / score.exp().sum()
                out[b, t, own] = sum(weights[b, head, t, s] * v[b, s, own] for s in range(5))
    close(attention(x), attention.projection(out))
    close(attention.attention_weights(x), weights)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_torch_with_the_same_weights(device, bias):
    ours = randomised(MultiHeadAttention(24, 4, qkv_bias=bias)).to(device)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True).to(device)
    qkv_bias = ours.qkv.bias if bias else torch.zeros(72)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": qkv_bias,
                            "out_proj.weight": ours.projection.weight, "out_proj.bias": ours.projection.bias})
    x = torch.randn(2, 7, 24, device=device)
    close(ours(x), theirs(x, x, x, need_weights=False)[0], 1e-4)


def test_attention_goes_through_scaled_dot_product_attention_but_for_gradients_on_a_cpu(device, monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **rest: calls.append(q.shape) or real(q, k, v, **rest))
    attention, x = randomised(MultiHeadAttention(24, 4)).to(device), torch.randn(2, 7, 24, device=device)
    attention(x)
    assert calls == [(2, 4, 7, 6)]
    with torch.autocast(device, torch.bfloat16):
        with torch.no_grad():
            fused = attention(x)
        assert len(calls) == 2
        close(attention(x), fused, 0.05)
    assert len(calls) == (2 if device == "cpu" else 3)


def test_attentions_own_formula_has_the_gradients_of_the_fused_kernel(monkeypatch):
    """In bfloat16, beside the same in fp32, which goes through the kernel."""
    attention, x = randomised(MultiHeadAttention(24, 4, qkv_bias=True)), torch.randn(2, 7, 24, requires_grad=True)
    inputs, direction = [x, *attention.parameters()], torch.randn(2, 7, 24)
    wanted = torch.autograd.grad((attention(x) * direction).sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad((attention(x) * direction).sum(), inputs)
    for ours, theirs in zip(found, wanted):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_attention_drops_weights_in_training_alone():
    attention = MultiHeadAttention(64, 1, dropout=0.5)
    nn.init.zeros_(attention.qkv.weight)                        # so all tokens are attended to alike
    nn.init.eye_(attention.qkv.weight[128:].data)
    nn.init.eye_(attention.projection.weight)
    nn.init.zeros_(attention.projection.bias)
    x = torch.ones(64, 50, 64)
    close(attention.eval()(x), x)
    attention.projection.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    sums = []
    attention.train()(x)
    assert sums[0].std() > 0.1 and abs(sums[0].mean() - 1) < 0.02                                 # mean of 50 × (0 or 2)


def test_attention_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="10.*3"):
        MultiHeadAttention(10, 3)


@pytest.mark.parametrize("hidden, out", [(None, None), (7, None), (7, 3)])
def test_mlp_is_two_linear_layers_around_a_gelu(hidden, out):
    mlp = randomised(MLP(5, hidden, out))
    x = torch.randn(2, 3, 5)
    assert mlp(x).shape == (2, 3, out or 5) and mlp.expand.out_features == (hidden or 5)
    close(mlp(x), F.linear(F.gelu(F.linear(x, mlp.expand.weight, mlp.expand.bias)), mlp.contract.weight, mlp.contract.bias))


@pytest.mark.parametrize("layer", [MultiHeadAttention(16, 2, dropout=0.5), MLP(16, 32, dropout=0.5)])
def test_dropout_acts_in_training_alone(layer):
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
def test_a_block_normalises_before_each_branch(layer_scale):
    block = randomised(TransformerBlock(16, 2, mlp_ratio=3, qkv_bias=True, layer_scale=layer_scale))
    x = torch.randn(2, 5, 16)
    attention, mlp = block.attention, block.mlp
    scales = (attention.scale, mlp.scale) if layer_scale else (1.0, 1.0)
    y = x + scales[0] * attention.layer(F.layer_norm(x, (16,), attention.norm.weight, attention.norm.bias, 1e-6))
    close(block(x), y + scales[1] * mlp.layer(F.layer_norm(y, (16,), mlp.norm.weight, mlp.norm.bias, 1e-6)))
    assert mlp.layer.expand.out_features == 48


def test_layer_scale_starts_at_its_value_and_nearly_closes_the_branch():
    plain, scaled = (TransformerBlock(16, 2, layer_scale=s).eval() for s in (0.0, 1e-5))
    x = torch.randn(2, 5, 16)
    assert sum(p.numel() for p in scaled.parameters()) - sum(p.numel() for p in plain.parameters()) == 2 * 16
    assert 0 < (scaled(x) - x).abs().max() < 1e-4 < 1e-2 < (plain(x) - x).abs().max()
    plain.load_state_dict(scaled.state_dict(), strict=False)
    close((scaled.attention(x) - x) * 1e5, plain.attention(x) - x, 0.05)


def test_drop_path_skips_whole_samples_and_keeps_the_expectation(device):
    branch = ResidualBranch(8, nn.Linear(8, 8), drop_path=0.25).to(device)
    x = torch.randn(1, 3, 8, device=device).expand(4000, -1, -1)
    full = branch.eval()(x) - x
    assert torch.equal(branch(x), branch(x))
    added = branch.train()(x) - x
    skipped = (added == 0).all(2).all(1)
    close(added[~skipped], full[~skipped] / 0.75, 1e-4)         # so a sample is skipped as a whole or not at all
    assert 0.22 < skipped.float().mean() < 0.28
    close(added.mean(0), full[0], 0.05)


def test_drop_path_rises_linearly_from_zero():
    rates = [(b.attention.drop_path, b.mlp.drop_path) for b in VisionTransformer(32, 8, 3, 32, 5, 2, drop_path=0.2).blocks]
    assert rates == [pytest.approx((rate, rate)) for rate in (0, 0.05, 0.1, 0.15, 0.2)]


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5}, {"drop_path": 0.4}])
def test_a_block_that_is_asked_for_rows_gives_those_of_the_whole(device, options):
    block, x = randomised(TransformerBlock(16, 2, **options)).to(device).train(), torch.randn(4, 5, 16, device=device)
    rows = torch.tensor([3, 0, 19, 7, 8], device=device)
    torch.manual_seed(0)
    whole = block(x).flatten(0, 1)[rows]
    torch.manual_seed(0)
    close(block(x, rows), whole)
    close(block.eval()(x, rows), block(x).flatten(0, 1)[rows])


# ---- VisionTransformer

@pytest.mark.parametrize("registers", [0, 3])
def test_asked_for_positions_it_gives_what_the_whole_has_there_with_the_same_gradients(device, registers):
    net = vit(register_tokens=registers).to(device)
    x, mask = torch.randn(3, 3, 16, 32, device=device), torch.rand(3, 8, device=device) < 0.4
    mask[0], mask[1, 7] = False, True
    positions = mask.flatten().nonzero().squeeze(1)
    full, partial = net(x, mask), net(x, mask, positions)
    whole = full[0], full[1][mask]
    directions = [torch.randn_like(part) for part in whole]
    gradients = []
    for outputs in (whole, partial):
        loss = sum((part * direction).sum() for part, direction in zip(outputs, directions))
        gradients.append(torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True))
    for ours, wanted in zip(partial, whole):
        close(ours, wanted)
    assert partial[1].shape == (int(mask.sum()), 32)
    for ours, wanted in zip(*gradients):
        assert (ours is None) == (wanted is None)
        assert ours is None or torch.allclose(ours, wanted, rtol=1e-4, atol=1e-4)
    assert net(x, None, positions[:0])[1].shape == (0, 32) and net.registers.requires_grad == (registers > 0)


def test_the_blocks_run_in_bfloat16_under_autocast_and_the_last_norm_in_fp32(device):
    net, seen = vit(register_tokens=1).to(device), []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    x = torch.randn(2, 3, 32, 32, device=device)
    with torch.autocast(device, torch.bfloat16):
        class_token, patches = net(x)
    assert set(seen) == {torch.bfloat16} and class_token.dtype == patches.dtype == torch.float32
    assert (class_token - net(x)[0]).abs().max() < 0.1
    assert seen.clear() or net(x)[0].dtype == torch.float32 and set(seen) == {torch.float32}


def test_layer_scale_keeps_the_sum_of_branches_in_fp32_under_autocast(device):
    with torch.autocast(device, torch.bfloat16):
        block = TransformerBlock(16, 2, layer_scale=1e-5).to(device)
        x = torch.ones(2, 3, 16, device=device, dtype=torch.bfloat16)
        assert block(x).dtype == torch.float32 and (block(x) != x).any()


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("height, width", [(32, 32), (16, 48), (8, 8), (64, 40)])
def test_any_size_of_whole_patches_gives_a_class_token_and_its_patches(device, height, width, registers):
    net = vit(register_tokens=registers).to(device)
    class_token, patches = net(torch.randn(2, 3, height, width, device=device))
    assert class_token.shape == (2, 32) and patches.shape == (2, height * width // 64, 32)


def test_registers_influence_the_output_but_are_not_in_it():
    net, x = vit(register_tokens=3), torch.randn(2, 3, 32, 32)
    before = net(x)
    tokens = net.tokens(x)
    assert tokens.shape[1] == 1 + 3 + 16
    close(tokens[:, 1:4], net.registers.expand(2, -1, -1))      # without a place
    close(tokens[:, 4:], net.patch_embed(x) + net.pos_embed[:, 1:])
    for block in net.blocks:
        tokens = block(tokens)
    close(before[1], net.norm(tokens)[:, 4:])
    close(before[0], net.norm(tokens)[:, 0])
    with torch.no_grad():
        net.registers[:, 1].normal_()
    assert all((a - b).abs().amax(-1).min() > 1e-4 for a, b in zip(before, net(x)))


def test_the_pictures_of_a_batch_do_not_see_each_other():
    net, x = vit(), torch.randn(3, 3, 32, 32)
    close(net(x)[0][1:2], net(x[1:2])[0])


def test_masked_pixels_have_no_influence_and_all_others_have(device):
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


def test_the_mask_token_stands_in_before_the_position_is_added():
    net, x = vit(), torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [0, 5]] = mask[1, 9] = True
    tokens, plain = net.tokens(x, mask)[:, 1:], net.tokens(x)[:, 1:]
    close(tokens[mask], (net.mask_token + net.pos_embed[:, 1:]).expand(2, -1, -1)[mask])
    assert torch.equal(tokens[~mask], plain[~mask])
    assert not torch.allclose(net(x, mask)[1][0, 0], net(x, mask)[1][0, 5], atol=1e-2)
    everything = torch.ones(2, 16, dtype=torch.bool)            # then the picture itself is gone, in every output
    assert torch.equal(net(x, everything)[1], net(x + 1, everything)[1])


def test_an_empty_mask_changes_nothing():
    net, x = vit(), torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(net(x), net(x, torch.zeros(2, 16, dtype=torch.bool))))


def test_the_mask_token_starts_at_zero():
    assert VisionTransformer(32, 8, 3, 32, 1, 2).mask_token.abs().max() == 0


# ---- Position embedding

def positions(net, height, width):
    """→ the class token's part (D,) and the grid (rows, columns, D) for a picture of this size."""
    encoding = net.interpolate_pos_encoding(torch.zeros(1, 1, 32), width, height)
    assert encoding.shape == (1, 1 + height * width // 64, 32)
    return encoding[0, 0], encoding[0, 1:].unflatten(0, (height // 8, width // 8))


def test_the_learned_grid_serves_its_own_size_untouched():
    net = vit()
    assert torch.equal(net.interpolate_pos_encoding(torch.zeros(1, 17, 32), 32, 32), net.pos_embed)


@pytest.mark.parametrize("height, width", [(16, 64), (64, 16), (24, 40), (8, 8), (16, 32), (32, 16)])
def test_another_size_gets_the_grid_resized_bicubically(device, height, width):
    net = vit().to(device)
    own = net.pos_embed[0, 1:].view(4, 4, 32).permute(2, 0, 1).unsqueeze(0)
    expected = F.interpolate(own, size=(height // 8, width // 8), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    class_part, grid = positions(net, height, width)
    assert torch.equal(class_part, net.pos_embed[0, 0])
    close(grid, expected)
    x = torch.randn(2, 3, height, width, device=device)         # and the tokens get it in this order
    close(net.tokens(x)[:, 1:], net.patch_embed(x) + expected.flatten(0, 1))


@pytest.mark.parametrize("height, width", [(16, 64), (64, 16), (48, 32)])
def test_height_and_width_keep_their_order(height, width):
    net = vit()
    with torch.no_grad():
        net.pos_embed[0, 1:] = torch.arange(4.0).repeat_interleave(4).unsqueeze(1)               # tells the row alone
    grid = positions(net, height, width)[1]
    close(grid, grid[:, :1].expand_as(grid))
    assert (grid.diff(dim=0) > 0.1).all()


def test_the_resized_grid_is_fp32_under_autocast_and_passes_gradients():
    net = vit()
    with torch.autocast("cpu", torch.bfloat16):
        encoding = net.interpolate_pos_encoding(torch.zeros(1, 5, 32), 16, 16)
    assert encoding.dtype == torch.float32
    encoding.sum().backward()
    assert (net.pos_embed.grad[0, :, 0] != 0).all()


# ---- Attention maps

@pytest.mark.parametrize("registers", [0, 2])
def test_class_attention_is_the_last_blocks_first_row(registers):
    net, x = vit(register_tokens=registers), torch.randn(2, 3, 16, 40)
    tokens = net.blocks[0](net.tokens(x))
    last = net.blocks[1].attention
    q, k = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in last.layer.qkv(last.norm(tokens)).chunk(3, -1)[:2])
    row = (q[:, :, :1] @ k.mT / 4).softmax(-1)[:, :, 0]
    close(row.sum(-1), torch.ones(2, 2))
    close(net.class_attention(x), row[:, :, 1 + registers:].unflatten(2, (2, 5)))


# ---- ProjectionHead

@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 3, 4)])
def test_a_heads_logits_are_cosines_for_any_leading_dimensions(device, leading, batch_norm):
    head = randomised(ProjectionHead(16, 10, 24, 8, batch_norm)).to(device)
    x = 100 * torch.randn(*leading, 16, device=device)
    logits = head(x)
    bottleneck = head.layers(x)
    assert logits.shape == (*leading, 10) and logits.abs().max() <= 1 + 1e-5
    close(logits, F.cosine_similarity(bottleneck.unsqueeze(-2), head.prototypes, dim=-1))
    close(head(x.flatten(0, -2)), logits.flatten(0, -2))


def test_the_prototypes_length_has_no_influence():
    head, x = ProjectionHead(16, 10), torch.randn(6, 16)
    before = head(x)
    with torch.no_grad():
        head.prototypes *= torch.rand(10, 1) * 5 + 0.1
    close(head(x), before)
    assert head.layers[0].out_features == 64                    # four times the input by default


def test_a_head_starts_with_small_weights_and_no_biases():
    head = ProjectionHead(64, 256, 128, 32, batch_norm=True)
    for layer in (m for m in head.modules() if isinstance(m, nn.Linear)):
        assert layer.bias.abs().max() == 0 and 0.015 < layer.weight.std() < 0.025
    assert 0.015 < head.prototypes.std() < 0.025


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation_always_takes_the_batchs_own_statistics(device, training):
    norm = ProjectionHead(16, 10, 24, 8, batch_norm=True).to(device).train(training).layers[1]
    x = 3 + 2 * torch.randn(4, 50, 24, device=device)
    y = norm(x).flatten(0, 1)
    close(y.mean(0), torch.zeros(24, device=device), 1e-4)
    close(y.std(0, unbiased=False), torch.ones(24, device=device), 1e-3)
    assert torch.equal(norm(x), norm(x)) and not list(norm.buffers())


def test_batch_normalisation_removes_what_all_rows_share():
    head, x = ProjectionHead(16, 10, 24, 8, batch_norm=True), torch.randn(32, 16)
    spread = head(x).std(0).mean()
    shared = 1000 * torch.ones(16)
    assert head(x + shared).std(0).mean() > 0.5 * spread
    plain = ProjectionHead(16, 10, 24, 8)
    assert plain(x + shared).std(0).mean() < 0.1 * plain(x).std(0).mean()


# ---- DINOv2: student and teacher

def pairs(model):
    """→ every teacher parameter with the student parameter that it follows."""
    return [(t, s) for teacher, student in zip((model.teacher, model.teacher_img_head, model.teacher_patch_head),
                                               (model.student, model.img_head, model.patch_head))
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]


def test_the_teacher_starts_as_an_exact_copy_with_its_own_memory(small):
    model = DINOv2(small(REGISTER_TOKENS=2, LAYER_SCALE=0.1))
    for teacher, student in pairs(model):
        assert torch.equal(teacher, student) and teacher.data_ptr() != student.data_ptr()
        assert student.requires_grad and not teacher.requires_grad
    memory = [p.data_ptr() for p in model.parameters()]
    assert len(set(memory)) == len(memory) == 2 * len(pairs(model))
    assert not torch.equal(model.img_head.prototypes, model.patch_head.prototypes)              # untied


def test_the_teacher_stays_in_eval_mode(small):
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
def test_the_teacher_is_the_running_average_of_backbone_and_heads(small, device, m):
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


def spy(monkeypatch, module):
    """→ a list that takes the arguments of every call of module."""
    calls, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: calls.append((args, kwargs)) or forward(*args, **kwargs))
    return calls


def test_the_teacher_sees_the_global_crops_and_no_mask_the_student_all_crops_and_the_mask(small, monkeypatch):
    config = small(LOCAL_CROPS_NUMBER=3)
    model, views, mask = DINOv2(config), make_views(config), half_mask(config)
    teacher, student = spy(monkeypatch, model.teacher), spy(monkeypatch, model.student)
    model(views, mask, 0.04)
    masked = mask.flatten().nonzero().squeeze(1)
    [((seen, no_mask, positions), _)] = teacher
    assert torch.equal(seen, torch.cat(views[:2])) and no_mask is None and torch.equal(positions, masked)
    [((seen_global, seen_mask, positions), _), ((seen_local, no_mask, none), _)] = student
    assert torch.equal(seen_global, torch.cat(views[:2])) and torch.equal(seen_mask, mask) and torch.equal(positions, masked)
    assert torch.equal(seen_local, torch.cat(views[2:])) and no_mask is None and len(none) == 0


def test_the_mask_reaches_the_loss_through_the_student_alone(small):
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
def test_targets_come_from_the_teachers_own_heads(small, part, number):
    config = small()
    model, views = DINOv2(config), make_views(config)
    targets = lambda: model.teacher_targets(views, torch.arange(20), 0.04)  # noqa: E731
    before = targets()
    assert before[0].shape == (2, 4, 16) and before[1].shape == (20, 16) and not before[0].requires_grad
    randomised(getattr(model, part))
    randomised(model.student)
    assert all(torch.equal(a, b) for a, b in zip(before, targets()))
    randomised(getattr(model, "teacher_" + part))
    after = targets()
    assert not torch.allclose(before[number], after[number], atol=1e-2)
    assert torch.equal(before[1 - number], after[1 - number])


def test_gradients_reach_every_part_of_the_student_and_nothing_of_the_teacher(small):
    config = small(REGISTER_TOKENS=1)
    model = DINOv2(config)
    model(make_views(config), half_mask(config), 0.04)["loss"].backward()
    for teacher, student in pairs(model):
        assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


def test_the_heads_logits_stay_in_fp32_under_autocast(device):
    """Over a temperature of 0.02 a bfloat16 cosine would be off by up to 0.2: targets are to be those of fp32 products."""
    head = ProjectionHead(32, 64, 32, 16).to(device)
    with torch.autocast(device, torch.bfloat16):
        x = head.layers(torch.randn(8, 32, device=device))
        head.layers = torch.nn.Identity()
        logits = head(x)
    wanted = torch.nn.functional.normalize(x.float(), dim=1) @ torch.nn.functional.normalize(head.prototypes, dim=1).T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
