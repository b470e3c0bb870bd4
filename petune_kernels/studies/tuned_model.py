"""A tuned model seen as a plain one: its parameters by their pretrained names, its weights, its files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import adapter
from .errors import InputError, StudyError

Value = TypeVar("Value")


def shadowed(name: str) -> bool:
    """Whether PEFT keeps this parameter as the untouched original of one that it copied."""
    return ".original_module." in name


def plain_names(named: Mapping[str, Value]) -> dict[str, Value]:
    """Parameters or a state dict of a base model inside PEFT by the names from before; of copied modules the copy."""
    return {n.replace(".modules_to_save.default", ""): value for n, value in named.items() if not shadowed(n)}


@torch.no_grad()
def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the model computes with, by the names of the model without PEFT or adapters.

    LoRA's product is added to its weight; a prefix and bottleneck adapters, which no weight holds, are left out. The
    model is left as it is; what is given is a float32 copy, so that a small product is not rounded away.
    """
    copied: Any = copy.deepcopy(model).float()
    adapter.remove(copied)
    if hasattr(copied, "merge_and_unload"):  # PEFT's, of what can be merged
        copied = copied.merge_and_unload()
    elif hasattr(copied, "get_base_model"):
        copied = copied.get_base_model()
    return plain_names(copied.state_dict())


def check_savable(method: str, options: Mapping[str, Any]) -> None:
    """Raises InputError for a method whose model `save` would refuse, so that nobody trains it for nothing."""
    if method == "eh-ft" and options.get("pet") == "prefix" and options.get("reserve"):
        raise InputError(
            f"method {method!r}: a model that has a prefix and is tuned itself cannot be saved; "
            "reserve = false leaves the prefix away in the end, and a study needs no model saved"
        )


def save(model: Any, folder: Path) -> str:
    """Writes the unpatched model into `folder` and gives the expression that loads it.

    What PEFT has wrapped is saved by PEFT, its base model being the one that was tuned; where that has changed too,
    LoRA is merged into it. Raises StudyError for a prefix on a changed base model, which no single call could load.
    """
    where = f".from_pretrained({str(folder)!r}"
    if adapter.adapters(model):
        adapter.save_pretrained(model, folder)
        return f"petune_kernels.studies.adapter{where})"
    if hasattr(model, "get_base_model"):
        base = model.get_base_model().named_parameters()
        if not any(p.requires_grad for name, p in base if ".lora_" not in name and ".modules_to_save." not in name):
            model.save_pretrained(folder)
            return f"peft.AutoPeftModelForSequenceClassification{where}, num_labels={model.config.num_labels})"
        if not hasattr(model, "merge_and_unload"):
            raise StudyError("the model was not saved: its base model and its prefix have both been tuned")
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    return f"transformers.AutoModelForSequenceClassification{where})"
