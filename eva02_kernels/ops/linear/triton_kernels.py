"""Triton kernels of linear: the product and its epilogue are ``ops/_triton_gemm.py``.

Fused: bias, layer scale, drop path and residual in the epilogue; backward one pass for the scaled gradient and the
column sums, none where nothing scales and no bias trains.
Bytes: forward reads x, W and the residual and writes y once. Backward reads dout (its scaled copy, which is written
once, where there is a scale) and x for the weight's product, dout and W for the input's.
Launch: see ``_triton_gemm``; backward's products are torch.mm. Numerics: float32 sums and epilogue, one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels.ops._common import contiguous, present, rows_2d
from eva02_kernels.ops._triton_gemm import multiply, output_gradient, output_parameter_gradients, project


def fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, layer_scale: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    x2, width = rows_2d(x), weight.shape[0]
    out = torch.empty(x2.shape[0], width, dtype=x.dtype, device=x.device)
    bias, layer_scale, row_scale = contiguous(bias, layer_scale, row_scale)
    residual = None if residual is None else rows_2d(residual)
    project(x2, rows_2d(weight), bias, out, layer_scale=layer_scale, row_scale=row_scale, residual=residual)
    return out.view(*x.shape[:-1], width)


def bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None,
    row_scale: Tensor | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    x2, weight = rows_2d(x), rows_2d(weight)
    bias, layer_scale, row_scale = contiguous(bias, layer_scale, row_scale)
    gradient = output_gradient(rows_2d(dout), bias, layer_scale, row_scale, needs[1:])
    dx = None
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        multiply(gradient.dy, weight, dx.view(x2.shape))
    return present((dx, *output_parameter_gradients(gradient, x2, weight, bias, layer_scale, needs[1:])))
