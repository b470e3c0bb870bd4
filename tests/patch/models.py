"""Small random Hugging Face models and batches for the patch tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

BASE = dict(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=64, num_labels=3, pad_token_id=1,
)  # fmt: skip
# model type -> (what differs from BASE, modules that pattern `post_norm_tail` and `norm` must each bind)
FAMILIES: dict[str, tuple[dict[str, Any], int, int]] = {
    "bert": ({}, 4, 1),
    "roberta": ({}, 4, 1),
    "xlm-roberta": ({}, 4, 1),
    "camembert": ({}, 4, 1),
    "electra": ({"embedding_size": 48}, 4, 1),
    "deberta-v2": ({"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}, 4, 1),
    "mpnet": ({}, 2, 3),
    "esm": ({"position_embedding_type": "rotary", "mask_token_id": 5}, 0, 5),
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **BASE | FAMILIES[family][0] | changes)
    model = AutoModelForSequenceClassification.from_config(config).to(dtype)
    with torch.no_grad():  # fresh LayerNorms are all ones and zeros, which would hide a swapped or dropped parameter
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def batch(B: int = 3, S: int = 11) -> dict[str, Tensor]:
    ids = torch.randint(6, 97, (B, S))
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[0, S // 2 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "labels": torch.arange(B) % 3}


def step(model: nn.Module, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits and every gradient of one training step."""
    model.zero_grad()
    out = model(**data)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), out.logits.detach(), grads
