from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, eager_gradients, run, scatter_grads
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    autocast,
    check,
    check_activation,
    check_like,
    check_parameter,
    cpu_backend,
    cuda_backend,
    cuda_rows,
    eager_backend,
    empty_stats,
    layer_norm_ref,
    norm_magnitude,
    num_rows,
    scale_and_add_ref,
    statistics,
    triton_backend,
    whole_rows_only,
)
from eva02_kernels.ops.add_layer_norm import native
from eva02_kernels.ops.add_layer_norm.reference import add_layer_norm_ref, rms_norm_ref


def check_scales(x: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None, width: int) -> None:
    """``layer_scale`` (width,) and ``row_scale`` (B,) float32 fit an output with the leading dims of x."""
    check_parameter("layer_scale", layer_scale, (width,), x)
    if row_scale is not None:
        check(x.dim() >= 2, "row_scale", "x (B, ..., C) with a batch dim", tuple(x.shape))
        expected = f"float32 ({x.shape[0]},), one factor a sample"
        check(
            tuple(row_scale.shape) == (x.shape[0],) and row_scale.dtype == torch.float32,
            "row_scale",
            expected,
            f"{tuple(row_scale.shape)} {row_scale.dtype}",
        )


def _canonical(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    rms: bool = False,
) -> tuple[Any, ...]:
    check_activation("x", x)
    x, residual = autocast(x, residual)
    check_like("residual", residual, x.shape, x)
    check_parameter("weight", weight, x.shape[-1:], x)
    check_parameter("bias", bias, x.shape[-1:], x)
    check_scales(x, layer_scale, row_scale, x.shape[-1])
    return x, residual, weight, bias, eps, layer_scale, row_scale, rms


def _adds(residual: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None) -> bool:
    return residual is not None or layer_scale is not None or row_scale is not None


def _eager_fwd(x: Tensor, residual: Any, weight: Any, bias: Any, eps: float, ls: Any, rs: Any, rms: bool) -> Any:
    normed, total = add_layer_norm_ref(x, residual, weight, bias, eps, ls, rs, rms)
    saved = total if _adds(residual, ls, rs) else x.new_empty(0)
    return normed, saved, *statistics(total, eps, rms=rms)


def _fake_fwd(x: Tensor, residual: Any, weight: Any, bias: Any, eps: float, ls: Any, rs: Any, rms: bool) -> Any:
    rows = num_rows(x)
    total = x.new_empty(x.shape) if _adds(residual, ls, rs) else x.new_empty(0)
    return x.new_empty(x.shape), total, empty_stats(x, 0 if rms else rows), empty_stats(x, rows)


