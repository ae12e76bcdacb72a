from __future__ import annotations

import torch
from torch import Tensor

from eva02_kernels.ops._common import layer_norm_ref


def hidden_ref(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, not rounded to a 16-bit dtype."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(wide), up.to(wide)
    return g * torch.sigmoid(g) * u


def subln_swiglu_ref(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm_ref(hidden_ref(gate, up), weight, bias, eps).to(gate.dtype)
