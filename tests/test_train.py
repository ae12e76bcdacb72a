"""The training loop: what a step does, how a run stops and goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import train_runs
from torch.utils._python_dispatch import TorchDispatchMode

import eva02
from eva02.cli import main
from eva02.clip.config import TextConfig
from eva02.clip.text import TextTower
from eva02.recipes import Model, Optimizer, Recipe, Run, Schedule
from eva02.train import loop, pretrain, state
from eva02.train.command import activation_bytes
from eva02.train.distributed import World
from eva02.train.loop import INTERRUPTED, NonFiniteLoss
from eva02.train.optim import make_optimizer, make_schedule, parameter_groups, steps_of
from eva02.train.progress import Clock, forward_flops, read_log
from eva02.train.state import CheckpointStore, DamagedCheckpoints
from eva02_kernels.bench.measure import saved_for_backward

TASKS = ("pretrain", "finetune")


class NoSynchronisation(TorchDispatchMode):
    """Refuses to read a tensor's value on the host, which waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


# ---- optimiser and schedule ------------------------------------------------------------------------------------------
def test_decay_groups():
    model = eva02.create_model("eva02_tiny_patch14_224", head="mim", depth=1, device="meta")
    groups = parameter_groups(model, Optimizer(weight_decay=0.05))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in decayed}
    plain = {name for name, p in model.named_parameters() if p.ndim <= 1}
    assert names == plain | {"pos_embed", "cls_token"}
    assert "mask_token" not in names


def test_layer_decay_is_the_published_one():
    model = train_runs.classifier(depth=3)
    groups = parameter_groups(model, Optimizer(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0 if "embed" in name else 4
        layer = 0 if name == "cls_token" else layer
        assert scale[id(parameter)] == 0.5 ** (4 - layer), name


def test_schedule():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = make_optimizer([{"params": [parameter], "lr_scale": 0.5}], Optimizer(lr=2.0))
    recipe = Schedule(epochs=3, warmup_epochs=1, min_lr=0.5)
    assert steps_of(recipe, 10) == (30, 10)
    schedule = make_schedule(optimizer, recipe, 10)
    rates = []
    for step in range(30):
        schedule.step_update(step)
        rates.append(2 * optimizer.param_groups[0]["lr"])
    assert rates[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert rates[20] == pytest.approx(0.5 + 1.5 / 2)
    assert 0.5 < rates[29] < 0.52
    ahead = make_schedule(optimizer, dataclasses.replace(recipe, warmup_from_zero=False), 10)
    for step in (0, 8, 9, 10, 11, 29):
        ahead.step_update(step)
        assert 2 * optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * (step + 1) if step < 10 else rates[step])
    assert steps_of(Schedule(steps=7, warmup_steps=100), 10) == (7, 6)
    with pytest.raises(ValueError, match="no step"):
        steps_of(Schedule(epochs=0), 10)


def test_flops_are_those_of_the_published_table():
    for name, gmacs in (("tiny_patch14_224", 1.70), ("small_patch14_336", 15.45), ("large_patch14_448", 361.75)):
        config = eva02.model_config(f"eva02_{name}", num_classes=0)
        assert forward_flops(config) / 2e9 == pytest.approx(gmacs, rel=0.005)


# ---- a step ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_never_waits_for_the_device(task, precision):
    trainer = train_runs.trainer(
        train_runs.recipe(
            task, run__precision=precision, run__ema_decay=0.9, data__accumulate=2, optimizer__layer_decay=0.8
        )
    )
    before = train_runs.parameters(trainer.task.model)
    batches = iter(trainer.loader)
    for _ in range(2):
        batch = next(batches)
        with NoSynchronisation():
            values = trainer.train_step(batch)
    assert values.isfinite().all()
    changed = [name for name, value in trainer.task.model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2


def test_a_step_that_waits_is_noticed(monkeypatch):
    trainer = train_runs.trainer(train_runs.recipe("finetune"))
    batch = next(iter(trainer.loader))
    loss = trainer.task.loss
    monkeypatch.setattr(trainer.task, "loss", lambda *args: loss(*args) * float(loss(*args).detach()))
    with pytest.raises(AssertionError, match="waits"), NoSynchronisation():
        trainer.train_step(batch)


@pytest.mark.parametrize("task", TASKS)
def test_accumulated_parts_are_one_step(task):
    """Also where the parts of a batch have different numbers of masked patches."""
    results = []
    for parts in (1, 4):
        trainer = train_runs.trainer(train_runs.recipe(task, data__accumulate=parts, model__drop_path_rate=0.0))
        batch = next(iter(trainer.loader))
        if task == "pretrain":
            batch["mask"][:5] = False
            batch["mask"][:5, 0] = True
        trainer.optimizer.zero_grad = lambda **_: None  # keep the gradients
        values = trainer.train_step(batch)
        gradients = {name: p.grad.clone() for name, p in trainer.task.model.named_parameters()}
        results.append({"values": values, **gradients})
    whole, parts = results
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


def test_the_trained_model_of_a_grid_that_is_not_square_loads(tmp_path):
    recipe = train_runs.recipe("finetune", model__img_size="8x12", schedule__steps=1)
    train_runs.trainer(recipe, tmp_path).run()
    model = eva02.create_model(recipe.model.name, **{**recipe.model.options, "img_size": 16})
    report = eva02.load_checkpoint(model, tmp_path / "model.safetensors")
    assert report.resized == ["pos_embed 4x6 -> 8x8 (timm)"]


def test_what_is_frozen_stays():
    """Without a gradient there is no weight decay either: fine-tuning leaves the patch projection as it was."""
    for changes, moves in (
        ({"model__patch_grad_scale": 0.0}, lambda name: not name.startswith("patch_embed")),
        ({"finetune__linear_probe": True}, lambda name: name.startswith("head")),
    ):
        trainer = train_runs.trainer(train_runs.recipe("finetune", optimizer__weight_decay=0.5, **changes))
        before = train_runs.parameters(trainer.task.model)
        batches = iter(trainer.loader)
        for _ in range(3):
            trainer.train_step(next(batches))
        for name, value in trainer.task.model.state_dict().items():
            assert torch.equal(value, before[name]) != moves(name), name


def test_clip_and_norm():
    trainer = train_runs.trainer(train_runs.recipe("finetune", optimizer__clip_grad=1e-3))
    norms = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *args: (
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters])),
        step(*args),
    )
    norm = trainer.train_step(next(iter(trainer.loader)))[1]
    assert norm > 1e-2
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_average_of_weights():
    trainer = train_runs.trainer(train_runs.recipe("finetune", run__ema_decay=0.75, schedule__warmup_steps=0))
    start = train_runs.parameters(trainer.task.model)["head.weight"]
    trainer.train_step(next(iter(trainer.loader)))
    expected = 0.75 * start + 0.25 * trainer.task.model.head.weight
    torch.testing.assert_close(trainer.ema.module.head.weight, expected)


