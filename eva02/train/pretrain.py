"""`eva02 pretrain`: masked image modelling. A student predicts a teacher's features of patches that it cannot see."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

import eva02
from eva02.config import ModelConfig
from eva02.model import Eva02Mim
from eva02.recipes import PretrainRecipe
from eva02.train import command
from eva02.train.distributed import World
from eva02.train.loop import Batch, Task
from eva02.train.progress import Clock, forward_flops
from eva02_kernels import masked_cosine_loss

if TYPE_CHECKING:
    from eva02.data import Source


class MimTask(Task):
    """Negative cosine between the student's predictions and the teacher's features of masked patches.

    Batches have "image" and "mask", and "teacher" (B, P, D) where the features were computed beforehand.

    Args:
        model: the student.
        teacher: images (B, 3, H, W) -> features of all patches (B, P, D), called without gradients under the run's
            autocast. None where every batch brings features.
        validation: batches with "image" and "mask", made anew by each call; None evaluates nothing.
    """

    ragged = True
    model: Eva02Mim

    def __init__(
        self, model: Eva02Mim, teacher: nn.Module | None = None, validation: Callable[[World], Any] | None = None
    ) -> None:
        self.model, self.teacher, self.validation = model, teacher, validation

    def prepare(self, batch: Batch) -> Batch:
        """Adds "idx", the masked patches as flat rows: on the host, where their number is known without waiting."""
        return {**batch, "idx": batch["mask"].flatten().nonzero().squeeze(1)}

    def count(self, batch: Batch) -> int:
        return len(batch["idx"])

    def loss(self, forward: nn.Module, batch: Batch, clock: Clock) -> Tensor:
        target = batch.get("teacher")
        if target is None:
            if self.teacher is None:
                raise ValueError("there is no teacher, and the batch brings no features")
            with clock.section("teacher"), torch.no_grad():
                target = self.teacher(batch["image"])
        predictions = forward(batch["image"], batch["mask"], batch["idx"])
        return masked_cosine_loss(predictions, target.to(predictions.dtype), batch["idx"])

    def example(self, size: int) -> Batch:
        config = self.model.config
        patches = config.grid[0] * config.grid[1]
        batch = {
            "image": torch.randn(size, config.in_chans, *config.image_hw),
            "mask": torch.rand(size, patches).argsort(1) < round(patches * 105 / 256),
        }
        if self.teacher is None:
            batch["teacher"] = torch.randn(size, patches, config.mim_dim)
        return batch

    def flops(self) -> int | None:
        student = 3 * forward_flops(self.model.config)
        if self.teacher is None:
            return student
        patches = self.model.config.grid[0] * self.model.config.grid[1]
        return student + _teacher_flops(self.teacher, patches + 1)

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Loss on validation images under a fixed mask."""
        if self.validation is None:
            return {}
        total = torch.zeros(2, device=world.device)
        for batch in self.validation(world):
            batch = self.prepare(batch)
            count = self.count(batch)
            part = {key: value.to(world.device, non_blocking=True) for key, value in batch.items()}
            loss = self.loss(model, part, Clock(torch.device("cpu")))
            total += torch.stack([loss.float() * count, torch.full_like(loss, count, dtype=torch.float32)])
        loss_sum, count_sum = world.sum_(total).tolist()
        return {"loss": loss_sum / max(count_sum, 1.0)}


