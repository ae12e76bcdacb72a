"""What operators promise beyond accuracy: selection, errors, autograd, compilation; and the CPU backend's own tests."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from samples import DTYPES, samples
from torch.utils._python_dispatch import TorchDispatchMode

import eva02_kernels
from eva02_kernels import _native
from eva02_kernels._registry import OP_NAMES, get_spec
from eva02_kernels.rope import RopeTable
from eva02_kernels.testing import contract, cpu_isa, nan_filled_memory


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.parametrize(("op", "sample"), samples(large=False))
def test_cpu_is_accurate_on_other_instruction_sets(op, sample, isa, cpu_library):
    if _native.ISA_NAMES.index(isa) > _native.ISA_NAMES.index(_native.cpu_isa()):
        pytest.skip(f"this CPU lacks {isa}")
    with cpu_isa(isa):
        if contract.refusal(op, sample, torch.float32, "cpu"):
            pytest.skip("refused")
        for dtype in DTYPES.values() if sample.smoke else (torch.float32,):
            with nan_filled_memory():
                contract.check_accuracy(op, sample, dtype, "cpu")


@pytest.mark.parametrize(("op", "sample"), samples())
def test_eager_operator_is_accurate(op, sample):
    """The eager backend inside the operator (auto ends here), not the reference that ``backend="eager"`` is."""
    inputs = contract.cast(contract.make(sample, torch.float32), None)
    canonical = get_spec(op).canonical(*inputs.args, **inputs.kwargs)
    function = getattr(torch.ops.eva02_kernels, f"{op}_fwd").default
    outputs = function(*canonical, "eager")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    reference = get_spec(op).reference(*canonical)
    reference = reference if isinstance(reference, tuple) else (reference,)
    for ours, expected in zip(outputs, reference, strict=False):
        if ours.numel():
            torch.testing.assert_close(ours, expected)


def test_backward_twice_gives_the_same_gradient():
    gate = torch.randn(5, 64, requires_grad=True)
    out = eva02_kernels.swiglu(gate).sum()
    (first,) = torch.autograd.grad(out, gate, retain_graph=True)
    (second,) = torch.autograd.grad(out, gate)
    assert torch.equal(first, second)


@pytest.mark.parametrize("op", OP_NAMES)
def test_fullgraph_inductor(op):
    torch._dynamo.reset()
    contract.check_compiled(op, next(s for s in get_spec(op).samples() if s.smoke), "inductor")


@pytest.mark.parametrize(("op", "sample"), samples(smoke=True))
def test_gradcheck_of_the_reference_and_its_operator(op, sample):
    inputs = contract.cast(contract.make(sample, torch.float64), None)
    leaves = list(inputs.leaves.values())
    for backend in ("eager", "auto"):  # float64 ends at eager inside the operator

        def function(*tensors, backend=backend):
            out = getattr(eva02_kernels, op)(*inputs.args, **inputs.kwargs, backend=backend)
            return tuple(o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad)

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_undefined_grad=False)


# ---- second derivatives ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("op", "sample"), samples(smoke=True))
def test_second_derivative_is_refused_and_eager_has_it(op, sample):
    def penalty(backend, dtype):
        inputs = contract.cast(contract.make(sample, dtype), dtype)
        out = getattr(eva02_kernels, op)(*inputs.args, **inputs.kwargs, backend=backend)
        out = out[0] if isinstance(out, tuple) else out
        leaf = next(iter(inputs.leaves.values()))
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return grad, leaf

    grad, leaf = penalty("auto", torch.float32)
    with pytest.raises(NotImplementedError, match=f'second derivatives of {op}: use backend="eager"'):
        torch.autograd.grad(grad.square().sum(), leaf)
    grad, leaf = penalty("eager", torch.float64)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    assert second.isfinite().all()


def test_eager_takes_vmap_and_func_grad():
    gate, up = torch.randn(2, 4, 8).unbind(0)
    batched = torch.vmap(lambda g, u: eva02_kernels.swiglu(g, u, backend="eager"))(gate, up)
    torch.testing.assert_close(batched, eva02_kernels.swiglu(gate, up))
    grad = torch.func.grad(lambda g: eva02_kernels.swiglu(g, up, backend="eager").sum())(gate)
    gate.requires_grad_()
    eva02_kernels.swiglu(gate, up).sum().backward()
    torch.testing.assert_close(grad, gate.grad)


# ---- selection -------------------------------------------------------------------------------------------------------
def test_a_named_backend_never_falls_back():
    x = torch.randn(3, 8)
    for backend in ("cuda", "triton"):
        with pytest.raises(NotImplementedError, match=f"swiglu.*{backend}"):
            eva02_kernels.swiglu(x, backend=backend)
    with pytest.raises(NotImplementedError, match="float64"):
        eva02_kernels.swiglu(x.double(), backend="cpu")
    with pytest.raises(ValueError, match="backend: expected 'auto'"):
        eva02_kernels.swiglu(x, backend="gpu")


def test_select_tells_the_backend_and_every_reason(cpu_library):
    chosen = eva02_kernels.select("swiglu", torch.randn(3, 8))
    assert chosen.backend == "cpu" and set(chosen.reasons) == {"cuda", "triton", "eager"}
    assert all(chosen.reasons.values())
    chosen = eva02_kernels.select("swiglu", torch.randn(3, 8, dtype=torch.float64))
    assert chosen.backend == "eager" and "float64" in chosen.reasons["cpu"][0]
    assert "cpu: " in str(chosen)
    with pytest.raises(ValueError, match="op: expected one of"):
        eva02_kernels.select("swish", torch.randn(3))


def test_strict_refuses_eager(monkeypatch):
    x = torch.randn(3, 8, dtype=torch.float64)
    with eva02_kernels.strict():
        with pytest.raises(NotImplementedError, match="strict mode"):
            eva02_kernels.swiglu(x)
        eva02_kernels.swiglu(x, backend="eager")  # asked for by name: allowed
        with eva02_kernels.strict(False):
            eva02_kernels.swiglu(x)
    eva02_kernels.swiglu(x)


def test_stats_count_calls_by_direction_and_backend(cpu_library):
    eva02_kernels.reset_stats()
    x = torch.randn(3, 8, requires_grad=True)
    eva02_kernels.swiglu(x).sum().backward()
    eva02_kernels.swiglu(x.detach())
    assert eva02_kernels.stats() == {("swiglu", "fwd", "cpu"): 2, ("swiglu", "bwd", "cpu"): 1}


# ---- how operators are used ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    sample = next(s for s in get_spec("swiglu_mlp").samples() if s.smoke)
    inputs = contract.cast(contract.make(sample, torch.float32), None)
    leaves = list(inputs.leaves.values())

    def forward(x):
        return eva02_kernels.swiglu_mlp(x, *inputs.args[1:], **{**inputs.kwargs, "residual": x})

    plain = torch.autograd.grad(forward(inputs.args[0]).sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(forward, inputs.args[0], use_reentrant=reentrant)
    if reentrant:  # reentrant checkpointing knows backward() alone
        out.sum().backward()
        again = [t.grad for t in leaves]
    else:
        again = torch.autograd.grad(out.sum(), leaves)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_functional_call():
    module = torch.nn.Linear(8, 8)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = module

        def forward(self, x):
            return eva02_kernels.linear(x, self.linear.weight, self.linear.bias)

    x = torch.randn(3, 8)
    state = {k: torch.randn_like(v) for k, v in Wrapped().state_dict().items()}
    out = torch.func.functional_call(Wrapped(), state, (x,))
    torch.testing.assert_close(out, torch.nn.functional.linear(x, state["linear.weight"], state["linear.bias"]))


def test_one_tensor_in_two_places():
    x = torch.randn(5, 24, requires_grad=True)
    eva02_kernels.swiglu(x, x).sum().backward()
    y = x.detach().clone().requires_grad_()
    (torch.nn.functional.silu(y) * y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_frozen_input_gets_no_gradient(cpu_library):
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    eva02_kernels.linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations_and_weights_but_not_norms(dtype):
    sample = next(s for s in get_spec("swiglu_mlp").samples() if s.id == "subln")
    inputs = contract.cast(contract.make(sample, torch.float32), None)
    with torch.autocast("cpu", dtype=dtype):
        args = get_spec("swiglu_mlp").canonical(*inputs.args, **inputs.kwargs)
        out = eva02_kernels.swiglu_mlp(*inputs.args, **inputs.kwargs)
    x, w_gate, _, _, _, w_down, _, norm_weight, _, _, pre_weight, *_ = args
    assert x.dtype == w_gate.dtype == w_down.dtype == out.dtype == dtype
    assert norm_weight.dtype == pre_weight.dtype == torch.float32
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in inputs.leaves.values())


def test_autocast_leaves_the_table_in_float32():
    table = eva02_kernels.rope_2d((2, 2), 16)
    q = torch.randn(1, 5, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        args = get_spec("rope_attention").canonical(q, q, q, table)
    assert args[0].dtype == torch.bfloat16 and args[3].dtype == torch.float32


# ---- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda t: eva02_kernels.swiglu(t(3, 8), t(3, 7)), r"up: expected shape \(3, 8\); got \(3, 7\)"),
        (lambda t: eva02_kernels.swiglu(t(3, 7)), "gate: expected an even last dim"),
        (lambda t: eva02_kernels.swiglu(t(3, 8), t(3, 8).double()), "up: expected torch.float32; got torch.float64"),
        (lambda t: eva02_kernels.swiglu(t(3, 8).long()), "gate: expected float32"),
        (lambda t: eva02_kernels.linear(t(3, 8), t(4, 7)), r"weight: expected \(N, 8\)"),
        (lambda t: eva02_kernels.rope_attention(t(1, 5, 3, 8), t(1, 5, 2, 8), t(1, 5, 2, 8)), "Hkv dividing H"),
        (
            lambda t: eva02_kernels.rope_attention(*[t(1, 6, 2, 8)] * 3, eva02_kernels.rope_2d((2, 2), 8)),
            "rope: the table is for 4 patches, the sequence has 5",
        ),
        (
            lambda t: eva02_kernels.rope_attention(*[t(1, 5, 2, 8)] * 3, eva02_kernels.rope_2d((2, 2), 16)),
            "rope: made for head_dim 16; got heads of 8",
        ),
        (
            lambda t: eva02_kernels.rope_attention(
                *[t(2, 5, 2, 8)] * 3,
                eva02_kernels.rope_2d(torch.tensor([[2, 2]], dtype=torch.int32), 8, max_grid=(2, 2)),
            ),
            "rope: expected a grid for each of the 2 sequences; got 1",
        ),
        (
            lambda t: eva02_kernels.rope_attention(*[t(1, 5, 2, 8)] * 3, eva02_kernels.rope_2d((2, 2), 8).to("meta")),
            "rope: expected tensors on cpu; got one on meta",
        ),
        (
            lambda t: eva02_kernels.rope_attention(*[t(5, 2, 8)] * 3, cu_seqlens=torch.tensor([0, 5]).int()),
            "max_seqlen: expected an int",
        ),
        (lambda t: eva02_kernels.mask_tokens(t(1, 4, 8), torch.zeros(1, 4), t(8)), r"mask: expected bool \(1, 4\)"),
        (lambda t: eva02_kernels.gather_tokens(t(1, 4, 8), t(1, 2)), "idx: expected an int32 or int64 tensor"),
        (lambda t: eva02_kernels.add_layer_norm(t(2, 4, 8), row_scale=t(3)), r"row_scale: expected float32 \(2,\)"),
        (
            lambda t: eva02_kernels.qkv_rope(t(1, 4, 8), t(10, 8), num_heads=2),
            "weight: expected rows that 6 heads divide",
        ),
        (lambda t: eva02_kernels.rope_2d((2, 2), 6), "head_dim: expected a positive multiple of 4"),
        (lambda t: RopeTable.from_cos_sin(t(4, 8), t(3, 8)), "cos, sin: expected equal shapes"),
        (
            lambda t: eva02_kernels.ragged_index(torch.zeros(2, 3).long(), [1, 4]),
            "counts: expected 2 integers from 0 to 3",
        ),
    ],
)
def test_bad_input_names_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call(lambda *shape: torch.randn(*shape))


def test_an_index_out_of_range_is_an_error_on_the_cpu(cpu_library):
    x = torch.randn(2, 4, 8)
    with pytest.raises(RuntimeError, match="idx"):
        eva02_kernels.gather_tokens(x, torch.tensor([[0, 4], [0, 1]]))
    table = eva02_kernels.rope_2d((2, 2), 8)
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(RuntimeError, match="keep_idx"):
        eva02_kernels.rope_attention(q, q, q, table, keep_idx=torch.tensor([[0, 7]]))


# ---- saved tensors ---------------------------------------------------------------------------------------------------
def test_an_mlp_keeps_gate_and_up_and_recompute_keeps_x_alone(cpu_library):
    rows, width, hidden = 10, 16, 30
    x, w_gate, w_up, w_down = (
        torch.randn(s, requires_grad=True)
        for s in ((1, rows, width), (hidden, width), (hidden, width), (width, hidden))
    )
    parameters = {t.untyped_storage().data_ptr() for t in (x, w_gate, w_up, w_down)}

    def kept(recompute):
        sizes = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = eva02_kernels.swiglu_mlp(x, w_gate, None, w_up, None, w_down, None, recompute=recompute)
        out.sum().backward()
        return sum(sizes.values())

    assert kept(False) == rows * 2 * 32 * 4  # rows padded to a multiple of 8
    assert kept(True) == 0


@pytest.mark.parametrize("op", ["swiglu_mlp", "gelu_mlp"])
def test_an_mlp_without_gradients_writes_nothing_for_backward(op):
    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.name() == f"eva02_kernels::{op}_fwd":
                self.kept = result[1].numel()
            return result

    x, w, w_down = (torch.randn(*s, requires_grad=True) for s in ((1, 10, 16), (30, 16), (16, 30)))
    up = (w, None) if op == "swiglu_mlp" else ()
    with Outputs() as seen:
        getattr(eva02_kernels, op)(x, w, None, *up, w_down, None)
    assert seen.kept > 0
    with Outputs() as seen, torch.no_grad():
        getattr(eva02_kernels, op)(x, w, None, *up, w_down, None)
    assert seen.kept == 0


# ---- memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_the_memory_of_a_call_is_kept_for_the_next_and_given_back(cpu_library):
    code = textwrap.dedent("""
        import os, resource
        import torch, eva02_kernels

        rows, width, hidden = 2048, 16, 4096  # 32 MiB of hidden layer, an output of 128 KiB
        x, w, w_down = torch.randn(rows, width), torch.randn(hidden, width), torch.randn(width, hidden)

        @torch.no_grad()
        def call():
            eva02_kernels.swiglu_mlp(x, w, None, w, None, w_down, None, backend="cpu")
            return resident()

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        call()
        eva02_kernels.empty_cache()
        before = resident()
        assert call() - before > 24 << 20
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 1000  # the hidden layer is 8192 pages
        eva02_kernels.empty_cache()
        assert resident() - before < 8 << 20
        limit = torch.ops.eva02_kernels_C.keep_workspaces(8 << 20)
        assert limit == 256 << 20
        assert call() - before < 16 << 20
        assert torch.ops.eva02_kernels_C.keep_workspaces(limit) == 8 << 20
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- tables and indices ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [768, 1000])  # whole vectors on every instruction set, a tail with AVX-512
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("op", ["add_layer_norm", "subln_swiglu"])
def test_outputs_that_bypass_the_caches_are_those_that_do_not(op, isa, width, cpu_library):
    """2 MiB and more are stored past the caches; a row's values do not depend on the other rows."""
    if _native.ISA_NAMES.index(isa) > _native.ISA_NAMES.index(_native.cpu_isa()):
        pytest.skip(f"this CPU lacks {isa}")
    generator = torch.Generator().manual_seed(0)
    a, b, d = (torch.randn(1024, width, generator=generator) for _ in range(3))
    weight, bias = torch.randn(2, width, generator=generator)

    def run(rows: slice) -> list[torch.Tensor]:
        inputs = [t[rows].clone().requires_grad_() for t in (a, b)]
        outputs = getattr(eva02_kernels, op)(*inputs, weight, bias, backend="cpu")
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        return [*outputs, *torch.autograd.grad(outputs, inputs, [d[rows]] * len(outputs))]

    with cpu_isa(isa), nan_filled_memory():
        whole = run(slice(None))
        parts = [run(slice(first, first + 128)) for first in range(0, 1024, 128)]
    for found, expected in zip(whole, zip(*parts, strict=True), strict=True):
        assert found.numel() * 4 >= 2 << 20
        assert torch.equal(found, torch.cat(expected))


