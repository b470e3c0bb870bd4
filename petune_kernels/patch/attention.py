"""Pattern `attention`: transformers' attention modules call `ops.attention` through AttentionInterface.

transformers asks the model's config, at every call, which attention function to use and which mask to build for it. The
pattern names ours there, for a whole transformers model at a time, and puts the former names back on unpatch. As with
set_attn_implementation, models that were built from one config object share the choice.

A query that sees no key (padding before a text) gets what the former function gave it: zeros after "sdpa", the mean of
all values after "eager". Taken over are these two; another choice (flash, flex) is the user's. On CUDA the op
calls torch's fused attention, with a mask that is made once, and keeps none of it where a part of the model runs again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops import attention as op
from . import pattern, trace
from .trace import Trace

NAMES = {"sdpa": "petune", "eager": "petune-eager"}
_MARK = "_petune_attention"


def bound(root: nn.Module) -> bool:
    return _MARK in root.__dict__


def unfit(root: nn.Module) -> str:
    """Why this model's attention is none of ours, or ''."""
    model: Any = root
    own = getattr(model.config, "_attn_implementation", None)
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if own not in ("eager", "sdpa", None):
        return f"attn_implementation is {own!r}, which is kept"
    return ""


def verify(root: nn.Module, seen: Trace) -> tuple[str, list[nn.Module]]:
    """('', the modules whose attention it would run), or what differs. The model is as it was."""
    if root in seen.failed:
        return seen.failed[root], []
    twins: dict[nn.Module, nn.Module] = {}
    twin = pattern.bare(seen.ran[root], twins)
    original = {copy: module for module, copy in twins.items()}
    called: list[nn.Module] = []
    configs = _switch(root)
    try:
        with _listening(called):
            fused = trace.run(twin)
    except Exception as error:  # what the op does not compute, it says: soft caps, sinks
        return f"{type(error).__name__}: {error}", []
    finally:
        _restore(configs)
    reason = "; ".join(filter(None, map(pattern.difference, seen.outputs[root], fused)))
    if not reason and not called:
        reason = "none of its modules called the attention function"
    return reason, [original[module] for module in dict.fromkeys(called)]


def bind(root: nn.Module, modules: list[nn.Module]) -> None:
    root.__dict__[_MARK] = (_switch(root), modules)


def unbind(root: nn.Module) -> None:
    _restore(root.__dict__.pop(_MARK)[0])


def served(root: nn.Module) -> list[nn.Module]:
    """The modules whose attention a bound model runs here."""
    return root.__dict__[_MARK][1]


def _configs(root: nn.Module) -> list[Any]:
    """Every config that a module of the model reads, and those inside them, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [
        c for m in root.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")
    ]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [c for name in config.sub_configs if (c := getattr(config, name, None)) is not None]
    return list(found.values())


def _register(function: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for own, name in NAMES.items():
        masked = -torch.inf if own == "sdpa" else None
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, functools.partial(op.attention_mask_interface, masked=masked))


def _switch(root: nn.Module) -> list[tuple[Any, Any]]:
    """Names our functions in every config; returns (config, what it named before)."""
    _register(op.attention_interface)
    before = [(config, config._attn_implementation_internal) for config in _configs(root)]
    for config, name in before:
        config._attn_implementation_internal = NAMES.get(name or "sdpa", name)
    return before


def _restore(before: list[tuple[Any, Any]]) -> None:
    for config, name in before:
        config._attn_implementation_internal = name


@contextlib.contextmanager
def _listening(called: list[nn.Module]) -> Iterator[None]:
    """Within it, `called` collects the modules that call our attention function."""

    def listen(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        called.append(module)
        return op.attention_interface(module, *args, **kwargs)

    _register(listen)
    try:
        yield
    finally:
        _register(op.attention_interface)
