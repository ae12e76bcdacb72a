"""Every Triton kernel compiled for GPUs that are not there, by ``benchmarks.kernels``."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

import eva02_kernels
from benchmarks import kernels
from eva02_kernels.testing.offline import AMD, ARCHITECTURES, compiling

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="TRITON_INTERPRET=1: nothing is compiled")

# Sequences of a multiple of 16 tokens, odd ones, one patch; one sample.
SHAPES = [(b, grid) for b in (2, 1, 3, 8) for grid in ((4, 4), (3, 5), (1, 1), (7, 9), (16, 16))]


@pytest.fixture(scope="module")
def budget():
    return kernels.read_budget(kernels.BUDGET)


@pytest.fixture(scope="module")
def quick():
    return kernels.compile_all(kernels.groups(kernels.QUICK_ARCHITECTURES, quick=True))


def test_quick_kernels_compile_without_spills(quick):
    assert sum(len(group["kernels"]) for group in quick.values()) > 100
    assert [f"{key}: {line}" for key, group in quick.items() for line in group["failed"]] == []
    spilled = [f"{key} {name}" for key, group in quick.items() for name, k in group["kernels"].items() if k["spills"]]
    assert spilled == []


def test_no_kernel_in_the_budget_spills(budget):
    spilled = [f"{key} {name}" for key, group in budget["groups"].items() for name, k in group["kernels"].items()
               if k["spills"]]  # fmt: skip
    assert spilled == []


def test_quick_kernels_keep_their_budget(quick, budget):
    assert kernels.violations(budget, quick) == []


@pytest.mark.full
def test_all_kernels_keep_their_budget(budget):
    found = kernels.compile_all(kernels.groups(ARCHITECTURES))
    assert kernels.violations(budget, found, whole=True) == []


def test_products_use_matrix_instructions(quick):
    kinds = {"80": "mma", "90": "wgmma"}
    for key, group in quick.items():
        for name, k in group["kernels"].items():
            multiplies = name.startswith(("_rope_attention", "_project", "_activate_kernel", "_hidden_gradient_kernel",
                                          "_qkv_rope"))  # fmt: skip
            multiplies |= " clip_loss " in key and name.startswith(("_features", "_gradient", "_statistics"))
            assert k["matrix"] == (kinds[key.split()[0]] if multiplies else ""), f"{key} {name}"


def test_every_kernel_of_the_sources_is_in_the_budget(budget):
    folder = Path(eva02_kernels.__file__).parent / "ops"
    sources = "\n".join(path.read_text() for path in folder.rglob("*triton*.py"))
    written = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    compiled = {name.split()[0] for group in budget["groups"].values() for name in group["kernels"]}
    assert compiled == written


def test_what_is_worse_is_found(budget):
    key = next(k for k in budget["groups"] if k.startswith("80 bfloat16 rope_attention "))
    name = next(iter(budget["groups"][key]["kernels"]))
    budget = {"tools": kernels.tools(), "groups": {key: budget["groups"][key]}}
    found = {key: {"failed": [], "kernels": copy.deepcopy(budget["groups"][key]["kernels"])}}
    assert kernels.violations(budget, found, whole=True) == []
    k = found[key]["kernels"][name]
    worse = [{"registers": k["registers"] + 1}, {"spills": 2}, {"shared": k["shared"] + 16},
             {"occupancy": k["occupancy"] / 2}, {"matrix": ""}, {"widths": {"2": 64}}]  # fmt: skip
    for change in worse:
        changed = found[key]["kernels"] | {name: k | change}
        (line,) = kernels.violations(budget, {key: {**found[key], "kernels": changed}})
        assert line.startswith(f"{key} {name}: ")
    others = {n: k for n, k in found[key]["kernels"].items() if n != name}
    assert kernels.violations(budget, {key: {**found[key], "kernels": others}}) == [f"{key} {name}: no longer compiled"]
    assert kernels.violations(budget, {}, whole=True) == [f"{key}: no longer compiled"]
    (line,) = kernels.violations(budget, {key: {**found[key], "kernels": found[key]["kernels"] | {"_new_kernel 0": k}}})
    assert line == f"{key} _new_kernel 0: not in the budget"


def test_bytes_over_the_minimum_are_found():
    key = "80 bfloat16 swiglu separate base"
    budget = {"tools": kernels.tools(), "groups": {key: {"bytes": {"fwd": 1.0}, "kernels": {}}}}
    lines = [
        kernels.violations(budget, {key: {"failed": [], "kernels": {}, "bytes": {"fwd": {"ratio": ratio}}}})
        for ratio in (1.0, 1.01, 1.1)
    ]
    assert [len(found) for found in lines] == [0, 1, 2]


@pytest.mark.parametrize("case", kernels.CASES, ids=lambda c: f"{c.op}-{c.name}")
def test_no_recompilation_for_a_shape(case):
    """Batch and grid are values, not constants, of every kernel."""
    with compiling(80) as found, kernels.taking(0), kernels.counting(kernels.TorchCalls()):
        for n, (batch, grid) in enumerate(SHAPES):
            list(kernels.call(case, case.inputs(case.models[0], torch.bfloat16, batch, grid)))
            if n == 0:
                first = [(k.name, k.signature, k.constants) for k in found]
            others = [(k.name, k.signature, k.constants) for k in found[len(first) :]]
            assert not others, f"batch {batch}, grid {grid} compiled {others} beside {first}"


def test_a_second_context_sees_kernels_of_the_first():
    case = next(c for c in kernels.CASES if c.op == "swiglu")
    seen = []
    for _ in range(2):
        with compiling(80) as found:
            list(kernels.call(case, case.inputs(case.models[0], torch.bfloat16, 2)))
        seen.append([k.name for k in found])
    assert seen == [["_swiglu_fwd_kernel", "_swiglu_bwd_kernel"]] * 2


def test_a_limit_of_registers_reaches_the_compiler(monkeypatch):
    from eva02_kernels.ops.swiglu import triton_kernels

    plain = triton_kernels.row_pieces(512)
    gate, up = torch.empty(2, 64, 512).unbind()
    registers = {}
    for limit in (None, 24):
        limited = dataclasses.replace(plain, max_registers=limit)
        monkeypatch.setattr(triton_kernels, "row_pieces", lambda width, limited=limited: limited)
        for arch in (80, next(iter(AMD))):  # which has no such option
            with compiling(arch) as found:
                eva02_kernels.swiglu(gate, up, backend="triton")
            if arch == 80:
                registers[limit] = found[0].registers
    assert registers[24] <= 24 < registers[None]


@pytest.mark.full
@pytest.mark.parametrize("case", kernels.CASES, ids=lambda c: f"{c.op}-{c.name}")
def test_compiles_for_amd(case):
    with compiling(next(iter(AMD))) as found, kernels.taking(0), kernels.counting(kernels.TorchCalls()):
        list(kernels.call(case, case.inputs(case.models[0], torch.bfloat16, 2)))
    assert found
