"""torch.nn modules that any model may hold: LayerNorm."""

from __future__ import annotations

from torch import nn

from ._core import refuse

LAYER_NORM_REASON = "already one kernel in PyTorch, forward and backward; inside a block it is fused with what follows"
RULES = [refuse(nn.LayerNorm, LAYER_NORM_REASON)]
