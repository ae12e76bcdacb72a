from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels._launch import MAX_ROW_WIDTH
from eva02_kernels._library import define, eager_gradients, input_gradients, save_inputs
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    MAX_CUDA_ROW_WIDTH,
    autocast,
    canonical_pre_norm,
    check,
    check_activation,
    check_like,
    check_parameter,
    cpu_backend,
    eager_backend,
    empty_stats,
    layer_norm_ref,
    linear_ref,
    norm_rows_unsupported,
    num_rows,
    product_backends,
    statistics,
)
from eva02_kernels.ops.qkv_rope import native
from eva02_kernels.ops.rope_attention.spec import attention_inputs
from eva02_kernels.rope import NUM_ROPE_ARGS, ROPE_SCHEMA, RopeArgs, RopeTable, canonical_rope, rotate_tokens

_ROPE = slice(native.NUM_PARAMETERS + 2, native.NUM_PARAMETERS + 2 + NUM_ROPE_ARGS)
_COS_SIN = (1 + _ROPE.start, 2 + _ROPE.start)  # places among the forward arguments, of which x is the first
_PLACES = (*range(9), *_COS_SIN)
_INPUTS_SCHEMA = (
    "Tensor x, Tensor wq, Tensor? wk, Tensor? wv, Tensor? bq, Tensor? bk, Tensor? bv, Tensor? pre_weight, "
    f"Tensor? pre_bias, float pre_eps, bool pre_norm, {ROPE_SCHEMA}, int num_heads, int num_kv_heads"
)


def _packed_bias(biases: tuple[Tensor | None, ...], sizes: tuple[int, ...], x: Tensor) -> Tensor | None:
    """One bias for a packed weight, zero where there is none (EVA-02 Ti and S: q and v alone have one)."""
    given = next((b for b in biases if b is not None), None)
    if given is None:
        return None
    for name, b, n in zip(("q", "k", "v"), biases, sizes, strict=True):
        check_parameter(f"bias ({name})", b, (n,), x)
    return torch.cat([given.new_zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)])


def _canonical(
    x: Tensor,
    weight: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Any = None,
    rope: RopeTable | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    pre_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    num_prefix_tokens: int = 1,
    keep_idx: Tensor | None = None,
) -> tuple[Any, ...]:
    check_activation("x", x)
    check(x.dim() == 3, "x", "(B, S, C)", tuple(x.shape))
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check(
        num_heads > 0 and kv_heads > 0 and num_heads % kv_heads == 0,
        "num_kv_heads",
        f"a divisor of num_heads = {num_heads}",
        kv_heads,
    )
    split = not isinstance(weight, Tensor)
    weights: Any = tuple(weight) if split else (weight, None, None)
    check(len(weights) == 3, "weight", "a tensor or (wq, wk, wv)", f"{len(weights)} tensors")
    biases = tuple(bias) if isinstance(bias, (tuple, list)) else (bias, None, None)
    check(len(biases) == 3, "bias", "None, a tensor or (bq, bk, bv)", f"{len(biases)} tensors")
    check(not (split and isinstance(bias, Tensor)), "bias", "a tuple with a tuple of weights, or None", "a tensor")
    x, *weights = autocast(x, *weights)
    total = num_heads if split else num_heads + 2 * kv_heads
    check(
        weights[0].dim() == 2 and weights[0].shape[0] % total == 0,
        "weight",
        f"rows that {total} heads divide",
        tuple(weights[0].shape),
    )
    head_dim = weights[0].shape[0] // total
    if not split and isinstance(bias, (tuple, list)):
        biases = (_packed_bias(biases, (num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), x), None, None)
    heads = (num_heads, kv_heads, kv_heads) if split else (total, 0, 0)
    for name, w, b, n in zip(("q", "k", "v"), weights, biases, heads, strict=True):
        name = name if split else "packed"
        check_like(f"weight ({name})", w, (n * head_dim, x.shape[-1]), x)
        check_parameter(f"bias ({name})", b, (n * head_dim,), x)
    table = canonical_rope(
        rope,
        head_dim,
        num_prefix_tokens,
        keep_idx,
        num_patches=x.shape[1] - num_prefix_tokens,
        batch=x.shape[0],
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        like=x,
    )
    return x, *weights, *biases, *canonical_pre_norm(pre_norm, x), *table, num_heads, kv_heads


