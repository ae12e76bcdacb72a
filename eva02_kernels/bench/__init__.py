"""Benchmarks of the operators: ``python -m eva02_kernels.bench``. ``benchmarks/`` in a clone adds whole models."""
