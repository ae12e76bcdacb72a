"""Recipes: the published numbers, fields by name, round trips."""

from __future__ import annotations

import dataclasses
import json

import pytest

from eva02.recipes import FinetuneRecipe, Model, Recipe, get_preset, list_presets
from eva02.train import clip, command
from eva02.train.optim import epoch_steps, steps_of


@pytest.mark.parametrize("name", list_presets())
def test_round_trip(name):
    recipe = get_preset(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_field_that_the_default_has_and_the_recipe_has_not_survives():
    recipe = get_preset("eva02_base_p14_in21k_mim").override({"optimizer.clip_grad": "none"})
    assert recipe.optimizer.clip_grad is None
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    recipe = FinetuneRecipe(model=Model("eva02_tiny_patch14_224", {"num_classes": 3, "ref_feat_shape": None}))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "drop_path", "steps"),
    [
        ("eva02_tiny_p14_in21k_mim", 240, 4000, 3e-3, 0.0, 0.85e6),
        ("eva02_small_p14_in21k_mim", 240, 4000, 3e-3, 0.0, 0.85e6),
        ("eva02_base_p14_in21k_mim", 150, 2048, 1.5e-3, 0.0, 1.04e6),
        ("eva02_large_p14_in21k_mim", 150, 2048, 1.5e-3, 0.1, 1.04e6),
        ("eva02_large_p14_m38m_mim", 56, 2048, 1.5e-3, 0.1, 1.04e6),
    ],
)
def test_published_pretraining(name, epochs, batch, lr, drop_path, steps):
    recipe = get_preset(name)
    optimizer = recipe.optimizer
    assert (recipe.schedule.epochs, recipe.data.batch_size, optimizer.lr) == (epochs, batch, lr)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip_grad) == ((0.9, 0.98), 1e-6, 0.05, 3)
    assert (recipe.model.config().drop_path_rate, recipe.model.config().patch_grad_scale) == (drop_path, 0.1)
    assert (recipe.schedule.min_lr, recipe.schedule.warmup_epochs, optimizer.layer_decay) == (1e-5, 1, None)
    assert recipe.data.crop_scale == (0.2, 1.0)
    total, _ = steps_of(recipe.schedule, recipe.data.samples // recipe.data.batch_size)
    assert total == pytest.approx(steps, rel=0.01)


@pytest.mark.parametrize(
    ("name", "pixels", "epochs", "warmup", "batch", "lr", "layer_decay", "drop_path", "smoothing", "crop", "ema"),
    [
        ("eva02_tiny_p14_336_in21k_ft_in1k", 336, 100, 5, 1024, 2e-4, 0.9, 0.1, 0.1, 0.08, True),
        ("eva02_small_p14_336_in21k_ft_in1k", 336, 100, 5, 1024, 1e-4, 0.8, 0.1, 0.1, 0.08, True),
        ("eva02_base_p14_448_in21k_ft_in1k", 448, 30, 3, 1024, 1e-4, 0.7, 0.1, 0.1, 0.08, True),
        ("eva02_large_p14_448_in21k_ft_in1k", 448, 30, 3, 1024, 5e-5, 0.8, 0.15, 0.2, 0.08, True),
        ("eva02_large_p14_448_m38m_ft_in1k", 448, 30, 3, 1024, 7e-5, 0.8, 0.15, 0.2, 0.08, True),
        ("eva02_base_p14_448_in21k_ft_in21k", 448, 40, 1, 2048, 3e-4, 0.7, 0.1, 0.1, 0.2, False),
        ("eva02_large_p14_448_in21k_ft_in21k", 448, 20, 1, 1024, 2e-4, 0.75, 0.15, 0.1, 0.2, False),
        ("eva02_large_p14_448_m38m_ft_in21k", 448, 30, 1, 2048, 3e-4, 0.75, 0.15, 0.1, 0.2, False),
        ("eva02_base_p14_448_in21k_ft_in21k_in1k", 448, 15, 2, 512, 5e-5, 0.8, 0.15, 0.2, 0.08, True),
        ("eva02_large_p14_448_in21k_ft_in21k_in1k", 448, 20, 2, 512, 2e-5, 0.85, 0.15, 0.2, 0.08, True),
        ("eva02_large_p14_448_m38m_ft_in21k_in1k", 448, 20, 2, 512, 2e-5, 0.85, 0.15, 0.2, 0.08, True),
    ],
)
def test_published_finetuning(name, pixels, epochs, warmup, batch, lr, layer_decay, drop_path, smoothing, crop, ema):
    recipe = get_preset(name)
    config, optimizer, schedule = recipe.model.config(), recipe.optimizer, recipe.schedule
    assert (config.img_size, config.drop_path_rate, config.patch_grad_scale) == (pixels, drop_path, 0.0)
    assert config.num_classes == (21841 if name.endswith("ft_in21k") else 1000)
    assert (schedule.epochs, schedule.warmup_epochs, schedule.min_lr) == (epochs, warmup, 0.0)
    assert (recipe.data.batch_size, optimizer.lr, optimizer.layer_decay) == (batch, lr, layer_decay)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip_grad) == (
        (0.9, 0.999), 1e-8, 0.05, None,
    )  # fmt: skip
    assert (recipe.finetune.smoothing, recipe.data.crop_scale) == (smoothing, (crop, 1.0))
    assert recipe.run.ema_decay == (0.9999 if ema else None)
    assert (recipe.data.auto_augment, recipe.data.mixup, recipe.data.cutmix) == ("rand-m9-mstd0.5-inc1", 0, 0)


