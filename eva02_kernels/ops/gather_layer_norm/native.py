"""Compiled kernels of ``csrc/gather_layer_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import contiguous, empty_like_needed, empty_stats, last_dense, present


def fwd(
    lib: Library, x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(*idx.shape, x.shape[-1], dtype=x.dtype, device=x.device)
    mean, rstd = empty_stats(x, idx.numel()), empty_stats(x, idx.numel())
    lib.gather_layer_norm_fwd(last_dense(x), *contiguous(idx, weight, bias), eps, out, mean, rstd)
    return out, mean, rstd


def bwd(
    lib: Library,
    dout: Tensor,
    x: Tensor,
    idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    grads = empty_like_needed((x, weight, bias), needs)
    lib.gather_layer_norm_bwd(
        dout.contiguous(),
        last_dense(x),
        *lib.inverse_token_index(idx, *x.shape[:2]),
        weight.contiguous(),
        mean,
        rstd,
        *grads,
    )
    return present(grads)
