"""AddLayerNorm, and how a LayerNorm module is handed to an op that fuses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eva02_kernels import add_layer_norm

PreNorm = tuple[Tensor, Tensor | None, float]


def fusable_norm(norm: nn.Module, where: str) -> nn.Module:
    """Check that `norm` is a LayerNorm with a weight, the only norm the fused prologues compute."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
        raise ValueError(f"{where}: norm_layer must build an affine LayerNorm, got {norm!r}")
    return norm


class AddLayerNorm(nn.Module):
    """Residual addition followed by LayerNorm (or RMSNorm), in one pass.

    Equivalent PyTorch::

        sum = residual + row_scale[:, None, None] * gamma * x
        normed = F.layer_norm(sum, (dim,), weight, bias, eps)

    Args:
        dim: channels.
        eps: added to the variance.
        init_values: initial layer scale of the branch `x`; None has no `gamma`.
        rms: RMSNorm: no mean, no bias.

    Shapes: x, residual (B, ..., dim); row_scale (B,) float32; both results like x.
    Memory: see `eva02_kernels.add_layer_norm`.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        init_values: float | None = None,
        rms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.rms = rms
        self.init_values = init_values
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = None if rms else nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.gamma = None if init_values is None else nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.init_values)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, row_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns (normed, sum); `sum` is what the next residual addition takes."""
        return add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            self.eps,
            layer_scale=self.gamma,
            row_scale=row_scale,
            rms=self.rms,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, rms={self.rms}, init_values={self.init_values}"


__all__ = ["AddLayerNorm", "PreNorm", "fusable_norm"]
