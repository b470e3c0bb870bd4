"""What transformers' own tests ask of BERT and RoBERTa, asked of the patched models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petune_kernels as pk

from .models import batch, build, heads
from .test_families import quiet

pytestmark = pytest.mark.parametrize("family", ("bert", "roberta"))


def patched(family: str, **options: Any) -> Any:
    model = build(family, **options).eval()
    pk.patch(model)
    return model


def inputs(family: str) -> dict[str, Any]:
    torch.manual_seed(1)
    return {k: v for k, v in batch(family).items() if k != "labels"}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_determinism_in_evaluation(family: str) -> None:
    model = patched(family)
    assert torch.equal(model(**inputs(family)).logits, model(**inputs(family)).logits)


@torch.no_grad()
def test_hidden_states(family: str) -> None:
    model = patched(family)
    out = model(**inputs(family), output_hidden_states=True)
    pk.unpatch(model)
    own = model(**inputs(family), output_hidden_states=True)
    assert len(out.hidden_states) == len(own.hidden_states) == model.config.num_hidden_layers + 1
    for a, b in zip(out.hidden_states, own.hidden_states, strict=True):
        close(a, b)


@torch.no_grad()
def test_tuple_and_dict_outputs_agree(family: str) -> None:
    model = patched(family)
    named, plain = model(**inputs(family)), model(**inputs(family), return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], named.logits)


@torch.no_grad()
def test_input_embeddings_instead_of_ids(family: str) -> None:
    model, data = patched(family), inputs(family)
    data["attention_mask"] = torch.ones_like(data["attention_mask"])
    data["input_ids"] = data["input_ids"].clamp_min(6)  # RoBERTa's positions skip padding ids, which embeddings hide
    embeds = model.get_input_embeddings()(data["input_ids"])
    close(model(inputs_embeds=embeds, attention_mask=data["attention_mask"]).logits, model(**data).logits)


@torch.no_grad()
def test_a_row_does_not_see_its_padding_or_its_neighbours(family: str) -> None:
    model, data = patched(family), inputs(family)
    length = int(data["attention_mask"][0].sum())
    alone = model(input_ids=data["input_ids"][:1, :length], attention_mask=data["attention_mask"][:1, :length]).logits
    close(model(**data).logits[:1], alone)


@torch.no_grad()
def test_new_tokens(family: str) -> None:
    model = patched(family)
    own = model(**inputs(family)).logits
    model.resize_token_embeddings(120, mean_resizing=False)
    close(model(**inputs(family)).logits, own)
    assert model(input_ids=torch.full((1, 4), 119)).logits.isfinite().all()


def test_tied_weights_stay_tied(family: str, tmp_path: Path) -> None:
    model = patched(family, head="masked_lm")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    with torch.no_grad():
        close(again(**inputs(family)).logits, model(**inputs(family)).logits)


@pytest.mark.parametrize("problem", ("regression", "single_label_classification", "multi_label_classification"))
def test_problem_types(family: str, problem: str) -> None:
    labels = {"regression": 1, "single_label_classification": 3, "multi_label_classification": 3}[problem]
    model = quiet(build(family, dropout=False, num_labels=labels, problem_type=problem))
    target = torch.randint(0, 3, (3,)) if problem.startswith("single") else torch.rand(3, labels)
    losses = []
    for fused in (False, True):
        if fused:
            pk.patch(model)
        loss = model(**inputs(family), labels=target.squeeze(-1) if labels == 1 else target).loss
        loss.backward()
        losses.append(loss.detach())
    close(losses[1], losses[0])


def test_every_head_learns_a_batch(family: str) -> None:
    for head in heads(family):
        torch.manual_seed(0)
        model = quiet(build(family, head=head, dropout=False))
        pk.patch(model)
        torch.manual_seed(1)
        data = batch(family, head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses = []
        for _ in range(8):
            loss = model(**data).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], head


def test_patching_initialises_nothing(family: str) -> None:
    model = build(family)
    before = {n: p.clone() for n, p in model.named_parameters()}
    pk.patch(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    pk.unpatch(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_decoder_with_cross_attention(family: str) -> None:
    model = quiet(build(family, head="causal_lm", dropout=False, add_cross_attention=True))
    torch.manual_seed(1)
    data = batch(family, "causal_lm") | {"encoder_hidden_states": torch.randn(3, 5, 48)}
    own = model(**data).logits
    report = pk.patch(model)
    assert isinstance(model, nn.Module) and "attention" in report.patched.values()
    close(model(**data).logits, own)


@torch.no_grad()
def test_attention_weights(family: str) -> None:
    """What eager gives; stock's default, sdpa, gives none at all."""
    model, data = build(family).eval(), inputs(family)
    model.set_attn_implementation("eager")
    own = model(**data, output_attentions=True)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with pk.patched(model):
            ours = model(**data, output_attentions=True)
        close(ours.logits, own.logits)
        assert len(ours.attentions) == len(own.attentions) == 2
        for a, b in zip(ours.attentions, own.attentions, strict=True):
            close(a, b)
