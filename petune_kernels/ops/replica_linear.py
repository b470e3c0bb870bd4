r"""replica_linear: y_g = x_g W_g^T + bias_g for every replica g, whose rows follow one another.

A head, an adapter or any other linear layer whose weight trains differs from replica to replica. All replicas are one
batched matmul each way; autograd knows its backward:

    dx_g = dy_g W_g        dW_g = dy_g^T x_g        dbias_g = sum_rows dy_g

Saved: x and W, as for one linear layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check


def replica_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, with W and bias of each row's replica.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; its T rows are all but the last dimension, replica after
            replica.
        w: [G, N, K], G a divisor of T.
        bias: [G, N], or [N] for all replicas; None for none.

    Returns:
        [..., N]. Under autocast everything is computed in autocast's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    op = "replica_linear"
    check.floating(op, x=x, w=w, bias=bias)
    check.same_device(op, x, w=w, bias=bias)
    T, K = check.rows(op, "x", x)
    if w.dim() != 3 or w.shape[2] != K or 0 in w.shape:
        raise ValueError(f"{op}: w has shape {tuple(w.shape)}; accepted is [G, N, {K}] for x of {tuple(x.shape)}")
    G, N, _ = w.shape
    if T % G:
        raise ValueError(f"{op}: w has {G} replicas, which does not divide the {T} rows of x")
    if bias is not None and bias.shape not in ((N,), (G, N)):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; accepted is [{G}, {N}] or [{N}]")
    if G == 1:
        return F.linear(x, w[0], None if bias is None else bias.reshape(N))
    rows = x.reshape(G, T // G, K)
    y = torch.bmm(rows, w.mT) if bias is None else torch.baddbmm(bias.reshape(-1, 1, N), rows, w.mT)
    return y.reshape(*x.shape[:-1], N)
