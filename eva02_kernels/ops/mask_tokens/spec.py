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
    check_parameter,
    cpu_backend,
    cuda_backend,
    eager_backend,
    num_rows,
    triton_backend,
)
from eva02_kernels.ops.mask_tokens import native


def _check_tokens(name: str, t: Tensor, width: int, like: Tensor) -> int:
    """How many tokens a (1, n, C), (n, C) or (C,) parameter holds. It stays as it is: autograd would record a view."""
    if t.dim() not in (1, 2, 3) or t.shape[-1] != width or (t.dim() == 3 and t.shape[0] != 1):
        check(False, name, f"(1, n, {width}), (n, {width}) or ({width},)", tuple(t.shape))
    check_parameter(name, t, t.shape, like)
    return num_rows(t)


def _canonical(
    patches: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
) -> tuple[Any, ...]:
    check_activation("patches", patches)
    (patches,) = autocast(patches)
    check(patches.dim() == 3, "patches", "(B, P, C)", tuple(patches.shape))
    batch, count, width = patches.shape
    if mask is None:
        mask_token = None
    else:
        if mask.dtype != torch.bool or mask.shape != (batch, count):
            check(False, "mask", f"bool ({batch}, {count})", f"{tuple(mask.shape)} {mask.dtype}")
        if mask_token is None or _check_tokens("mask_token", mask_token, width, patches) != 1:
            got = None if mask_token is None else tuple(mask_token.shape)
            check(False, "mask_token", "one token with a mask", got)
    tokens = count + (0 if cls_token is None else _check_tokens("cls_token", cls_token, width, patches))
    if pos_embed is not None and _check_tokens("pos_embed", pos_embed, width, patches) != tokens:
        check(False, "pos_embed", f"{tokens} tokens", tuple(pos_embed.shape))
    return patches, mask, mask_token, pos_embed, cls_token


def _reference(patches: Tensor, mask: Any, mask_token: Any, pos_embed: Any, cls_token: Any) -> Tensor:
    wide = torch.promote_types(patches.dtype, torch.float32)
    x = patches.to(wide)
    if mask is not None:
        x = torch.where(mask[..., None], mask_token.to(wide).reshape(-1), x)
    if cls_token is not None:
        cls_token = cls_token.to(wide).reshape(1, -1, x.shape[-1])
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    if pos_embed is not None:
        x = x + pos_embed.to(wide).reshape(x.shape[1:])
    return x.to(patches.dtype)


def _eager_fwd(*args: Any) -> Tensor:
    out = _reference(*args)
    return out.clone() if out is args[0] else out


def _eager_bwd(dout: Tensor, mask: Any, mask_token: Any, pos_embed: Any, cls_token: Any, needs: Any) -> list[Tensor]:
    prefix = native.num_prefix(cls_token)
    patches = torch.zeros_like(dout[:, prefix:])  # no gradient depends on their values
    return eager_gradients(_reference, (patches, mask, mask_token, pos_embed, cls_token), (0, 2, 3, 4), needs, [dout])


def _fake_fwd(patches: Tensor, mask: Any, mask_token: Any, pos_embed: Any, cls_token: Any) -> Tensor:
    prefix = native.num_prefix(cls_token)
    return patches.new_empty(patches.shape[0], prefix + patches.shape[1], patches.shape[2])


def _fake_bwd(dout: Tensor, mask: Any, mask_token: Any, pos_embed: Any, cls_token: Any, needs: Any) -> list[Tensor]:
    prefix = native.num_prefix(cls_token)
    tensors = (dout[:, prefix:], mask_token, pos_embed, cls_token)
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    flags = ctx.needs_input_grad
    needs = [flags[0], flags[2], flags[3], flags[4]]
    grads = run("mask_tokens_bwd", dout, *ctx.saved_tensors, needs, ctx.backend)
    dpatches, dmask_token, dpos_embed, dcls_token = scatter_grads(grads, needs)
    return dpatches, None, dmask_token, dpos_embed, dcls_token


def _samples() -> list[Sample]:
    def make(
        *shape: int,
        mask: bool = True,
        pos: bool = True,
        cls: int = 1,
        float32_parameters: bool = False,
        flat_parameters: bool = False,
    ) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            batch, count, width = shape
            parameter = torch.float32 if float32_parameters and dtype.itemsize < 4 else dtype

            def randn(*s: int) -> Tensor:
                if flat_parameters:
                    s = s[1:] if s[1] > 1 else s[2:]
                return torch.randn(*s, generator=generator).to(parameter)

            patches = torch.randn(shape, generator=generator).to(dtype)
            return (
                patches,
                torch.rand(batch, count, generator=generator) < 0.4 if mask else None,
                randn(1, 1, width) if mask else None,
                randn(1, count + cls, width) if pos else None,
                randn(1, cls, width) if cls else None,
            ), {}

        return inputs

    return [
        *(Sample(f"C{c}", make(2, 6, c)) for c in (1, 15, 17, 33)),
        Sample("wide", make(2, 3, 1030)),
        Sample("batch", make(5, 3, 8)),
        Sample("no_mask", make(2, 6, 24, mask=False), smoke=True),
        Sample("no_pos", make(2, 6, 24, pos=False)),
        Sample("no_cls", make(2, 6, 24, cls=0)),
        Sample("copy", make(2, 6, 24, mask=False, pos=False, cls=0)),
        Sample("registers", make(2, 6, 24, cls=5)),
        Sample("float32_parameters", make(2, 6, 24, float32_parameters=True)),
        Sample("flat_parameters", make(2, 6, 24, flat_parameters=True)),
        Sample("empty", make(0, 6, 24)),
        Sample("Ti", make(2, 256, 192)),
    ]


SPEC = define(
    OpSpec(
        name="mask_tokens",
        summary="mask blend, prefix tokens and position embedding in one pass",
        formula="cat(cls, where(mask, mask_token, patches)) + pos",
        source="Bao et al., arXiv:2106.08254",
        fwd_schema="Tensor patches, Tensor? mask, Tensor? mask_token, Tensor? pos_embed, Tensor? cls_token",
        fwd_returns="Tensor",
        bwd_schema="Tensor dout, Tensor? mask, Tensor? mask_token, Tensor? pos_embed, Tensor? cls_token, bool[] needs",
        canonical=_canonical,
        reference=_reference,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            cuda_backend(native.fwd, native.bwd),
            triton_backend("mask_tokens"),
            cpu_backend(native.fwd, native.bwd),
            eager_backend(_eager_fwd, _eager_bwd),
        ),
        samples=_samples,
        saved="mask; the parameters for their shapes (no copy)",
        bytes_moved=lambda patches, *rest: (
            2 * patches.element_size() * patches.numel(),
            2 * patches.element_size() * patches.numel(),
        ),
    )
)
