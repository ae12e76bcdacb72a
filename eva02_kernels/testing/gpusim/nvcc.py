"""Compile CUDA C++ so that it runs on the simulator, host code included."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

STAND_IN = Path(__file__).with_name("libgpusim_cudart.a")
SEAM = Path(__file__).with_name("gpusim_seam.o")  # what the program or library exports of it, for gpusim.Runtime
# PTX alone, readable, and no runtime but the stand-in, whose symbols stay inside: a CUDA torch in the process loads the
# real one into the global namespace.
COMPILE = ("-gencode", "arch=compute_80,code=compute_80", "--compress-mode=none", "-cudart", "none")
LINK = ("-Xlinker", "--exclude-libs", "-Xlinker", "ALL", "-lpthread")


def unavailable() -> str | None:
    """Why :func:`build` cannot work here, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    if not STAND_IN.exists() or not SEAM.exists():
        missing = f"{STAND_IN.name} or {SEAM.name} is missing"
        return f"{missing}: run `make gpusim` in a source tree, with CUDA's headers installed"
    return None


def build(sources: Sequence[str | Path], output: str | Path, *flags: str) -> Path:
    """A program (or, with ``-shared``, a library) from CUDA C++ sources, whose kernels the simulator runs.

    Args:
        sources: .cu and .cpp files, objects.
        output: what to write.
        flags: for nvcc: ``-std=c++20``, ``-I...``, ``-shared -Xcompiler -fPIC``.

    Raises: RuntimeError where nvcc or the stand-in is missing, or with nvcc's messages where it fails.
    """
    reason = unavailable()
    if reason:
        raise RuntimeError(f"gpusim.nvcc.build: {reason}")
    command = ["nvcc", *COMPILE, *flags, *map(str, sources), str(SEAM), str(STAND_IN), "-o", str(output), *LINK]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return Path(output)
