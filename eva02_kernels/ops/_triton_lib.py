"""Device functions that the Triton kernels share, and the second stage of their two-stage sums."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import COLUMN_SUMS, row_pieces

# Kernels are decorated once: interpreted or compiled is a property of the process (TRITON_INTERPRET).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. The interpreter multiplies bfloat16 as if its bits were integers: it gets float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def row_offsets(rows, stride):
    """Element offsets of rows, int64, as a column."""
    return rows.to(tl.int64)[:, None] * stride


@triton.jit
def fused(a, b, c):
    """a b + c, float32, rounded once: the interpreter's own fma rounds twice, which its users cannot bear."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    """As dot, for long sums. In float32 a b is summed by itself first: one chain over all of K errs by its length."""
    if a.dtype == tl.float32 and PRECISION == "ieee":
        return fused(dot(a, b, tl.zeros_like(acc), PRECISION), 1.0, acc)  # Triton makes a plain sum one chain again
    return dot(a, b, acc, PRECISION)


@triton.jit
def inverse_sqrt(x):
    """1 / sqrt(x), float32. A GPU approximates it; a step of Newton's, for its error would be that of a whole row."""
    r = tl.rsqrt(x)
    step = fused(-0.5 * x * r, r, 0.5)
    return tl.where(step == step, fused(r, step, r), r)  # no step at 0 and infinity


