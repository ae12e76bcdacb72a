"""The simulator's promises beyond single instructions: counters, order, malformed text, Triton, the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx import marked_line, needs_core, run, source

import eva02_kernels
from eva02_kernels.testing import executing, gpusim
from eva02_kernels.testing.gpusim.__main__ import main

needs_core()


# ---- counters, on kernels whose traffic is known by construction
def _load(stride, width=4, threads=32):
    """Every thread loads ``width`` bytes at ``stride`` bytes from its neighbour's."""
    kind, registers = {4: ("b32", "%r7"), 8: ("v2.b32", "{%r10, %r11}"), 16: ("v4.b32", "{%r10, %r11, %r12, %r13}")}[
        width
    ]
    body = f"mul.wide.u32 %d6, %r1, {stride};\nadd.u64 %d6, %d6, %d1;\nld.global.{kind} {registers}, [%d6];"
    return run(body, torch.zeros(threads * max(stride, width), dtype=torch.uint8), torch.zeros(1), threads=threads)


@pytest.mark.parametrize(
    ("stride", "width", "sectors"),
    [(4, 4, 4), (8, 4, 8), (16, 4, 16), (128, 4, 32), (8, 8, 8), (16, 16, 16), (0, 4, 1)],
)
def test_sectors_of_a_warps_load(stride, width, sectors):
    report = _load(stride, width)
    assert report.counters.global_load_sectors == sectors
    assert report.counters.global_load_bytes == 32 * width
    traffic = report.traffic["a"]
    assert traffic.loaded_bytes == (width if stride == 0 else 32 * width)
    assert traffic.loaded_sectors == sectors
    assert traffic.stored_bytes == report.traffic["b"].loaded_bytes == 0


def test_lanes_that_are_off_count_nothing():
    report = run(
        "setp.lt.u32 %p1, %r1, 8;\n@%p1 ld.global.b32 %r7, [%d4];", torch.zeros(64), torch.zeros(1), threads=32
    )
    assert report.counters.global_load_bytes == 32
    assert report.counters.global_load_sectors == 1


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)])
def test_bank_conflicts(stride, wavefronts):
    body = f"mad.lo.u32 %r7, %r1, {stride}, %r2;\nst.shared.b32 [%r7], 1;"
    counters = run(body, torch.zeros(1), torch.zeros(1), threads=32, shared=8192).counters
    assert (counters.wavefronts, counters.ideal_wavefronts) == (wavefronts, 1)


def test_wide_shared_accesses_take_a_phase_for_each_quarter():
    body = "mad.lo.u32 %r7, %r1, 16, %r2;\nst.shared.v4.b32 [%r7], {%r1, %r1, %r1, %r1};"
    counters = run(body, torch.zeros(1), torch.zeros(1), threads=32).counters
    assert (counters.wavefronts, counters.ideal_wavefronts) == (4, 4)


@triton.jit
def _rows_twice_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, PASSES: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(PASSES):
        for start in range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + row * N + at, mask=at < N, other=0.0).to(tl.float32)
        tl.debug_barrier()
    tl.store(out_ptr + row, tl.sum(total))


def test_a_second_pass_doubles_the_sectors():
    x, out = torch.randn(3, 512), torch.empty(3)
    once, twice = (gpusim.run_triton(_rows_twice_kernel, (3,), x, out, 512, BLOCK=128, PASSES=n) for n in (1, 2))
    assert once.counters.global_load_sectors == 3 * 512 * 4 // 32
    assert twice.counters.global_load_sectors == 2 * once.counters.global_load_sectors
    assert twice.traffic["x_ptr"] == once.traffic["x_ptr"]


