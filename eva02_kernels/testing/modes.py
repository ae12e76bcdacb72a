"""Ways of running operators that only tests use."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import deterministic as memory

from eva02_kernels import _native, _triton


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Inside, the CPU kernels use the named instruction set (``baseline``, ``avx2``, ``avx512``)."""
    before = _native.cpu_isa()
    _native.set_cpu_isa(name)
    try:
        yield
    finally:
        _native.set_cpu_isa(before)


@contextlib.contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` and the CPU kernels' workspaces hold NaN: an element that a kernel leaves out is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    workspaces = _native.fill_workspaces_with_nan(True)
    try:
        yield
    finally:
        _native.fill_workspaces_with_nan(workspaces)
        memory.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _bfloat16_casts(cast: Any) -> Any:
    """The interpreter's cast, rounding float32 to the nearest bfloat16 as compiled kernels do; Triton 3.8 truncates."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return cast(self, src, dst_type)

    return cast_impl


class _Bounds:
    """The memory of the tensors that the kernel being interpreted was given; a load or store beyond it is an error."""

    def __init__(self) -> None:
        self.starts = self.ends = np.empty(0, np.uint64)

    def noting(self, init_args: Any) -> Any:
        """The interpreter's preparation of arguments, which also notes where their memory is."""

        def init(executor: Any, args: Any, kwargs: Any) -> Any:
            storages = (a.untyped_storage() for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
            ranges = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
            self.starts, self.ends = np.array(ranges, np.uint64).reshape(-1, 2).T
            return init_args(executor, args, kwargs)

        return init

    def checking(self, access: Any, mask_at: int, what: str) -> Any:
        """The interpreter's masked load or store, whose argument number ``mask_at`` is the mask."""

        def checked(builder: Any, pointers: Any, *rest: Any) -> Any:
            from triton.runtime.interpreter import _get_np_dtype

            at = pointers.data[rest[mask_at].data.astype(bool)]
            if at.size:
                last = at + np.uint64(_get_np_dtype(pointers.get_element_ty()).itemsize)
                place = np.searchsorted(self.starts, at, side="right")
                outside = (place == 0) | (last > self.ends[place - 1]) if self.ends.size else np.ones(at.shape, bool)
                if outside.any():
                    raise IndexError(f"{what} outside the kernel's tensors: {int(outside.sum())} of {at.size} elements")
            return access(builder, pointers, *rest)

        return checked


# The CUDA operators built for the simulator; another build's with EVA02_CUDA_SIMULATED=file.
CUDA_SIMULATED = Path(
    os.environ.get("EVA02_CUDA_SIMULATED", Path(__file__).parent / "gpusim" / "libeva02_kernels_cuda.so")
)


@functools.cache
def _cuda_runtime() -> Any:
    """The CUDA operators built for the simulator, loaded for torch and for their reports."""
    from eva02_kernels.testing import gpusim

    if not CUDA_SIMULATED.exists():
        raise RuntimeError(
            f"{CUDA_SIMULATED.name} is missing: run `make cuda-simulator` in a source tree, with an nvcc"
        )
    torch.ops.load_library(str(CUDA_SIMULATED))
    return gpusim.Runtime(CUDA_SIMULATED)


def _simulated_call(operator: Any, on_report: Callable[[Any], None]) -> Callable[..., None]:
    """``operator`` of the CUDA library, whose schema says which tensors its kernels read and which they fill."""
    arguments = operator._schema.arguments

    def call(*args: Any) -> None:
        tensors = {a.name: t for a, t in zip(arguments, args, strict=True) if isinstance(t, torch.Tensor) and t.numel()}
        outputs = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        read = {t.data_ptr() for name, t in tensors.items() if name not in outputs}
        outputs = {name for name in outputs if name in tensors and tensors[name].data_ptr() not in read}  # not in place
        with _cuda_runtime().launches(
            {name: t for name, t in tensors.items() if name not in outputs},
            outputs={name: t for name, t in tensors.items() if name in outputs},
        ) as reports:
            operator(*args)
        for report in reports:
            on_report(report)

    return call


@contextlib.contextmanager
def _simulator(on_report: Callable[[Any], None]) -> Iterator[None]:
    from eva02_kernels.testing import gpusim

    library = _native.CUDA
    before = _triton.executing, _triton.target_arch, _native.simulated, library._around
    with gpusim.driver(80, on_report=on_report):
        _triton.executing, _triton.target_arch = "simulator", 80
        _native.simulated = CUDA_SIMULATED.exists()
        if _native.simulated:
            _cuda_runtime()
            library.around(lambda operator: _simulated_call(operator, on_report))
        try:
            yield
        finally:
            _triton.executing, _triton.target_arch, _native.simulated, around = before
            library.around(around)


@contextlib.contextmanager
def executing(mode: str, *, on_report: Callable[[Any], None] = lambda report: None) -> Iterator[None]:
    """Inside, the Triton backend (simulated the CUDA backend too) takes CPU tensors and runs its kernels on the CPU.

    Args:
        mode: ``"interpreter"``: Triton's interpreter executes the kernels' source, and a load or store outside the
            memory of a kernel's tensors raises. Kernels are decorated once, so the process must have been started with
            ``TRITON_INTERPRET=1``. ``"simulator"``: :mod:`eva02_kernels.testing.gpusim` executes the compiled kernels'
            PTX for compute capability 8.0, with all its checks; errors are its exceptions. The CUDA backend takes part
            where its library for the simulator was built (``make cuda-simulator``).
        on_report: called with the simulator's report of each launch.
    """
    if mode == "simulator":
        with _simulator(on_report):
            yield
        return
    if mode != "interpreter":
        raise ValueError(f"mode: expected 'interpreter' or 'simulator'; got {mode!r}")
    from triton import knobs

    if not knobs.runtime.interpret:
        raise RuntimeError("executing('interpreter'): start the process with TRITON_INTERPRET=1")
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    bounds = _Bounds()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    changes = (
        (InterpreterBuilder, "cast_impl", _bfloat16_casts(InterpreterBuilder.cast_impl)),
        (InterpreterBuilder, "create_masked_load", bounds.checking(load, 0, "load")),
        (InterpreterBuilder, "create_masked_store", bounds.checking(store, 1, "store")),
        (GridExecutor, "_init_args_hst", bounds.noting(GridExecutor._init_args_hst)),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    executing_before, _triton.executing = _triton.executing, mode
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        _triton.executing = executing_before
        for owner, name, value in before:
            setattr(owner, name, value)
