"""Peers of gelu_mlp."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from eva02_kernels.bench.cases import EPS, Problem
from eva02_kernels.bench.ops import Function
from eva02_kernels.bench.providers import provider


@provider("timm", suites=("ops",), op="gelu_mlp")
def timm(problem: Problem) -> Function:
    from timm.layers import Mlp

    s = problem.shape
    mlp = Mlp(s.dim, 4 * s.dim)
    names = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}

    def run(**t: Tensor) -> Tensor:
        y = F.layer_norm(t["x"], (s.dim,), t["pre_w"], t["pre_b"], EPS)
        return t["x"] + functional_call(mlp, {name: t[key] for name, key in names.items()}, (y,))

    return run
