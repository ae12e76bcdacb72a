"""Compiled kernels of ``csrc/subln_swiglu``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import dense_like, empty_stats, num_rows, rows_of


def fwd(
    lib: Library, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, rows = dense_like(gate), num_rows(gate)
    mean, rstd = empty_stats(gate, rows), empty_stats(gate, rows)
    lib.subln_swiglu_fwd(rows_of(gate), rows_of(up), weight.contiguous(), bias.contiguous(), eps, out, mean, rstd)
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
    lib.subln_swiglu_bwd(
        rows_of(dout),
        rows_of(gate),
        rows_of(up),
        weight.contiguous(),
        mean,
        rstd,
        dgate,
        dup,
        dweight,
        dbias,
    )
    return [t for t in grads if t is not None]
