"""Comparing our modules with timm's: random weights, a float64 reference, and the tolerance rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eva02_kernels import reset_stats, stats
from eva02_kernels._registry import get_spec

EPS = torch.finfo(torch.float32).eps


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights far from any default, so that a norm or bias that is left out cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim >= 2 and not name.endswith(("pos_embed", "cls_token", "mask_token")):
                noise *= parameter[0].numel() ** -0.5
            elif re.search(r"norm\d?\.weight$|(^|\.)gamma|ffn_ln\.weight$", name):
                noise = 1.0 + 0.3 * noise
            else:
                noise *= 0.3
            parameter.copy_(noise)


def rope_cat(grid: tuple[int, int], head_dim: int, pretrain_grid: int = 16) -> Tensor:
    """timm's cat(sin, cos) table, (P, 2D), computed in float64 throughout."""
    omega = 10000.0 ** (-4.0 * torch.arange(head_dim // 4, dtype=torch.float64) / head_dim)
    axes = [torch.outer(torch.arange(n, dtype=torch.float64) / n * pretrain_grid, omega) for n in grid]
    rows, columns = (angles.repeat_interleave(2, dim=1) for angles in axes)
    angles = torch.cat([rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)], dim=-1).flatten(0, 1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def double_reference(model: nn.Module, grid: tuple[int, int]) -> nn.Module:
    """A timm model moved to float64, with RoPE tables of float64 accuracy (its own are rounded to float32)."""
    model = model.double()
    if model.rope is not None:
        table = rope_cat(grid, model.rope.dim)
        model.rope.get_embed = lambda shape=None, dtype=None: table
    return model


def run(model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output and the gradient of every parameter for a fixed random output gradient, all in float64.

    The gradient of the input is there too if it requires one.
    """
    dtype = next(model.parameters()).dtype
    model.zero_grad(set_to_none=True)
    leaf = x.detach().to(dtype).requires_grad_(x.requires_grad)
    out = (call or (lambda m, x: m(x)))(model, leaf)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    out.backward(dout.to(dtype))
    results = {"output": out.detach().double()}
    if x.requires_grad:
        results["grad of input"] = leaf.grad.double()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        results["grad " + name] = parameter.grad.double()
    return results


Results = Mapping[str, Tensor]


def _errors(results: Results, reference: Results, names: list[str]) -> tuple[float, float, int]:
    """Largest and rms error of the named tensors together, each element in parts of its value plus its tensor's rms."""
    parts = []
    for name in names:
        expected = reference[name]
        scale = expected.abs() + expected.square().mean().sqrt()
        parts.append(((results[name] - expected) / scale.clamp_min(1e-300)).flatten())
    error = torch.cat(parts)
    return error.abs().max().item(), error.square().mean().sqrt().item(), error.numel()


def _error_multiple() -> float:
    """Largest multiple of the rule that a backend which ran since `reset_stats` states for itself."""
    multiples = [
        backend.error_multiple for op, _, name in stats() for backend in get_spec(op).backends if backend.name == name
    ]
    return max(multiples, default=1.0)


def assert_parity(ours: Results, yardsticks: Sequence[tuple[Results, Results]], multiple: float) -> None:
    """The tolerance rule of `eva02_kernels.testing`: at most twice plain float32 timm's error against float64.

    `yardsticks` holds (timm in float32, timm in float64) for several inputs, of which the first is that of `ours`: for
    few elements one input's error is too noisy to be a limit. The blocks' tensors of one name are judged together.
    `multiple` widens both bounds, see `Backend.error_multiple`.
    """
    plain, reference = yardsticks[0]
    assert ours.keys() == plain.keys() == reference.keys()
    groups: dict[str, list[str]] = {}
    for name in reference:
        groups.setdefault(re.sub(r"blocks\.\d+\.", "blocks.*.", name), []).append(name)
    failures = []
    for group, names in groups.items():
        worst, usual, numel = _errors(ours, reference, names)
        small = numel < 1024
        limits = [_errors(*pair, names) for pair in (yardsticks if small else yardsticks[:1])]
        least = 2 * EPS if small else 0.0
        worst_plain, usual_plain = (max(least, *(limit[i] for limit in limits)) for i in range(2))
        allowed = multiple * (2 * worst_plain + EPS), multiple * (1.5 * usual_plain + EPS / 4)
        if not (worst <= allowed[0] and usual <= allowed[1]):
            failures.append(
                f"{group} ({numel}): worst {worst / EPS:.2f} eps (timm {worst_plain / EPS:.2f}), "
                f"rms {usual / EPS:.2f} (timm {usual_plain / EPS:.2f})"
            )
    assert not failures, "\n" + "\n".join(failures)


def compare(
    theirs: nn.Module,
    ours: nn.Module,
    inputs: Sequence[Tensor],
    double: Callable[[nn.Module], nn.Module],
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
    names: Callable[[str], str] = str,
) -> None:
    """Outputs and all gradients of our model on the first input; timm's error on every input is the yardstick.

    Args:
        theirs, ours: models that hold the same weights.
        double: moves timm's model to float64.
        call: how to run either; the default calls it on the input.
        names: timm's parameter name -> ours.
    """

    def renamed(results: Results) -> dict[str, Tensor]:
        return {names(key): value for key, value in results.items()}

    reset_stats()
    actual = run(ours, inputs[0], call)
    multiple = _error_multiple()
    plain = [renamed(run(theirs, x, call)) for x in inputs]
    reference = double(theirs)
    assert_parity(actual, [(p, renamed(run(reference, x, call))) for p, x in zip(plain, inputs, strict=True)], multiple)


def images(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
