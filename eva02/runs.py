"""Models by name and checkpoint, or by the folder of a training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import eva02.clip
from eva02.checkpoint import LoadReport, load_checkpoint
from eva02.model import create_model
from eva02.resize import ResizeRule


def is_run(name: str) -> bool:
    """Whether `name` is a folder that `eva02 pretrain` or `eva02 finetune` wrote."""
    return (Path(name) / "recipe.json").is_file()


def is_clip(name: str) -> bool:
    """Whether `name` is a CLIP model's, of two towers, or the folder of such a model's training."""
    if not is_run(name):
        return name in eva02.clip.list_models()
    return json.loads((Path(name) / "recipe.json").read_text())["task"] == "clip"


def load_model(
    name: str,
    checkpoint: str | None = None,
    *,
    resize: ResizeRule = "timm",
    ema: bool = True,
    strict_rope: bool = True,
    **overrides: Any,
) -> tuple[Any, LoadReport]:
    """A model with its weights, without drop path.

    Args:
        name: a name for `create_model` or `eva02.clip.create_model`, or a run's folder: then model, options and weights
            are the run's, averaged ones where it has them and `ema` is set.
        checkpoint: the weights' file; None for a run's own.
        resize, ema, strict_rope: as in `load_checkpoint`.
        **overrides: fields of `ModelConfig`.

    Raises:
        ValueError: a name without a checkpoint, or what `create_model` and `load_checkpoint` refuse.
    """
    if is_run(name):
        from eva02.recipes import get_preset

        folder, trained = Path(name), get_preset(str(Path(name) / "recipe.json")).model
        averaged = folder / "model_ema.safetensors"
        checkpoint = checkpoint or str(averaged if ema and averaged.is_file() else folder / "model.safetensors")
        name, overrides = trained.name, {**trained.options, **overrides}
    if checkpoint is None:
        raise ValueError(f"--checkpoint is needed: the weights of {name}, which is no folder of a training run")
    create: Any = eva02.clip.create_model if is_clip(name) else create_model
    model = create(name, **{**overrides, "drop_path_rate": 0.0})
    return model, load_checkpoint(model, checkpoint, resize=resize, ema=ema, strict_rope=strict_rope)
