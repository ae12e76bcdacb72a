"""Triton kernels of apply_rope, and the gradients of dense tables; rope_attention and qkv_rope use both.

Fused: table lookup, rotation (or its inverse), prefix tokens, token selection. Bytes: rotation reads and writes each
element once, and the angles of a token once for BLOCK_H heads; the table's gradient reads x and dout once.
Launch: rotation in tiles of BLOCK_T tokens, head by head; the table's gradient in one program for each row of each
table, which sums the rows of x and dout that it meets, BLOCK_R at a time, in a fixed order (no atomics).
Numerics: float32, one rounding. Limits: tensors with a contiguous last dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import pair_chunks, rope_table_rows, rope_tokens
from eva02_kernels.ops._common import last_dense
from eva02_kernels.ops._token_index import inverse_index
from eva02_kernels.ops._triton_lib import alignment, row_offsets
from eva02_kernels.ops._triton_rope import (
    ROPE_INTEGERS,
    load_cos_sin,
    load_pairs,
    rope_arguments,
    store_pairs,
    unrotate,
)
from eva02_kernels.ops._triton_rope import rotate as rotate_pairs
from eva02_kernels.rope import RopeArgs


@triton.jit(do_not_specialize=["S", *ROPE_INTEGERS])
def _rotate_kernel(
    x_ptr, out_ptr, cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, cu_seqlens_ptr, S, stride_x, stride_x_token,
    stride_x_head, stride_out, stride_out_token, stride_out_head, prefix, num_kept, height, width, table_rows,
    H: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    AXIS: tl.constexpr, SWAP: tl.constexpr, PER_HEAD: tl.constexpr, INVERSE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_T)
    sequence = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    first = sequence
    length = S
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first
    there = token < length
    x_tokens = tl.cast(first, tl.int64) * stride_x + row_offsets(token, stride_x_token)
    out_tokens = tl.cast(first, tl.int64) * stride_out + row_offsets(token, stride_out_token)
    first_head = tl.program_id(1) * BLOCK_H
    for chunk in tl.static_range(2 if REST else 1):
        if not PER_HEAD:  # the heads share their angles
            cos, sin = load_cos_sin(
                cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, token, there, sequence, 0, prefix, num_kept, height, width,
                table_rows, chunk * PAIRS, REST if chunk else PAIRS, HALF, AXIS, SWAP, PER_HEAD,
            )  # fmt: skip
        for head in range(first_head, tl.minimum(first_head + BLOCK_H, H)):
            if PER_HEAD:
                cos, sin = load_cos_sin(
                    cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, token, there, sequence, head, prefix, num_kept, height,
                    width, table_rows, chunk * PAIRS, REST if chunk else PAIRS, HALF, AXIS, SWAP, PER_HEAD,
                )  # fmt: skip
            x = tl.multiple_of(x_tokens + tl.cast(head, tl.int64) * stride_x_head, [ALIGN, ALIGN])
            out = tl.multiple_of(out_tokens + tl.cast(head, tl.int64) * stride_out_head, [ALIGN, ALIGN])
            a, b = load_pairs(
                x_ptr, x, there[:, None], chunk * PAIRS, REST if chunk else PAIRS, HALF, INTERLEAVED
            )  # fmt: skip
            a = a.to(tl.float32)
            b = b.to(tl.float32)
            if INVERSE:
                a, b = unrotate(a, b, cos, sin)
            else:
                a, b = rotate_pairs(a, b, cos, sin)
            store_pairs(
                out_ptr, out, a, b, there[:, None], chunk * PAIRS, REST if chunk else PAIRS, HALF, INTERLEAVED
            )  # fmt: skip


@triton.jit(do_not_specialize=["B", "patches", "prefix", "num_kept"])
def _table_gradient_kernel(
    dout_ptr, x_ptr, dcos_ptr, dsin_ptr, cu_seqlens_ptr, order_ptr, starts_ptr, B, patches,
    stride_dout, stride_dout_token, stride_dout_head, stride_x, stride_x_token, stride_x_head, prefix, num_kept,
    H: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    PER_HEAD: tl.constexpr, PER_SEQUENCE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    table = tl.program_id(0) // patches
    patch = tl.program_id(0) % patches
    # Row r of those that meet this entry of the table is head r % HEADS of the token r // HEADS that meets it.
    HEADS: tl.constexpr = 1 if PER_HEAD else H
    first_head = table if PER_HEAD else 0
    first_sequence = table if PER_SEQUENCE else 0
    num_rows = HEADS if PER_SEQUENCE else B * HEADS
    if order_ptr is not None:
        entry = first_sequence * patches + patch
        start = tl.load(starts_ptr + entry)
        num_rows = (tl.load(starts_ptr + entry + 1) - start) * HEADS
    for chunk in tl.static_range(2 if REST else 1):
        dcos = tl.zeros([BLOCK_R, REST if chunk else PAIRS], tl.float32)
        dsin = tl.zeros([BLOCK_R, REST if chunk else PAIRS], tl.float32)
        for first in range(0, num_rows, BLOCK_R):
            rows = first + tl.arange(0, BLOCK_R)
            there = rows < num_rows
            head = (first_head + rows % HEADS).to(tl.int64)
            if order_ptr is not None:  # keep_idx says which tokens meet it
                place = tl.load(order_ptr + start + rows // HEADS, mask=there, other=0).to(tl.int64)
                sequence = place // num_kept
                token = prefix + place % num_kept
            else:
                sequence = (first_sequence + rows // HEADS).to(tl.int64)
                token = tl.cast(prefix + patch, tl.int64)
            if cu_seqlens_ptr is not None:
                begin = tl.load(cu_seqlens_ptr + sequence, mask=there, other=0)
                end = tl.load(cu_seqlens_ptr + sequence + 1, mask=there, other=0)
                there &= token < end - begin
                sequence = begin.to(tl.int64)
            dout = sequence * stride_dout + token * stride_dout_token + head * stride_dout_head
            dout = tl.multiple_of(dout[:, None], [ALIGN, ALIGN])
            x = sequence * stride_x + token * stride_x_token + head * stride_x_head
            x = tl.multiple_of(x[:, None], [ALIGN, ALIGN])
            da, db = load_pairs(
                dout_ptr, dout, there[:, None], chunk * PAIRS, REST if chunk else PAIRS, HALF, INTERLEAVED
            )  # fmt: skip
            xa, xb = load_pairs(
                x_ptr, x, there[:, None], chunk * PAIRS, REST if chunk else PAIRS, HALF, INTERLEAVED
            )  # fmt: skip
            da = da.to(tl.float32)
            db = db.to(tl.float32)
            xa = xa.to(tl.float32)
            xb = xb.to(tl.float32)
            dcos += xa * da + xb * db
            dsin += xa * db - xb * da
        pair = chunk * PAIRS + tl.arange(0, REST if chunk else PAIRS)
        out = tl.cast(tl.program_id(0), tl.int64) * HALF + pair
        tl.store(dcos_ptr + out, tl.sum(dcos, 0), mask=pair < HALF)
        tl.store(dsin_ptr + out, tl.sum(dsin, 0), mask=pair < HALF)


def _token_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of sequences, tokens and heads; packed sequences (T, H, D) begin at tokens."""
    return x.stride()[:3] if x.dim() == 4 else (x.stride(0), x.stride(0), x.stride(1))


