"""Where samples lie: folders, tar shards, Hugging Face datasets, arrays. All are map-style, so that any order can be
drawn and a run resumed at any sample, and picklable, for loader workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image


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


def open_source(location: str, split: str = "train") -> Source:
    """Open a data set.

    Args:
        location: "digits" (scikit-learn's).
        split: "train" or "val".

    Raises:
        FileNotFoundError: nothing there. ValueError: unknown kind or split.
    """
    if location == "digits":
        return _digits(split)
    raise FileNotFoundError(f"no data at {Path(location)}")
