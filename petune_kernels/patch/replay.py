"""One CUDA graph of a forward and one of its backward, over static tensors, as one node of autograd; and padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import cuda_graph
from ..ops import _saving as saving
from .watch import Watch

PLAIN = (type(None), bool, int, float, str)
"""What an argument or a result may be beside a tensor: part of the graph's key."""
_ALONG = ("position_ids", "token_type_ids")
"""Arguments beside the mask that may be padded with zeros."""

Padding = tuple[tuple[int, ...], ...]
"""For each argument the axes along which it is as long as the batch."""


class Unservable(Exception):
    """Why a stack's results cannot come from a graph."""


class Ticket:
    """One call that was replayed; alive as long as its backward may come."""

    __slots__ = ("__weakref__", "spent")

    def __init__(self) -> None:
        self.spent = False


class Graph:
    """Forward and backward of a stack for one shape, over tensors that stay where they are."""

    def __init__(
        self, path: str, own: Callable[..., Any], places: int, names: tuple[str, ...], statics: list[Any],
        padding: Padding | None, cut: tuple[bool, ...] | None, watch: Watch, recorder: cuda_graph.Recorder,
    ) -> None:  # fmt: skip
        self.path, self._statics, self._padding, self._cut = path, statics, padding, cut
        self._args, self._kwargs = statics[:places], dict(zip(names[places:], statics[places:], strict=True))
        self._own, self._watch = own, watch
        self._sources = [i for i, s in enumerate(statics) if isinstance(s, Tensor) and s.requires_grad]
        self.trained = [p for p in dict.fromkeys(watch.parameters()) if p.requires_grad]
        # not the parameters themselves: hooks on them run once, on what autograd gets
        self._aliases = {id(p): p.detach().requires_grad_() for p in self.trained}
        self._wanted = [*(statics[i] for i in self._sources), *self._aliases.values()]
        self._live: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._given: list[Tensor] = []
        self._prepared = False
        kind = recorder.device_type
        self._autocast: dict[str, Any] = dict(
            device_type=kind, enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind),
            cache_enabled=False,  # a cast kept from outside may be gone when the graph reads it
        )  # fmt: skip
        buffers = [(b, b.clone()) for b in watch.buffers()]
        device = next(s.device for s in statics if isinstance(s, Tensor))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            recorder.warm(self._once)
            before = recorder.reserved()
            with cuda_graph.HostNumbers():
                try:
                    recorder.probe(self._once)
                except RuntimeError as error:
                    raise Unservable(f"that no graph takes ({str(error).splitlines()[0]})") from error
                try:
                    self._replay_forward = recorder.record(self._run_forward)
                    self._replay_backward = recorder.record(self._run_backward) if self._given else None
                except Unservable as error:  # while capturing it is no longer a reason to run plainly
                    raise RuntimeError(str(error)) from error
        self._live = []
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        own_tensors = [*self._outputs, *self._given, *self._flat, *self._inputs, *filter(torch.is_tensor, statics)]
        self.bytes = recorder.reserved() - before + sum(t.nbytes for t in own_tensors)

    def _once(self) -> None:
        self._run_forward()
        if self._given:
            self._run_backward()

    def _run_forward(self) -> None:
        self._live = []
        with torch.enable_grad(), torch.autocast(**self._autocast), self._watch.standing_in(self._aliases):
            leaves, spec = pytree.tree_flatten(self._own(*self._args, **self._kwargs))
        live = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._prepared:
            self._prepare(leaves, spec, live)
        self._live = [t for t in live if t.requires_grad]
        with torch.no_grad():
            for buffer, t in zip(self._outputs, live, strict=True):
                buffer.copy_(t)

    def _prepare(self, leaves: list[Any], spec: Any, live: list[Tensor]) -> None:
        """Static tensors for the outputs and their gradients, from a first run."""
        strange = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))), None)
        if strange is not None:
            raise Unservable(f"that gives a {type(strange).__name__}")
        if self._cut is not None and len(self._cut) != len(live):
            raise Unservable(f"that gives {len(live)} tensors, where its trace gave {len(self._cut)}")
        self._leaves, self._spec = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._outputs = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in live]
        self._differentiable = [t.requires_grad for t in live]
        self._given = [torch.zeros_like(b) for b, d in zip(self._outputs, self._differentiable, strict=True) if d]
        self._flat: list[Tensor] = []
        self._inputs: list[Tensor] = []
        self._groups: list[list[int]] | None = None
        self._prepared = True

    def _run_backward(self) -> None:
        live, self._live = self._live, []
        with torch.autocast(self._autocast["device_type"], enabled=False):  # as around a plain backward
            grads = torch.autograd.grad(live, self._wanted, self._given, allow_unused=True)
        n = len(self._sources)
        if self._groups is None:  # which gradients there are
            by_dtype: dict[torch.dtype, list[int]] = {}
            for i, g in enumerate(grads[n:]):
                if g is not None:
                    by_dtype.setdefault(g.dtype, []).append(i)
            self._groups = list(by_dtype.values())
            sizes = [sum(self.trained[i].numel() for i in group) for group in self._groups]
            self._flat = [
                torch.zeros(size, dtype=dtype, device=live[0].device)
                for size, dtype in zip(sizes, by_dtype, strict=True)
            ]
            self._inputs = [torch.zeros_like(self._statics[i], requires_grad=False) for i in self._sources]
        if {i for i, g in enumerate(grads[n:]) if g is not None} != {*itertools.chain(*self._groups)}:
            raise Unservable("whose gradients come and go")
        with torch.no_grad():
            for flat, group in zip(self._flat, self._groups, strict=True):
                torch.cat([grads[n + i].reshape(-1) for i in group], out=flat)
            for buffer, g in zip(self._inputs, grads[:n], strict=True):
                buffer.zero_() if g is None else buffer.copy_(g)

    def call(self, ticket: Ticket, values: Any) -> Any:
        tensors = _Replay.apply(self, ticket, values, *(values[i] for i in self._sources), *self.trained)
        leaves = list(self._leaves)
        for place, t in zip(self._places, tensors, strict=True):
            leaves[place] = t
        return pytree.tree_unflatten(leaves, self._spec)

    def forward(self, values: Any) -> list[Tensor]:
        """Copies of the outputs for these arguments, without padding."""
        for i, (static, value) in enumerate(zip(self._statics, values, strict=True)):
            if isinstance(static, Tensor):
                _fill(static, value, self._padding[i] if self._padding else ())
        self._replay_forward()
        length = self._length(values)
        return [_cut(b, length, c) for b, c in zip(self._outputs, self._cut or itertools.repeat(False), strict=False)]

    def _length(self, values: Any) -> int:
        return next(v.shape[a[-1]] for v, a in zip(values, self._padding, strict=True) if a) if self._padding else 0

    def backward(self, length: int, dy: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients for what `call` passed to apply, from those of the outputs."""
        assert self._groups is not None and self._replay_backward is not None
        wanted = [d for d, differentiable in zip(dy, self._differentiable, strict=True) if differentiable]
        for buffer, d in zip(self._given, wanted, strict=True):
            if d is None:
                buffer.zero_()
            else:
                _fill(buffer, d, (1,) if d.shape != buffer.shape else ())
        self._replay_backward()
        grads: list[Tensor | None] = [None] * len(self.trained)
        for flat, group in zip(self._flat, self._groups, strict=True):
            views = torch._utils._unflatten_dense_tensors(flat.clone(), [self.trained[i] for i in group])
            for i, view in zip(group, views, strict=True):
                grads[i] = view
        inputs = [
            _cut(b, length, bool(self._padding and self._padding[i]))
            for b, i in zip(self._inputs, self._sources, strict=True)
        ]
        return [*inputs, *grads]


class _Replay(torch.autograd.Function):
    """apply(graph, ticket, arguments, *inputs that need a gradient, *trained parameters)."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, ticket: Ticket, values: Any, *sources: Tensor) -> Any:
        ctx.graph, ctx.ticket, ctx.length = graph, ticket, graph._length(values)
        ctx.set_materialize_grads(False)
        outputs = graph.forward(values)
        ctx.mark_non_differentiable(*(o for o, d in zip(outputs, graph._differentiable, strict=True) if not d))
        return tuple(outputs)

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, *dy: Tensor | None) -> Any:
        if ctx.ticket.spent:
            raise RuntimeError(
                f"cuda_graphs: a second backward through the same call of {ctx.graph.path or 'the model'}, whose "
                "activations the first one has overwritten (retain_graph does not keep them); call the model again, or "
                "patch it with cuda_graphs=False"
            )
        ctx.ticket.spent = True
        return (None, None, None, *ctx.graph.backward(ctx.length, dy))


