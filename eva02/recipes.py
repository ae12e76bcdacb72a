"""Training recipes as typed data, and every published one by name.

A recipe has sections (`model`, `data`, `optimizer`, `schedule`, `run`, and its task's own); each is a dataclass, and
any field can be set by its dotted name: `get_preset("eva02_base_p14_in21k_mim").override({"optimizer.lr": "1e-3"})`.

Sources: the published training commands of EVA (arXiv:2211.07636), EVA-02 (arXiv:2303.11331) and EVA-CLIP
(arXiv:2303.15389). Learning rates belong to the global batch beside them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

from eva02.config import ModelConfig, model_config

R = TypeVar("R", bound="Recipe")


@dataclasses.dataclass(frozen=True)
class Model:
    """The trained model: a name, and fields of `ModelConfig` that differ from it, as `model.drop_path_rate`."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def config(self) -> ModelConfig:
        return model_config(self.name, **self.options)


@dataclasses.dataclass(frozen=True)
class Data:
    source: str = ""
    """Training data: a folder, `wds:`, `hf:`, or "digits"; see `eva02.data.open_source`."""
    val: str | None = None
    """Validation data, of whose split "val" figures are shown; None has none."""
    name: str = ""
    """The published data set, for the record."""
    samples: int = 0
    """Its size: steps are counted with it until the data is opened."""
    batch_size: int = 1024
    """Of all processes and accumulated parts together."""
    accumulate: int = 1
    """Parts into which a process's share of a batch is split, to save memory; the step is that of the whole batch."""
    workers: int = 4
    """Loader processes of each training process."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop, as a share of the image."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = None
    """timm's description."""
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    max_bad_images: int = 100
    """Unreadable images that are reported and skipped before it is an error."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = 1e-3
    """Peak of the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """None on 1-D parameters, position embedding and class token."""
    clip_grad: float | None = None
    """Largest norm of all gradients together."""
    layer_decay: float | None = None
    """Factor on the learning rate from a layer to the one below it."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine, by optimiser step."""

    epochs: float = 100
    epoch_samples: int | None = None
    """Samples that make an epoch, here and in `run.eval_every`; None: all of the data."""
    warmup_epochs: float = 1
    min_lr: float = 0.0
    steps: int | None = None
    """Instead of `epochs`."""
    warmup_steps: int | None = None
    """Instead of `warmup_epochs`."""
    warmup_from_zero: bool = True
    """Step i of w that warm up has i/w of the peak rate; False: (i + 1)/w, so that the first step learns."""


@dataclasses.dataclass(frozen=True)
class Run:
    output: str = ""
    """Folder of checkpoints, logs and the trained model."""
    seed: int = 0
    device: str = "auto"
    """"auto": the GPU where there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float16"
    """Of autocast; float16 comes with a dynamic loss scale."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes (torchrun): replicas, or parameters, gradients and optimiser state in shards (FSDP2)."""
    ema_decay: float | None = None
    """Of an average of the weights, updated at each step."""
    grad_checkpointing: bool = False
    recompute: bool = False
    """Feed-forward networks keep only their input for backward."""
    log_every: int = 20
    """Steps between two looks at losses and gradient norms, which wait for the device."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep: int = 3
    """Checkpoints that stay."""
    eval_every: float = 1
    """Epochs between two evaluations; 0: at the end only."""
    tensorboard: bool = True
    profile_peak: bool = True
    """Measure the machine's peak at the start, for MFU."""


@dataclasses.dataclass(frozen=True)
class Mim:
    teacher: str = ""
    """Whose features are predicted: a name that `eva02.teacher.create_teacher` knows, or the folder of a run."""
    teacher_checkpoint: str | None = None
    """The teacher's weights: a file, or for open_clip a tag of its own; None are those of the run."""
    teacher_cache: str | None = None
    """Folder of features written by `eva02 features` instead of a teacher that runs."""
    num_masked: int | None = None
    """Masked patches of an image; None is EVA-02's share, 105 of 256."""
    min_block: int | None = None
    """Smallest masked rectangle, in patches; None is EVA-02's share, 16 of 256."""
    loss_norm: Literal["global", "local"] = "global"
    """The mean over all processes' masked patches, or (as published) the mean of each process's own mean."""


