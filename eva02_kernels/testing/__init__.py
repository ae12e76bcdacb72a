"""What the project's tests and its users' tests share: the tolerance rule, ways of running that tests alone use."""

from eva02_kernels.testing.accuracy import Error, assert_accurate, measure_error
from eva02_kernels.testing.modes import cpu_isa, executing, nan_filled_memory

__all__ = [
    "Error",
    "assert_accurate",
    "cpu_isa",
    "executing",
    "measure_error",
    "nan_filled_memory",
]