def test_mixed_labels(monkeypatch):
    trainer = train_runs.trainer(train_runs.recipe("finetune", data__cutmix=1.0))
    batch = next(iter(trainer.loader))
    assert batch["label"].shape == (16, 10)
    assert trainer.train_step(batch)[0] == pytest.approx(2.3, abs=0.3)


# ---- a run -----------------------------------------------------------------------------------------------------------
def losses(folder) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line and "lr" in line}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Loss of every step and the trained weights of each task's run."""
    found = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        outcome = train_runs.trainer(train_runs.recipe(task, run__ema_decay=0.9), folder).run()
        assert outcome.finished
        assert outcome.step == 6
        assert losses(folder) == dict(enumerate(outcome.losses, 1))
        found[task] = folder
    return found


def assert_same_run(folder, reference):
    assert losses(folder) == losses(reference)
    train_runs.assert_same_weights(folder, reference)


@pytest.mark.parametrize("task", TASKS)
def test_sigterm_saves_and_the_same_run_goes_on(task, uninterrupted, tmp_path, monkeypatch, capsys):
    step = loop.Trainer.train_step

    def interrupted(trainer, batch):
        values = step(trainer, batch)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    recipe = train_runs.recipe(task, run__ema_decay=0.9, run__output=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", interrupted)
        assert train_runs.train(recipe, train_runs.build) == INTERRUPTED
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()
    assert not (tmp_path / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train_runs.train(recipe, train_runs.build) == 0
    assert "continuing from step 3 of 6" in capsys.readouterr().err
    assert_same_run(tmp_path, uninterrupted[task])
    assert train_runs.train(recipe, train_runs.build) == 0  # nothing is left to do
    assert_same_run(tmp_path, uninterrupted[task])


def test_sigterm_to_the_loaders_processes_too(tmp_path, uninterrupted):
    """As schedulers send it: to every process of a job."""
    recipe = train_runs.recipe("finetune", run__ema_decay=0.9, data__workers=2)
    trainer = train_runs.trainer(recipe, tmp_path)
    step = trainer.train_step

    def told(batch):
        if trainer.step == 1:
            processes = (*multiprocessing.active_children(), multiprocessing.current_process())
            subprocess.run(["kill", *(str(process.pid) for process in processes)], check=True)
            time.sleep(0.2)
        return step(batch)

    trainer.train_step = told
    outcome = trainer.run()
    assert (outcome.step, outcome.finished) == (2, False)
    assert train_runs.trainer(recipe, tmp_path).run().finished
    assert_same_run(tmp_path, uninterrupted["finetune"])


@pytest.mark.parametrize("where", ["nan in the image", "infinite gradient"])
def test_a_loss_that_is_not_finite_stops(where, tmp_path, monkeypatch):
    trainer = train_runs.trainer(train_runs.recipe("pretrain", run__checkpoint_every=2, run__log_every=3), tmp_path)
    transform = trainer.loader.transform
    loss = trainer.task.loss

    def poisoned(image, target, rng):
        sample = transform(image, target, rng)
        if trainer.loader.state_dict()["batch"] == 4:
            sample["image"][0, 0, 0] = float("nan")
        return sample

    class InfiniteGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout * float("inf")

    def infinite(*args):
        return InfiniteGradient.apply(loss(*args)) if trainer.step == 4 else loss(*args)

    if where == "nan in the image":
        trainer.loader.transform = poisoned
    else:
        trainer.task.loss = infinite
    with pytest.raises(NonFiniteLoss, match="step 5: loss"):
        trainer.run()
    saved = torch.load(next(tmp_path.glob("nonfinite-step5-rank0.pt")), weights_only=True)
    assert saved["batch"]["image"].isnan().any() == (where == "nan in the image")
    assert saved["step"] == 5
    assert CheckpointStore(tmp_path / "checkpoints", 3, World()).steps() == [2, 4]


def test_another_recipe_is_not_continued(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted["finetune"], tmp_path / "run")
    with pytest.raises(ValueError, match=r"another recipe \(optimizer.lr: 0.001 -> 0.002\)"):
        train_runs.trainer(train_runs.recipe("finetune", run__ema_decay=0.9, optimizer__lr=2e-3), tmp_path / "run")


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def filled(folder, steps=(1, 2, 3), keep=3):
    store = CheckpointStore(folder, keep, World())
    for step in steps:
        store.save(step, {"step": step, "x": torch.full((1000,), float(step))}, {"y": step})
    return store


def test_checkpoints_are_kept_and_removed(tmp_path):
    store = filled(tmp_path, range(1, 6))
    assert store.steps() == [3, 4, 5]
    shared, own, same_processes = store.load(store.newest())
    assert shared["step"] == 5
    assert own == {"y": 5}
    assert same_processes


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "folder"])
def test_damage_is_found_and_passed_over(harm, tmp_path, caplog):
    store = filled(tmp_path)
    last = tmp_path / "step-00000003"
    file = last / "state.pt"
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "remove":
        file.unlink()
    elif harm == "manifest":
        (last / "manifest.json").write_text("{")
    else:
        shutil.rmtree(last)
        last.mkdir()
    assert store.newest().name == "step-00000002"
    assert "step-00000003" in caplog.text
    assert "continuing from step-00000002" in caplog.text
    store.save(3, {"step": 3}, {})
    assert store.newest().name == "step-00000003"
    for step in store.steps():
        (tmp_path / f"step-{step:08d}" / "rank-0.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpoints, match=r"no checkpoint in .* is whole"):
        store.newest()


class FullDisk:
    """Its `open` gives files that together take so many bytes; those of another name take any number."""

    def __init__(self, room: int, name: str = "") -> None:
        self.room, self.name = room, name

    def open(self, path, mode="r"):
        if "w" not in mode or self.name not in path.name:
            return open(path, mode)
        disk = self

        class File(io.FileIO):
            def write(self, data):
                disk.room -= len(memoryview(data).cast("B"))
                if disk.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data)

        file = File(path, "w")
        return file if "b" in mode else io.TextIOWrapper(io.BufferedWriter(file))


