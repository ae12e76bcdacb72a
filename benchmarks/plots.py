"""Pictures of benchmark files: ``python -m benchmarks.plots forward.json train.json --out results.png``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eva02_kernels.bench.providers import AGAIN
from eva02_kernels.bench.report import describe_gpu, read_json
from eva02_kernels.bench.rows import OK

Row = dict[str, Any]
COLOURS = {
    "timm+compile": "#8c8c8c",
    "compile": "#8c8c8c",
    "timm+patch": "#7fb3d5",
    "ours": "#1f5f99",
    "ours+compile": "#e08a1e",
    "ours, recompute": "#e08a1e",
    "timm": "#c9c9c9",
    "eager": "#c9c9c9",
}
OTHER_COLOURS = ("#5a9367", "#a05195", "#d45087", "#665191")
SHORT = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "host": "host"}
WHAT = {"model": "forward", "train": "training step", "pretrain": "pre-training step"}


def _figure(rows: int, columns: int, width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _colour(name: str, names: Sequence[str]) -> str:
    unknown = [n for n in names if n not in COLOURS]
    return COLOURS.get(name) or OTHER_COLOURS[unknown.index(name) % len(OTHER_COLOURS)]


def _arms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["provider"] for r in rows if not r["baseline"] and not r["provider"].endswith(AGAIN)))


def _bars(ax: Any, groups: Sequence[tuple[str, list[Row]]], field: str, names: Sequence[str]) -> None:
    """One group of bars a case: ratios with their spread, and the baseline's own spread as a band behind them."""
    width = 0.8 / max(1, len(names))
    top = 1.0
    for x, (_, rows) in enumerate(groups):
        by_name = {r["provider"]: r for r in rows}
        again = next((r for r in rows if r["provider"].endswith(AGAIN)), None)
        if again is not None and again["ratio"]:
            band = again["ratio"]
            ax.fill_between(
                [x - 0.45, x + 0.45], band["p20"], band["p80"], color="#c0392b", alpha=0.3, linewidth=0, zorder=2.5
            )
        for i, name in enumerate(names):
            row = by_name.get(name)
            at = x - 0.4 + (i + 0.5) * width
            if row is None or row[field] is None:
                reason = "no time" if row is None or row["status"] != OK else ""
                ax.text(at, 0.02, reason, rotation=90, ha="center", va="bottom", fontsize=7, color="#666666")
                continue
            ratio = row[field]
            error = [[ratio["median"] - ratio["p20"]], [ratio["p80"] - ratio["median"]]]
            ax.bar(
                at, ratio["median"], width * 0.92, color=_colour(name, names), zorder=2, label=name if x == 0 else None
            )
            ax.errorbar(at, ratio["median"], yerr=error, color="#222222", linewidth=1, capsize=2, zorder=3)
            ax.text(at, ratio["p80"] + 0.015, f"{ratio['median']:.2f}", ha="center", va="bottom", fontsize=8, zorder=4)
            top = max(top, ratio["p80"])
    ax.axhline(1.0, color="#222222", linewidth=0.8, zorder=1)
    ax.set_ylim(0, 1.25 * top)  # room for the legend
    ax.set_xticks(range(len(groups)), [label for label, _ in groups])


def _by_case(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["suite"], row["case"], row["model"], row["mode"]), []).append(row)
    return list(found.values())


def _caption(docs: Sequence[dict[str, Any]]) -> str:
    env = docs[0]["environment"]
    threads = f"{env['threads']} thread{'s' if env['threads'] > 1 else ''}"
    machine = describe_gpu(env["gpu"]) if env.get("gpu") else f"{env['cpu']}, {threads}"
    return (
        f"{machine}, {docs[0]['config']['dtype']}, torch {env['versions']['torch']}, "
        f"timm {env['versions'].get('timm', 'not installed')}; bars: median of the ratios within a round, "
        "lines p20-p80; red band: the baseline measured a second time"
    )


