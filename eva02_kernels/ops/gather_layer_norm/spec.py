from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, run, scatter_grads
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    autocast,
    check,
    check_activation,
    check_parameter,
    cpu_backend,
    cuda_backend,
    cuda_rows,
    eager_backend,
    empty_stats,
    layer_norm_ref,
    norm_magnitude,
    reference_backward,
    statistics,
    triton_backend,
    whole_rows_only,
)
from eva02_kernels.ops.gather_layer_norm import native
from eva02_kernels.ops.gather_tokens.reference import gather_tokens_ref
from eva02_kernels.ops.gather_tokens.spec import check_token_index, token_indices


def _canonical(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Any, ...]:
    check_activation("x", x)
    (x,) = autocast(x)
    check(x.dim() == 3, "x", "(B, S, C)", tuple(x.shape))
    check_token_index(idx, x.shape[0], x)
    check_parameter("weight", weight, x.shape[-1:], x)
    check_parameter("bias", bias, x.shape[-1:], x)
    return x, idx, weight, bias, eps


def _reference(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    normed = layer_norm_ref(gather_tokens_ref(x, idx), weight, bias, eps)
    return normed.masked_fill((idx < 0)[..., None], 0.0)


def _eager_fwd(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = statistics(gather_tokens_ref(x, idx), eps)
    padding = (idx < 0).flatten()
    return _reference(x, idx, weight, bias, eps), mean.masked_fill(padding, 0.0), rstd.masked_fill(padding, 0.0)


def _fake_fwd(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(*idx.shape, x.shape[-1]), empty_stats(x, idx.numel()), empty_stats(x, idx.numel())


def _fake_bwd(dout: Any, x: Any, idx: Any, weight: Any, bias: Any, mean: Any, rstd: Any, eps: Any, needs: Any) -> Any:
    return [t.new_empty(t.shape) for t, need in zip((x, weight, bias), needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, mean, rstd)


def _backward(ctx: Any, dout: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    flags = ctx.needs_input_grad
    needs = [flags[0], flags[2], flags[3]]
    grads = run("gather_layer_norm_bwd", dout, *ctx.saved_tensors, ctx.eps, needs, ctx.backend)
    dx, dweight, dbias = scatter_grads(grads, needs)
    return dx, None, dweight, dbias, None


def _magnitude(name: str, x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> float:
    if name != "arg0" or not idx.numel():
        return 0.0
    # Over all tokens, of which those that are not picked have no gradient.
    picked = idx.numel() / max(1, x.shape[0] * x.shape[1])
    return norm_magnitude(gather_tokens_ref(x, idx)[idx >= 0], weight, eps) * min(1.0, picked) ** 0.5


def _samples() -> list[Sample]:
    def make(*shape: int, count: int, flat: bool = False, strided: bool = False) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            batch, seq_len, width = shape
            x = torch.randn(batch, seq_len, 2 * width, generator=generator).to(dtype)
            x = x[..., :width] if strided else x[..., :width].contiguous()
            weight, bias = (0.1 * torch.randn(width, generator=generator) for _ in range(2))
            idx = token_indices(batch, seq_len, count, generator, flat=flat)
            return (x, idx, (1 + weight).to(dtype), bias.to(dtype)), {}

        return inputs

    return [
        *(Sample(f"C{c}", make(2, 9, c, count=5)) for c in (2, 15, 17, 33)),
        Sample("flat", make(3, 9, 24, count=4, flat=True), smoke=True),
        Sample("strided", make(2, 9, 24, count=4, strided=True)),
        Sample("none", make(2, 9, 24, count=0)),
        Sample("empty", make(0, 9, 24, count=4)),
        Sample("S257", make(2, 257, 192, count=105)),
        Sample("widest", make(1, 5, 8192, count=3)),
    ]


SPEC = define(
    OpSpec(
        name="gather_layer_norm",
        summary="LayerNorm of the selected tokens only",
        formula="y[b, k] = LN(x[b, idx[b, k]])",
        source="Ba et al., arXiv:1607.06450",
        fwd_schema="Tensor x, Tensor idx, Tensor weight, Tensor bias, float eps",
        fwd_returns="(Tensor, Tensor, Tensor)",
        bwd_schema="Tensor dout, Tensor x, Tensor idx, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
        "float eps, bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.fwd, native.bwd, cuda_rows),
            triton_backend("gather_layer_norm", whole_rows_only),
            cpu_backend(native.fwd, native.bwd),
            eager_backend(
                _eager_fwd,
                reference_backward(
                    _reference,
                    (0, 2, 3),
                    lambda dout, x, idx, weight, bias, mean, rstd, eps, needs: (
                        [dout],
                        (x, idx, weight, bias, eps),
                        needs,
                    ),
                ),
            ),
        ),
        samples=_samples,
        saved="x, idx, weight, bias; mean, rstd (tokens,) float32",
        bytes_moved=lambda x, idx, *rest: (
            2 * x.element_size() * idx.numel() * x.shape[-1],
            x.element_size() * (2 * idx.numel() * x.shape[-1] + x.numel()),
        ),
        magnitude=_magnitude,
    )
)
