from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import eva02
from eva02.cli import main
from eva02.data import ArraySource, BlockMask, MimTransform, TrainLoader
from eva02.teacher import Teacher, create_teacher
from eva02.teacher_cache import CacheError, CacheSpec, CacheWriter, TeacherCache, damage, decode, encode

TINY = "eva02_tiny_patch14_224"


# ---- teachers ----------------------------------------------------------------------------------------------------
def timm_tower(**options):
    timm = pytest.importorskip("timm")
    return timm.create_model("eva02_base_patch16_clip_224", depth=1, embed_dim=64, num_heads=2, img_size=32, **options)


def our_tower():
    return eva02.create_model(TINY, depth=1, img_size=32, patch_size=16, num_classes=24, global_pool="token")


def our_tower_that_averages():
    return eva02.create_model(TINY, depth=1, img_size=32, patch_size=16, num_classes=24)


def open_clip_tower():
    transformer = pytest.importorskip("open_clip.transformer")
    return transformer.VisionTransformer(32, 16, 64, 2, 2, 4.0, output_dim=24)


def transformers_tower():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 24, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    return transformers.CLIPVisionModelWithProjection(config)


def trunk_behind_a_projection():
    """open_clip's adapter: a timm trunk without a classifier, and a projection of its own."""
    adapter = nn.Module()
    adapter.trunk = timm_tower(num_classes=0)
    adapter.head = nn.Linear(64, 24)
    adapter.forward = lambda images: adapter.head(adapter.trunk(images))
    return adapter


OURS = [our_tower, our_tower_that_averages]
TOWERS = [timm_tower, *OURS, open_clip_tower, transformers_tower, trunk_behind_a_projection]


@pytest.mark.parametrize("make", TOWERS)
def test_patches_take_the_class_tokens_way(make):
    """A tower's own output is its class token through the last norm and the projection. With every token of the last
    block made equal to one patch's, that output has to be this patch's feature."""
    torch.manual_seed(0)
    tower = make().eval()
    for parameter in tower.parameters():  # a head of zeros, or norms of ones, would hide a mistake
        nn.init.normal_(parameter, std=0.2)
    teacher = Teacher(tower)
    images = torch.randn(2, 3, 32, 32)
    features = teacher(images)
    assert features.shape == (2, 4, teacher.dim) and teacher.img_size == (32, 32) and not features.requires_grad

    last = ("blocks.0", "resblocks.1", "layers.1")
    *_, block = (module for name, module in tower.named_modules() if name.endswith(last))

    def pooled():
        if hasattr(tower, "forward_head"):  # our forward computes the class token alone in the last block
            return tower.forward_head(tower.forward_features(images))
        return tower(images)

    for patch in range(4):

        def only(module, arguments, output, patch=patch):
            tokens = output[0] if isinstance(output, tuple) else output
            tokens = tokens[:, 1 + patch : 2 + patch].expand_as(tokens)
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        handle = block.register_forward_hook(only)
        with torch.no_grad():
            output = pooled()
        handle.remove()
        expected = output.image_embeds if hasattr(output, "image_embeds") else output
        torch.testing.assert_close(features[:, patch], expected, rtol=1e-4, atol=1e-5)


def test_teachers_are_frozen():
    teacher = Teacher(our_tower())
    assert not teacher.train().tower.training and not any(p.requires_grad for p in teacher.parameters())


def test_teachers_by_name(tmp_path):
    options = {"img_size": 28}
    first, second = (create_teacher(TINY, "random", **options) for _ in range(2))
    assert first.fingerprint() == second.fingerprint() and first.dim == 192
    model = eva02.create_model(TINY, img_size=28)
    eva02.save_checkpoint(model, tmp_path / "tiny.safetensors")
    loaded = create_teacher(TINY, str(tmp_path / "tiny.safetensors"), **options)
    assert loaded.fingerprint() != first.fingerprint()
    images = torch.randn(1, 3, 28, 28)
    through_timm = create_teacher(f"timm:{TINY}", str(tmp_path / "tiny.safetensors"), dtype=torch.float32, **options)
    torch.testing.assert_close(loaded(images), through_timm(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"the checkpoint of the teacher .* is needed, or 'random'"):
        create_teacher(TINY)
    with pytest.raises(FileNotFoundError, match="no checkpoint of the teacher at nowhere"):
        create_teacher(TINY, "nowhere")
    with pytest.raises(ValueError, match=r"the teacher timm:eva03 with random: Unknown model"):
        create_teacher("timm:eva03", "random")
    with pytest.raises(ValueError, match="unknown library 'jax'"):
        create_teacher("jax:vit", "random")


def test_our_clip_towers_teach(tmp_path):
    """EVA-02's teacher by its name, cut down: the vision tower out of a file of both towers."""
    model = eva02.clip.create_model("EVA02-CLIP-B-16", depth=1, img_size=32, text={"depth": 1})
    eva02.save_checkpoint(model, tmp_path / "clip.safetensors")
    whole = eva02.clip.clip_config("EVA01-CLIP-g-14").vision
    assert (whole.num_classes, whole.grid) == (1024, (16, 16))
    tower = eva02.Eva02(model.config.vision)
    eva02.load_checkpoint(tower, tmp_path / "clip.safetensors")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(Teacher(tower)(images), Teacher(model)(images)) and Teacher(tower).dim == 512


def test_what_is_no_teacher_is_refused():
    with pytest.raises(TypeError, match="Linear is no vision tower that is known here"):
        Teacher(nn.Linear(2, 2))
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"the tower wants images of mean \(0.5, 0.5, 0.5\)"):
        Teacher(timm.create_model("vit_tiny_patch16_224", depth=1))


