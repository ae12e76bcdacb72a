"""Peers of apply_rope."""

from __future__ import annotations

import torch
from torch import Tensor

from eva02_kernels.bench.cases import Problem
from eva02_kernels.bench.ops import Function
from eva02_kernels.bench.providers import Unsupported, provider


@provider("timm", suites=("ops",), op="apply_rope")
def timm(problem: Problem) -> Function:
    from timm.layers import apply_rot_embed_cat

    table = torch.cat([problem.extras["sin"], problem.extras["cos"]], -1)

    def run(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return torch.cat([x[:, :, :1], apply_rot_embed_cat(x[:, :, 1:], table)], dim=2).transpose(1, 2)

    return run


@provider("liger", suites=("ops",), op="apply_rope")
def liger(problem: Problem) -> Function:
    import liger_kernel  # noqa: F401

    raise Unsupported("its rotation pairs channel j with j + D/2 in one dimension; EVA-02 pairs neighbours in two")