@dataclasses.dataclass(frozen=True)
class Finetune:
    init: str | None = None
    """Checkpoint to start from, of any supported layout, or the folder of a run; None starts from scratch."""
    init_resize: Literal["timm", "official"] = "official"
    """Rule for resizing position embedding and patch kernel."""
    mim_norm: Literal["fc_norm", "fresh"] = "fresh"
    """What becomes of a pre-training file's final norm; published: left out."""
    smoothing: float = 0.1
    linear_probe: bool = False
    """Train the classifier alone."""
    crop: Literal["center", "squash"] = "center"
    """Of validation images."""


@dataclasses.dataclass(frozen=True)
class Clip:
    vision_init: str | None = None
    text_init: str | None = None
    vision_lr: float = 4e-4
    text_lr: float = 4e-5
    vision_layer_decay: float = 0.85
    text_layer_decay: float = 0.75
    patch_dropout: float = 0.0
    """Share of the patches that a training image loses."""
    prompt: str = "a photo of a {}."
    """Text of a class, where the data has classes and no captions."""
    text_width: int | None = None
    """The text tower's, where it differs from the model's; so are the next three."""
    text_depth: int | None = None
    text_heads: int | None = None
    context_length: int | None = None
    samples_seen: int = 0
    """Of the published model, by its name; for g/14+ and E/14+ more than the published command's epochs come to."""


