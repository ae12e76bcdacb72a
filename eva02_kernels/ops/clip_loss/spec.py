from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eva02_kernels._library import define, run, scatter_grads
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    FLOATS,
    autocast,
    check,
    check_activation,
    check_like,
    cpu_backend,
    eager_backend,
    loss_unsupported,
    triton_backend,
)
from eva02_kernels.ops.clip_loss import native

# Saved of each pair: the loss of its image, that of its text, and its logit. A loss is a log-sum-exp less that logit,
# and float32 holds more of it than of the log-sum-exp.
#
# The operator's loss is the share of its own M pairs in a batch of N: with all_image and all_text (N, D), those of
# rows first.. first + M; without them M = N.


def _canonical(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Any, ...]:
    check_activation("image", image)
    check(image.dim() == 2, "image", "(B, D)", tuple(image.shape))
    check_activation("text", text)
    image, text = autocast(image, text)
    check_like("text", text, image.shape, image)
    scalar = isinstance(logit_scale, Tensor) and logit_scale.dtype in FLOATS and logit_scale.numel() == 1
    check(scalar, "logit_scale", "a tensor of one floating-point element", getattr(logit_scale, "shape", logit_scale))
    check(logit_scale.device == image.device, "logit_scale", f"a tensor on {image.device}", logit_scale.device)
    return image, text, logit_scale.reshape(()).to(_wide(image)), None, None, 0


def _wide(image: Tensor) -> torch.dtype:
    return torch.promote_types(image.dtype, torch.float32)


def _keys(image: Tensor, text: Tensor, all_image: Tensor | None, all_text: Tensor | None) -> tuple[Tensor, Tensor]:
    """What images are compared with, and what texts are."""
    return (text if all_text is None else all_text), (image if all_image is None else all_image)


def _reference(
    image: Tensor, text: Tensor, logit_scale: Tensor, all_image: Tensor | None, all_text: Tensor | None, first: int
) -> tuple[Tensor]:
    image, text = image.to(_wide(image)), text.to(_wide(text))
    texts, images = (t.to(image.dtype) for t in _keys(image, text, all_image, all_text))
    if not images.shape[0]:
        return (logit_scale * image.sum() * text.sum(),)
    image_logits = logit_scale * image @ texts.T
    text_logits = image_logits.T if all_image is None else logit_scale * text @ images.T
    labels = torch.arange(first, first + image.shape[0], device=image.device)
    losses = [F.cross_entropy(logits, labels, reduction="sum") for logits in (image_logits, text_logits)]
    return ((losses[0] + losses[1]) / (2 * images.shape[0]),)


def _eager_fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor, all_image: Tensor | None, all_text: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    (loss,) = _reference(image, text, logit_scale, all_image, all_text, first)
    logits = [
        logit_scale * rows.to(loss.dtype) @ keys.to(loss.dtype).T
        for rows, keys in zip((image, text), _keys(image, text, all_image, all_text), strict=True)
    ]
    targets = [side.diagonal(first) for side in logits]
    losses = [(side - t[:, None]).logsumexp(1) for side, t in zip(logits, targets, strict=True)]
    return loss, torch.stack([*losses, targets[0]])


