"""The demo's sentences: splitting without leaks, and batches of token ids. `sources.py` reads them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .errors import InputError

MAX_LABELS = 100
Rows = TypeVar("Rows", bound=Sequence[int])
POOL = 8
"""Batches whose sentences are sorted by length together."""


@dataclass(frozen=True)
class Sentences:
    """`texts[i]` belongs to the class `names[labels[i]]`."""

    texts: list[str]
    labels: list[int]
    names: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Sentences:
        return Sentences([self.texts[i] for i in rows], [self.labels[i] for i in rows], self.names)

    def majority(self) -> float:
        """The accuracy of always answering the most frequent class."""
        return max(self.labels.count(label) for label in set(self.labels)) / len(self)


@dataclass(frozen=True)
class Split:
    """`dropped` counts the training rows left out because their text also stands in the test part."""

    train: Sentences
    test: Sentences
    dropped: int


def split(data: Sentences, test: int, seed: int) -> Split:
    """A seeded shuffle; the first `test` rows (at most a fifth of all) are the test part.

    Every training row whose text, but for case and white space, also stands in the test part is dropped: scraped
    sentence collections repeat themselves, and a repeated test sentence would measure memory instead of learning.
    """
    test = min(test, len(data) // 5)
    if test < 1:
        raise InputError(f"{len(data)} rows are too few to split into training and test; at least 5 are needed")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = data.take(order[:test])
    seen = {normalised(text) for text in held_out.texts}
    kept = [i for i in order[test:] if normalised(data.texts[i]) not in seen]
    train = data.take(kept)
    if len(set(train.labels)) < 2:
        raise InputError("the training part has fewer than two labels; the data need more rows of each")
    return Split(train, held_out, len(order) - test - len(kept))


class Batches:
    """Token ids of sentences, tokenised once. Batches are dicts on `device`, ready for a transformers model.

    `length` caps every sequence; `pad_full` pads all batches to it, otherwise to a batch's own longest sentence.
    """

    def __init__(
        self, data: Sentences, tokenizer: Any, size: int, length: int, device: torch.device, pad_full: bool = False
    ):
        if size > len(data):
            raise InputError(f"--batch is {size}, but there are only {len(data)} sentences to draw it from")
        self._labels = data.labels
        self._encoded = tokenizer(data.texts, truncation=True, max_length=length)
        self._pad = tokenizer.pad
        self._size, self._device = size, device
        self._padding: dict[str, Any] = {"padding": "longest"}
        if pad_full:
            self._padding = {"padding": "max_length", "max_length": length}

    def once(self) -> Iterator[dict[str, torch.Tensor]]:
        """Every sentence once, by length; the last batch may be smaller."""
        for rows in chunks(self._by_length(range(len(self._labels))), self._size):
            yield self._batch(rows)

    def shuffled(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Full batches without end, reshuffled every pass; the order depends on `seed` alone.

        A batch holds sentences of like length (sorted within pools of a few batches), which halves the padding.
        """
        shuffle = random.Random(seed)
        while True:
            order = list(range(len(self._labels)))
            shuffle.shuffle(order)
            for pool in chunks(order, POOL * self._size):
                batches = [rows for rows in chunks(self._by_length(pool), self._size) if len(rows) == self._size]
                shuffle.shuffle(batches)
                yield from map(self._batch, batches)

    @property
    def per_epoch(self) -> int:
        """How many full batches one pass gives."""
        return len(self._labels) // self._size

    def _by_length(self, rows: Iterable[int]) -> list[int]:
        return sorted(rows, key=lambda i: len(self._encoded["input_ids"][i]))

    def _batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        columns = {name: [values[i] for i in rows] for name, values in self._encoded.items()}
        batch = self._pad(columns, return_tensors="pt", **self._padding)
        batch["labels"] = torch.tensor([self._labels[i] for i in rows])
        return {name: tensor.to(self._device) for name, tensor in batch.items()}


def chunks(rows: Rows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]  # type: ignore[misc]


def normalised(text: str) -> str:
    """What two texts must share to count as one."""
    return " ".join(text.casefold().split())


def label_order(label: str) -> tuple[int, float, str]:
    """Numbers by value, then words by spelling."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
