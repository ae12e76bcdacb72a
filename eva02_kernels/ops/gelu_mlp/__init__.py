"""gelu_mlp: the plain feed-forward layer of a ViT (exact GELU), LayerNorm before and residual after.

Files: ``spec.py`` formula, schema, autograd, samples and bytes, ``gpu.py`` its steps on a GPU, ``native.py`` the
adapter to ``csrc/gelu_mlp``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import add_residual, call
from eva02_kernels.ops.gelu_mlp.spec import SPEC


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    pre_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    recompute: bool = False,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """W2 gelu(W1 x + b1) + b2 with the exact (erf) GELU, and with what surrounds it in a block.

    Equivalent PyTorch: ``y = F.layer_norm(x, (C,), *pre_norm[:2], pre_norm[2]);
    residual + row_scale * layer_scale * F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2)``.

    Args:
        x: (B, ..., C); float32, bfloat16, float16 or float64 (eager).
        w1: (F, C); w2: (C_out, F), dtype of x. b1: (F,); b2: (C_out,), dtype of x or float32, or None.
        pre_norm: (weight (C,), bias (C,), eps) of the LayerNorm applied to x first, or None.
        recompute: do not keep the hidden layer; backward computes it from x again.
        residual: (B, ..., C_out), added to the result; x itself costs no extra pass.
        layer_scale: (C_out,); row_scale: (B,) float32 drop-path factors, without gradient.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, ..., C_out). Gradients reach x, residual, every weight, bias, norm parameter and layer_scale.

    Numerics: float32 accumulation; the hidden layer is rounded once when kept; one rounding at the store.
    Memory: keeps x and G = B*N*F elements (the hidden layer before b1), or x alone with ``recompute`` or
            without gradients.
    Raises: ValueError for shapes and dtypes; NotImplementedError with every backend's reason.
    Source: Hendrycks and Gimpel, arXiv:1606.08415; Dosovitskiy et al., arXiv:2010.11929.
    """
    args = SPEC.canonical(
        x,
        w1,
        b1,
        w2,
        b2,
        pre_norm=pre_norm,
        recompute=recompute,
        residual=residual,
        layer_scale=layer_scale,
        row_scale=row_scale,
    )
    return add_residual(call(SPEC, backend, args), x, residual)
