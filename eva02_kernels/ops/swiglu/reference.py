from __future__ import annotations

import torch
from torch import Tensor


def swiglu_ref(gate: Tensor, up: Tensor | None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(wide), up.to(wide)
    return (g * torch.sigmoid(g) * u).to(gate.dtype)
