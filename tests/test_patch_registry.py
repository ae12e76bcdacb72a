"""Every registered model of the supported families: what `patch` replaces in it, and that nothing else changes.

What is replaced is compared with tests/data/patch_registry.json (``python tests/patch_registry.py --write``). Forward
and every gradient are compared with the unpatched model: in float64, where a difference is a wrong formula, and in
float32 by the tolerance rule, where the yardstick is the unpatched model's own error.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import patch_registry as registry
import pytest
import torch
from torch import Tensor, nn

from eva02_kernels.patching import patch, unpatch
from eva02_kernels.testing import Error, assert_accurate, measure_error

NAMES = registry.all_names()
SEEDS = range(8)  # of the yardstick: the error of one run of a small tensor may be small by chance
OURS = 2  # of which our own runs are checked
# Of the rule's bounds: every model holds attention, whose backends are held to this themselves (see its spec).
ERROR_MULTIPLE = 1.5
_seen: set[bytes] = set()


def run(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Outputs and the gradients of input and parameters, in training mode (coordinate augmentations are seeded)."""
    model.train()
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().to(next(model.parameters()).dtype).requires_grad_()
    torch.manual_seed(seed)
    out = model(x)
    out = out if isinstance(out, Tensor) else out[0]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    out.backward(dout)
    # Copies: a later model.double() would convert them too.
    grads = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "grad input": x.grad} | grads


def floor(name: str, exact: dict[str, Tensor]) -> float:
    """The gradient of a k bias is a sum that vanishes where nothing is rotated: its scale is that of the v bias."""
    if not name.endswith("k_proj.bias"):
        return 0.0
    return float(exact[name.replace("k_proj", "v_proj")].square().mean().sqrt())


def test_every_model_is_in_the_table() -> None:
    assert set(registry.expected()) == set(NAMES)


def test_every_supported_family_is_walked() -> None:
    assert len(registry.timm_names("eva")) == 65
    assert len(registry.timm_names("vision_transformer")) > 150


def fingerprint(model: nn.Module, x: Tensor) -> bytes:
    """Equal for models that are one and the same when reduced (many differ in size only): structure and output."""
    with torch.no_grad():
        out = model.eval()(x)
    out = out if isinstance(out, Tensor) else out[0]
    return hashlib.sha256(f"{model} {list(model.state_dict())}".encode() + out.numpy().tobytes()).digest()


@pytest.mark.parametrize("name", NAMES)
def test_model(name: str) -> None:
    original, x = registry.build(name)
    patched = copy.deepcopy(original)
    report = patch(patched)
    assert registry.record(report) == registry.expected()[name]
    assert list(patched.state_dict()) == list(original.state_dict())
    key = fingerprint(original, x)
    if key not in _seen:
        check_numbers(original, patched, x)
        _seen.add(key)
    assert unpatch(patched) == len(report.replaced)
    assert [type(m) for m in patched.modules()] == [type(m) for m in original.modules()]


def check_numbers(original: nn.Module, patched: nn.Module, x: Tensor) -> None:
    images = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    plain = [run(original, image, seed) for image, seed in zip(images, SEEDS, strict=True)]
    ours = [run(patched, image, seed) for image, seed in zip(images[:OURS], SEEDS, strict=False)]
    original.double()
    exact = [run(original, image, seed) for image, seed in zip(images, SEEDS, strict=True)]
    assert all(list(r) == list(exact[0]) for r in ours)

    formula = run(patched.double(), images[0], SEEDS[0])
    for key, value in formula.items():
        error = measure_error(value, exact[0][key], floor=floor(key, exact[0]))
        # Row statistics are saved in float32: a float64 backward is exact to about that.
        assert error.max < 1e-5, f"{key}: differs by {error.max:.1e} in float64"

    for key in exact[0]:
        errors = [measure_error(p[key], e[key], floor=floor(key, e)) for p, e in zip(plain, exact, strict=True)]
        yardstick = Error(max(e.max for e in errors), max(e.rms for e in errors))
        for o, e in zip(ours, exact, strict=False):
            assert_accurate(o[key], e[key], [yardstick], name=key, floor=floor(key, e), multiple=ERROR_MULTIPLE)


def test_the_table_of_the_readme_is_the_one_made_from_the_data():

    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert registry.markdown().strip() in readme, "put the output of tests/patch_registry.py --markdown there"
