"""Peers of subln_swiglu: no library fuses the two, so the fastest pieces are put together."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.ops.swiglu import own
from eva02_kernels.bench.cases import EPS, Problem
from eva02_kernels.bench.ops import Function
from eva02_kernels.bench.providers import Unsupported, provider


@provider("liger+layer_norm", suites=("ops",), op="subln_swiglu")
def liger(problem: Problem) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if problem.device == "cpu":
        raise Unsupported("its Triton kernels need a GPU")
    width = (problem.shape.hidden,)
    return lambda gate, up, norm_w, norm_b: F.layer_norm(
        LigerSiLUMulFunction.apply(*own(gate, up)), width, norm_w, norm_b, EPS
    )
