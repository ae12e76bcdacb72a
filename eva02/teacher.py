"""Teachers of masked image modelling: frozen CLIP vision towers that give a feature for every patch.

The target of EVA-02's pre-training is the tower's patch tokens after its final norm and its projection into the space
of text, without the class token and without further normalisation (arXiv:2303.11331): the cosine loss removes scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eva02
import eva02.clip
from eva02.images import CLIP_MEAN, CLIP_STD
from eva02.runs import is_clip, is_run, load_model

PatchFeatures = Callable[[Tensor], Tensor]
RANDOM = "random"


class Teacher(nn.Module):
    """Patch features of a CLIP vision tower, without gradients and always in evaluation mode.

    Shapes: images (B, 3, H, W), normalised by CLIP's mean and standard deviation -> (B, P, C) in the tower's dtype.

    Args:
        model: a CLIP model of open_clip or one of its vision towers, a CLIP vision tower of timm or of ours,
            transformers' `CLIPVisionModelWithProjection`, or any module with `patch_features(images)`, `img_size` and
            `dim`.
        name: what a cache of its features says they are.

    Raises:
        TypeError: the model has no patch tokens to give. ValueError: it wants another normalisation.
    """

    def __init__(self, model: nn.Module, name: str = "") -> None:
        super().__init__()
        self.tower: nn.Module = getattr(model, "visual", model)  # type: ignore[assignment]
        self.name = name or type(self.tower).__name__
        _check_normalisation(self.tower)
        self._read, self.dim, self.img_size = _reader(self.tower)
        """`dim` is C; `img_size` is (height, width), in pixels."""
        self.tower.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self._read(images.to(next(self.tower.parameters()).dtype))

    def fingerprint(self) -> str:
        """Digest of names, shapes and the first values of every weight: tells two checkpoints of a tower apart."""
        digest = hashlib.sha256()
        for key, value in sorted(self.tower.state_dict().items()):
            head = value.flatten()[:4096].float().cpu().numpy().tobytes()
            digest.update(f"{key} {tuple(value.shape)} {value.dtype} ".encode() + head)
        return digest.hexdigest()[:32]


def _check_normalisation(tower: nn.Module) -> None:
    config = getattr(tower, "pretrained_cfg", None) or {}  # timm's; open_clip has attributes
    mean, std = (getattr(tower, f"image_{name}", None) or config.get(name) for name in ("mean", "std"))
    for have, want in ((mean, CLIP_MEAN), (std, CLIP_STD)):
        if have is not None and any(abs(a - b) > 1e-3 for a, b in zip(have, want, strict=True)):
            raise ValueError(f"the tower wants images of mean {mean} and deviation {std}; loaders give CLIP's")


def _reader(tower: Any) -> tuple[PatchFeatures, int, tuple[int, int]]:
    """How to get patch features from a tower, their width, and the tower's image size (height, width)."""
    if hasattr(tower, "patch_features"):
        return tower.patch_features, tower.dim, _pair(tower.img_size)
    if hasattr(tower, "visual_projection"):
        return _transformers_reader(tower)
    if hasattr(tower, "trunk"):
        return _trunk_reader(tower.trunk, tower.head)
    if hasattr(tower, "ln_post") and hasattr(tower, "forward_intermediates"):
        return _open_clip_reader(tower)
    if hasattr(tower, "forward_features") and hasattr(tower, "num_prefix_tokens"):
        return _trunk_reader(tower, nn.Identity())
    raise TypeError(
        f"{type(tower).__name__} is no vision tower that is known here; give it patch_features(images) -> (B, P, C), "
        "img_size and dim"
    )


def _trunk_reader(trunk: Any, head: nn.Module) -> tuple[PatchFeatures, int, tuple[int, int]]:
    """timm's towers and ours; open_clip may put its projection behind them."""
    if getattr(trunk, "attn_pool", None) is not None:
        raise TypeError(f"{type(trunk).__name__} pools by attention: its projection is not defined for a patch")
    fc_norm = getattr(trunk, "fc_norm", None) or nn.Identity()

    def read(images: Tensor) -> Tensor:
        return head(trunk.head(fc_norm(trunk.forward_features(images)[:, trunk.num_prefix_tokens :])))

    projections = [module for part in (trunk.head, head) for module in part.modules() if isinstance(module, nn.Linear)]
    dim = projections[-1].out_features if projections else trunk.num_features
    return read, dim, _pair(getattr(trunk, "img_size", None) or trunk.patch_embed.img_size)


