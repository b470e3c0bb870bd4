"""Where in a model: structural patterns bound to module instances, and the report of what was and was not bound."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import backends
from . import (
    activation,
    attention,
    dropout,
    graphs,
    linear,
    lora,
    mlp,
    norm,
    pattern,
    post_norm_tail,
    pre_norm,
    shared_input,
    trace,
)  # fmt: skip
from . import memory as levels
from .pattern import Parts, Pattern
from .report import Entry, PatchReport

PATTERNS: tuple[Pattern, ...] = (
    lora.PATTERN, post_norm_tail.PATTERN, pre_norm.PATTERN, mlp.PATTERN, norm.PATTERN, linear.PATTERN, dropout.PATTERN,
    activation.PATTERN,
)  # fmt: skip
"""In the order of trial: a pattern that covers several modules comes before one that covers one of them. `shared_input`
and `attention` are found in the model's trace instead."""

_OPS = {
    "norm": "residual_norm", "post_norm_tail": "residual_norm", "pre_norm": "residual_norm", "lora": "lora_linear",
    "shared_input": "lora_linear", "mlp": "bias_act", "activation": "bias_act", "linear": "packed_linear",
    "dropout": "dropout", "attention": "attention",
}  # fmt: skip


class PatchError(RuntimeError):
    """Nothing to patch, a candidate left alone under strict=True, or a model that cannot be unpatched as it is."""


