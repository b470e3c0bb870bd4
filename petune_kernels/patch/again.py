"""What a part of a model was when it ran in forward, for backward, which runs it again.

What its modules hold (children, parameters, buffers, hooks) they hold again meanwhile: who lends a model parameters or
hooks for one forward gets the gradients of that forward. A mode, a rate, an adapter or a parameter's values that are
others by then raise.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import nn

_CHILDREN = operator.itemgetter("_modules", "_parameters", "_buffers")
_HOOKS = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_GLOBAL = [d for name, d in vars(nn.modules.module).items() if name.startswith("_global_forward_")]
_CONTAINERS = {nn.ModuleList, nn.ModuleDict, nn.ParameterDict}
"""Never called: half of the modules that PEFT adds."""
_NOTHING: dict[Any, Any] = {}
_VERSION = operator.attrgetter("_version")
_TRAINING = operator.methodcaller("get", "training")  # torch.compile's wrapper of a module has none of its own


class AsItWas:
    """A module and what is in it, as of now. For a layer of BERT-base this and `restored` take 64 microseconds together
    on one core of a server, with LoRA on every linear 176."""

    def __init__(self, module: nn.Module) -> None:
        self.name = type(module).__name__
        owned, called = [module.__dict__], [module.__dict__]
        for d in owned:  # it grows; modules() would make a name for each
            for child in d["_modules"].values():
                if child is not None:
                    owned.append(child.__dict__)
                    if type(child) not in _CONTAINERS:
                        called.append(child.__dict__)
        self._called, self._training = called, module.training
        self._places = [
            *_GLOBAL,
            *chain.from_iterable(map(_CHILDREN, owned)),
            *chain.from_iterable(map(_HOOKS, called)),
        ]
        self._held = [d.copy() if d else _NOTHING for d in self._places]
        self._facts = _facts(called)
        self._parameters = [
            p for d in owned for p in d["_parameters"].values() if p is not None and not p.is_inference()
        ]
        self._versions = [*map(_VERSION, self._parameters)]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within it the module is as it was; raises where that cannot be."""
        self._check()
        now, found, held = self._held, _contents(self._places), _contents(self._held)
        if found != held:
            now = [d.copy() for d in self._places]
        try:
            if found != held:
                _fill(self._places, self._held)
            yield
        finally:  # the run ends in the middle: a hook that lent something may not have come to take it back
            if _contents(self._places) != found:
                _fill(self._places, now)

    def _check(self) -> None:
        facts = _facts(self._called)
        what = next((name for name, then in self._facts.items() if facts[name] != then), "")
        versions = [*map(_VERSION, self._parameters)]
        if not what and versions != self._versions:
            for p, version, then in zip(self._parameters, versions, self._versions, strict=True):
                # an optimizer that steps in backward is at what has its gradient already: what follows the frame
                if version != then and not p._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
                    what = f"a parameter of shape {[*p.shape]} was changed in place"
                    break
        if what:
            before = "training" if self._training else "evaluation"
            raise RuntimeError(
                f"memory='recompute' or 'checkpoint': {what} between forward and backward; backward runs {self.name} "
                f"again, which was in {before}. Do that after backward, or use memory='exact'"
            )


def _facts(called: list[dict[str, Any]]) -> dict[str, list[Any]]:
    adapters, numbers = list[Any](), list[Any]()
    for d in called:
        if "_disable_adapters" in d:
            adapters.append(d["_disable_adapters"])
            adapters += map(_copied, map(d.get, ("_active_adapter", "merged_adapters", "scaling")))
        elif d["_modules"]:
            numbers += [v for v in d.values() if type(v) is float]
        else:
            numbers.append(d.get("p"))
    return {
        "train() or eval() was called": [*map(_TRAINING, called)],
        "an adapter was chosen, disabled, merged or scaled": adapters,
        "a dropout's rate or another number was changed": numbers,
    }


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else value


def _contents(dicts: list[dict[Any, Any]]) -> list[int]:
    return [*map(id, chain.from_iterable(map(dict.values, dicts)))]


def _same(now: dict[Any, Any], then: dict[Any, Any]) -> bool:
    """FSDP's own coming and going of a parameter's parts is no change."""
    return now.keys() == then.keys() and all(
        now[k] is then[k] or hasattr(now[k], "full_tensor") or hasattr(then[k], "full_tensor") for k in now
    )


def _fill(places: list[dict[Any, Any]], values: list[dict[Any, Any]]) -> None:
    for d, then in zip(places, values, strict=True):
        if not _same(d, then):
            d.clear()
            d.update(then)
