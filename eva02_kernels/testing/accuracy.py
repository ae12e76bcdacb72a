"""The tolerance rule: errors against a float64 reference, measured in the errors of plain PyTorch.

With ``s = |ref| + rms(ref)`` and eps of the tested dtype, a result passes when ``max(|out - ref| / s) <= 2 E_max +
eps`` and ``rms(out - ref) <= 1.5 E_rms + eps / 4 rms(ref)``. E is the error of plain PyTorch, the better of two runs:
the reference in the tested dtype, and the reference in float32 rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """Error of a tensor against float64: the largest relative to s, and the rms relative to that of the reference."""

    max: float
    rms: float


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


def measure_error(out: Tensor, ref: Tensor, *, floor: float = 0.0) -> Error:
    """Error of ``out`` against float64 ``ref``.

    ``floor`` is the least scale of an element: the rms of the terms whose sum it is, for a sum that may vanish.
    """
    if out.shape != ref.shape:
        raise AssertionError(f"expected shape {tuple(ref.shape)}; got {tuple(out.shape)}")
    if ref.numel() == 0:
        return Error(0.0, 0.0)
    out, ref = out.detach().double(), ref.detach().double()
    same = (out == ref) | (out.isnan() & ref.isnan())  # equal infinities
    difference = torch.where(same, 0.0, out - ref)
    difference = torch.where(difference.isnan(), torch.inf, difference)
    finite = torch.where(ref.isfinite(), ref, 0.0)
    rms = max(_rms(finite), floor)
    scale = finite.abs() + rms
    return Error(float((difference.abs() / scale.clamp(min=1e-300)).max()), _rms(difference) / max(rms, 1e-300))


def assert_accurate(
    out: Tensor,
    ref: Tensor,
    plain: Sequence[Error],
    *,
    name: str = "out",
    dtype: torch.dtype | None = None,
    floor: float = 0.0,
    multiple: float = 1.0,
) -> None:
    """Raise AssertionError unless ``out`` is as close to the float64 ``ref`` as the rule above asks.

    Args:
        plain: errors of the plain runs (:func:`measure_error`); the better one counts. For outputs under 1,024
            elements each should be the largest over 16 seeds, since one seed may be exact by chance; they then count
            for at least 2 eps.
        dtype: the tested dtype (default: that of ``out``).
        multiple: factor of both bounds, for a backend that has a reason for one.
    """
    eps = torch.finfo(dtype or out.dtype).eps
    least = 2 * eps if ref.numel() < 1024 else 0.0
    allowed_max = multiple * (2 * max(least, min(e.max for e in plain)) + eps)
    allowed_rms = multiple * (1.5 * max(least, min(e.rms for e in plain)) + eps / 4)
    error = measure_error(out, ref, floor=floor)
    if not (error.max <= allowed_max and error.rms <= allowed_rms):
        raise AssertionError(
            f"{name}: error against float64 is {error.max:.3e} (allowed {allowed_max:.3e}) at most and "
            f"{error.rms:.3e} rms (allowed {allowed_rms:.3e}), in parts of the value plus its rms; shape "
            f"{tuple(ref.shape)}, eps {eps:.1e}"
        )
