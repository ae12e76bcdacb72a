"""`eva02 features`: pooled features of images."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import eva02
from eva02.images import find_images, load_image
from eva02.options import LAYOUTS, loading, loading_options, model_options, overrides


def add_command(commands: Any) -> None:
    features = commands.add_parser(
        "features", help="write pooled features of images", description=_run.__doc__, epilog=LAYOUTS
    )
    features.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders searched recursively")
    features.add_argument("--model", required=True, help="model name, see 'eva02 info'")
    features.add_argument("--checkpoint", required=True, help="weights: official, timm or mmpretrain")
    features.add_argument("--out", required=True, metavar="FILE.npz", help="where to write 'features' and 'paths'")
    features.add_argument("--batch-size", type=int, default=16, help="images per forward pass (default %(default)s)")
    features.add_argument("--crop", choices=("center", "squash"), default="center", help="default %(default)s")
    features.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    model_options(features, classes=False)
    loading_options(features)
    features.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    """Write the pooled features of images to an .npz file with arrays 'features' (N, C) float32 and 'paths' (N,)."""
    import numpy as np

    if not args.out.endswith(".npz"):
        raise ValueError(f"--out must end in .npz, got {args.out!r}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be positive, got {args.batch_size}")
    paths = find_images(args.images)
    if not paths:
        raise ValueError("no image found")
    model = eva02.create_model(args.model, num_classes=0, **overrides(args)).eval()
    print(eva02.load_checkpoint(model, args.checkpoint, **loading(args)))
    model.to(args.device)
    features = []
    with torch.inference_mode():
        for start in range(0, len(paths), args.batch_size):
            batch = [load_image(path, model.img_size, args.crop) for path in paths[start : start + args.batch_size]]
            features.append(model(torch.stack(batch).to(args.device)).float().cpu())
    np.savez(args.out, features=torch.cat(features).numpy(), paths=np.array([str(path) for path in paths]))
    print(f"{args.out}: features of {len(paths)} images, {features[0].shape[1]} channels")
