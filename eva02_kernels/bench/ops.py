"""The ``ops`` suite: each operator against the expression users write today, compiled and not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eva02_kernels._registry import OP_NAMES, get_spec, reset_stats, select, stats, strict
from eva02_kernels.bench.cases import Problem, as_tuple, make_problem
from eva02_kernels.bench.machine import Roofline
from eva02_kernels.bench.measure import first_call, saved_for_backward, synchroniser
from eva02_kernels.bench.providers import Provider, Unsupported, build, provider, providers
from eva02_kernels.bench.rows import GATE_FAILED, RAISED, UNSUPPORTED, Arm, Config, compare, measure_rows
from eva02_kernels.bench.shapes import shape_named
from eva02_kernels.testing import contract

MODES = ("fwd", "fwd+bwd")
Function = Callable[..., Any]


# ---- arms -----------------------------------------------------------------------------------------------------------
@provider("eager", suites=("ops",), baseline=True)
def _eager(problem: Problem) -> Function:
    return problem.expression


@provider("compile", suites=("ops",), compiled=True)
def _compile(problem: Problem) -> Function:
    return torch.compile(problem.expression, fullgraph=True, dynamic=False)


@provider("ours", suites=("ops",), ours=True)
def _ours(problem: Problem) -> Function:
    args, kwargs = problem.arguments
    try:
        select(problem.op, *args, **kwargs)
    except NotImplementedError as error:
        raise Unsupported(str(error)) from error
    return problem.ours


# ---- one arm in one problem ------------------------------------------------------------------------------------------
def output_gradients(problem: Problem) -> tuple[Tensor, ...]:
    """Random gradients of the operator's outputs, the same for every arm."""
    with torch.no_grad():
        outputs = problem.to_public(*as_tuple(problem.expression(**problem.tensors)))
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(o.shape, generator=generator).to(o.dtype).to(o.device) for o in outputs)


def results(
    problem: Problem, function: Function, tensors: dict[str, Tensor], grads: Any, *, ours: bool, backward: bool
) -> dict[str, Tensor]:
    """Outputs and, with ``backward``, gradients by name, in the operator's arrangement."""
    with torch.set_grad_enabled(backward):
        outputs = as_tuple(function(**tensors))
        public = outputs if ours else problem.to_public(*outputs)
    named = {f"output {i}": o.detach() for i, o in enumerate(public)}
    if not backward:
        return named
    own = tuple(g.to(o.dtype) for g, o in zip(grads, public, strict=True))
    if not ours:
        own = problem.from_public(*own)
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    found = torch.autograd.grad(outputs, list(leaves.values()), own)
    return named | {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}


class Expected(NamedTuple):
    """What the baseline computes, in float64 and in the dtype that is measured."""

    reference: dict[str, Tensor]
    plain: dict[str, Tensor]


def expectation(problem: Problem, mode: str, grads: tuple[Tensor, ...]) -> Expected:
    run = functools.partial(results, problem, problem.expression, ours=False, backward=mode != "fwd")
    return Expected(run(problem.double(), [g.double() for g in grads]), run(problem.tensors, grads))


@functools.cache
def contract_failure(op: str, dtype: torch.dtype, backend: str, device: str) -> str | None:
    """Run the operator's contract checks on small inputs; the message of the first red one."""
    for sample in get_spec(op).samples():
        if sample.smoke and not contract.refusal(op, sample, dtype, backend, device=device):
            try:
                contract.check_accuracy(op, sample, dtype, backend, device=device)
            except AssertionError as error:
                return f"contract, sample {sample.id}: {error}"
    return None


def _gate(arm: Arm, problem: Problem, function: Function, mode: str, grads: Any, expected: Expected) -> None:
    if arm.provider.ours:
        args, kwargs = problem.arguments
        backend = select(problem.op, *args, **kwargs).backend
        failure = contract_failure(problem.op, problem.dtype, backend, problem.device)
        if failure:
            arm.gate = {"passed": False, "failures": [failure]}
            arm.refuse(GATE_FAILED, failure)
            return
    found = results(problem, function, problem.tensors, grads, ours=arm.provider.ours, backward=mode != "fwd")
    arm.gate = compare(found, expected.plain, expected.reference)
    if not arm.gate["passed"]:
        arm.refuse(GATE_FAILED, "; ".join(arm.gate["failures"]))


def _calls(problem: Problem, function: Function, mode: str, grads: Any, ours: bool) -> Callable[[], Any]:
    tensors, leaves = problem.tensors, problem.leaves
    if mode == "fwd":

        def forward() -> Any:
            with torch.no_grad():
                return function(**tensors)

        return forward
    own = grads if ours else problem.from_public(*grads)

    def forward_backward() -> Any:
        return torch.autograd.grad(as_tuple(function(**tensors)), leaves, own)

    return forward_backward


def prepare(p: Provider, problem: Problem, mode: str, grads: Any, expected: Expected) -> Arm:
    """Build an arm, time its first call, and let it pass the gate."""
    arm = Arm(p)
    try:
        function = build(p, problem)
    except Unsupported as reason:
        return arm.refuse(UNSUPPORTED, str(reason))
    call = _calls(problem, function, mode, grads, p.ours)
    reset_stats()
    arm.call = call
    try:
        arm.first_call_s = round(first_call(call, synchroniser(problem.device)), 5)
        if p.ours:
            arm.notes["backends"] = sorted({f"{op} {direction}: {name}" for op, direction, name in stats()})
        _gate(arm, problem, function, mode, grads, expected)
    except Exception as error:  # an arm that raises is a row with its reason; the others still run
        return arm.refuse(RAISED, f"{type(error).__name__}: {str(error).strip()[:600]}")
    if mode == "fwd":
        return arm
    exclude = [problem.tensors[name] for name in problem.parameters]
    arm.saved = functools.partial(saved_for_backward, lambda: function(**problem.tensors), exclude)
    return arm


def run_ops(
    config: Config, roofline: Roofline | None = None, progress: Callable[[str], None] = lambda text: None
) -> Iterator[list[dict[str, Any]]]:
    """Rows of each operator, model and mode in turn."""
    for op in config.ops or OP_NAMES:
        for model in config.models:
            shape = shape_named(model)
            try:
                problem = make_problem(op, shape, config.torch_dtype(), config.device)
            except Unsupported:
                continue  # the model has no such operator
            grads = output_gradients(problem)
            for mode in config.modes or MODES:
                expected = expectation(problem, mode, grads)
                torch._dynamo.reset()  # each arm compiles for this problem alone
                progress(f"{op} {shape.name} {mode}")
                found = providers("ops", op, list(config.providers))
                with strict():
                    arms = [prepare(p, problem, mode, grads, expected) for p in found]
                    backward = mode != "fwd"
                    # Five tokens are no load for a roofline: that row tells host time.
                    scale = (0.0, 0.0) if shape.name == "host" else (1.0, 1.0)
                    moved = sum(problem.bytes_moved) if backward else problem.bytes_without_gradients
                    yield measure_rows(
                        {"suite": "ops", "case": op, "model": shape.name, "mode": mode, "dtype": config.dtype,
                         "shape": shape.describe()},
                        arms,
                        config,
                        flops=scale[0] * (problem.flops[0] + backward * problem.flops[1]),
                        bytes_moved=scale[1] * moved,
                        roofline=roofline,
                    )  # fmt: skip
