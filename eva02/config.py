"""Typed description of an EVA-02 model, and the named variants."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any, Literal

Size = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and its function. Names are those of timm's `Eva`.

    Sizes are in pixels, grids in patches. Fields of ours, unknown to timm: `head`, `mim_dim`, `norm_eps`, `recompute`,
    `patch_grad_scale`, `k_bias`.
    """

    img_size: Size = 224
    patch_size: Size = 14
    in_chans: int = 3
    num_classes: int = 0
    global_pool: Literal["avg", "token", ""] = "avg"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    qkv_bias: bool = True
    qkv_fused: bool = True
    mlp_ratio: float = 4.0
    swiglu_mlp: bool = False
    scale_mlp: bool = False
    scale_attn_inner: bool = False
    drop_rate: float = 0.0
    patch_drop_rate: float = 0.0
    """Share of an image's patches that training leaves out, other ones in each step."""
    drop_path_rate: float = 0.0
    init_values: float | None = None
    use_abs_pos_emb: bool = True
    use_rot_pos_emb: bool = False
    rope_temperature: float = 10000.0
    ref_feat_shape: int | None = 16
    use_post_norm: bool = False
    use_post_transformer_norm: bool | None = None
    use_fc_norm: bool | None = None
    dynamic_img_size: bool = False
    head_init_scale: float = 0.001
    head: Literal["classifier", "mim"] = "classifier"
    """"mim" replaces pooling and classifier by a mask token, the final norm and `lm_head` on masked patches."""
    mim_dim: int = 1024
    """Width of the teacher's features that `lm_head` predicts."""
    norm_eps: float = 1e-6
    """1e-5 for models trained in mmpretrain itself."""
    k_bias: bool = False
    """Keys have a bias too, as in plain vision transformers and in no EVA-02."""
    recompute: bool = False
    """Feed-forward networks keep only their input for backward."""
    patch_grad_scale: float = 1.0
    """Factor on the gradient into the patch projection: 0.1 in EVA-02's pre-training, 0 in its fine-tuning."""

    def __post_init__(self) -> None:
        problems = []
        (height, width), (ph, pw) = self.image_hw, self.patch_hw
        if min(height // ph, width // pw) < 1:
            problems.append(f"img_size {self.img_size} holds no patch of {self.patch_size}")
        if self.embed_dim % self.num_heads:
            problems.append(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        elif self.use_rot_pos_emb and (self.embed_dim // self.num_heads) % 4:
            problems.append(f"RoPE needs a head width in multiples of 4, got {self.embed_dim // self.num_heads}")
        if self.global_pool not in ("avg", "token", ""):
            problems.append(f"global_pool is one of 'avg', 'token', '', got {self.global_pool!r}")
        if self.head not in ("classifier", "mim"):
            problems.append(f"head is 'classifier' or 'mim', got {self.head!r}")
        if not 0.0 <= self.drop_path_rate <= 1.0:
            problems.append(f"drop_path_rate must lie in [0, 1], got {self.drop_path_rate}")
        if not 0.0 <= self.patch_drop_rate < 1.0:
            problems.append(f"patch_drop_rate must lie in [0, 1), got {self.patch_drop_rate}")
        if self.patch_drop_rate and self.head == "mim":
            problems.append("patch_drop_rate is not for head='mim', which predicts patches")
        if self.k_bias and self.use_rot_pos_emb:
            problems.append("k_bias is for models without RoPE")
        if self.depth < 0 or self.num_classes < 0:
            problems.append(f"depth and num_classes cannot be negative, got {self.depth} and {self.num_classes}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def image_hw(self) -> tuple[int, int]:
        return _pair(self.img_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns); pixels past the last whole patch are left out, as in timm."""
        (height, width), (ph, pw) = self.image_hw, self.patch_hw
        return height // ph, width // pw

    @property
    def hidden_features(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    def replace(self, **overrides: Any) -> ModelConfig:
        """Copy with some fields changed; an unknown name is an error that suggests the nearest one."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"unknown model option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return dataclasses.replace(self, **overrides)


def _pair(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


_SWIGLU = {"mlp_ratio": 4 * 2 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True}
_SUBLN = {**_SWIGLU, "qkv_fused": False, "scale_mlp": True}
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, **_SWIGLU},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6, **_SWIGLU},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, **_SUBLN},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, **_SUBLN},
}
# Default heads follow timm: none at 224 (MIM weights), 1000 classes above, an embedding for towers of CLIP.
_VARIANTS: dict[str, ModelConfig] = {
    f"eva02_{size}_patch{patch}_{pixels}": ModelConfig(
        img_size=pixels, patch_size=patch, num_classes=0 if pixels == 224 else 1000, **fields
    )
    for size, fields in _SIZES.items()
    for patch in (14, 16)
    for pixels in (224, 336, 448)
}
_TOWER: dict[str, Any] = {"global_pool": "token", "scale_attn_inner": True}
_GIANT: dict[str, Any] = {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408}
_ENORMOUS: dict[str, Any] = {"embed_dim": 1792, "depth": 64, "num_heads": 16, "mlp_ratio": 15360 / 1792}
_VARIANTS |= {
    "eva02_base_patch16_clip_224": ModelConfig(patch_size=16, num_classes=512, **_SIZES["base"], **_TOWER),
    "eva02_large_patch14_clip_224": ModelConfig(num_classes=768, **_SIZES["large"], **_TOWER),
    "eva02_large_patch14_clip_336": ModelConfig(img_size=336, num_classes=768, **_SIZES["large"], **_TOWER),
    "eva02_enormous_patch14_clip_224": ModelConfig(
        num_classes=1024, global_pool="token", use_post_norm=True, **_ENORMOUS
    ),
    "eva_base_patch16_clip_224": ModelConfig(patch_size=16, num_classes=512, global_pool="token", init_values=0.1),
    "eva_giant_patch14_clip_224": ModelConfig(num_classes=1024, global_pool="token", **_GIANT),
    "eva_giant_patch14_224": ModelConfig(num_classes=1000, **_GIANT),
    "eva_giant_patch14_336": ModelConfig(img_size=336, num_classes=1000, **_GIANT),
    "eva_giant_patch14_560": ModelConfig(img_size=560, num_classes=1000, **_GIANT),
    # Pre-trained as masked autoencoders are, from the visible patches alone: plain vision transformers.
    "eva_mae_base_patch16_224": ModelConfig(patch_size=16, num_classes=1000, k_bias=True),
    "eva_large_patch14_196": ModelConfig(
        img_size=196, embed_dim=1024, depth=24, num_heads=16, num_classes=1000, k_bias=True
    ),
    "eva_large_patch14_336": ModelConfig(
        img_size=336, embed_dim=1024, depth=24, num_heads=16, num_classes=1000, k_bias=True
    ),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names `create_model` knows, filtered by a shell pattern such as "eva02_tiny*"."""
    return [name for name in _VARIANTS if fnmatch.fnmatch(name, pattern)]


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """Configuration of a named variant with some fields overridden."""
    config = _VARIANTS.get(name)
    if config is None:
        near = difflib.get_close_matches(name, _VARIANTS, n=3)
        hint = f"nearest: {', '.join(near)}" if near else "see eva02.list_models()"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return config.replace(**overrides)