def test_axis_table_follows_the_formula():
    table = eva02_kernels.rope_2d((3, 5), 16, pretrain_grid=16)
    omega = 10000.0 ** (-2 * torch.arange(4, dtype=torch.float64) / 8)
    rows = torch.arange(3, dtype=torch.float64) / 3 * 16
    columns = torch.arange(5, dtype=torch.float64) / 5 * 16
    angles = torch.cat([rows, columns])[:, None] * omega
    torch.testing.assert_close(table.cos, angles.cos().float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(table.sin, angles.sin().float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_dot_products_depend_on_the_offset_alone(layout):
    table = eva02_kernels.rope_2d((6, 6), 16, pretrain_grid=None, layout=layout)
    vector = torch.randn(2, 16).double()
    x = vector[:, None, None].expand(2, 36, 1, 16)
    rotated = eva02_kernels.apply_rope(x, table, num_prefix_tokens=0, backend="eager")[:, :, 0]
    scores = (rotated[0] @ rotated[1].T).view(6, 6, 6, 6)
    torch.testing.assert_close(scores[1, 2, 3, 5], scores[2, 1, 4, 4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[3, 4, 5, 5], rtol=1e-5, atol=1e-5)


def test_ragged_index_makes_flat_indices():
    idx = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert eva02_kernels.ragged_index(idx, [1, 3]).tolist() == [2, 4, 5, 3]
    assert eva02_kernels.ragged_index(idx, torch.tensor([2, 0]), seq_len=10).tolist() == [2, 0]
    x = torch.randn(2, 3, 4)
    picked = eva02_kernels.gather_tokens(x, eva02_kernels.ragged_index(idx, [1, 2]))
    torch.testing.assert_close(picked, torch.stack([x[0, 2], x[1, 1], x[1, 2]]))


def test_importing_starts_no_device_context_and_no_compiler():
    code = (
        "import sys, eva02_kernels, torch; assert not torch.cuda.is_initialized(); "
        "assert 'triton' not in sys.modules or not hasattr(sys.modules['triton'], '_eva02'); "
        "assert 'torch.utils.cpp_extension' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class _SeenOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _forward_and_backward():
    gate = torch.randn(3, 8, requires_grad=True)
    torch.autograd.grad(eva02_kernels.swiglu(gate, gate.detach()).sum(), gate)


def test_modes_and_the_profiler_see_both_operators():
    with _SeenOperators() as seen:
        _forward_and_backward()
    with torch.profiler.profile() as profile:
        _forward_and_backward()
    profiled = {event.name for event in profile.events()}
    for name in ("eva02_kernels::swiglu_fwd", "eva02_kernels::swiglu_bwd"):
        assert name in seen.names
        assert name in profiled


def test_a_plain_call_goes_around_the_dispatcher(monkeypatch):
    # A call that went through it would find no operator.
    monkeypatch.setattr(torch.ops, "eva02_kernels", None)
    _forward_and_backward()


def test_meta_tensors_compute_nothing():
    out = eva02_kernels.swiglu(torch.empty(3, 8, device="meta"), torch.empty(3, 8, device="meta"))
    assert out.is_meta
    assert out.shape == (3, 8)
