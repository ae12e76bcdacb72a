"""Modules on the fused ops. Constructor arguments are in timm's terms, weights have timm's names and shapes.

| module | op | timm class whose state_dict loads |
|---|---|---|
| Rope2d | rope_2d | - |
| RopeAttention | qkv_rope, rope_attention_packed, linear | EvaAttention |
| SwiGLU, SwiGLUPacked | swiglu_mlp | SwiGLU, GluMlp (SiLU, gate first) |
| Mlp | gelu_mlp | Mlp |
| AddLayerNorm | add_layer_norm | - |
| EvaBlock | all of these | EvaBlock, EvaBlockPostNorm |
"""

from eva02_kernels.nn.attention import RopeAttention
from eva02_kernels.nn.block import EvaBlock, drop_path_scale
from eva02_kernels.nn.mlp import Mlp, SwiGLU, SwiGLUPacked
from eva02_kernels.nn.norm import AddLayerNorm
from eva02_kernels.nn.rope import Rope2d

__all__ = [
    "AddLayerNorm",
    "EvaBlock",
    "Mlp",
    "Rope2d",
    "RopeAttention",
    "SwiGLU",
    "SwiGLUPacked",
    "drop_path_scale",
]
