"""Pattern `linear`: an nn.Linear where the op is better than torch's own; and what a projection is.

A weight that trains needs its x in backward: where x can be made again from what is kept anyway (the output of a fused
norm or activation), the op keeps no x. A bias with a replica axis, or wider than x, is the op's alone. Beside a frozen
weight the op runs where it is faster (ops/frozen_linear.py). Else torch's own linear keeps and computes the least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _checks as check
from ..ops import _saving as saving
from ..ops.frozen_linear import faster, frozen_linear
from ..ops.lora_linear import Projection
from .pattern import Parts, Pattern, foreign_forward, has_hooks, random_rows
from .trace import Call

_TENSORS = (nn.Parameter, Tensor)


def projection(module: nn.Module) -> Projection | None:
    """What a plain nn.Linear computes; None where its own forward must run: another class, hooks, a forward that
    somebody replaced (a pattern of ours is no obstacle), or a weight that is no plain tensor (quantised, sharded)."""
    if type(module) is not nn.Linear or has_hooks(module) or foreign_forward(module):
        return None
    w, bias = module.weight, module.bias  # looked up once: nn.Module finds a parameter slowly
    if type(w) not in _TENSORS or not (bias is None or type(bias) in _TENSORS):
        return None
    return Projection(w, bias)


def _parts(module: nn.Module, call: Call | None) -> Sequence[Parts]:
    return ({},) if type(module) is nn.Linear else ()


def _sample(module: nn.Module, parts: Parts, generator: torch.Generator, call: Call | None) -> tuple[Tensor, ...]:
    assert isinstance(module, nn.Linear)
    return (random_rows(module.weight, module.in_features, generator),)


def run(w: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x w^T + bias: a projection without an adapter."""
    if w.requires_grad:
        pays = saving.can_be_made(x)
    elif bias is not None and (bias.dim() != 1 or (bias.dtype != x.dtype and check.autocast_dtype(x) is None)):
        pays = True  # which torch's own does not take
    else:
        pays = faster(x, w, bias)
    # a quantised weight, say, knows torch's linear only
    pays = pays and type(w) in _TENSORS and Projection(w, bias).takes(x)
    return frozen_linear(x, w, bias) if pays else F.linear(x, w, bias)


def _forward(module: nn.Linear, parts: Parts, *args: Tensor, **kwargs: Tensor) -> Tensor:
    if kwargs or len(args) != 1:
        return type(module).forward(module, *args, **kwargs)
    return run(module.weight, module.bias, *args)


PATTERN = Pattern("linear", _forward, _parts, _sample, sure=False)
