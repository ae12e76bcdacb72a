"""scatter_tokens on the kernels of gather_tokens: each is the adjoint of the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eva02_kernels.ops.gather_tokens.triton_kernels import gather, scatter

fwd = scatter


def bwd(dout: Tensor, idx: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    return [gather(dout, idx)] if needs[0] else []
