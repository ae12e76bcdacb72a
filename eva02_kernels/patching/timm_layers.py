"""timm.layers: norms, MLPs and attention, and how timm spells rotary tables (timm 1.0.31)."""

from __future__ import annotations

from typing import Any

import torch
from timm import layers as tl
from torch import Tensor, nn

from eva02_kernels import RopeTable

from . import _read as read
from . import _run as run
from ._core import Rule, refuse
from .torch_layers import LAYER_NORM_REASON

# ---- small things ---------------------------------------------------------------------------------------------------
read.ACTIVATIONS[tl.GELU] = lambda m: "gelu"
read.LAYER_SCALES[tl.LayerScale] = "gamma"


def _draw(module: tl.DropPath, x: Tensor) -> Tensor | None:
    if not module.training or module.drop_prob == 0.0:
        return None
    return run.drop_path_factors(x, module.drop_prob, module.scale_by_keep)


read.DROP_PATHS[tl.DropPath] = _draw


# ---- norms ----------------------------------------------------------------------------------------------------------
class FusedTimmRmsNorm(tl.RmsNorm):
    def forward(self, x: Tensor) -> Tensor:
        why = read.Why()
        spec = read.norm(self, "norm", why)
        return tl.RmsNorm.forward(self, x) if why or spec is None else run.norm(x, spec)


class FusedTimmRmsNormFp32(tl.RmsNormFp32):
    def forward(self, x: Tensor) -> Tensor:
        why = read.Why()
        spec = read.norm(self, "norm", why)
        return tl.RmsNormFp32.forward(self, x) if why or spec is None else run.norm(x, spec)


def _norm_reasons(module: nn.Module) -> list[str]:
    why = read.Why()
    read.norm(module, "norm", why)
    return why.never


read.NORMS.update({tl.LayerNorm: False, tl.LayerNormFp32: False})
read.NORMS.update(dict.fromkeys((tl.RmsNorm, FusedTimmRmsNorm, tl.RmsNormFp32, FusedTimmRmsNormFp32), True))


# ---- MLPs -----------------------------------------------------------------------------------------------------------
def _read_mlp(module: tl.Mlp, why: read.Why) -> read.Mlp | None:
    read.activation(module.act, "act", "gelu", why)
    if not read.identity(module.norm, "norm", why):
        why.never.append(f"norm inside a GELU MLP ({read.kind(module.norm)})")
    return _finish(module, why, (module.fc1, "fc1"), None, None)


def _read_glu_mlp(module: tl.GluMlp, why: read.Why) -> read.Mlp | None:
    read.activation(module.act, "act", "silu", why)
    if module.gate_last:
        why.never.append("the gate is the second half of fc1 (gate_last=True)")
    if module.chunk_dim != -1:
        why.never.append("use_conv=True")
    return _finish(module, why, (module.fc1, "fc1"), None, _subln(module.norm, why))


def _read_swiglu(module: tl.SwiGLU, why: read.Why) -> read.Mlp | None:
    read.activation(module.act, "act", "silu", why)
    return _finish(module, why, (module.fc1_g, "fc1_g"), (module.fc1_x, "fc1_x"), _subln(module.norm, why))


def _subln(module: nn.Module, why: read.Why) -> read.Norm | None:
    norm = read.optional_norm(module, "norm", why)
    if norm is not None and norm.rms:
        why.never.append("RMS norm inside a SwiGLU MLP")
    elif norm is not None and norm.weight is None:
        why.never.append("norm without weight inside a SwiGLU MLP")
    return norm


def _finish(
    module: Any, why: read.Why, first: tuple[Any, str], up: tuple[Any, str] | None, norm: read.Norm | None
) -> read.Mlp | None:
    read.dropout(module.drop1, "drop1", why)
    read.dropout(module.drop2, "drop2", why)
    fine = [read.linear(m, name, why) for m, name in filter(None, (first, up, (module.fc2, "fc2")))]
    if why or not all(fine):
        return None
    up_weight, up_bias = (None, None) if up is None else (up[0].weight, up[0].bias)
    w1, b1 = first[0].weight, first[0].bias
    gated = not isinstance(module, tl.Mlp)
    return read.Mlp(gated, w1, b1, up_weight, up_bias, module.fc2.weight, module.fc2.bias, norm)


def _mlp_reasons(module: nn.Module) -> list[str]:
    why = read.Why()
    read.mlp(module, "mlp", why)
    return why.never


def _run_mlp(module: nn.Module, x: Tensor, original: Any) -> Tensor:
    why = read.Why()
    spec = read.MLPS[original](module, why)
    return original.forward(module, x) if spec is None else run.mlp(x, spec)


