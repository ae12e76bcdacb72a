"""What a simulated kernel can do wrong, as exceptions."""

from __future__ import annotations

from typing import Any


class SimulationError(RuntimeError):
    """A fault of a kernel: what happened, in which thread, at which line.

    Attributes:
        kernel: entry name.
        kind: ``"out of bounds"``, ``"race"``, ...
        where: the user's source line, with its callers where it was inlined.
        line, text: the PTX instruction.
        cta, thread: three indices each.
        address: the simulated address, or the byte of shared memory.
        tensor: name of the argument that was touched, where there is one.
        other_line, other_text, other_where: the other access of a race in shared memory; 0 and empty without one.
    """

    def __init__(self, kernel: str, record: dict[str, Any]) -> None:
        self.kernel, self.kind, self.where = kernel, record["kind"], record["where"]
        self.line, self.text = record["line"], record["text"]
        self.cta, self.thread = tuple(record["cta"]), tuple(record["thread"])
        self.address, self.tensor = record["address"], record["tensor"]
        self.other_line, self.other_text = record["other_line"], record["other_text"]
        self.other_where = record["other_where"]
        place = f"\n  at {self.where}" if self.where else ""
        if self.line:
            place += f"\n  PTX line {self.line}: {' '.join(self.text.split())}"
            place += f"\n  CTA {self.cta}, thread {self.thread}"
        if self.other_line:
            place += (
                f"\n  and {self.other_where}".rstrip()
                + f"\n  PTX line {self.other_line}: {' '.join(self.other_text.split())}"
            )
        super().__init__(f"{kernel}: {record['message']}{place}")


class OutOfBoundsError(SimulationError):
    """An access outside every tensor, or outside its own tensor's views."""


class MisalignedError(SimulationError):
    """An address that is no multiple of the access's width."""


class UninitialisedError(SimulationError):
    """Bytes that nobody wrote reach an address, a branch or a result; or an output is not written completely."""


class RaceError(SimulationError):
    """Two accesses with no order between them, at least one of them a write."""


class BarrierError(SimulationError):
    """A barrier, or an operation of a whole warp, that not all of its lanes reach together."""


class DeadlockError(SimulationError):
    """Every warp waits."""


class BudgetError(SimulationError):
    """A warp executed more instructions than it was allowed."""


class TrapError(SimulationError):
    """The kernel stopped itself."""


class UnsupportedError(SimulationError):
    """An instruction, or a use of one, that the simulator does not have."""


_KINDS = {
    "out of bounds": OutOfBoundsError,
    "misaligned": MisalignedError,
    "uninitialised": UninitialisedError,
    "race": RaceError,
    "barrier": BarrierError,
    "deadlock": DeadlockError,
    "budget": BudgetError,
    "trap": TrapError,
    "unsupported": UnsupportedError,
}


def fault_record(kind: str, message: str, **fields: Any) -> dict[str, Any]:
    """The record of a fault that no thread made."""
    place = {"line": 0, "text": "", "where": "", "cta": (0, 0, 0), "thread": (0, 0, 0), "address": 0, "tensor": ""}
    other = {"other_line": 0, "other_text": "", "other_where": ""}
    return {"kind": kind, "message": message, **place, **other, **fields}


def error_of(kernel: str, record: dict[str, Any]) -> SimulationError:
    """The exception for one of the core's records."""
    return _KINDS.get(record["kind"], SimulationError)(kernel, record)
