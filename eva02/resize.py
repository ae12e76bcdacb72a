"""Resizing of position embeddings and patch kernels, by either upstream's rule.

| | official (baaivision/EVA) | timm |
|---|---|---|
| position embedding | bicubic | bicubic with antialiasing |
| patch kernel | bicubic, values as they fall | pseudo-inverse of the image resize (FlexiViT) |

Source: eq. 6 of Beyer et al., arXiv:2212.08013, for the pseudo-inverse rule.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ResizeRule = Literal["timm", "official"]


def _antialias(rule: str) -> bool:
    if rule not in ("timm", "official"):
        raise ValueError(f"resize is 'timm' or 'official', got {rule!r}")
    return rule == "timm"


def resize_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    num_prefix_tokens: int = 1,
    rule: ResizeRule = "timm",
) -> Tensor:
    """Position embedding of another grid; the prefix tokens' rows are kept.

    Args:
        pos_embed: (1, prefix + old rows * old columns, C), any floating dtype; interpolated in float32.
        new_grid, old_grid: (rows, columns), in patches.

    Returns:
        (1, prefix + new rows * new columns, C) in pos_embed's dtype. Gradients reach pos_embed.
    """
    antialias = _antialias(rule)
    if new_grid == old_grid:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    image = grid.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def _resize_matrix(old: int, new: int) -> Tensor:
    """(new, old) float64: antialiased bicubic resizing of a line as a matrix."""
    columns = torch.eye(old, dtype=torch.float64)[None, None]  # one line a column; one column alone is mis-strided
    return F.interpolate(columns, size=(new, old), mode="bicubic", antialias=True)[0, 0]


def resize_patch_kernel(weight: Tensor, new_size: tuple[int, int], rule: ResizeRule = "timm") -> Tensor:
    """Patch projection kernel for another patch size.

    The pseudo-inverse rule asks that a resized kernel meet a resized image in the same product: with an image line
    resized by R, w' = pinv(R)^T w. Bicubic resizing is separable, so the two sides are inverted one by one.

    Args:
        weight: (C, channels, height, width), any floating dtype.
        new_size: (height, width), in pixels.
    """
    timm_rule = _antialias(rule)
    if tuple(weight.shape[-2:]) == tuple(new_size):
        return weight
    if not timm_rule:
        resized = F.interpolate(weight.float(), size=new_size, mode="bicubic", align_corners=False)
        return resized.to(weight.dtype)
    rows, columns = (
        torch.linalg.pinv(_resize_matrix(old, new)) for old, new in zip(weight.shape[-2:], new_size, strict=True)
    )
    return (rows.T @ weight.double() @ columns).to(weight.dtype)
