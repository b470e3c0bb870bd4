"""Small random models for the regime tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification


@pytest.fixture
def small_bert() -> Callable[..., BertForSequenceClassification]:
    """Builds a BERT of 2 layers, 16 wide, for 2 labels, always with the same weights; config fields may be given."""

    def build(**config: object) -> BertForSequenceClassification:
        shape = dict(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            initializer_range=0.2,
        )
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**{**shape, **config}))

    return build


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