@triton.jit
def _read_rows_kernel(x_ptr, out_ptr, stride, N, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + tl.program_id(0) * stride + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def test_rows_of_2730_touch_more_sectors_than_rows_of_2736():
    sectors = {}
    for stride in (2730, 2736):
        x, out = torch.zeros(4, stride, dtype=torch.bfloat16), torch.empty(4)
        report = gpusim.run_triton(_read_rows_kernel, (4,), x, out, stride, 2730, BLOCK=128)
        assert report.counters.global_load_bytes == 4 * 2730 * 2
        sectors[stride] = report.counters.global_load_sectors
    assert sectors[2736] == 4 * 171  # 2730 elements of 2 bytes: 170.6 sectors
    assert sectors[2730] > 1.3 * sectors[2736]


# ---- order
def _histogram(order, seed):
    counts = torch.zeros(64, dtype=torch.int32)
    with gpusim.options(order=order, seed=seed):
        report = run("and.b32 %r7, %r1, 7;\nmul.wide.u32 %d6, %r7, 4;\nadd.u64 %d6, %d6, %d2;\nred.global.add.u32 [%d6], 1;",
                     torch.zeros(1), counts, ctas=5)  # fmt: skip
    return counts, report


def test_results_and_counters_do_not_depend_on_the_order():
    first, report = _histogram("in", 0)
    assert first[:8].tolist() == [40] * 8
    for order in ("reverse", "random"):
        for seed in range(8):
            counts, other = _histogram(order, seed)
            assert torch.equal(counts, first)
            assert other.counters == report.counters


def test_ctas_run_in_the_order_asked_for():
    def order_of(order, seed=0):
        log = torch.zeros(64, dtype=torch.int32)
        body = "atom.global.add.u32 %r7, [%d1], 1;\nmul.wide.u32 %d6, %r7, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d6], %r5;"
        with gpusim.options(order=order, seed=seed):
            run(body, torch.zeros(1, dtype=torch.int32), log, threads=1, ctas=6)
        return log[:6].tolist()

    assert order_of("in") == [0, 1, 2, 3, 4, 5]
    assert order_of("reverse") == [5, 4, 3, 2, 1, 0]
    shuffled = order_of("random", 1)
    assert sorted(shuffled) == order_of("in")
    assert shuffled == order_of("random", 1) != order_of("random", 2)


# ---- bad launches
@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((0, 1, 1), (32, 1, 1)),
        ((1, 1, 1), (0, 1, 1)),
        ((1, 1, 1), (2048, 1, 1)),
        ((1, 1, 70000), (32, 1, 1)),
        ((2**31, 1, 1), (32, 1, 1)),
        ((2**20, 2**14, 1), (32, 1, 1)),
    ],
)
def test_absurd_launches_are_errors(grid, block):
    with pytest.raises((ValueError, gpusim.SimulationError), match=r"grid|block"):
        gpusim.run_ptx(source(""), "kernel", grid=grid, block=block, args=[torch.zeros(1), torch.zeros(1), 0])


def test_arguments_must_fit_the_parameters():
    a = torch.zeros(4)
    launch = {"grid": (1, 1, 1), "block": (1, 1, 1)}
    with pytest.raises(ValueError, match="3 parameters, got 2"):
        gpusim.run_ptx(source(""), "kernel", args=[a, a], **launch)
    with pytest.raises(ValueError, match=r"n: expected an integer for \.u32, got 0.5"):
        gpusim.run_ptx(source(""), "kernel", args=[a, a, 0.5], **launch)
    with pytest.raises(ValueError, match="n: expected 4 bytes, got 2"):
        gpusim.run_ptx(source(""), "kernel", args=[a, a, b"xx"], **launch)
    with pytest.raises(ValueError, match="entry_name: expected one of kernel; got kernels"):
        gpusim.run_ptx(source(""), "kernels", args=[], **launch)
    with (
        pytest.raises(ValueError, match="order: expected one of 'in', 'reverse', 'random'; got 'out'"),
        gpusim.options(order="out"),
    ):
        pass


def test_check_lists_what_is_not_supported():
    assert gpusim.check(source("add.u32 %r7, %r1, 1;")) == []
    text = source("add.u32 %r7, %r1, 1;\nwgmma.fence.sync.aligned;\nadd.f8 %r7, %r1, 1;")
    found = gpusim.check(text)
    assert [t for _, t, _ in found] == ["wgmma.fence.sync.aligned;", "add.f8 %r7, %r1, 1;"]
    assert [text.splitlines()[line - 1] for line, _, _ in found] == [t for _, t, _ in found]


@pytest.mark.parametrize(
    "instruction",
    ["sub.sat.s32 %r7, %r1, %r1", "cvt.rni.sat.f32.f32 %f1, %f2", "min.xorsign.abs.f32 %f1, %f2, %f2", "add.rz.sat.f32 %f1, %f2, %f2",
     "rcp.approx.ftz.f64 %e1, %e2", "cvt.u8.u32 %p1, %r1", "ld.global.u32 %r7, [%p1]", "mov.u64 %d9, %tid.x",
     "ld.param.u64 %d9, [a+9223372036854775807]", "mov.pred %p1, !%p2", "add.u32 %r7, %r7, %clock",
     "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1}, {%r1}, {%r1}, {%f1}"],
)  # fmt: skip
def test_what_would_be_misread_is_refused(instruction):
    assert len(gpusim.check(source(f"{instruction};"))) == 1


