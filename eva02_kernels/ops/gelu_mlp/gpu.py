"""gelu_mlp on a GPU: products and their epilogues are a backend's (``ops/_products.py``).

Fused: GELU behind the first product, layer scale, drop path and residual behind the second; GELU's gradient (with the
activation again, and the bias's sums) behind backward's first product. The pre-norm is one pass before the first.
Bytes: forward writes and reads the normed x and the activation, writes the hidden layer before b1 (kept, unless
recompute) and reads x again as the residual. Backward reads the hidden layer and writes its gradient and the
activation once; products read them from there. In 16 bits with b1 the gradient of w2 is a float32 product first, which
one more pass over a weight finishes, and dout is read once more for its sums (both as with a layer scale; on HIP that
product is of float32 copies).
Numerics: float32 inside each kernel; normed x, the hidden layer, the activation and their gradients are rounded once
each. A 16-bit number is as exact as it is small, and b1 may be far from 0: the hidden layer is kept before b1, and the
activation that the gradient of w2 is made of is stored less gelu(b1), its centre, which that gradient gets back in
float32 as (column sums of dy) gelu(b1). Limits: 16,384 columns under a normalisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels.ops._common import contiguous, empty_like_needed, padded, present, rows_2d, view_2d
from eva02_kernels.ops._products import (
    Kernels,
    activate,
    hidden_gradient,
    hidden_input_gradient,
    hidden_weight_gradients,
    normed_input,
    output_gradient,
    output_parameter_gradients,
    padded_columns,
    project,
)
from eva02_kernels.ops.gelu_mlp.native import empty_outputs


def fwd(on: Kernels, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w1, b1, w2, b2, *pre = args[:8]
    layer_scale, row_scale, add_x = args[8:11]
    outputs = empty_outputs(x, args)
    out, kept, pre_mean, pre_rstd = outputs
    if not out.numel():
        return outputs
    x2 = rows_2d(x)
    b1, b2, layer_scale, row_scale = contiguous(b1, b2, layer_scale, row_scale)
    normed = normed_input(on, x2, *pre, statistics=(pre_mean, pre_rstd))
    hidden = torch.empty(x2.shape[0], padded(w1.shape[0]), dtype=x.dtype, device=x.device)
    activate(on, normed, rows_2d(w1), b1, None, None, kept=kept[:, None] if kept.numel() else None, hidden=hidden,
             gelu=True)  # fmt: skip
    project(on, hidden, padded_columns(rows_2d(w2)), b2, view_2d(out), layer_scale=layer_scale, row_scale=row_scale,
            residual=x2 if add_x else None)  # fmt: skip
    return outputs


def bwd(
    on: Kernels, dout: Tensor, kept: Tensor, pre_mean: Tensor, pre_rstd: Tensor, x: Tensor, *args: Any
) -> list[Tensor]:
    *inputs, needs = args
    w1, b1, w2, b2, *pre = inputs[:8]
    layer_scale, row_scale, add_x = inputs[8:11]
    pre_weight, pre_bias, _, pre_norm = pre
    grads = empty_like_needed((x, w1, b1, None, None, pre_weight, pre_bias, None), needs)
    dx, dw1, db1, _, _, dpre_weight, dpre_bias, _ = grads
    if not dout.numel():
        return [t.new_zeros(t.shape) for t, need in
                zip((x, *inputs[:4], pre_weight, pre_bias, layer_scale), needs, strict=True) if need]  # fmt: skip
    x2, dout2, w1, w2 = rows_2d(x), rows_2d(dout), rows_2d(w1), rows_2d(w2)
    rows, cols = x2.shape[0], padded(w1.shape[0])
    b1, b2, layer_scale, row_scale = contiguous(b1, b2, layer_scale, row_scale)

    normed = normed_input(on, x2, *pre) if dw1 is not None or not kept.numel() else x2
    if not kept.numel():
        kept = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
        activate(on, normed, w1, b1, None, None, kept=kept[:, None], hidden=None, gelu=True)
    needs_out = (needs[3], needs[4], needs[7])
    hidden = centre = None
    if needs[3] or needs[7]:
        hidden = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
        centre = torch.nn.functional.gelu(b1.float()) if b1 is not None and x.dtype != torch.float32 else None
    gradient = output_gradient(on, dout2, b2, layer_scale, row_scale, needs_out, centred=centre is not None)
    dkept = torch.empty(rows, 1, cols, dtype=x.dtype, device=x.device)
    hidden_gradient(on, gradient.dy, w2, kept[:, None], dkept, hidden, db1, None, bias=b1, centre=centre)
    grads[3], grads[4], grads[7] = output_parameter_gradients(
        on, gradient, None if hidden is None else hidden[:, : w2.shape[1]], w2, b2, layer_scale, needs_out,
        centre=centre,
    )  # fmt: skip
    hidden_weight_gradients(on, dkept, normed, dw1, None)
    residual = dout2 if add_x else None
    if not pre_norm and dx is not None:
        hidden_input_gradient(on, dkept, w1, None, add=residual, out=view_2d(dx))
    elif dx is not None or dpre_weight is not None or dpre_bias is not None:
        dnormed = hidden_input_gradient(on, dkept, w1, None)
        on.norm_backward(dnormed, x2, pre_mean, pre_rstd, pre_weight, None if dx is None else view_2d(dx),
                      dresidual=residual, dweight=dpre_weight, dbias=dpre_bias)  # fmt: skip
    return present(grads)
