"""What the training commands share: a recipe from the command line, the dry run, the run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eva02
from eva02.clip.config import TextConfig
from eva02.config import ModelConfig
from eva02.files import atomic_file
from eva02.recipes import Recipe, get_preset, list_presets
from eva02.train.distributed import World, choose_device, started
from eva02.train.loop import INTERRUPTED, Outcome, Task, Trainer
from eva02.train.optim import epoch_steps, steps_of
from eva02.train.progress import forward_flops, text_flops

Build = Callable[..., tuple[Task, Any]]
_FLAGS = {
    "data": ("data.source", "folder:PATH, wds:PATTERN, hf:PATH, captions:PATH or digits"),
    "val": ("data.val", "held-out data of the same kinds, evaluated after each epoch"),
    "output": ("run.output", "folder of checkpoints, logs and the trained model"),
    "epochs": ("schedule.epochs", "length of the run"),
    "steps": ("schedule.steps", "length in optimiser steps instead"),
    "batch_size": ("data.batch_size", "of all processes together; the learning rate belongs to it"),
    "accumulate": ("data.accumulate", "parts that a process splits its share of a batch into, to save memory"),
    "lr": ("optimizer.lr", "peak learning rate"),
    "workers": ("data.workers", "loader processes of each training process"),
    "seed": ("run.seed", "of weights, order, augmentation, masks, drop path"),
    "device": ("run.device", "auto, cpu, cuda or cuda:N"),
    "precision": ("run.precision", "float32, or bfloat16 or float16 autocast"),
    "parallel": ("run.parallel", "ddp or fsdp, with several processes"),
}
"""Option -> the field of the recipe that it sets, and its help."""


def presets_text(task: str) -> str:
    """End of a command's help."""
    names = "\n".join(f"  {name}" for name in list_presets(task))
    return (
        f"Presets:\n{names}\n\nAny field of a recipe: --set optimizer.layer_decay=0.8 --set model.depth=6; --dry-run "
        "prints them all.\nSeveral processes: torchrun --nproc-per-node 8 -m eva02 "
        f"{task} ...\nThe same command continues a run that was interrupted. Exit status: 0 finished, {INTERRUPTED} "
        "stopped by SIGTERM\nafter saving (torchrun says 1), 1 an error."
    )


def add_arguments(parser: argparse.ArgumentParser, flags: Mapping[str, str]) -> None:
    """Options of every training command, after its own, which are `flags`: option -> field."""
    parser.add_argument("--preset", required=True, metavar="NAME", help="a recipe by name, or a run's recipe.json")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set a field of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print model, schedule, memory estimate, steps; no run")
    parser.add_argument(
        "--measure", type=int, metavar="N", help="with --dry-run: time steps on N random images here and now"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="with --dry-run: for so many (default %(default)s)"
    )
    options = parser.add_argument_group("fields of the recipe")
    for option, (field, text) in _FLAGS.items():
        options.add_argument(f"--{option.replace('_', '-')}", metavar="X", help=f"{text} ({field})")


def recipe_of(args: argparse.Namespace, task: str, flags: Mapping[str, str]) -> Recipe:
    """The preset with the command line's changes.

    Raises:
        ValueError: unknown preset or field, a preset of another task, an impossible value.
    """
    recipe = get_preset(args.preset)
    if recipe.task != task:
        raise ValueError(f"preset {args.preset!r} is for 'eva02 {recipe.task}', not {task!r}")
    fields = {option: field for option, (field, _) in _FLAGS.items()} | dict(flags)
    values = {field: getattr(args, option) for option, field in fields.items() if getattr(args, option) is not None}
    for assignment in args.set:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set takes FIELD=VALUE, got {assignment!r}")
        values[name.strip()] = value.strip()
    return recipe.override(values)


def create_model(recipe: Recipe, device: torch.device | str | None = None) -> nn.Module:
    """The recipe's model, with fresh weights."""
    return eva02.create_model(recipe.model.name, **recipe.model.options, device=device)


