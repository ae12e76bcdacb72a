"""The probe of ``patch(model, verify=...)``: the model before and after, against itself in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eva02_kernels.testing import Error, assert_accurate, measure_error

from . import _core

Probe = Callable[[nn.Module], Any]


def verified_swap(
    model: nn.Module,
    verify: bool | Tensor | Sequence[Tensor],
    plan: list[tuple[nn.Module, type[nn.Module]]],
    report: _core.PatchReport,
) -> None:
    """Swap the classes of ``plan``; undo it and raise if the model then computes something else."""
    probe, what = _probe(model, verify)
    watched = [r.name for r in report.replaced if r.within is None][-1]
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        original = copy.deepcopy(model)
        _core.unpatch(original)
        before = _outputs(probe, original, watched)
        exact = _outputs(probe, original.double(), watched)
        del original
        for module, fused in plan:
            _core._swap(module, fused)
        try:
            after = _outputs(probe, model, watched)
            _compare(before, after, exact)
        except BaseException as error:
            for module, _ in plan:
                _core._restore(module)
            if not isinstance(error, AssertionError):
                raise
            raise _core.VerificationError(
                f"the patched model differs from the original on {what}; it was restored. {error}\n{report}"
            ) from None
    finally:
        for module, mode in training:
            module.training = mode
    worst = max(measure_error(after[key], exact[key]).max for key in exact)
    report.verified = f"verified on {what}: largest error against float64 {worst:.1e}, in parts of the value plus rms"


def _compare(before: dict[str, Tensor], after: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    if not any(key.startswith("output") for key in exact):
        raise ValueError("verify: the model returned no floating-point tensor to compare")
    plain = {key: measure_error(before[key], exact[key]) for key in exact}
    # A handful of logits may be exact by chance; the features that they are made of tell how exact is likely.
    typical = Error(max(e.max for e in plain.values()), max(e.rms for e in plain.values()))
    for key, e in exact.items():
        if after[key].dtype != before[key].dtype:
            raise AssertionError(f"{key}: {after[key].dtype} instead of {before[key].dtype}")
        assert_accurate(after[key], e, [typical if e.numel() < 1024 else plain[key]], name=key)


def _outputs(probe: Probe, model: nn.Module, watched: str) -> dict[str, Tensor]:
    """Every floating-point output of the model, and those of the last replaced module that does work."""
    found: dict[str, Tensor] = {}

    def keep(name: str, out: Any) -> None:
        for i, t in enumerate(pytree.tree_leaves(dict(out) if hasattr(out, "to_tuple") else out)):
            if isinstance(t, Tensor) and t.is_floating_point():
                found[f"{name} {i}"] = t

    module = model.get_submodule(watched)
    handle = module.register_forward_hook(lambda m, args, out: keep(f"{watched}, output", out)) if watched else None
    try:
        with torch.no_grad():
            keep("output", probe(model))
    finally:
        if handle is not None:
            handle.remove()
    return found


def _cast(inputs: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    p = next(model.parameters())
    return [t.to(p.device, p.dtype if t.is_floating_point() else None) for t in inputs]


def _probe(model: nn.Module, verify: bool | Tensor | Sequence[Tensor]) -> tuple[Probe, str]:
    """(a function that runs a model on the probe batch, the batch in words)."""
    if isinstance(verify, Tensor):
        verify = (verify,)
    if verify is not True:
        given = list(verify)  # type: ignore[arg-type]
        if not given or not all(isinstance(t, Tensor) for t in given):
            raise TypeError("verify: expected True, a tensor or a sequence of tensors (positional arguments)")
        shapes = ", ".join(str(tuple(t.shape)) for t in given)
        return lambda m: m(*_cast(given, m)), f"the given batch {shapes}"
    inner = model
    while True:  # torch.compile and DDP hold the model in an attribute
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, nn.Module):
            break
        inner = wrapped
    size = _image_size(inner)
    if size is None:
        raise ValueError(
            "verify=True: the model tells no image size (config, pretrained_cfg, image_size); give verify=batch"
        )
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    length = getattr(inner, "context_length", None)
    if hasattr(inner, "encode_image") and hasattr(inner, "encode_text") and length:
        tokens = torch.randint(1, 100, (2, length), generator=torch.Generator().manual_seed(0))

        def both(m: Any) -> Any:
            image, text = _cast((images, tokens), m)
            return m.encode_image(image), m.encode_text(text)

        return both, f"images {tuple(images.shape)} and texts {tuple(tokens.shape)}"
    return lambda m: m(*_cast((images,), m)), f"images {tuple(images.shape)}"


def _image_size(model: Any) -> tuple[int, int, int] | None:
    """(C, H, W) of a model of timm, transformers or open_clip."""
    visual = getattr(model, "visual", None)
    if isinstance(visual, nn.Module):
        return _image_size(visual)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "image_size"):
        return (getattr(config, "num_channels", 3), *_pair(config.image_size))
    embed: Any = getattr(getattr(model, "trunk", model), "patch_embed", None)
    if getattr(embed, "img_size", None) is not None and hasattr(embed, "proj"):
        return (embed.proj.weight.shape[1], *_pair(embed.img_size))
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if "input_size" in cfg:
        return tuple(cfg["input_size"])
    if hasattr(model, "image_size"):
        return (3, *_pair(model.image_size))
    return None


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
