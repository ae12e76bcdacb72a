"""Attention of the CUDA backend on the simulator, beside the contract suite: tf32, inputs that need a copy, several
blocks with masks, gradients that are not asked for, refusals, and what loads and stores cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import eva02_kernels
from eva02_kernels import RopeTable, rope_2d
from eva02_kernels.nn import RopeAttention
from eva02_kernels.testing import executing, nan_filled_memory
from eva02_kernels.testing.modes import CUDA_SIMULATED

pytestmark = pytest.mark.skipif(not CUDA_SIMULATED.exists(), reason="needs the simulator's CUDA operators")


def _qkv(*shape, kv_heads=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    *lead, heads, d = shape
    return [torch.randn(*lead, n, d, generator=generator).to(dtype) for n in (heads, *(kv_heads or heads,) * 2)]


def _results(qkv, backend, **kwargs):
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = eva02_kernels.rope_attention(*leaves, backend=backend, **kwargs)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _errors(qkv, reports=None, **kwargs):
    """Of out, dq, dk and dv: rms of the error against float64 in parts of the rms."""
    exact = _results([t.double() for t in qkv], "eager", **kwargs)
    with executing("simulator", on_report=(reports if reports is not None else []).append), nan_filled_memory():
        found = _results(qkv, "cuda", **kwargs)
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


@pytest.fixture
def _tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_float32_products_follow_torchs_switch(head_dim):
    errors = _errors(_qkv(1, 37, 1, head_dim), rope=rope_2d((6, 6), head_dim))
    # 11 bits of each operand: well above what float32 leaves (3e-7), well below bfloat16's 8 bits.
    assert all(2e-5 < e < 1e-3 for e in errors), errors


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_blocks_of_queries_and_keys_with_every_mask(layout):
    """Three blocks of queries, unequal sequences, grouped keys, causal; pairs of four angles that span two runs."""
    tokens = [150, 7, 1, 64]
    kwargs = {
        "rope": rope_2d((10, 15), 40, layout=layout),
        "cu_seqlens": torch.tensor([0, *tokens]).cumsum(0).to(torch.int32),
        "max_seqlen": max(tokens),
        "causal": True,
    }
    assert max(_errors(_qkv(sum(tokens), 4, 40, kv_heads=2), **kwargs)) < 2e-6
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[:, 0] = True
    kwargs = {"key_padding_mask": mask, "causal": True, "rope": rope_2d((3, 23), 16, layout=layout)}
    assert max(_errors(_qkv(2, 70, 2, 16), **kwargs)) < 2e-6


def test_inputs_off_16_bytes_are_copied():
    table = rope_2d((3, 4), 24)
    plain = _qkv(2, 13, 2, 24, dtype=torch.bfloat16)
    odd = [torch.cat((plain[0], plain[0]), -1)[..., 1:25].copy_(plain[0]), *plain[1:]]
    shifted = torch.empty(table.cos.numel() + 1)[1:].view_as(table.cos).copy_(table.cos)
    with executing("simulator"):
        expected = eva02_kernels.rope_attention(*plain, table, backend="cuda")
        assert torch.equal(eva02_kernels.rope_attention(*odd, table, backend="cuda"), expected)
        table = dataclasses.replace(table, cos=shifted)
        assert torch.equal(eva02_kernels.rope_attention(*plain, table, backend="cuda"), expected)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(wanted):
    qkv = _qkv(1, 20, 2, 32)
    table = rope_2d((1, 19), 32)
    with executing("simulator"), nan_filled_memory():
        everything = _results(qkv, "cuda", rope=table)
        qkv[wanted].requires_grad_()
        out = eva02_kernels.rope_attention(*qkv, table, backend="cuda")
        dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape).float()
        (gradient,) = torch.autograd.grad(out, qkv[wanted], dout)
    assert torch.equal(gradient, everything[1 + wanted])


def test_a_table_alone_has_a_gradient():
    angles = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for backend, dtype in (("cuda", torch.float32), ("eager", torch.float64)):
        cos, sin = (t.to(dtype).requires_grad_() for t in (angles.cos(), angles.sin()))
        table = RopeTable.from_cos_sin(cos, sin, "half")
        with executing("simulator"):
            out = eva02_kernels.rope_attention(*(t.to(dtype) for t in _qkv(2, 13, 2, 16)), table, backend=backend)
            gradients.append(torch.autograd.grad(out.square().sum(), (cos, sin)))
    for found, exact in zip(*gradients, strict=True):
        assert float((found - exact).norm() / exact.norm()) < 2e-6


def test_what_the_kernels_do_not_do_is_refused_with_reasons():
    with executing("simulator"):
        for message, head_dim, kwargs in (
            ("head dim of 8..128 in steps of 8, got 20", 20, {}),
            ("positive scale", 16, {"scale": -1.0}),
            ("q_norm", 16, {"q_norm": torch.ones(16)}),
        ):
            with pytest.raises(NotImplementedError, match=message):
                eva02_kernels.rope_attention(*_qkv(1, 4, 1, head_dim), backend="cuda", **kwargs)


def test_loads_and_stores_cost_what_they_must():
    reports = []
    qkv = _qkv(1, 197, 1, 64, dtype=torch.bfloat16)
    assert max(_errors(qkv, reports, rope=rope_2d((14, 14), 64))) < 1e-2
    stored = {"fwd": ("out", "lse"), "dq_": ("dq",), "dkdv": ("dk", "dv")}
    for name, outputs in stored.items():
        (report,) = (r for r in reports if f"{name}" in r.kernel)
        counters = report.counters
        assert counters.wavefronts <= 1.02 * counters.ideal_wavefronts, name
        # lse and delta are stored by 16 rows a warp, which start a sector each time.
        sectors = sum(report.traffic[o].stored_sectors for o in outputs) + 197 * 4 // 32 + 1
        assert counters.global_store_sectors <= 1.1 * sectors, name


@pytest.mark.parametrize("case", ["axis", "half", "keep", "head table"])
def test_a_module_rotates_in_attention_alone(case):
    """As on the CPU, whose projection rotates, with gradients of everything; no kernel of its own rotates."""
    generator = torch.Generator().manual_seed(0)
    module = RopeAttention(24, 2, num_prefix_tokens=2, rotate_half=case == "half", attn_head_dim=16)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 24**-0.5
    table, kwargs = rope_2d((3, 4), 16, layout="half" if case == "half" else "interleaved"), {}
    leaves = [torch.randn(2, 9 if case == "keep" else 14, 24, generator=generator).requires_grad_()]
    if case == "keep":
        kwargs["keep_idx"] = torch.stack([torch.randperm(12, generator=generator)[:7] for _ in range(2)])
    if case == "head table":
        angles = torch.randn(2, 12, 8, generator=generator)
        leaves += [t.requires_grad_() for t in (angles.cos(), angles.sin())]
        table = RopeTable.from_cos_sin(*leaves[1:], "interleaved", per="head")
    leaves += module.parameters()

    def results():
        out = module(leaves[0], table, **kwargs)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    expected, reports = results(), []
    with executing("simulator", on_report=reports.append), nan_filled_memory():
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-6
    assert reports and not [r.kernel for r in reports if "project_rope" in r.kernel or "rotate" in r.kernel]
