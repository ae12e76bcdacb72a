from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, run, scatter_grads
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    autocast,
    check_activation,
    check_like,
    check_parameter,
    cpu_backend,
    cuda_backend,
    cuda_rows,
    eager_backend,
    empty_stats,
    norm_magnitude,
    num_rows,
    reference_backward,
    statistics,
    triton_backend,
    whole_rows_only,
)
from eva02_kernels.ops.subln_swiglu import native
from eva02_kernels.ops.subln_swiglu.reference import hidden_ref, subln_swiglu_ref


def _canonical(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Any, ...]:
    check_activation("gate", gate)
    gate, up = autocast(gate, up)
    check_like("up", up, gate.shape, gate)
    check_parameter("weight", weight, gate.shape[-1:], gate)
    check_parameter("bias", bias, gate.shape[-1:], gate)
    return gate, up, weight, bias, eps


def _eager_fwd(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return subln_swiglu_ref(gate, up, weight, bias, eps), *statistics(hidden_ref(gate, up), eps)


def _fake_fwd(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = num_rows(gate)
    return gate.new_empty(gate.shape), empty_stats(gate, rows), empty_stats(gate, rows)


def _fake_bwd(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: list[bool],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((gate, up, weight, bias), needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate, up, weight, bias, ctx.eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(gate, up, weight, bias, mean, rstd)


def _backward(ctx: Any, dout: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    grads = run("subln_swiglu_bwd", dout, *ctx.saved_tensors, ctx.eps, needs, ctx.backend)
    return *scatter_grads(grads, needs), None


def _magnitude(name: str, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> float:
    if name not in ("arg0", "arg1"):
        return 0.0
    sigmoid = torch.sigmoid(gate.detach())
    silu = gate.detach() * sigmoid
    slope = up.detach() * (sigmoid + silu * (1 - sigmoid)) if name == "arg0" else silu
    return norm_magnitude(hidden_ref(gate, up), weight, eps, slope)


def _samples() -> list[Sample]:
    def make(*shape: int, strided: bool = False, float32_weights: bool = False) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)
            g, u = x.chunk(2, -1)
            w = 1 + 0.1 * torch.randn(shape[-1], generator=generator)
            b = 0.1 * torch.randn(shape[-1], generator=generator)
            if not (float32_weights and dtype.itemsize < 4):
                w, b = w.to(dtype), b.to(dtype)
            return ((g, u) if strided else (g.contiguous(), u.contiguous())) + (w, b), {}

        return inputs

    return [
        *(Sample(f"F{n}", make(5, n)) for n in (2, 15, 16, 17, 33, 683)),
        Sample("strided", make(2, 7, 40, strided=True), smoke=True),
        Sample("float32_weights", make(3, 64, float32_weights=True)),
        Sample("empty", make(0, 8)),
        Sample("L", make(2, 257, 2730)),
        Sample("B", make(1, 257, 2048)),
        Sample("widest", make(3, 8192)),
        Sample("widest_odd", make(3, 8191)),
    ]


SPEC = define(
    OpSpec(
        name="subln_swiglu",
        summary="LayerNorm(silu(gate) * up)",
        formula="h = g * sigmoid(g) * u; y = (h - mean(h)) / sqrt(var(h) + eps) * w + b",
        source="EVA-02, arXiv:2303.11331",
        fwd_schema="Tensor gate, Tensor up, Tensor weight, Tensor bias, float eps",
        fwd_returns="(Tensor, Tensor, Tensor)",
        bwd_schema="Tensor dout, Tensor gate, Tensor up, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
        "float eps, bool[] needs",
        canonical=_canonical,
        reference=subln_swiglu_ref,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.fwd, native.bwd, cuda_rows),
            triton_backend("subln_swiglu", whole_rows_only),
            cpu_backend(native.fwd, native.bwd),
            eager_backend(
                _eager_fwd,
                reference_backward(
                    subln_swiglu_ref,
                    (0, 1, 2, 3),
                    lambda dout, gate, up, weight, bias, mean, rstd, eps, needs: (
                        [dout],
                        (gate, up, weight, bias, eps),
                        needs,
                    ),
                ),
            ),
        ),
        samples=_samples,
        saved="gate, up, weight, bias; mean, rstd (rows,) float32",
        bytes_moved=lambda gate, up, weight, bias, eps: (
            gate.element_size() * 3 * gate.numel(),
            gate.element_size() * 5 * gate.numel(),
        ),
        magnitude=_magnitude,
    )
)
