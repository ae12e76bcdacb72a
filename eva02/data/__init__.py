"""Images in: sources (where samples lie), transforms (what a task makes of one), masks, loading that can be resumed.

A `Source` gives (image, target) by index, a transform makes a dict of tensors of it, and `TrainLoader` makes batches of
these: every random choice follows from (seed, epoch, index), so no worker, process or resume changes a batch.
"""

from eva02.data.loader import BadImages, TrainLoader, eval_loader
from eva02.data.masking import BlockMask, every_other
from eva02.data.sources import ArraySource, Source, open_source
from eva02.data.transforms import ClipTransform, EvalTransform, FinetuneTransform, MimTransform, Mixup

__all__ = [
    "ArraySource",
    "BadImages",
    "BlockMask",
    "ClipTransform",
    "EvalTransform",
    "FinetuneTransform",
    "MimTransform",
    "Mixup",
    "Source",
    "TrainLoader",
    "eval_loader",
    "every_other",
    "open_source",
]
