"""Triton kernels of masked_cosine_loss.

Fused: gather of the target rows, both norms, dot product; a second kernel takes the mean. Backward each gradient in one
pass, both in the same one where no index is given; target rows that were picked several times sum theirs by an inverse
index made on the device (a stable sort, no atomics).
Bytes: forward reads both, backward reads both and writes a gradient: the minimum of each; with an index and both
gradients wanted it reads twice. Launch: tiles of BLOCK_M rows x BLOCK_N columns.
Numerics: float32, one rounding; norms under 1e-8 are 1e-8, a constant. Limits: an index out of range is taken as
padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import ONE_SUM, row_pieces
from eva02_kernels.ops._common import empty_like_needed, present, rows_2d
from eva02_kernels.ops._token_index import inverse_token_index
from eva02_kernels.ops._triton_lib import inverse_sqrt, row_offsets

EPS = tl.constexpr(1e-8)
CLAMPED = tl.constexpr(1e8)


@triton.jit
def _target_rows(idx_ptr, rows, M, T):
    """Target row of each row of pred, and whether there is one."""
    row = rows
    if idx_ptr is not None:
        row = tl.load(idx_ptr + rows, mask=rows < M, other=-1)
    return row, (rows < M) & (row >= 0) & (row < T)


@triton.jit
def _inverse(squares):
    """1 / sqrt(squares), exactly CLAMPED where that norm is under EPS; a NaN stays one."""
    small = squares < EPS * EPS
    return tl.where(small, CLAMPED, inverse_sqrt(tl.where(small, 1.0, squares)))


@triton.jit(do_not_specialize=["M", "T"])
def _cosine_kernel(
    pred_ptr, target_ptr, idx_ptr, stats_ptr, M, T, stride_pred, stride_target,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    target_rows, counts = _target_rows(idx_ptr, rows, M, T)
    pp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tt = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    pt = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, N, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        keep = counts[:, None] & (cols < N)[None, :]
        p = tl.load(pred_ptr + row_offsets(rows, stride_pred) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
        target = row_offsets(target_rows, stride_target) + cols[None, :]
        t = tl.load(target_ptr + target, mask=keep, other=0.0).to(tl.float32)
        pp += p * p
        tt += t * t
        pt += p * t
    p_inv = _inverse(tl.sum(pp, 1))
    t_inv = _inverse(tl.sum(tt, 1))
    cosine = tl.sum(pt, 1) * p_inv * t_inv
    stats = stats_ptr + rows.to(tl.int64)
    tl.store(stats, tl.where(counts, p_inv, 0.0), mask=rows < M)
    tl.store(stats + M, tl.where(counts, t_inv, 0.0), mask=rows < M)
    tl.store(stats + 2 * tl.cast(M, tl.int64), tl.where(counts, cosine, 0.0), mask=rows < M)


# The cosines begin behind two other statistics of any number of rows.
@triton.jit(do_not_specialize=["M", "T"], do_not_specialize_on_alignment=["cosine_ptr"])
def _mean_kernel(cosine_ptr, dloss_ptr, idx_ptr, out_ptr, M, T, BLOCK: tl.constexpr):
    """out = -mean of the cosines of the rows that count, or, given dloss, the gradient of each of them."""
    total = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.int32)
    for first in range(0, M, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        _, counts = _target_rows(idx_ptr, rows, M, T)
        number += counts.to(tl.int32)
        if dloss_ptr is None:
            total += tl.load(cosine_ptr + rows, mask=rows < M, other=0.0)
    number = tl.sum(number, 0)
    above = tl.sum(total, 0) if dloss_ptr is None else tl.load(dloss_ptr).to(tl.float32)
    tl.store(out_ptr, tl.where(number > 0, -above / tl.maximum(number, 1).to(tl.float32), 0.0))


@triton.jit
def _coefficients(stats_ptr, rows, keep, M, slope):
    """d cosine / d pred = other * target + of_pred * pred, and likewise d target with the same ``other``."""
    stats = stats_ptr + rows.to(tl.int64)
    p_inv = tl.load(stats, mask=keep, other=0.0)
    t_inv = tl.load(stats + M, mask=keep, other=0.0)
    along = slope * tl.load(stats + 2 * tl.cast(M, tl.int64), mask=keep, other=0.0)
    of_pred = tl.where(p_inv < CLAMPED, -along * p_inv * p_inv, 0.0)
    of_target = tl.where(t_inv < CLAMPED, -along * t_inv * t_inv, 0.0)
    return slope * p_inv * t_inv, of_pred, of_target


@triton.jit(do_not_specialize=["M", "T"])
def _cosine_bwd_kernel(
    pred_ptr, target_ptr, idx_ptr, stats_ptr, slope_ptr, dpred_ptr, dtarget_ptr, M, T, stride_pred, stride_target,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    target_rows, counts = _target_rows(idx_ptr, rows, M, T)
    keep = counts[:, None] & (cols < N)[None, :]
    p = tl.load(pred_ptr + row_offsets(rows, stride_pred) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    target = row_offsets(target_rows, stride_target) + cols[None, :]
    t = tl.load(target_ptr + target, mask=keep, other=0.0).to(tl.float32)
    other, of_pred, of_target = _coefficients(stats_ptr, rows, counts, M, tl.load(slope_ptr))
    out = row_offsets(rows, N) + cols[None, :]
    there = (rows < M)[:, None] & (cols < N)[None, :]
    if dpred_ptr is not None:
        dpred = tl.where(keep, other[:, None] * t + of_pred[:, None] * p, 0.0)
        tl.store(dpred_ptr + out, dpred.to(dpred_ptr.dtype.element_ty), mask=there)
    if dtarget_ptr is not None:  # without an index: row m of target is that of pred
        dtarget = other[:, None] * p + of_target[:, None] * t
        tl.store(dtarget_ptr + out, dtarget.to(dtarget_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M", "T"])
def _cosine_bwd_target_kernel(
    pred_ptr, target_ptr, order_ptr, starts_ptr, stats_ptr, slope_ptr, dtarget_ptr, M, T, stride_pred, stride_target,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(starts_ptr + rows, mask=rows < T, other=0)
    end = tl.load(starts_ptr + rows + 1, mask=rows < T, other=0)
    slope = tl.load(slope_ptr)
    along = tl.zeros([BLOCK_M], tl.float32)
    dtarget = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, tl.max(end - begin, 0)):
        there = begin + k < end
        place = tl.load(order_ptr + begin + k, mask=there, other=0)
        other, _, of_target = _coefficients(stats_ptr, place, there, M, slope)
        along += tl.where(there, of_target, 0.0)
        keep = there[:, None] & (cols < N)[None, :]
        p = tl.load(pred_ptr + row_offsets(place, stride_pred) + cols[None, :], mask=keep, other=0.0)
        dtarget += other[:, None] * p.to(tl.float32)
    keep = (begin < end)[:, None] & (cols < N)[None, :]
    t = tl.load(target_ptr + row_offsets(rows, stride_target) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    dtarget += along[:, None] * t
    out = row_offsets(rows, N) + cols[None, :]
    there = (rows < T)[:, None] & (cols < N)[None, :]
    tl.store(dtarget_ptr + out, dtarget.to(dtarget_ptr.dtype.element_ty), mask=there)


def fwd(pred: Tensor, target: Tensor, idx: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width = pred.shape
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    stats = torch.empty(3, rows, dtype=torch.float32, device=pred.device)
    pred, target, idx = rows_2d(pred), rows_2d(target), None if idx is None else idx.contiguous()
    if rows:
        launch = row_pieces(width)
        _triton.launch(
            _cosine_kernel, (triton.cdiv(rows, launch["BLOCK_M"]),), launch,
            pred, target, idx, stats, rows, target.shape[0], pred.stride(0), target.stride(0), N=width,
        )  # fmt: skip
    _triton.launch(_mean_kernel, (1,), ONE_SUM, stats[2], None, idx, loss, rows, target.shape[0])
    return loss, stats


def bwd(
    dloss: Tensor, pred: Tensor, target: Tensor, idx: Tensor | None, stats: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    grads = empty_like_needed((pred, target), needs)
    dpred, dtarget = grads
    (rows, width), pool = pred.shape, target.shape[0]
    pred, target, idx = rows_2d(pred), rows_2d(target), None if idx is None else idx.contiguous()
    slope = torch.empty(1, dtype=torch.float32, device=pred.device)
    _triton.launch(_mean_kernel, (1,), ONE_SUM, None, dloss, idx, slope, rows, pool)
    launch = row_pieces(width)
    pieces, strides = triton.cdiv(width, launch["BLOCK_N"]), (pred.stride(0), target.stride(0))
    here = (dpred, dtarget if idx is None else None)
    if rows and width and present(here):
        _triton.launch(
            _cosine_bwd_kernel, (triton.cdiv(rows, launch["BLOCK_M"]), pieces), launch,
            pred, target, idx, stats, slope, *here, rows, pool, *strides, N=width,
        )  # fmt: skip
    if dtarget is not None and idx is not None and dtarget.numel():
        _triton.launch(
            _cosine_bwd_target_kernel, (triton.cdiv(pool, launch["BLOCK_M"]), pieces), launch,
            pred, target, *inverse_token_index(idx, pool, 1), stats, slope, dtarget, rows, pool, *strides, N=width,
        )  # fmt: skip
    return present(grads)
