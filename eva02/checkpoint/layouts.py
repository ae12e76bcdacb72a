"""How each upstream names and arranges weights: one table a layout, which is read in both directions.

Ours are timm's names; of two towers `visual.` and timm's, `text.` and `logit_scale` as in open_clip.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eva02.checkpoint.files import State
from eva02.checkpoint.fit import fit_projections
from eva02.checkpoint.report import LoadReport, shorten

_MAX_ROPE_ERROR = 1e-3


# ---- tables ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rule:
    """One parameter's name here and in a file; {i} is a block's number, {p} weight or bias.

    Several stored names: parts of ours, row blocks in that order.
    """

    ours: str
    stored: str | tuple[str, ...]
    mlp: Literal["", "gated", "gelu"] = ""
    """Of models with such feed-forward networks alone."""
    leading: int = 0
    """Dimensions of one element that ours begins with and the stored lacks."""
    transposed: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.stored,) if isinstance(self.stored, str) else self.stored


@dataclass(frozen=True)
class Names:
    """Where a layout puts a vision tower: behind a prefix, by these rules; names without a rule are timm's."""

    prefix: str = ""
    rules: tuple[Rule, ...] = ()
    text_rules: tuple[Rule, ...] = ()
    """Of the text tower's names, which are open_clip's where there is no rule."""


@dataclass(frozen=True)
class Layout:
    """Names of a vision model alone, and in a file of two towers; None where the layout has no such files."""

    alone: Names
    clip: Names | None
    qkv: Literal["timm", "fused", "split"] = "timm"
    """Projections of q, k and v, and of gate and value; timm and the official code split those of sub-LN models."""
    bias: Literal["timm", "separate", "fused"] = "timm"
    """Of q and v: where timm has it; always `q_bias` and `v_bias`; or in `qkv.bias`, with zeros for k."""
    rope_tables: bool = False
    """Tables of the rotation are stored, once and in each block."""
    mim: bool = True
    """Has names for what pre-training alone needs."""


