"""masked_cosine_loss: mean negative cosine similarity of predictions and selected teacher features.

Files: ``spec.py`` formula, schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU kernels, ``native.py``
the adapter to ``csrc/masked_cosine_loss``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.masked_cosine_loss.spec import SPEC


def masked_cosine_loss(pred: Tensor, target: Tensor, idx: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """-mean(cos(pred[m], target[idx[m]])), the MIM loss of EVA.

    Equivalent PyTorch: ``-F.cosine_similarity(pred.float(), target.flatten(0, -2)[idx].float(), -1, 1e-8).mean()``.

    Args:
        pred: (..., D), M rows in all; float32, bfloat16, float16 or float64 (eager).
        target: (..., D), same dtype; M rows, or T rows from which idx picks.
        idx: M int32 or int64 rows of target (flat b * S + s), or None. A negative index is padding: its row does not
            count.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        The loss, a float32 scalar (float64 for float64); 0, with zero gradients, when no row counts. Gradients reach
        pred and target.

    Numerics: norms and dot products in float32; norms are at least 1e-8 (constant there).
    Memory: reads both once per direction; keeps them (no copy), idx and three float32 per row.
    Raises: ValueError for shapes and dtypes; RuntimeError on the CPU for an index out of range; NotImplementedError
        with every backend's reason.
    Source: EVA, arXiv:2211.07636; EVA-02, arXiv:2303.11331.
    """
    return call(SPEC, backend, SPEC.canonical(pred, target, idx))
