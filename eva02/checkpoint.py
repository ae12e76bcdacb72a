"""Checkpoints of four upstreams in, timm's layout out.

A file is read with `weights_only=True`, its container and layout are recognised, names become timm's, projections are
split or fused as the model has them, and position embedding and patch kernel are resized. Everything that is wrong is
collected before anything is written, so one `CheckpointError` lists it all and the model is as it was.

| layout | recognised by | differs from timm in |
|---|---|---|
| timm | `mlp.fc1`, `mlp.fc1_g` | - |
| asuka (baaivision/EVA) | `mlp.w12`, `mlp.w1`, `mlp.w3`, `ffn_ln` | feed-forward and bias names, stored RoPE tables |
| mmpretrain | `backbone.` | block names, everything fused, a key bias, stored RoPE tables |

A `visual.` or `visual.trunk.` prefix (EVA-CLIP, open_clip) selects the vision tower of either of the first two.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from eva02.files import atomic_file
from eva02.model import Eva02
from eva02.resize import ResizeRule, resize_patch_kernel, resize_pos_embed

State = dict[str, Tensor]
PathLike = str | os.PathLike[str]

_EMA_CONTAINERS = ("model_ema", "state_dict_ema")
_CONTAINERS = ("model", "module", "state_dict")
_ASUKA_NAMES = {
    "w12": "fc1",
    "w1": "fc1_g",
    "w2": "fc1_x",
    "w3": "fc2",
    "ffn_ln": "norm",
    "inner_attn_ln": "norm",
}
_MIM_ONLY = ("mask_token", "lm_head.weight", "lm_head.bias")
_GRID_KEY = "eva02_grid"
_MAX_ROPE_ERROR = 1e-3


class CheckpointError(ValueError):
    """A checkpoint that does not fit. `problems` holds one line per thing that is wrong."""

    def __init__(self, path: PathLike, problems: Iterable[str]) -> None:
        self.path = os.fspath(path)
        self.problems = list(problems)
        super().__init__(f"{self.path}: " + "".join(f"\n  - {problem}" for problem in self.problems))


@dataclasses.dataclass
class LoadReport:
    """What a load did: `print(report)` gives one line per kind of change."""

    path: str
    layout: str = ""
    container: str = ""
    loaded: list[str] = dataclasses.field(default_factory=list)
    """Parameters that received values."""
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Stored name -> timm's name, where they differ."""
    converted: list[str] = dataclasses.field(default_factory=list)
    """Projections split or fused."""
    resized: list[str] = dataclasses.field(default_factory=list)
    """What was interpolated, from which shape to which, by which rule."""
    dropped: list[str] = dataclasses.field(default_factory=list)
    """Stored tensors the model has no use for."""
    fresh: list[str] = dataclasses.field(default_factory=list)
    """Parameters that keep the values they had, because the file cannot hold them."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.layout} layout, container {self.container}, {len(self.loaded)} tensors loaded"]
        for title in ("converted", "resized", "dropped", "fresh", "notes"):
            values = getattr(self, title)
            if values:
                shown = values if title in ("resized", "notes") else _shorten(values)
                lines.append(f"  {title}: {', '.join(shown)}")
        return "\n".join(lines)


def _shorten(keys: Iterable[str]) -> list[str]:
    """`blocks.0.x`, `blocks.1.x`, `blocks.3.x` -> `blocks.[0-1,3].x`: twelve blocks of the same fault read as one."""
    groups: dict[tuple[str, str], list[int]] = {}
    for key in keys:
        match = re.match(r"(.*?\b(?:blocks|layers)\.)(\d+)(\..*)", key)
        head, index, tail = match.groups() if match else (key, None, "")
        groups.setdefault((head, tail), []).extend([] if index is None else [int(index)])
    names = []
    for (head, tail), indices in groups.items():
        if not indices:
            names.append(head)
            continue
        runs: list[list[int]] = []
        for index in sorted(set(indices)):
            if runs and runs[-1][1] == index - 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        names.append(f"{head}{spans if len(indices) == 1 else f'[{spans}]'}{tail}")
    return names


# ---- reading -----------------------------------------------------------------------------------------------------
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


# ---- layouts -----------------------------------------------------------------------------------------------------
def _tower(state: State) -> tuple[State, list[str]]:
    """Vision tower of a two-tower file, and what was left out."""
    for prefix in ("visual.trunk.", "visual."):
        if any(key.startswith(prefix) for key in state):
            inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            return inside, [key for key in state if not key.startswith(prefix)]
    return state, []


def _layout(state: State) -> str | None:
    if any(key.startswith("backbone.") for key in state):
        return "mmpretrain"
    parts = {part for key in state if ".mlp." in key for part in key.split(".")}
    if parts & {"w12", "w1", "w2", "w3", "ffn_ln"}:
        return "asuka"
    if parts & {"fc1", "fc1_g", "fc1_x", "fc2"}:
        return "timm"
    return None


def _timm_name(key: str, layout: str) -> str:
    if layout == "timm":
        return key
    if layout == "mmpretrain":
        if key.startswith("head."):
            return key.replace("head.fc.", "head.", 1)
        key = key.removeprefix("backbone.").replace("layers.", "blocks.", 1)
        key = key.replace("patch_embed.projection.", "patch_embed.proj.", 1)
        key = re.sub(r"^ln1\.", "norm.", key)
        key = re.sub(r"^ln2\.", "fc_norm.", key)
    return ".".join(_ASUKA_NAMES.get(part, part) for part in key.split("."))


def _is_rope(key: str) -> bool:
    """Stored tables, of any age and layout; `rope.freqs` is learned (mixed RoPE) and not one of them."""
    return "rope" in key.split(".") and not key.endswith("rope.freqs")


def rope_table_error(key: str, table: Tensor, pretrain_grid: int = 16) -> float | None:
    """Largest difference of a stored `freqs_cos` or `freqs_sin` from EVA's formula on its own (square) grid.

    None where the tensor is no such table: then it says nothing about the weights.
    """
    if table.ndim < 2 or table.shape[-1] % 4 or not key.endswith(("freqs_cos", "freqs_sin")):
        return None
    table = table.double().reshape(-1, table.shape[-1])
    side, head_dim = math.isqrt(table.shape[0]), table.shape[1]
    if side * side != table.shape[0] or side == 0:
        return None
    omega = 10000.0 ** (-4.0 * torch.arange(head_dim // 4, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(side, dtype=torch.float64) / side * pretrain_grid, omega)
    angles = angles.repeat_interleave(2, dim=1)  # every frequency twice, adjacently: (side, D/2)
    rows = angles[:, None].expand(side, side, -1)
    expected = torch.cat([rows, rows.transpose(0, 1)], dim=-1).reshape(side * side, head_dim)
    expected = expected.cos() if key.endswith("cos") else expected.sin()
    return (table - expected).abs().max().item()


def _to_timm_names(state: State, strict_rope: bool, report: LoadReport, problems: list[str]) -> State:
    """Rename to timm's names; drop stored RoPE tables and key biases after checking that they may be dropped."""
    state, outside = _tower(state)
    report.dropped += outside
    layout = _layout(state)
    if layout is None:
        keys = ", ".join(list(state)[:6])
        problems.append(
            f"is no EVA checkpoint: none of the known block names among its {len(state)} keys ({keys}, ...)"
        )
        return {}
    report.layout = layout
    renamed: State = {}
    wrong_tables: list[str] = []
    key_biases: list[str] = []
    wrong_error = 0.0
    for key, value in state.items():
        if _is_rope(key):
            error = rope_table_error(key, value) if layout == "mmpretrain" else None
            if error is not None and not error <= _MAX_ROPE_ERROR:
                wrong_tables.append(key)
                wrong_error = max(wrong_error, error)
            report.dropped.append(key)
            continue
        name = _timm_name(key, layout)
        if name.endswith((".attn.k_bias", ".attn.k_proj.bias")):
            (key_biases if value.count_nonzero() else report.dropped).append(key)
            continue
        if name.endswith(".attn.qkv.bias"):
            if value.ndim != 1 or value.shape[0] % 3:
                problems.append(f"{key} has shape {tuple(value.shape)}, expected (3C,)")
                continue
            q_bias, k_bias, v_bias = value.chunk(3)
            if k_bias.count_nonzero():
                key_biases.append(key)
            base = name.removesuffix("qkv.bias")
            renamed[base + "q_bias"], renamed[base + "v_bias"] = q_bias, v_bias
            report.converted.append(key)
            continue
        if name in renamed:
            problems.append(f"{key} is stored twice: another tensor already becomes {name}")
        if name != key:
            report.renamed[key] = name
        renamed[name] = value
    for key in _shorten(key_biases):
        problems.append(f"{key}: the key bias is not zero; EVA-02 has none, and under RoPE it would change the result")
    if wrong_tables and strict_rope:
        for key in _shorten(wrong_tables):
            problems.append(
                f"{key}: the stored RoPE table differs from EVA's formula by up to {wrong_error:.3g} (allowed "
                f"{_MAX_ROPE_ERROR:g}); the weights were trained with another rotation. strict_rope=False loads them"
            )
    elif wrong_tables:
        report.notes.append(f"RoPE tables differ from EVA's formula by up to {wrong_error:.3g}; EVA's are used")
    if layout == "mmpretrain":
        report.notes.append("models trained in mmpretrain itself use norm_eps=1e-5; converted ones 1e-6")
    return renamed


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


