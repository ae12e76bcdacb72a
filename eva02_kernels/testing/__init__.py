"""What the project's tests and its users' tests share: the tolerance rule, runs of an operator, execution modes."""

from eva02_kernels.testing.accuracy import Error, assert_accurate, measure_error
from eva02_kernels.testing.modes import cpu_isa, executing, execution_mode, nan_filled_memory

__all__ = [
    "Error",
    "assert_accurate",
    "cpu_isa",
    "executing",
    "execution_mode",
    "measure_error",
    "nan_filled_memory",
]
