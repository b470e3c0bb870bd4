"""Parts of a model that backward runs again instead of keeping what they made.

Such a part is a *frame*: an attention module, a feed-forward block, a whole layer. An op inside one keeps *slots*
instead of its tensors. The first slot that is asked for runs the part again, without gradients, from the same input,
random state and autocast, up to the last tensor wanted, and fills all of its slots.

Under torch.compile there are none: what is kept and what is made again is the compiler's to decide.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _seeds
from ._saving import Item, Recipe, known, under


class Slot(Recipe):
    """Tensor `index` of what an op leaves at `place` when its frame runs again, from the frame's inputs."""

    __slots__ = ("frame", "place", "index")

    def __init__(self, frame: Frame, place: int, index: int, inputs: Recipe) -> None:
        super().__init__(frame.fetch, inputs)
        self.frame, self.place, self.index, self.framed = frame, place, index, True

    def leaves(self) -> Iterator[Tensor | None]:
        self.frame.wanted[self.place] += 1
        return super().leaves()

    def bare(self) -> Slot:
        return Slot(self.frame, self.place, self.index, self.parts[0].bare())  # type: ignore[union-attr]

    def again(self, kept: Iterator[Tensor | None]) -> Any:
        return self.frame.fetch(self.place, self.index, list(itertools.islice(kept, self.count)))


class Place:
    """Where an op stands in its frame."""

    def __init__(self, frame: Frame, number: int) -> None:
        self.frame, self.number = frame, number

    def slots(self, count: int) -> list[Slot]:
        """For the op to keep instead of the `count` tensors that it will leave here."""
        return [Slot(self.frame, self.number, i, self.frame.inputs) for i in range(count)]

    def leave(self, *tensors: Tensor | None) -> None:
        """What the slots of this place stand for. The frame stops here if it wants nothing after it."""
        self.frame.leave(self.number, tensors)


def place(op: str) -> Place | None:
    """The next place in the frame that is running, which ops take in the same order each time. None outside one, and
    under hooks on saved tensors that came after it began: a checkpoint inside it runs its part again by itself."""
    frame = _running.frame
    if frame is None or torch.compiler.is_compiling():
        return None
    found = frame.step(op if frame.again or under.now() is frame.hooks else None)
    if found not in (op, None):
        raise frame.another_path()
    return None if found is None else Place(frame, frame.passed)


def whole_layer() -> bool:
    """Whether the frame that is running is a layer, of which nothing but the last row is kept."""
    return _running.frame is not None and _running.frame.whole


def decided(choice: bool) -> bool:
    """`choice`. In a frame that runs again, what it was in forward: gradients are off by then, and the frame must take
    the same path."""
    frame = _running.frame
    if frame is None or torch.compiler.is_compiling():
        return choice
    found = frame.step(choice)
    if not isinstance(found, bool):
        raise frame.another_path()
    return found


def recording() -> bool:
    """Whether gradients are recorded, or were when the frame ran that runs again."""
    return torch.is_grad_enabled() or (not torch.compiler.is_compiling() and _running.frame is not None)


class _Running(threading.local):
    frame: Frame | None = None


_running = _Running()


class _Enough(BaseException):
    """Every tensor that a frame is asked for is there."""


def _kept_elsewhere(t: Tensor) -> Item:
    """The recipe of t if it needs no other frame, which would need one before it, and so on; else t."""
    recipe = known(t)
    return t if isinstance(recipe, Recipe) and recipe.framed else recipe


class Remembered(Protocol):
    """What a frame's part of a model was."""

    name: str

    def restored(self) -> contextlib.AbstractContextManager[None]:
        """Within it the part is that again."""


