"""EvaBlock: one transformer layer of the EVA family on the fused ops."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from eva02_kernels import add_layer_norm
from eva02_kernels.nn.attention import RopeAttention
from eva02_kernels.nn.mlp import Mlp, NormLayer, SwiGLU, SwiGLUPacked
from eva02_kernels.nn.norm import fusable_norm
from eva02_kernels.rope import RopeTable

DEFAULT_NORM: NormLayer = partial(nn.LayerNorm, eps=1e-6)


def drop_path_scale(batch: int, drop_prob: float, count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Stochastic depth as row factors: `count` independent (batch,) float32 tensors of 0 or 1 / (1 - drop_prob)."""
    keep = 1.0 - drop_prob
    scale = torch.empty((count, batch), dtype=torch.float32, device=device).bernoulli_(keep)
    if keep > 0.0:
        scale.div_(keep)
    return scale.unbind(0)


class EvaBlock(nn.Module):
    """Transformer block: RoPE attention and a feed-forward network, each with its norm and residual.

    Equivalent PyTorch (`use_post_norm=False`, then `True`)::

        x = x + drop_path(gamma_1 * attn(norm1(x)));  x = x + drop_path(gamma_2 * mlp(norm2(x)))
        x = x + drop_path(norm1(attn(x)));            x = x + drop_path(norm2(mlp(x)))

    Pre-norm runs as four ops: projection (norm and rotation inside), attention, output projection (residual inside),
    feed-forward network (norm and residual inside). Arguments and weights are those of timm's EvaBlock and
    EvaBlockPostNorm, whose state_dicts load.

    Args:
        dim: channels.
        num_heads: attention heads.
        qkv_bias, qkv_fused: see RopeAttention.
        mlp_ratio: hidden width of the feed-forward network over dim; rounded down.
        swiglu_mlp: SwiGLU instead of GELU.
        swiglu_align_to: rounds SwiGLU's hidden width up to a multiple (and keeps its projections separate).
        scale_mlp: LayerNorm inside SwiGLU (sub-LN).
        scale_attn_inner: LayerNorm on the merged heads.
        num_prefix_tokens: tokens that are not rotated.
        rotate_half: RoPE pairs (j, j + D/2).
        proj_drop, attn_drop: must be 0: no EVA recipe uses them and the fused ops have no dropout.
        drop_path: stochastic depth rate of both branches.
        init_values: initial layer scale; None has none.
        attn_only_layer_scale: layer scale on the attention branch only.
        norm_layer: builds the LayerNorms.
        attn_head_dim: channels per head; None is dim // num_heads.
        use_post_norm: residual post-norm (init_values is then ignored, as in timm).
        recompute: the feed-forward network keeps only its input for backward.

    Memory: kept for backward per block, in T = B*S*dim and G = B*S*hidden elements: 6T + 2G, or 6T with `recompute`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qkv_fused: bool = True,
        mlp_ratio: float = 4.0,
        swiglu_mlp: bool = False,
        swiglu_align_to: int = 0,
        scale_mlp: bool = False,
        scale_attn_inner: bool = False,
        num_prefix_tokens: int = 1,
        rotate_half: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        attn_only_layer_scale: bool = False,
        norm_layer: NormLayer = DEFAULT_NORM,
        attn_head_dim: int | None = None,
        *,
        use_post_norm: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if proj_drop or attn_drop:
            raise ValueError(f"EvaBlock: proj_drop and attn_drop must be 0, got {proj_drop} and {attn_drop}")
        if scale_mlp and not swiglu_mlp:
            raise ValueError("EvaBlock: scale_mlp=True needs swiglu_mlp=True")
        factory = {"device": device, "dtype": dtype}
        self.use_post_norm = use_post_norm
        self.drop_path = drop_path
        self.norm1 = fusable_norm(norm_layer(dim, **factory), "EvaBlock")
        self.attn = RopeAttention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qkv_fused=qkv_fused,
            num_prefix_tokens=num_prefix_tokens,
            attn_head_dim=attn_head_dim,
            norm_layer=norm_layer,
            scale_norm=scale_attn_inner,
            rotate_half=rotate_half,
            **factory,
        )
        self.norm2 = fusable_norm(norm_layer(dim, **factory), "EvaBlock")
        hidden = int(dim * mlp_ratio)
        if not swiglu_mlp:
            self.mlp: nn.Module = Mlp(dim, hidden, recompute=recompute, **factory)
        elif scale_mlp or swiglu_align_to:
            norm = norm_layer if scale_mlp else None
            self.mlp = SwiGLU(dim, hidden, norm_layer=norm, align_to=swiglu_align_to, recompute=recompute, **factory)
        else:
            self.mlp = SwiGLUPacked(dim, hidden * 2, recompute=recompute, **factory)
        self.init_values = None if use_post_norm else init_values
        self.gamma_1 = self.gamma_2 = None
        if self.init_values is not None:
            self.gamma_1 = nn.Parameter(torch.empty(dim, **factory))
            if not attn_only_layer_scale:
                self.gamma_2 = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the layer scales, which belong to no submodule."""
        for gamma in (self.gamma_1, self.gamma_2):
            if gamma is not None:
                nn.init.constant_(gamma, self.init_values)

    def forward(
        self,
        x: Tensor,
        rope: RopeTable | None = None,
        *,
        keep_idx: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """x: (B, S, dim); the other arguments as in RopeAttention.forward. Returns (B, S, dim)."""
        attn_scale = mlp_scale = None
        if self.drop_path and self.training:
            attn_scale, mlp_scale = drop_path_scale(x.shape[0], self.drop_path, 2, x.device)
        norm1, norm2 = self.norm1, self.norm2
        if self.use_post_norm:
            out = self.attn(x, rope, keep_idx=keep_idx, key_padding_mask=key_padding_mask, is_causal=is_causal)
            x = _add_normed(x, out, norm1, attn_scale)
            return _add_normed(x, self.mlp(x), norm2, mlp_scale)
        x = self.attn(
            x,
            rope,
            keep_idx=keep_idx,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            pre_norm=(norm1.weight, norm1.bias, norm1.eps),
            residual=x,
            layer_scale=self.gamma_1,
            row_scale=attn_scale,
        )
        return self.mlp(
            x,
            pre_norm=(norm2.weight, norm2.bias, norm2.eps),
            residual=x,
            layer_scale=self.gamma_2,
            row_scale=mlp_scale,
        )

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}, use_post_norm={self.use_post_norm}"


def _add_normed(x: Tensor, branch: Tensor, norm: nn.Module, row_scale: Tensor | None) -> Tensor:
    normed = add_layer_norm(branch, None, norm.weight, norm.bias, norm.eps)[0]
    if row_scale is None:
        return x + normed
    return torch.addcmul(x, normed, row_scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))


__all__ = ["EvaBlock", "drop_path_scale"]
