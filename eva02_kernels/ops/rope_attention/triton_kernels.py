"""Triton kernels of rope_attention and rope_attention_packed.

Fused: RMSNorm of q and k over each head (optional), their rotation, scaled dot products, masks, softmax, and the sum of
v; backward the same for dq (with delta = sum(out * dout)) and for dk and dv, which are un-rotated at the store.
Bytes: forward reads q, k, v and writes out and lse; every block of queries reads k and v again (from L2). Backward is
two kernels, one by blocks of queries and one by blocks of keys, so that nothing is added atomically: seven matrix
products instead of five, and the same bits in every run. Tables are (h + w) rows for h x w patches.
Launch: one program for each block of queries (of keys) of each head of each sequence, in one grid dimension.
Numerics: scores, softmax and sums in float32; rotated q and k, probabilities and score gradients are rounded to the
inputs' dtype for the matrix instructions.
Limits: head dims 4..128 in steps of 4, channels of a head contiguous; a head is one tile or two (88 = 64 + 24 of 32).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _launch, _triton
from eva02_kernels._launch import Choice
from eva02_kernels.ops._common import contiguous, last_dense
from eva02_kernels.ops._triton_lib import INTERPRETED, add_product, column_sums, dot, inverse_sqrt, parameter_partials
from eva02_kernels.ops._triton_rope import (
    ROPE_INTEGERS,
    load_cos_sin,
    load_pairs,
    rope_arguments,
    rotate,
    store_pairs,
    unrotate,
)
from eva02_kernels.ops.apply_rope import triton_kernels as apply_rope
from eva02_kernels.ops.rope_attention.reference import split_packed
from eva02_kernels.rope import NUM_ROPE_ARGS, RopeArgs, per_unit_table

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# ---- tiles of a head -------------------------------------------------------------------------------------------------
@triton.jit
def _load_channels(ptr, offsets, there, FIRST: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr):
    channel = FIRST + tl.arange(0, COUNT)
    return tl.load(ptr + offsets + channel[None, :], mask=there & (channel < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _load_head(ptr, offsets, there, P0: tl.constexpr, P1: tl.constexpr, HALF: tl.constexpr):
    """Channels as they are: tiles of 2 P0 and 2 P1 (the first again where there is no second)."""
    x0 = _load_channels(ptr, offsets, there, 0, 2 * P0, 2 * HALF)
    x1 = x0
    if P1 > 0:
        x1 = _load_channels(ptr, offsets, there, 2 * P0, 2 * P1, 2 * HALF)
    return x0, x1


@triton.jit
def _store_head(ptr, offsets, x0, x1, there, P0: tl.constexpr, P1: tl.constexpr, HALF: tl.constexpr):
    channel = tl.arange(0, 2 * P0)
    keep = there & (channel < 2 * HALF)[None, :]
    tl.store(ptr + offsets + channel[None, :], x0.to(ptr.dtype.element_ty), mask=keep)
    if P1 > 0:
        channel = 2 * P0 + tl.arange(0, 2 * P1)
        keep = there & (channel < 2 * HALF)[None, :]
        tl.store(ptr + offsets + channel[None, :], x1.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def _interleave(a, b):
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _first(a, b):
    return a


@triton.jit
def _stay(x):
    """x, computed once by the threads that loaded it and then shared.

    Otherwise the compiler moves the layout of a matrix instruction's operand up to the load, where every warp needs all
    of the other operand's tile: each would rotate the whole tile. A reduction of one element ends that search.
    """
    if not INTERPRETED:
        x = tl.reduce(x[:, :, None], 2, _first)
    return x


@triton.jit
def _split(x):
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _norm_weight(norm_ptr, FIRST: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    here = tl.full([1, 1], True, tl.int1)
    a, b = load_pairs(norm_ptr, tl.zeros([1, 1], tl.int64), here, FIRST, PAIRS, HALF, INTERLEAVED)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _load_prepared(
    ptr, offsets, token, exists, sequence, head, norm_ptr, norm_eps,
    cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
    P0: tl.constexpr, P1: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    AXIS: tl.constexpr, SWAP: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Tiles of tokens' channels, normalised and rotated, pairs adjacent whatever the layout, in the stored dtype."""
    there = exists[:, None]
    if (not ROTATE) and norm_ptr is None:
        x0, x1 = _load_head(ptr, offsets, there, P0, P1, HALF)
    else:
        dtype = ptr.dtype.element_ty
        a0, b0 = load_pairs(ptr, offsets, there, 0, P0, HALF, INTERLEAVED)
        a0 = a0.to(tl.float32)
        b0 = b0.to(tl.float32)
        a1, b1 = a0, b0
        if P1 > 0:
            a1, b1 = load_pairs(ptr, offsets, there, P0, P1, HALF, INTERLEAVED)
            a1 = a1.to(tl.float32)
            b1 = b1.to(tl.float32)
        if norm_ptr is not None:
            squares = tl.sum(a0 * a0 + b0 * b0, 1)
            if P1 > 0:
                squares += tl.sum(a1 * a1 + b1 * b1, 1)
            rstd = inverse_sqrt(squares / (2 * HALF) + tl.cast(norm_eps, tl.float32))[:, None]
            wa, wb = _norm_weight(norm_ptr, 0, P0, HALF, INTERLEAVED)
            a0 *= rstd * wa
            b0 *= rstd * wb
            if P1 > 0:
                wa, wb = _norm_weight(norm_ptr, P0, P1, HALF, INTERLEAVED)
                a1 *= rstd * wa
                b1 *= rstd * wb
        if ROTATE:
            cos, sin = load_cos_sin(cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, token, exists, sequence, head, prefix,
                                    num_kept, height, width, table_rows, 0, P0, HALF, AXIS, SWAP, PER_HEAD)  # fmt: skip
            a0, b0 = rotate(a0, b0, cos, sin)
            if P1 > 0:
                cos, sin = load_cos_sin(cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, token, exists, sequence, head,
                                        prefix, num_kept, height, width, table_rows, P0, P1, HALF, AXIS, SWAP,
                                        PER_HEAD)  # fmt: skip
                a1, b1 = rotate(a1, b1, cos, sin)
        x0 = _stay(_interleave(a0.to(dtype), b0.to(dtype)))
        x1 = x0
        if P1 > 0:
            x1 = _stay(_interleave(a1.to(dtype), b1.to(dtype)))
    return x0, x1


