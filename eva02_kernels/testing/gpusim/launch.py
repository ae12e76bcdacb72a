"""Launches: tensors get simulated addresses, parameters are packed, the core runs, faults become exceptions."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eva02_kernels.testing.gpusim.errors import error_of, fault_record
from eva02_kernels.testing.gpusim.options import Options, current
from eva02_kernels.testing.gpusim.report import Report, report_of

_SLOT = 1 << 32  # storages are this far apart, so that an access beyond one never reaches another


@functools.cache
def core() -> Any:
    """The compiled core (another build's with EVA02_GPUSIM_CORE=folder), or an error that says how to build it."""
    folder = os.environ.get("EVA02_GPUSIM_CORE")
    if folder:
        name = f"{__package__}._core"
        (file,) = Path(folder).glob("_core*.so")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        from eva02_kernels.testing.gpusim import _core  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(
            f"eva02_kernels.testing.gpusim needs its compiled core ({error}): run `make gpusim` in a source tree"
        ) from None
    return _core


@functools.lru_cache(maxsize=512)
def program(ptx: str, entry: str, perturbation: int = 0) -> Any:
    """The decoded kernel; with the seed of what ``numerics="perturb"`` changes, 0 for nothing."""
    return core().Program(ptx, entry, perturbation)


def check(ptx: str) -> list[tuple[int, str, str]]:
    """Every unsupported instruction of every kernel in ``ptx``: (line, text, reason). Nothing is run.

    Raises ValueError for text that is not PTX.
    """
    found = {item for entry in core().entries(ptx) for item in program(ptx, entry).unsupported}
    return sorted(found)


class Mapping(NamedTuple):
    """The simulated address space of a launch."""

    regions: list[tuple[int, int, int, str, list[tuple[int, int]], bool, list[tuple[int, int]]]]
    address: Callable[[torch.Tensor], int]


def byte_ranges(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Byte ranges of the storage that a view covers, adjacent ones joined."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    ranges = [(begin, begin + size)]
    if tensor.numel() == 0:
        return []
    for n, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda item: item[1]):
        if len(ranges) == 1 and stride * size <= ranges[0][1] - ranges[0][0]:
            ranges = [(ranges[0][0], ranges[0][1] + (n - 1) * stride * size)]
        else:
            ranges = [(a + i * stride * size, b + i * stride * size) for i in range(n) for a, b in ranges]
    return ranges


def map_tensors(tensors: Sequence[tuple[str, torch.Tensor]], options: Options) -> Mapping:
    """One region for each distinct storage, in the order of the tensors."""
    fresh: dict[int, list[tuple[int, int]]] = {}
    for t in options.outputs:
        fresh.setdefault(t.untyped_storage().data_ptr(), []).extend(byte_ranges(t))
    regions: dict[int, list[Any]] = {}
    for name, tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if storage.nbytes() >= _SLOT:
            raise ValueError(f"{name}: expected a storage below 4 GiB, got {storage.nbytes()} bytes")
        if key not in regions:
            base = (1 + len(regions)) * _SLOT + key % 512
            regions[key] = [base, storage.nbytes(), key, name, fresh.get(key, []), False, []]
        else:
            regions[key][3] += f"/{name}"
        if options.bounds == "view":
            regions[key][6] += byte_ranges(tensor)

    def address(tensor: torch.Tensor) -> int:
        if tensor.numel() == 0:
            return 0
        region = regions[tensor.untyped_storage().data_ptr()]
        return region[0] + tensor.data_ptr() - region[2]

    return Mapping([tuple(r) for r in regions.values()], address)  # type: ignore[misc]


_MAX_GRID, _MAX_BLOCK, _MAX_THREADS = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024  # CUDA's limits


def _check_launch(grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int) -> None:
    for name, sizes, limits in (("grid", grid, _MAX_GRID), ("block", block, _MAX_BLOCK)):
        if len(sizes) != 3 or any(not 1 <= n <= most for n, most in zip(sizes, limits, strict=True)):
            raise ValueError(f"{name}: expected three numbers from 1 to {limits}, got {sizes}")
    if block[0] * block[1] * block[2] > _MAX_THREADS:
        raise ValueError(f"block: expected at most {_MAX_THREADS} threads, got {block}")
    if grid[0] * grid[1] * grid[2] >= 2**31:
        raise ValueError(f"grid: expected fewer than 2^31 CTAs, got {grid}")
    if not 0 <= shared_bytes <= 1 << 20:
        raise ValueError(f"shared_bytes: expected 0 to 1 MiB, got {shared_bytes}")


_FORMATS = {"f32": "f", "f64": "d"}


def _pack(name: str, ptx_type: str, size: int, value: Any, address: Callable[[torch.Tensor], int]) -> bytes:
    if isinstance(value, bytes):
        if len(value) != size:
            raise ValueError(f"{name}: expected {size} bytes, got {len(value)}")
        return value
    if isinstance(value, torch.Tensor):
        if size != 8 or ptx_type in _FORMATS:
            raise ValueError(f"{name}: expected a number for .{ptx_type}, got a tensor")
        value = address(value)
    if isinstance(value, float):
        if ptx_type not in _FORMATS:
            raise ValueError(f"{name}: expected an integer for .{ptx_type}, got {value!r}")
        return struct.pack("<" + _FORMATS[ptx_type], value)
    if ptx_type in _FORMATS:
        return struct.pack("<" + _FORMATS[ptx_type], float(value))
    return (int(value) % (1 << (8 * size))).to_bytes(size, "little")


def run_ptx(
    ptx: str,
    entry_name: str,
    *,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[Any],
    shared_bytes: int = 0,
    names: Sequence[str] | None = None,
) -> Report:
    """Run one kernel of PTX text over CPU tensors, which are written in place.

    Args:
        ptx: text of a module.
        entry_name: its kernel.
        grid, block: CTAs and threads, three numbers each.
        args: one for each .param: a tensor (its address), int, float, or bytes for a structure.
        shared_bytes: dynamic shared memory.
        names: what messages call the arguments (default: the .param names).

    Raises: a :class:`SimulationError` for the first fault (unless ``on_error="collect"``); ValueError for malformed
        text and arguments that do not fit the parameters.
    """
    _check_launch(grid, block, shared_bytes)
    opts = current()
    kernel = program(ptx, entry_name, opts.perturbation)
    params = kernel.params
    threads = block[0] * block[1] * block[2]
    if kernel.reqntid and threads != kernel.reqntid:
        raise ValueError(f"block: expected {kernel.reqntid} threads, which {entry_name} requires; got {threads}")
    if len(args) != len(params):
        raise ValueError(f"args: {entry_name} has {len(params)} parameters, got {len(args)}")
    if kernel.unsupported and opts.on_error == "raise":
        line, text, reason = kernel.unsupported[0]
        message = f"unsupported instruction ({reason}), one of {len(kernel.unsupported)}"
        record = fault_record("unsupported", message, line=line, text=text, where=f"line {line}")
        raise error_of(entry_name, record)
    labels = list(names) if names is not None else [name for name, *_ in params]
    tensors = [(label, a) for label, a in zip(labels, args, strict=True) if isinstance(a, torch.Tensor)]
    mapping = map_tensors(tensors, opts)
    buffer = bytearray(kernel.param_bytes)
    for label, (_, ptx_type, offset, size), value in zip(labels, params, args, strict=True):
        buffer[offset : offset + size] = _pack(label, ptx_type, size, value, mapping.address)
    regions = list(mapping.regions)
    keep_alive = []
    for name, size, initial, constant in kernel.constants():
        memory = ctypes.create_string_buffer(initial, max(size, 1))
        keep_alive.append(memory)
        host = ctypes.addressof(memory)
        regions.append(((len(regions) + 1) * _SLOT + host % 512, size, host, name, [], constant, []))
    grid_barrier = 0
    if kernel.grid_barrier:  # the words on which a cooperative launch synchronises its grid, zeros before it
        memory = ctypes.create_string_buffer(64)
        keep_alive.append(memory)
        grid_barrier = (len(regions) + 1) * _SLOT
        regions.append((grid_barrier, 64, ctypes.addressof(memory), "grid barrier", [], False, []))
    outcome = core().launch(kernel, grid, block, bytes(buffer), regions, shared_bytes, grid_barrier, opts.record())
    errors = [error_of(entry_name, record) for record in outcome["faults"]]
    if errors and opts.on_error == "raise":
        raise errors[0]
    return report_of(entry_name, outcome, errors)
