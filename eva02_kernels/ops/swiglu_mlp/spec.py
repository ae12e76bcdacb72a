from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels._launch import MAX_ROW_WIDTH
from eva02_kernels._library import define, eager_gradients, input_gradients, save_inputs
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
from eva02_kernels.ops.subln_swiglu.reference import hidden_ref, subln_swiglu_ref
from eva02_kernels.ops.swiglu.reference import swiglu_ref
from eva02_kernels.ops.swiglu_mlp import native
from eva02_kernels.ops.swiglu_mlp.native import hidden_width

_INPUTS_SCHEMA = (
    "Tensor x, Tensor w_gate, Tensor? b_gate, Tensor? w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? pre_weight, Tensor? pre_bias, float pre_eps, "
    "bool pre_norm, Tensor? layer_scale, Tensor? row_scale, bool add_x, bool recompute"
)
# Differentiable forward arguments: x, weights and biases, sub-LN, pre-norm, layer scale.
_PLACES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 14)


def _canonical(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    pre_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    recompute: bool = False,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Any, ...]:
    check_activation("x", x)
    add_x = residual is x
    x, w_gate, w_up, w_down = autocast(x, w_gate, w_up, w_down)
    check(w_gate.dim() == 2 and w_gate.shape[1] == x.shape[-1], "w_gate", f"(F, {x.shape[-1]})", tuple(w_gate.shape))
    if w_up is None:
        check(w_gate.shape[0] % 2 == 0, "w_gate", "an even number of rows (packed: w_up is None)", tuple(w_gate.shape))
        check(b_up is None, "b_up", "None beside a packed w_gate", "a tensor")
    width = hidden_width(w_gate, w_up)
    check_like("w_gate", w_gate, w_gate.shape, x)
    check_like("w_up", w_up, w_gate.shape, x)
    check(w_down.dim() == 2 and w_down.shape[1] == width, "w_down", f"(C_out, {width})", tuple(w_down.shape))
    check_like("w_down", w_down, w_down.shape, x)
    check_parameter("b_gate", b_gate, w_gate.shape[:1], x)
    check_parameter("b_up", b_up, (width,), x)
    check_parameter("b_down", b_down, w_down.shape[:1], x)
    check_parameter("norm_weight", norm_weight, (width,), x)
    check_parameter("norm_bias", norm_bias, (width,), x)
    check(norm_bias is None or norm_weight is not None, "norm_bias", "None without norm_weight", "a tensor")
    check_residual(x, residual, w_down.shape[0], add_x)
    check_scales(x, layer_scale, row_scale, w_down.shape[0])
    pre = canonical_pre_norm(pre_norm, x)
    recompute = recompute or not torch.is_grad_enabled()  # without gradients there is nothing to keep
    mlp = (x, w_gate, b_gate, w_up, b_up, w_down, b_down, norm_weight, norm_bias, eps)
    return *mlp, *pre, layer_scale, row_scale, add_x, recompute


def check_residual(x: Tensor, residual: Tensor | None, width: int, add_x: bool) -> None:
    if residual is not None:
        shape = x.shape if add_x else residual.shape
        check(tuple(shape) == (*x.shape[:-1], width), "residual", f"shape {(*x.shape[:-1], width)}", tuple(shape))


