"""What the DINO models of transformers share (transformers 5.23): attention, MLPs and blocks of one shape."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from eva02_kernels import RopeTable

from . import _read as read
from . import _run as run
from ._blocks import attention_half, mlp_half
from ._core import Rule

read.ACTIVATIONS[activations.GELUActivation] = lambda m: "gelu" if m.act is F.gelu else "GELU in Python"
read.ACTIVATIONS[activations.SiLUActivation] = lambda m: "silu"

# Implementations that compute plain softmax attention; a name that a user registered may compute anything.
_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention", None)
_HARMLESS = ("output_attentions", "output_hidden_states", "return_dict", "use_cache")


def _inactive_recorder(hook: Any) -> bool:
    """transformers puts recording hooks on its modules when outputs are first asked for, and leaves them there."""
    if getattr(hook, "__qualname__", "") != "install_output_capuring_hook.<locals>.output_capturing_hook":
        return False
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    wanted = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
    return collected is None or wanted["key"].cell_contents not in collected


read.INERT_HOOKS.append(_inactive_recorder)


def draw(module: Any, x: Tensor) -> Tensor | None:
    """Drop-path factors from the same draw as the models' DropPath: floor(rand + keep) / keep."""
    if not module.training or module.drop_prob == 0.0:
        return None
    keep = 1 - module.drop_prob
    shape = (x.shape[0],) + (1,) * (x.dim() - 1)
    return (x.new_empty(shape).uniform_() + keep).floor().flatten().float() / keep


def read_attention(module: Any, why: read.Why) -> read.Attention | None:
    fine = [read.linear(getattr(module, n), n, why) for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    read.head_dim(module.head_dim, why)
    implementation = module.config._attn_implementation
    if implementation not in _ATTENTION:
        why.now.append(f"attention implementation {implementation!r}")
    dropout: float = getattr(module, "dropout", 0.0) or getattr(module, "attention_dropout", 0.0)
    if module.training and dropout > 0.0:
        why.now.append(f"attention dropout is active (p={dropout:g}, training)")
    if why or not all(fine):
        return None
    q, k, v, o = module.q_proj, module.k_proj, module.v_proj, module.o_proj
    heads = q.weight.shape[0] // module.head_dim
    return read.Attention(
        (q.weight, k.weight, v.weight),
        (q.bias, k.bias, v.bias),
        o.weight,
        o.bias,
        heads,
        k.weight.shape[0] // module.head_dim,
        module.scaling,
        None,
        None,
        None,
        None,
    )


def attention_reasons(module: nn.Module) -> list[str]:
    why = read.Why()
    read_attention(module, why)
    return why.never


def read_mlp(module: Any, why: read.Why, names: tuple[str, str], act: str) -> read.Mlp | None:
    read.activation(getattr(module, act), act, "gelu", why)
    fine = [read.linear(getattr(module, n), n, why) for n in names]
    if why or not all(fine):
        return None
    first, second = (getattr(module, n) for n in names)
    return read.Mlp(False, first.weight, first.bias, None, None, second.weight, second.bias, None)


def read_gated_mlp(module: Any, why: read.Why) -> read.Mlp | None:
    read.activation(module.act_fn, "act_fn", "silu", why)
    fine = [read.linear(getattr(module, n), n, why) for n in ("gate_proj", "up_proj", "down_proj")]
    if why or not all(fine):
        return None
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    return read.Mlp(True, gate.weight, gate.bias, up.weight, up.bias, down.weight, down.bias, None)


def mlp_reasons(module: nn.Module) -> list[str]:
    why = read.Why()
    read.mlp(module, "mlp", why)
    return why.never


def run_mlp(module: nn.Module, x: Tensor, original: Any) -> Tensor:
    spec = read.MLPS[original](module, read.Why())
    return original.forward(module, x) if spec is None else run.mlp(x, spec)


_tables = run.TableCache()


class Call:
    """The arguments of one attention call in our terms; ``fine`` is False if it needs the original code."""

    def __init__(
        self, module: nn.Module, x: Tensor, mask: Tensor | None, cos_sin: tuple[Tensor, Tensor] | None, kwargs: dict
    ) -> None:
        self.fine = mask is None and all(v is None or k in _HARMLESS for k, v in kwargs.items())
        self.kwargs: dict[str, Any] = {}
        if cos_sin is None:
            return
        cos, sin = cos_sin
        head_dim = getattr(module, "head_dim", 0)
        if cos.dim() != 2 or cos.shape[-1] != head_dim:
            self.fine = False
            return

        def make(cos: Tensor, head_dim: int, layout: str) -> RopeTable:
            return run.table_from_cos_sin(cos, sin, head_dim, layout)

        self.kwargs["table"] = _tables.get(cos, make, head_dim, "half")
        self.kwargs["num_prefix_tokens"] = x.shape[1] - cos.shape[0]


def run_attention(module: Any, x: Tensor, call: Call, original: Any, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The attention module by itself; with ``eager`` attention it returns the weights, which we never have."""
    spec = read_attention(module, read.Why())
    if spec is None or not call.fine or module.config._attn_implementation == "eager":
        return original.forward(module, x, **arguments)
    return run.attention(x, spec, **call.kwargs), None


def run_layer(layer: Any, x: Tensor, call: Call, arguments: dict[str, Any]) -> Tensor:
    attention = layer.attention
    x = attention_half(
        x,
        layer.norm1,
        attention,
        layer.layer_scale1,
        layer.drop_path,
        call,
        lambda normed: attention(normed, **arguments)[0],
    )
    return mlp_half(x, layer.norm2, layer.mlp, layer.layer_scale2, layer.drop_path)


HALVES = (("norm1", "attention", "layer_scale1", "drop_path"), ("norm2", "mlp", "layer_scale2", "drop_path"))
ATTENTION_OPS = ("qkv_rope", "rope_attention", "linear")


def attention_rule(original: type[nn.Module], fused: type[nn.Module]) -> Rule:
    read.ATTENTIONS[original] = read.ATTENTIONS[fused] = read_attention
    return Rule(original, fused, attention_reasons, ATTENTION_OPS)


def mlp_rule(original: type[nn.Module], fused: type[nn.Module], reader: Any, op: str) -> Rule:
    read.MLPS[original] = read.MLPS[fused] = reader
    return Rule(original, fused, mlp_reasons, (op,))
