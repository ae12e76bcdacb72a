"""How launches are simulated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

ORDERS = ("in", "reverse", "random")


@dataclass(frozen=True)
class Options:
    """Fields as the arguments of :func:`options`."""

    seed: int = 0
    threads: int | None = None
    order: str = "in"
    outputs: tuple[torch.Tensor, ...] = ()
    bounds: str = "storage"
    races: bool | str = True
    uninit: str | bool = "use"
    numerics: str = "exact"
    budget: int = 0
    on_error: str = "raise"

    def __post_init__(self) -> None:
        for name, known in (
            ("order", ORDERS),
            ("bounds", ("storage", "view")),
            ("races", (True, False, "strict")),
            ("uninit", ("use", "load", False)),
            ("numerics", ("exact", "perturb")),
            ("on_error", ("raise", "collect")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}; got {value!r}")
        if self.threads is not None and not 1 <= self.threads <= 64:
            raise ValueError(f"threads: expected 1 to 64, or None for this machine's; got {self.threads!r}")

    def record(self) -> dict[str, Any]:
        """What the core reads."""
        return {
            "seed": self.seed,
            "order": self.order,
            "races": bool(self.races),
            "strict_races": self.races == "strict",
            "uninit": bool(self.uninit),
            "uninit_at_load": self.uninit == "load",
            "collect": self.on_error == "collect",
            "budget": self.budget,
            "threads": self.threads or min(os.cpu_count() or 1, 4),
        }

    @property
    def perturbation(self) -> int:
        """What decides how numerics are perturbed; 0 for not at all."""
        return 0 if self.numerics == "exact" else (0x9E3779B97F4A7C15 * (self.seed + 1)) % 2**64


_current = Options()


def current() -> Options:
    return _current


@contextlib.contextmanager
def options(
    *,
    seed: int | None = None,
    threads: int | None = None,
    order: str | None = None,
    outputs: Sequence[torch.Tensor] | None = None,
    bounds: str | None = None,
    races: bool | str | None = None,
    uninit: str | bool | None = None,
    numerics: str | None = None,
    budget: int | None = None,
    on_error: str | None = None,
) -> Iterator[None]:
    """Inside, launches are simulated so; what is not given stays as it is outside.

    Args:
        seed: of the order in which warps run, and of ``order="random"``. 0 runs warps by their number.
        threads: of the host, among which the CTAs are shared (default: this machine's, at most 4). Results, counters
            and faults do not depend on it; kernels that order their CTAs themselves (atomics, acquire, release) run on
            one.
        order: of CTAs: ``"in"``, ``"reverse"`` or ``"random"``, among those that a GPU holds together where they wait
            for each other.
        outputs: tensors that hold nothing yet: they must be written completely and not be used before.
        bounds: ``"storage"``: a tensor's whole storage may be accessed; ``"view"``: its own elements alone.
        races: look for them; ``"strict"``: equal values written by two CTAs are one too.
        uninit: ``"use"``: unwritten bytes may be loaded, not used; ``"load"``: not loaded either; False: not followed.
        numerics: ``"exact"``: each operation as PTX defines it, rounded once; ``"perturb"``: what a GPU may do
            otherwise, by the seed: approximate functions within PTX's stated error, products fused with sums,
            truncating matrix products, another winner among lanes that collide.
        budget: instructions that a warp may execute (0: 2 billion).
        on_error: ``"raise"`` the first, or ``"collect"`` one of each kind and instruction in ``report.errors``.
    """
    global _current
    given: dict[str, Any] = {
        "seed": seed,
        "threads": threads,
        "order": order,
        "outputs": None if outputs is None else tuple(outputs),
        "bounds": bounds,
        "races": races,
        "uninit": uninit,
        "numerics": numerics,
        "budget": budget,
        "on_error": on_error,
    }
    before = _current
    _current = replace(before, **{k: v for k, v in given.items() if v is not None})
    try:
        yield
    finally:
        _current = before
