"""Pattern `lora`: PEFT's LoRA layer over a plain nn.Linear, y = x W^T + b + s (dropout(x) A^T B^T + b_B) as one op.

PEFT's state is read at each call, so that set_adapter, disable_adapter, merge, unmerge, delete_adapter and adapters
added after patching are followed. Where PEFT does something else (several active adapters, `adapter_names`, DoRA and
other variants, quantised bases, hooks inside) its own forward runs. PEFT is never imported from here: no module can be
a LoRA layer unless somebody has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.lora_linear import Projection, project
from . import linear
from .pattern import Parts, Pattern, foreign_forward, has_hooks
from .trace import Call

_PEFT_LAYERS = "peft.tuners.lora.layer"


def _is_lora_linear(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Linear" and kind.__module__ == _PEFT_LAYERS


def is_layer(module: nn.Module) -> bool:
    """Any of PEFT's LoRA layers, whatever it adapts."""
    layers = sys.modules.get(_PEFT_LAYERS)
    return layers is not None and isinstance(module, layers.LoraLayer)


def projection(module: nn.Module) -> Projection | None:
    """What PEFT's LoRA layer `module` computes at this call, or None where its own forward must run.

    Hooks on the layer itself are the caller's concern: calling the layer runs them, computing in its stead does not.
    """
    if not _is_lora_linear(module):
        return None
    layer: Any = module
    if layer.disable_adapters:
        return None if layer.merged else linear.projection(layer.base_layer)  # a merged one is unmerged first
    adapters = layer._modules["lora_A"]._modules  # read at every call: not through getattr, which finds a module slowly
    active = [] if layer.merged else [name for name in layer.active_adapters if name in adapters]
    if not active:
        return linear.projection(layer.base_layer)
    found = _read(layer, active[0]) if len(active) == 1 else ""
    return None if isinstance(found, str) else found


def _read(layer: Any, adapter: str) -> Projection | str:
    """What the layer computes with this adapter, or why that is PEFT's own forward's business."""
    children = layer._modules
    base = linear.projection(children["base_layer"])
    if base is None:
        return f"its base layer ({type(children['base_layer']).__name__}) is not a plain nn.Linear, or carries hooks"
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a variant of LoRA ({type(layer.lora_variant[adapter]).__name__})"
    a, b = (linear.projection(children[name]._modules[adapter]) for name in ("lora_A", "lora_B"))
    p = _probability(children["lora_dropout"]._modules[adapter])
    if a is None or a.bias is not None or b is None or p is None:
        return f"lora_A, lora_B or lora_dropout of adapter {adapter!r} is not as PEFT makes it, or carries hooks"
    return Projection(base.w, base.bias, a.w, b.w, b.bias, float(layer.scaling[adapter]), p)


def _probability(dropout: Any) -> float | None:
    """p in effect, or None where the module must be called."""
    if type(dropout) not in (nn.Dropout, nn.Identity) or has_hooks(dropout) or foreign_forward(dropout):
        return None
    if isinstance(dropout, nn.Identity) or not dropout.training:
        return 0.0
    return float(dropout.p) if dropout.p < 1 and not dropout.inplace else None


def parts(module: nn.Module, call: Call | None = None) -> Sequence[Parts]:
    return ({name: name for name in module._modules},) if is_layer(module) else ()


def _refuse(module: nn.Module, parts: Parts) -> str:
    if not _is_lora_linear(module):
        return f"{type(module).__module__}.{type(module).__name__} is not PEFT's LoRA layer for nn.Linear"
    layer: Any = module
    found = [_read(layer, name) for name in layer.lora_A]
    if any(isinstance(one, Projection) for one in found):
        return ""
    return "; ".join(dict.fromkeys(str(one) for one in found)) or "it holds no adapter"


def _sample(module: nn.Module, parts: Parts, generator: torch.Generator, call: Call | None) -> tuple[Tensor, ...]:
    """Besides the input: readies `module`, a twin with a __dict__ of its own, so that the comparison sees an adapter.

    Not merged, enabled, its first adapter that is served active, with random A and B: PEFT's B is zero at first.
    """
    layer: Any = module
    layer.lora_dropout.__dict__["_modules"] = {name: nn.Identity() for name in layer.lora_dropout._modules}
    adapter = next(name for name in layer.lora_A if isinstance(_read(layer, name), Projection))
    layer.__dict__.update(merged_adapters=[], _disable_adapters=False, _active_adapter=adapter)
    for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
        factor.__dict__["_parameters"] = {
            name: None if t is None else _random(t.shape, t, generator) / t.shape[-1] ** 0.5
            for name, t in factor._parameters.items()
        }
    weight = layer.base_layer.weight
    return (_random((3, weight.shape[1]), weight, generator),)


def _random(shape: Any, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(like.device, like.dtype)


def _forward(module: nn.Module, parts: Parts, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    found = None if args or kwargs else projection(module)  # PEFT's adapter_names, alora_offsets
    if found is None or not found.takes(x):
        return type(module).forward(module, x, *args, **kwargs)
    return project(x, (found,))[0]


PATTERN = Pattern("lora", _forward, parts, _sample, _refuse, claims=lambda module, parts: tuple(parts))
