"""What a pattern is, how it verifies itself, and how a fused forward is bound to one module instance and taken off.

A pattern recognises a module by what it holds, binds a fused forward on the instance (never on the class), and only
after that forward has given the same result as the module's own on a small random input.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MARK = "_petune_pattern"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# largest difference between fused and own forward, relative to the largest output; a look-alike is off by far more
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Pattern:
    """One structural pattern.

    parts: role -> child name for a module that looks like this pattern (what verification then confirms), else None.
    refuse: why a module that looks right is left alone, or "".
    sample: a small random input for verification, from the module, its parts and a generator.
    forward: the fused forward, called as forward(module, parts, *args).
    """

    name: str
    parts: Callable[[nn.Module], Mapping[str, str] | None]
    refuse: Callable[[nn.Module, Mapping[str, str]], str]
    sample: Callable[[nn.Module, Mapping[str, str], torch.Generator], tuple[Tensor, ...]]
    forward: Callable[..., Any]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Exactly this class, its own forward, no hooks: its parameters may be read without calling it."""
    return type(module) is kind and "forward" not in module.__dict__ and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def pattern_of(module: nn.Module) -> str | None:
    """The name of the pattern bound to this instance, or None."""
    return module.__dict__.get(_MARK)


def bind(module: nn.Module, pattern: Pattern, parts: Mapping[str, str]) -> None:
    # functools.partial: deep-copies and pickles with its module, and torch.compile traces it
    module.__dict__["forward"] = functools.partial(pattern.forward, module, parts)
    module.__dict__[_MARK] = pattern.name


def foreign_forward(module: nn.Module) -> bool:
    """True where somebody else set `forward` on the instance (accelerate's hooks do), before or after us."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return pattern_of(module) is not None
    ours = isinstance(forward, functools.partial) and forward.func.__module__.startswith("petune_kernels.patch")
    return not (ours and pattern_of(module) is not None)


def unbind(module: nn.Module) -> None:
    del module.__dict__["forward"], module.__dict__[_MARK]


def _bare(module: nn.Module) -> nn.Module:
    """The same module seen without hooks and in evaluation, sharing its parameters; the original is not touched."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__, training=False)
    for name in _HOOKS:
        twin.__dict__[name] = type(getattr(module, name))()
    twin.__dict__["_modules"] = {k: None if m is None else _bare(m) for k, m in module._modules.items()}
    return twin


def verify(module: nn.Module, pattern: Pattern, parts: Mapping[str, str]) -> str:
    """'' where the fused forward agrees with the module's own on a small random input, else what differs.

    Dropout off, hooks and global random state untouched. On the meta device there is nothing to compare.
    """
    param = next(iter(module.parameters()), None)
    if param is None or param.device.type == "meta":
        return ""
    twin = _bare(module)
    generator = torch.Generator(param.device).manual_seed(0)
    with torch.no_grad(), torch.autocast(param.device.type, enabled=False):
        args = pattern.sample(twin, parts, generator)
        try:
            own = type(module).forward(twin, *args)
        except Exception as error:  # a look-alike with another signature or other shapes: the report carries the reason
            return f"its forward does not take this pattern's input: {type(error).__name__}: {error}"
        fused = pattern.forward(twin, parts, *args)
    if not isinstance(own, Tensor) or own.shape != fused.shape or own.dtype != fused.dtype:
        return f"its forward gives {_kind(own)}, the fused one {_kind(fused)}"
    difference = (own.double() - fused.double()).abs().max().item() if own.numel() else 0.0
    allowed = _TOLERANCE[own.dtype] * max(own.double().abs().max().item(), 1.0) if own.numel() else 0.0
    return "" if difference <= allowed else f"its forward differs from the fused one by {difference:.2g} on a sample"


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