@pytest.mark.parametrize(("room", "name"), [(0, ""), (3000, ""), (100_000, ""), (0, "manifest")])
def test_a_full_disk_loses_no_earlier_checkpoint(room, name, uninterrupted, tmp_path, monkeypatch, capsys):
    """The run goes on, says so, and its last checkpoint has to succeed."""
    full = FullDisk(room, name)
    recipe = train_runs.recipe("pretrain", run__ema_decay=0.9, run__output=str(tmp_path))
    save = loop.Trainer._save

    def saving(trainer, must):
        if trainer.step != 4:
            return save(trainer, must)
        with monkeypatch.context() as patch:
            patch.setattr(state, "open", full.open, raising=False)
            saved = save(trainer, must)
        assert saved == -1
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002"]
        assert state.damage(tmp_path / "checkpoints" / "step-00000002") is None
        return saved

    monkeypatch.setattr(loop.Trainer, "_save", saving)
    assert train_runs.train(recipe, train_runs.build) == 0
    assert full.room < 0
    assert "No space left on device" in capsys.readouterr().err
    assert_same_run(tmp_path, uninterrupted["pretrain"])

    monkeypatch.setattr(state, "open", FullDisk(0).open, raising=False)
    with pytest.raises(OSError, match="step-00000007 could not be written"):
        CheckpointStore(tmp_path / "checkpoints", 3, World()).save(7, {}, {})


