"""CUDA programs, host code included, on the simulator: ours, CUB's primitives, and CUTLASS's own examples."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from eva02_kernels.testing.gpusim import nvcc

pytestmark = pytest.mark.skipif(nvcc.unavailable() is not None, reason=str(nvcc.unavailable()))

PROGRAMS = Path(__file__).parent / "data" / "gpusim_programs.cu"
NAMES = re.findall(r'\{"(\w+)", run_\w+\}', PROGRAMS.read_text())
FAULTS = ("beyond", "unread", "freed")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cuda") / "programs.so"
    return nvcc.build([PROGRAMS], output, "-std=c++17", "-lineinfo", "-shared", "-Xcompiler", "-fPIC")


def call(library: Path, name: str, options: str = "") -> subprocess.CompletedProcess:
    """In a process of its own, where nothing else is loaded."""
    code = f"import ctypes, sys; sys.exit(ctypes.CDLL({str(library)!r}).run({name.encode()!r}))"
    env = {**os.environ, "EVA02_GPUSIM": options}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FAULTS])
def test_a_program_is_right_and_clean_in_every_order(programs, name):
    outputs = set()
    for options in (
        "on_error=exit",
        "on_error=exit,order=reverse,seed=1",
        "on_error=exit,order=random,seed=2,threads=2",
    ):
        done = call(programs, name, options)
        assert done.returncode == 0, f"{options}\n{done.stderr}"
        outputs.add(done.stdout)
    printed = "thread 3 of 32:  1.25 text 1099511627776%\n[     3] [2.062   ] [0.500000]\n"
    assert outputs == {printed if name == "printf" else ""}


@pytest.mark.parametrize(
    ("name", "kind"), [("beyond", "out of bounds"), ("unread", "uninitialised"), ("freed", "out of bounds")]
)
def test_a_fault_is_an_error_of_the_runtime(programs, name, kind):
    line = next(i for i, text in enumerate(PROGRAMS.read_text().splitlines(), 1) if f"// <- {name}" in text)
    done = call(programs, name)
    assert done.returncode == 0, done.stderr  # the program got cudaErrorLaunchFailure
    assert kind in done.stderr and f"{PROGRAMS.name}:{line}" in done.stderr
    assert call(programs, name, "on_error=exit").returncode == 70


def test_it_works_beside_a_cuda_torch(programs):
    """The process has loaded torch, and with it the real CUDA runtime where torch is a CUDA build."""
    import torch

    library = ctypes.CDLL(str(programs))
    assert torch.ones(2).sum() == 2
    for name in ("block_primitives", "device_scan", "calls"):
        assert library.run(name.encode()) == 0


def test_nothing_of_the_runtime_is_visible_but_its_seam(programs):
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", programs], capture_output=True, text=True, check=True
    ).stdout
    assert " run" in symbols and " eva02_gpusim_begin" in symbols
    assert not re.search(r"cuda(Malloc|LaunchKernel|GetLastError)|(?<!eva02_)gpusim", symbols)


def test_options_that_do_not_exist_are_refused(programs):
    done = call(programs, "calls", "sed=1")
    assert done.returncode == 70
    assert "unknown option sed=1" in done.stderr


# ---- CUTLASS's examples. Two of them have their sizes in the text, which are made smaller.
CUTLASS: dict[str, tuple[list[str], dict[str, str], str, str]] = {
    # arguments, sizes replaced, options, what it prints where it is right (and how often)
    "00_basic_gemm/basic_gemm": (["96", "80", "64"], {}, "", r"^Passed\."),
    "06_splitK_gemm/splitk_gemm": (
        [],
        {"length_m = 5120": "length_m = 256", "length_n = 4096": "length_n = 128", "length_k = 4096": "length_k = 512"},
        "capability=70",
        r"^Passed",
    ),
    "14_ampere_tf32_tensorop_gemm/ampere_tf32_tensorop_gemm": (["--m=128", "--n=128", "--k=64"], {}, "", r"^Passed"),
    "15_ampere_sparse_tensorop_gemm/ampere_sparse_tensorop_gemm": (
        [],
        {"length_m = 512": "length_m = 128", "length_n = 512": "length_n = 128", "length_k = 1024": "length_k = 512"},
        "",
        r"^Passed",
    ),
    "45_dual_gemm/dual_gemm": (
        [],
        {"problem_size(4096, 4096, 8192)": "problem_size(256, 128, 128)", "(321, 256, 512)": "(65, 128, 64)"},
        "",
        r"^Pass",
    ),
    "47_ampere_gemm_universal_streamk/ampere_gemm_universal_streamk": (
        ["--m=128", "--n=128", "--k=128", "--iterations=1"],
        {},
        "",
        r"Disposition: Passed",
    ),
}
PASSES = {"45_dual_gemm/dual_gemm": 5, "47_ampere_gemm_universal_streamk/ampere_gemm_universal_streamk": 5}


def cutlass() -> Path:
    (folder,) = find_spec("cutlass_library").submodule_search_locations
    return Path(folder) / "source"


def include_flags(example: str) -> list[str]:
    folders = [cutlass() / "include", cutlass() / "tools/util/include", cutlass() / "examples/common"]
    folders.append((cutlass() / "examples" / example).parent)
    if find_spec("nvidia"):
        folders += [Path(p) / "cu13" / "include" for p in find_spec("nvidia").submodule_search_locations]
    return [f"-I{folder}" for folder in folders]


@pytest.mark.full
@pytest.mark.skipif(find_spec("cutlass_library") is None, reason="nvidia-cutlass is not installed")
@pytest.mark.parametrize("example", CUTLASS)
def test_an_example_of_cutlass_passes(example, tmp_path):
    arguments, sizes, options, passed = CUTLASS[example]
    text = (cutlass() / "examples" / f"{example}.cu").read_text()
    for old, new in sizes.items():
        assert old in text
        text = text.replace(old, new)
    source = tmp_path / "example.cu"
    source.write_text(text)
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-w", *include_flags(example)]
    program = nvcc.build([source], tmp_path / "example", *flags)
    for order in ("in", "reverse", "random"):
        env = {**os.environ, "EVA02_GPUSIM": f"on_error=exit,threads=2,seed=3,order={order},{options}".rstrip(",")}
        done = subprocess.run([program, *arguments], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(re.findall(passed, done.stdout, re.MULTILINE)) == PASSES.get(example, 1), done.stdout


# ---- what is only checked, not run
CHECKED = [
    "08_turing_tensorop_gemm/turing_tensorop_gemm",
    "16_ampere_tensorop_conv2dfprop/ampere_tensorop_conv2dfprop",
    "18_ampere_fp64_tensorop_affine2_gemm/ampere_fp64_tensorop_affine2_gemm",
    "23_ampere_gemm_operand_reduction_fusion/ampere_gemm_operand_reduction_fusion",
    "35_gemm_softmax/gemm_softmax",
    "36_gather_scatter_fusion/gather_scatter_fusion",
    "37_gemm_layernorm_gemm_fusion/gemm_layernorm",
    "41_fused_multi_head_attention/fused_multihead_attention_fixed_seqlen",
    "cute/tutorial/sgemm_sm80",
]


@pytest.mark.full
@pytest.mark.skipif(find_spec("cutlass_library") is None, reason="nvidia-cutlass is not installed")
@pytest.mark.parametrize("example", [*CUTLASS, *CHECKED])
def test_no_instruction_of_an_example_is_unsupported(example, tmp_path):
    from eva02_kernels.testing import gpusim

    output = tmp_path / "example.ptx"
    source = cutlass() / "examples" / f"{example}.cu"
    flags = ["-arch=compute_80", "-ptx", "-std=c++17", "--expt-relaxed-constexpr", "-w", *include_flags(example)]
    subprocess.run(["nvcc", *flags, source, "-o", output], check=True)
    assert gpusim.check(output.read_text()) == []
