"""Pattern `linear`: an nn.Linear whose bias trains, or whose weight does on an x that can be made again; and what a
projection is.

The bias gradient is a float32 column sum whatever the dtype. A weight that trains needs its x in backward: where x can
be made again from what is kept anyway (the output of a fused norm or activation), the op keeps no x. A frozen float32
layer on a CPU is the op's where its matmul is faster. Else torch's own linear keeps and computes the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _checks as check
from ..ops import _saving as saving
from ..ops.frozen_linear import faster, frozen_linear
from .pattern import Parts, Pattern, foreign_forward, has_hooks, random_rows
from .trace import Call


class Projection(NamedTuple):
    """y = x w^T + bias + scale (dropout_p(x) a^T b^T + bias_b): the arguments of `lora_linear` at one call.

    w [N, K], bias [N], a [r, K], b [N, r], bias_b [N]; None where absent. p is 0 outside training.
    """

    w: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    bias_b: Tensor | None = None
    scale: float = 1.0
    p: float = 0.0

    def takes(self, x: Tensor) -> bool:
        """Whether `lora_linear` serves x: one dtype for x and w, that or float32 for the others; any in autocast."""
        given = [t for t in self[1:5] if t is not None]
        if check.autocast_dtype(x) is not None:
            return torch.float64 not in {x.dtype, self.w.dtype, *(t.dtype for t in given)}
        allowed = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
        adapter = {t.dtype for t in self[2:5] if t is not None}
        return x.dtype == self.w.dtype and len(adapter) <= 1 and all(t.dtype in allowed for t in given)


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


def _refuse(module: nn.Module, parts: Parts) -> str:
    return ""


def _sample(module: nn.Module, parts: Parts, generator: torch.Generator, call: Call | None) -> tuple[Tensor, ...]:
    assert isinstance(module, nn.Linear)
    return (random_rows(module.weight, module.in_features, generator),)


def run(this: Projection, x: Tensor) -> Tensor:
    """A projection without an adapter."""
    w, bias = this.w, this.bias
    if w.requires_grad:
        pays = saving.can_be_made(x)
    else:
        pays = bias is not None and bias.requires_grad or faster(x, w)
    return frozen_linear(x, w, bias) if pays and this.takes(x) else F.linear(x, w, bias)


def matmul(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias for a fused forward."""
    return run(Projection(w, bias), x)


def _forward(module: nn.Linear, parts: Parts, x: Tensor) -> Tensor:
    return run(Projection(module.weight, module.bias), x)


PATTERN = Pattern("linear", _parts, _refuse, _sample, _forward, sure=False)
