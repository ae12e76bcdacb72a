"""Compiled kernels of ``csrc/mask_tokens``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import contiguous, empty_like_needed, num_rows, present


def num_prefix(cls_token: Tensor | None) -> int:
    """Tokens before the patches: of cls_token (1, n, C), (n, C) or (C,)."""
    return 0 if cls_token is None else num_rows(cls_token)


def fwd(
    lib: Library,
    patches: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
) -> Tensor:
    batch, count, width = patches.shape
    prefix = num_prefix(cls_token)
    out = torch.empty(batch, prefix + count, width, dtype=patches.dtype, device=patches.device)
    lib.mask_tokens_fwd(*contiguous(patches, mask, mask_token, pos_embed, cls_token), out)
    return out


def bwd(
    lib: Library,
    dout: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    batch, tokens, width = dout.shape
    prefix = num_prefix(cls_token)
    dpatches = torch.empty(batch, tokens - prefix, width, dtype=dout.dtype, device=dout.device) if needs[0] else None
    parameters = empty_like_needed((mask_token, pos_embed, cls_token), needs[1:])
    lib.mask_tokens_bwd(*contiguous(dout, mask), prefix, dpatches, *parameters)
    return present([dpatches, *parameters])
