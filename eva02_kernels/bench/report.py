"""Tables on the terminal and JSON files; plots are drawn from the files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eva02_kernels.bench.machine import Roofline, environment
from eva02_kernels.bench.rows import OK, Config

SCHEMA = 1
Row = dict[str, Any]


def document(config: Config, rows: Sequence[Row], roofline: Roofline | None = None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "config": config.record(),
        "environment": environment(config.device),
        "roofline": roofline.record() if roofline else None,
        "rows": list(rows),
    }


def write_json(path: Path, doc: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(doc, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    doc = json.loads(path.read_text())
    if doc.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a benchmark file of schema {SCHEMA}; got {doc.get('schema')!r}")
    return doc


# ---- tables ---------------------------------------------------------------------------------------------------------
def print_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """With rich where it is installed, else in plain columns."""
    lines = [list(line) for line in lines]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(str(line[i])) for line in [header, *lines]) for i in range(len(header))]
        print(f"\n{title}")
        for line in [header, *lines]:
            print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(header):
        numeric = i > 0 and all(not line[i] or line[i][0].isdigit() for line in lines)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for line in lines:
        table.add_row(*map(str, line))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file keeps its columns
    console.print(table)


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant figures, never in exponents; nothing for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.0f}" if abs(value) >= 1 else f"{value:.8f}".rstrip("0")


def with_spread(record: dict[str, float] | None, unit: str = "") -> str:
    if record is None:
        return ""
    return f"{number(record['median'])}{unit} ({number(record['p20'])}-{number(record['p80'])})"


def megabytes(count: int | None) -> str:
    return "" if count is None else number(count / 2**20)


TIME_HEADER = (
    "arm", "ms (p20-p80)", "host ms", "img/s", "x baseline (p20-p80)", "x compiled", "GFLOP/s", "GB/s", "roofline",
    "data / teacher / student", "first s", "peak MiB", "saved MiB", "note",
)  # fmt: skip


def time_line(row: Row) -> list[str]:
    ratio = with_spread(row["ratio"])
    if (
        row["status"] == OK
        and row["resolved"] is False
        and not row["baseline"]
        and not row["provider"].endswith("/again")
    ):
        ratio += " ~"
    share = row["roofline_share"]
    return [
        row["provider"],
        with_spread(row["ms"]),
        number(row["host_ms"] and row["host_ms"]["median"]),
        number(row["images_per_s"]),
        ratio,
        number(row["ratio_compiled"] and row["ratio_compiled"]["median"]),
        number(row["gflops"]),
        number(row["gbps"]),
        f"{100 * share:.0f} % {row['roofline_bound']}" if share else "",
        " / ".join(f"{100 * part:.0f} %" for part in row["notes"].get("shares", {}).values()),
        number(row["first_call_s"]),
        megabytes(row["peak_memory_bytes"]),
        megabytes(row["saved_bytes"]),
        "" if row["status"] == OK else f"{row['status']}: {row['reason'].splitlines()[0][:60]}",
    ]


def saved_line(row: Row) -> list[str]:
    units, over = row["saved_units"], row["saved_over_baseline"]
    return [
        row["provider"],
        "" if units is None else f"{row['saved_bytes']:,}",
        number(row["saved_in_t"]),
        "" if units is None else f"{units['t']}T + {units['g']}G + {units['rest']:,}",
        number(over),
        "" if row["status"] == OK else f"{row['status']}: {row['reason'].splitlines()[0][:60]}",
    ]


def print_rows(rows: Sequence[Row]) -> None:
    """One case: its arms side by side."""
    first = rows[0]
    if first["suite"] == "memory":
        header = ("arm", "bytes saved", "in T", "T = BNC, G = BNF, rest in elements", "/ baseline", "note")
        print_table(f"memory {first['case']} {first['model']} {first['dtype']}", header, map(saved_line, rows))
        return
    shape = first.get("shape", {})
    detail = f", batch {shape['batch']}, {shape['tokens']} tokens" if "tokens" in shape else ""
    title = f"{first['suite']} {first['case']} {first['model']} {first['mode']} {first['dtype']}{detail}"
    lines = [time_line(row) for row in rows]
    used = [i for i in range(len(TIME_HEADER)) if i == 0 or any(line[i] for line in lines)]
    print_table(title, [TIME_HEADER[i] for i in used], [[line[i] for i in used] for line in lines])


def ceilings(roofline: dict[str, Any]) -> str:
    """The two rates of a run's roofline, by what was measured."""
    rate = roofline.get("gemm_gflops") or roofline.get("fma_gflops")
    what = roofline.get("gemm", "multiply-add")
    text = f"{rate:.0f} GFLOP/s {what}" if rate else f"no multiply-add peak ({roofline['reason']})"
    copy = roofline["copy_gbps"]
    return f"roofline of this run: {text}, {copy:.1f} GB/s copy" if copy else f"roofline: {text}"