def build(recipe: PretrainRecipe, world: World, *, with_data: bool = True) -> tuple[MimTask, Any]:
    """Task and loader of a recipe; without data the loader is None."""
    config = recipe.model.config()
    if config.head != "mim":
        raise ValueError(f"pre-training needs model.head='mim', got {config.head!r}")
    torch.manual_seed(recipe.run.seed)
    model = cast(Eva02Mim, eva02.create_model(recipe.model.name, **recipe.model.options, device=world.device))
    if not with_data:
        return MimTask(model), None
    from eva02.data import BlockMask, MimTransform, TrainLoader, every_other, open_source

    data, mim = recipe.data, recipe.mim
    source = open_source(data.source)  # before the teacher, which may take minutes: a wrong path is told at once
    teacher = None
    if mim.teacher_cache:
        source = _cached(source, recipe)
    else:
        teacher = load_teacher(recipe, world)
    mask = BlockMask.for_grid(config.grid)
    mask = BlockMask(config.grid, mim.num_masked or mask.num_masked, mim.min_block or mask.min_block)
    loader = TrainLoader(
        source,
        MimTransform(config.image_hw, mask, data.crop_scale, data.hflip),
        data.batch_size,
        seed=recipe.run.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=data.workers,
        max_bad_images=data.max_bad_images,
    )
    validation = None
    if data.val is not None and teacher is None and world.is_main:
        print(f"{data.val} is not evaluated: the cached features are those of the training data", file=sys.stderr)
    elif data.val is not None and teacher is not None:
        held_out = open_source(data.val, "val")
        fixed = every_other(config.grid)

        def validation(world: World) -> Any:
            for batch in command.validation_batches(held_out, config.image_hw, "center", recipe, world):
                yield {"image": batch["image"], "mask": fixed.expand(len(batch["image"]), -1).contiguous()}

    return MimTask(model, teacher, validation), loader


def _teacher_flops(teacher: nn.Module, tokens: int) -> int:
    """Of one image. Where the tower is not ours: its matrices alone, without the products of tokens with each other,
    which are 3 % of EVA-CLIP g/14's."""
    config = getattr(getattr(teacher, "tower", None), "config", None)
    if isinstance(config, ModelConfig):
        return forward_flops(config)
    matrices = (module.weight for module in teacher.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    return 2 * tokens * sum(weight.numel() for weight in matrices)


def _cached(source: Source, recipe: PretrainRecipe) -> Source:
    """The source with the recipe's cached features. ValueError: they are not of what the recipe says."""
    from eva02.teacher_cache import TeacherCache

    folder, config, data = str(recipe.mim.teacher_cache), recipe.model.config(), recipe.data
    cache = TeacherCache(folder, source)
    stored = (cache.spec.channels, tuple(cache.spec.img_size), cache.spec.patches)
    wanted = (config.mim_dim, config.image_hw, config.grid[0] * config.grid[1])
    if stored != wanted:
        raise ValueError(
            f"{folder} has features of (width, image size, patches) {stored}, the student predicts {wanted}"
        )
    drawn, asked = (cache.spec.scale, cache.spec.hflip), (data.crop_scale, data.hflip)
    if drawn != asked:
        raise ValueError(
            f"{folder} has crops of (scale, probability of a flip) {drawn}; data.crop_scale and data.hflip are {asked}"
        )
    return cache


def load_teacher(recipe: PretrainRecipe, world: World) -> nn.Module:
    """The recipe's teacher, on the process's device, in the run's precision.

    Raises:
        ValueError: none is named, or its features do not fit the student's head or grid.
    """
    mim, config = recipe.mim, recipe.model.config()
    if not mim.teacher:
        raise ValueError("--teacher is needed: a CLIP vision tower, or the folder of a training run")
    from eva02.teacher import create_teacher

    dtype = getattr(torch, recipe.run.precision)
    teacher = create_teacher(mim.teacher, mim.teacher_checkpoint, device=world.device, dtype=dtype)
    if teacher.dim != config.mim_dim:
        raise ValueError(f"the teacher's features are {teacher.dim} wide, model.mim_dim is {config.mim_dim}")
    if teacher.img_size != config.image_hw:
        raise ValueError(f"the teacher sees images of {teacher.img_size}, the student of {config.image_hw}")
    return teacher


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="masked image modelling",
        description="Pre-train by masked image modelling: predict a teacher's features of masked patches.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=command.presets_text("pretrain"),
    )
    parser.add_argument("--teacher", help="tower whose features are predicted, or a run's folder")
    parser.add_argument("--teacher-checkpoint", metavar="FILE", help="its weights (mim.teacher_checkpoint)")
    parser.add_argument("--teacher-cache", metavar="DIR", help="features written by 'eva02 features'")
    flags = {
        "teacher": "mim.teacher",
        "teacher_checkpoint": "mim.teacher_checkpoint",
        "teacher_cache": "mim.teacher_cache",
    }
    command.add_arguments(parser, flags)
    parser.set_defaults(run=lambda args: command.run(args, "pretrain", build, flags))
