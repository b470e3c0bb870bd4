"""What the computation of a part of a model depends on beside its arguments, cheap enough to ask at every call."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from .. import backends
from . import memory, pattern

_TRAINING, _REQUIRES_GRAD, _DTYPE = map(operator.attrgetter, ("training", "requires_grad", "dtype"))
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity)
"""What is never called, or does nothing: half of the modules that PEFT adds."""
_ASKED_FOR = ("output_attentions", "_output_attentions", "output_hidden_states")


class Watch:
    """What the computation of a stack depends on beside its arguments, read from lists that are gathered once.

    For BERT-base `stale`, `unfit` and `state` together take 0.1 ms a call on one core of a server,
    with LoRA on every linear 0.3 ms: that many modules and tensors are looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        owned = [m.__dict__ for m in modules]
        self._all_children = [d["_modules"] for d in owned]
        self._children = [d for d in self._all_children if d]
        self._had = self._has()
        self._parameters = [d["_parameters"] for d in owned if d["_parameters"]]
        self._buffers = [d["_buffers"] for d in owned if d["_buffers"]]
        self._hooks = [d[name] for d in owned[1:] for name in pattern._HOOKS]
        self._hooks += [getattr(nn.modules.module, "_global" + name) for name in pattern._HOOKS]
        self._called = [m for m in modules if not isinstance(m, _CONTAINERS)]
        self._own = [m.__dict__ for m in self._called]
        self._numbers = [(d, name) for d in owned for name, value in d.items() if type(value) is float]
        self._adapters = [d for d in owned if "merged_adapters" in d]
        self._layers = [m for m in modules if memory.is_layer(m)]
        configs: dict[int, Any] = {
            id(c): c for d in owned if hasattr(c := d.get("config"), "_attn_implementation_internal")
        }
        self._configs = list(configs.values())
        told = [*owned, *(getattr(c, "__dict__", {}) for c in self._configs)]
        self._layerdrops = [(d, name) for d in told for name in d if name.endswith("layerdrop")]
        self.positions: int | None = getattr(next(iter(self._configs), None), "max_position_embeddings", None)

    def _has(self) -> list[int]:
        return [sum(map(len, self._all_children)), *map(id, chain.from_iterable(map(dict.values, self._children)))]

    def stale(self) -> bool:
        """Whether modules came or went: the lists must be gathered again."""
        return self._has() != self._had

    def parameters(self) -> list[Tensor]:
        return [p for p in chain.from_iterable(map(dict.values, self._parameters)) if p is not None]

    def buffers(self) -> list[Tensor]:
        return [b for b in chain.from_iterable(map(dict.values, self._buffers)) if b is not None]

    def unfit(self) -> str:
        if any(self._hooks) and not _idle(self._hooks):
            return "with hooks on modules inside, which no graph calls"
        if any(layer.gradient_checkpointing for layer in self._layers):
            return "with transformers' gradient checkpointing"
        if any(d[name] for d, name in self._layerdrops):
            return "with layerdrop, whose draw on the host a graph would repeat"
        return ""

    def state(self) -> Any:
        """Equal as long as a graph computes what the stack would."""
        tensors = [*self.parameters(), *self.buffers()]
        return (
            [*map(id, tensors)],
            [*map(Tensor.data_ptr, tensors)],
            [*map(_REQUIRES_GRAD, tensors)],
            [*map(_DTYPE, tensors)],
            [*map(_TRAINING, self._called)],
            ["forward" in d and d["forward"] for d in self._own],
            [d.get(name) for d, name in self._numbers],
            [
                part
                for d in self._adapters
                for part in (d.get("_disable_adapters"), *d["merged_adapters"], 0, *d.get("_active_adapter", ()), 0)
            ],
            [*chain.from_iterable(d["scaling"].values() for d in self._adapters if "scaling" in d)],
            [
                (c._attn_implementation_internal, *map(getattr(c, "__dict__", {}).get, _ASKED_FOR))
                for c in self._configs
            ],
            backends._forced,
        )  # fmt: skip

    @contextlib.contextmanager
    def standing_in(self, others: dict[int, Tensor]) -> Iterator[None]:
        """Within it the modules hold others[id(p)] in place of a parameter p."""
        swapped = [(d, n, p) for d in self._parameters for n, p in d.items() if p is not None and id(p) in others]
        try:
            for d, n, p in swapped:
                d[n] = others[id(p)]
            yield
        finally:
            for d, n, p in swapped:
                d[n] = p


def _idle(hooks: list[Any]) -> bool:
    """Whether they are all transformers' recorders of outputs, which stay once installed, and nothing is recorded."""
    theirs = sys.modules.get("transformers.utils.output_capturing")
    return (
        theirs is not None
        and not theirs._active_collector.get()
        and all(getattr(f, "__module__", "") == theirs.__name__ for d in hooks for f in d.values())
    )
