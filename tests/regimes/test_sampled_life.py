"""Regime random: checkpoints, copies, removal, and a forward that is cut short."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sampled_helpers import fit, gradients, machinery, masks, weights
from torch import nn
from transformers import BertForSequenceClassification

from petune_kernels.regimes import tune


def test_state_dict_has_the_old_keys_and_the_trained_values(small_bert, batch) -> None:
    model = small_bert()
    keys = list(model.state_dict())
    tune(model, "random", fraction=0.3)
    fit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), batch, 1)
    values = dict(model.named_parameters())
    state = model.state_dict()  # no forward since the step
    assert list(state) == keys
    where = masks(model)
    for n, mask in where.items():
        assert torch.equal(state[n][mask], values[n + "_sampled"])
    assert any(not torch.equal(state[n], small_bert().state_dict()[n]) for n in where)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_loads_both_ways(small_bert, batch, assign: bool) -> None:
    model = small_bert()
    tune(model, "random", fraction=0.3)
    fit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), batch, 2)
    plain = small_bert(initializer_range=0.1).eval()
    plain.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=assign)
    assert torch.equal(plain(**batch).logits, model(**batch).logits)

    other = small_bert(initializer_range=0.05)
    model.load_state_dict(other.state_dict(), strict=True, assign=assign)
    values, state = dict(model.named_parameters()), other.state_dict()
    for n, mask in masks(model).items():
        assert torch.equal(values[n + "_sampled"], state[n][mask])
        assert values[n + "_sampled"].requires_grad and not values[n].requires_grad
    assert torch.equal(model.eval()(**batch).logits, other.eval()(**batch).logits)


def test_partial_and_wrong_state_dicts(small_bert) -> None:
    model = small_bert()
    tune(model, "random", fraction=0.3)
    before = weights(model)
    result = model.load_state_dict({"classifier.bias": torch.ones(2)}, strict=False)
    assert set(result.missing_keys) == set(before) - {"classifier.bias"} and result.unexpected_keys == []
    after = weights(model)
    assert all(torch.equal(after[n], before[n]) for n in before if n != "classifier.bias")
    with pytest.raises(RuntimeError, match="size mismatch for bert.encoder.layer.0.output.dense.weight"):
        model.load_state_dict({**before, "bert.encoder.layer.0.output.dense.weight": torch.ones(3)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_save_pretrained(small_bert, batch, tmp_path) -> None:
    model = small_bert()
    tune(model, "random", fraction=0.3)
    fit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), batch, 2)
    model.save_pretrained(tmp_path)
    loaded, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, _pickled])
def test_copies_are_whole_and_apart(small_bert, batch, clone) -> None:
    model = small_bert()
    tune(model, "random", fraction=0.3)
    before = weights(model)
    twin = clone(model)
    assert torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)
    fit(twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.5), batch, 2)
    assert all(torch.equal(v, before[n]) for n, v in weights(model).items())
    assert any(not torch.equal(v, before[n]) for n, v in weights(twin).items() if n in masks(twin))
    trained_weights = weights(twin)
    tune(twin, "layernorm")
    assert machinery(twin) == [] and machinery(model) != []
    assert all(torch.equal(v, trained_weights[n]) for n, v in weights(twin).items())
    gradients(model, batch)
    assert any(n.endswith("_sampled") and p.grad is not None for n, p in model.named_parameters())


def test_torch_save_of_the_whole_model(small_bert, batch, tmp_path) -> None:
    model = small_bert().eval()
    tune(model, "random", fraction=0.3)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert gradients(loaded, batch).keys() == gradients(model, batch).keys()


@pytest.mark.parametrize("regime", ["full", "layernorm", "random", "frozen"])
def test_another_regime_removes_everything(small_bert, batch, regime: str) -> None:
    model = small_bert()
    assert machinery(model) == []
    names = [n for n, _ in model.named_parameters()]
    tune(model, "random", budget=300, seed=1)
    assert len(machinery(model)) > 0
    fit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), batch, 2)
    state, logits = weights(model), model(**batch).logits
    report = tune(model, regime)
    assert report.total == sum(v.numel() for v in state.values())
    assert all(torch.equal(v, state[n]) for n, v in weights(model).items())
    assert torch.equal(model(**batch).logits, logits)
    if regime == "random":
        assert report.count == 128 == sum(int(m.sum()) for m in masks(model).values())
        tune(model, "full")
    assert machinery(model) == [] and [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters()) == (regime in ("full", "random"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises(small_bert, batch, error: type) -> None:
    """KeyboardInterrupt runs no hook of torch's: whatever looks at the model next puts it right."""
    model = small_bert().eval()
    tune(model, "random", fraction=0.3)
    parameters, logits, state = dict(model.named_parameters()), model(**batch).logits, weights(model)
    norm = model.bert.encoder.layer[1].output.LayerNorm
    forward = norm.forward

    def broken(*_: object) -> None:
        raise error

    norm.forward = broken
    for look in (
        lambda: model(**batch),
        lambda: model.state_dict(),
        lambda: model.load_state_dict(state),
        lambda: tune(model, "random", fraction=0.3),
    ):
        norm.forward = broken
        with pytest.raises(error):
            model(**batch)
        norm.forward = forward
        if error is KeyboardInterrupt:
            assert not isinstance(norm._parameters["weight"], nn.Parameter)
            look()
        now = dict(model.named_parameters())
        assert all(now[n] is p for n, p in parameters.items() if not n.endswith("_sampled"))
        assert torch.equal(model(**batch).logits, logits)
