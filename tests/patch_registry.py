"""Small models of every architecture that `patch` is tested on, and the table of what it replaces in each.

python tests/patch_registry.py --write      # regenerate tests/data/patch_registry.json (a change is reviewed)
python tests/patch_registry.py --markdown   # the README's table, from that file
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from eva02_kernels.patching import PatchReport, patch

DATA = Path(__file__).parent / "data" / "patch_registry.json"
GRID = (3, 4)  # patches; not square, so that rows and columns cannot be confused


def timm_names(module: str) -> list[str]:
    return timm.list_models(module=module)


def build_timm(name: str, **overrides: Any) -> nn.Module:
    """The architecture with two blocks and few heads; head dim, MLP ratio, norms and tokens as registered."""
    sapiens = "sapiens2" in name
    with torch.device("meta"):
        full = timm.create_model(name, depth=1, **({"num_kv_heads": (None,)} if sapiens else {}))
    block = full.blocks[0]
    attn = getattr(block, "attn", None)
    if attn is None:
        attn = block.attns[0].attn if hasattr(block, "attns") else block
    double = 2 if "Diff" in type(attn).__name__ else 1  # differential attention counts half heads
    heads = 4 if sapiens else 2
    patch_size = full.patch_embed.patch_size
    kwargs: dict[str, Any] = {
        "depth": 2,
        "embed_dim": heads * attn.head_dim * double,
        "num_heads": heads,
        "num_classes": 5,
        "img_size": tuple(g * p for g, p in zip(GRID, patch_size, strict=True)),
    }
    if sapiens:
        kwargs["num_kv_heads"] = (4, 2)
    if getattr(full, "attn_pool", None) is not None and timm.models.eva.__name__ == type(full).__module__:
        kwargs["attn_pool_num_heads"] = heads
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **{**kwargs, **overrides}))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters of order one: with initial layer scales of 1e-5 a wrong block would go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if re.search(r"freqs$|lambda_", name):
                p.add_(0.1 * noise)
            elif p.dim() >= 2 and name.endswith("weight"):
                p.copy_(noise / p[0].numel() ** 0.5)
            elif re.search(r"(norm\d?|norm\w*|layernorm)\.weight$|gamma|lambda1$", name):
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(0.2 * noise)
    return model


def image(model_or_size: nn.Module | tuple[int, int], channels: int = 3, batch: int = 2) -> Tensor:
    size = model_or_size if isinstance(model_or_size, tuple) else model_or_size.patch_embed.img_size
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


# ---- other libraries ------------------------------------------------------------------------------------------------
def _dinov3(**kwargs: Any) -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = dict(  # noqa: C408
        patch_size=4, image_size=16, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_register_tokens=4,
    )  # fmt: skip
    return randomize(DINOv3ViTModel(DINOv3ViTConfig(**{**config, **kwargs})))


def _dinov2(registers: bool = False, **kwargs: Any) -> nn.Module:
    import transformers

    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = dict(  # noqa: C408
        patch_size=4, image_size=16, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2
    )
    make = getattr(transformers, f"{name}Model")
    return randomize(make(getattr(transformers, f"{name}Config")(**{**config, **kwargs})))


def _open_clip(trunk: str) -> nn.Module:
    from open_clip.timm_model import TimmModel

    tower = TimmModel("eva02_tiny_patch14_224", embed_dim=16, image_size=224, proj="linear")
    tower.trunk = build_timm(trunk, num_classes=0)
    width = tower.trunk.num_features
    tower.head = nn.Sequential(nn.Linear(width, 16, bias=False))
    return randomize(tower)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "transformers DINOv3ViTModel": _dinov3,
    "transformers DINOv3ViTModel (gated MLP, key bias)": lambda: _dinov3(
        use_gated_mlp=True, hidden_act="silu", key_bias=True
    ),
    "transformers Dinov2Model": _dinov2,
    "transformers Dinov2Model (SwiGLU)": lambda: _dinov2(use_swiglu_ffn=True),
    "transformers Dinov2WithRegistersModel": lambda: _dinov2(registers=True),
    "open_clip tower of eva02_base_patch16_clip_224": lambda: _open_clip("eva02_base_patch16_clip_224"),
    "open_clip tower of eva02_enormous_patch14_clip_224": lambda: _open_clip("eva02_enormous_patch14_clip_224"),
    "open_clip tower of vit_so400m_patch14_siglip_224": lambda: _open_clip("vit_so400m_patch14_siglip_224"),
    "open_clip tower of vit_pe_core_base_patch16_224": lambda: _open_clip("vit_pe_core_base_patch16_224"),
}


def others_image(model: nn.Module) -> Tensor:
    return image((16, 16) if hasattr(model, "config") else model.trunk.patch_embed.img_size)


def all_names() -> list[str]:
    return [*timm_names("eva"), *timm_names("vision_transformer"), *OTHERS]


def build(name: str) -> tuple[nn.Module, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in OTHERS:
            model = OTHERS[name]()
            return model, others_image(model)
        model = build_timm(name)
        return model, image(model)


# ---- the table ------------------------------------------------------------------------------------------------------
def record(report: PatchReport) -> dict[str, Any]:
    """What the checked-in file holds for one model."""
    entry: dict[str, Any] = {"replaced": report.counts(), "standby": report.counts(standby=True)}
    ops = sorted({op for r in report.replaced if r.within is None for op in r.ops})
    notes = sorted({note for r in report.replaced if r.within is None for note in r.notes})
    return entry | {"ops": ops, "notes": notes, "kept": report.kept_counts()}


def expected() -> dict[str, Any]:
    """{model: its record}, from the checked-in file, in which equal models share one."""
    groups = json.loads(DATA.read_text())
    return {name: {k: v for k, v in group.items() if k != "models"} for group in groups for name in group["models"]}


def write() -> None:
    DATA.parent.mkdir(exist_ok=True)
    groups: dict[str, dict[str, Any]] = {}
    for name in all_names():
        entry = record(patch(build(name)[0]))
        group = groups.setdefault(f"{_family(name)} {json.dumps(entry)}", {"models": [], **entry})
        group["models"].append(name)
    DATA.write_text(json.dumps(list(groups.values()), indent=1) + "\n")
    print(f"{sum(len(g['models']) for g in groups.values())} models in {len(groups)} groups written to {DATA}")


def _family(name: str) -> str:
    if name in OTHERS:
        return name.split(" of ")[0].split(" (")[0]
    return "timm `eva.py`" if name in timm_names("eva") else "timm `vision_transformer.py`"


def markdown() -> str:
    """One row per family and replaced block; equal models share it. A LayerNorm outside blocks is not worth a word."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for name, entry in expected().items():
        replaced = ", ".join(f"{n} {key.split(' -> ')[0]}" for key, n in entry["replaced"].items()) or "nothing"
        kept = "; ".join(key for key in entry["kept"] if not key.startswith("LayerNorm:")) or "-"
        rows.setdefault((_family(name), replaced, ", ".join(entry["ops"]), kept), []).append(name)
    lines = ["| family | models | replaced (per 2 blocks) | operators | stays, and why |", "|---|---|---|---|---|"]
    for (family, replaced, ops, kept), names in rows.items():
        example = f"{len(names)}: `{names[0]}`" + (" ..." if len(names) > 1 else "")
        lines.append(f"| {family} | {example} | {replaced} | {ops} | {kept} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.write:
        write()
    if options.markdown:
        print(markdown())
