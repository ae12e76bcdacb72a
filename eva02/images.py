"""Images as EVA-02 was trained to see them, for evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # Pillow's number of the filter: Pillow itself is optional
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files among `paths`, folders searched recursively, in sorted order within each."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no image or folder at {path}")
    return found


def load_image(path: str | Path, size: tuple[int, int], crop: str = "center") -> Tensor:
    """Read, resize, crop and normalise.

    Args:
        path: any format Pillow reads.
        size, crop: as in `resize_crop`.

    Returns:
        (3, height, width) float32.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install pillow") from error
    with Image.open(path) as file:
        image = file.convert("RGB")
    return normalise(resize_crop(image, size, crop))


def resize_crop(image: Image.Image, size: tuple[int, int], crop: str = "center", crop_pct: float = 1.0) -> Image.Image:
    """An evaluation view, bicubic.

    Args:
        size: (height, width), in pixels.
        crop: "center" keeps the aspect and cuts the longer side; "squash" keeps all of the image.
        crop_pct: the image is resized to size / crop_pct, then cut to size.
    """
    if crop not in ("center", "squash"):
        raise ValueError(f"crop is 'center' or 'squash', got {crop!r}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], got {crop_pct}")
    height, width = size
    wide, high = int(width / crop_pct), int(height / crop_pct)
    if crop == "center":  # one side fits exactly, the other is longer; rounded as torchvision's Resize does
        if image.width * high >= image.height * wide:
            wide = int(high * image.width / image.height)
        else:
            high = int(wide * image.height / image.width)
    image = image.resize((wide, high), _BICUBIC)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    return image.crop((left, top, left + width, top + height))


def normalise(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32, by CLIP's mean and standard deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)  # np.array copies: writable
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]
