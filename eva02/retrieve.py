"""`eva02 retrieve`: a CLIP model finds images by their captions, and captions by their images.

Recall at k (R@k) in percent: an image counts where one of its captions is among the k texts nearest to it, a caption
where its image is among the k nearest images; as on Flickr30k (1K test images) and COCO (5K), captions as they are.

Source: Karpathy and Fei-Fei, arXiv:1412.2306 (splits); Radford et al., CLIP, arXiv:2103.00020 (zero-shot retrieval).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eva02.evaluate import write_results
from eva02.options import DTYPES, LAYOUTS, evaluation_options, loading, loading_options, model_options, overrides
from eva02.runs import is_clip, load_model
from eva02.train.distributed import World, started

TOPK = (1, 5, 10)
_ALONE = World()


@dataclasses.dataclass(frozen=True)
class _ImageAndTexts:
    """Gives "image" and "text" (captions, context) of a sample."""

    image: Callable[..., dict[str, Any]]
    tokenize: Callable[[list[str]], Tensor]
    most: int | None

    def __call__(self, image: Any, target: Any, rng: Any = None) -> dict[str, Any]:
        captions = [target] if isinstance(target, str) else target
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise ValueError(f"retrieval needs captions of every image; this target is {target!r}")
        return {**self.image(image, None), "text": self.tokenize(captions[: self.most])}


def _together(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: images, all their texts, and the image of each text."""
    counts = torch.tensor([len(sample["text"]) for sample in samples])
    index = torch.stack([sample["index"] for sample in samples])
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "text": torch.cat([sample["text"] for sample in samples]),
        "index": index,
        "image_of_text": index.repeat_interleave(counts),
    }


@torch.inference_mode()
def retrieve(
    model: Any,
    source: Any,
    transform: Callable[..., dict[str, Any]],
    *,
    captions: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    world: World = _ALONE,
) -> dict[str, float]:
    """Recall of images and texts.

    Args:
        model: `eva02.clip.Clip` on its device. It is put into evaluation mode.
        source: `eva02.data.Source` whose targets are captions (str, or a list of them).
        transform: an `EvalTransform`.
        captions: at most so many of each image, the first ones; None for all.
        batch_size: images at a time, of each process.
        world: processes that share the images; all get the result.

    Returns:
        "images", "captions"; "image_to_text_R@1" ... "text_to_image_R@10" and "mean_recall", their mean, in percent;
        "images_per_s", with reading and the texts.

    Raises:
        ValueError: an image has no caption or cannot be read, by name, or features are not finite.
    """
    from eva02.clip import retrieval_recall, tokenize
    from eva02.data import eval_loader

    model.eval()
    parameter = model.logit_scale
    both = _ImageAndTexts(transform, partial(tokenize, context_length=model.config.text.context_length), captions)
    shared: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "num_workers": num_workers}
    loader = eval_loader(source, both, batch_size, collate=_together, **shared)
    begin = time.perf_counter()
    parts: dict[str, list[Tensor]] = {name: [] for name in ("image", "text", "index", "image_of_text")}
    for batch in loader:
        images = batch["image"].to(parameter.device, next(model.visual.parameters()).dtype)
        parts["image"].append(model.encode_image(images, normalize=True).float().cpu())
        texts = batch["text"].to(parameter.device).split(4 * batch_size)
        parts["text"] += [model.encode_text(part, normalize=True).float().cpu() for part in texts]
        parts["index"].append(batch["index"])
        parts["image_of_text"].append(batch["image_of_text"])
    own = {name: torch.cat(values) for name, values in parts.items() if values}
    gathered = [part for part in world.gather(own) if part]
    image, text, index, image_of_text = (torch.cat([part[name] for part in gathered]) for name in parts)
    if not (image.isfinite().all() and text.isfinite().all()):
        raise ValueError("the model's features are not finite")
    order = index.argsort()
    recall = retrieval_recall(image[order].to(parameter.device), text.to(parameter.device), image_of_text, TOPK)
    shares = {name: 100 * value for name, value in recall.items()}
    return {
        "images": len(image),
        "captions": len(text),
        **shares,
        "mean_recall": sum(shares.values()) / len(shares),
        "images_per_s": len(image) / (time.perf_counter() - begin),
    }


# ---- command -----------------------------------------------------------------------------------------------------
def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "retrieve",
        help="image-text retrieval of a CLIP model: R@1, 5, 10 both ways",
        description=_run.__doc__,
        epilog=LAYOUTS,
    )
    data_help = (
        "images with captions: captions:ANNOTATION.json[:IMAGES] (COCO's, Karpathy's, or a list of images and "
        "captions), captions:FOLDER (a text file beside each image, one caption a line), wds:PATTERN or hf:PATH"
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help=data_help)
    parser.add_argument("--split", default="test", help="where the data has splits (default %(default)s)")
    parser.add_argument("--captions", type=int, metavar="N", help="the first N of each image (default: all)")
    evaluation_options(parser)
    model_options(parser, classes=False)
    loading_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    """Image-text retrieval of a CLIP model, without training for it: which share of the images has one of its captions
    among the 1, 5, 10 nearest texts, and which share of the captions its image among the nearest images, in percent.
    Under torchrun the processes share the images."""
    for name in ("batch_size", "captions"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if not is_clip(args.model):
        raise ValueError(f"retrieval needs a CLIP model of two towers, {args.model} is none; see 'eva02 info'")
    with started(args.device) as world:
        _retrieve_all(args, world)


def _retrieve_all(args: argparse.Namespace, world: World) -> None:
    from eva02.data import EvalTransform, open_source

    sources = [open_source(location, args.split) for location in args.data]  # a wrong path is told at once
    model, report = load_model(args.model, args.checkpoint, **overrides(args), **loading(args))
    model.eval().to(world.device, DTYPES[args.dtype])
    if world.is_main:
        print(report, _HEADER, sep="\n")
    transform = EvalTransform(model.visual.img_size, args.crop, args.crop_pct)
    options = {"captions": args.captions, "batch_size": args.batch_size, "num_workers": args.num_workers}
    rows: list[dict[str, Any]] = []
    for location, source in zip(args.data, sources, strict=True):
        rows.append({"location": location, **retrieve(model, source, transform, **options, world=world)})
        if world.is_main:
            print(_line(rows[-1]))
    if world.is_main:
        write_results(args, world, rows, captions=args.captions, split=args.split)


_WAYS = ("image_to_text", "text_to_image")
_HEADER = (
    f"{'image -> text R@1':>17} {'R@5':>7} {'R@10':>7} {'text -> image R@1':>18} {'R@5':>7} {'R@10':>7} {'mean':>7} "
    f"{'images':>7} {'captions':>8} {'img/s':>7}  location"
)


def _line(row: dict[str, Any]) -> str:
    shares = [row[f"{way}_R@{k}"] for way in _WAYS for k in TOPK]
    widths = (17, 7, 7, 18, 7, 7)
    line = " ".join(f"{share:{width}.2f}" for share, width in zip(shares, widths, strict=True))
    line += f" {row['mean_recall']:7.2f} {row['images']:7} {row['captions']:8} {row['images_per_s']:7.1f}"
    return f"{line}  {row['location']}"
