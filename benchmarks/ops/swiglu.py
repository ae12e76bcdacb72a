"""Peers of swiglu."""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.bench.cases import Problem
from eva02_kernels.bench.ops import Function
from eva02_kernels.bench.providers import Unsupported, provider


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
    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)
