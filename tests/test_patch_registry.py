"""Every registered model of the supported families: what `patch` replaces in it, and that nothing else changes.

What is replaced is compared with tests/data/patch_registry.json (``python tests/patch_registry.py --write``). Forward
and every gradient are compared with the unpatched model: in float64, where a difference is a wrong formula, and in
float32 by the tolerance rule, where the yardstick is the unpatched model's own error.
"""

from __future__ import annotations

import copy

import patch_registry as registry
import pytest
import torch
from torch import Tensor, nn

from eva02_kernels.patching import patch, unpatch
from eva02_kernels.testing import assert_accurate, measure_error

NAMES = registry.all_names()
SEEDS = (0, 1, 2)  # one seed of a small tensor may be exact by chance


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
    grads = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
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


@pytest.mark.parametrize("name", NAMES)
def test_model(name: str) -> None:
    original, x = registry.build(name)
    patched = copy.deepcopy(original)
    report = patch(patched)
    assert registry.record(report) == registry.expected()[name]
    assert list(patched.state_dict()) == list(original.state_dict())

    images = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    plain = [run(original, image, seed) for image, seed in zip(images, SEEDS, strict=True)]
    ours = [run(patched, image, seed) for image, seed in zip(images, SEEDS, strict=True)]
    exact_model = original.double()
    exact = [run(exact_model, image, seed) for image, seed in zip(images, SEEDS, strict=True)]
    assert [list(r) for r in ours] == [list(r) for r in exact]

    formula = run(patched.double(), images[0], SEEDS[0])
    for key, value in formula.items():
        error = measure_error(value, exact[0][key], floor=floor(key, exact[0]))
        # Row statistics are saved in float32: a float64 backward is exact to about that.
        assert error.max < 1e-5, f"{key}: differs by {error.max:.1e} in float64"

    for key in exact[0]:
        errors = [measure_error(p[key], e[key], floor=floor(key, e)) for p, e in zip(plain, exact, strict=True)]
        yardstick = max(errors, key=lambda e: e.max)._replace(rms=max(e.rms for e in errors))
        for o, e in zip(ours, exact, strict=True):
            assert_accurate(o[key], e[key], [yardstick], name=key, floor=floor(key, e))

    assert unpatch(patched) == len(report.replaced)
    assert [type(m) for m in patched.modules()] == [type(m) for m in original.modules()]
