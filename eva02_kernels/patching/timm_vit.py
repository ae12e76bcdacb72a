"""timm/models/vision_transformer.py: the plain ViT family and all that borrow its Block (timm 1.0.31)."""

from __future__ import annotations

from timm.models import vision_transformer as vit
from torch import Tensor

from ._blocks import Halves, attention_half, mlp_half
from ._core import refuse
from .timm_layers import Call


class FusedBlock(vit.Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attn = self.attn
        x = attention_half(
            x,
            self.norm1,
            attn,
            self.ls1,
            self.drop_path1,
            Call(attn, x, None, attn_mask, is_causal),
            lambda normed: attn(normed, attn_mask=attn_mask, is_causal=is_causal),
        )
        return mlp_half(x, self.norm2, self.mlp, self.ls2, self.drop_path2)


_halves = Halves(("norm1", "attn", "ls1", "drop_path1"), ("norm2", "mlp", "ls2", "drop_path2"))

RULES = [
    _halves.rule(vit.Block, FusedBlock),
    refuse(
        vit.ResPostBlock, "post-norm: no projection follows a norm or a residual sum, so its parts are replaced instead"
    ),
    refuse(vit.ParallelThingsBlock, "several attentions summed, then several MLPs: its parts are replaced instead"),
    refuse(vit.ParallelScalingBlock, "attention and MLP share one input projection"),
    refuse(vit.DiffParallelScalingBlock, "attention and MLP share one input projection; differential attention"),
]