def plot_models(docs: Sequence[dict[str, Any]], out: Path) -> None:
    """Speed over timm eager and over timm compiled, one row of panels a suite."""
    fig, axes = _figure(len(docs), 2, 11, 0.6 + 3.1 * len(docs))
    for (left, right), doc in zip(axes, docs, strict=True):
        timed = [r for r in doc["rows"] if r["suite"] in WHAT]
        groups = []
        for rows in _by_case(timed):
            shape = rows[0]["shape"]
            label = (
                rows[0]["case"] if rows[0]["model"] == "host" else f"{SHORT[rows[0]['model']]}, batch {shape['batch']}"
            )
            groups.append((label, rows))
        names = _arms(timed)
        baseline = next(r["provider"] for r in timed if r["baseline"])
        _bars(left, groups, "ratio", names)
        left.set_ylabel(f"{WHAT[timed[0]['suite']]}: speed over {baseline}")
        left.set_title(f"over {baseline} eager", fontsize=10)
        if names:
            left.legend(handles=[_patch(n, names) for n in names], fontsize=8, ncols=4, loc="upper left", frameon=False)
        compiled = next((n for n in names if n in ("timm+compile", "compile")), None)
        if compiled is None:
            right.set_axis_off()
            continue
        # Its own spread is that of its ratio; the band of the baseline does not apply to it.
        without_band = [(label, [r for r in rows if not r["provider"].endswith(AGAIN)]) for label, rows in groups]
        _bars(right, without_band, "ratio_compiled", [n for n in names if n != compiled])
        right.set_title(f"over {compiled}", fontsize=10)
    fig.supxlabel(_caption(docs), fontsize=7.5)
    _save(fig, out)


def _horizontal(ax: Any, cases: Sequence[list[Row]], names: Sequence[str], value: Callable[[Row], Any]) -> None:
    height = 0.8 / max(1, len(names))
    labels = []
    for y, rows in enumerate(cases):
        by_name = {r["provider"]: r for r in rows}
        labels.append(f"{rows[0]['case']} {SHORT[rows[0]['model']]}")
        again = next((r for r in rows if r["provider"].endswith(AGAIN)), None)
        if again is not None and again["ratio"]:
            ax.fill_betweenx([y - 0.45, y + 0.45], again["ratio"]["p20"], again["ratio"]["p80"], color="#c0392b",
                             alpha=0.25, linewidth=0)  # fmt: skip
        numbers = {n: value(by_name[n]) for n in names if n in by_name and by_name[n]["status"] == OK}
        shown = {name: number for name, number in numbers.items() if number is not None}
        for i, (name, number) in enumerate(shown.items()):
            at = y + (i + 0.5 - len(shown) / 2) * height
            ax.barh(at, number, height * 0.92, color=_colour(name, names), zorder=2)
            ax.text(number, at, f" {number:.2f}", va="center", fontsize=7, zorder=3)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    handles = [_patch(name, names) for name in names]
    ax.legend(handles=handles, fontsize=8, frameon=False, loc="lower right")


def _patch(name: str, names: Sequence[str]) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=_colour(name, names), label=name)


def plot_ops(doc: dict[str, Any], out: Path) -> None:
    """Speed over eager of each operator and model, one panel a mode."""
    modes = list(dict.fromkeys(r["mode"] for r in doc["rows"]))
    names = _arms(doc["rows"])
    cases = {mode: _by_case([r for r in doc["rows"] if r["mode"] == mode]) for mode in modes}
    longest = max(len(c) for c in cases.values())
    fig, axes = _figure(1, len(modes), 6 * len(modes), 1.4 + longest * max(0.3, 0.16 * len(names)))
    for ax, mode in zip(axes[0], modes, strict=True):
        _horizontal(ax, cases[mode], names, lambda r: r["ratio"] and r["ratio"]["median"])
        ax.axvline(1.0, color="#222222", linewidth=0.8, zorder=1)
        ax.set_title(f"{mode}: speed over eager", fontsize=10)
    fig.supxlabel(_caption([doc]), fontsize=7.5)
    _save(fig, out)


def plot_memory(doc: dict[str, Any], out: Path) -> None:
    """Bytes kept for backward over T = B*N*C elements."""
    cases = _by_case(doc["rows"])
    names = list(dict.fromkeys(r["provider"] for r in doc["rows"]))
    fig, axes = _figure(1, 1, 8, 1.4 + len(cases) * max(0.3, 0.16 * len(names)))
    _horizontal(axes[0][0], cases, names, lambda r: r["saved_in_t"])
    axes[0][0].set_xlabel("kept for backward, in T = batch x tokens x channels")
    _save(fig, out)


def _save(fig: Any, out: Path) -> None:
    import matplotlib.pyplot as plt

    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=150)
    plt.close(fig)


def plot(docs: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw one file of any suite, or several of the suites of whole models together."""
    suites = {doc["config"]["suite"] for doc in docs}
    if suites <= set(WHAT):
        plot_models(docs, out)
    elif len(docs) > 1:
        raise ValueError(f"only files of the suites {', '.join(WHAT)} share a picture; got {', '.join(sorted(suites))}")
    elif suites == {"memory"}:
        plot_memory(docs[0], out)
    else:
        plot_ops(docs[0], out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of benchmarks.run")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    args = parser.parse_args(argv)
    plot([read_json(path) for path in args.files], args.out)


if __name__ == "__main__":
    main()