def run(
    args: argparse.Namespace,
    task_name: str,
    build: Build,
    flags: Mapping[str, str],
    make_model: Callable[[Recipe, str], nn.Module] = create_model,
) -> int:
    """Dry run or run; returns the exit status."""
    recipe = recipe_of(args, task_name, flags)
    if args.measure is not None and not args.dry_run:
        raise ValueError("--measure needs --dry-run")
    if args.dry_run:
        speed = None if args.measure is None else measure(recipe, build, args.measure)
        print(describe(recipe, make_model(recipe, "meta"), speed, args.processes))
        return 0
    if not recipe.run.output:
        raise ValueError("--output is needed: the folder of checkpoints, logs and the trained model")
    if not recipe.data.source:
        raise ValueError("--data is needed: a folder, wds:, hf:, or digits")
    return train(recipe, build)


def train(recipe: Recipe, build: Build) -> int:
    """Run a recipe; returns the exit status."""
    outcome = train_recipe(recipe, build)
    if outcome.finished:
        return 0
    print(f"stopped after step {outcome.step}, saved; the same command continues", file=sys.stderr)
    return INTERRUPTED


def train_recipe(recipe: Recipe, build: Build) -> Outcome:
    """Run a recipe, in this process or in torchrun's, or continue the run that its `run.output` holds.

    Args:
        build: of the recipe's task: `eva02.train.pretrain.build`, `finetune.build` or `clip.build`.
    """
    output = Path(recipe.run.output)
    with started(recipe.run.device) as world:
        if world.is_main:
            output.mkdir(parents=True, exist_ok=True)
        world.barrier()
        task, loader = build(recipe, world)
        trainer = Trainer(task, loader, recipe, world, output)
        if world.is_main:
            with atomic_file(output / "recipe.json") as file:
                file.write(json.dumps(recipe.to_dict(), indent=1).encode())
            if trainer.step:
                print(f"continuing from step {trainer.step} of {trainer.total}", file=sys.stderr)
        return trainer.run()


