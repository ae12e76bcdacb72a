"""Turns an :class:`~eva02_kernels._registry.OpSpec` into ``torch.ops.eva02_kernels.<op>_fwd`` and ``_bwd``."""

from __future__ import annotations

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
    _library.impl(fwd, _implementation(spec, "fwd"), "CompositeExplicitAutograd")
    _library.impl(bwd, _implementation(spec, "bwd"), "CompositeExplicitAutograd")
    torch.library.register_fake(f"eva02_kernels::{fwd}", lambda *args: spec.fake_fwd(*args[:-1]), lib=_library)
    torch.library.register_fake(f"eva02_kernels::{bwd}", lambda *args: spec.fake_bwd(*args[:-1]), lib=_library)
    _library.impl(fwd, _autograd(spec, getattr(torch.ops.eva02_kernels, fwd).default), "Autograd", with_keyset=True)
    op = getattr(torch.ops.eva02_kernels, bwd).default
    _library.impl(bwd, _refuse_second_derivative(spec.name, op), "Autograd", with_keyset=True)
    return _registry.register(spec)


def _implementation(spec: OpSpec, direction: str) -> Callable[..., Any]:
    def implementation(*args: Any) -> Any:
        backend = _registry.choose(spec, direction, args[-1], args[:-1])
        return (backend.fwd if direction == "fwd" else backend.bwd)(*args[:-1])

    return implementation


def _autograd(spec: OpSpec, op: Any) -> Callable[..., Any]:
    """The forward operator's kernel for the autograd keys.

    It does what ``torch.library.register_autograd`` does, without that function's search for schema defaults (ours have
    none), which costs 100 us a call at these argument counts: as much as the rest of a small block.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        with torch._C._AutoDispatchBelowAutograd():
            output = op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
        ctx.set_materialize_grads(False)  # statistics have no gradient: no zeros are allocated for them
        ctx.backend = inputs.pop()
        spec.setup_context(ctx, tuple(inputs), output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        return (*spec.backward(ctx, *grads), None, None)  # backend and keyset

    return _autograd_kernel(op, forward, backward)


def _refuse_second_derivative(name: str, op: Any) -> Callable[..., Any]:
    """The backward operator's kernel for the autograd keys: its outputs can be had, but not differentiated."""

    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *inputs, keyset = args
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f'second derivatives of {name}: use backend="eager"')

    kernel = _autograd_kernel(op, forward, backward)
    return lambda keyset, *args: list(kernel(keyset, *args))


def _autograd_kernel(op: Any, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    function: Any = type(
        op.name(), (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def scatter_grads(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that a ``_bwd`` operator returned, put back at the places that asked for one."""
    it = iter(grads)
    return [next(it) if need else None for need in needs]


def save_inputs(ctx: Any, kept: Sequence[Tensor | None], inputs: Sequence[Any]) -> None:
    """Keep ``kept`` and every input for :func:`input_gradients`."""
    ctx.num_kept = len(kept)
    ctx.is_tensor = [isinstance(t, Tensor) for t in inputs]
    ctx.constants = [None if isinstance(t, Tensor) else t for t in inputs]
    ctx.save_for_backward(*kept, *(t for t in inputs if isinstance(t, Tensor)))


def input_gradients(
    ctx: Any, op: Callable[..., list[Tensor]], dout: Tensor, places: Sequence[int]
) -> list[Tensor | None]:
    """A gradient or None for every input: ``op(dout, *kept, *inputs, needs, backend)``, ``needs`` for ``places``."""
    saved = ctx.saved_tensors  # read once: activation checkpointing computes again at every reading
    tensors = iter(saved[ctx.num_kept :])
    inputs = [next(tensors) if is_t else c for is_t, c in zip(ctx.is_tensor, ctx.constants, strict=True)]
    needs = [ctx.needs_input_grad[i] for i in places]
    grads = op(dout, *saved[: ctx.num_kept], *inputs, needs, ctx.backend)
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
