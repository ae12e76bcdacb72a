"""Ways of running operators that only tests use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    """Inside, ``torch.empty`` gives NaN, so that an element which a kernel leaves out is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
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


@contextlib.contextmanager
def executing(mode: str) -> Iterator[None]:
    """Inside, the Triton backend takes CPU tensors and runs its kernels on the CPU.

    Args:
        mode: ``"interpreter"``: Triton's interpreter executes the kernels' source. Kernels are decorated once, so the
            process must have been started with ``TRITON_INTERPRET=1``.
    """
    if mode != "interpreter":
        raise ValueError(f"mode: expected 'interpreter'; got {mode!r}")
    from triton import knobs

    if not knobs.runtime.interpret:
        raise RuntimeError("executing('interpreter'): start the process with TRITON_INTERPRET=1")
    from triton.runtime.interpreter import InterpreterBuilder

    before, _triton.executing = _triton.executing, mode
    cast = InterpreterBuilder.cast_impl
    InterpreterBuilder.cast_impl = _bfloat16_casts(cast)
    try:
        yield
    finally:
        _triton.executing = before
        InterpreterBuilder.cast_impl = cast
