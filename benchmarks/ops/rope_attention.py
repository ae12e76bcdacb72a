"""Peers of rope_attention: timm's own functions, and the attention libraries of GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eva02_kernels.bench.cases import Problem
from eva02_kernels.bench.ops import Function
from eva02_kernels.bench.providers import Unsupported, provider


@provider("timm", suites=("ops",), op="rope_attention")
def timm(problem: Problem) -> Function:
    from timm.layers import apply_rot_embed_cat

    table = torch.cat([problem.extras["sin"], problem.extras["cos"]], -1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = (torch.cat([x[:, :, :1], apply_rot_embed_cat(x[:, :, 1:], table)], dim=2).type_as(v) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


@provider("flash-attn", suites=("ops",), op="rope_attention")
def flash_attn(problem: Problem) -> Function:
    from flash_attn import flash_attn_func  # rotary embedding apart: its own rotates in one dimension only

    if problem.device == "cpu":
        raise Unsupported("needs a CUDA GPU")
    rotate = _rotate(problem)
    return lambda q, k, v: flash_attn_func(rotate(q), rotate(k), v)


@provider("xformers", suites=("ops",), op="rope_attention")
def xformers(problem: Problem) -> Function:
    from xformers.ops import memory_efficient_attention

    if problem.device == "cpu":
        raise Unsupported("needs a CUDA GPU")
    rotate = _rotate(problem)
    return lambda q, k, v: memory_efficient_attention(rotate(q), rotate(k), v)


def _rotate(problem: Problem) -> Function:
    from eva02_kernels.bench.cases import rotate_patches

    sin, cos = problem.extras["sin"], problem.extras["cos"]
    return lambda x: rotate_patches(x.transpose(1, 2), sin, cos).transpose(1, 2)
