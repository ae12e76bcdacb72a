"""Batches for training, the same whatever the workers and processes, from any position on."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from eva02.data.sources import Source
from eva02.data.transforms import Sample

Transform = Callable[[Any, Any, np.random.Generator], Sample]
Collate = Callable[[Sequence[Sample], np.random.Generator], Sample]
_BAD = "_bad"
_SAMPLE, _BATCH, _ORDER = 0, 1, 2  # last number of a generator's seed: three streams that never coincide
_TRIES = 1000  # other images in place of a bad one
_logger = logging.getLogger(__name__)


class BadImages(ValueError):
    """More images than allowed could not be read. `bad` maps their names to their errors."""

    def __init__(self, bad: dict[str, str], limit: int) -> None:
        self.bad = dict(bad)
        listing = "".join(f"\n  - {name}: {error}" for name, error in bad.items())
        super().__init__(f"{len(bad)} images could not be read, {limit} are allowed (max_bad_images):{listing}")


class TrainLoader:
    """Batches without end, epoch after epoch; each is a dict of tensors with (B_local, ...) first.

    Every epoch is a fresh permutation; samples past the last whole batch are left out. What is drawn for a sample
    depends on (seed, epoch, index) alone, and no global generator moves. An image that cannot be read is logged, and
    another one, drawn from the same generator, takes its place.

    Args:
        source: the samples. One that has `at(epoch)`, which gives a source, may differ from epoch to epoch.
        transform: called as transform(image, target, rng), gives a dict of tensors; "index" is added to it.
        batch_size: of all processes together. Rank r takes the r-th contiguous part of each batch, so that a batch
            holds the same samples for any `world_size`, which has to divide it.
        seed: of the order and of everything that is drawn.
        rank, world_size: this process, and how many there are.
        num_workers: loader processes, 0 to load in this one.
        max_bad_images: unreadable images, by name, that a process skips before it raises `BadImages`.
        collate: called as collate(samples, rng) instead of PyTorch's `default_collate`.
        prefetch: batches that each worker loads ahead.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_bad_images: int = 100,
        collate: Collate | None = None,
        prefetch: int = 2,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of world_size {world_size}, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        if len(source) < batch_size:
            raise ValueError(f"batch_size {batch_size} is larger than the data set of {len(source)} samples")
        self.source, self.transform, self.collate = source, transform, collate
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.num_workers, self.prefetch, self.max_bad_images = num_workers, prefetch, max_bad_images
        self.bad: dict[str, str] = {}
        """Name -> error of the images that were skipped so far."""
        self._epoch = self._batch = 0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.source) // self.batch_size

    def __iter__(self) -> Iterator[Sample]:
        """Batches from the current position on, without end. `state_dict` counts a batch once it was handed out."""
        loader = DataLoader(
            _Samples(self.source, self.transform, self.seed, self.max_bad_images),
            batch_sampler=_Order(self),
            num_workers=self.num_workers,
            collate_fn=_Collate(self.collate, self.seed),
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # else it draws from the global one
        )
        for batch in loader:
            self._note_bad(batch.pop(_BAD), give_up=not batch)
            self._batch += 1
            if self._batch == self.steps_per_epoch:
                self._epoch, self._batch = self._epoch + 1, 0
            yield batch

    def _note_bad(self, bad: dict[str, str], give_up: bool) -> None:
        for name, error in bad.items():
            if name not in self.bad:
                self.bad[name] = error
                _logger.warning("skipped %s: %s", name, error)
        if give_up or len(self.bad) > self.max_bad_images:
            raise BadImages(self.bad, self.max_bad_images)

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch to be handed out; batches that workers loaded ahead do not count."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples": len(self.source),
            "bad": dict(self.bad),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, at the next `iter()`.

        Raises:
            ValueError: the position belongs to another seed, batch size or data set.
        """
        mine = self.state_dict()
        wrong = [
            f"{key} was {state[key]}, is {mine[key]}"
            for key in ("seed", "batch_size", "samples")
            if state[key] != mine[key]
        ]
        if wrong:
            raise ValueError(f"the loader's position belongs to other data: {'; '.join(wrong)}")
        self._epoch, self._batch, self.bad = state["epoch"], state["batch"], dict(state["bad"])


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of everything that is drawn for a sample in an epoch."""
    return np.random.default_rng((seed, epoch, index, _SAMPLE))


