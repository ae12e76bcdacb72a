"""`eva02 retrieve`: the same figures from every layout of images with captions, and those of their definition."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import tarfile

import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("datasets")
import datasets
import train_runs

import eva02.clip
from eva02.cli import main
from eva02.data import EvalTransform, open_source
from eva02.runs import load_model

COUNT = 12
# One to three captions an image.
CAPTIONS = [[f"digit {i} {word}" for word in ("small", "big", "red")[: 1 + i % 3]] for i in range(COUNT)]
FIELDS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A CLIP model of two towers with random weights, as a training run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    recipe = train_runs.recipe("clip", clip__context_length=16, schedule__steps=1, schedule__warmup_steps=0)
    train_runs.trainer(recipe, folder).run()
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    digits, folder = open_source("digits", "val"), tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        digits[i][0].resize((16, 16)).save(folder / f"{i:02}.png")
    return folder


def beside(images, place) -> str:
    for i, texts in enumerate(CAPTIONS):
        (place / "sub").mkdir(exist_ok=True)
        (place / "sub" / f"{i:02}.png").write_bytes((images / f"{i:02}.png").read_bytes())
        (place / "sub" / f"{i:02}.txt").write_text("\n".join(texts) + "\n\n")
    return f"captions:{place}"


def coco(images, place) -> str:
    entries = [{"id": 100 - i, "file_name": f"{i:02}.png"} for i in range(COUNT)]
    annotations = [{"image_id": 100 - i, "id": i, "caption": text} for i in range(COUNT) for text in CAPTIONS[i]]
    (place / "captions_val2017.json").write_text(json.dumps({"images": entries, "annotations": annotations[::-1]}))
    return f"captions:{place / 'captions_val2017.json'}:{images}"


def karpathy(images, place) -> str:
    entries = [
        {"filename": f"{i:02}.png", "split": "test", "sentences": [{"raw": text, "tokens": []} for text in texts]}
        for i, texts in enumerate(CAPTIONS)
    ]
    entries.insert(3, {"filename": "00.png", "split": "restval", "sentences": [{"raw": "of another split"}]})
    (place / "dataset_flickr30k.json").write_text(json.dumps({"images": entries, "dataset": "flickr30k"}))
    return f"captions:{place / 'dataset_flickr30k.json'}:{images}"


def listed(images, place) -> str:
    entries = [{"image": str(images / f"{i:02}.png"), "caption": texts} for i, texts in enumerate(CAPTIONS)]
    (place / "list.json").write_text(json.dumps(entries))
    return f"captions:{place / 'list.json'}"


def shards(images, place) -> str:
    with tarfile.open(place / "000.tar", "w") as tar:
        for i, texts in enumerate(CAPTIONS):
            (place / f"{i:02}.json").write_text(json.dumps({"captions": texts}))
            tar.add(images / f"{i:02}.png", f"{i:02}.png")
            tar.add(place / f"{i:02}.json", f"{i:02}.json")
    return f"wds:{place / '000.tar'}"


def hugging_face(images, place) -> str:
    columns = {"image": [str(images / f"{i:02}.png") for i in range(COUNT)], "captions": CAPTIONS}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=data.select(range(3)), test=data).save_to_disk(str(place / "data"))
    return f"hf:{place / 'data'}"


def expected(run: str, images, most: int | None = None) -> dict[str, float]:
    """By the whole matrix of similarities."""
    model, _ = load_model(run)
    model.eval()
    transform = EvalTransform(model.visual.img_size)
    batch = torch.stack(
        [transform(Image.open(images / f"{i:02}.png").convert("RGB"), 0)["image"] for i in range(COUNT)]
    )
    texts = [(i, text) for i in range(COUNT) for text in CAPTIONS[i][:most]]
    with torch.no_grad():
        image = model.encode_image(batch, normalize=True)
        text = model.encode_text(eva02.clip.tokenize([text for _, text in texts], 16), normalize=True)
    owner = torch.tensor([i for i, _ in texts])
    right = owner[None] == torch.arange(COUNT)[:, None]
    order = (image @ text.T).argsort(1, descending=True)
    found = {f"image_to_text_R@{k}": right.gather(1, order[:, :k]).any(1).double().mean() for k in (1, 5, 10)}
    order = (text @ image.T).argsort(1, descending=True)
    found |= {f"text_to_image_R@{k}": right.T.gather(1, order[:, :k]).any(1).double().mean() for k in (1, 5, 10)}
    return {name: 100 * float(value) for name, value in found.items()}


@pytest.mark.parametrize("layout", [beside, coco, karpathy, listed, shards, hugging_face])
def test_every_layout_has_the_figures_of_the_definition(layout, run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    location = layout(images, tmp_path)
    files = ["--csv", str(tmp_path / "out.csv"), "--json", str(tmp_path / "out.json")]
    assert main(["retrieve", location, "--model", run, "--batch-size", "5", "--device", "cpu", *files]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    (row,) = report["results"]
    wanted = expected(run, images)
    assert {name: row[name] for name in FIELDS} == pytest.approx(wanted)
    assert len(set(wanted.values())) > 2  # chance, but no trivial case
    assert row["mean_recall"] == pytest.approx(sum(wanted.values()) / 6)
    assert (row["images"], row["captions"], row["location"]) == (COUNT, sum(map(len, CAPTIONS)), location)
    assert report["model"] == run and report["torch"] == torch.__version__
    with open(tmp_path / "out.csv") as file:
        (line,) = csv.DictReader(file)
    assert float(line["text_to_image_R@5"]) == pytest.approx(row["text_to_image_R@5"])
    assert f"{row['mean_recall']:.2f}" in capsys.readouterr().out.splitlines()[-1]


def test_the_first_captions_of_each_image(run, images, tmp_path):
    arguments = ["retrieve", coco(images, tmp_path), listed(images, tmp_path), "--model", run, "--captions", "1"]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["captions"] == 1
    assert [row["captions"] for row in report["results"]] == [COUNT, COUNT]
    assert {name: report["results"][1][name] for name in FIELDS} == pytest.approx(expected(run, images, 1))


def test_annotations_train_too(images, tmp_path):
    """What a model is trained on: captions of the training part, "restval" with it."""
    source = open_source(karpathy(images, tmp_path))
    assert len(source) == 1
    assert source[0][1] == ["of another split"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": []}', "00.png has no caption"),
        ('[{"file": "00.png"}]', "KeyError 'image'; expected COCO's"),
        ("{", "is no annotation of captions"),
        ('[{"image": "away.png", "caption": "x"}]', "no image .*away.png; captions:.*:FOLDER tells"),
        ("[]", "there is no caption"),
        ('{"images": [{"filename": "a", "split": "val", "sentences": []}]}', "no split 'test', it has val"),
    ],
)
def test_annotations_that_cannot_be_used(content, message, run, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    assert main(["retrieve", f"captions:{tmp_path / 'x.json'}", "--model", run]) == 1
    error = capsys.readouterr().err
    assert error.startswith("eva02 retrieve: ")
    assert re.search(message, error), error


def test_what_is_refused(run, images, capsys):
    assert main(["retrieve", "digits", "--model", run, "--split", "val"]) == 1
    assert "image 0: ValueError: retrieval needs captions of every image; this target is" in capsys.readouterr().err
    assert main(["retrieve", "digits", "--model", "eva02_tiny_patch14_224"]) == 1
    assert "retrieval needs a CLIP model of two towers" in capsys.readouterr().err
    assert main(["retrieve", "digits", "--model", run, "--captions", "0"]) == 1
    assert "--captions must be positive" in capsys.readouterr().err


@pytest.mark.full
def test_processes_share_the_images(run, images, tmp_path):
    arguments = ["retrieve", coco(images, tmp_path), "--model", run, "--device", "cpu", "--batch-size", "3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eva02"]
    command = [*launch, *arguments, "--json", str(tmp_path / "two.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "two.json").read_text())
    assert report["processes"] == 2
    assert {name: report["results"][0][name] for name in FIELDS} == pytest.approx(expected(run, images))
