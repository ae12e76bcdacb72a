"""Files of every layout into models, and into files of every other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from eva02.checkpoint.files import GRID_KEY, State, read_state_dict, write_state_dict
from eva02.checkpoint.fit import by, fit_head, fit_projections, fit_sizes, mismatches
from eva02.checkpoint.layouts import LAYOUTS, from_stored, is_clip, to_stored
from eva02.checkpoint.report import CheckpointError, LoadReport, PathLike
from eva02.resize import ResizeRule


def _resolved_state(
    model: nn.Module,
    path: PathLike,
    *,
    resize: ResizeRule,
    head: str,
    mim_norm: str,
    ema: bool,
    strict_rope: bool,
    pos_grid: tuple[int, int] | None,
) -> tuple[State, LoadReport]:
    for name, value, allowed in (
        ("resize", resize, ("timm", "official")),
        ("head", head, ("auto", "fresh")),
        ("mim_norm", mim_norm, ("fc_norm", "fresh")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is one of {allowed}, got {value!r}")
    report = LoadReport(os.fspath(path))
    problems: list[str] = []
    state, report.container, metadata = read_state_dict(path, ema=ema)
    if pos_grid is None:
        pos_grid = _stored_grid(metadata)
    wanted = model.state_dict()
    k_bias = any(key.endswith(".attn.qkv.bias") for key in wanted)
    state = from_stored(state, strict_rope, report, problems, k_bias=k_bias)
    if not state:
        raise CheckpointError(path, problems)
    tower: Any = getattr(model, "visual", model)
    vision, rest = _towers(state)
    tower_wanted = tower.state_dict()
    fit_projections(
        vision,
        split_qkv=any(key.endswith(".q_proj.weight") for key in tower_wanted),
        split_mlp=any(key.endswith(".fc1_g.weight") for key in tower_wanted),
        report=report,
    )
    optional = fit_head(vision, tower_wanted, head, mim_norm, report)
    fit_sizes(vision, tower, resize, pos_grid, report, problems)
    if tower is model:
        report.dropped += rest
        state = vision
    else:
        state = {f"visual.{key}": value for key, value in vision.items()} | rest
        optional = {f"visual.{key}" for key in optional}
    problems += mismatches(state, wanted, optional)
    if problems:
        raise CheckpointError(path, problems)
    report.loaded = [key for key in wanted if key in state]
    report.fresh = [key for key in wanted if key not in state]
    return state, report


def _stored_grid(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    if GRID_KEY not in metadata:
        return None
    rows, columns = metadata[GRID_KEY].split("x")
    return int(rows), int(columns)


def _towers(state: State) -> tuple[State, State]:
    """(the vision tower by bare names, the rest)"""
    if not is_clip(state):
        return state, {}
    vision = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    return vision, {key: value for key, value in state.items() if not key.startswith("visual.")}


def load_checkpoint(
    model: nn.Module,
    path: PathLike,
    *,
    resize: ResizeRule = "timm",
    head: Literal["auto", "fresh"] = "auto",
    mim_norm: Literal["fc_norm", "fresh"] = "fc_norm",
    ema: bool = True,
    strict_rope: bool = True,
    pos_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Load a checkpoint of any supported upstream into a model.

    Stored RoPE tables are dropped: the model computes its own. A vision model takes its tower out of a CLIP file.
    Loading a pre-training file into a classifier keeps the classifier's own head; loading a classifier's file into a
    headless model drops the head.

    Args:
        model: from `create_model` or `eva02.clip.create_model`; parameters may be on any device, or on meta (they are
            then materialised on the CPU).
        path: .pt, .pth, .bin or .safetensors.
        resize: whose rule resizes position embedding and patch kernel, "timm" or "official" (see `eva02.resize`).
        head: "fresh" keeps the model's own head, mask token and final norm where the file's do not fit, for another
            set of classes.
        mim_norm: what becomes of a pre-training file's final norm in a mean-pooling model: "fc_norm" moves it there
            (timm), "fresh" leaves fc_norm as it is (the official fine-tuning).
        ema: prefer averaged weights where the file has both.
        strict_rope: refuse mmpretrain files whose stored RoPE tables are not EVA's.
        pos_grid: (rows, columns) of the stored position embedding; needed only if not square and not saved by us.

    Returns:
        LoadReport.

    Raises:
        CheckpointError: lists everything that is wrong; the model is unchanged. FileNotFoundError.
    """
    state, report = _resolved_state(
        model,
        path,
        resize=resize,
        head=head,
        mim_norm=mim_norm,
        ema=ema,
        strict_rope=strict_rope,
        pos_grid=pos_grid,
    )
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if on_meta:
        # assign=True takes the stored dtype; the model's own is what the caller chose.
        wanted = model.state_dict()
        state = {key: value.to(wanted[key].dtype).clone() for key, value in state.items()}
    model.load_state_dict(state, strict=False, assign=on_meta)
    return report


def convert_checkpoint(
    source: PathLike,
    target: PathLike,
    *,
    layout: str = "timm",
    model: nn.Module | None = None,
    resize: ResizeRule = "timm",
    ema: bool = True,
    strict_rope: bool = True,
) -> LoadReport:
    """Rewrite a checkpoint in another layout; there and back is the same to the last bit.

    Args:
        source, target: files; the target is written atomically.
        layout: "timm" (for two towers `visual.`, `text.` and `logit_scale`), "asuka" (official EVA and EVA-CLIP),
            "mmpretrain", "open_clip" or "transformers" (TimmWrapper; for two towers the names of CLIPModel).
        model: check against this model (it may be on meta and is not changed) and resize to it. None only renames:
            models with sub-LN get split projections and the others fused ones, as in timm.
        resize, ema, strict_rope: as in `load_checkpoint`.

    Raises:
        CheckpointError: lists everything that is wrong with the source. ValueError: the layout has no such files.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
    grid, head_dim = None, 64
    if model is not None:
        tower: Any = getattr(model, "visual", model)
        grid, head_dim = tower.grid_size, tower.embed_dim // tower.config.num_heads
        state, report = _resolved_state(
            model,
            source,
            resize=resize,
            head="auto",
            mim_norm="fc_norm",
            ema=ema,
            strict_rope=strict_rope,
            pos_grid=None,
        )
    else:
        report = LoadReport(os.fspath(source))
        problems: list[str] = []
        state, report.container, metadata = read_state_dict(source, ema=ema)
        grid = _stored_grid(metadata)
        state = from_stored(state, strict_rope, report, problems)
        if problems:
            raise CheckpointError(source, problems)
        report.loaded = list(state)
    state = to_stored(state, layout, report, grid=grid, head_dim=head_dim)
    write_state_dict(state, Path(target), {"format": "pt"} | ({GRID_KEY: by(grid)} if grid else {}))
    return report
