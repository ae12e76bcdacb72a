"""The `eva02` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch

import eva02
from eva02.images import find_images, load_image


def _size(text: str) -> int | tuple[int, int]:
    """ "224" or "196x280" (height x width, in pixels)."""
    try:
        parts = [int(part) for part in text.lower().split("x")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or min(parts) < 1:
        raise argparse.ArgumentTypeError(f"expected pixels such as 224 or 196x280, got {text!r}")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eva02", description="EVA-02 models on fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="list models, or describe one", description=_info.__doc__)
    info.add_argument("model", nargs="?", help="a model name or a shell pattern such as 'eva02_tiny*' (default: all)")
    info.add_argument("--json", action="store_true", help="print JSON")
    _model_options(info)
    info.set_defaults(run=_info)

    convert = commands.add_parser(
        "convert", help="rewrite a checkpoint in timm's layout", description=_convert.__doc__, epilog=_LAYOUTS
    )
    convert.add_argument("source", metavar="IN", help=".pt, .pth or .safetensors: official, timm or mmpretrain")
    convert.add_argument("target", metavar="OUT", help=".safetensors (or .pt)")
    convert.add_argument("--model", help="check the result against this model and resize to it")
    _model_options(convert)
    _loading_options(convert)
    convert.set_defaults(run=_convert)

    features = commands.add_parser(
        "features", help="write pooled features of images", description=_features.__doc__, epilog=_LAYOUTS
    )
    features.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders searched recursively")
    features.add_argument("--model", required=True, help="model name, see 'eva02 info'")
    features.add_argument("--checkpoint", required=True, help="weights: official, timm or mmpretrain")
    features.add_argument("--out", required=True, metavar="FILE.npz", help="where to write 'features' and 'paths'")
    features.add_argument("--batch-size", type=int, default=16, help="images per forward pass (default %(default)s)")
    features.add_argument("--crop", choices=("center", "squash"), default="center", help="default %(default)s")
    features.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    _model_options(features, classes=False)
    _loading_options(features)
    features.set_defaults(run=_features)
    return parser


_LAYOUTS = "The layout of a checkpoint is recognised; files are read with weights_only=True."


def _model_options(parser: argparse.ArgumentParser, classes: bool = True) -> None:
    parser.add_argument("--img-size", type=_size, help="pixels, 224 or 196x280 (default: the name's)")
    parser.add_argument("--patch-size", type=_size, help="pixels (default: the name's)")
    if classes:
        parser.add_argument("--num-classes", type=int, help="classes, 0 for none (default: the name's)")
        parser.add_argument("--mim", action="store_true", help="the pre-training model: mask token and lm_head")


def _loading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resize", choices=("timm", "official"), default="timm", help="rule for resizing (default %(default)s)"
    )
    parser.add_argument(
        "--no-ema", action="store_true", help="prefer raw weights where the file also has averaged ones"
    )
    parser.add_argument(
        "--no-strict-rope", action="store_true", help="accept mmpretrain files with foreign RoPE tables"
    )


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: getattr(args, name, None) for name in ("img_size", "patch_size", "num_classes")}
    overrides = {name: value for name, value in chosen.items() if value is not None}
    if getattr(args, "mim", False):
        overrides["head"] = "mim"
    return overrides


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    return {"resize": args.resize, "ema": not args.no_ema, "strict_rope": not args.no_strict_rope}


def _info(args: argparse.Namespace) -> None:
    """List the models and their sizes. Options describe a variation of them."""
    names = eva02.list_models(args.model or "*")
    if not names:
        raise ValueError(f"no model matches {args.model!r}; 'eva02 info' lists them all")
    rows = []
    for name in names:
        model = eva02.create_model(name, device="meta", **_overrides(args))
        config = model.config
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
    print(f"{'model':30} {'parameters':>12} {'image':>9} {'patch':>6}   dim depth heads hidden head")
    for row in rows:
        image, patch = (
            "x".join(str(n) for n in cast("tuple[int, int]", row[key])) for key in ("img_size", "patch_size")
        )
        print(
            f"{row['name']:30} {row['params']:12,} {image:>9} {patch:>6} {row['embed_dim']:5} {row['depth']:5} "
            f"{row['num_heads']:5} {row['hidden']:6} {row['head'] or '-'}"
        )


def _convert(args: argparse.Namespace) -> None:
    """Rewrite a checkpoint in timm's layout. Without --model only names change; with it the result is checked against
    the model, and position embedding and patch kernel are resized to it."""
    model = None
    if args.model:
        model = eva02.create_model(args.model, device="meta", **_overrides(args))
    elif _overrides(args):
        raise ValueError("--img-size, --patch-size, --num-classes and --mim need --model")
    print(eva02.convert_checkpoint(args.source, args.target, model=model, **_loading(args)))


def _features(args: argparse.Namespace) -> None:
    """Write the pooled features of images to an .npz file with arrays 'features' (N, C) float32 and 'paths' (N,)."""
    import numpy as np

    if not args.out.endswith(".npz"):
        raise ValueError(f"--out must end in .npz, got {args.out!r}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be positive, got {args.batch_size}")
    paths = find_images(args.images)
    if not paths:
        raise ValueError("no image found")
    model = eva02.create_model(args.model, num_classes=0, **_overrides(args)).eval()
    print(eva02.load_checkpoint(model, args.checkpoint, **_loading(args)))
    model.to(args.device)
    features = []
    with torch.inference_mode():
        for start in range(0, len(paths), args.batch_size):
            batch = [load_image(path, model.img_size, args.crop) for path in paths[start : start + args.batch_size]]
            features.append(model(torch.stack(batch).to(args.device)).float().cpu())
    np.savez(args.out, features=torch.cat(features).numpy(), paths=np.array([str(path) for path in paths]))
    print(f"{args.out}: features of {len(paths)} images, {features[0].shape[1]} channels")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one line on stderr and exit status 1."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"eva02 {args.command}: {error}", file=sys.stderr)
        return 1
    return 0
