"""gather_layer_norm: the final LayerNorm on the selected tokens only.

Files: ``spec.py`` formula, schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU kernels, ``native.py``
the adapter to ``csrc/gather_layer_norm``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.gather_layer_norm.spec import SPEC


def gather_layer_norm(
    x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm of the tokens that idx picks.

    Equivalent PyTorch: ``F.layer_norm(gather_tokens(x, idx), (C,), weight, bias, eps)``.

    Args:
        x: (B, S, C); float32, bfloat16, float16 or float64 (eager).
        idx: int32 or int64, (B, K) or flat (M,) of b * S + s. Duplicates are allowed; a negative index is padding:
            its row is zero and gives no gradient.
        weight, bias: (C,), the dtype of x or float32.
        eps: added to the variance.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, K, C) or (M, C). Gradients reach x, weight, bias.

    Numerics: statistics in float32, one rounding; gradients of duplicates are summed in a fixed order.
    Memory: reads and writes the selected rows only; keeps x (no copy), idx and two float32 per row.
    Raises: ValueError for shapes and dtypes; RuntimeError on the CPU for an index out of range; NotImplementedError
        with every backend's reason.
    """
    return call(SPEC, backend, SPEC.canonical(x, idx, weight, bias, eps))
