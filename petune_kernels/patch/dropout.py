"""Pattern `dropout`: an nn.Dropout that is called as a module keeps a seed of 8 bytes instead of a mask."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops.dropout import dropout
from .pattern import Parts, Pattern
from .trace import Call


def _parts(module: nn.Module, call: Call | None) -> Sequence[Parts]:
    return ({},) if type(module) is nn.Dropout else ()


def _refuse(module: nn.Module, parts: Parts) -> str:
    return "it works in place" if module.inplace else ""


def _forward(module: nn.Dropout, parts: Parts, *args: Tensor, **kwargs: Tensor) -> Tensor:
    if kwargs or len(args) != 1 or module.p >= 1.0 or not args[0].is_floating_point():
        return nn.Dropout.forward(module, *args, **kwargs)
    if not module.training or module.p == 0.0:
        return args[0]
    return dropout(*args, module.p)


PATTERN = Pattern("dropout", _forward, _parts, refuse=_refuse)
