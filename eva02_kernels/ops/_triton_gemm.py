"""Matrix products of linear, swiglu_mlp, gelu_mlp and qkv_rope, with everything around them in their epilogue.

Fused: bias, GELU, layer scale, row scale and residual in a product's epilogue; gate and up as one product over a shared
tile of the input, with SwiGLU behind it; the activation's gradient behind the product that gives it, which recomputes
the activation for the next product and sums its columns for the biases.
Two routes (``_launch.fused_gemm``): fused as above, or torch.mm (cuBLAS) for the products and one Triton kernel over
rows for what is around them. Products of backward that have nothing to fuse (weight gradients, input gradients) are
torch.mm on either route; 16-bit ones are rounded once, and cuBLAS may add split sums in 16 bits where torch's
``allow_*_reduced_precision_reduction`` lets it.
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
from eva02_kernels._launch import GROUP_ROWS, Choice, row_pieces
from eva02_kernels.ops._common import padded
from eva02_kernels.ops._products import by_torch, by_torch_float32, gate_and_up, padded_columns
from eva02_kernels.ops._triton_lib import (
    column_sums,
    dot,
    gelu_and_slope,
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
def add_columns(y, ptr, cols, N: tl.constexpr):
    """y plus a parameter of the columns, where there is one."""
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
    dhidden, rows, cols, M, gate_ptr, up_ptr, dgate_ptr, dup_ptr, hidden_ptr, stride_gate, stride_dgate, stride_hidden,
    N: tl.constexpr, COLS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of gate and up for that of silu(gate) * up, or without up that of gate for gelu(gate), and
    the activation itself; returns the gradients, zero beyond the last row and column."""
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
        hidden, slope = gelu_and_slope(gate)
        dgate = tl.where(keep, dhidden * slope, 0.0)
        dup = dgate
    _store_hidden(dgate, rows, cols, M, dgate_ptr, stride_dgate, N, COLS)
    _store_hidden(hidden, rows, cols, M, hidden_ptr, stride_hidden, N, COLS)
    return dgate, dup


# ---- kernels ---------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _project_kernel(
    a_ptr, b_ptr, bias_ptr, layer_scale_ptr, row_scale_ptr, residual_ptr, out_ptr, M, stride_a, stride_b,
    stride_residual, stride_out, rows_per_sample,
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
        y = add_columns(halves[half], bias_ptr, cols, N)
        _finish(y, rows, cols, M, layer_scale_ptr, row_scale_ptr, residual_ptr, out_ptr, stride_residual, stride_out,
                rows_per_sample, N)  # fmt: skip


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
    a_ptr, w_gate_ptr, w_up_ptr, b_gate_ptr, b_up_ptr, gate_ptr, up_ptr, hidden_ptr, M, stride_a, stride_w,
    stride_gate, stride_hidden, GELU: tl.constexpr,
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
        gate = add_columns(gates[half], b_gate_ptr, cols, N)
        up = add_columns(ups[half], b_up_ptr, cols, N)
        _store_hidden(gate, rows, cols, M, gate_ptr, stride_gate, N, COLS)
        _store_hidden(up, rows, cols, M, up_ptr, stride_gate, N, COLS)
        if hidden_ptr is not None:
            if GELU:
                hidden, _ = gelu_and_slope(gate)
            else:
                silu, _ = silu_and_slope(gate, PRECISE)
                hidden = silu * up
            _store_hidden(hidden, rows, cols, M, hidden_ptr, stride_hidden, N, COLS)


