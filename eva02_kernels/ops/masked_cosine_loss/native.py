"""CPU kernels of ``csrc/masked_cosine_loss``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels.ops._common import contiguous, empty_like_needed, present, rows_2d


def fwd(pred: Tensor, target: Tensor, idx: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32)
    stats = torch.empty(3, pred.shape[0], dtype=torch.float32)
    torch.ops.eva02_kernels_C.masked_cosine_loss_fwd_cpu.default(
        rows_2d(pred), rows_2d(target), *contiguous(idx), loss, stats
    )
    return loss, stats


def bwd(
    dloss: Tensor, pred: Tensor, target: Tensor, idx: Tensor | None, stats: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    grads = empty_like_needed((pred, target), needs)
    torch.ops.eva02_kernels_C.masked_cosine_loss_bwd_cpu.default(
        dloss, rows_2d(pred), rows_2d(target), *contiguous(idx), stats, *grads
    )
    return present(grads)


def unsupported(direction: str, args: tuple[object, ...]) -> Sequence[str]:
    if direction == "bwd":  # the first argument, the loss gradient, is float32 whatever the features are
        dtype = args[1].dtype  # type: ignore[attr-defined]
        if dtype == torch.float64:
            return ("needs float32, bfloat16 or float16, got float64",)
    return ()
