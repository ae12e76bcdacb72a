"""Small runs on scikit-learn's digits, and processes that make them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import eva02
from eva02.recipes import Recipe, get_preset
from eva02.train import clip, finetune, pretrain
from eva02.train.command import train
from eva02.train.distributed import World
from eva02.train.loop import Task, Trainer

SMALL = {
    "model.depth": 2,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "data.batch_size": 16,
    "data.val": None,
    "schedule.warmup_steps": 2,
    "schedule.steps": 6,
    "run.tensorboard": False,
    "run.profile_peak": False,
    "run.log_every": 3,
    "run.checkpoint_every": 2,
}


class PatchTeacher(nn.Module):
    """Features of each patch: a fixed random projection of its pixels."""

    def __init__(self, dim: int, patch: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, patch, patch, bias=False).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)


def recipe(task: str, **changes: Any) -> Recipe:
    """The digits' recipe at a few steps; keywords are fields with two underscores for the dot."""
    name = {"pretrain": "eva02_digits_mim", "finetune": "eva02_digits", "clip": "eva02_digits_clip"}[task]
    more = {"pretrain": {"model.mim_dim": 16}, "clip": {"clip.text_width": 32, "clip.text_depth": 1}}.get(task, {})
    small = {**SMALL, **more}
    return get_preset(name).override({**small, **{key.replace("__", "."): value for key, value in changes.items()}})


def build(recipe: Recipe, world: World, **options: Any) -> tuple[Task, Any]:
    """As the commands build it, with `PatchTeacher`."""
    if recipe.task != "pretrain":
        return {"finetune": finetune, "clip": clip}[recipe.task].build(recipe, world, **options)
    teacher, pretrain.load_teacher = (
        pretrain.load_teacher,
        lambda *_: PatchTeacher(recipe.model.config().mim_dim).to(world.device),
    )
    try:
        return pretrain.build(recipe, world, **options)
    finally:
        pretrain.load_teacher = teacher


def trainer(recipe: Recipe, output: Path | None = None, world: World | None = None) -> Trainer:
    task, loader = build(recipe, world or World())
    return Trainer(task, loader, recipe, world, output)


def run_process(task: str, changes: dict[str, Any]) -> None:
    """What a process of its own does: a run from start or last checkpoint to its end; exits with its status."""
    torch.set_num_threads(1)
    os._exit(train(recipe(task, **changes), build))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def classifier(**options: Any) -> eva02.Eva02:
    return eva02.create_model(recipe("finetune").model.name, **{**recipe("finetune").model.options, **options})


def assert_same_weights(folder: Path, reference: Path) -> None:
    """The trained models of two runs, averaged ones too, to the bit."""
    names = sorted(path.name for path in reference.glob("*.safetensors"))
    assert names
    for name in names:
        found, expected = (safetensors.torch.load_file(place / name) for place in (folder, reference))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
