"""Benchmarks of operators, models and training steps: ``python -m benchmarks.run --help``."""
