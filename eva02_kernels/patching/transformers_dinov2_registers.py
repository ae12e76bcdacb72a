"""transformers' DINOv2 with register tokens."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as hf

from . import _read as read
from . import transformers_layers as shared
from ._blocks import Halves


class FusedDinov2WithRegistersAttention(hf.Dinov2WithRegistersAttention):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        call = shared.Call(self, hidden_states, attention_mask, None, kwargs)
        return shared.run_attention(
            self, hidden_states, call, hf.Dinov2WithRegistersAttention, attention_mask=attention_mask, **kwargs
        )


class FusedDinov2WithRegistersMLP(hf.Dinov2WithRegistersMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return shared.run_mlp(self, hidden_states, hf.Dinov2WithRegistersMLP)


class FusedDinov2WithRegistersSwiGLUFFN(hf.Dinov2WithRegistersSwiGLUFFN):
    def forward(self, x: Tensor) -> Tensor:
        return shared.run_mlp(self, x, hf.Dinov2WithRegistersSwiGLUFFN)


class FusedDinov2WithRegistersLayer(hf.Dinov2WithRegistersLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        call = shared.Call(self.attention, hidden_states, attention_mask, None, kwargs)
        return shared.run_layer(self, hidden_states, call, {"attention_mask": attention_mask, **kwargs})


read.LAYER_SCALES[hf.Dinov2WithRegistersLayerScale] = "lambda1"
read.DROP_PATHS[hf.Dinov2WithRegistersDropPath] = shared.draw
_read_mlp = functools.partial(shared.read_mlp, names=("fc1", "fc2"), act="activation_fn")

RULES = [
    Halves(*shared.HALVES).rule(hf.Dinov2WithRegistersLayer, FusedDinov2WithRegistersLayer),
    shared.attention_rule(hf.Dinov2WithRegistersAttention, FusedDinov2WithRegistersAttention),
    shared.mlp_rule(hf.Dinov2WithRegistersMLP, FusedDinov2WithRegistersMLP, _read_mlp, "gelu_mlp"),
    shared.mlp_rule(
        hf.Dinov2WithRegistersSwiGLUFFN, FusedDinov2WithRegistersSwiGLUFFN, shared.read_gated_mlp, "swiglu_mlp"
    ),
]
