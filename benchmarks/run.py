"""``python -m benchmarks.run``: operators, models, training steps and memory against what users have today."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import benchmarks.ops  # noqa: F401 - registers the operators' peers
from benchmarks.base import run_base
from benchmarks.plots import plot
from benchmarks.pretrain import run_pretrain
from benchmarks.suites import Rows, run_memory, run_models
from eva02_kernels.bench import cli, report
from eva02_kernels.bench.ops import run_ops
from eva02_kernels.bench.providers import provider_names

RUNNERS: dict[str, Callable[..., Rows]] = {
    "ops": run_ops,
    "model": run_models,
    "train": run_models,
    "pretrain": run_pretrain,
    "memory": run_memory,
}
DEFAULT_MODELS = {
    "ops": ("tiny", "small", "base", "large", "host"),
    "model": ("tiny", "small", "base", "large", "host"),
    "train": ("tiny", "small", "base", "large", "host"),
    "pretrain": ("tiny", "small"),
    "memory": ("tiny", "small", "base", "large"),
}

DESCRIPTION = """\
Suites:
  ops     each operator against timm's expression of it (with SDPA), compiled and not, and against installed peers
  model   forward of EVA-02 at 224 pixels: batch 8 (tiny, small), 4 (base), 2 (large)
  train   forward, backward and AdamW step of the same models
  pretrain  steps of masked image modelling by the training loop, at batch 8 of the published recipes: JPEG files and a
          teacher's cached features are read by the same process, and the table shows the share of the time that takes
  memory  bytes kept for backward by block, model and operator: exact, the same on every machine with such a device

Examples:
  python -m benchmarks.run --suite model --models tiny small base --json out.json --plot out.png
  python -m benchmarks.run --suite ops --ops rope_attention subln_swiglu --models base --modes fwd+bwd
  python -m benchmarks.run --suite train --device cuda --dtype bfloat16 --json train-gpu.json
  python -m benchmarks.run --verify benchmarks/results/model.json --fail-if-regression
"""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=DESCRIPTION,
        epilog=cli.METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=list(RUNNERS), help="what to measure (not with --verify)")
    cli.add_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows into this PNG file")
    base = "build this commit in a throw-away worktree, run the same there first, and compare"
    parser.add_argument("--base", metavar="GIT_REF", help=base)
    return parser.parse_args(argv), parser


def main(argv: list[str] | None = None) -> int:
    args, parser = parse(argv)
    if args.list:
        for suite in [args.suite] if args.suite else RUNNERS:
            print(f"{suite}: {', '.join(provider_names(suite))}")
        return 0
    if args.fail_if_regression and not (args.verify or args.base):
        parser.error("--fail-if-regression compares: give --verify FILE or --base GIT_REF")
    against = None
    if args.verify:
        if args.suite:
            parser.error("--verify takes the suite and everything else from FILE")
        against, doc = cli.verify(args.verify, RUNNERS.__getitem__)
    else:
        if not args.suite:
            parser.error("--suite is needed: " + ", ".join(RUNNERS))
        try:
            config = cli.make_config(args, args.suite, DEFAULT_MODELS[args.suite])
        except ValueError as error:
            parser.error(str(error))
        if args.base:
            against = run_base(args.base, config)
        roofline = not args.no_roofline and args.suite != "memory"
        doc = cli.execute(config, RUNNERS[args.suite], roofline=roofline)
        if against is not None:
            report.print_comparison(against["rows"], doc["rows"], (args.base, "here"))
    if args.plot:
        plot([doc], args.plot)
        print(f"wrote {args.plot}")
    return cli.finish(doc, args, against)


if __name__ == "__main__":
    sys.exit(main())
