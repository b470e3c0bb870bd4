"""The meta device, where tensors have shapes and no values, as a stand-in for a real one.

A model decides some things by its inputs' values: a padding mask of ones is no mask, token ids without padding need no
warning. `Values` lets it decide them on the meta device as it would elsewhere. What goes another way by device asks
`kind`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_NOTHING = contextlib.nullcontext()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast off on that device; nothing where it has none, as on the meta device."""
    return torch.autocast(device.type, enabled=False) if autocasts(device.type) else _NOTHING


def autocasts(kind: str) -> bool:
    """Whether autocast is on for that type of device; of those that an op takes only meta has none.

    Not torch.amp.is_autocast_available, which torch 2.10 and 2.11 do not compile.
    """
    return kind != "meta" and torch.is_autocast_enabled(kind)


_kind = "cpu"


@contextlib.contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """Within it the meta device stands for this type of device; for "cpu" otherwise."""
    global _kind
    before, _kind = _kind, kind
    try:
        yield
    finally:
        _kind = before


def kind(device: torch.device) -> str:
    """The type of the device, or of the one that it stands for."""
    return _kind if device.type == "meta" else device.type


LIMIT = 1 << 20
"""Elements up to which values are kept."""


class Values(TorchDispatchMode):
    """While entered, what is computed on the meta device from tensors with values has values, up to LIMIT elements.

    Values start with tensors of the CPU that are moved to the meta device, and with new tensors (arange, ones; nothing
    random). Reading one that has none raises what the meta device raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        valued = self._valued(func, args, kwargs)
        leaves = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta"
        if valued is not None and (leaves or func is torch.ops.aten._local_scalar_dense.default):
            return func(*valued[0], **valued[1])
        if valued is not None and torch.Tag.dynamic_output_shape in func.tags:
            found = func(*valued[0], **valued[1])
            out = tree_map(lambda t: torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t, found)
            return self._keep(out, found)
        out = func(*args, **kwargs)
        results = _tensors(out)
        if valued is None or any(not t.is_meta or t.numel() > LIMIT for t in results):
            for t in results:  # written over in place, perhaps
                self._values.pop(t, None)
            return out
        return self._keep(out, func(*valued[0], **valued[1]))

    def _valued(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments with values, or None where one on the meta device has none or nothing is on that device."""
        tensors = _tensors((args, kwargs))
        to = kwargs.get("device")
        on_meta = any(t.is_meta for t in tensors) or (to is not None and torch.device(to).type == "meta")
        if not on_meta or any(t.is_meta and t not in self._values for t in tensors):
            return None
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.__name__:
            return None
        args, kwargs = tree_map(lambda a: self._values.get(a, a) if isinstance(a, Tensor) else a, (args, kwargs))
        return args, kwargs if to is None else kwargs | {"device": torch.device("cpu")}

    def _keep(self, out: Any, found: Any) -> Any:
        for t, value in zip(_tensors(out), _tensors(found), strict=True):
            self._values[t] = value
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
