"""Models without values, on the meta device, for counting."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
)

from .errors import InputError

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
}


def empty_model(name: str, labels: int) -> nn.Module:
    """A classifier of that shape (the bare model where transformers has no such classifier), with no values.

    name: a local folder with a config.json, one of SHAPES, or a model type of transformers in its default size.
    Raises InputError for anything else; nothing is fetched.
    """
    if Path(name).is_dir():
        try:
            config = AutoConfig.from_pretrained(name, num_labels=labels, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{name} holds no transformers model: {str(error).splitlines()[0]}") from error
    elif name in SHAPES:
        kind, sizes = SHAPES[name]
        config = AutoConfig.for_model(kind, num_labels=labels, **sizes)
    elif name in CONFIG_MAPPING:
        config = AutoConfig.for_model(name, num_labels=labels)
    else:
        close = difflib.get_close_matches(name, [*SHAPES, *CONFIG_MAPPING.keys()], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise InputError(
            f"{name!r} is neither a local folder, a built-in shape ({', '.join(SHAPES)}) nor a model type of "
            f"transformers (models are not fetched){hint}"
        )
    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    with torch.device("meta"):
        return (AutoModelForSequenceClassification if known else AutoModel).from_config(config)
