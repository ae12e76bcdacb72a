from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, eager_gradients, run, scatter_grads
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    autocast,
    check,
    check_activation,
    check_like,
    check_parameter,
    cpu_backend,
    eager_backend,
    linear_ref,
    num_rows,
    product_backends,
    scale_and_add_ref,
)
from eva02_kernels.ops.add_layer_norm.spec import check_scales
from eva02_kernels.ops.linear import native


def _canonical(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Any, ...]:
    check_activation("x", x)
    x, weight, residual = autocast(x, weight, residual)
    check(weight.dim() == 2 and weight.shape[1] == x.shape[-1], "weight", f"(N, {x.shape[-1]})", tuple(weight.shape))
    check_like("weight", weight, weight.shape, x)
    check_parameter("bias", bias, weight.shape[:1], x)
    check_like("residual", residual, (*x.shape[:-1], weight.shape[0]), x)
    check_scales(x, layer_scale, row_scale, weight.shape[0])
    return x, weight, bias, residual, layer_scale, row_scale


def _reference(x: Tensor, weight: Tensor, bias: Any, residual: Any, layer_scale: Any, row_scale: Any) -> Tensor:
    return scale_and_add_ref(linear_ref(x, weight, bias), residual, layer_scale, row_scale)


def _eager_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Any, layer_scale: Any, row_scale: Any, needs: list[bool]
) -> list[Tensor]:
    args = (x, weight, bias, None, layer_scale, row_scale)
    return eager_gradients(_reference, args, (0, 1, 2, 4), needs, [dout])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, layer_scale, row_scale = inputs
    ctx.save_for_backward(x, weight, bias, layer_scale, row_scale)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    flags = ctx.needs_input_grad
    needs = [flags[0], flags[1], flags[2], flags[4]]
    grads: list[Tensor | None] = [None] * 4
    if any(needs):
        found = run("linear_bwd", dout, *ctx.saved_tensors, needs, ctx.backend)
        grads = scatter_grads(found, needs)
    dx, dweight, dbias, dscale = grads
    return dx, dweight, dbias, dout if flags[3] else None, dscale, None


def _samples() -> list[Sample]:
    def make(
        *shape: int, n: int, bias: bool = True, residual: bool = False, scale: bool = False, drop: bool = False
    ) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def randn(*s: int) -> Tensor:
                return torch.randn(*s, generator=generator).to(dtype)

            kwargs: dict[str, Any] = {}
            if residual:
                kwargs["residual"] = randn(*shape[:-1], n)
            if scale:
                kwargs["layer_scale"] = 0.5 + 0.1 * randn(n)
            if drop:
                kwargs["row_scale"] = torch.tensor([0.0, 1.25] * shape[0])[: shape[0]]
            weight = randn(n, shape[-1]) * shape[-1] ** -0.5
            return (randn(*shape), weight, randn(n) if bias else None), kwargs

        return inputs

    return [
        *(Sample(f"M{m}", make(m, 24, n=16)) for m in (1, 5, 6, 7, 13, 15, 29)),
        *(Sample(f"N{n}", make(9, 40, n=n)) for n in (1, 15, 17, 33, 63)),
        *(Sample(f"K{k}", make(9, k, n=20)) for k in (1, 3, 255, 520, 700)),
        Sample("residual", make(3, 11, 32, n=48, residual=True, scale=True, drop=True), smoke=True),
        Sample("no_bias", make(2, 11, 32, n=48, bias=False, scale=True)),
        Sample("drop", make(4, 3, 32, n=48, drop=True)),
        Sample("tiles", make(1100, 4, n=136)),  # more than GROUP_ROWS tiles of rows, two of columns
        Sample("wide", make(3, 8, n=1030)),
        Sample("deep", make(3, 1030, n=6, scale=True)),
        Sample("empty", make(0, 4, 32, n=48)),
        Sample("Ti", make(1, 257, 192, n=192, residual=True)),
        Sample("block_L", make(1, 257, 1024, n=1024, residual=True), full=True),
    ]


SPEC = define(
    OpSpec(
        name="linear",
        summary="x W^T + b with layer scale, drop path and residual in the epilogue",
        formula="y = r + rs * ls * (x W^T + b)",
        source="EVA-02, arXiv:2303.11331 (attention output projection)",
        fwd_schema="Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? layer_scale, Tensor? row_scale",
        fwd_returns="Tensor",
        bwd_schema="Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor? row_scale, "
        "bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=lambda x, weight, *rest: x.new_empty(*x.shape[:-1], weight.shape[0]),
        fake_bwd=lambda dout, x, weight, bias, ls, rs, needs: [
            t.new_empty(t.shape) for t, need in zip((x, weight, bias, ls), needs, strict=True) if need
        ],
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            *product_backends("linear"),
            cpu_backend(native.fwd, native.bwd),
            eager_backend(_reference, _eager_bwd),
        ),
        samples=_samples,
        saved="x, weight, bias; layer_scale and row_scale where given",
        bytes_moved=lambda x, w, b, r, ls, rs: (
            x.element_size() * (x.numel() + num_rows(x) * w.shape[0] * (1 + (r is not None))),
            x.element_size() * 2 * (x.numel() + num_rows(x) * w.shape[0]),
        ),
        flops=lambda x, w, *rest: (2 * num_rows(x) * w.numel(), 4 * num_rows(x) * w.numel()),
    )
)
