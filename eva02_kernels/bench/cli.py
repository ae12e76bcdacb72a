"""Command line shared by ``python -m eva02_kernels.bench`` and ``python -m benchmarks.run``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from eva02_kernels._registry import OP_NAMES
from eva02_kernels.bench import report
from eva02_kernels.bench.machine import DEVICES, Roofline, check_device, roofline_of, warm_up_process
from eva02_kernels.bench.measure import fresh_compiler
from eva02_kernels.bench.ops import MODES
from eva02_kernels.bench.providers import provider_names, providers
from eva02_kernels.bench.rows import Config
from eva02_kernels.bench.shapes import SHAPES, shape_named

Runner = Callable[[Config, Roofline | None, Callable[[str], None]], Iterable[list[dict[str, Any]]]]

METHOD = """\
How it is measured: every arm sees the same inputs, in one process. Each arm passes a gate first (outputs and gradients
against the baseline in float64; our operators also run their contract checks); a red gate prints no time. All arms are
warm before any is timed. A round runs every arm once, in random order, with the garbage collector off; ratios are
medians of the ratios within a round. The baseline runs twice (arm ".../again"): a ratio inside that spread is no
result and is marked with ~. malloc keeps freed memory for the next tensor (mallopt), as tcmalloc and jemalloc do: page
faults would cost every arm more than a small kernel does. First call includes compilation with an empty compiler
cache. Peak memory is the growth of the process; saved bytes are the distinct storages kept for backward, parameters
excluded. Roofline: multiply-add rate and copy bandwidth, sampled between the rounds; the best sample is the ceiling.
With --device cuda: the same random inputs, moved to the GPU. A sample begins and ends with the GPU idle and waits
nowhere between, so that its calls queue up: ms is the longer of the GPU's time and the host's. host ms is the time
until one call returns, from an idle GPU: what launching costs. Peak memory is the growth of PyTorch's allocations on
the GPU. Roofline: rate of a large torch.matmul in the run's dtype (by torch's TF32 switch) and copy bandwidth on the
GPU, neither of them the hardware's peak. Tensors that stay in the GPU's cache move faster than that copy: shares above
100 % are possible.
"""


def names(text: str) -> list[str]:
    return [part for part in text.replace(",", " ").split() if part]


def flat(values: Sequence[list[str]] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in values or () for name in group))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes = ", ".join(s.name for s in SHAPES.values())
    parser.add_argument(
        "--models",
        nargs="+",
        type=names,
        metavar="MODEL",
        help=f"any of {shapes} (or eva02_tiny_patch14_224 ...); host: five tokens, tells host time",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        type=names,
        metavar="ARM",
        help="arms to measure (default: all; the baseline and its second run always stay)",
    )
    parser.add_argument(
        "--ops",
        nargs="+",
        type=names,
        metavar="OP",
        help=f"operators of the ops and memory suites (default: all): {', '.join(OP_NAMES)}",
    )
    parser.add_argument("--modes", nargs="+", type=names, metavar="MODE", help=f"ops suite: {' and '.join(MODES)}")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of activations and weights (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", choices=DEVICES, help="where everything is and runs (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each arm (default: %(default)s)")
    parser.add_argument(
        "--min-sample-ms",
        type=float,
        default=10.0,
        help="a sample repeats its call until it lasts this long (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of arms in a round (default: %(default)s)")
    parser.add_argument("--no-roofline", action="store_true", help="do not measure the machine's ceilings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument(
        "--verify", type=Path, metavar="FILE", help="run FILE's configuration again and print both runs side by side"
    )
    parser.add_argument(
        "--fail-if-regression", action="store_true", help="with --verify: exit 1 where an arm of ours fell behind FILE"
    )
    parser.add_argument("--list", action="store_true", help="list the suite's arms and stop")  # fmt: skip


def make_config(args: argparse.Namespace, suite: str, default_models: Sequence[str]) -> Config:
    config = Config(
        suite=suite,
        models=tuple(shape_named(name).name for name in flat(args.models) or default_models),
        providers=flat(args.providers),
        ops=flat(args.ops),
        modes=flat(args.modes),
        dtype=args.dtype,
        threads=args.threads,
        rounds=args.rounds,
        min_sample_ms=args.min_sample_ms,
        seed=args.seed,
        device=args.device,
    )
    check_device(config.device)
    for what, given, known in (
        ("arm", config.providers, provider_names(suite)),
        ("operator", config.ops, OP_NAMES),
        ("mode", config.modes, MODES),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"no {what} {', '.join(unknown)} in suite {suite}; expected {', '.join(known)}")
    if config.rounds < 1 or config.threads < 1:
        raise ValueError("--rounds and --threads must be at least 1")
    return config


def progress_line(text: str) -> None:
    print(f"... {text}", flush=True)


def execute(config: Config, runner: Runner, *, roofline: bool = True) -> dict[str, Any]:
    """Run a suite, printing each case as it is done; returns the file's content."""
    torch.set_num_threads(config.threads)
    warm_up_process(config.device)
    ceiling = roofline_of(config.device, config.torch_dtype()) if roofline else None
    if ceiling is not None:
        ceiling.sample()
        ceiling.samples = {name: [] for name in ceiling.samples}  # the first touches fresh pages
        for _ in range(3):
            ceiling.sample()
    rows: list[dict[str, Any]] = []
    # On a GPU our own operators are compiled at their first call too.
    compiles = config.device != "cpu" or any(p.compiled for p in providers(config.suite, names=list(config.providers)))
    with fresh_compiler(config.device) if compiles else contextlib.nullcontext():
        for case in runner(config, ceiling, progress_line):
            report.print_rows(case)
            rows += case
    doc = report.document(config, rows, ceiling)
    report.print_environment(doc["environment"], doc["roofline"])
    return doc


def verify(path: Path, runner_of: Callable[[str], Runner]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a file's configuration again; returns (the file, this run)."""
    recorded = report.read_json(path)
    config = Config.from_record(recorded["config"])
    try:
        check_device(config.device)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from error
    now = execute(config, runner_of(config.suite), roofline=recorded["roofline"] is not None)
    old_env, new_env = recorded["environment"], now["environment"]
    report.print_comparison(recorded["rows"], now["rows"])
    for name in ("cpu", "gpu", "isa", "torch_isa", "threads", "versions", "commit"):
        old, new = old_env.get(name), new_env[name]  # files from before there was a device have no "gpu"
        if old != new:
            print(f"{name}: recorded {old}, now {new}")
    return recorded, now


def finish(doc: dict[str, Any], args: argparse.Namespace, against: dict[str, Any] | None = None) -> int:
    """Write files and decide the exit status."""
    if args.json:
        report.write_json(args.json, doc)
        print(f"wrote {args.json}")
    if args.fail_if_regression and against is not None:
        worse = report.regressions(against["rows"], doc["rows"])
        for line in worse:
            print(f"regression: {line}")
        if worse:
            return 1
    return 0
