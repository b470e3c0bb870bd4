"""Where in a model: structural patterns bound to module instances, and the report of what was and was not bound."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .. import backends
from . import norm, pattern, post_norm_tail
from .pattern import Pattern
from .report import Entry, PatchReport

PATTERNS: tuple[Pattern, ...] = (post_norm_tail.PATTERN, norm.PATTERN)
"""In the order of trial: a pattern that covers several modules comes before one that covers one of them."""

_OPS = ("residual_norm", "residual_norm_backward")


class PatchError(RuntimeError):
    """Nothing to patch, a candidate left alone under strict=True, or a model that cannot be unpatched as it is."""


def patch(model: nn.Module, *, strict: bool = False) -> PatchReport:
    """Binds fused forwards to the modules of `model` that a pattern recognises and verifies.

    The model stays the same object with the same parameters, hooks, state-dict keys and checkpoints, and computes the
    same numbers to rounding. Patching twice is a no-op. Nothing is printed.

    Args:
        model: any nn.Module; Hugging Face and PEFT models among them. On any device, also meta.
        strict: raise PatchError if a candidate is left alone, with the reasons.

    Returns:
        PatchReport: for every module, the pattern that runs it or why none does.

    Raises:
        TypeError: `model` is no nn.Module.
        PatchError: nothing in it matches, or `strict` and something was left alone. The model is then as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is {type(model).__name__}; accepted is a torch.nn.Module")
    plan, entries = _survey(model)
    report = PatchReport(tuple(entries), _backends(model))
    if not report.patched:
        kinds = sorted({e.kind for e in entries})
        refused = "; ".join(f"{path}: {reason}" for path, reason in list(report.refused.items())[:5])
        raise PatchError(
            f"patch: nothing in this {type(model).__name__} matches a pattern ({', '.join(p.name for p in PATTERNS)}); "
            f"it holds {', '.join(kinds)}" + (f". Refused: {refused}" if refused else "")
        )
    if strict and report.refused:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in report.refused.items())
        raise PatchError(f"patch: strict=True and {len(report.refused)} candidates were left alone: {reasons}")
    for module, found, parts in plan:
        pattern.bind(module, found, parts)
    backends.warn_if_slow()
    return report


def unpatch(model: nn.Module) -> None:
    """Takes every fused forward off: the very same modules and methods as before `patch`. No-op on an unpatched model.

    Raises:
        TypeError: `model` is no nn.Module.
        PatchError: something else replaced a patched module's forward afterwards; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model is {type(model).__name__}; accepted is a torch.nn.Module")
    bound = {path: module for path, module in model.named_modules() if pattern.pattern_of(module)}
    foreign = [path for path, module in bound.items() if pattern.foreign_forward(module)]
    if foreign:
        raise PatchError(
            f"unpatch: the forward of {', '.join(foreign[:5])} was replaced after patching (by accelerate's hooks, "
            "for instance); take that off first"
        )
    for module in bound.values():
        pattern.unbind(module)


@contextlib.contextmanager
def patched(model: nn.Module, *, strict: bool = False) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches on entry and unpatches on exit."""
    report = patch(model, strict=strict)
    try:
        yield report
    finally:
        unpatch(model)


def _survey(model: nn.Module) -> tuple[list[tuple[nn.Module, Pattern, Mapping[str, str]]], list[Entry]]:
    """What would be bound where, and the entry of every module; changes nothing."""
    plan: list[tuple[nn.Module, Pattern, Mapping[str, str]]] = []
    entries: list[Entry] = []
    part_of: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        owner = part_of.get(module)
        already = pattern.pattern_of(module)
        if owner is not None:
            entries.append(Entry(path, kind, owner, part=True))
        elif already is not None and not pattern.foreign_forward(module):
            entries.append(Entry(path, kind, already, candidate=True))
            _claim(module, already, part_of)
        else:
            found, parts, reason = _match(module)
            if found is not None:
                plan.append((module, found, parts))
                entries.append(Entry(path, kind, found.name, candidate=True))
                _claim(module, found.name, part_of)
            elif reason:
                entries.append(Entry(path, kind, reason=reason, candidate=True))
            elif not module._modules:
                entries.append(Entry(path, kind, reason="no pattern for this class here"))
    return plan, entries


def _claim(module: nn.Module, name: str, part_of: dict[nn.Module, str]) -> None:
    """What runs inside a patched module's fused forward is part of it; a projection it calls is its own."""
    for found in PATTERNS:
        if found.name == name:
            parts = found.parts(module) or {}
            part_of.update({getattr(module, parts[role]): name for role in parts if role != "dense"})
            if "dense" in parts and type(getattr(module, parts["dense"])) is nn.Linear:
                part_of[getattr(module, parts["dense"])] = name


def _match(module: nn.Module) -> tuple[Pattern | None, Mapping[str, str], str]:
    """The first pattern that recognises and verifies the module, or the reasons of those that refused it."""
    reasons = []
    for candidate in PATTERNS:
        parts = candidate.parts(module)
        if parts is None:
            continue
        if "forward" in module.__dict__:
            reason = "its forward was replaced on the instance"
        else:
            reason = candidate.refuse(module, parts) or pattern.verify(module, candidate, parts)
        if not reason:
            return candidate, parts, ""
        reasons.append(f"{candidate.name}: {reason}")
    return None, {}, "; ".join(reasons)


def _backends(model: nn.Module) -> dict[str, str]:
    param = next(iter(model.parameters()), torch.empty(0))
    return {
        choice.op: choice.backend
        for choice in backends.describe()
        if choice.op in _OPS and choice.device == ("cuda" if param.is_cuda else "cpu")
    }