def _gate_up(x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    w_gate, b_gate, w_up, b_up, *_ = args
    pre_weight, pre_bias, pre_eps, has_pre_norm = args[9:13]
    if has_pre_norm:
        x = layer_norm_ref(x, pre_weight, pre_bias, pre_eps)
    if w_up is None:
        gate, up = linear_ref(x, w_gate, b_gate).chunk(2, dim=-1)
        return gate, up
    return linear_ref(x, w_gate, b_gate), linear_ref(x, w_up, b_up)


def _reference(x: Tensor, *args: Any) -> tuple[Tensor]:
    w_down, b_down, norm_weight, norm_bias, eps = args[4:9]
    layer_scale, row_scale, add_x, _ = args[13:]
    gate, up = _gate_up(x, args)
    if norm_weight is None:
        hidden = swiglu_ref(gate, up)
    else:
        hidden = subln_swiglu_ref(gate, up, norm_weight, norm_bias, eps)
    y = linear_ref(hidden, w_down, b_down)
    return (scale_and_add_ref(y, x if add_x else None, layer_scale, row_scale),)


def _eager_fwd(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    norm_weight, _, eps = args[6:9]
    pre_eps, has_pre_norm, recompute = args[11], args[12], args[16]
    gate, up = _gate_up(x, args)
    rows, width = num_rows(x), gate.shape[-1]
    kept = x.new_empty(0)
    if not recompute:
        kept = torch.stack([gate.reshape(rows, width), up.reshape(rows, width)], dim=1)
        kept = torch.nn.functional.pad(kept, (0, padded(width) - width))
    none = (empty_stats(x, 0), empty_stats(x, 0))
    norm = none if norm_weight is None else statistics(hidden_ref(gate, up), eps)
    pre = statistics(x, pre_eps) if has_pre_norm else none
    return *_reference(x, *args), kept, *norm, *pre


def _eager_bwd(dout: Tensor, *args: Any) -> list[Tensor]:
    inputs, needs = args[5:-1], args[-1]
    return eager_gradients(_reference, inputs, _PLACES, needs, [dout])


def _fake_bwd(dout: Tensor, *args: Any) -> list[Tensor]:
    inputs, needs = args[5:-1], args[-1]
    return [inputs[i].new_empty(inputs[i].shape) for i, need in zip(_PLACES, needs, strict=True) if need]


def save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep every output but the first, and the inputs."""
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    save_inputs(ctx, kept, inputs)


def _backward(ctx: Any, dout: Tensor, *_: None) -> list[Tensor | None]:
    return input_gradients(ctx, "swiglu_mlp_bwd", dout, _PLACES)


def _unsupported(limit: int, hidden_limit: int, direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    x, *rest = args if direction == "fwd" else args[6:]
    width = hidden_width(rest[0], rest[2])
    return (
        *norm_rows_unsupported((x.shape[-1], rest[12]), limit=limit),
        *norm_rows_unsupported((width, rest[6] is not None), limit=hidden_limit),
    )


_triton_unsupported = functools.partial(_unsupported, MAX_ROW_WIDTH, MAX_ROW_WIDTH)
# Backward of the sub-LN keeps the sums of the biases of gate and up too: twice as many for a column.
_cuda_unsupported = functools.partial(_unsupported, MAX_CUDA_ROW_WIDTH, MAX_CUDA_ROW_WIDTH // 2)


def _samples() -> list[Sample]:
    def make(
        *lead: int,
        width: int,
        hidden: int,
        packed: bool = False,
        bias: bool = True,
        norm: bool = True,
        pre_norm: bool = True,
        residual: str = "x",
        scale: bool = False,
        drop: bool = False,
        recompute: bool = False,
    ) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def randn(*s: int) -> Tensor:
                return torch.randn(*s, generator=generator).to(dtype)

            def affine(n: int) -> tuple[Tensor, Tensor]:
                return 1 + 0.1 * randn(n), 0.1 * randn(n)

            x = 0.5 + randn(*lead, width)
            w_up: Any
            b_gate: Any
            b_up: Any
            w_gate, w_up = (randn(hidden, width) * width**-0.5 for _ in range(2))
            b_gate, b_up = (randn(hidden) if bias else None for _ in range(2))
            w_down, b_down = randn(width, hidden) * hidden**-0.5, randn(width) if bias else None
            if packed:
                w_gate, w_up = torch.cat([w_gate, w_up]), None
                b_gate, b_up = (torch.cat([b_gate, b_up]), None) if bias else (None, None)
            kwargs: dict[str, Any] = {"recompute": recompute}
            if pre_norm:
                kwargs["pre_norm"] = (*affine(width), 1e-6)
            if residual:
                kwargs["residual"] = x if residual == "x" else randn(*lead, width)
            if scale:
                kwargs["layer_scale"] = 0.5 + 0.1 * randn(width)
            if drop:
                kwargs["row_scale"] = torch.tensor([0.0, 1.25] * lead[0])[: lead[0]]
            norms = affine(hidden) if norm else (None, None)
            return (x, w_gate, b_gate, w_up, b_up, w_down, b_down, *norms), kwargs

        return inputs

    return [
        Sample("subln", make(2, 7, width=40, hidden=56), smoke=True),
        Sample("packed", make(2, 7, width=40, hidden=56, packed=True, norm=False)),
        Sample("packed_subln", make(2, 7, width=33, hidden=31, packed=True)),
        Sample("bare", make(9, width=24, hidden=17, bias=False, norm=False, pre_norm=False, residual="")),
        Sample("scales", make(3, 5, width=32, hidden=48, scale=True, drop=True)),
        Sample("scales_no_residual", make(3, 5, width=32, hidden=48, scale=True, residual="", norm=False)),
        Sample("other_residual", make(2, 5, width=32, hidden=48, residual="other")),
        Sample("recompute", make(2, 7, width=40, hidden=61, recompute=True)),
        Sample("recompute_packed", make(2, 7, width=40, hidden=64, recompute=True, packed=True, norm=False)),
        Sample("rows", make(70, width=8, hidden=12, norm=False, pre_norm=False)),
        Sample("empty", make(0, 5, width=16, hidden=24)),
        Sample("F2730", make(1, 29, width=64, hidden=2730)),
        Sample("Ti", make(1, 257, width=192, hidden=512, packed=True, norm=False)),
        Sample("block_B", make(1, 257, width=768, hidden=2048), full=True),
        Sample("block_L", make(1, 257, width=1024, hidden=2730), full=True),
    ]


def _flops(x: Tensor, w_gate: Tensor, b_gate: Any, w_up: Any, b_up: Any, w_down: Tensor, *rest: Any) -> Any:
    weights = sum(w.numel() for w in (w_gate, w_up, w_down) if w is not None)
    recompute = rest[-1]
    again = w_gate.numel() + (0 if w_up is None else w_up.numel()) if recompute else 0
    return 2 * num_rows(x) * weights, 2 * num_rows(x) * (2 * weights + again)


def _bytes(x: Tensor, w_gate: Tensor, b_gate: Any, w_up: Any, *rest: Any) -> tuple[int, int]:
    """eva02.md's fused target with the LayerNorm outputs recomputed: T and G in elements."""
    t, g = x.numel(), num_rows(x) * hidden_width(w_gate, w_up)
    kept = 0 if rest[-1] else 2 * g
    return x.element_size() * (2 * t + kept), x.element_size() * (3 * t + kept + 2 * g)


# Matrix instructions take 16-bit operands: in those types the normed input, gate, up, the hidden activations and the
# gradients of all of these are rounded in turn; eager's run in the same dtype is as far off (3.5 times the plain
# bound for dw_up at F = 2730, where a float32 run rounded once is the yardstick). In float32 nothing is rounded.
GPU_ERROR_MULTIPLE = 4.0

SPEC = define(
    OpSpec(
        name="swiglu_mlp",
        summary="gated feed-forward with pre-norm, sub-LN, layer scale, drop path and residual",
        formula="r + rs * ls * (LN(silu(LN(x) Wg^T + bg) * (LN(x) Wu^T + bu)) Wd^T + bd)",
        source="EVA-02, arXiv:2303.11331",
        fwd_schema=_INPUTS_SCHEMA,
        fwd_returns="(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        bwd_schema="Tensor dout, Tensor gate_up, Tensor mean, Tensor rstd, Tensor pre_mean, Tensor pre_rstd, "
        f"{_INPUTS_SCHEMA}, bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=lambda x, *args: native.empty_outputs(x, args),
        fake_bwd=_fake_bwd,
        setup_context=save_mlp,
        backward=_backward,
        backends=(
            *product_backends(
                "swiglu_mlp",
                _triton_unsupported,
                _cuda_unsupported,
                error_multiple=GPU_ERROR_MULTIPLE,
                float32_multiple=1.0,
            ),
            cpu_backend(native.fwd, native.bwd, native.unsupported, error_multiple=native.ERROR_MULTIPLE),
            eager_backend(_eager_fwd, _eager_bwd),
        ),
        samples=_samples,
        saved="x, weights, biases; gate_up (rows, 2, F rounded up to 8) unless recompute; statistics float32",
        bytes_moved=_bytes,
        flops=_flops,
    )
)
