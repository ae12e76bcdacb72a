"""A teacher's patch features on disk, written once and read by every pre-training run.

    cache.json                          what the features are of: teacher, data, crops, layout
    crop-0000/00000000.safetensors      the samples 0 ... shard_size - 1 of the data, seen through their first crop

A shard holds, for each of its samples, the features (P, C) in bfloat16, or in float8 (e4m3) with one float32 scale a
patch, the crop, what the image was (name and size), and a checksum of all this. Shards are written whole or not at all.
Reading a sample verifies it, so that no damage reaches training; writing again verifies every shard and redoes what is
missing or damaged.

What rounding costs, as 1 - cos between stored and true features of a patch, mean over 2,000: bfloat16 1.4e-6, float8
3.5e-4 (normal features and those of a CLIP tower alike; largest 5.1e-4, with four channels fifty times the others).
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eva02.data.loader import sample_rng
from eva02.data.sources import Source
from eva02.data.transforms import Crop, TeacherView
from eva02.files import atomic_file
from eva02.teacher import Teacher

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_FORMAT = 1


class CacheError(ValueError):
    """A cache that is incomplete, damaged, or of other data."""


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache holds: the content of `cache.json`."""

    teacher: str
    """Name and fingerprint of the teacher."""
    samples: int
    crops: int
    """Views of each sample: training epoch e reads view e % crops."""
    patches: int
    channels: int
    img_size: tuple[int, int]
    """Height and width of the views, in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    seed: int = 0
    dtype: str = "bf16"
    shard_size: int = 1024
    hflip: float = 0.5
    """Probability with which a view is of the mirrored image."""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        for name in ("samples", "crops", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def shards(self) -> list[tuple[int, range]]:
        """View and samples of every shard."""
        starts = range(0, self.samples, self.shard_size)
        spans = [range(start, min(start + self.shard_size, self.samples)) for start in starts]
        return [(crop, span) for crop in range(self.crops) for span in spans]

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample's features and scales."""
        return self.patches * (2 * self.channels if self.dtype == "bf16" else self.channels + 4)

    def shard_path(self, root: Path, crop: int, start: int) -> Path:
        return root / f"crop-{crop:04}" / f"{start // self.shard_size:08}.safetensors"

    def tensors(self, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of a shard of `count` samples."""
        layout = {
            "features": (_DTYPES[self.dtype], (count, self.patches, self.channels)),
            "crop": (torch.int64, (count, len(Crop._fields))),  # of zero height: the image could not be read
            "image": (torch.int64, (count, 3)),  # checksum of the name, width, height
            "checksum": (torch.int64, (count,)),
        }
        return layout | ({"scale": (torch.float32, (count, self.patches))} if self.dtype == "fp8" else {})

    def save(self, path: Path) -> None:
        fields = {"format": _FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(fields)
        with atomic_file(path) as file:
            file.write(json.dumps({**fields, "checksum": zlib.crc32(text.encode())}, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> CacheSpec:
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            checksum, version = fields.pop("checksum"), fields["format"]
            whole = zlib.crc32(json.dumps(fields).encode()) == checksum
        except FileNotFoundError:
            raise FileNotFoundError(f"no teacher cache at {path.parent}: it has no {path.name}") from None
        except (ValueError, KeyError, AttributeError) as error:
            raise CacheError(f"{path} is damaged: {error}") from error
        if not whole:
            raise CacheError(f"{path} is damaged: its checksum does not match")
        if version != _FORMAT:
            raise CacheError(f"{path} has format {version}, expected {_FORMAT}")
        del fields["format"]
        return cls(**{**fields, "img_size": tuple(fields["img_size"]), "scale": tuple(fields["scale"])})


# ---- encoding ----------------------------------------------------------------------------------------------------
def encode(features: Tensor, dtype: str) -> dict[str, Tensor]:
    """Features (..., C) as they are stored: rounded once to bfloat16, or to float8 after division by the scale that
    brings each patch's largest value to the format's largest."""
    if dtype == "bf16":
        return {"features": features.bfloat16()}
    features = features.float()
    scale = features.abs().amax(-1) / _FP8_MAX
    scaled = features / torch.where(scale > 0, scale, 1.0)[..., None]
    return {"features": scaled.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), "scale": scale}


def decode(stored: dict[str, Tensor]) -> Tensor:
    """Features in bfloat16."""
    features = stored["features"]
    return features if "scale" not in stored else (features.float() * stored["scale"][..., None]).bfloat16()


def _checksum(sample: dict[str, Tensor]) -> int:
    """CRC-32 of a sample's tensors but the checksum, in the order of their names."""
    value = 0
    for name in sorted(sample):
        if name != "checksum":
            value = zlib.crc32(sample[name].reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value


def _image_facts(source: Source, index: int, size: tuple[int, int]) -> list[int]:
    """What tells whether a cache's image is the data's: its name, without folders, and its size (width, height)."""
    return [zlib.crc32(os.path.basename(source.name(index)).encode()), *size]


# ---- verifying ---------------------------------------------------------------------------------------------------
def _read_rows(path: Path, spec: CacheSpec, count: int, rows: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """The stored tensors of some samples of a shard, verified. Raises CacheError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            layout = {name: file.get_slice(name) for name in names}
            expected = spec.tensors(count)
            if {name: tuple(part.get_shape()) for name, part in layout.items()} != {
                name: shape for name, (_, shape) in expected.items()
            }:
                raise CacheError(f"{path} is damaged: it does not hold what a shard holds")
            for row in rows:
                sample = {name: part[row] for name, part in layout.items()}
                if any(sample[name].dtype != dtype for name, (dtype, _) in expected.items()):
                    raise CacheError(f"{path} is damaged: it does not hold what a shard holds")
                if _checksum(sample) != int(sample["checksum"]):
                    raise CacheError(f"{path} is damaged: the checksum of its sample {row} does not match")
                yield sample
    except FileNotFoundError:
        raise CacheError(f"{path} is missing") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CacheError(f"{path} is damaged: {error}") from error


def damage(root: Path, spec: CacheSpec, shard: tuple[int, range]) -> str | None:
    """What is wrong with a shard, after reading all of it; None for nothing."""
    crop, span = shard
    try:
        for _ in _read_rows(spec.shard_path(root, crop, span.start), spec, len(span), range(len(span))):
            pass
    except CacheError as error:
        return str(error)
    return None


# ---- writing -----------------------------------------------------------------------------------------------------
class _Views(Dataset[Any]):
    """Crops of (view, index) pairs, with what the cache keeps of them; of a bad image a black one of zero height."""

    def __init__(self, source: Source, spec: CacheSpec) -> None:
        self.source, self.spec = source, spec

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, tuple[str, str]]:
        view, index = key
        spec = self.spec
        try:
            image, _ = self.source[index]
        except Exception as error:  # a damaged file can raise anything in a decoder
            facts = _image_facts(self.source, index, (0, 0))
            nothing = torch.zeros(len(Crop._fields), dtype=torch.int64)
            bad = f"{type(error).__name__}: {error}"
            return torch.zeros(3, *spec.img_size), nothing, torch.tensor(facts), (self.source.name(index), bad)
        crop = Crop.draw(image, sample_rng(spec.seed, view, index).spawn(2)[0], spec.scale, hflip=spec.hflip)
        facts = _image_facts(self.source, index, image.size)
        return crop.apply(image, spec.img_size), torch.tensor([int(x) for x in crop]), torch.tensor(facts), ("", "")


class CacheWriter:
    """Writes a teacher's features of a data set, or what is missing of them.

    Args:
        root: the cache's folder, made where it does not exist.
        source, teacher: images, and who looks at them.
        crops, scale, hflip, seed, dtype, shard_size: see `CacheSpec`. `scale`, `hflip` and `seed` are those of the
            training run whose crops these are to be.
        rank, world_size: this process writes every world_size-th shard.

    Raises:
        CacheError: `root` holds a cache of something else.
    """

    def __init__(
        self,
        root: str | Path,
        source: Source,
        teacher: Teacher,
        *,
        crops: int = 1,
        scale: tuple[float, float] = (0.2, 1.0),
        hflip: float = 0.5,
        seed: int = 0,
        dtype: str = "bf16",
        shard_size: int = 1024,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.root, self.source, self.teacher = Path(root), source, teacher
        device = next(teacher.parameters()).device
        patches = teacher(torch.zeros(1, 3, *teacher.img_size, device=device)).shape[1]
        self.spec = CacheSpec(
            teacher=f"{teacher.name} {teacher.fingerprint()}",
            samples=len(source),
            crops=crops,
            patches=patches,
            channels=teacher.dim,
            img_size=teacher.img_size,
            scale=scale,
            hflip=hflip,
            seed=seed,
            dtype=dtype,
            shard_size=shard_size,
        )
        self.rank, self.world_size = rank, world_size
        self._claim()

    def _claim(self) -> None:
        """Make `root` this cache's, or find that it already is."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / "cache.json"
        if not path.exists():
            self.spec.save(path)
        there, mine = (dataclasses.asdict(spec) for spec in (CacheSpec.load(path), self.spec))
        differing = [f"{name} is {there[name]}, asked for {mine[name]}" for name in mine if there[name] != mine[name]]
        if differing:
            raise CacheError(f"{self.root} holds another cache: {'; '.join(differing)}")

    @property
    def shards(self) -> list[tuple[int, range]]:
        """View and samples of this process's shards."""
        return self.spec.shards[self.rank :: self.world_size]

    def pending(self, shards: Iterable[tuple[int, range]] | None = None) -> Iterator[tuple[tuple[int, range], str]]:
        """Those of some shards (all of this process's) that have to be written, and why. Reads the others whole."""
        for shard in self.shards if shards is None else shards:
            reason = damage(self.root, self.spec, shard)
            if reason is not None:
                yield shard, reason

    def write(
        self, pending: Sequence[tuple[int, range]], *, batch_size: int = 64, num_workers: int = 0
    ) -> Iterator[tuple[int, list[tuple[str, str]]]]:
        """Write shards; yields, after each batch, how many images it had, and name and error of those that cannot be
        read. These get no features, and their samples are errors when they are read."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        batches = [
            [(crop, index) for index in span[start : start + batch_size]]
            for crop, span in pending
            for start in range(0, len(span), batch_size)
        ]
        loader: DataLoader[Any] = DataLoader(
            _Views(self.source, self.spec),
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        stream = iter(loader)
        device = next(self.teacher.parameters()).device
        for crop, span in pending:
            parts: list[dict[str, Tensor]] = []
            for _ in range(0, len(span), batch_size):
                images, crops, facts, bad = next(stream)
                features = self.teacher(images.to(device, non_blocking=True))
                if not features.isfinite().all():
                    raise ValueError(f"the teacher's features are not finite in {features.dtype}; try another dtype")
                stored = {key: value.cpu() for key, value in encode(features, self.spec.dtype).items()}
                parts.append({**stored, "crop": crops, "image": facts})
                yield len(images), [(name, error) for name, error in zip(*bad, strict=True) if error]
            self._write_shard(crop, span, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _write_shard(self, crop: int, span: range, tensors: dict[str, Tensor]) -> None:
        rows = [{name: value[row] for name, value in tensors.items()} for row in range(len(span))]
        tensors["checksum"] = torch.tensor([_checksum(row) for row in rows])
        path = self.spec.shard_path(self.root, crop, span.start)
        path.parent.mkdir(exist_ok=True)
        for abandoned in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it wrote
            abandoned.unlink()
        with atomic_file(path) as file:
            file.write(safetensors.torch.save(tensors))


# ---- reading -----------------------------------------------------------------------------------------------------
class TeacherCache:
    """A source of the same samples whose targets are `TeacherView`s: the crop that the teacher saw and its features, in
    bfloat16. `TrainLoader` reads view `epoch % crops`.

    Args:
        root: the cache's folder.
        source: the data that it was written from.

    Raises:
        CacheError: shards are missing or too small, or the cache is of other data. Damage inside a shard is an error of
            the sample that is read.
    """

    def __init__(self, root: str | Path, source: Source, view: int = 0) -> None:
        self.root, self.source, self.view = Path(root), source, view
        self.classes = source.classes
        self.spec = CacheSpec.load(self.root / "cache.json")
        if len(source) != self.spec.samples:
            raise CacheError(f"{self.root} is of {self.spec.samples} samples, the data has {len(source)}")
        self._check_files()

    def _check_files(self) -> None:
        problems = []
        for crop, span in self.spec.shards:
            path = self.spec.shard_path(self.root, crop, span.start)
            if not path.exists():
                problems.append(f"{path} is missing")
            elif path.stat().st_size < len(span) * self.spec.sample_bytes:
                problems.append(f"{path} is truncated")
        if problems:
            raise CacheError(
                f"{len(problems)} of {len(self.spec.shards)} shards cannot be used, the first: {problems[0]}; "
                "'eva02 features' with the same arguments writes them"
            )

    def at(self, epoch: int) -> TeacherCache:
        """The view that a training epoch reads."""
        cache = object.__new__(TeacherCache)  # the files were checked
        cache.__dict__.update(self.__dict__, view=epoch % self.spec.crops)
        return cache

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, TeacherView]:
        spec = self.spec
        start = index - index % spec.shard_size
        count = min(spec.shard_size, spec.samples - start)
        path = spec.shard_path(self.root, self.view, start)
        (stored,) = _read_rows(path, spec, count, [index - start])
        crop = Crop(*stored["crop"].tolist())
        if crop.height == 0:
            raise CacheError(f"{path}: the image could not be read when the cache was written")
        image, _ = self.source[index]
        facts = _image_facts(self.source, index, image.size)
        if facts != stored["image"].tolist():
            raise CacheError(f"{path} is of another image than {self.source.name(index)} of {image.size}")
        return image, TeacherView(crop._replace(flip=bool(crop.flip)), decode(stored))

    def name(self, index: int) -> str:
        return self.source.name(index)
