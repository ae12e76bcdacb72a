"""Training on the fused operators goes where training on timm's plain modules goes, step by step."""

from __future__ import annotations

import pytest
import timm
import torch
import train_runs
from torch import Tensor, nn

from benchmarks.pretrain import timm_student
from eva02.train.loop import Trainer


def eager(trainer: Trainer, state: dict[str, Tensor]) -> nn.Module:
    """timm's model with the weights of ours."""
    recipe = trainer.recipe
    config = recipe.model.config()
    sizes = {name: getattr(config, name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    if recipe.task == "finetune":
        model = timm.create_model(recipe.model.name, num_classes=config.num_classes, **sizes)
        model.load_state_dict(state)
        return model
    return timm_student(recipe.model.name, config, state)


def curve(recipe, batches, *, plain: bool, noise: float = 0.0) -> Tensor:
    """Loss of each step. `noise`: relative size of what is added to each initial weight."""
    task, loader = train_runs.build(recipe, train_runs.World())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter *= 1 + noise * torch.randn(parameter.shape, generator=generator)
    trainer = Trainer(task, loader, recipe)
    if plain:
        task.model = eager(trainer, task.model.state_dict())
        trainer = Trainer(task, loader, recipe)
    return torch.stack([trainer.train_step(batch)[0] for batch in batches])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("steps", [30, pytest.param(300, marks=pytest.mark.full)])
def test_fused_and_eager_converge_alike(steps, task, precision):
    """No further apart than eager is from itself, started from weights that differ by a rounding error."""
    recipe = train_runs.recipe(
        task,
        model__drop_path_rate=0.0,
        model__head_init_scale=1.0,
        optimizer__lr=3e-3,
        schedule__steps=steps,
        schedule__warmup_steps=steps // 10,
        run__precision=precision,
    )
    _, loader = train_runs.build(recipe, train_runs.World())
    batches = [batch for batch, _ in zip(loader, range(steps), strict=False)]
    fused, plain = curve(recipe, batches, plain=False), curve(recipe, batches, plain=True)
    rounding = 2.0**-24 if precision == "float32" else 2.0**-9
    noisy = [curve(recipe, batches, plain=True, noise=rounding * factor) for factor in (1.0, -1.0)]
    assert plain[-5:].mean() < plain[:5].mean() - 0.02
    noise = max((other - plain).abs().max() for other in noisy)
    apart = (fused - plain).abs().max()
    print(f"{task} {precision}: {plain[0]:.3f} -> {plain[-1]:.3f}, apart {apart:.1e}, noise {noise:.1e}")
    assert apart <= 3 * noise + 4 * torch.finfo(torch.float32).eps * plain.abs().max()
