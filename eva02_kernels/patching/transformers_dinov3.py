"""transformers' DINOv3 ViT."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.models.dinov3_vit import modeling_dinov3_vit as hf

from . import _read as read
from . import transformers_layers as shared
from ._blocks import Halves


class FusedDINOv3ViTAttention(hf.DINOv3ViTAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        call = shared.Call(self, hidden_states, attention_mask, position_embeddings, kwargs)
        return shared.run_attention(
            self,
            hidden_states,
            call,
            hf.DINOv3ViTAttention,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )


class FusedDINOv3ViTMLP(hf.DINOv3ViTMLP):
    def forward(self, x: Tensor) -> Tensor:
        return shared.run_mlp(self, x, hf.DINOv3ViTMLP)


class FusedDINOv3ViTGatedMLP(hf.DINOv3ViTGatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return shared.run_mlp(self, x, hf.DINOv3ViTGatedMLP)


class FusedDINOv3ViTLayer(hf.DINOv3ViTLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        call = shared.Call(self.attention, hidden_states, attention_mask, position_embeddings, kwargs)
        arguments = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
        return shared.run_layer(self, hidden_states, call, arguments)


read.LAYER_SCALES[hf.DINOv3ViTLayerScale] = "lambda1"
read.DROP_PATHS[hf.Dinov3ViTDropPath] = shared.draw
_read_mlp = functools.partial(shared.read_mlp, names=("up_proj", "down_proj"), act="act_fn")

RULES = [
    Halves(*shared.HALVES).rule(hf.DINOv3ViTLayer, FusedDINOv3ViTLayer),
    shared.attention_rule(hf.DINOv3ViTAttention, FusedDINOv3ViTAttention),
    shared.mlp_rule(hf.DINOv3ViTMLP, FusedDINOv3ViTMLP, _read_mlp, "gelu_mlp"),
    shared.mlp_rule(hf.DINOv3ViTGatedMLP, FusedDINOv3ViTGatedMLP, shared.read_gated_mlp, "swiglu_mlp"),
]
