"""The CUDA backend's host side: why it does not run, and what it says where a launch cannot be made."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import eva02_kernels
from eva02_kernels import _native
from eva02_kernels.testing import executing
from eva02_kernels.testing.modes import CUDA_SIMULATED

needs_simulator = pytest.mark.skipif(not CUDA_SIMULATED.exists(), reason="`make cuda-simulator` was not run")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder of libraries, and no memory of what was found before."""
    caches = (_native.cuda_library, _native.driver_version, _native.capability_reasons)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(_native, "LIBRARY_DIR", tmp_path)
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def _built(folder, **info):
    (folder / "build_info.json").write_text(json.dumps(info))
    (folder / "libeva02_kernels_cuda.so").write_bytes(b"not a library")


def test_a_missing_library_has_a_reason(fresh):
    (fresh / "build_info.json").write_text(json.dumps({"missing_cuda": "built without an nvcc"}))
    assert _native.cuda_library() == (None, "no compiled CUDA library (built without an nvcc)")


def test_a_cpu_torch_has_a_reason(fresh, monkeypatch):
    _built(fresh, nvcc="13.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs a CUDA build of torch" in _native.cuda_library()[1]


@pytest.mark.parametrize(("version", "says"), [(0, "there is none"), (12080, "this one supports CUDA 12.8")])
def test_an_old_driver_has_a_reason(fresh, monkeypatch, version, says):
    _built(fresh, nvcc="13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_native, "driver_version", lambda: version)
    reason = _native.cuda_library()[1]
    assert "needs an NVIDIA driver for CUDA 13 or newer" in reason and says in reason


def test_a_broken_library_is_a_reason_and_no_error(fresh, monkeypatch):
    _built(fresh, nvcc="13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_native, "driver_version", lambda: 13000)
    assert "does not load" in _native.cuda_library()[1]


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_an_old_device_has_a_reason(fresh, monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reasons = _native.capability_reasons(0)
    assert bool(reasons) == refused
    assert not refused or reasons == ("needs compute capability 8.0, this device has 7.5",)


def test_cpu_tensors_are_refused():
    x = torch.randn(2, 8)
    with pytest.raises(NotImplementedError, match=r"swiglu.*'cuda' refuses(.|\n)*needs GPU tensors, got cpu"):
        eva02_kernels.swiglu(x, backend="cuda")


@needs_simulator
def test_rows_too_wide_are_refused_before_and_in_the_launcher():
    x, weight = torch.randn(2, 8200), torch.ones(8200)
    with executing("simulator"):
        with pytest.raises(NotImplementedError, match="needs at most 8192 columns, got 8200"):
            eva02_kernels.add_layer_norm(x, weight=weight, backend="cuda")
        eva02_kernels.swiglu(x, x, backend="cuda")  # nothing is summed over a row
        outputs = torch.empty_like(x), torch.empty(2), torch.empty(2)
        with pytest.raises(RuntimeError, match="run_subln_swiglu_fwd: a row has more than 8192 columns"):
            torch.ops.eva02_kernels_C.subln_swiglu_fwd_cuda(x, x, weight, weight, 1e-6, *outputs)


@needs_simulator
def test_the_sum_that_is_normalised_is_the_one_that_is_returned():
    """Rounded, as backward will read it."""
    generator = torch.Generator().manual_seed(0)
    x, residual, weight, bias = (torch.randn(*s, 40, generator=generator).bfloat16() for s in ((9,), (9,), (), ()))
    with executing("simulator"):
        normed, total = eva02_kernels.add_layer_norm(x, residual, weight, bias, backend="cuda")
        again, _ = eva02_kernels.add_layer_norm(total, None, weight, bias, backend="cuda")
    assert torch.equal(normed, again)


@needs_simulator
@pytest.mark.parametrize("op", ["add_layer_norm", "subln_swiglu"])
def test_what_outlives_a_row_is_kept_without_bank_conflicts(op):
    """Rows of EVA-02 B, forward and backward: shared memory holds parameters and sums."""
    reports: list[Any] = []
    x, weight, bias = (t.bfloat16().requires_grad_() for t in (torch.randn(34, 768), torch.ones(768), torch.zeros(768)))
    with executing("simulator", on_report=reports.append):
        args = (x, x, weight, bias) if op == "subln_swiglu" else (x, None, weight, bias)
        out = getattr(eva02_kernels, op)(*args, backend="cuda")
        torch.autograd.grad(out if isinstance(out, torch.Tensor) else out[0], (x, weight, bias), torch.randn_like(x))
    backward = [r.counters for r in reports if "bwd_kernel" in r.kernel]
    assert backward and all(c.shared_store_bytes >= 2 * 4 * x.numel() for c in backward)
    for c in (r.counters for r in reports):
        assert c.wavefronts <= 1.1 * c.ideal_wavefronts


@needs_simulator
def test_nothing_is_simulated_outside():
    with executing("simulator"):
        assert eva02_kernels.select("swiglu", torch.randn(2, 8)).backend == "cuda"
    assert eva02_kernels.select("swiglu", torch.randn(2, 8)).backend != "cuda"
