"""qkv_rope: the q, k, v projection with the LayerNorm before it and the rotation of q and k after it.

Files: ``spec.py`` formula, schema, autograd, samples and bytes, ``gpu.py`` its steps on a GPU, ``triton_kernels.py``
the product that rotates, ``native.py`` the adapter to ``csrc/qkv_rope``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.qkv_rope.spec import SPEC
from eva02_kernels.rope import RopeTable


def qkv_rope(
    x: Tensor,
    weight: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    rope: RopeTable | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    pre_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    num_prefix_tokens: int = 1,
    keep_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Packed q, k, v of x, with q and k already rotated: then ``rope_attention_packed(qkv)`` needs no table.

    Equivalent PyTorch: ``y = F.layer_norm(x, (C,), *pre_norm[:2], pre_norm[2]);
    qkv = F.linear(y, torch.cat(weights), torch.cat(biases)).unflatten(-1, (-1, D))``, then ``apply_rope`` on the
    first H + Hkv heads.

    Args:
        x: (B, S, C); float32, bfloat16, float16 or float64 (eager).
        weight: ((H + 2 Hkv) D, C), rows of q, then k, then v; or the tuple of the three. dtype of x.
        bias: ((H + 2 Hkv) D,), or a tuple of three in which None is allowed (EVA-02 has no k bias), or None.
            dtype of x or float32.
        rope: table for the S - num_prefix_tokens patches, or None.
        num_heads, num_kv_heads: H and Hkv (default H).
        pre_norm: (weight (C,), bias (C,), eps) of the LayerNorm applied to x first, or None.
        num_prefix_tokens, keep_idx: as in :func:`rope_attention`.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, S, H + 2 Hkv, D). Gradients reach x, weights, biases, the norm's parameters and a dense table.

    Numerics: float32 accumulation and rotation, one rounding at the store (eager rounds three times).
    Memory: reads x and the weights, writes qkv; keeps x itself, mean and rstd (never the LayerNorm's output).
    Raises: ValueError for shapes, dtypes and indices; NotImplementedError with every backend's reason.
    Source: EVA-02, arXiv:2303.11331.
    """
    args = SPEC.canonical(
        x,
        weight,
        bias,
        rope,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        pre_norm=pre_norm,
        num_prefix_tokens=num_prefix_tokens,
        keep_idx=keep_idx,
    )
    return call(SPEC, backend, args)
