"""`eva02 evaluate`: accuracy under the published protocols, and throughput.

| protocol | layout of the folder | classes | a hit is |
|---|---|---|---|
| folder | what `eva02.data.open_source` opens, with classes | the model's, folders sorted | the class |
| imagenet, imagenet-sketch | folders n01440764 ... of WordNet ids | 1000 | the class |
| imagenet-v2 | folders 0 ... 999 | 1000 | the class |
| imagenet-real | ILSVRC2012_val_*.JPEG at any depth | 1000 | in the image's labels; images without are skipped |
| imagenet-a, imagenet-r | folders of WordNet ids | their 200 alone compete | the class |
| objectnet | images/ and mappings/ of objectnet-1.0 | 1000 | the first mapped class; unmapped folders are skipped |

A CLIP model is evaluated zero-shot: its classes are names in CLIP's 80 prompts of ImageNet, or in `--prompt` for other
data; on ObjectNet it chooses among the 113 mapped classes by their names there.

Labels of ReaL and class lists of A and R come with timm, ObjectNet's mapping with its images, which keep their red
border here as in EVA-02's evaluation.

Source: Fang et al., EVA-02, arXiv:2303.11331 (protocols); Beyer et al., arXiv:2006.07159 (ReaL).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import pkgutil
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva02.files import atomic_file
from eva02.options import DTYPES, LAYOUTS, evaluation_options, loading, loading_options, model_options, overrides
from eva02.runs import is_clip, is_run, load_model, run_recipe
from eva02.train.distributed import World, started

Labels = tuple[int, ...]
_ALONE = World()
_PROMPT = "a photo of a {}."


@dataclasses.dataclass
class Task:
    """A data set as a protocol uses it."""

    source: Any
    """`eva02.data.Source`, of all images at the location."""
    labels: Sequence[Labels] | None = None
    """For each image the classes that count as hits, as numbers within `subset`; empty: the image is left out. None:
    the source's targets."""
    num_classes: int | None = None
    """Logits that the model has to have; None for any."""
    subset: Sequence[int] | None = None
    """Logits that compete; None for all."""
    expected: int | None = None
    """Images that count, in the published data set."""
    imagenet: bool = False
    """Zero-shot classification uses CLIP's names of ImageNet's classes and its 80 prompts, else the source's names."""
    names: Sequence[str] | None = None
    """Names instead of those."""

    @property
    def counted(self) -> Sequence[int]:
        """Indices of the images that count."""
        if self.labels is None:
            return range(len(self.source))
        return [index for index, labels in enumerate(self.labels) if labels]

    def labels_of(self, batch: dict[str, Tensor], counted: Sequence[int]) -> list[Labels]:
        """Labels of the images of a batch, whose "index" is a position in `counted`."""
        if self.labels is not None:
            return [self.labels[counted[position]] for position in batch["index"].tolist()]
        if "label" not in batch:
            raise ValueError("the data has images without a class")
        return [(label,) for label in batch["label"].tolist()]


# ---- protocols ---------------------------------------------------------------------------------------------------
def _imagenet_ids() -> list[str]:
    """WordNet ids of the 1000 classes, in the order of the logits."""
    return _timm_data("imagenet_synsets.txt").split()


def _timm_data(name: str) -> str:
    data = pkgutil.get_data("timm.data", f"_info/{name}")
    if data is None:
        raise ImportError(f"this timm does not ship {name}; it needs timm >= 1.0")
    return data.decode()


def _folders(location: str, split: str = "val") -> Any:
    from eva02.data.sources import FolderSource, open_source

    source = open_source(location if location.startswith("folder:") else f"folder:{location}", split)
    assert isinstance(source, FolderSource)
    return source


def _by_folder(source: Any, class_of: Callable[[str], Labels]) -> list[Labels]:
    """Labels of every image from the name of its class folder."""
    if source.classes is None:
        raise ValueError(f"{source.root} has no folder for each class")
    labels = [class_of(name) for name in source.classes]
    return [labels[target] for target in source.targets]


def _in(classes: Sequence[str], place: str) -> Callable[[str], Labels]:
    numbers = {name: (number,) for number, name in enumerate(classes)}

    def class_of(folder: str) -> Labels:
        if folder not in numbers:
            raise ValueError(f"{place}: folder {folder!r} is none of its classes ({classes[0]} ... {classes[-1]})")
        return numbers[folder]

    return class_of


def _folder(location: str, args: Any) -> Task:
    from eva02.data import open_source

    source = open_source(location, getattr(args, "split", "val"))
    return Task(source, num_classes=len(source.classes) if source.classes else None)


