from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, input_gradients
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    autocast,
    check,
    check_activation,
    cpu_backend,
    cuda_backend,
    eager_backend,
    reference_backward,
    triton_backend,
)
from eva02_kernels.ops.rope_attention import native
from eva02_kernels.ops.rope_attention.reference import (
    attention_with_lse_ref,
    rope_attention_packed_ref,
    split_packed,
)
from eva02_kernels.ops.rope_attention.spec import (
    ATTENTION_SCHEMA,
    DIFFERENTIABLE,
    attention_bytes,
    attention_cases,
    attention_flops,
    attention_inputs,
    canonical_attention,
    fake_attention,
    save_attention,
    triton_unsupported,
)
from eva02_kernels.rope import RopeTable

_PLACES = (0, *(2 + i for i in DIFFERENTIABLE))


def _canonical(
    qkv: Tensor, rope: RopeTable | None = None, *, num_kv_heads: int | None = None, **kwargs: Any
) -> tuple[Any, ...]:
    check_activation("qkv", qkv, min_dim=3)
    (qkv,) = autocast(qkv)
    heads = qkv.shape[-2]
    if num_kv_heads is None:
        check(heads % 3 == 0, "qkv", "3 H heads (or num_kv_heads)", tuple(qkv.shape))
        num_kv_heads = heads // 3
    check(
        num_kv_heads > 0 and heads > 2 * num_kv_heads and (heads - 2 * num_kv_heads) % num_kv_heads == 0,
        "num_kv_heads",
        f"Hkv with H + 2 Hkv = {heads} and H a multiple of Hkv",
        num_kv_heads,
    )
    q, _, _ = split_packed(qkv, num_kv_heads)
    return qkv, num_kv_heads, *canonical_attention(q, num_kv_heads, rope, **kwargs)


def _reference(qkv: Tensor, num_kv_heads: int, *args: Any) -> tuple[Tensor, Tensor]:
    return attention_with_lse_ref(*split_packed(qkv, num_kv_heads), *args)


def _fake_bwd(dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, num_kv_heads: int, *args: Any) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    inputs = (qkv, *(args[i] for i in DIFFERENTIABLE))
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def _backward(ctx: Any, dout: Tensor, dlse: None) -> list[Tensor | None]:
    return input_gradients(ctx, "rope_attention_packed_bwd", dout, _PLACES)


def _samples() -> list[Sample]:
    def make(case: dict[str, Any]) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            qkv, kwargs = attention_inputs(dtype, generator, **case)
            return (torch.cat(qkv, dim=-2),), {"num_kv_heads": qkv[1].shape[-2], **kwargs}

        return inputs

    names = ("S2", "S17", "half", "keep", "mask", "head_table", "norm", "varlen", "empty", "S257")
    cases = attention_cases()
    return [Sample(name, make(cases[name]), smoke=name == "norm") for name in names]


SPEC = define(
    OpSpec(
        name="rope_attention_packed",
        summary="rope_attention on one packed qkv, with one packed gradient",
        formula="softmax(scale * R(q) R(k)^T) v",
        source="Dao et al., arXiv:2307.08691; EVA-02, arXiv:2303.11331",
        fwd_schema=f"Tensor qkv, int num_kv_heads, {ATTENTION_SCHEMA}",
        fwd_returns="(Tensor, Tensor)",
        bwd_schema=f"Tensor dout, Tensor out, Tensor lse, Tensor qkv, int num_kv_heads, {ATTENTION_SCHEMA}, "
        "bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=lambda qkv, num_kv_heads, *args: fake_attention(split_packed(qkv, num_kv_heads)[0]),
        fake_bwd=_fake_bwd,
        setup_context=save_attention,
        backward=_backward,
        backends=(
            cuda_backend(
                native.fwd_packed, native.bwd_packed, native.cuda_unsupported, error_multiple=native.ERROR_MULTIPLE
            ),
            triton_backend(
                "rope_attention", triton_unsupported, suffix="_packed", error_multiple=native.ERROR_MULTIPLE
            ),
            cpu_backend(native.fwd_packed, native.bwd_packed, native.unsupported, error_multiple=native.ERROR_MULTIPLE),
            eager_backend(
                _reference,
                reference_backward(
                    rope_attention_packed_ref,
                    _PLACES,
                    lambda dout, out, lse, *args: ([dout], args[:-1], args[-1]),
                ),
            ),
        ),
        num_outputs=2,
        samples=_samples,
        saved="qkv as given; out; lse (B, H, S) float32; the tables",
        bytes_moved=lambda qkv, kv, *args: attention_bytes(split_packed(qkv, kv)[0], kv),
        flops=lambda qkv, kv, *args: attention_flops(split_packed(qkv, kv)[0], args[8]),
    )
)
