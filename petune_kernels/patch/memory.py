"""The memory dial: what a patched model keeps for backward, and what backward makes again.

    exact        every row that a gradient needs, once; only element-wise work is done again
    coded        where its input serves nothing else, an 8-bit code of the activation's derivative; in 16 bits only
    recompute    not q, k, v and the feed-forward block's inner rows: their projections run again in backward
    checkpoint   one row a layer: backward runs the layer again, but for its last projection, which nothing needs

`recompute` makes frames (ops/_frames.py) of attention modules and feed-forward blocks, `checkpoint` of layers, as
transformers' own checkpointing does. The norm that ends a layer stands outside the layer's frame: its row is what the
next layer starts from.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..ops._frames import framed, outside
from . import mlp, pattern
from .again import AsItWas
from .trace import Trace

LEVELS = ("exact", "coded", "recompute", "checkpoint")

_log = logging.getLogger(__name__)


NEEDS = {
    "coded": "activation that a pattern runs",
    "recompute": "attention or feed-forward block that a pattern runs",
    "checkpoint": "layer of transformers' kind (GradientCheckpointingLayer)",
}
"""What a level acts on."""


def set_level(model: nn.Module, level: str, attending: Iterable[nn.Module], seen: Trace) -> int:
    """Sets a patched model to a level, whatever it had; returns on how many modules the level acts.

    attending: the modules that call the attention op. seen: the model's trace.
    """
    ours = [m for m in model.modules() if pattern.bound(m) and not pattern.foreign_forward(m)]
    blocks = [m for m in ours if pattern.pattern_of(m) == mlp.PATTERN.name]
    layers = [m for m in model.modules() if is_layer(m) and not pattern.foreign_forward(m)]
    frames: dict[nn.Module, Callable[..., Any]] = {}
    if level == "recompute":
        frames = dict.fromkeys([*attending, *blocks], _part)
    if level == "checkpoint":
        frames = dict.fromkeys(layers, _layer) | dict.fromkeys([m for each in layers for m in _last(each, seen)], _kept)
    for module in filter(pattern.framed, ours):
        if pattern.around(module) not in (_part, _layer, _kept):
            continue
        if pattern.around(module) is frames.get(module):
            del frames[module]
        else:
            pattern.unframe(module)
    for block in blocks:
        parts = pattern.bound_parts(block)
        if parts["coded"] != (level == "coded"):
            pattern.bind(block, mlp.PATTERN, {**parts, "coded": level == "coded"})
    for module, around in frames.items():
        pattern.frame(module, around)
    return len(blocks if level == "coded" else layers if level == "checkpoint" else [*attending, *blocks])


def runs_again(model: nn.Module) -> str:
    """A module whose forward backward runs again, by memory="recompute" or "checkpoint" or transformers' own
    checkpointing, and by which; or ''."""
    for path, m in model.named_modules():
        if pattern.framed(m) and pattern.around(m) in (_part, _layer):
            return f"{path}, by memory={'recompute' if pattern.around(m) is _part else 'checkpoint'!r}"
        if getattr(m, "gradient_checkpointing", False):
            return f"{path or 'the model'}, by gradient checkpointing"
    return ""


def is_layer(module: nn.Module) -> bool:
    layers = sys.modules.get("transformers.modeling_layers")
    return layers is not None and isinstance(module, layers.GradientCheckpointingLayer)


def _last(layer: nn.Module, seen: Trace) -> list[nn.Module]:
    """The fused norm whose output is the layer's own."""
    out = seen.made.get(layer)
    norms = (m for m in layer.modules() if pattern.pattern_of(m) in ("post_norm_tail", "norm"))
    return [m for m in norms if out is not None and seen.made.get(m) is out and m is not layer]


def _part(module: nn.Module, parts: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return framed(own, args, _without_cache(module, kwargs), functools.partial(AsItWas, module))


def _layer(module: nn.Module, parts: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if module.training and getattr(module, "gradient_checkpointing", False):  # transformers' own, which is on
        return own(*args, **kwargs)
    return framed(own, args, _without_cache(module, kwargs), functools.partial(AsItWas, module), whole=True)


def _kept(module: nn.Module, parts: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with outside():
        return own(*args, **kwargs)


def _without_cache(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A cache that holds nothing yet is left out while training, as transformers leaves it out when it checkpoints: the
    second run would fill it a second time. A module with a full one (a prefix) is no frame."""
    name = next((n for n in pattern.CACHE if kwargs.get(n) is not None), "")
    if not name or not (module.training and torch.is_grad_enabled()):
        return kwargs
    index = next((i for m in module.modules() if isinstance(i := getattr(m, "layer_idx", None), int)), None)
    if index is None or kwargs[name].get_seq_length(index):
        return kwargs
    _say_once(name)
    return kwargs | {name: None} | ({"use_cache": False} if "use_cache" in kwargs else {})


@functools.cache
def _say_once(name: str) -> None:
    _log.warning("memory='recompute' and 'checkpoint' train without a cache: %s is left empty", name)
