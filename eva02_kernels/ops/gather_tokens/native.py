"""CPU kernels of ``csrc/gather_tokens``: a gather, and its adjoint, a sum of rows into the tokens they came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels.ops._common import last_dense


def gather(x: Tensor, idx: Tensor) -> Tensor:
    out = torch.empty(*idx.shape, x.shape[-1], dtype=x.dtype)
    torch.ops.eva02_kernels_C.gather_tokens_fwd_cpu.default(last_dense(x), idx.contiguous(), out)
    return out


def scatter(y: Tensor, idx: Tensor, batch: int, seq_len: int) -> Tensor:
    out = torch.empty(batch, seq_len, y.shape[-1], dtype=y.dtype)
    torch.ops.eva02_kernels_C.gather_tokens_bwd_cpu.default(y.contiguous(), idx.contiguous(), out)
    return out


def gather_bwd(dout: Tensor, idx: Tensor, batch: int, seq_len: int, needs: Sequence[bool]) -> list[Tensor]:
    return [scatter(dout, idx, batch, seq_len)] if needs[0] else []


def scatter_bwd(dout: Tensor, idx: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    return [gather(dout, idx)] if needs[0] else []