def _wordnet(expected: int) -> Callable[[str, Any], Task]:
    def task(location: str, args: Any) -> Task:
        source = _folders(location)
        labels = _by_folder(source, _in(_imagenet_ids(), location))
        return Task(source, labels, 1000, expected=expected, imagenet=True)

    return task


def _numbered(location: str, args: Any) -> Task:
    source = _folders(location)
    labels = _by_folder(source, _in([str(i) for i in range(1000)], location))
    return Task(source, labels, 1000, expected=10_000, imagenet=True)


def _subset(name: str, expected: int) -> Callable[[str, Any], Task]:
    def task(location: str, args: Any) -> Task:
        source = _folders(location)
        ids = sorted(_timm_data(f"imagenet_{name}_synsets.txt").split())
        numbers = {wordnet_id: number for number, wordnet_id in enumerate(_imagenet_ids())}
        subset = [numbers[wordnet_id] for wordnet_id in ids]
        return Task(source, _by_folder(source, _in(ids, location)), 1000, subset, expected, imagenet=True)

    return task


def _real(location: str, args: Any) -> Task:
    chosen = getattr(args, "real_labels", None)
    stored = json.loads(Path(chosen).read_text() if chosen else _timm_data("imagenet_real_labels.json"))
    source = _folders(location)
    labels = []
    for index in range(len(source)):
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", Path(source.name(index)).name)
        if match is None or not 1 <= int(match[1]) <= len(stored):
            raise ValueError(f"{source.name(index)} is no image of ImageNet's validation set")
        labels.append(tuple(stored[int(match[1]) - 1]))
    return Task(source, labels, 1000, expected=sum(bool(x) for x in stored), imagenet=True)


