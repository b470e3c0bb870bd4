"""What a pattern is, how it verifies itself, and how a fused forward is bound to one module instance and taken off.

A pattern recognises a module by what it holds, binds a fused forward on the instance (never on the class), and only
after that forward has given the same result as the module's own on a small input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..meta import no_autocast

if TYPE_CHECKING:
    from .trace import Call

_MARK = "_petune_pattern"
GRAPHS = "_petune_graphs"  # where the graphs of a stack are kept (graphs.py)
REPLICAS = "_petune_replicas"
"""In the __dict__ of a packed model's modules: the forward that the instance had before, or None (replicas/bind.py)."""
_BOUND = ("forward", _MARK, GRAPHS)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
# largest difference between fused and own forward, relative to the largest output; a look-alike is off by far more
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
CACHE = ("past_key_values", "cache")  # what transformers calls a cache: until 5.23, and since
_META_LIMIT = 1 << 22  # parameters of a module on the meta device up to which it is verified on random CPU weights
_WIDE_LIMIT = 1 << 24  # parameters of a 16-bit module up to which it is verified in float32, too

Parts = Mapping[str, Any]


def _rows(module: nn.Module, parts: Parts, generator: torch.Generator, call: Call | None) -> tuple[Tensor, ...]:
    return (torch.randn(4, 16, generator=generator, device=generator.device),)


def _whole(module: nn.Module, parts: Parts, call: Call | None) -> nn.Module:
    return bare(module)


@dataclass(frozen=True)
class Pattern:
    """One structural pattern.

    forward: the fused forward, called as forward(module, parts, *args, **kwargs).
    parts: the ways in which a module may be read as this pattern, likeliest first: role -> child name (or what else the
        forward must know), from the module and how it was called in the model's trace (None where there is none).
        Empty: not this pattern. Verification takes the first that gives the module's own result. The default finds
        nothing: such a pattern is found in the model's trace instead.
    sample: a small input for verification, from a bare twin of the module, the parts, a generator and the traced call;
        a dict at its end holds keyword arguments. May give the twin random parameters. By default four rows of 16.
    refuse: why a module that looks right is left alone, or "".
    claims: the roles whose children run inside the fused forward and so are no longer candidates themselves.
    outline: a bare twin in which what both forwards only call is replaced by something small whose result weighs as
        much as what it is added to.
    sure: whether a module that looks right and is refused all the same makes patch(strict=True) raise.
    """

    name: str
    forward: Callable[..., Any]
    parts: Callable[[nn.Module, Call | None], Sequence[Parts]] = lambda module, call: ()
    sample: Callable[[nn.Module, Parts, torch.Generator, Call | None], tuple[Any, ...]] = _rows
    refuse: Callable[[nn.Module, Parts], str] = lambda module, parts: ""
    claims: Callable[[nn.Module, Parts], Sequence[str]] = lambda module, parts: ()
    outline: Callable[[nn.Module, Parts, Call | None], nn.Module] = _whole
    sure: bool = True


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Exactly this class, its own forward, no hooks: its parameters may be read without calling it."""
    return type(module) is kind and "forward" not in module.__dict__ and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks of its own. torch's hooks on all modules do not count: they see what runs as a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )  # asked at every call: no loop


def drop_hooks(twin: nn.Module) -> None:
    """Takes the hooks off a copy, whose original keeps its own."""
    for name in (*_HOOKS, *_HOOK_FLAGS):
        twin.__dict__[name] = type(getattr(twin, name))()


def pattern_of(module: nn.Module) -> str | None:
    """The name of the pattern bound to this instance, or None."""
    return module.__dict__.get(_MARK)


def replicated(model: nn.Module) -> bool:
    return any(REPLICAS in m.__dict__ for m in model.modules())


def bound(module: nn.Module) -> bool:
    """Whether a forward of this library was bound here: a pattern's, or a frame around the module's own."""
    return _MARK in module.__dict__


def bind(module: nn.Module, pattern: Pattern, parts: Any) -> None:
    # functools.partial: deep-copies and pickles with its module, and torch.compile traces it
    module.__dict__["forward"] = functools.partial(pattern.forward, module, parts)
    module.__dict__[_MARK] = pattern.name


def bindings(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """What is bound in a model now, for `bind_again`."""
    return {m: {k: m.__dict__[k] for k in _BOUND if k in m.__dict__} for m in model.modules()}


def bind_again(before: dict[nn.Module, dict[str, Any]]) -> None:
    for module, own in before.items():
        for name in _BOUND:
            module.__dict__.pop(name, None)
        module.__dict__.update(own)


def frame(module: nn.Module, around: Callable[..., Any]) -> None:
    """Binds around(module, parts, own, *args, **kwargs), where `own` is the fused forward or, without one, its own."""
    own = module.__dict__.get("forward") or functools.partial(type(module).forward, module)
    parts = own.args[1] if _MARK in module.__dict__ else None
    module.__dict__["forward"] = functools.partial(around, module, parts, own)
    module.__dict__.setdefault(_MARK, None)


def framed(module: nn.Module) -> bool:
    return _MARK in module.__dict__ and not foreign_forward(module) and len(module.__dict__["forward"].args) == 3


def around(module: nn.Module) -> Callable[..., Any]:
    """What a frame's forward was bound to."""
    return module.__dict__["forward"].func