@triton.jit
def mean_and_rstd(x, keep, N: tl.constexpr, eps, RMS: tl.constexpr):
    """Statistics of the rows of a float32 tile whose columns beyond N hold anything; mean 0 for RMS."""
    x = tl.where(keep, x, 0.0)
    if RMS:
        mean = tl.zeros([x.shape[0]], tl.float32)
        centred = x
    else:
        mean = tl.sum(x, 1) * (1.0 / N)
        centred = tl.where(keep, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * (1.0 / N)
    return mean, inverse_sqrt(variance + tl.cast(eps, tl.float32))


@triton.jit
def norm_input_gradient(dnormed, normed, rstd, keep, N: tl.constexpr, RMS: tl.constexpr):
    """Gradient of a normalisation's input; ``dnormed`` is that of its output before weight and bias."""
    dnormed = tl.where(keep, dnormed, 0.0)
    along = tl.sum(dnormed * tl.where(keep, normed, 0.0), 1) * (1.0 / N)
    d = dnormed - normed * along[:, None]
    if not RMS:
        d -= (tl.sum(dnormed, 1) * (1.0 / N))[:, None]
    return d * rstd[:, None]


@triton.jit
def silu_and_slope(gate, PRECISE: tl.constexpr):
    """silu(gate) and its derivative, float32; precise for results that are stored so."""
    if PRECISE:
        # exp(x) = 2^p (1 + rest ln 2), where p + rest is x log2(e) to more digits than p has. The limits keep all of it
        # finite and change sigmoids under 1.7e-38.
        x = tl.minimum(tl.maximum(-gate, -104.0), 87.0)
        p = x * 1.4426950216293335
        rest = fused(x, 1.4426950216293335, -p) + x * 1.925963033500e-08
        power = tl.exp2(p)
        below = 1.0 + fused(power, rest * 0.6931471805599453, power)
        # A GPU's quotient is 2 units in the last place off, and a step of Newton's makes it less than one.
        sigmoid = 1.0 / below
        sigmoid = fused(sigmoid, fused(-below, sigmoid, 1.0), sigmoid)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def picked_tokens(idx_ptr, places, there, K, S, limit, stride, stride_token, FLAT: tl.constexpr):
    """Offsets, int64, of the tokens that entries ``places`` (T,) of an index pick, and whether they pick one.

    A flat index holds sample * S + token, one (B, K) tokens of its row's sample; entries outside 0..limit - 1 are
    padding.
    """
    token = tl.load(idx_ptr + places, mask=there, other=-1)
    picked = (token >= 0) & (token < limit)
    sample = places // K
    if FLAT:
        sample = token // S
        token = token % S
    return sample.to(tl.int64) * stride + token.to(tl.int64) * stride_token, picked


@triton.jit
def sum_of_run(x_ptr, order_ptr, begin, end, cols, stride, N: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    """For each of BLOCK_M runs order[begin:end], the sum of those rows of x, float32, in the order of the run."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, tl.max(end - begin, 0)):
        there = begin + k < end
        place = tl.load(order_ptr + begin + k, mask=there, other=0)
        keep = there[:, None] & (cols < N)[None, :]
        total += tl.load(x_ptr + row_offsets(place, stride) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["P", "ROWS"])
def _column_sums_kernel(partial_ptr, out_ptr, P, ROWS, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row i of the output has the sums of rows i * ROWS and on."""
    first = tl.program_id(1) * ROWS
    P = tl.minimum(P, first + ROWS)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(first, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        keep = (rows < P)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + row_offsets(rows, N) + cols[None, :], mask=keep, other=0.0)
    out = out_ptr + tl.program_id(1) * N + cols
    tl.store(out, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < N)


_SHARE = 256  # rows that one program sums


def column_sums(partials: Tensor, out: Tensor) -> Tensor:
    """out (N,) = sums of ``partials`` (programs, N) float32, in a fixed order.

    One kernel for all widths: that of a position embedding varies with the grid.
    """
    programs, width = partials.shape
    blocks = triton.cdiv(width, COLUMN_SUMS["BLOCK_N"])
    while programs > 2 * _SHARE:  # narrow parameters of many programs: one block alone would sum them all
        shares = triton.cdiv(programs, _SHARE)
        sums = torch.empty(shares, width, dtype=torch.float32, device=out.device)
        _triton.launch(_column_sums_kernel, (blocks, shares), COLUMN_SUMS, partials, sums, programs, _SHARE, width)
        partials, programs = sums, shares
    _triton.launch(_column_sums_kernel, (blocks, 1), COLUMN_SUMS, partials, out, programs, programs, width)
    return out


def parameter_partials(parameter: Tensor | None, need: bool, programs: int, device: torch.device) -> Tensor | None:
    """Where each program puts its sums for a parameter's gradient; None where nobody wants it."""
    if parameter is None or not need:
        return None
    return torch.empty(programs, parameter.numel(), dtype=torch.float32, device=device)


def alignment(*strides: int) -> int:
    """The largest of 16, 8, 4, 2 and 1 that divides all strides: for ``tl.multiple_of(offsets, [ALIGN, ALIGN])``.

    Of a stride the compiler itself knows whether 16 divides it, or nothing: heads of 88 or 72 channels would be loaded
    one element at a time. The hint belongs in the kernel: a function that it calls does not pass one back.
    """
    return math.gcd(16, *strides)


@triton.jit
def gelu_and_slope(x):
    """x Phi(x), the exact GELU, and its derivative, float32."""
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _scale_and_sum_kernel(
    x_ptr, layer_scale_ptr, row_scale_ptr, scaled_ptr, row_scaled_ptr, sum_ptr, M, stride_x, rows_per_sample,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.num_programs(0) * BLOCK_M
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(tl.program_id(0) * BLOCK_M, M, 16 * step):
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # of a few blocks: long sums would round much more
        for start in range(begin, tl.minimum(M, begin + 16 * step), step):
            rows = start + tl.arange(0, BLOCK_M)
            keep = (rows < M)[:, None] & (cols < N)[None, :]
            x = tl.load(x_ptr + row_offsets(rows, stride_x) + cols[None, :], mask=keep, other=0.0).to(tl.float32)
            out = row_offsets(rows, N) + cols[None, :]
            if row_scale_ptr is not None:
                x *= tl.load(row_scale_ptr + rows // rows_per_sample, mask=rows < M, other=0.0)[:, None]
            part += x
            if row_scaled_ptr is not None:
                tl.store(row_scaled_ptr + out, x.to(row_scaled_ptr.dtype.element_ty), mask=keep)
            if scaled_ptr is not None:
                if layer_scale_ptr is not None:
                    x *= tl.load(layer_scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
                tl.store(scaled_ptr + out, x.to(scaled_ptr.dtype.element_ty), mask=keep)
        total += part
    if sum_ptr is not None:
        tl.store(sum_ptr + tl.program_id(0) * N + cols, tl.sum(total, 0), mask=cols < N)


def scale_and_sum(
    x: Tensor, *, layer_scale: Tensor | None = None, row_scale: Tensor | None = None, scaled: Tensor | None = None,
    row_scaled: Tensor | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """One pass over rows x: ``row_scaled`` = row_scale x, ``scaled`` = layer_scale row_scale x, both contiguous, and
    ``sums`` (N,), the column sums of row_scale x; what is None is not written."""
    rows, width = x.shape
    if not width or (sums is None and not rows):
        return
    launch = row_pieces(width)
    pieces = triton.cdiv(width, launch["BLOCK_N"])
    programs = max(1, _triton.num_partials(rows, launch["BLOCK_M"], x.device) // pieces)
    partials = None if sums is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
    rows_per_sample = 1 if row_scale is None else rows // max(1, row_scale.numel())
    _triton.launch(
        _scale_and_sum_kernel, (programs, pieces), launch, x, layer_scale, row_scale, scaled, row_scaled, partials,
        rows, x.stride(0), max(1, rows_per_sample), N=width,
    )  # fmt: skip
    if partials is not None and sums is not None:
        column_sums(partials, sums)


def column_sums_of_rows(x: Tensor, out: Tensor) -> Tensor:
    """out (N,) = sums of x (rows, N) over the rows, in float32 and a fixed order: a bias's gradient."""
    scale_and_sum(x, sums=out)
    return out