_ASUKA = (
    Rule("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.w12.{p}", "gated"),
    Rule("blocks.{i}.mlp.fc1_g.{p}", "blocks.{i}.mlp.w1.{p}"),
    Rule("blocks.{i}.mlp.fc1_x.{p}", "blocks.{i}.mlp.w2.{p}"),
    Rule("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.w3.{p}", "gated"),
    Rule("blocks.{i}.mlp.norm.{p}", "blocks.{i}.mlp.ffn_ln.{p}"),
    Rule("blocks.{i}.attn.norm.{p}", "blocks.{i}.attn.inner_attn_ln.{p}"),
)
_MMPRETRAIN = (
    Rule("head.{p}", "head.fc.{p}"),
    Rule("cls_token", "backbone.cls_token"),
    Rule("pos_embed", "backbone.pos_embed"),
    Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
    Rule("norm.{p}", "backbone.ln1.{p}"),
    Rule("fc_norm.{p}", "backbone.ln2.{p}"),
    Rule("blocks.{i}.mlp.fc1.{p}", "backbone.layers.{i}.mlp.w12.{p}", "gated"),
    Rule("blocks.{i}.mlp.fc1_g.{p}", "backbone.layers.{i}.mlp.w1.{p}"),
    Rule("blocks.{i}.mlp.fc1_x.{p}", "backbone.layers.{i}.mlp.w2.{p}"),
    Rule("blocks.{i}.mlp.fc2.{p}", "backbone.layers.{i}.mlp.w3.{p}", "gated"),
    Rule("blocks.{i}.norm1.{p}", "backbone.layers.{i}.ln1.{p}", "gelu"),
    Rule("blocks.{i}.norm2.{p}", "backbone.layers.{i}.ln2.{p}", "gelu"),
    Rule("blocks.{i}.mlp.fc1.{p}", "backbone.layers.{i}.ffn.layers.0.0.{p}", "gelu"),
    Rule("blocks.{i}.mlp.fc2.{p}", "backbone.layers.{i}.ffn.layers.1.{p}", "gelu"),
    *(
        Rule(f"blocks.{{i}}.{name}", f"backbone.layers.{{i}}.{name}")
        for name in (
            *("norm1.{p}", "norm2.{p}", "mlp.norm.{p}", "attn.norm.{p}", "attn.proj.{p}", "attn.qkv.{p}"),
            *(
                "attn.q_bias",
                "attn.k_bias",
                "attn.v_bias",
                *(f"attn.{n}_proj.{{p}}" for n in "qkv"),
                "gamma_1",
                "gamma_2",
            ),
        )
    ),
)
# transformers' CLIPModel; gates as its DINOv3 names them, norms inside attention and MLP as its Kosmos-2.
_VISION = "vision_model.encoder.layers.{i}."
_TEXT, _OURS = "text_model.encoder.layers.{i}.", "transformer.resblocks.{i}."
_TRANSFORMERS = (
    Rule("cls_token", "vision_model.embeddings.class_embedding", leading=2),
    Rule("pos_embed", "vision_model.embeddings.position_embedding.weight", leading=1),
    Rule("patch_embed.proj.{p}", "vision_model.embeddings.patch_embedding.{p}"),
    Rule("norm.{p}", "vision_model.post_layernorm.{p}"),
    Rule("fc_norm.{p}", "vision_model.pooled_layernorm.{p}"),
    Rule("head.{p}", "visual_projection.{p}"),
    Rule("blocks.{i}.norm1.{p}", _VISION + "layer_norm1.{p}"),
    Rule("blocks.{i}.norm2.{p}", _VISION + "layer_norm2.{p}"),
    Rule("blocks.{i}.gamma_1", _VISION + "layer_scale1.lambda1"),
    Rule("blocks.{i}.gamma_2", _VISION + "layer_scale2.lambda1"),
    *(Rule(f"blocks.{{i}}.attn.{n}_proj.{{p}}", f"{_VISION}self_attn.{n}_proj.{{p}}") for n in "qkv"),
    Rule("blocks.{i}.attn.proj.{p}", _VISION + "self_attn.out_proj.{p}"),
    Rule("blocks.{i}.attn.norm.{p}", _VISION + "self_attn.inner_attn_ln.{p}"),
    Rule("blocks.{i}.mlp.fc1_g.{p}", _VISION + "mlp.gate_proj.{p}"),
    Rule("blocks.{i}.mlp.fc1_x.{p}", _VISION + "mlp.up_proj.{p}"),
    Rule("blocks.{i}.mlp.fc2.{p}", _VISION + "mlp.down_proj.{p}", "gated"),
    Rule("blocks.{i}.mlp.norm.{p}", _VISION + "mlp.ffn_layernorm.{p}"),
    Rule("blocks.{i}.mlp.fc1.{p}", _VISION + "mlp.fc1.{p}", "gelu"),
    Rule("blocks.{i}.mlp.fc2.{p}", _VISION + "mlp.fc2.{p}", "gelu"),
)
_TRANSFORMERS_TEXT = (
    Rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rule("ln_final.{p}", "text_model.final_layer_norm.{p}"),
    Rule("text_projection", "text_projection.weight", transposed=True),
    Rule(_OURS + "ln_1.{p}", _TEXT + "layer_norm1.{p}"),
    Rule(_OURS + "ln_2.{p}", _TEXT + "layer_norm2.{p}"),
    Rule(_OURS + "attn.in_proj_{p}", tuple(f"{_TEXT}self_attn.{n}_proj.{{p}}" for n in "qkv")),
    Rule(_OURS + "attn.out_proj.{p}", _TEXT + "self_attn.out_proj.{p}"),
    Rule(_OURS + "mlp.c_fc.{p}", _TEXT + "mlp.fc1.{p}"),
    Rule(_OURS + "mlp.c_proj.{p}", _TEXT + "mlp.fc2.{p}"),
)
LAYOUTS = {
    "timm": Layout(alone=Names(), clip=Names("visual.")),
    "asuka": Layout(alone=Names("", _ASUKA), clip=Names("visual.", _ASUKA), bias="separate", rope_tables=True),
    "mmpretrain": Layout(
        alone=Names("", _MMPRETRAIN), clip=None, qkv="fused", bias="fused", rope_tables=True, mim=False
    ),
    "open_clip": Layout(alone=Names("visual.trunk."), clip=Names("visual.trunk.")),
    "transformers": Layout(alone=Names("timm_model."), clip=Names("", _TRANSFORMERS, _TRANSFORMERS_TEXT), qkv="split"),
}
"""asuka is the official one, of EVA and EVA-CLIP; transformers' is that of its TimmWrapper models and of CLIPModel."""

_OLD_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


# ---- one rule --------------------------------------------------------------------------------------------------------
@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>weight|bias)")
    return re.compile(pattern)


def _matched(template: str, key: str) -> dict[str, str] | None:
    match = _pattern(template).fullmatch(key)
    return None if match is None else match.groupdict()


