"""`eva02 finetune`: classification, of all parameters or of the classifier alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eva02
from eva02.recipes import FinetuneRecipe
from eva02.runs import is_run
from eva02.train import command
from eva02.train.distributed import World
from eva02.train.loop import Batch, Task
from eva02.train.progress import Clock, forward_flops


class FinetuneTask(Task):
    """Cross-entropy with label smoothing. Batches have "image" and "label", classes or (B, classes) shares of them.

    Args:
        model: the classifier; parameters that do not require gradients stay as they are.
        smoothing: of class labels; shares are taken as they come.
        validation: batches with "image", "label" and "counts" (False for what repeats an image), made anew by each
            call; None evaluates nothing.
    """

    model: eva02.Eva02

    def __init__(
        self, model: eva02.Eva02, smoothing: float = 0.0, validation: Callable[[World], Any] | None = None
    ) -> None:
        self.model, self.smoothing, self.validation = model, smoothing, validation

    def loss(self, forward: nn.Module, batch: Batch, clock: Clock) -> Tensor:
        label = batch["label"]
        smoothing = 0.0 if label.is_floating_point() else self.smoothing
        return F.cross_entropy(forward(batch["image"]).float(), label, label_smoothing=smoothing)

    def example(self, size: int) -> Batch:
        config = self.model.config
        return {
            "image": torch.randn(size, config.in_chans, *config.image_hw),
            "label": torch.randint(config.num_classes, (size,)),
        }

    def flops(self) -> int | None:
        forward = forward_flops(self.model.config)
        head_only = not any(parameter.requires_grad for parameter in self.model.blocks.parameters())
        return forward if head_only else 3 * forward

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Shares of validation images whose class is the first, or among the first five, and the mean loss."""
        if self.validation is None:
            return {}
        total = torch.zeros(4, device=world.device)
        for batch in self.validation(world):
            image, label, counts = (batch[key].to(world.device) for key in ("image", "label", "counts"))
            logits = model(image).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
            loss = F.cross_entropy(logits, label, reduction="none")
            found = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)]) * counts
            total += found.sum(1)
        top1, top5, loss_sum, images = world.sum_(total).tolist()
        return {"top1": top1 / images, "top5": top5 / images, "loss": loss_sum / images}


def build(recipe: FinetuneRecipe, world: World, *, with_data: bool = True) -> tuple[FinetuneTask, Any]:
    """Task and loader of a recipe; without data the loader is None."""
    config, finetune, data = recipe.model.config(), recipe.finetune, recipe.data
    if config.head != "classifier" or config.num_classes < 1:
        raise ValueError(f"fine-tuning needs a classifier, got head {config.head!r} of {config.num_classes} classes")
    torch.manual_seed(recipe.run.seed)
    options = dict(recipe.model.options)
    if finetune.linear_probe:
        options["drop_path_rate"] = 0.0
    model = eva02.create_model(recipe.model.name, **options)
    if finetune.init and with_data:
        file = f"{finetune.init}/model.safetensors" if is_run(finetune.init) else finetune.init
        report = eva02.load_checkpoint(
            model, file, resize=finetune.init_resize, head="fresh", mim_norm=finetune.mim_norm
        )
        if world.is_main:
            print(report)
    model.to(world.device)
    if finetune.linear_probe:
        model.requires_grad_(False).head.requires_grad_(True)
    elif config.patch_grad_scale == 0.0:
        model.patch_embed.requires_grad_(False)  # no gradient is no weight decay either, as published
    if not with_data:
        return FinetuneTask(model, finetune.smoothing), None
    from eva02.data import FinetuneTransform, Mixup, TrainLoader, open_source

    transform = FinetuneTransform(
        config.image_hw,
        scale=data.crop_scale,
        auto_augment=data.auto_augment,
        hflip=data.hflip,
        reprob=data.random_erasing,
    )
    mixing = data.mixup > 0 or data.cutmix > 0
    options = {"mixup": data.mixup, "cutmix": data.cutmix, "smoothing": finetune.smoothing}
    source = open_source(data.source)
    classes = source.classes
    if classes is not None and len(classes) > config.num_classes:
        raise ValueError(f"{data.source} has {len(classes)} classes, model.num_classes is {config.num_classes}")
    loader = TrainLoader(
        source,
        transform,
        data.batch_size,
        seed=recipe.run.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=data.workers,
        max_bad_images=data.max_bad_images,
        collate=Mixup(config.num_classes, **options) if mixing else None,
    )
    validation = None
    if data.val is not None:
        held_out = open_source(data.val, "val")

        def validation(world: World) -> Any:
            return command.validation_batches(held_out, config.image_hw, finetune.crop, recipe, world)

    return FinetuneTask(model, finetune.smoothing, validation), loader


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train a classifier",
        description="Train a classifier: fine-tune a pre-trained encoder, or start from scratch (no --init).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=command.presets_text("finetune"),
    )
    parser.add_argument("--init", metavar="PATH", help="checkpoint to start from, of any layout, or a run's folder")
    parser.add_argument("--linear-probe", action="store_const", const=True, help="train the classifier alone")
    flags = {"init": "finetune.init", "linear_probe": "finetune.linear_probe"}
    command.add_arguments(parser, flags)
    parser.set_defaults(run=lambda args: command.run(args, "finetune", build, flags))
