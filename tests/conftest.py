from __future__ import annotations

import pytest
import torch

from eva02_kernels import _native


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def cpu_library():
    """Skip, with the reason, where the compiled library is not there."""
    reasons = _native.cpu_reasons()
    if reasons:
        pytest.skip("; ".join(reasons))
