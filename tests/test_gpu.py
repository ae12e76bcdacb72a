"""What only a GPU can show of the CUDA and Triton backends, beside the contract suite with ``--device cuda``."""

from __future__ import annotations

import pytest
import torch
import train_runs

import eva02_kernels
from eva02.train.distributed import World
from eva02_kernels import _triton
from eva02_kernels._registry import OP_NAMES, get_spec
from eva02_kernels.testing import contract

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    return request.param


def _skip_where_refused(op, dtype, backend):
    reasons = contract.refusal(op, _smoke(op), dtype, backend, device="cuda")
    if reasons:
        pytest.skip("; ".join(reasons))


def _smoke(op):
    return next(s for s in get_spec(op).samples() if s.smoke)


@pytest.mark.parametrize("op", OP_NAMES)
def test_forward_and_backward_are_captured_in_a_graph(op, backend):
    _skip_where_refused(op, torch.float32, backend)
    inputs = contract.cast(contract.make(_smoke(op), torch.float32), None, "cuda")

    def call():
        result = getattr(eva02_kernels, op)(*inputs.args, **inputs.kwargs, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    # Flags alone: a graph that is kept would tie the leaves' gradients to the default stream.
    differentiable = [o.requires_grad for o in call()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = contract.run(op, inputs, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    leaves = list(inputs.leaves.values())
    grads = [g for g, d in zip(contract.output_grads(expected.outputs, 0), differentiable, strict=True) if d]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
        gradients = torch.autograd.grad([o for o in captured if o.requires_grad], leaves, grads, allow_unused=True)
    found = contract.Result(
        {name: o.detach() for name, o in zip(expected.outputs, captured, strict=True)},
        {name: g for name, g in zip(inputs.leaves, gradients, strict=True) if g is not None},
    )
    given = {g.data_ptr() for g in grads}  # a residual's gradient is the incoming one itself
    for kind in ("outputs", "grads"):
        for value in getattr(found, kind).values():
            if value.data_ptr() not in given:
                value.fill_(float("nan"))
    graph.replay()
    for kind in ("outputs", "grads"):
        for name, value in getattr(found, kind).items():
            assert torch.equal(value, getattr(expected, kind)[name]), name


@pytest.mark.parametrize("op", OP_NAMES)
def test_nothing_waits_for_the_device(op, backend):
    _skip_where_refused(op, torch.float32, backend)
    inputs = contract.cast(contract.make(_smoke(op), torch.float32), None, "cuda")
    contract.run(op, inputs, backend=backend)  # compilation may
    outputs = getattr(eva02_kernels, op)(*inputs.args, **inputs.kwargs, backend=backend)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    grads = contract.output_grads({str(i): o for i, o in enumerate(outputs)}, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(eva02_kernels, op)(*inputs.args, **inputs.kwargs, backend=backend)
        torch.autograd.grad(outputs, list(inputs.leaves.values()), grads, allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("op", OP_NAMES)
def test_every_launch_choice_is_accurate(op, index, monkeypatch):
    """The suite takes the first of the choices that autotuning times."""
    monkeypatch.setattr(_triton, "tuned", lambda key, choices, run: choices[min(index, len(choices) - 1)])
    for dtype in (torch.bfloat16, torch.float32):
        contract.check_accuracy(op, _smoke(op), dtype, "triton", device="cuda")


def test_the_current_stream_is_used(backend):
    _skip_where_refused("swiglu", torch.float32, backend)
    x = torch.zeros(64, 4096, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)  # seen by the kernel only if it is queued behind
        out = eva02_kernels.swiglu(x, x, backend=backend)
    stream.synchronize()
    torch.testing.assert_close(out, torch.nn.functional.silu(x) * x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used(backend):
    _skip_where_refused("swiglu", torch.float32, backend)
    x = torch.randn(8, 64, device="cuda:1")
    with torch.cuda.device(0):
        out = eva02_kernels.swiglu(x, x, backend=backend)
    torch.testing.assert_close(out, torch.nn.functional.silu(x) * x)


@pytest.mark.parametrize("op", OP_NAMES)
def test_auto_takes_the_first_that_does_not_refuse(op):
    inputs = contract.cast(contract.make(_smoke(op), torch.bfloat16), None, "cuda")
    refused = contract.refusal(op, _smoke(op), torch.bfloat16, "cuda", device="cuda")
    assert eva02_kernels.select(op, *inputs.args, **inputs.kwargs).backend == ("triton" if refused else "cuda")


@pytest.mark.parametrize("op", ["rope_attention", "swiglu_mlp", "qkv_rope", "linear"])
def test_tf32_follows_torchs_switch(op, backend):
    _skip_where_refused(op, torch.float32, backend)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        results = []
        for allow in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allow
            inputs = contract.cast(contract.make(_smoke(op), torch.float32), None, "cuda")
            results.append(contract.run(op, inputs, backend=backend).outputs["out0"])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    assert torch.cuda.get_device_capability()[0] < 8 or not torch.equal(*results)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_a_training_step_does_not_wait_for_the_device(task, precision):
    recipe = train_runs.recipe(task, run__precision=precision, run__ema_decay=0.9, data__accumulate=2)
    trainer = train_runs.trainer(recipe, world=World(device=torch.device("cuda", 0)))
    batches = iter(trainer.loader)
    for _ in range(2):  # compilation may
        trainer.train_step(next(batches))
    batch = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values.isfinite().all()
