"""Rotation of channel pairs in Triton kernels: tables, loads and stores in either layout.

A head of D channels is handled as D/2 pairs (a, b), in one tile or two of a power of two of pairs each
(``_launch.pair_chunks``), so that 88 channels take tiles of 64 + 32 channels instead of 128. Pair j is channels
(2j, 2j + 1) in the interleaved layout, which a tile loads as one contiguous row and splits in registers, and channels
(j, j + D/2) in the half layout, which are two contiguous rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from eva02_kernels.rope import RopeArgs


@triton.jit
def load_pairs(ptr, offsets, there, FIRST: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
               INTERLEAVED: tl.constexpr):  # fmt: skip
    """Channels a and b of pairs FIRST.. of rows at ``offsets`` (T, 1), ``there`` (T, 1): two (T, PAIRS) tiles."""
    if INTERLEAVED:
        channel = 2 * FIRST + tl.arange(0, 2 * PAIRS)
        x = tl.load(ptr + offsets + channel[None, :], mask=there & (channel < 2 * HALF)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], PAIRS, 2]))
    else:
        pair = FIRST + tl.arange(0, PAIRS)
        keep = there & (pair < HALF)[None, :]
        a = tl.load(ptr + offsets + pair[None, :], mask=keep, other=0.0)
        b = tl.load(ptr + offsets + HALF + pair[None, :], mask=keep, other=0.0)
    return a, b


@triton.jit
def store_pairs(ptr, offsets, a, b, there, FIRST: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
                INTERLEAVED: tl.constexpr):  # fmt: skip
    a = a.to(ptr.dtype.element_ty)
    b = b.to(ptr.dtype.element_ty)
    if INTERLEAVED:
        channel = 2 * FIRST + tl.arange(0, 2 * PAIRS)
        x = tl.reshape(tl.join(a, b), [a.shape[0], 2 * PAIRS])
        tl.store(ptr + offsets + channel[None, :], x, mask=there & (channel < 2 * HALF)[None, :])
    else:
        pair = FIRST + tl.arange(0, PAIRS)
        keep = there & (pair < HALF)[None, :]
        tl.store(ptr + offsets + pair[None, :], a, mask=keep)
        tl.store(ptr + offsets + HALF + pair[None, :], b, mask=keep)


@triton.jit
def patch_of_token(keep_idx_ptr, token, there, sequence, prefix, num_kept):
    """Index in the grid of each token of a sequence; anything for prefix tokens."""
    patch = token - prefix
    if keep_idx_ptr is not None:
        kept = keep_idx_ptr + tl.cast(sequence, tl.int64) * num_kept + patch
        patch = tl.load(kept, mask=there & (patch >= 0), other=0).to(tl.int32)
    return patch


@triton.jit
def load_cos_sin(
    cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, token, there, sequence, head, prefix, num_kept, height, width,
    table_rows, FIRST: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, AXIS: tl.constexpr, SWAP: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Cosines and sines (T, PAIRS) float32 of pairs FIRST.. for tokens (T,) of one sequence; 1 and 0 in the prefix.

    ``token`` counts within the sequence; ``there`` (T,) marks those that exist. The arguments from ``prefix`` on are
    those that :func:`rope_arguments` gives, in its order.
    """
    pair = FIRST + tl.arange(0, PAIRS)
    patch = patch_of_token(keep_idx_ptr, token, there, sequence, prefix, num_kept)
    if AXIS:
        quarter: tl.constexpr = HALF // 2
        columns = width
        if grids_ptr is not None:
            columns = tl.maximum(tl.load(grids_ptr + 2 * sequence + 1), 1)
        row = patch // columns
        column = height + patch - row * columns
        # A remainder and a select of whole lines keep the address arithmetic provably contiguous: wide loads.
        first, second = row, column
        if SWAP:
            first, second = column, row
        line = tl.where((pair < quarter)[None, :], first[:, None], second[:, None])
        index = line * quarter + (pair % quarter)[None, :]
    else:
        index = patch[:, None] * HALF + pair[None, :]
    if PER_HEAD:
        table = tl.cast(head, tl.int64) * table_rows * (HALF // 2 if AXIS else HALF)
    else:
        table = tl.cast(sequence, tl.int64) * table_rows * (HALF // 2 if AXIS else HALF)
    keep = (there & (token >= prefix))[:, None] & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + table + index, mask=keep, other=1.0)
    sin = tl.load(sin_ptr + table + index, mask=keep, other=0.0)
    return cos, sin


@triton.jit
def load_cos_sin_of_tile(
    cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, token, there, sequence, pair, head, rotated, prefix, num_kept, height,
    width, table_rows, HALF: tl.constexpr, AXIS: tl.constexpr, SWAP: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """:func:`load_cos_sin` (T, P) for rows that are tokens of several sequences and columns that are pairs of several
    heads: token, there and sequence are (T,), pair, head and rotated (P,). 1 and 0 where a column is not rotated."""
    patch = patch_of_token(keep_idx_ptr, token, there, sequence, prefix, num_kept)
    if AXIS:
        quarter: tl.constexpr = HALF // 2
        columns = width
        if grids_ptr is not None:
            columns = tl.maximum(tl.load(grids_ptr + 2 * sequence + 1, mask=there, other=1), 1)
        row = patch // columns
        column = height + patch - row * columns
        first, second = row, column
        if SWAP:
            first, second = column, row
        line = tl.where((pair < quarter)[None, :], first[:, None], second[:, None])
        index = line * quarter + (pair % quarter)[None, :]
    else:
        index = patch[:, None] * HALF + pair[None, :]
    entries: tl.constexpr = HALF // 2 if AXIS else HALF
    if PER_HEAD:
        index = index + (head.to(tl.int64) * table_rows * entries)[None, :]
    else:
        index = index + (sequence.to(tl.int64) * table_rows * entries)[:, None]
    keep = (there & (token >= prefix))[:, None] & rotated[None, :]
    cos = tl.load(cos_ptr + index, mask=keep, other=1.0)
    sin = tl.load(sin_ptr + index, mask=keep, other=0.0)
    return cos, sin


@triton.jit
def rotate(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def unrotate(a, b, cos, sin):
    return a * cos + b * sin, b * cos - a * sin


ROPE_INTEGERS = ["prefix", "num_kept", "height", "width", "table_rows"]
"""Kernel arguments whose values must not make another kernel: for ``do_not_specialize``."""


def rope_arguments(rope: RopeArgs) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """What a kernel is given of a table: (cos, sin, grids, keep_idx), the values of ROPE_INTEGERS, and constants.

    The constants are ROTATE, INTERLEAVED, AXIS, SWAP and PER_HEAD.
    """
    layout, _, per = rope.layout.partition(":")
    constants = {"ROTATE": rope.cos is not None, "INTERLEAVED": layout == "interleaved", "AXIS": bool(rope.grid),
                 "SWAP": bool(rope.grid) and bool(rope.grid[2]), "PER_HEAD": per == "head"}  # fmt: skip
    if rope.cos is None or rope.sin is None:
        return (None, None, None, None), (0, 0, 0, 0, 0), constants
    cos, sin = rope.cos.contiguous(), rope.sin.contiguous()
    keep_idx = None if rope.keep_idx is None else rope.keep_idx.contiguous()
    height, width = (max(1, n) for n in rope.grid[:2]) if rope.grid else (1, 1)  # an empty grid divides nothing
    grids = None if rope.grids is None else rope.grids.contiguous()
    # A table of three dims holds one for each sequence, sample or head.
    table_rows = cos.shape[1] if cos.dim() == 3 else 0
    integers = (rope.num_prefix_tokens, 0 if keep_idx is None else keep_idx.shape[1], height, width, table_rows)
    return (cos, sin, grids, keep_idx), integers, constants
