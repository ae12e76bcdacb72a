"""Compiled kernels of ``csrc/gelu_mlp``."""

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


def unsupported(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    x, *rest = args if direction == "fwd" else args[4:]
    w_out = rest[2]
    if w_out.shape[0] != x.shape[-1]:
        return (f"needs as many output as input channels, got {w_out.shape[0]} and {x.shape[-1]}",)
    return ()


def empty_outputs(x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """out, hidden (rows, Fp) before b1 and the GELU, pre_mean, pre_rstd; what is not kept is empty."""
    w1, _, w2 = args[:3]
    has_pre_norm, recompute = args[7], args[11]
    rows = num_rows(x)
    pre_rows = rows if has_pre_norm else 0
    return (
        x.new_empty(*x.shape[:-1], w2.shape[0]),
        x.new_empty((0,) if recompute else (rows, padded(w1.shape[0]))),
        empty_stats(x, pre_rows),
        empty_stats(x, pre_rows),
    )


def _kernel_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    w1, b1, w2, b2, pre_weight, pre_bias, pre_eps = args[:7]
    return (*contiguous(w1, b1, w2, b2, pre_weight, pre_bias), pre_eps)


def fwd(lib: Library, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    layer_scale, row_scale, add_x = args[8:11]
    outputs = empty_outputs(x, args)
    out, *kept = outputs
    if out.numel():
        lib.gelu_mlp_fwd(
            rows_of(x), *_kernel_args(args), *contiguous(layer_scale, row_scale), add_x, out, *nonempty(*kept)
        )
    return outputs


def bwd(
    lib: Library, dout: Tensor, hidden: Tensor, pre_mean: Tensor, pre_rstd: Tensor, x: Tensor, *args: Any
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    layer_scale, row_scale, add_x = args[8:11]
    grads = empty_like_needed((x, *args[:6], layer_scale), needs)
    dx, *parameters = grads
    if dout.numel():
        lib.gelu_mlp_bwd(
            rows_of(dout),
            rows_of(x),
            *_kernel_args(tuple(args))[:-1],  # backward needs no eps: it has rstd
            *contiguous(layer_scale, row_scale),
            add_x,
            *nonempty(hidden, pre_mean, pre_rstd),
            dx,
            *parameters,
        )
    else:
        for t in present(grads):
            t.zero_()
    return present(grads)
