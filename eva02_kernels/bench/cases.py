"""Every operator at a model's sizes: inputs, our call, and the expression that users write without us.

The expressions are those of timm 1.0 and of the EVA-02 code (which tensors are made, in which order), attention
through `F.scaled_dot_product_attention`. Tables and indices are made once, outside the clock, for every arm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import eva02_kernels as ek
from eva02_kernels._registry import OP_NAMES, get_spec
from eva02_kernels.bench.providers import Unsupported
from eva02_kernels.bench.shapes import Shape

Outputs = Tensor | tuple[Tensor, ...]
EPS = 1e-6


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass
class Problem:
    """One operator at one shape. Arms are called with ``tensors`` as keywords.

    ``expression`` may leave its result in another arrangement than the operator (separate q, k, v): ``to_public``
    turns its outputs into the operator's, ``from_public`` the operator's output gradients into its own.
    """

    op: str
    shape: Shape
    tensors: dict[str, Tensor]
    ours: Callable[..., Outputs]
    expression: Callable[..., Outputs]
    parameters: frozenset[str] = frozenset()
    to_public: Callable[..., tuple[Tensor, ...]] = lambda *outputs: outputs
    from_public: Callable[..., tuple[Tensor, ...]] = lambda *grads: grads
    flops: tuple[int, int] = (0, 0)
    bytes_moved: tuple[int, int] = (0, 0)
    bytes_without_gradients: int = 0
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # of the public operator
    extras: dict[str, Any] = field(default_factory=dict)  # what a peer may want: tables

    @property
    def device(self) -> str:
        return next(iter(self.tensors.values())).device.type

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.tensors.values() if t.is_floating_point())

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors.values() if t.requires_grad]

    def double(self) -> dict[str, Tensor]:
        """The inputs in float64, for the reference."""
        return {
            name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for name, t in self.tensors.items()
        }


class _Draw:
    """Random inputs of one problem, rounded to its dtype; drawn on the CPU, so that they are the same on any device."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)
        self.tensors: dict[str, Tensor] = {}
        self.parameters: set[str] = set()

    def add(self, name: str, value: Tensor, *, parameter: bool = False, grad: bool = True) -> Tensor:
        if value.is_floating_point():
            value = value.to(self.dtype)
        value = value.to(self.device)
        if value.is_floating_point():
            value.requires_grad_(grad)
        self.tensors[name] = value
        if parameter:
            self.parameters.add(name)
        return value

    def activation(self, name: str, *size: int, grad: bool = True) -> Tensor:
        return self.add(name, torch.randn(size, generator=self.generator), grad=grad)

    def weight(self, name: str, *size: int) -> Tensor:
        return self.add(name, torch.randn(size, generator=self.generator) * size[-1] ** -0.5, parameter=True)

    def bias(self, name: str, size: int) -> Tensor:
        return self.add(name, 0.1 * torch.randn(size, generator=self.generator), parameter=True)

    def gain(self, name: str, size: int) -> Tensor:
        return self.add(name, 1 + 0.1 * torch.randn(size, generator=self.generator), parameter=True)

    def norm(self, name: str, size: int) -> None:
        self.gain(f"{name}_w", size)
        self.bias(f"{name}_b", size)


# ---- RoPE as timm writes it ------------------------------------------------------------------------------------------
def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


