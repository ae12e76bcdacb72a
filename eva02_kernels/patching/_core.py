"""patch and unpatch: swap the class of modules for a subclass whose forward runs our operators."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

_ORIGINAL = "_eva02_original_class"
"""Attribute of a replaced module (not a parameter, so not in the state_dict): the class it had."""


def _nothing(module: nn.Module) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Rule:
    """How modules of one class are replaced.

    Args:
        original: the class; modules of exactly this type match (a subclass may compute something else).
        fused: a module-level subclass of it, with its own ``forward`` and no state of its own, so that a module can
            become one by assignment to ``__class__``. None: modules of this class are never replaced.
        reasons: why a particular module cannot be replaced (an empty list: it can).
        ops: operators that the fused forward runs, or a function that tells them for a module. For the report.
        notes: what else the report should say of a replaced module.
        inlines: names of the children that the fused forward does the work of, or a function that tells them for a
            module; None: of all.

    A user's own block, in full::

        class Block(nn.Module):                       # hers, somewhere
            def __init__(self, dim):
                super().__init__()
                self.norm, self.mlp = nn.LayerNorm(dim), timm.layers.SwiGLU(dim, 4 * dim)
            def forward(self, x):
                return x + self.mlp(self.norm(x))

        class FusedBlock(Block):                      # at module level, so that it can be pickled
            def forward(self, x):
                m, n = self.mlp, self.norm
                if self.training and m.drop1.p > 0:   # what the operator does not do: her own code
                    return Block.forward(self, x)
                return eva02_kernels.swiglu_mlp(
                    x, m.fc1_g.weight, m.fc1_g.bias, m.fc1_x.weight, m.fc1_x.bias, m.fc2.weight, m.fc2.bias,
                    pre_norm=(n.weight, n.bias, n.eps), residual=x)

        report = patch(model, rules=[Rule(Block, FusedBlock, ops=("swiglu_mlp",))], verify=example_batch)
    """

    original: type[nn.Module]
    fused: type[nn.Module] | None
    reasons: Callable[[Any], list[str]] = _nothing
    ops: Sequence[str] | Callable[[Any], Sequence[str]] = ()
    notes: Callable[[Any], list[str]] = _nothing
    inlines: Sequence[str] | Callable[[Any], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.fused is None:
            return
        if not (isinstance(self.fused, type) and issubclass(self.fused, self.original)) or self.fused is self.original:
            raise TypeError(f"Rule: fused must be a subclass of {_qualified(self.original)}; got {self.fused!r}")
        if "<locals>" in self.fused.__qualname__:
            raise TypeError(
                f"Rule: {self.fused.__qualname__} is defined inside a function, so that a patched model could not be "
                "pickled; define it at module level"
            )

    def refusal(self, module: nn.Module) -> list[str]:
        """Why this module is not replaced; empty if it is."""
        if self.fused is not None:
            expected, found = (_parameters(c.forward) for c in (self.fused, self.original))
            if expected != found:
                return [f"its forward takes {found}, the replacement was written for {expected}: another version"]
            if "forward" in vars(module):
                return ["its forward was exchanged on this instance"]
        return list(self.reasons(module))


def refuse(original: type[nn.Module], reason: str) -> Rule:
    """A rule that only says why modules of this class stay as they are."""
    return Rule(original, None, lambda module: [reason])


@dataclasses.dataclass(frozen=True)
class Replaced:
    """One module that now runs our operators. ``within``: the replaced module that does its work in its place as long
    as nothing forbids it (dropout, hooks, masks), so that this one stands by."""

    name: str
    original: str
    fused: str
    ops: tuple[str, ...]
    within: str | None = None
    notes: tuple[str, ...] = ()
    already: bool = False


@dataclasses.dataclass(frozen=True)
class Kept:
    """One module that stays as it is although it looked like work for us, and why."""

    name: str
    original: str
    reasons: tuple[str, ...]


@dataclasses.dataclass
class PatchReport:
    """What :func:`patch` did. ``print(report)`` gives a table in which equal modules share a row."""

    replaced: list[Replaced] = dataclasses.field(default_factory=list)
    kept: list[Kept] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    verified: str | None = None

    def counts(self, *, standby: bool = False) -> dict[str, int]:
        """{"Original -> Fused": modules}, of those that do the work, or of those that stand by within them."""
        rows = (r for r in self.replaced if (r.within is not None) == standby)
        return dict(sorted(Counter(f"{r.original} -> {r.fused}" for r in rows).items()))

    def kept_counts(self) -> dict[str, int]:
        """{"Original: reasons": modules} of what stays."""
        return dict(sorted(Counter(f"{k.original}: {'; '.join(k.reasons)}" for k in self.kept).items()))

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        working: dict[tuple, list[Replaced]] = {}
        for r in self.replaced:
            if r.within is None:
                working.setdefault((r.original, r.fused, r.ops, r.notes, r.already), []).append(r)
        kept: dict[tuple, list[Kept]] = {}
        for k in self.kept:
            kept.setdefault((k.original, k.reasons), []).append(k)
        standing_by = sum(r.within is not None for r in self.replaced)
        lines = [f"replaced {sum(map(len, working.values()))} modules:"] if working else ["nothing was replaced"]
        for (original, fused, ops, notes, already), rows in working.items():
            again = " (already replaced)" if already else ""
            names = _names([r.name for r in rows])
            lines.append(f"  {len(rows):4d} x {original} -> {fused}: {', '.join(ops)}{again}  [{names}]")
            lines += [f"         {note}" for note in notes]
        if standing_by:
            lines.append(
                f"  {standing_by:4d} modules inside them are replaced too and run when a block cannot be fused"
            )
        if kept:
            lines.append(f"kept {sum(map(len, kept.values()))} modules:")
        for (original, reasons), items in kept.items():
            lines.append(f"  {len(items):4d} x {original}: {'; '.join(reasons)}  [{_names([k.name for k in items])}]")
        lines += self.problems
        if self.verified:
            lines.append(self.verified)
        return "\n".join(lines)


def _names(names: list[str]) -> str:
    names = [n or "(the model)" for n in names]
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]}"


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _parameters(function: Callable[..., Any]) -> str:
    return f"({', '.join(p for p in inspect.signature(function).parameters if p != 'self')})"


# Library that a model may come from -> our file of rules for it.
_LIBRARIES = {
    "timm.models.eva": "timm_eva",
    "timm.models.vision_transformer": "timm_vit",
    "timm.layers": "timm_layers",
    "transformers.models.dinov3_vit.modeling_dinov3_vit": "transformers_dinov3",
    "transformers.models.dinov2.modeling_dinov2": "transformers_dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers": "transformers_dinov2_registers",
    "torch.nn": "torch_layers",
}


def builtin_rules() -> tuple[list[Rule], list[str]]:
    """Rules for the libraries that are imported (a model's library is), and what was wrong with any of them."""
    rules: list[Rule] = []
    problems: list[str] = []
    for library, file in _LIBRARIES.items():
        if library not in sys.modules:
            continue
        try:
            rules += importlib.import_module(f"eva02_kernels.patching.{file}").RULES
        except (ImportError, AttributeError) as error:
            top = library.partition(".")[0]
            version = getattr(sys.modules.get(top), "__version__", "of unknown version")
            problems.append(f"no rules for {library} ({top} {version} lacks what they were written for): {error}")
    return rules, problems


def patch(
    model: nn.Module, *, verify: bool | Tensor | Sequence[Tensor] = False, rules: Sequence[Rule] | None = None
) -> PatchReport:
    """Let a vision transformer of timm, transformers or open_clip, or your own, run on this package's operators.

    The model stays what it is: each module that can be replaced gets a subclass of its class, whose forward calls our
    operators on the module's own parameters. Names, parameters, buffers, ``state_dict``, ``isinstance``, optimisers,
    ``deepcopy``, ``pickle``, ``.to()``, ``torch.compile`` and DDP go on working, and :func:`unpatch` undoes it.

    What a fused forward cannot do is decided at each call, never approximated: with active dropout, a float mask, a
    hook on a module that would be skipped, or a child that was exchanged later, that part of that call runs the
    original code. (Drop path, layer scale, boolean key masks and causal attention are supported.)

    Args:
        model: the model; changed in place.
        verify: run a probe batch in eval mode before and after, and accept the new model only if it is as accurate:
            compared with the original in float64, its error may be twice that of the original in the model's own
            dtype, plus rounding (``eva02_kernels.testing``). True derives the batch from the model's configuration;
            a tensor, or a tuple of them (positional arguments), is used as it is.
        rules: :class:`Rule` for your own classes, tried before the built-in ones.

    Returns:
        :class:`PatchReport`: what was replaced, what was not, and why. Nothing to replace is a report that says so.

    Raises:
        VerificationError: with ``verify``, if the patched model differs; the model is as before.
        ValueError: ``verify=True`` for a model whose input cannot be derived.
    """
    given = list(rules or ())
    for rule in given:
        if not isinstance(rule, Rule):
            raise TypeError(f"rules: expected eva02_kernels.patching.Rule objects; got {type(rule).__name__}")
    builtin, problems = builtin_rules()
    by_class = {rule.original: rule for rule in reversed([*given, *builtin])}
    report = PatchReport(problems=problems)
    plan: list[tuple[nn.Module, type[nn.Module]]] = []
    inlined: dict[str, str] = {}  # name of a child -> the replaced module that does its work
    for name, module in model.named_modules():
        _consider(name, module, by_class, inlined, report, plan)
    if not report.replaced:
        libraries = ", ".join(sorted({lib.partition(".")[0] for lib in _LIBRARIES} - {"torch"}))
        report.problems.append(
            "no module of a class that a rule covers and that it accepts; there are rules for classes of "
            f"{libraries}, and for your own with rules=[...]"
        )
    if verify is False or verify is None or not plan:
        for module, fused in plan:
            _swap(module, fused)
        return report
    from ._verify import verified_swap

    verified_swap(model, verify, plan, report)
    return report


def _consider(
    name: str, module: nn.Module, by_class: dict, inlined: dict[str, str], report: PatchReport, plan: list
) -> None:
    """Decide about one module; parents come before their children."""
    cls = type(module)
    done = vars(module).get(_ORIGINAL)
    rule = by_class.get(cls if done is None else done)
    original = (done or cls).__qualname__
    within = next((inlined[prefix] for prefix in _prefixes(name) if prefix in inlined), None)
    if rule is None:
        base = next((c for c in cls.__mro__[1:] if c in by_class and by_class[c].fused is not None), None)
        if done is not None:
            report.replaced.append(Replaced(name, original, cls.__qualname__, (), within, already=True))
        # torch.nn.LayerNorm has too many subclasses to be worth a word.
        elif base is not None and base.__module__.partition(".")[0] != "torch":
            report.kept.append(Kept(name, original, (f"a subclass of {base.__qualname__}, which may differ from it",)))
        return
    reasons = rule.refusal(module) if done is None else []
    if reasons or (rule.fused is None and done is None):
        if within is None:
            report.kept.append(Kept(name, original, tuple(reasons)))
        return
    ops = tuple(rule.ops(module) if callable(rule.ops) else rule.ops)
    fused = cls if done is not None else rule.fused
    notes = tuple(rule.notes(module))
    report.replaced.append(Replaced(name, original, fused.__qualname__, ops, within, notes, done is not None))
    if done is None:
        plan.append((module, fused))
    if within is None:
        children = rule.inlines(module) if callable(rule.inlines) else rule.inlines
        for child in dict(module.named_children()) if children is None else children:
            inlined[f"{name}.{child}" if name else child] = name


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _swap(module: nn.Module, fused: type[nn.Module]) -> None:
    object.__setattr__(module, _ORIGINAL, type(module))
    module.__class__ = fused


def _restore(module: nn.Module) -> None:
    module.__class__ = vars(module)[_ORIGINAL]
    object.__delattr__(module, _ORIGINAL)


def unpatch(model: nn.Module) -> int:
    """Give every replaced module its own class back; returns how many there were."""
    replaced = [m for m in model.modules() if _ORIGINAL in vars(m)]
    for module in replaced:
        _restore(module)
    return len(replaced)


class VerificationError(RuntimeError):
    """The patched model computes something else than the original; the model was restored."""
