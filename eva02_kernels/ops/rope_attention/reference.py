from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels.ops.add_layer_norm.reference import rms_norm_ref
from eva02_kernels.rope import NUM_ROPE_ARGS, RopeArgs, rotate, rotate_tokens, token_cos_sin


def attention_with_lse_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * rotate(q) . rotate(k)) v and the logarithm of the softmax's denominator.

    Everything up to the output is at least float32. Packed sequences become one, whose tokens attend to their own.
    """
    rope = RopeArgs(*args[:NUM_ROPE_ARGS])
    key_padding_mask, cu_seqlens, _, causal, scale, q_norm, k_norm, norm_eps = args[NUM_ROPE_ARGS:]
    dtype = v.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if q_norm is not None:
        q = rms_norm_ref(q, q_norm, None, norm_eps)
    if k_norm is not None:
        k = rms_norm_ref(k, k_norm, None, norm_eps)
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
        token = torch.arange(q.shape[1], device=q.device)
        segment = torch.searchsorted(cu_seqlens[1:].contiguous().long(), token, right=True)
        segment = segment.clamp(max=max(0, len(cu_seqlens) - 2))
        position = token - cu_seqlens.long()[segment]
        if rope.cos is not None and q.numel():
            cos, sin = token_cos_sin(rope, q.shape[1], dtype=wide, positions=position, segments=segment)
            q, k = (rotate(t, cos, sin, rope.layout) for t in (q, k))
    else:
        q, k = rotate_tokens(q, rope), rotate_tokens(k, rope)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if packed:
        allowed = allowed & (segment[:, None] == segment[None, :])
    if causal:
        allowed = allowed.tril()
    allowed = allowed[None, None]
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :]
    scores = scores.masked_fill(~allowed, float("-inf"))
    # A row with no key: its output and gradients are zero, its lse is -inf.
    any_key = allowed.any(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(~any_key, 0.0), dim=-1, keepdim=True)
    probabilities = torch.exp(scores - lse).masked_fill(~allowed, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", probabilities, v).to(dtype)
    lse = lse.masked_fill(~any_key, float("-inf")).squeeze(-1).float()
    return (out[0], lse[0]) if packed else (out, lse)


def rope_attention_ref(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return attention_with_lse_ref(q, k, v, *args)[0]


def split_packed(qkv: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k, v in (..., H + 2 Hkv, D)."""
    num_heads = qkv.shape[-2] - 2 * num_kv_heads
    return qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=-2)


def rope_attention_packed_ref(qkv: Tensor, num_kv_heads: int, *args: Any) -> Tensor:
    return rope_attention_ref(*split_packed(qkv, num_kv_heads), *args)
