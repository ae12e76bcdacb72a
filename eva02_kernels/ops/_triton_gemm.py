"""Matrix products of linear, swiglu_mlp, gelu_mlp and qkv_rope, with everything around them in their epilogue.

Fused: bias, GELU, layer scale, row scale and residual in a product's epilogue; gate and up as one product over a shared
tile of the input, with SwiGLU behind it, and a LayerNorm of that in the product that it meets; q, k and v as one
launch; the activation's gradient behind the product that gives it, which recomputes the activation for the next product
and sums its columns for the biases.
Two routes (``_launch.fused_gemm``): fused as above, or torch.mm (cuBLAS) for the products and one Triton kernel over
rows for what is around them. Products of backward that have nothing to fuse (weight gradients, input gradients) are
torch.mm on either route; 16-bit ones are rounded once, where finish_gradients does not take them in float32, and cuBLAS
may add split sums in 16 bits where torch's ``allow_*_reduced_precision_reduction`` lets it.
Launch: BLOCK_M x BLOCK_N tiles in groups of rows, each tile all of K in a pipelined loop. Numerics: float32 sums,
float32 epilogue, one rounding an output. Limits: last dims contiguous, any row stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _launch, _triton
from eva02_kernels._launch import GROUP_ROWS, Choice, fold_norm, row_pieces
from eva02_kernels.ops._common import contiguous, padded
from eva02_kernels.ops._products import (
    HiddenNorm,
    Part,
    by_torch,
    gate_and_up,
    padded_columns,
    weight_gradient_float32_by_torch,
    weight_gradients_by_torch,
)
from eva02_kernels.ops._triton_lib import (
    column_sums,
    dot,
    gelu_and_slope,
    inverse_sqrt,
    row_offsets,
    scale_and_sum,
    silu_and_slope,
)
from eva02_kernels.ops.add_layer_norm.triton_kernels import norm_backward, normalise
from eva02_kernels.ops.apply_rope.triton_kernels import rotate, table_gradients
from eva02_kernels.ops.subln_swiglu import triton_kernels as subln_swiglu

__all__ = ["norm_backward", "normalise", "rotate", "scale_and_sum", "table_gradients"]  # of _products.Kernels


# ---- device functions ------------------------------------------------------------------------------------------------
@triton.jit
def tile_of_program(M, COLS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row, column) of this program's tile: GROUP tile rows for a tile column, then the next tile column."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (COLS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def products(
    a_ptr, b_ptr, b2_ptr, rows, cols, M, stride_a, stride_b, COLS: tl.constexpr, K: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of A B, and of A B2 where there is one, float32. B is (K, COLS), or (COLS, K) where TRANSPOSED.

    Rows and columns beyond the last hold anything.
    """
    k = tl.arange(0, BLOCK_K)
    # The last row is loaded again for those that do not exist: no mask in the loop.
    a_ptrs = a_ptr + row_offsets(tl.minimum(rows, M - 1), stride_a) + k[None, :]
    if TRANSPOSED:
        offsets = tl.minimum(cols, COLS - 1).to(tl.int64)[None, :] * stride_b + k[:, None]
        step = BLOCK_K
    else:
        offsets = row_offsets(k, stride_b) + cols[None, :]
        step = BLOCK_K * stride_b
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < K - start)[None, :], other=0.0)
        b = _load_b(b_ptr + offsets, k, start, cols, COLS, K, TRANSPOSED, BLOCK_N, BLOCK_K)
        acc = dot(a, b, acc, PRECISION)
        if b2_ptr is not None:
            b2 = _load_b(b2_ptr + offsets, k, start, cols, COLS, K, TRANSPOSED, BLOCK_N, BLOCK_K)
            acc2 = dot(a, b2, acc2, PRECISION)
        a_ptrs += BLOCK_K
        offsets += step
    return acc, acc2


