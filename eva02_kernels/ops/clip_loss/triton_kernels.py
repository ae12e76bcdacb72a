"""Triton kernels of clip_loss.

Fused: a tile of similarities is a product whose epilogue leaves the largest and the sum of exponentials of each of its
rows and columns; these are merged into losses. Backward computes the tile again, and its epilogue makes it the gradient
of the loss; two more products give the features' gradients.
Bytes: forward reads the features, in tiles, and writes statistics, 8 bytes a row and column of each tile; backward
writes and reads twice the similarities' gradients of a block of rows. Launch: blocks of ``similarity_rows`` rows one
after the other, tiles of BLOCK_M x BLOCK_N. Numerics: float32; gradients of similarities are rounded to the features'
dtype for their products, sums over blocks of rows are float32; no atomics. Limits: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import ONE_SUM, PARTIAL_STATISTICS, Choice, similarities, similarity_rows
from eva02_kernels.ops._common import empty_like_needed, present, rows_2d
from eva02_kernels.ops._triton_lib import add_product, fused, row_offsets


@triton.jit
def _exp_minus_1(x):
    """exp(x) - 1, float32, with its relative precision near zero too."""
    series = 1.0 + x * (1 / 7)
    series = 1.0 + x * (1 / 6) * series
    series = 1.0 + x * (1 / 5) * series
    series = 1.0 + x * (1 / 4) * series
    series = 1.0 + x * (1 / 3) * series
    series = 1.0 + x * (1 / 2) * series
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1.0)


@triton.jit
def _fade(x):
    """exp(x) for x <= 0, exactly 1 at 0: a GPU approximates it there too, and the loss of a single pair is 0."""
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
    p = x * 1.4426950216293335  # exp(x) = 2^p (1 + rest ln 2), where p + rest is x log2(e) to more digits than p has
    rest = fused(x, 1.4426950216293335, -p) + x * 1.925963033500e-08
    power = tl.exp2(p)
    return tl.where(x == 0.0, 1.0, fused(power, rest * 0.6931471805599453, power))


@triton.jit
def _log(x):
    """log(x), float32, for x >= 1. A GPU's is wrong by as much near 1 as elsewhere, and there losses are small."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # x = m 2^exponent, m from sqrt(1/2) to sqrt(2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    inverse = 1.0 / (2.0 + f)
    s = f * inverse  # log m = 2 artanh(f / (2 + f))
    s = fused(fused(-s, 2.0 + f, f), inverse, s)
    z = s * s
    series = z * (0.6666667 + z * (0.4 + z * (0.2857143 + z * (0.2222222 + z * 0.1818182))))
    result = fused(exponent.to(tl.float32), 0.6931471805599453, 2.0 * s + s * series)
    return tl.where(x == x, result, x)


@triton.jit
def _factors(scale_ptr):
    """(factor, value): logits are value * (factor * product), and a scale of zero still gives the products."""
    scale = tl.load(scale_ptr)
    return tl.where(scale == 0.0, 1.0, scale), tl.where(scale == 0.0, 0.0, 1.0)


