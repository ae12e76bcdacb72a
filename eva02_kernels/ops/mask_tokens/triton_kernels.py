"""Triton kernels of mask_tokens.

Fused: mask blend, prefix tokens, position embedding; backward all gradients in one pass, those of parameters as one
partial sum a program and a second kernel that adds them (no atomics, a fixed order).
Bytes: forward reads the patches that are not masked and writes the tokens, backward reads and writes as much: the
minimum; the partial sums add at most 7 % where there are 32 samples or more for each program.
Launch: tiles of BLOCK_M tokens x BLOCK_N columns; backward each tile walks its share of the samples.
Numerics: float32, one rounding. Limits: patches with a contiguous last dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import row_pieces
from eva02_kernels.ops._common import contiguous, empty_like_needed, last_dense, present
from eva02_kernels.ops._triton_lib import column_sums, parameter_partials, row_offsets
from eva02_kernels.ops.mask_tokens.native import num_prefix


@triton.jit(do_not_specialize=["M", "P", "prefix"])
def _mask_tokens_fwd_kernel(
    patches_ptr, mask_ptr, mask_token_ptr, pos_embed_ptr, cls_token_ptr, out_ptr, M, P, prefix, stride_patches,
    stride_patches_token, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < M
    keep = there[:, None] & (cols < N)[None, :]
    sample = rows // (prefix + P)
    token = rows % (prefix + P)
    patch = token - prefix
    is_patch = there & (patch >= 0)
    own = is_patch
    if mask_ptr is not None:
        masked = tl.load(mask_ptr + sample.to(tl.int64) * P + patch, mask=is_patch, other=0) != 0
        own = is_patch & (masked == 0)
    x = row_offsets(sample, stride_patches) + row_offsets(patch, stride_patches_token)
    x = tl.load(patches_ptr + x + cols[None, :], mask=keep & own[:, None], other=0.0).to(tl.float32)
    if mask_ptr is not None:
        mask_token = tl.load(mask_token_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        x = tl.where(masked[:, None], mask_token[None, :], x)
    place = row_offsets(token, N) + cols[None, :]
    if cls_token_ptr is not None:
        x += tl.load(cls_token_ptr + place, mask=keep & (patch < 0)[:, None], other=0.0).to(tl.float32)
    if pos_embed_ptr is not None:
        x += tl.load(pos_embed_ptr + place, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_offsets(rows, N) + cols[None, :], x.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["B", "P", "prefix", "blocks", "share"])
def _mask_tokens_bwd_kernel(
    dout_ptr, mask_ptr, dpatches_ptr, dmask_token_ptr, dpos_embed_ptr, dcls_token_ptr, B, P, prefix, blocks, share,
    stride_dout, stride_dout_token, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) // blocks  # samples part * share and on
    token = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    patch = token - prefix
    is_patch = (patch >= 0) & (patch < P)
    keep = (patch < P)[:, None] & (cols < N)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total_masked = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(part * share, tl.minimum(part * share + share, B)):
        sample = tl.cast(b, tl.int64)
        dout = sample * stride_dout + row_offsets(token, stride_dout_token)
        d = tl.load(dout_ptr + dout + cols[None, :], mask=keep, other=0.0)
        total += d.to(tl.float32)
        if mask_ptr is not None:
            masked = tl.load(mask_ptr + sample * P + patch, mask=is_patch, other=0) != 0
            total_masked += tl.where(masked[:, None], d.to(tl.float32), 0.0)
            d = tl.where(masked[:, None], 0.0, d)
        if dpatches_ptr is not None:
            dpatches = sample * P * N + row_offsets(patch, N) + cols[None, :]
            tl.store(dpatches_ptr + dpatches, d, mask=keep & is_patch[:, None])
    place = row_offsets(token, N) + cols[None, :]
    if dpos_embed_ptr is not None:
        first = tl.cast(part, tl.int64) * (prefix + P) * N
        tl.store(dpos_embed_ptr + first + place, total, mask=keep)
    if dcls_token_ptr is not None:
        first = tl.cast(part, tl.int64) * prefix * N
        tl.store(dcls_token_ptr + first + place, total, mask=keep & (patch < 0)[:, None])
    if dmask_token_ptr is not None:
        first = tl.cast(tl.program_id(0), tl.int64) * N
        tl.store(dmask_token_ptr + first + cols, tl.sum(total_masked, 0), mask=cols < N)


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def fwd(
    patches: Tensor, mask: Tensor | None, mask_token: Tensor | None, pos_embed: Tensor | None, cls_token: Tensor | None
) -> Tensor:
    batch, count, width = patches.shape
    prefix = num_prefix(cls_token)
    out = torch.empty(batch, prefix + count, width, dtype=patches.dtype, device=patches.device)
    if not out.numel():
        return out
    patches, rows, launch = last_dense(patches), batch * (prefix + count), row_pieces(width)
    grid = (triton.cdiv(rows, launch["BLOCK_M"]), triton.cdiv(width, launch["BLOCK_N"]))
    _triton.launch(
        _mask_tokens_fwd_kernel, grid, launch, patches, _as_bytes(mask), *contiguous(mask_token, pos_embed, cls_token),
        out, rows, count, prefix, patches.stride(0), patches.stride(1), N=width,
    )  # fmt: skip
    return out


def bwd(
    dout: Tensor, mask: Tensor | None, mask_token: Tensor | None, pos_embed: Tensor | None, cls_token: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    batch, tokens, width = dout.shape
    prefix, device = num_prefix(cls_token), dout.device
    shape = (batch, tokens - prefix, width)
    dpatches = torch.empty(shape, dtype=dout.dtype, device=device) if needs[0] else None
    parameters = empty_like_needed((mask_token, pos_embed, cls_token), needs[1:])
    if not dout.numel():
        return present([dpatches, *(None if grad is None else grad.zero_() for grad in parameters)])
    dout, launch = last_dense(dout), row_pieces(width)
    blocks, pieces = triton.cdiv(tokens, launch["BLOCK_M"]), triton.cdiv(width, launch["BLOCK_N"])
    # Where no gradient of a parameter is wanted there are no partial sums to keep few.
    parts = batch
    if present(parameters):
        # At most one part for 32 samples: their tiles are all that a program has to load.
        parts = max(1, _triton.num_partials(2 * batch * blocks * pieces, 1, device) // (blocks * pieces))
    share = triton.cdiv(batch, parts)
    parts = triton.cdiv(batch, share)
    partials = [
        parameter_partials(grad, True, parts * (blocks if i == 0 else 1), device) for i, grad in enumerate(parameters)
    ]
    _triton.launch(
        _mask_tokens_bwd_kernel, (blocks * parts, pieces), launch, dout, _as_bytes(mask), dpatches, *partials,
        batch, tokens - prefix, prefix, blocks, share, dout.stride(0), dout.stride(1), N=width,
    )  # fmt: skip
    for partial, grad in zip(present(partials), present(parameters), strict=True):
        column_sums(partial, grad)
    return present([dpatches, *parameters])
