"""swiglu_mlp: the gated feed-forward layer of EVA-02, LayerNorm before and sub-LayerNorm inside, residual after.

Files: ``spec.py`` formula, schema, autograd, samples and bytes, ``gpu.py`` its steps on a GPU, ``native.py`` the
adapter to ``csrc/swiglu_mlp``.
"""

from __future__ import annotations

from torch import Tensor

from eva02_kernels.ops._common import add_residual, call
from eva02_kernels.ops.swiglu_mlp.spec import SPEC


def swiglu_mlp(
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
    backend: str = "auto",
) -> Tensor:
    """W_down LN(silu(W_gate x + b_gate) * (W_up x + b_up)) + b_down, with what surrounds it in a block.

    Equivalent PyTorch: ``y = F.layer_norm(x, (C,), *pre_norm[:2], pre_norm[2]); h = F.silu(F.linear(y, w_gate,
    b_gate)) * F.linear(y, w_up, b_up); h = F.layer_norm(h, (F,), norm_weight, norm_bias, eps);
    residual + row_scale * layer_scale * F.linear(h, w_down, b_down)``.

    Args:
        x: (B, ..., C); float32, bfloat16, float16 or float64 (eager).
        w_gate, w_up: (F, C), b_gate, b_up: (F,) or None. ``w_up = b_up = None``: w_gate is packed (2F, C), gate rows
            first, and b_gate (2F,), as in EVA-02 Ti and S.
        w_down: (C_out, F); b_down: (C_out,) or None. Weights have x's dtype, biases and norms that or float32.
        norm_weight, norm_bias: (F,) of the LayerNorm on the hidden layer (sub-LN), None for none. eps: its epsilon.
        pre_norm: (weight (C,), bias (C,), eps) of the LayerNorm applied to x first, or None.
        recompute: do not keep gate and up; backward computes them from x again.
        residual: (B, ..., C_out), added to the result; x itself costs no extra pass.
        layer_scale: (C_out,); row_scale: (B,) float32 drop-path factors, without gradient.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, ..., C_out). Gradients reach x, residual, every weight, bias, norm parameter and layer_scale.

    Numerics: float32 accumulation; gate and up are rounded once when kept; one rounding at the store.
    Memory: with T = B*N*C and G = B*N*F elements keeps x and 2G (gate and up, row stride F rounded up to 8), or x
        alone with ``recompute`` or without gradients; never a LayerNorm output or the hidden layer.
    Raises: ValueError for shapes and dtypes; NotImplementedError with every backend's reason.
    Source: Shazeer, arXiv:2002.05202; EVA-02, arXiv:2303.11331.
    """
    args = SPEC.canonical(
        x,
        w_gate,
        b_gate,
        w_up,
        b_up,
        w_down,
        b_down,
        norm_weight,
        norm_bias,
        eps,
        pre_norm=pre_norm,
        recompute=recompute,
        residual=residual,
        layer_scale=layer_scale,
        row_scale=row_scale,
    )
    return add_residual(call(SPEC, backend, args), x, residual)
