"""The three feed-forward networks of the EVA family, with timm's arguments and weight names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from eva02_kernels import gelu_mlp, swiglu_mlp
from eva02_kernels.nn.norm import PreNorm, fusable_norm

NormLayer = Callable[..., nn.Module]


class SwiGLU(nn.Module):
    """SwiGLU with separate gate and value projections and an optional LayerNorm on the product (sub-LN).

    Equivalent PyTorch: `fc2(norm(F.silu(fc1_g(x)) * fc1_x(x)))`. Weights: `fc1_g`, `fc1_x`, `norm`, `fc2`.

    Args:
        in_features, hidden_features, out_features: channels in, of the product, and out.
        norm_layer: builds the LayerNorm on the product; None has none.
        bias: whether the projections have biases.
        align_to: rounds hidden_features up to a multiple.
        recompute: keep only x for backward and compute gate and value again there.

    Source: Shazeer, arXiv:2002.05202; Fang et al., arXiv:2303.11331.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        norm_layer: NormLayer | None = None,
        bias: bool = True,
        align_to: int = 0,
        *,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        if align_to:
            hidden_features += -hidden_features % align_to
        self.recompute = recompute
        self.fc1_g = nn.Linear(in_features, hidden_features, bias=bias, **factory)
        self.fc1_x = nn.Linear(in_features, hidden_features, bias=bias, **factory)
        self.norm = None if norm_layer is None else fusable_norm(norm_layer(hidden_features, **factory), "SwiGLU")
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        pre_norm: PreNorm | None = None,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Returns residual + row_scale * layer_scale * mlp(pre_norm(x)); each of the three may be absent."""
        gate, up, norm, down = self.fc1_g, self.fc1_x, self.norm, self.fc2
        if norm is None:
            norm_weight = norm_bias = None
            eps = 1e-6
        else:
            norm_weight, norm_bias, eps = norm.weight, norm.bias, norm.eps
        return swiglu_mlp(
            x,
            gate.weight,
            gate.bias,
            up.weight,
            up.bias,
            down.weight,
            down.bias,
            norm_weight,
            norm_bias,
            eps,
            pre_norm=pre_norm,
            recompute=self.recompute,
            residual=residual,
            layer_scale=layer_scale,
            row_scale=row_scale,
        )

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"


class SwiGLUPacked(nn.Module):
    """SwiGLU with one projection for gate and value, gate rows first, and no norm inside.

    Equivalent PyTorch: `g, u = fc1(x).chunk(2, -1); fc2(F.silu(g) * u)`. Weights: `fc1`, `fc2`, as timm's GluMlp
    with `act_layer=nn.SiLU, gate_last=False`; like there, hidden_features is the width of `fc1`, twice the product's.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        if hidden_features % 2:
            raise ValueError(f"SwiGLUPacked: hidden_features holds gate and value and must be even: {hidden_features}")
        self.recompute = recompute
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **factory)
        self.fc2 = nn.Linear(hidden_features // 2, out_features or in_features, bias=bias, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        pre_norm: PreNorm | None = None,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Returns residual + row_scale * layer_scale * mlp(pre_norm(x)); each of the three may be absent."""
        gate_up, down = self.fc1, self.fc2
        return swiglu_mlp(
            x,
            gate_up.weight,
            gate_up.bias,
            None,
            None,
            down.weight,
            down.bias,
            pre_norm=pre_norm,
            recompute=self.recompute,
            residual=residual,
            layer_scale=layer_scale,
            row_scale=row_scale,
        )

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"


class Mlp(nn.Module):
    """Two projections with the exact GELU between them. Weights: `fc1`, `fc2`.

    Equivalent PyTorch: `fc2(F.gelu(fc1(x)))`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        self.recompute = recompute
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **factory)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        pre_norm: PreNorm | None = None,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Returns residual + row_scale * layer_scale * mlp(pre_norm(x)); each of the three may be absent."""
        up, down = self.fc1, self.fc2
        return gelu_mlp(
            x,
            up.weight,
            up.bias,
            down.weight,
            down.bias,
            pre_norm=pre_norm,
            recompute=self.recompute,
            residual=residual,
            layer_scale=layer_scale,
            row_scale=row_scale,
        )

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"


__all__ = ["Mlp", "NormLayer", "SwiGLU", "SwiGLUPacked"]
