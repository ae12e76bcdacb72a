"""CLIP's text tower on the fused operators; parameter names and outputs are those of open_clip's `TextTransformer`.

Source: Radford et al., CLIP, arXiv:2103.00020.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eva02.clip.config import TextConfig
from eva02_kernels import gather_layer_norm, gelu_mlp, linear, qkv_rope, rope_attention_packed


def tokenize(texts: str | Sequence[str], context_length: int = 77) -> Tensor:
    """CLIP's byte-pair encoding of texts: (N, context_length) int64, start and end of text, then zeros.

    Texts that are too long are cut, and still end with the end of text.
    """
    return _tokenizer()(texts if isinstance(texts, str) else list(texts), context_length=context_length)


@functools.cache
def _tokenizer() -> Any:
    try:
        from open_clip import SimpleTokenizer
    except ImportError as error:
        raise ImportError("tokenising text needs open_clip: pip install open_clip_torch") from error
    return SimpleTokenizer()


class _Attention(nn.Module):
    """Weights of `nn.MultiheadAttention`."""

    def __init__(self, width: int, **factory: Any) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width, **factory))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width, **factory))
        self.out_proj = nn.Linear(width, width, **factory)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden, **factory)
        self.c_proj = nn.Linear(hidden, width, **factory)


class TextBlock(nn.Module):
    """x + attention(ln_1(x)), causal, then x + mlp(ln_2(x)) with exact GELU. (B, S, width) -> the same."""

    def __init__(self, config: TextConfig, **factory: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.ln_1 = nn.LayerNorm(config.width, **factory)
        self.attn = _Attention(config.width, **factory)
        self.ln_2 = nn.LayerNorm(config.width, **factory)
        self.mlp = _Mlp(config.width, config.hidden_features, **factory)

    def forward(self, x: Tensor) -> Tensor:
        attn, out, mlp = self.attn, self.attn.out_proj, self.mlp
        norm1, norm2 = ((norm.weight, norm.bias, norm.eps) for norm in (self.ln_1, self.ln_2))
        packed = qkv_rope(x, attn.in_proj_weight, attn.in_proj_bias, num_heads=self.num_heads, pre_norm=norm1)
        heads: Any = rope_attention_packed(packed, causal=True)
        x = linear(heads.flatten(-2), out.weight, out.bias, residual=x)
        return gelu_mlp(
            x, mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias, pre_norm=norm2, residual=x
        )


class _Transformer(nn.Module):
    def __init__(self, config: TextConfig, **factory: Any) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(config, **factory) for _ in range(config.depth))


class TextTower(nn.Module):
    """Embeddings of texts. Shapes: tokens (B, S) integers, S <= context_length -> (B, embed_dim).

    The features are those of the end-of-text token, the one with the largest number.
    """

    def __init__(
        self,
        config: TextConfig,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.grad_checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.width, **factory)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width, **factory))
        self.transformer = _Transformer(config, **factory)
        self.ln_final = nn.LayerNorm(config.width, **factory)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim, **factory))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew, as open_clip does. Also fills a tower that `to_empty` brought from meta."""
        width, depth = self.config.width, max(1, self.config.depth)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        blocks: Any = self.transformer.resblocks
        for block in blocks:
            for weight, std in (
                (block.attn.in_proj_weight, width**-0.5),
                (block.attn.out_proj.weight, width**-0.5 * (2 * depth) ** -0.5),
                (block.mlp.c_fc.weight, (2 * width) ** -0.5),
                (block.mlp.c_proj.weight, width**-0.5 * (2 * depth) ** -0.5),
            ):
                nn.init.normal_(weight, std=std)
            for bias in (block.attn.in_proj_bias, block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                nn.init.zeros_(bias)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"tokens: expected (B, S) with S at most {self.config.context_length}; got {tuple(tokens.shape)}"
            )
        x = self.token_embedding(tokens)
        x = x + self.positional_embedding[: tokens.shape[1]].to(x.dtype)
        blocks: Any = self.transformer.resblocks
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x)
        norm, end = self.ln_final, tokens.argmax(-1, keepdim=True)
        return gather_layer_norm(x, end, norm.weight, norm.bias, norm.eps).squeeze(1) @ self.text_projection.to(x.dtype)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed beside the one-dimensional ones."""
        return {"positional_embedding"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that assign parameters to layers, for layer-wise learning rates (timm's format)."""
        return {
            "stem": r"^token_embedding|positional_embedding",
            "blocks": r"^transformer\.resblocks\.(\d+)",  # the rest is the last layer, as upstream
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward and run the block again there."""
        self.grad_checkpointing = enable
