"""Loads the compiled libraries. One that is missing or cannot load is a reason, never an import error."""

from __future__ import annotations

import ctypes
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        self._around: Callable[[Any], Any] | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        call = getattr(torch.ops.eva02_kernels_C, f"{name}_{self.target}").default
        if self._around is not None:
            return self._around(call)
        setattr(self, name, call)  # found without this function from now on
        return call

    def around(self, wrap: Callable[[Any], Any] | None) -> None:
        """From now on, call what ``wrap`` makes of an operator in its place; None: the operator itself."""
        self.__dict__ = {"target": self.target, "_around": wrap}

    def inverse_token_index(self, idx: Tensor, batch: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """As ``ops._token_index`` defines it; on the CPU without a sort, and values are checked."""
        if self.target == "cuda":
            from eva02_kernels.ops._token_index import inverse_token_index

            return inverse_token_index(idx, batch, seq_len)
        idx = idx.contiguous()
        entries = torch.empty(idx.numel(), dtype=torch.int32)
        offsets = torch.empty(batch * seq_len + 1, dtype=torch.int32)
        torch.ops.eva02_kernels_C.inverse_token_index_cpu.default(idx, batch, seq_len, entries, offsets)
        return entries, offsets


CPU = Library("cpu")
CUDA = Library("cuda")


@functools.cache
def cpu_reasons() -> tuple[str, ...]:
    reason = cpu_library()[1]
    return () if reason is None else (reason,)


def cpu_unsupported(args: tuple[Any, ...]) -> tuple[str, ...]:
    """Reasons common to every CPU kernel; the operator's main tensor is the first argument."""
    main = args[0]
    if main.device.type != "cpu":
        return (f"needs CPU tensors, got {main.device}",)
    return _dtype_reasons(main) or cpu_reasons()


def _dtype_reasons(main: Tensor) -> tuple[str, ...]:
    if main.dtype in DTYPES:
        return ()
    return (f"needs float32, bfloat16 or float16, got {str(main.dtype).removeprefix('torch.')}",)


def cpu_isa() -> str:
    """Instruction set that the CPU kernels use here."""
    return ISA_NAMES[torch.ops.eva02_kernels_C.cpu_isa_get()]


def set_cpu_isa(name: str) -> None:
    """Make the CPU kernels use another instruction set that this CPU has (for tests and benchmarks)."""
    if name not in ISA_NAMES:
        raise ValueError(f"name: expected one of {', '.join(ISA_NAMES)}; got {name!r}")
    torch.ops.eva02_kernels_C.cpu_isa_set(ISA_NAMES.index(name))


def empty_cache() -> None:
    """Give back to the system the memory that the CPU kernels keep for their next calls.

    They work in memory of their own, at most 256 MiB of which stays allocated after a call, because fresh memory costs
    page faults. Does nothing where there is no compiled CPU library. CUDA and Triton kernels take their workspaces from
    PyTorch's allocator, whose own ``torch.cuda.empty_cache`` returns them.
    """
    if cpu_library()[0]:
        torch.ops.eva02_kernels_C.release_workspaces()


def fill_workspaces_with_nan(fill: bool) -> bool:
    """Fill what the CPU kernels work in with NaN at each call (for tests); returns whether they did."""
    return bool(cpu_library()[0]) and torch.ops.eva02_kernels_C.fill_workspaces_with_nan(fill)


# ---- CUDA ------------------------------------------------------------------------------------------------------------
MIN_CAPABILITY = 80
# Set by testing.executing("simulator"): CPU tensors reach the CUDA operators, built for the simulator.
simulated = False


@functools.cache
def driver_version() -> int:
    """CUDA version that the installed NVIDIA driver supports, 1000 * major + 10 * minor; 0 where there is no driver."""
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value if status == 0 else 0


@functools.cache
def cuda_library() -> tuple[Path | None, str | None]:
    """(path, None) once the CUDA library is loaded, else (None, the reason)."""
    path = LIBRARY_DIR / "libeva02_kernels_cuda.so"
    build = build_info()
    if not path.exists():
        missing = build.get("missing") or build.get("missing_cuda", "built without an nvcc")
        return None, f"no compiled CUDA library ({missing})"
    if torch.version.cuda is None:
        return None, f"needs a CUDA build of torch, this is {torch.__version__}"
    needed, found = int(str(build.get("nvcc", "0")).split(".")[0]), driver_version()
    if found < 1000 * needed:
        has = f"this one supports CUDA {found // 1000}.{found % 1000 // 10}" if found else "there is none"
        return None, f"needs an NVIDIA driver for CUDA {needed} or newer, {has}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return None, f"the compiled CUDA library does not load: {error}"
    return path, None


@functools.cache
def capability_reasons(index: int) -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor >= MIN_CAPABILITY:
        return ()
    return (f"needs compute capability {MIN_CAPABILITY / 10}, this device has {major}.{minor}",)


def cuda_unsupported(args: tuple[Any, ...]) -> tuple[str, ...]:
    """Reasons common to every CUDA kernel; the operator's main tensor is the first argument."""
    main = args[0]
    if simulated:
        return (
            _dtype_reasons(main) if main.device.type == "cpu" else (f"is simulated on CPU tensors, got {main.device}",)
        )
    if main.device.type != "cuda":
        return (f"needs GPU tensors, got {main.device}",)
    reason = cuda_library()[1]
    if reason is not None:
        return (reason,)
    return _dtype_reasons(main) or capability_reasons(main.device.index)
