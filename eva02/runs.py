"""Models by name and checkpoint, or by the folder of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eva02.clip
from eva02.checkpoint import LoadReport, load_checkpoint
from eva02.model import create_model
from eva02.resize import ResizeRule


def is_run(name: str) -> bool:
    """Whether `name` is a folder that a training command wrote."""
    return (Path(name) / "recipe.json").is_file()


def is_clip(name: str) -> bool:
    """Whether `name` is a CLIP model's, of two towers, or the folder of such a model's training."""
    return run_recipe(name).task == "clip" if is_run(name) else name in eva02.clip.list_models()


def run_recipe(folder: str) -> Any:
    """The `eva02.recipes.Recipe` of a training run."""
    from eva02.recipes import get_preset

    return get_preset(str(Path(folder) / "recipe.json"))


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
    if checkpoint is None and not is_run(name):
        raise ValueError(f"--checkpoint is needed: the weights of {name}, which is no folder of a training run")
    if checkpoint is None:
        averaged = Path(name) / "model_ema.safetensors"
        checkpoint = str(averaged if ema and averaged.is_file() else Path(name) / "model.safetensors")
    model = _create(name, {**overrides, "drop_path_rate": 0.0})
    return model, load_checkpoint(model, checkpoint, resize=resize, ema=ema, strict_rope=strict_rope)


def _create(name: str, overrides: dict[str, Any]) -> Any:
    if not is_run(name):
        return (eva02.clip.create_model if is_clip(name) else create_model)(name, **overrides)
    recipe = run_recipe(name).override({f"model.{field}": value for field, value in overrides.items()})
    if recipe.task != "clip":
        return create_model(recipe.model.name, **recipe.model.options)
    from eva02.train.clip import make_model

    return make_model(recipe)
