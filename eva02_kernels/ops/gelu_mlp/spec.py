from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels._launch import MAX_ROW_WIDTH
from eva02_kernels._library import define, eager_gradients, input_gradients
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    MAX_CUDA_ROW_WIDTH,
    autocast,
    canonical_pre_norm,
    check,
    check_activation,
    check_like,
    check_parameter,
    cpu_backend,
    eager_backend,
    empty_stats,
    layer_norm_ref,
    linear_ref,
    norm_rows_unsupported,
    num_rows,
    padded,
    product_backends,
    scale_and_add_ref,
    statistics,
)
from eva02_kernels.ops.add_layer_norm.spec import check_scales
from eva02_kernels.ops.gelu_mlp import native
from eva02_kernels.ops.swiglu_mlp.spec import check_residual, save_mlp

_INPUTS_SCHEMA = (
    "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? pre_weight, Tensor? pre_bias, float pre_eps, "
    "bool pre_norm, Tensor? layer_scale, Tensor? row_scale, bool add_x, bool recompute"
)
# Of GPU backends: operands of a product are rounded to 16 bits, in backward the normed x, the gradient of the hidden
# layer and the activation, which a float32 run does not do; the largest excess over the rule's plain bounds on any
# sample, block_B included, is 1.25 (float16, gradient of w1).
_GPU_ERROR_MULTIPLE = 1.5
_PLACES = (0, 1, 2, 3, 4, 5, 6, 9)  # x, weights and biases, pre-norm, layer scale


def _canonical(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    pre_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    recompute: bool = False,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Any, ...]:
    check_activation("x", x)
    add_x = residual is x
    x, w1, w2 = autocast(x, w1, w2)
    check(w1.dim() == 2 and w1.shape[1] == x.shape[-1], "w1", f"(F, {x.shape[-1]})", tuple(w1.shape))
    check_like("w1", w1, w1.shape, x)
    check(w2.dim() == 2 and w2.shape[1] == w1.shape[0], "w2", f"(C_out, {w1.shape[0]})", tuple(w2.shape))
    check_like("w2", w2, w2.shape, x)
    check_parameter("b1", b1, w1.shape[:1], x)
    check_parameter("b2", b2, w2.shape[:1], x)
    check_residual(x, residual, w2.shape[0], add_x)
    check_scales(x, layer_scale, row_scale, w2.shape[0])
    recompute = recompute or not torch.is_grad_enabled()  # without gradients there is nothing to keep
    return x, w1, b1, w2, b2, *canonical_pre_norm(pre_norm, x), layer_scale, row_scale, add_x, recompute


def _hidden(x: Tensor, args: tuple[Any, ...], b1: Tensor | None) -> Tensor:
    w1, _, _, _, pre_weight, pre_bias, pre_eps, has_pre_norm = args[:8]
    if has_pre_norm:
        x = layer_norm_ref(x, pre_weight, pre_bias, pre_eps)
    return linear_ref(x, w1, b1)


def _reference(x: Tensor, *args: Any) -> tuple[Tensor]:
    _, b1, w2, b2 = args[:4]
    layer_scale, row_scale, add_x, _ = args[8:]
    hidden = _hidden(x, args, b1)
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    y = linear_ref(torch.nn.functional.gelu(wide).to(hidden.dtype), w2, b2)
    return (scale_and_add_ref(y, x if add_x else None, layer_scale, row_scale),)


