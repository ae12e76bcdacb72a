"""The host side of the Triton backend: launching, choosing, refusing. Kernels are compiled, nothing is computed."""

from __future__ import annotations

import functools

import pytest
import torch

import eva02_kernels
from eva02_kernels import _launch, _triton
from eva02_kernels._registry import get_spec
from eva02_kernels.ops.rope_attention.spec import triton_unsupported
from eva02_kernels.testing import executing, offline
from eva02_kernels.testing.offline import compiling

pytest.importorskip("triton")


from eva02_kernels.ops.swiglu.triton_kernels import _swiglu_fwd_kernel


def _rows(count, width, *, shift=0, dtype=torch.bfloat16):
    """(count, width), its first element ``shift`` elements after a 16-byte boundary."""
    storage = torch.zeros(count * width + 8, dtype=dtype)
    return storage[shift : shift + count * width].view(count, width)


@pytest.mark.parametrize("shifts", [(0, 0, 0), (1, 0, 0), (0, 0, 3)])
@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("width", [64, 61])
def test_a_direct_launch_is_the_launch_that_triton_would_make(shifts, rows, width, monkeypatch):
    """Same compiled kernel, grid and arguments, whatever was launched before."""
    launched = []
    choice = _launch.row_pieces(width)
    tensors = [_rows(rows, width, shift=s) for s in shifts]
    args = (*tensors, rows, width, width, width)
    with compiling(80):
        monkeypatch.setitem(offline._on_launch, "offline", lambda *launch: launched.append(launch))
        for other in (_rows(2, 64), _rows(16, 64)):  # leaves other specialisations of the kernel behind
            _triton.launch(_swiglu_fwd_kernel, (1, 1), choice, other, other, other, 2, 64, 64, 64, N=width)
        _triton.launch(_swiglu_fwd_kernel, (3, 2), choice, *args, N=width)
        launched.clear()
        _triton.launch(_swiglu_fwd_kernel, (3, 2), choice, *args, N=width)
        _swiglu_fwd_kernel.run(*args, grid=(3, 2), warmup=False, N=width, **choice.options)
    ours, tritons = launched
    assert ours[0] is tritons[0]  # one compiled kernel
    assert ours[2:4] == tritons[2:4]  # machine code, grid
    assert len(ours[4]) == len(tritons[4])
    assert all(a is b or a == b for a, b in zip(ours[4], tritons[4], strict=True))


def test_tuning_takes_the_fastest_and_keeps_it(monkeypatch):
    choices = [_launch.choice(BLOCK_M=n) for n in (16, 32, 64)]
    runs = []
    times = {16: 3.0, 32: 1.0, 64: 2.0}
    monkeypatch.setattr(_triton, "tuning", lambda: True)

    def do_bench(function, **options):
        function()
        return times[runs[-1]]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(_triton, "_tuned", {})

    def tuned():
        return _triton.tuned(("kernel", 1), choices, lambda c: runs.append(c["BLOCK_M"]))

    assert tuned() is choices[1] and tuned() is choices[1]
    assert runs == [16, 32, 64]  # once in a process


def test_tuning_passes_over_what_does_not_fit(monkeypatch):
    from triton import OutOfResources

    choices = [_launch.choice(BLOCK_M=n) for n in (16, 32)]
    monkeypatch.setattr(_triton, "tuning", lambda: True)
    monkeypatch.setattr(_triton, "_tuned", {})

    def do_bench(function, **options):
        function()
        return 1.0

    def run(choice):
        if choice is choices[0]:
            raise OutOfResources(200_000, 100_000, "shared memory")

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    assert _triton.tuned(("kernel", 2), choices, run) is choices[1]


@pytest.mark.parametrize("how", ["environment", "deterministic"])
def test_tuning_can_be_switched_off(how, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _triton.tuning()
    if how == "environment":
        monkeypatch.setenv("EVA02_AUTOTUNE", "0")
        assert not _triton.tuning()
        return
    torch.use_deterministic_algorithms(True)
    try:
        assert not _triton.tuning()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("how", ["allow_tf32", "set_float32_matmul_precision", "fp32_precision"])
def test_tf32_is_torchs_choice(how):
    """The old and the new switch; reading the old one raises once the new one was used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert _triton.dot_precision(torch.float32) == "ieee"
        if how == "allow_tf32":
            matmul.allow_tf32 = True
        elif how == "fp32_precision":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert _triton.dot_precision(torch.float32) == "tf32"
        assert _triton.dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_cpu_tensors_are_refused_outside_executing():
    with pytest.raises(NotImplementedError, match="needs GPU tensors, got cpu"):
        eva02_kernels.swiglu(torch.randn(3, 8), backend="triton")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), executing("interpreter"):
        pass
    with pytest.raises(ValueError, match="mode: expected 'interpreter'"), executing("emulator"):
        pass


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: eva02_kernels.rope_attention(*[torch.randn(1, 4, 1, 132)] * 3, backend="triton"),
            "head dim of 4..128",
        ),
        (
            lambda: eva02_kernels.add_layer_norm(torch.randn(2, 20000), backend="triton"),
            "needs at most 16384 columns, got 20000",
        ),
        (lambda: eva02_kernels.swiglu(torch.randn(2, 8).double(), backend="triton"), "got float64"),
    ],
)
def test_limits_are_refused_before_launch(call, match):
    with compiling(80) as kernels, pytest.raises(NotImplementedError, match=match):
        call()
    assert not kernels


def test_too_many_elements_for_int32_are_refused():
    rows = torch.empty(1, dtype=torch.bfloat16).expand(_triton.MAX_ROWS + 1, 1)
    with compiling(80), pytest.raises(NotImplementedError, match="needs at most 2147483647 rows"):
        eva02_kernels.swiglu(rows, rows, backend="triton")
    q = torch.empty_strided((1, 2**20, 1, 64), (2**32, 4096, 64, 1), dtype=torch.bfloat16, device="meta")
    small = torch.empty(1, 2, 1, 64)
    reasons = triton_unsupported("fwd", (q, *get_spec("rope_attention").canonical(small, small, small)[1:]))
    assert reasons == ["needs sequences that span under 2**31 elements, got 1048576 tokens of 4096"]


def test_keep_idx_is_checked_on_request(monkeypatch):
    q, table = torch.randn(1, 3, 2, 16), eva02_kernels.rope_2d((2, 2), 16)
    call = functools.partial(eva02_kernels.rope_attention, q, q, q, table, backend="eager")
    call(keep_idx=torch.tensor([[2, 1]]))
    monkeypatch.setenv("EVA02_DEBUG", "1")
    call(keep_idx=torch.tensor([[2, 1]]))
    with pytest.raises(ValueError, match=r"keep_idx: expected patches 0\.\.3; got -1\.\.2"):
        call(keep_idx=torch.tensor([[2, -1]]))
