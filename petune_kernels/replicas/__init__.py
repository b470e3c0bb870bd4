"""Many runs at once over one frozen backbone: `replicate` gives what trains a leading replica axis G.

    pk.tune(model, "layernorm")                       # or PEFT: what trains
    runs = pk.replicate(model, seeds=range(20))       # initial values, dropout: a seed each
    optimizers = [torch.optim.AdamW(runs.parameters(g), lr=1e-3) for g in runs.active]
    for batches in zip(*loaders):                     # a batch of each replica, all of one shape
        logits = runs.split(model(**runs.stack(batches)).logits)
        torch.stack([cross_entropy(logits[i], labels(b)) for i, b in enumerate(batches)]).sum().backward()
        for g in runs.active:
            clip_grad_norm_(runs.parameters(g), 1.0)
            optimizers[g].step(), optimizers[g].zero_grad()
    runs.replica(3).save_pretrained(folder)           # an ordinary model

The frozen weights see one batch of G x B rows; a replica's own parameters are rows of the packed ones, so that an
ordinary optimizer, schedule and norm for each replica do what they do in a solo run, to rounding, with the same dropout
masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _seeds
from ..patch import attention, patch, pattern, unpatch
from . import bind as binding
from . import initial
from .check import check, twin

Init = str | Callable[[nn.Module, int], None]

_MIXED = "labels are given; a loss over the whole batch mixes replicas: make one of each's logits"
_LOSS_OF_ALL = ("labels", "label", "label_ids", "start_positions", "end_positions")


_SAVE = "save_pretrained"


class ReplicaError(RuntimeError):
    """A model that cannot be packed, with the reason, or a packed model used as it cannot be."""


def replicate(
    model: nn.Module, seeds: Iterable[int | tuple[int, int]], *, init: Init = "draw", memory: str = "exact"
) -> Replicas:
    """Packs one training run for each seed into `model`, whose frozen parameters they share.

    Choose what trains first (`pk.tune`, PEFT). Every trainable parameter p becomes one Parameter [G, *p.shape], the
    model is patched where it is not yet, and its forward then takes batches with every replica's rows, replica after
    replica. Whatever trains must run in a module whose forward takes a replica axis: LayerNorms, biases, linear layers,
    PEFT's LoRA and prefix do. That every replica computes what it would alone is checked on a short input.
    Save a run by `replica(g)`: the packed model's own state has every parameter G times. An optimizer's step between a
    forward and its backward is not noticed, as it is in a solo run, and gives wrong gradients.

    Args:
        model: a transformers or PEFT model.
        seeds: one entry a replica: (wi, do), or an int for both. wi decides initial values; do decides dropout, as
            torch.manual_seed(do) before a solo run would.
        init: "draw" draws the head, LoRA's factors and a prefix anew from wi and leaves everything else; "keep" starts
            every replica from the model's values; a function is called as init(model, wi) after torch.manual_seed(wi)
            and sets values of trainable parameters in place.
        memory: what is kept for backward, as in `patch`.

    Returns:
        Replicas: the runs' parameters, batches and results.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
        PatchError: nothing in the model can be patched.
        ReplicaError: something trains that cannot be packed, or draws random numbers that are no replica's own. The
            model is then as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replicate: model is {type(model).__name__}; accepted is a torch.nn.Module")
    if not isinstance(seeds, Iterable) or isinstance(seeds, str):
        raise TypeError(f"replicate: seeds is {seeds!r}; accepted is one entry a replica: ints or (wi, do)")
    pairs = [_pair(s) for s in seeds]
    if not pairs:
        raise ValueError("replicate: seeds is empty; accepted is at least one")
    if not (callable(init) or init in ("draw", "keep")):
        raise ValueError(f"replicate: init is {init!r}; accepted are 'draw', 'keep' and a function of (model, wi)")
    if "forward" in model.__dict__:
        raise ReplicaError("replicate: the model's forward was replaced on the instance (is it packed already?)")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ReplicaError("replicate: no parameter requires a gradient; choose what trains first")
    before, attending = pattern.bindings(model), any(map(attention.bound, model.modules()))
    report = patch(model, memory=memory)
    undo = functools.partial(_undo, model, before, attending, {k: v for k, v in vars(model).items() if k == _SAVE})
    try:
        binders, refused = binding.plan(model, report)
        if refused:
            listed = "; ".join(f"{name} trains, but {why}" for name, why in list(refused.items())[:3])
            raise ReplicaError(f"replicate: {listed}" + (f"; and {len(refused) - 3} more" if len(refused) > 3 else ""))
        reason = check(model, trained, binders, report)
        if reason:
            raise ReplicaError(f"replicate: {reason}")
        return Replicas(model, trained, binders, pairs, _starts(model, trained, pairs, init), undo)
    except BaseException:
        undo()
        raise


