"""Pattern `pre_norm`: a layer whose residual sum and the norm after it become one op, as in Llama, GPT-2 or ViT.

    z = h + dropout(mixer(norm_1(h)));  out = z + dropout(mlp(norm_2(z)))

A layer with two norms (or nothing in the place of the first), a mixer, a feed-forward block, perhaps one dropout, and
nothing else. Which is which, and what the layer hands to its mixer, the traced call and verification show; a cache,
which the trace does without, goes to the mixer too. A call with other arguments that the trace did not have
(cross-attention) takes the layer's own forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..ops.residual_norm import residual_norm
from . import memory as layers
from . import norm, pattern
from .pattern import Parts, Pattern
from .trace import Call


def _parts(module: nn.Module, call: Call | None) -> Sequence[Parts]:
    norms, drops, blocks = list[str](), list[str](), list[str]()
    for name, child in module.named_children():
        is_norm = isinstance(child, nn.Identity) or bool(norm.readings(child))
        (norms if is_norm else drops if type(child) is nn.Dropout else blocks).append(name)
    if len(norms) != 2 or len(blocks) != 2 or len(drops) > 1 or call is None:
        return ()
    taken = list(inspect.signature(type(module).forward).parameters.values())[1:]
    names = tuple(p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD)
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    cache = {n for n in (*pattern.CACHE, "use_cache") if n in names}
    kwargs = frozenset(n for n, v in given.items() if v is not None and v is not False) - {names[0]} | cache
    found = []
    for (first, second), (mixer, mlp) in ((n, b) for n in permutations(norms) for b in permutations(blocks)):
        for reading in norm.readings(module.get_submodule(second)):
            parts: dict[str, Any] = {
                "first": first,
                "mixer": mixer,
                "second": second,
                "mlp": mlp,
                "norm": reading,
                "kind": type(module.get_submodule(second)),
                "names": names[1:],
                "given": kwargs,
                "required": _required(module.get_submodule(mixer)),
                "by_name": call.by_name,
            }
            found.append(parts | {"dropout": drops[0] if drops else None})
    return found


def _required(mixer: nn.Module) -> tuple[str, ...]:
    """What the mixer must be given besides its first argument."""
    taken = list(inspect.signature(type(mixer).forward).parameters.values())[2:]
    return tuple(p.name for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)


def _refuse(module: nn.Module, parts: Parts) -> str:
    second = module.get_submodule(parts["second"])
    if not pattern.undisturbed(second):
        return f"{type(second).__name__} has a forward of its own"
    # by itself: in the layer's result it hides behind a feed-forward block, which may add little
    return norm.PATTERN.refuse(second, parts["norm"]) or pattern.verify(second, norm.PATTERN, parts["norm"])


def _sample(module: nn.Module, parts: Parts, generator: torch.Generator, call: Call | None) -> tuple[Any, ...]:
    assert call is not None
    return tree_map(functools.partial(_valued, generator), (*call.args, dict(call.kwargs)))


def _valued(generator: torch.Generator, value: Any) -> Any:
    """A traced argument; one from the meta device with values (a mask of nothing but True or zeros)."""
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    if not value.is_floating_point():
        return torch.ones(value.shape, dtype=value.dtype)
    return torch.randn(value.shape, generator=generator).to(value.dtype)


class _StandIn(nn.Module):
    """In the place of a block that both forwards only call: as cheap a function of its first argument, in a tuple where
    the block's own result is one."""

    def __init__(self, block: nn.Module, gave: Any, shift: int):
        super().__init__()
        self.first = next(iter(inspect.signature(block.forward).parameters))
        self.shift, self.rest = shift, (None,) * (len(gave) - 1) if isinstance(gave, tuple) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[self.first]
        y = x.roll(self.shift, -1) * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)
        return y if self.rest is None else (y, *self.rest)


