r"""packed_linear: several frozen projections of the same x as one matmul.

    [y_1 | y_2 | ..] = x [W_1; W_2; ..]^T + [b_1 | b_2 | ..]
    dx = [dy_1 | dy_2 | ..] [W_1; W_2; ..]            [db_1 | db_2 | ..] = sum_rows [dy_1 | dy_2 | ..]

Nothing is saved but the weights. Eager runs one matmul each way per projection and adds the dx's up.

One matmul needs the weights behind one another in memory. `pack` makes the parameters views of one buffer: they stay
the same Parameter objects under the same state_dict keys. Whether they (and the incoming dy's) lie side by side is
looked at in every call, inside the op: after `.to`, `.half`, deepcopy or an assigning load they no longer do, and the
op runs them one by one, with the same numbers, until `pack` is called again. No copy of a weight can go stale, and
torch.compile needs no guard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import matmul
from ..backends import pick
from . import _checks as check
from . import _saving as saving
from .lora_linear import Projection, are_rows, as_list, bias_gradient, cast, projections, usual


class PackedLinear(torch.autograd.Function):
    """apply(x, n, groups, *w, *bias) -> [..., sum of N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, groups: int, *tensors: Any) -> Any:
        w, bias = list(tensors[:n]), list(tensors[n:])
        saving.save(ctx, saving.known(x) if any(ctx.needs_input_grad[3 : 3 + n]) else None, *w, *bias)
        ctx.n, ctx.groups = n, groups
        y = pick("packed_linear", x)(check.as_rows(x), cast(w, x.dtype), bias)
        return check.in_shape(y, x.shape[:-1])

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        n = ctx.n
        x, *saved = saving.load(ctx)
        w, bias = saved[:n], saved[n:]
        want_w, want_bias = ctx.needs_input_grad[3 : 3 + n], ctx.needs_input_grad[3 + n :]
        lead, dy, widths = dy.shape[:-1], check.as_rows(check.dense(dy)), [m.shape[0] for m in w]
        dw, dbias = [None] * n, [None] * n  # type: tuple[list[Any], list[Any]]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = check.in_shape(pick("packed_linear_backward", dy)(dy, cast(w, dy.dtype)), lead)
        if any(want_bias):
            sums = pick("column_sum", dy)(dy, ctx.groups).split(widths, 1)
            dbias = [bias_gradient(s, c) if yes else None for s, c, yes in zip(sums, bias, want_bias, strict=True)]
        if any(want_w):
            x, parts = check.as_rows(x), dy.split(widths, 1)
            dw = [(d.T @ x).to(m.dtype) if yes else None for d, m, yes in zip(parts, w, want_w, strict=True)]
        return (dx, None, None, *dw, *dbias)


def packed_linear(
    x: Tensor, w: Sequence[Tensor], bias: Sequence[Tensor | None] | None = None, *, op: str = "packed_linear"
) -> tuple[Tensor, ...]:
    """y_i = x W_i^T + bias_i for each i; one matmul where the weights lie behind one another (see `pack`).

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; its T rows are all but the last dimension.
        w: [N_i, K] each, in x's dtype. Frozen as a rule; one that requires grad gets its gradient.
        bias: None, or one each: None, [N_i] or [G, N_i] for G replicas whose rows follow one another (G divides T);
            all in one dtype, x's or float32.
        op: the name that error messages give.

    Returns:
        One [..., N_i] each, views of one tensor. Under autocast everything is computed in autocast's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    ws: list[Any] = list(w)
    if not ws:
        raise ValueError(f"{op}: w is empty; accepted is at least one projection")
    biases = as_list(op, "bias", bias, len(ws))
    dtype = check.autocast_dtype(x) if isinstance(x, Tensor) else None
    if dtype is not None:
        x, biases = x.to(dtype), [None if c is None else c.to(dtype) for c in biases]
    G = 1
    if not (are_rows(x) and all([usual(x, Projection(m, c)) for m, c in zip(ws, biases, strict=True)])):
        G = projections(op, x, ws, biases, autocast=dtype is not None)
    if len({c.dtype for c in biases if c is not None}) > 1:
        raise TypeError(f"{op}: the biases have several dtypes; accepted is one, {x.dtype} or float32")
    y = PackedLinear.apply(check.dense(x), len(ws), G, *ws, *biases)
    # even a split into one is a copy in backward
    return y.split([m.shape[0] for m in ws], -1) if len(ws) > 1 else (y,)


def pack(modules: Iterable[nn.Module]) -> bool:
    """Lays the weights of linear modules behind one another in one buffer; returns whether anything had to move.

    The parameters keep their identity, names, values and requires_grad; only their memory is new. Gradients, optimizer
    states, state_dict, torch.save and safetensors see them as before. Call it again after something moved them.

    Raises:
        TypeError, ValueError: a module without a floating [N, K] Parameter `weight`, a weight given twice, or weights
            that differ in K, dtype or device; naming the module's place in the list.
    """
    weights = _weights(modules)
    if matmul.behind_one_another(weights) is not None:
        return False
    with torch.no_grad():
        whole = torch.cat([t.detach() for t in weights])
        for t, rows in zip(weights, whole.split([t.shape[0] for t in weights]), strict=True):
            t.data = rows
    return True


def unpack(modules: Iterable[nn.Module]) -> None:
    """Gives every weight memory of its own again."""
    for t in _weights(modules):
        t.data = t.data.clone()


def is_packed(modules: Iterable[nn.Module]) -> bool:
    """Whether the weights lie behind one another, so that `packed_linear` runs them as one matmul."""
    return matmul.behind_one_another(_weights(modules)) is not None


def _weights(modules: Iterable[nn.Module]) -> list[Any]:
    weights: list[Any] = []
    for i, module in enumerate(modules):
        t = getattr(module, "weight", None)
        if not isinstance(t, nn.Parameter) or t.dim() != 2 or t.dtype not in check.FLOATS or t.is_meta:
            raise TypeError(
                f"pack: modules[{i}] is a {type(module).__name__} whose weight is no floating [N, K] Parameter"
            )
        if any(t is other for other in weights):
            raise ValueError(
                f"pack: modules[{i}] has the same weight as a module before it; accepted are distinct ones"
            )
        first = weights[0] if weights else t
        if (t.shape[1], t.dtype, t.device) != (first.shape[1], first.dtype, first.device):
            raise ValueError(
                f"pack: modules[{i}].weight is {tuple(t.shape)} {t.dtype} on {t.device}, modules[0].weight is "
                f"{tuple(first.shape)} {first.dtype} on {first.device}; K, dtype and device must agree"
            )
        weights.append(t)
    if not weights:
        raise ValueError("pack: modules is empty; accepted is at least one module")
    return weights
