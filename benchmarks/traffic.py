"""Bytes that one EVA-02 block moves, counted: our compiled kernels on the PTX simulator, and timm's block in PyTorch.

What the second of two samples adds: weights and their gradients, which do not depend on the batch, drop out. Distinct
bytes: what a launch reads or writes at least once. Requested bytes: sectors of 32 that the warps' accesses touch,
without a cache, with repeated reads of weights. torch's own kernels (cuBLAS products) read and write a tensor once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eva02_kernels
from benchmarks.kernels import CASES, MODELS, Arguments, Case, Inputs, counting
from eva02_kernels._registry import get_spec
from eva02_kernels.bench.machine import environment
from eva02_kernels.bench.report import print_table, write_json
from eva02_kernels.testing import executing
from eva02_kernels.testing.gpusim.report import Report


def _unrotated(i: Inputs) -> Arguments:
    (*projection, _), kwargs = _case("qkv_rope", "block").make(i)
    return tuple(projection), kwargs


def _case(op: str, name: str) -> Case:
    return next(c for c in CASES if (c.op, c.name) == (op, name))


# What a block with sub-LN consists of on a GPU, in its order: attention rotates what the projection made.
BLOCK = (
    Case("qkv_rope", "unrotated", (), _unrotated),
    Case("rope_attention_packed", "axis", (), lambda i: ((i.heads(3), i.rope()), {})),
    _case("linear", "residual"),
    _case("swiglu_mlp", "block"),
)
TIMM = {"base": "eva02_base_patch14_224.mim_in22k", "large": "eva02_large_patch14_224.mim_in22k"}


class Tensors(TorchDispatchMode):
    """Bytes of the tensors that torch's kernels read and write; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "eva02_kernels_C":  # its launches are reported by the simulator
            return result
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach")):
            written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            read = [t for t in read if all(t is not w for w in written)]
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return result


@dataclasses.dataclass
class Moved:
    """Bytes of one direction."""

    formula: int = 0
    distinct: int = 0
    requested: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.formula + other.formula, self.distinct + other.distinct, self.requested + other.requested)

    def __sub__(self, other: Moved) -> Moved:
        return Moved(self.formula - other.formula, self.distinct - other.distinct, self.requested - other.requested)


def _fill(tensors: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn(t.shape, generator=generator) * (0.02 if t.ndim == 2 else 1))


def _backward(outputs: Any, leaves: list[Tensor]) -> None:
    out = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out], allow_unused=True)


@dataclasses.dataclass
class Launched:
    """By an operator in one direction."""

    minimum: int  # bytes
    torch_bytes: int  # of torch's own kernels
    reports: list[Report]  # of ours

    @property
    def requested_bytes(self) -> int:
        counters = [r.counters for r in self.reports]
        return self.torch_bytes + 32 * sum(c.global_load_sectors + c.global_store_sectors for c in counters)


def run_case(case: Case, i: Inputs, backend: str) -> dict[str, Launched]:
    """An operator on the simulator, forward and backward."""
    args, kwargs = case.make(i)
    _fill(i.leaves)
    spec, calls = get_spec(case.op), Tensors()
    reports: list[Report] = []
    with executing("simulator", on_report=reports.append), counting(calls):
        outputs = getattr(eva02_kernels, case.op)(*args, **kwargs, backend=backend)
        launches, moved = len(reports), calls.bytes
        _backward(outputs, i.leaves)
    least = spec.bytes_moved(*spec.canonical(*args, **kwargs))
    return {
        "fwd": Launched(least[0], moved, reports[:launches]),
        "bwd": Launched(least[1], calls.bytes - moved, reports[launches:]),
    }


def _count(case: Case, model: str, batch: int, backend: str) -> dict[str, Moved]:
    found = run_case(case, case.inputs(model, torch.bfloat16, batch=batch), backend)

    def moved(of: Launched) -> Moved:
        distinct = sum(t.loaded_bytes + t.stored_bytes for r in of.reports for t in r.traffic.values())
        return Moved(of.minimum, of.torch_bytes + distinct, of.requested_bytes)

    return {direction: moved(of) for direction, of in found.items()}


def count(case: Case, model: str, backend: str) -> dict[str, Moved]:
    """What one more sample makes an operator move, forward and backward, in bfloat16."""
    one, two = _count(case, model, 1, backend), _count(case, model, 2, backend)
    return {direction: two[direction] - one[direction] for direction in one}


def eager_block(model: str) -> int:
    """The same of timm's block, forward and backward."""
    import timm

    vit = timm.create_model(TIMM[model], depth=1).to(torch.bfloat16)
    rope = vit.rope.get_embed()

    def moved(batch: int) -> int:
        x = torch.randn(batch, 257, vit.embed_dim, dtype=torch.bfloat16, requires_grad=True)
        with Tensors() as calls:
            _backward(vit.blocks[0](x, rope=rope), [x, *vit.blocks[0].parameters()])
        return calls.bytes

    return moved(2) - moved(1)


def print_traffic(json: Path | None = None, progress: Callable[[str], None] = print) -> None:
    """The table of one block for B and L on the two GPU backends, and a JSON of it."""
    rows: list[dict[str, Any]] = []
    for backend, model in itertools.product(("cuda", "triton"), TIMM):
        unit = 2 * 257 * MODELS[model].dim  # T of the model's description: one activation
        found = {}
        for case in BLOCK:
            for direction, moved in count(case, model, backend).items():
                found[case.op, direction] = moved
            progress(f"{backend} {model} {case.op} counted")
        # Autograd adds what a block's input gets from the residual and from the projection.
        found["sum of gradients", "bwd"] = Moved(0, 3 * unit, 3 * unit)
        total, eager = sum(found.values(), Moved()), eager_block(model)
        found["block", "both"] = total
        table = []
        for (op, direction), moved in found.items():
            row = {"backend": backend, "model": model, "op": op, "direction": direction, **dataclasses.asdict(moved)}
            rows.append(row | ({"eager": eager} if op == "block" else {}))
            table.append([op, direction, *(f"{n / unit:.1f}" for n in dataclasses.astuple(moved))])
        table.append(["timm's block", "both", "", f"{eager / unit:.1f}", ""])
        share = f"{total.distinct / eager:.3f} of timm's distinct bytes"
        title = f"{backend}, {model}, bfloat16, in T = {unit} bytes a sample: {share}"
        print_table(title, ("op", "direction", "formula", "distinct", "requested"), table)
    if json:
        write_json(json, {"environment": environment("cpu"), "rows": rows})
        print(f"wrote {json}")
