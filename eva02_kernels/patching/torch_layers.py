"""torch.nn modules that any model may hold: LayerNorm."""

from __future__ import annotations

from torch import Tensor, nn

from . import _read as read
from . import _run as run
from ._core import Rule


class FusedLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        why = read.Why()
        spec = read.norm(self, "norm", why)
        return nn.LayerNorm.forward(self, input) if why else run.norm(input, spec)


def norm_reasons(module: nn.Module) -> list[str]:
    why = read.Why()
    read.norm(module, "norm", why)
    return why.never


read.NORMS[FusedLayerNorm] = False

RULES = [Rule(nn.LayerNorm, FusedLayerNorm, norm_reasons, ("add_layer_norm",))]
