"""The suites `model`, `train` and `memory`, and how an arm is prepared."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import BlockCase, ModelArm, ModelCase, cases
from eva02_kernels import reset_stats, stats, strict
from eva02_kernels._registry import OP_NAMES
from eva02_kernels.bench.cases import Problem, make_problem
from eva02_kernels.bench.machine import Roofline, environment
from eva02_kernels.bench.measure import first_call, in_units, saved_for_backward, synchroniser
from eva02_kernels.bench.providers import AGAIN, Provider, Unsupported, build, provider, providers
from eva02_kernels.bench.rows import GATE_FAILED, OK, RAISED, UNSUPPORTED, Arm, Config, compare, empty_row, measure_rows
from eva02_kernels.bench.shapes import shape_named

Progress = Callable[[str], None]
Rows = Iterator[list[dict[str, Any]]]


# ---- model and train -------------------------------------------------------------------------------------------------
def _results(case: ModelCase, arm: ModelArm, *, train: bool, inputs: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and, with ``train``, every parameter's gradient; leaves no gradient behind."""
    inputs = case.inputs if inputs is None else inputs
    if not train:
        with torch.inference_mode():
            return {"output": arm.forward(inputs).clone()}
    outputs = arm.forward(inputs)
    case.loss(outputs).backward()
    found = {"output": outputs.detach()}
    for name, p in arm.module.named_parameters():
        if p.grad is not None:
            found[f"gradient of {name}"] = p.grad
    arm.module.zero_grad(set_to_none=True)
    inputs.grad = None
    return found


def _reference(case: ModelCase, *, train: bool) -> dict[str, Tensor]:
    module = copy.deepcopy(case.timm).double()
    inputs = case.inputs.detach().double()
    return _results(case, ModelArm(module, case.forward_of(module)), train=train, inputs=inputs)


class _Optimisers:
    """One AdamW for each module: arms that share a module share it too, as their memory does."""

    def __init__(self) -> None:
        self._by_module: dict[int, torch.optim.Optimizer] = {}

    def of(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        if id(module) not in self._by_module:
            # Rate 0 until every arm has passed its gate, which compares arms of equal weights.
            self._by_module[id(module)] = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)
        return self._by_module[id(module)]

    def start(self) -> None:
        for optimiser in self._by_module.values():
            for group in optimiser.param_groups:
                group["lr"] = 1e-6


def _call(case: ModelCase, arm: ModelArm, train: bool, optimisers: _Optimisers) -> Callable[[], Any]:
    forward, inputs = arm.forward, case.inputs
    if not train:

        def infer() -> Any:
            with torch.inference_mode():
                return forward(inputs)

        return infer
    if isinstance(case, BlockCase):
        leaves, dout = [inputs, *arm.module.parameters()], case.output_grad
        return lambda: torch.autograd.grad(forward(inputs), leaves, dout)
    optimiser = optimisers.of(arm.module)

    def step() -> None:
        case.loss(forward(inputs)).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def prepare(
    p: Provider,
    case: Any,
    device: str,
    start: Callable[[Arm, Any], Callable[[], dict[str, Tensor]]],
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    *,
    terms: int = 1,
) -> Arm:
    """Build an arm, time its first call, and let it pass the gate.

    Args:
        start: gives an arm its call, from what was built; returns what computes the results to be compared.
        expected: results of the baseline, and in float64.
        terms: see `compare`.
    """
    arm = Arm(p)
    reset_stats()
    try:
        results = start(arm, build(p, case))
        assert arm.call is not None
        arm.first_call_s = round(first_call(arm.call, synchroniser(device)), 4)
        if p.ours:
            arm.notes["backends"] = sorted({f"{op} {direction}: {name}" for op, direction, name in stats()})
        arm.gate = compare(results(), *expected, terms=terms)
    except Unsupported as reason:
        return arm.refuse(UNSUPPORTED, str(reason))
    except Exception as error:  # an arm that raises is a row with its reason; the others still run
        return arm.refuse(RAISED, f"{type(error).__name__}: {str(error).strip()[:600]}")
    if not arm.gate["passed"]:
        return arm.refuse(GATE_FAILED, "; ".join(arm.gate["failures"]))
    return arm


def run_case(
    case: ModelCase, config: Config, roofline: Roofline | None = None, progress: Progress = lambda text: None
) -> list[dict[str, Any]]:
    """Rows of one case: a forward, or a training step where the suite is `train`."""
    train, block, shape = config.suite == "train", isinstance(case, BlockCase), case.shape
    mode = ("fwd+bwd" if block else "step") if train else "fwd"
    torch._dynamo.reset()
    progress(f"{case.name} {mode}: reference")
    case.timm.train(train)
    plain = _results(case, ModelArm(case.timm, case.forward_of(case.timm)), train=train)
    expected = (plain, _reference(case, train=train))
    optimisers = _Optimisers()

    def start(arm: Arm, built: ModelArm) -> Callable[[], dict[str, Tensor]]:
        built.module.train(train)
        arm.call = _call(case, built, train, optimisers)
        if train:
            exclude = [*built.module.parameters(), *built.module.buffers()]
            arm.saved = functools.partial(saved_for_backward, lambda: built.forward(case.inputs), exclude)
        return lambda: _results(case, built, train=train)

    arms = []
    with strict():
        for p in providers(config.suite, names=list(config.providers)):
            progress(f"{case.name} {mode}: {p.name}")
            terms = shape.batch * shape.tokens if train else 1
            arms.append(prepare(p, case, case.device, start, expected, terms=terms))
        del expected, plain
        optimisers.start()
        progress(f"{case.name} {mode}: {config.rounds} rounds")
        return measure_rows(
            {"suite": config.suite, "case": case.name, "model": shape.name, "mode": mode, "dtype": config.dtype,
             "shape": shape.describe()},
            arms,
            config,
            # Backward is two products for each one of the forward.
            flops=0 if block else case.flops() * (3 if train else 1),
            items=0 if block else shape.batch,
            roofline=roofline,
        )  # fmt: skip


