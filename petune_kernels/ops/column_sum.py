r"""column_sum: the sum of rows, the gradient of every bias.

    y[g, n] = sum_{t in replica g} x[t, n]        dx[t, n] = dy[g(t), n]

in fp32 (fp64 for fp64) whatever x's dtype, and never rounded back: a bf16 sum would lose what its rows have in common.
The rows are cut into pieces that depend on T and the number of groups alone, each piece is summed by one thread, and
the pieces are added in order, so two runs agree bit for bit. Nothing is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import pick
from . import _checks as check


class ColumnSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return pick("column_sum", x)(x, groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        T, N = ctx.shape
        groups = dy.shape[0]
        return dy.to(ctx.dtype)[:, None].expand(groups, T // groups, N).reshape(T, N), None


def column_sum(x: Tensor, groups: int = 1) -> Tensor:
    """Sums the rows of x, or of each of `groups` equal runs of rows; see the top of this file.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64; its T rows are all but the last dimension.
        groups: how many sums; divides T. Group g owns rows g*T/groups to (g+1)*T/groups.

    Returns:
        [groups, N] in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    op = "column_sum"
    check.floating(op, x=x)
    T, N = check.rows(op, "x", x)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{op}: groups is {groups!r}; accepted is an integer of at least 1")
    if T % groups:
        raise ValueError(f"{op}: groups is {groups}, which does not divide the {T} rows of x")
    x = check.as_rows(check.dense(x))
    if check.tracked(x):
        return ColumnSum.apply(x, groups)
    return pick(op, x)(x, groups)
