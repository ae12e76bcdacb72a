"""The contract suite: every operator, dtype and sample of one backend against the float64 reference.

``--backend cpu`` (default) or ``--backend triton``; the latter runs on CPU tensors in a process started with
``TRITON_INTERPRET=1``, or on a GPU with ``--device cuda``.
"""

from __future__ import annotations

import pytest
import torch
from samples import DTYPES, samples
from torch import Tensor

import eva02_kernels
from eva02_kernels import _registry
from eva02_kernels._registry import get_spec
from eva02_kernels.testing import contract, nan_filled_memory
from eva02_kernels.testing.accuracy import measure_error


def _skip_where_refused(op, sample, dtype, backend, device):
    reasons = contract.refusal(op, sample, dtype, backend, device=device)
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "sample"), samples())
def test_is_accurate(op, sample, dtype, backend, device):
    _skip_where_refused(op, sample, DTYPES[dtype], backend, device)
    with nan_filled_memory():
        contract.check_accuracy(op, sample, DTYPES[dtype], backend, device=device)


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_gradient_behind_a_far_bias_is_accurate(dtype, layer_scale, backend, device):
    """What a GELU keeps and multiplies in 16 bits was rounded with its bias: 64 here, where rows of dout cancel it."""
    _skip_where_refused("gelu_mlp", get_spec("gelu_mlp").samples()[0], dtype, backend, device)
    generator = torch.Generator().manual_seed(0)
    x, w1, w2, rows = (torch.randn(*s, generator=generator).to(dtype) for s in ((64, 16), (24, 16), (16, 24), (32, 16)))
    dout, scale = torch.cat((rows, -rows)), torch.full((16,), 2.0) if layer_scale else None
    b1 = torch.full((24,), 64.0)

    def gradient(backend, device, dtype):
        given = [None if t is None else t.to(device, dtype) for t in (x, w1, b1, w2, scale)]
        weight = given[3].requires_grad_()
        out = eva02_kernels.gelu_mlp(*given[:3], weight, None, layer_scale=given[4], backend=backend)
        return torch.autograd.grad(out, weight, dout.to(device, dtype))[0].cpu()

    error = measure_error(gradient(backend, device, dtype), gradient("eager", "cpu", torch.float64))
    assert error.max < 4 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("wanted", ["x", "w1", "b1", "w2", "b2", "layer_scale"])
