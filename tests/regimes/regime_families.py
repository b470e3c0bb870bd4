"""Small models of every supported family, with the modules that each regime must pick, written out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

SHAPE: dict[str, Any] = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=50,
    max_position_embeddings=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
)


@dataclass(frozen=True)
class Stack:
    """A stack of two blocks: its path and, relative to a block, the modules of each kind."""

    path: str
    attention: str
    ffn: str
    attention_norms: str
    ffn_norms: str
    other: str = ""  # in the block and in none of the above

    def modules(self, fields: tuple[str, ...]) -> list[str]:
        return [f"{self.path}.{i}.{m}" for i in (0, 1) for f in fields for m in getattr(self, f).split()]


@dataclass(frozen=True)
class Family:
    stacks: tuple[Stack, ...]
    head: str
    config: dict[str, Any] = field(default_factory=dict)
    embedding_norms: str = ""
    pooler: str = ""


def _bert(path: str, attention: str = "attention.self.query attention.self.key attention.self.value") -> Stack:
    return Stack(
        f"{path}.encoder.layer",
        f"{attention} attention.output.dense",
        "intermediate.dense output.dense",
        "attention.output.LayerNorm",
        "output.LayerNorm",
    )


def _llama(q_norms: str = "", attention_norms: str = "input_layernorm", ffn_norms: str = "") -> Stack:
    return Stack(
        "model.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
        "mlp.gate_proj mlp.up_proj mlp.down_proj",
        f"{attention_norms} {q_norms}",
        ffn_norms or "post_attention_layernorm",
    )


def _bart(path: str, cross: bool = False) -> Stack:
    heads = ["self_attn", "encoder_attn"] if cross else ["self_attn"]
    return Stack(
        path,
        " ".join(f"{h}.{p}" for h in heads for p in ("q_proj", "k_proj", "v_proj", "out_proj")),
        "fc1 fc2",
        " ".join(f"{h}_layer_norm" for h in heads),
        "final_layer_norm",
    )


def _t5(path: str, cross: bool) -> Stack:
    attention = " ".join(f"layer.0.SelfAttention.{p}" for p in "qkvo")
    if not cross:
        ffn = "layer.1.DenseReluDense.wi layer.1.DenseReluDense.wo"
        return Stack(path, attention, ffn, "layer.0.layer_norm", "layer.1.layer_norm", _T5_BIAS)
    attention += " " + " ".join(f"layer.1.EncDecAttention.{p}" for p in "qkvo")
    ffn = "layer.2.DenseReluDense.wi layer.2.DenseReluDense.wo"
    return Stack(path, attention, ffn, "layer.0.layer_norm layer.1.layer_norm", "layer.2.layer_norm", _T5_BIAS)


_T5_BIAS = "layer.0.SelfAttention.relative_attention_bias"
_HEAD = "classifier.dense classifier.out_proj"
_KV = dict(num_key_value_heads=1, head_dim=8)
_GEMMA2 = _llama(
    attention_norms="input_layernorm post_attention_layernorm",
    ffn_norms="pre_feedforward_layernorm post_feedforward_layernorm",
)

FAMILIES = {
    "bert": Family(
        (_bert("bert"),), "classifier", embedding_norms="bert.embeddings.LayerNorm", pooler="bert.pooler.dense"
    ),
    "roberta": Family((_bert("roberta"),), _HEAD, embedding_norms="roberta.embeddings.LayerNorm"),
    "electra": Family(
        (_bert("electra"),), _HEAD, dict(embedding_size=8), embedding_norms="electra.embeddings.LayerNorm"
    ),
    "deberta-v2": Family(
        (_bert("deberta", "attention.self.query_proj attention.self.key_proj attention.self.value_proj"),),
        "pooler.dense classifier",
        # The convolution and the norm of the relative embeddings stand outside the blocks.
        dict(relative_attention=True, norm_rel_ebd="layer_norm", conv_kernel_size=3, position_buckets=4),
        embedding_norms="deberta.embeddings.LayerNorm",
    ),
    "distilbert": Family(
        (
            Stack(
                "distilbert.transformer.layer",
                "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
                "ffn.lin1 ffn.lin2",
                "sa_layer_norm",
                "output_layer_norm",
            ),
        ),
        "pre_classifier classifier",
        dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
        embedding_norms="distilbert.embeddings.LayerNorm",
    ),
    "albert": Family(
        (
            Stack(
                "albert.encoder.albert_layer_groups.0.albert_layers",
                "attention.query attention.key attention.value attention.dense",
                "ffn ffn_output",
                "attention.LayerNorm",
                "full_layer_layer_norm",
            ),
        ),
        "classifier",
        dict(embedding_size=8, inner_group_num=2),
        embedding_norms="albert.embeddings.LayerNorm",
        pooler="albert.pooler",
    ),
    "mpnet": Family(
        (
            Stack(
                "mpnet.encoder.layer",
                "attention.attn.q attention.attn.k attention.attn.v attention.attn.o",
                "intermediate.dense output.dense",
                "attention.LayerNorm",
                "output.LayerNorm",
            ),
        ),
        _HEAD,
        embedding_norms="mpnet.embeddings.LayerNorm",
    ),
    "modernbert": Family(
        # Block 0 has an Identity for its attn_norm.
        (Stack("model.layers", "attn.Wqkv attn.Wo", "mlp.Wi mlp.Wo", "attn_norm", "mlp_norm"),),
        "head.dense head.norm classifier",
        embedding_norms="model.embeddings.norm",
    ),
    "esm": Family(
        (
            Stack(
                "esm.encoder.layer",
                "attention.self.query attention.self.key attention.self.value attention.output.dense",
                "intermediate.dense output.dense",
                "attention.LayerNorm",
                "LayerNorm",
            ),
        ),
        _HEAD,
        dict(pad_token_id=1, mask_token_id=3, emb_layer_norm_before=True),
        embedding_norms="esm.embeddings.layer_norm",
    ),
    "vit": Family(
        (
            Stack(
                "vit.layers",
                "attention.q_proj attention.k_proj attention.v_proj attention.o_proj",
                "mlp.fc1 mlp.fc2",
                "layernorm_before",
                "layernorm_after",
            ),
        ),
        "classifier",
        dict(image_size=8, patch_size=4),
    ),
    "t5": Family(
        (_t5("transformer.encoder.block", False), _t5("transformer.decoder.block", True)),
        "classification_head.dense classification_head.out_proj",
        dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ),
    "bart": Family(
        (_bart("model.encoder.layers"), _bart("model.decoder.layers", cross=True)),
        "classification_head.dense classification_head.out_proj",
        dict(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        ),
        embedding_norms="model.encoder.layernorm_embedding model.decoder.layernorm_embedding",
    ),
    "gpt2": Family(
        (Stack("transformer.h", "attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", "ln_1", "ln_2"),),
        "score",
        dict(n_embd=16, n_layer=2, n_head=2),
    ),
    # OPT registers the decoder's final norm before its blocks; it is no norm of the embeddings.
    "opt": Family((_bart("model.decoder.layers"),), "score", dict(ffn_dim=32, word_embed_proj_dim=16)),
    "llama": Family((_llama(),), "score", dict(num_key_value_heads=1)),
    "mistral": Family((_llama(),), "score", dict(num_key_value_heads=1)),
    "qwen2": Family((_llama(),), "score", dict(num_key_value_heads=1)),  # with biases on q, k, v
    "qwen3": Family((_llama("self_attn.q_norm self_attn.k_norm"),), "score", _KV),
    "gemma": Family((_llama(),), "score", _KV),
    "gemma2": Family((_GEMMA2,), "score", _KV),
    "gemma3_text": Family(
        (
            _llama(
                "self_attn.q_norm self_attn.k_norm",
                "input_layernorm post_attention_layernorm",
                "pre_feedforward_layernorm post_feedforward_layernorm",
            ),
        ),
        "score",
        _KV,
    ),
    "glm4": Family(  # registers post_attention_layernorm, the FFN's, between the attention's two
        (
            Stack(
                "model.layers",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
                "mlp.gate_up_proj mlp.down_proj",
                "input_layernorm post_self_attn_layernorm",
                "post_attention_layernorm post_mlp_layernorm",
            ),
        ),
        "score",
        _KV,
    ),
    "phi": Family(  # one norm before attention and FFN side by side; narrower norms of q and k
        (
            Stack(
                "model.layers",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense",
                "mlp.fc1 mlp.fc2",
                "input_layernorm self_attn.q_layernorm self_attn.k_layernorm",
                "",
            ),
        ),
        "score",
        dict(qk_layernorm=True),
    ),
}


def build(name: str, device: str = "meta") -> nn.Module:
    config = AutoConfig.for_model(name, **{**SHAPE, **FAMILIES[name].config})
    auto = AutoModelForImageClassification if name == "vit" else AutoModelForSequenceClassification
    with torch.device(device):
        return auto.from_config(config)


class Plain(nn.Module):
    """Neither from transformers nor built like it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.before = nn.Linear(16, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, nn.LayerNorm(16), False)
        self.final_norm = nn.LayerNorm(16)
        self.labels = nn.Embedding(3, 16)
        self.pooler = nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)
