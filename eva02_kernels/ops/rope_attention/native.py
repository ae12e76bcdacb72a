"""Compiled kernels of ``csrc/rope_attention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._native import CUDA, Library
from eva02_kernels.ops._common import contiguous, dense_like, last_dense
from eva02_kernels.ops.rope_attention.reference import split_packed
from eva02_kernels.rope import NUM_ROPE_ARGS

# Backward recomputes the scores and takes lse and out as they were saved, so the roundings of the two do not cancel as
# they do in the reference, which keeps the probabilities. The largest excess over the rule's plain bounds seen in the
# contract suite is 1.55 (dq and dk at few keys, forward and backward on different backends).
ERROR_MULTIPLE = 2.0


def _kernel_args(lib: Library, q: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    cos, sin, *rest = args[:NUM_ROPE_ARGS]
    mask, cu_seqlens, max_seqlen, causal, scale, q_norm, k_norm, norm_eps = args[NUM_ROPE_ARGS:]
    table = (None, None) if cos is None else (_aligned(lib, cos.contiguous()), _aligned(lib, sin.contiguous()))
    mask = None if mask is None else mask.contiguous()
    shared = (*table, *rest, mask, cu_seqlens, causal, scale, *contiguous(q_norm, k_norm), norm_eps)
    if lib is not CUDA:
        return shared
    longest = q.shape[1] if cu_seqlens is None else max_seqlen
    return (*shared, longest, _triton.dot_precision(q.dtype) == "tf32")


def _aligned(lib: Library, t: Tensor) -> Tensor:
    """``t``, on CUDA a copy where it is not aligned to 16 bytes."""
    return t.clone() if lib is CUDA and t.data_ptr() % 16 else t


def _rows(lib: Library, t: Tensor) -> Tensor:
    """``t`` with a contiguous last dim and, on CUDA, rows aligned to 16 bytes; a copy where need be."""
    t = last_dense(t)
    if lib is CUDA and any(n * t.element_size() % 16 for n in t.stride()[:-1]):
        t = t.contiguous()
    return _aligned(lib, t)


def _allocate(lib: Library, like: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Memory for an output. CUDA kernels leave packed tokens behind the last sequence alone: zeros."""
    packed = lib is CUDA and args[NUM_ROPE_ARGS + 1] is not None
    return dense_like(like).zero_() if packed else dense_like(like)


def fwd(lib: Library, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = _allocate(lib, q, args)
    *batch, tokens, heads, _ = q.shape
    lse = torch.empty(*batch, heads, tokens, dtype=torch.float32, device=q.device)
    if lib is CUDA and args[NUM_ROPE_ARGS + 1] is not None:
        lse.fill_(float("-inf"))
    lib.rope_attention_fwd(*(_rows(lib, t) for t in (q, k, v)), *_kernel_args(lib, q, args), out, lse)
    return out, lse


def fwd_packed(lib: Library, qkv: Tensor, num_kv_heads: int, *args: Any) -> tuple[Tensor, Tensor]:
    return fwd(lib, *split_packed(qkv, num_kv_heads), *args)


def _gradients(
    lib: Library,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Sequence[Tensor],
    args: tuple[Any, ...],
    dqkv: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Fill ``dqkv`` and return the gradients of (cos, sin, q_norm, k_norm) that ``needs`` asks for."""
    cos, sin = args[:2]
    q_norm, k_norm = args[-3:-1]
    needs_cos, needs_sin, needs_q_norm, needs_k_norm = needs
    # The kernel gives both table gradients in one go.
    table = [dense_like(t) if needs_cos or needs_sin else None for t in (cos, sin)]
    norms = [dense_like(t) if need else None for t, need in ((q_norm, needs_q_norm), (k_norm, needs_k_norm))]
    lib.rope_attention_bwd(
        *(_rows(lib, t) for t in (dout, *qkv, out)),
        lse,
        *_kernel_args(lib, qkv[0], args),
        *dqkv,
        *table,
        *norms,
    )
    return [t for t, need in zip((*table, *norms), needs, strict=True) if need and t is not None]


def bwd(
    lib: Library, dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    dqkv = [_allocate(lib, t, args) if need else None for t, need in zip((q, k, v), needs, strict=False)]
    others = _gradients(lib, dout, out, lse, (q, k, v), tuple(args), dqkv, needs[3:])
    return [t for t in dqkv if t is not None] + others


def bwd_packed(
    lib: Library, dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, num_kv_heads: int, *args: Any
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    dqkv = _allocate(lib, qkv, args) if needs[0] else None
    parts = (None, None, None) if dqkv is None else split_packed(dqkv, num_kv_heads)
    others = _gradients(lib, dout, out, lse, split_packed(qkv, num_kv_heads), tuple(args), parts, needs[1:])
    return ([] if dqkv is None else [dqkv]) + others


def unsupported(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    head_dim = args[0].shape[-1]
    if head_dim % 4 or not 4 <= head_dim <= 256:
        return (f"needs a head dim of 4..256 in steps of 4, got {head_dim}",)
    return ()


def cuda_unsupported(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    """Of rope_attention and rope_attention_packed; the first argument is q, qkv or dout."""
    reasons = []
    head_dim = args[0].shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= 128:
        reasons.append(f"needs a head dim of 8..128 in steps of 8, got {head_dim}")
    # The schema's shared arguments are the last ones, before `needs` in backward.
    num_shared = NUM_ROPE_ARGS + 8
    shared = args[-num_shared:] if direction == "fwd" else args[-num_shared - 1 : -1]
    scale, q_norm, k_norm = shared[-4:-1]
    if not scale > 0:
        reasons.append(f"needs a positive scale, got {scale}")
    if q_norm is not None or k_norm is not None:
        reasons.append("has no q_norm and k_norm")
    return reasons
