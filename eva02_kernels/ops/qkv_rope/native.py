"""Compiled kernels of ``csrc/qkv_rope``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._native import Library
from eva02_kernels.ops._common import contiguous, empty_like_needed, empty_stats, num_rows, present, rows_of
from eva02_kernels.ops.apply_rope import native as rope_native
from eva02_kernels.rope import NUM_ROPE_ARGS, per_unit_table

NUM_PARAMETERS = 8  # wq, wk, wv, bq, bk, bv, pre_weight, pre_bias


def _geometry(x: Tensor, args: tuple[Any, ...]) -> tuple[int, int, int, int]:
    """(tokens a sample, H, Hkv, D)."""
    num_heads, num_kv_heads = args[-2:]
    wq, wk = args[:2]
    return x.shape[-2], num_heads, num_kv_heads, wq.shape[0] // (num_heads + (2 * num_kv_heads if wk is None else 0))


def _weights(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return contiguous(*args[:NUM_PARAMETERS])


def _rope_kernel_args(args: tuple[Any, ...], seq_len: int) -> tuple[Any, ...]:
    cos, sin, *rest = args[NUM_PARAMETERS + 2 : NUM_PARAMETERS + 2 + NUM_ROPE_ARGS]
    return (*contiguous(cos, sin), *rest, None, seq_len, *args[-2:])


def fwd(lib: Library, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    seq_len, heads, kv_heads, head_dim = _geometry(x, args)
    pre_eps, has_pre_norm = args[NUM_PARAMETERS : NUM_PARAMETERS + 2]
    rows = num_rows(x)
    qkv = torch.empty(*x.shape[:-1], heads + 2 * kv_heads, head_dim, dtype=x.dtype, device=x.device)
    mean, rstd = (empty_stats(x, rows if has_pre_norm else 0) for _ in range(2))
    lib.qkv_rope_fwd(
        rows_of(x),
        *_weights(args),
        pre_eps,
        *_rope_kernel_args(args, seq_len),
        qkv.view(rows, (heads + 2 * kv_heads) * head_dim),
        mean if has_pre_norm else None,
        rstd if has_pre_norm else None,
    )
    return qkv, mean, rstd


def bwd(
    lib: Library, dqkv: Tensor, mean: Tensor, rstd: Tensor, qkv: Tensor | None, x: Tensor, *args: Any
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    seq_len, heads, kv_heads, _ = _geometry(x, tuple(args))
    has_pre_norm = args[NUM_PARAMETERS + 1]
    dqkv = dqkv.contiguous()
    rows = num_rows(x)
    grads = empty_like_needed((x, *args[:NUM_PARAMETERS]), needs[: 1 + NUM_PARAMETERS])
    dx, *parameters = grads
    kernel_args = _rope_kernel_args(tuple(args), seq_len)
    weights = _weights(tuple(args))  # biases have no part in backward
    lib.qkv_rope_bwd(
        dqkv.view(rows, dqkv.shape[-2] * dqkv.shape[-1]),
        rows_of(x),
        *weights[:3],
        *weights[6:],
        mean if has_pre_norm else None,
        rstd if has_pre_norm else None,
        *kernel_args,
        dx,
        *parameters,
    )
    result = present(grads)
    needs_cos, needs_sin = needs[1 + NUM_PARAMETERS :]
    if needs_cos or needs_sin:
        assert qkv is not None
        rope = tuple(args[NUM_PARAMETERS + 2 : NUM_PARAMETERS + 2 + NUM_ROPE_ARGS])
        totals: list[Tensor] = []
        for part in (slice(0, heads), slice(heads, heads + kv_heads)):  # q and k meet a per-head table separately
            unrotated = rope_native.rotate(lib, qkv[:, :, part], rope, inverse=True)
            found = rope_native.table_gradients(lib, dqkv[:, :, part], unrotated, rope)
            totals = [t.add_(g) for t, g in zip(totals, found, strict=True)] if totals else list(found)
        # Un-rotating what was rotated gives cos^2 + sin^2 times the projection.
        dcos, dsin = per_unit_table(totals, *rope[:2])
        result += [dcos] * needs_cos + [dsin] * needs_sin
    return result