class Frame:
    """One run of a part of a model: call(*args, **kwargs)."""

    def __init__(
        self, call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], part: Remembered, whole: bool
    ) -> None:
        flat, spec = pytree.tree_flatten((args, dict(kwargs)))
        distinct = {id(value): value for value in flat if isinstance(value, Tensor)}  # one that is given twice is one
        order = {key: n for n, key in enumerate(distinct)}
        places = [(i, order[id(value)]) for i, value in enumerate(flat) if isinstance(value, Tensor)]
        others = [None if isinstance(value, Tensor) else value for value in flat]

        def arguments(*made: Tensor) -> Any:
            values = list(others)
            for i, n in places:
                values[i] = made[n]
            return pytree.tree_unflatten(values, spec)

        self.call, self.part, self.whole = call, part, whole
        self.inputs = Recipe(arguments, *map(_kept_elsewhere, distinct.values()))
        self.device = next(iter(distinct.values())).device
        self.state = _seeds.state(self.device)
        self.autocast: list[dict[str, Any]] = [
            dict(device_type=kind, enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys(("cpu", self.device.type))
            if kind != "meta"
        ]
        self.hooks = under.now()
        self.passed = 0
        self.path: list[str | bool | None] = []
        self.wanted: Counter[int] = Counter()
        self.left: dict[int, tuple[Sequence[Tensor | None], int]] = {}
        self.again = False

    def step(self, taken: str | bool | None) -> str | bool | None:
        """What is taken next on the frame's path: `taken`, or what that was in forward."""
        self.passed += 1
        if not self.again:
            self.path.append(taken)
        elif self.passed > len(self.path):
            raise self.another_path()
        return self.path[self.passed - 1]

    def another_path(self) -> RuntimeError:
        return RuntimeError(
            f"backward ran {self.part.name} again, and it took another path than in forward: a model with "
            "memory='recompute' or 'checkpoint' must do the same with the same input. Use memory='exact'"
        )

    def leave(self, number: int, tensors: Sequence[Tensor | None]) -> None:
        if self.again and number in self.wanted:
            self.left[number] = tensors, self.wanted[number]
            if len(self.left) == len(self.wanted):
                raise _Enough

    def fetch(self, number: int, index: int, kept: list[Tensor | None]) -> Tensor | None:
        """A tensor that was left at a place. What everybody has fetched is forgotten."""
        if number not in self.left:
            self._run_again(kept)
        tensors, times = self.left.pop(number)
        if times > 1:
            self.left[number] = tensors, times - 1
        return tensors[index]

    def _run_again(self, kept: list[Tensor | None]) -> None:
        args, kwargs = self.inputs.again(iter(kept))
        before, _running.frame = _running.frame, self
        self.again, self.passed, self.left = True, 0, {}
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.part.restored())
                stack.enter_context(torch.no_grad())
                stack.enter_context(_seeds.rewound(self.device, self.state))
                for setting in self.autocast:
                    stack.enter_context(torch.autocast(**setting))
                self.call(*args, **kwargs)
            raise self.another_path()
        except _Enough:
            pass
        finally:
            self.again, _running.frame = False, before


def framed(
    call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], remember: Callable[[], Remembered],
    whole: bool = False,
) -> Any:  # fmt: skip
    """call(*args, **kwargs), as a frame where gradients are recorded and a frame can keep every argument."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _running.frame is not None:
        return call(*args, **kwargs)
    flat = pytree.tree_leaves((args, dict(kwargs)))
    if not any(isinstance(value, Tensor) for value in flat):
        return call(*args, **kwargs)
    if not all(value is None or isinstance(value, (Tensor, bool, int, float, str)) for value in flat):
        return call(*args, **kwargs)  # a cache, say, which a second run would fill a second time
    frame = _running.frame = Frame(call, args, kwargs, remember(), whole)
    try:
        return call(*args, **kwargs)
    finally:
        _running.frame = None
        frame.inputs = frame.inputs.bare()


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Within it no frame is running: what is made here is kept."""
    frame, _running.frame = _running.frame, None
    try:
        yield
    finally:
        _running.frame = frame
