"""Compiled kernels of ``csrc/swiglu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import dense_like, halves, rows_2d


def fwd(lib: Library, gate: Tensor, up: Tensor | None) -> Tensor:
    g, u = halves(gate, up)
    out = torch.empty(*gate.shape[:-1], g.shape[1], dtype=gate.dtype, device=gate.device)
    lib.swiglu_fwd(g, u, out.view(g.shape))
    return out


def bwd(lib: Library, dout: Tensor, gate: Tensor, up: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    # One pass gives both gradients; a single one that nobody wants costs a store, not a pass.
    grads = [dense_like(t) for t in (gate, up) if t is not None]
    g, u = halves(gate, up)
    dg, du = halves(grads[0], grads[1] if up is not None else None)
    lib.swiglu_bwd(rows_2d(dout), g, u, dg, du)
    return [t for t, need in zip(grads, needs, strict=False) if need]