def _fit_projections(state: State, split_qkv: bool, split_mlp: bool, report: LoadReport) -> None:
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


# ---- fitting a model ---------------------------------------------------------------------------------------------
def _fit_head(state: State, wanted: Mapping[str, Tensor], head: str, mim_norm: str, report: LoadReport) -> set[str]:
    """Settle heads and final norms in place; returns the parameters that may keep their own values."""
    optional: set[str] = set()
    from_mim = "mask_token" in state
    norms = ("norm.weight", "norm.bias"), ("fc_norm.weight", "fc_norm.bias")
    if from_mim and "mask_token" not in wanted:
        for key in _MIM_ONLY:
            if state.pop(key, None) is not None:
                report.dropped.append(key)
        optional |= {"head.weight", "head.bias"}
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


def _fit_sizes(
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
        report.resized.append(f"patch_embed.proj.weight {_by(kernel.shape[-2:])} -> {_by(new_size)} ({rule})")
    pos = state.get("pos_embed")
    if pos is None or model.pos_embed is None or pos.ndim != 3 or pos.shape[0] != 1:
        return
    prefix = model.num_prefix_tokens
    patches = pos.shape[1] - prefix
    if pos_grid is not None and pos_grid[0] * pos_grid[1] != patches:
        problems.append(f"pos_embed has {patches} patch rows, not the {_by(pos_grid)} of pos_grid")
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
        report.resized.append(f"pos_embed {_by(pos_grid)} -> {_by(model.grid_size)} ({rule})")


def _by(size: Iterable[int]) -> str:
    return "x".join(str(n) for n in size)


def _mismatches(state: State, wanted: Mapping[str, Tensor], optional: set[str]) -> Iterator[str]:
    missing = [key for key in wanted if key not in state and (key not in optional or wanted[key].is_meta)]
    if missing:
        yield f"missing ({len(missing)}): {', '.join(_shorten(missing))}"
    unexpected = [key for key in state if key not in wanted]
    if unexpected:
        yield f"unexpected ({len(unexpected)}): {', '.join(_shorten(unexpected))}"
    shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for key, value in state.items():
        if key in wanted and value.shape != wanted[key].shape:
            shapes.setdefault((tuple(value.shape), tuple(wanted[key].shape)), []).append(key)
        elif key in wanted and not value.is_floating_point():
            yield f"{key} is {value.dtype}, expected a floating type"
    for (stored, expected), keys in shapes.items():
        hint = "; head='fresh' keeps the model's own head" if "head.weight" in keys else ""
        yield f"wrong shape, {stored} stored and {expected} expected: {', '.join(_shorten(keys))}{hint}"


def _resolved_state(
    model: Eva02,
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
    if pos_grid is None and _GRID_KEY in metadata:
        rows, columns = metadata[_GRID_KEY].split("x")
        pos_grid = int(rows), int(columns)
    state = _to_timm_names(state, strict_rope, report, problems)
    if not state:
        raise CheckpointError(path, problems)
    wanted = model.state_dict()
    _fit_projections(
        state,
        split_qkv=any(key.endswith(".q_proj.weight") for key in wanted),
        split_mlp=any(key.endswith(".fc1_g.weight") for key in wanted),
        report=report,
    )
    optional = _fit_head(state, wanted, head, mim_norm, report)
    _fit_sizes(state, model, resize, pos_grid, report, problems)
    problems += _mismatches(state, wanted, optional)
    if problems:
        raise CheckpointError(path, problems)
    report.loaded = [key for key in wanted if key in state]
    report.fresh = [key for key in wanted if key not in state]
    return state, report


def load_checkpoint(
    model: Eva02,
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

    Stored RoPE tables are dropped: the model computes its own. Loading a pre-training file into a classifier keeps the
    classifier's own head; loading a classifier's file into a headless model drops the head.

    Args:
        model: from `create_model`; parameters may be on any device, or on meta (they are then materialised on the CPU).
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


# ---- writing -----------------------------------------------------------------------------------------------------
def save_checkpoint(model_or_state: nn.Module | Mapping[str, Tensor], path: PathLike) -> None:
    """Write a state dict in timm's layout, whole or not at all: a crash leaves the old file.

    Args:
        model_or_state: a model, or a state dict in timm's layout.
        path: .safetensors, or .pt / .pth for `torch.save`.
    """
    metadata = {"format": "pt"}
    if isinstance(model_or_state, nn.Module):
        grid = getattr(model_or_state, "grid_size", None)
        if grid is not None:
            metadata[_GRID_KEY] = _by(grid)
        model_or_state = model_or_state.state_dict()
    _write({key: value.detach() for key, value in model_or_state.items()}, Path(path), metadata)


def _write(state: State, path: Path, metadata: dict[str, str]) -> None:
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"save as .safetensors, .pt or .pth, got {path.name!r}")
    with atomic_file(path) as file:
        if path.suffix == ".safetensors":
            # Copies: safetensors refuses views that share storage.
            tensors = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
            file.write(safetensors.torch.save(tensors, metadata=metadata))
        else:
            torch.save(state, file)


def convert_checkpoint(
    source: PathLike,
    target: PathLike,
    *,
    model: Eva02 | None = None,
    resize: ResizeRule = "timm",
    ema: bool = True,
    strict_rope: bool = True,
) -> LoadReport:
    """Rewrite a checkpoint in timm's layout.

    Args:
        source, target: files; the target is written atomically.
        model: check against this model (it may be on meta and is not changed) and resize to it. None only renames:
            models with sub-LN get split projections and the others fused ones, as in timm.
        resize, ema, strict_rope: as in `load_checkpoint`.
    """
    if model is not None:
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
        metadata = {"format": "pt", _GRID_KEY: _by(model.grid_size)}
    else:
        report = LoadReport(os.fspath(source))
        problems: list[str] = []
        state, report.container, metadata = read_state_dict(source, ema=ema)
        state = _to_timm_names(state, strict_rope, report, problems)
        if problems:
            raise CheckpointError(source, problems)
        sub_ln = any(re.fullmatch(r"blocks\.\d+\.mlp\.norm\.weight", key) for key in state)
        _fit_projections(state, split_qkv=sub_ln, split_mlp=sub_ln, report=report)
        report.loaded = list(state)
        metadata = {"format": "pt"} | {key: metadata[key] for key in (_GRID_KEY,) if key in metadata}
    _write(state, Path(target), metadata)
    return report
