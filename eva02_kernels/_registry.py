"""Which backend runs an operator, and why the others do not.

Every operator is an :class:`OpSpec`: schema, fake implementation, autograd formula, plain PyTorch reference, and its
backends in priority order. A backend answers a call with the list of reasons why it cannot take it; the first one
with no reason runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "eager")
"""Every backend name, in the order in which ``auto`` tries them."""

OP_NAMES = (
    "rope_attention",
    "rope_attention_packed",
    "apply_rope",
    "qkv_rope",
    "linear",
    "swiglu",
    "subln_swiglu",
    "swiglu_mlp",
    "gelu_mlp",
    "add_layer_norm",
    "gather_tokens",
    "scatter_tokens",
    "mask_tokens",
    "gather_layer_norm",
    "masked_cosine_loss",
    "clip_loss",
)


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    ``fwd`` and ``bwd`` take the operator's schema arguments without the trailing ``backend``. ``unsupported`` takes
    the direction (``"fwd"`` or ``"bwd"``) and the same arguments and returns the reasons for refusing them.
    """

    name: str
    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    unsupported: Callable[[str, tuple[Any, ...]], Sequence[str]]
    # Multiple of the tolerance rule's bounds that this backend is held to; above 1 only with the reason beside it.
    error_multiple: float = 1.0
    float32_multiple: float | None = None  # the same in float32, where it is another one

    def multiple(self, dtype: torch.dtype) -> float:
        wide = dtype == torch.float32 and self.float32_multiple is not None
        return self.float32_multiple if wide else self.error_multiple  # type: ignore[return-value]


