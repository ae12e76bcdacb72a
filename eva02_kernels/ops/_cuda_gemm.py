"""Kernels of ``csrc/gemm`` and of the row operators' folders as ``_products.Kernels``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels import _launch, _triton
from eva02_kernels._native import CUDA as lib
from eva02_kernels.ops._common import contiguous
from eva02_kernels.ops._products import (
    HiddenNorm,
    Part,
    by_torch,
    gate_and_up,
    padded_columns,
    weight_gradient_float32_by_torch,
    weight_gradients_by_torch,
)
from eva02_kernels.ops.apply_rope import native as apply_rope


def fused(t: Tensor) -> bool:
    return _launch.fused_cuda_gemm(_triton.architecture(t.device))[0]


def _tf32(t: Tensor) -> bool:
    return _triton.dot_precision(t.dtype) == "tf32"


def _project(
    a: Tensor | None, b: Tensor | None, y: Tensor | None, out: Tensor, *, bias: Tensor | None = None,
    residual: Tensor | None = None, layer_scale: Tensor | None = None, row_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    tf32 = a is not None and _tf32(a)
    lib.project(a, b, y, *contiguous(bias), residual, *contiguous(layer_scale, row_scale), tf32, out)
    return out


# ---- products --------------------------------------------------------------------------------------------------------
def multiply(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None = None) -> Tensor:
    if fused(a):
        vector = add is not None and add.dim() == 1
        return _project(a, b, None, out, bias=add if vector else None, residual=None if vector else add)
    return by_torch(a, b, out, add)


def weight_gradients(dy: Tensor, a: Tensor | None, parts: Sequence[Part]) -> None:
    if a is None or not fused(dy) or all(p.weight is None for p in parts):
        weight_gradients_by_torch(dy, a, parts, scale_and_sum)
        return
    filled = (*parts, *(Part(0, None, None),) * (3 - len(parts)))
    first, weights, biases = zip(*filled, strict=True)
    lib.weight_gradient(dy, a, _tf32(dy), first, *weights, *biases)


def weight_gradient_float32(dy: Tensor, a: Tensor) -> Tensor:
    if not fused(a):
        return weight_gradient_float32_by_torch(dy, a)
    out = torch.empty(dy.shape[1], a.shape[1], dtype=torch.float32, device=a.device)
    weight_gradients(dy, a, [Part(0, out, None)])
    return out


def project(
    a: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    _project(a, weight.t(), None, out, bias=bias, residual=residual, layer_scale=layer_scale, row_scale=row_scale)


def project_parts(a: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor) -> bool:
    if len({w.stride(0) for w in weights}) > 1:
        return False
    lib.project_parts(a, *weights, *biases, _tf32(a), out)
    return True


def finish(
    y: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None, residual: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    _project(None, None, y, out, bias=bias, residual=residual, layer_scale=layer_scale, row_scale=row_scale)


def activate(
    a: Tensor, w_gate: Tensor, w_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None, kept: Tensor | None,
    hidden: Tensor | None, norm_weight: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    gate, up = gate_and_up(kept)
    pieces = None
    if norm_weight is not None:  # of 32 columns of a row: their mean, and the squares about it
        size = ((norm_weight.numel() + 31) // 32, a.shape[0], 2)
        pieces = torch.empty(size, dtype=torch.float32, device=a.device)
    lib.activate(a, w_gate.t(), None if w_up is None else w_up.t(), None, None, *contiguous(b_gate, b_up, norm_weight),
                 _tf32(a), gate, up, hidden, pieces)  # fmt: skip
    return pieces


def project_normed(
    hidden: Tensor, rows: Tensor, norm: HiddenNorm, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None,
    row_scale: Tensor | None, residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    weight_sums, shift = torch.empty(2, weight.shape[0], dtype=torch.float32, device=out.device)
    lib.fold_norm(rows, *contiguous(norm.weight, norm.bias), norm.eps, weight, *contiguous(bias), norm.mean, norm.rstd,
                  weight_sums, shift)  # fmt: skip
    lib.project_normed(hidden, weight.t(), norm.mean, norm.rstd, weight_sums, shift, residual,
                       *contiguous(layer_scale, row_scale), _tf32(hidden), out)  # fmt: skip


def activate_rows(kept: Tensor, bias: Tensor | None, hidden: Tensor, width: int) -> None:
    gate, up = (None if t is None else t[:, :width] for t in gate_and_up(kept))
    lib.activate(None, None, None, gate, up, bias, None, None, False, None, None, hidden, None)


def hidden_gradient(
    dy: Tensor, w_down: Tensor, kept: Tensor, bias: Tensor | None, centre: Tensor | None, dkept: Tensor,
    hidden: Tensor | None, grads: Sequence[Tensor | None],
) -> None:  # fmt: skip
    weight = padded_columns(w_down)[:, : w_down.shape[1]]  # rows of 16 bytes' multiples
    lib.hidden_gradient(dy, weight, None, *gate_and_up(kept), bias, centre, _tf32(dy),
                        *gate_and_up(dkept), hidden, *grads)  # fmt: skip


def hidden_gradient_rows(
    dhidden: Tensor, kept: Tensor, bias: Tensor | None, centre: Tensor | None, dkept: Tensor, hidden: Tensor | None,
    width: int,
) -> None:  # fmt: skip
    lib.hidden_gradient(None, None, dhidden[:, :width], *gate_and_up(kept), bias, centre, False,
                        *gate_and_up(dkept), hidden, None, None)  # fmt: skip


def project_rope(
    a: Tensor, weight: Tensor, bias: Tensor | None, rope: Sequence[Any], tokens: int, heads: int, kv_heads: int,
    head_dim: int, out: Tensor,
) -> None:  # fmt: skip
    lib.project_rope(a, weight.t(), bias, *contiguous(*rope[:2]), *rope[2:], tokens, heads, kv_heads, head_dim,
                     _tf32(a), out)  # fmt: skip


# ---- gradients of scales and biases ----------------------------------------------------------------------------------
def scale_and_sum(
    x: Tensor, *, layer_scale: Tensor | None = None, row_scale: Tensor | None = None, scaled: Tensor | None = None,
    row_scaled: Tensor | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    lib.scale_and_sum(x, layer_scale, row_scale, scaled, row_scaled, sums)


def finish_gradients(
    product: Tensor | None, sums: Tensor | None, centre: Tensor | None, weight: Tensor, bias: Tensor | None,
    layer_scale: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dscale: Tensor | None,
) -> None:  # fmt: skip
    lib.finish_gradients(product, sums, centre, weight, bias, layer_scale, dweight, dbias, dscale)


# ---- row kernels of other operators ----------------------------------------------------------------------------------
def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> None:
    lib.add_layer_norm_fwd(x, None, *contiguous(weight, bias), eps, None, None, False, 1, out, None, mean, rstd)


def norm_backward(
    dnormed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dx: Tensor | None,
    *, dresidual: Tensor | None = None, dweight: Tensor | None = None, dbias: Tensor | None = None,
) -> None:  # fmt: skip
    lib.add_layer_norm_bwd(dnormed, dresidual, x, *contiguous(weight), mean, rstd, None, None, None, False, 1, dx, None,
                           dweight, dbias, None)  # fmt: skip


def subln_forward(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor,
    *, cols: int,
) -> None:  # fmt: skip
    width = weight.numel()
    lib.subln_swiglu_fwd(gate[:, :width], up[:, :width], weight, bias, eps, out[:, :width], mean, rstd)
    out[:, width:].zero_()


def subln_backward(
    dout: Tensor, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    dgate: Tensor, dup: Tensor, hidden: Tensor | None, grads: Sequence[Tensor | None],
) -> None:  # fmt: skip
    lib.subln_hidden_gradient(dout, gate, up, weight, *contiguous(bias), mean, rstd, dgate, dup, hidden, *grads)


def rotate(x: Tensor, rope: Sequence[Any], *, inverse: bool, out: Tensor | None = None) -> Tensor:
    return apply_rope.rotate(lib, x, tuple(rope), inverse=inverse, out=out)


def table_gradients(dout: Tensor, x: Tensor, rope: Sequence[Any]) -> tuple[Tensor, Tensor]:
    return apply_rope.table_gradients(lib, dout, x, tuple(rope))
