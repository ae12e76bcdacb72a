"""What the operators share: argument checks, autocast, eager and CPU backends in their common form."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels import _native, _triton
from eva02_kernels._launch import MAX_ROW_WIDTH
from eva02_kernels._library import eager_gradients, run
from eva02_kernels._registry import Backend, OpSpec, check_backend_name

MAX_CUDA_ROW_WIDTH = 8192  # csrc/common/rows.cuh
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- checks: every message names the argument, what was expected and what came --------------------------------------
def check(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}; got {got}")


def check_activation(name: str, t: Tensor, *, min_dim: int = 1) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64; got {t.dtype}")
    if t.dim() < min_dim:
        raise ValueError(f"{name}: expected at least {min_dim} dimensions; got shape {tuple(t.shape)}")


def check_like(name: str, t: Tensor | None, shape: Sequence[int], like: Tensor, *, or_float32: bool = False) -> None:
    """``t``, where given, has ``shape`` and the device and dtype of ``like`` (or, for a parameter, float32)."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(t).__name__}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}; got {tuple(t.shape)}")
    if t.dtype != like.dtype and not (or_float32 and t.dtype == torch.float32):
        raise ValueError(f"{name}: expected {like.dtype}{' or torch.float32' if or_float32 else ''}; got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}; got one on {t.device}")


check_parameter = functools.partial(check_like, or_float32=True)


def check_index(name: str, idx: Tensor, like: Tensor) -> None:
    if not isinstance(idx, Tensor) or idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected an int32 or int64 tensor; got {getattr(idx, 'dtype', type(idx))}")
    if idx.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}; got one on {idx.device}")


def num_rows(x: Tensor) -> int:
    """Product of the leading dims of x."""
    rows = 1
    for n in x.shape[:-1]:
        rows *= n
    return rows


def padded(n: int) -> int:
    """Row stride of a hidden tensor of width n: a multiple of 8 elements, 16 bytes in 16-bit types."""
    return (n + 7) // 8 * 8


