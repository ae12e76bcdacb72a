"""``python -m benchmarks.kernels``: every Triton kernel as compiled, without a GPU, beside a checked-in budget."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import eva02_kernels
from eva02_kernels import _launch, _library, _registry, _triton, rope_2d
from eva02_kernels._registry import OP_NAMES, get_spec
from eva02_kernels.bench.report import number, print_table
from eva02_kernels.bench.shapes import SHAPES, Shape
from eva02_kernels.rope import RopeTable
from eva02_kernels.testing.offline import ARCHITECTURES, Kernel, compiling

BUDGET = Path(__file__).parent / "results" / "kernels.json"
QUICK_ARCHITECTURES = (80, 90)
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,  # float32 where torch.backends.cuda.matmul.fp32_precision allows it
}
MAX_RATIO = 1.05
"""Bytes that a row kernel may move over the operator's minimum."""

EXCEPTIONS = {
    "mask_tokens bwd": "a float32 partial sum of the position embedding for 32 samples, 1/16 of what these move in 16 "
    "bits; with one for 64 there would be hardly a program for a multiprocessor",
}
"""Operators and directions that may move more, and why."""

DESCRIPTION = """\
Compile every Triton kernel for GPUs that need not be there, and show what became of it: registers, spilled registers,
shared memory, occupancy, width of global accesses, kind of matrix instruction, and for kernels over rows the bytes they
move over the operator's minimum. Every choice that the launch tables can give is compiled, those of the autotuner too.

Nothing is run: these numbers tell what limits a kernel, not how long it takes.

Examples:
  python -m benchmarks.kernels --quick                       what continuous integration checks: 8.0, 9.0, bfloat16
  python -m benchmarks.kernels --arch 90 --ops rope_attention --dtypes bfloat16
  python -m benchmarks.kernels --check                       exit 1 where a kernel got worse than its budget
  python -m benchmarks.kernels --write                       after a change that is worth it: a new budget
"""

EPILOG = f"""\
Columns: choice: place in the launch table (0 is launched without autotuning), blocks, warps and stages. spills: loads
and stores of spilled registers. KiB: shared memory of a block. occupancy: resident threads over those of a
multiprocessor. accesses: instructions that read or write global memory x bytes a thread; numbers of a row (statistics,
indices) are 4 or 8 bytes.
The budget is {BUDGET.relative_to(Path(__file__).parents[1])}. A kernel is worse with more registers, shared memory or
spills, lower occupancy, narrower accesses, another kind of matrix instruction, or more bytes. Registers, shared memory
and accesses are compared only where Triton and ptxas are those of the budget. A row kernel may move {MAX_RATIO} times
the minimum at most.
bfloat16 needs 8.0: on 7.5 float16 stands for it. On 8.0 and later both compile alike, so that the budget has one.
"""

# ---- cases -----------------------------------------------------------------------------------------------------------
# Sizes beyond those that are benchmarked: heads of 88 and 112 channels, an MLP with GELU.
MODELS = {
    **{name: s for name, s in SHAPES.items() if name != "host"},
    "giant": Shape("giant", 1, 1408, 16, 6144, 40, subln=False),
    "enormous": Shape("enormous", 1, 1792, 16, 15360, 64, subln=False),
    "head128": Shape("head128", 1, 1024, 8, 2730, 24, subln=True),
}
TARGET_DIM = 1024  # of the features that EVA-02's pre-training predicts


