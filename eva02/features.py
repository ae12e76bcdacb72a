"""`eva02 features`: a model's features of images, pooled, or of every patch as a cache for pre-training."""

from __future__ import annotations

import argparse
import os
import shutil
from typing import Any

import torch

from eva02.images import find_images, load_image
from eva02.options import DTYPES, LAYOUTS, loading, loading_options, model_options, overrides
from eva02.runs import is_clip, load_model
from eva02.train.distributed import choose_device


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "features",
        help="write features of images: pooled, or a teacher's of every patch",
        description=_run.__doc__,
        epilog=LAYOUTS,
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="files, or folders searched recursively; for a cache one data set"
    )
    model_help = "see 'eva02 info', or the folder of a training run; for a cache also timm:NAME, open_clip:NAME"
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument("--checkpoint", help="weights, of any layout that 'eva02 convert' knows (default: the run's)")
    parser.add_argument("--out", required=True, metavar="OUT", help="FILE.npz with 'features' and 'paths', or a folder")
    parser.add_argument("--batch-size", type=int, default=16, help="images per forward pass (default %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: this process's GPU, else cpu)")
    model_options(parser, classes=False)
    pooled = parser.add_argument_group("pooled features (--out FILE.npz)")
    pooled.add_argument("--crop", choices=("center", "squash"), default="center", help="default %(default)s")
    loading_options(pooled)
    cache = parser.add_argument_group("teacher cache (--out FOLDER)")
    cache.add_argument("--split", default="train", help="of the data set (default %(default)s)")
    cache.add_argument(
        "--crops", type=int, default=1, metavar="N", help="views of each image; epoch e trains on view e %% crops (1)"
    )
    cache.add_argument(
        "--scale", type=float, default=0.2, help="smallest share of an image in a crop (default %(default)s)"
    )
    cache.add_argument(
        "--hflip", type=float, default=0.5, help="probability of a horizontal flip (default %(default)s)"
    )
    cache.add_argument("--seed", type=int, default=0, help="of the crops: the training run's (default %(default)s)")
    cache.add_argument("--store", choices=("bf16", "fp8"), default="bf16", help="stored type (default %(default)s)")
    cache.add_argument("--shard-size", type=int, default=1024, help="images per file (default %(default)s)")
    cache.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="the teacher's (default %(default)s)")
    cache.add_argument("--num-workers", type=int, default=0, help="loader processes (default %(default)s)")
    cache.add_argument(
        "--max-bad-images", type=int, default=100, help="unreadable images allowed (default %(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    """Write features of images. With --out FILE.npz, pooled: arrays 'features' (N, C) float32 and 'paths' (N,). With
    --out FOLDER, a CLIP vision tower's features of every patch of random crops, for 'eva02 pretrain --teacher-cache'.
    Run that again after an interruption, or to check the cache: shards that are missing or damaged are written, the
    others are verified and kept. Under torchrun the processes share the shards."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be positive, got {args.batch_size}")
    args.device = choose_device(args.device)
    if args.out.endswith(".npz"):
        _write_pooled(args)
    else:
        _write_cache(args)


def _write_pooled(args: argparse.Namespace) -> None:
    import numpy as np

    paths = find_images(args.images)
    if not paths:
        raise ValueError("no image found")
    # A CLIP tower pools by its projection, any other by what its classifier would be given.
    pooling = {} if is_clip(args.model) else {"head": "classifier", "num_classes": 0}
    model, report = load_model(args.model, args.checkpoint, **{**overrides(args), **pooling}, **loading(args))
    model = getattr(model, "visual", model)
    print(report)
    model.eval().to(args.device)
    features = []
    with torch.inference_mode():
        for start in range(0, len(paths), args.batch_size):
            batch = [load_image(path, model.img_size, args.crop) for path in paths[start : start + args.batch_size]]
            features.append(model(torch.stack(batch).to(args.device)).float().cpu())
    np.savez(args.out, features=torch.cat(features).numpy(), paths=np.array([str(path) for path in paths]))
    print(f"{args.out}: features of {len(paths)} images, {features[0].shape[1]} channels")


def _write_cache(args: argparse.Namespace) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

    from eva02.data import BadImages, open_source
    from eva02.teacher import create_teacher
    from eva02.teacher_cache import CacheWriter

    if len(args.images) != 1:
        raise ValueError(f"a cache is of one data set, got {len(args.images)} places; give --out FILE.npz for images")
    if args.patch_size is not None:
        raise ValueError("--patch-size is the teacher's own, it cannot be changed")
    source = open_source(args.images[0], args.split)
    teacher = create_teacher(
        args.model, args.checkpoint, img_size=args.img_size, device=args.device, dtype=DTYPES[args.dtype]
    )
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    writer = CacheWriter(
        args.out,
        source,
        teacher,
        crops=args.crops,
        scale=(args.scale, 1.0),
        hflip=args.hflip,
        seed=args.seed,
        dtype=args.store,
        shard_size=args.shard_size,
        rank=rank,
        world_size=world_size,
    )
    pending = []
    for shard, reason in writer.pending(track(writer.shards, "verifying", disable=rank > 0)):
        pending.append(shard)
        if not reason.endswith("is missing"):
            print(f"{reason}; it is written again")
    total = sum(len(span) for _, span in pending)
    needed, free = total * writer.spec.sample_bytes, shutil.disk_usage(args.out).free
    print(
        f"{args.out}: {len(pending)} of {len(writer.spec.shards)} shards to write, {total} crops, "
        f"{needed / 2**30:.3g} GiB; {free / 2**30:.3g} GiB are free"
    )
    bad: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=rank > 0) as progress:
        task = progress.add_task("crops", total=total, rate="")
        for count, unreadable in writer.write(pending, batch_size=args.batch_size, num_workers=args.num_workers):
            speed = progress.tasks[task].speed
            progress.update(task, advance=count, rate=f"{speed:.1f}/s" if speed else "")
            for name, error in unreadable:
                bad[name] = error
                progress.console.print(f"skipped {name}: {error}")
            if len(bad) > args.max_bad_images:
                raise BadImages(bad, args.max_bad_images)
    spec = writer.spec
    print(
        f"{args.out}: {spec.samples} samples x {spec.crops} crops, {spec.patches} patches of {spec.channels} channels"
    )
