"""clip_loss over the processes of a group.

Every process computes its rows of the similarities and of their transpose: its images against all texts, its texts
against all images. The gradient of a similarity needs the statistics of its image and of its text, so with those
gathered too each process computes the whole gradient of its own features, and none is sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from eva02_kernels._library import run, scatter_grads
from eva02_kernels.ops._common import without_autocast
from eva02_kernels.ops.clip_loss.spec import SPEC


def global_clip_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, group: dist.ProcessGroup, backend: str
) -> Tensor:
    """The loss of the pairs of all processes of ``group``, from the canonical arguments of each."""
    first = dist.get_rank(group) * image.shape[0]
    if backend == "eager":
        all_image, all_text = (_Gather.apply(t, group).flatten(0, 1) for t in (image, text))
        (share,) = without_autocast(SPEC.reference)(image, text, logit_scale, all_image, all_text, first)
        return _Sum.apply(share, group)
    return _GlobalClipLoss.apply(image, text, logit_scale, first, group, backend)


def _gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(processes, *t.shape)"""
    out = t.new_empty(dist.get_world_size(group), *t.shape)
    dist.all_gather(list(out), t.contiguous(), group=group)
    return out


def _sum(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


class _Gather(torch.autograd.Function):
    """:func:`_gather`, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gather(t, group)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(dout, ctx.group)[dist.get_rank(ctx.group)], None


class _Sum(torch.autograd.Function):
    """:func:`_sum`, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sum(t, group)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(dout, ctx.group), None


class _GlobalClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, first: int, group: Any, backend: str
    ) -> Tensor:
        both = _gather(torch.cat([image, text], 1), group).flatten(0, 1)  # one message
        all_image, all_text = both.chunk(2, 1)
        loss, stats = run("clip_loss_fwd", image, text, logit_scale, all_image, all_text, first, backend)
        ctx.save_for_backward(image, text, logit_scale, all_image, all_text, stats)
        ctx.first, ctx.group, ctx.backend = first, group, backend
        return _sum(loss, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        image, text, logit_scale, all_image, all_text, stats = ctx.saved_tensors
        # Each process may weigh the loss, which is the same for all, in its own way.
        dloss = _sum(dloss, ctx.group)
        all_stats = _gather(stats, ctx.group).transpose(0, 1).flatten(1).contiguous()
        needs = list(ctx.needs_input_grad[:3])
        grads = run(
            "clip_loss_bwd", dloss, image, text, logit_scale, all_image, all_text, all_stats, ctx.first, needs,
            ctx.backend,
        )  # fmt: skip
        return *scatter_grads(grads, needs), None, None, None
