from __future__ import annotations

import torch
from torch import Tensor


def flat_index(idx: Tensor, seq_len: int) -> Tensor:
    """(B, K) per sample -> flat b * S + s, negative entries kept negative; a flat index passes through."""
    idx = idx.long()
    if idx.dim() == 1:
        return idx
    sample = torch.arange(idx.shape[0], device=idx.device)[:, None]
    return torch.where(idx < 0, idx, sample * seq_len + idx)


def gather_tokens_ref(x: Tensor, idx: Tensor) -> Tensor:
    flat = flat_index(idx, x.shape[1])
    rows = x.flatten(0, 1)
    if rows.shape[0] == 0:
        return x.new_zeros(*flat.shape, x.shape[-1])
    return rows[flat.clamp(min=0)].masked_fill((flat < 0)[..., None], 0.0)


def scatter_tokens_ref(y: Tensor, idx: Tensor, batch: int, seq_len: int) -> Tensor:
    """Zeros (B, S, C) with the rows of y added at their tokens: the adjoint of gather_tokens."""
    flat = flat_index(idx, seq_len)
    wide = torch.promote_types(y.dtype, torch.float32)
    rows = y.to(wide).masked_fill((flat < 0)[..., None], 0.0).reshape(-1, y.shape[-1])
    out = torch.zeros(batch * seq_len, y.shape[-1], dtype=wide, device=y.device)
    if out.shape[0]:
        out = out.index_add(0, flat.clamp(min=0).reshape(-1), rows)
    return out.view(batch, seq_len, y.shape[-1]).to(y.dtype)
