from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, eager_gradients, run, scatter_grads
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
from eva02_kernels.ops.apply_rope import native
from eva02_kernels.ops.rope_attention.spec import attention_cases, attention_inputs
from eva02_kernels.rope import ROPE_SCHEMA, RopeArgs, RopeTable, canonical_rope, rotate_tokens


def _canonical(
    x: Tensor, rope: RopeTable, *, num_prefix_tokens: int = 1, keep_idx: Tensor | None = None
) -> tuple[Any, ...]:
    check_activation("x", x)
    (x,) = autocast(x)
    check(x.dim() == 4, "x", "(B, S, H, D)", tuple(x.shape))
    check(isinstance(rope, RopeTable), "rope", "a RopeTable", type(rope).__name__)
    check(x.shape[1] >= num_prefix_tokens, "num_prefix_tokens", f"at most the {x.shape[1]} tokens", num_prefix_tokens)
    table = canonical_rope(
        rope,
        x.shape[-1],
        num_prefix_tokens,
        keep_idx,
        num_patches=x.shape[1] - num_prefix_tokens,
        batch=x.shape[0],
        num_heads=x.shape[2],
        num_kv_heads=x.shape[2],
        like=x,
    )
    return x, *table


def _reference(x: Tensor, *rope: Any) -> Tensor:
    return rotate_tokens(x, RopeArgs(*rope))


def _eager_fwd(x: Tensor, *rope: Any) -> Tensor:
    y = _reference(x, *rope)
    return y.clone() if y is x else y


def _eager_bwd(dout: Tensor, x: Tensor | None, *args: Any) -> list[Tensor]:
    *rope, needs = args
    x = torch.zeros_like(dout) if x is None else x  # the gradient of x does not depend on x
    return eager_gradients(_reference, (x, *rope), (0, 1, 2), needs, [dout])


def _fake_bwd(dout: Tensor, x: Tensor | None, *args: Any) -> list[Tensor]:
    *rope, needs = args
    return [t.new_empty(t.shape) for t, need in zip((dout, *rope[:2]), needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, grids, ctx.grid, ctx.layout, ctx.num_prefix_tokens, keep_idx = inputs
    table_trains = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(x if table_trains else None, cos, sin, grids, keep_idx)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, cos, sin, grids, keep_idx = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    rope = (cos, sin, grids, ctx.grid, ctx.layout, ctx.num_prefix_tokens, keep_idx)
    grads = run("apply_rope_bwd", dout, x, *rope, needs, ctx.backend)
    return *scatter_grads(grads, needs), None, None, None, None, None


def _samples() -> list[Sample]:
    def make(case: dict[str, Any]) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            (q, _, _), kwargs = attention_inputs(dtype, generator, **case)
            return (q,), {name: kwargs[name] for name in ("rope", "num_prefix_tokens", "keep_idx") if name in kwargs}

        return inputs

    names = ("S2", "S37", "half", "swap", "dense", "head_table", "batch_table", "keep", "grids", "keep_dense",
             "keep_batch", "dense88", "empty")  # fmt: skip
    cases = attention_cases()
    return [Sample(name, make(cases[name]), smoke=name == "half") for name in names]


SPEC = define(
    OpSpec(
        name="apply_rope",
        summary="rotate the patch tokens of one tensor (2-D RoPE)",
        formula="y_a = x_a cos - x_b sin; y_b = x_b cos + x_a sin",
        source="Su et al., arXiv:2104.09864",
        fwd_schema=f"Tensor x, {ROPE_SCHEMA}",
        fwd_returns="Tensor",
        bwd_schema=f"Tensor dout, Tensor? x, {ROPE_SCHEMA}, bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=lambda x, *rope: x.new_empty(x.shape),
        fake_bwd=_fake_bwd,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.fwd, native.bwd),
            triton_backend("apply_rope"),
            cpu_backend(native.fwd, native.bwd),
            eager_backend(_eager_fwd, _eager_bwd),
        ),
        samples=_samples,
        saved="x only when the table needs a gradient; the table",
        bytes_moved=lambda x, *rope: (2 * x.element_size() * x.numel(), 2 * x.element_size() * x.numel()),
    )
)
