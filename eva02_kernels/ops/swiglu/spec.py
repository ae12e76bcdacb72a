from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, run, scatter_grads
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    autocast,
    check,
    check_activation,
    check_like,
    cpu_backend,
    cuda_backend,
    eager_backend,
    reference_backward,
    triton_backend,
)
from eva02_kernels.ops.swiglu import native
from eva02_kernels.ops.swiglu.reference import swiglu_ref


def _canonical(gate: Tensor, up: Tensor | None = None) -> tuple[Any, ...]:
    check_activation("gate", gate)
    if up is None:
        check(gate.shape[-1] % 2 == 0, "gate", "an even last dim (gate half, up half) without up", tuple(gate.shape))
    gate, up = autocast(gate, up)
    check_like("up", up, gate.shape, gate)
    return gate, up


def _fake_fwd(gate: Tensor, up: Tensor | None) -> Tensor:
    width = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    return gate.new_empty(*gate.shape[:-1], width)


def _fake_bwd(dout: Tensor, gate: Tensor, up: Tensor | None, needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((gate, up), needs, strict=True) if need and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grads = run("swiglu_bwd", dout, gate, up, needs, ctx.backend)
    return tuple(scatter_grads(grads, needs))


def _samples() -> list[Sample]:
    def make(*shape: int, packed: bool = False, strided: bool = False) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            full = (*shape[:-1], shape[-1] * 2)
            x = torch.randn(full, generator=generator).to(dtype)
            if packed:
                return (x,), {}
            g, u = x.chunk(2, -1)
            return ((g, u) if strided else (g.contiguous(), u.contiguous())), {}

        return inputs

    return [
        *(Sample(f"F{n}", make(3, n)) for n in (1, 15, 16, 17, 33, 683)),
        Sample("packed", make(2, 5, 24, packed=True), smoke=True),
        Sample("strided", make(2, 7, 40, strided=True)),
        Sample("empty", make(0, 8)),
        Sample("L", make(2, 257, 2730)),
        Sample("vector", make(64)),
    ]


SPEC = define(
    OpSpec(
        name="swiglu",
        summary="silu(gate) * up",
        formula="y = g * sigmoid(g) * u",
        source="Shazeer, arXiv:2002.05202",
        fwd_schema="Tensor gate, Tensor? up",
        fwd_returns="Tensor",
        bwd_schema="Tensor dout, Tensor gate, Tensor? up, bool[] needs",
        canonical=_canonical,
        reference=swiglu_ref,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.fwd, native.bwd),
            triton_backend("swiglu"),
            cpu_backend(native.fwd, native.bwd),
            eager_backend(
                swiglu_ref,
                reference_backward(swiglu_ref, (0, 1), lambda dout, gate, up, needs: ([dout], (gate, up), needs)),
            ),
        ),
        samples=_samples,
        saved="gate, up",
        bytes_moved=lambda gate, up: (
            3 * gate.element_size() * gate.numel() // (2 if up is None else 1),
            5 * gate.element_size() * gate.numel() // (2 if up is None else 1),
        ),
    )
)