def _outline(module: nn.Module, parts: Parts, call: Call | None) -> nn.Module:
    """The layer around two stand-ins."""
    assert call is not None
    twin, gave = pattern.bare(module), dict[nn.Module, Any]()
    blocks = {parts[role]: twin.get_submodule(parts[role]) for role in ("mixer", "mlp")}
    for block in blocks.values():
        block.register_forward_hook(lambda block, args, out: gave.__setitem__(block, out))
    with torch.no_grad():
        type(module).forward(twin, *call.args, **call.kwargs)
    for shift, (name, block) in enumerate(blocks.items(), 1):
        twin._modules[name] = _StandIn(block, gave[block], shift)
    return twin


def _forward(module: Any, parts: Parts, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    passed, second = _passed(parts, args, kwargs), getattr(module, parts["second"])
    autocast = hidden_states.is_cuda and torch.is_autocast_enabled("cuda")  # float32 norms there: see norm.widened
    replaced = type(second) is not parts["kind"] or not pattern.undisturbed(second)
    again = module.training and getattr(module, "gradient_checkpointing", False) and _class_checkpoints(module)
    own_way = again and (torch.compiler.is_compiling() or not layers.is_layer(module))  # which is not transformers'
    if any(name not in parts["given"] for name in passed) or replaced or autocast or own_way:
        return type(module).forward(module, hidden_states, *args, **kwargs)
    if again:
        return _checkpointed(module, parts, hidden_states, *args, **kwargs)
    return _fused(module, parts, hidden_states, passed)


def _passed(parts: Parts, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    named = dict(zip(parts["names"], args, strict=False)) | kwargs
    return {name: value for name, value in named.items() if value is not None and value is not False}


def _class_checkpoints(module: nn.Module) -> bool:
    """Whether transformers checkpoints in the forward of the layer's class, which a forward bound on the instance goes
    past. Until 5.17 it did so in __call__, around any forward."""
    return type(module).__call__ is nn.Module.__call__


def _checkpointed(module: Any, parts: Parts, *args: Any, **kwargs: Any) -> Any:
    """The class's own forward, which checkpoints, with the fused forward as what is checkpointed.

    It runs on a twin whose checkpointing function is exchanged, so that the layer stays as it is: other threads may run
    it, too."""
    checkpoint = module._gradient_checkpointing_func

    def exchanged(own: functools.partial[Any], x: Tensor, *rest: Any) -> Any:
        return checkpoint(lambda x, *rest: _fused(module, parts, x, _passed(parts, rest, own.keywords)), x, *rest)

    twin = object.__new__(type(module))
    twin.__dict__ = dict(module.__dict__, _gradient_checkpointing_func=exchanged)
    return type(module).forward(twin, *args, **kwargs)


def _fused(module: Any, parts: Parts, hidden_states: Tensor, passed: dict[str, Any]) -> Tensor:
    first, second = getattr(module, parts["first"]), getattr(module, parts["second"])
    dropout = getattr(module, parts["dropout"]) if parts["dropout"] else None
    settings = parts["norm"]
    given: dict[str, Any] = dict.fromkeys(parts["required"]) | passed
    out = _call(module, parts, "mixer", first(hidden_states), given)
    x = out[0] if isinstance(out, tuple) else out
    p = 0.0
    if dropout is not None:
        if type(dropout) is nn.Dropout and pattern.undisturbed(dropout) and dropout.p < 1.0:
            p = dropout.p if dropout.training else 0.0
        else:
            x = dropout(x)
    if x.dtype != hidden_states.dtype or not norm.serves(second, settings, x):
        z = hidden_states + (x if p == 0.0 else dropout(x))  # type: ignore[misc]
        y = second(z)
    else:
        y, z = residual_norm(x, residual=hidden_states, p=p, return_z=True, **norm.settings(second, settings, x))
    out = _call(module, parts, "mlp", y, {})
    return z + (out if dropout is None else dropout(out))


def _call(module: nn.Module, parts: Parts, role: str, x: Tensor, more: dict[str, Any]) -> Any:
    """A block, given x by name where the layer's own forward does so."""
    block, name = getattr(module, parts[role]), parts["by_name"].get(parts[role])
    return block(**{name: x}, **more) if name else block(x, **more)


PATTERN = Pattern(
    "pre_norm", _forward, _parts, _sample, _refuse, lambda module, parts: ("second",), _outline, sure=False
)
