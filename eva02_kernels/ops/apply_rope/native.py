"""Compiled kernels of ``csrc/apply_rope``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import contiguous, dense_like, last_dense


def rotate(lib: Library, x: Tensor, rope: tuple[Any, ...], *, inverse: bool, out: Tensor | None = None) -> Tensor:
    """x (B, S, H, D) rotated, or rotated back; ``out`` may be x itself."""
    out = dense_like(x) if out is None else out
    lib.apply_rope_fwd(last_dense(x), *contiguous(*rope[:2]), *rope[2:], inverse, out)
    return out


def table_gradients(lib: Library, dout: Tensor, x: Tensor, rope: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Gradients of a dense table's cosines and sines, given the unrotated x."""
    dcos, dsin = (dense_like(t) for t in rope[:2])
    lib.apply_rope_table_grad(last_dense(dout), last_dense(x), *contiguous(*rope[:2]), *rope[2:], dcos, dsin)
    return dcos, dsin


def fwd(lib: Library, x: Tensor, *rope: Any) -> Tensor:
    return rotate(lib, x, rope, inverse=False)


def bwd(lib: Library, dout: Tensor, x: Tensor | None, *args: Any) -> list[Tensor]:
    *rope, (needs_x, needs_cos, needs_sin) = args
    grads = [rotate(lib, dout, tuple(rope), inverse=True)] if needs_x else []
    if needs_cos or needs_sin:
        assert x is not None
        dcos, dsin = table_gradients(lib, dout, x, tuple(rope))
        grads += [dcos] * needs_cos + [dsin] * needs_sin
    return grads
