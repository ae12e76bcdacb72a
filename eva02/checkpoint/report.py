"""What a load or a conversion did, and what was wrong with a file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that does not fit. `problems` holds one line per thing that is wrong."""

    def __init__(self, path: PathLike, problems: Iterable[str]) -> None:
        self.path = os.fspath(path)
        self.problems = list(problems)
        super().__init__(f"{self.path}: " + "".join(f"\n  - {problem}" for problem in self.problems))


@dataclasses.dataclass
class LoadReport:
    """What a load did: `print(report)` gives one line per kind of change."""

    path: str
    layout: str = ""
    container: str = ""
    loaded: list[str] = dataclasses.field(default_factory=list)
    """Parameters that received values."""
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Stored name -> timm's name, where they differ."""
    converted: list[str] = dataclasses.field(default_factory=list)
    """Projections split or fused."""
    resized: list[str] = dataclasses.field(default_factory=list)
    """What was interpolated, from which shape to which, by which rule."""
    dropped: list[str] = dataclasses.field(default_factory=list)
    """Stored tensors the model has no use for."""
    fresh: list[str] = dataclasses.field(default_factory=list)
    """Parameters that keep the values they had, because the file cannot hold them."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.layout} layout, container {self.container}, {len(self.loaded)} tensors loaded"]
        for title in ("converted", "resized", "dropped", "fresh", "notes"):
            values = getattr(self, title)
            if values:
                shown = values if title in ("resized", "notes") else shorten(values)
                lines.append(f"  {title}: {', '.join(shown)}")
        return "\n".join(lines)


def shorten(keys: Iterable[str]) -> list[str]:
    """`blocks.0.x`, `blocks.1.x`, `blocks.3.x` -> `blocks.[0-1,3].x`: twelve blocks of the same fault read as one."""
    groups: dict[tuple[str, str], list[int]] = {}
    for key in keys:
        match = re.match(r"(.*?\b(?:blocks|layers)\.)(\d+)(\..*)", key)
        head, index, tail = match.groups() if match else (key, None, "")
        groups.setdefault((head, tail), []).extend([] if index is None else [int(index)])
    names = []
    for (head, tail), indices in groups.items():
        if not indices:
            names.append(head)
            continue
        runs: list[list[int]] = []
        for index in sorted(set(indices)):
            if runs and runs[-1][1] == index - 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        names.append(f"{head}{spans if len(indices) == 1 else f'[{spans}]'}{tail}")
    return names
