"""Triton kernels of gather_layer_norm.

Fused: gather, LayerNorm, zeros for padding; backward all gradients in one pass over the tokens of x: a token that was
picked several times sums its output gradients first, by an inverse index made on the device (a stable sort, no
atomics). Gradients of weight and bias are one partial sum a program and a second kernel that adds them.
Bytes: forward moves twice the picked elements; backward reads as much and writes dx once: the minimum of both.
Launch: whole rows in registers, one program for BLOCK_M rows forward, a strided share of the tokens backward.
Numerics: float32, the variance from centred values; one rounding. Limits: 16,384 columns; an index out of range is
taken as padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import whole_rows
from eva02_kernels.ops._common import empty_like_needed, empty_stats, last_dense, present, rows_2d
from eva02_kernels.ops._token_index import inverse_token_index
from eva02_kernels.ops._triton_lib import (
    column_sums,
    mean_and_rstd,
    norm_input_gradient,
    parameter_partials,
    picked_tokens,
    row_offsets,
    sum_of_run,
)


@triton.jit(do_not_specialize=["M", "K", "S", "limit"])
def _gather_layer_norm_fwd_kernel(
    x_ptr, idx_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, M, K, S, limit, stride_x, stride_x_token, eps,
    FLAT: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    x, picked = picked_tokens(idx_ptr, rows, rows < M, K, S, limit, stride_x, stride_x_token, FLAT)
    keep = picked[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + x[:, None] + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    mean, rstd = mean_and_rstd(x, (cols < N)[None, :], N, eps, False)
    tl.store(mean_ptr + rows, tl.where(picked, mean, 0.0), mask=rows < M)
    tl.store(rstd_ptr + rows, tl.where(picked, rstd, 0.0), mask=rows < M)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    out = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    out = tl.where(picked[:, None], out, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offsets(rows, N) + cols[None, :], out, mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["M", "S"])
def _gather_layer_norm_bwd_kernel(
    dout_ptr, x_ptr, order_ptr, starts_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, M, S,
    stride_dout, stride_x, stride_x_token, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        begin = tl.load(starts_ptr + rows, mask=rows < M, other=0)
        end = tl.load(starts_ptr + rows + 1, mask=rows < M, other=0)
        picked = begin < end
        dout = sum_of_run(dout_ptr, order_ptr, begin, end, cols, stride_dout, N, BLOCK_M, BLOCK_N)
        place = tl.load(order_ptr + begin, mask=picked, other=0)  # the statistics of duplicates are the same
        mean = tl.load(mean_ptr + place, mask=picked, other=0.0)
        rstd = tl.load(rstd_ptr + place, mask=picked, other=0.0)
        x = row_offsets(rows // S, stride_x) + row_offsets(rows % S, stride_x_token)
        x = tl.load(x_ptr + x + cols[None, :], mask=picked[:, None] & (cols < N)[None, :], other=0.0).to(tl.float32)
        normed = (x - mean[:, None]) * rstd[:, None]
        if dweight_ptr is not None:
            dweight += dout * normed
        if dbias_ptr is not None:
            dbias += dout
        if dx_ptr is not None:
            dx = norm_input_gradient(dout * weight[None, :], normed, rstd, (cols < N)[None, :], N, False)
            keep = (rows < M)[:, None] & (cols < N)[None, :]
            tl.store(dx_ptr + row_offsets(rows, N) + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=keep)
    partial = tl.program_id(0) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=cols < N)


def fwd(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq_len, width = x.shape
    out = torch.empty(*idx.shape, width, dtype=x.dtype, device=x.device)
    mean, rstd = empty_stats(x, idx.numel()), empty_stats(x, idx.numel())
    if out.numel():
        x, flat, launch = last_dense(x), idx.dim() == 1, whole_rows(width)
        _triton.launch(
            _gather_layer_norm_fwd_kernel, (triton.cdiv(idx.numel(), launch["BLOCK_M"]),), launch,
            x, idx.contiguous(), weight.contiguous(), bias.contiguous(), out, mean, rstd,
            idx.numel(), idx.shape[-1], max(1, seq_len), batch * seq_len if flat else seq_len,
            x.stride(0), x.stride(1), eps, FLAT=flat, N=width,
        )  # fmt: skip
    return out, mean, rstd


def bwd(
    dout: Tensor, x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    batch, seq_len, width = x.shape
    grads = empty_like_needed((x, weight, bias), needs)
    dx, *parameters = grads
    if not x.numel():
        return [grad.zero_() for grad in present(grads)]
    rows, launch = batch * seq_len, whole_rows(width)
    programs = triton.cdiv(rows, launch["BLOCK_M"])
    if present(parameters):
        # Of the tokens, those that were picked are read: partial sums are few beside them.
        programs = _triton.num_partials(min(rows, idx.numel()), launch["BLOCK_M"], x.device)
    partials = [parameter_partials(p, True, programs, x.device) for p in parameters]
    dout, x = rows_2d(dout), last_dense(x)
    _triton.launch(
        _gather_layer_norm_bwd_kernel, (programs,), launch,
        dout, x, *inverse_token_index(idx, batch, seq_len), weight.contiguous(), mean, rstd, dx, *partials,
        rows, seq_len, dout.stride(0), x.stride(0), x.stride(1), N=width,
    )  # fmt: skip
    for partial, grad in zip(present(partials), present(parameters), strict=True):
        column_sums(partial, grad)
    return present(grads)
