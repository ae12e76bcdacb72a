"""linear: x W^T + b with layer scale, drop path and the residual in the epilogue (the attention output projection).

Files: ``spec.py`` formula, schema, autograd, samples and bytes, ``gpu.py`` its steps on a GPU, ``native.py`` the
adapter to ``csrc/linear``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.linear.spec import SPEC


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + row_scale * layer_scale * (x W^T + b).

    Equivalent PyTorch: ``residual + row_scale[:, None, None] * layer_scale * F.linear(x, weight, bias)``.

    Args:
        x: (B, ..., K); float32, bfloat16, float16 or float64 (eager).
        weight: (N, K), dtype of x. bias: (N,), dtype of x or float32, or None.
        residual: (B, ..., N), dtype of x, or None.
        layer_scale: (N,), dtype of x or float32, or None.
        row_scale: (B,) float32, the drop-path factor of each sample, or None. No gradient.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, ..., N). Gradients reach x, weight, bias, residual (the incoming gradient itself), layer_scale.

    Numerics: float32 accumulation, one rounding at the store.
    Memory: reads x, weight and residual, writes out; keeps x (no copy); the gradient of layer_scale comes from that
        of weight, so the product is not kept.
    Raises: ValueError for shapes and dtypes; NotImplementedError with every backend's reason.
    """
    return call(SPEC, backend, SPEC.canonical(x, weight, bias, residual, layer_scale=layer_scale, row_scale=row_scale))
