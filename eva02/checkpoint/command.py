"""`eva02 convert`."""

from __future__ import annotations

import argparse
from typing import Any

from eva02.checkpoint.convert import convert_checkpoint
from eva02.checkpoint.layouts import LAYOUTS
from eva02.options import LAYOUTS as LAYOUTS_HELP
from eva02.options import loading, loading_options, model_options, overrides


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="rewrite a checkpoint in another layout",
        description=_convert.__doc__,
        epilog=LAYOUTS_HELP,
    )
    parser.add_argument(
        "source", metavar="IN", help=f".pt, .pth or .safetensors: {', '.join(LAYOUTS)} (asuka is the official one)"
    )
    parser.add_argument("target", metavar="OUT", help=".safetensors (or .pt)")
    parser.add_argument("--to", choices=list(LAYOUTS), default="timm", help="layout to write (default %(default)s)")
    parser.add_argument("--model", help="check the result against this model and resize to it; CLIP models too")
    model_options(parser)
    loading_options(parser)
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    """Rewrite a checkpoint in another layout. Without --model only names and shapes change; with it the result is
    checked against the model, and position embedding and patch kernel are resized to it."""
    import eva02
    import eva02.clip

    model = None
    if args.model:
        create = eva02.clip.create_model if args.model in eva02.clip.list_models() else eva02.create_model
        model = create(args.model, device="meta", **overrides(args))
    elif overrides(args):
        raise ValueError("--img-size, --patch-size, --num-classes and --mim need --model")
    print(convert_checkpoint(args.source, args.target, layout=args.to, model=model, **loading(args)))
