"""``python -m benchmarks.cuda_kernels``: the compiled CUDA kernels of a library beside a checked-in budget."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import CASES, MAX_RATIO, Case, accesses, compare, excesses
from benchmarks.traffic import Launched, run_case
from eva02_kernels._native import LIBRARY_DIR
from eva02_kernels.bench.report import print_table
from eva02_kernels.testing.offline import access_widths, matrix_instructions, num_spills, occupancy, opcodes_of

BUDGET = Path(__file__).parent / "results" / "cuda_kernels.json"
LIBRARY = LIBRARY_DIR / "libeva02_kernels_cuda.so"

DESCRIPTION = """\
Show what became of every CUDA kernel of a compiled library: registers, loads and stores of spilled registers, static
shared memory, width of global accesses, kind of matrix instruction, for each compute capability that it has machine
code for. No GPU is needed: these numbers tell what limits a kernel, not how long it takes.

With --simulate operators run on the PTX simulator, which tells threads and dynamic shared memory of what they launch
(from which occupancy follows), and for kernels over rows the sectors of 32 bytes that they move over the operator's
minimum: distinct ones of each launch, which memory has to serve, and requested ones, of which caches serve many.

Examples:
  EVA02_CUDA_ARCHITECTURES="80;90" pip install --no-build-isolation -e .      builds the library here
  python -m benchmarks.cuda_kernels                                           a table
  python -m benchmarks.cuda_kernels --check                                   exit 1 where a kernel is worse
  python -m benchmarks.cuda_kernels --write                                   after a change that is worth it
  python -m benchmarks.cuda_kernels --simulate --check                        `make cuda-simulator` builds what runs
"""
FIELDS = ("registers", "spills", "shared", "widths", "matrix", "occupancy")
# Model and samples: kernels over rows are held to the minimum of a whole batch; what they move for a few samples of
# wider rows is only compared.
BATCH, FEW = ("small", 128), ("base", 4)
EXCEPTIONS = {
    "gather_layer_norm bwd": "a float32 partial sum of the parameters' gradients is of 64 tokens, half of which are "
    "picked; with one of 128 there would be hardly a CTA for a multiprocessor",
}
"""Operators and directions that may move more, and why."""

EPILOG = f"""\
The budget is {BUDGET.relative_to(Path(__file__).parents[1])}: a kernel is worse with more registers, shared memory or
spills, narrower accesses, or another kind of matrix instruction. All but spills and matrix instructions are compared
only where the nvcc is that of the budget. Of what is simulated: more threads or dynamic shared memory, more bytes, or
distinct bytes beyond {MAX_RATIO} of the minimum at {BATCH[1]} samples.
"""


def _cuobjdump(*arguments: str | Path) -> str:
    from triton import knobs  # brings the tool

    return subprocess.run([knobs.nvidia.cuobjdump.path, *arguments], capture_output=True, text=True, check=True).stdout


def architectures(library: Path) -> list[int]:
    """Compute capabilities that the library has machine code for."""
    return sorted({int(n) for n in re.findall(r"\.sm_(\d+)\.cubin", _cuobjdump("-lelf", library))})


def demangled(names: list[str]) -> list[str]:
    """As they are in the source, without namespaces and parameters: ``swiglu_cuda fwd_kernel<float, 4>``."""
    files = [found[1] if (found := re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", n)) else "" for n in names]
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = (re.sub(r"\(anonymous namespace\)::|eva02::(cuda::)?", "", name) for name in result.splitlines())
    short = (re.sub(r"^void |\(.*", "", name) for name in plain)
    return [f"{file} {name}" for file, name in zip(files, short, strict=True)]


def describe(library: Path, arch: int, launches: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every kernel of one architecture by name; ``launches``: threads and dynamic shared memory of those known."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", _cuobjdump("-res-usage", "-arch", f"sm_{arch}", library)
    )
    text = _cuobjdump("-sass", "-arch", f"sm_{arch}", library)
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)\n\s*\.{10,}", text, re.DOTALL))
    found = {}
    for name, (mangled, registers, shared) in zip(demangled([u[0] for u in usage]), usage, strict=True):
        opcodes = opcodes_of(bodies[mangled])
        found[name] = {
            "registers": int(registers),
            "spills": num_spills(opcodes),
            "shared": int(shared),
            "widths": {str(w): n for w, n in sorted(access_widths(opcodes).items())},
            "matrix": "+".join(matrix_instructions(opcodes)),
            "occupancy": None,
        }
        if name in launches:
            threads, dynamic = launches[name]
            found[name]["occupancy"] = round(occupancy(arch, threads, int(registers), int(shared) + dynamic), 3)
    return found


def compiler_of(library: Path) -> str:
    """nvcc's version as the build recorded it beside the library."""
    info = library.with_name("build_info.json")
    return f"nvcc {json.loads(info.read_text()).get('nvcc', 'unknown') if info.exists() else 'unknown'}"


