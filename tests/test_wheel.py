"""The files that users download: what is in them, and that they work where no compiler is."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import cuda_kernels

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "eva02_kernels/lib/libeva02_kernels_cpu.so"
CUDA_LIBRARY = "eva02_kernels/lib/libeva02_kernels_cuda.so"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc: the wheel has no CUDA library")

pytestmark = pytest.mark.wheel


def run(command: list[str | Path], env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Standard output of the command; its whole output in the error where it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, cwd=cwd)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` makes, of the files that git knows: nothing left over from a development build."""
    clone = tmp_path_factory.mktemp("source")
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT).split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    folder = tmp_path_factory.mktemp("dist")
    run(["make", "wheel-files", f"PYTHON={sys.executable}", f"DIST={folder}"], cwd=clone)
    return folder


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


@pytest.fixture(scope="session")
def platform_wheel(dist: Path) -> Path:
    return one(dist, f"eva02_kernels-*-py3-none-manylinux_2_28_{platform.machine()}.whl")


@pytest.fixture(scope="session")
def pure_wheel(dist: Path) -> Path:
    return one(dist, "eva02_kernels-*-py3-none-any.whl")


@pytest.fixture(scope="session")
def sdist(dist: Path) -> Path:
    return one(dist, "eva02_kernels-*.tar.gz")


class Environment:
    """A virtual environment in a folder of its own, used from outside the source tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run([sys.executable, "-m", "venv", folder / "venv"])
        self.python = folder / "venv" / "bin" / "python"
        # No compiler on PATH: nothing but this environment's own commands.
        self.env = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH", "VIRTUAL_ENV")}
        self.env["PATH"] = str(self.python.parent)

    def pip(self, *arguments: str | Path) -> None:
        run([self.python, "-m", "pip", "install", "-q", "--no-compile", *arguments], env=self.env, cwd=self.folder)

    def __call__(self, *arguments: str) -> str:
        return run([self.python, *arguments], env=self.env, cwd=self.folder)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    yield Environment(tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)  # a torch takes up to 6 GB


NATIVE_ERROR = """
import torch, eva02_kernels
from eva02_kernels import _native
assert _native.cpu_library()[1] is None
x, idx, out = torch.zeros(2, 3, 4), torch.tensor([[0], [3]]), torch.ones(2, 1, 4)
try:
    torch.ops.eva02_kernels_C.gather_tokens_fwd_cpu(x, idx, out)
except RuntimeError as error:
    assert "idx: expected values below 3, found 3 at position 1" in str(error), error
else:
    raise AssertionError("no error")
