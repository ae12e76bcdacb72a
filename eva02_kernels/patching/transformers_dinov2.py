"""transformers' DINOv2."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.models.dinov2 import modeling_dinov2 as hf

from . import _read as read
from . import transformers_layers as shared
from ._blocks import Halves


class FusedDinov2Attention(hf.Dinov2Attention):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        call = shared.Call(self, hidden_states, attention_mask, None, kwargs)
        return shared.run_attention(
            self, hidden_states, call, hf.Dinov2Attention, attention_mask=attention_mask, **kwargs
        )


class FusedDinov2MLP(hf.Dinov2MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return shared.run_mlp(self, hidden_states, hf.Dinov2MLP)


class FusedDinov2SwiGLUFFN(hf.Dinov2SwiGLUFFN):
    def forward(self, x: Tensor) -> Tensor:
        return shared.run_mlp(self, x, hf.Dinov2SwiGLUFFN)


class FusedDinov2Layer(hf.Dinov2Layer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        call = shared.Call(self.attention, hidden_states, attention_mask, None, kwargs)
        return shared.run_layer(self, hidden_states, call, {"attention_mask": attention_mask, **kwargs})


read.LAYER_SCALES[hf.Dinov2LayerScale] = "lambda1"
read.DROP_PATHS[hf.Dinov2DropPath] = shared.draw
_read_mlp = functools.partial(shared.read_mlp, names=("fc1", "fc2"), act="activation_fn")

RULES = [
    Halves(*shared.HALVES).rule(hf.Dinov2Layer, FusedDinov2Layer),
    shared.attention_rule(hf.Dinov2Attention, FusedDinov2Attention),
    shared.mlp_rule(hf.Dinov2MLP, FusedDinov2MLP, _read_mlp, "gelu_mlp"),
    shared.mlp_rule(hf.Dinov2SwiGLUFFN, FusedDinov2SwiGLUFFN, shared.read_gated_mlp, "swiglu_mlp"),
]
