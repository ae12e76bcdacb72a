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
    cpu_backend,
    cuda_backend,
    eager_backend,
    triton_backend,
)
from eva02_kernels.ops.gather_tokens import native
from eva02_kernels.ops.gather_tokens.reference import gather_tokens_ref, scatter_tokens_ref
from eva02_kernels.ops.gather_tokens.spec import check_token_index, token_indices


def _canonical(y: Tensor, idx: Tensor, like: Tensor) -> tuple[Any, ...]:
    check_activation("y", y)
    (y,) = autocast(y)
    check(like.dim() == 3, "like", "(B, S, C)", tuple(like.shape))
    check_token_index(idx, like.shape[0], y)
    expected = (*idx.shape, like.shape[-1])
    check(tuple(y.shape) == expected, "y", f"shape {expected}", tuple(y.shape))
    return y, idx, like.shape[0], like.shape[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (idx,) = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0]]
    grads = run("scatter_tokens_bwd", dout, idx, needs, ctx.backend)
    return *scatter_grads(grads, needs), None, None, None


def _samples() -> list[Sample]:
    def make(*shape: int, count: int, flat: bool = False) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            batch, seq_len, width = shape
            idx = token_indices(batch, seq_len, count, generator, flat=flat)
            y = torch.randn(*idx.shape, width, generator=generator).to(dtype)
            return (y, idx, torch.empty(shape, dtype=dtype, device="meta")), {}

        return inputs

    return [
        Sample("C17", make(2, 9, 17, count=5), smoke=True),
        Sample("flat", make(3, 9, 24, count=4, flat=True)),
        Sample("none", make(2, 9, 24, count=0)),
        Sample("empty", make(0, 9, 24, count=4)),
        Sample("S257", make(2, 257, 192, count=105)),
    ]


SPEC = define(
    OpSpec(
        name="scatter_tokens",
        summary="rows back at their tokens, zeros elsewhere",
        formula="out[b, s] = sum of y[b, k] over idx[b, k] = s",
        source="He et al., arXiv:2111.06377 (masked tokens)",
        fwd_schema="Tensor y, Tensor idx, SymInt batch, SymInt seq_len",
        fwd_returns="Tensor",
        bwd_schema="Tensor dout, Tensor idx, bool[] needs",
        canonical=_canonical,
        reference=scatter_tokens_ref,
        fake_fwd=lambda y, idx, batch, seq_len: y.new_empty(batch, seq_len, y.shape[-1]),
        fake_bwd=lambda dout, idx, needs: [dout.new_empty(*idx.shape, dout.shape[-1])] if needs[0] else [],
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.scatter, native.scatter_bwd),
            triton_backend("scatter_tokens"),
            cpu_backend(native.scatter, native.scatter_bwd),
            eager_backend(
                scatter_tokens_ref,
                lambda dout, idx, needs: [gather_tokens_ref(dout, idx)] if needs[0] else [],
            ),
        ),
        samples=_samples,
        saved="idx",
        bytes_moved=lambda y, idx, batch, seq_len: (
            y.element_size() * (y.numel() + batch * seq_len * y.shape[-1]),
            2 * y.element_size() * y.numel(),
        ),
    )
)