@pytest.mark.parametrize(
    ("name", "batch", "samples", "vision", "text", "dropout"),
    [
        ("eva01_clip_g14_plus", 114688, 4e9, (4e-4, 0.85), (4e-5, 0.75), 0.5),
        ("eva02_clip_b16", 131072, 8e9, (2e-4, 0.75), (2e-5, 0.75), 0.0),
        ("eva02_clip_l14", 131072, 4e9, (4e-4, 0.85), (4e-5, 0.75), 0.0),
        ("eva02_clip_l14_336", 61440, 2e9, (4e-4, 0.75), (4e-5, 0.65), 0.0),
        ("eva02_clip_e14", 115200, 4e9, (4e-4, 0.9), (4e-5, 0.75), 0.5),
        ("eva02_clip_e14_plus", 144000, 4e9, (4e-4, 0.9), (4e-5, 0.75), 0.5),
    ],
)
def test_published_contrastive_training(name, batch, samples, vision, text, dropout):
    recipe = get_preset(name)
    clip = recipe.clip
    assert (clip.vision_lr, clip.vision_layer_decay) == vision
    assert (clip.text_lr, clip.text_layer_decay) == text
    assert (recipe.data.batch_size, clip.patch_dropout) == (batch, dropout)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.clip_grad) == ("lamb", 5e-4, 5.0)
    assert recipe.schedule.warmup_steps == 2000
    for size in (recipe.data.samples, 10**7):  # epochs are of 40 million samples, whatever the data
        total, warmup = steps_of(recipe.schedule, epoch_steps(recipe, size // batch))
        assert total * batch == pytest.approx(samples, rel=0.005)
        assert warmup == 2000


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_has_its_model(name):
    recipe = get_preset(name)
    model = (clip.make_model if recipe.task == "clip" else command.create_model)(recipe, "meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in command.describe(recipe, model)


def test_fields_by_name():
    recipe = get_preset("eva02_base_p14_in21k_mim").override(
        {
            "optimizer.betas": "0.8,0.9",
            "model.img_size": "196x280",
            "model.depth": "3",
            "run.tensorboard": "no",
            "schedule.steps": "10",
            "data.val": "none",
            "run.ema_decay": 0.5,
        }
    )
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.model.config().grid == (14, 20)
    assert recipe.model.config().depth == 3
    assert recipe.run.tensorboard is False
    assert recipe.schedule.steps == 10
    assert recipe.data.val is None
    assert recipe.run.ema_decay == 0.5
    assert dataclasses.replace(recipe, model=get_preset("eva02_base_p14_in21k_mim").model).model.config().depth == 12


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.lr_", 1, "did you mean 'optimizer.lr'"),
        ("lr", 1, "did you mean 'optimizer.lr'"),
        ("model.dept", 1, "did you mean 'model.depth'"),
        ("finetune.init", "x", "unknown field 'finetune.init' of a pretrain recipe"),
        ("optimizer.lr", "fast", "optimizer.lr takes a number, got 'fast'"),
        ("data.batch_size", "1.5", "data.batch_size takes an integer"),
        ("data.batch_size", 0, "data.batch_size must be positive, got 0"),
        ("data.crop_scale", "0.5", "takes 2 values"),
        ("data.crop_scale", "0.5,0.2", "the smaller first"),
        ("run.precision", "int8", "run.precision is one of 'float32', 'bfloat16', 'float16'"),
        ("run.tensorboard", "maybe", "true or false"),
        ("run.ema_decay", 1.0, r"must lie in \[0, 1\)"),
        ("model.num_heads", 7, "not a multiple of num_heads 7"),
        ("model.name", "eva03", "unknown model"),
    ],
)
def test_mistakes_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        get_preset("eva02_base_p14_in21k_mim").override({name: value})


def test_unknown_preset():
    with pytest.raises(ValueError, match="nearest: eva02_base_p14_in21k_mim"):
        get_preset("eva02_base_p14_mim")
