"""scatter_tokens: put rows back at their tokens, zeros elsewhere; the adjoint of gather_tokens.

Files: ``spec.py``; reference and kernels are those of ``gather_tokens``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.scatter_tokens.spec import SPEC


def scatter_tokens(y: Tensor, idx: Tensor, like: Tensor, *, backend: str = "auto") -> Tensor:
    """A tensor shaped as ``like``: the rows of y at their tokens, duplicates summed, zeros elsewhere.

    Equivalent PyTorch: ``torch.zeros_like(like).scatter_add(1, idx[..., None].expand(-1, -1, C), y)``.

    Args:
        y: (B, K, C), or (M, C) with a flat index; float32, bfloat16, float16 or float64 (eager).
        idx: int32 or int64, (B, K) or flat (M,) of b * S + s; a negative index is padding, its row is left out.
        like: (B, S, C): only its shape is used.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, S, C) in y's dtype. Gradients reach y.

    Numerics: duplicates are summed in float32, in a fixed order.
    Memory: reads y, writes out; keeps idx only.
    Raises: ValueError for shapes and dtypes; RuntimeError on the CPU for an index out of range; NotImplementedError
        with every backend's reason.
    """
    return call(SPEC, backend, SPEC.canonical(y, idx, like))
