"""Fused kernels for vision transformers: 2-D RoPE attention, SwiGLU, sub-LayerNorm, masked-token gather.

Every function is a PyTorch operator with autograd; ``python -m eva02_kernels.info`` tells which backend runs here.
Importing this package starts no device context and needs no compiler.
"""

from eva02_kernels._native import empty_cache
from eva02_kernels._registry import Selection, reset_stats, select, stats, strict
from eva02_kernels.ops.add_layer_norm import add_layer_norm
from eva02_kernels.ops.apply_rope import apply_rope
from eva02_kernels.ops.clip_loss import clip_loss
from eva02_kernels.ops.gather_layer_norm import gather_layer_norm
from eva02_kernels.ops.gather_tokens import gather_tokens, ragged_index
from eva02_kernels.ops.gelu_mlp import gelu_mlp
from eva02_kernels.ops.linear import linear
from eva02_kernels.ops.mask_tokens import mask_tokens
from eva02_kernels.ops.masked_cosine_loss import masked_cosine_loss
from eva02_kernels.ops.qkv_rope import qkv_rope
from eva02_kernels.ops.rope_attention import rope_attention
from eva02_kernels.ops.rope_attention_packed import rope_attention_packed
from eva02_kernels.ops.scatter_tokens import scatter_tokens
from eva02_kernels.ops.subln_swiglu import subln_swiglu
from eva02_kernels.ops.swiglu import swiglu
from eva02_kernels.ops.swiglu_mlp import swiglu_mlp
from eva02_kernels.patching import PatchReport, Rule, patch, unpatch
from eva02_kernels.rope import RopeTable, rope_2d

# After the operators, which it is made of.
from eva02_kernels import nn  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "PatchReport",
    "RopeTable",
    "Rule",
    "Selection",
    "add_layer_norm",
    "apply_rope",
    "clip_loss",
    "empty_cache",
    "gather_layer_norm",
    "gather_tokens",
    "gelu_mlp",
    "linear",
    "mask_tokens",
    "masked_cosine_loss",
    "nn",
    "patch",
    "qkv_rope",
    "ragged_index",
    "reset_stats",
    "rope_2d",
    "rope_attention",
    "rope_attention_packed",
    "scatter_tokens",
    "select",
    "stats",
    "strict",
    "subln_swiglu",
    "swiglu",
    "swiglu_mlp",
    "unpatch",
]
