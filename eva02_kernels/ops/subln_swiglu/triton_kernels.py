"""Triton kernels of subln_swiglu.

Fused: LayerNorm(silu(gate) * up); backward all gradients in one pass, those of weight and bias as one partial sum a
program and a second kernel that adds them (no atomics, a fixed order). Inside an MLP that pass also writes the output
again and sums the gradients of the biases of gate and up.
Bytes: forward reads 2 and writes 1, backward reads 3 and writes 2 elements for each of the output (3 inside an MLP):
the minimum, and 4 bytes a row for each statistic; the partial sums add at most 3 % where there are 64 rows or more for
each program.
Launch: whole rows in registers, one program for BLOCK_M rows forward, a strided share of the rows backward.
Numerics: float32, the variance from centred values; one rounding an output. Limits: 16,384 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import whole_rows
from eva02_kernels.ops._common import empty_like_needed, empty_stats, present, rows_2d
from eva02_kernels.ops._triton_lib import (
    column_sums,
    mean_and_rstd,
    norm_input_gradient,
    parameter_partials,
    row_offsets,
    silu_and_slope,
)


@triton.jit(do_not_specialize=["M"])
def _subln_swiglu_fwd_kernel(
    gate_ptr, up_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, M, stride_gate, stride_up, stride_out, eps,
    N: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    there = (rows < M)[:, None] & (cols < COLS)[None, :]
    keep = (cols < N)[None, :]
    gate = tl.load(gate_ptr + row_offsets(rows, stride_gate) + cols[None, :], mask=there, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row_offsets(rows, stride_up) + cols[None, :], mask=there, other=0.0).to(tl.float32)
    silu, _ = silu_and_slope(gate, gate_ptr.dtype.element_ty == tl.float32)
    hidden = silu * up
    mean, rstd = mean_and_rstd(hidden, keep, N, eps, False)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    out = (hidden - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    out = tl.where(keep, out, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offsets(rows, stride_out) + cols[None, :], out, mask=there)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _subln_swiglu_bwd_kernel(
    dout_ptr, gate_ptr, up_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dgate_ptr, dup_ptr, out_ptr, dweight_ptr,
    dbias_ptr, gate_sum_ptr, up_sum_ptr, M, stride_dout, stride_gate, stride_up, stride_dgate, stride_dup, stride_out,
    N: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    keep = (cols < N)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if out_ptr is not None and bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros([BLOCK_N], tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        there = (rows < M)[:, None] & (cols < COLS)[None, :]
        dout = tl.load(dout_ptr + row_offsets(rows, stride_dout) + cols[None, :], mask=there, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row_offsets(rows, stride_gate) + cols[None, :], mask=there, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row_offsets(rows, stride_up) + cols[None, :], mask=there, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        silu, slope = silu_and_slope(gate, gate_ptr.dtype.element_ty == tl.float32)
        normed = (silu * up - mean[:, None]) * rstd[:, None]
        normed = tl.where(keep, normed, 0.0)
        dout = tl.where(keep, dout, 0.0)
        if dweight_ptr is not None:
            dweight += dout * normed
        if dbias_ptr is not None:
            dbias += dout
        if out_ptr is not None:
            out = (normed * weight[None, :] + bias[None, :]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row_offsets(rows, stride_out) + cols[None, :], out, mask=there)
        dhidden = norm_input_gradient(dout * weight[None, :], normed, rstd, keep, N, False)
        dgate = tl.where(keep, dhidden * up * slope, 0.0)
        dup = tl.where(keep, dhidden * silu, 0.0)
        if gate_sum_ptr is not None:
            gate_sum += dgate
        if up_sum_ptr is not None:
            up_sum += dup
        dgate = dgate.to(dgate_ptr.dtype.element_ty)
        dup = dup.to(dup_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row_offsets(rows, stride_dgate) + cols[None, :], dgate, mask=there)
        tl.store(dup_ptr + row_offsets(rows, stride_dup) + cols[None, :], dup, mask=there)
    partial = tl.program_id(0) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=cols < N)
    if gate_sum_ptr is not None:
        tl.store(gate_sum_ptr + partial, tl.sum(gate_sum, 0), mask=cols < N)
    if up_sum_ptr is not None:
        tl.store(up_sum_ptr + partial, tl.sum(up_sum, 0), mask=cols < N)


def forward(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor,
    *, cols: int,
) -> None:  # fmt: skip
    """Fill out, mean and rstd. ``cols``: columns that may be read and written: the width, or that with its padding."""
    rows, width = gate.shape[0], weight.numel()
    if not rows:
        return
    launch = whole_rows(cols)
    strides = (gate.stride(0), up.stride(0), out.stride(0))
    _triton.launch(
        _subln_swiglu_fwd_kernel, (triton.cdiv(rows, launch["BLOCK_M"]),), launch,
        gate, up, weight, bias, out, mean, rstd, rows, *strides, eps, N=width, COLS=cols,
    )  # fmt: skip


def backward(
    dout: Tensor, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    dgate: Tensor, dup: Tensor, out: Tensor | None, grads: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Fill dgate and dup (rows, cols), where wanted the output again, and ``grads``, those that are wanted of weight,
    bias and, as column sums, of the biases of gate and up."""
    rows, width, cols = gate.shape[0], weight.numel(), dgate.shape[1]
    if not rows:
        for empty in present(grads):
            empty.zero_()
        return
    launch = whole_rows(cols) if len(present(grads)) <= 2 else whole_rows(cols, 8)
    programs = _triton.num_partials(rows, launch["BLOCK_M"], gate.device)
    partials = [parameter_partials(g, True, programs, gate.device) for g in grads]
    tensors, results = (dout, gate, up), (dgate, dup)
    _triton.launch(
        _subln_swiglu_bwd_kernel, (programs,), launch,
        *tensors, weight, bias, mean, rstd, *results, out, *partials, rows,
        *(t.stride(0) for t in (*tensors, *results)), 0 if out is None else out.stride(0), N=width, COLS=cols,
    )  # fmt: skip
    for partial, grad in zip(partials, grads, strict=True):
        if partial is not None and grad is not None:
            column_sums(partial, grad)


def fwd(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    g, u = rows_2d(gate), rows_2d(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    mean, rstd = empty_stats(gate, g.shape[0]), empty_stats(gate, g.shape[0])
    forward(g, u, weight.contiguous(), bias.contiguous(), eps, out.view(g.shape), mean, rstd, cols=g.shape[1])
    return out, mean, rstd


def bwd(
    dout: Tensor, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    g, u = rows_2d(gate), rows_2d(up)
    dgate, dup = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    grads = empty_like_needed((weight, bias), needs[2:])
    backward(rows_2d(dout), g, u, weight.contiguous(), None, mean, rstd, dgate.view(g.shape), dup.view(g.shape), None,
             (*grads, None, None))  # fmt: skip
    return [t for t, need in zip((dgate, dup), needs, strict=False) if need] + present(grads)
