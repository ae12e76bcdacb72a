"""CPU kernels of ``csrc/gather_layer_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels.ops._common import contiguous, empty_like_needed, empty_stats, last_dense, present


def fwd(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(*idx.shape, x.shape[-1], dtype=x.dtype)
    mean, rstd = empty_stats(x, idx.numel()), empty_stats(x, idx.numel())
    torch.ops.eva02_kernels_C.gather_layer_norm_fwd_cpu.default(
        last_dense(x), *contiguous(idx, weight, bias), eps, out, mean, rstd
    )
    return out, mean, rstd


def bwd(
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
    torch.ops.eva02_kernels_C.gather_layer_norm_bwd_cpu.default(
        dout.contiguous(), last_dense(x), *contiguous(idx, weight), mean, rstd, *grads
    )
    return present(grads)
