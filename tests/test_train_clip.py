"""Contrastive training: the towers' rates, what a step does, where the towers start, digits by their names."""

from __future__ import annotations

import pytest
import torch
import train_runs
from test_train import NoSynchronisation, losses

import eva02
import eva02.clip
from eva02.cli import main
from eva02.clip.model import MAX_LOGIT_SCALE
from eva02.train import clip
from eva02.train.progress import read_log


def test_towers_have_their_own_rates_and_layers():
    recipe = train_runs.recipe(
        "clip", clip__vision_lr=1.0, clip__vision_layer_decay=0.5, clip__text_lr=10.0, clip__text_layer_decay=0.1,
        optimizer__lr=100.0,
    )  # fmt: skip
    model = clip.make_model(recipe)
    groups = clip.ClipTask(model).parameter_groups(recipe)
    found = {id(p): (group["lr"] * group.get("lr_scale", 1.0), group["weight_decay"]) for group in groups
             for p in group["params"]}  # fmt: skip
    named = {name: found[id(p)] for name, p in model.named_parameters()}
    rates = {name: rate for name, (rate, _) in named.items()}
    assert rates["logit_scale"] == 100.0
    assert rates["visual.patch_embed.proj.weight"] == rates["visual.cls_token"] == 0.5**3
    assert rates["visual.blocks.1.mlp.fc2.weight"] == 0.5
    assert rates["visual.norm.weight"] == rates["visual.head.weight"] == 1.0
    assert rates["text.token_embedding.weight"] == rates["text.positional_embedding"] == pytest.approx(0.1)
    assert rates["text.transformer.resblocks.0.ln_1.weight"] == pytest.approx(1.0)
    assert rates["text.ln_final.weight"] == rates["text.text_projection"] == 10.0
    plain = {name for name, (_, decay) in named.items() if not decay}
    apart = {"logit_scale", "visual.pos_embed", "visual.cls_token", "text.positional_embedding"}
    assert plain == apart | {name for name, p in model.named_parameters() if p.ndim <= 1}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_never_waits_for_the_device(precision):
    trainer = train_runs.trainer(train_runs.recipe("clip", run__precision=precision, clip__patch_dropout=0.5))
    before = train_runs.parameters(trainer.task.model)
    batches = iter(trainer.loader)
    for _ in range(8 if precision == "float16" else 2):  # the loss scale falls until gradients fit
        batch = next(batches)
        with NoSynchronisation():
            values = trainer.train_step(batch)
    assert values.isfinite().all()
    same = [name for name, value in trainer.task.model.state_dict().items() if torch.equal(value, before[name])]
    assert not same


def test_lamb_and_the_clamp():
    recipe = train_runs.recipe("clip", optimizer__name="lamb", optimizer__lr=50.0, schedule__warmup_steps=0)
    trainer = train_runs.trainer(recipe)
    before = train_runs.parameters(trainer.task.model)
    batch = next(iter(trainer.loader))
    for _ in range(2):
        trainer.train_step(batch)
    scale = trainer.task.model.logit_scale
    assert scale in (0.0, torch.tensor(MAX_LOGIT_SCALE))
    assert not torch.equal(trainer.task.model.visual.blocks[0].norm1.weight, before["visual.blocks.0.norm1.weight"])


def test_parts_of_a_batch_are_refused():
    with pytest.raises(ValueError, match="accumulate must be 1"):
        train_runs.trainer(train_runs.recipe("clip", data__accumulate=2))


def test_resume_is_exact(tmp_path):
    recipe = train_runs.recipe("clip", clip__patch_dropout=0.5, model__drop_path_rate=0.5)
    train_runs.trainer(recipe, tmp_path / "whole").run()
    first = train_runs.trainer(recipe, tmp_path / "broken")
    step = first.train_step

    def killed(batch):
        if first.step == 3:
            raise KeyboardInterrupt
        return step(batch)

    first.train_step = killed
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = train_runs.trainer(recipe, tmp_path / "broken")
    assert second.step == 2
    second.run()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    train_runs.assert_same_weights(tmp_path / "broken", tmp_path / "whole")


def test_towers_start_from_their_checkpoints(tmp_path):
    recipe = train_runs.recipe("clip")
    sizes = {key: value for key, value in recipe.model.options.items() if key not in ("num_classes", "head")}
    student = eva02.create_model("eva02_base_patch16_224", head="mim", mim_dim=16, **sizes)
    eva02.save_checkpoint(student, tmp_path / "mim.safetensors")
    source = clip.make_model(recipe)
    eva02.save_checkpoint(source.state_dict(), tmp_path / "clip.pt")
    starts = {"clip__vision_init": str(tmp_path / "mim.safetensors"), "clip__text_init": str(tmp_path / "clip.pt")}
    torch.manual_seed(recipe.run.seed)
    fresh = train_runs.parameters(clip.make_model(recipe))
    model = train_runs.build(train_runs.recipe("clip", **starts), train_runs.World())[0].model
    assert torch.equal(model.visual.blocks[1].mlp.fc2.weight, student.blocks[1].mlp.fc2.weight)
    assert torch.equal(model.visual.blocks[1].attn.norm.weight, torch.ones(32))
    assert torch.equal(model.visual.head.weight, fresh["visual.head.weight"])
    assert torch.equal(model.text.ln_final.weight, source.text.ln_final.weight)
    assert torch.equal(model.text.token_embedding.weight, source.text.token_embedding.weight)
    assert torch.equal(model.text.text_projection, fresh["text.text_projection"])
    with pytest.raises(ValueError, match=r"does not fit the text tower: .*token_embedding\.weight is missing"):
        clip.load_text(model.text, str(tmp_path / "mim.safetensors"))


SHORT = (
    *("--epochs", "5", "--batch-size", "32", "--set", "schedule.warmup_epochs=1", "--set", "run.eval_every=0"),
    *("--set", "model.depth=2", "--set", "model.embed_dim=48", "--set", "model.num_heads=2"),
    *("--set", "clip.vision_lr=3e-3", "--set", "clip.text_lr=3e-3"),
)


@pytest.mark.parametrize(
    ("options", "least"), [(SHORT, 0.5), pytest.param((), 0.95, marks=pytest.mark.full)], ids=["short", "whole"]
)
def test_digits_are_found_by_their_names(options, least, tmp_path):
    quiet = ("--set", "run.tensorboard=false", "--set", "run.profile_peak=false")
    assert main(["clip", "--preset", "eva02_digits_clip", "--output", str(tmp_path), *quiet, *options]) == 0
    found = [line for line in read_log(tmp_path / "log.jsonl") if line.get("kind") == "evaluation"][-1]
    print(f"zero-shot top-1 {100 * found['zero_shot_top1']:.2f} %")
    assert found["zero_shot_top1"] >= least
