"""`eva02 clip`: contrastive training of an image and a text tower."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import eva02
import eva02.clip
from eva02.checkpoint import read_state_dict
from eva02.recipes import ClipRecipe, Recipe
from eva02.train import command
from eva02.train.distributed import World
from eva02.train.loop import Batch, Task
from eva02.train.optim import ParameterGroups, layer_decay_groups
from eva02.train.progress import Clock, forward_flops, text_flops
from eva02_kernels import clip_loss


class ClipTask(Task):
    """Symmetric contrastive loss over all processes' pairs. Batches have "image" and "text" (B, context).

    Args:
        model: both towers.
        classes: names for zero-shot classification of the validation images.
        prompt: a class's text, with one place for its name.
        validation: batches with "image", "label" and "counts", made anew by each call; None evaluates nothing.
    """

    accumulates = False  # a part of a batch has other negatives than the whole

    model: eva02.clip.Clip

    def __init__(
        self,
        model: eva02.clip.Clip,
        classes: Sequence[str] = (),
        prompt: str = "a photo of a {}.",
        validation: Callable[[World], Any] | None = None,
        group: Any = None,
    ) -> None:
        self.model, self.classes, self.prompt, self.validation = model, classes, prompt, validation
        self.group = group

    def loss(self, forward: nn.Module, batch: Batch, clock: Clock) -> Tensor:
        image, text, logit_scale = forward(batch["image"], batch["text"])
        return clip_loss(image, text, logit_scale, group=self.group)

    def parameter_groups(self, recipe: Recipe) -> ParameterGroups:
        """Tower by layer by weight decay, each tower at its own rate, and `logit_scale` at the optimiser's."""
        assert isinstance(recipe, ClipRecipe)
        clip, decay = recipe.clip, recipe.optimizer.weight_decay
        groups: ParameterGroups = [{"params": [self.model.logit_scale], "weight_decay": 0.0, "lr": recipe.optimizer.lr}]
        for tower, rate, layer_decay in (
            (self.model.visual, clip.vision_lr, clip.vision_layer_decay),
            (self.model.text, clip.text_lr, clip.text_layer_decay),
        ):
            groups += [{**group, "lr": rate} for group in layer_decay_groups(tower, decay, layer_decay)]
        return groups

    def after_step(self) -> None:
        self.model.clamp_logit_scale_()

    def example(self, size: int) -> Batch:
        vision, text = self.model.config.vision, self.model.config.text
        tokens = torch.randint(1, text.vocab_size, (size, text.context_length))
        return {"image": torch.randn(size, vision.in_chans, *vision.image_hw), "text": tokens}

    def flops(self) -> int | None:
        vision, text = self.model.config.vision, self.model.config.text
        kept = 1 - vision.patch_drop_rate  # but for the products of tokens with each other, which shrink by its square
        return round(3 * (kept * forward_flops(vision) + text_flops(text)))

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Zero-shot: shares of validation images whose class is the first, or among the first five."""
        if self.validation is None:
            return {}
        names = eva02.clip.class_embeddings(model, self.classes, (self.prompt,))  # type: ignore[arg-type]
        total = torch.zeros(3, device=world.device)
        for batch in self.validation(world):
            image, label, counts = (batch[key].to(world.device) for key in ("image", "label", "counts"))
            features = model.encode_image(image, normalize=True).float()  # type: ignore[operator]
            hits = (features @ names.T).topk(min(5, len(names))).indices == label[:, None]
            total += (torch.stack([hits[:, 0], hits.any(1), torch.ones_like(label).bool()]) & counts).sum(1)
        top1, top5, images = world.sum_(total).tolist()
        return {"zero_shot_top1": top1 / images, "zero_shot_top5": top5 / images}


def make_model(recipe: Recipe, device: torch.device | str | None = None) -> eva02.clip.Clip:
    """The recipe's towers, with fresh weights."""
    assert isinstance(recipe, ClipRecipe)
    clip = recipe.clip
    sizes = {"width": clip.text_width, "depth": clip.text_depth, "num_heads": clip.text_heads,
             "context_length": clip.context_length}  # fmt: skip
    return eva02.clip.create_model(
        recipe.model.name,
        text={name: value for name, value in sizes.items() if value is not None},
        **{**recipe.model.options, "patch_drop_rate": clip.patch_dropout},
        device=device,
    )


def load_text(tower: nn.Module, path: str) -> list[str]:
    """Start the text tower from a CLIP checkpoint, its projection left out as in EVA-CLIP; returns what was loaded.

    Raises:
        ValueError: a parameter is missing or has another shape.
    """
    stored, _, _ = read_state_dict(path)
    stored = {key.removeprefix("text."): value for key, value in stored.items() if not key.startswith("visual.")}
    wanted = {key: value for key, value in tower.state_dict().items() if key != "text_projection"}
    wrong = [
        f"{key} is {tuple(stored[key].shape) if key in stored else 'missing'}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key not in stored or stored[key].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the text tower: {'; '.join(wrong[:4])}{' ...' if wrong[4:] else ''}")
    tower.load_state_dict({key: stored[key] for key in wanted}, strict=False)
    return list(wanted)


def build(recipe: ClipRecipe, world: World, *, with_data: bool = True) -> tuple[ClipTask, Any]:
    """Task and loader of a recipe; without data the loader is None."""
    clip, data = recipe.clip, recipe.data
    torch.manual_seed(recipe.run.seed)
    model = make_model(recipe)
    group = torch.distributed.group.WORLD if world.size > 1 else None
    if not with_data:
        return ClipTask(model.to(world.device), group=group), None
    if clip.vision_init:
        report = eva02.load_checkpoint(model.visual, clip.vision_init, resize="official")
        if world.is_main:
            print(report)
    if clip.text_init:
        load_text(model.text, clip.text_init)
    model.to(world.device)
    from eva02.data import ClipTransform, TrainLoader, open_source

    source = open_source(data.source)
    tokenize = partial(eva02.clip.tokenize, context_length=model.config.text.context_length)
    size = model.config.vision.image_hw
    loader = TrainLoader(
        source,
        ClipTransform(size, tokenize, data.crop_scale, data.hflip, source.classes, (clip.prompt,)),
        data.batch_size,
        seed=recipe.run.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=data.workers,
        max_bad_images=data.max_bad_images,
    )
    validation, classes = None, tuple[str, ...]()
    if data.val is not None:
        held_out = open_source(data.val, "val")
        classes = tuple(held_out.classes or ())
        if not classes:
            raise ValueError(f"data.val {data.val} has no classes with names, which zero-shot classification needs")

        def validation(world: World) -> Any:
            return command.validation_batches(held_out, size, "center", recipe, world)

    return ClipTask(model, classes, clip.prompt, validation, group), loader


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "clip",
        help="contrastive training on images and texts",
        description="Train an image and a text tower to find each other's pairs (CLIP).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=command.presets_text("clip"),
    )
    parser.add_argument("--vision-init", metavar="FILE", help="checkpoint of the vision tower; 'none' starts fresh")
    parser.add_argument("--text-init", metavar="FILE", help="CLIP checkpoint with a text tower; 'none' starts fresh")
    flags = {"vision_init": "clip.vision_init", "text_init": "clip.text_init"}
    command.add_arguments(parser, flags)
    parser.set_defaults(run=lambda args: command.run(args, "clip", build, flags, make_model))
