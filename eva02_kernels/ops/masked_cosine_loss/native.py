"""Compiled kernels of ``csrc/masked_cosine_loss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import contiguous, cuda_rows, empty_like_needed, loss_unsupported, present, rows_2d


def fwd(lib: Library, pred: Tensor, target: Tensor, idx: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    stats = torch.empty(3, pred.shape[0], dtype=torch.float32, device=pred.device)
    lib.masked_cosine_loss_fwd(rows_2d(pred), rows_2d(target), *contiguous(idx), loss, stats)
    return loss, stats


def bwd(
    lib: Library, dloss: Tensor, pred: Tensor, target: Tensor, idx: Tensor | None, stats: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    grads = empty_like_needed((pred, target), needs)
    inverse = (None, None) if idx is None or not needs[1] else lib.inverse_token_index(idx, target.shape[0], 1)
    lib.masked_cosine_loss_bwd(dloss, rows_2d(pred), rows_2d(target), *contiguous(idx), *inverse, stats, *grads)
    return present(grads)


def cuda_unsupported(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    return loss_unsupported(direction, args) or cuda_rows(direction, args[direction == "bwd" :])
