"""Kernels that nobody here wrote, on the simulator with all checks on: Liger-Kernel's Triton operators."""

from __future__ import annotations

import json
import subprocess
import sys

import inductor
import pytest
import torch
import torch.nn.functional as F
from ptx import needs_core

from eva02_kernels.testing import gpusim

needs_core()
ops = pytest.importorskip("liger_kernel.ops")


def _run(function, inputs, leaves, reference):
    """Outputs and gradients of ``function(*inputs)`` against plain PyTorch; the kernels that ran."""
    inputs = [t.requires_grad_() if i in leaves else t for i, t in enumerate(inputs)]
    wanted = [inputs[i] for i in leaves]
    expected = reference(*inputs)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, wanted, upstream)
    # Liger's backward may write into what it was given.
    copies = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs]
    with gpusim.driver(80) as reports:
        out = function(*copies)
        out = out[0] if isinstance(out, tuple) else out
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(out, [copies[i] for i in leaves], upstream.clone())
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert all(r.errors == [] for r in reports)
    return [r.kernel for r in reports]


def test_layer_norm():
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    kernels = _run(
        lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-6),
        [torch.randn(6, 96), torch.randn(96), torch.randn(96)],
        (0, 1, 2),
        lambda x, w, b: F.layer_norm(x, (96,), w, b, 1e-6),
    )
    assert kernels == ["_layer_norm_forward_kernel", "_layer_norm_backward_kernel"]


def test_rms_norm():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    kernels = _run(
        lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
        [torch.randn(6, 96), torch.randn(96)],
        (0, 1),
        lambda x, w: F.rms_norm(x, (96,), w, 1e-6),
    )
    assert kernels == ["_rms_norm_forward_kernel", "_rms_norm_backward_kernel"]


@pytest.mark.parametrize(
    ("name", "reference"), [("swiglu", F.silu), ("geglu", lambda x: F.gelu(x, approximate="tanh"))]
)
def test_gated_activations(name, reference):
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = {"swiglu": LigerSiLUMulFunction, "geglu": LigerGELUMulFunction}[name]
    _run(function.apply, [torch.randn(6, 100), torch.randn(6, 100)], (0, 1), lambda a, b: reference(a) * b)


def test_softmax():
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    _run(LigerSoftmaxFunction.apply, [torch.randn(6, 100)], (0,), lambda x: x.softmax(-1))


def test_group_norm():
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    _run(
        lambda x, w, b: LigerGroupNormFunction.apply(x, w, b, 8, 4, 1e-6),
        [torch.randn(2, 8, 20), torch.randn(8), torch.randn(8)],
        (0, 1, 2),
        lambda x, w, b: F.group_norm(x, 4, w, b, 1e-6),
    )


def test_cross_entropy():
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    target = torch.randint(0, 100, (6,))
    _run(lambda x: LigerCrossEntropyFunction.apply(x, target, None), [torch.randn(6, 100)], (0,),
         lambda x: F.cross_entropy(x, target))  # fmt: skip


def test_rope():
    from liger_kernel.ops.rope import LigerRopeFunction

    angles = torch.randn(1, 10, 16)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))

    def reference(q):
        return q * cos[:, None] + torch.cat([-q[..., 16:], q[..., :16]], -1) * sin[:, None]

    _run(
        lambda q: LigerRopeFunction.apply(q, torch.randn(1, 2, 10, 32), cos, sin),
        [torch.randn(1, 4, 10, 32)],
        (0,),
        reference,
    )


# ---- what torch.compile writes for a GPU
@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Outcome of every case of inductor.py: in a process of its own, where torch has not yet looked for a GPU."""
    output = tmp_path_factory.mktemp("inductor") / "outcome.json"
    subprocess.run([sys.executable, inductor.__file__, output], check=True, timeout=300)
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", inductor.CASES)
def test_a_program_of_inductors(name, compiled):
    assert compiled[name]["kernels"] >= 1
    assert compiled[name]["error"] is None