assert (out == 1).all()  # refused before anything is written
"""


def check_compiled(environment: Environment) -> None:
    info = environment("-m", "eva02_kernels.info")
    assert re.search(r"compiled library loaded, instruction set \w+", info), info
    assert "gnu.2.28" in info, info
    passed = environment("-m", "eva02_kernels.testing", "--backend", "cpu", "--require")
    assert re.search(r"[1-9]\d* checks passed, 0 refused", passed), passed
    environment("-c", NATIVE_ERROR)
    environment("-c", "import eva02; eva02.list_models()")


def test_platform_wheel_contents(platform_wheel: Path, pure_wheel: Path) -> None:
    assert platform_wheel.stat().st_size < 60_000_000
    with zipfile.ZipFile(platform_wheel) as archive, zipfile.ZipFile(pure_wheel) as pure:
        without_cuda = sum(i.compress_size for i in archive.infolist() if i.filename != CUDA_LIBRARY)
        assert without_cuda < 8_000_000
        names, pure_names = set(archive.namelist()), set(pure.namelist())
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/WHEEL"))
    assert LIBRARY in names
    assert "Root-Is-Purelib: false" in metadata
    assert (CUDA_LIBRARY in names) == (shutil.which("nvcc") is not None)
    assert not pure_names & {LIBRARY, CUDA_LIBRARY}
    for module in ("eva02_kernels/__init__.py", "eva02_kernels/ops/swiglu/__init__.py", "eva02/__init__.py"):
        assert module in names
        assert module in pure_names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "csrc"))]


@pytest.mark.parametrize("library", [LIBRARY, pytest.param(CUDA_LIBRARY, marks=needs_nvcc)])
def test_library_is_portable(library: str, platform_wheel: Path) -> None:
    """Old enough glibc, the stable ABI only, no Python, nothing exported, no path of the machine that built it."""
    elffile = pytest.importorskip("elftools.elf.elffile")
    with zipfile.ZipFile(platform_wheel) as archive:
        data = archive.read(library)
    elf = elffile.ELFFile(io.BytesIO(data))
    versions = {
        entry.name
        for need, entries in elf.get_section_by_name(".gnu.version_r").iter_versions()
        for entry in entries
        if need.name
    }
    glibc = [tuple(map(int, v.removeprefix("GLIBC_").split("."))) for v in versions if re.match(r"GLIBC_\d", v)]
    assert glibc
    assert max(glibc) <= (2, 28), versions
    assert not [v for v in versions if v.startswith(("GLIBCXX", "CXXABI"))], versions

    symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
    undefined = {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF" and s.name}
    exported = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] != "STB_LOCAL"}
    assert not exported, exported
    assert not [n for n in undefined if re.match(r"_?Py", n)]
    # C++ symbols of other libraries would be torch's unstable ABI; std::__throw_runtime_error is how errors are raised.
    assert {n for n in undefined if n.startswith("_Z")} <= {"_ZSt21__throw_runtime_errorPKc"}, undefined
    torch_symbols = {n for n in undefined if "torch" in n}
    assert torch_symbols
    assert all(n.startswith(("aoti_torch_", "torch_")) for n in torch_symbols), torch_symbols
    needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    system = {
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    }
    torch_libraries = {"libtorch_cpu.so"} | ({"libtorch_cuda.so"} if library == CUDA_LIBRARY else set())
    assert needed <= torch_libraries | system, needed
    assert str(ROOT).encode() not in data


@needs_nvcc
def test_cuda_kernels_are_within_their_budget(platform_wheel: Path, tmp_path: Path) -> None:
    """What nvcc made of every kernel: registers, spills, widths of accesses, matrix instructions."""
    with zipfile.ZipFile(platform_wheel) as archive:
        library = Path(archive.extract(CUDA_LIBRARY, tmp_path))
        info = json.loads(archive.read("eva02_kernels/lib/build_info.json"))
    budget = cuda_kernels.read_budget(cuda_kernels.BUDGET)
    capabilities = cuda_kernels.architectures(library)
    found = {arch: cuda_kernels.describe(library, arch, budget["launches"]) for arch in capabilities}
    assert [str(arch) for arch in found] == info["cuda_architectures"]
    assert not cuda_kernels.violations(budget, found, f"nvcc {info['nvcc']}")


@pytest.mark.parametrize("torch", ["2.14.1", pytest.param("2.10.0", marks=pytest.mark.full)])
def test_platform_wheel_runs(platform_wheel: Path, environment: Environment, torch: str) -> None:
    environment.pip(f"torch=={torch}", platform_wheel)
    assert environment("-c", "import torch; print(torch.__version__)").startswith(torch)
    check_compiled(environment)
    if shutil.which("nvcc"):
        info = environment("-m", "eva02_kernels.info")
        assert re.search(
            r"cuda +does not run here: needs an NVIDIA driver for CUDA \d+ or newer, there is none", info
        ), info


def test_without_a_compiler(platform_wheel: Path, pure_wheel: Path, sdist: Path, environment: Environment) -> None:
    """The three files, one after the other, over one torch (2.13.0)."""
    environment.pip("torch==2.13.0", platform_wheel)
    check_compiled(environment)
    if shutil.which("nvcc"):
        assert "cuda          does not run here: needs a CUDA build of torch" in environment("-m", "eva02_kernels.info")

    environment.pip("--force-reinstall", "--no-deps", pure_wheel)
    info = environment("-m", "eva02_kernels.info")
    assert "no compiled CPU library" in info
    assert "pure-Python" in info
    assert "checks passed" in environment("-m", "eva02_kernels.testing", "--backend", "eager")

    environment.pip("--force-reinstall", "--no-deps", sdist)
    info = environment("-m", "eva02_kernels.info")
    assert "no C++ compiler" in info
    assert "checks passed" in environment("-m", "eva02_kernels.testing", "--backend", "eager")


def test_failed_build_is_an_error(sdist: Path, tmp_path: Path) -> None:
    """A compiler that is named and does not work must not end in a silently pure install."""
    with tarfile.open(sdist) as archive:
        # A patch release of 3.10 or 3.11 may not have the filter yet.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = tmp_path.iterdir()
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native"],
        capture_output=True,
        text=True,
        cwd=source,
        env={**os.environ, "CXX": "false", "EVA02_BUILD": "auto"},
    )
    assert result.returncode != 0
    assert "building the compiled library failed" in result.stderr
