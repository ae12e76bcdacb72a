"""From arms to rows: gate, time, compare. Shared by every suite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from eva02_kernels.bench.machine import Roofline, environment, share_of_roofline
from eva02_kernels.bench.measure import (
    MIN_SAMPLE_S,
    Call,
    Saved,
    Spread,
    host_times,
    interleave,
    paired_ratio,
    peak_memory,
    spread,
    synchroniser,
)
from eva02_kernels.bench.providers import AGAIN, Provider

OK, UNSUPPORTED, GATE_FAILED, RAISED = "ok", "unsupported", "gate failed", "raised"


@dataclass(frozen=True)
class Config:
    """What a run measures and how; stored in its file, so that ``--verify`` can run it again."""

    suite: str
    models: tuple[str, ...]
    providers: tuple[str, ...] = ()  # none named: all
    ops: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    dtype: str = "float32"
    threads: int = 2
    rounds: int = 20
    min_sample_ms: float = MIN_SAMPLE_S * 1e3
    seed: int = 0
    device: str = "cpu"

    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Config:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**fields)

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Arm:
    """One provider in one case: what is timed, or why nothing is."""

    provider: Provider
    call: Call | None = None
    status: str = OK
    reason: str | None = None
    gate: dict[str, Any] | None = None
    first_call_s: float | None = None
    saved: Callable[[], Saved] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.provider.name

    def refuse(self, status: str, reason: str) -> Arm:
        self.status, self.reason, self.call = status, reason, None
        return self


# ---- gate -----------------------------------------------------------------------------------------------------------
def relative_error(value: Tensor, reference: Tensor) -> float:
    """rms of the difference over rms of the float64 reference."""
    if value.shape != reference.shape:
        return float("inf")
    difference = float((value.detach().double() - reference).square().mean().sqrt())
    scale = float(reference.square().mean().sqrt())
    error = difference / scale if scale else (0.0 if difference == 0.0 else float("inf"))
    return float("inf") if math.isnan(error) else error


def compare(
    results: Mapping[str, Tensor], plain: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, terms: int = 1
) -> dict:
    """Does an arm compute what the baseline computes? Every tensor within 4 times the baseline's error plus 16 eps.

    This asks whether the arms did the same work; how exact our operators are is the contract suite's question.
    ``terms``: tokens whose contributions a parameter's gradient sums. Eager sums pairwise, Inductor one after the
    other; terms that are equal, as they are after mean pooling, then round in step, and the sum is off by up to
    terms / 2 eps. The bound is at least that.
    """
    slack = max(16.0, terms / 2)
    worst: tuple[float, str] = (0.0, "")
    failures = []
    for name, expected in reference.items():
        if name not in results:
            failures.append(f"{name} is missing")
            continue
        eps = torch.finfo(plain[name].dtype).eps
        error, usual = relative_error(results[name], expected), relative_error(plain[name], expected)
        worst = max(worst, (error / eps, name))
        if not error <= 4 * usual + slack * eps:
            failures.append(f"{name}: relative error {error:.1e}, baseline {usual:.1e}")
    return {"passed": not failures, "worst_error_eps": round(worst[0], 2), "worst": worst[1], "failures": failures[:4]}


def empty_row(common: Mapping[str, Any], arm: Arm, env: dict[str, Any]) -> dict[str, Any]:
    """Every field a row has; what was not measured stays None."""
    measured = (
        "ms", "samples_ms", "host_ms", "ratio", "ratio_compiled", "resolved", "peak_memory_bytes", "saved_bytes",
        "saved_units", "saved_in_t", "saved_over_baseline", "images_per_s", "gflops", "gbps", "fma_share", "gemm_share",
        "roofline_share", "roofline_bound",
    )  # fmt: skip
    return {
        **common,
        "provider": arm.name,
        "baseline": arm.provider.baseline,
        "ours": arm.provider.ours,
        "status": arm.status,
        "reason": arm.reason,
        "gate": arm.gate,
        "first_call_s": arm.first_call_s,
        **dict.fromkeys(measured),
        "notes": arm.notes,
        "environment": env,
    }


# ---- timing and rows ------------------------------------------------------------------------------------------------
def measure_rows(
    common: Mapping[str, Any],
    arms: Sequence[Arm],
    config: Config,
    *,
    flops: float = 0,
    bytes_moved: float = 0,
    items: int = 0,
    roofline: Roofline | None = None,
) -> list[dict[str, Any]]:
    """Time every arm that passed its gate and give one row for each arm, those without a time included.

    Args:
        common: fields of every row, such as suite, case and mode.
        flops, bytes_moved: work of one call, for the roofline.
        items: images in one call.
    """
    timed = {arm.name: arm.call for arm in arms if arm.call is not None}
    synchronise = synchroniser(config.device)
    seconds = interleave(
        timed,
        config.rounds,
        min_sample_s=config.min_sample_ms / 1e3,
        seed=config.seed,
        on_round=None if roofline is None else lambda _: roofline.sample(),
        synchronise=synchronise,
    )
    baseline = next(a.name for a in arms if a.provider.baseline)
    again = baseline + AGAIN
    compiled = next((a.name for a in arms if a.provider.compiled and not a.provider.ours), None)
    env = environment(config.device)
    peaks: dict[str, float | None] = roofline.peaks() if roofline else {}
    noise = paired_ratio(seconds[baseline], seconds[again]) if {baseline, again} <= seconds.keys() else None
    rows = []
    for arm in arms:
        row = empty_row(common, arm, env)
        if arm.name in seconds:
            own = seconds[arm.name]
            ms = spread(own).scaled(1e3)
            row["ms"] = _record(ms)
            row["samples_ms"] = [round(1e3 * s, 5) for s in own]
            if baseline in seconds:
                ratio = paired_ratio(seconds[baseline], own)
                row["ratio"] = _record(ratio)
                row["resolved"] = noise is not None and arm.name not in (baseline, again) and _resolved(ratio, noise)
            if compiled in seconds:
                row["ratio_compiled"] = _record(paired_ratio(seconds[compiled], own))
            median_s = ms.median / 1e3
            if items:
                row["images_per_s"] = round(items / median_s, 3)
            if flops:
                row["gflops"] = round(flops / median_s / 1e9, 2)
                for name in ("fma", "gemm"):
                    rate = peaks.get(f"{name}_gflops")
                    if rate:
                        row[f"{name}_share"] = round(flops / median_s / 1e9 / rate, 4)
            if bytes_moved:
                row["gbps"] = round(bytes_moved / median_s / 1e9, 3)
            share, bound = share_of_roofline(median_s, flops, bytes_moved, peaks)
            row["roofline_share"], row["roofline_bound"] = share and round(share, 4), bound
            if config.device != "cpu":  # there a call returns when it is done, and ms says it all
                row["host_ms"] = _record(spread(host_times(timed[arm.name], config.rounds, synchronise)).scaled(1e3))
            # After the clock has stopped: both disturb caches and the allocator.
            row["peak_memory_bytes"] = peak_memory(timed[arm.name], config.device)
            if arm.saved is not None:
                row["saved_bytes"] = arm.saved().bytes
        rows.append(row)
    return rows


def _record(s: Spread) -> dict[str, float]:
    return {name: round(value, 5) for name, value in s._asdict().items()}


def _resolved(ratio: Spread, noise: Spread) -> bool:
    """Is the ratio a result, or could the baseline against itself have given it?"""
    return ratio.median > max(noise.p80, 1.0) or ratio.median < min(noise.p20, 1.0)
