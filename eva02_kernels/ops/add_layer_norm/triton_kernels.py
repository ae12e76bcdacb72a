"""Triton kernels of add_layer_norm, and a plain LayerNorm for the operators that have one before a projection.

Fused: drop path, layer scale, residual add, LayerNorm or RMSNorm; backward all gradients in one pass, those of the
parameters as one partial sum a program and a second kernel that adds them (no atomics, a fixed order).
Bytes: every tensor is read or written once, the minimum, and 4 bytes a row for each statistic; the partial sums add at
most 5 % where there are 64 rows or more for each program.
Launch: whole rows in registers, one program for BLOCK_M rows forward, a strided share of the rows backward.
Numerics: float32, one rounding an output; the sum is rounded before its statistics, so that the normed rows are a
function of the sum that is kept; the variance from centred values. Limits: 16,384 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import whole_rows
from eva02_kernels.ops._common import contiguous, empty_like_needed, empty_stats, present, rows_2d, view_2d
from eva02_kernels.ops._triton_lib import (
    column_sums,
    mean_and_rstd,
    norm_input_gradient,
    parameter_partials,
    row_offsets,
)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, layer_scale_ptr, row_scale_ptr, normed_ptr, sum_ptr, mean_ptr, rstd_ptr,
    M, rows_per_sample, stride_x, stride_residual, stride_normed, stride_sum, eps,
    RMS: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + row_offsets(rows, stride_x) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    if row_scale_ptr is not None:
        x *= tl.load(row_scale_ptr + rows // rows_per_sample, mask=rows < M, other=0.0)[:, None]
    if layer_scale_ptr is not None:
        x *= tl.load(layer_scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual = row_offsets(rows, stride_residual) + cols[None, :]
        x += tl.load(residual_ptr + residual, mask=keep, other=0.0).to(tl.float32)
    total = x.to(x_ptr.dtype.element_ty)
    if sum_ptr is not None:
        tl.store(sum_ptr + row_offsets(rows, stride_sum) + cols[None, :], total, mask=keep)
    total = total.to(tl.float32)
    mean, rstd = mean_and_rstd(total, (cols < N)[None, :], N, eps, RMS)
    normed = (total - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    normed = normed.to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + row_offsets(rows, stride_normed) + cols[None, :], normed, mask=keep)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _add_layer_norm_bwd_kernel(
    dnormed_ptr, dsum_ptr, sum_ptr, weight_ptr, mean_ptr, rstd_ptr, x_ptr, layer_scale_ptr, row_scale_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dscale_ptr, M, rows_per_sample,
    stride_dnormed, stride_dsum, stride_sum, stride_x, stride_dx, stride_dresidual,
    RMS: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dscale = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        keep = (rows < M)[:, None] & (cols < N)[None, :]
        dnormed = row_offsets(rows, stride_dnormed) + cols[None, :]
        d = tl.load(dnormed_ptr + dnormed, mask=keep, other=0.0).to(tl.float32)
        normed = tl.load(sum_ptr + row_offsets(rows, stride_sum) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        if not RMS:
            normed -= tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        normed *= rstd[:, None]
        if dweight_ptr is not None:
            dweight += d * normed
        if dbias_ptr is not None:
            dbias += d
        if dx_ptr is not None or dresidual_ptr is not None or dscale_ptr is not None:
            if weight_ptr is not None:
                d *= tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            d = norm_input_gradient(d, normed, rstd, (cols < N)[None, :], N, RMS)
            if dsum_ptr is not None:
                dsum = row_offsets(rows, stride_dsum) + cols[None, :]
                d += tl.load(dsum_ptr + dsum, mask=keep, other=0.0).to(tl.float32)
            if dresidual_ptr is not None:
                dresidual = row_offsets(rows, stride_dresidual) + cols[None, :]
                tl.store(dresidual_ptr + dresidual, d.to(dresidual_ptr.dtype.element_ty), mask=keep)
            if row_scale_ptr is not None:
                d *= tl.load(row_scale_ptr + rows // rows_per_sample, mask=rows < M, other=0.0)[:, None]
            if dscale_ptr is not None:
                x = tl.load(x_ptr + row_offsets(rows, stride_x) + cols[None, :], mask=keep, other=0.0)
                dscale += d * x.to(tl.float32)
            if dx_ptr is not None:
                if layer_scale_ptr is not None:
                    d *= tl.load(layer_scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
                dx = row_offsets(rows, stride_dx) + cols[None, :]
                tl.store(dx_ptr + dx, d.to(dx_ptr.dtype.element_ty), mask=keep)
    partial = tl.program_id(0) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=cols < N)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + partial, tl.sum(dscale, 0), mask=cols < N)


def _rows_per_sample(rows: int, row_scale: Tensor | None) -> int:
    return max(1, rows if row_scale is None else rows // max(1, row_scale.shape[0]))


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    layer_scale: Tensor | None, row_scale: Tensor | None, rms: bool,
    normed: Tensor, total: Tensor | None, mean: Tensor | None, rstd: Tensor,
) -> None:  # fmt: skip
    """Fill normed, total (where given), mean (where given) and rstd. Activations are rows (M, N), any row stride."""
    rows, width = x.shape
    if not rows or not width:
        return
    launch = whole_rows(width)
    _triton.launch(
        _add_layer_norm_fwd_kernel, (triton.cdiv(rows, launch["BLOCK_M"]),), launch,
        x, residual, *contiguous(weight, bias, layer_scale, row_scale), normed, total, mean, rstd,
        rows, _rows_per_sample(rows, row_scale), x.stride(0), _stride(residual), normed.stride(0), _stride(total), eps,
        RMS=rms, N=width,
    )  # fmt: skip


def backward(
    dnormed: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor,
    x: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None, rms: bool,
    dx: Tensor | None, dresidual: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None, dlayer_scale: Tensor | None,
) -> None:  # fmt: skip
    """Fill the gradients that are given, in one pass. x is read for that of layer_scale only."""
    rows, width = total.shape
    parameters = (dweight, dbias, dlayer_scale)
    if not rows or not width:
        for grad in present(parameters):
            grad.zero_()
        return
    launch = whole_rows(width, 8 if dlayer_scale is not None else 16)  # three sums of columns are many registers
    # Without gradients of parameters there are no partial sums to keep few.
    programs = triton.cdiv(rows, launch["BLOCK_M"])
    if present(parameters):
        programs = _triton.num_partials(rows, launch["BLOCK_M"], total.device)
    partials = [parameter_partials(p, True, programs, total.device) for p in parameters]
    _triton.launch(
        _add_layer_norm_bwd_kernel, (programs,), launch,
        dnormed, dsum, total, *contiguous(weight), mean, rstd, None if dlayer_scale is None else x,
        *contiguous(layer_scale, row_scale), dx, dresidual, *partials, rows, _rows_per_sample(rows, row_scale),
        *(_stride(t) for t in (dnormed, dsum, total, x, dx, dresidual)), RMS=rms, N=width,
    )  # fmt: skip
    for partial, grad in zip(present(partials), present(parameters), strict=True):
        column_sums(partial, grad)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> None:
    """Fill out = LayerNorm(x) and its statistics.

    x, out: (M, N) with a contiguous last dim and any row stride; out may be x. mean, rstd: (M,) float32. weight, bias:
    (N,) in the dtype of x or float32, or None. N is at most 16,384 (``_launch.MAX_ROW_WIDTH``).
    """
    forward(x, None, weight, bias, eps, None, None, False, out, None, mean, rstd)


def norm_backward(
    dnormed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dx: Tensor | None,
    *, dresidual: Tensor | None = None, dweight: Tensor | None = None, dbias: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill dx, dweight and dbias, those that are given, from the gradient of :func:`normalise`'s out, in one pass.

    dnormed, x, dx, dresidual: (M, N) with a contiguous last dim and any row stride. ``dresidual`` is added to dx: the
    gradient that reaches x on another way, such as around the block; dx may be it, or dnormed. mean, rstd: as
    normalise left them. dweight, dbias: (N,) contiguous, float32 or the dtype of x.
    """
    backward(
        dnormed, dresidual, x, weight, mean, rstd, None, None, None, False, dx, None, dweight, dbias, None
    )  # fmt: skip


def fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    layer_scale: Tensor | None, row_scale: Tensor | None, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x2 = rows_2d(x)
    rows = x2.shape[0]
    adds = residual is not None or layer_scale is not None or row_scale is not None
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape if adds else 0, dtype=x.dtype, device=x.device)
    mean, rstd = empty_stats(x, 0 if rms else rows), empty_stats(x, rows)
    forward(
        x2, None if residual is None else rows_2d(residual), weight, bias, eps, layer_scale, row_scale, rms,
        view_2d(normed), view_2d(total) if adds else None, None if rms else mean, rstd,
    )  # fmt: skip
    return normed, total, mean, rstd


def bwd(
    dnormed: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, x: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None, eps: float, rms: bool,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    grads = empty_like_needed((total, total, weight, bias, layer_scale), needs)
    dx, dresidual, *parameters = grads
    backward(
        rows_2d(dnormed), None if dsum is None else rows_2d(dsum), rows_2d(total), weight, None if rms else mean, rstd,
        None if x is None else rows_2d(x), layer_scale, row_scale, rms,
        None if dx is None else view_2d(dx), None if dresidual is None else view_2d(dresidual), *parameters,
    )  # fmt: skip
    return present(grads)
