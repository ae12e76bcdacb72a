"""``python -m eva02_kernels.testing.gpusim kernel.ptx``: check PTX, or run one of its kernels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eva02_kernels.testing import gpusim
from eva02_kernels.testing.gpusim.launch import core

DESCRIPTION = """\
Without --grid: list the kernels of the file and every instruction that the simulator does not support (exit 1 if
there is one). With --grid: run one kernel with all checks on and print what it counted (exit 1 at a fault).

Arguments, one --arg for each .param, in order:
  tensor:DTYPE:COUNT[:FILL]   a tensor; FILL is zeros (default), ones, arange, randn or fresh (an output, unwritten)
  FILE.npy                    a tensor from a file
  int:N   float:X             a number
"""


def parse_argument(text: str) -> tuple[Any, bool]:
    """The value that ``--arg`` names, and whether it is a fresh output."""
    kind, _, rest = text.partition(":")
    if kind == "int":
        return int(rest, 0), False
    if kind == "float":
        return float(rest), False
    if text.endswith(".npy"):
        return torch.from_numpy(np.load(text)), False
    parts = rest.split(":")
    if kind != "tensor" or len(parts) not in (2, 3):
        raise ValueError(f"--arg: expected tensor:DTYPE:COUNT[:FILL], FILE.npy, int:N or float:X; got {text!r}")
    dtype, count, fill = getattr(torch, parts[0], None), int(parts[1]), parts[2] if len(parts) == 3 else "zeros"
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--arg: {parts[0]!r} is no dtype of torch")
    fills = {
        "zeros": lambda: torch.zeros(count, dtype=dtype),
        "ones": lambda: torch.ones(count, dtype=dtype),
        "arange": lambda: torch.arange(count).to(dtype),
        "randn": lambda: torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype),
        "fresh": lambda: torch.zeros(count, dtype=dtype),
    }
    if fill not in fills:
        raise ValueError(f"--arg: expected one of {', '.join(fills)} for FILL; got {fill!r}")
    return fills[fill](), fill == "fresh"


def triple(text: str) -> tuple[int, int, int]:
    numbers = [int(n) for n in text.split(",")]
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected one to three numbers above 0, got {text!r}")
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eva02_kernels.testing.gpusim",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="PTX text")
    parser.add_argument("--entry", help="kernel to run (default: the only one)")
    parser.add_argument("--grid", type=triple, metavar="X[,Y,Z]", help="CTAs; without it nothing is run")
    parser.add_argument("--block", type=triple, metavar="X[,Y,Z]", default=(32, 1, 1), help="threads (default: 32)")
    parser.add_argument("--shared", type=int, default=0, metavar="BYTES", help="dynamic shared memory (default: 0)")
    parser.add_argument("--arg", action="append", default=[], metavar="SPEC", help="see above")
    parser.add_argument("--seed", type=int, default=0, help="of the order of warps (default: 0)")
    parser.add_argument("--order", default="in", choices=["in", "reverse", "random"], help="of CTAs (default: in)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write every tensor there afterwards, argN.npy")
    args = parser.parse_args(argv)
    try:
        text = args.file.read_text()
        entries = core().entries(text)
        if args.grid is None:
            print(f"{args.file}: {len(entries)} kernels: {', '.join(entries)}")
            found = gpusim.check(text)
            for line, instruction, reason in found:
                print(f"{args.file}:{line}: {reason}: {' '.join(instruction.split())}")
            print(f"{len(found)} unsupported instructions")
            return 1 if found else 0
        entry = args.entry or (entries[0] if len(entries) == 1 else None)
        if entry is None:
            raise ValueError(f"--entry: expected one of {', '.join(entries)}")
        values, fresh = zip(*map(parse_argument, args.arg), strict=True) if args.arg else ((), ())
        outputs = [v for v, f in zip(values, fresh, strict=True) if f]
        with gpusim.options(seed=args.seed, order=args.order, outputs=outputs):
            report = gpusim.run_ptx(
                text, entry, grid=args.grid, block=args.block, args=list(values), shared_bytes=args.shared
            )
    except (OSError, ValueError, gpusim.SimulationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.table())
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                np.save(
                    args.save / f"arg{i}.npy",
                    value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy(),
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
