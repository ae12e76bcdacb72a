"""Tables of 2-D rotary position embedding (RoPE), and what operators see of them.

A head of D channels holds D/2 pairs, each rotated by an angle. Pair j is channels (2j, 2j+1) in the ``interleaved``
layout (EVA-02) and (j, j + D/2) in the ``half`` layout (NeoX, DINOv3). In an axial table the first D/4 pairs turn
with the patch's row and the rest with its column, so (h + w) table rows serve h x w patches.

Source: Su et al., arXiv:2104.09864; EVA-02, arXiv:2303.11331; Heo et al., arXiv:2403.13298 (mixed tables).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("interleaved", "half")


@dataclasses.dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of the rotation angles of a grid of patches.

    Axis form (``grid`` given): ``cos``, ``sin`` (h+w, D/4) float32, or (num_seq, h+w, D/4) with one grid per
    sequence in ``grids`` (num_seq, 2) int32, ``grid`` then being the largest h and w. Dense form (``grid`` None):
    (P, D/2), or (H, P, D/2) with ``per="head"``, or (B, P, D/2) with ``per="batch"``; gradients reach them.
    """

    cos: Tensor
    sin: Tensor
    layout: str = "interleaved"
    grid: tuple[int, int] | None = None
    swap: bool = False  # the first pairs turn with the column ("xy" indexing)
    grids: Tensor | None = None
    per: str = ""

    @staticmethod
    def from_cos_sin(cos: Tensor, sin: Tensor, layout: str = "interleaved", *, per: str | None = None) -> RopeTable:
        """A dense table from given cosines and sines.

        Args:
            cos, sin: (P, X), (H, P, X) or (B, P, X), X = D/2, or X = D with every angle given twice in the manner of
                ``layout`` (adjacent for ``interleaved``, as two halves for ``half``). Which of the two X is, is known
                when the table meets a head; a table with X = D keeps its first copy only.
            per: ``"head"`` or ``"batch"`` for a 3-D table (default ``"head"``).
        """
        _check_layout(layout)
        if cos.shape != sin.shape or cos.dim() not in (2, 3):
            raise ValueError(
                f"cos, sin: expected equal shapes (P, X) or (H|B, P, X); got {tuple(cos.shape)} and {tuple(sin.shape)}"
            )
        if cos.dim() == 3:
            per = per or "head"
            if per not in ("head", "batch"):
                raise ValueError(f"per: expected 'head' or 'batch'; got {per!r}")
        elif per:
            raise ValueError(f"per: a (P, X) table is shared by heads and samples; got per={per!r}")
        return RopeTable(cos, sin, layout, per=per or "")

    def to(self, device: torch.device | str) -> RopeTable:
        """The same table on another device; its dtype never changes."""
        grids = None if self.grids is None else self.grids.to(device)
        return dataclasses.replace(self, cos=self.cos.to(device), sin=self.sin.to(device), grids=grids)


def rope_2d(
    grid: tuple[int, int] | Tensor,
    head_dim: int,
    theta: float = 1e4,
    pretrain_grid: int | tuple[int, int] | None = 16,
    layout: str = "interleaved",
    *,
    grid_offset: float = 0.0,
    grid_indexing: str = "ij",
    max_grid: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> RopeTable:
    """Axial RoPE table: angle of pair i of an axis at coordinate c is ``c * theta**(-2i / (head_dim/2))``.

    Args:
        grid: (h, w) patches, or an int32 tensor (num_seq, 2) with one grid per sequence (then ``max_grid`` too).
        head_dim: D, a multiple of 4.
        theta: base of the frequencies.
        pretrain_grid: side(s) to which the coordinates are stretched: ``c(t) = (t + grid_offset) / n * pretrain_grid``
            for t = 0..n-1. None: ``c(t) = t + grid_offset``. EVA-02 uses 16 for every model.
        layout: ``"interleaved"`` or ``"half"``: which channels form a pair.
        grid_offset: added to t, in patches.
        grid_indexing: ``"ij"``: the first D/4 pairs turn with the row; ``"xy"``: with the column.
        max_grid: largest (h, w) of a tensor ``grid`` (a host value, so that no device is synchronised).
        device: where the table lives (default: CPU, or the device of a tensor ``grid``).

    Returns:
        :class:`RopeTable` in axis form, float32, computed in float64.
    """
    _check_layout(layout)
    if head_dim % 4 or head_dim <= 0:
        raise ValueError(f"head_dim: expected a positive multiple of 4; got {head_dim}")
    if grid_indexing not in ("ij", "xy"):
        raise ValueError(f"grid_indexing: expected 'ij' or 'xy'; got {grid_indexing!r}")
    if pretrain_grid is not None and isinstance(pretrain_grid, int):
        pretrain_grid = (pretrain_grid, pretrain_grid)
    grids = grid if isinstance(grid, Tensor) else None
    if grids is not None:
        if grids.dim() != 2 or grids.shape[1] != 2 or grids.dtype != torch.int32:
            raise ValueError(f"grid: expected int32 (num_seq, 2); got {tuple(grids.shape)} {grids.dtype}")
        if max_grid is None:
            raise ValueError("max_grid: needed with a tensor grid (the largest h and w, host integers)")
        h, w = max_grid
        device = grids.device
    else:
        h, w = (int(n) for n in grid)  # type: ignore[union-attr]
    # float64 on the CPU, one rounding at the end: the same bits whatever device the table goes to.
    m = head_dim // 4
    omega = theta ** (-torch.arange(m, dtype=torch.float64) / m)
    t = [torch.arange(n, dtype=torch.float64) + grid_offset for n in (h, w)]
    if grids is None or pretrain_grid is None:
        if pretrain_grid is not None:
            t = [ti / n * pre for ti, n, pre in zip(t, (h, w), pretrain_grid, strict=True)]
        angles = (torch.cat(t)[:, None] * omega).to(device)  # (h+w, D/4)
    else:
        sides = grids.to(torch.float64).clamp(min=1)
        stretched = [
            ti.to(device) / sides[:, i, None] * pre for i, (ti, pre) in enumerate(zip(t, pretrain_grid, strict=True))
        ]
        angles = torch.cat(stretched, dim=1)[..., None] * omega.to(device)  # (num_seq, h+w, D/4)
    return RopeTable(
        angles.cos().float(), angles.sin().float(), layout, (h, w), swap=grid_indexing == "xy", grids=grids
    )


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}; got {layout!r}")