def padding_of(names: tuple[str, ...], values: tuple[Any, ...]) -> Padding | None:
    """None where nothing can hide padding: no mask, or an argument that is not known to be as long as the batch."""
    first = next(v for v in values if isinstance(v, Tensor))
    if first.dim() not in (2, 3):
        return None
    length, masked, found = first.shape[1], False, list[tuple[int, ...]]()
    for name, v in zip(names, values, strict=True):
        if not isinstance(v, Tensor) or v.dim() == 0:
            found.append(())
        elif v is first or (name in _ALONG and v.dim() == 2 and v.shape[1] == length):
            found.append((1,))
        elif v.requires_grad:
            return None
        elif name == "attention_mask" and v.dim() == 2 and v.shape[1] == length:
            masked = True
            found.append((1,))
        elif name == "attention_mask" and v.dim() == 4 and v.shape[3] == length and v.shape[2] in (1, length):
            masked = v.dtype == torch.bool or v.is_floating_point()
            found.append((3,) if v.shape[2] == 1 else (2, 3))
        else:
            return None
    return tuple(found) if masked else None


def longer_shape(value: Tensor, axes: tuple[int, ...], longer: Callable[[int], int]) -> tuple[int, ...]:
    return tuple(longer(n) if i in axes else n for i, n in enumerate(value.shape))


