"""Pattern `activation`: an activation that transformers composes from several torch ops, as one op.

gelu_new, gelu_fast and their like keep up to eight tensors for backward; the op keeps its input. An activation that is
one torch op already keeps no more than that, and is left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bias_act import bias_act
from ..schema import ACTIVATIONS
from .pattern import Parts, Pattern, bare
from .trace import Call

_KNOWN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def name_of(module: nn.Module) -> str | None:
    """The name of the activation in `bias_act` that this module computes, judged by what it gives; None for none."""
    if next(module.parameters(), None) is not None or module._modules or module._buffers:
        return None
    x = torch.linspace(-6, 6, 121, dtype=torch.float64, device="cpu")
    x = torch.cat((x, x[::20] ** 5))  # some clip at 6, 10 or more
    with torch.no_grad():
        try:
            own = type(module).forward(bare(module), x)
        except Exception:  # takes other arguments: no activation
            return None
    if not isinstance(own, Tensor) or own.shape != x.shape:
        return None
    return next((n for n in ACTIVATIONS if torch.allclose(own, _KNOWN[n](x), rtol=0, atol=1e-7)), None)


def _parts(module: nn.Module, call: Call | None) -> Sequence[Parts]:
    act = name_of(module)
    return ({"act": act},) if act else ()


def _refuse(module: nn.Module, parts: Parts) -> str:
    kept = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        type(module).forward(bare(module), torch.zeros(8, device="cpu", requires_grad=True))
    return "" if len(kept) > 1 else "torch's own op keeps nothing but its input"


def _forward(module: nn.Module, parts: Parts, *args: Tensor, **kwargs: Tensor) -> Tensor:
    if kwargs or len(args) != 1:
        return type(module).forward(module, *args, **kwargs)
    return bias_act(*args, act=parts["act"])


PATTERN = Pattern("activation", _forward, _parts, refuse=_refuse, sure=False)
