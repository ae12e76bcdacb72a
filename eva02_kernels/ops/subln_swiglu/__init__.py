"""subln_swiglu: LayerNorm of silu(gate) * up, the normalised hidden layer of EVA-02 B and L.

Files: ``reference.py`` the formula, ``spec.py`` schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU
kernels, ``native.py`` the adapter to ``csrc/subln_swiglu``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.subln_swiglu.spec import SPEC


def subln_swiglu(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm(silu(gate) * up) in one pass.

    Equivalent PyTorch: ``F.layer_norm(F.silu(gate) * up, (F,), weight, bias, eps)``.

    Args:
        gate, up: (..., F), same dtype; float32, bfloat16, float16 or float64 (eager).
        weight, bias: (F,), the dtype of gate or float32.
        eps: added to the variance.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (..., F) in gate's dtype. Gradients reach gate, up, weight, bias.

    Numerics: the product stays float32 until it is normalised; one rounding at the store.
    Memory: n = elements of gate; forward moves 3n, backward 5n; keeps gate, up and two float32 per row.
    Raises: ValueError for shapes and dtypes; NotImplementedError with every backend's reason.
    Source: EVA-02, arXiv:2303.11331 (sub-LN: Wang et al., arXiv:2210.06423).
    """
    return call(SPEC, backend, SPEC.canonical(gate, up, weight, bias, eps))
