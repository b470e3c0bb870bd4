"""What a Function keeps for backward, and how it gets back what it does not keep.

A *recipe* makes a tensor again from tensors that are kept anyway: h = act(u + bias) from u, y = gamma xhat + beta from
the row a norm keeps. The op that makes such a tensor says so (`describe`); whoever needs the tensor in its backward
keeps the recipe instead (`known`), so that x of a projection costs nothing beside the norm or the activation before it.

A *frame* is a part of a model that backward runs again: an attention module, a feed-forward block, a whole layer. An op
inside one keeps *slots* instead of its tensors. The first slot that is asked for runs the part again, without
gradients, from the same input, random state and autocast, up to the last tensor wanted, and fills all of its slots.

Everything that a Function keeps goes through save_for_backward, as leaves of recipes if need be: hooks on saved tensors
see all of it, and the graph holds nothing in secret. Under torch.compile there are no recipes and no frames: what is
kept and what is made again is the compiler's to decide.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _seeds

_RECIPE = "_petune_recipe"


class Recipe:
    """A tensor as make(*parts). A part is a tensor or None, which is kept, or another recipe. `make` holds none."""

    __slots__ = ("make", "parts", "count", "framed")

    def __init__(self, make: Callable[..., Any], *parts: Item) -> None:
        self.make, self.parts, self.count, self.framed = make, parts, len(parts), False
        for part in parts:
            if isinstance(part, Recipe):
                self.count += part.count - 1
                self.framed |= part.framed

    def leaves(self) -> Iterator[Tensor | None]:
        for part in self.parts:
            if isinstance(part, Recipe):
                yield from part.leaves()
            else:
                yield part

    def bare(self) -> Recipe:
        """The same recipe without its tensors."""
        return Recipe(self.make, *(part.bare() if isinstance(part, Recipe) else None for part in self.parts))

    def again(self, kept: Iterator[Tensor | None]) -> Any:
        """The tensor, from the leaves in their order."""
        return self.make(*(part.again(kept) if isinstance(part, Recipe) else next(kept) for part in self.parts))


Item = Tensor | Recipe | None


class _Made:
    """A tensor's recipe, with the tensor's version and what stands for the hooks under which it was made."""

    __slots__ = ("recipe", "version", "hooks", "__weakref__")

    def __init__(self, recipe: Recipe, version: int, hooks: object) -> None:
        self.recipe: Recipe | None = recipe
        self.version, self.hooks = version, hooks

    def __reduce__(self) -> Any:
        return set, ()  # a tensor that is pickled or copied forgets how it was made; weights-only loading knows a set


class _Under(threading.local):
    """Which hooks on saved tensors are in force in this thread.

    A recipe is used only while the hooks are in force under which it was made, and is forgotten when they change.
    torch's checkpoint works by such hooks: what comes into a checkpointed part is another tensor when the part runs
    again, so a recipe from outside would not be found then; and a recipe from inside would keep alive outside what the
    checkpoint is there to drop."""

    def __init__(self) -> None:
        self.hooks: Callable[[], object] = lambda: None
        self.token: object = None
        self.made: weakref.WeakSet[_Made] = weakref.WeakSet()

    def now(self) -> object:
        """An object that stands for the hooks in force, None without any. If they changed, recipes are forgotten."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack = None if top is None else top[0]
        if pack is not self.hooks() or (pack is None and self.token is not None):  # or they are gone
            for made in list(self.made):
                made.recipe = None
            self.made = weakref.WeakSet()
            self.hooks, self.token = (lambda: None, None) if pack is None else (_weak(pack), object())
        return self.token


def _weak(hook: Any) -> Callable[[], object]:
    try:
        return weakref.ref(hook)
    except TypeError:  # a callable of somebody's own
        return lambda: hook


_under = _Under()


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


def save(ctx: Any, *items: Item) -> None:
    """save_for_backward for tensors, None and recipes; `load` gives them back in the same order."""
    for item in items:
        if isinstance(item, Recipe):
            break
    else:
        ctx.save_for_backward(*items)
        ctx.bare = None
        return
    kept: list[Tensor | None] = []
    bare: list[Recipe | None] = []
    for item in items:
        if isinstance(item, Recipe):
            kept.extend(item.leaves())
            bare.append(item.bare())
        else:
            kept.append(item)
            bare.append(None)
    ctx.save_for_backward(*kept)
    ctx.bare = bare


