"""Triton kernels of qkv_rope: the product is ``ops/_triton_gemm.py``'s, rotation is ``ops/_triton_rope.py``'s.

Fused: bias and rotation in the product's epilogue, for the interleaved layout: its pairs are adjacent columns, whatever
head a tile begins in. The half layout, and products by torch.mm, are rotated in place by one pass. The pre-norm is one
pass before. Backward rotates dqkv back once, into a temporary that the products read.
Bytes: forward reads x (normed x, written once) and writes q, k, v once; in place rotation reads and writes q and k once
more. Backward reads and writes dqkv once, then reads it for each of the two products and for the biases.
Launch: see ``_triton_gemm``. Numerics: float32 sums and rotation, one rounding where fused. Limits: 16,384 columns
under a normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels.ops._common import empty_like_needed, present, rows_2d, view_2d
from eva02_kernels.ops._triton_gemm import (
    add_columns,
    column_halves,
    fused,
    launch_tiles,
    multiply,
    normed_input,
    products,
    project,
    tile_of_program,
)
from eva02_kernels.ops._triton_lib import column_sums_of_rows, row_offsets
from eva02_kernels.ops._triton_rope import ROPE_INTEGERS, load_cos_sin_of_tile, rope_arguments
from eva02_kernels.ops._triton_rope import rotate as rotate_pairs
from eva02_kernels.ops.add_layer_norm.triton_kernels import norm_backward
from eva02_kernels.ops.apply_rope.triton_kernels import rotate, table_gradients
from eva02_kernels.ops.qkv_rope.native import NUM_PARAMETERS
from eva02_kernels.rope import NUM_ROPE_ARGS, RopeArgs, per_unit_table


@triton.jit(do_not_specialize=["M", "S", *ROPE_INTEGERS])
def _qkv_rope_kernel(
    a_ptr, b_ptr, bias_ptr, out_ptr, cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, M, S, stride_a, stride_b, stride_out,
    prefix, num_kept, height, width, table_rows,
    FIRST_HEAD: tl.constexpr, H: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, AXIS: tl.constexpr,
    SWAP: tl.constexpr, PER_HEAD: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, N, GROUP, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y, _ = products(a_ptr, b_ptr, None, rows, cols, M, stride_a, stride_b, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K,
                    PRECISION)  # fmt: skip
    halves = column_halves(y)
    for half in tl.static_range(2):
        cols = tile_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        y = add_columns(halves[half], bias_ptr, cols, N)
        pair = tile_n * (BLOCK_N // 2) + half * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        head = FIRST_HEAD + pair // HALF
        cos, sin = load_cos_sin_of_tile(
            cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, rows % S, rows < M, rows // S, pair % HALF,
            tl.where(head < H, head, head - H), head < ROTATED, prefix, num_kept, height, width, table_rows,
            HALF, AXIS, SWAP, PER_HEAD,
        )  # fmt: skip
        even, odd = tl.split(tl.reshape(y, [BLOCK_M, BLOCK_N // 4, 2]))
        even, odd = rotate_pairs(even, odd, cos, sin)
        y = tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_N // 2]).to(out_ptr.dtype.element_ty)
        keep = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(out_ptr + row_offsets(rows, stride_out) + cols[None, :], y, mask=keep)


def _rotate_heads(
    x: Tensor, out: Tensor, rope: Sequence[Any], heads: int, kv_heads: int, *, inverse: bool
) -> None:  # fmt: skip
    """Rotate q and k of packed x into ``out``; they meet a per-head table separately."""
    per_head = str(RopeArgs(*rope).layout).endswith(":head")
    parts = ((0, heads), (heads, heads + kv_heads)) if per_head else ((0, heads + kv_heads),)
    for a, b in parts:
        rotate(x[:, :, a:b], rope, inverse=inverse, out=out[:, :, a:b])


def fwd(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    wq, wk, wv, bq, bk, bv, pre_weight, pre_bias, pre_eps, pre_norm = args[: NUM_PARAMETERS + 2]
    rope = args[NUM_PARAMETERS + 2 : NUM_PARAMETERS + 2 + NUM_ROPE_ARGS]
    heads, kv_heads = args[-2:]
    total = heads + 2 * kv_heads
    head_dim = wq.shape[0] // (total if wk is None else heads)
    x2 = rows_2d(x)
    rows, tokens = x2.shape[0], x.shape[1]
    mean, rstd = (torch.empty(rows if pre_norm else 0, dtype=torch.float32, device=x.device) for _ in range(2))
    qkv = torch.empty(*x.shape[:-1], total, head_dim, dtype=x.dtype, device=x.device)
    if not qkv.numel():
        return qkv, mean, rstd
    normed = normed_input(x2, pre_weight, pre_bias, pre_eps, pre_norm, statistics=(mean, rstd))
    tables, integers, constants = rope_arguments(RopeArgs(*rope))
    rotates, interleaved = constants.pop("ROTATE"), constants.pop("INTERLEAVED")
    in_epilogue = rotates and interleaved and fused(x)
    first, out = 0, qkv.view(rows, total * head_dim)
    for weight, bias in ((wq, bq), (wk, bk), (wv, bv)):
        if weight is None:
            continue
        weight, bias, width = rows_2d(weight), None if bias is None else bias.contiguous(), weight.shape[0]
        part = out[:, first * head_dim : first * head_dim + width]
        if in_epilogue and first < heads + kv_heads:
            launch_tiles(_qkv_rope_kernel, "rich", normed, width, weight.shape[1], normed, weight, bias, part, *tables,
                         rows, tokens, normed.stride(0), weight.stride(0), part.stride(0), *integers,
                         FIRST_HEAD=first, H=heads, ROTATED=heads + kv_heads, HALF=head_dim // 2, N=width,
                         **constants)  # fmt: skip
        else:
            project(normed, weight, bias, part)
        first += width // head_dim
    if rotates and not in_epilogue:
        _rotate_heads(qkv, qkv, rope, heads, kv_heads, inverse=False)
    return qkv, mean, rstd


def bwd(dqkv: Tensor, mean: Tensor, rstd: Tensor, qkv: Tensor | None, x: Tensor, *args: Any) -> list[Tensor]:
    *inputs, needs = args
    wq, wk, wv, _, _, _, pre_weight, pre_bias, pre_eps, pre_norm = inputs[: NUM_PARAMETERS + 2]
    rope = inputs[NUM_PARAMETERS + 2 : NUM_PARAMETERS + 2 + NUM_ROPE_ARGS]
    heads, kv_heads = inputs[-2:]
    grads = empty_like_needed((x, *inputs[:NUM_PARAMETERS]), needs[: 1 + NUM_PARAMETERS])
    dx, *parameters = grads
    dpre_weight, dpre_bias = parameters[6:]
    x2, dqkv = rows_2d(x), dqkv.contiguous()
    d = dqkv
    if RopeArgs(*rope).cos is not None and dqkv.numel():
        d = torch.empty(dqkv.shape, dtype=dqkv.dtype, device=dqkv.device)
        _rotate_heads(dqkv, d, rope, heads, kv_heads, inverse=True)
        d[:, :, heads + kv_heads :] = dqkv[:, :, heads + kv_heads :]
    d2 = d.view(x2.shape[0], d.shape[2] * d.shape[3])
    weights = [rows_2d(w) for w in (wq, wk, wv) if w is not None]
    if any(needs[1:4]):
        normed = normed_input(x2, pre_weight, pre_bias, pre_eps, pre_norm)
    first = 0
    for i, weight in enumerate(weights):
        part = d2[:, first : first + weight.shape[0]]
        dweight, dbias = parameters[i], parameters[3 + i]
        if dweight is not None:
            multiply(part.t(), normed, dweight)
        if dbias is not None:
            column_sums_of_rows(part, dbias)
        first += weight.shape[0]
    if dx is not None or dpre_weight is not None or dpre_bias is not None:
        # One product over q, k and v: its sum is rounded once.
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        dx2 = None if dx is None else view_2d(dx)
        dnormed = dx2 if dx2 is not None and not pre_norm else torch.empty(x2.shape, dtype=x.dtype, device=x.device)
        multiply(d2, weight, dnormed)
        if pre_norm:
            norm_backward(dnormed, x2, mean, rstd, pre_weight, dx2, dweight=dpre_weight, dbias=dpre_bias)
    result = present(grads)
    needs_cos, needs_sin = needs[1 + NUM_PARAMETERS :]
    if needs_cos or needs_sin:
        assert qkv is not None
        totals: list[Tensor] = []
        for at in (slice(0, heads), slice(heads, heads + kv_heads)):  # q and k meet a per-head table separately
            unrotated = rotate(qkv[:, :, at], rope, inverse=True)
            found = table_gradients(dqkv[:, :, at], unrotated, rope)
            totals = [t.add_(g) for t, g in zip(totals, found, strict=True)] if totals else list(found)
        # Un-rotating what was rotated gives cos^2 + sin^2 times the projection.
        dcos, dsin = per_unit_table(totals, *rope[:2])
        result += [dcos] * needs_cos + [dsin] * needs_sin
    return result
