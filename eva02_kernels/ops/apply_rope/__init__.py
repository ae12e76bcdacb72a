"""apply_rope: rotate the patch tokens of one tensor (2-D RoPE); prefix tokens pass through.

Files: ``spec.py`` schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU kernels, ``native.py`` the adapter
to ``csrc/apply_rope``; the formula is ``eva02_kernels.rope.rotate``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.apply_rope.spec import SPEC
from eva02_kernels.rope import RopeTable


def apply_rope(
    x: Tensor,
    rope: RopeTable,
    *,
    num_prefix_tokens: int = 1,
    keep_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rotate each channel pair of the tokens after the prefix by its angle.

    Equivalent PyTorch (interleaved): ``a, b = x[..., 0::2], x[..., 1::2];
    torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)``.

    Args:
        x: (B, S, H, D), last dim contiguous, D a multiple of 4; float32, bfloat16, float16 or float64 (eager).
        rope: table for the patches.
        num_prefix_tokens: tokens at the start that are not rotated.
        keep_idx: (B, K) int32 or int64, which patch each token after the prefix is; S = prefix + K.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, S, H, D). Gradients reach x and the cosines and sines of a dense table.

    Numerics: float32 inside, one rounding.
    Memory: n = elements of x; forward and backward move 2n each; keeps x only when the table needs a gradient.
    Raises: ValueError for shapes, dtypes and indices; NotImplementedError with every backend's reason.
    Source: Su et al., arXiv:2104.09864; EVA-02, arXiv:2303.11331.
    """
    return call(SPEC, backend, SPEC.canonical(x, rope, num_prefix_tokens=num_prefix_tokens, keep_idx=keep_idx))
