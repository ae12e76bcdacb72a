"""Turns an :class:`~eva02_kernels._registry.OpSpec` into ``torch.ops.eva02_kernels.<op>_fwd`` and ``_bwd``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels import _registry
from eva02_kernels._registry import OpSpec

_library = torch.library.Library("eva02_kernels", "DEF")


def define(spec: OpSpec) -> OpSpec:
    """Define both operators of ``spec`` (schema, dispatch to backends, fake, autograd) and register the spec."""
    fwd, bwd = f"{spec.name}_fwd", f"{spec.name}_bwd"
    _library.define(f"{fwd}({spec.fwd_schema}, str backend) -> {spec.fwd_returns}")
    _library.define(f"{bwd}({spec.bwd_schema}, str backend) -> Tensor[]")
    # One kernel for every device: the device is one of the things that a backend may refuse.
    forward, backward = _implementation(spec, "fwd"), _implementation(spec, "bwd")
    _library.impl(fwd, forward, "CompositeExplicitAutograd")
    _library.impl(bwd, backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"eva02_kernels::{fwd}", lambda *args: spec.fake_fwd(*args[:-1]), lib=_library)
    torch.library.register_fake(f"eva02_kernels::{bwd}", lambda *args: spec.fake_bwd(*args[:-1]), lib=_library)
    for name, implementation, autograd in (
        (fwd, forward, _differentiable(spec)),
        (bwd, backward, _not_differentiable(spec)),
    ):
        _library.impl(name, _autograd_key(name, autograd), "Autograd", with_keyset=True)
        _direct[name] = functools.partial(autograd, implementation)
    return _registry.register(spec)


def run(name: str, *args: Any) -> Any:
    """``torch.ops.eva02_kernels.<name>(*args)``, around the dispatcher where that changes nothing.

    Two passes through the dispatcher, each from Python into Python, cost as much host time as a small kernel.
    """
    if torch.compiler.is_compiling() or not _is_plain(args):
        return getattr(torch.ops.eva02_kernels, name).default(*args)
    return _direct[name](*args)


_direct: dict[str, Callable[..., Any]] = {}
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple}


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Nobody between the caller and the kernel: no mode, transform, tracer, profiler, subclass or meta tensor."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU)
    ):
        return False
    return _PLAIN.issuperset(map(type, args)) and not args[0].is_meta


def _implementation(spec: OpSpec, direction: str) -> Callable[..., Any]:
    def implementation(*args: Any) -> Any:
        backend = _registry.choose(spec, direction, args[-1], args[:-1])
        return (backend.fwd if direction == "fwd" else backend.bwd)(*args[:-1])

    return implementation


def _autograd_key(name: str, autograd: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's kernel for the autograd keys: ``autograd`` around the next kernel that the dispatcher has."""
    op = getattr(torch.ops.eva02_kernels, name).default

    def kernel(keyset: Any, *args: Any) -> Any:
        def below(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        return autograd(below, *args)

    return kernel


def _differentiable(spec: OpSpec) -> Callable[..., Any]:
    """``(below, *args) -> below(*args)`` with ``spec``'s gradients.

    It does what ``torch.library.register_autograd`` does, without that function's search for schema defaults (ours have
    none), which costs 100 us a call at these argument counts: as much as the rest of a small block.
    """

    def forward(ctx: Any, *args_and_below: Any) -> Any:
        *args, below = args_and_below
        output = below(*args)
        ctx.set_materialize_grads(False)  # statistics have no gradient: no zeros are allocated for them
        ctx.backend = args[-1]
        spec.setup_context(ctx, tuple(args[:-1]), output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        return (*spec.backward(ctx, *grads), None, None)  # backend and below

    return _autograd_function(f"{spec.name}_fwd", forward, backward)


def _not_differentiable(spec: OpSpec) -> Callable[..., Any]:
    """``(below, *args) -> below(*args)``: its outputs can be had, but not differentiated."""

    def forward(ctx: Any, *args_and_below: Any) -> tuple[Tensor, ...]:
        *args, below = args_and_below
        return tuple(below(*args))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f'second derivatives of {spec.name}: use backend="eager"')

    autograd = _autograd_function(f"{spec.name}_bwd", forward, backward)
    return lambda *args: list(autograd(*args))


def _autograd_function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    function: Any = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )

    def autograd(below: Callable[..., Any], *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, below)
        return below(*args)

    return autograd


def scatter_grads(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that a ``_bwd`` operator returned, put back at the places that asked for one."""
    it = iter(grads)
    return [next(it) if need else None for need in needs]


def save_inputs(ctx: Any, kept: Sequence[Tensor | None], inputs: Sequence[Any]) -> None:
    """Keep ``kept`` and every input for :func:`input_gradients`."""
    ctx.num_kept = len(kept)
    tensors = [t if isinstance(t, Tensor) else None for t in inputs]
    ctx.constants = [c if t is None else None for t, c in zip(tensors, inputs, strict=True)]
    ctx.save_for_backward(*kept, *tensors)


def input_gradients(ctx: Any, name: str, dout: Tensor, places: Sequence[int]) -> list[Tensor | None]:
    """A gradient or None for every input: ``name(dout, *kept, *inputs, needs, backend)``, ``needs`` for ``places``."""
    saved = ctx.saved_tensors  # read once: activation checkpointing computes again at every reading
    inputs = [c if t is None else t for t, c in zip(saved[ctx.num_kept :], ctx.constants, strict=True)]
    needs = [ctx.needs_input_grad[i] for i in places]
    grads = run(name, dout, *saved[: ctx.num_kept], *inputs, needs, ctx.backend)
    result: list[Tensor | None] = [None] * len(inputs)
    for place, g in zip(places, scatter_grads(grads, needs), strict=True):
        result[place] = g
    return result


def eager_gradients(
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    positions: Sequence[int],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients of ``reference(*args)`` for the arguments at ``positions`` that ``needs`` flags, by autograd.

    Runs inside an operator, where the dispatcher skips autograd; it is switched on again for the reference.
    """
    with _autograd_inside_operator(), torch.enable_grad():
        leaves = list(args)
        wanted = []
        for position, need in zip(positions, needs, strict=True):
            if leaves[position] is not None:
                leaves[position] = leaves[position].detach().requires_grad_(need)
                if need:
                    wanted.append(leaves[position])
        outputs = reference(*leaves)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(w) for w in wanted]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    result: list[Tensor] = []
    for leaf, g in zip(wanted, found, strict=True):
        g = torch.zeros_like(leaf) if g is None else g
        # An operator's outputs are contiguous and share no memory with each other or with its inputs.
        alias = any(g is other for other in (*result, *grads))
        result.append(g.clone(memory_format=torch.contiguous_format) if alias else g.contiguous())
    return result


def _autograd_inside_operator() -> Any:
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(included, excluded)
