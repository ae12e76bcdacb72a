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
    check_index,
    cpu_backend,
    cuda_backend,
    eager_backend,
    triton_backend,
)
from eva02_kernels.ops.gather_tokens import native
from eva02_kernels.ops.gather_tokens.reference import gather_tokens_ref, scatter_tokens_ref


def check_token_index(idx: Tensor, batch: int, like: Tensor) -> None:
    check_index("idx", idx, like)
    check(
        idx.dim() == 1 or (idx.dim() == 2 and idx.shape[0] == batch),
        "idx",
        f"({batch}, K), or flat (M,)",
        tuple(idx.shape),
    )


def _canonical(x: Tensor, idx: Tensor) -> tuple[Any, ...]:
    check_activation("x", x)
    (x,) = autocast(x)
    check(x.dim() == 3, "x", "(B, S, C)", tuple(x.shape))
    check_token_index(idx, x.shape[0], x)
    return x, idx


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, idx = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(idx)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (idx,) = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0]]
    grads = run("gather_tokens_bwd", dout, idx, *ctx.shape[:2], needs, ctx.backend)
    return *scatter_grads(grads, needs), None


def token_indices(batch: int, seq_len: int, count: int, generator: torch.Generator, *, flat: bool = False) -> Tensor:
    """Random tokens with a duplicate and a padding entry where there is room for them."""
    idx = torch.randint(0, max(1, seq_len), (batch, count), generator=generator)
    if count > 2:
        idx[:, 1] = idx[:, 0]
        idx[-1:, 2] = -1
    if flat:
        idx = torch.where(idx < 0, idx, idx + seq_len * torch.arange(batch)[:, None]).flatten()
    return idx


def _samples() -> list[Sample]:
    def make(*shape: int, count: int, flat: bool = False, small: bool = False, strided: bool = False) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            batch, seq_len, width = shape
            x = torch.randn(batch, seq_len, 2 * width, generator=generator).to(dtype)
            x = x[..., :width] if strided else x[..., :width].contiguous()
            idx = token_indices(batch, seq_len, count, generator, flat=flat)
            return (x, idx.int() if small else idx), {}

        return inputs

    return [
        *(Sample(f"C{c}", make(2, 9, c, count=5)) for c in (1, 15, 17, 33)),
        Sample("wide", make(1, 3, 1030, count=2)),
        Sample("flat", make(3, 9, 24, count=4, flat=True), smoke=True),
        Sample("int32", make(2, 9, 24, count=12, small=True)),
        Sample("strided", make(2, 9, 24, count=4, strided=True)),
        Sample("none", make(2, 9, 24, count=0)),
        Sample("empty", make(0, 9, 24, count=4)),
        Sample("S257", make(2, 257, 192, count=105)),
    ]


SPEC = define(
    OpSpec(
        name="gather_tokens",
        summary="pick tokens by index",
        formula="y[b, k] = x[b, idx[b, k]]",
        source="He et al., arXiv:2111.06377 (masked tokens)",
        fwd_schema="Tensor x, Tensor idx",
        fwd_returns="Tensor",
        bwd_schema="Tensor dout, Tensor idx, SymInt batch, SymInt seq_len, bool[] needs",
        canonical=_canonical,
        reference=gather_tokens_ref,
        fake_fwd=lambda x, idx: x.new_empty(*idx.shape, x.shape[-1]),
        fake_bwd=lambda dout, idx, batch, seq_len, needs: (
            [dout.new_empty(batch, seq_len, dout.shape[-1])] if needs[0] else []
        ),
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.gather, native.gather_bwd),
            triton_backend("gather_tokens"),
            cpu_backend(native.gather, native.gather_bwd),
            eager_backend(
                gather_tokens_ref,
                lambda dout, idx, batch, seq_len, needs: (
                    [scatter_tokens_ref(dout, idx, batch, seq_len)] if needs[0] else []
                ),
            ),
        ),
        samples=_samples,
        saved="idx",
        bytes_moved=lambda x, idx: (
            2 * x.element_size() * idx.numel() * x.shape[-1],
            x.element_size() * (idx.numel() * x.shape[-1] + x.numel()),
        ),
    )
)
