"""The training loop: all tasks, any number of processes, any precision; stops and resumes without a trace.

Within a step nothing waits for the device: losses and gradient norms stay on it and are read every `log_every` steps.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from eva02.checkpoint import save_checkpoint
from eva02.files import atomic_file
from eva02.recipes import Recipe
from eva02.train.distributed import AnyOf, Parallel, World, load_sharded, save_sharded
from eva02.train.optim import ParameterGroups, epoch_steps, make_optimizer, make_schedule, parameter_groups, steps_of
from eva02.train.progress import Clock, Reporter, measured_peak, mfu
from eva02.train.state import CheckpointStore, rng_state, seed_everything, set_rng_state

if TYPE_CHECKING:
    from eva02.data import TrainLoader

_logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
INTERRUPTED = 75
"""Exit status of a run that was told to stop, saved and stopped: the same command continues it (EX_TEMPFAIL)."""


class Task(abc.ABC):
    """What is trained on what. The loop does everything else."""

    ragged: ClassVar[bool] = False
    """Batches of one size have losses of different numbers of terms, which ranks have to agree on."""

    accumulates: ClassVar[bool] = True
    """The mean of the losses of a batch's parts is the loss of the batch."""

    model: nn.Module

    def prepare(self, batch: Batch) -> Batch:
        """Adds to a batch on the host what the loss needs of it there."""
        return batch

    def count(self, batch: Batch) -> int:
        """Terms of which the loss of a prepared batch is the mean."""
        return len(batch["image"])

    @abc.abstractmethod
    def example(self, size: int) -> Batch:
        """A batch of random data of the shapes that the loader gives, to measure speed with."""

    @abc.abstractmethod
    def loss(self, forward: nn.Module, batch: Batch, clock: Clock) -> Tensor:
        """Mean loss of a batch on the device, under autocast; `forward` is the model, or what wraps it."""

    def parameter_groups(self, recipe: Recipe) -> ParameterGroups:
        return parameter_groups(self.model, recipe.optimizer)

    def after_step(self) -> None:  # noqa: B027
        """Called after each update, for example to clamp a parameter."""

    def flops(self) -> int | None:
        """Of one image's training step, teacher included, None where unknown: for MFU."""
        return None

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Figures on held-out data, the same on all processes; none without such data."""
        return {}


class NonFiniteLoss(FloatingPointError):
    """The loss, or the gradients' norm, became NaN or infinite."""


@dataclass
class Outcome:
    """What a run came to."""

    step: int
    finished: bool
    """False: it was told to stop, and saved."""
    losses: list[float]
    """Of each step since it was started or resumed."""
    evaluation: dict[str, float]


