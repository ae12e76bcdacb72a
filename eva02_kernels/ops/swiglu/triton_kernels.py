"""Triton kernels of swiglu.

Fused: silu(gate) * up; backward both gradients in one pass.
Bytes: forward reads 2 and writes 1, backward reads 3 and writes 2 elements for each of the output: the minimum.
Launch: tiles of BLOCK_M rows x BLOCK_N columns. Numerics: float32, one rounding an output.
Limits: rows with a contiguous last dim; rows under 2**31.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import row_pieces
from eva02_kernels.ops._common import halves, rows_2d
from eva02_kernels.ops._triton_lib import row_offsets, silu_and_slope


@triton.jit(do_not_specialize=["M"])
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, M, stride_gate, stride_up, stride_out,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    gate = tl.load(gate_ptr + row_offsets(rows, stride_gate) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row_offsets(rows, stride_up) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    silu, _ = silu_and_slope(gate, gate_ptr.dtype.element_ty == tl.float32)
    out = (silu * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offsets(rows, stride_out) + cols[None, :], out, mask=keep)


@triton.jit(do_not_specialize=["M"])
def _swiglu_bwd_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, M,
    stride_dout, stride_gate, stride_up, stride_dgate, stride_dup,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    dout = tl.load(dout_ptr + row_offsets(rows, stride_dout) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row_offsets(rows, stride_gate) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row_offsets(rows, stride_up) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    silu, slope = silu_and_slope(gate, gate_ptr.dtype.element_ty == tl.float32)
    dgate = (dout * up * slope).to(dgate_ptr.dtype.element_ty)
    dup = (dout * silu).to(dup_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row_offsets(rows, stride_dgate) + cols[None, :], dgate, mask=keep)
    tl.store(dup_ptr + row_offsets(rows, stride_dup) + cols[None, :], dup, mask=keep)


def forward(gate: Tensor, up: Tensor, out: Tensor, width: int) -> None:
    """out = silu(gate) * up on the first ``width`` columns of (rows, width or more)."""
    rows = gate.shape[0]
    if not rows or not width:
        return
    launch = row_pieces(width)
    grid = (triton.cdiv(rows, launch["BLOCK_M"]), triton.cdiv(width, launch["BLOCK_N"]))
    strides = (gate.stride(0), up.stride(0), out.stride(0))
    _triton.launch(_swiglu_fwd_kernel, grid, launch, gate, up, out, rows, *strides, N=width)


def backward(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, width: int) -> None:
    rows = gate.shape[0]
    if not rows or not width:
        return
    launch = row_pieces(width)
    grid = (triton.cdiv(rows, launch["BLOCK_M"]), triton.cdiv(width, launch["BLOCK_N"]))
    tensors = (dout, gate, up, dgate, dup)
    strides = (t.stride(0) for t in tensors)
    _triton.launch(_swiglu_bwd_kernel, grid, launch, *tensors, rows, *strides, N=width)


def fwd(gate: Tensor, up: Tensor | None) -> Tensor:
    g, u = halves(gate, up)
    out = torch.empty(*gate.shape[:-1], g.shape[1], dtype=gate.dtype, device=gate.device)
    forward(g, u, out.view(g.shape), g.shape[1])
    return out


def bwd(dout: Tensor, gate: Tensor, up: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    # One pass gives both gradients; a single one that nobody wants costs a store, not a pass.
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up) if t is not None]
    g, u = halves(gate, up)
    dg, du = halves(grads[0], grads[1] if up is not None else None)
    backward(rows_2d(dout), g, u, dg, du, g.shape[1])
    return [t for t, need in zip(grads, needs, strict=False) if need]