@pytest.mark.parametrize("layer_scale", [False, True])
def test_one_gradient_of_gelu_mlp_alone_is_accurate(wanted, layer_scale, backend, device):
    """Whether w2's is wanted decides whether the hidden layer is made again, centred, and which columns are summed."""
    if wanted == "layer_scale" and not layer_scale:
        pytest.skip("there is none")
    _skip_where_refused("gelu_mlp", get_spec("gelu_mlp").samples()[0], torch.bfloat16, backend, device)
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 9, 16), "w1": (13, 16), "b1": (13,), "w2": (16, 13), "b2": (16,), "layer_scale": (16,)}
    inputs = {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    row_scale, dout = torch.tensor([0.0, 1.25]), torch.randn(2, 9, 16, generator=generator).bfloat16()
    if not layer_scale:
        inputs["layer_scale"] = None

    def gradient(backend, device, dtype):
        given = {name: None if t is None else t.to(device, dtype) for name, t in inputs.items()}
        given[wanted].requires_grad_()
        out = eva02_kernels.gelu_mlp(**given, residual=given["x"], row_scale=row_scale.to(device), backend=backend)
        return torch.autograd.grad(out, given[wanted], dout.to(device, dtype))[0].cpu()

    error = measure_error(gradient(backend, device, torch.bfloat16), gradient("eager", "cpu", torch.float64))
    assert error.max < 4 * torch.finfo(torch.bfloat16).eps, error


@pytest.mark.parametrize(("op", "sample"), samples(large=False))
@pytest.mark.parametrize(("fwd", "bwd"), [("tested", "eager"), ("eager", "tested"), ("eager", "eager")])
def test_any_backward_takes_any_forward(op, sample, fwd, bwd, backend, device, monkeypatch):
    _skip_where_refused(op, sample, torch.float32, backend, device)
    if (fwd, bwd) == ("eager", "eager") and device != "cpu":
        pytest.skip("plain PyTorch on a GPU, judged by plain PyTorch on the CPU")
    spec = get_spec(op)
    fwd, bwd = (backend if name == "tested" else name for name in (fwd, bwd))

    def choose(spec, direction, backend, args):
        return spec.backend(fwd if direction == "fwd" else bwd)

    monkeypatch.setattr(_registry, "choose", choose)
    exact = contract.reference(op, sample.id, torch.float32)
    result = contract.run(op, contract.cast(contract.make(sample, torch.float32), None, device))
    multiple = max(spec.backend(b).multiple(torch.float32) for b in (fwd, bwd))
    for name, value in result.grads.items():
        errors, floor = contract.plain_errors(op, sample.id, torch.float32, name, "grads")
        contract.assert_accurate(value.cpu(), exact.grads[name], errors, name=name, floor=floor, multiple=multiple)


@pytest.mark.parametrize(("op", "sample"), samples(large=False))
def test_statistics_are_the_same_on_every_backend(op, sample, backend, device):
    """Saved tensors mean the same whoever wrote them; padding columns of hidden tensors are unspecified."""
    _skip_where_refused(op, sample, torch.float32, backend, device)
    inputs = contract.cast(contract.make(sample, torch.float32), None, device)
    canonical = get_spec(op).canonical(*inputs.args, **inputs.kwargs)
    with torch.no_grad():
        outputs = [get_spec(op).backend(b).fwd(*canonical) for b in (backend, "eager")]
    if isinstance(outputs[0], Tensor):
        return
    args = inputs.args
    hidden = {"swiglu_mlp": lambda: args[5].shape[1], "gelu_mlp": lambda: args[3].shape[1]}
    for index, (ours, eager) in enumerate(zip(*outputs, strict=True)):
        assert ours.dtype == eager.dtype and ours.shape == eager.shape and ours.stride() == eager.stride()
        if op in hidden and index == 1:
            ours, eager = (t[..., : hidden[op]()] for t in (ours, eager))
        torch.testing.assert_close(ours, eager, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("op", "sample"), samples(smoke=True))
def test_is_deterministic(op, sample, backend, device):
    _skip_where_refused(op, sample, torch.float32, backend, device)

    def gradients():
        return contract.run(op, contract.cast(contract.make(sample, torch.float32), None, device), backend=backend)

    first, second = gradients(), gradients()
    for kind in ("outputs", "grads"):
        for name, value in getattr(first, kind).items():
            assert torch.equal(value, getattr(second, kind)[name]), name


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("op", "sample"), samples(smoke=True))
def test_views_into_wider_rows_give_what_dense_inputs_give(op, sample, step, backend, device):
    """Activations, weights and parameters alike; rows apart, and columns apart."""
    _skip_where_refused(op, sample, torch.float32, backend, device)
    dense = contract.make(sample, torch.float32)
    results = [
        contract.run(op, contract.cast(inputs, None, device), backend=backend)
        for inputs in (dense, contract.spread(dense, step))
    ]
    for kind in ("outputs", "grads"):
        found, expected = (getattr(result, kind) for result in reversed(results))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("op", "sample"), samples(smoke=True))
@pytest.mark.parametrize("which", ["tested", "eager"])
def test_opcheck(op, sample, which, backend, device):
    _skip_where_refused(op, sample, torch.float32, backend, device)
    inputs = contract.cast(contract.make(sample, torch.float32), None, device)
    canonical = get_spec(op).canonical(*inputs.args, **inputs.kwargs)
    detached = tuple(
        t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in canonical
    )
    function = getattr(torch.ops.eva02_kernels, f"{op}_fwd").default
    torch.library.opcheck(function, (*detached, backend if which == "tested" else which))


@pytest.mark.parametrize(("op", "sample"), samples(smoke=True))
def test_fullgraph(op, sample, backend, device):
    _skip_where_refused(op, sample, torch.float32, backend, device)
    torch._dynamo.reset()
    contract.check_compiled(op, sample, "aot_eager", backend=backend, device=device)


@pytest.mark.parametrize(("op", "sample"), samples(smoke=True))
def test_float64_is_refused_by_name(op, sample, backend, device):
    if get_spec(op).backend(backend) is None:
        pytest.skip(f"no {backend} kernel")
    inputs = contract.cast(contract.make(sample, torch.float32), torch.float64, device)
    with pytest.raises(NotImplementedError, match=f"{op}.*{backend}(.|\n)*float64"):
        getattr(eva02_kernels, op)(*inputs.args, **inputs.kwargs, backend=backend)
