from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, run, scatter_grads
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    autocast,
    check,
    check_activation,
    check_index,
    check_like,
    cpu_backend,
    cuda_backend,
    eager_backend,
    loss_unsupported,
    reference_backward,
    triton_backend,
)
from eva02_kernels.ops.masked_cosine_loss import native

EPS = 1e-8


def _canonical(pred: Tensor, target: Tensor, idx: Tensor | None = None) -> tuple[Any, ...]:
    check_activation("pred", pred, min_dim=2)
    check_activation("target", target, min_dim=2)
    pred, target = autocast(pred, target)
    pred, target = pred.flatten(0, -2), target.flatten(0, -2)
    if idx is None:
        check_like("target", target, pred.shape, pred)
        return pred, target, None
    check_index("idx", idx, pred)
    check(idx.numel() == pred.shape[0], "idx", f"{pred.shape[0]} entries, one a row of pred", tuple(idx.shape))
    check_like("target", target, (target.shape[0], pred.shape[1]), pred)
    return pred, target, idx.flatten()


def _rows(pred: Tensor, target: Tensor, idx: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """pred and the selected target rows in at least float32, and which rows count."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    counts = torch.ones(pred.shape[0], dtype=torch.bool, device=pred.device)
    if idx is not None:
        counts = idx >= 0
        target = target[idx.long().clamp(min=0)] if target.shape[0] else target.new_zeros(pred.shape)
    return pred.to(wide), target.to(wide), counts


def _cosine(p: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # A zero row has a zero gradient, not the square root's NaN.
    p_norm, t_norm = (
        torch.where(s > EPS**2, s.clamp(min=EPS**2).sqrt(), EPS) for s in (p.square().sum(-1), t.square().sum(-1))
    )
    return 1 / p_norm, 1 / t_norm, (p * t).sum(-1) / (p_norm * t_norm)


def _reference(pred: Tensor, target: Tensor, idx: Tensor | None) -> tuple[Tensor]:
    p, t, counts = _rows(pred, target, idx)
    _, _, cosine = _cosine(p, t)
    return (-cosine.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1),)


def _eager_fwd(pred: Tensor, target: Tensor, idx: Tensor | None) -> tuple[Tensor, Tensor]:
    p, t, counts = _rows(pred, target, idx)
    stats = torch.stack([s.masked_fill(~counts, 0.0) for s in _cosine(p, t)]).float()
    return _reference(pred, target, idx)[0], stats


def _fake_fwd(pred: Tensor, target: Tensor, idx: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))
    return loss, pred.new_empty(3, pred.shape[0], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, dloss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = run("masked_cosine_loss_bwd", dloss, *ctx.saved_tensors, needs, ctx.backend)
    return *scatter_grads(grads, needs), None


def _samples() -> list[Sample]:
    def make(
        rows: int, width: int, *, pool: int = 0, padding: int = 0, strided: bool = False, tiny: bool = False
    ) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            pred = torch.randn(rows, width * (2 if strided else 1), generator=generator).to(dtype)[:, :width]
            target = torch.randn(pool or rows, width, generator=generator).to(dtype)
            if tiny:  # norms under 1e-8
                pred[0], pred[1], target[2] = 0.0, pred[1] * 1e-10, target[2] * 1e-10
            if not pool:
                return (pred, target), {}
            idx = torch.randint(0, pool, (rows,), generator=generator)
            idx[:padding] = -1
            return (pred, target, idx), {}

        return inputs

    return [
        *(Sample(f"D{d}", make(7, d)) for d in (1, 15, 17, 33, 1024)),
        Sample("idx", make(29, 64, pool=50), smoke=True),
        Sample("padding", make(29, 64, pool=20, padding=5)),
        Sample("all_padding", make(4, 32, pool=9, padding=4)),
        Sample("wide", make(5, 1030, pool=4)),
        Sample("tiny", make(5, 24, tiny=True)),
        Sample("strided", make(5, 24, strided=True)),
        Sample("empty", make(0, 24)),
        Sample("mim", make(105, 1024, pool=256)),
        Sample("widest", make(9, 8192, pool=4)),  # a row has one factor: few rows would be luck
    ]


SPEC = define(
    OpSpec(
        name="masked_cosine_loss",
        summary="mean negative cosine of predictions and selected teacher features",
        formula="-mean_m p_m . t_idx(m) / (|p_m| |t_idx(m)|)",
        source="EVA, arXiv:2211.07636",
        fwd_schema="Tensor pred, Tensor target, Tensor? idx",
        fwd_returns="(Tensor, Tensor)",
        bwd_schema="Tensor dloss, Tensor pred, Tensor target, Tensor? idx, Tensor stats, bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=_fake_fwd,
        fake_bwd=lambda dloss, pred, target, idx, stats, needs: [
            t.new_empty(t.shape) for t, need in zip((pred, target), needs, strict=True) if need
        ],
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.fwd, native.bwd, native.cuda_unsupported),
            triton_backend("masked_cosine_loss", loss_unsupported),
            cpu_backend(native.fwd, native.bwd, loss_unsupported),
            eager_backend(
                _eager_fwd,
                reference_backward(
                    _reference,
                    (0, 1),
                    lambda dloss, pred, target, idx, stats, needs: ([dloss], (pred, target, idx), needs),
                ),
            ),
        ),
        samples=_samples,
        saved="pred, target, idx; 1/|pred|, 1/|target|, cosine (3, M) float32",
        bytes_moved=lambda pred, *rest: (
            2 * pred.element_size() * pred.numel(),
            3 * pred.element_size() * pred.numel(),
        ),
    )
)
