"""A part's token ids, and features of a frozen backbone in their place where only the head trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .data import chunks
from .tasks import Examples


class Encoded:
    """Token ids of a part, tokenised once; batches are padded to their own longest row."""

    def __init__(self, part: Examples, tokenizer: Any, length: int, device: torch.device):
        texts = (part.texts,) if part.pairs is None else (part.texts, part.pairs)
        self._encoded = tokenizer(*texts, truncation=True, max_length=length)
        self._labels, self._pad, self._device = torch.tensor(part.labels), tokenizer.pad, device

    def __len__(self) -> int:
        return len(self._labels)

    def by_length(self, rows: Iterable[int]) -> list[int]:
        return sorted(rows, key=lambda i: len(self._encoded["input_ids"][i]))

    def inputs(self, rows: list[int]) -> Mapping[str, Tensor]:
        columns = {name: [values[i] for i in rows] for name, values in self._encoded.items()}
        return {k: v.to(self._device) for k, v in self._pad(columns, return_tensors="pt").items()}

    def labels(self, rows: list[int]) -> Tensor:
        return self._labels[rows].to(self._device)


class HeadOnly:
    """The head alone on features of a frozen, dropout-free model: each part goes through the backbone once.

    Features are the head's input; of a sequence [B, S, H] only the first position, which is checked to be all it reads.
    """

    def __init__(self, model: nn.Module, head: nn.Module, batch: int):
        self._model, self._head, self._batch = model, head, batch
        self._features: dict[int, Tensor] = {}

    @staticmethod
    def of(model: nn.Module, names: Iterable[str], data: Encoded, batch: int) -> HeadOnly | None:
        """None where the head is not one module that makes the logits of its first position alone."""
        modules = sorted({name.split(".")[0] for name in names})
        if len(modules) != 1:
            return None
        this = HeadOnly(model, model.get_submodule(modules[0]), batch)
        with torch.no_grad():
            logits, features = this._run(data, list(range(min(2, len(data)))))
            return this if features is not None and torch.allclose(logits, this._head(features), atol=1e-6) else None

    def __call__(self, data: Encoded, rows: list[int]) -> Tensor:
        if id(data) not in self._features:
            order, found = data.by_length(range(len(data))), []
            with torch.no_grad():
                for some in chunks(order, self._batch):
                    features = self._run(data, some)[1]
                    assert features is not None
                    found.append(features)
            self._features[id(data)] = torch.cat(found)[torch.tensor(order).argsort()]
        logits: Tensor = self._head(self._features[id(data)][rows])
        return logits

    def _run(self, data: Encoded, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        seen: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            logits = self._model(**data.inputs(rows)).logits
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0].dim() not in (2, 3):
            return logits, None
        return logits, (seen[0] if seen[0].dim() == 2 else seen[0][:, :1]).detach()