def _objectnet(location: str, args: Any) -> Task:
    """A CLIP model (`args.zero_shot`) chooses among ObjectNet's names of mapped classes, as in CLIP's evaluations."""
    root = Path(location)
    images = root / "images" if (root / "images").is_dir() else root
    mappings = Path(getattr(args, "objectnet_mappings", None) or images.parent / "mappings")
    if not mappings.is_dir():
        raise FileNotFoundError(f"no folder {mappings}; --objectnet-mappings tells where objectnet-1.0/mappings is")
    objects = json.loads((mappings / "folder_to_objectnet_label.json").read_text())
    imagenet_labels = json.loads((mappings / "objectnet_to_imagenet_1k.json").read_text())
    # The file of labels is in the order of the 2012 challenge, which another file maps to that of the logits.
    names = [line.strip() for line in (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()]
    logit_to_line = json.loads((mappings / "pytorch_to_imagenet_2012_id.json").read_text())
    classes = {names[int(line)]: int(logit) for logit, line in logit_to_line.items()}

    mapped = sorted(folder for folder, name in objects.items() if name in imagenet_labels)
    zero_shot = getattr(args, "zero_shot", False)

    def class_of(folder: str) -> Labels:
        if folder not in objects:
            raise ValueError(f"{images}: folder {folder!r} is not in {mappings / 'folder_to_objectnet_label.json'}")
        if folder not in mapped:
            return ()
        return (mapped.index(folder) if zero_shot else classes[imagenet_labels[objects[folder]].split("; ")[0]],)

    source = _folders(str(images))
    names = [objects[folder].lower() for folder in mapped]
    labels = _by_folder(source, class_of)
    if zero_shot:
        return Task(source, labels, len(names), expected=18_574, imagenet=True, names=names)
    return Task(source, labels, 1000, expected=18_574, imagenet=True)


PROTOCOLS: dict[str, Callable[[str, Any], Task]] = {
    "folder": _folder,
    "imagenet": _wordnet(50_000),
    "imagenet-v2": _numbered,
    "imagenet-real": _real,
    "imagenet-a": _subset("a", 7_500),
    "imagenet-r": _subset("r", 30_000),
    "imagenet-sketch": _wordnet(50_889),
    "objectnet": _objectnet,
}


def open_task(protocol: str, location: str, args: Any = None) -> Task:
    """Open a data set for a protocol of `PROTOCOLS`.

    Args:
        args: may have the attributes `real_labels` (a JSON file of label lists instead of timm's), `objectnet_mappings`
            (a folder), `split`, and `zero_shot` (the classifier is a CLIP model's).

    Raises:
        ValueError: unknown protocol, or folders that are not those of its classes. FileNotFoundError: nothing there.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}, expected {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol](location, args)


# ---- measuring ---------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Result:
    """Accuracy in percent, throughput in images per second."""

    protocol: str
    location: str
    images: int
    expected: int | None
    """Images of the published data set; another number of `images` is a partial evaluation."""
    top1: float
    top5: float | None
    """None where fewer than six classes compete."""
    total_throughput: float
    """With reading, decoding and transforming; start of the loader included."""
    model_throughput: float | None
    """Of the model alone, without its first batch; None where there was but one."""


def count_hits(logits: Tensor, labels: Sequence[Labels], k: int) -> Tensor:
    """Whether one of the k largest logits belongs to the image's labels: (B, classes) -> (B,) bool."""
    member = torch.zeros(logits.shape, dtype=torch.bool)
    for row, classes in enumerate(labels):
        for wrong in (label for label in classes if not 0 <= label < logits.shape[1]):
            raise ValueError(f"class {wrong} is none of the {logits.shape[1]} that the model tells apart")
        member[row, list(classes)] = True
    return member.to(logits.device).gather(1, logits.topk(k).indices).any(1)


class ZeroShot(nn.Module):
    """A CLIP model as a classifier of a task's classes: images (B, 3, H, W) -> 100 cosines (B, classes).

    Args:
        model: `eva02.clip.Clip`, on its device.
        prompts: templates of classes that are not ImageNet's; those have CLIP's 80.
    """

    def __init__(self, model: Any, task: Task, prompts: Sequence[str] = (_PROMPT,)) -> None:
        super().__init__()
        from eva02.clip import class_embeddings, imagenet_prompts

        names, templates = imagenet_prompts() if task.imagenet else (task.source.classes, prompts)
        names = task.names or names
        if not names:
            raise ValueError("zero-shot classification needs names of the classes, and the data has none")
        self.model = model
        self.classes = class_embeddings(model, names, templates)

    def forward(self, images: Tensor) -> Tensor:
        return 100 * self.model.encode_image(images, normalize=True).float() @ self.classes.T


class _Stopwatch:
    """Time of the model's calls, the work of its device included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[tuple[float, int]] = []

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        begin = self._now()
        output = model(images)
        self.calls.append((self._now() - begin, len(images)))
        return output

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def throughput(self) -> float:
        """Images per second after the first call, 0 where there was no other."""
        steady = self.calls[1:]
        return sum(images for _, images in steady) / sum(seconds for seconds, _ in steady) if steady else 0.0


def evaluate(
    model: nn.Module,
    task: Task,
    transform: Any,
    *,
    protocol: str = "folder",
    location: str = "",
    batch_size: int = 64,
    num_workers: int = 0,
    world: World = _ALONE,
) -> Result:
    """Evaluate a classifier.

    Args:
        model: images (B, 3, H, W) -> logits (B, classes); its device and dtype are those of its parameters. It is put
            into evaluation mode.
        transform: an `EvalTransform`, or what is called as that.
        batch_size: of each process.
        world: processes that share the images; all get the result.

    Raises:
        ValueError: wrong number of classes, logits that are not finite, or an image that cannot be read, by name.
    """
    from torchmetrics import MeanMetric

    from eva02.data import eval_loader
    from eva02.data.sources import Selection

    counted = task.counted
    if not counted:
        raise ValueError(f"{location} has no image that counts")
    model.eval()
    parameter = next(model.parameters())
    # In torch.distributed's processes `compute` takes the mean over all of them.
    top1, top5 = (MeanMetric().set_dtype(torch.float64).to(parameter.device) for _ in range(2))
    watch = _Stopwatch(parameter.device)
    options: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "num_workers": num_workers}
    loader = eval_loader(Selection(task.source, counted), transform, batch_size, **options)
    begin = time.perf_counter()
    competing = 0
    with torch.inference_mode():
        for batch in loader:
            logits = watch(model, batch["image"].to(parameter.device, parameter.dtype)).float()
            labels = task.labels_of(batch, counted)
            logits = _competing(logits, task)
            competing = logits.shape[1]
            top1.update(count_hits(logits, labels, 1).double())
            top5.update(count_hits(logits, labels, min(5, competing)).double())
    speed = world.sum_(torch.tensor(watch.throughput, device=parameter.device)).item()
    share1, share5 = top1.compute().item(), top5.compute().item()  # by every process: they communicate
    return Result(
        protocol,
        location,
        images=len(counted),
        expected=task.expected,
        top1=100 * share1,
        top5=100 * share5 if competing > 5 else None,
        total_throughput=len(counted) / (time.perf_counter() - begin),
        model_throughput=speed or None,
    )


def _competing(logits: Tensor, task: Task) -> Tensor:
    if task.num_classes not in (None, logits.shape[1]):
        raise ValueError(f"the data has {task.num_classes} classes, the model {logits.shape[1]}")
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite")
    return logits if task.subset is None else logits[:, list(task.subset)]


# ---- command -----------------------------------------------------------------------------------------------------
def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="accuracy under the published protocols, and throughput",
        description=_run.__doc__,
        epilog=f"Protocols: {', '.join(PROTOCOLS)}. {LAYOUTS}",
    )
    data_help = "such as imagenet-a=/data/imagenet-a (default protocol: folder)"
    parser.add_argument("data", nargs="+", metavar="[PROTOCOL=]PATH", help=data_help)
    parser.add_argument("--split", default="val", help="of protocol folder (default %(default)s)")
    evaluation_options(parser)
    parser.add_argument(
        "--prompt",
        nargs="+",
        help="of a CLIP model, for classes that are not ImageNet's (default: the run's, else 'a photo of a {}.')",
    )
    parser.add_argument("--real-labels", metavar="JSON", help="ReaL's labels instead of those that timm ships")
    parser.add_argument("--objectnet-mappings", metavar="FOLDER", help="where it does not lie beside the images")
    model_options(parser, classes=False)
    parser.add_argument("--num-classes", type=int, help="classes of the model (default: the name's)")
    loading_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    """Evaluate a classifier, or a CLIP model zero-shot: top-1 and top-5 in percent, and images per second, of the model
    alone and with reading. Under torchrun the processes share the images."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be positive, got {args.batch_size}")
    with started(args.device) as world:
        _evaluate_all(args, world)


