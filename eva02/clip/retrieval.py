"""Retrieval of images by text and of text by images, where an image may have several captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def retrieval_recall(
    image: Tensor, text: Tensor, image_of_text: Tensor, topk: Sequence[int] = (1, 5, 10), *, block: int = 1024
) -> dict[str, float]:
    """R@k both ways, as reported on Flickr30k and COCO.

    An image counts where one of its captions is among the k texts nearest to it; a text where its image is among the k
    nearest images.

    Args:
        image: (N, E), text: (M, E), of unit length.
        image_of_text: (M,) integers, the image that each text belongs to; every image has a text.
        topk: each k; one over the number of candidates takes them all.
        block: rows of similarities at a time.

    Returns:
        "image_to_text_R@1", ..., "text_to_image_R@1", ...: shares of images and of texts.
    """
    if image_of_text.shape != (len(text),):
        raise ValueError(
            f"image_of_text: expected one image for each of {len(text)} texts; got {tuple(image_of_text.shape)}"
        )
    image_of_text = image_of_text.to(image.device)
    captions = torch.bincount(image_of_text, minlength=len(image))
    if len(captions) > len(image) or bool((captions == 0).any()):
        raise ValueError(f"image_of_text: expected texts of each of the {len(image)} images and of no other")
    numbers = torch.arange(len(image), device=image.device)
    directions = {
        "image_to_text": (image, text, numbers, image_of_text),
        "text_to_image": (text, image, image_of_text, numbers),
    }
    recalls: dict[str, float] = {}
    for name, (queries, candidates, wanted, owner) in directions.items():
        most = min(max(topk), len(candidates))
        hits = torch.zeros(most, dtype=torch.int64, device=image.device)
        for start in range(0, len(queries), block):
            nearest = (queries[start : start + block].float() @ candidates.float().T).topk(most).indices
            right = owner[nearest] == wanted[start : start + block, None]
            hits += (right.cumsum(1) > 0).sum(0)
        shares = (hits.double() / len(queries)).tolist()
        recalls |= {f"{name}_R@{k}": shares[min(k, most) - 1] for k in topk}
    return recalls
