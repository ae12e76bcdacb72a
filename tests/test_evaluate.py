from __future__ import annotations

import csv
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")
import eva02.clip
from eva02.cli import main
from eva02.data import EvalTransform
from eva02.evaluate import ZeroShot, count_hits, evaluate, open_task
from eva02.images import resize_crop
from eva02.runs import load_model
from eva02.teacher import create_teacher

IDS = ("n01440764", "n01443537", "n01498041", "n01531178", "n15075141")  # classes 0, 1, 6, 11 and 999
PARTIAL = {"n01498041": 6, "n01531178": 11, "n01534433": 13}


def write_image(path, value: int):
    """A constant image: its brightness tells which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), value).save(path, "PNG")


class ByBrightness(nn.Module):
    """Ranks the classes of an image of brightness v as `ranking[v]` says, the others below."""

    def __init__(self, rankings: dict[int, list[int]], num_classes: int = 1000) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.rankings, self.num_classes = rankings, num_classes

    def forward(self, images):
        red = images[:, 0].mean((1, 2)) * 0.26862954 + 0.48145466  # CLIP's normalisation, undone
        logits = torch.zeros(len(images), self.num_classes)
        for row, value in enumerate((red * 255).round().int().tolist()):
            ranking = self.rankings[value]
            logits[row, ranking] = torch.arange(len(ranking), 0, -1.0)
        return logits


def accuracy(protocol, location, rankings, args=None, num_classes=1000):
    task = open_task(protocol, str(location), args)
    result = evaluate(ByBrightness(rankings, num_classes), task, EvalTransform((4, 4)), batch_size=2)
    return result.images, result.top1, result.top5


def test_hits():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [0, 3, 2, 1]])
    labels = [(1,), (3, 0), (0,)]
    assert count_hits(logits, labels, 1).tolist() == [False, True, False]
    assert count_hits(logits, labels, 2).tolist() == [True, True, False]
    for wrong in (-1, 4):  # -1 marks images without a label in some data sets
        with pytest.raises(ValueError, match=f"class {wrong} is none of the 4"):
            count_hits(logits, [(0,), (1,), (wrong,)], 1)


def test_imagenet(tmp_path):
    for value, name in enumerate(IDS):
        write_image(tmp_path / "val" / name / f"{value}.png", value)
    rankings = {0: [0], 1: [1], 2: [0, 1, 2, 3, 6], 3: [0, 1, 2, 3, 4, 11], 4: [999]}
    assert accuracy("imagenet", tmp_path, rankings) == (5, 60.0, 80.0)
    assert accuracy("imagenet-sketch", tmp_path / "val", rankings) == (5, 60.0, 80.0)
    write_image(tmp_path / "val" / "n00000000" / "x.png", 5)
    with pytest.raises(ValueError, match="folder 'n00000000' is none of its classes"):
        open_task("imagenet", str(tmp_path))


def test_imagenet_v2_has_numbers_for_folders(tmp_path):
    for value, number in enumerate((0, 2, 10, 999)):  # sorted as text, 10 comes before 2
        write_image(tmp_path / str(number) / "x.png", value)
    assert accuracy("imagenet-v2", tmp_path, {0: [0], 1: [2], 2: [10], 3: [998]}) == (4, 75.0, 75.0)


@pytest.mark.parametrize("protocol", ["imagenet-a", "imagenet-r"])
def test_classes_outside_the_subset_do_not_compete(tmp_path, protocol):
    ids = {"imagenet-a": PARTIAL, "imagenet-r": {"n01443537": 1, "n01484850": 2, "n01494475": 4}}[protocol]
    for value, name in enumerate(ids):
        write_image(tmp_path / name / "x.png", value)
    first, second, third = ids.values()
    subset = open_task(protocol, str(tmp_path)).subset
    outside = [number for number in range(1000) if number not in subset][:6]
    rankings = {0: [*outside, first], 1: [*outside, first, second], 2: [third]}
    assert accuracy(protocol, tmp_path, rankings) == (3, pytest.approx(200 / 3), 100.0)
    write_image(tmp_path / "n01440764" / "x.png", 3)  # an ImageNet class, but not of these
    with pytest.raises(ValueError, match="folder 'n01440764' is none of its classes"):
        open_task(protocol, str(tmp_path))


def test_subsets_are_timms():
    """Their order is that of sorted folders, and timm ships the same numbers beside the names."""
    from eva02.evaluate import _imagenet_ids, _timm_data

    for name in ("a", "r"):
        ids = sorted(_timm_data(f"imagenet_{name}_synsets.txt").split())
        numbers = [int(line) for line in _timm_data(f"imagenet_{name}_indices.txt").split()]
        assert [_imagenet_ids().index(wordnet_id) for wordnet_id in ids] == numbers and len(numbers) == 200


def test_real_labels(tmp_path):
    for number in (1, 2, 3, 4):
        write_image(tmp_path / "val" / "n01440764" / f"ILSVRC2012_val_{number:08}.JPEG", number)
    labels = [[65], [], [230, 231], [809, 516]]
    options = SimpleNamespace(real_labels=tmp_path / "real.json")
    options.real_labels.write_text(json.dumps(labels))
    rankings = {1: [65], 2: [0], 3: [231], 4: [0, 1, 2, 516]}
    assert accuracy("imagenet-real", tmp_path, rankings, options) == (3, pytest.approx(200 / 3), 100.0)
    shipped = open_task("imagenet-real", str(tmp_path))
    assert shipped.expected == 46_837 and shipped.num_classes == 1000
    write_image(tmp_path / "val" / "n01440764" / "other.png", 5)
    with pytest.raises(ValueError, match=r"other\.png is no image of ImageNet's validation set"):
        open_task("imagenet-real", str(tmp_path), options)


def test_objectnet(tmp_path):
    root = tmp_path / "objectnet-1.0"
    for value, folder in enumerate(("air_freshener", "bench", "clock")):
        write_image(root / "images" / folder / "x.png", value)
    mappings = root / "mappings"
    mappings.mkdir()
    objects = {"air_freshener": "Air freshener", "bench": "Bench", "clock": "Clock"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(objects))
    imagenet = {"Bench": "park bench", "Clock": "wall clock; digital clock"}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(imagenet))
    (mappings / "imagenet_to_label_2012_v2").write_text("digital clock\npark bench\nwall clock")
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text('{"530": 0, "703": 1, "892": 2}')
    for location in (root, root / "images"):
        assert accuracy("objectnet", location, {1: [703], 2: [892]}) == (2, 100.0, 100.0)
    assert accuracy("objectnet", root, {1: [892], 2: [530, 892]}) == (2, 0.0, 50.0)  # the first label alone counts
    zero_shot = open_task("objectnet", str(root), SimpleNamespace(zero_shot=True))
    assert zero_shot.imagenet and zero_shot.names == ["bench", "clock"]
    assert zero_shot.num_classes == 2 and zero_shot.labels == [(), (0,), (1,)]
    mappings.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="--objectnet-mappings tells where"):
        open_task("objectnet", str(root))

    options = SimpleNamespace(objectnet_mappings=str(tmp_path / "elsewhere"))
    assert accuracy("objectnet", root, {1: [703], 2: [892]}, options) == (2, 100.0, 100.0)


def test_models_of_other_classes_are_refused(tmp_path):
    for value, name in enumerate(IDS):
        write_image(tmp_path / name / "x.png", value)
    with pytest.raises(ValueError, match="the data has 1000 classes, the model 21841"):
        accuracy("imagenet", tmp_path, {value: [0] for value in range(5)}, num_classes=21841)
    with pytest.raises(ValueError, match="logits are not finite"):
        evaluate(Nan({}, 5), open_task("folder", str(tmp_path)), EvalTransform((4, 4)))
    with pytest.raises(ValueError, match="unknown protocol 'imagenet-b'"):
        open_task("imagenet-b", str(tmp_path))


class Nan(ByBrightness):
    def forward(self, images):
        return torch.full((len(images), 5), float("nan"))


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (333, 448), (448, 448), (97, 1000), (225, 224)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_the_centre_crop_is_torchvisions(shape, crop_pct):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    theirs = Compose([Resize(int(56 / crop_pct), InterpolationMode.BICUBIC), CenterCrop(56)])(image)
    assert np.array_equal(np.array(resize_crop(image, (56, 56), crop_pct=crop_pct)), np.array(theirs))


def test_evaluate_command(tmp_path, capsys):
    model = eva02.create_model("eva02_tiny_patch14_224", img_size=28, num_classes=10).eval()
    nn.init.normal_(model.head.weight)
    eva02.save_checkpoint(model, tmp_path / "model.safetensors")
    arguments = ["evaluate", "digits", "--model", "eva02_tiny_patch14_224", "--img-size", "28", "--num-classes", "10"]
    arguments += ["--checkpoint", str(tmp_path / "model.safetensors"), "--batch-size", "64"]
    files = [str(tmp_path / "out.csv"), str(tmp_path / "out.json")]
    assert main([*arguments, "--csv", files[0], "--json", files[1]]) == 0
    out = capsys.readouterr().out
    with open(files[0]) as file:
        (row,) = csv.DictReader(file)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["results"][0]["top1"] == float(row["top1"]) and f"{float(row['top1']):.3f}" in out
    assert row["images"] == "360" and float(row["model_throughput"]) > 0 and report["img_size"] == 28

    from eva02.data import eval_loader, open_source

    hits = 0
    with torch.inference_mode():
        for batch in eval_loader(open_source("digits", "val"), EvalTransform((28, 28)), 60):
            hits += int((model(batch["image"]).argmax(1) == batch["label"]).sum())
    assert float(row["top1"]) == pytest.approx(100 * hits / 360)
    assert main([*arguments[:1], "imagenet-z=/nowhere", *arguments[2:]]) == 1
    assert "unknown protocol 'imagenet-z'" in capsys.readouterr().err


def test_clip_models_classify_by_names(tmp_path):
    from eva02.clip import class_embeddings, create_model
    from eva02.data import eval_loader, open_source

    options = {"img_size": 32, "depth": 1, "num_classes": 32, "text": {"depth": 1, "width": 64, "num_heads": 1}}
    model = create_model("EVA02-CLIP-B-16", **options).eval()
    eva02.save_checkpoint(model, tmp_path / "clip.safetensors")
    loaded, _ = load_model("EVA02-CLIP-B-16", str(tmp_path / "clip.safetensors"), **options)
    task, prompts = open_task("folder", "digits"), ("{}", "a {}")
    result = evaluate(ZeroShot(loaded.eval(), task, prompts), task, EvalTransform((32, 32)), batch_size=50)
    classes = class_embeddings(model, open_source("digits").classes, prompts)
    hits = 0
    with torch.inference_mode():
        for batch in eval_loader(open_source("digits", "val"), EvalTransform((32, 32)), 60):
            nearest = (model.encode_image(batch["image"], normalize=True) @ classes.T).argmax(1)
            hits += int((nearest == batch["label"]).sum())
    assert result.images == 360 and result.top1 == pytest.approx(100 * hits / 360)
    assert torch.equal(ZeroShot(loaded, task, prompts).classes, classes)
    task.source.classes = None
    with pytest.raises(ValueError, match="needs names of the classes, and the data has none"):
        ZeroShot(loaded, task)


def test_imagenets_prompts_are_clips(tmp_path, monkeypatch):
    for value, name in enumerate(IDS):
        write_image(tmp_path / name / "x.png", value)

    class Towers(nn.Module):
        """A text is the sum of its tokens."""

        def __init__(self):
            super().__init__()
            self.logit_scale = nn.Parameter(torch.zeros(()))
            self.config = SimpleNamespace(text=SimpleNamespace(context_length=77))
            self.seen = 0

        def encode_text(self, tokens, normalize):
            self.seen += len(tokens)
            return nn.functional.normalize(tokens[:, :16].float(), dim=-1)

    monkeypatch.setattr(eva02.clip, "imagenet_prompts", lambda: (["a", "b", "c"], ["{}", "the {}"]))
    for protocol, classes, prompts in (("imagenet", 3, 6), ("folder", 5, 5)):
        towers = Towers()
        assert ZeroShot(towers, open_task(protocol, str(tmp_path))).classes.shape == (classes, 16)
        assert towers.seen == prompts


def test_a_clip_run_is_evaluated_as_it_trained(tmp_path, capsys):
    run = str(tmp_path / "run")
    short = ["--steps", "3", "--batch-size", "32", "--set", "run.tensorboard=false", "--set", "run.profile_peak=false"]
    assert main(["clip", "--preset", "eva02_digits_clip", *short, "--set", "model.depth=1", "--output", run]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (trained,) = (line["zero_shot_top1"] for line in lines if "zero_shot_top1" in line)
    assert main(["evaluate", "digits", "--model", run, "--json", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["top1"] == pytest.approx(100 * trained)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    assert main(["features", str(tmp_path / "red.png"), "--model", run, "--out", str(tmp_path / "red.npz")]) == 0
    assert "64 channels" in capsys.readouterr().out
    assert create_teacher(run).dim == 64


@pytest.mark.full
def test_processes_share_the_images(tmp_path):
    model = eva02.create_model("eva02_tiny_patch14_224", img_size=28, num_classes=10, depth=12).eval()
    nn.init.normal_(model.head.weight)
    eva02.save_checkpoint(model, tmp_path / "model.safetensors")
    arguments = ["evaluate", "digits", "--model", "eva02_tiny_patch14_224", "--img-size", "28", "--num-classes", "10"]
    arguments += ["--checkpoint", str(tmp_path / "model.safetensors"), "--batch-size", "59", "--device", "cpu"]
    assert main([*arguments, "--json", str(tmp_path / "one.json")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "eva02", *arguments, "--json", str(tmp_path / "two.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("digits") == 1  # one of them prints
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("images", "top1", "top5"):
        assert one["results"][0][key] == pytest.approx(two["results"][0][key])