def _evaluate_all(args: argparse.Namespace, world: World) -> None:
    from eva02.data import EvalTransform

    args.zero_shot = is_clip(args.model)
    tasks = []
    for item in args.data:  # all are opened before the first is evaluated: a wrong path is told at once
        protocol, separator, location = item.partition("=")
        if not separator or Path(item).exists():
            protocol, location = "folder", item
        tasks.append((protocol, location, open_task(protocol, location, args)))
    model, report = load_model(args.model, args.checkpoint, **overrides(args), **loading(args))
    model.eval().to(world.device, DTYPES[args.dtype])
    if world.is_main:
        print(report, _HEADER, sep="\n")
    tower = model.visual if args.zero_shot else model
    transform = EvalTransform(tower.img_size, args.crop, args.crop_pct)
    results = []
    for protocol, location, task in tasks:
        options = {"batch_size": args.batch_size, "num_workers": args.num_workers, "world": world}
        classifier = ZeroShot(model, task, _prompts(args)) if args.zero_shot else model
        results.append(evaluate(classifier, task, transform, protocol=protocol, location=location, **options))
        if world.is_main:
            print(_line(results[-1]))
    if world.is_main:
        write_results(args, world, [dataclasses.asdict(result) for result in results])


def _prompts(args: argparse.Namespace) -> Sequence[str]:
    if args.prompt:
        return args.prompt
    return (run_recipe(args.model).clip.prompt,) if is_run(args.model) else (_PROMPT,)


_HEADER = f"{'protocol':16} {'top-1':>7} {'top-5':>7} {'images':>7} {'img/s':>9} {'model img/s':>12}  location"


def _line(result: Result) -> str:
    top5 = "-" if result.top5 is None else f"{result.top5:.3f}"
    speed = "-" if result.model_throughput is None else f"{result.model_throughput:.1f}"
    line = f"{result.protocol:16} {result.top1:7.3f} {top5:>7} {result.images:7}"
    line += f" {result.total_throughput:9.1f} {speed:>12}"
    if result.expected not in (None, result.images):
        return f"{line}  {result.location}  (the published data set has {result.expected} images)"
    return f"{line}  {result.location}"


def write_results(args: argparse.Namespace, world: World, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
    """The files that `evaluation_options` ask for: rows as CSV, and as JSON with what they were measured with."""
    if args.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        with atomic_file(args.csv) as file:
            file.write(text.getvalue().encode())
    if args.json:
        with atomic_file(args.json) as file:
            file.write(json.dumps(_report(args, world, rows, settings), indent=1).encode())


def _report(
    args: argparse.Namespace, world: World, rows: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    keys = ("model", "checkpoint", "crop", "crop_pct", "batch_size", "num_workers", "dtype")
    on_gpu = world.device.type == "cuda"
    return {
        **{key: getattr(args, key) for key in keys},
        **overrides(args),
        **loading(args),
        **settings,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or "cpu",
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": list(rows),
    }
