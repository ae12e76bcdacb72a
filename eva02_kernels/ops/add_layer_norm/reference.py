from __future__ import annotations

import torch
from torch import Tensor

from eva02_kernels.ops._common import layer_norm_ref, scale_and_add_ref


def rms_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def add_layer_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    total = scale_and_add_ref(x, residual, layer_scale, row_scale)
    return (rms_norm_ref if rms else layer_norm_ref)(total, weight, bias, eps), total
