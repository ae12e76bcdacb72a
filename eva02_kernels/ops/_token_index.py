"""Scatters as gathers: for each row, which entries of an index name it."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_index(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(order, starts) int32: the flat positions in ``index`` that name row r are order[starts[r]:starts[r + 1]].

    They are in increasing order, so that a sum over them has a fixed one. Entries outside 0..rows - 1 name no row.
    Nothing here waits for the device.
    """
    found, order = torch.sort(index.flatten(), stable=True)
    starts = torch.searchsorted(found, torch.arange(rows + 1, dtype=found.dtype, device=found.device), out_int32=True)
    return order.int(), starts


def inverse_token_index(idx: Tensor, batch: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """:func:`inverse_index` of the tokens that ``idx`` (B, K) or flat (M,) picks; entries out of range are padding."""
    flat = idx.dim() == 1
    padding = (idx < 0) | (idx >= (batch * seq_len if flat else seq_len))
    rows = idx.int()
    if not flat:
        rows = rows + seq_len * torch.arange(batch, dtype=torch.int32, device=idx.device)[:, None]
    return inverse_index(rows.masked_fill(padding, -1), batch * seq_len)
