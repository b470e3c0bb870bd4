"""Every architecture of transformers' auto classes, as small as its config lets it be: patched beside unpatched.

Slow: half an hour. What cannot be built or run so small is skipped with stock's own reason. The families that
docs/coverage.md names have tests of their own; this one finds what only a stranger does.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import petune_kernels as pk

from .models import HEADS

pytestmark = pytest.mark.slow

MOST = 60_000_000  # parameters
VOCABULARY, LENGTH = 120, 12
SMALL: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "pooler_hidden_size"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_experts_per_tok", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "hidden_dim", "d_ff"), 128),
    **dict.fromkeys(("n_inner", "d_inner"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "rotary_dim", "kv_lora_rank", "v_head_dim", "sliding_window"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "pooler_hidden_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "shared_expert_intermediate_size", "moe_intermediate_size"), 64),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "q_lora_rank": 32,
    "vocab_size": VOCABULARY,
}
CASES = [
    pytest.param(head, config, id=f"{head}-{config.model_type}")
    for head in ("sequence", "causal_lm", "masked_lm", "seq2seq_lm")
    for config in getattr(transformers, HEADS[head])._model_mapping
]


def shrink(config: Any, depth: int = 0) -> None:
    for name, value in SMALL.items():
        if type(getattr(config, name, None)) is int:
            setattr(config, name, value)
    for name in ("pad", "bos", "eos", "decoder_start", "sep", "cls"):
        if (getattr(config, f"{name}_token_id", None) or 0) >= VOCABULARY:
            setattr(config, f"{name}_token_id", 1)
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, (list, tuple)) and kinds:  # one layer of each of two kinds, where there are two
        config.layer_types = [kinds[0], next((kind for kind in kinds if kind != kinds[0]), kinds[0])]
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig) and depth < 3:
            shrink(value, depth + 1)


def batch(model: Any, head: str) -> dict[str, Tensor]:
    if model.main_input_name != "input_ids":
        pytest.skip(f"reads {model.main_input_name}")
    ids = torch.randint(5, 110, (3, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int):  # T5 and BART look for the end of a text
        ids = ids.masked_fill(ids == end, 7)
        ids[:, 8] = end
    labels = torch.tensor([0, 1, 0]) if head == "sequence" else ids.clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def built(head: str, config: Any, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in evaluation, its vectors perturbed, and a batch."""
    for heads in (None, 4):
        torch.manual_seed(seed)
        try:
            small = config()
            shrink(small)
            if heads and hasattr(small, "num_key_value_heads"):
                small.num_key_value_heads = heads
            model = getattr(transformers, HEADS[head]).from_config(small).float().eval()
            if sum(p.numel() for p in model.parameters()) > MOST:
                pytest.skip("no small config")
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.nan_to_num(0.02, 0.02, 0.02) + 0.05 * torch.randn_like(p) * (p.dim() == 1))
            data = batch(model, head)
            gradients(copy.deepcopy(model), data)
        except Exception as error:  # stock's, not ours
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            return model, data
    pytest.skip(reason)


def gradients(model: nn.Module, data: dict[str, Tensor], autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**data).loss
    loss.backward()
    return {name: p.grad.detach().double() for name, p in model.named_parameters() if p.grad is not None}


def off(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The error of all gradients together."""
    assert found.keys() == exact.keys()
    return float(sum((found[n] - g).square().sum() for n, g in exact.items())) ** 0.5 / (
        float(sum(g.square().sum() for g in exact.values())) ** 0.5 or 1.0
    )


def patched(model: nn.Module, **options: Any) -> nn.Module:
    twin = copy.deepcopy(model)
    try:
        pk.patch(twin, **options)
    except pk.PatchError as error:
        assert "nothing in this" in str(error) or "has no layer" in str(error), error
        pytest.skip(str(error))
    return twin


@pytest.mark.parametrize("head,config", CASES)
def test_gradients_are_stocks(head: str, config: Any) -> None:
    model, data = built(head, config, 0)
    own = gradients(model, data)
    if off(gradients(model, data), own) > 1e-5:
        pytest.skip("stock's own gradients differ from run to run")
    twin = patched(model)
    assert off(gradients(twin, data), own) < 2e-4
    pk.unpatch(twin)
    assert off(gradients(twin, data), own) < 1e-6
    assert off(gradients(patched(model, memory="checkpoint"), data), own) < 2e-4


@pytest.mark.parametrize("head,config", CASES)
def test_sixteen_bits_and_autocast_are_no_worse_than_stock(head: str, config: Any) -> None:
    """Against float32 with the same weights; one of three seeds will do, as a router or a ReLU may tip in a batch."""
    failed = []
    for seed in range(3):
        model, data = built(head, config, seed)
        narrow = copy.deepcopy(model).bfloat16()
        wide = copy.deepcopy(narrow).float()
        exact = gradients(wide, data)
        try:
            own = [off(gradients(narrow, data), exact), off(gradients(wide, data, autocast=True), exact)]
        except Exception as error:  # stock's
            pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
        twins = patched(narrow), patched(wide)
        ours = [off(gradients(twins[0], data), exact), off(gradients(twins[1], data, autocast=True), exact)]
        if all(a <= 1.25 * b + 1e-3 for a, b in zip(ours, own, strict=True)):
            return
        failed.append((ours, own))
    raise AssertionError(failed)
