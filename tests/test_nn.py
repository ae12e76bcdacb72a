"""Modules of eva02_kernels.nn: timm's weights load, timm's numbers come out, Rope2d survives what models go through."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import timm.layers
import timm.models.eva as timm_eva
import torch
from parity import compare, randomise, rope_cat, shapes
from torch import nn

import eva02_kernels
from eva02_kernels.nn import AddLayerNorm, EvaBlock, Mlp, Rope2d, RopeAttention, SwiGLU, SwiGLUPacked, drop_path_scale
from eva02_kernels.nn import block as eva_block

GRID = (3, 5)
DIM, HEADS = 128, 2
timm_norm = partial(timm.layers.LayerNorm, eps=1e-6)


def tokens(batch=2, length=1 + GRID[0] * GRID[1], dim=DIM, seed=1):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def check(theirs: nn.Module, ours: nn.Module, with_rope: bool = False) -> None:
    """Same state_dict, then same output and gradients (that of the input included) by the tolerance rule."""
    randomise(theirs)
    assert shapes(theirs) == shapes(ours)
    ours.load_state_dict(theirs.state_dict())
    cat = rope_cat(GRID, DIM // HEADS)
    table = eva02_kernels.rope_2d(GRID, DIM // HEADS)

    def call(model, x):
        if not with_rope:
            return model(x)
        return model(x, table) if model is ours else model(x, rope=cat.to(x.dtype))

    compare(theirs, ours, [tokens(seed=seed).requires_grad_() for seed in range(16)], lambda m: m.double(), call)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("hidden", [96, 170, 257])
def test_swiglu(norm, hidden):
    theirs = timm.layers.SwiGLU(DIM, hidden, norm_layer=timm_norm if norm else None)
    check(theirs, SwiGLU(DIM, hidden, norm_layer=partial(nn.LayerNorm, eps=1e-6) if norm else None))


def test_swiglu_alignment_and_bias():
    check(timm.layers.SwiGLU(DIM, 170, align_to=64, bias=False), SwiGLU(DIM, 170, align_to=64, bias=False))


def test_swiglu_packed():
    check(timm.layers.SwiGLUPacked(DIM, 340), SwiGLUPacked(DIM, 340))
    with pytest.raises(ValueError, match="even"):
        SwiGLUPacked(DIM, 341)


def test_mlp():
    check(timm.layers.Mlp(DIM, 300), Mlp(DIM, 300))


@pytest.mark.parametrize("out_features", [60, 200])
def test_another_number_of_output_channels(out_features):
    check(timm.layers.Mlp(DIM, 300, out_features), Mlp(DIM, 300, out_features))
    check(timm.layers.SwiGLU(DIM, 170, out_features), SwiGLU(DIM, 170, out_features))
    check(timm.layers.SwiGLUPacked(DIM, 340, out_features), SwiGLUPacked(DIM, 340, out_features))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale_norm", [True, False])
def test_attention(fused, bias, scale_norm):
    theirs = timm_eva.EvaAttention(
        DIM, HEADS, qkv_fused=fused, qkv_bias=bias, scale_norm=scale_norm, norm_layer=timm_norm
    )
    ours = RopeAttention(
        DIM, HEADS, qkv_fused=fused, qkv_bias=bias, scale_norm=scale_norm, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    check(theirs, ours, with_rope=True)


def test_attention_without_rope():
    theirs = timm_eva.EvaAttention(DIM, HEADS, scale_norm=False)
    check(theirs, RopeAttention(DIM, HEADS))


def test_attention_mask_keep_and_causal():
    attention = RopeAttention(DIM, HEADS)
    randomise(attention)
    x, table = tokens(), eva02_kernels.rope_2d(GRID, DIM // HEADS)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, 12:] = False
    torch.testing.assert_close(
        attention(x, table, key_padding_mask=mask)[:, :12],
        attention(x[:, :12], table, keep_idx=torch.arange(11).expand(2, 11)),
    )
    causal = attention(x, table, is_causal=True)
    torch.testing.assert_close(causal[:, 0], attention(x[:, :1])[:, 0])
    torch.testing.assert_close(causal[:, -1], attention(x, table)[:, -1])
    keep = torch.tensor([[4, 0, 14], [2, 9, 1]])
    kept = torch.stack([torch.cat([x[b, :1], x[b, 1 + keep[b]]]) for b in range(2)])
    for b in range(2):
        alone = attention(kept[b : b + 1], table, keep_idx=keep[b : b + 1])
        torch.testing.assert_close(attention(kept, table, keep_idx=keep)[b : b + 1], alone)


def test_attention_checks():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        RopeAttention(DIM, 3)
    with pytest.raises(ValueError, match="norm_layer"):
        RopeAttention(DIM, HEADS, scale_norm=True)
    with pytest.raises(ValueError, match="layout"):
        RopeAttention(DIM, HEADS, rotate_half=True)(tokens(), eva02_kernels.rope_2d(GRID, DIM // HEADS))
    with pytest.raises(ValueError, match="affine LayerNorm"):
        RopeAttention(DIM, HEADS, scale_norm=True, norm_layer=nn.RMSNorm)


BLOCKS = {
    "gelu": {},
    "swiglu": {"swiglu_mlp": True, "mlp_ratio": 4 * 2 / 3},
    "swiglu-aligned": {"swiglu_mlp": True, "mlp_ratio": 4 * 2 / 3, "swiglu_align_to": 8},
    "subln": {"swiglu_mlp": True, "mlp_ratio": 4 * 2 / 3, "scale_mlp": True, "qkv_fused": False},
    "clip": {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "scale_attn_inner": True},
    "layer-scale": {"swiglu_mlp": True, "init_values": 0.5},
    "attention-layer-scale": {"swiglu_mlp": True, "init_values": 0.5, "attn_only_layer_scale": True},
    "no-bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("case", BLOCKS)
def test_block(case):
    check(timm_eva.EvaBlock(DIM, HEADS, **BLOCKS[case]), EvaBlock(DIM, HEADS, **BLOCKS[case]), with_rope=True)


@pytest.mark.parametrize("case", ["gelu", "swiglu", "subln"])
def test_post_norm_block(case):
    theirs = timm_eva.EvaBlockPostNorm(DIM, HEADS, norm_layer=timm_norm, **BLOCKS[case])  # its own default is eps 1e-5
    check(theirs, EvaBlock(DIM, HEADS, use_post_norm=True, **BLOCKS[case]), with_rope=True)


def test_rotate_half_block():
    theirs = timm_eva.EvaBlock(DIM, HEADS, rotate_half=True)
    ours = EvaBlock(DIM, HEADS, rotate_half=True)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    rope = Rope2d(DIM // HEADS, GRID, rotate_half=True)
    cat = timm.layers.RotaryEmbeddingCat(
        DIM // HEADS, in_pixels=False, feat_shape=GRID, ref_feat_shape=(16, 16), rotate_half=True
    ).get_embed()
    torch.testing.assert_close(ours(tokens(), rope()), theirs(tokens(), rope=cat), rtol=1e-4, atol=1e-5)


def test_block_refuses_what_it_would_ignore():
    for name in ("proj_drop", "attn_drop"):
        with pytest.raises(ValueError, match="must be 0"):
            EvaBlock(DIM, HEADS, **{name: 0.1})
    with pytest.raises(ValueError, match="scale_mlp"):
        EvaBlock(DIM, HEADS, scale_mlp=True)
    with pytest.raises(ValueError, match="affine LayerNorm"):
        EvaBlock(DIM, HEADS, norm_layer=nn.RMSNorm)


@pytest.mark.parametrize("post_norm", [False, True])
def test_drop_path(post_norm):
    block = EvaBlock(DIM, HEADS, drop_path=0.5, use_post_norm=post_norm, mlp_ratio=1.0)
    randomise(block)
    x = tokens(batch=64)
    plain = block.eval()(x)
    assert torch.equal(block(x), plain)
    block.train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.mlp.parameters():
            parameter.zero_()
        block.norm2.bias.zero_()
        out, kept = block(x), block.eval()(x)
    branch = (out - x).flatten(1).norm(dim=1) > 0
    torch.testing.assert_close(out[branch], x[branch] + 2 * (kept - x)[branch], rtol=1e-4, atol=1e-4)
    assert torch.equal(out[~branch], x[~branch])
    assert 16 < branch.sum() < 48


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("kept", [[0, 2, 3], []])
def test_drop_path_computes_the_kept_samples_only(post_norm, kept, monkeypatch):
    block = EvaBlock(DIM, HEADS, drop_path=0.5, use_post_norm=post_norm, mlp_ratio=1.0, init_values=0.5)
    randomise(block)
    table = eva02_kernels.rope_2d(GRID, DIM // HEADS)
    monkeypatch.setattr(eva_block, "kept_samples", lambda *_: torch.tensor(kept, dtype=torch.int64))
    factors = torch.zeros(5).index_fill(0, torch.tensor(kept, dtype=torch.int64), 2.0)
    monkeypatch.setattr(eva_block, "drop_path_scale", lambda *_: (factors, factors))
    seen = []
    block.mlp.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))

    def results():
        x = tokens(batch=5).requires_grad_()
        out = block(x, table)
        block.zero_grad(set_to_none=True)
        out.backward(tokens(batch=5, seed=2))
        return {"output": out, "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}

    skipped = results()
    monkeypatch.setattr(eva_block, "_shapes_are_fixed", lambda x: True)
    scaled = results()
    assert seen == [len(kept), 5]
    for name, value in scaled.items():
        torch.testing.assert_close(skipped[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


def test_kept_samples():
    torch.manual_seed(0)
    kept = eva_block.kept_samples(1000, 0.25, torch.device("cpu"))
    assert 700 < len(kept) < 800
    assert kept.unique().equal(kept)
    assert eva_block.kept_samples(8, 0.0, torch.device("cpu")) is None
    assert not len(eva_block.kept_samples(8, 1.0, torch.device("cpu")))


@pytest.mark.parametrize("post_norm", [False, True])
def test_rows_of_the_last_block(post_norm):
    """Only the rows that are read go through the feed-forward network, and they are those of the whole block."""
    block = EvaBlock(DIM, HEADS, use_post_norm=post_norm, mlp_ratio=1.0, scale_attn_inner=True)
    randomise(block)
    table = eva02_kernels.rope_2d(GRID, DIM // HEADS)
    length = 1 + GRID[0] * GRID[1]
    idx = torch.tensor([3, length + 4, 2 * length - 1])
    dout = tokens(batch=1, length=3, seed=2)[0]
    rows = []
    block.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))

    def results(call):
        x = tokens().requires_grad_()
        out = call(x)
        block.zero_grad(set_to_none=True)
        out.backward(dout)
        return {"output": out, "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}

    whole = results(lambda x: block(x, table).flatten(0, 1)[idx])
    for name, value in results(lambda x: block(x, table, out_idx=idx)).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5 * whole[name].abs().max().item(), msg=name)
    assert rows == [2 * length, 3]
    padded = block(tokens(), table, out_idx=torch.tensor([3, -1], dtype=torch.int32))
    torch.testing.assert_close(padded[0], whole["output"][0])


def test_drop_path_of_single_rows():
    block = EvaBlock(DIM, HEADS, drop_path=1.0, mlp_ratio=1.0).train()
    x, idx = tokens(), torch.tensor([3, 20])
    torch.testing.assert_close(block(x, out_idx=idx), x.flatten(0, 1)[idx])


def test_drop_path_scale():
    torch.manual_seed(0)
    first, second = drop_path_scale(1000, 0.25, 2, torch.device("cpu"))
    assert first.dtype == torch.float32
    assert first.shape == (1000,)
    assert not torch.equal(first, second)
    assert first.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert first.mean().item() == pytest.approx(1.0, abs=0.1)
    assert not drop_path_scale(8, 1.0, 1, torch.device("cpu"))[0].any()


@pytest.mark.parametrize("rms", [False, True])
def test_add_layer_norm(rms):
    module = AddLayerNorm(DIM, init_values=0.5, rms=rms)
    randomise(module)
    x, residual, row = tokens(), tokens(dim=DIM).flip(0), torch.tensor([0.0, 2.0])
    normed, total = module(x, residual, row_scale=row)
    expected = residual + row[:, None, None] * module.gamma * x
    torch.testing.assert_close(total, expected)
    if rms:
        reference = nn.functional.rms_norm(expected, (DIM,), module.weight, 1e-6)
    else:
        reference = nn.functional.layer_norm(expected, (DIM,), module.weight, module.bias, 1e-6)
    torch.testing.assert_close(normed, reference)
    assert set(AddLayerNorm(DIM).state_dict()) == {"weight", "bias"}


# ---- Rope2d ------------------------------------------------------------------------------------------------------
class Holder(nn.Module):
    def __init__(self, feat_shape=GRID):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.rope = Rope2d(64, feat_shape)


def equal(a, b):
    return torch.equal(a.cos, b.cos) and torch.equal(a.sin, b.sin) and (a.grid, a.layout) == (b.grid, b.layout)


def test_rope_is_the_recipe_and_is_cached():
    rope = Rope2d(64, GRID, temperature=100.0, ref_feat_shape=None, grid_offset=0.5, grid_indexing="xy")
    expected = eva02_kernels.rope_2d(GRID, 64, 100.0, None, grid_offset=0.5, grid_indexing="xy")
    assert equal(rope(), expected)
    assert rope().cos.data_ptr() == rope(GRID, "cpu").cos.data_ptr()
    assert equal(rope((7, 2)), eva02_kernels.rope_2d((7, 2), 64, 100.0, None, grid_offset=0.5, grid_indexing="xy"))
    assert rope((7, 2)).cos.data_ptr() == rope((7, 2)).cos.data_ptr()


def test_rope_is_no_state_and_keeps_its_dtype():
    model = Holder()
    assert set(model.state_dict()) == {"lin.weight", "lin.bias"}
    assert not list(model.rope.buffers())
    assert not list(model.rope.parameters())
    table = model.rope()
    for convert in (model.half, model.double, model.bfloat16, lambda: model.to(torch.bfloat16)):
        convert()
        assert equal(model.rope(), table)
        assert model.rope().cos.dtype == torch.float32


def test_rope_survives_copies():
    model = Holder()
    model.rope((2, 2))
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(clone.rope(), model.rope())
        assert clone.rope().cos.data_ptr() != model.rope().cos.data_ptr()
        assert equal(clone.rope((2, 2)), model.rope((2, 2)))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert equal(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False).rope(), model.rope())


@pytest.mark.parametrize("feat_shape", [GRID, None])
def test_rope_is_rebuilt_after_meta(feat_shape):
    with torch.device("meta"):
        model = Holder(feat_shape)
        assert model.rope(GRID).cos.is_meta
    expected = eva02_kernels.rope_2d(GRID, 64)
    assert equal(model.to_empty(device="cpu").rope(GRID), expected)
    with torch.device("meta"):
        model = Holder(feat_shape)
    assert equal(model.rope(GRID, torch.device("cpu")), expected)


def test_rope_made_in_inference_mode_can_be_trained_with():
    rope, block = Rope2d(DIM // HEADS), EvaBlock(DIM, HEADS)
    with torch.inference_mode():
        block(tokens(), rope(GRID))
    block(tokens(), rope(GRID)).sum().backward()
    assert not rope(GRID).cos.is_inference()


def test_rope_does_not_keep_fake_tensors():
    from torch._subclasses import FakeTensorMode

    rope = Rope2d(64)
    with FakeTensorMode():
        rope(GRID)
    assert type(rope(GRID).cos) is torch.Tensor


@pytest.mark.parametrize("feat_shape", [GRID, None])
def test_rope_compiles(feat_shape):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rope = Rope2d(DIM // HEADS, feat_shape)
            self.block = EvaBlock(DIM, HEADS, swiglu_mlp=True)

        def forward(self, x):
            return self.block(x, self.rope(GRID, x.device))

    model = Model()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
    if feat_shape is not None:
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(tokens())
