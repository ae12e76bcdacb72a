"""The two halves of a pre-norm transformer block, ``x + drop(scale * f(norm(x)))``, each fused if it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _read as read
from . import _run as run
from ._core import Rule

Scale = nn.Module | Tensor | None


def attention_half(
    x: Tensor, norm: nn.Module, attn: nn.Module, scale: Scale, drop: nn.Module, call: Any, original: Callable
) -> Tensor:
    """``call``: arguments of the attention in our terms, and whether they can be (``fine``). ``original``: the
    attention as a function of the normed tokens, for a call that cannot be fused."""
    why = read.Why()
    pre, gamma = _around(norm, scale, drop, why)
    spec = read.attention(attn, "attn", why)
    if why or spec is None or not call.fine:
        return _as_written(x, original(norm(x)), scale, drop)
    stream = _stream(x)
    row_scale = read.row_scale(drop, x)
    out = run.attention(x, spec, pre=pre, residual=stream, layer_scale=gamma, row_scale=row_scale, **call.kwargs)
    return out if stream is x else x + out


def mlp_half(x: Tensor, norm: nn.Module, mlp: nn.Module, scale: Scale, drop: nn.Module) -> Tensor:
    why = read.Why()
    pre, gamma = _around(norm, scale, drop, why)
    spec = read.mlp(mlp, "mlp", why)
    if why or spec is None:
        return _as_written(x, mlp(norm(x)), scale, drop)
    stream = _stream(x)
    out = run.mlp(x, spec, pre=pre, residual=stream, layer_scale=gamma, row_scale=read.row_scale(drop, x))
    return out if stream is x else x + out


def _stream(x: Tensor) -> Tensor | None:
    """x, for an operator to add to its result; None under autocast, where operators compute in the low precision but
    the residual stream keeps its own, as in the original."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        return None
    return x


def _around(norm: nn.Module, scale: Scale, drop: nn.Module, why: read.Why) -> tuple[read.Norm | None, Tensor | None]:
    read.no_global_hooks(why)
    read.drop_path(drop, "drop path", why)
    return read.norm(norm, "norm", why), read.layer_scale(scale, "layer scale", why)


def _as_written(x: Tensor, branch: Tensor, scale: Scale, drop: nn.Module) -> Tensor:
    """The rest of a half whose module ran as a module (which may itself be a fused one)."""
    if isinstance(scale, Tensor):
        branch = branch * scale
    elif scale is not None:
        branch = scale(branch)
    return x + drop(branch)


class Halves:
    """What a rule has to say about a block, from the names of (norm, attention or MLP, scale, drop path) of a half."""

    def __init__(self, first: tuple[str, str, str, str], second: tuple[str, str, str, str]) -> None:
        self._names = (first, second)

    def _read(self, block: nn.Module) -> tuple[read.Why, read.Why, bool]:
        first, second = read.Why(), read.Why()
        norm, attn, scale, drop = (getattr(block, name) for name in self._names[0])
        _around(norm, scale, drop, first)
        read.attention(attn, "attention", first)
        norm, mlp, scale, drop = (getattr(block, name) for name in self._names[1])
        _around(norm, scale, drop, second)
        spec = read.mlp(mlp, "MLP", second)
        return first, second, spec is not None and spec.gated

    def reasons(self, block: nn.Module) -> list[str]:
        first, second, _ = self._read(block)
        if not (first.never and second.never):
            return []
        return [f"attention half: {r}" for r in first.never] + [f"MLP half: {r}" for r in second.never]

    def ops(self, block: nn.Module) -> tuple[str, ...]:
        first, second, gated = self._read(block)
        attention = () if first.never else ("qkv_rope", "rope_attention", "linear")
        return attention + (() if second.never else ("swiglu_mlp" if gated else "gelu_mlp",))

    def notes(self, block: nn.Module) -> list[str]:
        first, second, _ = self._read(block)
        halves = (("attention", first), ("MLP", second))
        kept = [f"{name} half stays as written: {'; '.join(w.never)}" for name, w in halves if w.never]
        return kept + [f"{name} half, for now: {'; '.join(w.now)}" for name, w in halves if w.now and not w.never]

    def inlines(self, block: nn.Module) -> list[str]:
        first, second, _ = self._read(block)
        return [n for names, w in zip(self._names, (first, second), strict=True) if not w.never for n in names]

    def rule(self, original: type[nn.Module], fused: type[nn.Module]) -> Rule:
        return Rule(original, fused, self.reasons, self.ops, self.notes, self.inlines)
