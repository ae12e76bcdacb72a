"""Host launchers of compiled CUDA code on the simulator, called with CPU tensors' addresses.

``nvcc.build([sources], "kernels.so", "-shared", "-Xcompiler", "-fPIC", ...)`` compiles a library whose CUDA runtime is
the stand-in of ``csrc/gpusim``. Its functions are called as they would be on a GPU: pointers are ``tensor.data_ptr()``
of CPU tensors, streams are any number. :meth:`Runtime.launches` says which tensors those pointers are of, and tells
what every launch inside did; launches that touch any other memory of the host are out of bounds.

::

    runtime = gpusim.Runtime(library)
    with gpusim.options(seed=1), runtime.launches({"x": x}, outputs={"out": out}, workspace={"sums": sums}) as reports:
        status = runtime.library.scale(c_void_p(x.data_ptr()), c_void_p(out.data_ptr()), c_long(x.numel()), stream)

The seam in the library are the functions ``eva02_gpusim_begin``, ``_map``, ``_unwritten``, ``_view``, ``_unmap`` and
``_end`` (``csrc/gpusim/seam.cpp``), exported by ``gpusim_seam.o``, which ``nvcc.build`` links beside the archive; an
exports map of the library's own has to let ``eva02_gpusim_*`` through.

Where it differs from :func:`run_ptx`: kernels see the host's own addresses, so that one tensor may lie directly behind
another and an access beyond the first is one to the second. :func:`apart` copies a tensor to memory that has no
neighbours, and is what tests of bounds want.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eva02_kernels.testing.gpusim.errors import SimulationError, error_of, fault_record
from eva02_kernels.testing.gpusim.launch import byte_ranges, map_tensors
from eva02_kernels.testing.gpusim.options import Options, current
from eva02_kernels.testing.gpusim.report import Report, report_of

Tensors = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
_GAP = 16 << 20  # bytes of address space on each side of a tensor that is apart; they take no memory


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a CPU tensor, alone in its storage, with 16 MiB of address space on each side of it."""
    size = tensor.numel() * tensor.element_size()
    memory = mmap.mmap(-1, size + 2 * _GAP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=max(tensor.numel(), 1), offset=_GAP)
    return copy[: tensor.numel()].view(tensor.shape).copy_(tensor)


def _named(kind: str, tensors: Tensors) -> list[tuple[str, torch.Tensor]]:
    if isinstance(tensors, Mapping):
        return list(tensors.items())
    return [(f"{kind} {i}", t) for i, t in enumerate(tensors)]


def _unwritten(kernel: str, tensor: dict[str, Any]) -> SimulationError:
    name, missing = tensor["tensor"], f"{tensor['bytes']} of {tensor['of']} bytes"
    message = f"uninitialised output: byte {tensor['first']} of {name} ({missing}) is never written"
    return error_of(kernel, fault_record("uninitialised", message, tensor=name))


def _text(options: Options) -> str:
    """The options as the stand-in reads them."""
    items = {
        "seed": options.seed,
        "order": options.order,
        "threads": options.record()["threads"],
        "races": "strict" if options.races == "strict" else int(bool(options.races)),
        "uninit": options.uninit or 0,
        "numerics": options.numerics,
        "budget": options.budget,
        "on_error": "collect" if options.on_error == "collect" else "return",
    }
    return ",".join(f"{key}={value}" for key, value in items.items())


class Runtime:
    """The CUDA runtime's stand-in inside a shared library that ``gpusim.nvcc.build`` made.

    Args:
        library: path of the library.

    Attributes:
        library: the loaded library, for calls of its functions.

    Raises: OSError where it cannot be loaded; ValueError for a library without the stand-in.
    """

    def __init__(self, library: str | Path) -> None:
        self.library = ctypes.CDLL(str(library))
        address, size = ctypes.c_uint64, ctypes.c_uint64
        functions: dict[str, list[type]] = {
            "begin": [ctypes.c_char_p],
            "map": [address, size, ctypes.c_char_p],
            "unwritten": [address, size, ctypes.c_int],
            "view": [address, size],
            "unmap": [address],
            "end": [],
        }
        self._functions = {}
        for name, arguments in functions.items():
            function = getattr(self.library, f"eva02_gpusim_{name}", None)
            if function is None:
                raise ValueError(f"library: {library} was not built by gpusim.nvcc.build, or hides eva02_gpusim_{name}")
            function.argtypes, function.restype = arguments, ctypes.c_char_p
            self._functions[name] = function

    def _call(self, name: str, *arguments: int | bytes) -> None:
        message = self._functions[name](*arguments)
        if message is not None:
            raise ValueError(f"eva02_gpusim_{name}: {message.decode()}")

    def _map(self, tensors: Tensors, outputs: Tensors, workspace: Tensors, options: Options) -> None:
        fresh, scratch = _named("output", outputs), _named("workspace", workspace)
        options = replace(options, outputs=(*options.outputs, *(t for _, t in fresh)))
        for _, size, host, name, unwritten, _, views in map_tensors(
            [*_named("tensor", tensors), *fresh, *scratch], options
        ).regions:
            if size == 0:
                continue
            self._call("map", host, size, name.encode())
            for begin, end in views:
                self._call("view", host + begin, end - begin)
            for begin, end in unwritten:
                self._call("unwritten", host + begin, end - begin, 1)
        for _, tensor in scratch:
            host = tensor.untyped_storage().data_ptr()
            for begin, end in byte_ranges(tensor):
                self._call("unwritten", host + begin, end - begin, 0)

    def _finish(self, reports: list[Report], *, collect: bool, check_outputs: bool) -> None:
        """Ends the recording; fills the reports, and raises what was found."""
        record = json.loads(self._functions["end"]().decode(errors="replace"))
        for launch in record["launches"]:
            errors = [error_of(launch["kernel"], fault) for fault in launch["faults"]]
            reports.append(report_of(launch["kernel"], launch, errors))
        faults = [error for report in reports for error in report.errors]
        if not faults and check_outputs:
            kernel = reports[-1].kernel if reports else "no launch"
            faults = [_unwritten(kernel, tensor) for tensor in record["unwritten"]]
            if reports:
                reports[-1].errors += faults
        if faults and not (collect and reports):
            raise faults[0]

    @contextlib.contextmanager
    def launches(
        self, tensors: Tensors = (), *, outputs: Tensors = (), workspace: Tensors = ()
    ) -> Iterator[list[Report]]:
        """Inside, the library's launches run with the options of :func:`gpusim.options` over these CPU tensors.

        Args:
            tensors: what kernels may access, by name or in a list; a tensor's whole storage, or with
                ``bounds="view"`` its elements.
            outputs: the same for tensors that hold nothing yet: they have to be written completely, by all launches
                together, and are not used before; also those of ``options(outputs=...)``.
            workspace: the same for tensors that hold nothing yet and need not be written.

        Gives: a list that has, once the block is left, the report of each launch; with ``on_error="collect"`` their
            faults are in it.

        Raises: when the block is left, whatever it raised itself: the :class:`SimulationError` of the first fault or
            refused launch, with the kernel's mangled name; :class:`UninitialisedError` for an output that is not
            written completely. After a fault the launches that follow do nothing, and the library's functions get
            cudaErrorLaunchFailure. ValueError for tensors that are not on the CPU.
        """
        options = current()
        collect = options.on_error == "collect"
        reports: list[Report] = []
        self._call("begin", _text(options).encode())
        try:
            self._map(tensors, outputs, workspace, options)
            yield reports
        except BaseException:
            self._finish(reports, collect=collect, check_outputs=False)
            raise
        self._finish(reports, collect=collect, check_outputs=True)
