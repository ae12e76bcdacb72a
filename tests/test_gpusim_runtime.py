"""Launchers of compiled CUDA code, called with CPU tensors' addresses on the simulator."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from eva02_kernels.testing import gpusim

pytestmark = pytest.mark.skipif(gpusim.nvcc.unavailable() is not None, reason=str(gpusim.nvcc.unavailable()))

SOURCE = Path(__file__).parent / "data" / "gpusim_launchers.cu"
STREAM = 0x1234  # any value passes
BEYOND, SHARED, THREADS, UNREAD, ROW = 1, 2, 3, 4, 5  # what the launcher does otherwise
LAUNCH_FAILURE, INVALID_CONFIGURATION = 719, 9


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> gpusim.Runtime:
    output = tmp_path_factory.mktemp("launchers") / "launchers.so"
    flags = ("-std=c++17", "-lineinfo", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden")
    return gpusim.Runtime(gpusim.nvcc.build([SOURCE], output, *flags))


def line_of(name: str) -> int:
    return next(i for i, text in enumerate(SOURCE.read_text().splitlines(), 1) if f"// <- {name}" in text)


class Call:
    """One call of the launcher, over a view of a wider storage."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = gpusim.apart(torch.rand(5, 300, generator=generator) + 1)[:, :200]
        self.out = gpusim.apart(torch.full((5, 200), torch.nan))
        self.sums = gpusim.apart(torch.full((64,), torch.nan))  # more than is needed

    def named(self):
        return {"tensors": {"x": self.x}, "outputs": {"out": self.out}, "workspace": {"sums": self.sums}}

    def run(self, runtime: gpusim.Runtime, mode: int = 0) -> int:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (self.x, self.out, self.sums)]
        sizes = [ctypes.c_long(5), ctypes.c_int(200), ctypes.c_long(300)]
        return runtime.library.normalise(*pointers, *sizes, ctypes.c_int(mode), ctypes.c_void_p(STREAM))

    def operator(self, runtime: gpusim.Runtime, mode: int) -> None:
        if self.run(runtime, mode) == LAUNCH_FAILURE:
            raise RuntimeError("what an operator makes of its launcher's error")


@pytest.mark.parametrize("mode", [0, SHARED])
@pytest.mark.parametrize("options", [{}, {"order": "reverse", "seed": 3, "threads": 2}, {"numerics": "perturb"}])
def test_launchers_compute_and_are_counted(runtime, mode, options):
    call = Call()
    with gpusim.options(**options), runtime.launches(**call.named()) as reports:
        assert call.run(runtime, mode) == 0
    torch.testing.assert_close(call.out, call.x / call.x.sum(1, keepdim=True))
    sums, divide = reports
    assert "row_sums" in sums.kernel and "divide" in divide.kernel
    assert sums.counters.global_load_bytes == sums.traffic["x"].loaded_bytes == call.x.nbytes
    assert sums.traffic["sums"].stored_bytes == divide.traffic["sums"].loaded_bytes == 20
    assert divide.traffic["out"].stored_bytes == call.out.nbytes
    assert divide.traffic["x"].storage == call.x.data_ptr()
    assert any(where.endswith(f"{SOURCE.name}:{line_of('unread')}") for where in divide.lines)


def test_a_fault_names_kernel_line_thread_address_and_tensor(runtime):
    call = Call()
    with (
        pytest.raises(gpusim.OutOfBoundsError, match="out of bounds load of 4 bytes") as found,
        gpusim.options(bounds="view"),
        runtime.launches(**call.named()),
    ):
        call.operator(runtime, BEYOND)
    error = found.value
    assert "row_sums" in error.kernel and error.where.endswith(f"{SOURCE.name}:{line_of('beyond')}")
    assert error.cta == (0, 0, 0) and error.thread == (72, 0, 0)
    assert error.tensor == "x" and error.address == call.x.data_ptr() + 200 * 4
    assert isinstance(error.__context__, RuntimeError)


def test_memory_that_is_not_named_is_out_of_bounds(runtime):
    call = Call()
    named = call.named() | {"tensors": {}}
    with pytest.raises(gpusim.OutOfBoundsError, match="out of bounds"), runtime.launches(**named):
        call.run(runtime)
    with runtime.launches(**call.named()):  # nothing of it is left
        assert call.run(runtime) == 0


def test_what_nobody_wrote_may_not_be_used_and_outputs_are_complete(runtime):
    call = Call()
    with pytest.raises(gpusim.UninitialisedError) as found, runtime.launches(**call.named()):
        call.run(runtime, UNREAD)
    assert found.value.where.endswith(f"{SOURCE.name}:{line_of('unread')}")
    with (
        pytest.raises(gpusim.UninitialisedError, match=r"byte 3200 of out \(800 of 4000 bytes\)"),
        runtime.launches(**call.named()),
    ):
        assert call.run(runtime, ROW) == 0
    with pytest.raises(gpusim.UninitialisedError, match="no launch"), runtime.launches(outputs=[call.out]):
        pass


def test_a_refused_launch_is_told_even_where_its_error_is_ignored(runtime):
    call = Call()
    refused = r"refused launch: grid \[5,1,1\], block \[2048,1,1\]"
    with pytest.raises(gpusim.SimulationError, match=refused), runtime.launches(**call.named()):
        assert call.run(runtime, THREADS) == INVALID_CONFIGURATION


def test_faults_are_collected(runtime):
    out = gpusim.apart(torch.zeros(64))
    with gpusim.options(on_error="collect"), runtime.launches(outputs={"out": out}) as reports:
        assert runtime.library.race(ctypes.c_void_p(out.data_ptr()), None) == 0
    (error,) = reports[0].errors
    assert isinstance(error, gpusim.RaceError) and error.where.endswith(f"{SOURCE.name}:{line_of('race')}")
    with gpusim.options(races=False), runtime.launches(outputs=[out]):
        assert runtime.library.race(ctypes.c_void_p(out.data_ptr()), None) == 0


def test_bad_uses_are_refused(runtime, tmp_path):
    x = torch.zeros(4)
    with (
        pytest.raises(ValueError, match="recorded already"),
        runtime.launches([x]),
        runtime.launches([x]),
    ):
        pass
    with pytest.raises(ValueError, match="expected a CPU tensor"), runtime.launches([x.to("meta")]):
        pass
    with runtime.launches([x]):
        pass
    with pytest.raises(ValueError, match=r"not built by gpusim\.nvcc\.build"):
        gpusim.Runtime("libc.so.6")
