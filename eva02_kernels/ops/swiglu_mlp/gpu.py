"""swiglu_mlp on a GPU: products and their epilogues are a backend's (``ops/_products.py``), the sub-LN subln_swiglu's.

Fused: SwiGLU behind the product of gate and up, where products are the backend's own with the sub-LN's weight and the
statistics of pieces of rows: the next product takes the norm in (``_products.folds_norm``). Else the sub-LN is one pass
over whole rows. Backward: SwiGLU's gradient (with the hidden layer again, and the biases' sums) behind the first
product, or with a sub-LN in one pass over whole rows.
Layer scale, drop path and residual are the epilogue of the last product, the pre-norm is one pass before the first.
Bytes: forward writes and reads the normed x, writes gate and up (kept, unless recompute; read again for a sub-LN's pass
alone), writes and reads the hidden layer, and reads x again as the residual. Backward reads gate and up once, writes
their gradients and the hidden layer once; products read them from there.
Numerics: float32 inside each kernel; normed x, gate, up, the hidden layer and their gradients are rounded once each. A
norm that a product takes in has its mean subtracted from float32 sums; what is rounded before is the hidden layer times
the norm's weight, so that rows with a mean far above their deviation lose as many bits more in 16-bit types.
Limits: under the pre-norm 16,384 columns on Triton and 8,192 on CUDA, under the sub-LN 16,384 and 4,096.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels.ops._common import (
    contiguous,
    empty_like_needed,
    padded,
    present,
    rows_2d,
    view_2d,
)
from eva02_kernels.ops._products import (
    HiddenNorm,
    Kernels,
    activate,
    folds_norm,
    hidden_gradient,
    hidden_input_gradient,
    hidden_weight_gradients,
    normed_input,
    output_gradient,
    output_parameter_gradients,
    padded_columns,
    project,
)
from eva02_kernels.ops.swiglu_mlp.native import empty_outputs, hidden_width


def fwd(on: Kernels, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w_gate, b_gate, w_up, b_up, w_down, b_down, norm_weight, norm_bias, eps, *pre = args[:13]
    layer_scale, row_scale, add_x = args[13:16]
    outputs = empty_outputs(x, args)
    out, kept, mean, rstd, pre_mean, pre_rstd = outputs
    if not out.numel():
        return outputs
    x2, cols = rows_2d(x), padded(hidden_width(w_gate, w_up))
    rows = x2.shape[0]
    normed = normed_input(on, x2, *pre, statistics=(pre_mean, pre_rstd))
    hidden = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    b_gate, b_up, b_down, layer_scale, row_scale = contiguous(b_gate, b_up, b_down, layer_scale, row_scale)
    norm_weight, norm_bias = contiguous(norm_weight, norm_bias)
    weights: Any = (rows_2d(w_gate), b_gate, None if w_up is None else rows_2d(w_up), b_up)
    w_down = padded_columns(rows_2d(w_down))
    to_out: Any = {"layer_scale": layer_scale, "row_scale": row_scale, "residual": x2 if add_x else None}
    gate_up = kept if kept.numel() else None
    if norm_weight is not None and folds_norm(on, x):
        norm_rows = activate(on, normed, *weights, kept=gate_up, hidden=hidden, norm_weight=norm_weight)
        if norm_rows is not None:
            norm = HiddenNorm(norm_weight, norm_bias, eps, mean, rstd)
            on.project_normed(hidden, norm_rows, norm, w_down, b_down, **to_out, out=view_2d(out))
            return outputs
    if norm_weight is None:
        activate(on, normed, *weights, kept=gate_up, hidden=hidden)
    else:
        if gate_up is None:
            gate_up = torch.empty(rows, 2, cols, dtype=x.dtype, device=x.device)
        activate(on, normed, *weights, kept=gate_up, hidden=None)
        norm_bias = torch.zeros_like(norm_weight) if norm_bias is None else norm_bias
        on.subln_forward(gate_up[:, 0], gate_up[:, 1], norm_weight, norm_bias, eps, hidden, mean, rstd,
                         cols=cols)  # fmt: skip
    project(on, hidden, w_down, b_down, view_2d(out), **to_out)
    return outputs


def bwd(
    on: Kernels, dout: Tensor, kept: Tensor, mean: Tensor, rstd: Tensor, pre_mean: Tensor, pre_rstd: Tensor,
    x: Tensor, *args: Any,
) -> list[Tensor]:  # fmt: skip
    *inputs, needs = args
    w_gate, b_gate, w_up, b_up, w_down, b_down, norm_weight, norm_bias, _, *pre = inputs[:13]
    layer_scale, row_scale, add_x = inputs[13:16]
    pre_weight, pre_bias, _, pre_norm = pre
    grads = empty_like_needed((x, *inputs[:4], None, None, None, None, pre_weight, pre_bias, None), needs)
    dx, dw_gate, db_gate, dw_up, db_up = grads[:5]
    dpre_weight, dpre_bias = grads[9:11]
    if not dout.numel():
        return [t.new_zeros(t.shape) for t, need in
                zip((x, *inputs[:8], pre_weight, pre_bias, layer_scale), needs, strict=True) if need]  # fmt: skip
    x2, dout2, packed = rows_2d(x), rows_2d(dout), w_up is None
    rows, cols = x2.shape[0], padded(hidden_width(w_gate, w_up))
    w_gate, w_down, w_up = rows_2d(w_gate), rows_2d(w_down), None if w_up is None else rows_2d(w_up)
    b_gate, b_up, b_down, layer_scale, row_scale = contiguous(b_gate, b_up, b_down, layer_scale, row_scale)
    norm_weight, norm_bias = contiguous(norm_weight, norm_bias)

    normed = normed_input(on, x2, *pre) if dw_gate is not None or dw_up is not None or not kept.numel() else x2
    if not kept.numel():
        kept = torch.empty(rows, 2, cols, dtype=x.dtype, device=x.device)
        activate(on, normed, w_gate, b_gate, w_up, b_up, kept=kept, hidden=None)
    needs_out = (needs[5], needs[6], needs[11])
    gradient = output_gradient(on, dout2, b_down, layer_scale, row_scale, needs_out)
    hidden = None
    if needs[5] or needs[11]:
        hidden = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    dkept = torch.empty(kept.shape, dtype=x.dtype, device=x.device)
    bias_grads = db_gate.chunk(2) if packed and db_gate is not None else (db_gate, db_up)
    if norm_weight is None:
        hidden_gradient(on, gradient.dy, w_down, kept, dkept, hidden, *bias_grads)
    else:
        dhidden = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
        on.multiply(gradient.dy, padded_columns(w_down), dhidden)
        grads[7:9] = empty_like_needed((norm_weight, norm_bias), needs[7:9])
        on.subln_backward(dhidden, kept[:, 0], kept[:, 1], norm_weight, norm_bias, mean, rstd,
                          dkept[:, 0], dkept[:, 1], hidden, (*grads[7:9], *bias_grads))  # fmt: skip
    grads[5], grads[6], grads[11] = output_parameter_gradients(
        on, gradient, None if hidden is None else hidden[:, : w_down.shape[1]], w_down, b_down, layer_scale, needs_out
    )
    hidden_weight_gradients(on, dkept, normed, dw_gate, dw_up, packed=packed)
    residual = dout2 if add_x else None
    if not pre_norm and dx is not None:
        hidden_input_gradient(on, dkept, w_gate, w_up, add=residual, out=view_2d(dx))
    elif dx is not None or dpre_weight is not None or dpre_bias is not None:
        dnormed = hidden_input_gradient(on, dkept, w_gate, w_up)
        on.norm_backward(dnormed, x2, pre_mean, pre_rstd, pre_weight, None if dx is None else view_2d(dx),
                      dresidual=residual, dweight=dpre_weight, dbias=dpre_bias)  # fmt: skip
    return present(grads)
