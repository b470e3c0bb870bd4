"""Training a few scalars of a weight and leaving all others bit-identical, whatever the optimizer and its decay.

W [..] keeps its Parameter, frozen. Beside it, its module holds `<name>_sampled` [n], the Parameter that trains, and
`<name>_sampled_index` [n], the flat positions in W. While the module runs, W stands replaced by

    W' = W with W.flatten()[index] = sampled,        d sampled = (dW').flatten()[index]

written in place: W' is W's own memory. A linear layer of which few scalars train keeps W itself, which needs no
gradient, and the n entries of dW' = dYt X are summed from columns of dY and X on the side: no dW', and of X no more
for backward than those columns. Checkpoints know nothing of it: state_dict() first writes the values into W and
leaves the two entries out; load_state_dict() reads the values from the loaded W. Between an optimizer step and the
next forward or state_dict(), W holds the values of before the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._saving import once_differentiable

_ATTRIBUTE = "_petune_sampled"
VALUES = "_sampled"
_INDEX = "_sampled_index"
_FEW = 512
"""From this many scalars of W for each sampled one, gathering columns is faster than the product dYt X, also in
bfloat16 on a CPU; docs/decisions.md has the times. Regime random's own budget has more than 1,000."""


def draw(total: int, count: int, seed: int) -> Tensor:
    """count of the numbers 0 .. total-1 without repeats, every subset equally likely: sorted int64 [count] on the CPU.

    The same seed gives the same numbers on every machine. Memory goes with count, not with total: repeats are drawn
    again; of more than half of all numbers the others are drawn instead.
    """
    if 2 * count > total:
        keep = torch.ones(total, dtype=torch.bool, device="cpu")
        keep[draw(total, total - count, seed)] = False
        return keep.nonzero().squeeze(1)
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(numbers) < count:
        # Of 62 random bits, because torch.randint's own remainder of 32 bits favours low numbers by up to 5 %.
        more = torch.randint(2**62, (count - len(numbers),), generator=generator, device="cpu") % total
        numbers = torch.cat([numbers, more]).unique()
    return numbers


def _put(w: Tensor, index: Tensor, values: Tensor) -> None:
    """w.flatten()[index] = values, in w's memory; unlike Tensor.put_ it may run under deterministic algorithms."""
    if w.is_contiguous():
        w.data.view(-1).index_copy_(0, index, values.detach())
    else:
        w.data[torch.unravel_index(index, w.shape)] = values.detach()