def _fake_bwd(
    dnormed: Any,
    dsum: Any,
    total: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    rstd: Any,
    x: Any,
    ls: Any,
    rs: Any,
    eps: float,
    rms: bool,
    needs: list[bool],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((total, total, weight, bias, ls), needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.eps, layer_scale, row_scale, ctx.rms = inputs
    _, total, mean, rstd = output
    adds = _adds(residual, layer_scale, row_scale)
    ctx.mark_non_differentiable(mean, rstd, *(() if adds else (total,)))
    scale_needs_x = layer_scale is not None and layer_scale.requires_grad
    ctx.save_for_backward(
        total if adds else x, weight, bias, mean, rstd, x if scale_needs_x else None, layer_scale, row_scale
    )


def _backward(ctx: Any, dnormed: Tensor | None, dsum: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    total, weight, bias, mean, rstd, x, layer_scale, row_scale = ctx.saved_tensors
    if dnormed is None:  # only the sum was used: the norm contributes nothing
        dnormed = torch.zeros_like(total)
    flags = ctx.needs_input_grad
    # Without scales x and residual have one gradient, which is written once.
    same = flags[0] and flags[1] and layer_scale is None and row_scale is None
    needs = [flags[0], flags[1] and not same, flags[2], flags[3], flags[5]]
    grads = run(
        "add_layer_norm_bwd",
        dnormed,
        dsum,
        total,
        weight,
        bias,
        mean,
        rstd,
        x,
        layer_scale,
        row_scale,
        ctx.eps,
        ctx.rms,
        needs,
        ctx.backend,
    )
    dx, dresidual, dweight, dbias, dscale = scatter_grads(grads, needs)
    return dx, dx if same else dresidual, dweight, dbias, None, dscale, None, None


def _eager_bwd(
    dnormed: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    rms: bool,
    needs: list[bool],
) -> list[Tensor]:
    needs_x, needs_residual, needs_weight, needs_bias, needs_scale = needs
    norm = rms_norm_ref if rms else layer_norm_ref
    wide = torch.promote_types(total.dtype, torch.float32)
    d, *parameters = eager_gradients(
        norm, (total.to(wide), weight, bias, eps), (0, 1, 2), (True, needs_weight, needs_bias), [dnormed.to(wide)]
    )
    if dsum is not None:
        d = d + dsum
    dx = scale_and_add_ref(d, None, layer_scale, row_scale)
    grads = [dx.to(total.dtype)] if needs_x else []
    if needs_residual:
        grads.append(d.to(total.dtype).clone())
    grads += parameters
    if needs_scale:
        assert x is not None and layer_scale is not None
        per_token = (scale_and_add_ref(d, None, None, row_scale) * x).flatten(0, -2)
        grads.append(per_token.sum(0).to(layer_scale.dtype))
    return grads


def _samples() -> list[Sample]:
    def make(
        *shape: int,
        residual: bool = True,
        affine: bool = True,
        scale: bool = False,
        drop: bool = False,
        rms: bool = False,
        strided: bool = False,
    ) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def randn(*s: int) -> Tensor:
                return torch.randn(*s, generator=generator).to(dtype)

            c = shape[-1]
            x, res = (randn(*shape[:-1], 2 * c)[..., :c] if strided else randn(*shape) for _ in range(2))
            weight, bias = (1 + 0.1 * randn(c), 0.1 * randn(c)) if affine else (None, None)
            kwargs: dict[str, Any] = {"rms": rms}
            if scale:
                kwargs["layer_scale"] = 0.5 + 0.1 * randn(c)
            if drop:
                kwargs["row_scale"] = torch.tensor([0.0, 1.25] * shape[0])[: shape[0]]
            return (x, res if residual else None, weight, None if rms else bias), kwargs

        return inputs

    return [
        *(Sample(f"C{n}", make(3, n)) for n in (2, 15, 16, 17, 33, 192)),
        Sample("plain", make(2, 5, 48, residual=False)),
        Sample("no_affine", make(2, 5, 48, affine=False)),
        Sample("scales", make(3, 5, 40, scale=True, drop=True), smoke=True),
        Sample("scale_only", make(2, 5, 40, residual=False, scale=True)),
        Sample("drop", make(4, 3, 65, drop=True)),
        Sample("rms", make(2, 5, 96, rms=True)),
        Sample("rms_plain", make(2, 5, 96, rms=True, residual=False)),
        Sample("strided", make(2, 7, 40, strided=True)),
        Sample("empty", make(0, 4, 8)),
        Sample("B", make(2, 257, 768, scale=True, drop=True)),
        Sample("widest", make(2, 3, 8192, scale=True, drop=True)),
        Sample("widest_odd", make(3, 8191)),
    ]


def _magnitude(
    name: str, x: Tensor, residual: Any = None, weight: Any = None, bias: Any = None, eps: float = 1e-6, **options: Any
) -> float:
    if name not in ("arg0", "arg1") or options.get("rms") or residual is None or len(options) > 1:
        return 0.0
    return norm_magnitude(x + residual, weight, eps)


def _bytes(x: Tensor, residual: Any, weight: Any, bias: Any, eps: float, ls: Any, rs: Any, rms: bool) -> Any:
    n = x.element_size() * x.numel()
    if not _adds(residual, ls, rs):
        return 2 * n, 3 * n
    scaled = ls is not None or rs is not None
    backward = 4 + (residual is not None and scaled) + (ls is not None and ls.requires_grad)
    return (3 + (residual is not None)) * n, backward * n


SPEC = define(
    OpSpec(
        name="add_layer_norm",
        summary="LayerNorm or RMSNorm of residual + row_scale * layer_scale * x",
        formula="s = r + rs * ls * x; y = (s - mean(s)) / sqrt(var(s) + eps) * w + b",
        source="Ba et al., arXiv:1607.06450",
        fwd_schema="Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? layer_scale, "
        "Tensor? row_scale, bool rms",
        fwd_returns="(Tensor, Tensor, Tensor, Tensor)",
        bwd_schema="Tensor dnormed, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
        "Tensor? x, Tensor? layer_scale, Tensor? row_scale, float eps, bool rms, bool[] needs",
        canonical=_canonical,
        reference=add_layer_norm_ref,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.fwd, native.bwd, cuda_rows),
            triton_backend("add_layer_norm", whole_rows_only),
            cpu_backend(native.fwd, native.bwd),
            eager_backend(_eager_fwd, _eager_bwd),
        ),
        num_outputs=2,
        samples=_samples,
        saved="the sum (x itself where nothing is added); mean, rstd (rows,) float32; x only if layer_scale trains",
        bytes_moved=_bytes,
        magnitude=_magnitude,
    )
)
