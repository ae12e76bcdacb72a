"""Where a number was measured, and the most that the machine could have reached there and then."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import eva02_kernels
from eva02_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("timm", "transformers", "triton", "liger_kernel", "xformers", "flash_attn")
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "asimd", "sve")


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


def environment() -> dict[str, Any]:
    """Machine, load, threads, versions, commit and time: carried by every row."""
    library, reason = _native.cpu_library()
    return {
        **_cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "isa": _native.cpu_isa() if library else f"none: {reason}",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class Roofline:
    """Multiply-add rate and copy bandwidth, sampled between the rounds of the very run they are compared with.

    The best sample counts: the highest ceiling gives the lowest, most cautious shares.
    """

    def __init__(self, copy_bytes: int = 256 << 20, iterations: int = 4_000_000) -> None:
        self.samples: dict[str, list[float]] = {"fma_gflops": [], "copy_gbps": []}
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

    def peaks(self) -> dict[str, float | None]:
        """Best samples, GFLOP/s and GB/s; None where there is none."""
        return {name: max(values, default=None) for name, values in self.samples.items()}

    def record(self) -> dict[str, Any]:
        return {**self.peaks(), "samples": {k: [round(v, 1) for v in s] for k, s in self.samples.items()},
                "reason": self.reason}  # fmt: skip


def share_of_roofline(
    seconds: float, flops: float, bytes_moved: float, peaks: dict[str, float | None]
) -> tuple[float | None, str | None]:
    """Least time that arithmetic and memory allow over the time taken, and which of the two bounds it."""
    bounds = {}
    if flops and peaks["fma_gflops"]:
        bounds["fma"] = flops / peaks["fma_gflops"] / 1e9
    if bytes_moved and peaks["copy_gbps"]:
        bounds["copy"] = bytes_moved / peaks["copy_gbps"] / 1e9
    if not bounds:
        return None, None
    name = max(bounds, key=lambda k: bounds[k])
    return bounds[name] / seconds, name


def warm_up_process(rounds: Sequence[int] = (1, 2)) -> None:
    """Start thread pools and library initialisation, so that no arm's first call pays for them."""
    x = torch.randn(64, 64, requires_grad=True)
    for _ in rounds:
        y = torch.nn.functional.layer_norm(x @ x, (64,))
        q = y.view(1, 4, 16, 64)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        torch.nn.functional.conv2d(torch.randn(1, 3, 16, 16), torch.randn(4, 3, 4, 4), stride=4)
