"""Peers of swiglu."""

from __future__ import annotations

import torch
from torch import Tensor

from eva02_kernels.bench.cases import Problem
from eva02_kernels.bench.ops import Function
from eva02_kernels.bench.providers import Unsupported, provider


def own(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Copies for a backward that overwrites what it saved, as Liger's does: the inputs serve every arm.

    Its time with backward includes them.
    """
    return (gate.clone(), up.clone()) if torch.is_grad_enabled() else (gate, up)


@provider("liger", suites=("ops",), op="swiglu")
def liger(problem: Problem) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if problem.device == "cpu":
        raise Unsupported("its Triton kernels need a GPU")
    if "gate_up" in problem.tensors:

        def packed(gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, -1)
            return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())

        return packed
    return lambda gate, up: LigerSiLUMulFunction.apply(*own(gate, up))
