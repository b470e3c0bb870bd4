"""A CUDA graph for the CPU: the ops of one run, each with the very tensors it read and wrote, run again in that order.

What holds of a real graph holds here: Python does not run at a replay, addresses are those of the recording, every
intermediate result stands in one place and is overwritten, random numbers are drawn anew, and recording changes nothing
that was there before. A number read by the host is refused, as the probe before a capture does. What it does not show:
memory that one graph of a pool takes from another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petune_kernels import cuda_graph


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """What stood, before the recording, in tensors that it writes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                for t in tree_leaves(given):
                    if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self._made:
                        self.before.setdefault(id(t), (t, t.detach().clone()))
        out = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, Tensor)}
        self._made |= made - inputs
        self.ops.append((func, args, kwargs, out))  # keeps every tensor where it is
        return out


class _Waits(TorchDispatchMode):
    """Raises where a GPU would be waited for, or notes it."""

    def __init__(self, raises: bool = True) -> None:
        super().__init__()
        self.raises, self.said = raises, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.said = "called a synchronizing operation"
            if self.raises:
                raise RuntimeError(self.said)
        return func(*args, **(kwargs or {}))


class Recorder:
    """Stands in for petune_kernels.cuda_graph.Recorder."""

    device_type = "cpu"

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    @staticmethod
    def recording() -> bool:
        return False

    def warm(self, function: Callable[[], None], times: int = 3) -> None:
        with cuda_graph.as_captured():
            for _ in range(times):
                function()

    def probe(self, function: Callable[[], None]) -> None:
        with _Waits():
            self.warm(function, times=1)

    def waits(self, function: Callable[[], None]) -> str:
        with _Waits(raises=False) as waits:
            self.warm(function, times=1)
        return waits.said

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        # TorchScript makes a number by a dispatched poison and a write that is not: only the former would be replayed
        with cuda_graph.no_collection(), pytest.MonkeyPatch.context() as patch, cuda_graph.as_captured(), _Log() as log:
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
            function()
        with torch.no_grad():
            for t, value in log.before.values():
                t.copy_(value)

        def replay() -> None:
            with torch._C._AutoDispatchBelowAutograd():
                for func, args, kwargs, out in log.ops:
                    for was, now in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                        if isinstance(was, Tensor) and was.data_ptr() != now.data_ptr():
                            was.copy_(now)

        return replay

    def reserved(self) -> int:
        return 0
