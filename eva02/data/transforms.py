"""What the tasks make of an image: augmentation from timm, under a generator that the sample owns.

A transform is called as `transform(image, target, rng)` and gives a dict of tensors: "image" (3, H, W) float32,
normalised by CLIP's mean and standard deviation, and what its task needs beside it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eva02.data.masking import BlockMask
from eva02.images import CLIP_MEAN, CLIP_STD, normalise, resize_crop

Sample = dict[str, Any]


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's global CPU generators, seeded from `rng` inside and as they were after.

    timm and torchvision draw from them; so do a model's drop path and dropout in the same process.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Crop(NamedTuple):
    """A region of an image, in pixels of the image after the flip: all that pre-training draws for its view."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    @classmethod
    def draw(
        cls,
        image: Image.Image,
        rng: np.random.Generator,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
    ) -> Crop:
        """Flip with probability `hflip`, then a box of `scale` times the image's area and of a log-uniform aspect."""
        from timm.data.transforms import RandomResizedCropAndInterpolation

        flip = bool(rng.random() < hflip)
        with seeded(rng):
            top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        return cls(top, left, height, width, flip)

    def apply(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """The region at `size` (height, width), bicubic and normalised: (3, height, width) float32."""
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        return normalise(image.resize(size[::-1], Image.Resampling.BICUBIC))


class TeacherView(NamedTuple):
    """What a teacher saw of an image, and its answer: the target of a sample from a cache of features."""

    crop: Crop
    features: Tensor
    """(P, C)."""


@dataclasses.dataclass(frozen=True)
class MimTransform:
    """Pre-training: flip, random resized crop, mask. Gives "image" and "mask" (P,) bool.

    A target that is a `TeacherView` decides the crop, and its features are given as "teacher" (P, C). The mask is drawn
    by itself: it is the same with a cache as without.
    """

    size: tuple[int, int]
    """Height and width, in pixels."""
    mask: BlockMask
    scale: tuple[float, float] = (0.2, 1.0)
    hflip: float = 0.5
    """Probability of a horizontal flip; 0 for digits and text."""

    def __call__(self, image: Image.Image, target: Any, rng: np.random.Generator) -> Sample:
        crop_rng, mask_rng = rng.spawn(2)
        cached = target if isinstance(target, TeacherView) else None
        crop = cached.crop if cached else Crop.draw(image, crop_rng, self.scale, hflip=self.hflip)
        sample = {"image": crop.apply(image, self.size), "mask": self.mask(mask_rng)}
        return sample if cached is None else {**sample, "teacher": cached.features}


class FinetuneTransform:
    """Fine-tuning: timm's random resized crop, flip and RandAugment. Gives "image" and "label" (int64).

    Args:
        size: (height, width), in pixels.
        scale: share of the image's area that a crop takes.
        auto_augment: timm's description, None for none.
        hflip: probability of a horizontal flip; 0 for digits and text.
        ratio: range of a crop's aspect.
        reprob: probability of random erasing.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        hflip: float = 0.5,
        reprob: float = 0.0,
    ) -> None:
        from timm.data import create_transform

        self.transform = create_transform(
            (3, *size),
            is_training=True,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            color_jitter=0.0,
            auto_augment=auto_augment,
            interpolation="bicubic",
            re_prob=reprob,
            re_mode="pixel",
            mean=CLIP_MEAN,
            std=CLIP_STD,
        )

    def __call__(self, image: Image.Image, target: Any, rng: np.random.Generator) -> Sample:
        with seeded(rng):
            pixels = self.transform(image)
        return {"image": pixels, "label": torch.tensor(target)}


@dataclasses.dataclass(frozen=True)
class ClipTransform:
    """Contrastive training: random resized crop and a caption. Gives "image" and "text" (context,) int64.

    The target is a caption, several of which one is drawn, or a class, whose name is put into one of the prompts.
    """

    size: tuple[int, int]
    """Height and width, in pixels."""
    tokenize: Callable[[list[str]], Tensor]
    """N texts -> (N, context), such as open_clip's tokenizer."""
    scale: tuple[float, float] = (0.9, 1.0)
    hflip: float = 0.0
    classes: Sequence[str] | None = None
    prompts: Sequence[str] = ("a photo of a {}.",)

    def __call__(self, image: Image.Image, target: Any, rng: np.random.Generator) -> Sample:
        crop = Crop.draw(image, rng, self.scale, hflip=self.hflip)
        text = self.tokenize([self._caption(target, rng)])[0]
        return {"image": crop.apply(image, self.size), "text": text}

    def _caption(self, target: Any, rng: np.random.Generator) -> str:
        if isinstance(target, int) and self.classes is not None:
            return str(rng.choice(list(self.prompts))).format(self.classes[target])
        captions = [target] if isinstance(target, str) else target
        if not isinstance(captions, list) or not captions:
            raise ValueError(f"contrastive training needs captions, or classes with names; this target is {target!r}")
        return captions[rng.integers(len(captions))]


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Evaluation: resize and crop as `eva02.images.resize_crop`. Gives "image", and "label" where there is a class."""

    size: tuple[int, int]
    crop: Literal["center", "squash"] = "center"
    crop_pct: float = 1.0

    def __call__(self, image: Image.Image, target: Any, rng: np.random.Generator | None = None) -> Sample:
        sample: Sample = {"image": normalise(resize_crop(image, self.size, self.crop, self.crop_pct))}
        if isinstance(target, int):
            sample["label"] = torch.tensor(target)
        return sample


class Mixup:
    """Collates samples and mixes their images and labels with timm's Mixup: "label" becomes (B, classes) float32.

    Pass it as `TrainLoader(..., collate=Mixup(...))`; the draw follows from the batch's first sample. Each process
    mixes within its own part of the batch, which has to be even.
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.1) -> None:
        from timm.data import Mixup as TimmMixup

        self.mix = TimmMixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, samples: Sequence[Sample], rng: np.random.Generator) -> Sample:
        batch = torch.utils.data.default_collate(list(samples))
        with seeded(rng):
            batch["image"], batch["label"] = self.mix(batch["image"], batch["label"])
        return batch
