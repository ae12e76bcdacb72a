"""Peers of gather_layer_norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from eva02_kernels.bench.cases import EPS, Problem
from eva02_kernels.bench.ops import Function
from eva02_kernels.bench.providers import provider


@provider("gather first", suites=("ops",), op="gather_layer_norm")
def gather_first(problem: Problem) -> Function:
    """What a careful user writes in plain PyTorch: pick the tokens, then normalise those alone."""

    def run(x: Tensor, idx: Tensor, norm_w: Tensor, norm_b: Tensor) -> Tensor:
        return F.layer_norm(x.flatten(0, 1)[idx], x.shape[-1:], norm_w, norm_b, EPS)

    return run