def _undo(model: nn.Module, before: dict[nn.Module, dict[str, Any]], attending: bool, own: dict[str, Any]) -> None:
    """Takes off what `replicate` bound: its own forwards, and patches that were not there before."""
    pattern.bind_again(before)
    model.__dict__.pop(_SAVE, None)
    model.__dict__.update(own)
    for module in model.modules():
        module.__dict__.pop(binding.MARK, None)
        if not attending and attention.bound(module):
            attention.unbind(module)


def _pair(seed: Any) -> tuple[int, int]:
    pair = (seed, seed) if isinstance(seed, Integral) else seed
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_is_seed, pair)):
        raise ValueError(f"replicate: seeds has {seed!r}; accepted is an int from 0 below 2**63, or two as (wi, do)")
    return int(pair[0]), int(pair[1])


def _is_seed(seed: Any) -> bool:
    return isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= seed < 2**63  # type: ignore[operator]


def _starts(
    model: nn.Module, trained: Mapping[str, nn.Parameter], pairs: list[tuple[int, int]], init: Init
) -> list[dict[str, Tensor]]:
    """Every replica's initial values; the model's own stay."""
    own = {name: p.detach().clone() for name, p in trained.items()}
    found = []
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for wi, _ in pairs:
            try:
                if init == "draw":
                    initial.draw(model, wi)
                elif not isinstance(init, str):
                    torch.manual_seed(wi)
                    init(model, wi)
                found.append({name: p.detach().clone() for name, p in trained.items()})
            except ValueError as error:
                raise ReplicaError(f"replicate: init: {error}; 'keep' or a function can stand in its place") from error
            finally:
                for name, p in trained.items():
                    p.copy_(own[name])
    return found


