"""Where samples lie: folders, tar shards, Hugging Face datasets, captioned images, arrays. All are map-style, so that
any order can be drawn and a run resumed at any sample, and picklable, for loader workers."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from eva02.data.captions import open_captions
from eva02.files import atomic_file
from eva02.images import find_images

_logger = logging.getLogger(__name__)


@runtime_checkable
class Source(Protocol):
    """Images and their targets, by index."""

    classes: Sequence[str] | None
    """Names of the classes that integer targets stand for, where there are any."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """An RGB image, wholly decoded, and its class (int), caption (str), captions (list of str) or None."""
        ...

    def name(self, index: int) -> str:
        """What to call the sample in a message: a path, or a shard and a key."""
        ...


class ArraySource:
    """Images in memory.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        targets: N classes or captions; None for none.
        classes: names of the classes.
    """

    def __init__(self, images: np.ndarray, targets: Sequence[Any] | None = None, classes: Sequence[str] | None = None):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise ValueError(f"images must be (N, H, W[, 3]) uint8, got {images.shape} {images.dtype}")
        if targets is not None and len(targets) != len(images):
            raise ValueError(f"targets must be one for each of {len(images)} images, got {len(targets)}")
        self.images, self.targets, self.classes = images, targets, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        target = None if self.targets is None else self.targets[index]
        if isinstance(target, np.integer):
            target = int(target)
        return Image.fromarray(self.images[index]).convert("RGB"), target

    def name(self, index: int) -> str:
        return f"image {index}"


class Selection:
    """Some samples of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return self.source[self.indices[index]]

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _digits(split: str) -> ArraySource:
    """scikit-learn's 1797 digits of 8x8 pixels, a fifth of each class held out as "val"."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn") from error
    if split not in ("train", "val"):
        raise ValueError(f"digits has the splits 'train' and 'val', got {split!r}")
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    train_x, val_x, train_y, val_y = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return ArraySource(train_x, train_y, _DIGITS) if split == "train" else ArraySource(val_x, val_y, _DIGITS)


class FolderSource:
    """torchvision's ImageFolder: a folder for each class, numbered in sorted order, with images at any depth. A folder
    without subfolders is a set of images without classes."""

    def __init__(self, root: str | Path) -> None:
        from torchvision.datasets import ImageFolder

        self.root = Path(root)
        self.targets: np.ndarray | None = None
        if any(child.is_dir() for child in self.root.iterdir()):
            folder = ImageFolder(str(self.root), allow_empty=True)
            self.classes: Sequence[str] | None = folder.classes
            self.targets = np.array(folder.targets, dtype=np.int32)
            files = [os.path.relpath(path, self.root) for path, _ in folder.samples]
        else:
            self.classes = None
            files = [str(path.relative_to(self.root)) for path in find_images([self.root])]
        if not files:
            raise ValueError(f"no image in {self.root}")
        # One array, where a list of millions of strings would be copied into every worker page by page.
        self.files = np.array([os.fsencode(file) for file in files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        with Image.open(self.name(index)) as file:
            image = file.convert("RGB")
        return image, None if self.targets is None else int(self.targets[index])

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.files[index].item()))


_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
_TARGET_EXTENSIONS = ("cls", "txt", "json")


class ShardSource:
    """Local tar shards in webdataset's layout: members of one name are one sample.

    The image is the member `.jpg`, `.jpeg`, `.png`, `.webp`, `.ppm` or `.bmp`; the target is `.cls` (class), else
    `.txt` (caption), else `.json` with "label", "caption" or "captions". Opening reads every shard's headers; what they
    say is kept in the user's cache folder ($XDG_CACHE_HOME) until the shard's size or date changes.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self.shards = [str(Path(shard).absolute()) for shard in shards]
        with ThreadPoolExecutor(8) as pool:
            indices = list(pool.map(_shard_index, self.shards))
        self.members = np.concatenate(indices)
        self.shard_starts = np.cumsum([0] + [len(index) for index in indices])
        if not len(self.members):
            raise ValueError(f"no image with extension {', '.join(_IMAGE_EXTENSIONS)} in {len(self.shards)} shards")
        self.classes: Sequence[str] | None = _class_names(Path(self.shards[0]).parent)

    def __len__(self) -> int:
        return len(self.members)

    def _shard(self, index: int) -> str:
        return self.shards[int(np.searchsorted(self.shard_starts, index, side="right")) - 1]

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        member = self.members[range(len(self))[index]]
        with open(self._shard(index), "rb") as file:
            stored = _read(file, member["image_offset"], member["image_size"])
            target = _read(file, member["target_offset"], member["target_size"]) if member["target"] >= 0 else None
        with Image.open(io.BytesIO(stored)) as picture:
            image = picture.convert("RGB")
        return image, None if target is None else _parse_target(_TARGET_EXTENSIONS[member["target"]], target)

    def name(self, index: int) -> str:
        return f"{self._shard(index)}:{os.fsdecode(self.members[index]['key'].item())}"


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    stored = file.read(size)
    if len(stored) != size:
        raise OSError(f"the shard ends within a member ({len(stored)} of {size} bytes)")
    return stored