def run_models(config: Config, roofline: Roofline | None = None, progress: Progress = lambda text: None) -> Rows:
    """Images per second of the forward (suite `model`) or of a training step (suite `train`)."""
    for model in config.models:
        for case in cases(shape_named(model), config.torch_dtype(), config.device):
            yield run_case(case, config, roofline, progress)


# ---- memory ----------------------------------------------------------------------------------------------------------
@provider("eager", suites=("memory/ops",), baseline=True)
def _eager(problem: Problem) -> Callable[..., Any]:
    return problem.expression


@provider("ours", suites=("memory/ops",), ours=True)
def _ours(problem: Problem) -> Callable[..., Any]:
    return problem.ours


@provider("ours, recompute", suites=("memory/ops",), ours=True)
def _recompute(problem: Problem) -> Callable[..., Any]:
    import eva02_kernels

    args, kwargs = problem.arguments
    if "recompute" not in getattr(eva02_kernels, problem.op).__kwdefaults__:
        raise Unsupported("keeps no hidden layer that could be computed again")
    return lambda **tensors: getattr(eva02_kernels, problem.op)(*args, recompute=True, **kwargs)


def _saved_rows(config: Config, common: dict[str, Any], arms: list[Arm]) -> list[dict[str, Any]]:
    shape = shape_named(common["model"])
    env = environment(config.device)
    baseline = None
    rows = []
    for arm in arms:
        row = empty_row(common, arm, env)
        if arm.status == OK and arm.saved is not None:
            saved = arm.saved()
            row["saved_bytes"] = saved.bytes
            row["saved_units"] = in_units(saved.elements, shape.rows, shape.dim, shape.hidden)._asdict()
            row["saved_in_t"] = round(saved.bytes / config.torch_dtype().itemsize / (shape.rows * shape.dim), 3)
            if arm.provider.baseline:
                baseline = saved.bytes
            if baseline:
                row["saved_over_baseline"] = round(saved.bytes / baseline, 4)
        rows.append(row)
    return rows


def _memory_arms(suite: str, op: str | None, config: Config, saved_of: Callable[[Provider], Callable[[], Any]]) -> list:
    arms = []
    for p in providers(suite, op, list(config.providers)):
        if p.name.endswith(AGAIN):
            continue  # the count is exact: a second one tells nothing
        arm = Arm(p)
        try:
            arm.saved = saved_of(p)
        except Unsupported as reason:
            arm.refuse(UNSUPPORTED, str(reason))
        arms.append(arm)
    return arms


def run_memory(config: Config, roofline: Roofline | None = None, progress: Progress = lambda text: None) -> Rows:
    """Bytes kept for backward: by block, by model, by operator; exact, the same on every machine with such a device.

    In units of T = B*N*C and G = B*N*F elements.
    """
    for model in config.models:
        shape = shape_named(model)
        built: list[ModelCase] = [BlockCase(shape, config.torch_dtype(), config.device)]
        if shape.name != "host" and not config.ops:
            built.append(ModelCase(shape, config.torch_dtype(), config.device))
        for case in [] if config.ops else built:
            progress(f"{case.name} {shape.name}")

            def saved_of(p: Provider, case: ModelCase = case) -> Callable[[], Any]:
                arm = build(p, case)
                arm.module.train()
                exclude = [*arm.module.parameters(), *arm.module.buffers()]
                return functools.partial(saved_for_backward, lambda: arm.forward(case.inputs), exclude)

            with strict():
                yield _saved_rows(
                    config, _common(config, case.name, shape), _memory_arms("memory", None, config, saved_of)
                )
        for op in config.ops or OP_NAMES:
            try:
                problem = make_problem(op, shape, config.torch_dtype(), config.device)
            except Unsupported:
                continue
            progress(f"{op} {shape.name}")

            def op_saved_of(p: Provider, problem: Problem = problem) -> Callable[[], Any]:
                function = build(p, problem)
                exclude = [problem.tensors[name] for name in problem.parameters]
                return functools.partial(saved_for_backward, lambda: function(**problem.tensors), exclude)

            with strict():
                yield _saved_rows(
                    config, _common(config, op, shape), _memory_arms("memory/ops", op, config, op_saved_of)
                )


def _common(config: Config, case: str, shape: Any) -> dict[str, Any]:
    return {"suite": "memory", "case": case, "model": shape.name, "mode": "saved", "dtype": config.dtype,
            "shape": shape.describe()}  # fmt: skip
