"""``python -m benchmarks.launch``: what a call of each Triton operator costs the host, without a GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eva02_kernels._registry import OP_NAMES
from eva02_kernels.bench.cases import Problem, as_tuple, make_problem
from eva02_kernels.bench.machine import environment
from eva02_kernels.bench.measure import interleave, paired_ratio, spread
from eva02_kernels.bench.ops import output_gradients
from eva02_kernels.bench.providers import Unsupported
from eva02_kernels.bench.report import print_table, write_json
from eva02_kernels.bench.shapes import SHAPES
from eva02_kernels.testing.offline import compiling

DESCRIPTION = """\
Host time of a call of every operator on Triton, forward and with backward, beside timm's eager expression of it.

Both get five tokens on the CPU. Ours goes the whole way that a call on a GPU goes, down to the driver: kernels are
compiled for compute capability 8.0 and handed to a driver that does nothing. Eager computes its five tokens. Neither
includes the driver's own time for a launch, a few microseconds for each kernel: the number of launches is beside the
times. For eager it is the number of operators that are not views; one of them may be several kernels.
"""


class CountOperators(TorchDispatchMode):
    """Counts the operators that compute, which on a GPU are at least one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        makes_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not makes_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach"))
        return func(*args, **(kwargs or {}))


def _calls(problem: Problem, backward: bool) -> dict[str, Callable[[], Any]]:
    tensors, leaves = problem.tensors, problem.leaves
    grads = output_gradients(problem)
    calls = {}
    for name, function, own in (
        ("eager", problem.expression, problem.from_public(*grads)),
        ("triton", problem.ours, grads),
    ):

        def forward(function: Callable[..., Any] = function) -> Any:
            with torch.no_grad():
                return function(**tensors)

        def both(function: Callable[..., Any] = function, own: Any = own) -> Any:
            return torch.autograd.grad(as_tuple(function(**tensors)), leaves, own)

        calls[name] = both if backward else forward
    return calls


def measure(ops: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each operator and direction."""
    for op in ops:
        try:
            problem = make_problem(op, SHAPES["host"], torch.float32)
        except Unsupported:
            continue
        for backward in (False, True):
            with compiling(80) as kernels:
                calls = _calls(problem, backward)
                calls["triton"]()
                launches = sum(len(kernel.grids) for kernel in kernels)
                with CountOperators() as counted:
                    calls["eager"]()
                seconds = interleave(calls, rounds)
            row = {"op": op, "mode": "fwd+bwd" if backward else "fwd"}
            row |= {name: [round(1e6 * v, 1) for v in spread(seconds[name])] for name in calls}
            row |= {"ratio": [round(v, 3) for v in paired_ratio(seconds["triton"], seconds["eager"])]}
            yield row | {"launches": launches, "eager_operators": counted.count}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launch",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ops", nargs="+", choices=OP_NAMES, default=list(OP_NAMES), metavar="OP",
                        help=f"operators (default: all): {', '.join(OP_NAMES)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=30, help="samples of each arm (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # five tokens are no work to share
    rows = []
    for row in measure(args.ops, args.rounds):
        rows.append(row)
        print(f"... {row['op']} {row['mode']}", flush=True)
    lines = [
        [r["op"], r["mode"], f"{r['triton'][0]:.0f}", str(r["launches"]), f"{r['eager'][0]:.0f}",
         str(r["eager_operators"]), f"{r['ratio'][0]:.2f} ({r['ratio'][1]:.2f}-{r['ratio'][2]:.2f})"]
        for r in rows
    ]  # fmt: skip
    header = ("operator", "mode", "us, Triton", "launches", "us, eager", "operators", "Triton / eager (p20-p80)")
    print_table("host time of a call, without the driver's launches", header, lines)
    if args.json:
        write_json(args.json, {"schema": 1, "environment": environment(), "rows": rows})
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
