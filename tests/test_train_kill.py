"""Runs that are killed at any moment, steps and checkpoint writes alike, go on as if nothing had been."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
import train_runs

from eva02.train.progress import read_log


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported everything and computed nothing: they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train_runs", "timm", "timm.optim", "timm.scheduler", "timm.data", "sklearn.datasets"]
    )
    return context


def start(context, task, changes):
    process = context.Process(target=train_runs.run_process, args=(task, changes))
    process.start()
    return process


def curve(folder) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder / "log.jsonl") if "lr" in line}


def kill(process) -> None:
    assert process.is_alive(), "the run is too short for so many kills"
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def work_and_kill(process, log, rng) -> float:
    """Kill within a few steps of the process's work, or within one; returns the seconds until it began to work."""
    begin, started, wanted, size = time.monotonic(), 0.0, rng.randint(1, 6), -1
    while process.is_alive() and wanted:
        now = log.stat().st_size if log.exists() else 0
        if now > size and size >= 0:
            started = started or time.monotonic() - begin
            wanted -= 1
        size = now
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.03))
    kill(process)
    return started


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.full)])
def test_killed_runs_go_on(kills, processes, tmp_path):
    """A checkpoint at every step, so that many kills meet one that is being written."""
    rng = random.Random(kills)
    changes = {"schedule__steps": 16 * kills, "run__checkpoint_every": 1, "run__ema_decay": 0.9}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    startup = 0.0
    for moment in range(kills):
        process = start(processes, "pretrain", {**changes, "run__output": str(broken)})
        if moment % 3 == 2:  # while it starts, or reads its checkpoint
            time.sleep(rng.uniform(0.0, startup))
            kill(process)
        else:
            startup = work_and_kill(process, broken / "log.jsonl", rng)
    for folder in (whole, broken):
        process = start(processes, "pretrain", {**changes, "run__output": str(folder)})
        process.join(timeout=400)
        assert process.exitcode == 0
    assert sorted(curve(whole)) == list(range(1, 16 * kills + 1))
    assert curve(broken) == curve(whole)
    train_runs.assert_same_weights(broken, whole)
    assert not [path.name for path in (broken / "checkpoints").iterdir() if path.name.startswith(".")]
