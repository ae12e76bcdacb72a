"""Command line options that several commands share, and what they say of a model."""

from __future__ import annotations

import argparse
from typing import Any

import torch

LAYOUTS = "The layout of a checkpoint is recognised; files are read with weights_only=True."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def size(text: str) -> int | tuple[int, int]:
    """ "224" or "196x280" (height x width, in pixels)."""
    try:
        parts = [int(part) for part in text.lower().split("x")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or min(parts) < 1:
        raise argparse.ArgumentTypeError(f"expected pixels such as 224 or 196x280, got {text!r}")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def model_options(parser: argparse.ArgumentParser, classes: bool = True) -> None:
    """Options that describe a variation of a named model; `overrides` reads them."""
    parser.add_argument("--img-size", type=size, help="pixels, 224 or 196x280 (default: the name's)")
    parser.add_argument("--patch-size", type=size, help="pixels (default: the name's)")
    if classes:
        parser.add_argument("--num-classes", type=int, help="classes, 0 for none (default: the name's)")
        parser.add_argument("--mim", action="store_true", help="the pre-training model: mask token and lm_head")


def evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Options of what evaluates a model on data sets; `eva02.evaluate.write_results` writes the files."""
    parser.add_argument("--model", required=True, help="model name, see 'eva02 info', or the folder of a training run")
    parser.add_argument("--checkpoint", help="weights, of any layout that 'eva02 convert' knows (default: the run's)")
    parser.add_argument("--crop", choices=("center", "squash"), default="center", help="default %(default)s")
    parser.add_argument("--crop-pct", type=float, default=1.0, help="size over resized size (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass (default %(default)s)")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes (default %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: this process's GPU, else cpu)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the model (default %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write the table")
    parser.add_argument("--json", metavar="FILE", help="write the table and what it was measured with")


def loading_options(parser: argparse.ArgumentParser) -> None:
    """Options of `load_checkpoint`; `loading` reads them."""
    parser.add_argument(
        "--resize", choices=("timm", "official"), default="timm", help="rule for resizing (default %(default)s)"
    )
    parser.add_argument(
        "--no-ema", action="store_true", help="prefer raw weights where the file also has averaged ones"
    )
    parser.add_argument(
        "--no-strict-rope", action="store_true", help="accept mmpretrain files with foreign RoPE tables"
    )


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `create_model`."""
    chosen = {name: getattr(args, name, None) for name in ("img_size", "patch_size", "num_classes")}
    overrides = {name: value for name, value in chosen.items() if value is not None}
    if getattr(args, "mim", False):
        overrides["head"] = "mim"
    return overrides


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `load_checkpoint`."""
    return {"resize": args.resize, "ema": not args.no_ema, "strict_rope": not args.no_strict_rope}
