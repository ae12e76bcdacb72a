"""mask_tokens: the tokens a ViT starts from: mask blend, prefix tokens and position embedding in one pass.

Files: ``spec.py`` formula, schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU kernels, ``native.py``
the adapter to ``csrc/mask_tokens``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.mask_tokens.spec import SPEC


def mask_tokens(
    patches: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """cat(cls_token, where(mask, mask_token, patches)) + pos_embed.

    Equivalent PyTorch: ``x = torch.where(mask[..., None], mask_token, patches);
    x = torch.cat([cls_token.expand(B, -1, -1), x], 1) + pos_embed``.

    Args:
        patches: (B, P, C); float32, bfloat16, float16 or float64 (eager).
        mask: (B, P) bool, True where the patch is replaced, or None.
        mask_token: (1, 1, C) or (C,); needed with a mask.
        pos_embed: (1, N, C) or (N, C), N = prefix tokens + P, or None.
        cls_token: (1, n, C), (n, C) or (C,): n prefix tokens, or None. Parameters have the dtype of patches or float32.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, N, C) in the dtype of patches. Gradients reach patches, mask_token, pos_embed, cls_token.

    Numerics: one addition in float32, one rounding; gradients of parameters are summed in float32 in a fixed order.
    Memory: reads patches, writes out; keeps mask only.
    Raises: ValueError for shapes and dtypes; NotImplementedError with every backend's reason.
    Source: Bao et al., arXiv:2106.08254.
    """
    return call(SPEC, backend, SPEC.canonical(patches, mask, mask_token, pos_embed, cls_token))
