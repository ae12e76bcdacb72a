"""add_layer_norm: residual add (with layer scale and drop path) and the LayerNorm or RMSNorm after it, in one pass.

Files: ``reference.py`` the formula, ``spec.py`` schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU
kernels, ``native.py`` the adapter to ``csrc/add_layer_norm``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.add_layer_norm.spec import SPEC


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    rms: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """sum = residual + row_scale * layer_scale * x, and its LayerNorm, in one pass.

    Equivalent PyTorch: ``s = residual + row_scale[:, None, None] * layer_scale * x;
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s`` (``F.rms_norm`` with ``rms``).

    Args:
        x: (B, ..., C); float32, bfloat16, float16 or float64 (eager).
        residual: shape and dtype of x, or None.
        weight, bias: (C,), the dtype of x or float32, or None.
        eps: added to the variance (mean square with ``rms``).
        layer_scale: (C,), the dtype of x or float32, or None.
        row_scale: (B,) float32, the drop-path factor of each sample (0, or 1 / keep rate), or None. No gradient.
        rms: RMSNorm (no mean) instead of LayerNorm.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (normed, sum), both shaped as x. With no residual and no scale, sum is x itself. Gradients reach x, residual,
        weight, bias, layer_scale, from both outputs.

    Numerics: the sum is rounded to its dtype first; the statistics are those of the rounded sum, in float32.
    Memory: n = elements of x; forward moves 4n (2n without residual and scales), backward 4n (3n when only one
        output's gradient exists); keeps the sum and two float32 per row, and x when layer_scale needs a gradient.
    Raises: ValueError for shapes and dtypes; NotImplementedError with every backend's reason.
    Source: Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467 (RMS); Touvron et al.,
        arXiv:2103.17239 (layer scale); Huang et al., arXiv:1603.09382 (drop path).
    """
    args = SPEC.canonical(x, residual, weight, bias, eps, layer_scale=layer_scale, row_scale=row_scale, rms=rms)
    normed, total = call(SPEC, backend, args)
    plain = residual is None and layer_scale is None and row_scale is None
    return normed, args[0] if plain else total
