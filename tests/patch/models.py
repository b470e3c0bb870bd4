"""Small random Hugging Face models of every supported family and head, their batches, and one training step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

BASE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    initializer_range=0.15, init_std=0.15,  # of the order of 1 / sqrt(hidden_size), so that attention weights differ
)  # fmt: skip
HEADS = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "multiple_choice": "AutoModelForMultipleChoice",
    "image": "AutoModelForImageClassification",
}


@dataclass(frozen=True)
class Family:
    """A model type of transformers, what its configuration adds to BASE, and how its batches are padded."""

    type: str
    config: dict[str, Any] = field(default_factory=dict)
    sides: tuple[str, ...] = ("right",)
    unfit: tuple[str, ...] = ()  # regimes that match nothing here: no biases, say
    main: str = "sequence"


_T5 = dict(d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=1)
_BART = dict(
    d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
_DECODER: dict[str, Any] = dict(sides=("right", "left"))
_LLAMA: dict[str, Any] = dict(sides=("right", "left"), unfit=("bitfit",))  # no biases
_GROUPED = dict(num_key_value_heads=2, head_dim=12)

FAMILIES: dict[str, Family] = {
    "bert": Family("bert"),
    "roberta": Family("roberta"),
    "xlm-roberta": Family("xlm-roberta"),
    "camembert": Family("camembert"),
    "electra": Family("electra", dict(embedding_size=24)),
    "distilbert": Family("distilbert", dict(dim=48, n_layers=2, n_heads=4, hidden_dim=96)),
    "albert": Family("albert", dict(embedding_size=24)),
    "mpnet": Family("mpnet"),
    "deberta-v2": Family(
        "deberta-v2",
        dict(
            relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
            conv_kernel_size=3, max_relative_positions=-1,
        ),
    ),
    "modernbert": Family(
        "modernbert", dict(global_attn_every_n_layers=2, local_attention=6, cls_token_id=0, sep_token_id=2),
        unfit=("bitfit",),
    ),
    "esm": Family("esm", dict(position_embedding_type="rotary", mask_token_id=5, token_dropout=True)),
    "vit": Family("vit", dict(image_size=8, patch_size=4), main="image"),
    "t5": Family("t5", _T5, unfit=("bitfit",)),
    "t5 gated": Family("t5", _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), unfit=("bitfit",)),
    "bart": Family("bart", _BART),
    "gpt2": Family("gpt2", dict(n_embd=48, n_layer=2, n_head=4, n_inner=96, n_positions=64), **_DECODER),
    "opt": Family("opt", dict(ffn_dim=96, word_embed_proj_dim=48), **_DECODER),
    "opt post-norm": Family("opt", dict(ffn_dim=96, word_embed_proj_dim=24, do_layer_norm_before=False), **_DECODER),
    "llama": Family("llama", dict(num_key_value_heads=2), **_LLAMA),
    "mistral": Family("mistral", dict(num_key_value_heads=2, sliding_window=5), **_LLAMA),
    "qwen3": Family("qwen3", _GROUPED, **_LLAMA),
    "gemma": Family("gemma", _GROUPED | dict(num_key_value_heads=1), **_LLAMA),
}  # fmt: skip


def heads(family: str) -> tuple[str, ...]:
    """The heads that transformers has for a family, the main one first."""
    config = type(AutoConfig.for_model(FAMILIES[family].type))
    found = [h for h, auto in HEADS.items() if config in getattr(transformers, auto)._model_mapping.keys()]
    return tuple(sorted(found, key=lambda h: h != FAMILIES[family].main))


def build(
    family: str, dtype: torch.dtype = torch.float32, head: str | None = None, dropout: bool = True, **changes: Any
) -> nn.Module:
    """A random model, the same at every call. Its parameters have bfloat16 values, so that its copies in every dtype
    are the same function; those of one dimension are perturbed, since fresh norms are all ones and zeros."""
    head = head or FAMILIES[family].main
    torch.manual_seed(0)
    if head == "causal_lm" and not FAMILIES[family].sides[1:]:
        changes = dict(is_decoder=True) | changes
    labels = dict(num_labels=2 if head == "qa" else 3)
    config = AutoConfig.for_model(FAMILIES[family].type, **BASE | labels | FAMILIES[family].config | changes)
    if not dropout:
        for name, value in config.to_dict().items():
            if ("dropout" in name or "pdrop" in name) and type(value) is float:
                setattr(config, name, 0.0)
    model = getattr(transformers, HEADS[head]).from_config(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
            p.copy_(p.bfloat16())
    return model


def batch(family: str = "bert", head: str | None = None, B: int = 3, S: int = 9, side: str = "right") -> dict[str, Any]:
    """A batch with labels, and padding on the given side of its first two rows."""
    head = head or FAMILIES[family].main
    if head == "image":
        return {"pixel_values": torch.randn(B, 3, 8, 8).bfloat16().float(), "labels": torch.arange(B) % 3}
    shape = (B, 2, S) if head == "multiple_choice" else (B, S)
    lengths = torch.full((*shape[:-1], 1), S)
    lengths[0], lengths[1] = S // 2, S - 2
    at = torch.arange(S) if side == "right" else torch.arange(S) - S + lengths  # the place in the text, 0 for its first
    mask = (at >= 0) & (at < lengths)
    ids = torch.randint(6, 97, shape).masked_fill(at == lengths - 1, 2)  # T5 and BART look for the end of a text
    ids = ids.masked_fill(~mask, 1)
    data: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if head in ("masked_lm", "causal_lm", "seq2seq_lm"):
        return data | {"labels": ids.masked_fill(~mask, -100)}
    if head == "token":
        return data | {"labels": (ids % 3).masked_fill(~mask, -100)}
    if head == "qa":
        start = mask.int().argmax(-1)
        return data | {"start_positions": start, "end_positions": start + 1}
    return data | {"labels": torch.arange(B) % (2 if head == "multiple_choice" else 3)}


def cast(data: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The batch with its floating-point entries in the model's dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}


class Step(NamedTuple):
    """Loss [], logits at the real positions, and the gradient of every parameter that got one."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor]


def logits_of(out: Any, data: dict[str, Any]) -> Tensor:
    """The logits, without those at padded positions, which mean nothing."""
    logits = out.logits if "logits" in out else torch.stack((out.start_logits, out.end_logits), -1)
    mask = data.get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape and logits.dim() == 3:
        logits = logits[mask.bool()]
    return logits.detach()


def step(model: nn.Module, data: dict[str, Any]) -> Step:
    """One training step: loss, logits and every gradient."""
    model.zero_grad()
    out = model(**data)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(out.loss.detach(), logits_of(out, data), grads)
