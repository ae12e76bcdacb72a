"""``make demo``: pre-train and fine-tune a small EVA-02 on handwritten digits, on our kernels, then measure it.

1. A teacher, an EVA-02 of the student's size, is trained with labels on the training split, then frozen.
2. A student without labels learns to predict the teacher's features of masked patches (masked image modelling).
3. The student's encoder is fine-tuned with labels. Its accuracy on the test split, which nothing before has seen and
   no choice was made on, is printed at the end.
4. The same model and EVA-02 Ti are timed against timm, eager and compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eva02
from benchmarks.models import ModelCase
from benchmarks.suites import run_case
from eva02_kernels import add_layer_norm, masked_cosine_loss, reset_stats, stats, strict
from eva02_kernels.bench import report
from eva02_kernels.bench.machine import CpuRoofline, warm_up_process
from eva02_kernels.bench.measure import fresh_compiler
from eva02_kernels.bench.rows import Config
from eva02_kernels.bench.shapes import SHAPES, Shape

MODEL = "eva02_base_patch14_224"  # sub-LN and separate projections, as in EVA-02 B; the sizes are the demo's


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and lengths, fixed before the test split was ever looked at."""

    image: int = 12
    patch: int = 2
    dim: int = 96
    heads: int = 3
    depth: int = 4
    mask_share: float = 0.4
    batch: int = 64
    teacher_epochs: int = 20
    mim_epochs: int = 25
    finetune_epochs: int = 25
    train_images: int | None = None

    def options(self) -> dict[str, Any]:
        return {
            "img_size": self.image,
            "patch_size": self.patch,
            "in_chans": 1,
            "embed_dim": self.dim,
            "num_heads": self.heads,
            "depth": self.depth,
        }

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


QUICK = Settings(
    dim=32, heads=2, depth=2, teacher_epochs=1, mim_epochs=1, finetune_epochs=1, batch=32, train_images=256
)


class Digits(NamedTuple):
    train_images: Tensor  # (n, 1, 8, 8), standardised with the training split's mean and deviation
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Outcome(NamedTuple):
    accuracy: float
    teacher_accuracy: float
    losses: dict[str, list[float]]  # one value a step
    seconds: dict[str, float]


def load_digits(limit: int | None = None) -> Digits:
    """1,797 digits of 8x8 pixels; one in five of each class is the test split (stratified, seed 0)."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    images, labels = datasets.load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(a) for a in split)
    train_x, test_x = (x.float().view(-1, 1, 8, 8) for x in (train_x, test_x))
    mean, std = train_x.mean(), train_x.std()
    return Digits((train_x - mean)[:limit] / std, train_y[:limit].long(), (test_x - mean) / std, test_y.long())


def enlarge(images: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """8x8 images as size x size; with a generator each one turned, scaled and shifted a little."""
    n = len(images)
    affine = torch.eye(2, 3).repeat(n, 1, 1)
    if generator is not None:

        def uniform(limit: float, *shape: int) -> Tensor:
            return limit * (2 * torch.rand(n, *shape, generator=generator) - 1)

        angle, scale = uniform(0.25), 1 + uniform(0.15)
        affine[:, 0, 0] = affine[:, 1, 1] = scale * angle.cos()
        affine[:, 1, 0] = scale * angle.sin()
        affine[:, 0, 1] = -affine[:, 1, 0]
        affine[:, :, 2] = uniform(0.2, 2)
    grid = F.affine_grid(affine, [n, 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


# ---- training --------------------------------------------------------------------------------------------------------
def batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index of every batch of every epoch; the last, smaller one of an epoch is left out."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].split(size)


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    settings: Settings,
    epochs: int,
    generator: torch.Generator,
    *,
    lr: float,
    advance: Callable[[float], None],
) -> list[float]:
    """AdamW with warm-up and a cosine schedule; ``loss_of(batch)`` gives the loss. Returns it for every step."""
    from timm.optim import param_groups_weight_decay
    from timm.scheduler import CosineLRScheduler

    groups = param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    steps = epochs * (count // settings.batch)
    schedule = CosineLRScheduler(
        optimiser, t_initial=steps, lr_min=1e-5, warmup_t=max(1, steps // 10), warmup_lr_init=0.0, t_in_epochs=False
    )
    model.train()
    losses = []
    for step, index in enumerate(batches(count, settings.batch, epochs, generator)):
        schedule.step_update(step)
        loss = loss_of(index)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        advance(losses[-1])
    return losses


def teacher_features(teacher: eva02.Eva02, images: Tensor) -> Tensor:
    """The frozen teacher's normalised patch tokens: (B, P, C)."""
    with torch.no_grad():
        tokens = teacher.forward_features(images)
        norm = teacher.fc_norm
        return add_layer_norm(tokens, None, norm.weight, norm.bias, norm.eps)[0][:, 1:]


def random_masks(batch: int, settings: Settings, generator: torch.Generator) -> Tensor:
    """(B, P) bool, the same number of patches masked in every sample."""
    order = torch.rand(batch, settings.patches, generator=generator).argsort(1)
    return order < round(settings.mask_share * settings.patches)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> float:
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(enlarge(part, size)).argmax(1) for part in images.split(128)])
    return float((found == labels).float().mean())