def unframe(module: nn.Module) -> None:
    if module.__dict__[_MARK] is None:
        unbind(module)
    else:
        module.__dict__["forward"] = module.__dict__["forward"].args[2]


def undisturbed(module: nn.Module) -> bool:
    """No hooks, and nobody else's forward: what the module does may be done in its stead."""
    return not has_hooks(module) and not foreign_forward(module)


def bound_parts(module: nn.Module) -> Any:
    """What `bind` was given for this module."""
    return module.__dict__["forward"].args[1]


def foreign_forward(module: nn.Module) -> bool:
    """True where somebody else set `forward` on the instance (accelerate's hooks do), before or after us."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return bound(module)
    ours = isinstance(forward, functools.partial) and forward.func.__module__.startswith("petune_kernels.patch")
    return not (ours and bound(module))


def unbind(module: nn.Module) -> None:
    del module.__dict__["forward"], module.__dict__[_MARK]


def bare(module: nn.Module, twins: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """The same module seen without hooks, fused forwards and in evaluation, sharing its parameters; the original is not
    touched. `twins` collects original -> twin for every module in it."""
    twins = {} if twins is None else twins
    if module in twins:
        return twins[module]
    twin = twins[module] = object.__new__(type(module))  # not copy.copy, which a parametrised module refuses
    twin.__dict__ = dict(module.__dict__, training=False)
    if bound(module) and not foreign_forward(module):
        unbind(twin)
    drop_hooks(twin)
    for name in ("_parameters", "_buffers"):
        twin.__dict__[name] = dict(module.__dict__[name])
    twin.__dict__["_modules"] = {k: None if m is None else bare(m, twins) for k, m in module._modules.items()}
    return twin


class Marker(nn.Module):
    """Stands in for a dropout during verification: fused and own forward must drop in the same place."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)


def _probe(module: nn.Module, generator: torch.Generator, wide: bool) -> nn.Module:
    """A bare twin that hides nothing: vectors (norm weights, biases) random, dropouts replaced by markers; `wide`: in
    float32. On the meta device a small module gets random weights on the CPU instead."""
    twin = bare(module)
    for child in twin.modules():
        for name, p in child._parameters.items():
            if p is None:
                continue
            value = p.detach()
            if p.dim() == 1 or p.is_meta:
                size = 1 if p.dim() == 1 else 0.1
                value = (torch.randn(p.shape, generator=generator, device=generator.device) * size).to(p.dtype)
            child._parameters[name] = nn.Parameter(_widened(value) if wide else value, requires_grad=False)
        for name, m in child._modules.items():
            if type(m) is nn.Dropout:
                child._modules[name] = Marker()
    return twin


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


