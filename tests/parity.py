"""Comparing our modules with timm's: random weights, a float64 reference, and the tolerance rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


def run(
    model: nn.Module, images: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Output and the gradient of every parameter for a fixed random output gradient, all in float64."""
    dtype = next(model.parameters()).dtype
    model.zero_grad(set_to_none=True)
    out = (call or (lambda m, x: m(x)))(model, images.to(dtype))
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    out.backward(dout.to(dtype))
    results = {"output": out.detach().double()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        results["grad " + name] = parameter.grad.double()
    return results


def assert_parity(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """Every result at most twice as far from the float64 reference as plain float32 timm, beside a rounding floor.

    The blocks' tensors of one name are judged together: the error of a lone 192-element bias is too noisy a yardstick
    for twice itself.
    """
    assert ours.keys() == plain.keys() == reference.keys()
    groups: dict[str, list[str]] = {}
    for name in reference:
        groups.setdefault(re.sub(r"blocks\.\d+\.", "blocks.*.", name), []).append(name)
    failures = []
    for group, names in groups.items():
        scales = [reference[n].abs() + reference[n].square().mean().sqrt() for n in names]
        errors = [
            torch.cat([((result[n] - reference[n]) / s.clamp_min(1e-300)).flatten() for n, s in zip(names, scales)])
            for result in (ours, plain)
        ]
        (worst, usual), (worst_plain, usual_plain) = (
            (e.abs().max().item(), e.square().mean().sqrt().item()) for e in errors
        )
        floor = 4 * EPS if errors[0].numel() < 1024 else EPS  # few elements: the yardstick may be exact by luck
        if not (worst <= 2 * max(worst_plain, floor / 2) + floor and usual <= 1.5 * usual_plain + floor):
            failures.append(
                f"{group}: worst {worst / EPS:.2f} eps (timm {worst_plain / EPS:.2f}), "
                f"rms {usual / EPS:.2f} (timm {usual_plain / EPS:.2f})"
            )
    assert not failures, "\n" + "\n".join(failures)


def compare(
    timm_model: nn.Module,
    our_model: nn.Module,
    images: Tensor,
    grid: tuple[int, int],
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
    timm_call: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> None:
    """Load timm's weights into our model and compare outputs and all gradients."""
    our_model.load_state_dict(timm_model.state_dict())
    ours = run(our_model, images, call)
    plain = run(timm_model, images, timm_call or call)
    reference = run(double_reference(timm_model, grid), images, timm_call or call)
    assert_parity(ours, plain, reference)


def images(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