_SECTIONS = {
    "model": Model,
    "data": Data,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "run": Run,
    "mim": Mim,
    "finetune": Finetune,
    "clip": Clip,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run is. Subclasses add the section of their task."""

    task: ClassVar[str]
    model: Model
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    run: Run = Run()

    def override(self: R, values: Mapping[str, Any]) -> R:
        """Copy with fields set by dotted name; strings are read as the field's type.

        Raises:
            ValueError: no such field (the nearest is named), or a value that does not fit.
        """
        recipe = _set_all(self, values)
        recipe.check()
        return recipe

    def check(self) -> None:
        """ValueError that lists everything that is impossible."""
        data, optimizer, run = self.data, self.optimizer, self.run
        positive = {
            "data.batch_size": data.batch_size,
            "data.accumulate": data.accumulate,
            "run.log_every": run.log_every,
            "run.checkpoint_every": run.checkpoint_every,
            "run.keep": run.keep,
            "schedule.epoch_samples": 1 if self.schedule.epoch_samples is None else self.schedule.epoch_samples,
        }
        problems = [f"{name} must be positive, got {value}" for name, value in positive.items() if value < 1]
        if optimizer.lr < 0 or optimizer.weight_decay < 0:
            problems.append(
                f"optimizer.lr and weight_decay cannot be negative: {optimizer.lr}, {optimizer.weight_decay}"
            )
        if run.ema_decay is not None and not 0 <= run.ema_decay < 1:
            problems.append(f"run.ema_decay must lie in [0, 1), got {run.ema_decay}")
        low, high = data.crop_scale
        if not 0 < low <= high <= 1:
            problems.append(f"data.crop_scale must be two numbers in (0, 1], the smaller first, got {data.crop_scale}")
        if problems:
            raise ValueError("; ".join(problems))
        if self.task != "clip":
            self.model.config()

    def fields(self) -> dict[str, Any]:
        """Dotted name -> value of everything; options of the model as `model.<option>`."""
        found: dict[str, Any] = {}
        for section in dataclasses.fields(self):
            for field in dataclasses.fields(getattr(self, section.name)):
                value = getattr(getattr(self, section.name), field.name)
                if section.name == "model" and field.name == "options":
                    found |= {f"model.{name}": option for name, option in value.items()}
                else:
                    found[f"{section.name}.{field.name}"] = value
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; `from_dict` reads it."""
        return {"task": self.task, **self.fields()}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Recipe:
        values = dict(stored)
        task = values.pop("task", None)
        if task not in _TASKS:
            raise ValueError(f"task is one of {', '.join(_TASKS)}, got {task!r}")
        if "model.name" not in values:
            raise ValueError("a recipe needs model.name")
        return _set_all(_TASKS[task](model=Model(values.pop("model.name"))), values)


@dataclasses.dataclass(frozen=True)
class PretrainRecipe(Recipe):
    task: ClassVar[str] = "pretrain"
    mim: Mim = Mim()


@dataclasses.dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    task: ClassVar[str] = "finetune"
    finetune: Finetune = Finetune()


@dataclasses.dataclass(frozen=True)
class ClipRecipe(Recipe):
    task: ClassVar[str] = "clip"
    clip: Clip = Clip()


_TASKS: dict[str, type[Recipe]] = {cls.task: cls for cls in (PretrainRecipe, FinetuneRecipe, ClipRecipe)}


# ---- fields by name --------------------------------------------------------------------------------------------------
def _hint(recipe: Recipe, name: str) -> Any:
    """Type of a dotted field. ValueError names the nearest field where there is none."""
    section, _, field = name.partition(".")
    if section in _sections(recipe):
        if section == "model" and field != "options":
            hints = typing.get_type_hints(ModelConfig) | {"name": str}
        else:
            hints = typing.get_type_hints(_SECTIONS[section])
        if field in hints:
            return hints[field]
    known = [*recipe.fields(), *(f"model.{option.name}" for option in dataclasses.fields(ModelConfig))]
    near = (
        difflib.get_close_matches(name, known, n=1)
        or [known_name for known_name in known if known_name.endswith(f".{name}")][:1]
    )
    hint = f"; did you mean {near[0]!r}?" if near else f"; sections are {', '.join(_sections(recipe))}"
    raise ValueError(f"unknown field {name!r} of a {recipe.task} recipe{hint}")


def _sections(recipe: Recipe) -> list[str]:
    return [field.name for field in dataclasses.fields(recipe)]


def _set_all(recipe: R, values: Mapping[str, Any]) -> R:
    for name, value in values.items():
        recipe = _set(recipe, name, value)
    return recipe


def _set(recipe: R, name: str, value: Any) -> R:
    hint = _hint(recipe, name)
    value = _read(name, value, hint)
    section_name, _, field = name.partition(".")
    section = getattr(recipe, section_name)
    if section_name == "model" and field not in ("name", "options"):
        changed = dataclasses.replace(section, options={**section.options, field: value})
    else:
        changed = dataclasses.replace(section, **{field: value})
    return dataclasses.replace(recipe, **{section_name: changed})


def _read(name: str, value: Any, hint: Any) -> Any:
    """A value of the hinted type, from text or from what JSON makes of it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in args):
            return None
        errors = []
        for kind in (arg for arg in args if arg is not type(None)):
            try:
                return _read(name, value, kind)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0])
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} is one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        parts = value.replace("x", ",").split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or len(parts) != len(args):
            raise ValueError(f"{name} takes {len(args)} values, such as 0.2,1.0, got {value!r}")
        return tuple(_read(name, part, arg) for part, arg in zip(parts, args, strict=True))
    if hint is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in known:
            raise ValueError(f"{name} is true or false, got {value!r}")
        return known[str(value).lower()]
    if hint in (int, float):
        wrong = f"{name} takes {'an integer' if hint is int else 'a number'}, got {value!r}"
        if isinstance(value, (tuple, list, bool)) or value is None:
            raise ValueError(wrong)
        try:
            number = hint(value)
        except ValueError:
            raise ValueError(wrong) from None
        if isinstance(value, float) and number != value:
            raise ValueError(wrong)
        return number
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{name} takes text, got {value!r}")
    return value


# ---- published recipes -----------------------------------------------------------------------------------------------
IN21K, IN1K = 14_197_122, 1_281_167
_IN21K: dict[str, Any] = {"name": "ImageNet-21K", "samples": IN21K}
_IN1K: dict[str, Any] = {"name": "ImageNet-1K", "samples": IN1K}
_M38M: dict[str, Any] = {"name": "Merged-38M", "samples": 38_000_000}
_M30M: dict[str, Any] = {"name": "Merged-30M", "samples": 30_000_000}
_TEACHER = ("open_clip:EVA01-g-14", "laion400m_s11b_b41k")


def _pretrain(
    model: str,
    data: dict[str, Any],
    epochs: int,
    batch: int,
    lr: float,
    *,
    drop_path: float = 0.0,
    warmup: int = 1,
    patch_grad_scale: float = 0.1,
    mim_dim: int = 1024,
    teacher: tuple[str, str] = _TEACHER,
) -> PretrainRecipe:
    options = {"head": "mim", "mim_dim": mim_dim, "drop_path_rate": drop_path, "patch_grad_scale": patch_grad_scale}
    return PretrainRecipe(
        model=Model(model, options),
        data=Data(**data, batch_size=batch, crop_scale=(0.2, 1.0)),
        optimizer=Optimizer(lr=lr, betas=(0.9, 0.98), eps=1e-6, clip_grad=3.0),
        schedule=Schedule(epochs=epochs, warmup_epochs=warmup, min_lr=1e-5),
        run=Run(parallel="fsdp" if drop_path else "ddp"),  # ZeRO stage 1 upstream
        mim=Mim(*teacher),
    )


def _finetune(
    model: str,
    data: dict[str, Any],
    epochs: int,
    warmup: int,
    batch: int,
    lr: float,
    layer_decay: float,
    *,
    drop_path: float,
    smoothing: float = 0.1,
    crop: float = 0.08,
    ema: bool = True,
    pixels: int | None = None,
    patch_grad_scale: float = 0.0,
    beta2: float = 0.999,
    cutmix: float = 0.0,
) -> FinetuneRecipe:
    options: dict[str, Any] = {
        "num_classes": 21841 if data is _IN21K else 1000,
        "drop_path_rate": drop_path,
        "patch_grad_scale": patch_grad_scale,
    }
    if pixels is not None:
        options["img_size"] = pixels
    return FinetuneRecipe(
        model=Model(model, options),
        data=Data(
            **data,
            batch_size=batch,
            crop_scale=(crop, 1.0),
            auto_augment="rand-m9-mstd0.5-inc1",
            cutmix=cutmix,
        ),
        optimizer=Optimizer(lr=lr, betas=(0.9, beta2), layer_decay=layer_decay),
        schedule=Schedule(epochs=epochs, warmup_epochs=warmup),
        run=Run(ema_decay=0.9999 if ema else None),
        finetune=Finetune(smoothing=smoothing),
    )


def _clip(
    model: str,
    data: str,
    batch: int,
    epochs: int,
    samples_seen: int,
    vision: tuple[float, float],
    text: tuple[float, float],
    *,
    patch_dropout: float = 0.0,
    vision_init: str,
    text_init: str | None,
) -> ClipRecipe:
    (vision_lr, vision_decay), (text_lr, text_decay) = vision, text
    return ClipRecipe(
        model=Model(model),
        data=Data(name=data, samples=2_000_000_000, batch_size=batch, crop_scale=(0.9, 1.0), hflip=0.0),
        # The rate is logit_scale's alone; the towers have their own.
        optimizer=Optimizer(name="lamb", lr=5e-4, betas=(0.9, 0.999), eps=1e-8, clip_grad=5.0),
        # Their epoch is 40 million samples, of data that is much larger.
        schedule=Schedule(epochs=epochs, epoch_samples=40_000_000, warmup_steps=2000, warmup_from_zero=False),
        run=Run(
            grad_checkpointing=True,
            parallel="fsdp",
            precision="bfloat16" if model == "EVA02-CLIP-bigE-14-plus" else "float16",
        ),
        clip=Clip(
            vision_init,
            text_init,
            vision_lr,
            text_lr,
            vision_decay,
            text_decay,
            patch_dropout,
            samples_seen=samples_seen,
        ),
    )


_TI, _S, _B, _L = (f"eva02_{size}_patch14" for size in ("tiny", "small", "base", "large"))
_PRESETS: dict[str, Recipe] = {
    # ---- masked image modelling
    "eva02_tiny_p14_in21k_mim": _pretrain(f"{_TI}_224", _IN21K, 240, 4000, 3e-3),
    "eva02_small_p14_in21k_mim": _pretrain(f"{_S}_224", _IN21K, 240, 4000, 3e-3),
    "eva02_base_p14_in21k_mim": _pretrain(f"{_B}_224", _IN21K, 150, 2048, 1.5e-3),
    "eva02_large_p14_in21k_mim": _pretrain(f"{_L}_224", _IN21K, 150, 2048, 1.5e-3, drop_path=0.1),
    "eva02_large_p14_m38m_mim": _pretrain(f"{_L}_224", _M38M, 56, 2048, 1.5e-3, drop_path=0.1),
    "eva_giant_p14_m30m_mim": _pretrain(
        "eva_giant_patch14_224",
        _M30M,
        150,
        4096,
        1e-3,
        drop_path=0.1,
        warmup=2,
        patch_grad_scale=1.0,
        mim_dim=768,
        teacher=("open_clip:ViT-L-14", "openai"),
    ),
    # ---- classification, from MIM weights (mim data after the size where it matters)
    "eva02_tiny_p14_336_in21k_ft_in1k": _finetune(f"{_TI}_336", _IN1K, 100, 5, 1024, 2e-4, 0.9, drop_path=0.1),
    "eva02_small_p14_336_in21k_ft_in1k": _finetune(f"{_S}_336", _IN1K, 100, 5, 1024, 1e-4, 0.8, drop_path=0.1),
    "eva02_base_p14_448_in21k_ft_in1k": _finetune(f"{_B}_448", _IN1K, 30, 3, 1024, 1e-4, 0.7, drop_path=0.1),
    "eva02_large_p14_448_in21k_ft_in1k": _finetune(
        f"{_L}_448", _IN1K, 30, 3, 1024, 5e-5, 0.8, drop_path=0.15, smoothing=0.2
    ),
    "eva02_large_p14_448_m38m_ft_in1k": _finetune(
        f"{_L}_448", _IN1K, 30, 3, 1024, 7e-5, 0.8, drop_path=0.15, smoothing=0.2
    ),
    "eva02_base_p14_448_in21k_ft_in21k": _finetune(
        f"{_B}_448", _IN21K, 40, 1, 2048, 3e-4, 0.7, drop_path=0.1, crop=0.2, ema=False
    ),
    "eva02_large_p14_448_in21k_ft_in21k": _finetune(
        f"{_L}_448", _IN21K, 20, 1, 1024, 2e-4, 0.75, drop_path=0.15, crop=0.2, ema=False
    ),
    "eva02_large_p14_448_m38m_ft_in21k": _finetune(
        f"{_L}_448", _IN21K, 30, 1, 2048, 3e-4, 0.75, drop_path=0.15, crop=0.2, ema=False
    ),
    "eva02_base_p14_448_in21k_ft_in21k_in1k": _finetune(
        f"{_B}_448", _IN1K, 15, 2, 512, 5e-5, 0.8, drop_path=0.15, smoothing=0.2
    ),
    "eva02_large_p14_448_in21k_ft_in21k_in1k": _finetune(
        f"{_L}_448", _IN1K, 20, 2, 512, 2e-5, 0.85, drop_path=0.15, smoothing=0.2
    ),
    "eva02_large_p14_448_m38m_ft_in21k_in1k": _finetune(
        f"{_L}_448", _IN1K, 20, 2, 512, 2e-5, 0.85, drop_path=0.15, smoothing=0.2
    ),
    "eva_giant_p14_224_m30m_ft_in21k": _finetune(
        "eva_giant_patch14_224",
        _IN21K,
        60,
        15,
        4096,
        1e-4,
        0.85,
        drop_path=0.4,
        crop=0.5,
        ema=False,
        beta2=0.98,
        cutmix=1.0,
        patch_grad_scale=1.0,
    ),
    "eva_giant_p14_336_m30m_ft_in21k_in1k": _finetune(
        "eva_giant_patch14_336", _IN1K, 10, 2, 512, 3e-5, 0.95, drop_path=0.4, smoothing=0.3, patch_grad_scale=1.0
    ),
    "eva_giant_p14_560_m30m_ft_in21k_in1k": _finetune(
        "eva_giant_patch14_560", _IN1K, 15, 2, 512, 3e-5, 0.95, drop_path=0.4, smoothing=0.3, patch_grad_scale=1.0
    ),
    # ---- contrastive
    "eva01_clip_g14_plus": _clip(
        "EVA01-CLIP-g-14-plus",
        "Merged-2B",
        114_688,
        100,
        11_000_000_000,
        (4e-4, 0.85),
        (4e-5, 0.75),
        patch_dropout=0.5,
        vision_init="EVA01_g_psz14",
        text_init="OpenCLIP-H-14",
    ),
    "eva02_clip_b16": _clip(
        "EVA02-CLIP-B-16",
        "Merged-2B",
        131_072,
        200,
        8_000_000_000,
        (2e-4, 0.75),
        (2e-5, 0.75),
        vision_init="eva02_B_pt_in21k_p14to16",
        text_init="OpenAI-B-16",
    ),
    "eva02_clip_l14": _clip(
        "EVA02-CLIP-L-14",
        "Merged-2B",
        131_072,
        100,
        4_000_000_000,
        (4e-4, 0.85),
        (4e-5, 0.75),
        vision_init="eva02_L_pt_m38m_p14",
        text_init="OpenAI-L-14",
    ),
    "eva02_clip_l14_336": _clip(
        "EVA02-CLIP-L-14-336",
        "Merged-2B",
        61_440,
        50,
        2_000_000_000,
        (4e-4, 0.75),
        (4e-5, 0.65),
        vision_init="EVA02_CLIP_L_psz14_224to336",
        text_init=None,
    ),
    "eva02_clip_e14": _clip(
        "EVA02-CLIP-bigE-14",
        "LAION-2B",
        115_200,
        100,
        4_000_000_000,
        (4e-4, 0.9),
        (4e-5, 0.75),
        patch_dropout=0.5,
        vision_init="EVA02_E_psz14",
        text_init="OpenCLIP-H-14",
    ),
    "eva02_clip_e14_plus": _clip(
        "EVA02-CLIP-bigE-14-plus",
        "LAION-2B",
        144_000,
        100,
        9_000_000_000,
        (4e-4, 0.9),
        (4e-5, 0.75),
        patch_dropout=0.5,
        vision_init="EVA02_E_psz14",
        text_init="OpenCLIP-bigG-14",
    ),
}

# Not published: small enough for a CPU, on scikit-learn's digits.
_DIGITS_MODEL: dict[str, Any] = {"img_size": 12, "patch_size": 2, "embed_dim": 96, "num_heads": 3, "depth": 4}
_DIGITS_DATA: dict[str, Any] = {
    "source": "digits",
    "val": "digits",
    "name": "digits",
    "samples": 1437,
    "batch_size": 64,
    "workers": 0,
    "hflip": 0.0,
}
_DIGITS_RUN: dict[str, Any] = {"precision": "float32", "log_every": 10, "checkpoint_every": 200}
_PRESETS["eva02_digits_mim"] = PretrainRecipe(
    model=Model(f"{_B}_224", {**_DIGITS_MODEL, "head": "mim", "mim_dim": 96}),
    data=Data(**_DIGITS_DATA, crop_scale=(0.5, 1.0)),
    optimizer=Optimizer(lr=1.5e-3, betas=(0.9, 0.98), eps=1e-6, clip_grad=3.0),
    schedule=Schedule(epochs=30, warmup_epochs=3, min_lr=1e-5),
    run=Run(**_DIGITS_RUN),
)
_PRESETS["eva02_digits"] = FinetuneRecipe(
    model=Model(f"{_B}_224", {**_DIGITS_MODEL, "num_classes": 10, "drop_path_rate": 0.1}),
    # Mostly turned, sheared and shifted: what handwriting does too. Crops were chosen on folds of the training images.
    data=Data(**_DIGITS_DATA, crop_scale=(0.8, 1.0), auto_augment="rand-m5-n2-tweights"),
    optimizer=Optimizer(lr=1e-3, betas=(0.9, 0.98), clip_grad=3.0),
    schedule=Schedule(epochs=30, warmup_epochs=3, min_lr=1e-5),
    run=Run(**_DIGITS_RUN, eval_every=5),
)
_PRESETS["eva02_digits_clip"] = ClipRecipe(
    model=Model("EVA02-CLIP-B-16", {**_DIGITS_MODEL, "num_classes": 64, "head_init_scale": 1.0}),
    data=Data(**_DIGITS_DATA, crop_scale=(0.6, 1.0)),
    optimizer=Optimizer(lr=1e-3, betas=(0.9, 0.98), clip_grad=3.0),
    schedule=Schedule(epochs=20, warmup_epochs=2, min_lr=1e-5),
    run=Run(**_DIGITS_RUN, eval_every=5),
    clip=Clip(
        vision_lr=1e-3,
        text_lr=1e-3,
        vision_layer_decay=1.0,
        text_layer_decay=1.0,
        prompt="the digit {}.",
        text_width=64,
        text_depth=2,
        text_heads=2,
        context_length=8,
    ),
)


def list_presets(task: str | None = None) -> list[str]:
    """Names of the recipes of a task, or of all."""
    return [name for name, recipe in _PRESETS.items() if task in (None, recipe.task)]


def get_preset(name: str) -> Recipe:
    """A recipe by name, or from a JSON file that a run wrote (`recipe.json`).

    Raises:
        ValueError: unknown; the nearest are named.
    """
    if name in _PRESETS:
        return _PRESETS[name]
    if name.endswith(".json"):
        return Recipe.from_dict(json.loads(Path(name).read_text()))
    near = difflib.get_close_matches(name, _PRESETS, n=3)
    raise ValueError(f"unknown preset {name!r}; {'nearest' if near else 'known'}: {', '.join(near or _PRESETS)}")