def rotate(
    x: Tensor, rope: Sequence[Any], *, inverse: bool, out: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> Tensor:  # fmt: skip
    """x (B, S, H, D) rotated, or rotated back; ``out`` may be x itself.

    x and ``out`` have a contiguous last dim and any other strides: they may be parts of a packed tensor. With
    ``cu_seqlens`` (num_seq + 1,) x is (T, H, D), sequences of at most ``max_seqlen`` tokens one after the other; tokens
    before and behind them are left as they are in ``out``.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    tables, integers, constants = rope_arguments(RopeArgs(*rope))
    if not constants.pop("ROTATE"):
        return out.copy_(x)
    if not x.numel():
        return out
    x = last_dense(x)
    heads, head_dim = x.shape[-2:]
    batch, tokens = x.shape[:2] if cu_seqlens is None else (cu_seqlens.shape[0] - 1, max_seqlen)
    launch = rope_tokens(head_dim)
    pairs, rest = pair_chunks(head_dim)
    grid = (batch * triton.cdiv(tokens, launch["BLOCK_T"]), triton.cdiv(heads, launch["BLOCK_H"]))
    strides = (*_token_strides(x), *_token_strides(out))
    if grid[0]:
        _triton.launch(
            _rotate_kernel, grid, launch, x, out, *tables, cu_seqlens, tokens, *strides, *integers,
            H=heads, HALF=head_dim // 2, PAIRS=pairs, REST=rest, INVERSE=inverse, ALIGN=alignment(*strides),
            **constants,
        )  # fmt: skip
    return out


def table_gradients(
    dout: Tensor, x: Tensor, rope: Sequence[Any], *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of a dense table's cosines and sines, given the unrotated x and the gradient of the rotated one.

    Shapes and strides are as :func:`rotate` takes them.
    """
    table = RopeArgs(*rope)
    assert table.cos is not None and table.sin is not None and not table.grid
    dcos, dsin = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (table.cos, table.sin))
    if not dcos.numel():
        return dcos, dsin
    dout, x = last_dense(dout), last_dense(x)
    heads, head_dim = x.shape[-2:]
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    layout, _, per = table.layout.partition(":")
    patches = dcos.shape[-2]
    order, starts, num_kept = None, None, 0
    if table.keep_idx is not None:
        patch = table.keep_idx
        num_kept = patch.shape[1]
        if per == "batch":
            patch = patch + patches * torch.arange(batch, device=patch.device)[:, None]
        order, starts = inverse_index(patch, patches * (batch if per == "batch" else 1))
    pairs, rest = pair_chunks(head_dim)
    strides = (*_token_strides(dout), *_token_strides(x))
    _triton.launch(
        _table_gradient_kernel, (dcos.numel() // dcos.shape[-1],), rope_table_rows(head_dim),
        dout, x, dcos, dsin, cu_seqlens, order, starts, batch, patches, *strides,
        table.num_prefix_tokens, num_kept, H=heads, HALF=head_dim // 2, PAIRS=pairs, REST=rest,
        INTERLEAVED=layout == "interleaved", PER_HEAD=per == "head", PER_SEQUENCE=per == "batch",
        ALIGN=alignment(*strides),
    )  # fmt: skip
    return dcos, dsin


def fwd(x: Tensor, *rope: Any) -> Tensor:
    return rotate(x, rope, inverse=False)


def bwd(dout: Tensor, x: Tensor | None, *args: Any) -> list[Tensor]:
    *rope, (needs_x, needs_cos, needs_sin) = args
    grads = [rotate(dout, rope, inverse=True)] if needs_x else []
    if needs_cos or needs_sin:
        assert x is not None
        dcos, dsin = table_gradients(dout, x, rope)
        grads += [dcos] * needs_cos + [dsin] * needs_sin
    return grads