def _reference(x: Tensor, wq: Tensor, wk: Any, wv: Any, bq: Any, bk: Any, bv: Any, *args: Any) -> tuple[Tensor]:
    pre_weight, pre_bias, pre_eps, has_pre_norm, *rope, num_heads, num_kv_heads = args
    if has_pre_norm:
        x = layer_norm_ref(x, pre_weight, pre_bias, pre_eps)
    parts = [(wq, bq)] if wk is None else [(wq, bq), (wk, bk), (wv, bv)]
    qkv = torch.cat([linear_ref(x, w, b) for w, b in parts], dim=-1)
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    qkv = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    q, k = (rotate_tokens(t, RopeArgs(*rope)) for t in (q, k))
    return (torch.cat([q, k, v], dim=2),)


def _eager_fwd(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    pre_eps, has_pre_norm = args[native.NUM_PARAMETERS : native.NUM_PARAMETERS + 2]
    stats = statistics(x, pre_eps) if has_pre_norm else (empty_stats(x, 0), empty_stats(x, 0))
    return *_reference(x, *args), *stats


def _eager_bwd(dqkv: Tensor, mean: Tensor, rstd: Tensor, qkv: Tensor | None, *args: Any) -> list[Tensor]:
    *inputs, needs = args
    return eager_gradients(_reference, tuple(inputs), _PLACES, needs, [dqkv])


def _fake_fwd(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    wq, wk, *_, num_heads, num_kv_heads = args
    heads = num_heads + 2 * num_kv_heads
    head_dim = wq.shape[0] // (heads if wk is None else num_heads)
    rows = num_rows(x) if args[native.NUM_PARAMETERS + 1] else 0
    return x.new_empty(*x.shape[:-1], heads, head_dim), empty_stats(x, rows), empty_stats(x, rows)


def _fake_bwd(dqkv: Tensor, mean: Tensor, rstd: Tensor, qkv: Tensor | None, *args: Any) -> list[Tensor]:
    *inputs, needs = args
    tensors = [*inputs[:9], *(inputs[i] for i in _COS_SIN)]
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    cos, sin = (inputs[i] for i in _COS_SIN)
    table_trains = cos is not None and (cos.requires_grad or sin.requires_grad)
    save_inputs(ctx, (mean, rstd, qkv if table_trains else None), inputs)


def _backward(ctx: Any, dqkv: Tensor, *_: None) -> list[Tensor | None]:
    return input_gradients(ctx, "qkv_rope_bwd", dqkv, _PLACES)


def _unsupported(limit: int, direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    x, *rest = args if direction == "fwd" else args[4:]
    return norm_rows_unsupported((x.shape[-1], rest[native.NUM_PARAMETERS + 1]), limit=limit)


_triton_unsupported = functools.partial(_unsupported, MAX_ROW_WIDTH)
_cuda_unsupported = functools.partial(_unsupported, MAX_CUDA_ROW_WIDTH)


def _samples() -> list[Sample]:
    def make(
        width: int, *, split: bool = False, bias: str = "qv", pre_norm: bool = True, kv: int | None = None, **case: Any
    ) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def randn(*s: int) -> Tensor:
                return torch.randn(*s, generator=generator).to(dtype)

            (q, _, _), attention = attention_inputs(dtype, generator, **case)
            kwargs: dict[str, Any] = {
                n: attention[n] for n in ("rope", "num_prefix_tokens", "keep_idx") if n in attention
            }
            batch, tokens, heads, d = q.shape
            kv_heads = kv or heads
            weights = [randn(n * d, width) * width**-0.5 for n in (heads, kv_heads, kv_heads)]
            biases = [randn(len(w)) if name in bias else None for name, w in zip("qkv", weights, strict=True)]
            packed_bias = torch.cat([b if b is not None else torch.zeros(len(w)).to(dtype)
                                     for b, w in zip(biases, weights, strict=True)]) if bias else None  # fmt: skip
            kwargs |= {"num_heads": heads, "num_kv_heads": kv_heads}
            if pre_norm:
                kwargs["pre_norm"] = (1 + 0.1 * randn(width), 0.1 * randn(width), 1e-6)
            x = 0.5 + randn(batch, tokens, width)
            if split:
                return (x, tuple(weights), tuple(biases)), kwargs
            return (x, torch.cat(weights), packed_bias), kwargs

        return inputs

    return [
        Sample("packed", make(48, shape=(2, 3, 16), grid=(3, 4)), smoke=True),
        Sample("split", make(40, split=True, shape=(2, 2, 20), grid=(3, 3))),
        Sample("no_bias", make(33, split=True, bias="", shape=(2, 2, 16), grid=(3, 3))),
        Sample("no_norm", make(48, pre_norm=False, shape=(1, 3, 16), grid=(2, 3))),
        Sample("no_rope", make(48, shape=(2, 3, 16), grid=(3, 4), rope="none")),
        Sample("split_no_rope", make(32, split=True, shape=(2, 4, 64), grid=(2, 3), rope="none")),
        Sample("half", make(64, shape=(2, 2, 32), grid=(3, 4), layout="half", prefix=5)),
        Sample("keep", make(64, shape=(2, 1, 64), grid=(4, 4), keep=7)),
        Sample("gqa", make(64, split=True, kv=2, shape=(2, 4, 16), grid=(4, 4))),
        Sample("scaled_table", make(48, shape=(2, 3, 16), grid=(3, 3), rope="dense", table_scale=1.1)),
        Sample("head_table", make(48, shape=(2, 3, 16), grid=(3, 3), rope="head")),
        Sample("head_table_20", make(48, shape=(2, 3, 20), grid=(3, 3), rope="head")),  # heads end within 8 columns
        Sample("batch_table", make(48, split=True, shape=(2, 3, 16), grid=(3, 3), rope="batch")),
        Sample("grids", make(48, shape=(2, 3, 16), grid=(3, 4), grids=((3, 4), (4, 3)), swap=True)),
        Sample("empty", make(48, shape=(0, 3, 16), grid=(3, 3))),
        Sample("Ti", make(192, shape=(1, 3, 64), grid=(16, 16))),
        Sample("block_B", make(768, shape=(1, 12, 64), grid=(16, 16)), full=True),
        Sample("block_L", make(1024, split=True, shape=(1, 16, 64), grid=(16, 16)), full=True),
    ]


def _flops(x: Tensor, wq: Tensor, wk: Any, wv: Any, *rest: Any) -> tuple[int, int]:
    weights = sum(w.numel() for w in (wq, wk, wv) if w is not None)
    return 2 * num_rows(x) * weights, 4 * num_rows(x) * weights


def _bytes(x: Tensor, *args: Any) -> tuple[int, int]:
    qkv = num_rows(x) * sum(w.shape[0] for w in args[:3] if w is not None)
    # Backward reads dqkv for each of the two products, and x once, and writes dx.
    return x.element_size() * (x.numel() + qkv), x.element_size() * (2 * x.numel() + 2 * qkv)


SPEC = define(
    OpSpec(
        name="qkv_rope",
        summary="q, k, v projection with LayerNorm before and rotation after",
        formula="[R(q), R(k), v] = split(LN(x) W^T + b)",
        source="EVA-02, arXiv:2303.11331",
        fwd_schema=_INPUTS_SCHEMA,
        fwd_returns="(Tensor, Tensor, Tensor)",
        bwd_schema=f"Tensor dqkv, Tensor mean, Tensor rstd, Tensor? qkv, {_INPUTS_SCHEMA}, bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            *product_backends("qkv_rope", _triton_unsupported, _cuda_unsupported),
            cpu_backend(native.fwd, native.bwd),
            eager_backend(_eager_fwd, _eager_bwd),
        ),
        samples=_samples,
        saved="x, weights, biases; mean, rstd (rows,) float32; qkv only when a dense table trains",
        bytes_moved=_bytes,
        flops=_flops,
    )
)
