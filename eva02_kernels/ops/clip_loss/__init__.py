"""clip_loss: symmetric contrastive loss of paired image and text features, without their matrix of similarities.

Files: ``spec.py`` formula, schema, autograd, samples and bytes, ``distributed.py`` the loss of a batch that is spread
over processes, ``triton_kernels.py`` the GPU kernels, ``native.py`` the adapter to ``csrc/clip_loss``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from eva02_kernels.ops._common import call
from eva02_kernels.ops.clip_loss.spec import SPEC

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean cross-entropy of every image over all texts and of every text over all images.

    Equivalent PyTorch::

        logits = logit_scale * image @ text.T
        (F.cross_entropy(logits, torch.arange(B)) + F.cross_entropy(logits.T, torch.arange(B))) / 2

    Args:
        image: (B, D), of unit length where similarities are cosines; float32, bfloat16, float16 or float64 (eager).
        text: (B, D), same dtype; row i belongs to image i.
        logit_scale: one floating-point element, the factor itself: ``model.logit_scale.exp()``, 1 / temperature.
        group: the processes whose pairs make up the batch, ``torch.distributed.group.WORLD`` for all; each has the same
            number of pairs. None: this process's pairs are the batch.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        The loss of the whole batch, a float32 scalar (float64 for float64), the same on every process; 0 for an empty
        batch. Gradients reach image, text and logit_scale. Those of a process are of the sum of all processes' losses,
        so that averaging parameters' gradients over processes (DDP, FSDP) gives those of one process with the batch.

    Numerics: similarities, softmaxes and sums in float32; the Triton backend rounds the similarities' gradients to the
        features' dtype for their products.
    Memory: keeps image and text (no copy; with a group those of all processes) and three float32 a pair; similarities
        of a block of rows exist at a time.
    Communication: with a group, features are gathered in forward and statistics in backward; feature gradients are
        computed where the features are and not exchanged.
    Raises: ValueError for shapes and dtypes; NotImplementedError with every backend's reason.
    Source: CLIP, arXiv:2103.00020, figure 3.
    """
    image, text, logit_scale, *rest = SPEC.canonical(image, text, logit_scale)
    if group is not None:
        from eva02_kernels.ops.clip_loss.distributed import global_clip_loss

        return global_clip_loss(image, text, logit_scale, group, backend)
    return call(SPEC, backend, (image, text, logit_scale, *rest))