def test_random_generators_are_restored():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    state.seed_everything(3)
    random.gauss(0, 1)
    np.random.randn()
    saved = state.rng_state()
    expected = draw()
    assert draw() != expected
    state.set_rng_state(saved)
    assert draw() == expected


# ---- what is shown ---------------------------------------------------------------------------------------------------
def test_clock_gives_inner_sections_their_own_time(monkeypatch):
    now = iter([0.0, 0.0, 1.0, 3.0, 4.0, 8.0, 9.0, 10.0, 10.0])
    monkeypatch.setattr("eva02.train.progress.time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with clock.section("student"), clock.section("teacher"):
        pass
    with clock.section("data"):
        pass
    wall, shares = clock.take()
    assert wall == 10.0
    assert shares == {"data": 0.1, "teacher": 0.2, "student": 0.2}


def test_log_and_tensorboard(tmp_path):
    recipe = train_runs.recipe(
        "finetune", data__val="digits", run__tensorboard=True, run__eval_every=0, run__profile_peak=True
    )
    outcome = train_runs.trainer(recipe, tmp_path).run()
    lines = read_log(tmp_path / "log.jsonl")
    kinds = [line.get("kind", "step") for line in lines]
    look = ["step", "step", "window", "checkpoint"]
    assert kinds == ["start", *look, *look, *look[:3], "evaluation", "checkpoint"]
    windows = [line for line in lines if line.get("kind") == "window"]
    assert all(0 < line["mfu"] < 1 for line in windows)
    assert all(0.5 < sum(line["shares"].values()) <= 1.01 for line in windows)
    assert "multiply-adds" in lines[0]["peak"][1]
    evaluation = next(line for line in lines if line.get("kind") == "evaluation")
    assert outcome.evaluation == {name: evaluation[name] for name in ("top1", "top5", "loss")}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("loss")) == 6
    assert events.Scalars("val/top1")[-1].value == pytest.approx(outcome.evaluation["top1"])