class Trainer:
    """One run.

    Args:
        task: model and loss. The model is on `world.device`.
        loader: of this process; gives batches of this process's share.
        recipe: everything else.
        world: the run's processes.
        output: folder of checkpoints and logs, None for neither. A run that it holds is continued.
    """

    def __init__(
        self, task: Task, loader: TrainLoader, recipe: Recipe, world: World | None = None, output: Path | None = None
    ) -> None:
        world = world or World()
        run = recipe.run
        self.task, self.loader, self.recipe, self.world, self.output = task, loader, recipe, world, output
        local = recipe.data.batch_size // world.size
        if recipe.data.batch_size % (world.size * recipe.data.accumulate):
            raise ValueError(
                f"data.batch_size {recipe.data.batch_size} is not a multiple of {world.size} processes times "
                f"data.accumulate {recipe.data.accumulate}"
            )
        if recipe.data.accumulate > 1 and not task.accumulates:
            raise ValueError("data.accumulate must be 1: a part's contrastive loss is not a part of the batch's")
        self.part = local // recipe.data.accumulate
        self.epoch = epoch_steps(recipe, loader.steps_per_epoch)
        self.total, _ = steps_of(recipe.schedule, self.epoch)
        if run.grad_checkpointing:
            task.model.set_grad_checkpointing()  # type: ignore[operator]
        if run.recompute:
            for module in task.model.modules():
                if hasattr(module, "recompute"):
                    module.recompute = True  # type: ignore[assignment]
        world.equalise(task.model)
        self.ema = None
        if run.ema_decay is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(task.model, decay=run.ema_decay)
        self.parallel = Parallel(task.model, world, run.parallel)
        if self.ema is not None and self.parallel.sharded:
            Parallel(self.ema.module, world, run.parallel)
        task.model.train()
        self.optimizer = make_optimizer(task.parameter_groups(recipe), recipe.optimizer)
        self.schedule = make_schedule(self.optimizer, recipe.schedule, self.epoch)
        self.scaler = torch.amp.GradScaler(
            world.device.type, init_scale=2.0**16, growth_interval=500, enabled=run.precision == "float16"
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.clock = Clock(world.device)
        self.step = 0
        self.losses: list[float] = []
        self._unread: list[tuple[dict[str, Any], Tensor]] = []
        self._positions: list[dict[str, Any]] = []
        self._anyone_told_to_stop = AnyOf(world)
        self._peak: tuple[float, str] | None = None
        seed_everything(run.seed + world.rank)
        self.store = None if output is None else CheckpointStore(output / "checkpoints", run.keep, world)
        if self.store is not None:
            self._resume(self.store)

    # ---- one step ----------------------------------------------------------------------------------------------------
    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = self.recipe.run.precision
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, getattr(torch, precision))

    def train_step(self, batch: Batch) -> Tensor:
        """One update from this process's share of a batch; returns [loss, gradient norm] on the device.

        The loss is this process's part of the run's: their sum over processes is the loss of the whole batch.
        """
        task, world = self.task, self.world
        size = len(batch["image"])
        starts = range(0, size, self.part)
        parts = [task.prepare({key: value[i : i + self.part] for key, value in batch.items()}) for i in starts]
        weights = self._weights([task.count(part) for part in parts])
        self.schedule.step_update(self.step)
        total = torch.zeros((), device=world.device)
        with self.clock.section("student"):
            for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                part = {key: value.to(world.device, non_blocking=True) for key, value in part.items()}
                with self.parallel.gradients(last=i == len(parts) - 1):
                    with self.autocast():
                        loss = task.loss(self.parallel.forward, part, self.clock)
                    loss = loss.float() * weight
                    self.scaler.scale(loss).backward()
                total += loss.detach()
            norm = self._update()
        self.step += 1
        return torch.stack([total / world.size, norm])

    def _weights(self, counts: list[int]) -> list[Any]:
        """Factors that make the parts' means, averaged over processes, the mean of all terms."""
        own = sum(counts)
        mim = getattr(self.recipe, "mim", None)
        if self.world.size == 1 or not self.task.ragged or (mim is not None and mim.loss_norm == "local"):
            return [count / max(own, 1) for count in counts]
        everyone = self.world.sum_(torch.full((), float(own), device=self.world.device)).clamp_(min=1.0)
        return [count * self.world.size / everyone for count in counts]

    def _update(self) -> Tensor:
        """Clip, step, average; returns the norm of all gradients before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.recipe.optimizer.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.optimizer.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        if self.ema is not None:
            self.ema.update(self.task.model)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards: a sum over processes

    # ---- the run -----------------------------------------------------------------------------------------------------
    def run(self) -> Outcome:
        """Train to the end, or until SIGTERM.

        Raises:
            NonFiniteLoss: the step's batch is saved beside the checkpoints.
        """
        run = self.recipe.run
        eval_steps = round(run.eval_every * self.epoch)
        evaluation: dict[str, float] = {}
        self.reporter = Reporter(self.output, self.total, self.step, run.tensorboard) if self.world.is_main else None
        if run.profile_peak:
            self._peak = measured_peak(self.world.device, run.precision)
        if self._peak is not None and self.reporter is not None:
            rate, against = self._peak
            self.reporter.print(f"MFU is against {rate / 1e9:.4g} GFLOP/s a process: {against}")
        self._note(kind="start", step=self.step, total=self.total, world_size=self.world.size, peak=self._peak,
                   torch=torch.__version__, recipe=self.recipe.to_dict())  # fmt: skip
        saved = self.step
        with self._told_to_stop():
            try:
                batches = iter(self.loader)
                self.clock.restart()
                stop = False
                while self.step < self.total and not stop:
                    self._positions.append(self.loader.state_dict())
                    with self.clock.section("data"):
                        batch = next(batches)
                    values = self.train_step(batch)
                    rate = max(group["lr"] for group in self.optimizer.param_groups)
                    self._unread.append(({"step": self.step, "lr": rate}, values))
                    done = self.step == self.total
                    save = self.store is not None and (done or self.step % run.checkpoint_every == 0)
                    stop = self._anyone_told_to_stop(self._signalled)
                    evaluate = done or (eval_steps > 0 and self.step % eval_steps == 0 and not stop)
                    if save or evaluate or len(self._unread) == run.log_every:
                        self._read()
                    if evaluate:
                        evaluation = self._evaluate() or evaluation
                    if save:
                        saved = self._save(must=done)
                    if save or evaluate:
                        self.clock.restart()
                self._anyone_told_to_stop.wait()
                if self._unread:
                    self._read()
                if self.store is not None and saved != self.step:
                    self._save(must=True)
                finished = self.step == self.total
                if finished and self.output is not None:
                    self._export(self.output)
                return Outcome(self.step, finished, self.losses, evaluation)
            finally:
                if self.reporter is not None:
                    self.reporter.close()

    @contextlib.contextmanager
    def _told_to_stop(self) -> Iterator[None]:
        """SIGTERM ends the run after the step, with several processes after the next, and before an evaluation."""
        self._signalled = False

        def note(*_: Any) -> None:
            self._signalled = True

        try:
            before = signal.signal(signal.SIGTERM, note)
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _read(self) -> None:
        """Wait for the device: losses of the steps since the last look, whether they are finite, speed."""
        lines = [line for line, _ in self._unread]
        values = torch.stack([value for _, value in self._unread])
        values[:, 1] /= self.world.size  # each process has the norm of all
        table = self.world.sum_(values).tolist()
        positions, self._unread, self._positions = self._positions, [], []
        for line, (loss, norm), position in zip(lines, table, positions, strict=True):
            # Under a loss scale a gradient may overflow: its step was left out, and the scale is lower.
            if not (math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())):
                self._dump(line["step"], loss, norm, position)
            line |= {"loss": loss, "grad_norm": norm if math.isfinite(norm) else None}
            self.losses.append(loss)
        seconds, shares = self.clock.take()
        if self.reporter is not None:
            if self.scaler.is_enabled():
                lines[-1]["loss_scale"] = self.scaler.get_scale()
            self.reporter.steps(lines)
            self.reporter.window(self.step, lines[-1]["loss"], {**self._speed(len(lines), seconds), "shares": shares})

    def _speed(self, steps: int, seconds: float) -> dict[str, float | None]:
        images = steps * self.recipe.data.batch_size
        flops = self.task.flops()
        return {
            "epoch": round(self.step / self.epoch, 3),
            "images_per_s": round(images / seconds, 2),
            "seconds_per_step": round(seconds / steps, 5),
            "mfu": mfu(None if flops is None else flops * images / self.world.size, seconds, self._peak),
        }

    def _dump(self, step: int, loss: float, norm: float, position: dict[str, Any]) -> None:
        """Save the batch of a step whose loss or gradient is not finite, and raise."""
        path = None
        if self.output is not None:
            self.loader.load_state_dict(position)
            batch = next(iter(self.loader))  # the same again: it follows from its position
            path = self.output / f"nonfinite-step{step}-rank{self.world.rank}.pt"
            with atomic_file(path) as file:
                torch.save({"step": step, "loss": loss, "grad_norm": norm, "batch": batch, "loader": position}, file)
        self._note(kind="nonfinite", step=step - 1, loss=repr(loss), grad_norm=repr(norm))
        saved = "" if path is None else f"; its batch is in {path}"
        raise NonFiniteLoss(f"step {step}: loss {loss}, gradient norm {norm}{saved}")

    def _evaluate(self) -> dict[str, float]:
        model = self.task.model
        found: dict[str, float] = {}
        model.eval()
        with torch.no_grad(), self.autocast():
            found |= self.task.evaluate(model, self.world)
            if self.ema is not None and found:
                averaged = self.task.evaluate(self.ema.module, self.world)
                found |= {f"ema_{name}": value for name, value in averaged.items()}
        model.train()
        if found and self.reporter is not None:
            self.reporter.evaluation(self.step, found)
        return found

    def _note(self, **values: Any) -> None:
        if self.reporter is not None:
            self.reporter.note(**values)

    # ---- saved state -------------------------------------------------------------------------------------------------
    def _tensors(self) -> dict[str, Any]:
        """Of model, optimiser and average, by name: what FSDP keeps in shards."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.task.model, self.optimizer)
        found = {"model": model, "optimizer": optimizer}
        return found if self.ema is None else {**found, "ema": self.ema.module.state_dict()}

    def _save(self, must: bool) -> int:
        """Write a checkpoint. One that fails is reported, and the run goes on unless it was the last chance."""
        assert self.store is not None
        shared: dict[str, Any] = {"step": self.step, "scaler": self.scaler.state_dict(), "recipe": self._identity()}
        sharded = None
        if self.parallel.sharded:
            tensors = self._tensors()

            def sharded(path: Path) -> None:
                save_sharded(path, tensors)
        else:
            shared |= {"model": self.task.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            if self.ema is not None:
                shared["ema"] = self.ema.module.state_dict()
        own = {"rng": rng_state(), "loader": self.loader.state_dict()}
        try:
            self.store.save(self.step, shared, own, sharded)
        except OSError as error:
            if must:
                raise
            self._note(kind="checkpoint", step=self.step, error=str(error))
            if self.reporter is not None:
                self.reporter.print(f"step {self.step}: {error}; going on, earlier checkpoints are as they were")
            return -1
        self._note(kind="checkpoint", step=self.step)
        return self.step

    def _identity(self) -> str:
        """JSON of what a resumed run must have in common with the run that it continues."""
        free = ("run.output", "run.device", "run.log_every", "run.checkpoint_every", "run.keep", "run.eval_every",
                "run.tensorboard", "run.profile_peak", "run.parallel", "data.workers", "data.max_bad_images",
                "data.source", "data.val")  # fmt: skip
        return json.dumps({name: value for name, value in self.recipe.to_dict().items() if name not in free})

    def _resume(self, store: CheckpointStore) -> None:
        path = store.newest()
        if path is None:
            return
        shared, own, same_processes = store.load(path)
        before, now = json.loads(shared["recipe"]), json.loads(self._identity())
        changed = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in sorted({*before, *now})
                   if before.get(name) != now.get(name)]  # fmt: skip
        if changed:
            raise ValueError(
                f"{store.folder} holds a run with another recipe ({'; '.join(changed)}); continue it with its own, or "
                "choose another output folder"
            )
        if (path / "sharded").exists() != self.parallel.sharded:
            raise ValueError(f"{path} was written with FSDP or without, the other way round; run.parallel must agree")
        if self.parallel.sharded:
            from torch.distributed.checkpoint.state_dict import set_state_dict

            tensors = self._tensors()
            load_sharded(path / "sharded", tensors)
            set_state_dict(
                self.task.model,
                self.optimizer,
                model_state_dict=tensors["model"],
                optim_state_dict=tensors["optimizer"],
            )
        else:
            self.task.model.load_state_dict(shared["model"])
            self.optimizer.load_state_dict(shared["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(shared["ema"])
        self.scaler.load_state_dict(shared["scaler"])
        self.step = shared["step"]
        if same_processes:
            set_rng_state(own["rng"])
        else:  # other samples are each process's: draws begin anew
            _logger.warning("%s is of another number of processes; what is drawn for drop path is not the same", path)
            seed_everything(self.recipe.run.seed + self.world.rank + 1_000_003 * self.step)
        self.loader.load_state_dict(own["loader"])

    def _export(self, output: Path) -> None:
        """The trained weights, for `eva02.load_checkpoint`: model.safetensors, and model_ema.safetensors."""
        models = {"model": self.task.model} | ({} if self.ema is None else {"model_ema": self.ema.module})
        for name, model in models.items():
            state = self.parallel.full_state(model)
            if self.world.is_main:
                save_checkpoint(model, output / f"{name}.safetensors", state=state)
        self.world.barrier()
