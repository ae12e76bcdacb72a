"""swiglu: silu(gate) * up, the activation of a gated feed-forward network.

Files: ``reference.py`` the formula, ``spec.py`` schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU
kernels, ``native.py`` the adapter to ``csrc/swiglu``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.swiglu.spec import SPEC


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up in one pass.

    Equivalent PyTorch: ``F.silu(gate) * up``; packed: ``g, u = gate.chunk(2, -1); F.silu(g) * u``.

    Args:
        gate: (..., F), or (..., 2F) with the gate half first when ``up`` is None; float32, bfloat16, float16 or
            float64 (eager).
        up: (..., F), same dtype and device as ``gate``, or None.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (..., F). Gradients reach gate and up.

    Numerics: float32 inside, one rounding at the store.
    Memory: n = elements of the output; forward moves 3n, backward 5n; keeps gate and up (no copy).
    Raises: ValueError for shapes and dtypes; NotImplementedError with every backend's reason.
    Source: Shazeer, arXiv:2002.05202; EVA-02, arXiv:2303.11331.
    """
    return call(SPEC, backend, SPEC.canonical(gate, up))