@dataclass
class Inputs:
    """Uninitialised tensors of a model's sizes; those that train are kept in ``leaves``."""

    shape: Shape
    batch: int
    grid: tuple[int, int]
    dtype: torch.dtype
    leaves: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> int:
        return 1 + self.grid[0] * self.grid[1]

    def tensor(self, *size: int) -> Tensor:
        """An activation or the weight of a product."""
        self.leaves.append(torch.empty(size, dtype=self.dtype, requires_grad=True))
        return self.leaves[-1]

    def parameter(self, *size: int) -> Tensor:
        """float32 beside 16-bit activations, as under autocast."""
        self.leaves.append(torch.empty(size, requires_grad=True))
        return self.leaves[-1]

    def rows(self, width: int | None = None) -> Tensor:
        return self.tensor(self.batch, self.tokens, width or self.shape.dim)

    def norm(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        width = width or self.shape.dim
        return self.parameter(width), self.parameter(width)

    def pre_norm(self) -> tuple[Tensor, Tensor, float]:
        return *self.norm(), 1e-6

    def drop_path(self) -> Tensor:
        return torch.empty(self.batch)

    def picked(self) -> Tensor:
        """(B, K): the class token and half of the patches."""
        return torch.arange(self.tokens // 2 + 1).expand(self.batch, -1).contiguous()

    def heads(self, factor: int = 1, tokens: int | None = None) -> Tensor:
        return self.tensor(self.batch, tokens or self.tokens, factor * self.shape.heads, self.shape.head_dim)

    def rope(self, **options: Any) -> RopeTable:
        return rope_2d(self.grid, self.shape.head_dim, **options)

    def dense_rope(self) -> RopeTable:
        size = (self.grid[0] * self.grid[1], self.shape.head_dim // 2)
        return RopeTable.from_cos_sin(self.parameter(*size), self.parameter(*size), layout="interleaved")


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    models: tuple[str, ...]
    make: Callable[[Inputs], Arguments]
    quick: tuple[str, ...] = ()  # models of --quick
    rows: bool = False  # a kernel over rows: its bytes are compared with the operator's minimum
    variant: bool = False  # compiled in 16 bits only

    def inputs(self, model: str, dtype: torch.dtype, batch: int = 0, grid: tuple[int, int] | None = None) -> Inputs:
        shape = MODELS[model]
        return Inputs(shape, batch or (64 if self.rows else 2), grid or shape.grid, dtype)


def _attention(**options: Any) -> Callable[[Inputs], Arguments]:
    def make(i: Inputs) -> Arguments:
        kwargs = {name: value(i) if callable(value) else value for name, value in options.items()}
        return (i.heads(), i.heads(), i.heads(), i.rope()), kwargs

    return make


def _selected(i: Inputs) -> Arguments:
    patches = i.grid[0] * i.grid[1]
    kept = patches - patches // 2
    keep_idx = torch.arange(kept).expand(i.batch, -1).contiguous()
    q, k, v = (i.heads(tokens=1 + kept) for _ in range(3))
    return (q, k, v, i.rope()), {"keep_idx": keep_idx}


def _sequences(i: Inputs) -> Arguments:
    total = i.batch * i.tokens
    q, k, v = (i.tensor(total, i.shape.heads, i.shape.head_dim) for _ in range(3))
    grids = torch.tensor([i.grid] * i.batch, dtype=torch.int32)
    lengths = torch.arange(0, total + 1, i.tokens, dtype=torch.int32)
    return (q, k, v, rope_2d(grids, i.shape.head_dim, max_grid=i.grid)), {"cu_seqlens": lengths, "max_seqlen": i.tokens}


def _grouped(i: Inputs) -> Arguments:
    key_value = (i.batch, i.tokens, i.shape.heads // 4, i.shape.head_dim)
    return (i.heads(), i.tensor(*key_value), i.tensor(*key_value), i.rope()), {}


def _layer_norm(residual: bool = False, scale: bool = False, drop: bool = False, rms: bool = False) -> Any:
    def make(i: Inputs) -> Arguments:
        weight, bias = i.norm()
        kwargs: dict[str, Any] = {"rms": rms}
        if scale:
            kwargs["layer_scale"] = i.parameter(i.shape.dim)
        if drop:
            kwargs["row_scale"] = i.drop_path()
        return (i.rows(), i.rows() if residual else None, weight, None if rms else bias), kwargs

    return make


def _mask_tokens(i: Inputs) -> Arguments:
    dim, patches = i.shape.dim, i.tokens - 1
    mask = torch.zeros(i.batch, patches, dtype=torch.bool)
    tokens = (i.parameter(dim), i.parameter(i.tokens, dim), i.parameter(1, dim))
    return (i.tensor(i.batch, patches, dim), mask, *tokens), {}


def _cosine(index: bool, *, target_trains: bool = False) -> Callable[[Inputs], Arguments]:
    def make(i: Inputs) -> Arguments:
        # A teacher's features take no gradient.
        rows = i.picked().numel()
        if index:
            target = torch.empty(i.batch * i.tokens, TARGET_DIM, dtype=i.dtype)
            if target_trains:
                target = i.tensor(*target.shape)
            return (i.tensor(rows, TARGET_DIM), target, torch.arange(rows)), {}
        return (i.tensor(rows, TARGET_DIM), torch.empty(rows, TARGET_DIM, dtype=i.dtype)), {}

    return make


def _pairs(i: Inputs) -> Arguments:
    embedding = 512 if i.shape.dim < 1024 else 1024
    return (i.tensor(4096, embedding), i.tensor(4096, embedding), i.parameter(1)), {}


def _linear(scales: bool) -> Callable[[Inputs], Arguments]:
    def make(i: Inputs) -> Arguments:
        dim, kwargs = i.shape.dim, {"residual": i.rows()}
        if scales:
            kwargs |= {"layer_scale": i.parameter(dim), "row_scale": i.drop_path()}
        return (i.rows(), i.tensor(dim, dim), i.parameter(dim)), kwargs

    return make


def _swiglu_mlp(recompute: bool = False, scales: bool = False) -> Callable[[Inputs], Arguments]:
    def make(i: Inputs) -> Arguments:
        dim, hidden = i.shape.dim, i.shape.hidden
        x, up = i.rows(), (i.tensor(hidden, dim), i.parameter(hidden)) if i.shape.subln else (None, None)
        gate_width = hidden if i.shape.subln else 2 * hidden
        gate, down = (i.tensor(gate_width, dim), i.parameter(gate_width)), (i.tensor(dim, hidden), i.parameter(dim))
        norm = i.norm(hidden) if i.shape.subln else (None, None)
        kwargs: dict[str, Any] = {"pre_norm": i.pre_norm(), "residual": x, "recompute": recompute}
        if scales:
            kwargs |= {"layer_scale": i.parameter(dim), "row_scale": i.drop_path()}
        return (x, *gate, *up, *down, *norm), kwargs

    return make


def _gelu_mlp(i: Inputs) -> Arguments:
    dim, hidden, x = i.shape.dim, i.shape.hidden, i.rows()
    weights = (i.tensor(hidden, dim), i.parameter(hidden), i.tensor(dim, hidden), i.parameter(dim))
    return (x, *weights), {"pre_norm": i.pre_norm(), "residual": x}


def _qkv_rope(i: Inputs, *, rotated: bool = True) -> Arguments:
    dim, kwargs = i.shape.dim, {"num_heads": i.shape.heads, "pre_norm": i.pre_norm()}
    if i.shape.subln:
        weights: Any = tuple(i.tensor(dim, dim) for _ in range(3))
    else:
        weights = i.tensor(3 * dim, dim)
    return (i.rows(), weights, (i.parameter(dim), None, i.parameter(dim)), i.rope() if rotated else None), kwargs


def _padding_mask(i: Inputs) -> Tensor:
    return torch.ones(i.batch, i.tokens, dtype=torch.bool)


def _head_weight(i: Inputs) -> Tensor:
    return i.parameter(i.shape.head_dim)


CASES = (
    Case("rope_attention", "axis", ("base", "giant", "enormous", "head128"), _attention(), quick=("base", "giant")),
    Case("rope_attention", "half", ("base",), lambda i: ((i.heads(), i.heads(), i.heads(), i.rope(layout="half")), {}),
         variant=True),
    Case("rope_attention", "causal", ("base",), _attention(causal=True), variant=True),
    Case("rope_attention", "mask", ("base",), _attention(key_padding_mask=_padding_mask), variant=True),
    Case("rope_attention", "norms", ("base", "giant"), _attention(q_norm=_head_weight, k_norm=_head_weight),
         variant=True),
    Case("rope_attention", "grouped", ("base",), _grouped, variant=True),
    Case("rope_attention", "selected", ("base",), _selected, variant=True),
    Case("rope_attention", "sequences", ("base",), _sequences, variant=True),
    Case("rope_attention", "dense", ("base",), lambda i: ((i.heads(), i.heads(), i.heads(), i.dense_rope()), {}),
         variant=True),
    # Without RoPE; with it they are rope_attention's, of other strides.
    Case("rope_attention_packed", "rotated", ("base", "giant", "enormous"), lambda i: ((i.heads(3),), {}),
         quick=("base", "giant")),
    Case("apply_rope", "axis", ("base", "giant", "enormous"), lambda i: ((i.heads(), i.rope()), {}), quick=("base",),
         rows=True),
    Case("apply_rope", "half", ("base",), lambda i: ((i.heads(), i.rope(layout="half")), {}), rows=True),
    Case("apply_rope", "dense", ("base",), lambda i: ((i.heads(), i.dense_rope()), {})),
    Case("qkv_rope", "block", ("small", "base", "giant"), _qkv_rope, quick=("base",)),
    # As models call it on a GPU: attention rotates.
    Case("qkv_rope", "unrotated", ("base",), lambda i: _qkv_rope(i, rotated=False), quick=("base",), variant=True),
    Case("linear", "residual", ("base",), _linear(False), quick=("base",)),
    Case("linear", "scales", ("base",), _linear(True), variant=True),
    Case("swiglu", "packed", ("tiny", "small"), lambda i: ((i.rows(2 * i.shape.hidden),), {}), rows=True),
    Case("swiglu", "separate", ("base",), lambda i: ((i.rows(i.shape.hidden), i.rows(i.shape.hidden)), {}),
         quick=("base",), rows=True),
    Case("subln_swiglu", "separate", ("base", "large"),
         lambda i: ((i.rows(i.shape.hidden), i.rows(i.shape.hidden), *i.norm(i.shape.hidden)), {}), quick=("base",),
         rows=True),
    Case("swiglu_mlp", "block", ("small", "base", "large"), _swiglu_mlp(), quick=("base",)),
    Case("swiglu_mlp", "recompute", ("base",), _swiglu_mlp(recompute=True), variant=True),
    Case("swiglu_mlp", "scales", ("small",), _swiglu_mlp(scales=True), variant=True),
    Case("gelu_mlp", "block", ("giant",), _gelu_mlp, quick=("giant",)),
    Case("add_layer_norm", "norm", ("tiny", "base", "large"), _layer_norm(), quick=("base",), rows=True),
    Case("add_layer_norm", "residual", ("base",), _layer_norm(residual=True), quick=("base",), rows=True),
    Case("add_layer_norm", "drop", ("base",), _layer_norm(residual=True, drop=True), rows=True),
    Case("add_layer_norm", "scales", ("base",), _layer_norm(residual=True, scale=True, drop=True), rows=True),
    Case("add_layer_norm", "rms", ("base",), _layer_norm(rms=True), rows=True),
    Case("gather_tokens", "half", ("base",), lambda i: ((i.rows(), i.picked()), {}), quick=("base",), rows=True),
    Case("scatter_tokens", "half", ("base",),
         lambda i: ((i.tensor(i.batch, i.tokens // 2 + 1, i.shape.dim), i.picked(), i.rows()), {}), quick=("base",),
         rows=True),
    Case("mask_tokens", "all", ("base",), _mask_tokens, quick=("base",), rows=True),
    Case("gather_layer_norm", "half", ("base",), lambda i: ((i.rows(), i.picked(), *i.norm()), {}), quick=("base",),
         rows=True),
    Case("masked_cosine_loss", "rows", ("base",), _cosine(False), rows=True),
    Case("masked_cosine_loss", "index", ("base",), _cosine(True), quick=("base",), rows=True),
    Case("masked_cosine_loss", "target", ("base",), _cosine(True, target_trains=True), quick=("base",)),
    Case("clip_loss", "pairs", ("base", "enormous"), _pairs, quick=("base",)),
)  # fmt: skip
# Their kernels multiply matrices, where TF32 is another choice.
PRODUCTS = ("rope_attention", "rope_attention_packed", "qkv_rope", "linear", "swiglu_mlp", "gelu_mlp", "clip_loss")


# ---- compiling -------------------------------------------------------------------------------------------------------
# Arguments of which a launch touches only as many rows as another one has.
PICKED = {
    ("_gather_tokens_kernel", "x_ptr"): "out_ptr",
    ("_gather_layer_norm_fwd_kernel", "x_ptr"): "out_ptr",
    ("_gather_layer_norm_bwd_kernel", "x_ptr"): "dout_ptr",
    ("_cosine_kernel", "target_ptr"): "pred_ptr",
    ("_cosine_bwd_kernel", "target_ptr"): "pred_ptr",
}


class TorchCalls(TorchDispatchMode):
    """Counts the bytes that torch's own kernels read and write inside an operator, and leaves products out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm") and "out" in kwargs:
            return kwargs["out"]
        result = func(*args, **kwargs)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not name.startswith(("empty", "new_empty")):
            written = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
            read = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            read = [t for t in read if all(t is not w for w in written)]
            self.bytes += sum(t.numel() * t.element_size() for t in (*written, *read))
        return result


Calls = TypeVar("Calls", bound=TorchDispatchMode)


@contextlib.contextmanager
def counting(calls: Calls) -> Iterator[Calls]:
    """Inside, operators run in ``calls``, a :class:`TorchCalls` or the like."""
    choose = _registry.choose

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            with calls:
                return function(*args)

        return counted

    def chosen(*args: Any) -> _registry.Backend:
        backend = choose(*args)
        return dataclasses.replace(backend, fwd=inside(backend.fwd), bwd=inside(backend.bwd))

    # By way of the dispatcher, below which torch's own operators are counted once and not as their parts.
    with mock.patch.object(_registry, "choose", chosen), mock.patch.object(_library, "_is_plain", return_value=False):
        yield calls


@contextlib.contextmanager
def taking(index: int) -> Iterator[dict[str, Any]]:
    """Inside, every launch takes choice ``index`` where it has as many, else the first.

    Gives ``most``, how many choices a launch has at most, and ``failed``, the choices that this architecture cannot
    launch. Choices do not depend on the number of rows.
    """
    from triton import OutOfResources

    seen: dict[str, Any] = {"most": 1, "failed": []}
    gemm_choices = _launch.gemm_choices

    def tuned(key: tuple[Any, ...], choices: Sequence[Any], run: Callable[[Any], None]) -> Any:
        seen["most"] = max(seen["most"], len(choices))
        if 0 < index < len(choices):
            try:
                run(choices[index])
                return choices[index]
            except OutOfResources as error:  # the autotuner leaves such a choice out
                seen["failed"].append(f"{key[0]} choice {index}: {error}")
        return choices[0]

    with (
        mock.patch.object(_triton, "tuned", tuned),
        mock.patch.object(_launch, "gemm_choices", lambda *args: gemm_choices(*args[:-1], 1)),
    ):
        yield seen


@contextlib.contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class Group:
    """What is compiled together: a case for a model, a dtype and an architecture."""

    arch: int
    dtype: str
    case: Case
    model: str

    @property
    def key(self) -> str:
        return f"{self.arch} {self.dtype} {self.case.op} {self.case.name} {self.model}"


def call(case: Case, i: Inputs) -> Iterator[str]:
    """Forward, then backward; gives the direction that is done."""
    args, kwargs = case.make(i)
    result = getattr(eva02_kernels, case.op)(*args, **kwargs, backend="triton")
    yield "fwd"
    outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
    torch.autograd.grad(outputs, i.leaves, [torch.empty_like(o) for o in outputs], allow_unused=True)
    yield "bwd"


def _launch_bytes(kernel: Kernel, launch: dict[str, int]) -> int:
    return sum(launch[PICKED.get((kernel.name, name), name)] for name in launch)


def _bytes(case: Case, i: Inputs, found: list[Kernel], calls: TorchCalls) -> dict[str, dict[str, Any]]:
    """Bytes of both directions: each tensor that a launch is given is read or written once."""
    spec = get_spec(case.op)
    args, kwargs = case.make(dataclasses.replace(i, leaves=[]))
    least = dict(zip(("fwd", "bwd"), spec.bytes_moved(*spec.canonical(*args, **kwargs)), strict=True))
    moved, before = {}, 0
    for direction in call(case, i):
        total = sum(_launch_bytes(k, launch) for k in found for launch in k.traffic) + calls.bytes
        moved[direction], before = total - before, total
    return {d: {"bytes": moved[d], "least": least[d], "ratio": round(moved[d] / least[d], 4)} for d in moved}


_described: dict[str, dict[str, Any]] = {}


def describe(kernel: Kernel) -> dict[str, Any]:
    """What a kernel's machine code says; a binary is disassembled once."""
    name = hashlib.sha256(kernel.binary).hexdigest()
    if name not in _described:
        blocks = {k: v for k, v in kernel.constants.items() if k.startswith("BLOCK_")}
        _described[name] = {
            "registers": kernel.registers,
            "spills": kernel.spills,
            "shared": kernel.shared,
            "occupancy": round(kernel.occupancy, 3),
            "widths": {str(w): n for w, n in sorted(kernel.access_widths().items())},
            "matrix": "+".join(kernel.matrix_instructions),
            "launch": "x".join(map(str, blocks.values())) + f" w{kernel.num_warps} s{kernel.num_stages}",
        }
    return _described[name]


def compile_group(group: Group) -> dict[str, Any]:
    """Kernels of a group by name, choice and order of launch; bytes; what could not be compiled."""
    case, dtype = group.case, DTYPES[group.dtype]
    kernels: dict[str, Any] = {}
    result: dict[str, Any] = {"kernels": kernels, "failed": [], "left_out": []}
    with allowing_tf32(group.dtype == "tf32"), compiling(group.arch) as found:
        index, most = 0, 1
        while index < most:
            done, i = len(found), case.inputs(group.model, dtype)
            try:
                with taking(index) as seen, counting(TorchCalls()) as calls:
                    if case.rows and index == 0:
                        result["bytes"] = _bytes(case, i, found, calls)
                    else:
                        list(call(case, i))
            except Exception as error:  # the other cases still compile
                result["failed"].append(f"choice {index}: {type(error).__name__}: {str(error).strip()[:300]}")
            most = max(most, seen["most"])
            result["left_out"] += seen["failed"]
            names: Counter[str] = Counter()
            for kernel in found[done:]:
                nth = names[kernel.name]
                names[kernel.name] += 1
                key = f"{kernel.name} {index}" + (f" ({nth + 1})" if nth else "")
                kernels[key] = describe(kernel)
            index += 1
    return result


def groups(
    architectures: Iterable[int], ops: Sequence[str] = (), dtypes: Sequence[str] = (), quick: bool = False
) -> list[Group]:
    """The plan: all of it without arguments."""
    plan = []
    for arch in architectures:
        low = "float16" if arch == 75 else "bfloat16"
        for dtype in dtypes or ((low,) if quick else (low, "float32", "tf32")):
            if dtype == "bfloat16" and arch == 75:
                dtype = low
            for case in CASES:
                if (ops and case.op not in ops) or (case.variant and DTYPES[dtype] == torch.float32):
                    continue
                if dtype == "tf32" and (case.op not in PRODUCTS or arch < 80):
                    continue
                plan += [Group(arch, dtype, case, model) for model in (case.quick if quick else case.models)]
    return list(dict.fromkeys(plan))


def _compile_architecture(plan: list[tuple[int, str, int, str]]) -> list[tuple[str, dict[str, Any]]]:
    torch.set_num_threads(1)
    results = []
    for arch, dtype, place, model in plan:
        group = Group(arch, dtype, CASES[place], model)
        begin = time.perf_counter()
        found = compile_group(group)
        spills = [f"{name} spills" for name, k in found["kernels"].items() if k["spills"]]
        seconds = f"{time.perf_counter() - begin:.1f} s"
        print(*(group.key, seconds, *found["failed"], *spills), sep=", ", file=sys.stderr, flush=True)
        results.append((group.key, found))
    return results


def compile_all(plan: Sequence[Group], jobs: int = 2) -> dict[str, dict[str, Any]]:
    """Results by the groups' keys; one process for an architecture, ``jobs`` at a time."""
    by_arch = [[(g.arch, g.dtype, CASES.index(g.case), g.model) for g in plan if g.arch == arch]
               for arch in dict.fromkeys(g.arch for g in plan)]  # fmt: skip
    if jobs == 1 or len(by_arch) == 1:
        parts = list(map(_compile_architecture, by_arch))
    else:
        with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
            parts = pool.map(_compile_architecture, by_arch, chunksize=1)
    found = dict(pair for part in parts for pair in part)
    return {g.key: found[g.key] for g in plan}


# ---- budget ----------------------------------------------------------------------------------------------------------
def tools() -> str:
    import triton
    from triton import knobs

    return f"triton {triton.__version__}, ptxas {knobs.nvidia.ptxas.version}, {knobs.nvidia.ptxas_blackwell.version}"


def mean_width(widths: dict[str, int]) -> float:
    return sum(int(w) * n for w, n in widths.items()) / max(1, sum(widths.values()))


def compare(name: str, old: dict[str, Any], new: dict[str, Any], *, same_tools: bool = True) -> list[str]:
    """What is worse about a kernel, a line each."""
    worse = [f"{new['spills']} spills, was {old['spills']}"] if new["spills"] > old["spills"] else []
    if same_tools:
        for what in ("registers", "shared"):
            if new[what] > old[what]:
                worse.append(f"{new[what]} {what}{' bytes' if what == 'shared' else ''}, was {old[what]}")
        if new.get("occupancy", 0) < old.get("occupancy", 0):
            worse.append(f"occupancy {new['occupancy']}, was {old['occupancy']}")
        if mean_width(new["widths"]) < 0.99 * mean_width(old["widths"]):
            worse.append(f"accesses {accesses(new['widths'])}, were {accesses(old['widths'])}")
    if new["matrix"] != old["matrix"]:
        worse.append(f"matrix instruction {new['matrix'] or 'none'}, was {old['matrix'] or 'none'}")
    return [f"{name}: {line}" for line in worse]


def excesses(case: str, op: str, ratios: dict[str, float], exceptions: Collection[str]) -> list[str]:
    """A line for each direction of a row operator that moves too much; exceptions are "operator direction"."""
    return [
        f"{case} {direction}: {ratio} of the minimum bytes, allowed {MAX_RATIO}"
        for direction, ratio in ratios.items()
        if ratio > MAX_RATIO and f"{op} {direction}" not in exceptions
    ]


def violations(budget: dict[str, Any], found: dict[str, dict[str, Any]], *, whole: bool = False) -> list[str]:
    """What is worse than the budget, a line each; ``whole``: the plan is all of it, so that nothing may be missing."""
    same_tools = budget["tools"] == tools()
    lines = []
    for key, now in found.items():
        lines += [f"{key}: {failure}" for failure in now["failed"]]
        old = budget["groups"].get(key)
        ratios = {direction: b["ratio"] for direction, b in now.get("bytes", {}).items()}
        lines += excesses(key, key.split()[2], ratios, EXCEPTIONS)
        for direction, ratio in ratios.items():
            if old and ratio > old["bytes"][direction]:
                lines.append(f"{key} {direction}: {ratio} of the minimum bytes, was {old['bytes'][direction]}")
        if old is None:
            lines.append(f"{key}: not in the budget")
            continue
        lines += [f"{key} {name}: no longer compiled" for name in old["kernels"] if name not in now["kernels"]]
        for name, kernel in now["kernels"].items():
            if name not in old["kernels"]:
                lines.append(f"{key} {name}: not in the budget")
            else:
                lines += compare(f"{key} {name}", old["kernels"][name], kernel, same_tools=same_tools)
    if whole:
        lines += [f"{key}: no longer compiled" for key in budget["groups"] if key not in found]
    return lines


FIELDS = ("registers", "spills", "shared", "occupancy", "widths", "matrix", "launch")


def read_budget(path: Path) -> dict[str, Any]:
    """``tools``, and for each group's key the ratios of its bytes and its kernels as ``describe`` gives them."""
    budget = json.loads(path.read_text())
    for group in budget["groups"].values():
        group["kernels"] = {name: dict(zip(FIELDS, k, strict=True)) for name, k in group["kernels"].items()}
    return budget


def write_budget(path: Path, found: dict[str, dict[str, Any]], before: dict[str, Any] | None = None) -> None:
    """``found``, one line a kernel; the groups of ``before`` that it leaves out stay."""
    kept = dict(before["groups"]) if before else {}
    for key, now in found.items():
        kept[key] = {"bytes": {d: b["ratio"] for d, b in now.get("bytes", {}).items()}, "kernels": now["kernels"]}
    lines = []
    for key in sorted(kept, key=lambda k: (int(k.split()[0]), k)):
        kernels = [f"   {json.dumps(n)}: {json.dumps([k[f] for f in FIELDS])}" for n, k in kept[key]["kernels"].items()]
        body = ",\n".join(kernels)
        lines.append(f'  {json.dumps(key)}: {{"bytes": {json.dumps(kept[key]["bytes"])}, "kernels": {{\n{body}}}}}')
    body = ",\n".join(lines)
    path.write_text(f'{{\n "tools": {json.dumps(tools())},\n "groups": {{\n{body}\n }}\n}}\n')


# ---- command ---------------------------------------------------------------------------------------------------------
def accesses(widths: dict[str, int]) -> str:
    return " ".join(f"{n}x{w}" for w, n in sorted(widths.items(), key=lambda pair: -int(pair[0])))


def print_found(found: dict[str, dict[str, Any]]) -> None:
    header = ("case", "kernel", "choice", "registers", "spills", "KiB", "occupancy", "accesses", "matrix")
    for arch, dtype in dict.fromkeys(tuple(key.split()[:2]) for key in found):
        lines, moved = [], []
        for key, now in found.items():
            if key.split()[:2] != [arch, dtype]:
                continue
            case = " ".join(key.split()[2:])
            for name, k in now["kernels"].items():
                kernel, choice = name.split()[:2]
                line = (case, kernel.strip("_").removesuffix("_kernel"), f"{choice}: {k['launch']}", k["registers"],
                        k["spills"], number(k["shared"] / 1024), number(k["occupancy"], 2), accesses(k["widths"]),
                        k["matrix"])  # fmt: skip
                lines.append([str(cell) for cell in line])
            for direction, b in now.get("bytes", {}).items():
                moved.append([case, direction, number(b["bytes"] / 1e6), number(b["least"] / 1e6), f"{b['ratio']:.3f}"])
        print_table(f"compute capability {int(arch) / 10}, {dtype}", header, lines)
        if moved:
            print_table("bytes moved", ("case", "direction", "MB", "minimum MB", "ratio"), moved)
    for key, now in found.items():
        for line in now["failed"]:
            print(f"FAILED {key}: {line}")
        for line in now["left_out"]:
            print(f"left out by the autotuner: {key}: {line}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = sorted(dict.fromkeys(case.op for case in CASES), key=OP_NAMES.index)
    known = ", ".join(map(str, ARCHITECTURES))
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, metavar="N",
                        help=f"compute capabilities, of {known} (default: all)")  # fmt: skip
    parser.add_argument("--ops", nargs="+", choices=names, metavar="OP", help=f"operators, of {', '.join(names)}")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), metavar="DTYPE",
                        help=f"of {', '.join(DTYPES)} (default: bfloat16, float32, tf32)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few shapes, 8.0 and 9.0, bfloat16, unless given")
    parser.add_argument("--check", action="store_true", help="compare with the budget; exit 1 where a kernel got worse")
    parser.add_argument("--write", action="store_true", help="put what is compiled into the budget")
    parser.add_argument("--budget", type=Path, default=BUDGET, metavar="FILE", help="another budget file")
    parser.add_argument("--traffic", action="store_true", help="count one block's bytes on the PTX simulator instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of --traffic: write the rows here")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args(argv)
    if args.traffic:
        from benchmarks.traffic import print_traffic

        print_traffic(args.json)
        return 0
    if args.write and args.quick:
        parser.error("--write takes every shape: without --quick")
    if args.check and not args.budget.exists():
        parser.error(f"--check: there is no {args.budget}; --write makes it")
    architectures = args.arch or (QUICK_ARCHITECTURES if args.quick else ARCHITECTURES)
    plan = groups(architectures, args.ops or (), args.dtypes or (), args.quick)
    whole = not (args.arch or args.ops or args.dtypes or args.quick)
    found = compile_all(plan, args.jobs)
    if args.check:
        budget = read_budget(args.budget)
        if budget["tools"] != tools():
            print(f"spills and matrix instructions only: {tools()} here, the budget has {budget['tools']}")
        lines = violations(budget, found, whole=whole)
        for line in lines:
            print(line)
        kernels = sum(len(now["kernels"]) for now in found.values())
        print(f"{kernels} kernels compiled, {len(lines)} worse than {args.budget.name}")
        return 1 if lines else 0
    print_found(found)
    failed = any(now["failed"] for now in found.values())
    if args.write:
        if failed:
            print("not written: something does not compile")
            return 1
        before = None if whole or not args.budget.exists() else read_budget(args.budget)
        write_budget(args.budget, found, before)
        print(f"wrote {args.budget}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
