"""From pixels to accuracy, by the commands: what pre-training without labels adds on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import pytest

from eva02.cli import main
from eva02.train.progress import read_log

QUIET = ("--set", "run.tensorboard=false", "--set", "run.profile_peak=false", "--set", "run.log_every=50")
SHORT = (
    *("--epochs", "3", "--batch-size", "32", "--lr", "3e-3", "--set", "schedule.warmup_epochs=1"),
    *(
        "--set",
        "model.depth=2",
        "--set",
        "model.embed_dim=48",
        "--set",
        "model.num_heads=2",
        "--set",
        "run.eval_every=0",
        "--set",
        "data.auto_augment=none",
    ),
)


def life(folder: Path, *options: str) -> tuple[float, float, list[float]]:
    """Accuracy of a classifier trained from scratch and, with that as teacher of a student without labels, of the
    student fine-tuned; the student's losses."""
    scratch, student, tuned = (str(folder / name) for name in ("scratch", "student", "tuned"))
    options = (*QUIET, *options)
    width = ("--set", "model.mim_dim=48") if "model.embed_dim=48" in options else ()
    assert main(["finetune", "--preset", "eva02_digits", "--output", scratch, *options]) == 0
    command = ["pretrain", "--preset", "eva02_digits_mim", "--output", student, "--teacher", scratch]
    assert main([*command, *options, *width]) == 0
    assert main(["finetune", "--preset", "eva02_digits", "--output", tuned, "--init", student, *options]) == 0
    logs = {name: read_log(folder / name / "log.jsonl") for name in ("scratch", "student", "tuned")}
    accuracy = {
        name: [line["top1"] for line in lines if "top1" in line][-1]
        for name, lines in logs.items()
        if name != "student"
    }
    losses = [line["loss"] for line in logs["student"] if "lr" in line]
    return accuracy["scratch"], accuracy["tuned"], losses


def test_a_short_life(tmp_path):
    scratch, tuned, losses = life(tmp_path, *SHORT)
    print(f"from scratch {100 * scratch:.2f} %, after pre-training {100 * tuned:.2f} %, loss {losses[-1]:.3f}")
    assert sum(losses[-10:]) / 10 < -0.2
    assert tuned > 0.5
    assert tuned > scratch - 0.05


@pytest.mark.full
def test_digits(tmp_path):
    scratch, tuned, losses = life(tmp_path)
    print(f"from scratch {100 * scratch:.2f} %, after pre-training {100 * tuned:.2f} %, loss {losses[-1]:.3f}")
    assert tuned >= 0.975
    assert sum(losses[-10:]) / 10 < -0.5
