"""Checkpoint files: read without running their code, whatever they are wrapped in, and written whole."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from eva02.checkpoint.report import CheckpointError, PathLike
from eva02.files import atomic_file

State = dict[str, Tensor]

GRID_KEY = "eva02_grid"
_EMA_CONTAINERS = ("model_ema", "state_dict_ema")
_CONTAINERS = ("model", "module", "state_dict")


def _read_file(path: Path) -> tuple[Any, dict[str, str]]:
    """Stored object and, for safetensors, its metadata. Anything unreadable is a CheckpointError."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(path, ["is a directory, expected one .pt, .pth or .safetensors file"])
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        # Training scripts store their arguments beside the weights; a Namespace holds values and runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(path, [_reading_problem(path, error)]) from error


def _reading_problem(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    text = str(error)
    if size == 0:
        return "is empty (0 bytes)"
    unsafe = re.search(r"nsupported (?:global: GLOBAL|GLOBAL|class) ([\w.]+)", text)
    if unsafe:
        return (
            f"holds a {unsafe[1]} object; only tensors and plain containers are read (weights_only=True). Open it with "
            "the program that wrote it and save the state dict alone"
        )
    # torch's own text for a refused pickle recommends turning the protection off; its last sentence says what failed.
    reason = re.search(r"WeightsUnpickler error: *([^\n]+)", text) or re.match(r"\s*([^\n]+)", text)
    detail = type(error).__name__ if reason is None or reason[1].startswith("Weights only load failed") else reason[1]
    return f"cannot be read as {path.suffix or 'a checkpoint'} ({size} bytes): truncated or not a checkpoint ({detail})"


def read_state_dict(path: PathLike, *, ema: bool = True) -> tuple[State, str, dict[str, str]]:
    """Tensors of a checkpoint file, whatever it is wrapped in.

    Args:
        path: .pt, .pth, .bin or .safetensors.
        ema: prefer averaged weights (`model_ema`, `state_dict_ema`) where the file has both.

    Returns:
        State dict with `module.` and `_orig_mod.` prefixes removed, name of the container ("root" for none),
        safetensors metadata.
    """
    stored, metadata = _read_file(Path(path))
    names = (*_EMA_CONTAINERS, *_CONTAINERS) if ema else (*_CONTAINERS, *_EMA_CONTAINERS)
    container = []
    while isinstance(stored, Mapping):
        name = next((name for name in names if isinstance(stored.get(name), Mapping)), None)
        if name is None:
            break
        container.append(name)
        stored = stored[name]
    problems = _not_a_state_dict(stored)
    if problems:
        raise CheckpointError(path, problems)
    state: State = {}
    for key, value in stored.items():
        while key.startswith(("module.", "_orig_mod.")):
            key = key.partition(".")[2]
        if key in state:
            problems.append(f"{key} is stored twice, with and without a wrapper's prefix")
        state[key] = value
    if problems:
        raise CheckpointError(path, problems)
    return state, ".".join(container) or "root", metadata


def _not_a_state_dict(stored: Any) -> list[str]:
    if not isinstance(stored, Mapping):
        return [f"is not a state dict: it holds a {type(stored).__name__}"]
    if not stored:
        return ["is not a state dict: it is an empty dict"]
    odd = [f"{key!r}: {type(value).__name__}" for key, value in stored.items() if not isinstance(value, Tensor)]
    odd += [f"{key!r}: a key that is no string" for key in stored if not isinstance(key, str)]
    if not odd:
        return []
    if len(odd) >= len(stored):
        return [f"is not a state dict: a dict without tensors ({', '.join(odd[:8])}{', ...' if len(odd) > 8 else ''})"]
    return [f"entry {entry}, expected a tensor" for entry in odd]


def save_checkpoint(
    model_or_state: nn.Module | Mapping[str, Tensor], path: PathLike, *, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a state dict in timm's layout, whole or not at all: a crash leaves the old file.

    Args:
        model_or_state: a model, or a state dict in timm's layout.
        path: .safetensors, or .pt / .pth for `torch.save`.
        state: the model's, where `model.state_dict()` is not it: gathered from shards.
    """
    metadata = {"format": "pt"}
    if isinstance(model_or_state, nn.Module):
        grid = getattr(getattr(model_or_state, "visual", model_or_state), "grid_size", None)
        if grid is not None:
            metadata[GRID_KEY] = "x".join(str(n) for n in grid)
        model_or_state = model_or_state.state_dict() if state is None else state
    write_state_dict({key: value.detach() for key, value in model_or_state.items()}, Path(path), metadata)


def write_state_dict(state: State, path: Path, metadata: dict[str, str]) -> None:
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"save as .safetensors, .pt or .pth, got {path.name!r}")
    with atomic_file(path) as file:
        if path.suffix == ".safetensors":
            # Copies: safetensors refuses views that share storage.
            tensors = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
            file.write(safetensors.torch.save(tensors, metadata=metadata))
        else:
            torch.save(state, file)
