"""Host side of the Triton backend: where it runs, why it does not, and how kernels are launched.

Triton is imported with the first kernel (``ops/*/triton_kernels.py``), never by importing the package.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from eva02_kernels._launch import Choice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROWS = 2**31 - 1  # row numbers are int32 in kernels; offsets are int64

# How CPU tensors reach the kernels, set by testing.executing ("interpreter", "offline"); None: they do not.
executing: str | None = None
# Architecture that kernels are compiled for while `executing` compiles them without a GPU.
target_arch = 80


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with CUDA and ROCm builds of torch)"
    return None


def unsupported(args: Sequence[Any]) -> Sequence[str]:
    """Reasons common to every Triton kernel; the operator's main tensor is the first argument."""
    main = args[0]
    device = main.device
    if device.type != "cuda":
        if device.type != "cpu":
            return (f"needs GPU tensors, got {device}",)
        if executing is None:
            return ("needs GPU tensors, got cpu (CPU tensors run inside eva02_kernels.testing.executing only)",)
    reason = _missing()
    if reason is not None:
        return (reason,)
    if main.dtype not in DTYPES:
        return (f"needs float32, bfloat16 or float16, got {str(main.dtype).removeprefix('torch.')}",)
    if main.dtype == torch.bfloat16 and architecture(device) < 80 and device.type == "cuda":
        return (f"bfloat16 needs compute capability 8.0, this device has {architecture(device) / 10}",)
    if main.dim() and main.numel() // max(1, main.shape[-1]) > MAX_ROWS:
        return (f"needs at most {MAX_ROWS} rows, got {main.numel() // main.shape[-1]}",)
    return ()


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def architecture(device: torch.device) -> int:
    """Compute capability as two digits (80, 90, 120); AMD's answer their gfx number's leading part (94 for gfx942)."""
    if device.type != "cuda":
        return target_arch
    properties = _properties(device.index or 0)
    return 10 * properties.major + properties.minor


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; on the CPU a small number, so that reductions over several programs are exercised."""
    if device.type != "cuda":
        return 108 if executing == "offline" else 3
    return _properties(device.index or 0).multi_processor_count


def num_partials(rows: int, block_rows: int, device: torch.device) -> int:
    """Programs that each sum their share of the rows of a parameter's gradient; one more kernel adds their sums.

    At most one in 32 rows, so that the float32 partial sums stay under 5 % of a row kernel's traffic, but one for
    each multiprocessor where there are rows for it; at most four for each.
    """
    processors = num_processors(device)
    blocks = (rows + block_rows - 1) // block_rows
    return max(1, min(blocks, max(processors, rows // 32), 4 * processors))


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: torch's own switch decides whether float32 products may use TF32."""
    if dtype != torch.float32 or executing == "interpreter":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], choice: Choice, *args: Any, **constants: Any) -> None:
    """Run a kernel on the device and current stream of its first tensor."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel.run(*args, grid=grid, warmup=False, **constants, **choice.options)
    else:
        kernel.run(*args, grid=grid, warmup=False, **constants, **choice.options)


# ---- autotuning ------------------------------------------------------------------------------------------------------
_tuned: dict[tuple[Any, ...], Choice] = {}


def tuning() -> bool:
    """Whether several choices are timed on their first use; the first one is taken otherwise.

    Off with ``EVA02_AUTOTUNE=0``, under ``torch.use_deterministic_algorithms``, without a GPU, and while a CUDA graph
    is captured.
    """
    if executing is not None or os.environ.get("EVA02_AUTOTUNE", "1") == "0":
        return False
    return not torch.are_deterministic_algorithms_enabled() and not torch.cuda.is_current_stream_capturing()


def tuned(key: tuple[Any, ...], choices: Sequence[Choice], run: Callable[[Choice], None]) -> Choice:
    """The choice to launch with: the fastest of ``choices`` for ``key``, timed once in a process, or the first."""
    found = _tuned.get(key)
    if found is not None:
        return found
    if len(choices) == 1 or not tuning():
        return choices[0]
    from triton import OutOfResources
    from triton.testing import do_bench

    times: dict[Choice, float] = {}
    for choice in choices:
        try:
            times[choice] = do_bench(functools.partial(run, choice), warmup=5, rep=20, return_mode="median")
        except OutOfResources:  # more shared memory or registers than this device has
            continue
    _tuned[key] = best = min(times, key=times.__getitem__) if times else choices[0]
    return best
