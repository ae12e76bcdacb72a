"""Compiled kernels of ``csrc/gather_tokens``: a gather, and its adjoint, a sum of rows into where they came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import last_dense


def gather(lib: Library, x: Tensor, idx: Tensor) -> Tensor:
    out = torch.empty(*idx.shape, x.shape[-1], dtype=x.dtype, device=x.device)
    lib.gather_tokens_fwd(last_dense(x), idx.contiguous(), out)
    return out


def scatter(lib: Library, y: Tensor, idx: Tensor, batch: int, seq_len: int) -> Tensor:
    out = torch.empty(batch, seq_len, y.shape[-1], dtype=y.dtype, device=y.device)
    lib.gather_tokens_bwd(y.contiguous(), *lib.inverse_token_index(idx, batch, seq_len), out)
    return out


def gather_bwd(
    lib: Library, dout: Tensor, idx: Tensor, batch: int, seq_len: int, needs: Sequence[bool]
) -> list[Tensor]:
    return [scatter(lib, dout, idx, batch, seq_len)] if needs[0] else []


def scatter_bwd(lib: Library, dout: Tensor, idx: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    return [gather(lib, dout, idx)] if needs[0] else []
