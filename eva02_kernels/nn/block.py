"""EvaBlock: one transformer layer of the EVA family on the fused ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eva02_kernels import add_layer_norm, gather_tokens
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


def kept_samples(batch: int, drop_prob: float, device: torch.device) -> Tensor | None:
    """Stochastic depth as a selection: int64 index of the samples that are kept, or None where all are.

    Drawn by the CPU's generator, so that the host knows how many there are without asking the device.
    """
    kept = (torch.rand(batch, device="cpu") >= drop_prob).nonzero().squeeze(1)
    return None if len(kept) == batch else kept.to(device, non_blocking=True)


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
        qkv_bias, qkv_fused, k_bias: see RopeAttention.
        mlp_ratio: hidden width of the feed-forward network over dim; rounded down.
        swiglu_mlp: SwiGLU instead of GELU.
        swiglu_align_to: rounds SwiGLU's hidden width up to a multiple (and keeps its projections separate).
        scale_mlp: LayerNorm inside SwiGLU (sub-LN).
        scale_attn_inner: LayerNorm on the merged heads.
        num_prefix_tokens: tokens that are not rotated.
        rotate_half: RoPE pairs (j, j + D/2).
        proj_drop, attn_drop: must be 0: no EVA recipe uses them and the fused ops have no dropout.
        drop_path: stochastic depth rate of both branches, drawn for each sample. A dropped sample's branch is not
            computed, except where shapes must not depend on the draw (torch.compile, CUDA graphs, `out_idx`).
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
        k_bias: bool = False,
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
            k_bias=k_bias,
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
        out_idx: Tensor | None = None,
    ) -> Tensor:
        """x: (B, S, dim); the other arguments as in RopeAttention.forward. Returns (B, S, dim).

        With `out_idx`, flat rows b * S + s, (M,): only those, (M, dim). All tokens are attended to, but what follows
        attention is computed for these rows alone: for a last block of which not every row is read.
        """

        def attend(x: Tensor, **epilogue: Any) -> Tensor:
            return self.attn(
                x, rope, keep_idx=keep_idx, key_padding_mask=key_padding_mask, is_causal=is_causal, **epilogue
            )

        if not (self.drop_path and self.training):
            return self._feed_forward(self._attention(x, attend, None, out_idx), None)
        by_sample = rope is not None and (rope.per == "batch" or rope.grids is not None)
        whole = out_idx is None and keep_idx is None and key_padding_mask is None and not by_sample
        if whole and not _shapes_are_fixed(x):
            x = self._on_kept(x, lambda kept, scale: self._attention(kept, attend, scale))
            return self._on_kept(x, self._feed_forward)
        attn_scale, mlp_scale = drop_path_scale(x.shape[0], self.drop_path, 2, x.device)
        if out_idx is not None:
            sample = out_idx.clamp(min=0).div(x.shape[1], rounding_mode="floor")
            attn_scale, mlp_scale = attn_scale[sample], mlp_scale[sample]
        return self._feed_forward(self._attention(x, attend, attn_scale, out_idx), mlp_scale)

    def _attention(
        self, x: Tensor, attend: Callable[..., Tensor], row_scale: Tensor | None, out_idx: Tensor | None = None
    ) -> Tensor:
        norm = self.norm1
        residual = x if out_idx is None else gather_tokens(x, out_idx)
        if self.use_post_norm:
            return _add_normed(residual, attend(x, out_idx=out_idx), norm, row_scale)
        return attend(
            x,
            pre_norm=(norm.weight, norm.bias, norm.eps),
            residual=residual,
            layer_scale=self.gamma_1,
            row_scale=row_scale,
            out_idx=out_idx,
        )

    def _feed_forward(self, x: Tensor, row_scale: Tensor | None) -> Tensor:
        norm = self.norm2
        if self.use_post_norm:
            return _add_normed(x, self.mlp(x), norm, row_scale)
        return self.mlp(
            x,
            pre_norm=(norm.weight, norm.bias, norm.eps),
            residual=x,
            layer_scale=self.gamma_2,
            row_scale=row_scale,
        )

    def _on_kept(self, x: Tensor, branch: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x with `branch` applied to the samples that stochastic depth keeps; the others are as they were.

        No kept sample still calls the branch, on an empty batch: each parameter has a gradient in every step, which is
        what DistributedDataParallel waits for.
        """
        kept = kept_samples(x.shape[0], self.drop_path, x.device)
        part = x if kept is None else x.index_select(0, kept)
        scale = torch.full(
            (part.shape[0],), 1.0 / (1.0 - self.drop_path) if self.drop_path < 1.0 else 0.0, device=x.device
        )
        out = branch(part, scale)
        return out if kept is None else x.index_copy(0, kept, out.to(x.dtype))

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}, use_post_norm={self.use_post_norm}"


def _shapes_are_fixed(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _add_normed(x: Tensor, branch: Tensor, norm: nn.Module, row_scale: Tensor | None) -> Tensor:
    normed = add_layer_norm(branch, None, norm.weight, norm.bias, norm.eps)[0]
    if row_scale is None:
        return x + normed
    return torch.addcmul(x, normed, row_scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))


__all__ = ["EvaBlock", "drop_path_scale", "kept_samples"]
