"""CUDA graphs of a model's layers: `patch(model, cuda_graphs=True)`.

A *stack* is the module that calls a model's layers: BertEncoder, or LlamaModel, which makes its embeddings itself. Its
forward and its backward are captured once per shape and then replayed, with one launch each in place of hundreds.
Around it everything runs as before.

    call      the arguments are copied into static tensors, the forward graph runs, and the caller gets copies of the
              outputs: none is overwritten while somebody holds it
    backward  one autograd node for the whole stack. Its graph makes every gradient and gathers those of parameters in
              one tensor per dtype, of which autograd gets a copy: it may keep it as .grad and add to it

Dropout. Seeds are drawn inside the graph from torch's generator, which CUDA graphs move on at each replay as the plain
run would, so masks are fresh and torch.manual_seed rules them.

Lengths. Where the batch has a mask, its length is padded to the next bucket, the padding hidden and cut off again. That
this changes nothing is tried once on the model's trace; where it does, every length is captured by itself.

Memory. The graphs of a stack share one pool, so that it holds the largest one's activations, not all of them. A call
that comes while an earlier one waits for its backward therefore runs plainly; so does whatever else a graph cannot
serve. `Graphs.plain` counts such calls by reason: nothing falls back unseen.

A graph makes every gradient, also where only some of the stack's outputs were used: zeros, where autograd has None.

A graph is of one state of the stack: which modules and tensors it holds and where, what trains, modes, dropout rates,
adapters, the attention function. Another state drops the graphs. What is not watched: torch's global switches (TF32,
which SDPA kernels are allowed), and Python state that a module of an unknown kind changes by itself.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import backends, cuda_graph, meta
from ..ops import _seeds
from . import memory, pattern
from .replay import PLAIN, Graph, Padding, Ticket, Unservable, longer_shape, make_static, padding_of
from .trace import Call, Trace
from .watch import Watch

BUCKET = 32
MOST = 16
"""Graphs of one stack; the one that was not used for longest is dropped for the next."""

_FIRST = "of a shape for the first time"
"""Captured at its second call: a shape that comes once, or a number that is another each time, is not worth it."""

Lengths = bool | int | Sequence[int]


def check(value: Any, level: str) -> None:
    """Raises unless it is what `patch` takes as cuda_graphs beside this memory level."""
    lengths = [value] if isinstance(value, int) else value
    if not isinstance(lengths, (list, tuple)) or not all(isinstance(n, int) for n in lengths):
        raise TypeError(
            f"patch: cuda_graphs is {value!r}; accepted are True, False, a number of which lengths become a multiple, "
            "or a list of lengths"
        )
    if not isinstance(value, bool) and min(lengths, default=0) < 1:
        raise ValueError(f"patch: cuda_graphs is {value!r}; accepted are lengths of at least 1")
    if value and level in ("recompute", "checkpoint"):  # their backward sets the generator back, which no graph can
        raise ValueError(f"patch: cuda_graphs is {value!r} and memory {level!r}; accepted with it are exact, coded")


def away(model: nn.Module) -> str:
    """A parameter that is not where graphs are, and where it is; or ''."""
    kind = cuda_graph.Recorder.device_type
    return next((f"{n} is on {t.device}" for n, t in model.named_parameters() if t.device.type != kind), "")


def stacks(model: nn.Module, seen: Trace) -> dict[nn.Module, Call]:
    """The modules that call layers (of transformers' kind), outermost ones, and how they were called."""
    parents = {child: m for m in model.modules() for child in m.children()}
    found: dict[nn.Module, Call] = {}
    for layer in filter(memory.is_layer, model.modules()):
        above = parents.get(layer)
        while above is not None and above not in seen.calls:
            above = parents.get(above)
        if above is not None:
            found[above] = seen.calls[above]
    inner = {m for stack in found for m in stack.modules() if m is not stack}
    return {stack: call for stack, call in found.items() if stack not in inner}


def bound(module: nn.Module) -> bool:
    return pattern.GRAPHS in module.__dict__


def of(model: nn.Module) -> dict[str, Graphs]:
    """Path of the stack -> its graphs."""
    return {path: m.__dict__[pattern.GRAPHS] for path, m in model.named_modules() if bound(m)}


def set_graphs(model: nn.Module, lengths: Lengths, found: dict[nn.Module, Call]) -> None:
    """Gives these stacks graphs and takes them off all others. One that has them with these lengths keeps its own."""
    for path, module in model.named_modules():
        if bound(module) and (module not in found or module.__dict__[pattern.GRAPHS].lengths != lengths):
            unbind(module)
        if module in found and not bound(module):
            module.__dict__[pattern.GRAPHS] = Graphs(path, lengths, *_try_padding(module, found[module]))
            pattern.frame(module, _forward)


def unbind(module: nn.Module) -> None:
    module.__dict__.pop(pattern.GRAPHS).end()
    if pattern.framed(module) and pattern.around(module) is _forward:
        pattern.unframe(module)


def _forward(module: nn.Module, parts: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return own(*args, **kwargs)
    return module.__dict__[pattern.GRAPHS].run(module, own, args, kwargs)


class Graphs:
    """The graphs of one stack, and what became of its calls.

    Attributes: path, of the stack in its model. replayed, captured: calls, graphs ever made. plain: reason -> calls
    that ran without a graph. exact: why lengths are not padded, or ''. A copy or a pickle has no graphs and no counts.
    """

    def __init__(self, path: str, lengths: Lengths, cut: tuple[bool, ...] | None, exact: str) -> None:
        self.path, self.lengths, self.exact = path, lengths, exact
        self.replayed, self.captured, self.plain = 0, 0, Counter[str]()
        self._cut = cut
        self._names: tuple[str, ...] | None = None
        self._watch: Watch | None = None
        self._state: Any = None
        self._last: Callable[[], Ticket | None] = lambda: None
        self.forget()

    def __reduce__(self) -> Any:
        return Graphs, (self.path, self.lengths, self._cut, self.exact)

    @property
    def bytes(self) -> int:
        """What the graphs hold now: static tensors, and what capturing added to the pool."""
        return sum(g.bytes for g in self._graphs.values() if isinstance(g, Graph))

    def __str__(self) -> str:
        held = [g for g in self._graphs.values() if isinstance(g, Graph)]
        plain = ", ".join(f"{count} {reason}" for reason, count in self.plain.most_common())
        text = f"CUDA graphs of {self.path or 'the model'}: {len(held)} of {self.bytes / 2**20:.1f} MiB together, "
        text += f"{self.replayed} calls replayed" + (f"; run plainly: {plain}" if plain else "")
        return text + (f"; every length by itself: {self.exact}" if self.exact else "")

    def forget(self) -> None:
        """Drops the graphs. Their memory is free as soon as no backward waits for them."""
        self._graphs: OrderedDict[Any, Graph | str] = OrderedDict()
        self._recorder: cuda_graph.Recorder | None = None

    def end(self) -> None:
        """Nothing is held any more, whoever keeps the report."""
        self.forget()
        self._watch = self._state = None

    def run(self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        graph = self._graph(module, own, args, kwargs)
        if isinstance(graph, str):
            self.plain[graph] += 1
            return own(*args, **kwargs)
        self.replayed += 1
        ticket = Ticket()
        self._last = weakref.ref(ticket)
        return graph.call(ticket, (*args, *kwargs.values()))

    def _graph(self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Graph | str:
        """The graph for this call, captured if need be, or why there is none."""
        if not module.training:
            return "in evaluation"
        if not torch.is_grad_enabled():
            return "without gradients"
        if self._names is None:
            self._names = _names(module)
        names, values = (*self._names[: len(args)], *kwargs), (*args, *kwargs.values())
        reason = _unfit_call(names, values)
        if reason:
            return reason
        if self._watch is None or self._watch.stale():
            self._watch, self._state = Watch(module), None
        reason = self._watch.unfit()
        if reason:
            return reason
        state = self._watch.state()
        if state != self._state:
            self.forget()
            self._state = state
        waiting = self._last()
        if waiting is not None and not waiting.spent:
            return "while an earlier call waits for its backward"
        padding = padding_of(names, values) if self._cut is not None else None
        key = _key(names, values, padding, self._longer)
        graph = self._graphs.get(key)
        if graph is None:
            self._graphs[key] = graph = _FIRST
            self._drop_oldest()
        elif graph is _FIRST:
            graph = self._graphs[key] = self._capture(own, len(args), names, values, padding)
            self._drop_oldest(but=key)
        self._graphs.move_to_end(key)
        return graph

    def _longer(self, length: int) -> int:
        """The length of the bucket."""
        assert self._watch is not None
        if isinstance(self.lengths, Sequence):
            longer = min((n for n in self.lengths if n >= length), default=length)
        else:
            step = BUCKET if self.lengths is True else self.lengths
            longer = -(-length // step) * step
        return max(length, min(longer, self._watch.positions or longer))  # no position that has no embedding

    def _drop_oldest(self, but: Any = None) -> None:
        held = [key for key, graph in self._graphs.items() if isinstance(graph, Graph)]
        if len(held) > MOST:
            del self._graphs[next(key for key in held if key != but)]
        if len(self._graphs) > 16 * MOST:  # shapes seen once
            del self._graphs[next(iter(self._graphs))]

    def _capture(
        self, own: Callable[..., Any], places: int, names: tuple[str, ...], values: Any, padding: Padding | None
    ) -> Graph | str:
        device = next(v.device for v in values if isinstance(v, Tensor))
        self._recorder = self._recorder or cuda_graph.Recorder(device)
        assert self._watch is not None
        cut = self._cut if padding is not None else None
        statics = make_static(values, padding, self._longer)
        try:
            graph = Graph(self.path, own, places, names, statics, padding, cut, self._watch, self._recorder)
        except Unservable as error:
            return str(error)
        except Exception as error:
            given = ", ".join(
                f"{n} {tuple(v.shape)}" for n, v in zip(names, statics, strict=True) if torch.is_tensor(v)
            )
            why = error.__context__ or error  # torch's own error says only that the capture failed
            raise RuntimeError(
                f"cuda_graphs: {self.path or 'the model'} cannot be captured with {given}: {why}. "
                "Start again with cuda_graphs=False: after a capture that failed torch draws no more random numbers"
            ) from error
        self.captured += 1
        return graph


def _names(module: nn.Module) -> tuple[str, ...]:
    taken = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _unfit_call(names: tuple[str, ...], values: tuple[Any, ...]) -> str:
    kind, some = cuda_graph.Recorder.device_type, False
    if len(names) != len(values):
        return "with more positional arguments than its forward names"
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Tensor):
            some = True
            if value.device.type != kind:
                return f"on {value.device.type}"
            if type(value) not in (Tensor, nn.Parameter):
                return f"whose {name} is a {type(value).__name__}"
        elif type(value) not in PLAIN:
            return f"whose {name} is a {type(value).__name__}"
    if not some:
        return "without a tensor"
    if cuda_graph.Recorder.recording():
        return "inside a capture of somebody else's"
    if _seeds.packed():
        return "in a packed run, whose replicas draw from generators of their own"
    if backends._modes() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "under a dispatch mode or hooks on saved tensors"
    return ""


def _key(names: tuple[str, ...], values: tuple[Any, ...], padding: Padding | None, longer: Callable[[int], int]) -> Any:
    kind = cuda_graph.Recorder.device_type
    parts = [
        (longer_shape(v, axes, longer), v.dtype, v.requires_grad) if isinstance(v, Tensor) else (type(v), v)
        for v, axes in zip(values, padding or itertools.repeat(()), strict=False)
    ]
    return names, padding, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), *parts


def _try_padding(module: nn.Module, call: Call) -> tuple[tuple[bool, ...] | None, str]:
    """For each tensor that the stack gives whether padding is to be cut off it, or None and why lengths stay as they
    are: run on the traced call, whose mask hides its last token, with and without padding."""
    names = (*_names(module)[: len(call.args)], *call.kwargs)
    values = (*call.args, *call.kwargs.values())
    device = next((v.device for v in values if isinstance(v, Tensor)), None)
    if len(names) != len(values) or device is None:
        return None, "it is called in a way that is not known"
    padding = padding_of(names, values)
    if padding is None:
        return None, "its batch has no mask that could hide padding"
    twin, at = pattern.bare(module), len(call.args)
    longer = make_static(values, padding, lambda n: n + 3)
    try:
        with torch.no_grad(), meta.no_autocast(device):
            runs = [
                [t for t in pytree.tree_leaves(twin(*given[:at], **dict(zip(names[at:], given[at:], strict=True))))
                 if isinstance(t, Tensor)]
                for given in (values, longer)
            ]  # fmt: skip
        cut = tuple(own.shape != padded.shape for own, padded in zip(*runs, strict=True))
        shorter = [p[:, : o.shape[1]] if c else p for o, p, c in zip(*runs, cut, strict=True)]
    except Exception as error:  # the report carries the reason
        return None, f"it does not take padding: {type(error).__name__}: {error}"
    reason = next(filter(None, map(pattern.difference, runs[0], shorter)), "")
    if reason:
        return None, f"padding changes its result: {reason}"
    return cut, ""
