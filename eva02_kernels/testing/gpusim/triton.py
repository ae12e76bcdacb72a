"""Triton on the simulator: a driver whose launches are simulated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from eva02_kernels.testing.gpusim.launch import run_ptx
from eva02_kernels.testing.gpusim.report import Report
from eva02_kernels.testing.offline import triton_driver


def _ptx_is_the_binary(backend: Any = None, stages: Any = None, *_: Any, **__: Any) -> Any:
    """A hook on Triton's compiler that ends at PTX: nothing here needs ptxas."""
    if backend is None:
        return "gpusim", "gpusim"
    stages["cubin"] = lambda src, metadata: src.encode()
    return None


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


def _arguments(src: Any, args: tuple[Any, ...]) -> tuple[list[str], list[Any]]:
    """Names and values of the arguments that are parameters of the compiled kernel."""
    names, values = [], []
    for name, value in zip(src.fn.arg_names, args, strict=True):
        kind = src.signature[name]
        if kind == "constexpr":
            continue
        kinds = list(_flatten(kind))
        for k, v in zip(kinds, _flatten(value), strict=True):
            if k != "constexpr":
                names.append(name)
                values.append(float(v) if k in ("fp32", "fp64") and not isinstance(v, torch.Tensor) else v)
    return names, values


@contextlib.contextmanager
def driver(target: int = 80, on_report: Callable[[Report], None] | None = None) -> Iterator[list[Report]]:
    """Inside, Triton kernels called with CPU tensors run on the simulator; gives the list of their reports.

    Args:
        target: compute capability whose PTX is executed; 80, 86 or 89.
        on_report: called with each report, which is then not kept.
    """
    from triton import knobs
    from triton.runtime.driver import driver as active

    if target not in (80, 86, 89):
        raise ValueError(f"target: expected 80, 86 or 89; got {target}")
    if knobs.runtime.interpret:
        raise RuntimeError("gpusim.driver: not in a process with TRITON_INTERPRET=1")
    reports: list[Report] = []

    def on_launch(src: Any, metadata: Any, binary: bytes, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        names, values = _arguments(src, args)
        scratch = []  # global and profiling scratch: two pointers behind the arguments
        for size in (metadata.global_scratch_size, metadata.profile_scratch_size):
            scratch.append(torch.empty(size * grid[0] * grid[1] * grid[2], dtype=torch.uint8) if size else 0)
        report = run_ptx(
            binary.decode(), metadata.name, grid=grid, block=(32 * metadata.num_warps, 1, 1),
            args=[*values, *scratch], shared_bytes=metadata.shared, names=[*names, "scratch", "profile scratch"],
        )  # fmt: skip
        on_report(report) if on_report else reports.append(report)

    before = active._active, knobs.runtime.add_stages_inspection_hook
    active.set_active(triton_driver(target, on_launch, key="simulator"))
    knobs.runtime.add_stages_inspection_hook = _ptx_is_the_binary
    try:
        yield reports
    finally:
        active._active, knobs.runtime.add_stages_inspection_hook = before


def run_triton(kernel: Any, grid: Any, *args: Any, target: int = 80, **kwargs: Any) -> Report:
    """Compile a ``triton.jit`` function for ``target`` and run it once over CPU tensors, which are written in place.

    Args:
        kernel: the function; with ``num_warps``, ``num_stages`` and its ``tl.constexpr`` arguments in ``kwargs``.
        grid: CTAs, or a function of the arguments as in a launch.

    Raises: TypeError for an interpreted function; a :class:`SimulationError` for the first fault.
    """
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        name = getattr(kernel, "__name__", repr(kernel))
        raise TypeError(f"kernel: expected a compiled triton.jit function; {name} is {type(kernel).__name__}")
    with driver(target) as reports:
        kernel[grid](*args, **kwargs)
    return reports[-1]
