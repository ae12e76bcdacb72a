"""A PTX simulator: runs compiled GPU kernels on the CPU, over ordinary tensors, checks every access and counts them.

``run_triton`` compiles a Triton kernel and runs it, ``run_ptx`` runs PTX text, ``driver`` makes plain Triton launches
run, ``check`` lists what is not supported, ``nvcc.build`` compiles CUDA C++ with its host code, ``Runtime`` calls the
launchers of a library that it built. The core is C++ (``csrc/gpusim``) and is built by ``make gpusim``.
"""

from eva02_kernels.testing.gpusim import nvcc
from eva02_kernels.testing.gpusim.errors import (
    BarrierError,
    BudgetError,
    DeadlockError,
    MisalignedError,
    OutOfBoundsError,
    RaceError,
    SimulationError,
    TrapError,
    UninitialisedError,
    UnsupportedError,
)
from eva02_kernels.testing.gpusim.launch import check, run_ptx
from eva02_kernels.testing.gpusim.options import options
from eva02_kernels.testing.gpusim.report import Counters, Report
from eva02_kernels.testing.gpusim.runtime import Runtime, apart
from eva02_kernels.testing.gpusim.triton import driver, run_triton

__all__ = [
    "BarrierError",
    "BudgetError",
    "Counters",
    "DeadlockError",
    "MisalignedError",
    "OutOfBoundsError",
    "RaceError",
    "Report",
    "Runtime",
    "SimulationError",
    "TrapError",
    "UninitialisedError",
    "UnsupportedError",
    "apart",
    "check",
    "driver",
    "nvcc",
    "options",
    "run_ptx",
    "run_triton",
]
