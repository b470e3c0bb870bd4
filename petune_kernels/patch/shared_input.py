"""Pattern `shared_input`: projections that read the same x (query, key and value; gate and up) run as one op, where one
of them has an adapter or trains, or the op is faster than torch's own linear.

Which projections share x is seen in the model's trace, not guessed from names: siblings that were called with the same
tensor. Each stays a module that is called, hooks and all; the first one called computes all of them, and the others
find their result under the very same x. Called with anything else, a projection computes its own, so a model that does
something the trace did not show still gets what it asked for.

One op for all: one read of x for every rank-r product, dx accumulated by the matmuls instead of added up afterwards.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import meta
from ..ops import _frames as frames
from ..ops import _saving as saving
from ..ops.frozen_linear import faster
from ..ops.lora_linear import Projection, project
from . import linear, lora, pattern
from .pattern import Pattern
from .trace import Trace


class Pending:
    """What one projection has computed for others of its group. They may take it while x, the weights and whether
    gradients are recorded are as they were. It holds no x, and what is left goes with x: who is no longer called, or
    was not because of an exception, leaves nothing behind."""

    def __init__(self, x: Tensor, left: dict[nn.Module, Tensor | None], found: list[tuple[nn.Module, Projection]]):
        self.left, self._recording = left, torch.is_grad_enabled()
        self._compiled: Tensor | None = None
        self._read: list[tuple[Tensor, int]] = []
        if torch.compiler.is_compiling():
            self._compiled = x
            return
        self._x, self._version = weakref.ref(x, lambda _: left.update(dict.fromkeys(left))), x._version
        for _, it in found:
            self._read += [(t, t._version) for t in it[:5] if t is not None and not t.is_inference()]

    def of(self, x: Tensor) -> bool:
        return self._compiled is x if torch.compiler.is_compiling() else self._x() is x

    def fresh(self, x: Tensor) -> bool:
        if not torch.compiler.is_compiling() and x._version != self._version:
            return False
        for t, version in self._read:
            if t._version != version:
                return False
        return torch.is_grad_enabled() == self._recording


class Group:
    """The projections in the order of their calls, and what the first of them has left for the others. Each thread has
    its own: another may run the same model at the same time, and autograd's threads, in which a layer may run again,
    must start with nothing left, as forward does.

    idle: those for which something was left that they did not take. Nothing is computed for them until they are called
    again. Under hooks on saved tensors that stays as it is: a checkpoint must save the same when it runs again."""

    def __init__(self, modules: tuple[nn.Module, ...]):
        self.modules, self.idle = modules, frozenset[nn.Module]()
        self._compiled: Pending | None = None
        self._threads = threading.local()

    @property
    def pending(self) -> Pending | None:
        return self._compiled if torch.compiler.is_compiling() else getattr(self._threads, "pending", None)

    @pending.setter
    def pending(self, pending: Pending | None) -> None:
        if torch.compiler.is_compiling():
            self._compiled = pending
        else:
            self._threads.pending = pending

    def members(self) -> Sequence[nn.Module]:
        """For whom the first of them computes now."""
        if not self.idle or torch.compiler.is_compiling():
            return self.modules
        return [m for m in self.modules if m not in self.idle]

    def see(self, called: nn.Module, pending: Pending | None) -> None:
        """One was called for which nothing was left."""
        if torch.compiler.is_compiling():
            return
        untaken = set[nn.Module]()
        if pending is not None and called is self.modules[0]:
            untaken.update(pending.left)
            self.pending = None
        if saving.under.now() is None:
            self.idle = (self.idle | untaken) - {called}

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _leaves(x: Tensor) -> bool:
    """Whether results may be left for the others: not where x has no version that tells a change (in inference mode),
    nor in what torch.compile traces as an operator of its own (a checkpoint), which may have no side effects."""
    return not _in_operator() if torch.compiler.is_compiling() else not x.is_inference()


@torch.compiler.assume_constant_result
def _in_operator() -> bool:
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except (ImportError, AttributeError):  # another torch's compiler
        return True


def is_projection(module: nn.Module) -> bool:
    return type(module) is nn.Linear or lora.is_layer(module)


def projection(module: nn.Module) -> Projection | None:
    return linear.projection(module) if type(module) is nn.Linear else lora.projection(module)


def groups(model: nn.Module, trace: Trace) -> list[tuple[nn.Module, ...]]:
    """Siblings called equally often with the same single argument, at least two, in the order of their calls."""
    place = {module: i for i, module in enumerate(trace.calls)}
    found: list[tuple[nn.Module, ...]] = []
    for parent in model.modules():
        if lora.is_layer(parent):
            continue
        by_input: dict[tuple[int, int], list[nn.Module]] = {}
        for child in parent._modules.values():
            call = trace.calls.get(child) if child is not None else None
            if call is None or call.kwargs or len(call.args) != 1 or projection(child) is None:  # type: ignore[arg-type]
                continue
            by_input.setdefault((id(call.args[0]), call.times), []).append(child)  # type: ignore[arg-type]
        found += [tuple(sorted(set(g), key=place.__getitem__)) for g in by_input.values() if len(set(g)) > 1]
    return found


def verify(modules: tuple[nn.Module, ...]) -> str:
    """'' where the group gives what its members give one by one, else what differs."""
    found = [projection(m) for m in modules]
    first = found[0]
    assert first is not None
    if first.w.is_meta:
        return ""
    generator = torch.Generator(first.w.device).manual_seed(0)
    with torch.no_grad(), meta.no_autocast(first.w.device):
        x = pattern.random_rows(first.w, first.w.shape[1], generator)
        twins = tuple(pattern.bare(m) for m in modules)
        together, group = [], Group(twins)
        with torch.enable_grad():  # as in training
            for twin in twins:
                together.append(_forward(twin, group, x).detach())
        own = [type(twin).forward(twin, x) for twin in twins]
    return "; ".join(filter(None, map(pattern.difference, own, together)))


def _forward(module: nn.Module, group: Group, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1:
        return type(module).forward(module, *args, **kwargs)
    (x,) = args
    pending = group.pending
    if pending is not None and module in pending.left and pending.of(x):
        own_y, fresh = pending.left.pop(module), pending.fresh(x)
        if not pending.left or not fresh:
            group.pending = None
        if fresh:
            return own_y
    first = module is group.modules[0]
    if group.idle or (first and pending is not None):
        group.see(module, pending)
    members = group.members() if first and _leaves(x) else (module,)
    found: list[tuple[nn.Module, Projection]] = []
    own, gains = None, False
    for member in members:
        it = projection(member)
        if it is not None:
            found.append((member, it))
            gains = gains or _gains(it, x)
            own = it if member is module else own
    if own is not None and not gains:
        return linear.run(own.w, own.bias, x)
    if own is None or not own.takes(x):
        return type(module).forward(module, x)
    found = [(member, it) for member, it in found if it.takes(x)]
    if len(found) == 1 and own.a is None:
        return linear.run(own.w, own.bias, x)
    made = project(x, [it for _, it in found])
    left: dict[nn.Module, Tensor | None] = dict(zip([member for member, _ in found], made, strict=True))
    y = left.pop(module)
    if left or group.pending is not None:  # a compiler takes even None for a change
        group.pending = Pending(x, left, found) if left else None
    return y


def _gains(it: Projection, x: Tensor) -> bool:
    """Whether one op for the whole group is better for this projection than its own matmul.

    The answer must be the same when the layer runs again in backward, because one op sums dx in another order. So for a
    weight that trains it does not ask, as `linear.run` does, whether x can be made again."""
    if it.a is not None:
        return True
    trains = it.w.requires_grad and frames.recording()  # a model that generates has no use for the op's graph
    return trains or faster(x, it.w, it.bias)


PATTERN = Pattern("shared_input", _forward)
