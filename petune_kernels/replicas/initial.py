"""Initial values that a seed decides: the head's, LoRA's and a prefix's, drawn as those who made them draw them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..patch import lora
from ..regimes.structure import read

_LOADED = "_is_hf_initialized"
"""On a parameter: transformers has loaded it, and _init_weights leaves it alone."""


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Draws what trains and was not pretrained anew: the head by transformers' own initialisation, LoRA's factors and a
    prefix by PEFT's. Everything else keeps its values. `seed` alone decides.

    Raises ValueError where it cannot be drawn: a head whose model has no _init_weights, an adapter made from the data
    or the weights (PiSSA and the like), another kind of prompt.
    """
    torch.manual_seed(seed)
    for module in _head(model):
        with _frozen_kept(module):
            _base(model)._init_weights(module)
    for module in model.modules():
        if lora.is_layer(module):
            _lora(model, module)
    for name, encoder in getattr(model, "prompt_encoder", {}).items():
        if not any(p.requires_grad for p in encoder.parameters()):
            continue
        if type(encoder).__name__ != "PrefixEncoder":
            raise ValueError(f"prompt {name!r} is a {type(encoder).__name__}, which cannot be drawn anew")
        for module in encoder.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                module.reset_parameters()


@contextlib.contextmanager
def _frozen_kept(module: nn.Module) -> Iterator[None]:
    """Within it transformers draws a module's parameters anew; afterwards those that do not train are as before: a
    decoder's weight is the embedding's, and only its bias trains."""
    own: list[Any] = list(module.parameters(recurse=False))
    frozen = [(p, p.detach().clone()) for p in own if not p.requires_grad]
    marks = [(p, p.__dict__.get(_LOADED)) for p in own]
    for p in own:
        setattr(p, _LOADED, False)
    try:
        yield
    finally:
        for p, value in frozen:
            p.copy_(value)
        for p, mark in marks:
            if mark is None:
                delattr(p, _LOADED)
            else:
                setattr(p, _LOADED, mark)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model: nn.Module) -> list[nn.Module]:
    """The modules of the head that train; PEFT trains a copy of each."""
    base = _base(model)
    head = set(read(base).head)

    def plain(path: str) -> str:
        return re.sub(r"\.(modules_to_save\.[^.]+|original_module)(?=\.)", "", path)

    names = {plain(n) for n in head}
    found = []
    for path, module in base.named_modules():
        own = [f"{path}.{n}".lstrip(".") for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if any(plain(n) in names for n in own):
            found.append(module)
    if found and not hasattr(base, "_init_weights"):
        raise ValueError(f"{type(base).__name__} has no _init_weights, so that its head cannot be drawn anew")
    return found


def _lora(model: Any, layer: Any) -> None:
    for name, factor in layer.lora_A.items():
        if not factor.weight.requires_grad:
            continue
        how = model.peft_config[name].init_lora_weights
        if how is not True and how not in (False, "gaussian"):
            raise ValueError(f"adapter {name!r} has init_lora_weights={how!r}, which cannot be drawn anew")
        layer.reset_lora_parameters(name, how)