def _parse_target(extension: str, stored: bytes) -> Any:
    text = stored.decode()
    if extension == "cls":
        return int(text)
    if extension == "txt":
        return text
    fields = json.loads(text)
    return next((fields[key] for key in ("label", "caption", "captions") if key in fields), None)


def _class_names(folder: Path) -> list[str] | None:
    """Names from `classnames.txt`, one a line, beside the shards or above them, where data sets in shards have it."""
    for place in (folder, folder.parent):
        if (place / "classnames.txt").is_file():
            return (place / "classnames.txt").read_text().splitlines()
    return None


def _shard_index(shard: str) -> np.ndarray:
    """What `_scan` finds, from the cache where it holds this very file's."""
    stat = os.stat(shard)
    identity = hashlib.sha256(f"{shard}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cached = Path(root) / "eva02" / "shards" / f"{identity}.npy"
    try:
        return np.load(cached)
    except (OSError, ValueError, EOFError):
        members = _scan(shard, stat.st_size)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cached) as file:
            np.save(file, members)
    except OSError as error:  # a read-only home or a full disk: the next run scans again
        _logger.warning("the index of %s could not be kept: %s", shard, error)
    return members


def _scan(shard: str, shard_size: int) -> np.ndarray:
    """Offsets and sizes of a shard's images and targets, a row for each sample that has an image."""
    from webdataset.tariterators import base_plus_ext

    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:  # "r:" refuses compressed archives, which cannot be read at an offset
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if key is None or not member.isfile():
                    continue
                if member.offset_data + member.size > shard_size:
                    raise tarfile.ReadError(f"ends within {member.name}")
                samples.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        raise ValueError(f"{shard} is not a whole, uncompressed tar file: {error}") from error
    rows = []
    for key, parts in samples.items():
        image = next((parts[name] for name in _IMAGE_EXTENSIONS if name in parts), None)
        kind = next((i for i, name in enumerate(_TARGET_EXTENSIONS) if name in parts), -1)
        if image is not None:
            target = parts[_TARGET_EXTENSIONS[kind]] if kind >= 0 else (0, 0)
            rows.append((os.fsencode(key), *image, kind, *target))
    width = max((len(row[0]) for row in rows), default=1)
    numbers = [("image_offset", "i8"), ("image_size", "i8"), ("target", "i1"), ("target_offset", "i8")]
    return np.array(rows, dtype=[("key", f"S{width}"), *numbers, ("target_size", "i8")])


class HuggingFaceSource:
    """A data set of Hugging Face's `datasets` on disk, as `save_to_disk` writes it.

    The image is the column of type Image; the target is the first ClassLabel column, else the column "caption",
    "captions" or "text", else "label" or "labels".
    """

    def __init__(self, dataset: Any, place: str) -> None:
        import datasets

        self.place = place
        features = dataset.features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise ValueError(f"{place} must have one column of type Image, has {images} among {list(features)}")
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        targets = [*labels, *(name for name in ("caption", "captions", "text", "label", "labels") if name in features)]
        self.image, self.target = images[0], targets[0] if targets else None
        self.classes: Sequence[str] | None = features[labels[0]].names if labels else None
        self.dataset = dataset.select_columns([self.image, *targets[:1]])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        row = self.dataset[index]
        return row[self.image].convert("RGB"), None if self.target is None else row[self.target]

    def name(self, index: int) -> str:
        return f"{self.place}[{index}]"


