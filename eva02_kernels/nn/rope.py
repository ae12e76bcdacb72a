"""Rope2d: the recipe of a 2-D rotary table, and the tables built from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from eva02_kernels.rope import RopeTable, rope_2d


def _pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


class Rope2d(nn.Module):
    """2-D axial rotary position embedding, as a module without parameters or buffers.

    It stores how a table is made, never the table's values as state: nothing enters a state_dict, `.to(dtype)`
    and `.half()` leave the float32 tables alone, and a model built on the meta device gets real tables at its
    first call. Tables are cached per grid and device.

    Equivalent PyTorch: `eva02_kernels.rope_2d(grid, head_dim, ...)`.

    Args:
        head_dim: channels of one attention head, a multiple of 4.
        feat_shape: grid (rows, columns) built ahead of time, in patches; None builds every grid when first asked for.
        temperature: base of the frequencies (theta).
        ref_feat_shape: grid side the model was pre-trained on, in patches: coordinates are stretched onto it.
            None keeps c(t) = t.
        rotate_half: pairs are channels (j, j + D/2) instead of (2j, 2j + 1).
        grid_offset: added to every coordinate before stretching, in patches.
        grid_indexing: "ij" puts the row first, "xy" the column.

    Source: Su et al., arXiv:2104.09864; Fang et al., arXiv:2303.11331.
    """

    def __init__(
        self,
        head_dim: int,
        feat_shape: int | tuple[int, int] | None = None,
        *,
        temperature: float = 10000.0,
        ref_feat_shape: int | None = 16,
        rotate_half: bool = False,
        grid_offset: float = 0.0,
        grid_indexing: str = "ij",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.feat_shape = None if feat_shape is None else _pair(feat_shape)
        self.temperature = temperature
        self.ref_feat_shape = ref_feat_shape
        self.rotate_half = rotate_half
        self.grid_offset = grid_offset
        self.grid_indexing = grid_indexing
        self._tables: dict[tuple[int, int, torch.device], RopeTable] = {}
        # torch.empty honours `with torch.device(...)`, so an unset device is the one the parameters get.
        self._home = torch.empty(0, device=device).device
        self._prebuild()

    def _prebuild(self) -> None:
        if self.feat_shape is not None and self._home.type != "meta":
            self.forward(self.feat_shape, self._home)

    def _build(self, height: int, width: int, device: torch.device) -> RopeTable:
        return rope_2d(
            (height, width),
            self.head_dim,
            theta=self.temperature,
            pretrain_grid=self.ref_feat_shape,
            layout="half" if self.rotate_half else "interleaved",
            grid_offset=self.grid_offset,
            grid_indexing=self.grid_indexing,
            device=device,
        )

    def forward(self, grid: tuple[int, int] | None = None, device: torch.device | str | None = None) -> RopeTable:
        """Table of a grid.

        Args:
            grid: (rows, columns), in patches; None is `feat_shape`.
            device: where the table must lie; None is the device the module was last moved to.

        Returns:
            RopeTable with float32 cos and sin. No gradients.
        """
        height, width = grid or self.feat_shape  # type: ignore[misc]
        if device is None:
            device = self._home
        elif not isinstance(device, torch.device):
            device = torch.device(device)
        table = self._tables.get((height, width, device))
        if table is not None:
            return table
        if torch.compiler.is_compiling():
            # Filling the cache from inside a graph would change what the graph was guarded on.
            return self._build(height, width, device)
        # A table made in inference mode could never be saved for a later backward; one made on an ambient meta
        # device would hold no values.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            table = self._build(height, width, device)
        if type(table.cos) is torch.Tensor and not table.cos.is_meta:  # fake tensors must not outlive their mode
            self._tables[height, width, device] = table
        return table

    def _apply(self, fn: Any, recurse: bool = True) -> Rope2d:
        # .to(), .cuda(), .half(), to_empty() all arrive here; only the device they lead to is of interest.
        super()._apply(fn, recurse)
        probe = "cpu" if self._home.type == "meta" else self._home  # a meta tensor cannot be moved by .to()
        self._home = fn(torch.empty(0, device=probe)).device
        self._tables = {}
        self._prebuild()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy rebuilds its own tables: stored ones would tie it to this device.
        return {**self.__dict__, "_tables": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._home.type == "cpu":  # another device may be absent where the copy is opened: built when called
            self._prebuild()

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, feat_shape={self.feat_shape}, temperature={self.temperature}, "
            f"ref_feat_shape={self.ref_feat_shape}, rotate_half={self.rotate_half}"
        )


__all__ = ["Rope2d"]