# ---- storage -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "angle"), [("bf16", 4e-6), ("fp8", 5e-4)])
def test_rounding_of_stored_features(dtype, angle):
    """Measured as 1 - cos, which is what the loss sees; a patch may be 1e4 times another, and zero."""
    torch.manual_seed(0)
    features = torch.randn(64, 1024) * torch.logspace(-2, 2, 64)[:, None]
    features[5] = 0
    back = decode(encode(features, dtype)).float()
    assert back[5].abs().max() == 0
    cosine = nn.functional.cosine_similarity(back, features, dim=-1)
    cosine[5] = 1
    assert 1 - cosine.min() < angle
    assert (back - features).norm() < (0.003 if dtype == "bf16" else 0.03) * features.norm()


class Toy(nn.Module):
    """A tower of 2 x 2 patches that takes a while, so that a kill falls into its work."""

    img_size, dim = (8, 8), 6

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3 * 6).view(3, 6))
        self.delay = delay

    def patch_features(self, images):
        time.sleep(self.delay)
        return nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2) @ self.weight


def source_of(count: int = 22, seed: int = 0) -> ArraySource:
    return ArraySource(np.random.default_rng(seed).integers(0, 255, (count, 12, 10, 3), dtype=np.uint8))


def write(root, source=None, delay=0.0, **options):
    options = {"crops": 2, "shard_size": 8, "seed": 3, **options}
    writer = CacheWriter(root, source or source_of(), Teacher(Toy(delay), "toy"), **options)
    pending = [shard for shard, _ in writer.pending()]
    bad = [name for _, names in writer.write(pending, batch_size=3) for name in names]
    return pending, bad


def shards_of(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}


TRANSFORM = MimTransform((8, 8), BlockMask.for_grid((2, 2)))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_training_from_a_cache_is_training_with_the_teacher(tmp_path, dtype):
    source = source_of()
    write(tmp_path, source, dtype=dtype)
    teacher = Teacher(Toy())
    live = iter(TrainLoader(source, TRANSFORM, 11, seed=3))
    cached = iter(TrainLoader(TeacherCache(tmp_path, source), TRANSFORM, 11, seed=3))
    for step in range(6):  # three epochs over two views
        expected, batch = next(live), next(cached)
        assert torch.equal(batch["index"], expected["index"]) and torch.equal(batch["mask"], expected["mask"])
        assert torch.equal(batch["image"], expected["image"]) == (step < 4)
        torch.testing.assert_close(batch["teacher"], decode(encode(teacher(batch["image"]), dtype)))


def test_nothing_is_written_twice(tmp_path):
    pending, _ = write(tmp_path)
    assert len(pending) == 6
    before = shards_of(tmp_path)
    assert write(tmp_path)[0] == [] and shards_of(tmp_path) == before