# ---- opening -----------------------------------------------------------------------------------------------------
_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
_SPLIT_WORDS = {word: split for split, words in _SPLITS.items() for word in words}


def _pick_split(found: Sequence[str], split: str, place: str) -> str:
    """The one of `found` that stands for `split`."""
    for word in _SPLITS.get(_SPLIT_WORDS.get(split, ""), (split,)):
        if word in found:
            return word
    raise ValueError(f"{place} has no split {split!r}, it has {', '.join(sorted(found))}")


def _split_folder(path: Path, split: str) -> Path:
    """`path`'s subfolder of the split, or `path` itself where it is not divided into splits."""
    names = {child.name for child in path.iterdir() if child.is_dir()}
    splits = {_SPLIT_WORDS[name] for name in names if name in _SPLIT_WORDS}
    # "train" alone may be a class, among others.
    divided = len(splits) > 1 or (splits and names <= set(_SPLIT_WORDS))
    return path / _pick_split(sorted(names), split, str(path)) if divided else path


def _open_folder(path: Path, split: str) -> Source:
    if not path.is_dir():
        raise FileNotFoundError(f"no folder at {path}")
    return FolderSource(_split_folder(path, split))


def _open_shards(location: str, split: str) -> Source:
    from webdataset.shardlists import expand_urls

    if not Path(location).is_dir():
        shards = expand_urls(location)
        missing = [shard for shard in shards if not Path(shard).is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}")
        return ShardSource(shards)
    folder = _split_folder(Path(location), split)
    paths = sorted(folder.glob("*.tar"))
    words = {path: set(re.split(r"[-_.]", path.stem)) & set(_SPLIT_WORDS) for path in paths}
    if any(words.values()):
        word = _pick_split(sorted(set().union(*words.values())), split, str(folder))
        paths = [path for path in paths if word in words[path]]
    if not paths:
        raise FileNotFoundError(f"no .tar file in {folder}")
    return ShardSource(paths)


def _open_hugging_face(path: Path, split: str) -> Source:
    import datasets

    if not path.is_dir():
        raise FileNotFoundError(f"no data set at {path}")
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        dataset = dataset[_pick_split(list(dataset), split, str(path))]
    return HuggingFaceSource(dataset, str(path))


def _kind(location: str) -> str:
    """What a location without a prefix holds."""
    path = Path(location)
    if location.endswith(".tar") or "{" in location:
        return "wds"
    if not path.is_dir():
        raise FileNotFoundError(
            f"no data at {location}; give 'digits', a folder, tar shards such as 'wds:/data/{{000..009}}.tar', "
            "'hf:/data' as datasets' save_to_disk writes it, or 'captions:/data/annotation.json:/data/images'"
        )
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "hf"
    if any(any(folder.glob("*.tar")) for folder in (path, *(path / word for word in _SPLIT_WORDS))):
        return "wds"
    return "folder"


def open_source(location: str, split: str = "train") -> Source:
    """Open a data set.

    Args:
        location: "digits" (scikit-learn's), "folder:/path" (a folder for each class), "wds:/path/{000..009}.tar" or
            "wds:/path" (webdataset's tar shards), "hf:/path" (a Hugging Face data set on disk); without a prefix the
            kind is recognised. "captions:" stands before what `eva02.data.captions.open_captions` takes: an annotation
            of COCO or Flickr30k, or a folder with texts beside its images.
        split: "train", "val", or another name. Taken where the location is divided into splits (folders `train` and
            `val`, names of shards, a DatasetDict); a location that is not divided is the split itself.

    Raises:
        FileNotFoundError: nothing there. ValueError: no image, no such split, or a damaged shard.
    """
    if location == "digits":
        return _digits(split)
    kind, separator, place = location.partition(":")
    if separator and kind == "captions":
        return open_captions(place, split)
    if not separator or kind not in ("folder", "wds", "hf"):
        kind, place = _kind(location), location
    if kind == "wds":
        return _open_shards(place, split)
    return _open_folder(Path(place), split) if kind == "folder" else _open_hugging_face(Path(place), split)
