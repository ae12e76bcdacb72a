"""``python -m benchmarks.simulator``: how fast the PTX simulator is on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import eva02_kernels
from eva02_kernels.bench.machine import environment
from eva02_kernels.bench.report import print_table, write_json
from eva02_kernels.testing import executing, gpusim
from eva02_kernels.testing.gpusim import Report

DESCRIPTION = """\
Simulated lane instructions a second and seconds a launch, with all checks on: float32 multiply-adds in a row, and RoPE
attention forward and backward in bfloat16. Compilation is not counted: the second call is timed.
"""

_FMA = """\
.version 8.0
.target sm_80
.address_size 64
.visible .entry fma(.param .u64 x)
{
.reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %d<4>; .reg .f32 %f<10>;
ld.param.u64 %d1, [x];
mov.u32 %r1, %tid.x;
mul.wide.u32 %d2, %r1, 4;
add.u64 %d2, %d2, %d1;
ld.global.f32 %f1, [%d2];
mov.f32 %f2, 0f3f7fffff;
mov.f32 %f3, 0f3a83126f;
mov.f32 %f4, %f1; mov.f32 %f5, %f1; mov.f32 %f6, %f1;
mov.u32 %r2, 0;
LOOP:
STEPS
add.u32 %r2, %r2, 1;
setp.lt.u32 %p1, %r2, 2000;
@%p1 bra LOOP;
add.f32 %f1, %f1, %f4; add.f32 %f5, %f5, %f6; add.f32 %f1, %f1, %f5;
st.global.f32 [%d2], %f1;
ret;
}
""".replace("STEPS", "\n".join(f"fma.rn.f32 %f{r}, %f{r}, %f2, %f3;" for _ in range(16) for r in (1, 4, 5, 6)))


def multiply_adds() -> list[Report]:
    return [gpusim.run_ptx(_FMA, "fma", grid=(1, 1, 1), block=(128, 1, 1), args=[torch.randn(128)])]


def rope_attention(grid: tuple[int, int], heads: int) -> list[Report]:
    tokens = grid[0] * grid[1] + 1
    q, k, v = (torch.randn(1, tokens, heads, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    reports: list[Report] = []
    with executing("simulator", on_report=reports.append):
        out = eva02_kernels.rope_attention(q, k, v, eva02_kernels.rope_2d(grid, 64), backend="triton")
        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    return reports


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--long", action="store_true", help="also 1025 tokens and 16 heads (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    args = parser.parse_args(argv)
    cases: dict[str, Callable[[], list[Report]]] = {
        "float32 multiply-adds": multiply_adds,
        "rope_attention fwd+bwd, B1 H2 N257 D64": lambda: rope_attention((16, 16), 2),
    }
    if args.long:
        cases["rope_attention fwd+bwd, B1 H16 N1025 D64"] = lambda: rope_attention((32, 32), 16)
    rows, lines = [], []
    for name, run in cases.items():
        for threads in (1, 2):
            with gpusim.options(threads=threads):
                run()
                start = time.perf_counter()
                reports = run()
                seconds = time.perf_counter() - start
            lanes = sum(r.counters.lane_instructions for r in reports)
            rows.append({"case": name, "threads": threads, "seconds": round(seconds, 4), "lane_instructions": lanes})
            lines.append([name, str(threads), f"{seconds:.2f}", f"{lanes / 1e6:.1f}", f"{lanes / seconds / 1e6:.0f}"])
    print_table("the simulator", ("case", "threads", "s", "M lane instr.", "M lane instr./s"), lines)
    if args.json:
        write_json(args.json, {"environment": environment("cpu"), "rows": rows})
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
