"""The `eva02` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, cast

import eva02.clip
from eva02 import evaluate, features, retrieve
from eva02.checkpoint import command as convert
from eva02.options import model_options, overrides
from eva02.train import clip, finetune, pretrain

_COMMANDS = (convert, features, pretrain, finetune, clip, evaluate, retrieve)
"""Modules that have a command of their own: `add_command(commands)` adds its parser, whose default `run` is called."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eva02", description="EVA-02 models on fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="list models, or describe one", description=_info.__doc__)
    info.add_argument("model", nargs="?", help="a model name or a shell pattern such as 'eva02_tiny*' (default: all)")
    info.add_argument("--json", action="store_true", help="print JSON")
    model_options(info)
    info.set_defaults(run=_info)

    for module in _COMMANDS:
        module.add_command(commands)
    return parser


def _info(args: argparse.Namespace) -> None:
    """List the models and their sizes, of CLIP those of its vision tower. Options describe a variation of them."""
    clips = [] if args.mim else eva02.clip.list_models(args.model or "*")
    names = eva02.list_models(args.model or "*") + clips
    if not names:
        raise ValueError(f"no model matches {args.model!r}; 'eva02 info' lists them all")
    rows = []
    for name in names:
        create = eva02.clip.create_model if name in clips else eva02.create_model
        model = create(name, device="meta", **overrides(args))
        tower: Any = getattr(model, "visual", model)
        config = tower.config
        rows.append(
            {
                "name": name,
                "params": sum(parameter.numel() for parameter in model.parameters()),
                "img_size": list(config.image_hw),
                "patch_size": list(config.patch_hw),
                "embed_dim": config.embed_dim,
                "depth": config.depth,
                "num_heads": config.num_heads,
                "hidden": config.hidden_features,
                "head": "mim" if config.head == "mim" else config.num_classes,
            }
        )
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'model':30} {'parameters':>13} {'image':>9} {'patch':>6}   dim depth heads hidden head")
    for row in rows:
        image, patch = (
            "x".join(str(n) for n in cast("tuple[int, int]", row[key])) for key in ("img_size", "patch_size")
        )
        print(
            f"{row['name']:30} {row['params']:13,} {image:>9} {patch:>6} {row['embed_dim']:5} {row['depth']:5} "
            f"{row['num_heads']:5} {row['hidden']:6} {row['head'] or '-'}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one line on stderr and exit status 1. A command may have others."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ModuleNotFoundError as error:
        print(f"eva02 {args.command}: {error}; pip install 'eva02-kernels[train]'", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"eva02 {args.command}: {error}", file=sys.stderr)
        return 1