@triton.jit
def _store_gradient(
    ptr, offsets, dx0, dx1, x_ptr, x_offsets, token, exists, sequence, head, norm_ptr, norm_eps, dnorm_ptr,
    cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
    P0: tl.constexpr, P1: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    AXIS: tl.constexpr, SWAP: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Take the gradient of what ``_load_prepared`` gave back through rotation and norm, and store it.

    ``dnorm_ptr``: this program's row for its sum of the norm weight's gradient.
    """
    there = exists[:, None]
    if (not ROTATE) and norm_ptr is None:
        _store_head(ptr, offsets, dx0, dx1, there, P0, P1, HALF)
    else:
        a0, b0 = _split(dx0)
        a1, b1 = a0, b0
        if P1 > 0:
            a1, b1 = _split(dx1)
        if ROTATE:
            cos, sin = load_cos_sin(cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, token, exists, sequence, head, prefix,
                                    num_kept, height, width, table_rows, 0, P0, HALF, AXIS, SWAP, PER_HEAD)  # fmt: skip
            a0, b0 = unrotate(a0, b0, cos, sin)
            if P1 > 0:
                cos, sin = load_cos_sin(cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, token, exists, sequence, head,
                                        prefix, num_kept, height, width, table_rows, P0, P1, HALF, AXIS, SWAP,
                                        PER_HEAD)  # fmt: skip
                a1, b1 = unrotate(a1, b1, cos, sin)
        if norm_ptr is not None:
            xa0, xb0 = load_pairs(x_ptr, x_offsets, there, 0, P0, HALF, INTERLEAVED)
            xa0 = xa0.to(tl.float32)
            xb0 = xb0.to(tl.float32)
            squares = tl.sum(xa0 * xa0 + xb0 * xb0, 1)
            xa1, xb1 = xa0, xb0
            if P1 > 0:
                xa1, xb1 = load_pairs(x_ptr, x_offsets, there, P0, P1, HALF, INTERLEAVED)
                xa1 = xa1.to(tl.float32)
                xb1 = xb1.to(tl.float32)
                squares += tl.sum(xa1 * xa1 + xb1 * xb1, 1)
            rstd = inverse_sqrt(squares / (2 * HALF) + tl.cast(norm_eps, tl.float32))[:, None]
            xa0 *= rstd
            xb0 *= rstd
            own_row = tl.zeros([1, 1], tl.int64)
            here = tl.full([1, 1], True, tl.int1)
            if dnorm_ptr is not None:
                store_pairs(dnorm_ptr, own_row, tl.sum(a0 * xa0, 0)[None, :], tl.sum(b0 * xb0, 0)[None, :], here,
                            0, P0, HALF, INTERLEAVED)  # fmt: skip
            wa, wb = _norm_weight(norm_ptr, 0, P0, HALF, INTERLEAVED)
            a0 *= wa
            b0 *= wb
            along = tl.sum(a0 * xa0 + b0 * xb0, 1)
            if P1 > 0:
                xa1 *= rstd
                xb1 *= rstd
                if dnorm_ptr is not None:
                    store_pairs(dnorm_ptr, own_row, tl.sum(a1 * xa1, 0)[None, :], tl.sum(b1 * xb1, 0)[None, :], here,
                                P0, P1, HALF, INTERLEAVED)  # fmt: skip
                wa, wb = _norm_weight(norm_ptr, P0, P1, HALF, INTERLEAVED)
                a1 *= wa
                b1 *= wb
                along += tl.sum(a1 * xa1 + b1 * xb1, 1)
            along = (along / (2 * HALF))[:, None]
            a0 = (a0 - xa0 * along) * rstd
            b0 = (b0 - xb0 * along) * rstd
            if P1 > 0:
                a1 = (a1 - xa1 * along) * rstd
                b1 = (b1 - xb1 * along) * rstd
        store_pairs(ptr, offsets, a0, b0, there, 0, P0, HALF, INTERLEAVED)
        if P1 > 0:
            store_pairs(ptr, offsets, a1, b1, there, P0, P1, HALF, INTERLEAVED)


@triton.jit
def _add_queries(a, b, acc, PAIRS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, of heads up to 96 channels as a long sum: with more, registers for it would cost a block's room."""
    if PAIRS <= 48:
        acc = add_product(a, b, acc, PRECISION)
    else:
        acc = dot(a, b, acc, PRECISION)
    return acc


# ---- where a program works -------------------------------------------------------------------------------------------
@triton.jit
def _again(block, turns):
    """``block``, in a form that the compiler cannot tell from a new number, after a loop that counted ``turns``.

    What is computed from it is computed then, instead of being kept in registers since before the loop.
    """
    return block + (turns < 0).to(tl.int32)


@triton.jit
def _sequence_bounds(cu_seqlens_ptr, sequence, seq_len):
    """(first token, sample, length): packed sequences are one sample, others start their own."""
    first = 0
    sample = sequence
    length = seq_len
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first
        sample = 0
    return first, sample, length


@triton.jit
def _head_of(ptr, first, sample, head, stride_b, UNIT: tl.constexpr, STRIDES: tl.constexpr):
    """Pointer to a head of a sequence's first token; within a sequence offsets are int32.

    STRIDES, of a token and a head, are a model's and constants: the compiler must see that heads of 88 channels are
    aligned to 16 bytes. ``stride_b``, of a sample, varies with the length and counts UNIT elements.
    """
    offset = tl.cast(sample, tl.int64) * stride_b * UNIT + tl.cast(head, tl.int64) * STRIDES[1]
    return ptr + offset + tl.cast(first, tl.int64) * STRIDES[0]


@triton.jit
def _allowed(query, key, length, mask_ptr, sample, seq_len, CAUSAL: tl.constexpr):
    """Which keys (one axis) each query (the other) attends to; ``query`` and ``key`` broadcast against each other."""
    allowed = key < length
    if mask_ptr is not None:
        at = tl.cast(sample, tl.int64) * seq_len + key
        allowed = allowed & (tl.load(mask_ptr + at, mask=key < length, other=0) != 0)
    if CAUSAL:
        allowed = allowed & (key <= query)
    return allowed


_RUN_TIME = [
    *(f"stride_{t}b" for t in ("q", "k", "v", "o", "g", "dq", "dk", "dv")), "stride_lse_b", "stride_lse_h",
    "seq_len", "heads", "group", *ROPE_INTEGERS,
]  # fmt: skip


# ---- kernels ---------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_RUN_TIME)
def _rope_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, cu_seqlens_ptr, q_norm_ptr, k_norm_ptr,
    cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
    stride_qb, stride_kb, stride_vb, stride_ob, stride_lse_b, stride_lse_h, seq_len, heads, group, scale, norm_eps,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, O_STRIDES: tl.constexpr,
    UNIT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    AXIS: tl.constexpr, SWAP: tl.constexpr, PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(seq_len, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % heads
    sequence = tl.program_id(0) // blocks // heads
    first, sample, length = _sequence_bounds(cu_seqlens_ptr, sequence, seq_len)
    if block * BLOCK_M >= length:
        return
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_head = _head_of(q_ptr, first, sample, head, stride_qb, UNIT, Q_STRIDES)
    q0, q1 = _load_prepared(
        q_head, query[:, None] * Q_STRIDES[0], query, query < length, sequence, head, q_norm_ptr, norm_eps,
        cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
        P0, P1, HALF, ROTATE, INTERLEAVED, AXIS, SWAP, PER_HEAD,
    )  # fmt: skip
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, 2 * P0], tl.float32)
    acc1 = acc0
    if P1 > 0:
        acc1 = tl.zeros([BLOCK_M, 2 * P1], tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, (block + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        exists = key < length
        k_head = _head_of(k_ptr, first, sample, head // group, stride_kb, UNIT, K_STRIDES)
        k0, k1 = _load_prepared(
            k_head, key[:, None] * K_STRIDES[0], key, exists, sequence, head // group, k_norm_ptr, norm_eps,
            cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
            P0, P1, HALF, ROTATE, INTERLEAVED, AXIS, SWAP, PER_HEAD,
        )  # fmt: skip
        scores = dot(q0, tl.trans(k0), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        if P1 > 0:
            scores = dot(q1, tl.trans(k1), scores, PRECISION)
        allowed = _allowed(query[:, None], key[None, :], length, mask_ptr, sample, seq_len, CAUSAL)
        scores = tl.where(allowed, scores * scale2, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)  # no key so far: exp2(-inf - 0) = 0
        p = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(p, 1)
        largest = now
        v_head = _head_of(v_ptr, first, sample, head // group, stride_vb, UNIT, V_STRIDES)
        v0, v1 = _load_head(v_head, key[:, None] * V_STRIDES[0], exists[:, None], P0, P1, HALF)
        acc0 = dot(p.to(v0.dtype), v0, acc0 * fade[:, None], PRECISION)
        if P1 > 0:
            acc1 = dot(p.to(v1.dtype), v1, acc1 * fade[:, None], PRECISION)
    # A query without keys: out 0, lse -inf.
    share = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    out_head = _head_of(out_ptr, first, sample, head, stride_ob, UNIT, O_STRIDES)
    exists = (query < length)[:, None]
    _store_head(out_head, query[:, None] * O_STRIDES[0], acc0 * share, acc1 * share, exists, P0, P1, HALF)
    lse = largest * LN_2 + tl.log(tl.where(total == 0.0, 1.0, total))
    at = tl.cast(sample, tl.int64) * stride_lse_b + tl.cast(head, tl.int64) * stride_lse_h + first
    tl.store(lse_ptr + at + query, lse, mask=query < length)


@triton.jit(do_not_specialize=_RUN_TIME)
def _rope_attention_bwd_dq_kernel(
    dout_ptr, out_ptr, lse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dnorm_ptr, mask_ptr, cu_seqlens_ptr,
    q_norm_ptr, k_norm_ptr,
    cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
    stride_gb, stride_ob, stride_qb, stride_kb, stride_vb, stride_dqb, stride_lse_b, stride_lse_h, seq_len, heads,
    group, scale, norm_eps,
    G_STRIDES: tl.constexpr, O_STRIDES: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr, DQ_STRIDES: tl.constexpr, UNIT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    AXIS: tl.constexpr, SWAP: tl.constexpr, PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(seq_len, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % heads
    sequence = tl.program_id(0) // blocks // heads
    first, sample, length = _sequence_bounds(cu_seqlens_ptr, sequence, seq_len)
    if dnorm_ptr is not None:
        dnorm_ptr += tl.cast(tl.program_id(0), tl.int64) * (2 * HALF)
    if block * BLOCK_M >= length:
        return
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = query < length
    q_head = _head_of(q_ptr, first, sample, head, stride_qb, UNIT, Q_STRIDES)
    q0, q1 = _load_prepared(
        q_head, query[:, None] * Q_STRIDES[0], query, exists, sequence, head, q_norm_ptr, norm_eps,
        cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
        P0, P1, HALF, ROTATE, INTERLEAVED, AXIS, SWAP, PER_HEAD,
    )  # fmt: skip
    dout_head = _head_of(dout_ptr, first, sample, head, stride_gb, UNIT, G_STRIDES)
    g0, g1 = _load_head(dout_head, query[:, None] * G_STRIDES[0], exists[:, None], P0, P1, HALF)
    out_head = _head_of(out_ptr, first, sample, head, stride_ob, UNIT, O_STRIDES)
    o0, o1 = _load_head(out_head, query[:, None] * O_STRIDES[0], exists[:, None], P0, P1, HALF)
    delta = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if P1 > 0:
        delta += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    at = tl.cast(sample, tl.int64) * stride_lse_b + tl.cast(head, tl.int64) * stride_lse_h + first
    tl.store(delta_ptr + at + query, delta, mask=exists)
    lse = tl.load(lse_ptr + at + query, mask=exists, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E  # a query without keys: every exp2 is 0
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    dq0 = tl.zeros([BLOCK_M, 2 * P0], tl.float32)
    dq1 = dq0
    if P1 > 0:
        dq1 = tl.zeros([BLOCK_M, 2 * P1], tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, (block + 1) * BLOCK_M)
    turns = seq_len
    for start in range(0, end, BLOCK_N):
        turns += 1
        key = start + tl.arange(0, BLOCK_N)
        k_head = _head_of(k_ptr, first, sample, head // group, stride_kb, UNIT, K_STRIDES)
        k0, k1 = _load_prepared(
            k_head, key[:, None] * K_STRIDES[0], key, key < length, sequence, head // group, k_norm_ptr, norm_eps,
            cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
            P0, P1, HALF, ROTATE, INTERLEAVED, AXIS, SWAP, PER_HEAD,
        )  # fmt: skip
        v_head = _head_of(v_ptr, first, sample, head // group, stride_vb, UNIT, V_STRIDES)
        v0, v1 = _load_head(v_head, key[:, None] * V_STRIDES[0], (key < length)[:, None], P0, P1, HALF)
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = dot(q0, tl.trans(k0), zeros, PRECISION)
        dp = dot(g0, tl.trans(v0), zeros, PRECISION)
        if P1 > 0:
            scores = dot(q1, tl.trans(k1), scores, PRECISION)
            dp = dot(g1, tl.trans(v1), dp, PRECISION)
        allowed = _allowed(query[:, None], key[None, :], length, mask_ptr, sample, seq_len, CAUSAL)
        p = tl.exp2(tl.where(allowed, scores * scale2 - lse[:, None], float("-inf")))
        ds = (p * (dp - delta[:, None])).to(k0.dtype)
        dq0 = dot(ds, k0, dq0, PRECISION)
        if P1 > 0:
            dq1 = dot(ds, k1, dq1, PRECISION)
    scale = tl.cast(scale, tl.float32)
    query = _again(block, turns) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = query < length
    q_head = _head_of(q_ptr, first, sample, head, stride_qb, UNIT, Q_STRIDES)
    dq_head = _head_of(dq_ptr, first, sample, head, stride_dqb, UNIT, DQ_STRIDES)
    _store_gradient(
        dq_head, query[:, None] * DQ_STRIDES[0], dq0 * scale, dq1 * scale, q_head, query[:, None] * Q_STRIDES[0],
        query, exists, sequence, head, q_norm_ptr, norm_eps, dnorm_ptr,
        cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
        P0, P1, HALF, ROTATE, INTERLEAVED, AXIS, SWAP, PER_HEAD,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME)
def _rope_attention_bwd_dkdv_kernel(
    dout_ptr, lse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, dnorm_ptr, mask_ptr, cu_seqlens_ptr,
    q_norm_ptr, k_norm_ptr,
    cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
    stride_gb, stride_qb, stride_kb, stride_vb, stride_dkb, stride_dvb, stride_lse_b, stride_lse_h, seq_len, heads,
    group, scale, norm_eps,
    G_STRIDES: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    DK_STRIDES: tl.constexpr, DV_STRIDES: tl.constexpr, UNIT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    AXIS: tl.constexpr, SWAP: tl.constexpr, PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``heads`` are those of k and v here; every one serves ``group`` heads of q."""
    blocks = tl.cdiv(seq_len, BLOCK_N)
    block = tl.program_id(0) % blocks
    kv_head = (tl.program_id(0) // blocks) % heads
    sequence = tl.program_id(0) // blocks // heads
    first, sample, length = _sequence_bounds(cu_seqlens_ptr, sequence, seq_len)
    if dnorm_ptr is not None:
        dnorm_ptr += tl.cast(tl.program_id(0), tl.int64) * (2 * HALF)
    if block * BLOCK_N >= length:
        return
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = key < length
    k_head = _head_of(k_ptr, first, sample, kv_head, stride_kb, UNIT, K_STRIDES)
    k0, k1 = _load_prepared(
        k_head, key[:, None] * K_STRIDES[0], key, exists, sequence, kv_head, k_norm_ptr, norm_eps,
        cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
        P0, P1, HALF, ROTATE, INTERLEAVED, AXIS, SWAP, PER_HEAD,
    )  # fmt: skip
    v_head = _head_of(v_ptr, first, sample, kv_head, stride_vb, UNIT, V_STRIDES)
    v0, v1 = _load_head(v_head, key[:, None] * V_STRIDES[0], exists[:, None], P0, P1, HALF)
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    dk0 = tl.zeros([BLOCK_N, 2 * P0], tl.float32)
    dv0 = dk0
    dk1 = dk0
    dv1 = dk0
    if P1 > 0:
        dk1 = tl.zeros([BLOCK_N, 2 * P1], tl.float32)
        dv1 = dk1
    begin = 0
    if CAUSAL:
        begin = (block * BLOCK_N) // BLOCK_M * BLOCK_M
    turns = seq_len
    for head in range(kv_head * group, (kv_head + 1) * group):
        at = tl.cast(sample, tl.int64) * stride_lse_b + tl.cast(head, tl.int64) * stride_lse_h + first
        for start in range(begin, length, BLOCK_M):
            turns += 1
            query = start + tl.arange(0, BLOCK_M)
            q_head = _head_of(q_ptr, first, sample, head, stride_qb, UNIT, Q_STRIDES)
            q0, q1 = _load_prepared(
                q_head, query[:, None] * Q_STRIDES[0], query, query < length, sequence, head, q_norm_ptr, norm_eps,
                cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
                P0, P1, HALF, ROTATE, INTERLEAVED, AXIS, SWAP, PER_HEAD,
            )  # fmt: skip
            dout_head = _head_of(dout_ptr, first, sample, head, stride_gb, UNIT, G_STRIDES)
            g0, g1 = _load_head(dout_head, query[:, None] * G_STRIDES[0], (query < length)[:, None], P0, P1, HALF)
            g0 = _stay(g0)
            if P1 > 0:
                g1 = _stay(g1)
            delta = tl.load(delta_ptr + at + query, mask=query < length, other=0.0)
            lse = tl.load(lse_ptr + at + query, mask=query < length, other=float("inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E
            scores = dot(k0, tl.trans(q0), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            if P1 > 0:
                scores = dot(k1, tl.trans(q1), scores, PRECISION)
            allowed = _allowed(query[None, :], key[:, None], length, mask_ptr, sample, seq_len, CAUSAL)
            p = tl.exp2(tl.where(allowed, scores * scale2 - lse[None, :], float("-inf")))
            dp = dot(v0, tl.trans(g0), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            dv0 = _add_queries(p.to(g0.dtype), g0, dv0, P0 + P1, PRECISION)
            if P1 > 0:
                dp = dot(v1, tl.trans(g1), dp, PRECISION)
                dv1 = _add_queries(p.to(g1.dtype), g1, dv1, P0 + P1, PRECISION)
            ds = (p * (dp - delta[None, :])).to(q0.dtype)
            dk0 = _add_queries(ds, q0, dk0, P0 + P1, PRECISION)
            if P1 > 0:
                dk1 = _add_queries(ds, q1, dk1, P0 + P1, PRECISION)
    scale = tl.cast(scale, tl.float32)
    key = _again(block, turns) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = key < length
    k_head = _head_of(k_ptr, first, sample, kv_head, stride_kb, UNIT, K_STRIDES)
    dv_head = _head_of(dv_ptr, first, sample, kv_head, stride_dvb, UNIT, DV_STRIDES)
    _store_head(dv_head, key[:, None] * DV_STRIDES[0], dv0, dv1, exists[:, None], P0, P1, HALF)
    dk_head = _head_of(dk_ptr, first, sample, kv_head, stride_dkb, UNIT, DK_STRIDES)
    _store_gradient(
        dk_head, key[:, None] * DK_STRIDES[0], dk0 * scale, dk1 * scale, k_head, key[:, None] * K_STRIDES[0], key,
        exists, sequence, kv_head, k_norm_ptr, norm_eps, dnorm_ptr,
        cos_ptr, sin_ptr, grids_ptr, keep_idx_ptr, prefix, num_kept, height, width, table_rows,
        P0, P1, HALF, ROTATE, INTERLEAVED, AXIS, SWAP, PER_HEAD,
    )  # fmt: skip


# ---- launch ----------------------------------------------------------------------------------------------------------
class _Call(NamedTuple):
    """What the three kernels are given alike."""

    table: tuple[Any, ...]  # cos, sin, grids, keep_idx and the integers of ROPE_INTEGERS
    masks: tuple[Any, ...]  # key padding mask, cu_seqlens
    norms: tuple[Any, ...]
    sizes: tuple[int, ...]  # stride_lse_b, stride_lse_h, seq_len
    scalars: tuple[float, float]
    constants: dict[str, Any]
    sequences: int
    longest: int
    key: tuple[Any, ...]  # of tuning


def _prepare(q: Tensor, args: tuple[Any, ...]) -> _Call:
    rope = RopeArgs(*args[:NUM_ROPE_ARGS])
    mask, cu_seqlens, max_seqlen, causal, scale, q_norm, k_norm, norm_eps = args[NUM_ROPE_ARGS:]
    tensors, integers, constants = rope_arguments(rope)
    head_dim, heads = q.shape[-1], q.shape[-2]
    arch = _triton.architecture(q.device)
    p0, p1 = _launch.attention_chunks(q.dtype, head_dim, arch)
    constants |= {"P0": p0, "P1": p1, "HALF": head_dim // 2, "CAUSAL": causal,
                  "PRECISION": _triton.dot_precision(q.dtype)}  # fmt: skip
    if cu_seqlens is None:
        sequences, longest = q.shape[0], q.shape[1]
        lse_strides = (heads * longest, longest)
    else:
        sequences, longest = cu_seqlens.numel() - 1, max_seqlen
        lse_strides = (0, q.shape[0])
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    cu_seqlens, q_norm, k_norm = contiguous(cu_seqlens, q_norm, k_norm)
    key = (q.dtype, head_dim, _launch.power_of_2(longest), arch, causal)
    return _Call((*tensors, *integers), (mask, cu_seqlens), (q_norm, k_norm), (*lse_strides, longest),
                 (scale, norm_eps), constants, sequences, longest, key)  # fmt: skip


def _strides(**tensors: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Strides of a sample in units, and as constants the unit and the (token, head) strides of each tensor.

    Packed sequences (T, H, D) are one sample.
    """
    samples = [t.stride(0) if t.dim() == 4 else 0 for t in tensors.values()]
    unit = math.gcd(8, *samples)
    constants: dict[str, Any] = {f"{name.upper()}_STRIDES": t.stride()[-3:-1] for name, t in tensors.items()}
    return tuple(s // unit for s in samples), {**constants, "UNIT": unit}


def _grid(call: _Call, heads: int, block: int) -> tuple[int]:
    return (call.sequences * heads * triton.cdiv(call.longest, block),)


def _is_packed(args: Sequence[Any]) -> bool:
    return args[NUM_ROPE_ARGS + 1] is not None


def _allocate(like: Tensor, args: Sequence[Any]) -> Tensor:
    """Contiguous memory for an output; zeros for packed tokens, of which some may be padding behind every sequence."""
    make = torch.zeros if _is_packed(args) else torch.empty
    return make(like.shape, dtype=like.dtype, device=like.device)


def fwd(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = _allocate(q, args)
    *batch, tokens, heads, head_dim = q.shape
    lse = torch.empty(*batch, heads, tokens, dtype=torch.float32, device=q.device)
    if _is_packed(args) or not out.numel():
        lse.fill_(float("-inf"))
    if not out.numel():
        return out, lse
    q, k, v = (last_dense(t) for t in (q, k, v))
    call = _prepare(q, args)
    strides, constants = _strides(q=q, k=k, v=v, o=out)

    def run(choice: Choice) -> None:
        _triton.launch(
            _rope_attention_fwd_kernel, _grid(call, heads, choice["BLOCK_M"]), choice,
            q, k, v, out, lse, *call.masks, *call.norms, *call.table,
            *strides, *call.sizes, heads, heads // k.shape[-2], *call.scalars, **call.constants, **constants,
        )  # fmt: skip

    choices = _launch.attention("fwd", q.dtype, head_dim, _triton.architecture(q.device))
    run(_triton.tuned(("attention_fwd", *call.key), choices, run))
    return out, lse


def fwd_packed(qkv: Tensor, num_kv_heads: int, *args: Any) -> tuple[Tensor, Tensor]:
    return fwd(*split_packed(qkv, num_kv_heads), *args)


def _partials(weight: Tensor | None, need: bool, programs: int) -> Tensor | None:
    partials = None if weight is None else parameter_partials(weight, need, programs, weight.device)
    # A program beyond its sequence's length leaves its row as it is.
    return None if partials is None else partials.zero_()


def _gradients(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    args: tuple[Any, ...],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Fill dq, dk and dv, and return the gradients of (cos, sin, q_norm, k_norm) that ``needs`` asks for."""
    rope = RopeArgs(*args[:NUM_ROPE_ARGS])
    q_norm, k_norm = args[-3:-1]
    needs_cos, needs_sin, needs_q_norm, needs_k_norm = needs
    if not q.numel():
        wanted = [t for t, need in zip((rope.cos, rope.sin, q_norm, k_norm), needs, strict=True) if need]
        return [torch.zeros_like(t) for t in wanted]
    needs_table = needs_cos or needs_sin
    dout, q, k, v = (last_dense(t) for t in (dout, q, k, v))
    call = _prepare(q, args)
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    # The gradients of a table are sums over the unrounded gradients of q and k.
    to_q, to_k = (_allocate(t.float(), args) if needs_table else t for t in (dq, dk))
    delta = torch.empty_like(lse)
    dq_strides, dq_constants = _strides(g=dout, o=out, q=q, k=k, v=v, dq=to_q)
    dkdv_strides, dkdv_constants = _strides(g=dout, q=q, k=k, v=v, dk=to_k, dv=dv)
    shared = (*call.masks, *call.norms, *call.table)
    norm_partials: list[Tensor | None] = [None, None]

    def run_dq(choice: Choice) -> None:
        grid = _grid(call, heads, choice["BLOCK_M"])
        norm_partials[0] = _partials(q_norm, needs_q_norm, grid[0])
        _triton.launch(
            _rope_attention_bwd_dq_kernel, grid, choice, dout, out, lse, delta, q, k, v, to_q, norm_partials[0],
            *shared, *dq_strides, *call.sizes, heads, heads // kv_heads, *call.scalars, **call.constants,
            **dq_constants,
        )  # fmt: skip

    def run_dkdv(choice: Choice) -> None:
        grid = _grid(call, kv_heads, choice["BLOCK_N"])
        norm_partials[1] = _partials(k_norm, needs_k_norm, grid[0])
        _triton.launch(
            _rope_attention_bwd_dkdv_kernel, grid, choice, dout, lse, delta, q, k, v, to_k, dv, norm_partials[1],
            *shared, *dkdv_strides, *call.sizes, kv_heads, heads // kv_heads, *call.scalars, **call.constants,
            **dkdv_constants,
        )  # fmt: skip

    for name, run in (("dq", run_dq), ("dkdv", run_dkdv)):
        choices = _launch.attention(name, q.dtype, head_dim, _triton.architecture(q.device))
        run(_triton.tuned((f"attention_{name}", *call.key), choices, run))
    found: list[Tensor] = []
    if needs_table:
        packed = {"cu_seqlens": call.masks[1]}
        sums = []
        for d, x in ((to_q, q), (to_k, k)):
            rotated = apply_rope.rotate(d, rope, inverse=False, out=d.clone(), max_seqlen=call.longest, **packed)
            sums.append(apply_rope.table_gradients(rotated, x, rope, **packed))
        assert rope.cos is not None and rope.sin is not None
        dcos, dsin = per_unit_table([a + b for a, b in zip(*sums, strict=True)], rope.cos, rope.sin)
        found += [dcos] * needs_cos + [dsin] * needs_sin
        dq.copy_(to_q)
        dk.copy_(to_k)
    for weight, partials in zip((q_norm, k_norm), norm_partials, strict=True):
        if partials is not None:
            found.append(column_sums(partials, torch.empty_like(weight)))
    return found


def bwd(dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    grads = [_allocate(t, args) for t in (q, k, v)]
    dq, dk, dv = grads
    others = _gradients(dout, out, lse, q, k, v, tuple(args), dq, dk, dv, needs[3:])
    return [t for t, need in zip(grads, needs, strict=False) if need] + others


def bwd_packed(dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, num_kv_heads: int, *args: Any) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    dqkv = _allocate(qkv, args)
    split = functools.partial(split_packed, num_kv_heads=num_kv_heads)
    q, k, v = split(qkv)
    dq, dk, dv = split(dqkv)
    others = _gradients(dout, out, lse, q, k, v, tuple(args), dq, dk, dv, needs[1:])
    return ([dqkv] if needs[0] else []) + others
