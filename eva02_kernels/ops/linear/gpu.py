"""linear on a GPU: the product and its epilogue are a backend's (``ops/_products.py``).

Fused: bias, layer scale, drop path and residual in the epilogue; backward one pass for the scaled gradient and the
column sums, none where nothing scales and no bias trains.
Bytes: forward reads x, W and the residual and writes y once. Backward reads dout (its scaled copy, which is written
once, where there is a scale) and x for the weight's product, dout and W for the input's.
Numerics: float32 sums and epilogue, one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels.ops._common import contiguous, present, rows_2d
from eva02_kernels.ops._products import Kernels, output_gradient, output_parameter_gradients, project


def fwd(
    on: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    layer_scale: Tensor | None, row_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    x2, width = rows_2d(x), weight.shape[0]
    out = torch.empty(x2.shape[0], width, dtype=x.dtype, device=x.device)
    bias, layer_scale, row_scale = contiguous(bias, layer_scale, row_scale)
    residual = None if residual is None else rows_2d(residual)
    project(on, x2, rows_2d(weight), bias, out, layer_scale=layer_scale, row_scale=row_scale, residual=residual)
    return out.view(*x.shape[:-1], width)


def bwd(
    on: Kernels, dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None,
    row_scale: Tensor | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    x2, weight = rows_2d(x), rows_2d(weight)
    bias, layer_scale, row_scale = contiguous(bias, layer_scale, row_scale)
    gradient = output_gradient(on, rows_2d(dout), bias, layer_scale, row_scale, needs[1:])
    dx = None
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        on.multiply(gradient.dy, weight, dx.view(x2.shape))
    return present((dx, *output_parameter_gradients(on, gradient, x2, weight, bias, layer_scale, needs[1:])))
