"""Where a number was measured, and the most that the machine could have reached there and then."""

from __future__ import annotations

import abc
import ctypes
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import eva02_kernels
from eva02_kernels import _native
from eva02_kernels.bench.measure import synchroniser

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("timm", "transformers", "triton", "liger_kernel", "xformers", "flash_attn")
DEVICES = ("cpu", "cuda")
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "asimd", "sve")


def check_device(device: str) -> None:
    """ValueError where there is nothing to run on."""
    if device not in DEVICES:
        raise ValueError(f"no device {device!r}; expected {' or '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise ValueError(
            f"--device cuda: torch.cuda.is_available() is False; torch {torch.__version__} {built}, and the GPU and "
            "its driver must be visible to this process"
        )


def versions() -> dict[str, str]:
    """Versions of what is compared; a package that is missing is left out."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "eva02_kernels": eva02_kernels.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The clone's commit, with ``+`` where files differ from it; None outside a clone."""
    if not (ROOT / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if status else "")


def _cpu() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    family = re.findall(r"^(?:cpu family|model|stepping)\s*:\s*(\d+)$", text, re.MULTILINE)[:3]
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cpu_family_model_stepping": [int(n) for n in family],
        "arch": platform.machine(),
        "flags": [f for f in ISA_FLAGS if flags and f in flags[1].split()],
    }


