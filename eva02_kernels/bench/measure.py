"""How times and bytes are taken: every arm in one process, in random order in every round."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eva02_kernels._native import empty_cache
from eva02_kernels.ops._common import padded

Call = Callable[[], Any]
Synchronise = Callable[[], None]

MIN_SAMPLE_S = 0.01
"""A sample repeats its call until it lasts this long; the clock's and the loop's own cost vanish in it."""


def nothing_queued() -> None:
    """Synchronises the CPU: a call is done when it returns."""


def synchroniser(device: str) -> Synchronise:
    """What waits until ``device`` has done all that was queued."""
    return torch.cuda.synchronize if device == "cuda" else nothing_queued


class Spread(NamedTuple):
    """Median with the 20th and the 80th percentile."""

    median: float
    p20: float
    p80: float

    def scaled(self, factor: float) -> Spread:
        return Spread(*(v * factor for v in self))


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), cuts[0], cuts[-1])


def paired_ratio(baseline: Sequence[float], arm: Sequence[float]) -> Spread:
    """How much faster the arm is than the baseline, from the ratio of their times in each round.

    Both saw the load of the same moment, so the ratio is steadier than the quotient of two medians.
    """
    return spread([b / a for b, a in zip(baseline, arm, strict=True)])


@contextlib.contextmanager
def fresh_compiler(device: str = "cpu") -> Iterator[None]:
    """Empty caches of Inductor and Triton inside, so that a first call compiles as a user's first call does.

    What a machine pays once and for all (the compiler's check, precompiled headers) is paid here, by no arm.
    """
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        with contextlib.suppress(Exception):  # no C++ compiler: each compiled arm says so itself
            torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
        torch._dynamo.reset()
        yield


def first_call(call: Call, synchronise: Synchronise = nothing_queued) -> float:
    """Seconds of the first call, compilation and what it queued included."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """The garbage collector runs before, not inside."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    min_sample_s: float = MIN_SAMPLE_S,
    warmup: int = 2,
    seed: int = 0,
    on_round: Callable[[int], None] | None = None,
    synchronise: Synchronise = nothing_queued,
) -> dict[str, list[float]]:
    """Seconds per call of every arm, one value a round.

    All arms are warm before any is timed. Each round runs every arm once, in random order, so that drift, load and
    caches left behind by the previous arm fall on all of them alike. A sample begins and ends with nothing queued, and
    waits nowhere between: calls on a GPU follow each other as they do in a user's loop.
    """
    repeats = {}
    for name, call in calls.items():
        fastest = min(first_call(call, synchronise) for _ in range(max(1, warmup)))
        repeats[name] = max(1, min(100_000, math.ceil(min_sample_s / max(fastest, 1e-9))))
    shuffle = random.Random(seed).shuffle
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with no_collection():
        for i in range(rounds):
            shuffle(names)
            for name in names:
                call, count = calls[name], range(repeats[name])
                synchronise()
                start = time.perf_counter()
                for _ in count:
                    call()
                synchronise()
                seconds[name].append((time.perf_counter() - start) / len(count))
            gc.collect()  # between rounds, so that cycles left by an arm do not grow without end
            if on_round is not None:
                on_round(i)
    return seconds


def host_times(call: Call, count: int, synchronise: Synchronise) -> list[float]:
    """Seconds until each of ``count`` calls returns, from an idle device; it waits only where the launch queue is full.

    What launching costs the host: a call whose device time is less than this is not helped by a faster kernel.
    """
    seconds = []
    with no_collection():
        for _ in range(count):
            synchronise()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        synchronise()
    return seconds


# ---- memory ---------------------------------------------------------------------------------------------------------
def _status(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(match[1]) * 1024


def peak_memory(call: Call, device: str = "cpu") -> int | None:
    """Bytes that the process grows by at most while ``call`` runs; None where the system does not tell (not Linux).

    The resident high-water mark: the kernels' own workspaces count as well as tensors do. On a GPU what PyTorch's
    allocator hands out there: neither its cache nor what libraries take beside it.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated
    try:
        # Give freed memory back, or it would be reused unseen.
        empty_cache()
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


class Saved(NamedTuple):
    """Storages kept for backward: their bytes, and how many elements each holds."""

    bytes: int
    elements: tuple[int, ...]


def saved_for_backward(forward: Call, exclude: Iterable[Tensor] = ()) -> Saved:
    """What one forward keeps for backward, by distinct storage; storages of ``exclude`` (parameters) do not count.

    A view counts with the whole storage it keeps alive. Exact, and the same on every machine; on GPUs as far as PyTorch
    chooses the same attention for them.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, tuple[int, int]] = {}
    alive = []  # a storage freed and allocated again would be counted once

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            storages[storage.data_ptr()] = (storage.nbytes(), storage.nbytes() // t.element_size())
            alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return Saved(sum(b for b, _ in storages.values()), tuple(n for _, n in storages.values()))


class Units(NamedTuple):
    """Saved elements as multiples of T = B*N*C and G = B*N*F; ``rest`` are elements of neither size."""

    t: int
    g: int
    rest: int


def in_units(elements: Sequence[int], tokens: int, width: int, hidden: int) -> Units:
    """Count storages of whole multiples of T and G; a row padded to a multiple of 8 elements counts as G."""
    t = g = rest = 0
    for n in elements:
        if n % (tokens * width) == 0:
            t += n // (tokens * width)
        elif n % (tokens * hidden) == 0:
            g += n // (tokens * hidden)
        elif n % (tokens * padded(hidden)) == 0:
            g += n // (tokens * padded(hidden))
        else:
            rest += n
    return Units(t, g, rest)
