"""Compile Triton kernels for any GPU without one, by calling operators on CPU tensors, and read what was compiled.

``with compiling(90) as kernels: rope_attention(...)`` runs launchers as they are: every kernel they would launch is
compiled for that architecture with the block sizes and specialisations of a real call. Nothing is computed; the
outputs hold anything.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eva02_kernels import _triton

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
AMD = {942: "gfx942"}
# Shared memory a block can have and a multiprocessor has, registers, threads and blocks of a multiprocessor, by compute
# capability: CUDA C++ Programming Guide, table of technical specifications.
LIMITS = {
    75: (65536, 65536, 65536, 1024, 16),
    80: (166912, 167936, 65536, 2048, 32),
    86: (101376, 102400, 65536, 1536, 16),
    89: (101376, 102400, 65536, 1536, 24),
    90: (232448, 233472, 65536, 2048, 32),
    100: (232448, 233472, 65536, 2048, 32),
    120: (101376, 102400, 65536, 1536, 24),
}


# ---- machine code ----------------------------------------------------------------------------------------------------
def opcodes_of(disassembly: str) -> Counter[str]:
    """How often each instruction is in a disassembly by nvdisasm or cuobjdump."""
    return Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", disassembly))


def num_spills(opcodes: Counter[str]) -> int:
    """Loads and stores of local memory."""
    return sum(n for op, n in opcodes.items() if op.startswith(("LDL", "STL")))


def matrix_instructions(opcodes: Counter[str]) -> tuple[str, ...]:
    kinds = {"HMMA": "mma", "IMMA": "mma", "QMMA": "mma", "OMMA": "mma", "HGMMA": "wgmma", "QGMMA": "wgmma",
             "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05", "UTCOMMA": "tcgen05"}  # fmt: skip
    return tuple(sorted({kinds[op.split(".")[0]] for op in opcodes if op.split(".")[0] in kinds}))


def access_widths(opcodes: Counter[str]) -> dict[int, int]:
    """Instructions that read or write global memory, by bytes a thread; asynchronous copies are among them."""
    widths: Counter[int] = Counter()
    for op, n in opcodes.items():
        if re.match(r"(LDG|STG|LDGSTS)\b", op):
            found = re.search(r"\.(256|128|64)\b|\.[US](8|16)\b", op)
            bits = 32 if found is None else int(found[1] or found[2])
            widths[bits // 8] += n
    return dict(widths)


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """Resident threads over a multiprocessor's: by a block's threads, a thread's registers, a block's shared bytes."""
    _, most_shared, most_registers, most_threads, most_blocks = LIMITS[arch]
    warps = -(-threads // 32)
    # Registers are given to warps in units of 256, shared memory in units of 128 bytes plus 1 KiB a block from 8.0.
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(most_threads // (32 * warps), most_registers // (per_warp * warps), most_blocks)
    if shared:
        blocks = min(blocks, most_shared // (-(-shared // 128) * 128 + (1024 if arch >= 80 else 0)))
    return blocks * 32 * warps / most_threads


@dataclass
class Kernel:
    """One compiled kernel, and how often it was launched."""

    name: str
    arch: int
    num_warps: int
    num_stages: int
    shared: int  # bytes
    constants: dict[str, Any]
    signature: dict[str, str]
    binary: bytes = field(repr=False)
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    # Bytes of each tensor argument at each launch, by its name.
    traffic: list[dict[str, int]] = field(default_factory=list)

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK and the rest of ``cuobjdump --dump-resource-usage``; STACK above 0 means spilled registers."""
        text = _disassemble("cuobjdump", "--dump-resource-usage", self.binary)
        line = next(line for line in text.splitlines() if "REG:" in line)
        return {k: int(v) for k, v in re.findall(r"(\w+(?:\[\d\])?):(\d+)", line)}

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction is in the machine code."""
        return opcodes_of(_disassemble("nvdisasm", "--print-code", self.binary))

    @property
    def registers(self) -> int:
        return self.resources["REG"]

    @property
    def spills(self) -> int:
        return num_spills(self.opcodes)

    @property
    def matrix_instructions(self) -> tuple[str, ...]:
        return matrix_instructions(self.opcodes)

    def access_widths(self) -> dict[int, int]:
        return access_widths(self.opcodes)

    @property
    def occupancy(self) -> float:
        return occupancy(self.arch, 32 * self.num_warps, self.registers, self.shared)


def _disassemble(tool: str, option: str, binary: bytes) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, tool).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        return subprocess.run([path, option, file], capture_output=True, text=True, check=True).stdout


OnLaunch = Callable[[Any, Any, bytes, tuple[int, int, int], tuple[Any, ...]], None]
# What the open context does with a launch, by its key: Triton keeps launchers with their kernels, beyond the end of a
# context.
_on_launch: dict[str, OnLaunch] = {}


def triton_driver(arch: int, on_launch: OnLaunch, key: str) -> Any:
    """A Triton driver for CPU tensors: kernels are compiled for ``arch``, launches are given to ``on_launch``.

    Args:
        on_launch: called with Triton's source and metadata, the binary, the grid and all bound arguments.
        key: names the kind of driver; Triton keeps compiled kernels apart by it and by ``arch``.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    target = GPUTarget("hip", AMD[arch], 64) if arch in AMD else GPUTarget("cuda", arch, 32)
    max_shared = 65536 if arch in AMD else LIMITS[arch][0]

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.src, self.metadata = src, metadata

        def __call__(self, x: int, y: int, z: int, stream: int, function: bytes, *rest: Any) -> None:
            # Behind the metadata of the kernel and of the launch and two hooks are the kernel's arguments.
            _on_launch[key](self.src, self.metadata, function, (x, y, z), rest[4:])

    class Driver(DriverBase):
        launcher_cls = Launcher
        utils = SimpleNamespace(
            # No module: Triton would unload it through whatever driver is active when a kernel is collected.
            load_binary=lambda name, kernel, shared, device: (None, kernel, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": max_shared, "multiprocessor_count": 108},
        )

        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return target

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            return lambda fn, **options: [1.0, 1.0, 1.0]

        def get_current_device(self) -> Any:
            return arch if key == "offline" else (key, arch)  # Triton keeps compiled kernels by device

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

    _on_launch[key] = on_launch
    return Driver()


@contextlib.contextmanager
def compiling(arch: int = 80) -> Iterator[list[Kernel]]:
    """Inside, Triton kernels called with CPU tensors are compiled for ``arch`` and not run; gives the list of them.

    Args:
        arch: compute capability (80, 90, ...), or 942 for AMD's gfx942.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret:
        raise RuntimeError("compiling: not in a process with TRITON_INTERPRET=1")
    kernels: dict[int, Kernel] = {}

    def on_launch(src: Any, metadata: Any, binary: bytes, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        kernel = kernels.get(id(src))
        names = src.fn.arg_names
        if kernel is None:
            constants = {names[path[0]]: value for path, value in src.constants.items()}
            kernel = kernels[id(src)] = Kernel(
                metadata.name, arch, metadata.num_warps, metadata.num_stages, metadata.shared, constants,
                dict(src.signature), binary,
            )  # fmt: skip
            found.append(kernel)
        kernel.grids.append(grid)
        tensors = {name: a for name, a in zip(names, args, strict=True) if isinstance(a, torch.Tensor)}
        kernel.traffic.append({name: t.numel() * t.element_size() for name, t in tensors.items()})

    found: list[Kernel] = []
    before = driver._active, _triton.executing, _triton.target_arch
    driver.set_active(triton_driver(arch, on_launch, key="offline"))
    _triton.executing, _triton.target_arch = "offline", arch
    try:
        yield found
    finally:
        driver._active, _triton.executing, _triton.target_arch = before
