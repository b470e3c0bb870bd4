"""Argument checks shared by the ops: every message names the argument, what was given and what is accepted.

Strides are no concern of theirs: no op writes into an argument, so one that is expanded or overlaps itself is read as
PyTorch reads it (docs/decisions.md, "Overlapping inputs are read, not refused").
"""

from __future__ import annotations

from numbers import Real
from typing import TypeVar

import torch
from torch.autograd import forward_ad

from ..meta import autocasts
from ..schema import accumulator

_Given = TypeVar("_Given", torch.Tensor, torch.Tensor | None)

_NEEDED = ("x", "u", "q", "k", "v", "w")
"""Arguments that are never None."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def usual(x: torch.Tensor, alike: tuple[torch.Tensor | None, ...], small: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether this is the call that models make, with nothing to refuse and nothing to convert: x is dense, `alike` are
    dense tensors of its shape, `small` are vectors of its width, and all have one dtype and one device.

    For speed: a call that passes skips the checks of each argument, which cost more than a small kernel.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS or not x.dim() or not x.is_contiguous():
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape[-1]:
        return False
    for t in alike:
        if t is not None and not (
            isinstance(t, torch.Tensor)
            and t.shape == shape and t.dtype == dtype and t.device == device and t.is_contiguous()
        ):  # fmt: skip
            return False
    for t in small:
        if t is not None and not (
            isinstance(t, torch.Tensor)
            and t.dim() == 1 and t.shape[0] == shape[-1] and t.dtype == dtype and t.device == device
            and t.is_contiguous()
        ):  # fmt: skip
            return False
    return True


def tracked(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records an op of these, or forward-mode differentiation is on, which a Function refuses and an
    op called past it would ignore."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def floating(op: str, **tensors: torch.Tensor | None) -> None:
    for name, t in tensors.items():
        if t is None and name not in _NEEDED:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(t).__name__}; accepted is a torch.Tensor")
        if t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} is {t.dtype}; accepted are float16, bfloat16, float32, float64")


def same_device(op: str, x: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, x is on {x.device}; they must share one device")


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast prescribes for a matmul of x, or None. The meta device has no autocast."""
    kind = x.device.type
    if x.dtype == torch.float64 or not autocasts(kind):
        return None
    return torch.get_autocast_dtype(kind)


def probability(op: str, p: float) -> None:
    if not isinstance(p, (int, float, Real)) or not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: p is {p!r}; accepted is a probability in [0, 1)")


def rows(op: str, name: str, x: torch.Tensor) -> tuple[int, int]:
    """T and H of a tensor seen as rows of its last dimension."""
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} has no dimension; accepted is [..., H]")
    H = x.shape[-1]
    if H == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; its last dimension must not be empty")
    return x.numel() // H, H


def same_shape(op: str, x: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, x has {tuple(x.shape)}; they must be equal")


def small(op: str, T: int, H: int, **params: torch.Tensor | None) -> int:
    """Checks small parameters [G, H], or [H] for all replicas, against rows [T, H]; returns G."""
    G = 1
    for name, t in params.items():
        if t is None:
            continue
        if t.dim() not in (1, 2) or t.shape[-1] != H:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; accepted is [{H}] or [G, {H}] for rows of {H}")
        if t.dim() == 1:
            continue
        g = t.shape[0]
        if g == 1:
            continue
        if G not in (1, g):
            raise ValueError(f"{op}: {name} has {g} replicas, another parameter has {G}; they must agree")
        if g == 0 or T % g:
            raise ValueError(f"{op}: {name} has {g} replicas, which does not divide the {T} rows of x")
        G = g
    return G


def per_replica(G: int, *params: torch.Tensor | None) -> list[torch.Tensor | None]:
    """With G replicas, a parameter [H] that trains as [G, H], the shape in which kernels give its gradient; one that is
    frozen stays [H]. [1, H] counts as [H]."""
    if G == 1:
        return list(params)
    params = tuple(t[0] if t is not None and t.dim() == 2 and t.shape[0] == 1 else t for t in params)
    return [t.expand(G, -1).contiguous() if t is not None and t.dim() == 1 and t.requires_grad else t for t in params]


def seeds(op: str, seed: torch.Tensor | None, T: int, G: int, device: torch.device) -> torch.Tensor | None:
    """The seeds, dense, if there are any."""
    if seed is None:
        return None
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64 or seed.dim() != 1:
        raise TypeError(f"{op}: seed is {seed!r}; accepted is an int64 tensor [1] or [G]")
    if seed.shape[0] not in (1, G) and (G != 1 or seed.shape[0] == 0 or T % seed.shape[0]):
        raise ValueError(f"{op}: seed has {seed.shape[0]} elements; accepted are 1 or one for each of {G} replicas")
    if seed.device != device:
        raise ValueError(f"{op}: seed is on {seed.device}, x is on {device}; they must share one device")
    return dense(seed)


def dense(x: _Given) -> _Given:
    return x if x is None or x.is_contiguous() else x.contiguous()


def as_rows(x: _Given) -> _Given:
    """A dense [..., H] as [T, H], as matmul kernels take it. Inside a Function, where a view costs no node."""
    return x if x is None or x.dim() == 2 else x.view(-1, x.shape[-1])


def in_shape(rows: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """Fresh [T, N] as [*lead, N], and not as a view of it: a Function's views may not be changed in place."""
    return rows if len(lead) == 1 else rows.view(*lead, rows.shape[-1]).detach()


def one_dtype(x: torch.Tensor, *params: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Small parameters contiguous and in one dtype that a kernel takes, x's or float32; autograd sees the casts."""
    if all(t is None or (t.dtype == x.dtype and t.is_contiguous()) for t in params):
        return list(params)
    wide = accumulator(x.dtype)
    dtypes = {t.dtype for t in params if t is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else wide
    if dtype not in (x.dtype, wide):
        dtype = wide
    return [None if t is None else t.to(dtype).contiguous() for t in params]
