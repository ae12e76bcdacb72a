"""Host side of the Triton backend: where it runs, why it does not, and how kernels are launched.

Triton is imported with the first kernel (``ops/*/triton_kernels.py``), never by importing the package.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
def missing() -> str | None:
    """Why Triton cannot be used at all; None where it can."""
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
    reason = missing()
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

    At most one in 64 rows, so that the float32 partial sums of two parameters stay under 5 % of what a row kernel moves
    that reads and writes three 16-bit elements, but one for each multiprocessor where there are rows for it; at most
    four for each.
    """
    processors = num_processors(device)
    blocks = (rows + block_rows - 1) // block_rows
    return max(1, min(blocks, max(processors, rows // 64), 4 * processors))


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: torch's own switch decides whether float32 products may use TF32."""
    if dtype != torch.float32 or executing == "interpreter":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# ---- launching -------------------------------------------------------------------------------------------------------
class _Compiled(NamedTuple):
    """What a launch needs of a kernel that Triton has compiled and loaded."""

    kernel: Any  # kept: its module is unloaded with it
    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


_compiled: dict[tuple[Any, ...], _Compiled] = {}
_INT32_MAX = 2**31 - 1


@functools.cache
def _sized_at_run_time(kernel: Any) -> tuple[bool, ...]:
    return tuple(p.do_not_specialize for p in kernel.params)


@functools.cache
def _triton_runtime() -> tuple[tuple[Any, Any], Any]:
    """The chains of launch hooks, and the holder of the active driver."""
    from triton import knobs
    from triton.runtime.driver import driver

    return (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook), driver


def _launch_key(kernel: Any, choice: Choice, device: torch.device, args: Sequence[Any], constants: dict) -> tuple:
    """All that a compiled kernel depends on, as Triton specialises: dtypes, 16-byte alignment, integers but those
    marked ``do_not_specialize``, which arguments are None, constants, options and the device.
    """
    key = [kernel, choice, device.index, executing, target_arch, *constants.values()]
    for arg, sized in zip(args, _sized_at_run_time(kernel), strict=False):
        if isinstance(arg, Tensor):
            key.append(arg.dtype)
            key.append(arg.data_ptr() & 15 == 0)
        elif not sized or arg is None:
            key.append(arg if arg.__class__ is not float else float)
        else:
            key.append(arg > _INT32_MAX)
    return tuple(key)


def launch(kernel: Any, grid: tuple[int, ...], choice: Choice, *args: Any, **constants: Any) -> None:
    """Run a kernel on the device and current stream of its first tensor.

    The launch path of ``kernel[grid](...)`` costs as much as several eager operators; a kernel that was launched with
    the same specialisation before is launched directly.
    """
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, choice, *args, **constants)
    # The interpreter compiles nothing; on AMD Triton specialises on storage sizes too, which the key leaves out.
    if executing == "interpreter" or torch.version.hip is not None:
        kernel.run(*args, grid=grid, warmup=False, **constants, **choice.options)
        return None
    hooks, driver = _triton_runtime()
    key = _launch_key(kernel, choice, device, args, constants)
    found = _compiled.get(key)
    if found is None or hooks[0].calls or hooks[1].calls:  # a profiler's hooks want what the long way gives them
        options = choice.options
        if choice.max_registers is not None and driver.active.get_current_target().backend == "cuda":
            options = {**options, "maxnreg": choice.max_registers}
        made = kernel.run(*args, grid=grid, warmup=False, **constants, **options)
        known = {**constants, **options}
        tail = tuple(known[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = _Compiled(made, made.run, made.function, made.packed_metadata, tail)
        return None
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    x, y, z = (*grid, 1, 1)[:3]
    found.run(x, y, z, stream, found.function, found.metadata, None, None, None, *args, *found.constants)
    return None


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