def test_bytes_of_an_element_that_are_not_used_are_not_read():
    a, b = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = 'setp.eq.u32 %p1, %r1, 15;\nmul.wide.u32 %d6, %r1, 4;\nadd.u64 %d6, %d6, %d1;\nmov.u64 %d9, 0;\n.pragma "used_bytes_mask 0x000f";\n@%p1 ld.global.b64 %d9, [%d6+4];\nst.global.b32 [%d5], %r1;'
    with gpusim.options(on_error="collect"):
        report = run(body, a[:17].clone(), b, threads=16)
    assert report.errors == []


# ---- Triton
@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n + LIMIT
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=mask) + tl.load(y_ptr + at, mask=mask), mask=mask)


def test_a_triton_kernel_runs_and_its_fault_is_at_the_users_line():
    x, y, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    with gpusim.options(outputs=[out]):
        report = gpusim.run_triton(_add_kernel, (4,), x, y, out, 1000, BLOCK=256, LIMIT=0)
    assert torch.equal(out, x + y)
    assert report.traffic["out_ptr"].stored_bytes == 4000
    with pytest.raises(gpusim.OutOfBoundsError, match=r"4000 of [xy]_ptr, which has 4000") as caught:
        gpusim.run_triton(_add_kernel, (4,), x, y, out, 1000, BLOCK=256, LIMIT=1)
    line = _add_kernel.starting_line_number + 4
    assert f"{Path(__file__).name}:{line}" in caught.value.where  # Triton's cache may know another checkout
    assert caught.value.cta == (3, 0, 0)


@triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])
@triton.jit
def _tuned_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)


def test_plain_and_autotuned_launches_run_on_the_driver():
    x, out = torch.randn(300), torch.empty(300)
    with gpusim.driver(80) as reports:
        _tuned_kernel[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, out, 300)
    assert torch.equal(out, 2 * x)
    assert reports


@triton.jit
def _layer_norm_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * N + at, mask=at < N, other=0.0)
    d = tl.where(at < N, x - tl.sum(x) / N, 0.0)
    tl.store(out_ptr + tl.program_id(0) * N + at, d / tl.sqrt(tl.sum(d * d) / N + 1e-6), mask=at < N)


@pytest.mark.parametrize("num_warps", [1, 4, 32])
def test_layer_norm_over_many_warps_is_clean_and_right(num_warps):
    x, out = torch.randn(2, 1000), torch.empty(2, 1000)
    results = []
    for seed in range(4):
        with gpusim.options(outputs=[out], seed=seed):
            gpusim.run_triton(_layer_norm_kernel, (2,), x, out, 1000, BLOCK=1024, num_warps=num_warps)
        results.append(out.clone())
    assert all(torch.equal(r, results[0]) for r in results)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (1000,), eps=1e-6))


def test_a_function_that_is_not_compiled_is_refused_by_name():
    def helper():
        pass

    with pytest.raises(TypeError, match=r"triton\.jit function; helper"):
        gpusim.run_triton(helper, (1,))


# ---- the command line
def test_the_command_checks_and_runs(tmp_path, capsys):
    file = tmp_path / "kernel.ptx"
    file.write_text(source("ld.global.b32 %r7, [%d4];\nst.global.b32 [%d5], %r7;"))
    assert main([str(file)]) == 0
    assert "1 kernels: kernel\n0 unsupported" in capsys.readouterr().out
    arguments = [
        "--arg",
        "tensor:int32:32:arange",
        "--arg",
        "tensor:int32:32:fresh",
        "--arg",
        "int:0",
        "--shared",
        "64",
    ]
    assert main([str(file), "--grid", "1", *arguments, "--save", str(tmp_path)]) == 0
    assert np.load(tmp_path / "arg1.npy").tolist() == list(range(32))
    assert "distinct ld" in capsys.readouterr().out
    assert main([str(file), "--grid", "1", "--block", "64", *arguments]) == 1
    assert "out of bounds load" in capsys.readouterr().err
    assert main([str(file), "--grid", "1", "--arg", "tensor:int32"]) == 1
    assert "--arg: expected" in capsys.readouterr().err
    file.write_text(source("wgmma.fence.sync.aligned;"))
    assert main([str(file)]) == 1
    assert "unknown instruction: wgmma.fence.sync.aligned;" in capsys.readouterr().out


