"""``python -m benchmarks.cuda_kernels``: the compiled CUDA kernels of a library beside a checked-in budget."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.kernels import accesses, compare
from eva02_kernels._native import LIBRARY_DIR
from eva02_kernels.bench.report import print_table
from eva02_kernels.testing.offline import access_widths, matrix_instructions, num_spills, opcodes_of

BUDGET = Path(__file__).parent / "results" / "cuda_kernels.json"
LIBRARY = LIBRARY_DIR / "libeva02_kernels_cuda.so"

DESCRIPTION = """\
Show what became of every CUDA kernel of a compiled library: registers, loads and stores of spilled registers, static
shared memory, width of global accesses, kind of matrix instruction, for each compute capability that it has machine
code for. Nothing is run, no GPU is needed: these numbers tell what limits a kernel, not how long it takes.

Examples:
  EVA02_CUDA_ARCHITECTURES="80;90" pip install --no-build-isolation -e .      builds the library here
  python -m benchmarks.cuda_kernels                                           a table
  python -m benchmarks.cuda_kernels --check                                   exit 1 where a kernel is worse
  python -m benchmarks.cuda_kernels --write                                   after a change that is worth it
"""
EPILOG = f"""\
The budget is {BUDGET.relative_to(Path(__file__).parents[1])}: a kernel is worse with more registers, shared memory or
spills, narrower accesses, or another kind of matrix instruction. All but spills and matrix instructions are compared
only where the nvcc is that of the budget.
"""
FIELDS = ("registers", "spills", "shared", "widths", "matrix")


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


def describe(library: Path, arch: int) -> dict[str, dict[str, Any]]:
    """Every kernel of one architecture by name."""
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
        }
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
                lines += compare(f"sm_{arch} {name}", old, kernel, same_tools=same)
    return lines


def write_budget(path: Path, found: dict[int, dict[str, Any]], compiler: str) -> None:
    parts = []
    for arch, kernels in found.items():
        lines = [f"   {json.dumps(n)}: {json.dumps([k[f] for f in FIELDS])}" for n, k in sorted(kernels.items())]
        parts.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
    body = ",\n".join(parts)
    path.write_text(f'{{\n "compiler": {json.dumps(compiler)},\n "kernels": {{\n{body}\n }}\n}}\n')


def print_found(found: dict[int, dict[str, Any]]) -> None:
    for arch, kernels in found.items():
        rows = [[name, *(str(k[f]) for f in FIELDS[:3]), accesses(k["widths"]), k["matrix"]]
                for name, k in sorted(kernels.items())]  # fmt: skip
        header = ("kernel", "registers", "spills", "shared bytes", "accesses", "matrix")
        print_table(f"compute capability {arch / 10}", header, rows)
        kinds: Counter[str] = Counter(k["matrix"] or "none" for k in kernels.values())
        spilled = sum(k["spills"] > 0 for k in kernels.values())
        print(f"{len(kernels)} kernels, {spilled} spill; matrix instructions: {dict(kinds)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_kernels", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--library", type=Path, default=LIBRARY, help="default: the installed one")
    parser.add_argument("--arch", nargs="+", type=int, help="compute capabilities such as 80 (default: all it has)")
    parser.add_argument("--check", action="store_true", help="compare with the budget; exit 1 where a kernel is worse")
    parser.add_argument("--write", action="store_true", help="make this the budget")
    parser.add_argument("--budget", type=Path, default=BUDGET, metavar="FILE", help="another budget file")
    args = parser.parse_args(argv)
    if not args.library.exists():
        parser.error(f"--library: there is no {args.library}; see --help for how to build it")
    has = architectures(args.library)
    if unknown := set(args.arch or ()) - set(has):
        parser.error(f"--arch: the library has {has}, not {sorted(unknown)}")
    found = {arch: describe(args.library, arch) for arch in args.arch or has}
    if args.check:
        lines = violations(json.loads(args.budget.read_text()), found, compiler_of(args.library))
        print("\n".join(lines))
        print(f"{sum(map(len, found.values()))} kernels, {len(lines)} worse than {args.budget.name}")
        return 1 if lines else 0
    print_found(found)
    if args.write:
        write_budget(args.budget, found, compiler_of(args.library))
        print(f"wrote {args.budget}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
