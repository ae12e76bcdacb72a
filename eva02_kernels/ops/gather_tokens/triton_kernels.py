"""Triton kernels of gather_tokens and of its adjoint, which is its backward and the forward of scatter_tokens.

Fused: index arithmetic, gather, zeros for padding. The adjoint is a gather too, by an inverse index made on the device
(a stable sort): each row is written once and sums its duplicates in the order of the index, without atomics.
Bytes: a gather moves twice the gathered elements, the adjoint those and every row of its output once: the minimum.
Launch: tiles of BLOCK_M rows x BLOCK_N columns. Numerics: exact; duplicates are summed in float32, one rounding.
Limits: tensors with a contiguous last dim; rows under 2**31. An index out of range is taken as padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import row_pieces
from eva02_kernels.ops._common import last_dense, rows_2d
from eva02_kernels.ops._token_index import inverse_token_index
from eva02_kernels.ops._triton_lib import picked_tokens, row_offsets, sum_of_run


@triton.jit(do_not_specialize=["M", "K", "S", "limit"])
def _gather_tokens_kernel(
    x_ptr, idx_ptr, out_ptr, M, K, S, limit, stride_x, stride_x_token,
    FLAT: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, picked = picked_tokens(idx_ptr, rows, rows < M, K, S, limit, stride_x, stride_x_token, FLAT)
    keep = picked[:, None] & (cols < N)[None, :]
    out = tl.load(x_ptr + x[:, None] + cols[None, :], mask=keep, other=0.0)
    tl.store(out_ptr + row_offsets(rows, N) + cols[None, :], out, mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _scatter_tokens_kernel(
    y_ptr, order_ptr, starts_ptr, out_ptr, M, stride_y, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(starts_ptr + rows, mask=rows < M, other=0)
    end = tl.load(starts_ptr + rows + 1, mask=rows < M, other=0)
    out = sum_of_run(y_ptr, order_ptr, begin, end, cols, stride_y, N, BLOCK_M, BLOCK_N)
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + row_offsets(rows, N) + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=keep)


def gather(x: Tensor, idx: Tensor) -> Tensor:
    batch, seq_len, width = x.shape
    out = torch.empty(*idx.shape, width, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, idx = last_dense(x), idx.contiguous()
    flat = idx.dim() == 1
    launch = row_pieces(width)
    grid = (triton.cdiv(idx.numel(), launch["BLOCK_M"]), triton.cdiv(width, launch["BLOCK_N"]))
    _triton.launch(
        _gather_tokens_kernel, grid, launch, x, idx, out, idx.numel(), idx.shape[-1], max(1, seq_len),
        batch * seq_len if flat else seq_len, x.stride(0), x.stride(1), FLAT=flat, N=width,
    )  # fmt: skip
    return out


def scatter(y: Tensor, idx: Tensor, batch: int, seq_len: int) -> Tensor:
    width = y.shape[-1]
    out = torch.empty(batch, seq_len, width, dtype=y.dtype, device=y.device)
    if not out.numel():
        return out
    order, starts = inverse_token_index(idx, batch, seq_len)
    y = rows_2d(y)
    launch = row_pieces(width)
    grid = (triton.cdiv(batch * seq_len, launch["BLOCK_M"]), triton.cdiv(width, launch["BLOCK_N"]))
    _triton.launch(
        _scatter_tokens_kernel, grid, launch, y, order, starts, out, batch * seq_len, y.stride(0), N=width
    )  # fmt: skip
    return out


fwd = gather


def bwd(dout: Tensor, idx: Tensor, batch: int, seq_len: int, needs: Sequence[bool]) -> list[Tensor]:
    return [scatter(dout, idx, batch, seq_len)] if needs[0] else []
