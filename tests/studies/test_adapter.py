"""Bottleneck adapters: how many parameters, where they stand, patching in either order, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import petune_kernels as pk
from petune_kernels.studies import adapter

IDS = {"input_ids": torch.arange(5, 17).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}


def tiny(**changes: float) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=17, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    for name, value in changes.items():
        setattr(config, name, value)
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize(("reduction", "count"), [(64, 230_544), (16, 894_528), (2, 7_091_712)])
def test_counts_are_those_of_the_second_paper(reduction: int, count: int) -> None:
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig())
    assert sum(p.numel() for p in adapter.insert(model, "pfeiffer", reduction)) == count


def test_houlsby_has_twice_as_many() -> None:
    assert len(adapter.insert(tiny(), "houlsby", 4)) == 2 * len(adapter.insert(tiny(), "pfeiffer", 4)) == 16


def test_the_formula() -> None:
    model = tiny()
    adapter.insert(model, reduction=4, std=0.5)
    (one, _), x = adapter.adapters(model).values(), torch.randn(3, 64)
    assert not one.down.bias.any() and not one.up.bias.any() and not one.up.training
    y = x @ one.dense.weight.T + one.dense.bias
    h = (y @ one.down.weight.T + one.down.bias).clamp(min=0)
    torch.testing.assert_close(one(x), y + h @ one.up.weight.T + one.up.bias)
    assert list(adapter.adapters(model)) == [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]


SMALL = {"vocab_size": 17, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64, "pad_token_id": 0}
PRE_NORM = {
    "llama": (LlamaForSequenceClassification, LlamaConfig(**SMALL), ("self_attn.o_proj", "mlp.down_proj")),
    "opt": (
        OPTForSequenceClassification,
        OPTConfig(**SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 16}),
        ("self_attn.out_proj", "fc2"),
    ),
}


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize("first", ["patch", "insert"])
def test_pre_norm_blocks_have_them_after_their_closing_projections(family: str, first: str) -> None:
    kind, config, places = PRE_NORM[family]
    torch.manual_seed(0)
    stock = kind(config).eval()
    patched = copy.deepcopy(stock)
    for model in (stock, patched):
        if model is patched and first == "patch":
            pk.patch(model)
        torch.manual_seed(1)
        adapter.insert(model, "houlsby", 4, std=0.5)
    if first == "insert":
        pk.patch(patched)
    assert [path.split("layers.")[1][2:] for path in adapter.adapters(stock)] == [*places, *places]
    out = [model(**IDS).logits for model in (stock, patched)]
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-5)
    for logits in out:
        logits.square().sum().backward()
    for (name, a), b in zip(stock.named_parameters(), patched.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("first", ["patch", "insert"])
def test_patched_in_either_order_computes_the_same_with_the_same_gradients(first: str) -> None:
    stock, patched = tiny(), tiny()
    for model in (stock, patched):
        if model is patched and first == "patch":
            pk.patch(model)
        torch.manual_seed(1)
        adapter.insert(model, "houlsby", 4, std=0.5)
    if first == "insert":
        pk.patch(patched)
    assert pk.patch(patched).patched["bert.encoder.layer.0.output"] == "post_norm_tail"
    out = [model(**IDS).logits for model in (stock, patched)]
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-5)
    for logits in out:
        logits.square().sum().backward()
    for (name, a), b in zip(stock.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_remove_gives_the_very_same_model_back() -> None:
    model = tiny()
    modules, before = dict(model.named_modules()), model(**IDS).logits
    adapter.insert(model, "houlsby", 4, std=0.5)
    assert not model(**IDS).logits.allclose(before)
    adapter.remove(model)
    assert all(m is modules[name] for name, m in model.named_modules()) and not adapter.adapters(model)
    assert model(**IDS).logits.equal(before)


def test_files_carry_the_adapters_and_only_them(tmp_path: Path) -> None:
    model, other = tiny(), tiny()
    adapter.insert(model, "houlsby", 4, std=0.5)
    adapter.save(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bottlenecks.json", "bottlenecks.safetensors"]
    assert (tmp_path / "bottlenecks.safetensors").stat().st_size < 25_000  # of the model's 100 kB
    adapter.load(other, tmp_path)
    assert other(**IDS).logits.equal(model(**IDS).logits) and not any(m.training for m in other.modules())
    with pytest.raises(ValueError, match="adapters already"):
        adapter.load(other, tmp_path)
    wide = BertForSequenceClassification(
        BertConfig(vocab_size=17, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="does not fit"):
        adapter.load(wide, tmp_path)
    assert not adapter.adapters(wide)


def test_what_is_refused() -> None:
    model = tiny()
    for given, message in [
        ({"placement": "parallel"}, "accepted are pfeiffer, houlsby"),
        ({"reduction": 0}, "reduction is 0"),
        ({"reduction": 33}, "more than the width"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapter.insert(model, **given)
    assert not adapter.adapters(model)
    with pytest.raises(ValueError, match="no adapter to save"):
        adapter.save(model, Path())
    adapter.insert(model, reduction=4)
    with pytest.raises(ValueError, match="already"):
        adapter.insert(model)
    pre_norm = GPT2ForSequenceClassification(GPT2Config(vocab_size=17, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="block 0 of GPT2ForSequenceClassification does not close its ffn"):
        adapter.insert(pre_norm)  # Conv1D
    experts = MixtralForSequenceClassification(MixtralConfig(**SMALL, num_local_experts=2, num_key_value_heads=2))
    with pytest.raises(ValueError, match="block 0 of MixtralForSequenceClassification does not close its ffn"):
        adapter.insert(experts)
    assert isinstance(model.bert.encoder.layer[0].attention.output.dense, nn.Linear)
