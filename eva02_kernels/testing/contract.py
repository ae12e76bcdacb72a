"""The contract that every operator keeps on every backend; ``tests/test_contract.py`` runs it over all of them.

``python -m eva02_kernels.testing`` runs its smoke part on an installed package.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import eva02_kernels
from eva02_kernels._registry import OpSpec, Sample, get_spec
from eva02_kernels.rope import RopeTable
from eva02_kernels.testing.accuracy import Error, assert_accurate, measure_error

SMALL = 1024  # outputs under this many elements are judged by the plain errors of several seeds
SEEDS = 16


class Inputs(NamedTuple):
    """Arguments of a public operator, and which of the tensors in them take gradients (by name)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: dict[str, Tensor]


class Result(NamedTuple):
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def _map(obj: Any, function: Callable[[str, Tensor], Tensor], name: str, memo: dict[int, Tensor], device: str) -> Any:
    """The same structure on ``device`` with every tensor replaced but those of axis tables, which are constants.

    One tensor in two places stays one.
    """
    if isinstance(obj, Tensor):
        if id(obj) not in memo:
            memo[id(obj)] = function(name, obj)
        return memo[id(obj)]
    if isinstance(obj, RopeTable) and obj.grid is not None:
        return obj.to(device)
    if isinstance(obj, RopeTable):
        fields = {
            f.name: _map(getattr(obj, f.name), function, f"{name}.{f.name}", memo, device)
            for f in dataclasses.fields(obj)
            if isinstance(getattr(obj, f.name), Tensor)
        }
        return dataclasses.replace(obj, **fields)
    if isinstance(obj, tuple | list):
        return type(obj)(_map(o, function, f"{name}[{i}]", memo, device) for i, o in enumerate(obj))
    if isinstance(obj, dict):
        return {k: _map(o, function, k, memo, device) for k, o in obj.items()}
    return obj


def cast(inputs: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype | None, device: str = "cpu") -> Inputs:
    """Fresh leaves with the values of ``inputs``, in ``dtype`` (None: as they are). ``row_scale`` takes no gradient."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, t: Tensor) -> Tensor:
        if t.device.type == "meta":
            return t
        if not t.is_floating_point() or name == "row_scale":
            return t.to(device)
        fresh = t.detach().to(device, dtype or t.dtype)
        if fresh is t.detach() or fresh.data_ptr() == t.data_ptr():
            # Strides are part of a sample: clone the storage, not the values only.
            fresh = torch.as_strided(
                fresh.new_empty(max(1, t.untyped_storage().size() // t.element_size())),
                t.shape,
                t.stride(),
                t.storage_offset(),
            ).copy_(fresh)
        fresh.requires_grad_()
        leaves[name] = fresh
        return fresh

    memo: dict[int, Tensor] = {}
    args = tuple(_map(a, leaf, f"arg{i}", memo, device) for i, a in enumerate(inputs[0]))
    kwargs = _map(inputs[1], leaf, "", memo, device)
    return Inputs(args, kwargs, leaves)


def make(sample: Sample, dtype: torch.dtype, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return sample.make(dtype, torch.Generator().manual_seed(seed))


def spread(inputs: tuple[tuple[Any, ...], dict[str, Any]], step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same values as views into wider rows: every ``step``-th column of them."""

    def view(name: str, t: Tensor) -> Tensor:
        if t.device.type == "meta" or t.dim() == 0 or not t.is_floating_point():
            return t
        wide = t.new_full((*t.shape[:-1], step * t.shape[-1] + 3), float("nan"))
        return wide[..., : step * t.shape[-1] : step].copy_(t)

    memo: dict[int, Tensor] = {}
    args = tuple(_map(a, view, f"arg{i}", memo, "cpu") for i, a in enumerate(inputs[0]))
    return args, _map(inputs[1], view, "", memo, "cpu")