def patch(
    model: nn.Module, *, strict: bool = False, memory: str = "exact", cuda_graphs: graphs.Lengths = False
) -> PatchReport:
    """Binds fused forwards to the modules of `model` that a pattern recognises and verifies.

    The model stays the same object with the same parameters, hooks, state-dict keys and checkpoints, and computes the
    same numbers to rounding. Patching twice is a no-op, but for another `memory` or `cuda_graphs`. Nothing is printed.

    Args:
        model: any nn.Module; Hugging Face and PEFT models among them. On any device, also meta.
        strict: raise PatchError if a candidate is left alone, with the reasons.
        memory: what is kept for backward, most first. In bytes a token and unit of width, for a layer of BERT in 16
            bits with dropout; docs/kernels.md, "Memory", has every case:
            "exact": 18 to 20, nothing is computed again but element-wise work;
            "coded": 4 fewer where the activation's input serves its derivative alone (no LoRA on or training of the
                projection after it): 8 bits of that derivative, with an error like bfloat16's own. Same as exact in
                float32;
            "recompute": 4 to 6, the matmuls before attention and activation run again in backward;
            "checkpoint": 2, a layer runs again but for its last matmul. Without a cache while training.
            A module that is given a filled cache (prefix tuning), and everything under torch.compile, stays at "exact".
        cuda_graphs: capture forward and backward of the model's stack of layers once per shape and replay them while
            training; for a model on an NVIDIA GPU, with memory "exact" or "coded". Where a batch has a mask, its length
            is padded to a multiple of 32 (True), to a multiple of the number given (1: never padded) or to the next of
            a list. A shape is captured at its second call, 16 of them a stack at most, the least recently used dropped.
            They hold the activations of the largest and the inputs and outputs of each; report.graphs says how many
            bytes, and counts the calls that ran without a graph by reason. A second backward through one call raises.
            Tested without a GPU only, over a recorder of CPU ops; not measured.

    Returns:
        PatchReport: for every module, the pattern that runs it or why none does.

    Raises:
        TypeError: `model` is no nn.Module, or `cuda_graphs` none of these.
        ValueError: `memory` is none of these, or `cuda_graphs` does not go with it.
        PatchError: nothing in it matches, it is replicated, its parameters are sharded already, `strict` and something
            was left alone, nothing in it could be set to `memory`, `cuda_graphs` and it is not on a GPU or has no stack
            of layers, or it is on a GPU for which the CUDA library was not built.
            The model is then as before.
    """
    if memory not in levels.LEVELS:
        raise ValueError(f"patch: memory is {memory!r}; accepted are {', '.join(levels.LEVELS)}")
    graphs.check(cuda_graphs, memory)
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is {type(model).__name__}; accepted is a torch.nn.Module")
    if pattern.replicated(model):
        raise PatchError("patch: the model is replicated, and patched with it; release() it first")
    sharded = next((n for n, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if sharded is not None:
        raise PatchError(f"patch: {sharded} is sharded (a DTensor); patch the model once, before fully_shard")
    if cuda_graphs and (away := graphs.away(model)):
        raise PatchError(
            f"patch: cuda_graphs is {cuda_graphs!r}, and {away}; accepted is a model on an NVIDIA GPU, moved there "
            "before patch"
        )
    for device in {p.device for p in model.parameters() if p.is_cuda}:
        if why := backends.cannot_run(device):
            raise PatchError(f"patch: model is on {device}: {why}")
    plan = _survey(model)
    stacks = graphs.stacks(model, plan.seen) if cuda_graphs else {}
    if cuda_graphs and not stacks:
        why = "; ".join(plan.seen.failed.values()) or "no layer of transformers' kind (GradientCheckpointingLayer)"
        raise PatchError(
            f"patch: cuda_graphs is {cuda_graphs!r}, and no stack of layers is seen in this {type(model).__name__}: "
            f"{why}"
        )
    report = PatchReport(tuple(plan.entries), _backends(model, plan.entries), memory)
    if not report.patched:
        kinds = sorted({e.kind for e in plan.entries})
        refused = "; ".join(f"{path}: {reason}" for path, reason in list(report.refused.items())[:5])
        raise PatchError(
            f"patch: nothing in this {type(model).__name__} matches a pattern ({', '.join(_OPS)}); "
            f"it holds {', '.join(kinds)}" + (f". Refused: {refused}" if refused else "")
        )
    if strict and report.refused:
        reasons = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in report.refused.items())
        raise PatchError(f"patch: strict=True and {len(report.refused)} candidates were left alone: {reasons}")
    before = pattern.bindings(model)
    for module, found, parts in plan.modules:
        pattern.bind(module, found, parts)
    for root, served in plan.attention:
        attention.bind(root, served)
    attending = [m for root in filter(attention.bound, model.modules()) for m in attention.served(root)]
    if not levels.set_level(model, memory, attending, plan.seen) and memory != "exact":
        pattern.bind_again(before)
        for root, _ in plan.attention:
            attention.unbind(root)
        raise PatchError(
            f"patch: memory is {memory!r}, and this {type(model).__name__} has no {levels.NEEDS[memory]} to set to it"
        )
    graphs.set_graphs(model, cuda_graphs, stacks)
    backends.warn_if_slow(_device(model))
    return dataclasses.replace(report, graphs=graphs.of(model))


def unpatch(model: nn.Module) -> None:
    """Takes every fused forward off: the very same modules and methods as before `patch`. No-op on an unpatched model.

    transformers reads a model's attention from its config: of two patched models with one config object (both made by
    from_config), unpatching the one gives both their own attention back.

    Raises:
        TypeError: `model` is no nn.Module.
        PatchError: it is replicated, or something else replaced a patched module's forward afterwards; nothing is
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model is {type(model).__name__}; accepted is a torch.nn.Module")
    if pattern.replicated(model):
        raise PatchError("unpatch: the model is replicated; release() it first, or take one run with replica(g)")
    bound = {path: module for path, module in model.named_modules() if pattern.bound(module)}
    foreign = [path for path, module in bound.items() if pattern.foreign_forward(module)]
    if foreign:
        raise PatchError(
            f"unpatch: the forward of {', '.join(foreign[:5])} was replaced after patching (by accelerate's hooks, "
            "for instance); take that off first"
        )
    for module in filter(graphs.bound, bound.values()):
        graphs.unbind(module)
    for module in filter(pattern.bound, bound.values()):
        pattern.unbind(module)
    for root in filter(attention.marked, list(model.modules())):
        attention.unbind(root)
    if bound:  # else nothing here is ours: its config may be that of another model, which is patched
        attention.disown(model)


@contextlib.contextmanager
def patched(
    model: nn.Module, *, strict: bool = False, memory: str = "exact", cuda_graphs: graphs.Lengths = False
) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches on entry and unpatches on exit."""
    report = patch(model, strict=strict, memory=memory, cuda_graphs=cuda_graphs)
    try:
        yield report
    finally:
        unpatch(model)


@dataclass
class _Plan:
    """What would be bound where, and the entry of every module."""

    modules: list[tuple[nn.Module, Pattern, Any]] = field(default_factory=list)
    attention: list[tuple[nn.Module, list[nn.Module]]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    seen: trace.Trace = field(default_factory=trace.Trace)


def _survey(model: nn.Module) -> _Plan:
    """Changes nothing."""
    seen, part_of = trace.observe(model), dict[nn.Module, str]()
    plan = _Plan(seen=seen)
    whole = _whole_models(model, seen, plan)
    groups, strangers = _groups(model, seen)
    for path, module in model.named_modules():
        kind = type(module).__name__
        already = None if pattern.foreign_forward(module) else pattern.pattern_of(module)
        if module in whole:
            plan.entries.append(Entry(path, kind, *whole[module]))
        if already is None and module in groups:
            plan.modules.append((module, shared_input.PATTERN, groups[module]))
            already = shared_input.PATTERN.name
            _claim_adapter(module, part_of)
        elif already is not None:
            bound = next((p for p in PATTERNS if p.name == already), None)
            if bound is not None:
                _claim(module, bound, pattern.bound_parts(module), part_of)
            _claim_adapter(module, part_of)
        elif module in part_of:
            plan.entries.append(Entry(path, kind, part_of[module], part=True))
            continue
        if already is not None:
            plan.entries.append(Entry(path, kind, already, candidate=True))
            continue
        if module in strangers:
            plan.entries.append(Entry(path, kind, reason=strangers[module], candidate=True))
            continue
        call = seen.calls.get(module)
        if type(module) is nn.Dropout and seen.unused(module):
            plan.entries.append(Entry(path, kind, reason="not called in the model's forward: only its rate is read"))
            continue
        found, parts, reason, candidate = _match(module, call)
        if found is not None:
            plan.modules.append((module, found, parts))
            plan.entries.append(Entry(path, kind, found.name, candidate=True))
            _claim(module, found, parts, part_of)
        elif reason:
            plan.entries.append(Entry(path, kind, reason=reason, candidate=candidate))
        elif not module._modules and not isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
            plan.entries.append(Entry(path, kind, reason="no pattern for this class here"))
    return plan


def _whole_models(model: nn.Module, seen: trace.Trace, plan: _Plan) -> dict[nn.Module, tuple[str, str, bool, bool]]:
    """What follows `path, kind` in the entries of attention modules, and of transformers models that are left alone."""
    entries: dict[nn.Module, tuple[str, str, bool, bool]] = {}
    for root in trace.roots(model):
        if attention.bound(root):
            served = attention.served(root)
        else:
            unfit = attention.unfit(root)
            reason, served = (unfit, []) if unfit else attention.verify(root, seen)
            if reason:
                entries[root] = ("", f"attention: {reason}", False, not unfit)
                continue
            plan.attention.append((root, served))
        entries |= dict.fromkeys(served, ("attention", "", False, True))
    return entries


def _groups(model: nn.Module, seen: trace.Trace) -> tuple[dict[nn.Module, shared_input.Group], dict[nn.Module, str]]:
    """Module -> its group, and module -> why the group it would be in was refused."""
    groups: dict[nn.Module, shared_input.Group] = {}
    refused: dict[nn.Module, str] = {}
    for modules in shared_input.groups(model, seen):
        if any(pattern.foreign_forward(m) or pattern.pattern_of(m) for m in modules):
            continue
        reason = shared_input.verify(modules)
        if reason:
            refused |= dict.fromkeys(modules, f"shared_input: {reason}")
        else:
            groups |= dict.fromkeys(modules, shared_input.Group(modules))
    return groups, refused


def _claim(module: nn.Module, found: Pattern, parts: Parts, part_of: dict[nn.Module, str]) -> None:
    """What runs inside a fused forward is part of it."""
    for role in found.claims(module, parts):
        part_of.update(dict.fromkeys(module.get_submodule(parts[role]).modules(), found.name))


def _claim_adapter(module: nn.Module, part_of: dict[nn.Module, str]) -> None:
    for parts in lora.parts(module):
        _claim(module, lora.PATTERN, parts, part_of)


def _match(module: nn.Module, call: trace.Call | None) -> tuple[Pattern | None, Parts, str, bool]:
    """The first pattern and reading that verify, or the reasons of those that refused, and whether a sure one is among
    them."""
    reasons: dict[str, bool] = {}
    for candidate in PATTERNS:
        for parts in candidate.parts(module, call):
            if pattern.foreign_forward(module):
                reason = "its forward was replaced on the instance"
            else:
                reason = candidate.refuse(module, parts) or pattern.verify(module, candidate, parts, call)
            if not reason:
                return candidate, parts, "", True
            reasons[f"{candidate.name}: {reason}"] = candidate.sure
    return None, {}, "; ".join(reasons), any(reasons.values())


def _backends(model: nn.Module, entries: list[Entry]) -> dict[str, str]:
    used, device = {_OPS[e.pattern] for e in entries if e.pattern}, _device(model)
    return {
        choice.op: choice.backend for choice in backends.describe(device) if choice.op.removesuffix("_backward") in used
    }


def _device(model: nn.Module) -> str:
    return "cuda" if next(iter(model.parameters()), torch.empty(0)).is_cuda else "cpu"
