"""The suite `pretrain`: masked image modelling as the training loop runs it, on our blocks and on timm's.

A step reads a batch (JPEG files, crops, masks, a teacher's features from a cache), then does forward, backward,
clipping and AdamW of the published recipe, in every arm by `Trainer.train_step`. The arms differ in the student's
modules and in the loss.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import eva02
from benchmarks.models import randomise
from benchmarks.suites import prepare
from eva02.config import ModelConfig
from eva02.data import open_source
from eva02.recipes import PretrainRecipe, get_preset
from eva02.teacher import Teacher
from eva02.teacher_cache import CacheWriter
from eva02.train import pretrain
from eva02.train.distributed import World
from eva02.train.loop import Batch, Trainer
from eva02.train.pretrain import MimTask
from eva02.train.progress import Clock
from eva02_kernels import strict
from eva02_kernels.bench.machine import Roofline
from eva02_kernels.bench.providers import provider, providers
from eva02_kernels.bench.rows import Arm, Config, measure_rows
from eva02_kernels.bench.shapes import Shape, shape_named

SUITES = ("pretrain",)
PRESETS = {size: f"eva02_{size}_p14_in21k_mim" for size in ("tiny", "small", "base", "large")}


# ---- the step on timm's modules --------------------------------------------------------------------------------------
class TimmMim(nn.Module):
    """The published pre-training model on timm's modules.

    Shapes: images (B, 3, H, W), mask (B, P) bool -> predictions (M, mim_dim) of the masked patches, or of the flat rows
    `idx` (M,), which spares the device a wait.
    """

    def __init__(self, encoder: nn.Module, mim_dim: int, patch_grad_scale: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.rope, self.patch_grad_scale = encoder, encoder.rope, patch_grad_scale
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.lm_head = nn.Linear(encoder.embed_dim, mim_dim)

    def no_weight_decay(self) -> set[str]:
        return {"encoder.pos_embed", "encoder.cls_token"}

    def forward(self, images: Tensor, mask: Tensor, idx: Tensor | None = None) -> Tensor:
        encoder = self.encoder
        x = encoder.patch_embed(images)
        if self.training and self.patch_grad_scale != 1.0:
            x = self.patch_grad_scale * x + (1 - self.patch_grad_scale) * x.detach()
        w = mask.unsqueeze(-1).to(x.dtype)
        x = x * (1 - w) + self.mask_token * w
        x, rope = encoder._pos_embed(x)
        for block in encoder.blocks:
            x = block(x, rope=rope)
        x = encoder.norm(x)[:, 1:]
        return self.lm_head(x[mask] if idx is None else x.flatten(0, 1).index_select(0, idx))


def timm_student(name: str, config: ModelConfig, state: Mapping[str, Tensor]) -> TimmMim:
    """timm's form of a student of ours, with its weights."""
    import timm

    sizes = {key: getattr(config, key) for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    encoder = timm.create_model(name, num_classes=0, use_fc_norm=False, use_post_transformer_norm=True, **sizes)
    model = TimmMim(encoder, config.mim_dim, config.patch_grad_scale)
    outer = ("mask_token", "lm_head.")
    model.load_state_dict({key if key.startswith(outer) else f"encoder.{key}": value for key, value in state.items()})
    return model


def cosine_loss(predictions: Tensor, target: Tensor, idx: Tensor) -> Tensor:
    """PyTorch's own operators for `masked_cosine_loss`."""
    wide = torch.promote_types(predictions.dtype, torch.float32)
    target = target.flatten(0, 1).index_select(0, idx)
    return -F.cosine_similarity(predictions.to(wide), target.to(wide), dim=-1).mean()


class TimmTask(MimTask):
    def __init__(self, model: TimmMim, *, compiled: bool = False) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.compiled = compiled
        self._loss = torch.compile(self._plain_loss) if compiled else self._plain_loss

    @staticmethod
    def _plain_loss(model: nn.Module, batch: Batch) -> Tensor:
        return cosine_loss(model(batch["image"], batch["mask"], batch["idx"]), batch["teacher"], batch["idx"])

    def loss(self, forward: nn.Module, batch: Batch, clock: Clock) -> Tensor:
        if self.compiled:  # the number of masked patches varies: compiled once for all of them
            torch._dynamo.mark_dynamic(batch["idx"], 0)
        return self._loss(forward, batch)


# ---- case and arms ---------------------------------------------------------------------------------------------------
def write_photos(folder: Path, count: int) -> None:
    """`count` JPEG files of 500x333 pixels, the usual size in ImageNet: scikit-learn's two photographs, shifted."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    photos = load_sample_images().images
    for i in range(count):
        pixels = np.roll(photos[i % len(photos)], 20 * i, axis=1)
        Image.fromarray(pixels).resize((500, 333), Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg", quality=90)


class PretrainCase:
    """A published recipe at a benchmark's batch, its images and its teacher's features in `folder`.

    The features are those of a random projection behind one block: reading them costs the same whoever the teacher was.
    """

    def __init__(self, shape: Shape, config: Config, folder: Path, **changes: Any) -> None:
        """`changes` are fields of the recipe, with two underscores for the dot."""
        if shape.name not in PRESETS:
            raise ValueError(f"suite pretrain has the models {', '.join(PRESETS)}, not {shape.name!r}")
        self.shape = shape
        self.world = World(device=torch.device(config.device))
        self.name = PRESETS[shape.name]
        recipe = get_preset(self.name).override(
            {
                "data.source": f"folder:{folder / 'images'}",
                "data.batch_size": shape.batch,
                "data.workers": 0,
                "mim.teacher_cache": str(folder / "cache"),
                "run.precision": config.dtype,
                "schedule.steps": 10**6,
                "schedule.warmup_steps": 10**5,
                **{name.replace("__", "."): value for name, value in changes.items()},
            }
        )
        assert isinstance(recipe, PretrainRecipe)
        self.recipe = recipe
        write_photos(folder / "images", 4 * shape.batch)
        self._write_features(folder / "cache")
        model = eva02.create_model(recipe.model.name, **recipe.model.options)
        randomise(model)
        self.state = model.state_dict()
        self.batch = next(iter(self.trainer().loader))

    def _write_features(self, folder: Path) -> None:
        recipe = self.recipe
        sizes = {**recipe.model.options, "head": "classifier", "num_classes": recipe.model.config().mim_dim, "depth": 1}
        teacher = Teacher(eva02.create_model(recipe.model.name, **sizes))
        crops = {"scale": recipe.data.crop_scale, "hflip": recipe.data.hflip}
        writer = CacheWriter(folder, open_source(recipe.data.source), teacher, **crops)
        for _ in writer.write(writer.shards, batch_size=8):
            pass

    def trainer(self, task_of: Callable[[MimTask], MimTask] = lambda task: task) -> Trainer:
        """A trainer of an arm's own, all with the same weights and batches. `task_of` may put another task in place."""
        task, loader = pretrain.build(self.recipe, self.world)
        task.model.load_state_dict(self.state)
        return Trainer(task_of(task), loader, self.recipe, self.world)

    def timm_task(self, compiled: bool = False) -> TimmTask:
        student = timm_student(self.recipe.model.name, self.recipe.model.config(), self.state)
        return TimmTask(student.to(self.world.device), compiled=compiled)

    def results(self, trainer: Trainer, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Loss of the first batch and every parameter's gradient, under our names; with float64 no autocast."""
        task = trainer.task
        batch = {key: value.to(self.world.device) for key, value in task.prepare(self.batch).items()}
        if dtype == torch.float64:
            batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
            loss = task.loss(task.model, batch, trainer.clock)
        else:
            with trainer.autocast():
                loss = task.loss(task.model, batch, trainer.clock)
        loss.backward()
        gradients = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
        task.model.zero_grad(set_to_none=True)
        return {"loss": loss.detach()} | {
            f"gradient of {name.removeprefix('encoder.')}": grad for name, grad in gradients.items()
        }


@provider("timm", suites=SUITES, baseline=True)
def _timm(case: PretrainCase) -> Trainer:
    return case.trainer(lambda task: case.timm_task())


@provider("timm+compile", suites=SUITES, compiled=True)
def _timm_compile(case: PretrainCase) -> Trainer:
    return case.trainer(lambda task: case.timm_task(compiled=True))


@provider("ours", suites=SUITES, ours=True)
def _ours(case: PretrainCase) -> Trainer:
    return case.trainer()


# ---- running ---------------------------------------------------------------------------------------------------------
def _step(trainer: Trainer) -> Callable[[], Tensor]:
    """What the loop does once."""
    batches = iter(trainer.loader)

    def step() -> Tensor:
        with trainer.clock.section("data"):
            batch = next(batches)
        return trainer.train_step(batch)

    return step


def run_case(
    case: PretrainCase, config: Config, roofline: Roofline | None = None, progress: Callable[[str], None] = str
) -> list[dict[str, Any]]:
    """Rows of one recipe; `notes` has the shares of the time in data, teacher and student."""
    torch._dynamo.reset()
    progress(f"{case.name}: reference")
    plain = case.trainer(lambda task: case.timm_task())
    exact = copy.deepcopy(plain.task)
    exact.model.double()
    reference = case.trainer(lambda task: exact)
    expected = (case.results(plain), case.results(reference, torch.float64))
    trainers: dict[str, Trainer] = {}

    def start(arm: Arm, built: Trainer) -> Callable[[], dict[str, Tensor]]:
        trainers[arm.name] = built
        arm.call = _step(built)
        return lambda: case.results(built)  # the first step's rate was 0: the weights are still those of all arms

    arms = []
    with strict():
        for p in providers("pretrain", names=list(config.providers)):
            progress(f"{case.name}: {p.name}")
            terms = case.shape.batch * case.shape.tokens
            arms.append(prepare(p, case, config.device, start, expected, terms=terms))
        for trainer in trainers.values():
            trainer.clock.restart()
        progress(f"{case.name}: {config.rounds} rounds")
        flops = trainers["ours"].task.flops() if "ours" in trainers else None
        rows = measure_rows(
            {"suite": "pretrain", "case": case.name, "model": case.shape.name, "mode": "step", "dtype": config.dtype,
             "shape": case.shape.describe()},
            arms,
            config,
            flops=(flops or 0) * case.shape.batch,
            items=case.shape.batch,
            roofline=roofline,
        )  # fmt: skip
    for row in rows:
        if row["ms"]:
            row["notes"]["shares"] = _shares(trainers[row["provider"]].clock)
    return rows


def _shares(clock: Clock) -> dict[str, float]:
    """Of the time in the arm's own steps, not of the time that passed."""
    _, shares = clock.take()
    total = sum(shares.values())
    return {name: round(share / total, 4) for name, share in shares.items()}


def run_pretrain(
    config: Config, roofline: Roofline | None = None, progress: Callable[[str], None] = str
) -> Iterator[list[dict[str, Any]]]:
    """Images per second of pre-training steps, loading included, with cached teacher features."""
    for model in config.models:
        with tempfile.TemporaryDirectory(prefix="eva02_pretrain_") as folder:
            yield run_case(PretrainCase(shape_named(model), config, Path(folder)), config, roofline, progress)
