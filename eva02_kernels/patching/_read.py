"""Reading other libraries' modules: what they compute, in terms of our operators, or why they cannot be read.

A reading is made when a model is patched (for the report) and again at every call of a fused module: dropout that was
switched on, a hook that was put on a skipped child or a child that was exchanged since then sends that call to the
original code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


class Norm(NamedTuple):
    rms: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Attention(NamedTuple):
    weight: Tensor | tuple[Tensor, Tensor, Tensor]
    bias: Tensor | tuple[Tensor | None, Tensor | None, Tensor | None] | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    num_heads: int
    num_kv_heads: int
    scale: float | None
    q_norm: Norm | None
    k_norm: Norm | None
    inner_norm: Norm | None
    gate: nn.Linear | None


class Mlp(NamedTuple):
    gated: bool
    w1: Tensor  # the gate projection of a gated MLP
    b1: Tensor | None
    w_up: Tensor | None  # None: no gate, or packed with it in w1
    b_up: Tensor | None
    w2: Tensor
    b2: Tensor | None
    norm: Norm | None


class Why:
    """Why a module cannot be read: ``never`` (its kind) and ``now`` (hooks, active dropout: may change)."""

    __slots__ = ("never", "now")

    def __init__(self) -> None:
        self.never: list[str] = []
        self.now: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.never or self.now)


# What is known of each class (exact types: a subclass may override anything). Library files add to these.
NORMS: dict[type, bool] = {nn.LayerNorm: False}  # class -> rms
ACTIVATIONS: dict[type, Callable[[Any], str]] = {  # class -> instance -> "gelu" | "silu" | other
    nn.GELU: lambda m: "gelu" if m.approximate == "none" else f"GELU(approximate={m.approximate!r})",
    nn.SiLU: lambda m: "silu",
}
LAYER_SCALES: dict[type, str] = {}  # class -> name of the (C,) parameter
DROP_PATHS: dict[type, Callable[[Any, Tensor], Tensor | None]] = {}  # class -> (instance, x) -> (B,) float32 factors
ATTENTIONS: dict[type, Callable[[Any, Why], Attention | None]] = {}
MLPS: dict[type, Callable[[Any, Why], Mlp | None]] = {}


def kind(module: object) -> str:
    return type(module).__qualname__


INERT_HOOKS: list[Callable[[Any], bool]] = []  # hook -> whether it is known to do nothing now


def hooked(module: nn.Module) -> bool:
    """Whether calling the module would do more than its forward."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return bool(module._forward_hooks) and not all(
        any(inert(hook) for inert in INERT_HOOKS) for hook in module._forward_hooks.values()
    )


def skippable(module: nn.Module, name: str, why: Why) -> bool:
    """Whether the module's forward may be inlined: no hooks, and its parameters are ordinary tensors."""
    if hooked(module):
        why.now.append(f"hooks on {name}")
        return False
    for key, value in module._parameters.items():
        # DTensor, quantised and other subclasses bring their own implementation of a linear layer.
        if value is not None and type(value) not in _PLAIN_TENSORS and not _is_fake(value):
            why.now.append(f"{name}.{key} is a {kind(value)}")
            return False
    return True


_PLAIN_TENSORS = (nn.Parameter, Tensor, nn.Buffer)


def _is_fake(value: object) -> bool:
    return type(value).__name__ == "FakeTensor"  # of torch.export and make_fx; its module is private


def no_global_hooks(why: Why) -> None:
    if _has_any_global_hook():
        why.now.append("global module hooks")


def linear(module: nn.Module | None, name: str, why: Why) -> bool:
    if type(module) is not nn.Linear:
        why.never.append(f"{name} is a {kind(module)}, not nn.Linear")
        return False
    return skippable(module, name, why)


def identity(module: nn.Module, name: str, why: Why) -> bool:
    """True for nn.Identity; a hooked one is reported."""
    return type(module) is nn.Identity and (skippable(module, name, why) or True)


def dropout(module: nn.Module, name: str, why: Why) -> None:
    if type(module) is nn.Identity:
        skippable(module, name, why)
    elif type(module) is not nn.Dropout:
        why.never.append(f"{name} is a {kind(module)}")
    elif module.training and module.p > 0.0:
        why.now.append(f"{name} is active (p={module.p:g}, training)")
    else:
        skippable(module, name, why)


def norm(module: Any, name: str, why: Why) -> Norm | None:
    rms = NORMS.get(type(module))
    if rms is None:
        why.never.append(f"{name} is a {kind(module)}")
        return None
    if getattr(module, "_fast_norm", False):
        why.never.append(f"{name} uses timm's fast norm (other arithmetic under autocast)")
        return None
    if len(module.normalized_shape) != 1:
        why.never.append(f"{name} normalises {len(module.normalized_shape)} dims")
        return None
    if module.eps is None:
        why.never.append(f"{name} has eps=None (depends on the dtype)")
        return None
    skippable(module, name, why)
    return Norm(rms, module.weight, None if rms else module.bias, module.eps)


def optional_norm(module: nn.Module, name: str, why: Why) -> Norm | None:
    return None if identity(module, name, why) else norm(module, name, why)


def activation(module: nn.Module, name: str, wanted: str, why: Why) -> None:
    read = ACTIVATIONS.get(type(module))
    found = kind(module) if read is None else read(module)
    if found != wanted:
        why.never.append(f"{name} is {found}, not {'exact GELU' if wanted == 'gelu' else 'SiLU'}")
    else:
        skippable(module, name, why)


def layer_scale(module: nn.Module | Tensor | None, name: str, why: Why) -> Tensor | None:
    """The (C,) factors of a layer scale: a parameter, a module that holds one, or nothing."""
    if module is None or isinstance(module, Tensor):
        return module
    if identity(module, name, why):
        return None
    key = LAYER_SCALES.get(type(module))
    if key is None:
        why.never.append(f"{name} is a {kind(module)}")
        return None
    skippable(module, name, why)
    return getattr(module, key)


def drop_path(module: nn.Module, name: str, why: Why) -> None:
    if type(module) not in DROP_PATHS and type(module) is not nn.Identity:
        why.never.append(f"{name} is a {kind(module)}")
    else:
        skippable(module, name, why)


def row_scale(module: nn.Module, x: Tensor) -> Tensor | None:
    """Drop-path factors, drawn exactly as the module would draw them (the same seed drops the same samples)."""
    draw = DROP_PATHS.get(type(module))
    return None if draw is None else draw(module, x)


def attention(module: nn.Module, name: str, why: Why) -> Attention | None:
    read = ATTENTIONS.get(type(module))
    if read is None:
        why.never.append(f"{name} is a {kind(module)}")
        return None
    if hooked(module):
        why.now.append(f"hooks on {name}")
    return read(module, why)


def mlp(module: nn.Module, name: str, why: Why) -> Mlp | None:
    read = MLPS.get(type(module))
    if read is None:
        why.never.append(f"{name} is a {kind(module)}")
        return None
    if hooked(module):
        why.now.append(f"hooks on {name}")
    return read(module, why)


def head_dim(value: int, why: Why) -> None:
    if value % 4 or not 16 <= value <= 128:
        why.never.append(f"head dim {value} (16 to 128 in steps of 4 are supported)")
