"""Optimisers, their parameter groups and schedules, from timm and PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from eva02.recipes import Optimizer as OptimizerRecipe
from eva02.recipes import Recipe, Schedule

ParameterGroups = list[dict[str, Any]]


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> ParameterGroups:
    """Groups by weight decay and layer; see `parameter_groups`."""
    from timm.optim import param_groups_layer_decay

    excluded = model.no_weight_decay()  # type: ignore[operator]
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=excluded, layer_decay=layer_decay)


def parameter_groups(model: nn.Module, recipe: OptimizerRecipe) -> ParameterGroups:
    """Groups by weight decay and, with layer decay, by layer (`lr_scale`).

    Parameters of one dimension, biases and what `model.no_weight_decay()` names are not decayed. With layer decay d
    over L blocks the embeddings have the scale d^(L+1), block i has d^(L-i), final norm and head have 1.
    """
    if recipe.layer_decay is not None:
        return layer_decay_groups(model, recipe.weight_decay, recipe.layer_decay)
    from timm.optim import param_groups_weight_decay

    excluded = model.no_weight_decay()  # type: ignore[operator]
    return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=excluded)


def make_optimizer(groups: ParameterGroups, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """AdamW (PyTorch's, fused) or LAMB (timm's, without its own clipping) over the groups.

    LAMB scales every parameter's step, decayed or not, as DeepSpeed's does, but does not bound the ratio to [0.01, 10]
    as that. With float16's loss scale it waits for the device once a step.
    """
    options: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
    if recipe.name == "adamw":
        return torch.optim.AdamW(groups, **options, weight_decay=0.0, fused=True)
    from timm.optim import Lamb

    return Lamb(groups, **options, weight_decay=0.0, max_grad_norm=None, always_adapt=True)


def epoch_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps of an epoch of the recipe's schedule, where one through the data has `steps_per_epoch`."""
    samples = recipe.schedule.epoch_samples
    return steps_per_epoch if samples is None else max(1, samples // recipe.data.batch_size)


def steps_of(schedule: Schedule, steps_per_epoch: int) -> tuple[int, int]:
    """Optimiser steps of the run, and how many of them warm up."""
    total = round(schedule.epochs * steps_per_epoch) if schedule.steps is None else schedule.steps
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if total < 1:
        raise ValueError(f"the schedule has no step: {schedule.epochs} epochs of {steps_per_epoch} steps")
    return total, min(warmup, total - 1)


def make_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, steps_per_epoch: int) -> Any:
    """timm's cosine: `step_update(i)` sets the rates of step i, a function of i alone (nothing to save or restore).

    Linear from 0 at step 0 to the peak at step `warmup`, or one step earlier without `warmup_from_zero`; then half a
    cosine that reaches min_lr after the last step.
    """
    from timm.scheduler import CosineLRScheduler

    class OneAhead(CosineLRScheduler):
        def _get_lr(self, t: int) -> list[float]:
            return super()._get_lr(t + 1 if t < self.warmup_t else t)

    total, warmup = steps_of(schedule, steps_per_epoch)
    return (CosineLRScheduler if schedule.warmup_from_zero else OneAhead)(
        optimizer,
        t_initial=total - warmup,
        lr_min=schedule.min_lr,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