def make_static(values: tuple[Any, ...], padding: Padding | None, longer: Callable[[int], int]) -> list[Any]:
    """The arguments as tensors that stay, padded, with these values in them."""
    statics = list[Any]()
    for v, axes in zip(values, padding or ((),) * len(values), strict=True):
        if not isinstance(v, Tensor):
            statics.append(v)
            continue
        static = torch.zeros(longer_shape(v, axes, longer), dtype=v.dtype, device=v.device)
        with torch.no_grad():
            _fill(static, v, axes)
        statics.append(static.requires_grad_(v.requires_grad))
    return statics


def _fill(static: Tensor, value: Tensor, axes: tuple[int, ...]) -> None:
    """static = value, and after it along the axes what hides the rest: zeros, or in a mask of scores -inf."""
    if static.shape == value.shape:
        static.copy_(value)
        return
    part = static
    for axis in axes:
        part = part.narrow(axis, 0, value.shape[axis])
    part.copy_(value)
    for axis in axes:
        rest = static.narrow(axis, value.shape[axis], static.shape[axis] - value.shape[axis])
        if axis == 2:  # rows of padding see what they like: seeing nothing is NaN to some
            rest.fill_(True if rest.dtype == torch.bool else 0)
        else:
            rest.fill_(-math.inf if axis == 3 and rest.is_floating_point() else 0)


def _cut(t: Tensor, length: int, cut: bool) -> Tensor:
    return (t.narrow(1, 0, length) if cut and t.shape[1] != length else t).clone()