class Replicas:
    """The runs in a packed model, by number in the order of their seeds.

    model: the packed model. seeds: (wi, do) of every run. active: the runs in the batch, in its order.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        binders: Mapping[str, Callable[[nn.Module], None]],
        seeds: list[tuple[int, int]],
        starts: list[dict[str, Tensor]],
        undo: Callable[[], None],
    ):
        self.model, self.seeds = model, tuple(seeds)
        self._undo, self._released = undo, False
        self._originals = dict(trained)
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        names = {id(p): name for name, p in trained.items()}
        self._homes: list[tuple[nn.Module, str, str]] = [
            (module, own, names[id(p)])
            for module in model.modules()
            for own, p in module._parameters.items()
            if p is not None and id(p) in names
        ]
        self._rows = [{name: nn.Parameter(start[name]) for name in trained} for start in starts]
        self._packed: dict[str, nn.Parameter] = {}
        self._sources = _seeds.Sources([do for _, do in seeds])
        for path, binder in binders.items():
            binder(model.get_submodule(path))
        self._pack()
        binding.bind(model, functools.partial(_forward, self))
        if hasattr(model, "save_pretrained"):
            model.__dict__[_SAVE] = _no_checkpoint
        self._bound = [(m, m.__dict__["forward"]) for m in model.modules() if "forward" in m.__dict__]

    @property
    def active(self) -> tuple[int, ...]:
        return tuple(self._sources.active)

    def parameters(self, g: int) -> list[nn.Parameter]:
        """Replica g's own parameters, in the model's order: rows of the packed ones, with rows of their gradients."""
        return list(self._rows[self._known(g)].values())

    def named_parameters(self, g: int) -> dict[str, nn.Parameter]:
        """The same by their names in the model."""
        return dict(self._rows[self._known(g)])

    @torch.no_grad()
    def load(self, g: int, values: Mapping[str, Tensor]) -> None:
        """Sets parameters of replica g by their names in the model. ValueError for an unknown name or another shape."""
        self._in_use("load")
        own = self._rows[self._known(g)]
        for name, value in values.items():
            if name not in own:
                raise ValueError(f"load: {name!r} does not train in this model; accepted are {', '.join(own)}")
            if not isinstance(value, Tensor):
                raise TypeError(f"load: {name} is {type(value).__name__}; accepted is a tensor")
            if value.shape != own[name].shape:
                raise ValueError(f"load: {name} has shape {tuple(value.shape)}; accepted is {tuple(own[name].shape)}")
        for name, value in values.items():
            own[name].copy_(value)

    def manual_seed(self, g: int, seed: int) -> None:
        """Replica g's dropout from here on, as torch.manual_seed(seed) in a solo run."""
        if not _is_seed(seed):
            raise ValueError(f"manual_seed: seed is {seed!r}; accepted is an int from 0 below 2**63")
        self._sources.manual_seed(self._in_batch(g), int(seed))

    def stack(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of the active replicas' batches, in their order. What is no tensor must be the same in all."""
        if len(batches) != len(self.active):
            raise ValueError(f"stack: {len(batches)} batches; accepted is one for each of {len(self.active)} replicas")
        whole: dict[str, Any] = {}
        for batch in batches:
            if batch.keys() != batches[0].keys():
                raise ValueError(f"stack: a batch has {', '.join(batch)}, the first {', '.join(batches[0])}")
        for name, first in batches[0].items():
            parts = [batch[name] for batch in batches]
            if not isinstance(first, Tensor):
                if any(isinstance(part, Tensor) or part != first for part in parts):
                    raise ValueError(f"stack: {name} is {first!r} in the first batch only; accepted is the same in all")
                whole[name] = first
                continue
            shapes = {tuple(part.shape) for part in parts}
            if () in shapes:
                raise ValueError(f"stack: {name} has no dimension; accepted are tensors whose first one is the rows")
            if len(shapes) > 1:
                raise ValueError(f"stack: {name} has the shapes {sorted(shapes)}; pad them alike, to one")
            whole[name] = torch.cat(parts)
        return whole

    def repeat(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The same rows for every active replica, as an evaluation needs them."""
        G = len(self.active)
        return {k: torch.cat([v] * G) if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}

    def split(self, rows: Tensor) -> Tensor:
        """[G x B, ...] as [G, B, ...], by active replica."""
        if not rows.dim() or rows.shape[0] % len(self.active):
            raise ValueError(
                f"split: rows has shape {tuple(rows.shape)}; accepted is a multiple of {len(self.active)} rows"
            )
        return rows.reshape(len(self.active), -1, *rows.shape[1:])

    def stop(self, g: int) -> None:
        """Replica g leaves the batch with the values that it has; after the backward of the batch that it was in."""
        self._in_use("stop")
        self._sources.active.remove(self._in_batch(g))
        with torch.no_grad():
            for p in self._rows[g].values():
                p.data = p.data.clone()
        self._pack()

    def resume(self, g: int) -> None:
        """A stopped replica joins the batch again, at its end."""
        self._in_use("resume")
        if self._known(g) in self.active:
            raise ReplicaError(f"replica {g} was not stopped")
        self._sources.active.append(g)
        self._pack()

    def replica(self, g: int) -> nn.Module:
        """An ordinary, unpatched model with replica g's values: a copy, which shares nothing."""
        self._in_use("replica")
        own = self._rows[self._known(g)]
        values = {id(p): nn.Parameter(own[name].detach().clone()) for name, p in self._packed.items()}
        copied = twin(self.model, values, share=False, forget=self)
        binding.unbind(copied)
        copied.__dict__.pop(_SAVE, None)
        unpatch(copied)
        return copied

    @torch.no_grad()
    def release(self, g: int | None = None) -> nn.Module:
        """The model as it was before `replicate`, the same parameters; with replica g's values, where g is given."""
        self._in_use("release")
        values = {} if g is None else self._rows[self._known(g)]
        self._released = True
        for module, own, name in self._homes:
            module._parameters[own] = self._originals[name]
        for name, value in values.items():
            self._originals[name].copy_(value)
        self._undo()
        return self.model

    def _in_use(self, call: str) -> None:
        if self._released:
            raise ReplicaError(f"{call}: the model was released already")

    def _known(self, g: int) -> int:
        if not isinstance(g, Integral) or not 0 <= g < len(self._rows):
            raise IndexError(f"replica {g!r}; there are 0 to {len(self._rows) - 1}")
        return g

    def _in_batch(self, g: int) -> int:
        if self._known(g) not in self.active:
            raise ReplicaError(f"replica {g} was stopped")
        return g

    @torch.no_grad()
    def _pack(self) -> None:
        """Makes the packed parameters of the active replicas' values, and their own ones rows of them."""
        rows = [self._rows[g] for g in self.active]
        for name, original in self._originals.items():
            values = [row[name].data for row in rows]
            whole = nn.Parameter(torch.stack(values) if values else original.new_empty([0, *original.shape]))
            whole.register_post_accumulate_grad_hook(functools.partial(self._deal, name, self.active))
            for row, value in zip(rows, whole.data.unbind(), strict=True):
                row[name].data = value
            self._packed[name] = whole
        for module, own, name in self._homes:
            module._parameters[own] = self._packed[name]

    @torch.no_grad()
    def _deal(self, name: str, active: tuple[int, ...], packed: Tensor) -> None:
        """Gives every replica that was in the batch its row of a gradient, added to what it has."""
        gradient, packed.grad = packed.grad, None
        assert gradient is not None
        for g, own in zip(active, gradient.unbind(), strict=True):
            p = self._rows[g][name]
            if p.grad is None:
                p.grad = own
            else:
                p.grad += own

    def _ready(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises for a call that would not keep the replicas apart."""
        G = len(self.active)
        if G == 0:
            raise ReplicaError("no replica is left in the batch")
        if G > 1 and any(kwargs.get(name) is not None for name in _LOSS_OF_ALL):
            raise ValueError(_MIXED)
        given = (*args, kwargs.get(getattr(self.model, "main_input_name", "")), *kwargs.values())
        rows = next((v.shape[0] for v in given if isinstance(v, Tensor) and v.dim()), 0)
        if rows % G:
            raise ValueError(f"the batch has {rows} rows; accepted is a multiple of the {G} replicas in it")
        if any(m.__dict__.get("forward") is not forward for m, forward in self._bound):
            raise ReplicaError("a forward was replaced or taken off since `replicate`; release() first")
        own = self._rows[self.active[0]]
        if not torch.compiler.is_compiling() and any(
            own[n].data_ptr() != p.data_ptr() for n, p in self._packed.items()
        ):
            raise ReplicaError(
                "the replicas' parameters are no rows of the model's: it is a copy, or was moved or cast since "
                "`replicate`"
            )
        if any(p.requires_grad for p in self._frozen):
            raise ReplicaError(
                "a parameter that all replicas share was set to train since `replicate`; release() first"
            )
        if any(getattr(m, "gradient_checkpointing", False) and m.training for m in self.model.modules()):
            raise ReplicaError("transformers' gradient checkpointing would draw other dropout masks in backward")


def _no_checkpoint(*args: Any, **kwargs: Any) -> None:
    raise ReplicaError(
        "save_pretrained: the model is replicated, and nothing loads G rows of a parameter; save runs.replica(g), or "
        "release() it first"
    )


def _forward(replicas: Replicas, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    replicas._ready(args, kwargs)
    with _seeds.replicated(replicas._sources):
        outputs = type(model).forward(model, *args, **kwargs)
    if len(replicas.active) > 1 and getattr(outputs, "loss", None) is not None:
        raise ValueError(_MIXED)  # labels by place, or by another name
    return outputs