def new_classifier(settings: Settings) -> eva02.Eva02:
    return eva02.create_model(MODEL, num_classes=10, drop_path_rate=0.1, **settings.options())


def train_student(
    seed: int, settings: Settings, data: Digits, phase: Callable[[str, int], Callable[[float], None]]
) -> Outcome:
    """Teacher, pre-training, fine-tuning; the test split is used once, at the end.

    ``phase(name, steps)`` is told of each phase and returns what is called with each step's loss.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.train_images, data.train_labels
    losses: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}

    def train(name: str, model: nn.Module, loss_of: Callable[[Tensor], Tensor], epochs: int, lr: float) -> None:
        start = time.perf_counter()
        advance = phase(name, epochs * (len(images) // settings.batch))
        losses[name] = fit(model, loss_of, len(images), settings, epochs, generator, lr=lr, advance=advance)
        seconds[name] = time.perf_counter() - start

    def classify(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda index: F.cross_entropy(
            model(enlarge(images[index], settings.image, generator)), labels[index], label_smoothing=0.1
        )

    teacher = new_classifier(settings)
    train("teacher, with labels", teacher, classify(teacher), settings.teacher_epochs, 1.5e-3)
    teacher.eval().requires_grad_(False)

    student = eva02.create_model(MODEL, head="mim", mim_dim=settings.dim, **settings.options())

    def predict(index: Tensor) -> Tensor:
        view = enlarge(images[index], settings.image, generator)
        mask = random_masks(len(index), settings, generator)
        idx = mask.flatten().nonzero().squeeze(1)
        return masked_cosine_loss(student(view, mask, idx), teacher_features(teacher, view), idx)

    train("masked image modelling", student, predict, settings.mim_epochs, 1.5e-3)

    classifier = new_classifier(settings)
    encoder = {k: v for k, v in student.state_dict().items() if not k.startswith(("mask_token", "norm.", "lm_head."))}
    missing, unexpected = classifier.load_state_dict(encoder, strict=False)
    fresh = [name for name in missing if not name.startswith(("fc_norm.", "head."))]
    if fresh or unexpected:
        raise RuntimeError(f"the encoder does not fit: missing {fresh}, unexpected {unexpected}")
    train("fine-tuning, with labels", classifier, classify(classifier), settings.finetune_epochs, 1e-3)

    test = (data.test_images, data.test_labels, settings.image)
    return Outcome(accuracy(classifier, *test), accuracy(teacher, *test), losses, seconds)


# ---- what is shown ---------------------------------------------------------------------------------------------------
def train_with_progress(seed: int, settings: Settings, data: Digits) -> Outcome:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("loss {task.fields[loss]}"))  # fmt: skip
    with Progress(*columns) as bars:

        def phase(name: str, steps: int) -> Callable[[float], None]:
            task = bars.add_task(name, total=steps, loss="")
            return lambda loss: bars.update(task, advance=1, loss=f"{loss:.3f}")

        return train_student(seed, settings, data, phase)


def measure(settings: Settings, *, quick: bool, threads: int) -> dict[str, Any]:
    """Rows of the demo's model (training step, forward) and of EVA-02 Ti (forward)."""
    hidden = int(settings.dim * 4 * 2 / 3)
    shape = Shape("digits", settings.batch, settings.dim, settings.heads, hidden, settings.depth, True, settings.image,
                  settings.patch)  # fmt: skip
    arms = ("ours",) if quick else ("ours", "timm+compile")
    digits = {"model_name": MODEL, "num_classes": 10, **settings.options()}
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
    settings = QUICK if args.quick else Settings()
    start = time.perf_counter()
    data = load_digits(settings.train_images)
    print(f"digits: {len(data.train_images)} images to train on, {len(data.test_images)} to test on; seed {args.seed}")
    reset_stats()
    with strict():  # a kernel that is missing is an error here, not a slower run
        outcome = train_with_progress(args.seed, settings, data)
    calls = [[op, direction, backend, str(n)] for (op, direction, backend), n in sorted(stats().items())]
    report.print_table("operator calls while training", ("operator", "direction", "backend", "calls"), calls)
    print(f"test accuracy: {100 * outcome.accuracy:.2f} % (teacher, trained with labels: "
          f"{100 * outcome.teacher_accuracy:.2f} %)")  # fmt: skip
    doc = measure(settings, quick=args.quick, threads=args.threads)
    report.print_environment(doc["environment"], doc["roofline"])
    found = {name: getattr(outcome, name) for name in ("accuracy", "teacher_accuracy", "seconds")}
    doc["demo"] = {"seed": args.seed, "quick": args.quick, "settings": dataclasses.asdict(settings), **found}
    report.write_json(args.out / "demo.json", doc)
    draw(outcome, doc, args.out / "demo.png")
    print(f"wrote {args.out / 'demo.json'} and {args.out / 'demo.png'}; {time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
