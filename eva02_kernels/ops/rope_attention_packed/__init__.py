"""rope_attention_packed: rope_attention on one packed qkv, whose backward writes one packed dqkv.

Files: ``spec.py``; reference and kernels are those of ``rope_attention``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.rope_attention_packed.spec import SPEC
from eva02_kernels.rope import RopeTable


def rope_attention_packed(
    qkv: Tensor,
    rope: RopeTable | None = None,
    *,
    num_kv_heads: int | None = None,
    num_prefix_tokens: int = 1,
    keep_idx: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`rope_attention` on one packed tensor: no split copies, one gradient.

    Equivalent PyTorch: ``q, k, v = qkv.split([H, Hkv, Hkv], -2); rope_attention(q, k, v, ...)``.

    Args:
        qkv: (B, S, H + 2 Hkv, D), heads of q, then of k, then of v; (T, H + 2 Hkv, D) with ``cu_seqlens``.
        num_kv_heads: Hkv; default a third of the heads (H = Hkv).
        The others: as in :func:`rope_attention`.

    Returns:
        out (B, S, H, D); with ``return_lse`` also lse (B, H, S). Gradients reach qkv (one packed tensor), the norm
        weights and the cosines and sines of a dense table.

    Numerics, Memory, Raises, Source: as :func:`rope_attention`; keeps qkv, out, lse.
    """
    args = SPEC.canonical(
        qkv,
        rope,
        num_kv_heads=num_kv_heads,
        num_prefix_tokens=num_prefix_tokens,
        keep_idx=keep_idx,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        causal=causal,
        scale=scale,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
    )
    out, lse = call(SPEC, backend, args)
    return (out, lse) if return_lse else out
