"""qkv_rope on a GPU: products and their epilogues are a backend's (``ops/_products.py``), as is apply_rope's rotation.

Fused: bias and rotation in the product's epilogue, for the interleaved layout. The half layout, and products by
torch.mm, are rotated in place by one pass. The pre-norm is one pass before. Backward rotates dqkv back once, into a
temporary that the products read.
Bytes: forward reads x (normed x, written once) and writes q, k, v once; in place rotation reads and writes q and k once
more. Backward reads dqkv for each of the two products (for the biases too, where products are torch.mm); rotated, it is
read and written once before. Models on a GPU rotate in attention (``nn.attention``), so that theirs is not.
Numerics: float32 sums and rotation, one rounding where fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels.ops._common import contiguous, empty_like_needed, present, rows_2d, view_2d
from eva02_kernels.ops._products import Kernels, Part, normed_input, project_parts
from eva02_kernels.ops.qkv_rope.native import NUM_PARAMETERS
from eva02_kernels.rope import NUM_ROPE_ARGS, RopeArgs, per_unit_table


def _rotate_heads(
    on: Kernels, x: Tensor, out: Tensor, rope: Sequence[Any], heads: int, kv_heads: int, *, inverse: bool
) -> None:  # fmt: skip
    """Rotate q and k of packed x into ``out``; they meet a per-head table separately."""
    per_head = str(RopeArgs(*rope).layout).endswith(":head")
    parts = ((0, heads), (heads, heads + kv_heads)) if per_head else ((0, heads + kv_heads),)
    for a, b in parts:
        on.rotate(x[:, :, a:b], rope, inverse=inverse, out=out[:, :, a:b])


def fwd(on: Kernels, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    wq, wk, wv, bq, bk, bv, pre_weight, pre_bias, pre_eps, pre_norm = args[: NUM_PARAMETERS + 2]
    rope = args[NUM_PARAMETERS + 2 : NUM_PARAMETERS + 2 + NUM_ROPE_ARGS]
    heads, kv_heads = args[-2:]
    total = heads + 2 * kv_heads
    head_dim = wq.shape[0] // (total if wk is None else heads)
    x2 = rows_2d(x)
    rows, tokens = x2.shape[0], x.shape[1]
    mean, rstd = (torch.empty(rows if pre_norm else 0, dtype=torch.float32, device=x.device) for _ in range(2))
    qkv = torch.empty(*x.shape[:-1], total, head_dim, dtype=x.dtype, device=x.device)
    if not qkv.numel():
        return qkv, mean, rstd
    normed = normed_input(on, x2, pre_weight, pre_bias, pre_eps, pre_norm, statistics=(mean, rstd))
    table = RopeArgs(*rope)
    rotates = table.cos is not None
    in_epilogue = rotates and table.layout.startswith("interleaved") and on.fused(x)
    out = qkv.view(rows, total * head_dim)
    weights = [rows_2d(w) for w in (wq, wk, wv) if w is not None]
    biases = contiguous(*(bq, bk, bv)[: len(weights)])
    rotated = 0
    if in_epilogue:
        for first, weight, bias in zip((0, heads), weights, biases, strict=False):
            part = out[:, first * head_dim : first * head_dim + weight.shape[0]]
            on.project_rope(normed, weight, bias, table, tokens, heads, kv_heads, head_dim, part)
            rotated += weight.shape[0]
        weights, biases = weights[2:], biases[2:]
    project_parts(on, normed, weights, biases, out[:, rotated:])
    if rotates and not in_epilogue:
        _rotate_heads(on, qkv, qkv, rope, heads, kv_heads, inverse=False)
    return qkv, mean, rstd


def bwd(
    on: Kernels, dqkv: Tensor, mean: Tensor, rstd: Tensor, qkv: Tensor | None, x: Tensor, *args: Any
) -> list[Tensor]:
    *inputs, needs = args
    wq, wk, wv, _, _, _, pre_weight, pre_bias, pre_eps, pre_norm = inputs[: NUM_PARAMETERS + 2]
    rope = inputs[NUM_PARAMETERS + 2 : NUM_PARAMETERS + 2 + NUM_ROPE_ARGS]
    heads, kv_heads = inputs[-2:]
    grads = empty_like_needed((x, *inputs[:NUM_PARAMETERS]), needs[: 1 + NUM_PARAMETERS])
    dx, *parameters = grads
    dpre_weight, dpre_bias = parameters[6:]
    x2, dqkv = rows_2d(x), dqkv.contiguous()
    d = dqkv
    if RopeArgs(*rope).cos is not None and dqkv.numel():
        d = torch.empty(dqkv.shape, dtype=dqkv.dtype, device=dqkv.device)
        _rotate_heads(on, dqkv, d, rope, heads, kv_heads, inverse=True)
        d[:, :, heads + kv_heads :] = dqkv[:, :, heads + kv_heads :]
    d2 = d.view(x2.shape[0], d.shape[2] * d.shape[3])
    weights = [rows_2d(w) for w in (wq, wk, wv) if w is not None]
    first, parts = 0, []
    for weight, dweight, dbias in zip(weights, parameters[:3], parameters[3:6], strict=False):
        if dweight is not None or dbias is not None:
            parts.append(Part(first, dweight, dbias))
        first += weight.shape[0]
    if parts:
        normed = normed_input(on, x2, pre_weight, pre_bias, pre_eps, pre_norm) if any(needs[1:4]) else None
        on.weight_gradients(d2, normed, parts)
    if dx is not None or dpre_weight is not None or dpre_bias is not None:
        # One product over q, k and v: its sum is rounded once.
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        dx2 = None if dx is None else view_2d(dx)
        dnormed = dx2 if dx2 is not None and not pre_norm else torch.empty(x2.shape, dtype=x.dtype, device=x.device)
        on.multiply(d2, weight, dnormed)
        if pre_norm:
            on.norm_backward(dnormed, x2, mean, rstd, pre_weight, dx2, dweight=dpre_weight, dbias=dpre_bias)
    result = present(grads)
    needs_cos, needs_sin = needs[1 + NUM_PARAMETERS :]
    if needs_cos or needs_sin:
        assert qkv is not None
        totals: list[Tensor] = []
        for at in (slice(0, heads), slice(heads, heads + kv_heads)):  # q and k meet a per-head table separately
            unrotated = on.rotate(qkv[:, :, at], rope, inverse=True)
            found = on.table_gradients(dqkv[:, :, at], unrotated, rope)
            totals = [t.add_(g) for t, g in zip(totals, found, strict=True)] if totals else list(found)
        # Un-rotating what was rotated gives cos^2 + sin^2 times the projection.
        dcos, dsin = per_unit_table(totals, *rope[:2])
        result += [dcos] * needs_cos + [dsin] * needs_sin
    return result
