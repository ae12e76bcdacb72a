"""``python -m eva02_kernels.bench``: each operator against eager PyTorch and torch.compile, on this machine."""

from __future__ import annotations

import argparse
import sys

from eva02_kernels.bench import cli
from eva02_kernels.bench.ops import run_ops
from eva02_kernels.bench.providers import provider_names

DEFAULT_MODELS = ("tiny", "base", "host")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eva02_kernels.bench",
        description="Time every operator, forward and with backward, against the PyTorch expression that users write "
        "today and against torch.compile of it. Models and training steps: benchmarks.run in a clone.",
        epilog=cli.METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(provider_names("ops")))
        return 0
    if args.fail_if_regression and not args.verify:
        parser.error("--fail-if-regression compares with a file: give --verify FILE")
    if args.verify:
        recorded, now = cli.verify(args.verify, lambda suite: run_ops)
        return cli.finish(now, args, recorded)
    try:
        config = cli.make_config(args, "ops", DEFAULT_MODELS)
    except ValueError as error:
        parser.error(str(error))
    return cli.finish(cli.execute(config, run_ops, roofline=not args.no_roofline), args)


if __name__ == "__main__":
    sys.exit(main())
