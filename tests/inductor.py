"""Triton kernels as TorchInductor writes them for a GPU, without one: its generated program, run on CPU tensors."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from eva02_kernels.testing import gpusim

_A100 = SimpleNamespace(
    major=8, minor=0, cc=80, type="cuda", index=0, name="A100", multi_processor_count=108, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, total_memory=40 << 30, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=166912, L2_cache_size=40 << 20,
)  # fmt: skip
_INTERFACE = "torch._dynamo.device_interface.CudaInterface"
_STUBS = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda.get_device_capability": lambda *_: (8, 0),
    "torch.cuda.get_device_properties": lambda *_: _A100,
    "torch.cuda._get_device_properties": lambda *_: _A100,
    f"{_INTERFACE}.Worker.get_device_properties": staticmethod(lambda *_: _A100),
    f"{_INTERFACE}.get_compute_capability": staticmethod(lambda *_: 80),
    "torch.utils._triton.has_triton": lambda *_: True,
}


def generate(function: Callable[..., Any], inputs: list[Tensor]) -> str:
    """The program that Inductor writes for ``function`` on a GPU, as Python text."""
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with contextlib.ExitStack() as stack:
        for name, value in _STUBS.items():
            stack.enter_context(mock.patch(name, value, create=True))
        stack.enter_context(gpusim.driver(80))
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in inputs]
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="real")(*fakes)
        graph = GraphLowering(traced, example_inputs=fakes)
        options = {"triton.autotune_at_compile_time": False, "triton.unique_kernel_names": True}
        for context in (V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext())):
            stack.enter_context(context)
        stack.enter_context(config.patch(options))
        graph.run(*fakes)
        code, *_ = graph.codegen()
    return code.value


class _Kernel:
    """One generated kernel; ``run`` launches it with the blocks that it has no value for itself."""

    def __init__(self, name: str, text: str, folder: Path) -> None:
        # Without the heuristics, which choose blocks by timing on a device.
        begin = text.index("@triton_heuristics")
        body = text[text.index("@triton.jit", begin) :]
        lines = [line for line in text[:begin].splitlines() if "triton_heuristics" not in line]
        header = "\n".join(lines).replace("triton_helpers.set_driver_to_gpu()", "")
        path = folder / f"{name}.py"
        path.write_text("from torch._inductor.runtime import triton_helpers\n" + header + "\n" + body)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.function = getattr(module, name)
        self.blocks = {b: 4 if b == "YBLOCK" else 64 for b in re.findall(r"(\w+BLOCK) : tl.constexpr", body)}
        if "R0_BLOCK" in self.blocks or "tl.sum" in body or "_reduce" in body:
            self.blocks["XBLOCK"] = 2

    def run(self, *args: Any, stream: int) -> None:
        sizes = [a for a in args if isinstance(a, int)]
        grid = (-(-sizes[0] // self.blocks.get("XBLOCK", 1)), 1, 1)
        gpusim.run_triton(self.function, grid, *args, **self.blocks)


def run(function: Callable[..., Any], inputs: list[Tensor], folder: Path) -> tuple[list[Tensor], int]:
    """What the generated program gives for CPU tensors, and how many kernels it has."""
    text = generate(function, inputs)
    kernels: list[str] = []

    class AsyncCompile:
        def triton(self, name: str, source: str, device_str: str = "") -> _Kernel:
            kernels.append(name)
            return _Kernel(name, source, folder)

        def wait(self, scope: dict[str, Any]) -> None:
            pass

    text = text.replace("from torch._inductor.async_compile import AsyncCompile", "")
    text = text.replace("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "")
    text = re.sub(r"^empty_strided_cuda = .*$", "empty_strided_cuda = _empty", text, flags=re.MULTILINE)
    text = re.sub(r"^ *assert_size_stride.*\(\(.*$", "", text, flags=re.MULTILINE)
    scope: dict[str, Any] = {
        "AsyncCompile": AsyncCompile,
        "get_raw_stream": lambda index: 0,
        "_empty": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
    }
    with mock.patch("torch.cuda._DeviceGuard"), mock.patch("torch.cuda.set_device"):
        exec(compile(text, "generated", "exec"), scope)
        outputs = scope["call"](list(inputs))
    return list(outputs), len(kernels)


def _rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


CASES = {
    "layer norm and gate": (
        lambda x, w, b: torch.nn.functional.layer_norm(x, (x.shape[-1],), w, b).sigmoid() * x,
        [_rows(16, 200), _rows(200), _rows(200)],
    ),
    "gated activation in bfloat16": (
        lambda gate, up: torch.nn.functional.silu(gate) * up,
        [_rows(10, 200, dtype=torch.bfloat16), _rows(10, 200, dtype=torch.bfloat16).flip(0)],
    ),
    "softmax of long rows": (lambda x: torch.softmax(x, -1), [_rows(3, 3000)]),
    "sums of columns": (lambda x: x.square().sum(0), [_rows(300, 40)]),
    "running sums": (lambda x: x.cumsum(-1), [_rows(5, 130)]),
    "sums by index": (
        lambda x, i: x.new_zeros(7, 16).index_add(0, i, x),
        [_rows(50, 16), torch.arange(50) % 7],
    ),
}


def main() -> None:
    """Run every case and write {name: {"kernels": how many, "error": None or what went wrong}} to argv[1]."""
    outcome: dict[str, dict[str, Any]] = {}
    for name, (function, inputs) in CASES.items():
        kernels = 0
        try:
            with tempfile.TemporaryDirectory() as folder:
                (out,), kernels = run(function, inputs, Path(folder))
            expected = function(*(t.double() if t.is_floating_point() else t for t in inputs))
            tolerance = 2e-2 if out.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
            outcome[name] = {"kernels": kernels, "error": None}
        except Exception:
            outcome[name] = {"kernels": kernels, "error": traceback.format_exc()}
    Path(sys.argv[1]).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