@functools.cache
def _driver() -> str | None:
    """Version of NVIDIA's driver, which torch does not tell; None where its tool does not either."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def gpu() -> dict[str, Any]:
    """The GPU in use, what runs it, and the switches that decide how float32 products are computed."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def environment(device: str = "cpu") -> dict[str, Any]:
    """Machine, load, threads, versions, commit and time: carried by every row."""
    library, reason = _native.cpu_library()
    return {
        "device": device,
        "gpu": gpu() if device == "cuda" else None,
        **_cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "freed_memory": "kept" if _keeps_freed_memory else "as malloc decides",
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "isa": _native.cpu_isa() if library else f"none: {reason}",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class Roofline(abc.ABC):
    """Rates of arithmetic and of copying, sampled between the rounds of the very run they are compared with.

    The best sample counts: the highest ceiling gives the lowest, most cautious shares.
    """

    reason: str | None = None  # why arithmetic has no rate

    def __init__(self, *names: str) -> None:
        self.samples: dict[str, list[float]] = {name: [] for name in names}

    @abc.abstractmethod
    def sample(self) -> None:
        """Measure each rate once."""

    def peaks(self) -> dict[str, float | None]:
        """Best samples, GFLOP/s and GB/s; None where there is none."""
        return {name: max(values, default=None) for name, values in self.samples.items()}

    def record(self) -> dict[str, Any]:
        return {**self.peaks(), "samples": {k: [round(v, 1) for v in s] for k, s in self.samples.items()},
                "reason": self.reason}  # fmt: skip


class CpuRoofline(Roofline):
    """Multiply-adds in registers, and a copy."""

    def __init__(self, copy_bytes: int = 256 << 20, iterations: int = 4_000_000) -> None:
        super().__init__("fma_gflops", "copy_gbps")
        self._iterations = iterations
        self._source = torch.zeros(copy_bytes // 4)
        self._target = torch.zeros(copy_bytes // 4)
        library, reason = _native.cpu_library()
        if library and not hasattr(torch.ops.eva02_kernels_C, "fma_peak_cpu"):
            library, reason = None, "the compiled CPU library was built before fma_peak was added"
        self.reason = None if library else reason

    def sample(self) -> None:
        start = time.perf_counter()
        self._target.copy_(self._source)
        # A copy reads one buffer and writes the other.
        self.samples["copy_gbps"].append(2 * self._source.nbytes / (time.perf_counter() - start) / 1e9)
        if self.reason is None:
            out = torch.empty(torch.get_num_threads(), 2)
            start = time.perf_counter()
            torch.ops.eva02_kernels_C.fma_peak_cpu(self._iterations, out)
            flops = self._iterations * float(out[:, 1].sum())
            self.samples["fma_gflops"].append(flops / (time.perf_counter() - start) / 1e9)


class GpuRoofline(Roofline):
    """A large ``torch.matmul`` in the run's dtype, and a copy on the device.

    No peak of the hardware: what PyTorch's own best case reaches there and then, with the clocks of that moment.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        device: str = "cuda",
        size: int | None = None,
        copy_bytes: int = 256 << 20,
        repeats: int = 8,
    ) -> None:
        super().__init__("gemm_gflops", "copy_gbps")
        size = size or (8192 if dtype.itemsize == 2 else 4096)
        self.gemm = f"torch.matmul {size} x {size} x {size} {str(dtype).removeprefix('torch.')}"
        self._flops, self._repeats = 2 * size**3, repeats
        self._synchronise = synchroniser(device)
        # Random values: products of zeros draw less power, at higher clocks than any real product has.
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self._c = torch.empty_like(self._a)
        self._source, self._target = (torch.zeros(copy_bytes // 4, device=device) for _ in range(2))

    def _rate(self, call: Callable[[], Any], work: float) -> float:
        """Work per second / 1e9; calls queue up, so that launching them costs nothing."""
        self._synchronise()
        start = time.perf_counter()
        for _ in range(self._repeats):
            call()
        self._synchronise()
        return self._repeats * work / (time.perf_counter() - start) / 1e9

    def sample(self) -> None:
        copied = self._rate(lambda: self._target.copy_(self._source), 2 * self._source.nbytes)
        self.samples["copy_gbps"].append(copied)
        product = self._rate(lambda: torch.matmul(self._a, self._b, out=self._c), self._flops)
        self.samples["gemm_gflops"].append(product)

    def record(self) -> dict[str, Any]:
        return {**super().record(), "gemm": self.gemm}


def roofline_of(device: str, dtype: torch.dtype) -> Roofline:
    return GpuRoofline(dtype, device=device) if device == "cuda" else CpuRoofline()


def share_of_roofline(
    seconds: float, flops: float, bytes_moved: float, peaks: dict[str, float | None]
) -> tuple[float | None, str | None]:
    """Least time that arithmetic and memory allow over the time taken, and which of the two bounds it."""
    work = {"fma": flops, "gemm": flops, "copy": bytes_moved}
    bounds = {}
    for peak, rate in peaks.items():
        name = peak.split("_")[0]
        if rate and work[name]:
            bounds[name] = work[name] / rate / 1e9
    if not bounds:
        return None, None
    name = max(bounds, key=lambda k: bounds[k])
    return bounds[name] / seconds, name


_keeps_freed_memory = False


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next tensor, as tcmalloc, jemalloc and torch's GPU allocator do.

    By default it gives large blocks back to the system, and each new tensor pays a page fault for every 4 KiB: where
    those are dear (virtual machines), an operator on 3 MB takes several times as long as its kernel, in every arm, and
    how long depends on what was freed before. Nothing happens where malloc has no ``mallopt``.
    """
    global _keeps_freed_memory
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        for option, size in ((m_mmap_threshold, 2**30), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**26)):
            mallopt(option, size)
        _keeps_freed_memory = True


def warm_up_process(device: str = "cpu", rounds: Sequence[int] = (1, 2)) -> None:
    """Start thread pools and library initialisation, so that no arm's first call pays for them; keep freed memory."""
    keep_freed_memory()
    x = torch.randn(64, 64, device=device, requires_grad=True)
    for _ in rounds:
        y = torch.nn.functional.layer_norm(x @ x, (64,))
        q = y.view(1, 4, 16, 64)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        image, weight = (torch.randn(size, device=device) for size in ((1, 3, 16, 16), (4, 3, 4, 4)))
        torch.nn.functional.conv2d(image, weight, stride=4)
