"""Peers of swiglu_mlp: the modules of timm and transformers on the same weights."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from eva02_kernels.bench.cases import EPS, Problem
from eva02_kernels.bench.ops import Function
from eva02_kernels.bench.providers import Unsupported, provider


@provider("timm", suites=("ops",), op="swiglu_mlp")
def timm(problem: Problem) -> Function:
    from timm.layers import GluMlp, SwiGLU

    s = problem.shape
    if s.subln:
        mlp = SwiGLU(s.dim, s.hidden, norm_layer=partial(nn.LayerNorm, eps=EPS))
        modules = {"fc1_g": "gate", "fc1_x": "up", "fc2": "down"}
        names = {f"{m}.{kind}": f"{kind[0]}_{n}" for m, n in modules.items() for kind in ("weight", "bias")}
        names |= {"norm.weight": "norm_w", "norm.bias": "norm_b"}
    else:
        mlp = GluMlp(s.dim, 2 * s.hidden, act_layer=nn.SiLU, gate_last=False)
        names = {"fc1.weight": "w_gate", "fc1.bias": "b_gate", "fc2.weight": "w_down", "fc2.bias": "b_down"}

    def run(**t: Tensor) -> Tensor:
        y = F.layer_norm(t["x"], (s.dim,), t["pre_w"], t["pre_b"], EPS)
        return t["x"] + functional_call(mlp, {name: t[key] for name, key in names.items()}, (y,))

    return run


@provider("transformers", suites=("ops",), op="swiglu_mlp")
def transformers(problem: Problem) -> Function:
    from transformers import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN

    s = problem.shape
    if s.subln:
        raise Unsupported("has no SwiGLU with a LayerNorm on the hidden layer")
    # The module rounds 2/3 of hidden_size * mlp_ratio up to a multiple of 8, which must be our width.
    mlp = Dinov2SwiGLUFFN(Dinov2Config(hidden_size=s.dim, mlp_ratio=4))
    if not hasattr(mlp, "gate_proj"):
        raise Unsupported("this release's module has other weights; 5.x is known to fit")
    if mlp.gate_proj.out_features != s.hidden:
        raise Unsupported(f"its hidden width is {mlp.gate_proj.out_features}, not {s.hidden}")

    def run(**t: Tensor) -> Tensor:
        y = F.layer_norm(t["x"], (s.dim,), t["pre_w"], t["pre_b"], EPS)
        weights = {"down_proj.weight": t["w_down"], "down_proj.bias": t["b_down"]}
        for kind in ("weight", "bias"):
            gate, up = t[f"{kind[0]}_gate"].chunk(2)
            weights |= {f"gate_proj.{kind}": gate, f"up_proj.{kind}": up}
        return t["x"] + functional_call(mlp, weights, (y,))

    return run