def _open_clip_reader(tower: Any) -> tuple[PatchFeatures, int, tuple[int, int]]:
    if tower.attn_pool is not None:
        raise TypeError("the tower pools by attention: its projection is not defined for a patch")

    def read(images: Tensor) -> Tensor:
        tokens = tower.forward_intermediates(
            images, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][0]
        return tokens if tower.proj is None else tokens @ tower.proj

    return read, tower.conv1.out_channels if tower.proj is None else tower.proj.shape[1], _pair(tower.image_size)


def _transformers_reader(tower: Any) -> tuple[PatchFeatures, int, tuple[int, int]]:
    vision = tower.vision_model

    def read(images: Tensor) -> Tensor:
        tokens = vision(images).last_hidden_state[:, 1:]
        return tower.visual_projection(vision.post_layernorm(tokens))

    return read, tower.visual_projection.out_features, _pair(tower.config.image_size)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def create_teacher(
    name: str,
    checkpoint: str | None = None,
    *,
    img_size: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    patch: bool = True,
) -> Teacher:
    """Build a teacher by name and load its weights.

    Args:
        name: a vision model of ours, the vision tower of "EVA01-CLIP-g-14" and the like, one of another library
            ("timm:eva_giant_patch14_clip_224", "open_clip:EVA01-g-14"), or the folder of a training run: of a
            classifier, without its head, or of a CLIP model.
        checkpoint: file with its weights; for open_clip also a tag of its own; "random" for weights drawn with seed 0,
            the same in every process; None for a run's own.
        img_size: pixels; None for the name's.
        dtype: of weights and features. They are cast once, not at every step.
        patch: let timm's and open_clip's towers run on `eva02_kernels`.

    Raises:
        ValueError: unknown name, or weights that do not fit. FileNotFoundError: no such file.
    """
    library, separator, model_name = name.partition(":")
    if not separator or is_run(name):
        library, model_name = "eva02", name
    if library not in _LIBRARIES:
        raise ValueError(f"unknown library {library!r} in {name!r}, expected {', '.join(_LIBRARIES)} or none")
    if checkpoint is None and not is_run(name):
        raise ValueError(f"the checkpoint of the teacher {name} is needed, or {RANDOM!r}")
    if checkpoint not in (None, RANDOM) and library != "open_clip" and not Path(str(checkpoint)).is_file():
        raise FileNotFoundError(f"no checkpoint of the teacher at {checkpoint}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            model = _LIBRARIES[library](model_name, checkpoint, img_size)
        except RuntimeError as error:  # timm's and open_clip's word for an unknown name and for weights that do not fit
            raise ValueError(f"the teacher {name} with {checkpoint}: {error}") from error
    teacher = Teacher(model, name)
    if patch and library != "eva02":
        from eva02_kernels.patching import patch as patch_modules

        patch_modules(teacher.tower)
    return teacher.to(device=device, dtype=dtype)


def _from_eva02(name: str, checkpoint: str | None, img_size: Any) -> nn.Module:
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if name in eva02.clip.list_models():
        tower = eva02.Eva02(eva02.clip.clip_config(name, **options).vision)
        if checkpoint != RANDOM:
            eva02.load_checkpoint(tower, str(checkpoint))
        return tower
    if checkpoint == RANDOM:
        return eva02.create_model(name, **options)
    if is_run(name) and not is_clip(name):
        options |= {"head": "classifier", "num_classes": 0}
    return load_model(name, checkpoint, **options)[0]


def _from_timm(name: str, checkpoint: str | None, img_size: Any) -> nn.Module:
    import timm

    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if checkpoint != RANDOM:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": checkpoint}}
    return timm.create_model(name, **options)


def _from_open_clip(name: str, checkpoint: str | None, img_size: Any) -> nn.Module:
    import open_clip

    return open_clip.create_model(
        name,
        pretrained=None if checkpoint == RANDOM else checkpoint,
        require_pretrained=checkpoint != RANDOM,
        force_image_size=img_size,
    )


_LIBRARIES = {"eva02": _from_eva02, "timm": _from_timm, "open_clip": _from_open_clip}