def load(ctx: Any) -> Sequence[Any]:
    if ctx.bare is None:
        return ctx.saved_tensors
    kept = iter(ctx.saved_tensors)
    return [next(kept) if recipe is None else recipe.again(kept) for recipe in ctx.bare]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that has no derivative, and says so at once: torch's own guard, where dy needs no gradient (the sum of
    outputs), lets a second derivative through that lacks what this one would add."""
    op = backward.__qualname__.partition(".")[0].lstrip("_")

    @functools.wraps(backward)
    def wrapper(ctx: Any, *dy: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{op}: backward with create_graph=True, and this op has no second derivative; of a patched model "
                "pk.unpatch(model) gives stock's"
            )
        return backward(ctx, *dy)

    return wrapper


def describe(t: Tensor, recipe: Recipe) -> None:
    """Says how t, just made, can be made again. Forgotten as soon as t is changed in place; what goes past autograd's
    version counter (t.data, t.numpy()) is not seen."""
    if not torch.compiler.is_compiling():
        made = _owner(t).__dict__[_RECIPE] = _Made(recipe, t._version, _under.now())
        if made.hooks is not None:
            _under.made.add(made)


def small(t: Tensor | None) -> Tensor | None:
    """A vector of parameters as part of a recipe: a copy where processes share the work, since FSDP takes a parameter's
    memory away before the module that made y is done with it, and y may be made again in another module's backward."""
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    return t.detach().clone() if t is not None and shared else t


def known(t: Tensor) -> Item:
    """The recipe of t, also where t is a view of what was described; t itself if it has none."""
    if torch.compiler.is_compiling():
        return t
    owner = _owner(t)
    made = owner.__dict__.get(_RECIPE)
    if not isinstance(made, _Made) or made.version != owner._version or made.hooks is not _under.now():
        return t
    recipe = made.recipe
    if recipe is None:
        return t
    if owner is t:
        return recipe
    size, stride, offset = t.size(), t.stride(), t.storage_offset()
    return Recipe(lambda made: made.as_strided(size, stride, offset), recipe)


def can_be_made(t: Tensor) -> bool:
    """Whether keeping t for a gradient costs nothing."""
    return torch.is_grad_enabled() and isinstance(known(t), Recipe)


def _owner(t: Tensor) -> Tensor:
    """The tensor whose memory t views; what is made again has that memory's layout."""
    return t if t._base is None else t._base


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


def place() -> Place | None:
    """The next place in the frame that is running, which ops take in the same order each time; None outside one."""
    frame = _running.frame
    if frame is None:
        return None
    frame.passed += 1
    return Place(frame, frame.passed)


def whole_layer() -> bool:
    """Whether the frame that is running is a layer, of which nothing but the last row is kept."""
    return _running.frame is not None and _running.frame.whole


def decided(choice: bool) -> bool:
    """`choice`. In a frame that runs again, what it was in forward: gradients are off by then, and the frame must take
    the same path."""
    frame = _running.frame
    if frame is None:
        return choice
    if not frame.again:
        frame.choices.append(choice)
        return choice
    frame.chosen += 1
    return frame.choices[frame.chosen - 1]


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
        self.passed = self.chosen = 0
        self.choices: list[bool] = []
        self.wanted: Counter[int] = Counter()
        self.left: dict[int, tuple[Sequence[Tensor | None], int]] = {}
        self.again = False

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
        self.again, self.passed, self.chosen, self.left = True, 0, 0, {}
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.part.restored())
                stack.enter_context(torch.no_grad())
                stack.enter_context(_seeds.rewound(self.device, self.state))
                for setting in self.autocast:
                    stack.enter_context(torch.autocast(**setting))
                self.call(*args, **kwargs)
            raise RuntimeError(
                f"backward ran {self.part.name} again, and it took another path than in forward: a model with "
                "memory='recompute' or 'checkpoint' must do the same with the same input. Use memory='exact'"
            )
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