def output_grads(outputs: dict[str, Tensor], seed: int) -> list[Tensor]:
    """Incoming gradients, rounded to bfloat16 so that they are the same in every dtype."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype).to(o.device) for o in outputs.values()]


def run(op: str, inputs: Inputs, *, seed: int = 0, function: Callable[..., Any] | None = None, **kwargs: Any) -> Result:
    """Forward, and the gradient of every leaf for random incoming gradients of every output."""
    function = function or getattr(eva02_kernels, op)
    result = function(*inputs.args, **inputs.kwargs, **kwargs)
    result = result if isinstance(result, tuple) else (result,)
    outputs = {f"out{i}": o for i, o in enumerate(result)}
    wanted = [o for o in outputs.values() if o.requires_grad]
    grads = [g for o, g in zip(outputs.values(), output_grads(outputs, seed), strict=True) if o.requires_grad]
    leaves = inputs.leaves
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if wanted and leaves:
        found = torch.autograd.grad(wanted, list(leaves.values()), grads, allow_unused=True)
    return Result(
        {k: o.detach() for k, o in outputs.items()},
        {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(leaves.items(), found, strict=True)},
    )


@functools.lru_cache(maxsize=256)
def _reference(op: str, sample_id: str, dtype: torch.dtype, seed: int) -> tuple[Result, Result, Result]:
    """(float64, tested dtype, float32) runs of the reference on the same rounded inputs."""
    sample = next(s for s in get_spec(op).samples() if s.id == sample_id)
    inputs = make(sample, dtype, seed)
    runs = [cast(inputs, kind) for kind in (torch.float64, None, torch.float32)]
    return tuple(run(op, r, seed=seed, backend="eager") for r in runs)  # type: ignore[return-value]


def reference(op: str, sample_id: str, dtype: torch.dtype) -> Result:
    """Outputs and gradients of the float64 reference, on the CPU."""
    return _reference(op, sample_id, dtype, 0)[0]


def _floor(spec: OpSpec, name: str, dtype: torch.dtype, sample: Sample, seed: int) -> float:
    if spec.magnitude is None:
        return 0.0
    inputs = cast(make(sample, dtype, seed), torch.float64)
    return spec.magnitude(name, *inputs.args, **inputs.kwargs)


@functools.lru_cache(maxsize=256)
def plain_errors(op: str, sample_id: str, dtype: torch.dtype, name: str, kind: str) -> tuple[tuple[Error, ...], float]:
    """Errors of the two plain runs for one output or gradient (``kind``), and its scale's floor."""
    spec = get_spec(op)
    sample = next(s for s in spec.samples() if s.id == sample_id)
    floor = _floor(spec, name, dtype, sample, 0) if kind == "grads" else 0.0
    first = _reference(op, sample_id, dtype, 0)
    size = getattr(first[0], kind)[name].numel()
    worst = [Error(0.0, 0.0), Error(0.0, 0.0)]
    for seed in range(SEEDS if 0 < size < SMALL else 1):
        exact, low, wide = (getattr(r, kind)[name] for r in _reference(op, sample_id, dtype, seed))
        for i, plain in enumerate((low, wide.to(low.dtype))):
            error = measure_error(plain, exact, floor=floor)
            worst[i] = Error(max(worst[i].max, error.max), max(worst[i].rms, error.rms))
    return tuple(worst), floor


def check_accuracy(op: str, sample: Sample, dtype: torch.dtype, backend: str, *, device: str = "cpu") -> Result:
    """Outputs and gradients of ``backend`` within the tolerance rule of the float64 reference."""
    inputs = cast(make(sample, dtype), None, device)
    before = {k: t.detach().clone() for k, t in inputs.leaves.items()}
    result = run(op, inputs, backend=backend)
    implementation = get_spec(op).backend(backend)
    assert implementation is not None
    exact = reference(op, sample.id, dtype)
    for kind in ("outputs", "grads"):
        for name, value in getattr(result, kind).items():
            errors, floor = plain_errors(op, sample.id, dtype, name, kind)
            expected = getattr(exact, kind)[name]
            assert_accurate(
                value.cpu(),
                expected,
                errors,
                name=f"{op} {sample.id} {kind} {name}",
                # A float32 loss of 16-bit inputs is judged as float32; a float32 gradient goes through saved values of
                # the tested dtype.
                dtype=value.dtype if kind == "outputs" else dtype,
                floor=floor,
                multiple=implementation.multiple(dtype),
            )
    for name, t in inputs.leaves.items():
        if not torch.equal(t.detach(), before[name]):
            raise AssertionError(f"{op} {sample.id}: the input {name} was changed")
    return result


def check_compiled(op: str, sample: Sample, compiler: str, *, device: str = "cpu", **options: Any) -> None:
    """The public function under ``torch.compile(fullgraph=True)`` gives what it gives without."""
    inputs = cast(make(sample, torch.float32), None, device)
    expected = run(op, inputs, **options)
    function = torch.compile(getattr(eva02_kernels, op), fullgraph=True, backend=compiler)
    found = run(op, inputs, function=function, **options)
    for kind in ("outputs", "grads"):
        for name, value in getattr(expected, kind).items():
            torch.testing.assert_close(getattr(found, kind)[name], value)


def refusal(op: str, sample: Sample, dtype: torch.dtype, backend: str, *, device: str = "cpu") -> list[str]:
    """Reasons why ``backend`` does not take the sample; empty where it does."""
    spec = get_spec(op)
    implementation = spec.backend(backend)
    if implementation is None:
        return [f"no {backend} kernel"]
    args, kwargs, _ = cast(make(sample, dtype), None, device)
    return list(implementation.unsupported("fwd", spec.canonical(*args, **kwargs)))


def smoke(backends: Sequence[str] = ("cpu", "eager")) -> tuple[int, list[str]]:
    """Run the smoke samples; returns how many checks passed, and the reasons of those that a backend refused."""
    passed, refused = 0, []
    for op in eva02_kernels._registry.OP_NAMES:
        for sample in get_spec(op).samples():
            if not sample.smoke:
                continue
            for backend in backends:
                # In 16 bits eager is the yardstick itself.
                for dtype in (torch.float32, torch.bfloat16) if backend != "eager" else (torch.float32,):
                    reasons = refusal(op, sample, dtype, backend)
                    if reasons:
                        refused.append(f"{op} {backend}: {'; '.join(reasons)}")
                        continue
                    check_accuracy(op, sample, dtype, backend)
                    passed += 1
    return passed, refused
