"""Pattern `post_norm_tail`: how BERT and its relatives end a block, LayerNorm(dropout(dense(hidden)) + residual).

A module that holds exactly a projection, an nn.Dropout and an nn.LayerNorm and is called as forward(hidden, residual).
The projection's bias, the dropout, the sum and the norm become one op. A projection that is not a plain nn.Linear
(PEFT's LoRA layer, one with hooks) is called as it is, with its own bias.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.residual_norm import residual_norm
from . import linear, norm, pattern
from .pattern import Parts, Pattern, is_plain
from .trace import Call


def _parts(module: nn.Module, call: Call | None) -> Sequence[Parts]:
    roles = {}
    for name, child in module.named_children():
        role = {nn.LayerNorm: "norm", nn.Dropout: "dropout"}.get(type(child), "dense")  # type: ignore[call-overload]
        roles[role] = name
    if len(roles) != 3 or len(module._modules) != 3:
        return ()
    taken = [p for p in inspect.signature(type(module).forward).parameters.values() if p.default is p.empty]
    return (roles,) if len(taken) == 3 else ()  # self, hidden, residual


def _refuse(module: nn.Module, parts: Parts) -> str:
    norm = getattr(module, parts["norm"])
    if len(norm.normalized_shape) != 1:
        return f"its norm works over {len(norm.normalized_shape)} dimensions; the kernel takes one"
    if next(module.get_submodule(parts["dense"]).parameters(), None) is None:
        return f"{parts['dense']} is no projection: it has no parameters"
    if not isinstance(getattr(module.get_submodule(parts["dense"]), "in_features", None), int):
        return f"{parts['dense']} ({type(getattr(module, parts['dense'])).__name__}) does not say its in_features"
    return ""


def _sample(module: nn.Module, parts: Parts, generator: torch.Generator, call: Call | None) -> tuple[Tensor, ...]:
    dense, norm = getattr(module, parts["dense"]), getattr(module, parts["norm"])
    like = next(dense.parameters())
    return tuple(pattern.random_rows(like, width, generator) for width in (dense.in_features, norm.normalized_shape[0]))


def _forward(module: nn.Module, parts: Parts, *args: Tensor, **kwargs: Tensor) -> Tensor:
    children = module._modules
    dense: Any = children[parts["dense"]]
    dropout: Any = children[parts["dropout"]]
    last: Any = children[parts["norm"]]
    if kwargs or len(args) != 2 or not is_plain(last, nn.LayerNorm):
        return type(module).forward(module, *args, **kwargs)
    hidden_states, residual = args
    if not is_plain(dropout, nn.Dropout) or dropout.p >= 1.0:
        x, bias, p = dropout(dense(hidden_states)), None, 0.0
    elif is_plain(dense, nn.Linear):
        x, bias, p = linear.run(dense.weight, None, hidden_states), dense.bias, dropout.p
    else:
        x, bias, p = dense(hidden_states), None, dropout.p
    y = residual_norm(
        norm.widened(x), last.weight, last.bias, bias=bias, residual=residual, p=p if dropout.training else 0.0,
        eps=last.eps,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return y


def _claims(module: nn.Module, parts: Parts) -> Sequence[str]:
    return ("norm", "dropout", *(("dense",) if type(getattr(module, parts["dense"])) is nn.Linear else ()))


PATTERN = Pattern("post_norm_tail", _forward, _parts, _sample, _refuse, _claims)
