"""What a run shows and writes down: a bar, TensorBoard, JSON lines; where its time goes; work and peak for MFU."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eva02.clip.config import TextConfig
from eva02.config import ModelConfig
from eva02.files import atomic_file

SECTIONS = ("data", "teacher", "student")


def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of one image's forward: two for each multiply-add of its matrix products.

    In pre-training the last block's rows and the head's are EVA-02's share of masked patches, 105 of 256.
    """
    rows, columns = config.grid
    patches, dim, depth = rows * columns, config.embed_dim, config.depth
    tokens = patches + 1
    attention = 3 * dim**2 + 2 * tokens * dim
    after = dim**2 + (3 if config.swiglu_mlp else 2) * dim * config.hidden_features
    patch = patches * config.in_chans * config.patch_hw[0] * config.patch_hw[1] * dim
    if config.head == "mim":
        masked = patches * 105 // 256
        read, head = tokens * (depth - 1) + masked, masked * dim * config.mim_dim
    else:
        read, head = tokens * depth, dim * config.num_classes
    return 2 * (depth * tokens * attention + read * after + patch + head)


def text_flops(config: TextConfig) -> int:
    """The same of one text."""
    tokens, width, hidden = config.context_length, config.width, config.hidden_features
    return 2 * config.depth * tokens * (4 * width**2 + 2 * tokens * width + 2 * width * hidden)


def measured_peak(device: torch.device, precision: str) -> tuple[float, str] | None:
    """FLOP/s that this machine reached just now, and in what; None where it cannot be measured."""
    from eva02_kernels.bench.machine import CpuRoofline, GpuRoofline, Roofline

    roofline: Roofline
    if device.type == "cuda":
        dtype = getattr(torch, precision)
        roofline = GpuRoofline(dtype, device=str(device))
        against = roofline.gemm
    elif device.type == "cpu":
        roofline = CpuRoofline(copy_bytes=1 << 20)
        against = f"float32 multiply-adds in registers on {torch.get_num_threads()} threads"
    else:
        return None
    for _ in range(3):
        roofline.sample()
    peaks = roofline.peaks()
    rate = peaks.get("gemm_gflops") or peaks.get("fma_gflops")
    return (rate * 1e9, against) if rate else None


class Clock:
    """Seconds spent in sections since the last `take`. On a GPU the sections are timed by events on its stream, which
    nobody waits for before `take`; "data" is the host's wait for a batch on any device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._start = time.perf_counter()
        self._within: list[float] = []

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time inside; that of a section within it counts for the inner one alone."""
        if self.on_gpu and name != "data":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        start = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[name] += spent - self._within.pop()
            if self._within:
                self._within[-1] += spent

    def take(self) -> tuple[float, dict[str, float]]:
        """Wall-clock seconds, and the share of each section. Call it when the device has been waited for."""
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        if self.on_gpu:  # the teacher's events lie within the student's
            self._seconds["student"] = max(0.0, self._seconds["student"] - self._seconds["teacher"])
        now = time.perf_counter()
        wall = now - self._start
        shares = {name: round(seconds / wall, 4) for name, seconds in self._seconds.items()}
        self.restart()
        return wall, shares

    def restart(self) -> None:
        """Forget what was measured: an evaluation or a checkpoint is no training time."""
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._events = []


class JsonLog:
    """One JSON object a line, appended. Lines past `step` are removed at the start, and one that a crash cut off."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in read_log(path) if line.get("step", 0) <= step]
            with atomic_file(path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        self.file.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; a last one that was cut off is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Reporter:
    """Bar on a terminal, plain lines elsewhere; TensorBoard and `log.jsonl` in the run's folder.

    Made by the first process alone. `step` is the one that the run continues from.
    """

    def __init__(self, output: Path | None, total: int, step: int, tensorboard: bool) -> None:
        self.total = total
        self.log = None if output is None else JsonLog(output / "log.jsonl", step)
        self.board = None
        if tensorboard and output is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self._bar_task = self.bar.add_task("", total=total, completed=step)

    def note(self, **values: Any) -> None:
        """A line of the log that belongs to no step: start, evaluation, checkpoint."""
        if self.log is not None:
            self.log.write(values)
            self.log.flush()

    def steps(self, lines: list[dict[str, Any]]) -> None:
        """What was read of each step."""
        for line in lines:
            if self.log is not None:
                self.log.write(line)
            if self.board is not None:
                for name, value in line.items():
                    if name != "step" and value is not None:
                        self.board.add_scalar(name, value, line["step"])

    def window(self, step: int, loss: float, values: dict[str, Any]) -> None:
        """Speed and shares of the steps since the last call."""
        self.note(kind="window", step=step, **values)
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"speed/{name}", value, step)
        parts = [f"loss {loss:.4f}", f"{values['images_per_s']:.4g} img/s"]
        if values.get("mfu") is not None:
            parts.append(f"MFU {100 * values['mfu']:.0f} %")
        parts += [f"{name} {100 * share:.0f} %" for name, share in values["shares"].items() if share]
        self.say(step, ", ".join(parts))

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.note(kind="evaluation", step=step, **values)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"val/{name}", value, step)
        self.print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def say(self, step: int, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self._bar_task, completed=step, description=text)
        else:
            self.print(f"step {step}/{self.total}: {text}")

    def print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.board is not None:
            self.board.close()
        if self.log is not None:
            self.log.file.close()


def mfu(flops: float | None, seconds: float, peak: tuple[float, str] | None) -> float | None:
    """Share of the peak that a rate of model FLOPs is; recomputed work does not count."""
    if flops is None or peak is None or not math.isfinite(seconds) or seconds <= 0:
        return None
    return round(flops / seconds / peak[0], 4)
