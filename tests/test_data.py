from __future__ import annotations

import io
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
from eva02.data import (
    ArraySource,
    BadImages,
    BlockMask,
    ClipTransform,
    EvalTransform,
    FinetuneTransform,
    MimTransform,
    Mixup,
    TrainLoader,
    eval_loader,
    every_other,
    open_source,
)
from eva02.data.transforms import Crop

SIZE = (28, 28)
MIM = MimTransform(SIZE, BlockMask.for_grid((2, 2)))


def source_of(count: int = 40) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 255, (count, 40, 50, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(count) % 4, [f"class {i}" for i in range(4)])


def take(loader: TrainLoader, count: int) -> list[dict[str, torch.Tensor]]:
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert torch.equal(batch[key], other[key]), key


# ---- masks -------------------------------------------------------------------------------------------------------
def test_block_masks_have_the_published_statistics():
    mask = BlockMask()
    counts = np.array([int(mask(np.random.default_rng(seed)).sum()) for seed in range(5000)])
    assert counts.max() == 105
    assert abs(counts.mean() - 104.44) < 0.08  # 4 standard errors
    assert abs((counts == 105).mean() - 0.65) < 0.03
    assert counts.min() >= 88


def test_block_masks_are_unions_of_blocks():
    mask = BlockMask()(np.random.default_rng(0)).view(16, 16).int()
    # Of 105 patches that lie at random, 60 % of the right neighbours would be unmasked.
    changes = int((mask[:, 1:] != mask[:, :-1]).sum() + (mask[1:] != mask[:-1]).sum())
    assert changes < 120


def test_first_blocks():
    """What the algorithm says of one rectangle: sides under 16, any place where it fits, areas from 16 to 105."""
    mask, blocks = BlockMask(), []
    for seed in range(3000):
        patches = np.zeros((16, 16), dtype=bool)
        added = mask._add_block(patches, 105, np.random.default_rng(seed))
        rows, columns = np.flatnonzero(patches.any(1)), np.flatnonzero(patches.any(0))
        assert added == patches.sum() == len(rows) * len(columns)
        blocks.append((rows[0], rows[-1], columns[0], columns[-1], added))
    top, bottom, left, right, area = np.array(blocks).T
    for first, last in ((top, bottom), (left, right)):
        assert (last - first + 1).max() == 15
        assert abs((first == 0).sum() - (last == 15).sum()) < 4 * np.sqrt((first == 0).sum())
    assert area.max() == 105 and 14 <= area.min() < 18  # sides are rounded


def test_validation_mask():
    mask = every_other((16, 16))
    assert mask.sum() == 128 and mask[0] and not mask[1] and mask[254]


def test_impossible_masks_are_refused():
    with pytest.raises(ValueError, match=r"num_masked must lie in \[1, 16\]"):
        BlockMask((4, 4), 17)


# ---- loading -----------------------------------------------------------------------------------------------------
def test_workers_change_nothing():
    plain = take(TrainLoader(source_of(), MIM, 8, seed=3), 12)  # more than two epochs
    assert_same(take(TrainLoader(source_of(), MIM, 8, seed=3, num_workers=2), 12), plain)