class _Scatter(torch.autograd.Function):
    """(w, index [n], values [n]) -> w's memory with the values in place."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, index: Tensor, values: Tensor) -> Tensor:
        # Through .data, so that a second call before backward is no "in-place change" of what the first one saved.
        # A step between forward and backward still raises: values is saved, and the step changes its version.
        _put(w, index, values)
        ctx.save_for_backward(index, values)
        return w.detach()

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[None, None, Tensor]:
        index, _ = ctx.saved_tensors
        return None, None, dw.take(index)


class _Gather(torch.autograd.Function):
    """(y [.., N], x [.., K], index [n] into [N, K], values [n]) -> y, which is linear in W [N, K], and d values.

    d values[i] = sum over rows of dy[:, index[i] // K] x[:, index[i] % K], in float32 or better. Keeps the n columns of
    x, or x where it has no more. No size depends on data, so it can be compiled and captured.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
        ctx.width = x.shape[-1]
        x = x.flatten(0, -2)
        ctx.picked = len(index) < ctx.width
        ctx.save_for_backward(index, x.index_select(1, index % ctx.width) if ctx.picked else x, values)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, Tensor]:
        index, x, values = ctx.saved_tensors
        wide = torch.promote_types(values.dtype, torch.float32)
        rows, columns = dy.flatten(0, -2).to(wide).index_select(1, index // ctx.width), x.to(wide)
        if not ctx.picked:
            columns = columns.index_select(1, index % ctx.width)
        return dy, None, None, (rows * columns).sum(0).to(values.dtype)


class _Sampled:
    """The hooks of one module (the owner) with sampled parameters. Holds no module, so that copies work."""

    def __init__(self, path: str) -> None:
        self.path = path  # from the module that runs to the owner
        self.names: list[str] = []
        self.homes: dict[str, nn.Parameter] = {}  # W, while W' stands in its place
        self.handles: list[Any] = []

    def hook(self, host: nn.Module, owner: nn.Module) -> None:
        self.handles += [
            host.register_forward_pre_hook(self.enter),
            host.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
            owner.register_state_dict_pre_hook(self.before_save),
            owner.register_state_dict_post_hook(_after_save),
            owner.register_load_state_dict_pre_hook(self.before_load),
        ]

    def entries(self, owner: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
        return [(n, owner._parameters[n + VALUES], owner._buffers[n + _INDEX]) for n in self.names]  # type: ignore

    def settle(self, owner: nn.Module) -> None:
        """Puts every W back; also after a forward that was cut short (KeyboardInterrupt runs no hook)."""
        while self.homes:
            name, w = self.homes.popitem()
            owner._parameters[name] = w

    def write(self, owner: nn.Module) -> None:
        self.settle(owner)
        for name, values, index in self.entries(owner):
            _put(owner.get_parameter(name), index, values)

    def enter(self, host: nn.Module, args: Any) -> None:
        if getattr(host, "_is_replica", False):
            raise RuntimeError("regime 'random' cannot run under nn.DataParallel; use DistributedDataParallel")
        owner = host.get_submodule(self.path)
        self.settle(owner)
        for name, values, index in self.entries(owner):
            w = owner._parameters[name]
            assert w is not None
            if self.few(owner, name):
                _put(w, index, values)
                continue
            swapped = _Scatter.apply(w, index, values)
            self.homes[name], owner._parameters[name] = w, swapped  # type: ignore[assignment]

    def leave(self, host: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        owner = host.get_submodule(self.path)
        self.settle(owner)
        if isinstance(output, Tensor) and torch.is_grad_enabled():  # None: the forward was cut short
            for name, values, index in self.entries(owner):
                if self.few(owner, name):
                    output = _Gather.apply(output, args[0] if args else kwargs["input"], index, values)
        return output

    def few(self, owner: nn.Module, name: str) -> bool:
        """Whether this is the weight of a linear layer that is called itself, and few of its scalars train."""
        w, index = owner._parameters[name], owner._buffers[name + _INDEX]
        assert w is not None and index is not None
        return type(owner) is nn.Linear and not self.path and name == "weight" and len(index) * _FEW <= w.numel()

    def before_save(self, owner: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.write(owner)

    def before_load(self, owner: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self.settle(owner)
        for name, values, index in self.entries(owner):
            new = state_dict.get(prefix + name)
            if isinstance(new, Tensor) and new.shape == owner._parameters[name].shape:  # type: ignore[union-attr]
                state_dict[prefix + name + VALUES] = new.take(index.to(new.device))
            else:  # nothing to load (strict=False), or torch is about to say what does not fit: the values stay
                state_dict[prefix + name + VALUES] = values.detach()


def _after_save(owner: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A function, because torch sets an attribute on it, which a method cannot have."""
    for name in owner.__dict__[_ATTRIBUTE].names:
        del state_dict[prefix + name + VALUES]


def install(model: nn.Module, picks: dict[str, Tensor]) -> tuple[str, ...]:
    """Lets the scalars at flat positions picks[name] (int64 [n]) of model's frozen parameters train: the new names."""
    parameters = dict(model.named_parameters())
    picked = {id(parameters[name]): index for name, index in picks.items()}
    # MultiheadAttention reads its out_proj's weight and never calls it.
    readers = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    shared: dict[int, nn.Parameter] = {}
    for owner in model.modules():
        own = [(name, w) for name, w in owner.named_parameters(recurse=False) if id(w) in picked]
        if not own:
            continue
        host = readers.get(id(owner), owner)
        record = _Sampled("" if host is owner else "out_proj")
        setattr(owner, _ATTRIBUTE, record)
        for name, w in own:
            index = picked[id(w)].to(w.device)
            if id(w) not in shared:
                shared[id(w)] = nn.Parameter(w.detach().take(index))
            record.names.append(name)
            owner.register_parameter(name + VALUES, shared[id(w)])
            owner.register_buffer(name + _INDEX, index, persistent=False)
        record.hook(host, owner)
    return tuple(name for name, p in model.named_parameters() if any(p is values for values in shared.values()))


def _records(model: nn.Module) -> list[tuple[nn.Module, _Sampled]]:
    return [(m, record) for m in model.modules() if isinstance(record := m.__dict__.get(_ATTRIBUTE), _Sampled)]


def settle(model: nn.Module) -> set[int]:
    """Brings a model that a cut-short forward left half-way back to rest: the ids of its sampled parameters."""
    ids = set()
    for owner, record in _records(model):
        record.settle(owner)
        ids |= {id(values) for _, values, _ in record.entries(owner)}
    return ids


def remove(model: nn.Module) -> None:
    """Takes all sampled parameters out again; W keeps the trained values."""
    for owner, record in _records(model):
        record.write(owner)
        for handle in record.handles:
            handle.remove()
        for name in record.names:
            del owner._parameters[name + VALUES]
            delattr(owner, name + _INDEX)
        delattr(owner, _ATTRIBUTE)


def clashes(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Those of the parameter names beside which the model holds something called `<name>_sampled` of its own."""
    taken = []
    for name in names:
        path, _, own = name.rpartition(".")
        owner = model.get_submodule(path)
        if _ATTRIBUTE not in owner.__dict__ and (hasattr(owner, own + VALUES) or hasattr(owner, own + _INDEX)):
            taken.append(name)
    return taken
