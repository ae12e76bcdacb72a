"""Compiled kernels of ``csrc/clip_loss``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import empty_like_needed, present, rows_2d


def fwd(
    lib: Library, image: Tensor, text: Tensor, logit_scale: Tensor, all_image: Tensor | None, all_text: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    forward = lib.clip_loss_fwd
    loss = torch.empty(2, dtype=torch.float32, device=image.device)
    stats = torch.empty(3, image.shape[0], dtype=torch.float32, device=image.device)
    image_loss, text_loss, target = stats
    image, text = rows_2d(image), rows_2d(text)
    if all_image is None or all_text is None:
        forward(image, text, logit_scale, 0, target, image_loss, text_loss, loss[:1])
        return loss[0].clone(), stats
    forward(text, rows_2d(all_image), logit_scale, first, target, text_loss, None, loss[1:])
    forward(image, rows_2d(all_text), logit_scale, first, target, image_loss, None, loss[:1])
    return loss.sum(), stats


def bwd(
    lib: Library, dloss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, all_image: Tensor | None,
    all_text: Tensor | None, stats: Tensor, first: int, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    backward = lib.clip_loss_bwd
    grads = empty_like_needed((image, text, logit_scale), needs)
    dimage, dtext, dscale = grads
    image, text = rows_2d(image), rows_2d(text)
    image_loss, text_loss, target = stats
    images, texts = (target, image_loss), (target, text_loss)
    if all_image is None or all_text is None:
        backward(dloss, image, text, logit_scale, 0, *images, *texts, dimage, dtext, dscale)
        return present(grads)
    own = slice(first, first + image.shape[0])
    if dimage is not None or dscale is not None:
        own_images = (t[own] for t in images)
        backward(dloss, image, rows_2d(all_text), logit_scale, first, *own_images, *texts, dimage, None, dscale)
    if dtext is not None:
        own_texts = (t[own] for t in texts)
        backward(dloss, text, rows_2d(all_image), logit_scale, first, *own_texts, *images, dtext, None, None)
    return present(grads)