def _to_ours(state: State, rules: tuple[Rule, ...], report: LoadReport, problems: list[str]) -> State:
    """Stored names and shapes become ours; what no rule knows keeps its name."""
    renamed: State = {}
    parts: dict[str, dict[int, Tensor]] = {}
    whole: dict[str, Rule] = {}
    for key, value in state.items():
        found = next(
            (
                (rule, k, m)
                for rule in rules
                for k, part in enumerate(rule.parts)
                if (m := _matched(part, key)) is not None
            ),
            None,
        )
        name = key
        if found is not None:
            rule, k, fields = found
            name = rule.ours.format(**fields)
            if len(rule.parts) > 1:
                parts.setdefault(name, {})[k] = value
                whole[name] = rule
                report.renamed[key] = name
                continue
            value = value.reshape((1,) * rule.leading + tuple(value.shape))
            value = value.T if rule.transposed and value.ndim == 2 else value
        if name in renamed:
            problems.append(f"{key} is stored twice: another tensor already becomes {name}")
        if name != key:
            report.renamed[key] = name
        renamed[name] = value
    for name, found_parts in parts.items():
        if len(found_parts) < len(whole[name].parts):
            problems.append(f"{name}: {len(found_parts)} of its {len(whole[name].parts)} parts are stored")
        else:
            renamed[name] = torch.cat([found_parts[k] for k in sorted(found_parts)])
            report.converted.append(name)
    return renamed


def _to_stored(state: State, rules: tuple[Rule, ...], gated: bool) -> State:
    """Our names and shapes become those of a layout."""
    rules = tuple(rule for rule in rules if rule.mlp in ("", "gated" if gated else "gelu"))
    stored: State = {}
    for name, value in state.items():
        found = next(((rule, m) for rule in rules if (m := _matched(rule.ours, name)) is not None), None)
        if found is None:
            stored[name] = value
            continue
        rule, fields = found
        value = value.reshape(value.shape[rule.leading :]) if rule.leading else value
        value = value.T if rule.transposed else value
        names = [part.format(**fields) for part in rule.parts]
        stored |= zip(names, value.chunk(len(names)), strict=True)
    return stored


# ---- reading ---------------------------------------------------------------------------------------------------------
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
    expected = _rope_tables(side, head_dim, pretrain_grid, torch.float64)["cos" if key.endswith("cos") else "sin"]
    return (table - expected).abs().max().item()