def _leave_signals_to_the_run(worker: int) -> None:
    """A scheduler sends SIGTERM to all processes of a job; the run needs its loader to finish the step and to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Order(Sampler[list[tuple[int, int]]]):
    """This rank's (epoch, index) pairs of each batch, from the loader's position on."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        loader = self.loader
        epoch, batch = loader._epoch, loader._batch
        local = loader.batch_size // loader.world_size
        while True:
            order = np.random.default_rng((loader.seed, epoch, 0, _ORDER)).permutation(len(loader.source))
            while batch < loader.steps_per_epoch:
                start = batch * loader.batch_size + loader.rank * local
                yield [(epoch, int(index)) for index in order[start : start + local]]
                batch += 1
            epoch, batch = epoch + 1, 0


Item = tuple[tuple[int, int], Sample | None, dict[str, str]]
"""Epoch and index, the sample (None: too many are bad), and names and errors of the bad images on the way to it."""


class _Samples(Dataset[Any]):
    def __init__(self, source: Source, transform: Transform, seed: int, max_bad_images: int) -> None:
        self.source, self.transform, self.seed, self.max_bad_images = source, transform, seed, max_bad_images

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        rng = sample_rng(self.seed, epoch, index)
        source = self.source.at(epoch) if hasattr(self.source, "at") else self.source
        bad: dict[str, str] = {}
        for _ in range(_TRIES):
            try:
                image, target = source[index]
            except Exception as error:  # a damaged file can raise anything in a decoder
                bad[source.name(index)] = f"{type(error).__name__}: {error}"
                if len(bad) > self.max_bad_images:
                    break
                index = int(rng.integers(len(source)))
            else:
                return key, {**self.transform(image, target, rng), "index": torch.tensor(index)}, bad
        return key, None, bad


class _Collate:
    def __init__(self, collate: Collate | None, seed: int) -> None:
        self.collate, self.seed = collate, seed

    def __call__(self, items: Sequence[Item]) -> Sample:
        samples = [sample for _, sample, _ in items if sample is not None]
        batch: Sample = {}
        if len(samples) < len(items):
            pass  # too many are bad, which the loader says in its own process
        elif self.collate is None:
            batch = default_collate(samples)
        else:
            batch = self.collate(samples, np.random.default_rng((self.seed, *items[0][0], _BATCH)))
        batch[_BAD] = {name: error for _, _, bad in items for name, error in bad.items()}
        return batch


def eval_loader(
    source: Source,
    transform: Transform,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    collate: Callable[[Sequence[Sample]], Sample] | None = None,
) -> DataLoader[Any]:
    """Every sample once and in order, in batches of `batch_size` of this process; the last may be smaller.

    Rank r takes samples r, r + world_size, ...; the parts differ by one sample at most, and none is repeated. An image
    that cannot be read is an error that names it. `collate` makes a batch of samples instead of PyTorch's.
    """
    return DataLoader(
        _InOrder(source, transform, range(rank, len(source), world_size)),
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )


class _InOrder(Dataset[Sample]):
    def __init__(self, source: Source, transform: Transform, indices: range) -> None:
        self.source, self.transform, self.indices = source, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        index = self.indices[position]
        try:
            image, target = self.source[index]
            sample = self.transform(image, target, np.random.default_rng((0, 0, index)))
        except Exception as error:
            raise ValueError(f"{self.source.name(index)}: {type(error).__name__}: {error}") from error
        return {**sample, "index": torch.tensor(index)}