def verify(module: nn.Module, pattern: Pattern, parts: Parts, call: Call | None = None) -> str:
    """'' where the fused forward agrees with the module's own on a small input, else what differs.

    In the module's own dtype; where that has 16 bits, in which a small term is lost beside a large one, also in
    float32, unless the module is large; and around stand-ins of the blocks that both only call; and in training, for
    what it drops there by itself. Dropouts marked, hooks and global random state untouched. Of a large module on the
    meta device only the shapes are compared.
    """
    if any(p.is_meta for p in module.parameters()):
        outlined = pattern.outline(module, parts, call)
        return _agree(outlined, pattern, parts, call, shapes_only=_count(outlined) > _META_LIMIT)
    reason = _agree(module, pattern, parts, call)
    if not reason and _count(module) <= _WIDE_LIMIT and any(_widened(p) is not p for p in module.parameters()):
        reason = _agree(module, pattern, parts, call, wide=True)
    if not reason and pattern.outline is not _whole:
        reason = _agree(pattern.outline(module, parts, call), pattern, parts, call, wide=True)
    if not reason and type(module) is not nn.Dropout:
        reason = _agree(pattern.outline(module, parts, call), pattern, parts, call, training=True)
        return reason and f"in training {reason}"
    return reason


def _agree(
    module: nn.Module, pattern: Pattern, parts: Parts, call: Call | None, wide: bool = False,
    shapes_only: bool = False, training: bool = False,
) -> str:  # fmt: skip
    tensors = [p for p in module.parameters() if p.is_floating_point()]
    device = tensors[0].device if tensors and not tensors[0].is_meta else torch.device("cpu")
    generator, kind = torch.Generator(device).manual_seed(0), type(module)
    gpu = [device] if device.type == "cuda" else []
    with torch.no_grad(), no_autocast(device), torch.random.fork_rng(gpu, enabled=training):
        twin = bare(module) if shapes_only else _probe(module, generator, wide)
        for child in twin.modules() if training else ():
            child.__dict__.update(training=True, gradient_checkpointing=False)
        try:
            args = pattern.sample(twin, parts, generator, call)
            if wide or shapes_only:
                args = tree_map(_widened if wide else _to_meta, args)
            args, kwargs = (args[:-1], args[-1]) if args and isinstance(args[-1], dict) else (args, {})
            if training:
                torch.manual_seed(0)  # what both drop in the same way is the same
            own = kind.forward(twin, *args, **kwargs)
        except Exception as error:  # a look-alike with another signature or other shapes: the report carries the reason
            return f"its forward does not take this pattern's input: {type(error).__name__}: {error}"
        try:
            if training:
                torch.manual_seed(0)
            fused = pattern.forward(twin, parts, *args, **kwargs)
        except Exception as error:  # the parts do not fit together as this reading has it
            return f"the fused forward does not fit it: {type(error).__name__}: {error}"
    return difference(own, fused)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def difference(own: Any, fused: Any) -> str:
    """'' where two results agree within their dtype's rounding, else what differs."""
    if not isinstance(own, Tensor) or not isinstance(fused, Tensor):
        return "" if own is fused else f"its forward gives {_kind(own)}, the fused one {_kind(fused)}"
    if own.shape != fused.shape or own.dtype != fused.dtype:
        return f"its forward gives {_kind(own)}, the fused one {_kind(fused)}"
    if not own.numel() or own.is_meta:
        return ""
    off = (own.double() - fused.double()).abs().max().item()
    allowed = _TOLERANCE[own.dtype] * own.double().abs().max().item()
    return "" if off <= allowed else f"its forward differs from the fused one by {off:.2g} on a sample"


def random_rows(like: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """[1, 3, width] in the dtype of `like`, on the generator's device."""
    return torch.randn(1, 3, width, generator=generator, device=generator.device).to(like.dtype)


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
