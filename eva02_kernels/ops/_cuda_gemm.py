"""Kernels of ``csrc/gemm`` and of the row operators' folders as ``_products.Kernels``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels import _launch, _triton
from eva02_kernels._native import CUDA as lib
from eva02_kernels.ops._common import contiguous, present
from eva02_kernels.ops._products import by_torch, by_torch_float32, gate_and_up, padded_columns
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


def multiply_float32(a: Tensor, b: Tensor) -> Tensor:
    if not fused(a):
        return by_torch_float32(a, b)
    return multiply(a, b, torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device))


def project(
    a: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    _project(a, weight.t(), None, out, bias=bias, residual=residual, layer_scale=layer_scale, row_scale=row_scale)


def finish(
    y: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None, residual: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    _project(None, None, y, out, bias=bias, residual=residual, layer_scale=layer_scale, row_scale=row_scale)


def activate(
    a: Tensor, w_gate: Tensor, w_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None, kept: Tensor | None,
    hidden: Tensor | None,
) -> None:  # fmt: skip
    gate, up = gate_and_up(kept)
    w_up = None if w_up is None else w_up.t()
    lib.activate(a, w_gate.t(), w_up, None, None, *contiguous(b_gate, b_up), _tf32(a), gate, up, hidden)


def activate_rows(kept: Tensor, hidden: Tensor, width: int) -> None:
    gate, up = (None if t is None else t[:, :width] for t in gate_and_up(kept))
    lib.activate(None, None, None, gate, up, None, None, False, None, None, hidden)


def hidden_gradient(
    dy: Tensor, w_down: Tensor, kept: Tensor, dkept: Tensor, hidden: Tensor | None, grads: Sequence[Tensor | None]
) -> None:
    weight = padded_columns(w_down)[:, : w_down.shape[1]]  # rows of 16 bytes' multiples
    lib.hidden_gradient(dy, weight, None, *gate_and_up(kept), _tf32(dy), *gate_and_up(dkept), hidden, *grads)


def hidden_gradient_rows(dhidden: Tensor, kept: Tensor, dkept: Tensor, hidden: Tensor | None, width: int) -> None:
    lib.hidden_gradient(None, None, dhidden[:, :width], *gate_and_up(kept), False, *gate_and_up(dkept), hidden, None,
                        None)  # fmt: skip


def project_rope(
    a: Tensor, weight: Tensor, bias: Tensor | None, rope: Sequence[Any], tokens: int, first_head: int, heads: int,
    kv_heads: int, head_dim: int, out: Tensor,
) -> None:  # fmt: skip
    lib.project_rope(a, weight.t(), bias, *contiguous(*rope[:2]), *rope[2:], tokens, first_head, heads, kv_heads,
                     head_dim, _tf32(a), out)  # fmt: skip


# ---- gradients of scales and biases ----------------------------------------------------------------------------------
def scale_and_sum(
    x: Tensor, *, layer_scale: Tensor | None = None, row_scale: Tensor | None = None, scaled: Tensor | None = None,
    row_scaled: Tensor | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    lib.scale_and_sum(x, layer_scale, row_scale, scaled, row_scaled, sums)


def layer_scale_gradient(
    product: Tensor | None, weight: Tensor, bias: Tensor | None, layer_scale: Tensor, sums: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None, dscale: Tensor | None,
) -> None:  # fmt: skip
    lib.layer_scale_gradient(product, weight, bias, layer_scale, sums, dweight, dbias, dscale)


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
    dgate: Tensor, dup: Tensor, needs: Sequence[bool], *, cols: int,
) -> list[Tensor]:  # fmt: skip
    width = weight.numel()
    grads = [torch.empty(p.shape, dtype=p.dtype, device=p.device) if need and p is not None else None for p, need in
             zip((weight, bias), needs, strict=True)]  # fmt: skip
    rows = (t[:, :width] for t in (dout, gate, up))
    lib.subln_swiglu_bwd(*rows, weight, mean, rstd, dgate[:, :width], dup[:, :width], *grads)
    for d in (dgate, dup):
        d[:, width:].zero_()
    return present(grads)


def rotate(x: Tensor, rope: Sequence[Any], *, inverse: bool, out: Tensor | None = None) -> Tensor:
    return apply_rope.rotate(lib, x, tuple(rope), inverse=inverse, out=out)


def table_gradients(dout: Tensor, x: Tensor, rope: Sequence[Any]) -> tuple[Tensor, Tensor]:
    return apply_rope.table_gradients(lib, dout, x, tuple(rope))
