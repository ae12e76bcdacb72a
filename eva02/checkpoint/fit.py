"""A state dict in timm's names made to fit a model: projections split or fused, heads settled, sizes resized."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from eva02.checkpoint.files import State
from eva02.checkpoint.report import LoadReport, shorten
from eva02.model import Eva02
from eva02.resize import ResizeRule, resize_patch_kernel, resize_pos_embed

_MIM_ONLY = ("mask_token", "lm_head.weight", "lm_head.bias")


def _block_prefixes(state: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(m[1] for key in state if (m := re.match(r"(blocks\.\d+\.)", key))))


def _split(state: State, stored: str, parts: tuple[str, ...], report: LoadReport) -> None:
    value = state.get(stored)
    if value is not None and value.ndim and value.shape[0] % len(parts) == 0:
        state |= zip(parts, state.pop(stored).chunk(len(parts)), strict=True)
        report.converted.append(stored)


def _fuse(state: State, parts: tuple[str, ...], wanted: str, report: LoadReport) -> None:
    values = [state[part] for part in parts if part in state]
    if len(values) == len(parts) and all(v.ndim and v.shape[1:] == values[0].shape[1:] for v in values):
        state[wanted] = torch.cat([state.pop(part) for part in parts])
        report.converted.append(wanted)


def fit_projections(state: State, split_qkv: bool, split_mlp: bool, report: LoadReport) -> None:
    """Split or fuse q, k, v and gate, value in place. Rows are [q; k; v] and [gate; value].

    Tensors whose shapes do not allow it stay, and are then reported as unexpected.
    """
    for block in _block_prefixes(state):
        attn, mlp = block + "attn.", block + "mlp."
        fused, split = attn + "qkv.weight", tuple(f"{attn}{name}_proj.weight" for name in "qkv")
        if split_qkv:
            _split(state, fused, split, report)
        else:
            _fuse(state, split, fused, report)
        for name in "qv":
            stored, wanted = f"{attn}{name}_bias", f"{attn}{name}_proj.bias"
            if not split_qkv:
                stored, wanted = wanted, stored
            if stored in state and wanted not in state:
                state[wanted] = state.pop(stored)
        for kind in ("weight", "bias"):
            packed, parts = f"{mlp}fc1.{kind}", (f"{mlp}fc1_g.{kind}", f"{mlp}fc1_x.{kind}")
            if split_mlp:
                _split(state, packed, parts, report)
            else:
                _fuse(state, parts, packed, report)


def fit_head(state: State, wanted: Mapping[str, Tensor], head: str, mim_norm: str, report: LoadReport) -> set[str]:
    """Settle heads and final norms in place; returns the parameters that may keep their own values."""
    optional: set[str] = set()
    from_mim = "mask_token" in state
    norms = ("norm.weight", "norm.bias"), ("fc_norm.weight", "fc_norm.bias")
    if from_mim and "mask_token" not in wanted:
        for key in _MIM_ONLY:
            if state.pop(key, None) is not None:
                report.dropped.append(key)
        optional |= {"head.weight", "head.bias"}
        # The norms inside the attention of CLIP's towers begin with it.
        optional |= {key for key in wanted if re.fullmatch(r"blocks\.\d+\.attn\.norm\.(weight|bias)", key)}
        for norm, fc_norm in zip(*norms, strict=True):
            if norm in state and norm not in wanted:
                value = state.pop(norm)
                if mim_norm == "fc_norm" and fc_norm in wanted:
                    state.setdefault(fc_norm, value)
                    report.renamed[norm] = fc_norm
                else:
                    report.dropped.append(norm)
                    optional.add(fc_norm)
    elif "fc_norm.weight" not in state and "norm.weight" not in state and "head.weight" not in state:
        optional |= {*norms[0], *norms[1], "head.weight", "head.bias"}  # a bare backbone, as mmpretrain publishes
    for key in ("head.weight", "head.bias", "lm_head.weight", "lm_head.bias"):
        if key in state and (key not in wanted or head == "fresh"):
            del state[key]
            report.dropped.append(key)
    if head == "fresh":
        optional |= {"head.weight", "head.bias", *_MIM_ONLY, *norms[0], *norms[1]}
        for key in (*norms[0], *norms[1], "mask_token"):
            if key in state and key not in wanted:
                del state[key]
                report.dropped.append(key)
    return optional


def fit_sizes(
    state: State,
    model: Eva02,
    rule: ResizeRule,
    pos_grid: tuple[int, int] | None,
    report: LoadReport,
    problems: list[str],
) -> None:
    """Resize patch kernel and position embedding in place."""
    kernel, target = state.get("patch_embed.proj.weight"), model.patch_embed.proj.weight
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-2:] != target.shape[-2:]:
        new_size = (target.shape[-2], target.shape[-1])
        state["patch_embed.proj.weight"] = resize_patch_kernel(kernel, new_size, rule)
        report.resized.append(f"patch_embed.proj.weight {by(kernel.shape[-2:])} -> {by(new_size)} ({rule})")
    pos = state.get("pos_embed")
    if pos is None or model.pos_embed is None or pos.ndim != 3 or pos.shape[0] != 1:
        return
    prefix = model.num_prefix_tokens
    patches = pos.shape[1] - prefix
    if pos_grid is not None and pos_grid[0] * pos_grid[1] != patches:
        problems.append(f"pos_embed has {patches} patch rows, not the {by(pos_grid)} of pos_grid")
        return
    if pos_grid is None:
        side = math.isqrt(max(patches, 0))
        if model.grid_size[0] * model.grid_size[1] == patches and side * side != patches:
            pos_grid = model.grid_size
        elif side * side == patches and patches > 0:
            pos_grid = (side, side)
        else:
            problems.append(f"pos_embed has {patches} patch rows, no square grid; pass pos_grid=(rows, columns)")
            return
    if pos_grid != model.grid_size:
        state["pos_embed"] = resize_pos_embed(pos, model.grid_size, pos_grid, prefix, rule)
        report.resized.append(f"pos_embed {by(pos_grid)} -> {by(model.grid_size)} ({rule})")


def by(size: Iterable[int]) -> str:
    return "x".join(str(n) for n in size)


def mismatches(state: State, wanted: Mapping[str, Tensor], optional: set[str]) -> Iterator[str]:
    missing = [key for key in wanted if key not in state and (key not in optional or wanted[key].is_meta)]
    if missing:
        yield f"missing ({len(missing)}): {', '.join(shorten(missing))}"
    unexpected = [key for key in state if key not in wanted]
    if unexpected:
        yield f"unexpected ({len(unexpected)}): {', '.join(shorten(unexpected))}"
    shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for key, value in state.items():
        if key in wanted and value.shape != wanted[key].shape:
            shapes.setdefault((tuple(value.shape), tuple(wanted[key].shape)), []).append(key)
        elif key in wanted and not value.is_floating_point():
            yield f"{key} is {value.dtype}, expected a floating type"
    for (stored, expected), keys in shapes.items():
        hint = "; head='fresh' keeps the model's own head" if "head.weight" in keys else ""
        yield f"wrong shape, {stored} stored and {expected} expected: {', '.join(shorten(keys))}{hint}"
