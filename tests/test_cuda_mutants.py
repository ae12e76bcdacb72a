"""The mutation check of tests/cuda_mutants.py: its list fits the kernels as they are, and nothing in it survives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuda_mutants
import pytest

from eva02_kernels._registry import OP_NAMES


def test_every_mutant_can_be_made():
    """Its old text is where it is said to be, once."""
    assert len(cuda_mutants.MUTANTS) >= 40
    assert len({m.name for m in cuda_mutants.MUTANTS}) == len(cuda_mutants.MUTANTS)
    for mutant in cuda_mutants.MUTANTS:
        assert mutant.op in OP_NAMES, mutant.name
        assert cuda_mutants.mutated(mutant)


def test_every_file_of_kernels_has_mutants():
    csrc = cuda_mutants.ROOT / "csrc"
    kernels = {str(p.relative_to(csrc)) for p in csrc.rglob("*.cu")}
    assert kernels <= {m.source or m.file for m in cuda_mutants.MUTANTS}


@pytest.mark.full
def test_no_mutant_survives():
    subprocess.run([sys.executable, Path(cuda_mutants.__file__)], check=True)