def violations(budget: dict[str, Any], found: dict[int, dict[str, Any]], compiler: str) -> list[str]:
    """What is worse than the budget, a line each; ``compiler``: of what was found."""
    lines = []
    same = budget["compiler"] == compiler
    for arch, kernels in found.items():
        known = budget["kernels"].get(str(arch))
        if known is None:
            lines.append(f"sm_{arch}: not in the budget")
            continue
        lines += [f"sm_{arch} {name}: no longer compiled" for name in known if name not in kernels]
        for name, kernel in kernels.items():
            if name not in known:
                lines.append(f"sm_{arch} {name}: not in the budget")
            else:
                old = dict(zip(FIELDS, known[name], strict=True))
                old["occupancy"] = old["occupancy"] or 0.0
                now = kernel | {"occupancy": kernel["occupancy"] or old["occupancy"]}
                lines += compare(f"sm_{arch} {name}", old, now, same_tools=same)
    return lines


def read_budget(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"compiler": "", "kernels": {}, "launches": {}, "moved": {}}
    return empty | (json.loads(path.read_text()) if path.exists() else {})


def write_budget(path: Path, budget: dict[str, Any]) -> None:
    """One line for each kernel, launch and case, so that changes can be read."""

    def block(entries: dict[str, Any], indent: str) -> str:
        lines = (f"{indent} {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(entries.items()))
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    kernels = ",\n".join(f'  "{arch}": {block(of, "  ")}' for arch, of in budget["kernels"].items())
    path.write_text(
        f'{{\n "compiler": {json.dumps(budget["compiler"])},\n "kernels": {{\n{kernels}\n }},\n'
        f' "launches": {block(budget["launches"], " ")},\n "moved": {block(budget["moved"], " ")}\n}}\n'
    )


# ---- on the simulator ------------------------------------------------------------------------------------------------
def launches_of(cases: Sequence[Case], progress: Callable[[str], None]) -> dict[str, tuple[int, int]]:
    """Threads and dynamic shared memory (the most seen) of every kernel that operators launch, by name."""
    found: dict[str, tuple[int, int]] = {}
    for case, dtype, grid in itertools.product(cases, (torch.bfloat16, torch.float16, torch.float32), (4, 16)):
        if grid == 16 and dtype != torch.bfloat16:
            continue  # many rows choose other tiles of products than few do, whatever the dtype
        for model in case.quick:
            try:
                directions = run_case(case, case.inputs(model, dtype, batch=1, grid=(grid, grid)), "cuda")
            except NotImplementedError:  # refused, with a reason that the backend's tests read
                continue
            for report in (r for of in directions.values() for r in of.reports):
                (name,) = demangled([report.kernel])
                threads, shared = report.block[0] * report.block[1] * report.block[2], report.dynamic_shared
                before = found.get(name, (0, 0))
                found[name] = max(threads, before[0]), max(shared, before[1])
        progress(f"{case.op} {case.name} {str(dtype).removeprefix('torch.')} {grid}x{grid}")
    return found


def moved_by_rows(
    cases: Sequence[Case], model: str, batch: int, progress: Callable[[str], None]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Distinct and requested bytes over the minimum, of a model's rows in bfloat16: {case: {direction: the two}}."""

    def ratios(of: Launched) -> tuple[float, float]:
        sectors = sum(t.loaded_sectors + t.stored_sectors for r in of.reports for t in r.traffic.values())
        distinct = of.torch_bytes + 32 * sectors
        return round(distinct / of.minimum, 3), round(of.requested_bytes / of.minimum, 3)

    found = {}
    for case in cases:
        if not case.rows or "base" not in case.models:
            continue
        directions = run_case(case, case.inputs(model, torch.bfloat16, batch=batch), "cuda")
        found[f"{case.op} {case.name}"] = {direction: ratios(of) for direction, of in directions.items()}
        progress(f"{case.op} {case.name}, {model}, {batch} samples")
    return found


def beyond_the_minimum(moved: dict[str, dict[str, tuple[float, float]]]) -> list[str]:
    return [
        line
        for case, directions in moved.items()
        for line in excesses(
            case, case.split()[0], {way: distinct for way, (distinct, _) in directions.items()}, EXCEPTIONS
        )
    ]


def simulated_violations(
    budget: dict[str, Any],
    launches: dict[str, tuple[int, int]],
    moved: dict[str, dict[str, tuple[float, float]]],
) -> list[str]:
    """What is worse than the budget about what ran, a line each."""
    lines = []
    for name, (threads, shared) in launches.items():
        if name not in budget["launches"]:
            lines.append(f"{name}: its launch is not in the budget")
        elif threads > budget["launches"][name][0] or shared > budget["launches"][name][1]:
            was = budget["launches"][name]
            lines.append(f"{name}: {threads} threads, {shared} bytes of dynamic shared memory, were {was[0]}, {was[1]}")
    for case, directions in moved.items():
        for direction, now in directions.items():
            was = budget["moved"].get(case, {}).get(direction)
            if was is None:
                lines.append(f"{case} {direction}: not in the budget")
            elif any(n > b for n, b in zip(now, was, strict=True)):
                lines.append(f"{case} {direction}: {now[0]} distinct, {now[1]} requested of the minimum, were {was}")
    return lines


def print_found(found: dict[int, dict[str, Any]]) -> None:
    for arch, kernels in found.items():
        rows = [[name, *(str(k[f]) for f in FIELDS[:3]), "" if k["occupancy"] is None else f"{k['occupancy']:.2f}",
                 accesses(k["widths"]), k["matrix"]] for name, k in sorted(kernels.items())]  # fmt: skip
        header = ("kernel", "registers", "spills", "shared bytes", "occupancy", "accesses", "matrix")
        print_table(f"compute capability {arch / 10}", header, rows)
        kinds: Counter[str] = Counter(k["matrix"] or "none" for k in kernels.values())
        spilled, known = (sum(map(of, kernels.values())) for of in (lambda k: k["spills"] > 0, _has_occupancy))
        print(f"{len(kernels)} kernels, {spilled} spill; matrix instructions: {dict(kinds)}; of {known} the launch")


def _has_occupancy(kernel: dict[str, Any]) -> bool:
    return kernel["occupancy"] is not None


def print_simulated(
    launches: dict[str, tuple[int, int]], moved: dict[tuple[str, int], dict[str, dict[str, tuple[float, float]]]]
) -> None:
    print_table("launches", ("kernel", "threads", "dynamic shared bytes"),
                [[name, str(t), str(b)] for name, (t, b) in sorted(launches.items())])  # fmt: skip
    for (model, batch), cases in moved.items():
        rows = [[case, direction, f"{distinct:.3f}", f"{requested:.3f}"]
                for case, of in cases.items() for direction, (distinct, requested) in of.items()]  # fmt: skip
        title = f"bytes over the minimum, {model}, {batch} samples, bfloat16"
        print_table(title, ("case", "direction", "distinct", "requested"), rows)


def simulate(args: argparse.Namespace, budget: dict[str, Any]) -> int:
    """--simulate: what operators launch, and what kernels over rows move."""
    launches = launches_of(CASES, _progress)
    moved = {size: moved_by_rows(CASES, *size, _progress) for size in (FEW, BATCH)}
    lines = beyond_the_minimum(moved[BATCH])
    if args.check:
        lines += simulated_violations(budget, launches, moved[FEW])
        print("\n".join(lines))
        print(f"{len(launches)} launches, {len(moved[FEW])} cases, {len(lines)} worse than {args.budget.name}")
        return 1 if lines else 0
    print_simulated(launches, moved)
    if args.write:
        write_budget(args.budget, budget | {"launches": launches, "moved": moved[FEW]})
        print(f"wrote {args.budget}")
    return 0


def _progress(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_kernels", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--library", type=Path, default=LIBRARY, help="default: the installed one")
    parser.add_argument("--arch", nargs="+", type=int, help="compute capabilities such as 80 (default: all it has)")
    parser.add_argument("--simulate", action="store_true", help="run operators on the simulator (minutes)")
    parser.add_argument("--check", action="store_true", help="compare with the budget; exit 1 where a kernel is worse")
    parser.add_argument("--write", action="store_true", help="make this the budget")
    parser.add_argument("--budget", type=Path, default=BUDGET, metavar="FILE", help="another budget file")
    args = parser.parse_args(argv)
    budget = read_budget(args.budget)
    if args.simulate:
        return simulate(args, budget)
    if not args.library.exists():
        parser.error(f"--library: there is no {args.library}; see --help for how to build it")
    has = architectures(args.library)
    if unknown := set(args.arch or ()) - set(has):
        parser.error(f"--arch: the library has {has}, not {sorted(unknown)}")
    found = {arch: describe(args.library, arch, budget["launches"]) for arch in args.arch or has}
    if args.check:
        lines = violations(budget, found, compiler_of(args.library))
        print("\n".join(lines))
        print(f"{sum(map(len, found.values()))} kernels, {len(lines)} worse than {args.budget.name}")
        return 1 if lines else 0
    print_found(found)
    if args.write:
        kernels = {str(arch): {n: [k[f] for f in FIELDS] for n, k in of.items()} for arch, of in found.items()}
        write_budget(args.budget, budget | {"compiler": compiler_of(args.library), "kernels": kernels})
        print(f"wrote {args.budget}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