def _eager_bwd(
    dloss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, all_image: Tensor | None,
    all_text: Tensor | None, stats: Tensor, first: int, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    features, own = (image, text), slice(first, first + image.shape[0])
    grads: list[Tensor] = []
    dscale = torch.zeros_like(logit_scale)
    for side, keys in enumerate(_keys(image, text, all_image, all_text)):
        rows, keys = features[side].to(stats.dtype), keys.to(stats.dtype)
        logits = logit_scale * rows @ keys.T
        slopes = torch.exp(logits - stats[2, own, None] - stats[side, own, None])
        slopes += torch.exp(logits - stats[2] - stats[1 - side])
        slopes.diagonal(first).copy_(torch.expm1(-stats[:2, own]).sum(0))
        slopes *= dloss / max(1, 2 * stats.shape[1])
        unscaled = slopes @ keys
        if side == 0:
            dscale = (unscaled * rows).sum()
        grads.append((logit_scale * unscaled).to(image.dtype))
    return [g for g, need in zip((*grads, dscale), needs, strict=True) if need]


def _fake_fwd(image: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return image.new_empty((), dtype=_wide(image)), image.new_empty(3, image.shape[0], dtype=_wide(image))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, text, logit_scale, all_image, _, _ = inputs
    if all_image is not None:
        raise NotImplementedError("clip_loss_fwd: a share of a batch is differentiated by clip_loss(..., group=)")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(image, text, logit_scale, output[1])


def _backward(ctx: Any, dloss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    image, text, logit_scale, stats = ctx.saved_tensors
    grads = run("clip_loss_bwd", dloss, image, text, logit_scale, None, None, stats, 0, needs, ctx.backend)
    return *scatter_grads(grads, needs), None, None, None


def _magnitude(name: str, image: Tensor, text: Tensor, logit_scale: Tensor) -> float:
    """Rms of what a gradient is the difference of, means of features or of similarities and those of the pair."""
    if not image.numel():
        return 0.0
    image, text, logit_scale = image.detach(), text.detach(), logit_scale.detach()
    if name == "arg2":
        return float((image * text).sum(1).square().mean().sqrt())
    other = text if name == "arg0" else image
    return float(logit_scale.abs() * other.square().mean().sqrt() / image.shape[0])


def _samples() -> list[Sample]:
    def make(
        pairs: int, width: int, *, scale: float = 7.0, noise: float = 4.0, strided: bool = False, signs: bool = False
    ) -> Any:
        def inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
            image, text = torch.randn(2, pairs, width, generator=generator)
            text = image + noise * text  # pairs that know each other a little
            if signs:  # similarities that every backend has exactly: large logits differ in nothing but the softmax
                image, text = image.sign(), text.sign()
            image, text = (torch.nn.functional.normalize(t, dim=-1).to(dtype) for t in (image, text))
            if strided:
                image, text = torch.cat([image, text], 1).chunk(2, 1)
            return (image, text, torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32))), {}

        return inputs

    return [
        *(Sample(f"B{b}", make(b, 24)) for b in (1, 15, 17, 33, 130)),
        *(Sample(f"D{d}", make(9, d)) for d in (1, 16, 65)),
        Sample("smoke", make(20, 48), smoke=True),
        Sample("sharp", make(24, 16, scale=32.0, noise=2.0, signs=True)),
        Sample("strided", make(12, 20, strided=True)),
        Sample("empty", make(0, 24)),
        Sample("blocks", make(300, 16)),
        Sample("clip", make(1024, 512, scale=14.0, noise=2.0), full=True),
    ]


SPEC = define(
    OpSpec(
        name="clip_loss",
        summary="symmetric contrastive loss of paired features",
        formula="(CE(s I T^t, diagonal) + CE(s T I^t, diagonal)) / 2",
        source="CLIP, arXiv:2103.00020",
        fwd_schema="Tensor image, Tensor text, Tensor logit_scale, Tensor? all_image, Tensor? all_text, int first",
        fwd_returns="(Tensor, Tensor)",
        bwd_schema=(
            "Tensor dloss, Tensor image, Tensor text, Tensor logit_scale, Tensor? all_image, Tensor? all_text, "
            "Tensor stats, int first, bool[] needs"
        ),
        canonical=_canonical,
        reference=_reference,
        fake_fwd=_fake_fwd,
        fake_bwd=lambda dloss, image, text, logit_scale, all_image, all_text, stats, first, needs: [
            t.new_empty(t.shape) for t, need in zip((image, text, logit_scale), needs, strict=True) if need
        ],
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            triton_backend("clip_loss", loss_unsupported),
            cpu_backend(native.fwd, native.bwd, loss_unsupported),
            eager_backend(_eager_fwd, _eager_bwd),
        ),
        samples=_samples,
        magnitude=_magnitude,
        saved="image, text, logit_scale; loss of each image and of each text, logit of each pair (3, B) float32",
        bytes_moved=lambda image, *rest: (
            2 * image.element_size() * image.numel(),
            4 * image.element_size() * image.numel(),
        ),
        flops=lambda image, *rest: (2 * image.shape[0] * image.numel(), 6 * image.shape[0] * image.numel()),
    )
)
