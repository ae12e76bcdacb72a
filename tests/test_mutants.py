"""The mutation check of tests/mutants.py: its list fits the kernels as they are, and nothing in it survives."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

from eva02_kernels._registry import OP_NAMES


def test_every_mutant_can_be_made():
    """Its old text is where it is said to be, once, and the result is Python."""
    assert len(mutants.MUTANTS) >= 40
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS)
    for mutant in mutants.MUTANTS:
        assert set(mutant.ops.split()) <= set(OP_NAMES), mutant.name
        ast.parse(mutants.mutated(mutant))


def test_every_file_of_kernels_has_mutants():
    ops = mutants.ROOT / mutants.PACKAGE / "ops"
    kernels = {str(p.relative_to(ops)) for p in ops.rglob("*.py") if "@triton.jit" in p.read_text()}
    assert kernels <= {m.file for m in mutants.MUTANTS}


@pytest.mark.full
def test_no_mutant_survives():
    subprocess.run([sys.executable, Path(mutants.__file__)], check=True)
