"""Triton kernel of qkv_rope: the product is ``ops/_triton_gemm.py``'s, rotation is ``ops/_triton_rope.py``'s.

Fused: bias and rotation in the product's epilogue, for the interleaved layout: its pairs are adjacent columns, whatever
head a tile begins in. ``gpu.py`` has the operator around it.
Bytes: reads normed x and writes q, k, v once.
Launch: see ``_triton_gemm``. Numerics: float32 sums and rotation, one rounding. Limits: interleaved pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels.ops._triton_gemm import add_columns, column_halves, launch_tiles, products, tile_of_program
from eva02_kernels.ops._triton_lib import row_offsets
from eva02_kernels.ops._triton_rope import ROPE_INTEGERS, load_cos_sin_of_tile, rope_arguments
from eva02_kernels.ops._triton_rope import rotate as rotate_pairs
from eva02_kernels.rope import RopeArgs


@triton.jit(do_not_specialize=["M", "S", *ROPE_INTEGERS])
def _qkv_rope_kernel(
    a_ptr, b_ptr, bias_ptr, out_ptr, cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, M, S, stride_a, stride_b, stride_out,
    prefix, num_kept, height, width, table_rows,
    H: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, AXIS: tl.constexpr,
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
        head = pair // HALF
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


def project_rope(
    a: Tensor, weight: Tensor, bias: Tensor | None, rope: RopeArgs, tokens: int, heads: int, kv_heads: int,
    head_dim: int, out: Tensor,
) -> None:  # fmt: skip
    """out = a weight^T + bias, heads of q and k, or of either, rotated (interleaved pairs)."""
    tables, integers, constants = rope_arguments(rope)
    del constants["ROTATE"], constants["INTERLEAVED"]
    width, depth = weight.shape
    launch_tiles(_qkv_rope_kernel, "rich", a, width, depth, a, weight, bias, out, *tables, a.shape[0], tokens,
                 a.stride(0), weight.stride(0), out.stride(0), *integers, H=heads,
                 ROTATED=heads + kv_heads, HALF=head_dim // 2, N=width, **constants)  # fmt: skip
