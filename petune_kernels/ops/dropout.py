r"""dropout: a mask from a seed, in one pass each way, with nothing stored but the seed.

    y = x * keep / (1 - p)        dx = dy * keep / (1 - p)

keep[e] is lane e % 4 of Philox4x32-10 (Salmon et al., SC 2011) at counter e // 4 under the seed as its key, compared
with floor(p 2^32). Any element's word can be computed on its own, so backward computes the same mask again: eager keeps
a mask byte (CUDA) or a whole scaled mask in x's dtype (CPU) for every element, this op keeps eight bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import pick
from . import _checks as check
from . import _saving as saving
from ._seeds import new_seed


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        y = _again(p, x, seed)
        before = saving.known(x)
        if isinstance(before, saving.Recipe):
            saving.describe(y, saving.Recipe(partial(_again, p), before, seed))
        return y

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (seed,) = ctx.saved_tensors
        return pick("dropout", dy)(dy.contiguous(), seed, ctx.p), None, None


def _again(p: float, x: Tensor, seed: Tensor) -> Tensor:
    return pick("dropout", x)(x, seed, p)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, seed: Tensor | None = None) -> Tensor:
    """Sets elements of x to 0 with probability p and divides the others by 1 - p; see the top of this file.

    Args:
        x: any shape, float16, bfloat16, float32 or float64. Elements are counted in x's logical (row-major) order.
        p: probability in [0, 1).
        training: False returns x itself, as p = 0 does.
        seed: int64 [1], or [G] for G equal runs of elements with a seed each (replicas; G divides the number of
            elements); drawn from torch's generator of x's device when None.

    Returns:
        y like x.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    op = "dropout"
    check.floating(op, x=x)
    check.probability(op, p)
    seed = check.seeds(op, seed, x.numel(), 1, x.device)
    if not training or p == 0.0:
        return x
    if seed is None:
        seed = new_seed(x.device)
    x = x.contiguous()
    if check.tracked(x):
        return Dropout.apply(x, seed, p)
    return pick(op, x)(x, seed, p)
