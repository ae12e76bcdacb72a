"""What fused modules run: attention, MLP and norm of a reading, on our operators."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eva02_kernels import (
    RopeTable,
    add_layer_norm,
    gelu_mlp,
    linear,
    qkv_rope,
    rope_attention,
    swiglu_mlp,
)
from eva02_kernels.nn.attention import projected_attention

from . import _read as read


def norm(x: Tensor, spec: read.Norm) -> Tensor:
    return add_layer_norm(x, None, spec.weight, spec.bias, spec.eps, rms=spec.rms)[0]


def _pre_norm(x: Tensor, pre: read.Norm | None, *, apart: bool = False) -> tuple[Tensor, tuple | None]:
    """The norm before a projection: inside the projection's operator if that has it, else run here."""
    if pre is None:
        return x, None
    if pre.rms or apart:
        return norm(x, pre), None
    return x, (pre.weight, pre.bias, pre.eps)


def attention(
    x: Tensor,
    spec: read.Attention,
    *,
    pre: read.Norm | None = None,
    table: RopeTable | None = None,
    num_prefix_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """residual + row_scale * layer_scale * proj(attention(pre(x)))."""
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    x, pre_norm = _pre_norm(x, pre, apart=spec.gate is not None)
    normed_heads = spec.q_norm is not None or spec.k_norm is not None
    projection: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "pre_norm": pre_norm}
    masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "causal": causal, "scale": spec.scale}
    out: Any
    if not (normed_heads or (table is not None and table.cos.dim() == 4)):
        out = projected_attention(
            x, spec.weight, spec.bias, table, num_prefix_tokens=num_prefix_tokens, **projection, **masks
        )
    else:
        qkv = qkv_rope(x, spec.weight, spec.bias, **projection)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
        weights: dict[str, Any] = {}
        if spec.q_norm is not None and spec.k_norm is not None and _same_rms(spec.q_norm, spec.k_norm):
            weights = {"q_norm": spec.q_norm.weight, "k_norm": spec.k_norm.weight, "norm_eps": spec.q_norm.eps}
        else:
            q = q if spec.q_norm is None else norm(q, spec.q_norm)
            k = k if spec.k_norm is None else norm(k, spec.k_norm)
        if table is not None and table.cos.dim() == 4:
            out = _per_sample_and_head(q, k, v, table, num_prefix_tokens, {**masks, **weights})
        else:
            out = rope_attention(q, k, v, table, num_prefix_tokens=num_prefix_tokens, **masks, **weights)
    out = out.flatten(2)
    if spec.inner_norm is not None:
        out = norm(out, spec.inner_norm)
    if spec.gate is not None:
        out = out * linear(x, spec.gate.weight, spec.gate.bias).sigmoid()
    return linear(
        out, spec.proj_weight, spec.proj_bias, residual=residual, layer_scale=layer_scale, row_scale=row_scale
    )


def _same_rms(q_norm: read.Norm, k_norm: read.Norm) -> bool:
    """Whether attention can do both head norms itself: RMS, with weights, one eps."""
    if not (q_norm.rms and k_norm.rms):
        return False
    return q_norm.weight is not None and k_norm.weight is not None and q_norm.eps == k_norm.eps


def _per_sample_and_head(
    q: Tensor, k: Tensor, v: Tensor, table: RopeTable, num_prefix_tokens: int, kwargs: dict
) -> Tensor:
    """Attention with a (B, H, P, D/2) table (learned frequencies under patch dropout): heads become samples."""
    batch, seqlen, heads, _ = q.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1).unsqueeze(2) for t in (q, k, v))
    folded = RopeTable.from_cos_sin(table.cos.flatten(0, 1), table.sin.flatten(0, 1), table.layout, per="batch")
    if kwargs["key_padding_mask"] is not None:
        kwargs["key_padding_mask"] = kwargs["key_padding_mask"].repeat_interleave(heads, dim=0)
    out: Any = rope_attention(q, k, v, folded, num_prefix_tokens=num_prefix_tokens, **kwargs)
    return out.view(batch, heads, seqlen, -1).transpose(1, 2)


def mlp(
    x: Tensor,
    spec: read.Mlp,
    *,
    pre: read.Norm | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """residual + row_scale * layer_scale * mlp(pre(x))."""
    x, pre_norm = _pre_norm(x, pre)
    branch: dict[str, Any] = {
        "pre_norm": pre_norm,
        "residual": residual,
        "layer_scale": layer_scale,
        "row_scale": row_scale,
    }
    if not spec.gated:
        return gelu_mlp(x, spec.w1, spec.b1, spec.w2, spec.b2, **branch)
    weight, bias, eps = (None, None, 1e-6) if spec.norm is None else spec.norm[1:]
    return swiglu_mlp(x, spec.w1, spec.b1, spec.w_up, spec.b_up, spec.w2, spec.b2, weight, bias, eps, **branch)


def drop_path_factors(x: Tensor, drop_prob: float, scale_by_keep: bool = True) -> Tensor:
    """(B,) factors 0 or 1/keep, from the same draw as timm's drop_path."""
    keep = 1.0 - drop_prob
    factors = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).flatten().float()
    return factors / keep if keep > 0.0 and scale_by_keep else factors


def residual_add(x: Tensor, branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """x + row_scale * layer_scale * branch, for a branch that no operator could finish."""
    if layer_scale is not None:
        branch = branch * layer_scale
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype).view(-1, *(1,) * (branch.dim() - 1))
    return x + branch


def table_from_cos_sin(cos: Tensor, sin: Tensor, head_dim: int, layout: str) -> RopeTable:
    """A dense table from (P, D), (H, P, D) or (B, 1|H, P, D) cosines and sines that hold every angle twice.

    The first copy is taken: ``interleaved`` tables repeat each value, ``half`` ones the whole row.
    """
    pick = (..., slice(None, None, 2)) if layout == "interleaved" else (..., slice(None, head_dim // 2))
    cos, sin = (t[pick].float() if t.dtype != torch.float64 else t[pick] for t in (cos, sin))
    while cos.dim() > 2 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    if cos.dim() == 4 and cos.shape[1] > 1:
        return RopeTable(cos, sin, layout)  # per sample and head: see _per_sample_and_head
    if cos.dim() == 4:
        return RopeTable.from_cos_sin(cos[:, 0].contiguous(), sin[:, 0].contiguous(), layout, per="batch")
    return RopeTable.from_cos_sin(cos.contiguous(), sin.contiguous(), layout)


class TableCache:
    """The last table made, so that the blocks of a model share one instead of slicing the same tensor each.

    Only for a tensor that no gradient flows through, and in eager mode: a compiled graph finds the common part itself.
    """

    def __init__(self) -> None:
        self._entry: tuple | None = None

    def get(self, source: Tensor, make: Callable[[Tensor, int, str], RopeTable], head_dim: int, layout: str):
        """``make(source, head_dim, layout)``, or what it gave for the same unchanged ``source`` before."""
        if (
            torch.compiler.is_compiling()
            or type(source) not in (Tensor, torch.nn.Buffer)
            or source.requires_grad
            or source.is_inference()
            or torch.is_inference_mode_enabled()
            or (source.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return make(source, head_dim, layout)
        stream = torch.cuda.current_stream(source.device) if source.is_cuda else None
        tag = (source.data_ptr(), source._version, source.dtype, source.device, stream, head_dim, layout)
        entry = self._entry
        if entry is not None and entry[0]() is source and entry[1] == tag:
            return entry[2]
        table = make(source, head_dim, layout)
        self._entry = (weakref.ref(source), tag, table)
        return table