def _eager_fwd(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    pre_eps, has_pre_norm, recompute = args[6], args[7], args[11]
    kept = x.new_empty(0)
    if not recompute:
        hidden = _hidden(x, args, None)
        width = hidden.shape[-1]
        kept = torch.nn.functional.pad(hidden.reshape(num_rows(x), width), (0, padded(width) - width))
    pre = statistics(x, pre_eps) if has_pre_norm else (empty_stats(x, 0), empty_stats(x, 0))
    return *_reference(x, *args), kept, *pre


def _eager_bwd(dout: Tensor, *args: Any) -> list[Tensor]:
    return eager_gradients(_reference, args[3:-1], _PLACES, args[-1], [dout])


def _fake_bwd(dout: Tensor, *args: Any) -> list[Tensor]:
    inputs, needs = args[3:-1], args[-1]
    return [inputs[i].new_empty(inputs[i].shape) for i, need in zip(_PLACES, needs, strict=True) if need]


def _backward(ctx: Any, dout: Tensor, *_: None) -> list[Tensor | None]:
    return input_gradients(ctx, "gelu_mlp_bwd", dout, _PLACES)


def _unsupported(limit: int, direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    x, *rest = args if direction == "fwd" else args[4:]
    return norm_rows_unsupported((x.shape[-1], rest[7]), limit=limit)


_triton_unsupported = functools.partial(_unsupported, MAX_ROW_WIDTH)
_cuda_unsupported = functools.partial(_unsupported, MAX_CUDA_ROW_WIDTH)


def _samples() -> list[Sample]:
    def make(
        *lead: int,
        width: int,
        hidden: int,
        bias: bool = True,
        pre_norm: bool = True,
        residual: bool = True,
        scale: bool = False,
        drop: bool = False,
        recompute: bool = False,
    ) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def randn(*s: int) -> Tensor:
                return torch.randn(*s, generator=generator).to(dtype)

            x = 0.5 + randn(*lead, width)
            w1, w2 = randn(hidden, width) * width**-0.5, randn(width, hidden) * hidden**-0.5
            b1, b2 = (randn(hidden), randn(width)) if bias else (None, None)
            kwargs: dict[str, Any] = {"recompute": recompute}
            if pre_norm:
                kwargs["pre_norm"] = (1 + 0.1 * randn(width), 0.1 * randn(width), 1e-6)
            if residual:
                kwargs["residual"] = x
            if scale:
                kwargs["layer_scale"] = 0.5 + 0.1 * randn(width)
            if drop:
                kwargs["row_scale"] = torch.tensor([0.0, 1.25] * lead[0])[: lead[0]]
            return (x, w1, b1, w2, b2), kwargs

        return inputs

    return [
        Sample("block", make(2, 7, width=40, hidden=56), smoke=True),
        Sample("bare", make(9, width=24, hidden=17, bias=False, pre_norm=False, residual=False)),
        Sample("scales", make(3, 5, width=32, hidden=48, scale=True, drop=True)),
        Sample("recompute", make(2, 7, width=33, hidden=61, recompute=True)),
        Sample("rows", make(70, width=8, hidden=12, pre_norm=False)),
        Sample("empty", make(0, 5, width=16, hidden=24)),
        Sample("Ti", make(1, 197, width=192, hidden=768)),
        Sample("block_B", make(1, 197, width=768, hidden=3072), full=True),
    ]


def _flops(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *rest: Any) -> tuple[int, int]:
    weights = w1.numel() + w2.numel()
    return 2 * num_rows(x) * weights, 2 * num_rows(x) * (2 * weights + (w1.numel() if rest[-1] else 0))


def _bytes(x: Tensor, w1: Tensor, *rest: Any) -> tuple[int, int]:
    t, g = x.numel(), num_rows(x) * w1.shape[0]
    kept = 0 if rest[-1] else g
    return x.element_size() * (2 * t + kept), x.element_size() * (3 * t + kept + g)


SPEC = define(
    OpSpec(
        name="gelu_mlp",
        summary="feed-forward with exact GELU, pre-norm, layer scale, drop path and residual",
        formula="r + rs * ls * (gelu(LN(x) W1^T + b1) W2^T + b2)",
        source="Dosovitskiy et al., arXiv:2010.11929",
        fwd_schema=_INPUTS_SCHEMA,
        fwd_returns="(Tensor, Tensor, Tensor, Tensor)",
        bwd_schema=f"Tensor dout, Tensor hidden, Tensor pre_mean, Tensor pre_rstd, {_INPUTS_SCHEMA}, bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=lambda x, *args: native.empty_outputs(x, args),
        fake_bwd=_fake_bwd,
        setup_context=save_mlp,
        backward=_backward,
        backends=(
            *product_backends(
                "gelu_mlp",
                _triton_unsupported,
                _cuda_unsupported,
                error_multiple=_GPU_ERROR_MULTIPLE,
                float32_multiple=1.0,
            ),
            cpu_backend(native.fwd, native.bwd, native.unsupported),
            eager_backend(_eager_fwd, _eager_bwd),
        ),
        samples=_samples,
        saved="x, weights, biases; hidden before b1 (rows, F rounded up to 8) unless recompute; statistics float32",
        bytes_moved=_bytes,
        flops=_flops,
    )
)
