"""``make demo``: pre-train and fine-tune a small EVA-02 on handwritten digits, on our kernels, then measure it.

1. A teacher, an EVA-02 of the student's size, is trained with labels on the training split, then frozen.
2. A student without labels learns to predict the teacher's features of masked patches (masked image modelling).
3. The student's encoder is fine-tuned with labels. Its accuracy on the test split, which none of them was trained on,
   is printed at the end.
4. The same model and EVA-02 Ti are timed against timm, eager and compiled.

The first three are `eva02 finetune`, `pretrain` and `finetune` with the presets of the digits.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.models import ModelCase
from benchmarks.suites import run_case
from eva02.recipes import Recipe, get_preset
from eva02.train import finetune, pretrain
from eva02.train.command import train_recipe
from eva02_kernels import reset_stats, stats, strict
from eva02_kernels.bench import report
from eva02_kernels.bench.machine import CpuRoofline, warm_up_process
from eva02_kernels.bench.measure import fresh_compiler
from eva02_kernels.bench.rows import Config
from eva02_kernels.bench.shapes import SHAPES, Shape

TEACHER, STUDENT, TUNED = "teacher, with labels", "masked image modelling", "fine-tuning, with labels"
QUICK = {"model.embed_dim": 32, "model.num_heads": 2, "model.depth": 2, "data.batch_size": 32, "schedule.steps": 8}


class Outcome(NamedTuple):
    accuracy: float
    teacher_accuracy: float
    losses: dict[str, list[float]]  # one value a step
    seconds: dict[str, float]


# ---- training --------------------------------------------------------------------------------------------------------
def recipes(folder: Path, seed: int, *, quick: bool = False) -> dict[str, Recipe]:
    """Of the three phases, in their order; each writes into a folder of its own, where the next finds what it needs."""
    found: dict[str, Recipe] = {}
    for name, preset, changes in (
        (TEACHER, "eva02_digits", {}),
        (STUDENT, "eva02_digits_mim", {"mim.teacher": str(folder / TEACHER), "data.val": None}),
        (TUNED, "eva02_digits", {"finetune.init": str(folder / STUDENT)}),
    ):
        common: dict[str, Any] = {
            "run.output": str(folder / name),
            "run.seed": seed,
            "run.device": "cpu",
            "run.log_every": 50,
            "run.eval_every": 0,
            "run.tensorboard": False,
            "run.profile_peak": False,
            "data.workers": 1,  # loads while the others compute
        }
        small = {} if not quick else {**QUICK, **({"model.mim_dim": 32} if name == STUDENT else {})}
        found[name] = get_preset(preset).override({**common, **changes, **small})
    return found


def train(seed: int, *, quick: bool = False) -> Outcome:
    """Teacher, pre-training, fine-tuning."""
    outcomes, seconds = {}, {}
    with tempfile.TemporaryDirectory(prefix="eva02_demo_") as folder:
        for name, recipe in recipes(Path(folder), seed, quick=quick).items():
            print(f"... {name}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            outcomes[name] = train_recipe(recipe, pretrain.build if recipe.task == "pretrain" else finetune.build)
            seconds[name] = time.perf_counter() - start
    if not all(outcome.finished for outcome in outcomes.values()):
        raise SystemExit("told to stop")
    accuracy, teacher_accuracy = (outcomes[name].evaluation["top1"] for name in (TUNED, TEACHER))
    return Outcome(accuracy, teacher_accuracy, {name: found.losses for name, found in outcomes.items()}, seconds)


# ---- what is shown ---------------------------------------------------------------------------------------------------
def measure(recipe: Recipe, *, quick: bool, threads: int) -> dict[str, Any]:
    """Rows of the fine-tuned model (training step, forward) and of EVA-02 Ti (forward)."""
    model = recipe.model.config()
    shape = Shape("digits", recipe.data.batch_size, model.embed_dim, model.num_heads, model.hidden_features,
                  model.depth, model.scale_mlp, model.image_hw[0], model.patch_hw[0])  # fmt: skip
    arms = ("ours",) if quick else ("ours", "timm+compile")
    digits = {"model_name": recipe.model.name, **recipe.model.options, "drop_path_rate": 0.0}
    planned: list[tuple[str, Callable[[], ModelCase], int]] = [
        ("train", lambda: ModelCase(shape, **digits), 2 if quick else 10),
        ("model", lambda: ModelCase(shape, **digits), 2 if quick else 10),
    ]
    if not quick:
        planned.append(("model", lambda: ModelCase(SHAPES["tiny"]), 8))
    warm_up_process()
    roofline, rows, config = CpuRoofline(), [], None
    with contextlib.nullcontext() if quick else fresh_compiler():
        for suite, make, rounds in planned:
            config = Config(suite, ("tiny",), providers=arms, threads=threads, rounds=rounds)
            case = make()
            print(f"... timing {suite} {case.name}", flush=True)
            rows.append(run_case(case, config, roofline))
            report.print_rows(rows[-1])
    assert config is not None
    return report.document(config, [row for case in rows for row in case], roofline)


def draw(outcome: Outcome, doc: dict[str, Any], out: Path) -> None:
    """Loss of each phase, and images per second of each arm over timm eager."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.plots import _arms, _bars, _by_case, _patch

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in outcome.losses.items():
        left.plot(values, linewidth=1, label=name)
    left.set(xlabel="step", ylabel="loss", title=f"test accuracy {100 * outcome.accuracy:.1f} %")
    left.legend(fontsize=8, frameon=False)
    labels = {"train": "training step", "model": "forward"}
    groups = [(f"{rows[0]['model']}\n{labels[rows[0]['suite']]}", rows) for rows in _by_case(doc["rows"])]
    names = _arms(doc["rows"])
    _bars(right, groups, "ratio", names)
    right.legend(handles=[_patch(n, names) for n in names], fontsize=8, ncols=2, loc="upper left", frameon=False)
    right.set_title("images per second over timm eager; red: timm a second time", fontsize=10)
    fig.savefig(out, dpi=150)
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches, masks (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one epoch of a smaller model, few timings: a smoke test")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for files (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    reset_stats()
    with strict():  # a kernel that is missing is an error here, not a slower run
        outcome = train(args.seed, quick=args.quick)
    calls = [[op, direction, backend, str(n)] for (op, direction, backend), n in sorted(stats().items())]
    report.print_table("operator calls while training", ("operator", "direction", "backend", "calls"), calls)
    print(f"test accuracy: {100 * outcome.accuracy:.2f} % (teacher, trained with labels: "
          f"{100 * outcome.teacher_accuracy:.2f} %)")  # fmt: skip
    phases = recipes(Path(), args.seed, quick=args.quick)
    doc = measure(phases[TUNED], quick=args.quick, threads=args.threads)
    report.print_environment(doc["environment"], doc["roofline"])
    found = {name: getattr(outcome, name) for name in ("accuracy", "teacher_accuracy", "seconds")}
    doc["demo"] = {"seed": args.seed, "quick": args.quick, **found,
                   "recipes": {name: recipe.to_dict() for name, recipe in phases.items()}}  # fmt: skip
    report.write_json(args.out / "demo.json", doc)
    draw(outcome, doc, args.out / "demo.png")
    print(f"wrote {args.out / 'demo.json'} and {args.out / 'demo.png'}; {time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
