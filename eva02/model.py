"""The EVA-02 model: patch projection, tokens, blocks and heads, each a call into `eva02_kernels`.

Parameter names, shapes and outputs are timm's (`timm.models.eva.Eva`).

Source: Fang et al., EVA-02, arXiv:2303.11331.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eva02.config import ModelConfig, model_config
from eva02.resize import resize_pos_embed
from eva02_kernels import RopeTable, add_layer_norm, gather_layer_norm, gather_tokens, linear, mask_tokens
from eva02_kernels.nn import EvaBlock, Rope2d


class PatchEmbed(nn.Module):
    """Patches to tokens: a convolution whose stride is its kernel, run as one matrix product.

    (B, channels, H, W) -> (B, rows * columns, C), rows first. Weights: `proj.weight` (C, channels, p, p), `proj.bias`.
    """

    def __init__(self, patch_size: tuple[int, int], in_chans: int, embed_dim: int, **factory: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, **factory)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        ph, pw = self.patch_size
        rows, columns = height // ph, width // pw
        if height % ph or width % pw:
            images = images[..., : rows * ph, : columns * pw]
        patches = images.reshape(batch, channels, rows, ph, columns, pw).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, rows * columns, channels * ph * pw)
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Eva02(nn.Module):
    """EVA-02 encoder with a classification head (`num_classes=0`: pooled features).

    Shapes: images (B, in_chans, H, W) -> logits (B, num_classes).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.LayerNorm, eps=config.norm_eps)
        dim = config.embed_dim
        self.config = config
        self.img_size = config.image_hw
        self.grid_size = config.grid
        self.embed_dim = self.num_features = self.head_hidden_size = dim
        self.num_classes = config.num_classes
        self.global_pool = config.global_pool
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(config.patch_hw, config.in_chans, dim, **factory)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.pos_embed = None
        if config.use_abs_pos_emb:
            num_tokens = self.grid_size[0] * self.grid_size[1] + self.num_prefix_tokens
            self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim, **factory))
        self.rope = None
        if config.use_rot_pos_emb:
            self.rope = Rope2d(
                dim // config.num_heads,
                self.grid_size,
                temperature=config.rope_temperature,
                ref_feat_shape=config.ref_feat_shape,
                device=device,
            )
        self.blocks = nn.ModuleList(
            EvaBlock(
                dim,
                config.num_heads,
                qkv_bias=config.qkv_bias,
                qkv_fused=config.qkv_fused,
                mlp_ratio=config.mlp_ratio,
                swiglu_mlp=config.swiglu_mlp,
                scale_mlp=config.scale_mlp,
                scale_attn_inner=config.scale_attn_inner,
                k_bias=config.k_bias,
                num_prefix_tokens=self.num_prefix_tokens,
                drop_path=config.drop_path_rate * i / max(config.depth - 1, 1),
                init_values=config.init_values,
                norm_layer=norm_layer,
                use_post_norm=config.use_post_norm,
                recompute=config.recompute,
                **factory,
            )
            for i in range(config.depth)
        )
        self._make_head(norm_layer, factory)
        self.init_weights()

    def _make_head(self, norm_layer: Any, factory: dict[str, Any]) -> None:
        config = self.config
        use_fc_norm = config.global_pool == "avg" if config.use_fc_norm is None else config.use_fc_norm
        use_norm = not use_fc_norm if config.use_post_transformer_norm is None else config.use_post_transformer_norm
        self.norm = norm_layer(self.embed_dim, **factory) if use_norm else None
        self.fc_norm = norm_layer(self.embed_dim, **factory) if use_fc_norm else None
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = (
            nn.Linear(self.embed_dim, config.num_classes, **factory) if config.num_classes > 0 else nn.Identity()
        )

    # ---- forward -------------------------------------------------------------------------------------------------
    def _embed(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RopeTable | None]:
        """Tokens before the first block, (B, 1 + P, C), and the rotation of their grid."""
        height, width = images.shape[-2:]
        config, pos_embed = self.config, self.pos_embed
        if (height, width) == self.img_size:
            grid = self.grid_size
        elif not config.dynamic_img_size:
            raise ValueError(
                f"images are {height}x{width}, the model was built for {self.img_size[0]}x{self.img_size[1]}; build it "
                f"with img_size=({height}, {width}), or with dynamic_img_size=True for any size"
            )
        else:
            ph, pw = self.patch_embed.patch_size
            if height % ph or width % pw:
                raise ValueError(f"images of {height}x{width} are not whole patches of {ph}x{pw}")
            grid = height // ph, width // pw
            if pos_embed is not None:
                pos_embed = resize_pos_embed(pos_embed, grid, self.grid_size, self.num_prefix_tokens)
        patches = self.patch_embed(images)
        if self.training and config.patch_grad_scale != 1.0:
            # x + s * (x - x): the value is x to the last bit, the gradient is scaled.
            patches = torch.lerp(patches.detach(), patches, config.patch_grad_scale)
        mask_token = None if mask is None else self.mask_token
        x = mask_tokens(patches, mask, mask_token, pos_embed, self.cls_token)
        return x, None if self.rope is None else self.rope(grid, x.device)

    def _drop_patches(self, x: Tensor, rope: RopeTable | None) -> tuple[Tensor, dict[str, Any]]:
        """Tokens of the patches that patch dropout keeps, in no order, and what attention must know of them."""
        rate = self.config.patch_drop_rate
        if not (rate and self.training):
            return x, {}
        batch, patches = x.shape[0], x.shape[1] - self.num_prefix_tokens
        keep = max(1, int(patches * (1.0 - rate)))
        keep_idx = torch.rand(batch, patches, device=x.device).topk(keep).indices
        prefix = torch.arange(self.num_prefix_tokens, device=x.device).expand(batch, -1)
        x = gather_tokens(x, torch.cat([prefix, keep_idx + self.num_prefix_tokens], 1))
        return x, {} if rope is None else {"keep_idx": keep_idx}

    def _encode(self, x: Tensor, rope: RopeTable | None, out_idx: Tensor | None = None, **kept: Tensor) -> Tensor:
        """Tokens after the last block, before any final norm: (B, 1 + P, C).

        With `out_idx`, flat rows b * (1 + P) + s, (M,): those alone, (M, C); the last block computes no others.
        """
        blocks: list[Callable[..., Tensor]] = list(self.blocks)
        if self.grad_checkpointing and torch.is_grad_enabled():
            blocks = [partial(checkpoint, block, use_reentrant=False) for block in blocks]
        if out_idx is None:
            for block in blocks:
                x = block(x, rope, **kept)
            return x
        if not blocks:
            return gather_tokens(x, out_idx)
        for block in blocks[:-1]:
            x = block(x, rope, **kept)
        return blocks[-1](x, rope, out_idx=out_idx, **kept)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens, after the final norm where the model has one: (B, 1 + P, C)."""
        x, rope = self._embed(images)
        x, kept = self._drop_patches(x, rope)
        return _norm(self._encode(x, rope, **kept), self.norm)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled and classified tokens; with `pre_logits`, what the classifier would be given."""
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "token":
            x = x[:, 0]
        return self._classify(x, pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(_norm(x, self.fc_norm))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        if self.global_pool != "token":
            return self.forward_head(self.forward_features(images))
        x, rope = self._embed(images)
        x, kept = self._drop_patches(x, rope)
        cls_rows = torch.arange(x.shape[0], device=x.device) * x.shape[1]
        return self._classify(_norm(self._encode(x, rope, cls_rows, **kept), self.norm))

    # ---- training ------------------------------------------------------------------------------------------------
    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed beside the one-dimensional ones. The mask token is decayed, as upstream."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that assign parameters to layers, for layer-wise learning rates (timm's format)."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|mask_token",
            "blocks": r"^blocks\.(\d+)",  # the rest, with the final norm, is the last layer, as upstream
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward and run the block again there."""
        self.grad_checkpointing = enable

    def set_recompute(self, enable: bool = True) -> None:
        """Keep only the input of each feed-forward network for backward, not its hidden activations."""
        for block in self.blocks:
            block.mlp.recompute = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", "token", ""] | None = None) -> None:
        """Replace the classifier by a fresh one (`num_classes=0`: none). The norms stay where they are, as in timm."""
        changes: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None:
            changes |= {
                "global_pool": global_pool,
                "use_fc_norm": self.fc_norm is not None,
                "use_post_transformer_norm": self.norm is not None,
            }
        self.config = self.config.replace(**changes)
        self.num_classes = num_classes
        self.global_pool = self.config.global_pool
        like = self.cls_token
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            self._init_head()

    # ---- initialisation ------------------------------------------------------------------------------------------
    @torch.no_grad()
    def init_weights(self, scheme: Literal["beit", "xavier"] | None = None) -> None:
        """Draw every parameter anew. Also fills a model that `to_empty` brought from the meta device.

        Args:
            scheme: "beit" is what timm and the official fine-tuning use: normal of std 0.02, and the output projections
                of block i divided by sqrt(2 (i + 1)). "xavier" is the official pre-training's (arXiv:2303.11331):
                xavier normal Linears, embeddings cut at one sigma, sub-LN models rescaled by sqrt(ln 2L).
                None takes "xavier" for a model with a MIM head and "beit" otherwise.
        """
        scheme = scheme or ("xavier" if self.config.head == "mim" else "beit")
        if scheme not in ("beit", "xavier"):
            raise ValueError(f"scheme is 'beit' or 'xavier', got {scheme!r}")
        xavier = scheme == "xavier"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if xavier:
                    nn.init.xavier_normal_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # norms 1 and 0, q and v biases, layer scales, the convolution's defaults
        bound = 0.02 if xavier else 2.0
        for name in ("cls_token", "pos_embed", "mask_token"):
            token = getattr(self, name, None)
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02, a=-bound, b=bound)
        if xavier:
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
            if self.config.scale_mlp:
                self._rescale_subln()
        else:
            for i, block in enumerate(self.blocks):
                block.attn.proj.weight.div_(math.sqrt(2.0 * (i + 1)))
                block.mlp.fc2.weight.div_(math.sqrt(2.0 * (i + 1)))
        self._init_head()

    def _rescale_subln(self) -> None:
        gain = math.sqrt(math.log(2 * len(self.blocks)))
        for block in self.blocks:
            attn, mlp = block.attn, block.mlp
            for linear_ in (mlp.fc1_g, mlp.fc1_x, mlp.fc2, attn.proj):
                linear_.weight.mul_(gain)
            if attn.v_proj is not None:
                attn.v_proj.weight.mul_(gain)

    @torch.no_grad()
    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self.head.weight.mul_(self.config.head_init_scale)


class Eva02Mim(Eva02):
    """EVA-02 encoder with the pre-training head: predicts the teacher's features of masked patches.

    Shapes: images (B, in_chans, H, W), mask (B, P) bool -> predictions (M, mim_dim) of the M masked patches.
    """

    def _make_head(self, norm_layer: Any, factory: dict[str, Any]) -> None:
        config = self.config
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.embed_dim, **factory))
        self.norm = norm_layer(self.embed_dim, **factory)
        self.fc_norm = None
        self.lm_head = nn.Linear(self.embed_dim, config.mim_dim, **factory)

    def forward(self, images: Tensor, mask: Tensor | None = None, idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Predict the teacher's features.

        Args:
            images: (B, in_chans, H, W).
            mask: (B, P) bool, True where the mask token replaces the patch; None masks nothing.
            idx: (M,) int32 or int64, the patches to predict, as flat rows b * P + p of a (B, P, ...) target; negative
                entries pad a ragged batch and predict from a zero row. None takes the masked patches in order, which
                synchronises the device once; all patches where mask is None.

        Returns:
            (M, mim_dim); with neither mask nor idx (B, P, mim_dim).
        """
        x, rope = self._embed(images, mask)
        norm, lm_head = self.norm, self.lm_head
        if idx is None:
            if mask is None:
                return lm_head(_norm(self._encode(x, rope), norm)[:, self.num_prefix_tokens :])
            idx = mask.flatten().nonzero().squeeze(1)
        num_patches = x.shape[1] - self.num_prefix_tokens
        # Row b * P + p of the patches is row b * (P + prefix) + prefix + p of the tokens.
        token_idx = idx + (idx.div(num_patches, rounding_mode="floor") + 1) * self.num_prefix_tokens
        padding = idx < 0
        rows = self._encode(x, rope, torch.where(padding, idx, token_idx))
        order = torch.arange(len(idx), dtype=idx.dtype, device=idx.device)
        rows = gather_layer_norm(rows[None], torch.where(padding, idx, order), norm.weight, norm.bias, norm.eps)
        return lm_head(rows)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Predictions of all patches from `forward_features`' tokens: (B, P, mim_dim)."""
        x = x[:, self.num_prefix_tokens :]
        return x if pre_logits else self.lm_head(x)

    def get_classifier(self) -> nn.Module:
        return self.lm_head

    def reset_classifier(self, num_classes: int, global_pool: Any = None) -> None:
        raise TypeError(
            "a model with a MIM head has no classifier; create one with head='classifier' and load its file"
        )

    def _init_head(self) -> None:
        pass  # lm_head follows the scheme of the other Linears


def _norm(x: Tensor, norm: nn.Module | None) -> Tensor:
    if norm is None:
        return x
    return add_layer_norm(x, None, norm.weight, norm.bias, norm.eps)[0]


def create_model(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Eva02:
    """Build a named EVA-02 model with fresh weights.

    Args:
        name: one of `list_models()`, for example "eva02_base_patch14_224".
        device, dtype: where and in which type the parameters are made; "meta" makes none.
        **overrides: fields of `ModelConfig`: `num_classes=10`, `img_size=(196, 280)`, `depth=4`, `patch_size=16`,
            `head="mim"`, `drop_path_rate=0.1`, `dynamic_img_size=True`, ...

    Returns:
        `Eva02`, or `Eva02Mim` with `head="mim"`.

    Raises:
        ValueError: unknown name or impossible configuration. TypeError: unknown override.
    """
    config = model_config(name, **overrides)
    cls = Eva02Mim if config.head == "mim" else Eva02
    return cls(config, device=device, dtype=dtype)
