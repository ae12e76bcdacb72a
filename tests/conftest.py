from __future__ import annotations

import os

import pytest
import torch

from eva02_kernels import _native
from eva02_kernels.testing import executing, gpusim
from eva02_kernels.testing.modes import CUDA_SIMULATED


def pytest_addoption(parser):
    parser.addoption(
        "--backend", default="cpu", choices=["cpu", "triton", "cuda"], help="whom the contract suite tests"
    )
    parser.addoption(
        "--device",
        default="cpu",
        help="where its tensors are; triton and cuda on cpu: simulated, triton interpreted with TRITON_INTERPRET=1",
    )
    parser.addoption("--numerics", default="exact", choices=["exact", "perturb"], help="of the simulator")
    parser.addoption("--seed", type=int, default=0, help="of the simulator's orders and perturbations")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def backend(request, device):
    name = request.config.getoption("--backend")
    if name == "cpu" and _native.cpu_reasons():
        pytest.skip("; ".join(_native.cpu_reasons()))
    if name == "cpu" or device != "cpu":
        yield name
        return
    if os.environ.get("TRITON_INTERPRET") == "1" and name == "triton":
        with executing("interpreter"):
            yield name
        return
    if name == "cuda" and not CUDA_SIMULATED.exists():
        pytest.fail(f"{CUDA_SIMULATED} is missing: run `make cuda-simulator`")
    numerics, seed = request.config.getoption("--numerics"), request.config.getoption("--seed")
    with executing("simulator"), gpusim.options(numerics=numerics, seed=seed):
        yield name


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def cpu_library():
    """Skip, with the reason, where the compiled library is not there."""
    reasons = _native.cpu_reasons()
    if reasons:
        pytest.skip("; ".join(reasons))
