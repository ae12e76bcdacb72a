"""Whole models and lone blocks as benchmark cases, and the arms that run them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import eva02
from eva02_kernels.bench.providers import provider
from eva02_kernels.bench.shapes import Shape
from eva02_kernels.nn import EvaBlock
from eva02_kernels.patching import patch
from eva02_kernels.rope import rope_2d

NUM_CLASSES = 1000
SUITES = ("model", "train", "memory")
Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights unlike any default: a bias or norm that an arm leaves out changes its results, and the gate sees it."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2 and not name.endswith(("pos_embed", "cls_token")):
            p.copy_(noise * p[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            p.copy_(1 + 0.1 * noise)
        else:
            p.copy_(0.1 * noise)


class ModelCase:
    """One classification model in the three forms that the arms share: timm's, ours, timm's patched."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        model_name: str | None = None,
        **options: Any,
    ) -> None:
        """``model_name``: the model that ``options`` change (timm's and ours take the same); default: the shape's.

        Weights and inputs are drawn on the CPU, so that they are the same on any device.
        """
        self.shape, self.dtype, self.device = shape, dtype, device
        self.name = shape.name if model_name else shape.model_name
        self.model_name = model_name or shape.model_name
        self.options: dict[str, Any] = {"num_classes": NUM_CLASSES, "in_chans": 3, **options}
        generator = torch.Generator().manual_seed(0)
        size = (shape.batch, self.options["in_chans"], shape.image, shape.image)
        self.inputs = torch.randn(size, generator=generator).to(dtype).to(device)
        self.labels = torch.randint(self.options["num_classes"], (shape.batch,), generator=generator).to(device)

    @cached_property
    def timm(self) -> nn.Module:
        import timm

        model = timm.create_model(self.model_name, **self.options)
        randomise(model)
        return model.to(self.device, self.dtype)

    @cached_property
    def ours(self) -> nn.Module:
        model = eva02.create_model(self.model_name, **self.options)
        model.load_state_dict(self.timm.state_dict())
        return model.to(self.device, self.dtype)

    @cached_property
    def patched(self) -> nn.Module:
        model = copy.deepcopy(self.timm)
        patch(model)
        return model

    @cached_property
    def recomputing(self) -> nn.Module:
        model = copy.deepcopy(self.ours)
        model.set_recompute()
        return model

    def forward_of(self, module: Callable[..., Tensor], *, ours: bool = False) -> Forward:
        return module

    def loss(self, outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.float() if outputs.dtype != torch.float64 else outputs, self.labels)

    def flops(self) -> int:
        return self.shape.model_flops(self.options["num_classes"], self.options["in_chans"])


class BlockCase(ModelCase):
    """One transformer block on a (B, S, C) input; ``packed`` as in Ti and S, else sub-LN as in B and L."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", *, subln: bool | None = None
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.subln = shape.subln if subln is None else subln
        self.name = "block, sub-LN" if self.subln else "block, packed"
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(shape.batch, shape.tokens, shape.dim, generator=generator)
        self.inputs = inputs.to(dtype).to(device).requires_grad_()
        self.table = rope_2d(shape.grid, shape.head_dim).to(device)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "dim": self.shape.dim,
            "num_heads": self.shape.heads,
            "qkv_fused": not self.subln,
            "mlp_ratio": (self.shape.hidden + 0.5) / self.shape.dim,  # rounded down to hidden again
            "swiglu_mlp": True,
            "scale_mlp": self.subln,
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        }

    @cached_property
    def timm(self) -> nn.Module:
        from timm.models.eva import EvaBlock as TimmEvaBlock

        block = TimmEvaBlock(**self._options)
        randomise(block)
        return block.to(self.device, self.dtype)

    @cached_property
    def timm_rope(self) -> Tensor:
        from timm.layers import RotaryEmbeddingCat

        rope = RotaryEmbeddingCat(
            self.shape.head_dim, in_pixels=False, feat_shape=list(self.shape.grid), ref_feat_shape=[16, 16]
        )
        return rope.get_embed().to(self.device)

    @cached_property
    def ours(self) -> nn.Module:
        block = EvaBlock(**self._options)
        block.load_state_dict(self.timm.state_dict())
        return block.to(self.device, self.dtype)

    @cached_property
    def recomputing(self) -> nn.Module:
        block = copy.deepcopy(self.ours)
        block.mlp.recompute = True
        return block

    def forward_of(self, module: Callable[..., Tensor], *, ours: bool = False) -> Forward:
        if ours:
            table = self.table
            return lambda x: module(x, table)
        rope = self.timm_rope
        return lambda x: module(x, rope=rope.to(x.dtype) if x.dtype == torch.float64 else rope)

    def loss(self, outputs: Tensor) -> Tensor:
        return (outputs * self.output_grad.to(outputs.dtype)).sum()

    @cached_property
    def output_grad(self) -> Tensor:
        values = torch.randn(self.inputs.shape, generator=torch.Generator().manual_seed(1))
        return values.to(self.dtype).to(self.device)

    def flops(self) -> int:
        return self.shape.block_flops()


def cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[ModelCase]:
    """The model; for the shape ``host`` one block of either kind instead, whose time is host time."""
    if shape.name == "host":
        yield BlockCase(shape, dtype, device, subln=False)
        yield BlockCase(shape, dtype, device, subln=True)
    else:
        yield ModelCase(shape, dtype, device)


# ---- arms -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelArm:
    module: nn.Module  # whose parameters train; arms may share one
    forward: Forward


@provider("timm", suites=SUITES, baseline=True)
def _timm(case: ModelCase) -> ModelArm:
    return ModelArm(case.timm, case.forward_of(case.timm))


@provider("timm+compile", suites=("model", "train"), compiled=True)
def _timm_compile(case: ModelCase) -> ModelArm:
    return ModelArm(case.timm, case.forward_of(torch.compile(case.timm, dynamic=False)))


@provider("timm+patch", suites=SUITES, ours=True)
def _timm_patch(case: ModelCase) -> ModelArm:
    return ModelArm(case.patched, case.forward_of(case.patched))


@provider("ours", suites=SUITES, ours=True)
def _ours(case: ModelCase) -> ModelArm:
    return ModelArm(case.ours, case.forward_of(case.ours, ours=True))


@provider("ours+compile", suites=("model", "train"), ours=True, compiled=True)
def _ours_compile(case: ModelCase) -> ModelArm:
    return ModelArm(case.ours, case.forward_of(torch.compile(case.ours, dynamic=False), ours=True))


@provider("ours, recompute", suites=("memory",), ours=True)
def _ours_recompute(case: ModelCase) -> ModelArm:
    return ModelArm(case.recomputing, case.forward_of(case.recomputing, ours=True))