# ---- the project's own operators
def test_operators_run_on_the_simulator():
    gate, up = torch.randn(2, 3, 70).unbind(0)
    with executing("simulator"):
        out = eva02_kernels.swiglu(gate, up, backend="triton")
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
    with pytest.raises(NotImplementedError, match="needs GPU tensors"):
        eva02_kernels.swiglu(gate, up, backend="triton")


def test_an_operators_traffic_is_its_minimum():
    x, weight = torch.randn(64, 768, dtype=torch.bfloat16), torch.randn(768)
    reports = []
    with executing("simulator", on_report=reports.append):
        eva02_kernels.add_layer_norm(x, None, weight, None, backend="triton")
    (report,) = reports
    traffic = {name: t for name, t in report.traffic.items() if t.loaded_bytes or t.stored_bytes}
    assert sum(t.loaded_bytes for t in traffic.values()) == x.nbytes + weight.nbytes
    assert sum(t.stored_bytes for t in traffic.values()) == x.nbytes + 2 * 64 * 4  # normed; mean and rstd of each row
    assert (
        report.counters.global_load_sectors == (x.nbytes + 64 * weight.nbytes) // 32
    )  # each row reads the weight again


# ---- host threads, perturbed numerics
def _outcome(body, **options):
    a, b = torch.arange(64, dtype=torch.float32), torch.zeros(64 * 8)
    with gpusim.options(**options):
        report = run(body, a, b, threads=64, ctas=8)
    return b, report


def test_host_threads_change_neither_bits_nor_counters():
    body = (
        "ld.global.f32 %f1, [%d4];\nex2.approx.f32 %f2, %f1;\nmul.wide.u32 %d6, %r5, 256;\nadd.u64 %d6, %d6, %d5;\n"
        "st.global.f32 [%d6], %f2;\nst.global.f32 [%d2], 0f3f800000;"
    )
    one, two, three = (_outcome(body, threads=n, seed=5) for n in (1, 2, 3))
    assert torch.equal(one[0], two[0]) and torch.equal(one[0], three[0])
    assert one[1].counters == two[1].counters == three[1].counters
    assert one[1].counters.collisions > 0
    # Where each tensor lies on the host is no part of it.
    assert [t[:4] if isinstance(t, tuple) else t for t in one[1].traffic] == list(two[1].traffic)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_race_of_ctas_is_found_by_any_number_of_host_threads(threads):
    body = (
        "mul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d6], %r5;\nld.global.b32 %r7, [%d2]; // <-"
    )
    with pytest.raises(gpusim.RaceError) as caught, gpusim.options(threads=threads):
        run(body, torch.zeros(8), torch.zeros(8), threads=1, ctas=3)
    line = marked_line(source(body))
    assert line in (caught.value.line, caught.value.other_line)
    assert caught.value.tensor == "b" and caught.value.cta[0] > 0


def test_perturbed_numerics_stay_within_the_stated_errors():
    body = (
        "ld.global.f32 %f1, [%d4];\nadd.f32 %f1, %f1, 0f3f800000;\nrcp.approx.f32 %f2, %f1;\nst.global.f32 [%d5], %f2;"
    )
    exact, _ = _outcome(body)
    moved, _ = _outcome(body, numerics="perturb")
    assert not torch.equal(exact, moved)
    true = 1 / (torch.arange(64, dtype=torch.float64) + 1)
    assert ((moved[:64].double() - true).abs() <= 2**-23 * true).all()
    again, _ = _outcome(body, numerics="perturb")
    other, _ = _outcome(body, numerics="perturb", seed=1)
    assert torch.equal(moved, again) and not torch.equal(moved, other)


def test_products_are_fused_with_sums_where_ptx_leaves_it_open():
    def result(rounding, numerics):
        body = (
            "mov.f32 %f1, 0f3f800800;\n"  # 1 + 2^-12: its square is 1 + 2^-11 and a bit that float32 drops
            f"mul{rounding}.f32 %f2, %f1, %f1;\nadd.f32 %f3, %f2, 0fbf801000;\nst.global.f32 [%d5], %f3;"
        )
        return _outcome(body, numerics=numerics)[0][0].item()

    assert result("", "exact") == 0
    assert result("", "perturb") == 2**-24
    assert result(".rn", "perturb") == 0