def validation_batches(
    source: Any, size: tuple[int, int], crop: Any, recipe: Recipe, world: World
) -> Iterator[dict[str, Tensor]]:
    """This process's batches of held-out images, as many on each process: with shards, all have to call the model.

    "counts" is False for an image that is there a second time for that.
    """
    from eva02.data import EvalTransform, eval_loader

    data = recipe.data
    batch_size = max(1, data.batch_size // world.size // data.accumulate)
    transform = EvalTransform(size, crop)
    options: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "num_workers": data.workers}
    wanted = -(-len(source) // (world.size * batch_size))
    batch: dict[str, Tensor] = {}
    for batch in eval_loader(source, transform, batch_size, **options):
        wanted -= 1
        yield {**batch, "counts": torch.ones(len(batch["image"]), dtype=torch.bool)}
    for _ in range(wanted):
        batch = batch or {key: value[None] for key, value in transform(*source[0]).items()}
        yield {**batch, "counts": torch.zeros(len(batch["image"]), dtype=torch.bool)}


# ---- dry run ---------------------------------------------------------------------------------------------------------
def _samples(recipe: Recipe) -> tuple[int, str]:
    if recipe.data.source:
        from eva02.data import open_source

        return len(open_source(recipe.data.source)), recipe.data.source
    return recipe.data.samples, f"{recipe.data.name}, as published"


def activation_bytes(config: ModelConfig | TextConfig, recipe: Recipe, samples: int) -> int:
    """Kept for backward by the blocks for so many images or texts.

    A token keeps 6 C + F in a block, 6 C + 2 F with SwiGLU, and 6 C with recomputation; with checkpointing C in every
    block and the rest in one. The last block counts like the others, although it may compute fewer rows.
    """
    if isinstance(config, TextConfig):
        tokens, width, hidden = config.context_length, config.width, config.hidden_features
    else:
        patches = config.grid[0] * config.grid[1]
        tokens, width = 1 + max(1, int(patches * (1 - config.patch_drop_rate))), config.embed_dim
        hidden = (1 + config.swiglu_mlp) * config.hidden_features
        hidden *= not (recipe.run.recompute or config.recompute)
    kept = 6 * width + hidden
    rows = samples * tokens * (4 if recipe.run.precision == "float32" else 2)
    return rows * (config.depth * width + kept if recipe.run.grad_checkpointing else config.depth * kept)


def describe(recipe: Recipe, model: nn.Module, measured: float | None = None, size: int = 1) -> str:
    """Model, schedule, memory and steps as text; `measured` are images per second, `size` counts processes."""
    described: Any = model.config
    config: ModelConfig = getattr(described, "vision", described)
    text: TextConfig | None = getattr(described, "text", None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    samples, where = _samples(recipe)
    per_epoch = samples // recipe.data.batch_size
    if not per_epoch:
        raise ValueError(f"data.batch_size {recipe.data.batch_size} is larger than the data set of {samples} samples")
    per_epoch = epoch_steps(recipe, per_epoch)
    total, warmup = steps_of(recipe.schedule, per_epoch)
    part = -(-recipe.data.batch_size // size // recipe.data.accumulate)
    per_parameter = 16 + (4 if recipe.run.ema_decay is not None else 0)
    shards = size if recipe.run.parallel == "fsdp" else 1
    state, kept = parameters * per_parameter / shards, activation_bytes(config, recipe, part)
    work = f"{forward_flops(config) / 1e9:.2f} GFLOP forward an image"
    if text is not None:
        kept += activation_bytes(text, recipe, part)
        work += f", {text_flops(text) / 1e9:.2f} a text of {text.context_length} tokens"
    first = 0.0 if recipe.schedule.warmup_from_zero else recipe.optimizer.lr / max(1, warmup)
    lines = [
        f"recipe     {recipe.task}",
        *(f"  {name} = {value}" for name, value in recipe.fields().items()),
        f"model      {recipe.model.name}: {parameters:,} parameters, {config.grid[0]}x{config.grid[1]} patches of "
        f"{config.patch_hw[0]}x{config.patch_hw[1]}, {work}",
        f"data       {samples:,} images ({where}), {per_epoch:,} steps an epoch",
        f"batch      {recipe.data.batch_size} = {size} process(es) x {recipe.data.accumulate} part(s) x {part}",
        f"schedule   {total:,} steps, {warmup:,} of them warm-up, {total * recipe.data.batch_size:,} images; "
        f"rate {first:g} -> {recipe.optimizer.lr:g} -> {recipe.schedule.min_lr:g}",
        f"memory     estimate for each process: {state / 2**30:.2f} GiB of weights, gradients, optimiser"
        f"{', average' if recipe.run.ema_decay is not None else ''}; {kept / 2**30:.2f} GiB kept by the "
        f"blocks for backward; {'the teacher and ' if recipe.task == 'pretrain' else ''}temporaries come on top",
    ]
    if measured is None:
        lines.append("time       --measure N times steps on N random images here and now")
    else:
        seconds = total * recipe.data.batch_size / measured / size
        lines.append(
            f"time       {measured:.4g} images/s measured here in one process: {seconds / 3600:.2f} hours for "
            f"{size} process(es); loading, communication and a teacher not counted"
        )
    return "\n".join(lines)


def measure(recipe: Recipe, build: Build, images: int, steps: int = 3) -> float:
    """Images per second of training steps on random images in this process, after one step that does not count."""
    if images < 1:
        raise ValueError(f"--measure takes a number of images, got {images}")
    small = recipe.override({"data.batch_size": images, "data.accumulate": 1, "schedule.steps": 1000})
    device = choose_device(recipe.run.device)
    task, _ = build(small, World(device=device), with_data=False)
    trainer = Trainer(task, _NoData(), small, World(device=device))  # type: ignore[arg-type]
    batch = task.example(images)
    values = trainer.train_step(batch)
    values.tolist()
    start = time.perf_counter()
    for _ in range(steps):
        values = trainer.train_step(batch)
    values.tolist()  # waits for the device
    return steps * images / (time.perf_counter() - start)


class _NoData:
    steps_per_epoch = 1
