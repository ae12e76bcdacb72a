"""``--base GIT_REF``: the same benchmark on another commit, built in a throw-away worktree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from eva02_kernels.bench.machine import ROOT
from eva02_kernels.bench.report import read_json
from eva02_kernels.bench.rows import Config


def build_library(tree: Path) -> None:
    """Compile the CPU library of ``tree`` and put it where its package looks for it."""
    build = tree / "build" / "base"
    torch_dir = Path(torch.__file__).parent
    subprocess.run(
        ["cmake", "-S", tree, "-B", build, "-G", "Ninja", f"-DEVA02_TORCH_DIR={torch_dir}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(["ninja", "-C", build], check=True, stdout=subprocess.DEVNULL)
    target = tree / "eva02_kernels" / "lib"
    target.mkdir(exist_ok=True)
    shutil.copy(build / "libeva02_kernels_cpu.so", target)


def command(config: Config, out: Path) -> list[str]:
    arguments = [sys.executable, "-m", "benchmarks.run", "--suite", config.suite, "--json", str(out)]
    for name in ("models", "providers", "ops", "modes"):
        values = getattr(config, name)
        if values:
            arguments += [f"--{name}", *values]
    for name in ("dtype", "threads", "rounds", "min_sample_ms", "seed"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    if config.device != "cpu":  # older commits know no other and have no such option
        arguments += ["--device", config.device]
    return arguments


def run_base(ref: str, config: Config) -> dict[str, Any]:
    """Rows of ``config`` on commit ``ref``. Ratios to the baseline compare; times of two processes less so."""
    with tempfile.TemporaryDirectory(prefix="eva02_base_") as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "base.json"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", "--quiet", tree, ref], check=True)
        try:
            if not (tree / "benchmarks" / "run.py").exists():
                raise SystemExit(f"--base {ref}: that commit has no benchmarks.run")
            print(f"... building {ref}", flush=True)
            build_library(tree)
            # The worktree's packages, not an installed or a neighbouring copy.
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            subprocess.run(command(config, out), cwd=tree, env=environment, check=True)
            return read_json(out)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=False)