# ---- autocast -------------------------------------------------------------------------------------------------------
def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Activations and GEMM weights in the autocast dtype, where autocast is on for their device (float64 stays).

    Tables, norm weights, statistics, masks and layer scales are not passed here and are never cast.
    """
    first = next(t for t in tensors if t is not None)
    device = first.device.type
    if first.is_meta or not torch.is_autocast_enabled(device):  # a meta device has no autocast to ask for
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype not in FLOATS[:3] else t.to(dtype) for t in tensors)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference computes in the dtypes it is given: its plain PyTorch calls are not cast once more."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wrapper


# ---- calling an operator --------------------------------------------------------------------------------------------
def call(spec: OpSpec, backend: str, args: tuple[Any, ...]) -> Any:
    """Run the operator on its canonical arguments; ``backend="eager"`` is the reference itself.

    Returns the public outputs: a tensor, or a tuple where the spec has several.
    """
    if backend == "eager":
        result = without_autocast(spec.reference)(*args)
    else:
        if backend != "auto":
            check_backend_name(backend)
        result = run(f"{spec.name}_fwd", *args, backend)
    if isinstance(result, Tensor):
        return result
    return result[0] if spec.num_outputs == 1 else result[: spec.num_outputs]


# ---- backends -------------------------------------------------------------------------------------------------------
def _never(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    return ()


def eager_backend(fwd: Callable[..., Any], bwd: Callable[..., list[Tensor]]) -> Backend:
    """Plain PyTorch as a backend: ``fwd`` gives outputs and statistics as the schema returns them."""

    def forward(*args: Any) -> Any:
        outputs = fwd(*args)
        return outputs.contiguous() if isinstance(outputs, Tensor) else tuple(o.contiguous() for o in outputs)

    return Backend("eager", forward, bwd, _never)


def reference_backward(
    reference: Callable[..., Any],
    positions: Sequence[int],
    split: Callable[..., tuple[Sequence[Tensor | None], tuple[Any, ...], Sequence[bool]]],
) -> Callable[..., list[Tensor]]:
    """Eager backward by autograd of the reference.

    ``positions``: the differentiable forward arguments, in the order of ``needs``. ``split``: backward arguments ->
    (gradients of the reference's outputs, forward arguments, needs).
    """

    def bwd(*args: Any) -> list[Tensor]:
        grads, forward_args, needs = split(*args)
        return eager_gradients(reference, forward_args, positions, needs, grads)

    return bwd


def cpu_backend(
    fwd: Callable[..., Any],
    bwd: Callable[..., Any],
    unsupported: Callable[[str, tuple[Any, ...]], Sequence[str]] = _never,
    *,
    error_multiple: float = 1.0,
) -> Backend:
    """The compiled CPU kernels as a backend: ``fwd`` and ``bwd`` take the library before the operator's arguments.

    ``unsupported`` adds the operator's own reasons.
    """

    def reasons(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
        common = _native.cpu_unsupported(args)
        return common or unsupported(direction, args)

    return Backend(
        "cpu", functools.partial(fwd, _native.CPU), functools.partial(bwd, _native.CPU), reasons, error_multiple
    )


def cuda_backend(
    fwd: Callable[..., Any],
    bwd: Callable[..., Any],
    unsupported: Callable[[str, tuple[Any, ...]], Sequence[str]] = _never,
    *,
    error_multiple: float = 1.0,
) -> Backend:
    """The compiled CUDA kernels as a backend, through the adapters of :func:`cpu_backend`."""

    def reasons(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
        return _native.cuda_unsupported(args) or unsupported(direction, args)

    return Backend(
        "cuda", functools.partial(fwd, _native.CUDA), functools.partial(bwd, _native.CUDA), reasons, error_multiple
    )


def cuda_rows(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    """A CUDA kernel's reason: a CTA holds a row of the operator's main tensor in registers."""
    width = args[0].shape[-1]
    return (f"needs at most {MAX_CUDA_ROW_WIDTH} columns, got {width}",) if width > MAX_CUDA_ROW_WIDTH else ()


def triton_backend(
    op: str,
    unsupported: Callable[[str, tuple[Any, ...]], Sequence[str]] = _never,
    *,
    suffix: str = "",
    error_multiple: float = 1.0,
    float32_multiple: float | None = None,
) -> Backend:
    """``fwd<suffix>`` and ``bwd<suffix>`` of ``ops/<op>/triton_kernels.py``, which is imported by the first call."""

    @functools.cache
    def kernels() -> Any:
        return importlib.import_module(f"eva02_kernels.ops.{op}.triton_kernels")

    def reasons(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
        return _triton.unsupported(args) or unsupported(direction, args)

    return Backend(
        "triton",
        lambda *args: getattr(kernels(), f"fwd{suffix}")(*args),
        lambda *args: getattr(kernels(), f"bwd{suffix}")(*args),
        reasons,
        error_multiple,
        float32_multiple,
    )


def product_backends(
    op: str,
    triton_unsupported: Callable[[str, tuple[Any, ...]], Sequence[str]] = _never,
    cuda_unsupported: Callable[[str, tuple[Any, ...]], Sequence[str]] = _never,
    *,
    error_multiple: float = 1.0,
    float32_multiple: float | None = None,
) -> tuple[Backend, Backend]:
    """CUDA and Triton: ``fwd`` and ``bwd`` of ``ops/<op>/gpu.py`` over each one's ``_products.Kernels``.

    Both are imported by the first call.
    """

    def backend(name: str, common: Any, unsupported: Any) -> Backend:
        @functools.cache
        def bound(direction: str) -> Callable[..., Any]:
            function = getattr(importlib.import_module(f"eva02_kernels.ops.{op}.gpu"), direction)
            return functools.partial(function, importlib.import_module(f"eva02_kernels.ops._{name}_gemm"))

        return Backend(
            name,
            lambda *args: bound("fwd")(*args),
            lambda *args: bound("bwd")(*args),
            lambda direction, args: common(args) or unsupported(direction, args),
            error_multiple,
            float32_multiple,
        )

    return (
        backend("cuda", _native.cuda_unsupported, cuda_unsupported),
        backend("triton", _triton.unsupported, triton_unsupported),
    )


def loss_unsupported(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    """Of a loss's kernels: backward's first argument, the loss gradient, is float32 whatever the features are."""
    if direction == "bwd" and args[1].dtype == torch.float64:
        return ("needs float32, bfloat16 or float16, got float64",)
    return ()


def whole_rows_only(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    """A Triton kernel's reason: it holds a row of the operator's main tensor in registers."""
    width = args[0].shape[-1]
    return (f"needs at most {MAX_ROW_WIDTH} columns, got {width}",) if width > MAX_ROW_WIDTH else ()


def norm_rows_unsupported(*norms: tuple[int, bool], limit: int = MAX_ROW_WIDTH) -> Sequence[str]:
    """:func:`whole_rows_only` for (width, whether there is one) of each normalisation of an operator."""
    width = max((n for n, there in norms if there), default=0)
    return (f"needs at most {limit} normalised columns, got {width}",) if width > limit else ()


def rows_2d(t: Tensor) -> Tensor:
    """(rows, N) view of t, or a copy where the leading dims have no common stride or the last is strided."""
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(num_rows(t), t.shape[-1])
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def rows_of(t: Tensor | None) -> Tensor | None:
    """What a native kernel reads as rows: t itself where it is contiguous, which costs no view, else ``rows_2d``."""
    return t if t is None or t.is_contiguous() else rows_2d(t)


def last_dense(x: Tensor) -> Tensor:
    """x itself where its last dim is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows, F) views of gate and up; without up, of the halves of a packed gate."""
    if up is not None:
        return rows_2d(gate), rows_2d(up)
    packed = rows_2d(gate)
    width = packed.shape[1] // 2
    return packed[:, :width], packed[:, width:]


def statistics(x: Tensor, eps: float, *, rms: bool = False) -> tuple[Tensor, Tensor]:
    """(mean, rstd) float32 (rows,) of the last dim; for RMS the mean is empty."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(num_rows(x), x.shape[-1])
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    if rms:
        return rows.new_empty(0, dtype=torch.float32), (rows.square().mean(-1) + eps).rsqrt().float()
    mean = rows.mean(-1)
    variance = (rows - mean[:, None]).square().mean(-1)
    return mean.float(), (variance + eps).rsqrt().float()