def test_processes_share_the_shards(tmp_path):
    write(tmp_path / "one")
    parts = [write(tmp_path / "two", rank=rank, world_size=2)[0] for rank in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")


def test_any_flipped_byte_is_found_and_redone(tmp_path):
    """Every 37th byte of a shard: header, features, scales, crops, checksums. Bytes of the header that change nothing
    (blanks that pad it) may pass."""
    write(tmp_path, dtype="fp8")
    before = shards_of(tmp_path)
    cache = TeacherCache(tmp_path, source_of())
    path = tmp_path / "crop-0000" / "00000001.safetensors"
    whole = path.read_bytes()
    expected = [cache[index] for index in range(8, 16)]
    for position in range(0, len(whole), 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        problem = damage(tmp_path, cache.spec, (0, range(8, 16)))
        if problem is None:  # then nothing that is read may differ
            for index, (image, view) in zip(range(8, 16), expected, strict=True):
                again, other = cache[index]
                assert again == image and other.crop == view.crop and torch.equal(other.features, view.features)
            continue
        assert "00000001.safetensors is damaged" in problem
    path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    loader = TrainLoader(cache, TRANSFORM, 11, max_bad_images=0)
    with pytest.raises(ValueError, match=r"00000001\.safetensors is damaged: the checksum of its sample"):
        for _ in zip(range(2), loader, strict=False):
            pass
    assert [span.start for _, span in write(tmp_path, dtype="fp8")[0]] == [8]
    assert shards_of(tmp_path) == before


@pytest.mark.parametrize("length", [0, 5, 700, -1])
def test_truncated_and_missing_shards_are_found_and_redone(tmp_path, length):
    write(tmp_path)
    before = shards_of(tmp_path)
    path = tmp_path / "crop-0001" / "00000002.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    (tmp_path / "crop-0000" / "00000000.safetensors").unlink()
    with pytest.raises(CacheError, match=r"of 6 shards cannot be used, the first: .*00000000\.safetensors is missing"):
        TeacherCache(tmp_path, source_of())
    assert [(crop, span.start) for crop, span in write(tmp_path)[0]] == [(0, 0), (1, 16)]
    assert shards_of(tmp_path) == before


def test_caches_belong_to_their_data(tmp_path):
    write(tmp_path)
    with pytest.raises(CacheError, match="is of 22 samples, the data has 21"):
        TeacherCache(tmp_path, source_of(21))
    with pytest.raises(CacheError, match="holds another cache: seed is 3, asked for 4"):
        write(tmp_path, seed=4)
    other = source_of()
    other.images = other.images[:, :11]
    with pytest.raises(CacheError, match="is of another image than image 0"):
        TeacherCache(tmp_path, other)[0]
    text = (tmp_path / "cache.json").read_text()
    (tmp_path / "cache.json").write_text(text.replace('"seed": 3', '"seed": 5'))
    with pytest.raises(CacheError, match="its checksum does not match"):
        TeacherCache(tmp_path, source_of())
    with pytest.raises(FileNotFoundError, match="no teacher cache at"):
        TeacherCache(tmp_path / "nowhere", source_of())


def test_unreadable_images_have_no_features(tmp_path):
    class Damaged(ArraySource):
        def __getitem__(self, index):
            if index == 9:
                raise OSError("truncated")
            return super().__getitem__(index)

    source = Damaged(source_of().images)
    assert write(tmp_path, source)[1] == [("image 9", "OSError: truncated")] * 2
    loader = TrainLoader(TeacherCache(tmp_path, source), TRANSFORM, 11)
    indices = torch.cat([batch["index"] for _, batch in zip(range(4), loader, strict=False)])
    assert 9 not in indices.tolist() and len(indices) == 44 and list(loader.bad) == ["image 9"]


def test_features_that_are_not_finite_are_not_written(tmp_path):
    teacher = Teacher(Toy(), "toy")
    writer = CacheWriter(tmp_path, source_of(), teacher)
    teacher.tower.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"not finite in torch\.float32"):
        list(writer.write(writer.shards))
    assert not shards_of(tmp_path)


# ---- accidents ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["short", "late"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, how):
    """The disk fills while a shard is written (a limit on the size of files), or as it is flushed (ENOSPC)."""
    write(tmp_path / "whole")
    source = source_of()
    write(tmp_path / "cache", ArraySource(source.images[:22]), crops=2)
    lost = tmp_path / "cache" / "crop-0001" / "00000001.safetensors"
    lost.unlink()
    before = shards_of(tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "late":
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"disk full|File too large"):
            write(tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert shards_of(tmp_path / "cache") == before
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    monkeypatch.undo()
    write(tmp_path / "cache")
    assert shards_of(tmp_path / "cache") == shards_of(tmp_path / "whole")


_VICTIM = """
import os, resource, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_teacher import write
import torch

torch.set_num_threads(1)
for line in sys.stdin:  # one child, to be killed, for each line
    child = os.fork()
    if child == 0:
        if line.strip():  # the system kills it as it writes this byte of a file
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(line), int(line)))
        write(Path({root!r}), delay=0.01)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def survive_kills(tmp_path: Path, kills: int, seed: int) -> None:
    """Kill a writer at `kills` random moments of its work, and at as many random bytes of a file that it writes; then
    the cache has to be what it is without kills."""
    write(tmp_path / "whole")
    expected = shards_of(tmp_path / "whole")
    root = tmp_path / "cache"
    program = _VICTIM.format(tests=str(Path(__file__).parent), root=str(root))
    rng = np.random.default_rng(seed)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as victim:
        for kill in range(2 * kills):
            if kill % 6 == 0:  # else what the last one left is continued
                for path in root.rglob("*.safetensors"):
                    path.unlink()
            by_system = kill % 2 == 1
            victim.stdin.write(f"{rng.integers(1, min(map(len, expected.values())))}\n" if by_system else "\n")
            victim.stdin.flush()
            child = int(victim.stdout.readline())
            if not by_system:
                time.sleep(rng.uniform(0, 0.6))
                os.kill(child, signal.SIGKILL)
            assert victim.stdout.readline() == "gone\n"
            for name, content in shards_of(root).items():  # whatever stands there is whole
                assert content == expected[name]
        victim.stdin.close()
    write(root)
    assert shards_of(root) == expected
    assert not list(root.rglob("*.safetensors.*.tmp"))


def test_killed_writers(tmp_path):
    survive_kills(tmp_path, 5, seed=0)


@pytest.mark.full
def test_killed_writers_often(tmp_path):
    survive_kills(tmp_path, 50, seed=1)


def test_a_run_teaches_through_a_cache_as_without(tmp_path, capsys):
    """Fine-tune, evaluate the run, write its features, pre-train from them: losses are those of the live teacher."""
    pytest.importorskip("sklearn")
    run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    short = ["--batch-size", "32", "--set", "run.tensorboard=false", "--set", "run.profile_peak=false"]
    short += ["--set", "run.log_every=1", "--set", "data.val=none", "--set", "model.depth=1"]
    assert main(["finetune", "--preset", "eva02_digits", *short, "--steps", "2", "--output", run]) == 0
    assert main(["evaluate", "digits", "--model", run]) == 0
    assert "    360 " in capsys.readouterr().out.splitlines()[-1]
    views = ["--seed", "5", "--scale", "0.5", "--hflip", "0", "--crops", "1"]
    assert main(["features", "digits", "--model", run, "--out", cache, "--batch-size", "64", *views]) == 0
    losses = {}
    for name, source in (("live", ["--teacher", run]), ("cached", ["--teacher-cache", cache])):
        output = str(tmp_path / name)
        arguments = [*short, "--steps", "4", "--seed", "5", "--output", output, *source]
        assert main(["pretrain", "--preset", "eva02_digits_mim", *arguments]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "lr" in line]
    assert len(losses["live"]) == 4
    assert losses["cached"] == pytest.approx(losses["live"], abs=2e-4)  # the cache rounds to bfloat16


# ---- command -----------------------------------------------------------------------------------------------------
def test_features_command_writes_a_cache(tmp_path, capsys):
    from PIL import Image

    (tmp_path / "data" / "cat").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(
            tmp_path / "data" / "cat" / f"{i}.png"
        )
    (tmp_path / "data" / "cat" / "5.png").write_bytes(b"no image")
    arguments = ["features", str(tmp_path / "data"), "--model", TINY, "--checkpoint", "random", "--img-size", "28"]
    arguments += ["--out", str(tmp_path / "cache"), "--store", "fp8", "--crops", "2", "--shard-size", "4"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "4 of 4 shards to write, 12 crops" in out and "6 samples x 2 crops, 4 patches of 192 channels" in out
    assert "skipped" in out and "cannot identify image file" in out
    spec = CacheSpec.load(tmp_path / "cache" / "cache.json")
    assert dataclasses.asdict(spec)["dtype"] == "fp8" and spec.teacher.startswith(TINY)
    shard = tmp_path / "cache" / "crop-0001" / "00000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(arguments) == 0
    out = capsys.readouterr().out.replace("\n", "")
    assert "1 of 4 shards to write" in out and "00000000.safetensors is damaged" in out and "it is written again" in out
    assert main(arguments) == 0
    assert "0 of 4 shards to write" in capsys.readouterr().out
    assert main([*arguments[:-1], "8"]) == 1
    assert "shard_size is 4, asked for 8" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "other"), "--max-bad-images", "0"]) == 1
    assert "1 images could not be read, 0 are allowed" in capsys.readouterr().err


def test_what_is_not_installed_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert main(["features", "digits", "--model", TINY, "--checkpoint", "random", "--out", "cache"]) == 1
    message = capsys.readouterr().err
    assert "rich.progress" in message and "pip install 'eva02-kernels[train]'" in message
