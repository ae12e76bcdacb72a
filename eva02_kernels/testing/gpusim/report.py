"""What a launch did: counters of each source line, and the faults that were collected."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from eva02_kernels.testing.gpusim.errors import SimulationError


@dataclass
class Counters:
    """Of one source line, or of a launch. Sectors: the distinct 32 bytes of one warp's access, without a cache."""

    instructions: int = 0  # of warps
    lane_instructions: int = 0
    global_load_bytes: int = 0  # requested
    global_store_bytes: int = 0
    global_load_sectors: int = 0
    global_store_sectors: int = 0
    shared_load_bytes: int = 0
    shared_store_bytes: int = 0
    wavefronts: int = 0  # of shared memory; a model of its banks
    ideal_wavefronts: int = 0
    collisions: int = 0  # stores of several lanes, or of equal values by several CTAs, to the same bytes


@dataclass(frozen=True)
class Traffic:
    """Distinct bytes and sectors of one tensor that a launch touched."""

    loaded_bytes: int
    stored_bytes: int
    loaded_sectors: int
    stored_sectors: int
    storage: int = 0  # address of its first byte on the host


@dataclass
class Report:
    """The outcome of one launch."""

    kernel: str
    grid: tuple[int, int, int]  # CTAs
    block: tuple[int, int, int]  # threads
    dynamic_shared: int  # bytes of a CTA, beside what the kernel itself declares
    counters: Counters
    lines: dict[str, Counters]
    opcodes: dict[str, int]  # executions by warps
    traffic: dict[str, Traffic]  # by tensor
    errors: list[SimulationError] = field(default_factory=list)
    output: str = ""  # of the kernel's printf

    def table(self, count: int = 20) -> str:
        """The ``count`` busiest source lines and every tensor's traffic, as text."""
        c = self.counters
        out = [
            f"{self.kernel}: {c.instructions} warp instructions, {c.lane_instructions} lane instructions",
            f"{'line':60} {'instr':>10} {'ld bytes':>12} {'ld sect':>9} {'st bytes':>12} {'st sect':>9} "
            f"{'wavefr':>8} {'ideal':>8}",
        ]
        busiest = sorted(self.lines.items(), key=lambda item: -item[1].instructions)[:count]
        for where, n in busiest:
            out.append(
                f"{where[-60:]:60} {n.instructions:10} {n.global_load_bytes:12} {n.global_load_sectors:9} "
                f"{n.global_store_bytes:12} {n.global_store_sectors:9} {n.wavefronts:8} {n.ideal_wavefronts:8}"
            )
        out.append(f"{'tensor':60} {'distinct ld':>12} {'sectors':>9} {'distinct st':>12} {'sectors':>9}")
        for name, t in self.traffic.items():
            out.append(
                f"{name[-60:]:60} {t.loaded_bytes:12} {t.loaded_sectors:9} {t.stored_bytes:12} {t.stored_sectors:9}"
            )
        return "\n".join(out)


def report_of(kernel: str, outcome: dict[str, Any], errors: list[SimulationError]) -> Report:
    """A report from the core's outcome."""
    total = Counters()
    lines: defaultdict[str, Counters] = defaultdict(Counters)
    opcodes: defaultdict[str, int] = defaultdict(int)
    for _, opcode, _, where, warps, lanes, space, store, size, sectors, waves, ideal, collisions in outcome["counters"]:
        opcodes[opcode] += warps
        for c in (total, lines[where.split(", called from ")[0]]):
            c.instructions += warps
            c.lane_instructions += lanes
            c.wavefronts += waves
            c.ideal_wavefronts += ideal
            c.collisions += collisions
            if space == "global":
                c.global_store_bytes += size * store
                c.global_load_bytes += size * (not store)
                c.global_store_sectors += sectors * store
                c.global_load_sectors += sectors * (not store)
            elif space == "shared":
                c.shared_store_bytes += size * store
                c.shared_load_bytes += size * (not store)
    traffic = {name: Traffic(*values) for name, values in outcome["distinct"].items()}
    grid, block = tuple(outcome["grid"]), tuple(outcome["block"])
    return Report(
        kernel, grid, block, outcome["shared"], total, dict(lines), dict(opcodes), traffic, errors, outcome["output"]
    )
