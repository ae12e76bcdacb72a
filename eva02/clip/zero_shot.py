"""Zero-shot classification: an image is of the class whose prompts it resembles most.

A class is the mean of its prompts' embeddings, each normalised first, and normalised again (arXiv:2103.00020, 3.1.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eva02.clip.model import Clip
from eva02.clip.text import tokenize

Template = str | Callable[[str], str]
Tokenizer = Callable[[list[str]], Tensor]


def imagenet_prompts() -> tuple[Sequence[str], Sequence[Template]]:
    """CLIP's 1000 names of ImageNet's classes and its 80 templates, as open_clip keeps them."""
    try:
        from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    except ImportError as error:
        raise ImportError("ImageNet's prompts are open_clip's: pip install open_clip_torch") from error
    return IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES


@torch.no_grad()
def class_embeddings(
    model: Clip,
    classes: Sequence[str],
    templates: Sequence[Template] = ("a photo of a {}.",),
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 256,
) -> Tensor:
    """(classes, E), of unit length.

    Args:
        templates: formats with one place for a class's name, or functions of it.
        tokenizer: texts -> (N, S) tokens; None is CLIP's, cut to the model's context.
        batch_size: texts at a time.
    """
    if not classes or not templates:
        raise ValueError(f"expected classes and templates, got {len(classes)} and {len(templates)}")
    tokens = tokenizer or (lambda texts: tokenize(texts, model.config.text.context_length))
    prompts = [t.format(name) if isinstance(t, str) else t(name) for name in classes for t in templates]
    device = model.logit_scale.device
    features = torch.cat(
        [
            model.encode_text(tokens(prompts[start : start + batch_size]).to(device), normalize=True).float()
            for start in range(0, len(prompts), batch_size)
        ]
    )
    return F.normalize(features.unflatten(0, (len(classes), len(templates))).mean(1), dim=-1)


@torch.no_grad()
def zero_shot_accuracy(
    model: Clip, batches: Iterable[tuple[Tensor, Tensor]], classes: Tensor, topk: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Share of images whose class is among the k nearest.

    Args:
        batches: images (B, 3, H, W) and labels (B,).
        classes: (classes, E) from `class_embeddings`.
        topk: each k; those over the number of classes are left out.
    """
    ks = [k for k in topk if k <= len(classes)]
    hits, total = torch.zeros(len(ks), dtype=torch.int64), 0
    for images, labels in batches:
        features = model.encode_image(images.to(classes.device), normalize=True).float()
        nearest = (features @ classes.T).topk(max(ks)).indices
        right = nearest == labels.to(classes.device)[:, None]
        hits += torch.stack([right[:, :k].any(1).sum() for k in ks]).cpu()
        total += len(labels)
    if not total:
        raise ValueError("batches: expected images, got none")
    return {k: hit.item() / total for k, hit in zip(ks, hits, strict=True)}