def _rope_tables(side: int, head_dim: int, pretrain_grid: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """EVA's cosines and sines of a square grid, (side * side, head_dim), in the order of its operations."""
    omega = 1.0 / 10000.0 ** (torch.arange(0, head_dim // 2, 2, dtype=dtype) / (head_dim // 2))
    angles = torch.outer(torch.arange(side, dtype=dtype) / side * pretrain_grid, omega)
    angles = angles.repeat_interleave(2, dim=1)  # every frequency twice, adjacently: (side, D/2)
    rows = angles[:, None].expand(side, side, -1)
    angles = torch.cat([rows, rows.transpose(0, 1)], dim=-1).reshape(side * side, head_dim)
    return {"cos": angles.cos(), "sin": angles.sin()}


def _layout(state: State) -> str | None:
    """A file's layout by its names; of EVA's GELU models the official names are timm's."""
    prefixes = {"backbone.": "mmpretrain", "visual.trunk.": "open_clip"}
    prefixes |= dict.fromkeys(("vision_model.", "text_model.", "timm_model."), "transformers")
    for prefix, layout in prefixes.items():
        if any(key.startswith(prefix) for key in state):
            return layout
    parts = {part for key in state if ".mlp." in key for part in key.split(".")}
    if parts & {"w12", "w1", "w2", "w3", "ffn_ln"}:
        return "asuka"
    if parts & {"fc1", "fc1_g", "fc1_x", "fc2"}:
        return "timm"
    return None


def is_clip(state: Mapping[str, Tensor]) -> bool:
    """Two towers, by our names."""
    return any(key.startswith("text.") or key == "logit_scale" for key in state)


def _old_names(state: State) -> State:
    """EVA-CLIP's first files have the text tower's names without a prefix."""
    if not any(key.startswith("visual.") for key in state):
        return state
    names = {key: f"text.{key}" if key.startswith(_OLD_TEXT) else key for key in state}
    return {("logit_scale" if name == "text.logit_scale" else name): state[key] for key, name in names.items()}


def from_stored(
    state: State, strict_rope: bool, report: LoadReport, problems: list[str], *, k_bias: bool | None = None
) -> State:
    """A file's state dict in our names: `visual.`, `text.` and `logit_scale` for two towers, bare for one.

    Stored RoPE tables and key biases are dropped after checking that they may be. `k_bias`: the model has one; None:
    one that is not zero is kept where it can be meant, in models without gates, which have no RoPE.
    """
    layout = _layout(state)
    if layout is None:
        keys = ", ".join(list(state)[:6])
        problems.append(
            f"is no EVA checkpoint: none of the known block names among its {len(state)} keys ({keys}, ...)"
        )
        return {}
    report.layout = layout
    state = _drop_rope(state, layout, strict_rope, report, problems)
    towers = LAYOUTS[layout]
    if layout == "transformers" and not any(key.startswith("timm_model.") for key in state):
        assert towers.clip is not None
        renamed = _transformers_names(state, towers.clip, report, problems)
    else:
        state = _old_names(state)
        names = towers.alone
        prefix = next((p for p in (names.prefix, "visual.") if p and any(key.startswith(p) for key in state)), "")
        vision = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
        renamed = _to_ours(vision, names.rules, report, problems)
        if is_clip(rest):
            renamed = {f"visual.{key}": value for key, value in renamed.items()} | rest
        else:
            report.dropped += rest
    if layout == "mmpretrain":
        report.notes.append("models trained in mmpretrain itself use norm_eps=1e-5; converted ones 1e-6")
    return _settle_key_biases(renamed, k_bias, report, problems)


def _transformers_names(state: State, names: Names, report: LoadReport, problems: list[str]) -> State:
    vision = {key: v for key, v in state.items() if key.startswith(("vision_model.", "visual_projection."))}
    text = {key: v for key, v in state.items() if key.startswith(("text_model.", "text_projection."))}
    rest = {key: v for key, v in state.items() if key not in vision and key not in text}
    report.dropped += [key for key in rest if key.endswith("position_ids")]
    rest = {key: v for key, v in rest.items() if not key.endswith("position_ids")}
    vision = _to_ours(vision, names.rules, report, problems)
    if not text:
        return vision | rest
    text = _to_ours(text, names.text_rules, report, problems)
    return {f"visual.{k}": v for k, v in vision.items()} | {f"text.{k}": v for k, v in text.items()} | rest


def _drop_rope(state: State, layout: str, strict_rope: bool, report: LoadReport, problems: list[str]) -> State:
    tables = {key: value for key, value in state.items() if _is_rope(key)}
    report.dropped += tables
    if layout != "mmpretrain":
        return {key: value for key, value in state.items() if key not in tables}
    errors = {key: error for key, value in tables.items() if (error := rope_table_error(key, value)) is not None}
    wrong = {key: error for key, error in errors.items() if not error <= _MAX_ROPE_ERROR}
    worst = max(wrong.values(), default=0.0)
    if wrong and strict_rope:
        for key in shorten(wrong):
            problems.append(
                f"{key}: the stored RoPE table differs from EVA's formula by up to {worst:.3g} (allowed "
                f"{_MAX_ROPE_ERROR:g}); the weights were trained with another rotation. strict_rope=False loads them"
            )
    elif wrong:
        report.notes.append(f"RoPE tables differ from EVA's formula by up to {worst:.3g}; EVA's are used")
    return {key: value for key, value in state.items() if key not in tables}


def _settle_key_biases(state: State, k_bias: bool | None, report: LoadReport, problems: list[str]) -> State:
    """`qkv.bias` to `q_bias` and `v_bias`, where keys have none; zero key biases go."""
    stored = {name: key for key, name in report.renamed.items()}
    gated = is_gated(state)
    settled: State = {}
    wrong: list[str] = []
    for name, value in state.items():
        key = stored.get(name.removeprefix("visual."), name)
        if name.endswith((".attn.k_bias", ".attn.k_proj.bias")):
            (wrong if value.count_nonzero() else report.dropped).append(key)
            continue
        if not name.endswith(".attn.qkv.bias"):
            settled[name] = value
            continue
        if value.ndim != 1 or value.shape[0] % 3:
            problems.append(f"{key} has shape {tuple(value.shape)}, expected (3C,)")
            continue
        q_bias, middle, v_bias = value.chunk(3)
        zero = not middle.count_nonzero()
        if k_bias or (k_bias is None and not gated and not zero):
            settled[name] = value
            continue
        if not zero:
            wrong.append(key)
        base = name.removesuffix("qkv.bias")
        settled[base + "q_bias"], settled[base + "v_bias"] = q_bias, v_bias
        report.converted.append(key)
    for key in shorten(wrong):
        problems.append(f"{key}: the key bias is not zero; EVA-02 has none, and under RoPE it would change the result")
    return settled


# ---- writing ---------------------------------------------------------------------------------------------------------
def is_gated(state: Mapping[str, Tensor]) -> bool:
    """Feed-forward networks with gates, which in this family come with RoPE."""
    for key, value in state.items():
        if key.endswith(".mlp.fc1_g.weight"):
            return True
        if key.endswith(".mlp.fc1.weight") and value.ndim == 2:
            down = state.get(key.removesuffix("fc1.weight") + "fc2.weight")
            return down is not None and down.ndim == 2 and value.shape[0] == 2 * down.shape[1]
    return False


def has_subln(state: Mapping[str, Tensor]) -> bool:
    """Models whose projections timm and the official code split."""
    return any(re.fullmatch(r"(visual\.)?blocks\.\d+\.mlp\.norm\.weight", key) for key in state)


def to_stored(
    state: State, layout: str, report: LoadReport, *, grid: tuple[int, int] | None = None, head_dim: int = 64
) -> State:
    """A state dict in our names as a file of another layout has it.

    Args:
        state: of one tower or of two.
        layout: one of `LAYOUTS`.
        grid: (rows, columns) of the position embedding; None: square. For RoPE tables, which official files hold.
        head_dim: of the vision tower; likewise.

    Raises:
        ValueError: the layout has no such files.
    """
    two, how = is_clip(state), LAYOUTS[layout]
    names = how.clip if two else how.alone
    if names is None:
        raise ValueError(f"layout {layout!r} has no files of two towers")
    vision = {key.removeprefix("visual."): v for key, v in state.items() if not two or key.startswith("visual.")}
    rest = {key: v for key, v in state.items() if two and not key.startswith("visual.")}
    text = {key.removeprefix("text."): v for key, v in rest.items() if key.startswith("text.")}
    rest = {key: v for key, v in rest.items() if not key.startswith("text.")}
    gated, subln = is_gated(vision), has_subln(vision)
    split = {"timm": subln, "fused": False, "split": two or subln}[how.qkv]
    fit_projections(vision, split_qkv=split, split_mlp=split and gated, report=report)
    vision = _move_biases(vision, how.bias)
    if not how.mim:
        dropped = [key for key in vision if key.split(".")[0] in ("mask_token", "lm_head")]
        dropped += [key for key in vision if dropped and key.startswith("norm.")]
        report.dropped += dropped
        vision = {key: v for key, v in vision.items() if key not in dropped}
    tables = _tables(vision, grid, head_dim, layout) if how.rope_tables and gated else {}
    vision = _to_stored(vision, names.rules, gated) | tables
    if names.text_rules:
        text = _to_stored(text, names.text_rules, gated)
    else:
        text = {f"text.{key}": v for key, v in text.items()}
    return {f"{names.prefix}{key}": v for key, v in vision.items()} | text | rest


def _move_biases(state: State, where: str) -> State:
    moved: State = {}
    for key, value in state.items():
        if where == "separate" and (match := re.fullmatch(r"(.*\.attn\.)([qv])_proj\.bias", key)):
            key = f"{match[1]}{match[2]}_bias"
        elif where == "fused" and key.endswith(".attn.v_bias"):
            continue
        elif where == "fused" and key.endswith(".attn.q_bias"):
            base = key.removesuffix("q_bias")
            key, value = base + "qkv.bias", torch.cat([value, torch.zeros_like(value), state[base + "v_bias"]])
        moved[key] = value
    return moved


def _tables(state: State, grid: tuple[int, int] | None, head_dim: int, layout: str) -> State:
    patches = state["pos_embed"].shape[1] - 1 if "pos_embed" in state else 0
    side = math.isqrt(patches)
    if side * side != patches or (grid is not None and grid[0] != grid[1]):
        raise ValueError(f"layout {layout!r} holds RoPE tables of square grids; this model has {patches} patches")
    tables = _rope_tables(side, head_dim, 16, torch.float32)
    base, block = ("backbone.", "backbone.layers.") if layout == "mmpretrain" else ("", "blocks.")
    places = [base, *(f"{block}{i}.attn." for i in sorted(_block_numbers(state)))]
    return {f"{place}rope.freqs_{name}": table for place in places for name, table in tables.items()}


def _block_numbers(state: State) -> set[int]:
    return {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
