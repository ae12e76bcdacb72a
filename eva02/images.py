"""Images as EVA-02 was trained to see them, for evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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
    """Read, resize (bicubic), crop and normalise with CLIP's mean and standard deviation.

    Args:
        path: any format Pillow reads.
        size: (height, width), in pixels.
        crop: "center" keeps the aspect and cuts the longer side; "squash" keeps all of the image.

    Returns:
        (3, height, width) float32.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install pillow") from error
    if crop not in ("center", "squash"):
        raise ValueError(f"crop is 'center' or 'squash', got {crop!r}")
    height, width = size
    with Image.open(path) as file:
        image = file.convert("RGB")
    if crop == "squash":
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    else:
        ratio = max(height / image.height, width / image.width)
        scaled = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)  # np.array copies: writable
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]
