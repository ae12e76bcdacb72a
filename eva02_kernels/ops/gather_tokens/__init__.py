"""gather_tokens: pick tokens by index; its backward is a deterministic sum over duplicates.

Files: ``reference.py`` the formula, ``spec.py`` schema, autograd, samples and bytes, ``triton_kernels.py`` the GPU
kernels, ``native.py`` the adapter to ``csrc/gather_tokens``; ``ragged_index`` makes the flat index of a ragged batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva02_kernels.ops._common import call, check
from eva02_kernels.ops.gather_tokens.spec import SPEC


def gather_tokens(x: Tensor, idx: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of x by index.

    Equivalent PyTorch: ``x.gather(1, idx[..., None].expand(-1, -1, C))``; flat: ``x.flatten(0, 1)[idx]``.

    Args:
        x: (B, S, C); float32, bfloat16, float16 or float64 (eager).
        idx: int32 or int64, (B, K) of tokens of the same sample, or flat (M,) of b * S + s. Duplicates are allowed;
            a negative index is padding and gathers zeros.
        backend: ``"auto"`` or the name of one backend, which then never falls back.

    Returns:
        (B, K, C) or (M, C). Gradients reach x: duplicates are summed, in a fixed order.

    Numerics: exact; the gradient of duplicates is summed in float32.
    Memory: moves twice the gathered elements; keeps idx only.
    Raises: ValueError for shapes and dtypes; RuntimeError on the CPU for an index out of range; NotImplementedError
        with every backend's reason.
    """
    return call(SPEC, backend, SPEC.canonical(x, idx))


def ragged_index(idx: Tensor, counts: Sequence[int] | Tensor, *, seq_len: int | None = None) -> Tensor:
    """Flat index b * S + s of a ragged batch: the first ``counts[b]`` entries of each row of ``idx``.

    Made on the host, once per batch: ``counts`` are host integers, so no device is synchronised.

    Args:
        idx: (B, K) int32 or int64, token s of sample b, kept ones first.
        counts: B integers from 0 to K.
        seq_len: S; default K (``idx`` is then a permutation of all tokens).

    Returns:
        int64 (sum(counts),), on the device of ``idx``.
    """
    check(
        idx.dim() == 2 and idx.dtype in (torch.int32, torch.int64),
        "idx",
        "int32 or int64 (B, K)",
        f"{tuple(idx.shape)} {idx.dtype}",
    )
    host = torch.as_tensor(counts, device="cpu").long()
    rows, width = idx.shape
    check(
        tuple(host.shape) == (rows,) and bool(((host >= 0) & (host <= width)).all()),
        "counts",
        f"{rows} integers from 0 to {width}",
        host.tolist(),
    )
    sample = torch.repeat_interleave(torch.arange(rows), host)
    first = torch.cumsum(host, 0) - host
    column = torch.arange(int(host.sum())) - first[sample]
    sample, column = sample.to(idx.device), column.to(idx.device)
    return sample * (width if seq_len is None else seq_len) + idx[sample, column].long()
