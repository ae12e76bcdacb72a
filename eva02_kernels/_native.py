"""Loads the compiled libraries. One that is missing or cannot load is a reason, never an import error."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY_DIR = Path(__file__).parent / "lib"
ISA_NAMES = ("baseline", "avx2", "avx512")
"""Instruction sets of the CPU library by number; on other CPUs than x86-64 only the first exists."""

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build_info() -> dict[str, Any]:
    """What the build recorded: compiler and flags, or under ``"missing"`` why there is no compiled library."""
    path = LIBRARY_DIR / "build_info.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def cpu_library() -> tuple[Path | None, str | None]:
    """(path, None) once the CPU library is loaded, else (None, the reason)."""
    path = LIBRARY_DIR / "libeva02_kernels_cpu.so"
    if not path.exists():
        missing = build_info().get("missing", "built without a C++ compiler, or the pure-Python wheel is installed")
        return None, f"no compiled CPU library ({missing})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return None, f"the compiled CPU library does not load: {error}"
    return path, None


class Library:
    """Operators of one compiled library by their names without its own: ``CPU.swiglu_fwd(gate, up, out)``.

    They fill the tensors that they are given.
    """

    def __init__(self, target: str) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Callable[..., None]:
        operator = getattr(torch.ops.eva02_kernels_C, f"{name}_{self.target}").default
        setattr(self, name, operator)
        return operator

    def inverse_token_index(self, idx: Tensor, batch: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """As ``ops._token_index`` defines it; on the CPU without a sort, and values are checked."""
        idx = idx.contiguous()
        entries = torch.empty(idx.numel(), dtype=torch.int32)
        offsets = torch.empty(batch * seq_len + 1, dtype=torch.int32)
        torch.ops.eva02_kernels_C.inverse_token_index_cpu.default(idx, batch, seq_len, entries, offsets)
        return entries, offsets


CPU = Library("cpu")


@functools.cache
def cpu_reasons() -> tuple[str, ...]:
    reason = cpu_library()[1]
    return () if reason is None else (reason,)


def cpu_unsupported(args: tuple[Any, ...]) -> tuple[str, ...]:
    """Reasons common to every CPU kernel; the operator's main tensor is the first argument."""
    main = args[0]
    if main.device.type != "cpu":
        return (f"needs CPU tensors, got {main.device}",)
    if main.dtype not in CPU_DTYPES:
        return (f"needs float32, bfloat16 or float16, got {str(main.dtype).removeprefix('torch.')}",)
    return cpu_reasons()


def cpu_isa() -> str:
    """Instruction set that the CPU kernels use here."""
    return ISA_NAMES[torch.ops.eva02_kernels_C.cpu_isa_get()]


def set_cpu_isa(name: str) -> None:
    """Make the CPU kernels use another instruction set that this CPU has (for tests and benchmarks)."""
    if name not in ISA_NAMES:
        raise ValueError(f"name: expected one of {', '.join(ISA_NAMES)}; got {name!r}")
    torch.ops.eva02_kernels_C.cpu_isa_set(ISA_NAMES.index(name))
