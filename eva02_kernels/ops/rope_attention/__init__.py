"""rope_attention: flash attention that rotates q and k (2-D RoPE) on load.

Files: ``reference.py`` the formula, ``spec.py`` schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU
kernels, ``native.py`` the adapter to ``csrc/rope_attention``. ``rope_attention_packed`` beside it takes one packed qkv
and shares all of them.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.rope_attention.spec import SPEC
from eva02_kernels.rope import RopeTable


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: RopeTable | None = None,
    *,
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
    """softmax(scale * rotate(q) . rotate(k)) v without a score matrix in memory and without rotated copies.

    Equivalent PyTorch: rotate the tokens after the prefix (``apply_rope``), then
    ``F.scaled_dot_product_attention(q.transpose(1, 2), ...).transpose(1, 2)``.

    Args:
        q: (B, S, H, D); k, v: (B, S, Hkv, D), H a multiple of Hkv; D a multiple of 4, 16..128. Any strides with a
            contiguous last dim. float32, bfloat16, float16 or float64 (eager).
        rope: table for the S - num_prefix_tokens patches (``rope_2d``, ``RopeTable.from_cos_sin``), or None.
        num_prefix_tokens: tokens at the start of each sequence that are not rotated.
        keep_idx: (B, K) int32 or int64, which patch each token after the prefix is (patch dropout), S = prefix + K.
        key_padding_mask: (B, S) bool, True for the keys to attend to.
        cu_seqlens: (n + 1,) int32 on the device, for packed sequences: q, k, v are then (T, H, D).
        max_seqlen: longest of the packed sequences (a host integer), required with cu_seqlens.
        causal: token i attends to tokens up to i of its sequence.
        scale: factor of the scores; default D**-0.5.
        q_norm, k_norm: (D,) weights of an RMSNorm over each head before the rotation, q's dtype or float32.
        norm_eps: its epsilon.
        return_lse: also return the log-sum-exp of the scores.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        out, shaped as q; with ``return_lse`` also lse, float32, natural logarithm, (B, H, S) or (H, T), without
        gradient. Gradients reach q, k, v, the norm weights and the cosines and sines of a dense table. A token with
        no key to attend to gets 0 and lse -inf.

    Numerics: scores, softmax and sums in float32; one rounding of out.
    Memory: forward reads q, k, v and writes out; backward reads q, k, v, out, dout and writes dq, dk, dv; keeps q, k,
        v as given, out and lse. No tensor of B*H*S*S elements.
    Raises: ValueError for shapes, dtypes and indices; NotImplementedError with every backend's reason.
    Source: Dao et al., arXiv:2205.14135 and arXiv:2307.08691; EVA-02, arXiv:2303.11331.
    """
    args = SPEC.canonical(
        q,
        k,
        v,
        rope,
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