class FusedMlp(tl.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return _run_mlp(self, x, tl.Mlp)


class FusedGluMlp(tl.GluMlp):
    def forward(self, x: Tensor) -> Tensor:
        return _run_mlp(self, x, tl.GluMlp)


class FusedSwiGLU(tl.SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return _run_mlp(self, x, tl.SwiGLU)


for _reader, *_classes in (
    (_read_mlp, tl.Mlp, FusedMlp),
    (_read_glu_mlp, tl.GluMlp, FusedGluMlp),
    (_read_swiglu, tl.SwiGLU, FusedSwiGLU),
):
    read.MLPS.update(dict.fromkeys(_classes, _reader))


# ---- attention ------------------------------------------------------------------------------------------------------
def read_attention(module: Any, why: read.Why) -> read.Attention | None:
    """timm's Attention, AttentionRope and EvaAttention, which differ in their projections only."""
    fused = module.qkv is not None
    linears = [(module.qkv, "qkv")] if fused else [(getattr(module, n), n) for n in ("q_proj", "k_proj", "v_proj")]
    linears.append((module.proj, "proj"))
    gate = getattr(module, "gate", None)
    if gate is not None:
        linears.append((gate, "gate"))
    fine = [read.linear(m, name, why) for m, name in linears]
    q_norm = read.optional_norm(module.q_norm, "q_norm", why)
    k_norm = read.optional_norm(module.k_norm, "k_norm", why)
    inner_norm = read.optional_norm(module.norm, "norm", why)
    read.dropout(module.attn_drop, "attn_drop", why)
    read.dropout(module.proj_drop, "proj_drop", why)
    read.head_dim(module.head_dim, why)
    if why or not all(fine):
        return None
    if fused:
        weight, bias = module.qkv.weight, module.qkv.bias
        if getattr(module, "q_bias", None) is not None:
            bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    else:
        weight = (module.q_proj.weight, module.k_proj.weight, module.v_proj.weight)
        bias = (module.q_proj.bias, module.k_proj.bias, module.v_proj.bias)
    return read.Attention(
        weight,
        bias,
        module.proj.weight,
        module.proj.bias,
        module.num_heads,
        getattr(module, "num_kv_heads", module.num_heads),
        None if module.fused_attn else module.scale,  # timm's SDPA call uses 1 / sqrt(head dim)
        q_norm,
        k_norm,
        inner_norm,
        gate,
    )


def attention_reasons(module: nn.Module) -> list[str]:
    why = read.Why()
    read.attention(module, "attn", why)
    return why.never


def key_padding_mask(attn_mask: Tensor | None, x: Tensor) -> tuple[bool, Tensor | None]:
    """(whether our attention can apply the mask, the (B, S) mask): boolean, the same for every head and query."""
    if attn_mask is None:
        return True, None
    if attn_mask.dtype != torch.bool or attn_mask.dim() != 4 or attn_mask.shape[1:3] != (1, 1):
        return False, None
    return True, attn_mask[:, 0, 0].expand(x.shape[0], -1)


_tables = run.TableCache()


def _make_table(rope: Tensor, head_dim: int, layout: str) -> RopeTable:
    sin, cos = rope.chunk(2, dim=-1)
    return run.table_from_cos_sin(cos, sin, head_dim, layout)


def rope_table(rope: Tensor | None, module: nn.Module) -> tuple[bool, RopeTable | None]:
    """(whether it can be applied, the table) of timm's concatenated (.., P, 2D) sin | cos."""
    if rope is None:
        return True, None
    head_dim = getattr(module, "head_dim", 0)
    if not isinstance(rope, Tensor) or not 2 <= rope.dim() <= 4 or rope.shape[-1] != 2 * head_dim:
        return False, None
    layout = "half" if getattr(module, "rotate_half", False) else "interleaved"
    return True, _tables.get(rope, _make_table, head_dim, layout)


class Call:
    """The arguments of one attention call in our terms; ``fine`` is False if it needs the original code."""

    def __init__(self, module: Any, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool):
        can_mask, mask = key_padding_mask(attn_mask, x)
        can_rotate, table = rope_table(rope, module)
        self.fine = can_mask and can_rotate and not (is_causal and attn_mask is not None)
        self.kwargs: dict[str, Any] = {
            "table": table,
            "num_prefix_tokens": 0 if table is None else module.num_prefix_tokens,
            "key_padding_mask": mask,
            "causal": is_causal,
        }


class FusedAttention(tl.Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        why = read.Why()
        spec = read_attention(self, why)
        call = Call(self, x, None, attn_mask, is_causal)
        if spec is None or not call.fine:
            return tl.Attention.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        return run.attention(x, spec, **call.kwargs)


class FusedAttentionRope(tl.AttentionRope):
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        why = read.Why()
        spec = read_attention(self, why)
        call = Call(self, x, rope, attn_mask, is_causal)
        if spec is None or not call.fine:
            return tl.AttentionRope.forward(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return run.attention(x, spec, **call.kwargs)


for _class in (tl.Attention, FusedAttention, tl.AttentionRope, FusedAttentionRope):
    read.ATTENTIONS[_class] = read_attention


ATTENTION_OPS = ("qkv_rope", "rope_attention", "linear")
RULES = [
    refuse(tl.LayerNorm, LAYER_NORM_REASON),
    refuse(tl.LayerNormFp32, LAYER_NORM_REASON),
    Rule(tl.RmsNorm, FusedTimmRmsNorm, _norm_reasons, ("add_layer_norm",)),
    Rule(tl.RmsNormFp32, FusedTimmRmsNormFp32, _norm_reasons, ("add_layer_norm",)),
    Rule(tl.Mlp, FusedMlp, _mlp_reasons, ("gelu_mlp",)),
    Rule(tl.GluMlp, FusedGluMlp, _mlp_reasons, ("swiglu_mlp",)),
    Rule(tl.SwiGLU, FusedSwiGLU, _mlp_reasons, ("swiglu_mlp",)),
    Rule(tl.Attention, FusedAttention, attention_reasons, ATTENTION_OPS),
    Rule(tl.AttentionRope, FusedAttentionRope, attention_reasons, ATTENTION_OPS),
    refuse(tl.DiffAttention, "attention is the difference of two softmax maps"),
    refuse(tl.AttentionPoolLatent, "cross-attention of a few latent queries to all tokens"),
    refuse(tl.AttentionPoolPrr, "attention without projections, used once"),
]
