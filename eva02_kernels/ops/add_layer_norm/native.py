"""Compiled kernels of ``csrc/add_layer_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import contiguous, dense_like, empty_stats, num_rows, rows_of


def _rows_per_sample(rows: int, row_scale: Tensor | None) -> int:
    return max(1, rows if row_scale is None else rows // max(1, row_scale.shape[0]))


def fwd(
    lib: Library,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = num_rows(x)
    adds = residual is not None or layer_scale is not None or row_scale is not None
    normed = dense_like(x)
    total = torch.empty(x.shape if adds else 0, dtype=x.dtype, device=x.device)
    mean, rstd = empty_stats(x, 0 if rms else rows), empty_stats(x, rows)
    lib.add_layer_norm_fwd(
        rows_of(x),
        rows_of(residual),
        *contiguous(weight, bias),
        eps,
        *contiguous(layer_scale, row_scale),
        rms,
        _rows_per_sample(rows, row_scale),
        normed,
        total if adds else None,
        None if rms else mean,
        rstd,
    )
    return normed, total, mean, rstd


def bwd(
    lib: Library,
    dnormed: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    rms: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    needs_x, needs_residual, needs_weight, needs_bias, needs_scale = needs

    def like(t: Tensor | None, need: bool) -> Tensor | None:
        return dense_like(t) if need and t is not None else None

    dx = like(total, needs_x)
    # Without scales dx equals dresidual: the kernel writes one and the other is a copy only if both are asked for.
    same = layer_scale is None and row_scale is None
    dresidual = None if same and needs_x else like(total, needs_residual)
    dweight, dbias, dscale = like(weight, needs_weight), like(bias, needs_bias), like(layer_scale, needs_scale)
    lib.add_layer_norm_bwd(
        rows_of(dnormed),
        rows_of(dsum),
        rows_of(total),
        *contiguous(weight),
        None if rms else mean,
        rstd,
        rows_of(x),
        *contiguous(layer_scale, row_scale),
        rms,
        _rows_per_sample(num_rows(total), row_scale),
        dx,
        dresidual,
        dweight,
        dbias,
        dscale,
    )
    if same and needs_x and needs_residual:
        assert dx is not None
        dresidual = dx.clone()
    return [t for t in (dx, dresidual, dweight, dbias, dscale) if t is not None]
