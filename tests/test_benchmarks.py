"""The benchmarks measure what they say: gate, A/A row, saved bytes, files; and the demo runs."""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmarks.ops  # noqa: F401 - registers the peers
from benchmarks import base, demo, plots, pretrain, run
from benchmarks.models import BlockCase, ModelCase
from benchmarks.suites import run_case, run_memory
from eva02_kernels import _native
from eva02_kernels._registry import OP_NAMES
from eva02_kernels.bench import cli, machine, measure, ops, providers, report
from eva02_kernels.bench.__main__ import main as bench_main
from eva02_kernels.bench.cases import make_problem
from eva02_kernels.bench.rows import GATE_FAILED, OK, RAISED, UNSUPPORTED, Arm, Config, measure_rows
from eva02_kernels.bench.shapes import SHAPES, Shape, shape_named

ROOT = Path(__file__).resolve().parents[1]
needs_library = pytest.mark.skipif(bool(_native.cpu_reasons()), reason="; ".join(_native.cpu_reasons()))
TINY = {"dtype": "float32", "threads": 1, "rounds": 2, "min_sample_ms": 0.2}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def only(rows: list[dict], provider: str) -> dict:
    (row,) = [r for r in rows if r["provider"] == provider]
    return row


# ---- command lines ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", ["benchmarks.run", "benchmarks.demo", "benchmarks.plots", "eva02_kernels.bench"])
def test_help(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage" in done.stdout
    assert len(done.stdout) > 300


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "ops", "--models", "huge"], "huge"),
        (["--suite", "ops", "--ops", "softmax"], "softmax"),
        (["--suite", "model", "--providers", "their"], "their"),
        ([], "--suite"),
        (["--suite", "ops", "--fail-if-regression"], "--verify"),
    ],
)
def test_a_wrong_argument_is_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@needs_library
def test_an_ops_run_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    argv = ["--suite", "ops", "--ops", "swiglu", "mask_tokens", "--models", "host", "--providers", "ours,liger",
            "--threads", "1", "--rounds", "2", "--min-sample-ms", "0.2"]  # fmt: skip
    argv += ["--json", str(out), "--plot", str(picture)]
    assert run.main(argv) == 0
    assert picture.read_bytes().startswith(PNG)
    doc = json.loads(out.read_text())
    assert doc["roofline"]["fma_gflops"] > 0
    assert doc["roofline"]["copy_gbps"] > 0
    assert [r["mode"] for r in doc["rows"] if r["provider"] == "ours"] == ["fwd", "fwd+bwd"] * 2
    for row in doc["rows"]:
        assert row["suite"] == "ops"
        assert row["case"] in ("swiglu", "mask_tokens")
        assert row["dtype"] == "float32"
        env = row["environment"]
        assert env["cpu"]
        assert env["cores"]
        assert env["threads"] == 1
        assert len(env["load"]) == 3
        assert env["time"]
        assert env["versions"]["torch"] == torch.__version__
        assert {"isa", "flags", "commit", "torch_isa"} <= env.keys()
        assert env["device"] == "cpu"
        assert env["gpu"] is row["host_ms"] is row["gemm_share"] is None
        if row["provider"] == "liger":
            assert row["status"] == UNSUPPORTED
            assert row["reason"]
            assert row["ms"] is None
            continue
        assert row["status"] == OK
        assert row["gate"]["passed"]
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["first_call_s"] > 0
        assert row["peak_memory_bytes"] >= 0
        assert len(row["samples_ms"]) == 2
        assert row["ratio"]["median"] > 0
        assert (row["saved_bytes"] is not None) == (row["mode"] == "fwd+bwd")
        if row["ours"]:
            assert row["notes"]["backends"]
            assert all(b.endswith("cpu") for b in row["notes"]["backends"])
    assert (
        only([r for r in doc["rows"] if r["case"] == "swiglu" and r["mode"] == "fwd"], "eager/again")["resolved"]
        is False
    )
    assert "swiglu" in capsys.readouterr().out

    # The file runs again, and both runs stand side by side.
    assert bench_main(["--verify", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "recorded beside now" in printed


# ---- gate ------------------------------------------------------------------------------------------------------------
def _with_arm(build, op: str = "swiglu", **options):  # type: ignore[no-untyped-def]
    providers.provider("injected", suites=("ops",), op=op, **options)(build)
    try:
        config = Config("ops", ("host",), providers=("injected",), ops=(op,), modes=("fwd", "fwd+bwd"), **TINY)
        return {rows[0]["mode"]: only(rows, "injected") for rows in ops.run_ops(config)}
    finally:
        providers.unregister(build)


def test_a_right_arm_passes_the_gate() -> None:
    found = _with_arm(lambda problem: lambda gate, up: up * gate / (1 + torch.exp(-gate)))
    assert [row["status"] for row in found.values()] == [OK, OK]


def test_a_wrong_forward_gets_no_time() -> None:
    found = _with_arm(lambda problem: lambda gate, up: problem.expression(gate, up) * 1.001)
    for row in found.values():
        assert row["status"] == GATE_FAILED
        assert "output 0" in row["reason"]
        assert row["ms"] is None
        assert row["ratio"] is None
        assert row["images_per_s"] is None
        assert "samples_ms" in row


def test_a_wrong_gradient_gets_no_time() -> None:
    def build(problem):  # type: ignore[no-untyped-def]
        return lambda gate, up: torch.nn.functional.silu(gate) * up.detach() + 0 * up

    found = _with_arm(build)
    assert found["fwd"]["status"] == OK
    assert found["fwd+bwd"]["status"] == GATE_FAILED
    assert "gradient of up" in found["fwd+bwd"]["reason"]
    assert found["fwd+bwd"]["ms"] is None


def test_a_shape_error_is_a_red_gate() -> None:
    found = _with_arm(lambda problem: lambda gate, up: problem.expression(gate, up)[:, 1:])
    assert found["fwd"]["status"] == GATE_FAILED


def test_an_arm_that_raises_is_a_row_with_its_reason() -> None:
    def build(problem):  # type: ignore[no-untyped-def]
        def broken(gate, up):  # type: ignore[no-untyped-def]
            raise RuntimeError("no such kernel")

        return broken

    row = _with_arm(build)["fwd"]
    assert row["status"] == RAISED
    assert "no such kernel" in row["reason"]
    assert row["ms"] is None


def test_a_missing_package_is_a_row_with_its_reason() -> None:
    def build(problem):  # type: ignore[no-untyped-def]
        import a_package_nobody_has

        return a_package_nobody_has.swiglu

    row = _with_arm(build)["fwd"]
    assert row["status"] == UNSUPPORTED
    assert row["reason"] == "a_package_nobody_has is not installed"


@needs_library
def test_a_red_contract_check_stops_our_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    def red(*args: object, **kwargs: object) -> None:
        raise AssertionError("error against float64 is 1.0")

    monkeypatch.setattr(ops.contract, "check_accuracy", red)
    ops.contract_failure.cache_clear()
    try:
        config = Config("ops", ("host",), providers=("ours",), ops=("swiglu",), modes=("fwd",), **TINY)
        (rows,) = ops.run_ops(config)
    finally:
        ops.contract_failure.cache_clear()
    assert only(rows, "ours")["status"] == GATE_FAILED
    assert only(rows, "ours")["ms"] is None
    assert only(rows, "eager")["ms"] is not None


@needs_library
def test_a_model_that_differs_gets_no_time() -> None:
    case = BlockCase(SHAPES["host"])
    with torch.no_grad():
        case.ours.norm1.bias[0] += 1e-2
    config = Config("train", ("host",), providers=("ours", "timm+patch"), **TINY)
    rows = run_case(case, config)
    assert only(rows, "ours")["status"] == GATE_FAILED
    assert only(rows, "ours")["ms"] is None
    assert only(rows, "timm+patch")["status"] == OK


# ---- arms ------------------------------------------------------------------------------------------------------------
@needs_library
@pytest.mark.parametrize("op", OP_NAMES)
def test_every_operator_and_its_peers_agree(op: str) -> None:
    """At the small shape of either block kind: ours and every peer that is installed pass the gate."""
    packed = Shape("packed", 2, 32, 2, 84, 1, subln=False, image=42)
    for shape in (SHAPES["host"], packed):
        try:
            problem = make_problem(op, shape)
        except providers.Unsupported:
            assert op == "subln_swiglu"
            continue
        assert problem.bytes_moved[0] > 0
        assert problem.bytes_moved[1] > 0
        grads = ops.output_gradients(problem)
        expected = ops.expectation(problem, "fwd+bwd", grads)
        for p in providers.providers("ops", op):
            if p.compiled:
                continue
            arm = ops.prepare(p, problem, "fwd+bwd", grads, expected)
            known = (
                arm.reason is None
                or "not installed" in arm.reason
                or "need a GPU" in arm.reason
                or "EVA-02 pairs neighbours" in arm.reason
                or "SwiGLU" in arm.reason
                or "hidden width" in arm.reason
            )
            assert arm.status == OK or (arm.status == UNSUPPORTED and known), (p.name, arm.reason)


def test_eager_rotation_is_timms() -> None:
    layers = pytest.importorskip("timm.layers")
    problem = make_problem("apply_rope", SHAPES["host"])
    embed = layers.RotaryEmbeddingCat(16, in_pixels=False, feat_shape=(2, 2), ref_feat_shape=(16, 16)).get_embed()
    torch.testing.assert_close(torch.cat([problem.extras["sin"], problem.extras["cos"]], -1), embed)
    x = problem.tensors["x"].detach()
    expected = layers.apply_rot_embed_cat(x.transpose(1, 2)[:, :, 1:], embed).transpose(1, 2)
    torch.testing.assert_close(problem.expression(x=x)[:, 1:], expected)


def test_the_compiled_arm_runs() -> None:
    config = Config("ops", ("host",), providers=("compile",), ops=("swiglu",), modes=("fwd",), **TINY)
    (rows,) = ops.run_ops(config)
    compiled, eager = only(rows, "compile"), only(rows, "eager")
    assert compiled["status"] == OK
    assert compiled["ratio_compiled"]["median"] == 1.0
    assert compiled["first_call_s"] > eager["first_call_s"]


@needs_library
def test_train_rows_of_a_block_have_the_baseline_twice() -> None:
    config = Config("train", ("host",), providers=("ours", "timm+patch"), **TINY)
    rows = run_case(BlockCase(SHAPES["host"], subln=False), config)
    assert [r["provider"] for r in rows] == ["timm", "timm/again", "timm+patch", "ours"]
    assert all(r["status"] == OK for r in rows), [r["reason"] for r in rows]
    assert only(rows, "timm")["ratio"]["median"] == 1.0
    assert only(rows, "ours")["saved_bytes"] < 0.56 * only(rows, "timm")["saved_bytes"]


@needs_library
def test_a_model_step_updates_weights_after_the_gate() -> None:
    shape = Shape("small_model", 2, 32, 2, 85, 1, subln=True, image=28)
    case = ModelCase(shape, model_name="eva02_base_patch14_224", img_size=28, embed_dim=32, num_heads=2, depth=1)
    before = {k: v.clone() for k, v in case.ours.state_dict().items()}
    rows = run_case(case, Config("train", ("tiny",), providers=("ours",), **TINY))
    ours = only(rows, "ours")
    assert ours["status"] == OK
    assert ours["images_per_s"] == pytest.approx(2e3 / ours["ms"]["median"], rel=1e-2)
    assert any(not torch.equal(v, before[k]) for k, v in case.ours.state_dict().items())


# ---- measuring -------------------------------------------------------------------------------------------------------
def test_interleave_warms_first_and_runs_every_arm_in_every_round() -> None:
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    seconds = measure.interleave(calls, 5, min_sample_s=0.0, warmup=1)
    assert log[:3] == list("abc")
    rounds = [log[3 + 3 * i : 6 + 3 * i] for i in range(5)]
    assert all(sorted(r) == list("abc") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "the order changes between rounds"
    assert all(len(v) == 5 for v in seconds.values())


def test_paired_ratio_ignores_load_that_hits_both() -> None:
    rng = random.Random(0)
    load = [rng.uniform(1, 10) for _ in range(99)]
    ratio = measure.paired_ratio([2 * v for v in load], load)
    assert ratio.median == ratio.p20 == ratio.p80 == 2.0
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).median == statistics.median(range(1, 7))


def test_saved_bytes_by_hand() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    w = torch.randn(8, 8, requires_grad=True)
    # exp keeps its result, the product both factors: x.exp() once, w is a parameter.
    saved = measure.saved_for_backward(lambda: x.exp() @ w.t(), exclude=[w])
    assert saved.bytes == 4 * 8 * 4
    assert saved.elements == (32,)
    # A view keeps its whole storage alive.
    assert measure.saved_for_backward(lambda: x[:1].sin()).bytes == 4 * 8 * 4


def test_peak_memory_sees_what_is_freed_again() -> None:
    def call() -> None:
        torch.ones(16 << 18)  # 16 MiB

    peak = measure.peak_memory(call)
    if peak is None:
        pytest.skip("the system does not tell")
    assert 15 << 20 < peak < 24 << 20


@needs_library
def test_memory_suite_equals_a_hand_count() -> None:
    """One block of five tokens: 6T + 2G of EVA-02's fused design, and the statistics beside them."""
    shape = SHAPES["host"]
    config = Config("memory", ("host",), **TINY)
    rows = next(iter(run_memory(config)))
    tokens, dim, padded_hidden = 5, 32, 88
    assert shape.rows == tokens
    assert shape.hidden == 84
    # Elements: x, q, k, v, attention out, the sum between the branches; gate and up in rows of a multiple of eight.
    t, g = 6 * tokens * dim, 2 * tokens * padded_hidden
    # float32 statistics: mean and rstd of three norms; lse of every head and token; two axes of the rotation table.
    rest = 3 * 2 * tokens + shape.heads * tokens + 2 * (2 + 2) * (dim // shape.heads // 4)
    ours = only(rows, "ours")
    assert ours["saved_units"] == {"t": 6, "g": 2, "rest": rest}
    assert ours["saved_bytes"] == 4 * (t + g + rest)
    recompute = only(rows, "ours, recompute")
    assert recompute["saved_units"] == {"t": 6, "g": 0, "rest": rest}
    assert only(rows, "timm")["saved_over_baseline"] == 1.0
    assert ours["saved_over_baseline"] < 0.55
    assert recompute["saved_over_baseline"] < 0.33


@needs_library
def test_roofline_of_this_machine() -> None:
    torch.set_num_threads(1)
    roofline = machine.CpuRoofline(copy_bytes=8 << 20, iterations=200_000)
    roofline.sample()
    peaks = roofline.peaks()
    assert peaks["fma_gflops"] > 1
    assert peaks["copy_gbps"] > 0.1
    share, bound = machine.share_of_roofline(1.0, 2e9, 1e9, {"fma_gflops": 4.0, "copy_gbps": 1.0})
    assert share == 1.0
    assert bound == "copy"
    assert machine.share_of_roofline(1.0, 0, 0, peaks) == (None, None)


@pytest.mark.parametrize(("name", "gmacs"), [("tiny", 1.70), ("small", 6.14), ("base", 23.22), ("large", 81.15)])
def test_model_flops_are_the_counted_ones(name: str, gmacs: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = SHAPES[name]
    assert shape.model_flops(0) / 2e9 / shape.batch == pytest.approx(gmacs, rel=0.02)
    if name == "tiny":
        timm = pytest.importorskip("timm")
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = timm.create_model(shape.model_name, num_classes=1000).eval()
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # plain products, which the counter knows on every device
            model(torch.empty(shape.batch, 3, 224, 224))
        assert shape.model_flops(1000) == pytest.approx(counter.get_total_flops(), rel=1e-3)


# ---- reports ---------------------------------------------------------------------------------------------------------
def _row(provider: str, ratio: float | None, *, ours: bool = True, **changes: object) -> dict:
    of = ratio or 1.0
    ratios = {"median": of, "p20": 0.98 * of, "p80": 1.02 * of}
    row = {"suite": "model", "case": "m", "model": "tiny", "mode": "fwd", "dtype": "float32", "provider": provider,
           "ours": ours, "status": OK, "reason": None, "ratio": ratio and ratios,
           "saved_bytes": None, "saved_units": None,
           "ms": {"median": 1 / of, "p20": 1 / of, "p80": 1 / of}}  # fmt: skip
    return row | changes


def test_regressions_are_only_what_left_both_spreads() -> None:
    old = [_row("ours", 1.5), _row("timm+compile", 1.2, ours=False)]
    assert report.regressions(old, [_row("ours", 1.48), _row("timm+compile", 0.5, ours=False)]) == []
    (line,) = report.regressions(old, [_row("ours", 1.2)])
    assert "1.200 x baseline, was 1.500" in line
    (line,) = report.regressions(old, [_row("ours", None, status=GATE_FAILED, reason="red")])
    assert GATE_FAILED in line
    (line,) = report.regressions([_row("ours", 1.5, saved_bytes=10)], [_row("ours", 1.5, saved_bytes=11)])
    assert "keeps 11 bytes" in line


def test_the_last_run_fails_on_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = type("Arguments", (), {"json": tmp_path / "now.json", "fail_if_regression": True})()
    now, before = {"rows": [_row("ours", 1.0)]}, {"rows": [_row("ours", 1.5)]}
    assert cli.finish(now, arguments, before) == 1
    assert cli.finish(before, arguments, before) == 0
    assert "regression" in capsys.readouterr().out


def test_model_files_share_a_picture(tmp_path: Path) -> None:
    def doc(suite: str) -> dict:
        rows = []
        for model in ("tiny", "small"):
            common = {"suite": suite, "model": model, "case": model, "baseline": False,
                      "shape": SHAPES[model].describe()}  # fmt: skip
            rows += [
                _row("timm", 1.0, ours=False, ratio_compiled=None) | common | {"baseline": True},
                _row("timm/again", 1.01, ours=False, ratio_compiled=None) | common,
                _row("timm+compile", 1.2, ours=False, ratio_compiled=None) | common,
                _row("ours", 1.4) | common | {"ratio_compiled": {"median": 1.2, "p20": 1.1, "p80": 1.3}},
                _row("timm+patch", None, status=GATE_FAILED, ratio_compiled=None) | common,
            ]
        env = {"cpu": "a CPU", "threads": 2, "versions": {"torch": "2", "timm": "1"}}
        return {"config": {"suite": suite, "dtype": "float32"}, "environment": env, "rows": rows}

    plots.plot([doc("model"), doc("train")], tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


def test_shape_names() -> None:
    assert shape_named("eva02_tiny_patch14_224") is shape_named("tiny")
    for wrong in ("eva02_tiny_patch16_224", "huge", "eva02_"):
        with pytest.raises(ValueError, match="no benchmark shape"):
            shape_named(wrong)


# ---- a GPU, as far as can be told without one ------------------------------------------------------------------------
GPU = {"name": "a GPU", "capability": "9.0", "driver": None, "cuda": "13.0", "tf32": {"matmul": False, "cudnn": True}}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that waits for a GPU writes "wait" here; its memory and its description are made up."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 142)
    monkeypatch.setattr(machine, "gpu", lambda: GPU)
    return log


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Tensors without values, on "cuda" or not: mixing the two raises, as it does on a GPU."""

    def nonzero(mask: torch.Tensor, as_tuple: bool = False) -> object:
        index = torch.zeros(5, mask.ndim, dtype=torch.int64)
        return index.unbind(1) if as_tuple else index

    def to(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
        for part in module.modules():
            for name, p in part._parameters.items():
                part._parameters[name] = None if p is None else nn.Parameter(p.detach().to(device, dtype))
            for name, b in part._buffers.items():
                part._buffers[name] = None if b is None else b.to(device, dtype if b.is_floating_point() else None)
        return module

    # What needs values, and what fake parameters do not take.
    with (
        mock.patch.object(torch.Tensor, "nonzero", nonzero),
        mock.patch.object(torch.Tensor, "item", return_value=0.0),
        mock.patch.object(nn.init, "trunc_normal_", lambda t, *args, **kwargs: t),
        mock.patch.object(nn.Module, "to", to),
        FakeTensorMode(),
    ):
        yield


@pytest.mark.parametrize("op", OP_NAMES)
def test_all_of_a_problem_is_on_its_device(op: str) -> None:
    packed = Shape("packed", 2, 32, 2, 84, 1, subln=False, image=42)
    for shape in (SHAPES["host"], packed):
        with pretended_gpu():
            try:
                problem = make_problem(op, shape, torch.bfloat16, "cuda")
            except providers.Unsupported:
                continue
            assert problem.device == "cuda"
            grads = ops.output_gradients(problem)
            expected = ops.expectation(problem, "fwd", grads)
            found = ops.results(problem, problem.ours, problem.tensors, grads, ours=True, backward=False)
            tensors = [*problem.tensors.values(), *problem.from_public(*grads), *expected.reference.values(),
                       *expected.plain.values(), *found.values()]  # fmt: skip
            assert {t.device.type for t in tensors} == {"cuda"}


@pytest.mark.parametrize("kind", ["packed", "sub-LN", "model"])
def test_all_of_a_model_case_is_on_its_device(kind: str) -> None:
    pytest.importorskip("timm")
    with pretended_gpu():
        if kind == "model":
            shape = Shape("small_model", 2, 32, 2, 85, 1, subln=True, image=28)
            options = {"img_size": 28, "embed_dim": 32, "num_heads": 2, "depth": 1}
            case = ModelCase(shape, torch.bfloat16, "cuda", model_name="eva02_base_patch14_224", **options)
        else:
            case = BlockCase(SHAPES["host"], torch.bfloat16, "cuda", subln=kind == "sub-LN")
        for module in (case.timm, case.ours):
            assert {t.device.type for t in module.state_dict().values()} == {"cuda"}
            loss = case.loss(case.forward_of(module, ours=module is case.ours)(case.inputs))
            assert loss.device.type == "cuda"


def test_a_gpu_that_is_not_there_is_named(no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main, suite in ((run.main, ["--suite", "ops"]), (bench_main, [])):
        with pytest.raises(SystemExit) as stop:
            main([*suite, "--device", "cuda"])
        assert stop.value.code == 2
        assert "--device cuda: torch.cuda.is_available() is False" in capsys.readouterr().err
    path = tmp_path / "gpu.json"
    config = Config("ops", ("host",), device="cuda").record()
    report.write_json(path, {"schema": report.SCHEMA, "config": config, "roofline": None, "rows": []})
    for main in (run.main, bench_main):
        with pytest.raises(SystemExit, match=r"gpu\.json: --device cuda: .* is False"):
            main(["--verify", str(path)])


def test_a_file_from_before_there_was_a_device_loads() -> None:
    record = Config("ops", ("host",)).record()
    assert record.pop("device") == "cpu"
    assert Config.from_record(record).device == "cpu"
    config = Config("ops", ("host",), device="cuda")
    assert Config.from_record(json.loads(json.dumps(config.record()))) == config
    assert base.command(config, Path("out"))[-2:] == ["--device", "cuda"]
    assert "--device" not in base.command(Config("ops", ("host",)), Path("out"))


def test_a_sample_waits_before_and_after_but_not_inside() -> None:
    log: list[str] = []

    def wait() -> None:
        log.append("wait")

    def call() -> None:
        log.append("call")
        if len(log) == 2:
            time.sleep(2e-3)  # the first: a sample has many calls

    measure.first_call(call, wait)
    assert log == ["wait", "call", "wait"]
    log.clear()
    measure.interleave({"a": call}, 2, min_sample_s=0.2, warmup=1, synchronise=wait)
    assert log[:3] == ["wait", "call", "wait"]
    calls = (len(log) - 3 - 4) // 2
    assert calls >= 2
    assert log[3:] == ["wait", *["call"] * calls, "wait"] * 2
    log.clear()
    assert len(measure.host_times(call, 2, wait)) == 2
    assert log == ["wait", "call", "wait", "call", "wait"]


def test_host_time_leaves_out_the_device() -> None:
    (seconds,) = measure.host_times(lambda: None, 1, lambda: time.sleep(0.05))
    assert seconds < 0.04
    assert measure.first_call(lambda: None, lambda: time.sleep(0.02)) >= 0.02
    assert measure.synchroniser("cpu") is measure.nothing_queued


def test_gpu_memory_is_the_growth_of_the_allocator(waits: list[str]) -> None:
    assert measure.peak_memory(lambda: waits.append("call"), "cuda") == 42
    assert waits == ["wait", "reset", "call", "wait"]


def test_rows_of_a_gpu(waits: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    roofline = machine.GpuRoofline(torch.float32, device="cpu", size=64, copy_bytes=1 << 20)
    roofline.sample()
    config = Config("ops", ("host",), device="cuda", **TINY)
    eager, again, *_ = providers.providers("ops", "swiglu")
    arms = [Arm(p, call=lambda: waits.append("call")) for p in (eager, again)]
    common = {"suite": "ops", "case": "swiglu", "model": "host", "mode": "fwd", "dtype": "bfloat16"}
    rows = measure_rows(common, arms, config, flops=10**6, bytes_moved=10**3, roofline=roofline)
    for row in rows:
        assert row["environment"]["device"] == "cuda"
        assert row["environment"]["gpu"] == GPU
        assert row["peak_memory_bytes"] == 42
        assert 0 < row["host_ms"]["p20"] <= row["host_ms"]["median"]
        assert row["gemm_share"] > 0
        assert row["fma_share"] is None
        assert row["roofline_bound"] == "gemm"
    assert "wait" in waits

    doc = json.loads(json.dumps(report.document(config, rows, roofline)))
    assert doc["config"]["device"] == "cuda"
    assert doc["roofline"]["gemm_gflops"] > 0
    assert doc["roofline"]["copy_gbps"] > 0
    assert "fma_gflops" not in doc["roofline"]
    report.print_rows(rows)
    report.print_environment(doc["environment"], doc["roofline"])
    printed = capsys.readouterr().out
    assert "host ms" in printed
    assert "a GPU, capability 9.0, driver unknown, CUDA 13.0, TF32: matmul off, cudnn on" in printed
    assert "GFLOP/s torch.matmul 64 x 64 x 64 float32" in printed
    assert plots._caption([doc]).startswith("a GPU, capability 9.0, driver unknown, CUDA 13.0, float32")


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="a GPU", major=8, minor=6, multi_processor_count=80, total_memory=1 << 34)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    env = machine.environment("cuda")
    assert env["gpu"]["capability"] == "8.6"
    assert env["gpu"]["memory_bytes"] == 1 << 34
    assert {"driver", "cuda", "cudnn", "multiprocessors", "l2_bytes", "tf32"} < env["gpu"].keys()
    json.dumps(env)


def test_gpu_roofline_waits_around_its_samples(waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(machine, "synchroniser", lambda device: made.append(device) or torch.cuda.synchronize)
    roofline = machine.GpuRoofline(torch.bfloat16, device="cpu", size=16, copy_bytes=1 << 10, repeats=2)
    roofline.sample()
    assert made == ["cpu"]
    assert waits == ["wait"] * 4, "before and after the copies, before and after the products"
    share, bound = machine.share_of_roofline(1.0, 2e9, 1e9, {"gemm_gflops": 4.0, "copy_gbps": 10.0})
    assert share == 0.5
    assert bound == "gemm"
    assert machine.share_of_roofline(1.0, 2e9, 1e9, {}) == (None, None)


@needs_library
def test_contract_checks_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(ops.contract, "refusal", lambda *args, device: [])
    monkeypatch.setattr(ops.contract, "check_accuracy", lambda *args, device: seen.append(device))
    ops.contract_failure.cache_clear()
    try:
        assert ops.contract_failure("swiglu", torch.bfloat16, "triton", "cuda") is None
    finally:
        ops.contract_failure.cache_clear()
    assert set(seen) == {"cuda"}


# ---- pre-training ----------------------------------------------------------------------------------------------------
@needs_library
@pytest.mark.parametrize(
    "more", [(), pytest.param(("timm+compile",), marks=pytest.mark.full)], ids=["eager", "compiled"]
)
def test_pretraining_steps_are_those_of_the_loop(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All arms make the published step on the same batches; one whose loss differs gets no time."""
    pytest.importorskip("sklearn")
    shape = Shape("tiny", 2, 32, 2, 84, 2, subln=False, image=56)
    small = {"model__img_size": 56, "model__embed_dim": 32, "model__num_heads": 2, "model__depth": 2,
             "model__mim_dim": 16}  # fmt: skip
    config = Config("pretrain", ("tiny",), ("ours", "scaled", *more), **TINY)
    case = pretrain.PretrainCase(shape, config, tmp_path, **small)
    first = {name: case.trainer(task).train_step(case.batch) for name, task in (
        ("ours", lambda task: task), ("timm", lambda task: case.timm_task()))}  # fmt: skip
    torch.testing.assert_close(first["ours"], first["timm"])
    assert not case.batch["teacher"].isnan().any()

    @providers.provider("scaled", suites=("pretrain",))
    def scaled(case: pretrain.PretrainCase):  # type: ignore[no-untyped-def]
        trainer = case.trainer()
        loss = trainer.task.loss
        trainer.task.loss = lambda *args: 1.01 * loss(*args)
        return trainer

    try:
        rows = pretrain.run_case(case, config)
    finally:
        providers.unregister(scaled)
    assert only(rows, "scaled")["status"] == GATE_FAILED
    for name in ("timm", "timm/again", "ours", *more):
        row = only(rows, name)
        assert row["status"] == OK, row["reason"]
        assert row["images_per_s"] > 0
        shares = row["notes"]["shares"]
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
        assert shares["data"] > 0 and shares["student"] > 0 and shares["teacher"] == 0
    assert any("masked_cosine_loss" in backend for backend in only(rows, "ours")["notes"]["backends"])
    report.print_rows(rows)
    assert "data / teacher / student" in capsys.readouterr().out
    with pytest.raises(ValueError, match="suite pretrain has the models tiny"):
        pretrain.PretrainCase(SHAPES["host"], config, tmp_path / "host")


# ---- demo ------------------------------------------------------------------------------------------------------------
@needs_library
def test_the_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert demo.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert "rope_attention_packed" in printed
    doc = json.loads((tmp_path / "demo.json").read_text())
    assert 0 <= doc["demo"]["accuracy"] <= 1
    assert {r["provider"] for r in doc["rows"]} >= {"timm", "timm/again", "ours"}
    assert all(r["status"] == OK for r in doc["rows"]), [r["reason"] for r in doc["rows"]]
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


@needs_library
@pytest.mark.full
def test_the_demo_reaches_97_percent() -> None:
    pytest.importorskip("sklearn")
    found = [demo.train(seed) for seed in range(3)]
    print([round(o.accuracy, 4) for o in found])
    assert statistics.mean(o.accuracy for o in found) >= 0.97