def describe_gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, capability {gpu['capability']}, driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}"


def print_environment(env: dict[str, Any], roofline: dict[str, Any] | None) -> None:
    if env["gpu"]:
        switches = ", ".join(f"{name} {'on' if on else 'off'}" for name, on in env["gpu"]["tf32"].items())
        print(f"{describe_gpu(env['gpu'])}, TF32: {switches}")
    load = ", ".join(f"{v:.1f}" for v in env["load"] or ())
    print(
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads, load {load}; "
        f"freed memory {env.get('freed_memory', 'as malloc decides')}; kernels {env['isa']}, "
        f"torch {env['versions']['torch']} {env['torch_isa']}; commit {(env['commit'] or 'none')[:12]}; {env['time']}"
    )
    if roofline:
        print(ceilings(roofline))
    print("~ : inside the spread of the baseline against itself, so no result")


# ---- comparing two files --------------------------------------------------------------------------------------------
def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("suite", "case", "model", "mode", "dtype", "provider"))


def print_comparison(recorded: Sequence[Row], now: Sequence[Row], names: tuple[str, str] = ("recorded", "now")) -> None:
    """Both runs side by side: what each arm took, and its ratio to the baseline then and now."""
    found = {key(row): row for row in now}
    lines = []
    for old in recorded:
        new = found.get(key(old))
        label = " ".join(key(old)[1:4])
        if old.get("saved_units") is not None:
            got = new["saved_bytes"] if new else None
            same = "equal" if got == old["saved_bytes"] else "DIFFERENT"
            lines.append([label, old["provider"], f"{old['saved_bytes']} B", f"{got} B", same, "", "", ""])
            continue
        times = [r["ms"] and r["ms"]["median"] if r else None for r in (old, new)]
        ratios = [r["ratio"] if r else None for r in (old, new)]
        before, after = times
        drift = number(before / after) if before and after else (new or {}).get("status", "missing")
        first, second = ratios
        change = number(second["median"] / first["median"]) if first and second else ""
        lines.append([label, old["provider"], *map(number, times), drift, *map(with_spread, ratios), change])
    old_name, new_name = names
    header = ["case", "arm", f"ms {old_name}", f"ms {new_name}", "speed-up", f"x baseline {old_name}",
              f"x baseline {new_name}", "change"]  # fmt: skip
    print_table(f"{old_name} beside {new_name}", header, lines)


def regressions(recorded: Sequence[Row], now: Sequence[Row], tolerance: float = 0.05) -> list[str]:
    """Our arms whose ratio to the baseline fell by more than ``tolerance`` and out of both runs' spreads, or lost
    their time, or keep more bytes for backward."""
    found = {key(row): row for row in now}
    worse = []
    for old in recorded:
        new = found.get(key(old))
        if not old["ours"] or new is None:
            continue
        label = " ".join(key(old)[1:])
        if old["status"] == OK and new["status"] != OK:
            worse.append(f"{label}: {new['status']} ({new['reason']})")
        elif old.get("saved_bytes") is not None and (new["saved_bytes"] or 0) > old["saved_bytes"]:
            worse.append(f"{label}: keeps {new['saved_bytes']} bytes for backward, was {old['saved_bytes']}")
        elif old["ratio"] and new["ratio"]:
            before, after = old["ratio"], new["ratio"]
            if after["median"] < (1 - tolerance) * before["median"] and after["p80"] < before["p20"]:
                worse.append(f"{label}: {after['median']:.3f} x baseline, was {before['median']:.3f}")
    return worse
