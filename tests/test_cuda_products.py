"""Products of the CUDA backend on the simulator, beside the contract suite: large tiles, the route of cuBLAS, and what
their loads and stores cost."""

from __future__ import annotations

import pytest
import torch
from samples import samples

import eva02_kernels
from eva02_kernels import _launch
from eva02_kernels.testing import accuracy, contract, executing, nan_filled_memory
from eva02_kernels.testing.modes import CUDA_SIMULATED

pytestmark = pytest.mark.skipif(not CUDA_SIMULATED.exists(), reason="needs the simulator's CUDA operators")
OPERATORS = ("linear", "gelu_mlp", "swiglu_mlp", "qkv_rope")


@pytest.mark.parametrize(("op", "sample"), [p for p in samples(smoke=True) if p.values[0] in OPERATORS])
def test_products_by_torch_with_kernels_around_them_are_accurate(op, sample, monkeypatch):
    """The route of compute capability 9.0 and later."""
    monkeypatch.setattr(_launch, "force_fused", False)
    with executing("simulator"), nan_filled_memory():
        for dtype in (torch.float32, torch.bfloat16):
            contract.check_accuracy(op, sample, dtype, "cuda")


def test_no_bit_of_float32_operands_is_lost():
    """Times one, a float32 comes back as it was: all three parts that it is split into are multiplied."""
    x = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    with executing("simulator"):
        right = eva02_kernels.linear(x, torch.eye(40), backend="cuda")
        left = eva02_kernels.linear(torch.eye(40), x, backend="cuda")
    assert torch.equal(right, x)
    assert torch.equal(left, x.t())


def _gradients(op, args, kwargs, backend):
    leaves = [a.detach().requires_grad_() for a in args]
    out = getattr(eva02_kernels, op)(*leaves, **kwargs, backend=backend)
    grads = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype).expand_as(out))
    return [out.detach(), *grads]


def _randn(*shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])) * scale


# Wide enough for 108 tiles of 128 x 128 of the product that is named; the others have small ones.
LARGE = {
    "forward": ("linear", lambda: (_randn(1700, 20), _randn(1000, 20, scale=0.2), _randn(1000))),
    "input": ("linear", lambda: (_randn(1700, 1000), _randn(20, 1000, scale=0.03), _randn(20))),
    "weight": ("linear", lambda: (_randn(11, 1300), _randn(1300, 1300, scale=0.03), _randn(1300))),
    "gate and up": (
        "swiglu_mlp",
        lambda: (_randn(1700, 16), *(_randn(n, *c, scale=0.3) for n, c in ((516, (16,)), (516, ())) * 2),
                 _randn(16, 516, scale=0.05), _randn(16)),
    ),
    "hidden": (
        "gelu_mlp",
        lambda: (_randn(1700, 16), _randn(1030, 16, scale=0.3), _randn(1030), _randn(16, 1030, scale=0.05),
                 _randn(16)),
    ),
}  # fmt: skip


@pytest.fixture
def _tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("product", LARGE)
def test_large_tiles_are_accurate(product, dtype):
    op, make = LARGE[product]
    args = [a.to(dtype) for a in make()]
    kernels = set()
    with executing("simulator", on_report=lambda report: kernels.add(report.kernel)), nan_filled_memory():
        found = _gradients(op, args, {}, "cuda")
    assert any("4TileILi64E" in k for k in kernels), "no product took large tiles"
    exact = _gradients(op, [a.double() for a in args], {}, "eager")
    # Operands of 8 (bfloat16) or 11 bits, and a rounded hidden layer between two products.
    limit = {torch.bfloat16: 2**-6, torch.float32: 2**-9}[dtype]
    for name, value, reference in zip(("out", *map(str, range(len(args)))), found, exact, strict=True):
        assert accuracy.measure_error(value, reference).rms < limit, name


def test_an_aligned_product_moves_whole_sectors_without_bank_conflicts():
    """EVA-02-B's attention output projection for a few tokens: 16-byte accesses, sectors used as a whole."""
    x, weight, bias = (t.bfloat16() for t in (_randn(256, 768), _randn(768, 768, scale=0.03), _randn(768)))
    reports = []
    with executing("simulator", on_report=reports.append):
        eva02_kernels.linear(x, weight, bias, residual=x, backend="cuda")
    (report,) = reports
    c = report.counters
    assert c.global_load_sectors * 32 <= 1.05 * c.global_load_bytes
    assert c.global_store_sectors * 32 == c.global_store_bytes == 2 * x.numel()
    assert c.wavefronts <= 1.1 * c.ideal_wavefronts


def _subln_mlp(gate, up, hidden=200, dtype=torch.float32):
    """Arguments of swiglu_mlp whose gates and ups are about ``gate`` and ``up``, with a sub-LN."""
    args = (_randn(37, 16), _randn(hidden, 16, scale=0.1), torch.full((hidden,), gate),
            _randn(hidden, 16, scale=0.1) + 0.01, torch.full((hidden,), up), _randn(24, hidden, scale=0.07), _randn(24),
            1 + 0.1 * _randn(hidden), 0.1 * _randn(hidden))  # fmt: skip
    return [a.to(dtype) for a in args]


def test_a_norm_in_the_product_behind_it_bears_a_large_mean():
    """Rows whose mean is 20 deviations: squares about zero would leave 4 digits of the variance fewer."""
    args = _subln_mlp(8.0, 8.0)
    with executing("simulator"), nan_filled_memory():
        found = _gradients("swiglu_mlp", args, {}, "cuda")
    exact = _gradients("swiglu_mlp", [a.double() for a in args], {}, "eager")
    assert max(accuracy.measure_error(f, e).rms for f, e in zip(found, exact, strict=True)) < 2e-5


def test_a_hidden_layer_beyond_float16_is_normalised():
    args = _subln_mlp(300.0, 300.0, dtype=torch.float16)
    with executing("simulator"), nan_filled_memory():
        assert torch.isfinite(eva02_kernels.swiglu_mlp(*args, backend="cuda")).all()
