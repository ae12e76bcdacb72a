"""Two processes make the steps of one: DDP and FSDP2 over gloo on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import train_runs
from torch import Tensor

from eva02.train.distributed import save_sharded, started
from eva02.train.loop import Trainer
from eva02.train.progress import read_log
from eva02.train.state import CheckpointStore

EXACT = {"model__drop_path_rate": 0.0, "optimizer__clip_grad": 0.05, "run__ema_decay": 0.5}
"""Drop path is drawn by each process for its own samples."""


def full(value: Tensor) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def uneven(batch):
    """Masks of 1 to 20 patches, so that processes and parts of a batch have different numbers of them."""
    if "mask" in batch:
        batch["mask"] = torch.arange(batch["mask"].shape[1]) <= batch["index"][:, None] % 20
    return batch


def results(trainer: Trainer, steps: int) -> dict[str, Tensor]:
    """Losses, gradient norms, the last gradients, and the weights after the steps."""
    values, gradients = [], {}
    update = trainer._update

    def keeping():
        gradients.update({f"grad {name}": full(p.grad) for name, p in trainer.task.model.named_parameters()})
        return update()

    trainer._update = keeping
    batches = iter(trainer.loader)
    for _ in range(steps):
        loss, norm = trainer.train_step(uneven(next(batches)))
        values.append(torch.stack([trainer.world.sum_(loss.clone()), norm]))
    weights = {name: full(p) for name, p in trainer.task.model.named_parameters()}
    averages = {f"ema {name}": full(p) for name, p in trainer.ema.module.named_parameters()}
    return {"values": torch.stack(values), **gradients, **weights, **averages}


def process(rank: int, port: int, target: str, folder: str, *args) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    with started("cpu") as world:
        globals()[target](world, Path(folder), *args)


@pytest.fixture(scope="module")
def two_processes():
    """Runs a function of this module, by name, in two processes that are joined by gloo."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train_runs", "timm", "timm.optim", "timm.scheduler", "timm.data", "sklearn.datasets"]
    )

    def run(target, *args):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = [context.Process(target=process, args=(rank, port, target, *args)) for rank in range(2)]
        for one in started:
            one.start()
        for one in started:
            one.join(timeout=240)
        assert [one.exitcode for one in started] == [0, 0]

    return run


def step_together(world, folder, task, how, changes):
    recipe = train_runs.recipe(task, **{**EXACT, **changes, "run__parallel": how})
    trainer = train_runs.trainer(recipe, world=world)
    found = results(trainer, 2)
    if world.is_main:
        torch.save(found, folder / "two.pt")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", ["pretrain", "finetune", "clip"])
def test_two_processes_are_one(task, how, two_processes, tmp_path):
    """Same losses, gradients, weights and averages, with ragged masks, parts of a batch, and pairs on both."""
    changes = {"optimizer__name": "lamb"} if task == "clip" else {"data__accumulate": 2}
    two_processes("step_together", str(tmp_path), task, how, changes)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one = results(train_runs.trainer(train_runs.recipe(task, **EXACT, **changes)), 2)
    assert two.keys() == one.keys()
    for name, value in one.items():
        # AdamW's first steps are the signs of gradients: weights are compared by the size of a step.
        scale = value.abs().max().item() if name == "values" or name.startswith("grad") else 1.0
        torch.testing.assert_close(
            two[name].reshape(value.shape), value, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_local_norm_is_the_mean_of_means(two_processes, tmp_path):
    two_processes("step_together", str(tmp_path), "pretrain", "ddp", {"mim__loss_norm": "local"})
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    trainer = train_runs.trainer(train_runs.recipe("pretrain", **EXACT))
    batch = uneven(next(iter(trainer.loader)))
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 8), slice(8, 16))]
    counts, losses = [], []
    for half in halves:
        half = trainer.task.prepare(half)
        counts.append(trainer.task.count(half))
        losses.append(trainer.task.loss(trainer.task.model, half, trainer.clock))
    assert counts[0] != counts[1]
    mean_of_means = torch.stack(losses).mean()
    torch.testing.assert_close(two["values"][0, 0], mean_of_means.detach(), rtol=1e-4, atol=1e-6)
    mean_of_all = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
    assert (mean_of_means - mean_of_all).abs() > 1e-5


def fail_to_save(world, folder):
    store = CheckpointStore(folder, 3, world)
    state = {"x": torch.full((4,), float(world.rank))}
    store.save(1, {}, {}, lambda path: save_sharded(path, state))

    def without_place(path):
        if world.is_main:
            path.touch()
        dist.barrier()
        save_sharded(path, state)

    with pytest.raises(OSError, match=r"step-00000002 could not be written: process \d"):
        store.save(2, {}, {}, without_place)
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert store.newest().name == "step-00000001"


def test_shards_that_cannot_be_written_lose_no_earlier_checkpoint(two_processes, tmp_path):
    two_processes("fail_to_save", str(tmp_path))


RESUMED = {"run__ema_decay": 0.5, "run__checkpoint_every": 3}


def train_and_resume(world, folder, how):
    """A run in one go, and one that is told to stop in its third step and goes on in a trainer of its own."""
    recipe = train_runs.recipe("finetune", **RESUMED, run__parallel=how, run__log_every=100)
    assert train_runs.trainer(recipe, folder / "whole", world).run().finished
    first = train_runs.trainer(recipe, folder / "broken", world)
    step = first.train_step

    def told(batch):
        if first.step == 2 and world.rank == 1:
            first._signalled = True
        return step(batch)

    first.train_step = told
    assert not first.run().finished
    second = train_runs.trainer(recipe, folder / "broken", world)
    assert second.step == 4
    assert second.run().finished
    dist.barrier()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_resume_is_exact(how, two_processes, tmp_path, caplog):
    """A signal to one process stops both a step later; the weights that come out are those of a run in one go."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    two_processes("train_and_resume", str(tmp_path), how)
    curves = [
        {line["step"]: line["loss"] for line in read_log(tmp_path / name / "log.jsonl") if "lr" in line}
        for name in ("whole", "broken")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 6
    train_runs.assert_same_weights(tmp_path / "broken", tmp_path / "whole")
    if how == "ddp":  # one process can go on with it, and says what that changes
        alone = train_runs.trainer(train_runs.recipe("finetune", **RESUMED), tmp_path / "broken")
        assert alone.step == 6
        assert "another number of processes" in caplog.text
    else:
        with pytest.raises(ValueError, match=r"run\.parallel must agree"):
            train_runs.trainer(train_runs.recipe("finetune", **RESUMED), tmp_path / "broken")
