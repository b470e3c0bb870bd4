"""Models without values, on the meta device, for counting."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from .errors import InputError, first_line

HEADS: dict[str, tuple[Any, ...]] = {
    "auto": (AutoModelForSequenceClassification, AutoModelForImageClassification, AutoModel),
    "causal-lm": (AutoModelForCausalLM,),
    "masked-lm": (AutoModelForMaskedLM,),
}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
SHAPES = {
    "bert-base": ("bert", {}),
    "bert-large": ("bert", _LARGE),
    "roberta-base": ("roberta", _ROBERTA),
    "roberta-large": ("roberta", _ROBERTA | _LARGE),
    "minilm": (
        "bert",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "tinyllama": (
        "llama",
        {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
         "intermediate_size": 5632, "pad_token_id": 0},
    ),
}  # fmt: skip


def read_shape(name: str, labels: int) -> Any:
    """The config of a model: a local folder with a config.json, one of SHAPES, or a model type of transformers in its
    default size. Raises InputError for anything else; nothing is fetched.
    """
    if Path(name).is_dir():
        try:
            return AutoConfig.from_pretrained(name, num_labels=labels, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{name} holds no transformers model: {first_line(error)}") from error
    if name in SHAPES:
        kind, sizes = SHAPES[name]
        return AutoConfig.for_model(kind, num_labels=labels, **sizes)
    if name in CONFIG_MAPPING:
        return AutoConfig.for_model(name, num_labels=labels)
    close = difflib.get_close_matches(name, [*SHAPES, *CONFIG_MAPPING.keys()], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise InputError(
        f"{name!r} is neither a local folder, a built-in shape ({', '.join(SHAPES)}) nor a model type of "
        f"transformers (models are not fetched){hint}"
    )


def empty_model(name: str, labels: int) -> nn.Module:
    """A classifier of that shape (the bare model where transformers has none), with no values.

    name and InputError as for `read_shape`.
    """
    config = read_shape(name, labels)
    with torch.device("meta"):
        return model_class(config, "auto").from_config(config)


def model_class(config: Any, head: str) -> Any:
    """transformers' class for this config with that head, one of HEADS; "auto": a classifier, or bare where there is
    none. Raises InputError where transformers has no such head for it."""
    if head not in HEADS:
        raise InputError(f"--head is {head!r}; accepted: {', '.join(HEADS)}")
    for found in HEADS[head]:
        if found is AutoModel or type(config) in found._model_mapping:
            return found
    raise InputError(f"--head {head}: transformers has none for {config.model_type}")


def has_labels(config: Any, head: str) -> bool:
    return model_class(config, head) is not AutoModel
