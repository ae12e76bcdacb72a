"""What the CUDA operators launch and move, on the simulator, beside the budget; test_wheel.py has the compiled side."""

from __future__ import annotations

import pytest

from benchmarks import cuda_kernels
from benchmarks.kernels import CASES
from eva02_kernels.testing.modes import CUDA_SIMULATED

pytestmark = pytest.mark.skipif(not CUDA_SIMULATED.exists(), reason="`make cuda-simulator` was not run")


def _silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def budget():
    return cuda_kernels.read_budget(cuda_kernels.BUDGET)


def test_kernels_over_rows_keep_their_budget(budget):
    """Launches, and sectors over the operator's minimum, of EVA-02 B's rows."""
    rows = [case for case in CASES if case.rows]
    launches = cuda_kernels.launches_of([case for case in rows if case.quick], _silent)
    moved = cuda_kernels.moved_by_rows(rows, *cuda_kernels.FEW, _silent)
    assert launches and len(moved) == len({case.op + case.name for case in rows if "base" in case.models})
    assert not cuda_kernels.simulated_violations(budget, launches, moved)


@pytest.mark.full
def test_whole_batches_move_the_minimum(budget):
    rows = [case for case in CASES if case.rows]
    assert not cuda_kernels.beyond_the_minimum(cuda_kernels.moved_by_rows(rows, *cuda_kernels.BATCH, print))


@pytest.mark.full
def test_all_launches_keep_their_budget(budget):
    assert not cuda_kernels.simulated_violations(budget, cuda_kernels.launches_of(CASES, print), {})


def test_what_is_worse_is_named(budget):
    name, (threads, shared) = next((n, of) for n, of in budget["launches"].items() if of[1])
    case, directions = next(iter(budget["moved"].items()))
    worse = {direction: (distinct, requested + 0.01) for direction, (distinct, requested) in directions.items()}
    lines = cuda_kernels.simulated_violations(budget, {name: (threads, shared + 16), "new": (32, 0)}, {case: worse})
    assert len(lines) == 2 + len(directions) and name in lines[0] and case in lines[-1]
    assert len(cuda_kernels.beyond_the_minimum({"swiglu all": {"fwd": (1.06, 2.0), "bwd": (1.05, 2.0)}})) == 1