def norm_magnitude(x: Tensor, weight: Tensor | None, eps: float, factor: Tensor | float = 1.0) -> float:
    """Rms of the terms of a LayerNorm's input gradient, ``rstd * weight * dy`` times ``factor``, for dy of rms 1.

    With two columns the terms cancel but for eps: the gradient alone would be no scale to judge its error by.
    """
    if not x.numel():
        return 0.0
    x = x.detach().double()
    rstd = (torch.var(x, dim=-1, correction=0, keepdim=True) + eps).rsqrt()
    terms = rstd * factor * (1.0 if weight is None else weight.detach().double())
    return float(terms.square().mean().sqrt())


def empty_stats(x: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.float32, device=x.device)


def layer_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, in at least float32, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def scale_and_add_ref(y: Tensor, x: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """x + row_scale * layer_scale * y; row_scale (B,) belongs to y's first dim."""
    dtype = y.dtype
    if layer_scale is not None or row_scale is not None:
        y = y.to(torch.promote_types(dtype, torch.float32))
    if layer_scale is not None:
        y = y * layer_scale.to(y.dtype)
    if row_scale is not None:
        rows = y.reshape(row_scale.shape[0], -1, y.shape[-1]) if y.numel() else y
        y = (rows * row_scale.to(y.dtype)[:, None, None]).reshape(y.shape) if y.numel() else y
    return y.to(dtype) if x is None else (x + y).to(dtype)


def canonical_pre_norm(
    pre_norm: tuple[Tensor | None, Tensor | None, float] | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None, float, bool]:
    """(weight, bias, eps, whether there is one) of the LayerNorm before a projection of x."""
    if pre_norm is None:
        return None, None, 0.0, False
    check(len(pre_norm) == 3, "pre_norm", "(weight, bias, eps)", pre_norm)
    weight, bias, eps = pre_norm
    check_parameter("pre_norm weight", weight, x.shape[-1:], x)
    check_parameter("pre_norm bias", bias, x.shape[-1:], x)
    return weight, bias, float(eps), True


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def empty_like_needed(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Contiguous uninitialised gradients for those tensors that need one."""
    return [dense_like(t) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)]


def dense_like(t: Tensor) -> Tensor:
    """Uninitialised and contiguous, shaped as t: half the host time of ``torch.empty(t.shape, ...)``."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def nonempty(*tensors: Tensor) -> tuple[Tensor | None, ...]:
    """None in the place of every saved tensor that stands for nothing."""
    return tuple(t if t.numel() else None for t in tensors)


def view_2d(t: Tensor) -> Tensor:
    """(rows, N) view of a contiguous tensor, of a zero-size one too."""
    return t.view(num_rows(t), t.shape[-1])


def add_residual(out: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
    """A residual that is x itself was added by the operator; any other is added here."""
    return out if residual is None or residual is x else residual.to(out.dtype) + out