@triton.jit(do_not_specialize=["M"])
def _activate_rows_kernel(
    gate_ptr, up_ptr, hidden_ptr, M, stride_gate, stride_hidden,
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
        hidden, _ = gelu_and_slope(gate)
    _store_hidden(hidden, rows, cols, M, hidden_ptr, stride_hidden, N, COLS)


@triton.jit(do_not_specialize=["M"])
def _hidden_gradient_kernel(
    a_ptr, b_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, hidden_ptr, gate_sum_ptr, up_sum_ptr, M, stride_a, stride_b,
    stride_gate, stride_dgate, stride_hidden,
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
        dgate, dup = _activation_gradient(halves[half], rows, cols, M, gate_ptr, up_ptr, dgate_ptr, dup_ptr, hidden_ptr,
                                          stride_gate, stride_dgate, stride_hidden, N, COLS, PRECISE)  # fmt: skip
        if gate_sum_ptr is not None:
            tl.store(gate_sum_ptr + tile_m * N + cols, tl.sum(dgate, 0), mask=cols < N)
        if up_sum_ptr is not None:
            tl.store(up_sum_ptr + tile_m * N + cols, tl.sum(dup, 0), mask=cols < N)


@triton.jit(do_not_specialize=["M"])
def _hidden_gradient_rows_kernel(
    dhidden_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, hidden_ptr, M, stride_dhidden, stride_gate, stride_dgate,
    stride_hidden, N: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (rows < M)[:, None] & (cols < COLS)[None, :]
    dhidden = tl.load(dhidden_ptr + row_offsets(rows, stride_dhidden) + cols[None, :], mask=there, other=0.0)
    _activation_gradient(dhidden.to(tl.float32), rows, cols, M, gate_ptr, up_ptr, dgate_ptr, dup_ptr, hidden_ptr,
                         stride_gate, stride_dgate, stride_hidden, N, COLS,
                         gate_ptr.dtype.element_ty == tl.float32)  # fmt: skip


@triton.jit
def _layer_scale_gradient_kernel(
    product_ptr, weight_ptr, bias_ptr, layer_scale_ptr, sum_ptr, dweight_ptr, dbias_ptr, dlayer_scale_ptr,
    stride_weight, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    scale = tl.load(layer_scale_ptr + n).to(tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if product_ptr is not None:
        for start in range(0, K, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            keep = cols < K
            product = tl.load(product_ptr + tl.cast(n, tl.int64) * K + cols, mask=keep, other=0.0)
            weight = tl.load(weight_ptr + tl.cast(n, tl.int64) * stride_weight + cols, mask=keep, other=0.0)
            total += product * weight.to(tl.float32)
            if dweight_ptr is not None:
                dweight = (product * scale).to(dweight_ptr.dtype.element_ty)
                tl.store(dweight_ptr + tl.cast(n, tl.int64) * K + cols, dweight, mask=keep)
    dscale = tl.sum(total, 0)
    if sum_ptr is not None:
        column_sum = tl.load(sum_ptr + n)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + n, (column_sum * scale).to(dbias_ptr.dtype.element_ty))
        if bias_ptr is not None:
            dscale += column_sum * tl.load(bias_ptr + n).to(tl.float32)
    if dlayer_scale_ptr is not None:
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
multiply, multiply_float32 = by_torch, by_torch_float32
subln_forward, subln_backward = subln_swiglu.forward, subln_swiglu.backward


def project(
    a: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    rows, (width, depth) = a.shape[0], weight.shape
    launch_tiles(_project_kernel, "plain", a, width, depth, a, weight, bias, layer_scale, row_scale, residual, out,
                 rows, a.stride(0), weight.stride(0), _stride(residual), out.stride(0), _per_sample(rows, row_scale),
                 N=width, COLS=width)  # fmt: skip


def finish(
    y: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None, residual: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    rows, width = y.shape
    _launch_rows(_finish_kernel, rows, width, y, bias, layer_scale, row_scale, residual, out, rows, y.stride(0),
                 _stride(residual), out.stride(0), _per_sample(rows, row_scale), N=width)  # fmt: skip


def activate(
    a: Tensor, w_gate: Tensor, w_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None, kept: Tensor | None,
    hidden: Tensor | None,
) -> None:  # fmt: skip
    rows, width, cols = a.shape[0], w_gate.shape[0], padded(w_gate.shape[0])
    gate, up = gate_and_up(kept)
    launch_tiles(_activate_kernel, "plain" if w_up is None else "dual", a, cols, a.shape[1], a, w_gate, w_up, b_gate,
                 b_up, gate, up, hidden, rows, a.stride(0), w_gate.stride(0), _stride(kept), _stride(hidden),
                 GELU=w_up is None, N=width, COLS=cols)  # fmt: skip


def activate_rows(kept: Tensor, hidden: Tensor, width: int) -> None:
    gate, up = gate_and_up(kept)
    _launch_rows(_activate_rows_kernel, kept.shape[0], kept.shape[2], gate, up, hidden, kept.shape[0], _stride(kept),
                 _stride(hidden), N=width, COLS=kept.shape[2])  # fmt: skip


def hidden_gradient(
    dy: Tensor, w_down: Tensor, kept: Tensor, dkept: Tensor, hidden: Tensor | None, grads: Sequence[Tensor | None]
) -> None:
    rows, (depth, width), cols = dy.shape[0], w_down.shape, kept.shape[2]
    # One partial sum of each bias's gradient for every row of tiles: 1 / BLOCK_M of what the tiles store.
    partials = [None if g is None else torch.empty(triton.cdiv(rows, 32), width, dtype=torch.float32, device=dy.device)
                for g in grads]  # fmt: skip
    weight = padded_columns(w_down)
    choice = launch_tiles(_hidden_gradient_kernel, "rich", dy, cols, depth, dy, weight, *gate_and_up(kept),
                          *gate_and_up(dkept), hidden, *partials, rows, dy.stride(0), weight.stride(0), _stride(kept),
                          _stride(dkept), _stride(hidden), N=width, COLS=cols)  # fmt: skip
    for partial, grad in zip(partials, grads, strict=True):
        if partial is not None and grad is not None:
            column_sums(partial[: triton.cdiv(rows, choice["BLOCK_M"])], grad)


def hidden_gradient_rows(dhidden: Tensor, kept: Tensor, dkept: Tensor, hidden: Tensor | None, width: int) -> None:
    rows, cols = dhidden.shape
    _launch_rows(_hidden_gradient_rows_kernel, rows, cols, dhidden, *gate_and_up(kept), *gate_and_up(dkept), hidden,
                 rows, dhidden.stride(0), _stride(kept), _stride(dkept), _stride(hidden), N=width,
                 COLS=cols)  # fmt: skip


def project_rope(*args: Any) -> None:
    from eva02_kernels.ops.qkv_rope import triton_kernels  # which imports this module

    triton_kernels.project_rope(*args)


def layer_scale_gradient(
    product: Tensor | None, weight: Tensor, bias: Tensor | None, layer_scale: Tensor, sums: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None, dscale: Tensor | None,
) -> None:  # fmt: skip
    width, depth = weight.shape
    _triton.launch(_layer_scale_gradient_kernel, (width,), row_pieces(depth), product, weight, bias, layer_scale, sums,
                   dweight, dbias, dscale, weight.stride(0), K=depth)  # fmt: skip
