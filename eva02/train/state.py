"""Checkpoints of a run: whole or not there, verified before they are used, several kept.

    <folder>/step-00001200/state.pt        what all processes share: model, optimiser, average, loss scale
                           sharded/        instead of these, with FSDP: torch.distributed.checkpoint
                           rank-0.pt       a process's own: random generators, position in the data
                           manifest.json   size and SHA-256 of each file

A checkpoint is written beside its place and renamed into it, so a crash or a full disk at any moment leaves the earlier
ones as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from eva02.train.distributed import World

_logger = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_HIDDEN = ".unfinished-"

State = dict[str, Any]


class DamagedCheckpoints(ValueError):
    """There are checkpoints, and none of them is whole."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: made when it is missing.
        keep: newest checkpoints that stay after a save.
        world: the run's processes, all of which call `save` and `load` together.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(_HIDDEN + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
        world.barrier()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first; it may be damaged."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, shared: State, own: State, sharded: Callable[[Path], None] | None = None) -> Path:
        """Write the checkpoint of a step, then remove those that are older than the newest `keep`.

        Args:
            shared: what the first process writes for all.
            own: what each process writes for itself.
            sharded: called by all processes with a folder to write into.

        Raises:
            OSError: it could not be written; the earlier ones are as they were.
        """
        final = self.folder / _name(step)
        hidden = self.folder / (_HIDDEN + _name(step))
        written: dict[str, list[Any]] = {}
        problem = None
        try:
            if self.world.is_main:
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir()
        except OSError as error:
            problem = str(error)
        self._agree(problem, hidden)
        try:
            name = f"rank-{self.world.rank}.pt"
            written[name] = _write(hidden / name, own)
            if self.world.is_main:
                written["state.pt"] = _write(hidden / "state.pt", shared)
        except OSError as error:
            problem = str(error)
        self._agree(problem, hidden)
        if sharded is not None:
            try:
                sharded(hidden / "sharded")
            except OSError as error:
                problem = str(error)
            self._agree(problem, hidden)
        parts = self.world.gather(written)
        if self.world.is_main:
            try:
                files = {name: entry for part in parts for name, entry in part.items()}
                files |= {str(path.relative_to(hidden)): _digest_file(path) for path in _files(hidden / "sharded")}
                _finish(hidden, final, {"step": step, "world_size": self.world.size, "files": files})
            except OSError as error:
                problem = str(error)
        self._agree(problem, hidden)
        if self.world.is_main:
            self._prune()
        return final

    def _agree(self, problem: str | None, hidden: Path) -> None:
        """OSError on all processes if any of them has a problem."""
        problems = [text for text in self.world.gather(problem) if text]
        if problems:
            if self.world.is_main:
                shutil.rmtree(hidden, ignore_errors=True)
            raise OSError(f"checkpoint {hidden.name.removeprefix(_HIDDEN)} could not be written: {problems[0]}")

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            # Renamed first: what is half removed must not look like a checkpoint.
            doomed = self.folder / (_HIDDEN + "old-" + _name(step))
            try:
                os.rename(self.folder / _name(step), doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                _logger.warning("old checkpoint %s stays: %s", _name(step), error)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; one that is damaged is reported and passed over.

        Raises:
            DamagedCheckpoints: all are.
        """
        chosen: str | None = None
        reports: list[str] = []
        if self.world.is_main:
            for step in reversed(self.steps()):
                problem = damage(self.folder / _name(step))
                if problem is None:
                    chosen = _name(step)
                    break
                reports.append(f"{_name(step)}: {problem}")
        chosen, reports = self.world.share((chosen, reports))
        if chosen is None and reports:
            raise DamagedCheckpoints(f"no checkpoint in {self.folder} is whole: {'; '.join(reports)}")
        if self.world.is_main:
            for report in reports:
                _logger.warning("damaged checkpoint passed over: %s; continuing from %s", report, chosen)
        return None if chosen is None else self.folder / chosen

    def load(self, path: Path) -> tuple[State, State, bool]:
        """What all share; this process's own, or the first's where the run had fewer processes; whether the run had as
        many as now."""
        own = path / f"rank-{self.world.rank}.pt"
        same = json.loads((path / _MANIFEST).read_text())["world_size"] == self.world.size
        return _read(path / "state.pt"), _read(own if own.exists() else path / "rank-0.pt"), same


def _name(step: int) -> str:
    return f"step-{step:08d}"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, (size, digest) in manifest["files"].items():
            found_size, found = _digest_file(path / name)
            if found_size != size:
                return f"{name} has {found_size} bytes, {size} were written"
            if found != digest:
                return f"{name} is not what was written (its checksum differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be used: {error}"
    return None


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        try:
            return self.file.write(view)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(path: Path, state: State) -> list[Any]:
    """Write and sync; returns [size, SHA-256]."""
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(state, hashed)  # type: ignore[arg-type]
        except RuntimeError:  # what torch makes of any error of the file
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return [hashed.size, hashed.digest.hexdigest()]


def _read(path: Path) -> State:
    return torch.load(path, map_location="cpu", weights_only=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _digest_file(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest_of(file)
        return [os.fstat(file.fileno()).st_size, digest.hexdigest()]


def _digest_of(file: IO[bytes]) -> Any:
    """hashlib.file_digest, which Python 3.10 does not have."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _finish(hidden: Path, final: Path, manifest: dict[str, Any]) -> None:
    with open(hidden / _MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in _files(hidden / "sharded"):
        _sync(path)
    for folder in [*(path for path in hidden.rglob("*") if path.is_dir()), hidden]:
        _sync(folder)
    if final.exists():  # a damaged one that was passed over
        shutil.rmtree(final)
    os.rename(hidden, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- random generators -----------------------------------------------------------------------------------------------
def rng_state() -> State:
    """Of Python, NumPy, PyTorch's CPU and this process's GPU."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state())
    state: State = {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: State) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Of this process; ranks take different seeds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