@triton.jit
def _load_b(
    ptrs, k, start, cols, COLS: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN_N: tl.constexpr = TRANSPOSED or COLS % BLOCK_N == 0
    if EVEN_K and EVEN_N:
        b = tl.load(ptrs)
    elif EVEN_K:
        b = tl.load(ptrs, mask=(cols < COLS)[None, :], other=0.0)
    elif EVEN_N:
        b = tl.load(ptrs, mask=(k < K - start)[:, None], other=0.0)
    else:
        b = tl.load(ptrs, mask=(k < K - start)[:, None] & (cols < COLS)[None, :], other=0.0)
    return b


@triton.jit
def column_halves(y):
    """Both halves of a tile's columns: epilogues take one at a time, so that its operands fit in registers."""
    return tl.split(tl.permute(tl.reshape(y, [y.shape[0], 2, y.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def add_columns(y, ptr, cols, N):
    """y plus a parameter of the first N columns, where there is one."""
    if ptr is not None:
        y += tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _finish(
    y, rows, cols, M, layer_scale_ptr, row_scale_ptr, residual_ptr, out_ptr, stride_residual, stride_out,
    rows_per_sample, N: tl.constexpr,
):  # fmt: skip
    """Store residual + row_scale * layer_scale * y."""
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    if layer_scale_ptr is not None:
        y *= tl.load(layer_scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if row_scale_ptr is not None:
        y *= tl.load(row_scale_ptr + rows // rows_per_sample, mask=rows < M, other=0.0)[:, None]
    if residual_ptr is not None:
        residual = residual_ptr + row_offsets(rows, stride_residual) + cols[None, :]
        y += tl.load(residual, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_offsets(rows, stride_out) + cols[None, :], y.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _store_hidden(y, rows, cols, M, ptr, stride, N: tl.constexpr, COLS: tl.constexpr):
    """Store y and zero in the padding, where there is a pointer."""
    if ptr is not None:
        y = tl.where((cols < N)[None, :], y, 0.0).to(ptr.dtype.element_ty)
        keep = (rows < M)[:, None] & (cols < COLS)[None, :]
        tl.store(ptr + row_offsets(rows, stride) + cols[None, :], y, mask=keep)


@triton.jit
def _activation_gradient(
    dhidden, rows, cols, M, gate_ptr, up_ptr, bias_ptr, centre_ptr, dgate_ptr, dup_ptr, hidden_ptr, stride_gate,
    stride_dgate, stride_hidden, N: tl.constexpr, COLS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of gate and up for that of silu(gate) * up, or without up that of gate for gelu(gate + bias),
    and the activation itself, less its centre; returns the gradients, zero beyond the last row and column."""
    there = (rows < M)[:, None] & (cols < COLS)[None, :]
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = row_offsets(rows, stride_gate) + cols[None, :]
    gate = tl.load(gate_ptr + offsets, mask=there, other=0.0).to(tl.float32)
    if up_ptr is not None:
        up = tl.load(up_ptr + offsets, mask=there, other=0.0).to(tl.float32)
        silu, slope = silu_and_slope(gate, PRECISE)
        hidden = silu * up
        dgate = tl.where(keep, dhidden * up * slope, 0.0)
        dup = tl.where(keep, dhidden * silu, 0.0)
        _store_hidden(dup, rows, cols, M, dup_ptr, stride_dgate, N, COLS)
    else:
        hidden, slope = gelu_and_slope(add_columns(gate, bias_ptr, cols, N))
        if centre_ptr is not None:
            hidden -= tl.load(centre_ptr + cols, mask=cols < N, other=0.0)[None, :]
        dgate = tl.where(keep, dhidden * slope, 0.0)
        dup = dgate
    _store_hidden(dgate, rows, cols, M, dgate_ptr, stride_dgate, N, COLS)
    _store_hidden(hidden, rows, cols, M, hidden_ptr, stride_hidden, N, COLS)
    return dgate, dup


@triton.jit
def _store_piece(hidden, rows, first, M, piece_ptr, N: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Store the mean of each row's columns from ``first`` on, those that exist, and the squares about it."""
    keep = (first + tl.arange(0, WIDTH) < N)[None, :]
    columns = tl.minimum(N - first, WIDTH)
    mean = tl.sum(tl.where(keep, hidden, 0.0), 1) / tl.maximum(columns, 1).to(tl.float32)
    centred = tl.where(keep, hidden - mean[:, None], 0.0)
    at = piece_ptr + tl.cast(first // WIDTH, tl.int64) * M + rows
    there = (rows < M) & (columns > 0)
    tl.store(at, mean, mask=there)
    tl.store(at + tl.cast(COUNT, tl.int64) * M, tl.sum(centred * centred, 1), mask=there)


# ---- kernels ---------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _project_kernel(
    a_ptr, b_ptr, bias_ptr, layer_scale_ptr, row_scale_ptr, residual_ptr, out_ptr, mean_ptr, rstd_ptr, weight_sum_ptr,
    M, stride_a, stride_b, stride_residual, stride_out, rows_per_sample,
    N: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, COLS, GROUP, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y, _ = products(a_ptr, b_ptr, None, rows, cols, M, stride_a, stride_b, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K,
                    PRECISION)  # fmt: skip
    halves = column_halves(y)
    for half in tl.static_range(2):
        cols = tile_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        y = halves[half]
        if mean_ptr is not None:  # of the LayerNorm of a's rows
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
            weight_sum = tl.load(weight_sum_ptr + cols, mask=cols < N, other=0.0)
            y = (y - mean[:, None] * weight_sum[None, :]) * rstd[:, None]
        y = add_columns(y, bias_ptr, cols, N)
        _finish(y, rows, cols, M, layer_scale_ptr, row_scale_ptr, residual_ptr, out_ptr, stride_residual, stride_out,
                rows_per_sample, N)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _project_parts_kernel(
    a_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, out_ptr, M, stride_a, stride_b, stride_out,
    PART: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of three weights of PART columns, which are whole tiles."""
    tile_m, tile_n = tile_of_program(M, N, GROUP, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tile_n * BLOCK_N // PART
    b_ptr = b0_ptr
    if part == 1:
        b_ptr = b1_ptr
    if part == 2:
        b_ptr = b2_ptr
    first = tile_n * BLOCK_N - part * PART
    cols = first + tl.arange(0, BLOCK_N)
    y, _ = products(a_ptr, b_ptr, None, rows, cols, M, stride_a, stride_b, PART, K, True, BLOCK_M, BLOCK_N, BLOCK_K,
                    PRECISION)  # fmt: skip
    halves = column_halves(y)
    for half in tl.static_range(2):
        cols = first + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        y = add_columns(halves[half], bias0_ptr, cols, tl.where(part == 0, PART, 0))
        y = add_columns(y, bias1_ptr, cols, tl.where(part == 1, PART, 0))
        y = add_columns(y, bias2_ptr, cols, tl.where(part == 2, PART, 0))
        out = out_ptr + row_offsets(rows, stride_out) + (part * PART + cols)[None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None])


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _finish_kernel(
    y_ptr, bias_ptr, layer_scale_ptr, row_scale_ptr, residual_ptr, out_ptr, M, stride_y, stride_residual, stride_out,
    rows_per_sample, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    y = tl.load(y_ptr + row_offsets(rows, stride_y) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    y = add_columns(y, bias_ptr, cols, N)
    _finish(y, rows, cols, M, layer_scale_ptr, row_scale_ptr, residual_ptr, out_ptr, stride_residual, stride_out,
            rows_per_sample, N)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _activate_kernel(
    a_ptr, w_gate_ptr, w_up_ptr, b_gate_ptr, b_up_ptr, gate_ptr, up_ptr, hidden_ptr, norm_weight_ptr, piece_ptr, M,
    stride_a, stride_w, stride_gate, stride_hidden, GELU: tl.constexpr, PIECES: tl.constexpr,
    N: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, COLS, GROUP, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    gate, up = products(a_ptr, w_gate_ptr, w_up_ptr, rows, cols, M, stride_a, stride_w, N, K, True, BLOCK_M, BLOCK_N,
                        BLOCK_K, PRECISION)  # fmt: skip
    gates, ups = column_halves(gate), column_halves(up)
    PRECISE: tl.constexpr = a_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee"
    for half in tl.static_range(2):
        cols = tile_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, up = gates[half], ups[half]
        if GELU:
            _store_hidden(gate, rows, cols, M, gate_ptr, stride_gate, N, COLS)
            gate = add_columns(gate, b_gate_ptr, cols, N)
        else:
            gate = add_columns(gate, b_gate_ptr, cols, N)
            up = add_columns(up, b_up_ptr, cols, N)
            _store_hidden(gate, rows, cols, M, gate_ptr, stride_gate, N, COLS)
            _store_hidden(up, rows, cols, M, up_ptr, stride_gate, N, COLS)
        if hidden_ptr is not None:
            if GELU:
                hidden, _ = gelu_and_slope(gate)
            else:
                if piece_ptr is not None:  # the statistics are those of what is kept
                    gate = gate.to(a_ptr.dtype.element_ty).to(tl.float32)
                    up = up.to(a_ptr.dtype.element_ty).to(tl.float32)
                silu, _ = silu_and_slope(gate, PRECISE)
                hidden = silu * up
                if piece_ptr is not None:
                    first = tile_n * BLOCK_N + half * (BLOCK_N // 2)
                    _store_piece(hidden, rows, first, M, piece_ptr, N, BLOCK_N // 2, PIECES)
                    hidden *= tl.load(norm_weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            _store_hidden(hidden, rows, cols, M, hidden_ptr, stride_hidden, N, COLS)


@triton.jit(do_not_specialize=["M", "row_programs"])
def _fold_norm_kernel(
    piece_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, weight_sum_ptr, shift_ptr, M,
    row_programs, stride_weight, eps, N: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First the statistics of rows from those of their pieces, nothing cancels; then a program for a weight's row."""
    if tl.program_id(0) < row_programs:
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        pieces = tl.arange(0, BLOCK_P)
        columns = tl.minimum(tl.maximum(N - pieces * WIDTH, 0), WIDTH).to(tl.float32)[:, None]
        there = (columns > 0.0) & (rows < M)[None, :]
        at = piece_ptr + row_offsets(pieces, M) + rows[None, :]
        means = tl.load(at, mask=there, other=0.0)
        mean = tl.sum(columns * means, 0) * (1.0 / N)
        squares = tl.load(at + tl.cast(PIECES, tl.int64) * M, mask=there, other=0.0)
        squares += columns * (means - mean[None, :]) * (means - mean[None, :])
        variance = tl.sum(tl.where(there, squares, 0.0), 0) * (1.0 / N)
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        tl.store(rstd_ptr + rows, inverse_sqrt(variance + tl.cast(eps, tl.float32)), mask=rows < M)
    else:
        n = tl.program_id(0) - row_programs
        sums = tl.zeros([BLOCK_N], tl.float32)
        shift = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            keep = cols < N
            weight = tl.load(weight_ptr + tl.cast(n, tl.int64) * stride_weight + cols, mask=keep, other=0.0)
            sums += weight.to(tl.float32) * tl.load(norm_weight_ptr + cols, mask=keep, other=0.0).to(tl.float32)
            if norm_bias_ptr is not None:
                shift += weight.to(tl.float32) * tl.load(norm_bias_ptr + cols, mask=keep, other=0.0).to(tl.float32)
        total = tl.sum(shift, 0)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n).to(tl.float32)
        tl.store(weight_sum_ptr + n, tl.sum(sums, 0))
        tl.store(shift_ptr + n, total)


@triton.jit(do_not_specialize=["M"])
def _activate_rows_kernel(
    gate_ptr, up_ptr, bias_ptr, hidden_ptr, M, stride_gate, stride_hidden,
    N: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (rows < M)[:, None] & (cols < COLS)[None, :]
    offsets = row_offsets(rows, stride_gate) + cols[None, :]
    gate = tl.load(gate_ptr + offsets, mask=there, other=0.0).to(tl.float32)
    if up_ptr is not None:
        silu, _ = silu_and_slope(gate, gate_ptr.dtype.element_ty == tl.float32)
        hidden = silu * tl.load(up_ptr + offsets, mask=there, other=0.0).to(tl.float32)
    else:
        hidden, _ = gelu_and_slope(add_columns(gate, bias_ptr, cols, N))
    _store_hidden(hidden, rows, cols, M, hidden_ptr, stride_hidden, N, COLS)


@triton.jit(do_not_specialize=["M"])
def _hidden_gradient_kernel(
    a_ptr, b_ptr, gate_ptr, up_ptr, bias_ptr, centre_ptr, dgate_ptr, dup_ptr, hidden_ptr, gate_sum_ptr, up_sum_ptr, M,
    stride_a, stride_b, stride_gate, stride_dgate, stride_hidden,
    N: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, COLS, GROUP, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dhidden, _ = products(a_ptr, b_ptr, None, rows, cols, M, stride_a, stride_b, COLS, K, False, BLOCK_M, BLOCK_N,
                          BLOCK_K, PRECISION)  # fmt: skip
    halves = column_halves(dhidden)
    PRECISE: tl.constexpr = gate_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee"
    for half in tl.static_range(2):
        cols = tile_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        dgate, dup = _activation_gradient(halves[half], rows, cols, M, gate_ptr, up_ptr, bias_ptr, centre_ptr,
                                          dgate_ptr, dup_ptr, hidden_ptr, stride_gate, stride_dgate, stride_hidden, N,
                                          COLS, PRECISE)  # fmt: skip
        if gate_sum_ptr is not None:
            tl.store(gate_sum_ptr + tile_m * N + cols, tl.sum(dgate, 0), mask=cols < N)
        if up_sum_ptr is not None:
            tl.store(up_sum_ptr + tile_m * N + cols, tl.sum(dup, 0), mask=cols < N)


@triton.jit(do_not_specialize=["M"])
def _hidden_gradient_rows_kernel(
    dhidden_ptr, gate_ptr, up_ptr, bias_ptr, centre_ptr, dgate_ptr, dup_ptr, hidden_ptr, M, stride_dhidden, stride_gate,
    stride_dgate, stride_hidden, N: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (rows < M)[:, None] & (cols < COLS)[None, :]
    dhidden = tl.load(dhidden_ptr + row_offsets(rows, stride_dhidden) + cols[None, :], mask=there, other=0.0)
    _activation_gradient(dhidden.to(tl.float32), rows, cols, M, gate_ptr, up_ptr, bias_ptr, centre_ptr, dgate_ptr,
                         dup_ptr, hidden_ptr, stride_gate, stride_dgate, stride_hidden, N, COLS,
                         gate_ptr.dtype.element_ty == tl.float32)  # fmt: skip


@triton.jit
def _finish_gradients_kernel(
    product_ptr, sum_ptr, centre_ptr, weight_ptr, bias_ptr, layer_scale_ptr, dweight_ptr, dbias_ptr, dlayer_scale_ptr,
    stride_weight, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    scale = tl.full([], 1.0, tl.float32)
    if layer_scale_ptr is not None:
        scale = tl.load(layer_scale_ptr + n).to(tl.float32)
    column_sum = tl.full([], 0.0, tl.float32)
    if sum_ptr is not None:
        column_sum = tl.load(sum_ptr + n)
    total = tl.zeros([BLOCK_N], tl.float32)
    if product_ptr is not None:
        for start in range(0, K, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            keep = cols < K
            product = tl.load(product_ptr + tl.cast(n, tl.int64) * K + cols, mask=keep, other=0.0)
            if centre_ptr is not None:
                product += column_sum * tl.load(centre_ptr + cols, mask=keep, other=0.0)
            if dlayer_scale_ptr is not None:
                weight = tl.load(weight_ptr + tl.cast(n, tl.int64) * stride_weight + cols, mask=keep, other=0.0)
                total += product * weight.to(tl.float32)
            if dweight_ptr is not None:
                dweight = (product * scale).to(dweight_ptr.dtype.element_ty)
                tl.store(dweight_ptr + tl.cast(n, tl.int64) * K + cols, dweight, mask=keep)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + n, (column_sum * scale).to(dbias_ptr.dtype.element_ty))
    if dlayer_scale_ptr is not None:
        dscale = tl.sum(total, 0)
        if bias_ptr is not None:
            dscale += column_sum * tl.load(bias_ptr + n).to(tl.float32)
        tl.store(dlayer_scale_ptr + n, dscale.to(dlayer_scale_ptr.dtype.element_ty))


# ---- launchers -------------------------------------------------------------------------------------------------------
def fused(t: Tensor) -> bool:
    return _launch.fused_gemm(_triton.architecture(t.device), t.dtype)[0]


def launch_tiles(
    kernel: Any, epilogue: str, a: Tensor, cols: int, depth: int, *args: Any, **constants: Any
) -> Choice:  # fmt: skip
    """Run a kernel whose programs are tiles of (rows of a, cols), K = depth; returns the choice it ran with.

    ``epilogue``: as ``_launch.gemm_choices`` takes it.
    """
    rows, arch = a.shape[0], _triton.architecture(a.device)
    choices = _launch.gemm_choices(epilogue, rows, cols, a.dtype, arch, _triton.num_processors(a.device))

    def run(choice: Choice) -> None:
        grid = (triton.cdiv(rows, choice["BLOCK_M"]) * triton.cdiv(cols, choice["BLOCK_N"]),)
        _triton.launch(kernel, grid, choice, *args, **constants, K=depth, GROUP=GROUP_ROWS,
                       PRECISION=_triton.dot_precision(a.dtype))  # fmt: skip

    key = (kernel.fn.__name__, a.dtype, _launch.power_of_2(rows), cols, depth, arch, epilogue)
    choice = _triton.tuned(key, choices, run)
    run(choice)
    return choice


def _launch_rows(kernel: Any, rows: int, cols: int, *args: Any, **constants: Any) -> None:
    launch = row_pieces(cols)
    grid = (triton.cdiv(rows, launch["BLOCK_M"]), triton.cdiv(cols, launch["BLOCK_N"]))
    _triton.launch(kernel, grid, launch, *args, **constants)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _per_sample(rows: int, row_scale: Tensor | None) -> int:
    return 1 if row_scale is None else max(1, rows // max(1, row_scale.numel()))


# ---- what _products.Kernels asks for ---------------------------------------------------------------------------------
multiply, weight_gradient_float32 = by_torch, weight_gradient_float32_by_torch
subln_forward, subln_backward = subln_swiglu.forward, subln_swiglu.backward


def project(
    a: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    _project(a, weight, bias, layer_scale, row_scale, residual, out, None, None, None)


def weight_gradients(dy: Tensor, a: Tensor | None, parts: Sequence[Part]) -> None:
    weight_gradients_by_torch(dy, a, parts, scale_and_sum)


def _project(
    a: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    residual: Tensor | None, out: Tensor, *norm: Tensor | None,
) -> None:  # fmt: skip
    rows, (width, depth) = a.shape[0], weight.shape
    launch_tiles(_project_kernel, "plain", a, width, depth, a, weight, bias, layer_scale, row_scale, residual, out,
                 *norm, rows, a.stride(0), weight.stride(0), _stride(residual), out.stride(0),
                 _per_sample(rows, row_scale), N=width, COLS=width)  # fmt: skip


def project_parts(a: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor) -> bool:
    width, depth = weights[0].shape
    if width % 256 or any(w.shape != weights[0].shape or w.stride() != weights[0].stride() for w in weights):
        return False
    launch_tiles(_project_parts_kernel, "plain", a, out.shape[1], depth, a, *weights, *biases, out, a.shape[0],
                 a.stride(0), weights[0].stride(0), out.stride(0), PART=width, N=out.shape[1])  # fmt: skip
    return True


def finish(
    y: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None, residual: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    rows, width = y.shape
    _launch_rows(_finish_kernel, rows, width, y, bias, layer_scale, row_scale, residual, out, rows, y.stride(0),
                 _stride(residual), out.stride(0), _per_sample(rows, row_scale), N=width)  # fmt: skip


def activate(
    a: Tensor, w_gate: Tensor, w_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None, kept: Tensor | None,
    hidden: Tensor | None, norm_weight: Tensor | None = None,
) -> tuple[Tensor, int] | None:  # fmt: skip
    """With ``norm_weight``: means of the pieces of rows, and squares about them, (2, pieces, rows) float32; the pieces'
    columns. There may be more pieces than are filled."""
    rows, width, cols = a.shape[0], w_gate.shape[0], padded(w_gate.shape[0])
    gate, up = gate_and_up(kept)
    pieces, most = None, triton.cdiv(cols, 16)
    if norm_weight is not None:
        pieces = torch.empty(2, most, rows, dtype=torch.float32, device=a.device)
    epilogue = "plain" if w_up is None else "dual" if pieces is None else "dual with norm"
    choice = launch_tiles(
        _activate_kernel, epilogue, a, cols, a.shape[1], a, w_gate, w_up, b_gate, b_up, gate,
        up, hidden, *contiguous(norm_weight), pieces, rows, a.stride(0), w_gate.stride(0), _stride(kept),
        _stride(hidden), GELU=w_up is None, PIECES=most, N=width, COLS=cols,
    )  # fmt: skip
    return None if pieces is None else (pieces, choice["BLOCK_N"] // 2)  # a piece for each half tile


def project_normed(
    hidden: Tensor, rows: tuple[Tensor, int], norm: HiddenNorm, weight: Tensor, bias: Tensor | None,
    layer_scale: Tensor | None, row_scale: Tensor | None, residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    pieces, piece_width = rows
    weight_sums, shift = torch.empty(2, weight.shape[0], dtype=torch.float32, device=out.device)
    norm_weight, norm_bias = contiguous(norm.weight, norm.bias)
    width = norm.weight.numel()
    launch = fold_norm(triton.cdiv(width, piece_width))
    row_programs = triton.cdiv(hidden.shape[0], launch["BLOCK_M"])
    _triton.launch(
        _fold_norm_kernel, (row_programs + weight.shape[0],), launch, pieces, norm_weight, norm_bias, weight, bias,
        norm.mean, norm.rstd, weight_sums, shift, hidden.shape[0], row_programs, weight.stride(0), norm.eps, N=width,
        WIDTH=piece_width, PIECES=pieces.shape[1],
    )  # fmt: skip
    _project(hidden, weight, shift, layer_scale, row_scale, residual, out, norm.mean, norm.rstd, weight_sums)


def activate_rows(kept: Tensor, bias: Tensor | None, hidden: Tensor, width: int) -> None:
    gate, up = gate_and_up(kept)
    _launch_rows(_activate_rows_kernel, kept.shape[0], kept.shape[2], gate, up, bias, hidden, kept.shape[0],
                 _stride(kept), _stride(hidden), N=width, COLS=kept.shape[2])  # fmt: skip


def hidden_gradient(
    dy: Tensor, w_down: Tensor, kept: Tensor, bias: Tensor | None, centre: Tensor | None, dkept: Tensor,
    hidden: Tensor | None, grads: Sequence[Tensor | None],
) -> None:  # fmt: skip
    rows, (depth, width), cols = dy.shape[0], w_down.shape, kept.shape[2]
    # One partial sum of each bias's gradient for every row of tiles: 1 / BLOCK_M of what the tiles store.
    partials = [None if g is None else torch.empty(triton.cdiv(rows, 32), width, dtype=torch.float32, device=dy.device)
                for g in grads]  # fmt: skip
    weight = padded_columns(w_down)
    choice = launch_tiles(_hidden_gradient_kernel, "rich", dy, cols, depth, dy, weight, *gate_and_up(kept), bias,
                          centre, *gate_and_up(dkept), hidden, *partials, rows, dy.stride(0), weight.stride(0),
                          _stride(kept), _stride(dkept), _stride(hidden), N=width, COLS=cols)  # fmt: skip
    for partial, grad in zip(partials, grads, strict=True):
        if partial is not None and grad is not None:
            column_sums(partial[: triton.cdiv(rows, choice["BLOCK_M"])], grad)


def hidden_gradient_rows(
    dhidden: Tensor, kept: Tensor, bias: Tensor | None, centre: Tensor | None, dkept: Tensor, hidden: Tensor | None,
    width: int,
) -> None:  # fmt: skip
    rows, cols = dhidden.shape
    _launch_rows(_hidden_gradient_rows_kernel, rows, cols, dhidden, *gate_and_up(kept), bias, centre,
                 *gate_and_up(dkept), hidden, rows, dhidden.stride(0), _stride(kept), _stride(dkept), _stride(hidden),
                 N=width, COLS=cols)  # fmt: skip


def project_rope(*args: Any) -> None:
    from eva02_kernels.ops.qkv_rope import triton_kernels  # which imports this module

    triton_kernels.project_rope(*args)


def finish_gradients(
    product: Tensor | None, sums: Tensor | None, centre: Tensor | None, weight: Tensor, bias: Tensor | None,
    layer_scale: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dscale: Tensor | None,
) -> None:  # fmt: skip
    width, depth = weight.shape
    _triton.launch(_finish_gradients_kernel, (width,), row_pieces(depth), product, sums, centre, weight, bias,
                   layer_scale, dweight, dbias, dscale, weight.stride(0), K=depth)  # fmt: skip
