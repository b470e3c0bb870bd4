"""Which forward consumes a parameter of G replicas, and how it is bound to a module and taken off.

Most of a patched model does it already: `residual_norm`, `bias_act`, `lora_linear`, `frozen_linear` take [G, ..]
parameters. What is left are linear layers whose weight trains (heads, adapters) and embeddings (PEFT's prefix), which
get a forward of their own here, and everything else, which is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.frozen_linear import frozen_linear
from ..ops.replica_linear import replica_linear
from ..patch import PatchReport, linear, lora, norm, pattern

MARK = pattern.REPLICAS


def _linear(module: Any, x: Tensor) -> Tensor:
    if module.weight.dim() == 3:
        return replica_linear(x, module.weight, module.bias)
    return frozen_linear(x, module.weight, module.bias)


def _embedding(module: Any, ids: Tensor) -> Tensor:
    """Rows of each replica's own table: [G, V, E] as one table of G*V rows."""
    G, V, E = module.weight.shape
    if ids.shape[0] % G:
        raise ValueError(f"the batch has {ids.shape[0]} rows; accepted is a multiple of the {G} replicas")
    first = torch.arange(0, G * V, V, dtype=ids.dtype, device=ids.device).repeat_interleave(ids.shape[0] // G)
    return F.embedding(ids + first.reshape(-1, *(1,) * (ids.dim() - 1)), module.weight.reshape(G * V, E))


def plan(model: nn.Module, report: PatchReport) -> tuple[dict[str, Callable[[nn.Module], None]], dict[str, str]]:
    """(module path -> what binds its forward, where it needs one; parameter name -> why nothing consumes it)."""
    entries = {e.path: e for e in report.entries}
    served = {id(p) for p in _served(model)}
    binders: dict[str, Callable[[nn.Module], None]] = {}
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        trained = [n for n, p in module._parameters.items() if p is not None and p.requires_grad]
        if not trained or all(id(module._parameters[n]) in served for n in trained):
            continue
        entry = entries.get(path)
        by = entry.pattern if entry is not None else ""
        found = _binder(module, trained, by, entry is not None and entry.part)
        if isinstance(found, str):
            why = f": {entry.reason}" if entry is not None and entry.reason else ""
            refused |= {f"{path}.{n}".lstrip("."): found + why for n in trained}
        elif found is not None:
            binders[path] = found
    return binders, refused


def _served(model: nn.Module) -> Iterator[Tensor]:
    """What a bound LoRA layer or projection hands to its op: factors, and biases beside frozen weights."""
    for module in model.modules():
        if pattern.pattern_of(module) not in ("lora", "shared_input", "linear") or pattern.foreign_forward(module):
            continue
        found = lora.projection(module) if lora.is_layer(module) else linear.projection(module)
        if found is not None and not found.w.requires_grad:
            yield from (t for t in found[1:5] if isinstance(t, Tensor))


def _binder(module: nn.Module, trained: list[str], by: str, part: bool) -> Callable[[nn.Module], None] | str | None:
    """What binds a forward, None where the fused one will do, or why there is none."""
    kind = type(module).__name__
    if pattern.foreign_forward(module):
        return f"the forward of this {kind} was replaced on the instance"
    if not {*trained} <= {"weight", "bias"}:
        return f"the forward of {kind} is not known to read it"
    if type(module) is nn.Linear:
        if trained == ["bias"] and part and by in ("post_norm_tail", "mlp"):
            return None
        return functools.partial(bind, forward=_linear)
    if type(module) is nn.Embedding:
        if module.padding_idx is not None or module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return "an embedding with a padding row (or max_norm, sparse or scaled gradients) has one table for all"
        return functools.partial(bind, forward=_embedding)
    readings = norm.readings(module)
    if readings and by == "pre_norm" and part:
        # runs inside the layer's op; its own forward, should anybody call it, must take replicas, too
        chosen = next((r for r in readings if not pattern.verify(module, norm.PATTERN, r)), None)
        return None if chosen is None else functools.partial(_bind_norm, parts=chosen)
    if readings and by:
        return None
    return f"the forward of {kind} takes no replica axis"


def _bind_norm(module: nn.Module, parts: Any) -> None:
    pattern.bind(module, norm.PATTERN, parts)
    module.__dict__[MARK] = None


def bind(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__[MARK] = module.__dict__.get("forward")
    module.__dict__["forward"] = functools.partial(forward, module)


def unbind(model: nn.Module) -> None:
    """Gives every module the forward that it had before `bind`."""
    for module in model.modules():
        if MARK not in module.__dict__:
            continue
        before = module.__dict__.pop(MARK)
        if before is not None:
            module.__dict__["forward"] = before
        elif pattern.pattern_of(module) is not None and not pattern.foreign_forward(module):
            pattern.unbind(module)
        else:
            del module.__dict__["forward"]