def test_processes_share_a_batch():
    whole = take(TrainLoader(source_of(), MIM, 8, seed=3), 6)
    parts = [take(TrainLoader(source_of(), MIM, 8, seed=3, rank=rank, world_size=2), 6) for rank in range(2)]
    joined = [
        {key: torch.cat([first[key], second[key]]) for key in first} for first, second in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_with_the_next_batch(workers):
    expected = take(TrainLoader(source_of(), MIM, 8), 13)
    loader = TrainLoader(source_of(), MIM, 8, num_workers=workers)
    assert_same(take(loader, 7), expected[:7])  # workers have loaded more than that
    again = TrainLoader(source_of(), MIM, 8, num_workers=workers)
    again.load_state_dict(loader.state_dict())
    assert_same(take(again, 6), expected[7:])


def test_a_position_belongs_to_its_data():
    state = TrainLoader(source_of(), MIM, 8).state_dict()
    with pytest.raises(ValueError, match="seed was 0, is 1; samples was 40, is 30"):
        TrainLoader(source_of(30), MIM, 8, seed=1).load_state_dict(state)


def test_epochs_are_permutations_that_differ():
    loader = TrainLoader(source_of(), MIM, 8)
    batches = take(loader, 10)
    epochs = [torch.cat([batch["index"] for batch in batches[start : start + 5]]) for start in (0, 5)]
    assert all(sorted(epoch.tolist()) == list(range(40)) for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("transform", [MIM, FinetuneTransform(SIZE)])
def test_global_generators_do_not_move(transform, monkeypatch):
    def draws():
        return random.random(), np.random.random(), torch.rand(()).item()

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    first = take(TrainLoader(source_of(), transform, 8), 2)
    assert draws() == expected
    assert_same(take(TrainLoader(source_of(), transform, 8), 2), first)


class Damaged(ArraySource):
    """Some images cannot be read."""

    def __init__(self, bad: set[int]) -> None:
        plain = source_of()
        super().__init__(plain.images, plain.targets, plain.classes)
        self.bad_indices = bad

    def __getitem__(self, index):
        if index in self.bad_indices:
            raise OSError("truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_and_replaced(workers, caplog):
    loader = TrainLoader(Damaged({3, 5}), MIM, 8, num_workers=workers, max_bad_images=2)
    batches = take(loader, 10)
    indices = torch.cat([batch["index"] for batch in batches])
    assert len(indices) == 80 and not {3, 5} & set(indices.tolist())
    assert loader.bad == {"image 3": "OSError: truncated", "image 5": "OSError: truncated"}
    assert caplog.text.count("skipped image 3: OSError: truncated") == 1
    assert_same(take(TrainLoader(Damaged({3, 5}), MIM, 8), 10), batches)


@pytest.mark.parametrize("bad", [{1, 2, 3}, set(range(40))])
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_are_an_error(bad, workers):
    with pytest.raises(BadImages, match="images could not be read, 2 are allowed") as caught:
        take(TrainLoader(Damaged(bad), MIM, 8, num_workers=workers, max_bad_images=2), 5)
    assert len(caught.value.bad) >= 3
    assert all(f"{name}: OSError: truncated" in str(caught.value) for name in caught.value.bad)


def test_a_small_data_set_that_is_all_bad_is_an_error():
    with pytest.raises(BadImages, match="40 images could not be read, 100 are allowed"):
        take(TrainLoader(Damaged(set(range(40))), MIM, 8), 1)


def test_evaluation_sees_every_sample_once():
    transform = EvalTransform(SIZE)
    parts = [list(eval_loader(source_of(41), transform, 6, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(int(i) for part in parts for batch in part for i in batch["index"]) == list(range(41))
    with pytest.raises(ValueError, match="image 3: OSError: truncated"):
        list(eval_loader(Damaged({3}), transform, 6))


def test_mixup_follows_from_the_batch():
    def loader():
        return TrainLoader(source_of(), FinetuneTransform(SIZE), 8, collate=Mixup(4, cutmix=1.0))

    first = take(loader(), 5)
    assert first[0]["label"].shape == (8, 4)
    assert_same(take(loader(), 5), first)
    assert len({batch["label"].max().item() for batch in first}) > 2  # each batch draws its own share


def test_captions():
    def tokenize(texts):
        return torch.tensor([[len(text), *text[:2].encode()] for text in texts])

    captions = ["a cat", ["one", "another"], 1]
    source = ArraySource(source_of(3).images, captions)
    transform = ClipTransform(SIZE, tokenize, classes=["dog", "bird"], prompts=("{}", "the {}"))
    batches = take(TrainLoader(source, transform, 3), 20)
    seen = {
        pair for batch in batches for pair in zip(batch["index"].tolist(), batch["text"][:, 0].tolist(), strict=True)
    }
    assert seen == {(0, 5), (1, 3), (1, 7), (2, 4), (2, 8)}
    with pytest.raises(ValueError, match="needs captions, or classes with names; this target is None"):
        transform(source[0][0], None, np.random.default_rng(0))


def views(transform, count=400):
    """Means of the left and right half of the views of an image that is black on the left."""
    image = Image.fromarray(np.repeat(np.uint8([[0] * 30 + [255] * 30]), 60, 0)).convert("RGB")
    for seed in range(count):
        view = transform(image, 0, np.random.default_rng(seed))["image"][0]
        yield view[:, :14].mean().item(), view[:, 14:].mean().item()


def test_flips_and_crops():
    """Pre-training and fine-tuning flip half of the views, contrastive training none, or as they are told; crops have
    their areas."""

    def clip(**options):
        return ClipTransform(SIZE, lambda texts: torch.zeros(1, 1), classes=["x"], **options)

    def mim(**options):
        return MimTransform(SIZE, BlockMask.for_grid((2, 2)), **options)

    for transform, share in ((mim(), 0.5), (mim(hflip=0.2), 0.2), (mim(hflip=0.0), 0.0), (clip(), 0.0),
                             (clip(hflip=0.5), 0.5), (FinetuneTransform(SIZE, auto_augment=None), 0.5)):  # fmt: skip
        flipped = np.mean([left > right for left, right in views(transform)])
        assert flipped == 0.0 if share == 0.0 else abs(flipped - share) < 0.1
    image = Image.new("RGB", (200, 100))
    crops = [Crop.draw(image, np.random.default_rng(seed)) for seed in range(400)]
    areas = np.array([crop.height * crop.width / 20000 for crop in crops])
    aspects = np.array([crop.width / crop.height for crop in crops])
    assert 0.19 < areas.min() < 0.25 and areas.max() <= 0.75 and 0.74 < aspects.min() < aspects.max() < 1.35
    assert all(crop.top + crop.height <= 100 and crop.left + crop.width <= 200 for crop in crops)


# ---- sources -----------------------------------------------------------------------------------------------------
@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Six PNG files' bytes, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoded = []
    for i in range(6):
        file = io.BytesIO()
        Image.new("L", (8 + i, 8), i).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded


def contents(source):
    """(width, value of the first pixel, target) of each sample, of a source that was pickled, as for a worker."""
    source = pickle.loads(pickle.dumps(source))
    samples = [source[i] for i in range(len(source))]
    return [(image.width, image.getpixel((0, 0))[0], target) for image, target in samples]


def write_folders(root, pictures, classes=("cat", "dog")):
    for i, picture in enumerate(pictures):
        place = root / classes[i % len(classes)] / "deep" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture)


def test_folders(tmp_path, pictures):
    write_folders(tmp_path / "data" / "train", pictures)
    write_folders(tmp_path / "data" / "val", pictures[:2])
    source = open_source(str(tmp_path / "data"))
    assert source.classes == ["cat", "dog"] and source.name(0).endswith("train/cat/deep/0.png")
    expected = [(8, 0, 0), (10, 2, 0), (12, 4, 0), (9, 1, 1), (11, 3, 1), (13, 5, 1)]
    assert contents(source) == expected == contents(open_source(f"folder:{tmp_path}/data/train", "val"))
    assert len(open_source(str(tmp_path / "data"), "validation")) == 2
    with pytest.raises(ValueError, match="no split 'test', it has train, val"):
        open_source(str(tmp_path / "data"), "test")
    flat = open_source(str(tmp_path / "data" / "train" / "cat" / "deep"))
    assert flat.classes is None and contents(flat) == [(8, 0, None), (10, 2, None), (12, 4, None)]


def test_a_class_may_be_called_train(tmp_path, pictures):
    write_folders(tmp_path / "vehicles", pictures, ("bus", "train"))
    assert open_source(str(tmp_path / "vehicles")).classes == ["bus", "train"]


def write_shard(path, pictures, start=0, **targets):
    """A shard with a sample for each picture; `targets` maps an extension to the text of each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, picture in enumerate(pictures):
            members = {"png": picture, **{name: texts[i].encode() for name, texts in targets.items()}}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"a.folder/{start + i:05}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_shards(tmp_path, pictures):
    write_shard(tmp_path / "x-train-000.tar", pictures[:4], cls=list("0101"), json=["{}"] * 4)
    write_shard(tmp_path / "x-train-001.tar", pictures[4:], 4, cls=list("23"))
    write_shard(tmp_path / "x-val-000.tar", pictures[:1], txt=["a cat"])
    (tmp_path / "classnames.txt").write_text("a\nb\nc\nd\n")
    expected = [(8 + i, i, target) for i, target in enumerate((0, 1, 0, 1, 2, 3))]
    for _ in range(2):  # the second time from the kept index
        source = open_source(str(tmp_path))
        assert contents(source) == expected
        assert contents(open_source(f"wds:{tmp_path}/x-train-{{000..001}}.tar")) == expected
    assert source.classes == list("abcd") and source.name(5) == f"{tmp_path}/x-train-001.tar:a.folder/00005"
    assert contents(open_source(str(tmp_path), "val")) == [(8, 0, "a cat")]
    write_shard(tmp_path / "x-val-000.tar", pictures[2:4], json=['{"captions": ["x", "y"]}', '{"label": 7}'])
    assert contents(open_source(str(tmp_path), "val")) == [(10, 2, ["x", "y"]), (11, 3, 7)]
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards are missing, the first is .*-002\.tar"):
        open_source(f"{tmp_path}/x-train-{{000..002}}.tar")


def test_damaged_shards_are_named(tmp_path, pictures):
    write_shard(tmp_path / "a.tar", [np.random.default_rng(0).bytes(5000)] * 3)
    whole = (tmp_path / "a.tar").read_bytes()
    for length in (7000, 100):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.tar is not a whole, uncompressed tar file"):
            open_source(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"a\.tar is not a whole, uncompressed tar file"):
        open_source(str(tmp_path / "a.tar"))


def test_hugging_face_datasets(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": picture, "path": None} for picture in pictures], "label": [0, 1] * 3, "id": [9] * 6}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "id": datasets.Value("int64")}
    )
    data = datasets.Dataset.from_dict(columns, features)
    data.save_to_disk(str(tmp_path / "one"))
    source = open_source(str(tmp_path / "one"))
    assert source.classes == ["cat", "dog"] and contents(source) == [(8 + i, i, i % 2) for i in range(6)]
    captions = data.remove_columns("label").add_column("caption", [f"picture {i}" for i in range(6)])
    datasets.DatasetDict(train=data, validation=captions).save_to_disk(str(tmp_path / "two"))
    assert contents(open_source(str(tmp_path / "two"), "val"))[1] == (9, 1, "picture 1")
    with pytest.raises(ValueError, match="no split 'test'"):
        open_source(f"hf:{tmp_path}/two", "test")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data at .*give 'digits', a folder"):
        open_source(str(tmp_path / "nothing"))
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match="no image in"):
        open_source(str(tmp_path))


def test_digits():
    train, val = open_source("digits"), open_source("digits", "val")
    assert (len(train), len(val)) == (1437, 360)
    assert val[0][0].size == (8, 8) and {val[i][1] for i in range(len(val))} == set(range(10))
    held_out = {val[i][0].tobytes() for i in range(len(val))}
    assert not held_out & {train[i][0].tobytes() for i in range(len(train))}
