"""Compiled kernels of ``csrc/linear``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import contiguous, empty_like_needed, present, rows_of


def fwd(
    lib: Library,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    lib.linear_fwd(
        rows_of(x),
        weight.contiguous(),
        *contiguous(bias),
        rows_of(residual),
        *contiguous(layer_scale, row_scale),
        out,
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
    grads = empty_like_needed((x, weight, bias, layer_scale), needs)
    dx, *parameters = grads
    lib.linear_bwd(
        rows_of(dout),
        rows_of(x),
        weight.contiguous(),
        *contiguous(bias, layer_scale, row_scale),
        dx,
        *parameters,
    )
    return present(grads)
