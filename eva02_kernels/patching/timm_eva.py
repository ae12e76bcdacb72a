"""timm/models/eva.py: EVA-01, EVA-02 and their CLIP towers, DINOv3, PE, RoPE-ViT, Sapiens2, LingBot (timm 1.0.31)."""

from __future__ import annotations

from timm.models import eva
from torch import Tensor

from . import _read as read
from . import _run as run
from ._blocks import Halves, attention_half, mlp_half
from ._core import Rule, refuse
from .timm_layers import ATTENTION_OPS, Call, attention_reasons, read_attention


class FusedEvaAttention(eva.EvaAttention):
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        why = read.Why()
        spec = read_attention(self, why)
        call = Call(self, x, rope, attn_mask, is_causal)
        if spec is None or not call.fine:
            return eva.EvaAttention.forward(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return run.attention(x, spec, **call.kwargs)


read.ATTENTIONS[eva.EvaAttention] = read.ATTENTIONS[FusedEvaAttention] = read_attention


class FusedEvaBlock(eva.EvaBlock):
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        attn = self.attn
        x = attention_half(
            x,
            self.norm1,
            attn,
            self.gamma_1,
            self.drop_path1,
            Call(attn, x, rope, attn_mask, is_causal),
            lambda normed: attn(normed, rope=rope, attn_mask=attn_mask, is_causal=is_causal),
        )
        return mlp_half(x, self.norm2, self.mlp, self.gamma_2, self.drop_path2)


_halves = Halves(("norm1", "attn", "gamma_1", "drop_path1"), ("norm2", "mlp", "gamma_2", "drop_path2"))

RULES = [
    _halves.rule(eva.EvaBlock, FusedEvaBlock),
    Rule(eva.EvaAttention, FusedEvaAttention, attention_reasons, ATTENTION_OPS),
    refuse(
        eva.EvaBlockPostNorm,
        "post-norm: no projection follows a norm or a residual sum, so its parts are replaced instead",
    ),
]
