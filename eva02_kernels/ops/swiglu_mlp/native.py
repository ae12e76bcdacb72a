"""Compiled kernels of ``csrc/swiglu_mlp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import (
    contiguous,
    empty_like_needed,
    empty_stats,
    nonempty,
    num_rows,
    padded,
    present,
    rows_of,
)

# gate and up are kept in the activations' dtype, so that in 16 bits backward starts from rounded values that a float32
# run does not have; the largest excess over the rule's plain bounds seen in the contract suite is 1.83 (dw_down, Ti).
ERROR_MULTIPLE = 2.0


def hidden_width(w_gate: Tensor, w_up: Tensor | None) -> int:
    return w_gate.shape[0] // (2 if w_up is None else 1)


def unsupported(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    x, *rest = args if direction == "fwd" else args[6:]
    w_out = rest[4]
    if w_out.shape[0] != x.shape[-1]:
        return (f"needs as many output as input channels, got {w_out.shape[0]} and {x.shape[-1]}",)
    return ()


def empty_outputs(x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """out, gate_up (rows, 2, Fp), mean, rstd, pre_mean, pre_rstd; what is not kept is empty."""
    w_gate, _, w_up, _, w_down, _, norm_weight, *_ = args
    has_pre_norm, recompute = args[12], args[16]
    rows = num_rows(x)
    width = padded(hidden_width(w_gate, w_up))
    kept = (0,) if recompute else (rows, 2, width)
    norm_rows, pre_rows = rows if norm_weight is not None else 0, rows if has_pre_norm else 0
    return (
        x.new_empty(*x.shape[:-1], w_down.shape[0]),
        x.new_empty(kept),
        empty_stats(x, norm_rows),
        empty_stats(x, norm_rows),
        empty_stats(x, pre_rows),
        empty_stats(x, pre_rows),
    )


def _kernel_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    w_gate, b_gate, w_up, b_up, w_down, b_down, norm_weight, norm_bias, eps, pre_weight, pre_bias, pre_eps = args[:12]
    return (
        *contiguous(w_gate, b_gate, w_up, b_up, w_down, b_down, norm_weight, norm_bias),
        eps,
        *contiguous(pre_weight, pre_bias),
        pre_eps,
    )


def fwd(lib: Library, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    layer_scale, row_scale, add_x = args[13:16]
    outputs = empty_outputs(x, args)
    out, *kept = outputs
    if out.numel():
        lib.swiglu_mlp_fwd(
            rows_of(x), *_kernel_args(args), *contiguous(layer_scale, row_scale), add_x, out, *nonempty(*kept)
        )
    return outputs


def bwd(
    lib: Library,
    dout: Tensor,
    gate_up: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pre_mean: Tensor,
    pre_rstd: Tensor,
    x: Tensor,
    *args: Any,
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    layer_scale, row_scale, add_x = args[13:16]
    grads = empty_like_needed((x, *args[:8], *args[9:11], layer_scale), needs)
    dx, *parameters = grads
    *weights, _, pre_weight, pre_bias, _ = _kernel_args(tuple(args))  # backward needs no eps: it has rstd
    kernel_args = (*weights, pre_weight, pre_bias)
    if dout.numel():
        lib.swiglu_mlp_bwd(
            rows_of(dout),
            rows_of(x),
            *kernel_args,
            *contiguous(layer_scale, row_scale),
            add_x,
            *nonempty(gate_up, mean, rstd, pre_mean, pre_rstd),
            dx,
            *parameters,
        )
    else:
        for t in present(grads):
            t.zero_()
    return present(grads)