@triton.jit
def _products(
    row_ptr, key_ptr, rows, cols, M, N, stride_row, stride_key, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows keys^T, float32; rows and columns beyond the last repeat it."""
    k = tl.arange(0, BLOCK_K)
    row_ptrs = row_ptr + row_offsets(tl.minimum(rows, M - 1), stride_row) + k[None, :]
    key_ptrs = key_ptr + tl.minimum(cols, N - 1).to(tl.int64)[None, :] * stride_key + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            a = tl.load(row_ptrs)
            b = tl.load(key_ptrs)
        else:
            a = tl.load(row_ptrs, mask=(k < D - start)[None, :], other=0.0)
            b = tl.load(key_ptrs, mask=(k < D - start)[:, None], other=0.0)
        acc = add_product(a, b, acc, PRECISION)
        row_ptrs += BLOCK_K
        key_ptrs += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["M", "N", "first"])
def _statistics_kernel(
    row_ptr, key_ptr, scale_ptr, target_ptr, row_part_ptr, column_part_ptr, M, N, first, stride_row, stride_key,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Parts are (2, tiles, rows or columns): the largest logit, and the sum of exp(logit - largest)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    factor, value = _factors(scale_ptr)
    acc = _products(row_ptr, key_ptr, rows, cols, M, N, stride_row, stride_key, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    logits = acc * factor * value
    own = (rows + first)[:, None] == cols[None, :]
    here = (rows + first >= tile_n * BLOCK_N) & (rows + first < (tile_n + 1) * BLOCK_N)
    tl.store(target_ptr + rows, tl.sum(tl.where(own, logits, 0.0), 1), mask=(rows < M) & here)

    of_rows = tl.where((cols < N)[None, :], logits, float("-inf"))
    largest = tl.max(of_rows, 1)
    part = row_part_ptr + tile_n.to(tl.int64) * M + rows
    tl.store(part, largest, mask=rows < M)
    tl.store(part + tl.cdiv(N, BLOCK_N).to(tl.int64) * M, tl.sum(_fade(of_rows - largest[:, None]), 1), mask=rows < M)
    if column_part_ptr is not None:
        of_columns = tl.where((rows < M)[:, None], logits, float("-inf"))
        largest = tl.max(of_columns, 0)
        part = column_part_ptr + tile_m.to(tl.int64) * N + cols
        tl.store(part, largest, mask=cols < N)
        total = tl.sum(_fade(of_columns - largest[None, :]), 0)
        tl.store(part + tiles_m.to(tl.int64) * N, total, mask=cols < N)


@triton.jit(do_not_specialize=["P", "N"])
def _merge_kernel(part_ptr, before_ptr, after_ptr, target_ptr, loss_ptr, P, N, BLOCK: tl.constexpr):
    """Statistics of P parts, and of those before where there are any, as statistics (2, N) or as losses."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < N
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if before_ptr is not None:
        largest = tl.load(before_ptr + cols, mask=keep, other=0.0)
        total = tl.load(before_ptr + N + cols, mask=keep, other=0.0)
    for p in range(P):
        part = part_ptr + tl.cast(p, tl.int64) * N + cols
        other = tl.load(part, mask=keep, other=0.0)
        both = tl.maximum(largest, other)
        more = tl.load(part + tl.cast(P, tl.int64) * N, mask=keep, other=0.0)
        total = total * _fade(largest - both) + more * _fade(other - both)
        largest = both
    if after_ptr is not None:
        tl.store(after_ptr + cols, largest, mask=keep)
        tl.store(after_ptr + N + cols, total, mask=keep)
    if loss_ptr is not None:
        target = tl.load(target_ptr + cols, mask=keep, other=0.0)
        tl.store(loss_ptr + cols, largest - target + _log(total), mask=keep)


@triton.jit(do_not_specialize=["M"])
def _total_kernel(x_ptr, dloss_ptr, scale_ptr, out_ptr, M, unit, BLOCK: tl.constexpr):
    """out = unit * sum of M numbers: the loss, or, given dloss and the scale, the scale's gradient."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, M, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i, mask=i < M, other=0.0)
    out = tl.sum(total, 0) * unit
    if dloss_ptr is not None:
        factor, _ = _factors(scale_ptr)
        out = out * tl.load(dloss_ptr) / factor
    tl.store(out_ptr, out)


@triton.jit(do_not_specialize=["M", "N", "first"])
def _gradient_kernel(
    row_ptr, key_ptr, scale_ptr, row_target_ptr, row_loss_ptr, key_target_ptr, key_loss_ptr, out_ptr, dots_ptr, M, N,
    first, stride_row, stride_key, stride_out, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = 2 N d loss / d logit, and for each tile the sum of its products with factor * similarity."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    factor, value = _factors(scale_ptr)
    acc = _products(row_ptr, key_ptr, rows, cols, M, N, stride_row, stride_key, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    acc *= factor
    row_target = tl.load(row_target_ptr + rows, mask=rows < M, other=0.0)
    row_loss = tl.load(row_loss_ptr + rows, mask=rows < M, other=0.0)
    key_target = tl.load(key_target_ptr + cols, mask=cols < N, other=0.0)
    key_loss = tl.load(key_loss_ptr + cols, mask=cols < N, other=0.0)
    g = tl.exp(acc * value - row_target[:, None] - row_loss[:, None])
    g += tl.exp(acc * value - key_target[None, :] - key_loss[None, :])
    # Of a pair itself it is too near to zero to be had as a difference.
    own = (rows + first)[:, None] == cols[None, :]
    g = tl.where(own, _exp_minus_1(-row_loss)[:, None] + _exp_minus_1(-key_loss)[None, :], g)
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    g = tl.where(keep, g, 0.0)
    if dots_ptr is not None:
        tl.store(dots_ptr + tl.program_id(0), tl.sum(tl.sum(g * acc, 1), 0))
    there = (rows < M)[:, None] & (cols < stride_out)[None, :]  # zeros in the padding
    tl.store(out_ptr + row_offsets(rows, stride_out) + cols[None, :], g.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M", "K"])
def _features_kernel(
    slope_ptr, x_ptr, before_ptr, out_ptr, dloss_ptr, scale_ptr, M, K, unit, stride_slope, stride_x, D: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, D) = before + slopes x, or slopes^T x, with K rows of x; times the rest of the gradient, given dloss.

    Rows of slopes are padded with zeros to a multiple of 16, which lets them be read in whole vectors.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        there = start + k < K
        if TRANSPOSED:
            slopes = slope_ptr + row_offsets(start + k, stride_slope) + rows[None, :]
            a = tl.trans(tl.load(slopes, mask=there[:, None] & (rows < stride_slope)[None, :], other=0.0))
        else:
            slopes = slope_ptr + row_offsets(rows, stride_slope) + (start + k)[None, :]
            a = tl.load(slopes, mask=(start + k < stride_slope)[None, :] & (rows < M)[:, None], other=0.0)
        x = x_ptr + row_offsets(start + k, stride_x) + cols[None, :]
        b = tl.load(x, mask=there[:, None] & (cols < D)[None, :], other=0.0)
        acc = add_product(a, b, acc, PRECISION)
    keep = (rows < M)[:, None] & (cols < D)[None, :]
    out = row_offsets(rows, D) + cols[None, :]
    if before_ptr is not None:
        acc += tl.load(before_ptr + out, mask=keep, other=0.0)
    if dloss_ptr is not None:
        acc *= tl.load(scale_ptr) * tl.load(dloss_ptr) * unit
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=keep)


def _launch_of(rows: Tensor) -> tuple[dict[str, Any], Choice]:
    choice = similarities(rows.dtype, _triton.architecture(rows.device))
    return {"D": rows.shape[1], "PRECISION": _triton.dot_precision(rows.dtype)}, choice


def _unit(keys: int) -> float:
    """What each of the losses counts: a share of two for each key."""
    return 0.5 / max(1, keys)


def _losses(
    rows: Tensor, keys: Tensor, logit_scale: Tensor, first: int, target: Tensor, row_loss: Tensor,
    column_loss: Tensor | None,
) -> None:  # fmt: skip
    """Fill the rows' targets and losses, and the columns' losses where they are wanted."""
    constants, choice = _launch_of(rows)
    count, (num_keys, _) = rows.shape[0], keys.shape
    step, tiles_n = similarity_rows(num_keys), triton.cdiv(num_keys, choice["BLOCK_N"])
    running = None
    merge_columns = (triton.cdiv(num_keys, PARTIAL_STATISTICS["BLOCK"]),)
    for begin in range(0, count, step):
        size = min(step, count - begin)
        tiles_m = triton.cdiv(size, choice["BLOCK_M"])
        row_part = torch.empty(2, tiles_n, size, dtype=torch.float32, device=rows.device)
        column_part = None if column_loss is None else row_part.new_empty(2, tiles_m, num_keys)
        own = slice(begin, begin + size)
        _triton.launch(
            _statistics_kernel, (tiles_m * tiles_n,), choice, rows[own], keys, logit_scale, target[own], row_part,
            column_part, size, num_keys, first + begin, rows.stride(0), keys.stride(0), **constants,
        )  # fmt: skip
        _triton.launch(
            _merge_kernel, (triton.cdiv(size, PARTIAL_STATISTICS["BLOCK"]),), PARTIAL_STATISTICS, row_part, None, None,
            target[own], row_loss[own], tiles_n, size,
        )  # fmt: skip
        if column_part is None:
            continue
        last = begin + size == count
        after = None if last else row_part.new_empty(2, num_keys)
        _triton.launch(
            _merge_kernel, merge_columns, PARTIAL_STATISTICS, column_part, running, after, target if last else None,
            column_loss if last else None, tiles_m, num_keys,
        )  # fmt: skip
        running = after


def fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor, all_image: Tensor | None, all_text: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    stats = torch.empty(3, image.shape[0], dtype=torch.float32, device=image.device)
    image_loss, text_loss, target = stats
    image, text = rows_2d(image), rows_2d(text)
    num_keys = image.shape[0]
    if all_image is None or all_text is None:
        _losses(image, text, logit_scale, 0, target, image_loss, text_loss)
    else:
        num_keys = all_image.shape[0]
        _losses(text, rows_2d(all_image), logit_scale, first, target, text_loss, None)
        _losses(image, rows_2d(all_text), logit_scale, first, target, image_loss, None)
    loss = torch.empty((), dtype=torch.float32, device=image.device)
    _triton.launch(_total_kernel, (1,), ONE_SUM, stats, None, None, loss, 2 * image.shape[0], _unit(num_keys))
    return loss, stats


def _gradients(
    dloss: Tensor, rows: Tensor, keys: Tensor, logit_scale: Tensor, first: int, row_stats: Sequence[Tensor],
    key_stats: Sequence[Tensor], drows: Tensor | None, dkeys: Tensor | None, dscale: Tensor | None,
) -> None:  # fmt: skip
    """Fill the gradients that are wanted; that of the keys needs all rows."""
    constants, choice = _launch_of(rows)
    (count, width), num_keys = rows.shape, keys.shape[0]
    step, tiles_n = similarity_rows(num_keys), triton.cdiv(num_keys, choice["BLOCK_N"])
    wide = triton.cdiv(width, choice["BLOCK_N"])
    row_tiles = triton.cdiv(step, choice["BLOCK_M"])
    dots = None
    if dscale is not None:
        dots = torch.zeros(triton.cdiv(count, step), row_tiles * tiles_n, dtype=torch.float32, device=rows.device)
    slopes = rows.new_empty(min(step, count), triton.cdiv(num_keys, 16) * 16)
    sums = None
    for i, begin in enumerate(range(0, count, step)):
        size = min(step, count - begin)
        own, tiles_m = slice(begin, begin + size), triton.cdiv(size, choice["BLOCK_M"])
        _triton.launch(
            _gradient_kernel, (tiles_m * tiles_n,), choice, rows[own], keys, logit_scale,
            *(t[own] for t in row_stats), *key_stats, slopes, None if dots is None else dots[i], size, num_keys,
            first + begin, rows.stride(0), keys.stride(0), slopes.stride(0), **constants,
        )  # fmt: skip
        if drows is not None and width:
            _triton.launch(
                _features_kernel, (tiles_m, wide), choice, slopes, keys, None, drows[own], dloss, logit_scale, size,
                num_keys, _unit(num_keys), slopes.stride(0), keys.stride(0), TRANSPOSED=False, **constants,
            )  # fmt: skip
        if dkeys is not None and width:
            last = begin + size == count
            after = dkeys if last else torch.empty_like(dkeys, dtype=torch.float32)
            _triton.launch(
                _features_kernel, (triton.cdiv(num_keys, choice["BLOCK_M"]), wide), choice, slopes, rows[own], sums,
                after, dloss if last else None, logit_scale, num_keys, size, _unit(num_keys), slopes.stride(0),
                rows.stride(0), TRANSPOSED=True, **constants,
            )  # fmt: skip
            sums = after
    if dscale is not None:
        number = 0 if dots is None else dots.numel()
        _triton.launch(_total_kernel, (1,), ONE_SUM, dots, dloss, logit_scale, dscale, number, _unit(num_keys))


def bwd(
    dloss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, all_image: Tensor | None,
    all_text: Tensor | None, stats: Tensor, first: int, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    grads = empty_like_needed((image, text, logit_scale), needs)
    dimage, dtext, dscale = grads
    image, text = rows_2d(image), rows_2d(text)
    image_loss, text_loss, target = stats
    images, texts = (target, image_loss), (target, text_loss)
    if all_image is None or all_text is None:
        _gradients(dloss, image, text, logit_scale, 0, images, texts, dimage, dtext, dscale)
        return present(grads)
    own = slice(first, first + image.shape[0])
    if dimage is not None or dscale is not None:
        own_images = [t[own] for t in images]
        _gradients(
            dloss, image, rows_2d(all_text), logit_scale, first, own_images, texts, dimage, None, dscale
        )  # fmt: skip
    if dtext is not None:
        own_texts = [t[own] for t in texts]
        _gradients(dloss, text, rows_2d(all_image), logit_scale, first, own_texts, images, dtext, None, None)
    return present(grads)
