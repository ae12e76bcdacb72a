"""The interpreter's traps, and the route it does not take by itself. ``make test`` sets TRITON_INTERPRET=1 for it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from samples import samples

from eva02_kernels import _launch
from eva02_kernels.ops._triton_lib import column_sums, dot
from eva02_kernels.testing import contract, executing, nan_filled_memory

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")


@triton.jit
def _dot_kernel(a_ptr, b_ptr, ours_ptr, plain_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(ours_ptr + at, dot(a, b, tl.zeros([N, N], tl.float32), "ieee"))
    tl.store(plain_ptr + at, tl.dot(a, b))


@triton.jit
def _round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


def test_bfloat16_products_are_right_where_the_interpreters_own_are_not():
    a, b = torch.randn(2, 16, 16).bfloat16().unbind(0)
    ours, plain = torch.empty(2, 16, 16).unbind(0)
    with executing("interpreter"):
        _dot_kernel[(1,)](a, b, ours, plain, N=16)
    exact = a.float() @ b.float()
    torch.testing.assert_close(ours, exact)
    assert not torch.allclose(plain, exact)  # if this fails, the interpreter was mended: `dot` need not cast


def test_float32_is_rounded_to_the_nearest_bfloat16():
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.00390625, 1.01171875, 3.4e38])
    x = torch.cat([torch.randn(4096 - len(special)) * 10 ** torch.randn(4096 - len(special)), special])
    out = torch.empty(4096, dtype=torch.bfloat16)
    with executing("interpreter"):
        _round_kernel[(1,)](x, out, N=4096)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("programs", [1, 33, 513, 1100])
def test_sums_of_many_programs_are_right(programs):
    """More than a tile, more than one program adds: no operator's sample has as many."""
    partials = torch.randn(programs, 70)
    with executing("interpreter"), nan_filled_memory():
        out = column_sums(partials, torch.empty(70))
    torch.testing.assert_close(out, partials.sum(0), rtol=1e-4, atol=1e-4)


def test_a_load_or_store_outside_the_kernels_tensors_is_an_error():
    x = torch.randn(16, 16)
    with executing("interpreter"), pytest.raises(Exception, match="load outside the kernel"):
        _dot_kernel[(1,)](x, x[:15].clone(), torch.empty_like(x), torch.empty_like(x), N=16)
    with executing("interpreter"), pytest.raises(Exception, match="store outside the kernel"):
        _round_kernel[(1,)](x, torch.empty(8, dtype=torch.bfloat16), N=256)


def test_the_interpreter_is_left_as_it_was():
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.cast_impl
    with executing("interpreter"):
        assert InterpreterBuilder.cast_impl is not before
    assert InterpreterBuilder.cast_impl is before


@pytest.mark.parametrize(
    ("op", "sample"),
    [p for p in samples(large=False) if p.values[0] in ("linear", "qkv_rope", "swiglu_mlp", "gelu_mlp")],
)
def test_products_by_torch_with_kernels_around_them_are_accurate(op, sample, monkeypatch):
    """The route of compute capability 9.0 and later; the interpreter takes that of 8.x."""
    monkeypatch.setattr(_launch, "force_fused", False)
    with executing("interpreter"), nan_filled_memory():
        for dtype in (torch.float32, torch.bfloat16) if sample.smoke else (torch.float32,):
            contract.check_accuracy(op, sample, dtype, "triton")
