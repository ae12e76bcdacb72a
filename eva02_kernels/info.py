"""``python -m eva02_kernels.info [op]``: what is built, what runs here, and why the rest does not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from typing import Any

import torch

import eva02_kernels
from eva02_kernels import _native, _triton
from eva02_kernels._launch import cuda_gemm_route, gemm_route
from eva02_kernels._registry import BACKENDS, OP_NAMES, OpSpec, get_spec


def environment() -> dict[str, Any]:
    """Versions, compiled libraries and devices, as plain values."""
    path, reason = _native.cpu_library()
    library: dict[str, Any] = {"missing": reason} if path is None else {"path": str(path), "isa": _native.cpu_isa()}
    cuda_path, cuda_reason = _native.cuda_library()
    build = {k: v for k, v in _native.build_info().items() if not k.startswith("missing")}
    return {
        "eva02_kernels": eva02_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "triton": importlib.metadata.version("triton") if _triton.missing() is None else None,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_library": library,
        "cuda_library": {"missing": cuda_reason} if cuda_path is None else {"path": str(cuda_path)},
        "build": build,
    }


def backend_state(spec: OpSpec, name: str) -> str:
    """In words: what the backend does for float32 tensors on the CPU, the one device every machine has."""
    backend = spec.backend(name)
    if backend is None:
        return "no kernel in this release"
    if name == "eager":
        return "plain PyTorch, any device and dtype; the reference"
    if name == "triton":
        return triton_state(spec.name)
    if name == "cuda":
        return cuda_state(spec.name)
    sample = next(s for s in spec.samples() if s.smoke)
    args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    reasons = backend.unsupported("fwd", spec.canonical(*args, **kwargs))
    return "; ".join(reasons) if reasons else f"runs, forward and backward ({_native.cpu_isa()})"


PRODUCTS = ("qkv_rope", "linear", "swiglu_mlp", "gelu_mlp")  # operators that are matrix products


def cuda_state(op: str | None = None) -> str:
    """In words: whether the compiled CUDA kernels run here, and where the products of ``op`` are computed."""
    reason = _native.cuda_library()[1] or (None if torch.cuda.is_available() else "no GPU")
    if reason is None:
        reason = "; ".join(_native.capability_reasons(torch.cuda.current_device())) or None
    if reason:
        return _with_routes(f"does not run here: {reason}", op, (80, 90), cuda_gemm_route)
    device = torch.device("cuda", torch.cuda.current_device())
    text = f"runs on {torch.cuda.get_device_name(device)}"
    return _with_routes(text, op, (_triton.architecture(device),), cuda_gemm_route)


def _with_routes(text: str, op: str | None, devices: tuple[int, ...], route: Callable[[int], str]) -> str:
    """``text``, and a line on the products of ``op`` for each compute capability."""
    routes = [f"products on {arch / 10}: {route(arch)}" for arch in devices] if op in PRODUCTS else []
    return "\n          ".join([text, *routes])


def triton_state(op: str | None = None) -> str:
    """In words: whether Triton kernels run here, and where the products of ``op`` are computed."""
    reason = _triton.missing() or (None if torch.cuda.is_available() else "no GPU")
    devices: tuple[int, ...]
    if reason:
        text, devices = f"does not run here: {reason}", (80, 90)
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        text, devices = f"runs on {torch.cuda.get_device_name(device)}", (_triton.architecture(device),)
    return _with_routes(text, op, devices, lambda arch: f"{gemm_route(arch, torch.bfloat16)}, bfloat16")


def print_overview() -> None:
    values = environment()
    library = values["cpu_library"]
    print(f"eva02_kernels {values['eva02_kernels']}, torch {values['torch']}, Python {values['python']}")
    print(f"machine       {values['machine']}, {values['threads']} threads, GPU: {values['cuda_device'] or 'none'}")
    if "path" in library:
        print(f"cpu           compiled library loaded, instruction set {library['isa']}: {library['path']}")
    else:
        print(f"cpu           {library['missing']}")
    for key, value in values["build"].items():
        print(f"  {key:<12}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    print(f"triton        {triton_state()}")
    print(f"cuda          {cuda_state()}")
    print()
    width = max(map(len, OP_NAMES))
    for name in OP_NAMES:
        spec = get_spec(name)
        chosen = next(b.name for b in spec.backends if b.name == "eager" or not _refuses(spec, b.name))
        print(f"{name:<{width}}  {chosen:<6} {spec.summary}")
    print("\npython -m eva02_kernels.info OP shows one operator: formula, saved tensors, every backend's state.")


def _refuses(spec: OpSpec, name: str) -> bool:
    return not backend_state(spec, name).startswith("runs")


def print_op(name: str) -> None:
    spec = get_spec(name)
    page = importlib.import_module(f"eva02_kernels.ops.{name}")
    print(f"{spec.name}: {spec.summary}\n")
    print(f"formula   {spec.formula}")
    print(f"source    {spec.source}")
    print(f"saved     {spec.saved}")
    print(f"forward   {spec.name}_fwd({spec.fwd_schema}, str backend) -> {spec.fwd_returns}")
    print(f"backward  {spec.name}_bwd({spec.bwd_schema}, str backend) -> Tensor[]")
    print("\nbackends, in the order in which auto tries them (float32 on the CPU):")
    for backend in BACKENDS:
        print(f"  {backend:<7} {backend_state(spec, backend)}")
    print(f"\n{page.__doc__}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eva02_kernels.info", description=__doc__)
    parser.add_argument("op", nargs="?", choices=OP_NAMES, metavar="OP", help=f"one of: {', '.join(OP_NAMES)}")
    parser.add_argument("--json", action="store_true", help="print the environment as JSON")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(environment(), indent=2))
    elif args.op:
        print_op(args.op)
    else:
        print_overview()


if __name__ == "__main__":
    main()
