"""Compiled kernels of ``csrc/subln_swiglu``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import dense_like, empty_stats, rows_2d


def fwd(
    lib: Library, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    g, u = rows_2d(gate), rows_2d(up)
    out = dense_like(gate)
    mean, rstd = empty_stats(gate, g.shape[0]), empty_stats(gate, g.shape[0])
    lib.subln_swiglu_fwd(g, u, weight.contiguous(), bias.contiguous(), eps, out.view(g.shape), mean, rstd)
    return out, mean, rstd


def bwd(
    lib: Library,
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    grads = [dense_like(t) if need else None for t, need in zip((gate, up, weight, bias), needs, strict=True)]
    dgate, dup, dweight, dbias = grads
    g, u = rows_2d(gate), rows_2d(up)
    lib.subln_swiglu_bwd(
        rows_2d(dout),
        g,
        u,
        weight.contiguous(),
        mean,
        rstd,
        None if dgate is None else dgate.view(g.shape),
        None if dup is None else dup.view(g.shape),
        dweight,
        dbias,
    )
    return [t for t in grads if t is not None]
