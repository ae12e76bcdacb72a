"""Builds the compiled libraries with CMake and ninja, next to the Python packages.

EVA02_BUILD chooses what is built:
  auto       (default) the libraries that this machine can build, else the pure-Python packages
  native     the CPU library, or an error
  manylinux  the libraries with zig against glibc 2.28, stripped: a wheel tagged py3-none-manylinux_2_28_<arch>
  pure       no library: a py3-none-any wheel
EVA02_CUDA_ARCHITECTURES chooses the GPUs that the CUDA library has machine code for, such as "80;90"; empty: none, no
CUDA library. By default those of this machine, and for manylinux all that the project supports. It needs an nvcc.
Why a library is missing is recorded in eva02_kernels/lib/build_info.json, which `python -m eva02_kernels.info` prints.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("EVA02_BUILD", "auto")
GLIBC = (2, 28)
LIBRARY = "libeva02_kernels_cpu.so"
CUDA_LIBRARY = "libeva02_kernels_cuda.so"
CUDA_ARCHITECTURES = "80;90;100;120"
INFO = "build_info.json"
SOURCES = (".h", ".cpp", ".cuh", ".cu", ".cmake", ".map")

if MODE not in ("auto", "native", "manylinux", "pure"):
    raise SystemExit(f"EVA02_BUILD: expected auto, native, manylinux or pure; got {MODE!r}")


class Missing(Exception):
    """What a native build needs and this machine lacks."""


def find_compiler() -> list[str]:
    """The C++ compiler's command; the environment's CXX, else the first of the usual names that works."""
    if MODE == "manylinux":
        spec = importlib.util.find_spec("ziglang")
        if spec is None or not spec.submodule_search_locations:
            raise Missing("the ziglang package is not installed")
        zig = Path(spec.submodule_search_locations[0]) / "zig"
        return [str(zig), "c++", "-target", f"{platform.machine()}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"]
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    names = ("c++", "g++", "clang++")
    found = [path for name in names if (path := shutil.which(name))]
    if not found:
        raise Missing(f"no C++ compiler: looked for {', '.join(names)} on PATH")
    broken = []
    for path in found:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <vector>\nint main() { return static_cast<int>(std::vector<int>{}.size()); }\n")
            run = subprocess.run(
                [path, "-std=c++20", str(source), "-o", str(Path(folder) / "probe")], capture_output=True, text=True
            )
        if run.returncode == 0:
            return [path]
        broken.append(f"{path} cannot compile a C++20 program: {run.stderr.strip().splitlines()[:1]}")
    raise Missing("no working C++ compiler: " + "; ".join(broken))


def find_tool(name: str) -> str:
    """cmake or ninja: the Python package's or the system's."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise Missing(f"{name} is not installed")
    return path


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Missing(
            "torch's headers are not visible to the build: install torch, then build with pip's --no-build-isolation"
        )
    return Path(spec.submodule_search_locations[0])


@functools.cache
def toolchain() -> tuple[dict[str, list[str]] | None, str | None]:
    """(what to build with, None), or (None, why the packages will be pure Python)."""
    if MODE == "pure":
        return None, "built as a pure-Python package (EVA02_BUILD=pure)"
    try:
        if sys.platform != "linux":
            raise Missing(f"the compiled library is built on Linux only, not on {sys.platform}")
        return {
            "compiler": find_compiler(),
            "cmake": [find_tool("cmake")],
            "ninja": [find_tool("ninja")],
            "torch": [str(find_torch())],
        }, None
    except Missing as missing:
        if MODE in ("native", "manylinux"):
            raise SystemExit(f"EVA02_BUILD={MODE}: {missing}") from None
        return None, str(missing)


@functools.cache
def cuda() -> tuple[str | None, str | None]:
    """(compute capabilities to build the CUDA library for, None), or (None, why there will be none)."""
    if toolchain()[0] is None:
        return None, toolchain()[1]
    wanted = os.environ.get("EVA02_CUDA_ARCHITECTURES")
    if wanted == "":
        return None, "built with EVA02_CUDA_ARCHITECTURES empty"
    if shutil.which("nvcc") is None:
        return None, "built without an nvcc"
    if wanted is None and MODE == "manylinux":
        wanted = CUDA_ARCHITECTURES
    if wanted is None:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            found = []
        if not found:
            return None, "built on a machine without a GPU; EVA02_CUDA_ARCHITECTURES=80 would have built it"
        wanted = ";".join(sorted({capability.replace(".", "") for capability in found}, key=int))
    return wanted, None


class BuildNative(Command):
    """Builds the libraries into eva02_kernels/lib, with what they were built with or why they were not."""

    description = "build the compiled libraries with CMake and ninja"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    build_lib: str | None
    editable_mode: bool

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        tools, missing = toolchain()
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, CUDA_LIBRARY):
            (target / name).unlink(missing_ok=True)
        if tools is None:
            (target / INFO).write_text(json.dumps({"missing": missing}, indent=2) + "\n")
            print(f"no compiled library: {missing}")
            return
        architectures, missing_cuda = cuda()
        folder = ROOT / "build" / ("manylinux" if MODE == "manylinux" else "native")
        configure = [
            *tools["cmake"],
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tools['ninja'][0]}",
            f"-DCMAKE_CXX_COMPILER={';'.join(tools['compiler'])}",
            f"-DEVA02_TORCH_DIR={tools['torch'][0]}",
            f"-DCMAKE_SHARED_LINKER_FLAGS={'-Wl,--strip-all' if MODE == 'manylinux' else ''}",
            f"-DEVA02_CUDA={'ON' if architectures else 'OFF'}",
            f"-DEVA02_CUDA_ARCHITECTURES={architectures or ''}",
        ]
        self._run(configure)
        self._run([*tools["cmake"], "--build", str(folder)])
        for name in (LIBRARY, CUDA_LIBRARY) if architectures else (LIBRARY,):
            shutil.copy2(folder / name, target / name)
        info = json.loads((folder / INFO).read_text())
        if missing_cuda:
            info["missing_cuda"] = missing_cuda
        (target / INFO).write_text(json.dumps(info, indent=2) + "\n")

    def _run(self, command: list[str]) -> None:
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f"building the compiled library failed: {shlex.join(command)}")

    def _target(self) -> Path:
        base = ROOT if self.editable_mode else Path(str(self.build_lib))
        return base / "eva02_kernels" / "lib"

    def get_outputs(self) -> list[str]:
        names = [INFO] if toolchain()[0] is None else [LIBRARY, *([CUDA_LIBRARY] if cuda()[0] else []), INFO]
        return [str(Path(str(self.build_lib)) / "eva02_kernels" / "lib" / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in SOURCES]
        return [str(path.relative_to(ROOT)) for path in sorted(sources)] + ["CMakeLists.txt"]


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012 (setuptools' own declaration)


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return toolchain()[0] is not None


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The library has no Python in it, so one wheel serves every Python."""
        if toolchain()[0] is None:
            return "py3", "none", "any"
        if MODE == "manylinux":
            return "py3", "none", f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
)
