"""An encoder, a decoder and the comparison that the set-up tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

Step = tuple[Tensor, Tensor, dict[str, Tensor]]

_BASE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=64, num_labels=3, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    initializer_range=0.15,  # of the order of 1 / sqrt(hidden_size), so that attention weights differ
)  # fmt: skip
# model type -> how it is built without and with dropout
_SHAPES: dict[str, dict[str, Any]] = {"bert": {}, "llama": {"num_key_value_heads": 2}}
_DROPOUTS = {"bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "llama": ("attention_dropout",)}
FAMILIES = tuple(_SHAPES)


def build(family: str, dropout: float = 0.0, **changes: Any) -> nn.Module:
    """A small random classifier in training mode, its one-dimensional parameters away from 0 and 1. The generator is
    left as it was: Trainer calls this from model_init, after it has seeded the data order."""
    drops = dict.fromkeys(_DROPOUTS[family], dropout)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(family, **_BASE | _SHAPES[family] | drops | changes)
        )
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.add_(0.2 * torch.randn_like(p))
    return model.train()


def examples(count: int, S: int = 11, seed: int = 0) -> list[dict[str, Tensor]]:
    """A data set: `count` sequences of S ids with right padding of 0 to S/2, and labels of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = S - int(torch.randint(S // 2, (), generator=generator))
        ids = torch.randint(6, 97, (S,), generator=generator)
        ids[length:] = 1
        mask = (torch.arange(S) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids[0] % 3})
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, data: dict[str, Tensor]) -> Step:
    """Loss, logits and every gradient of one training step."""
    model.zero_grad()
    out = model(**data)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), gradients(model)


def assert_same_gradients(own: dict[str, Tensor], fused: dict[str, Tensor], tol: float = 1e-4) -> None:
    """Equal to tol of a gradient's norm, or of a fiftieth of the largest one's (a key's bias has none but rounding)."""
    assert own and own.keys() == fused.keys(), own.keys() ^ fused.keys()
    largest = max(grad.float().norm().item() for grad in own.values())
    for name, grad in own.items():
        scale = max(grad.float().norm().item(), largest / 50)
        difference = (fused[name].float() - grad.float()).norm().item()
        assert difference <= tol * scale, (name, difference, scale)


def assert_same_step(own: Step, fused: Step, tol: float = 1e-4) -> None:
    torch.testing.assert_close(fused[0].float(), own[0].float(), rtol=tol, atol=tol)
    torch.testing.assert_close(fused[1].float(), own[1].float(), rtol=tol, atol=tol)
    assert_same_gradients(own[2], fused[2], tol)
