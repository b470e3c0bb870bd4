"""Reading sentences, splitting without leaks, batching."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from petune_kernels.studies import data
from petune_kernels.studies.data import Batches, Sentences
from petune_kernels.studies.errors import InputError
from petune_kernels.studies.train import load_tokenizer


def test_no_test_sentence_is_left_in_the_training_part() -> None:
    texts = [f"Sentence  {i // 2 % 60}" if i % 2 else f"sentence {i // 2 % 60} " for i in range(200)]
    whole = Sentences(texts, [i % 2 for i in range(200)], ["a", "b"])
    parts = data.split(whole, test=20, seed=0)
    keys = [{" ".join(t.lower().split()) for t in part.texts} for part in (parts.train, parts.test)]
    assert not keys[0] & keys[1]
    assert parts.dropped > 0 and len(parts.train) + len(parts.test) + parts.dropped == 200
    assert len(parts.test) == 20


def test_the_split_depends_on_the_seed_alone_and_keeps_a_fifth_at_most() -> None:
    whole = Sentences([f"s{i}" for i in range(50)], [i % 2 for i in range(50)], ["a", "b"])
    first, again, other = (data.split(whole, 1000, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first.test) == 10 and first.dropped == 0
    assert sorted(first.train.texts + first.test.texts) == sorted(whole.texts)
    assert all(int(text[1:]) % 2 == label for text, label in zip(first.train.texts, first.train.labels, strict=True))


@pytest.mark.parametrize(("rows", "message"), [(4, "too few"), (6, "fewer than two labels")])
def test_too_few_rows_cannot_be_split(rows: int, message: str) -> None:
    whole = Sentences([f"s{i}" for i in range(rows)], [0] * rows, ["a", "b"])
    with pytest.raises(InputError, match=message):
        data.split(whole, 1000, 0)


@pytest.fixture
def sentences() -> Sentences:
    """Two pools of batches and a few left over."""
    return Sentences(["good " * (1 + i % 9) for i in range(131)], [i % 2 for i in range(131)], ["a", "b"])


def batches(sentences: Sentences, model: Path, **options: Any) -> Batches:
    return Batches(sentences, load_tokenizer(model), 8, 16, torch.device("cpu"), **options)


def rows(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(words, label) of every sentence; [CLS] and [SEP] are not words."""
    return list(zip((batch["attention_mask"].sum(1) - 2).tolist(), batch["labels"].tolist(), strict=True))


def test_a_pass_gives_every_sentence_once(sentences: Sentences, tiny_model: Path) -> None:
    expected = Counter((1 + i % 9, i % 2) for i in range(131))
    found = batches(sentences, tiny_model)
    assert Counter(row for batch in found.once() for row in rows(batch)) == expected
    endless = found.shuffled(seed=3)
    first_pass = [next(endless) for _ in range(found.per_epoch)]
    assert [len(batch["labels"]) for batch in [*first_pass, next(endless)]] == [8] * 17
    left_out = expected - Counter(row for batch in first_pass for row in rows(batch))
    assert left_out.total() == 3  # what does not fill a batch


def test_the_order_depends_on_the_seed_alone(sentences: Sentences, tiny_model: Path) -> None:
    def order(seed: int) -> list[tuple[tuple[int, int], ...]]:
        endless = batches(sentences, tiny_model).shuffled(seed)
        return [tuple(rows(next(endless))) for _ in range(32)]

    assert order(1) == order(1) != order(2)
    assert set(order(1)[:16]) != set(order(1)[16:])  # other batches in the next pass, not only another order
    longest = [max(words for words, _ in batch) for batch in order(1)[:8]]
    assert longest != sorted(longest)  # sorted within a pool, but its batches come in any order


def test_padding_to_the_longest_or_to_the_full_length(sentences: Sentences, tiny_model: Path) -> None:
    longest = next(batches(sentences, tiny_model).shuffled(0))
    assert longest["input_ids"].shape[1] == longest["attention_mask"].sum(1).max()
    full = next(batches(sentences, tiny_model, pad_full=True).shuffled(0))
    assert full["input_ids"].shape == (8, 16) and rows(full) == rows(longest)


def test_a_batch_larger_than_the_data_is_refused(sentences: Sentences, tiny_model: Path) -> None:
    with pytest.raises(InputError, match="--batch is 8, but there are only 3"):
        batches(sentences.take([0, 1, 2]), tiny_model)
