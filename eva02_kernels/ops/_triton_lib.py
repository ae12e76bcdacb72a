"""Device functions that the Triton kernels share, and the second stage of their two-stage sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eva02_kernels import _triton
from eva02_kernels._launch import COLUMN_SUMS

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
def mean_and_rstd(x, keep, N: tl.constexpr, eps, RMS: tl.constexpr):
    """Statistics of the rows of a float32 tile whose columns beyond N hold anything; mean 0 for RMS."""
    x = tl.where(keep, x, 0.0)
    if RMS:
        mean = tl.zeros([x.shape[0]], tl.float32)
        centred = x
    else:
        mean = tl.sum(x, 1) / N
        centred = tl.where(keep, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / N
    return mean, 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float32))


@triton.jit
def norm_input_gradient(dnormed, normed, rstd, keep, N: tl.constexpr, RMS: tl.constexpr):
    """Gradient of a normalisation's input; ``dnormed`` is that of its output before weight and bias."""
    dnormed = tl.where(keep, dnormed, 0.0)
    along = tl.sum(dnormed * tl.where(keep, normed, 0.0), 1) / N
    d = dnormed - normed * along[:, None]
    if not RMS:
        d -= (tl.sum(dnormed, 1) / N)[:, None]
    return d * rstd[:, None]


@triton.jit
def silu_and_slope(gate):
    """silu(gate) and its derivative, float32."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def _column_sums_kernel(partial_ptr, out_ptr, P, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        keep = (rows < P)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * N + cols[None, :], mask=keep, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < N)


def column_sums(partials: Tensor, out: Tensor) -> Tensor:
    """out (N,) = sums of ``partials`` (programs, N) float32, in a fixed order."""
    programs, width = partials.shape
    grid = (triton.cdiv(width, COLUMN_SUMS["BLOCK_N"]),)
    _triton.launch(_column_sums_kernel, grid, COLUMN_SUMS, partials, out, programs, N=width)
    return out


def parameter_partials(parameter: Tensor | None, need: bool, programs: int, device: torch.device) -> Tensor | None:
    """Where each program puts its sums for a parameter's gradient; None where nobody wants it."""
    if parameter is None or not need:
        return None
    return torch.empty(programs, parameter.numel(), dtype=torch.float32, device=device)
