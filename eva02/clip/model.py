"""EVA-CLIP: an EVA vision tower and a text tower that share an embedding.

Source: Sun et al., EVA-CLIP, arXiv:2303.15389.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eva02.clip.config import ClipConfig, clip_config
from eva02.clip.text import TextTower
from eva02.model import Eva02

MAX_LOGIT_SCALE = math.log(100)


class Clip(nn.Module):
    """Embeddings of images and texts, of unit length.

    Parameters: `visual.*` as timm names the tower's, `text.*` and `logit_scale` as open_clip does.

    Shapes: images (B, 3, H, W), tokens (B, S) -> image features (B, E), text features (B, E), factor of logits ().
    """

    def __init__(
        self,
        config: ClipConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.visual = Eva02(config.vision, device=device, dtype=dtype)
        self.text = TextTower(config.text, config.embed_dim, device=device, dtype=dtype)
        self.logit_scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        """Logarithm of the factor."""
        self.init_logit_scale()

    @torch.no_grad()
    def init_logit_scale(self) -> None:
        """The temperature of CLIP's start, 0.07."""
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep the factor in [1, 100], as after each step of training."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """(B, E) of images (B, 3, H, W); of unit length with `normalize`."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """(B, E) of tokens (B, S); of unit length with `normalize`."""
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `eva02_kernels.clip_loss` takes."""
        return self.encode_image(images, True), self.encode_text(tokens, True), self.logit_scale.exp()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward and run the block again there."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)


def create_model(
    name: str,
    *,
    text: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **vision: Any,
) -> Clip:
    """Build a named EVA-CLIP model with fresh weights.

    Args:
        name: one of `list_models()`, for example "EVA02-CLIP-B-16".
        text, **vision: fields of `TextConfig` and `ModelConfig`, as for `clip_config`.
        device, dtype: where and in which type the parameters are made; "meta" makes none.

    Raises:
        ValueError: unknown name or impossible configuration. TypeError: unknown option.
    """
    return Clip(clip_config(name, text=text, **vision), device=device, dtype=dtype)
