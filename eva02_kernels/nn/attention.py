"""RopeAttention: EVA's self-attention, with timm's arguments and weight names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eva02_kernels import _triton, add_layer_norm, gather_tokens, linear, qkv_rope, rope_attention_packed
from eva02_kernels.nn.mlp import NormLayer
from eva02_kernels.nn.norm import PreNorm, fusable_norm
from eva02_kernels.rope import RopeTable


def rotates_on_load(x: Tensor) -> bool:
    """Whether attention, not the projection of x before it, rotates queries and keys.

    A GPU's attention kernels rotate what they load and rotate gradients back before they store them: no pass more, and
    none of qkv_rope over dqkv. The CPU's rotate as they project: they would do it again for every block of queries.
    """
    return x.device.type != "cpu" or _triton.executing is not None


def projected_attention(
    x: Tensor,
    weight: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    rope: RopeTable | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    pre_norm: PreNorm | None = None,
    num_prefix_tokens: int = 1,
    keep_idx: Tensor | None = None,
    **attention: Any,
) -> Tensor:
    """qkv_rope and rope_attention_packed of it, rotated by one of them; (B, S, num_heads, D).

    ``attention``: key_padding_mask, causal and scale, as rope_attention_packed takes them.
    """
    rotation = {"rope": rope, "num_prefix_tokens": num_prefix_tokens, "keep_idx": keep_idx}
    now, later = ({}, rotation) if rotates_on_load(x) else (rotation, {})
    qkv = qkv_rope(x, weight, bias, num_heads=num_heads, num_kv_heads=num_kv_heads, pre_norm=pre_norm, **now)
    out: Any = rope_attention_packed(qkv, num_kv_heads=num_kv_heads, **later, **attention)
    return out


class RopeAttention(nn.Module):
    """Multi-head self-attention with 2-D RoPE on queries and keys and, in EVA-02, no key bias.

    Equivalent PyTorch::

        q, k, v = split_heads(x @ W.T + cat(q_bias, 0, v_bias))
        out = F.scaled_dot_product_attention(apply_rope(q), apply_rope(k), v)
        out = proj(norm(merge_heads(out)))

    The weights are those of timm's EvaAttention: `qkv` with `q_bias` and `v_bias` (`qkv_fused=True`), or `q_proj`,
    `k_proj` (no bias), `v_proj`; `norm` (`scale_norm=True`) and `proj`. The zero key bias is not stored.

    Args:
        dim: channels.
        num_heads: heads.
        qkv_bias: whether queries and values have a bias.
        qkv_fused: one projection for q, k and v.
        num_prefix_tokens: tokens at the start of a sequence that are not rotated.
        attn_head_dim: channels per head; None is dim // num_heads.
        norm_layer: builds the LayerNorm of `scale_norm`.
        scale_norm: LayerNorm on the merged heads, before `proj`.
        k_bias: a bias of the keys too, where there is one at all: `qkv.bias`, as in plain vision transformers.
        rotate_half: must agree with the table's layout (checked); pairs are channels (j, j + D/2).

    Source: Vaswani et al., arXiv:1706.03762; Fang et al., arXiv:2303.11331.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qkv_fused: bool = True,
        num_prefix_tokens: int = 1,
        attn_head_dim: int | None = None,
        norm_layer: NormLayer | None = None,
        scale_norm: bool = False,
        rotate_half: bool = False,
        *,
        k_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"RopeAttention: dim {dim} is not a multiple of num_heads {num_heads}")
        if scale_norm and norm_layer is None:
            raise ValueError("RopeAttention: scale_norm=True needs a norm_layer")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5
        self.num_prefix_tokens = num_prefix_tokens
        self.rotate_half = rotate_half
        attn_dim = self.head_dim * num_heads
        self.qkv = self.q_proj = self.k_proj = self.v_proj = self.q_bias = self.v_bias = None
        if qkv_fused:
            self.qkv = nn.Linear(dim, attn_dim * 3, bias=qkv_bias and k_bias, **factory)
            if qkv_bias and not k_bias:
                self.q_bias = nn.Parameter(torch.empty(attn_dim, **factory))
                self.v_bias = nn.Parameter(torch.empty(attn_dim, **factory))
        else:
            self.q_proj = nn.Linear(dim, attn_dim, bias=qkv_bias, **factory)
            self.k_proj = nn.Linear(dim, attn_dim, bias=qkv_bias and k_bias, **factory)
            self.v_proj = nn.Linear(dim, attn_dim, bias=qkv_bias, **factory)
        self.norm = fusable_norm(norm_layer(attn_dim, **factory), "RopeAttention") if scale_norm else None
        self.proj = nn.Linear(attn_dim, dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the biases that belong to no submodule."""
        if self.q_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def forward(
        self,
        x: Tensor,
        rope: RopeTable | None = None,
        *,
        keep_idx: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        pre_norm: PreNorm | None = None,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        out_idx: Tensor | None = None,
    ) -> Tensor:
        """Returns residual + row_scale * layer_scale * attention(pre_norm(x)); each of the three may be absent.

        Args:
            x: (B, S, dim), S = num_prefix_tokens + patches.
            rope: table of the patches' grid, or None.
            keep_idx: (B, K) int32 or int64, the patch each token after the prefix is; None means all, in order.
            key_padding_mask: (B, S) bool, True where a key may be attended to.
            pre_norm: (weight, bias, eps) of a LayerNorm computed inside the projection.
            residual, layer_scale, row_scale: (B, S, dim), (dim,), (B,) float32; with out_idx the first is (M, dim) and
                the last (M,).
            out_idx: (M,) flat rows b * S + s to return, as (M, dim); negative ones are padding. All tokens are keys.
        """
        qkv = self.qkv
        if qkv is not None:
            weight = qkv.weight
            q_bias = self.q_bias
            bias = qkv.bias if q_bias is None else (q_bias, None, self.v_bias)
        else:
            q_proj, k_proj, v_proj = self.q_proj, self.k_proj, self.v_proj
            weight = (q_proj.weight, k_proj.weight, v_proj.weight)
            q_bias = q_proj.bias
            bias = None if q_bias is None else (q_bias, k_proj.bias, v_proj.bias)
        if rope is not None and rope.layout.startswith("half") != self.rotate_half:
            raise ValueError(
                f"RopeAttention: rotate_half={self.rotate_half}, but the table's layout is {rope.layout!r}"
            )
        out = projected_attention(
            x,
            weight,
            bias,
            rope,
            num_heads=self.num_heads,
            pre_norm=pre_norm,
            num_prefix_tokens=self.num_prefix_tokens,
            keep_idx=keep_idx,
            key_padding_mask=key_padding_mask,
            causal=is_causal,
            scale=self.scale,
        ).flatten(-2)
        if out_idx is not None:
            out = gather_tokens(out, out_idx)
        norm = self.norm
        if norm is not None:
            out = add_layer_norm(out, None, norm.weight, norm.bias, norm.eps)[0]
        proj = self.proj
        return linear(out, proj.weight, proj.bias, residual=residual, layer_scale=layer_scale, row_scale=row_scale)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_prefix_tokens={self.num_prefix_tokens}"


__all__ = ["RopeAttention"]