# ---- the table as operators take it: tensors, ints and a string -----------------------------------------------------
ROPE_SCHEMA = (
    "Tensor? rope_cos, Tensor? rope_sin, Tensor? rope_grids, int[] rope_grid, str rope_layout, "
    "int num_prefix_tokens, Tensor? keep_idx"
)


class RopeArgs(NamedTuple):
    """Values for :data:`ROPE_SCHEMA`. ``rope_grid`` is [h, w, swap] or empty (dense or no table)."""

    cos: Tensor | None
    sin: Tensor | None
    grids: Tensor | None
    grid: list[int]
    layout: str
    num_prefix_tokens: int
    keep_idx: Tensor | None


NUM_ROPE_ARGS = len(RopeArgs._fields)


def canonical_rope(
    rope: RopeTable | None,
    head_dim: int,
    num_prefix_tokens: int,
    keep_idx: Tensor | None,
    *,
    num_patches: int | None,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    like: Tensor,
) -> RopeArgs:
    """Check a table against the tokens that it is for and spell it out for an operator.

    ``num_patches`` are those of the tokens (None for packed sequences, whose lengths are on the device), ``batch`` is
    the number of sequences. ``like`` is an activation: the table is on its device, in float32 beside all but float64.
    With ``EVA02_DEBUG=1`` in the environment the values of ``keep_idx`` are checked, which waits for the device; GPU
    kernels do not check them.
    """
    if rope is None:
        if keep_idx is not None:
            raise ValueError("keep_idx: given without a rope table to index")
        return RopeArgs(None, None, None, [], "interleaved", num_prefix_tokens, None)
    if not isinstance(rope, RopeTable):
        raise TypeError(f"rope: expected a RopeTable (rope_2d, RopeTable.from_cos_sin) or None; got {type(rope)}")
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens: expected 0 or more; got {num_prefix_tokens}")
    if head_dim % 4:
        raise ValueError(f"head_dim: rotation needs a multiple of 4; got {head_dim}")
    for name, t in (("rope", rope.cos), ("rope", rope.sin), ("rope", rope.grids), ("keep_idx", keep_idx)):
        if t is not None and t.device != like.device:
            raise ValueError(f"{name}: expected tensors on {like.device}; got one on {t.device}")
    cos, sin, layout = rope.cos, rope.sin, rope.layout
    if rope.grid is None:
        if cos.shape[-1] == head_dim:  # every angle twice: keep the first copy
            step = (slice(None, None, 2),) if layout == "interleaved" else (slice(None, head_dim // 2),)
            cos, sin = cos[(..., *step)], sin[(..., *step)]
        elif cos.shape[-1] != head_dim // 2:
            raise ValueError(
                f"rope: expected a last dim of {head_dim // 2} or {head_dim} for head_dim {head_dim}; "
                f"got {tuple(cos.shape)}"
            )
        capacity = cos.shape[-2]
        if rope.per == "head":
            if cos.shape[0] != num_heads or num_kv_heads != num_heads:
                raise ValueError(
                    f"rope: a per-head table needs {num_heads} heads of q and of k; got a table of {cos.shape[0]} and "
                    f"{num_kv_heads} heads of k"
                )
            layout += ":head"
        elif rope.per == "batch":
            if cos.shape[0] != batch:
                raise ValueError(f"rope: expected a per-sample table of {batch} samples; got {cos.shape[0]}")
            layout += ":batch"
        grid = []
    else:
        if cos.shape[-1] != head_dim // 4:
            raise ValueError(f"rope: made for head_dim {4 * cos.shape[-1]}; got heads of {head_dim}")
        for t in (rope.grids, cos if cos.dim() == 3 else None):
            if t is not None and len(t) != batch:
                raise ValueError(f"rope: expected a grid for each of the {batch} sequences; got {len(t)}")
        capacity = rope.grid[0] * rope.grid[1]
        grid = [rope.grid[0], rope.grid[1], int(rope.swap)]
    if like.dtype != torch.float64 and cos.dtype != torch.float32:
        cos, sin = cos.float(), sin.float()
    if num_patches is not None:
        if keep_idx is not None:
            if keep_idx.dtype not in (torch.int32, torch.int64) or tuple(keep_idx.shape) != (batch, num_patches):
                raise ValueError(
                    f"keep_idx: expected int32 or int64 ({batch}, {num_patches}); "
                    f"got {tuple(keep_idx.shape)} {keep_idx.dtype}"
                )
        elif rope.grids is None and capacity != num_patches:
            raise ValueError(
                f"rope: the table is for {capacity} patches, the sequence has {num_patches} after "
                f"{num_prefix_tokens} prefix tokens (keep_idx tells which patches are there)"
            )
    if keep_idx is not None and keep_idx.numel() and os.environ.get("EVA02_DEBUG", "0") not in ("", "0"):
        least, largest = (int(n) for n in keep_idx.aminmax())
        if least < 0 or largest >= capacity:
            raise ValueError(f"keep_idx: expected patches 0..{capacity - 1}; got {least}..{largest}")
    if keep_idx is not None:
        keep_idx = keep_idx.contiguous()  # such as one row of indices expanded over the batch
    return RopeArgs(cos, sin, rope.grids, grid, layout, num_prefix_tokens, keep_idx)


def per_unit_table(gradients: Sequence[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """A table's gradients (cosines, sines) from ones computed with rotations there and back.

    Rotating there and back multiplies by cos^2 + sin^2, which is 1 only for cosines and sines of angles.
    """
    square = cos * cos + sin * sin
    return [torch.where(square == 0, 0.0, g / square).to(g.dtype) for g in gradients]


# ---- reference ------------------------------------------------------------------------------------------------------
def token_cos_sin(
    rope: RopeArgs, seq_len: int, *, dtype: torch.dtype, positions: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines per token, (1|B, S, 1|H, D/2) in ``dtype``; prefix tokens get cos 1, sin 0.

    ``positions`` and ``segments`` (S,): position within its sequence, and the sequence, of each token of a packed
    batch (then B = 1).
    """
    cos, sin = rope.cos, rope.sin
    assert cos is not None and sin is not None
    form = rope.layout.partition(":")[2]
    packed = positions is not None
    if positions is None:
        positions = torch.arange(seq_len, device=cos.device)
    patch = (positions - rope.num_prefix_tokens)[None]  # (1, S)
    if rope.keep_idx is not None:
        patch = torch.nn.functional.pad(rope.keep_idx.long(), (rope.num_prefix_tokens, 0))  # (B, S)
    is_prefix = (positions < rope.num_prefix_tokens)[None, :, None, None]
    patch = patch.clamp(min=0)
    if rope.grid:
        h, w, swap = rope.grid
        if rope.grids is None:
            width = torch.full_like(patch, w)
        else:
            width = rope.grids[:, 1].long().clamp(min=1)
            width = width[segments][None] if packed else width[:, None]
        row = torch.div(patch, width, rounding_mode="floor")
        rows = [row, h + patch - row * width]
        if swap:
            rows.reverse()
        if cos.dim() == 3:
            of_sequence = segments[None] if segments is not None else torch.arange(len(cos), device=cos.device)[:, None]
            picked = [torch.cat([t[of_sequence, r] for r in rows], -1) for t in (cos, sin)]
        else:
            picked = [torch.cat([t[r] for r in rows], -1) for t in (cos, sin)]
        cos, sin = (t[:, :, None] for t in picked)  # (1|B, S, 1, D/2)
    elif form == "head":
        cos, sin = (t[:, patch].permute(1, 2, 0, 3) for t in (cos, sin))  # (1|B, S, H, D/2)
    elif form == "batch":
        sample = segments[None] if segments is not None else torch.arange(len(cos), device=cos.device)[:, None]
        cos, sin = (t[sample, patch][:, :, None] for t in (cos, sin))
    else:
        cos, sin = (t[patch][:, :, None] for t in (cos, sin))
    return cos.to(dtype).masked_fill(is_prefix, 1.0), sin.to(dtype).masked_fill(is_prefix, 0.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotate the channel pairs of x (B, S, H, D) by cos, sin broadcastable to (B, S, H, D/2)."""
    if layout.startswith("interleaved"):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_tokens(x: Tensor, rope: RopeArgs) -> Tensor:
    """x (B, S, H, D) with its patch tokens rotated; the arithmetic is at least float32, the result x's dtype."""
    if rope.cos is None or x.numel() == 0 or x.shape[1] <= rope.num_prefix_tokens:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = token_cos_sin(rope, x.shape[1], dtype=dtype)
    return rotate(x.to(dtype), cos, sin, rope.layout).to(x.dtype)