def rotate_patches(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """x (B, H, S, D): the class token is cut off, the patches rotated, both joined again."""
    patches = x[:, :, 1:]
    return torch.cat([x[:, :, :1], (patches * cos + rotate_pairs(patches) * sin).to(x.dtype)], dim=2)


def _tables(shape: Shape, device: str) -> tuple[ek.RopeTable, Tensor, Tensor]:
    """The axial table, and the same angles as dense (P, D) sine and cosine, each given twice."""
    table = ek.rope_2d(shape.grid, shape.head_dim)
    h, w = shape.grid
    dense = []
    for values in (table.sin, table.cos):
        rows, columns = values[:h].repeat_interleave(w, 0), values[h:].repeat(h, 1)
        dense.append(torch.cat([rows, columns], -1).repeat_interleave(2, -1))
    return table.to(device), dense[0].to(device), dense[1].to(device)


# ---- one function per operator: (shape, draw) -> (ours, expression, what else a Problem takes) -----------------------
_makers: dict[str, Callable[[Shape, _Draw], dict[str, Any]]] = {}


def _case(make: Callable[[Shape, _Draw], dict[str, Any]]) -> Callable[[Shape, _Draw], dict[str, Any]]:
    _makers[make.__name__] = make
    return make


@_case
def rope_attention(s: Shape, draw: _Draw) -> dict[str, Any]:
    for name in "qkv":
        draw.activation(name, s.batch, s.tokens, s.heads, s.head_dim)
    table, sin, cos = _tables(s, draw.device)

    def expression(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(rotate_patches(q, sin, cos), rotate_patches(k, sin, cos), v)
        return out.transpose(1, 2).reshape(s.batch, s.tokens, s.heads, s.head_dim)

    return {
        "ours": lambda q, k, v: ek.rope_attention(q, k, v, table),
        "expression": expression,
        "canonical": lambda t: ((t["q"], t["k"], t["v"], table), {}),
        "extras": {"sin": sin, "cos": cos, "table": table},
    }


@_case
def rope_attention_packed(s: Shape, draw: _Draw) -> dict[str, Any]:
    draw.activation("qkv", s.batch, s.tokens, 3 * s.heads, s.head_dim)
    table, sin, cos = _tables(s, draw.device)

    def expression(qkv: Tensor) -> Tensor:
        q, k, v = qkv.reshape(s.batch, s.tokens, 3, s.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(rotate_patches(q, sin, cos), rotate_patches(k, sin, cos), v)
        return out.transpose(1, 2).reshape(s.batch, s.tokens, s.heads, s.head_dim)

    return {
        "ours": lambda qkv: ek.rope_attention_packed(qkv, table),
        "expression": expression,
        "canonical": lambda t: ((t["qkv"], table), {}),
        "extras": {"sin": sin, "cos": cos},
    }


@_case
def apply_rope(s: Shape, draw: _Draw) -> dict[str, Any]:
    draw.activation("x", s.batch, s.tokens, s.heads, s.head_dim)
    table, sin, cos = _tables(s, draw.device)
    return {
        "ours": lambda x: ek.apply_rope(x, table),
        "expression": lambda x: rotate_patches(x.transpose(1, 2), sin, cos).transpose(1, 2),
        "canonical": lambda t: ((t["x"], table), {}),
        "extras": {"sin": sin, "cos": cos},
    }


@_case
def qkv_rope(s: Shape, draw: _Draw) -> dict[str, Any]:
    draw.activation("x", s.batch, s.tokens, s.dim)
    draw.norm("norm", s.dim)
    draw.bias("bq", s.dim), draw.bias("bv", s.dim)
    table, sin, cos = _tables(s, draw.device)
    k_bias = torch.zeros(s.dim, dtype=draw.dtype, device=draw.device)

    def heads(y: Tensor) -> Tensor:
        return y.reshape(s.batch, s.tokens, s.heads, -1).transpose(1, 2)

    def rotated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return rotate_patches(q, sin, cos), rotate_patches(k, sin, cos), v

    names = ("wq", "wk", "wv") if s.subln else ("w",)
    for name in names:
        draw.weight(name, s.dim if s.subln else 3 * s.dim, s.dim)

    def weights(w: dict[str, Tensor]) -> Any:
        return tuple(w[name] for name in names) if s.subln else w["w"]

    def ours(x: Tensor, norm_w: Tensor, norm_b: Tensor, bq: Tensor, bv: Tensor, **w: Tensor) -> Tensor:
        pre_norm = (norm_w, norm_b, EPS)
        return ek.qkv_rope(x, weights(w), (bq, None, bv), table, num_heads=s.heads, pre_norm=pre_norm)

    def expression(
        x: Tensor, norm_w: Tensor, norm_b: Tensor, bq: Tensor, bv: Tensor, **w: Tensor
    ) -> tuple[Tensor, ...]:
        y = F.layer_norm(x, (s.dim,), norm_w, norm_b, EPS)
        if s.subln:
            return rotated(
                heads(F.linear(y, w["wq"], bq)), heads(F.linear(y, w["wk"])), heads(F.linear(y, w["wv"], bv))
            )
        qkv = F.linear(y, w["w"], torch.cat((bq, k_bias.to(bq.dtype), bv)))
        q, k, v = qkv.reshape(s.batch, s.tokens, 3, s.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return rotated(q, k, v)

    return {
        "ours": ours,
        "expression": expression,
        "to_public": lambda q, k, v: (torch.cat([q, k, v], 1).transpose(1, 2),),
        # Attention hands gradients back token by token: the same values in that arrangement.
        "from_public": lambda g: tuple(part.contiguous().transpose(1, 2) for part in g.chunk(3, 2)),
        "canonical": lambda t: (
            (t["x"], weights(t), (t["bq"], None, t["bv"]), table),
            {"num_heads": s.heads, "pre_norm": (t["norm_w"], t["norm_b"], EPS)},
        ),
    }


@_case
def linear(s: Shape, draw: _Draw) -> dict[str, Any]:
    draw.activation("x", s.batch, s.tokens, s.dim)
    draw.activation("residual", s.batch, s.tokens, s.dim)
    draw.weight("w", s.dim, s.dim), draw.bias("b", s.dim)
    return {
        "ours": lambda x, residual, w, b: ek.linear(x, w, b, residual=residual),
        "expression": lambda x, residual, w, b: residual + F.linear(x, w, b),
        "canonical": lambda t: ((t["x"], t["w"], t["b"]), {"residual": t["residual"]}),
    }


@_case
def swiglu(s: Shape, draw: _Draw) -> dict[str, Any]:
    if s.subln:
        draw.activation("gate", s.batch, s.tokens, s.hidden)
        draw.activation("up", s.batch, s.tokens, s.hidden)
        return {
            "ours": lambda gate, up: ek.swiglu(gate, up),
            "expression": lambda gate, up: F.silu(gate) * up,
            "canonical": lambda t: ((t["gate"], t["up"]), {}),
        }
    draw.activation("gate_up", s.batch, s.tokens, 2 * s.hidden)

    def expression(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return {
        "ours": lambda gate_up: ek.swiglu(gate_up),
        "expression": expression,
        "canonical": lambda t: ((t["gate_up"],), {}),
    }


@_case
def subln_swiglu(s: Shape, draw: _Draw) -> dict[str, Any]:
    if not s.subln:
        raise Unsupported("EVA-02 Ti and S have no LayerNorm on the hidden layer")
    draw.activation("gate", s.batch, s.tokens, s.hidden)
    draw.activation("up", s.batch, s.tokens, s.hidden)
    draw.norm("norm", s.hidden)
    return {
        "ours": lambda gate, up, norm_w, norm_b: ek.subln_swiglu(gate, up, norm_w, norm_b, EPS),
        "expression": lambda gate, up, norm_w, norm_b: F.layer_norm(
            F.silu(gate) * up, (s.hidden,), norm_w, norm_b, EPS
        ),
        "canonical": lambda t: ((t["gate"], t["up"], t["norm_w"], t["norm_b"], EPS), {}),
    }


@_case
def swiglu_mlp(s: Shape, draw: _Draw) -> dict[str, Any]:
    draw.activation("x", s.batch, s.tokens, s.dim)
    draw.norm("pre", s.dim)
    draw.weight("w_down", s.dim, s.hidden), draw.bias("b_down", s.dim)
    if s.subln:
        draw.weight("w_gate", s.hidden, s.dim), draw.bias("b_gate", s.hidden)
        draw.weight("w_up", s.hidden, s.dim), draw.bias("b_up", s.hidden)
        draw.norm("norm", s.hidden)
    else:
        draw.weight("w_gate", 2 * s.hidden, s.dim), draw.bias("b_gate", 2 * s.hidden)
    names = ("x", "w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down", "norm_w", "norm_b")

    def ours(pre_w: Tensor, pre_b: Tensor, **t: Tensor) -> Tensor:
        args: list[Any] = [*(t.get(name) for name in names), EPS]
        return ek.swiglu_mlp(*args, pre_norm=(pre_w, pre_b, EPS), residual=t["x"])

    def expression(
        x: Tensor, pre_w: Tensor, pre_b: Tensor, w_down: Tensor, b_down: Tensor, w_gate: Tensor, b_gate: Tensor,
        w_up: Tensor | None = None, b_up: Tensor | None = None, norm_w: Tensor | None = None,
        norm_b: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = F.layer_norm(x, (s.dim,), pre_w, pre_b, EPS)
        if w_up is None:
            gate, up = F.linear(y, w_gate, b_gate).chunk(2, -1)
            return x + F.linear(F.silu(gate) * up, w_down, b_down)
        h = F.silu(F.linear(y, w_gate, b_gate)) * F.linear(y, w_up, b_up)
        return x + F.linear(F.layer_norm(h, (s.hidden,), norm_w, norm_b, EPS), w_down, b_down)

    return {
        "ours": ours,
        "expression": expression,
        "canonical": lambda t: (
            tuple(t.get(n) for n in names),
            {"pre_norm": (t["pre_w"], t["pre_b"], EPS), "residual": t["x"]},
        ),
    }


@_case
def gelu_mlp(s: Shape, draw: _Draw) -> dict[str, Any]:
    """A plain ViT's feed-forward network of the same width: hidden 4 C."""
    draw.activation("x", s.batch, s.tokens, s.dim)
    draw.norm("pre", s.dim)
    draw.weight("w1", 4 * s.dim, s.dim), draw.bias("b1", 4 * s.dim)
    draw.weight("w2", s.dim, 4 * s.dim), draw.bias("b2", s.dim)

    def expression(x: Tensor, pre_w: Tensor, pre_b: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y = F.layer_norm(x, (s.dim,), pre_w, pre_b, EPS)
        return x + F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2)

    return {
        "ours": lambda x, pre_w, pre_b, w1, b1, w2, b2: ek.gelu_mlp(
            x, w1, b1, w2, b2, pre_norm=(pre_w, pre_b, EPS), residual=x
        ),
        "expression": expression,
        "canonical": lambda t: (
            (t["x"], t["w1"], t["b1"], t["w2"], t["b2"]),
            {"pre_norm": (t["pre_w"], t["pre_b"], EPS), "residual": t["x"]},
        ),
    }


@_case
def add_layer_norm(s: Shape, draw: _Draw) -> dict[str, Any]:
    """With layer scale and drop path, as in a block that trains with both."""
    draw.activation("x", s.batch, s.tokens, s.dim)
    draw.activation("residual", s.batch, s.tokens, s.dim)
    draw.norm("norm", s.dim)
    draw.gain("scale", s.dim)
    # float32: drop path is never rounded.
    factors = torch.tensor([1.25, 1.25, 0.0, 1.25] * s.batch, device=draw.device)[: s.batch]

    def expression(x: Tensor, residual: Tensor, norm_w: Tensor, norm_b: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        total = residual + x * scale * factors.to(x.dtype).view(-1, 1, 1)
        return F.layer_norm(total, (s.dim,), norm_w, norm_b, EPS), total

    def ours(x: Tensor, residual: Tensor, norm_w: Tensor, norm_b: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return ek.add_layer_norm(x, residual, norm_w, norm_b, EPS, layer_scale=scale, row_scale=factors)

    return {
        "ours": ours,
        "expression": expression,
        "canonical": lambda t: (
            (t["x"], t["residual"], t["norm_w"], t["norm_b"], EPS),
            {"layer_scale": t["scale"], "row_scale": factors},
        ),
    }


def _kept_tokens(s: Shape, draw: _Draw) -> Tensor:
    """Half of the patches of each sample, in random order: (B, K)."""
    order = torch.rand(s.batch, s.patches, generator=draw.generator).argsort(1)
    return 1 + order[:, : max(1, s.patches // 2)]


@_case
def gather_tokens(s: Shape, draw: _Draw) -> dict[str, Any]:
    draw.activation("x", s.batch, s.tokens, s.dim)
    draw.add("idx", _kept_tokens(s, draw))
    return {
        "ours": lambda x, idx: ek.gather_tokens(x, idx),
        "expression": lambda x, idx: x.gather(1, idx.unsqueeze(-1).expand(-1, -1, s.dim)),
        "canonical": lambda t: ((t["x"], t["idx"]), {}),
    }


@_case
def scatter_tokens(s: Shape, draw: _Draw) -> dict[str, Any]:
    idx = draw.add("idx", _kept_tokens(s, draw))
    draw.activation("y", s.batch, idx.shape[1], s.dim)
    like = torch.empty(s.batch, s.tokens, s.dim, dtype=draw.dtype, device=draw.device)
    return {
        "ours": lambda idx, y: ek.scatter_tokens(y, idx, like),
        "expression": lambda idx, y: y.new_zeros(like.shape).scatter_add(1, idx.unsqueeze(-1).expand(-1, -1, s.dim), y),
        "canonical": lambda t: ((t["y"], t["idx"], like), {}),
    }


def _mask(s: Shape, draw: _Draw) -> Tensor:
    """Two patches in five are masked, as in EVA-02's pre-training."""
    order = torch.rand(s.batch, s.patches, generator=draw.generator).argsort(1)
    return order < max(1, 2 * s.patches // 5)


@_case
def mask_tokens(s: Shape, draw: _Draw) -> dict[str, Any]:
    draw.activation("patches", s.batch, s.patches, s.dim)
    draw.add("mask", _mask(s, draw))
    for name, count in (("mask_token", 1), ("pos_embed", s.tokens), ("cls_token", 1)):
        draw.add(name, 0.02 * torch.randn(1, count, s.dim, generator=draw.generator), parameter=True)

    def expression(patches: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
        w = mask.unsqueeze(-1).type_as(patches)
        x = patches * (1 - w) + mask_token.expand(s.batch, s.patches, -1) * w
        return torch.cat((cls_token.expand(s.batch, -1, -1), x), dim=1) + pos_embed

    return {
        "ours": lambda patches, mask, mask_token, pos_embed, cls_token: ek.mask_tokens(
            patches, mask, mask_token, pos_embed, cls_token
        ),
        "expression": expression,
        "canonical": lambda t: ((t["patches"], t["mask"], t["mask_token"], t["pos_embed"], t["cls_token"]), {}),
    }


@_case
def gather_layer_norm(s: Shape, draw: _Draw) -> dict[str, Any]:
    """The final LayerNorm before the pre-training head: upstream normalises every token and then picks the masked."""
    draw.activation("x", s.batch, s.tokens, s.dim)
    sample, patch = _mask(s, draw).nonzero(as_tuple=True)
    draw.add("idx", sample * s.tokens + 1 + patch)
    draw.norm("norm", s.dim)

    def expression(x: Tensor, idx: Tensor, norm_w: Tensor, norm_b: Tensor) -> Tensor:
        return F.layer_norm(x, (s.dim,), norm_w, norm_b, EPS).flatten(0, 1)[idx]

    return {
        "ours": lambda x, idx, norm_w, norm_b: ek.gather_layer_norm(x, idx, norm_w, norm_b, EPS),
        "expression": expression,
        "canonical": lambda t: ((t["x"], t["idx"], t["norm_w"], t["norm_b"], EPS), {}),
    }


@_case
def masked_cosine_loss(s: Shape, draw: _Draw) -> dict[str, Any]:
    idx = draw.add("idx", _mask(s, draw).flatten().nonzero().squeeze(1))
    draw.activation("pred", len(idx), s.dim)
    draw.activation("target", s.batch, s.patches, s.dim, grad=False)
    return {
        "ours": lambda idx, pred, target: ek.masked_cosine_loss(pred, target, idx),
        "expression": lambda idx, pred, target: (
            -F.cosine_similarity(
                pred.float() if pred.dtype != torch.float64 else pred,
                target.flatten(0, 1)[idx].to(torch.promote_types(target.dtype, torch.float32)),
                dim=-1,
            ).mean()
        ),
        "canonical": lambda t: ((t["pred"], t["target"], t["idx"]), {}),
    }


@_case
def clip_loss(s: Shape, draw: _Draw) -> dict[str, Any]:
    """Pairs enough for a matrix of similarities to be worth avoiding; of cosines' size, without normalising."""
    pairs = 64 * s.batch
    draw.activation("image", pairs, s.dim)
    draw.activation("text", pairs, s.dim)
    draw.add("logit_scale", torch.tensor(14.3 / s.dim))

    def expression(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        wide = torch.promote_types(image.dtype, torch.float32)
        logits = (logit_scale * image @ text.T).to(wide)
        labels = torch.arange(pairs, device=image.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return {
        "ours": lambda image, text, logit_scale: ek.clip_loss(image, text, logit_scale),
        "expression": expression,
        "canonical": lambda t: ((t["image"], t["text"], t["logit_scale"]), {}),
    }


def make_problem(op: str, shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    """Inputs, arms' functions, and the operator's declared work at this shape. Raises Unsupported where it has none."""
    draw = _Draw(shape, dtype, device)
    parts = _makers[op](shape, draw)
    spec = get_spec(op)
    args, kwargs = parts.pop("canonical")(draw.tensors)
    canonical = spec.canonical(*args, **kwargs)
    with torch.no_grad():
        forward_bytes, _ = spec.bytes_moved(*spec.canonical(*args, **kwargs))
    return Problem(
        op,
        shape,
        draw.tensors,
        parameters=frozenset(draw.parameters),
        arguments=(args, kwargs),
        flops=spec.flops(*canonical),
        bytes_moved=spec.bytes_moved(*canonical),
        bytes_without_gradients=forward_bytes,
        **parts,
    )


assert set(_makers) == set(OP_NAMES), "every operator has a case"
