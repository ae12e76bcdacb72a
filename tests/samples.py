"""Samples of the operators' specs as pytest parameters."""

from __future__ import annotations

import pytest
import torch

from eva02_kernels._registry import OP_NAMES, get_spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = ("S257", "L", "B", "Ti", "mim", "F2730")  # left out of the slower walks


def samples(*, smoke: bool = False, large: bool = True) -> list:
    return [
        pytest.param(op, sample, id=f"{op}-{sample.id}", marks=[pytest.mark.full] if sample.full else [])
        for op in OP_NAMES
        for sample in get_spec(op).samples()
        if (sample.smoke or not smoke) and (large or not (sample.full or sample.id in LARGE))
    ]