@dataclass(frozen=True)
class Sample:
    """One set of inputs for tests and benchmarks: ``make(dtype, generator)`` gives (args, kwargs) of the public op."""

    id: str
    make: Callable[[torch.dtype, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    smoke: bool = False
    full: bool = False  # of EVA-02's own size: for `make test-full` alone


@dataclass(frozen=True)
class OpSpec:
    """All that the project knows of an operator; the one source for dispatch, tests, benchmarks and ``info``."""

    name: str
    summary: str
    formula: str
    source: str
    fwd_schema: str  # arguments without `backend`
    fwd_returns: str
    bwd_schema: str  # gradients, saved values, arguments, `bool[] needs`; without `backend`; returns Tensor[]
    canonical: Callable[..., tuple[Any, ...]]  # public arguments (without `backend`) -> fwd arguments
    reference: Callable[..., Any]  # fwd arguments -> differentiable outputs, in plain PyTorch
    fake_fwd: Callable[..., Any]
    fake_bwd: Callable[..., Any]
    setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    backward: Callable[..., Any]
    backends: tuple[Backend, ...]
    samples: Callable[[], list[Sample]]
    saved: str  # what is kept for backward, in words
    bytes_moved: Callable[..., tuple[int, int]]  # fwd arguments -> minimum bytes (forward, backward), weights excluded
    num_outputs: int = 1  # outputs of the public function; the rest of fwd_returns is kept for backward
    flops: Callable[..., tuple[int, int]] = field(default=lambda *args: (0, 0))
    # Least scale of a gradient that may vanish by cancellation: (leaf name, public arguments) -> rms of the terms that
    # are summed. Used by the tolerance rule.
    magnitude: Callable[..., float] | None = None

    def backend(self, name: str) -> Backend | None:
        return next((b for b in self.backends if b.name == name), None)


@dataclass(frozen=True)
class Selection:
    """Outcome of :func:`select`: the backend that runs, and why each of the others does not."""

    op: str
    backend: str
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        others = "; ".join(f"{name}: {', '.join(r)}" for name, r in self.reasons.items())
        return f"{self.op} -> {self.backend}" + (f" ({others})" if others else "")


_specs: dict[str, OpSpec] = {}
_stats: Counter[tuple[str, str, str]] = Counter()
# Plain module state, not context variables: autograd runs backward on threads of its own.
_strict_depth = 1 if os.environ.get("EVA02_STRICT", "0") not in ("", "0") else 0


def register(spec: OpSpec) -> OpSpec:
    if spec.name not in OP_NAMES:
        raise ValueError(f"{spec.name} is not listed in OP_NAMES")
    _specs[spec.name] = spec
    return spec


def get_spec(op: str) -> OpSpec:
    if op not in OP_NAMES:
        raise ValueError(f"op: expected one of {', '.join(OP_NAMES)}; got {op!r}")
    if op not in _specs:
        importlib.import_module(f"eva02_kernels.ops.{op}")
    return _specs[op]


def all_specs() -> list[OpSpec]:
    return [get_spec(name) for name in OP_NAMES]


def check_backend_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def _refusals(spec: OpSpec, name: str, direction: str, args: tuple[Any, ...]) -> list[str]:
    backend = spec.backend(name)
    if backend is None:
        return [f"this release has no {name} kernel for {spec.name}"]
    reasons = list(backend.unsupported(direction, args))
    if name == "eager" and _strict_depth:
        reasons.append("strict mode: auto must not end at eager")
    return reasons


def _refused(spec: OpSpec, backend: str, direction: str, args: tuple[Any, ...]) -> NotImplementedError:
    names = BACKENDS if backend == "auto" else (backend,)
    lines = [f"  {name}: {'; '.join(_refusals(spec, name, direction, args))}" for name in names]
    what = "no backend takes" if backend == "auto" else f"backend {backend!r} refuses"
    return NotImplementedError("\n".join([f"{spec.name} ({direction}): {what} these inputs:", *lines]))


def choose(spec: OpSpec, direction: str, backend: str, args: tuple[Any, ...]) -> Backend:
    """The backend that runs this call, counted in :func:`stats`. Raises where there is none."""
    for candidate in spec.backends:
        if backend == "auto":
            if candidate.name == "eager" and _strict_depth:
                continue
        elif candidate.name != backend:
            continue
        if not candidate.unsupported(direction, args):
            _stats[spec.name, direction, candidate.name] += 1
            return candidate
    raise _refused(spec, backend, direction, args)


def select(op: str, *args: Any, **kwargs: Any) -> Selection:
    """Tell which backend ``eva02_kernels.<op>(*args, **kwargs)`` runs on, and why each other one does not.

    Nothing is computed. Raises ``NotImplementedError`` with every reason where no backend takes the inputs, and
    ``ValueError`` for inputs that the operator itself refuses.
    """
    backend = kwargs.pop("backend", "auto")
    check_backend_name(backend)
    spec = get_spec(op)
    canonical = spec.canonical(*args, **kwargs)
    reasons: dict[str, list[str]] = {}
    chosen = None
    for name in BACKENDS:
        why = _refusals(spec, name, "fwd", canonical)
        if backend not in ("auto", name):
            why.insert(0, f"backend={backend!r} was asked for")
        if not why and chosen is None:
            chosen = name
        else:
            reasons[name] = why or [f"{chosen} comes first"]
    if chosen is None:
        raise _refused(spec, backend, "fwd", canonical)
    return Selection(op, chosen, reasons)


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Inside, ``backend="auto"`` raises instead of ending at eager. ``EVA02_STRICT=1`` does so for the process.

    ``strict(False)`` lifts it inside.
    """
    global _strict_depth
    before = _strict_depth
    _strict_depth = before + 1 if enabled else 0
    try:
        yield
    finally:
        _strict_depth = before


def stats() -> dict[tuple[str, str, str], int]:
    """Calls so far, by (operator, ``"fwd"`` or ``"bwd"``, backend that ran)."""
    return dict(_stats)


def reset_stats() -> None:
    """Set every count of :func:`stats` to zero."""
    _stats.clear()


def describe_tensor(t: Tensor | None) -> str:
    return "None" if t is None else f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"
