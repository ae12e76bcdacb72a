"""Compiled kernels of ``csrc/linear``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import contiguous, empty_like_needed, present, rows_2d


def fwd(
    lib: Library,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    x2 = rows_2d(x)
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    lib.linear_fwd(
        x2,
        rows_2d(weight),
        *contiguous(bias),
        None if residual is None else rows_2d(residual),
        *contiguous(layer_scale, row_scale),
        out.view(x2.shape[0], -1) if out.numel() else out.new_empty(x2.shape[0], weight.shape[0]),
    )
    return out


def bwd(
    lib: Library,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    x2 = rows_2d(x)
    grads = empty_like_needed((x, weight, bias, layer_scale), needs)
    dx, *parameters = grads
    lib.linear_bwd(
        rows_2d(dout),
        x2,
        rows_2d(weight),
        *contiguous(bias, layer_scale, row_scale),
        None if dx is None else dx.view(x2.shape),
        *parameters,
    )
    return present(grads)
