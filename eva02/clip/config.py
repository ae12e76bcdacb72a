"""Typed description of the EVA-CLIP models, and the published ones by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any

from eva02.config import ModelConfig, model_config


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower: a causal pre-norm transformer, read at the end-of-text token."""

    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    context_length: int = 77
    """Tokens of a text, start and end of text among them."""
    vocab_size: int = 49408

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"text width {self.width} is not a multiple of num_heads {self.num_heads}")

    @property
    def hidden_features(self) -> int:
        """Width inside the MLPs."""
        return int(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Two towers with one embedding, whose width is the vision tower's `num_classes`."""

    vision: ModelConfig
    text: TextConfig

    def __post_init__(self) -> None:
        if self.vision.head != "classifier" or not self.vision.num_classes:
            raise ValueError("CLIP's vision tower needs head='classifier' and the embedding's width as num_classes")

    @property
    def embed_dim(self) -> int:
        return self.vision.num_classes


_BASE, _LARGE, _HUGE, _GIANT = (
    TextConfig(),
    TextConfig(width=768, num_heads=12),
    TextConfig(width=1024, depth=24, num_heads=16),
    TextConfig(width=1280, depth=32, num_heads=20),
)
# baaivision/EVA's names -> (vision tower, text tower)
_MODELS = {
    "EVA01-CLIP-B-16": ("eva_base_patch16_clip_224", _BASE),  # a configuration without weights
    "EVA01-CLIP-g-14": ("eva_giant_patch14_clip_224", _LARGE),
    "EVA01-CLIP-g-14-plus": ("eva_giant_patch14_clip_224", _HUGE),
    "EVA02-CLIP-B-16": ("eva02_base_patch16_clip_224", _BASE),
    "EVA02-CLIP-L-14": ("eva02_large_patch14_clip_224", _LARGE),
    "EVA02-CLIP-L-14-336": ("eva02_large_patch14_clip_336", _LARGE),
    "EVA02-CLIP-bigE-14": ("eva02_enormous_patch14_clip_224", _HUGE),
    "EVA02-CLIP-bigE-14-plus": ("eva02_enormous_patch14_clip_224", _GIANT),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, filtered by a shell pattern such as "EVA02*"."""
    return [name for name in _MODELS if fnmatch.fnmatch(name, pattern)]


def clip_config(name: str, *, text: dict[str, Any] | None = None, **vision: Any) -> ClipConfig:
    """Configuration of a named model, with some fields of its towers overridden.

    Args:
        name: one of `list_models()`.
        text: fields of `TextConfig`.
        **vision: fields of `ModelConfig`: `depth=4`, `img_size=336`, `patch_drop_rate=0.5`, `num_classes=128` (the
            embedding of both towers), ...
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3)
        raise ValueError(
            f"unknown CLIP model {name!r}; {'nearest' if near else 'there are'}: {', '.join(near or _MODELS)}"
        )
    tower, text_config = _MODELS[name]
    known = [field.name for field in dataclasses.fields(TextConfig)]
    for option in text or {}:
        if option not in known:
            raise TypeError(f"unknown option {option!r} of the text tower; there are {', '.join(known)}")
    return ClipConfig(model_config(tower, **vision), dataclasses.replace(text_config, **(text or {})))