# ---- the commands ----------------------------------------------------------------------------------------------------
def test_dry_run(capsys):
    assert main(["pretrain", "--preset", "eva02_tiny_p14_in21k_mim", "--dry-run", "--processes", "40"]) == 0
    text = capsys.readouterr().out
    assert "5,699,968 parameters" in text
    assert "851,760 steps, 3,549 of them warm-up" in text
    assert "4000 = 40 process(es) x 1 part(s) x 100" in text
    command = ["finetune", "--preset", "eva02_digits", "--dry-run", "--measure", "4", "--set", "model.depth=1"]
    assert main(command) == 0
    assert "images/s measured here" in capsys.readouterr().out
    assert main(["clip", "--preset", "eva02_clip_b16", "--dry-run", "--processes", "64"]) == 0
    text = capsys.readouterr().out
    assert "GFLOP forward an image, 5.96 a text of 77 tokens" in text
    assert "rate 2.5e-07 -> 0.0005 -> 0" in text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eva02_tiny_patch14_224", {}),
        ("eva02_base_patch14_224", {"recompute": True}),
        ("eva_giant_patch14_clip_224", {"patch_drop_rate": 0.5}),
        ("text", {}),
    ],
)
def test_the_dry_run_foresees_what_blocks_keep(name, options):
    recipe = Recipe(Model(""), run=Run(precision="float32"))

    def kept(depth: int) -> tuple[int, int]:
        if name == "text":
            model = TextTower(TextConfig(depth=depth), 512)
            batch = torch.randint(1, 49408, (2, 77))
        else:
            model = eva02.create_model(name, depth=depth, **options)
            batch = torch.randn(2, 3, *model.config.image_hw)
        saved = saved_for_backward(lambda: model(batch), model.parameters())
        return saved.bytes, activation_bytes(model.config, recipe, 2)

    # The last block may compute fewer rows; what another block adds is what is foreseen.
    (found3, foreseen3), (found2, foreseen2) = kept(3), kept(2)
    assert found3 - found2 == pytest.approx(foreseen3 - foreseen2, rel=0.01)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["finetune", "--preset", "eva02_digit"], "nearest: eva02_digits"),
        (["finetune", "--preset", "eva02_digits_mim"], "is for 'eva02 pretrain'"),
        (["finetune", "--preset", "eva02_digits", "--set", "optimizer.Lr=1"], "did you mean 'optimizer.lr'"),
        (["finetune", "--preset", "eva02_digits", "--set", "lr"], "FIELD=VALUE"),
        (["finetune", "--preset", "eva02_digits", "--lr", "x"], "optimizer.lr takes a number"),
        (["finetune", "--preset", "eva02_digits"], "--output is needed"),
        (["finetune", "--preset", "eva02_digits", "--measure", "3"], "--dry-run"),
        (
            ["finetune", "--preset", "eva02_digits", "--output", "{tmp}", "--batch-size", "65", "--accumulate", "2"],
            "65",
        ),
        (["finetune", "--preset", "eva02_digits", "--output", "{tmp}", "--data", "/nowhere"], "nowhere"),
        (["pretrain", "--preset", "eva02_digits_mim", "--output", "{tmp}"], "--teacher is needed"),
    ],
)
def test_mistakes_are_named(command, message, capsys, tmp_path):
    assert main([part.format(tmp=tmp_path) for part in command]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_fine_tuned_run_as_teacher(tmp_path, capsys):
    """The three commands in a row: a classifier, pre-training with it as teacher, fine-tuning of what came out."""
    small = [f"--set={name}={value}" for name, value in train_runs.SMALL.items()]
    teacher, student, out = (str(tmp_path / name) for name in ("teacher", "student", "out"))
    assert main(["finetune", "--preset", "eva02_digits", "--output", teacher, *small]) == 0
    command = ["pretrain", "--preset", "eva02_digits_mim", "--output", student, "--teacher", teacher, *small]
    assert main(command) == 1
    assert "features are 32 wide, model.mim_dim is 96" in capsys.readouterr().err
    assert main([*command, "--set", "model.mim_dim=32", "--set", "data.val=digits"]) == 0
    init = student
    assert main(["finetune", "--preset", "eva02_digits", "--output", out, "--init", init, *small]) == 0
    evaluations = [line for line in read_log(tmp_path / "student" / "log.jsonl") if line.get("kind") == "evaluation"]
    assert -1 <= evaluations[-1]["loss"] <= 1
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["finetune.init"] == init


def test_cached_features_train_as_the_teacher_itself(tmp_path):
    """The same crops, masks and, but for their rounding to bfloat16, targets."""
    from eva02.data import open_source
    from eva02.teacher import Teacher
    from eva02.teacher_cache import CacheWriter

    recipe = train_runs.recipe("pretrain", schedule__steps=3)
    model = eva02.create_model(recipe.model.name, **{**recipe.model.options, "head": "classifier", "num_classes": 0})
    teacher = Teacher(model)
    crops = {"scale": recipe.data.crop_scale, "hflip": recipe.data.hflip}
    writer = CacheWriter(tmp_path, open_source("digits"), teacher, crops=1, **crops)
    for _ in writer.write(writer.shards):
        pass
    wide = {"model__mim_dim": 32, "schedule__steps": 3}
    live = train_runs.trainer(train_runs.recipe("pretrain", **wide))
    live.task.teacher = teacher
    cached, loader = pretrain.build(train_runs.recipe("pretrain", **wide, mim__teacher_cache=str(tmp_path)), World())
    assert cached.teacher is None
    losses = live.run().losses
    from_cache = loop.Trainer(cached, loader, live.recipe).run().losses
    assert from_cache == pytest.approx(losses, abs=2e-3)
    assert from_cache != losses
    with pytest.raises(ValueError, match=r"flip\) \(\(0.5, 1.0\), 0.0\); data.crop_scale and data.hflip are .* 0.5\)"):
        pretrain.build(
            train_runs.recipe("pretrain", **wide, mim__teacher_cache=str(tmp_path), data__hflip=0.5), World()
        )
    with pytest.raises(ValueError, match="the student predicts"):
        pretrain.build(train_runs.recipe("pretrain", mim__teacher_cache=str(tmp_path)), World())
