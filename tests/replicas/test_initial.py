"""What `replicate` draws anew for each replica, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import petune_kernels as pk

from ..patch.models import build
from .runs import QV, make


@pytest.mark.parametrize("family", QV)
@pytest.mark.parametrize("regime", ("layernorm", "lora", "prefix"))
def test_draw_gives_each_seed_its_own_head_and_adapters(family: str, regime: str) -> None:
    model = make(family, regime)
    pretrained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    runs = pk.replicate(model, [(4, 0), (5, 0), (4, 1)])
    for name, p in runs.named_parameters(0).items():
        q, again = runs.named_parameters(1)[name], runs.named_parameters(2)[name]
        assert torch.equal(p, again), name
        drawn = "Norm" not in name and "norm" not in name and "bias" not in name and "lora_B" not in name
        assert torch.equal(p, q) != drawn, name
        if "orm" in name:
            assert torch.equal(p, pretrained[name])
    alone = pk.replicate(make(family, regime), [(5, 9)])
    for name, p in alone.named_parameters(0).items():
        assert torch.equal(p, runs.named_parameters(1)[name])
    kept = pk.replicate(make(family, regime), [1, 2], init="keep")
    assert all(torch.equal(p, pretrained[n]) for g in (0, 1) for n, p in kept.named_parameters(g).items())


def test_draw_refuses_what_it_cannot_draw() -> None:
    model = make("bert", "frozen")
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights="pissa", target_modules=QV["bert"]))
    with pytest.raises(pk.ReplicaError, match="init_lora_weights='pissa'"):
        pk.replicate(model, [0])
    assert pk.replicate(model, [0, 1], init="keep").active == (0, 1)


@pytest.mark.parametrize("family", ("distilbert", "electra", "modernbert"))
def test_draw_leaves_frozen_values_alone(family: str) -> None:
    """A decoder's weight is the embedding's: frozen, and shared by all replicas."""
    model = build(family, head="masked_lm")
    pk.tune(model, "layernorm")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    marks = [dict(p.__dict__) for p in model.parameters()]
    pk.replicate(model, [0, 1]).release()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert [dict(p.__dict__) for p in model.parameters()] == marks


def test_draw_redraws_a_head_that_was_loaded(tmp_path: Path) -> None:
    make("bert", "frozen").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    pk.tune(model, "frozen")
    own = model.classifier.weight.detach().clone()
    runs = pk.replicate(model, [0, 1])
    first, second = (runs.named_parameters(g)["classifier.weight"] for g in (0, 1))
    assert not torch.equal(first, own) and not torch.equal(first, second)
