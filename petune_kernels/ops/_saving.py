"""What a Function keeps for backward, and how it gets back what it does not keep.

A *recipe* makes a tensor again from tensors that are kept anyway: h = act(u + bias) from u, y = gamma xhat + beta from
the row a norm keeps. The op that makes such a tensor says so (`describe`); whoever needs the tensor in its backward
keeps the recipe instead (`known`), so that x of a projection costs nothing beside the norm or the activation before it.

A slot of a frame (_frames.py) is a recipe, too: what it needs is the input of a part of the model.

Everything that a Function keeps goes through save_for_backward, as leaves of recipes if need be: hooks on saved tensors
see all of it, and the graph holds nothing in secret. Under torch.compile there are no recipes and no frames: what is
kept and what is made again is the compiler's to decide.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

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


under = _Under()


def save(ctx: Any, *items: Item) -> None:
    """save_for_backward for tensors, None and recipes; `load` gives them back in the same order."""
    for item in items:
        if isinstance(item, Recipe):
            break
    else:
        ctx.save_for_backward(*items)
        ctx.bare = None
        return
    leaves: list[Tensor | None] = []
    bare: list[Recipe | None] = []
    for item in items:
        if isinstance(item, Recipe):
            leaves.extend(item.leaves())
            bare.append(item.bare())
        else:
            leaves.append(item)
            bare.append(None)
    kept = {id(leaf): leaf for leaf in leaves}  # each once: hooks on saved tensors would move it as often as it is kept
    place = {key: n for n, key in enumerate(kept)}
    ctx.save_for_backward(*kept.values())
    ctx.bare, ctx.order = bare, [place[id(leaf)] for leaf in leaves]


def load(ctx: Any) -> Sequence[Any]:
    if ctx.bare is None:
        return ctx.saved_tensors
    saved = ctx.saved_tensors
    kept = iter([saved[n] for n in ctx.order])
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
        made = _owner(t).__dict__[_RECIPE] = _Made(recipe, t._version, under.now())
        if made.hooks is not None:
            under.made.add(made)


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
    if not isinstance(made, _Made) or made.version != owner._version or made.hooks is not under.now():
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
