"""Arms of a benchmark. They are registered, so that the runner has no branch for any of them.

>>> @provider("mine", suites=("ops",), op="swiglu")
... def mine(problem):
...     import my_library                      # missing: the row says so
...     if problem.device == "cpu":
...         raise Unsupported("needs a GPU")   # so does this one
...     return lambda gate, up: my_library.swiglu(gate, up)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

AGAIN = "/again"
"""Suffix of the A/A arm: the baseline measured a second time, as if it were another arm."""


class Unsupported(Exception):
    """Why an arm cannot run here; becomes its row's reason."""


@dataclass(frozen=True)
class Provider:
    """``build(case)`` gives what is called and timed; what it means is the suite's affair."""

    name: str
    suites: tuple[str, ...]
    build: Callable[[Any], Any]
    op: str | None = None  # of one operator only
    baseline: bool = False
    ours: bool = False
    compiled: bool = False


_providers: list[Provider] = []


def provider(
    name: str,
    *,
    suites: tuple[str, ...],
    op: str | None = None,
    baseline: bool = False,
    ours: bool = False,
    compiled: bool = False,
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register the decorated function as an arm of ``suites`` (of operator ``op``, where given)."""

    def register(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        new = Provider(name, suites, build, op, baseline, ours, compiled)
        if any(p.name == name and p.op == op and set(p.suites) & set(suites) for p in _providers):
            raise ValueError(f"provider {name!r} is already registered for {op or suites}")
        _providers.append(new)
        return build

    return register


def unregister(build: Callable[[Any], Any]) -> None:
    """Take back what :func:`provider` registered."""
    _providers[:] = [p for p in _providers if p.build is not build]


def providers(suite: str, op: str | None = None, names: list[str] | None = None) -> list[Provider]:
    """Arms of a suite, the baseline first and its second run (A/A) right after it.

    ``names`` selects arms; the baseline and the A/A arm stay, every ratio needs them.
    """
    found = [p for p in _providers if suite in p.suites and p.op in (None, op)]
    if names:
        found = [p for p in found if p.baseline or p.name in names]
    found.sort(key=lambda p: not p.baseline)
    if not found or not found[0].baseline or (len(found) > 1 and found[1].baseline):
        raise ValueError(f"suite {suite}: exactly one provider must be the baseline")
    first = found[0]
    again = Provider(first.name + AGAIN, first.suites, first.build, first.op, compiled=first.compiled)
    return [first, again, *found[1:]]


def provider_names(suite: str) -> list[str]:
    """Names of the suite's arms, those of its parts (``memory/ops``) included."""
    return list(dict.fromkeys(p.name for p in _providers if any(s.split("/")[0] == suite for s in p.suites)))


def build(arm: Provider, case: Any) -> Any:
    """``arm.build(case)``; a package that is not installed is a reason like any other."""
    try:
        return arm.build(case)
    except ImportError as error:
        name = (error.name or str(error)).partition(".")[0]
        raise Unsupported(f"{name} is not installed" if error.name else f"does not import: {error}") from error
