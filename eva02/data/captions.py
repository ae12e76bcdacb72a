"""Images with captions in files of their own: annotations of COCO and Flickr30k, text files beside images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eva02.images import find_images


class CaptionSource:
    """Images, and a list of captions for each.

    Args:
        root: folder that the files' names start from.
        captions: file -> its captions.
    """

    classes: Sequence[str] | None = None

    def __init__(self, root: Path, captions: dict[str, list[str]]) -> None:
        self.root, self.files, self.captions = root, list(captions), list(captions.values())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        with Image.open(self.name(index)) as file:
            return file.convert("RGB"), self.captions[index]

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])


def open_captions(place: str, split: str) -> CaptionSource:
    """Open what `captions:` stands before.

    Args:
        place: a folder, whose images have a text file of the same name beside them, one caption a line; or an
            annotation, ANNOTATION.json or ANNOTATION.json:FOLDER where the images do not lie in the annotation's own.
            An annotation is COCO's ("images" and "annotations"), Karpathy's splits of COCO and Flickr30k ("images" with
            "sentences" and "split"), or a list of {"image": file, "caption": one or a list}.
        split: of Karpathy's, which have "train", "val" and "test" ("restval" belongs to "train"); other annotations are
            of one split.

    Raises:
        FileNotFoundError: no such file, or the first image is missing. ValueError: another format, or no caption.
    """
    head, separator, folder = place.partition(".json:")
    path = Path(head + ".json" if separator else place)
    if path.is_dir():
        root, captions = path, _beside_images(path)
    elif path.is_file():
        root = Path(folder) if separator else path.parent
        captions = _annotated(path, split)
    else:
        raise FileNotFoundError(f"no annotation and no folder at {path}")
    without = [file for file, texts in captions.items() if not texts]
    if without or not captions:
        raise ValueError(f"{path}: {f'{without[0]} has' if without else 'there is'} no caption")
    first = root / next(iter(captions))
    if not first.is_file():
        raise FileNotFoundError(f"no image {first}; captions:{path}:FOLDER tells where the images of {path.name} are")
    return CaptionSource(root, captions)


def _beside_images(folder: Path) -> dict[str, list[str]]:
    captions = {}
    for image in find_images([folder]):
        text = image.with_suffix(".txt")
        lines = text.read_text().splitlines() if text.is_file() else []
        captions[os.path.relpath(image, folder)] = [line.strip() for line in lines if line.strip()]
    return captions


def _annotated(path: Path, split: str) -> dict[str, list[str]]:
    try:
        stored = json.loads(path.read_text())
        if isinstance(stored, list):
            return {entry["image"]: _texts(entry["caption"]) for entry in stored}
        if "annotations" in stored:
            return _coco(stored)
        return _karpathy(stored, split, path)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no annotation of captions: {type(error).__name__} {error}; expected COCO's, Karpathy's, or a "
            'list of {"image": ..., "caption": ...}'
        ) from error


def _coco(stored: dict[str, Any]) -> dict[str, list[str]]:
    files = {image["id"]: image["file_name"] for image in stored["images"]}
    captions: dict[str, list[str]] = {file: [] for file in files.values()}
    for annotation in stored["annotations"]:
        captions[files[annotation["image_id"]]].append(annotation["caption"].strip())
    return captions


def _karpathy(stored: dict[str, Any], split: str, path: Path) -> dict[str, list[str]]:
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    captions = {
        os.path.join(image.get("filepath", ""), image["filename"]): [s["raw"].strip() for s in image["sentences"]]
        for image in stored["images"]
        if image["split"] in wanted
    }
    if not captions:
        found = sorted({image["split"] for image in stored["images"]})
        raise ValueError(f"{path} has no split {split!r}, it has {', '.join(found)}")
    return captions


def _texts(caption: str | list[str]) -> list[str]:
    return [caption] if isinstance(caption, str) else list(caption)
