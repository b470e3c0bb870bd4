"""Every family, head and regime: the patched model's loss, logits and every gradient are the unpatched one's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune_kernels as pk
from petune_kernels.regimes import regimes

from . import coverage
from .models import FAMILIES, Step, batch, build, heads, step

REGIMES = (*regimes(), "layernorm of layer 1")
FITTING = [(family, regime) for family, f in FAMILIES.items() for regime in REGIMES if regime not in f.unfit]
FITTING.remove(("albert", "layernorm of layer 1"))  # its layers are one
MAIN = [(family, FAMILIES[family].main, "right", regime) for family, regime in FITTING]
OTHER = [
    (family, head, side, "full")
    for family, f in FAMILIES.items()
    for head in heads(family)
    for side in f.sides
    if (head, side) != (f.main, "right")
]


def quiet(model: nn.Module) -> nn.Module:
    """In training mode, with every dropout at 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def prepared(family: str, head: str, side: str) -> tuple[nn.Module, dict[str, Any]]:
    model = quiet(build(family, head=head, dropout=False))
    torch.manual_seed(1)
    return model, batch(family, head, side=side)


def tune(model: nn.Module, regime: str) -> None:
    name, _, layer = regime.partition(" of layer ")
    pk.tune(model, name, layers=[int(layer)] if layer else None)


def rms(t: Tensor) -> float:
    return t.double().norm().item() / max(1, t.numel()) ** 0.5


def worst(of: Step, exact: Step) -> tuple[float, str]:
    """The largest relative error of a gradient. One much smaller than the others is relative to a hundredth of the
    largest: some are zero but for rounding (a key's bias, the bias of logits that are compared with each other)."""
    assert of.grads.keys() == exact.grads.keys()
    common = 1e-2 * max(rms(g) for g in exact.grads.values())
    return max((rms(of.grads[n].double() - g.double()) / max(rms(g), common), n) for n, g in exact.grads.items())


@pytest.mark.parametrize(("family", "head", "side", "regime"), MAIN + OTHER)
def test_same_step(family: str, head: str, side: str, regime: str) -> None:
    model, data = prepared(family, head, side)
    tune(model, regime)
    own = step(model, data)
    assert own.grads, "a regime that trains nothing would show nothing"
    report = pk.patch(model)
    assert report.patched
    ours = step(model, data)
    torch.testing.assert_close(ours.loss, own.loss, rtol=1e-5, atol=1e-6)
    assert rms(ours.logits - own.logits) <= 2e-5 * rms(own.logits)
    error, name = worst(ours, own)
    assert error <= 2e-4, (name, error)
    pk.unpatch(model)
    again = step(model, data)
    assert torch.equal(again.loss, own.loss) and all(torch.equal(g, again.grads[n]) for n, g in own.grads.items())


@pytest.mark.parametrize(("family", "regime"), [(n, r) for n, f in FAMILIES.items() for r in f.unfit])
def test_what_does_not_fit_is_refused(family: str, regime: str) -> None:
    with pytest.raises(ValueError, match=regime):
        pk.tune(build(family), regime)


def pooled(of: Step, exact: Step) -> float:
    """The error of all gradients together, relative to their size."""
    off = sum((of.grads[n].double() - g).square().sum() for n, g in exact.grads.items())
    return float(off / sum(g.square().sum() for g in exact.grads.values())) ** 0.5


@pytest.mark.parametrize(("family", "regime"), FITTING)
def test_bfloat16_is_no_worse_than_stock(family: str, regime: str) -> None:
    """Against float64. Two roundings of one sum differ by chance, more so for one tensor than for all together; a wrong
    term is off by far more."""
    model, data = prepared(family, FAMILIES[family].main, "right")
    tune(model, regime)

    def run(variant: nn.Module, dtype: torch.dtype) -> Step:
        return step(variant.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()})

    exact = run(copy.deepcopy(model), torch.float64)
    stock = run(copy.deepcopy(model), torch.bfloat16)
    pk.patch(model)
    ours = run(model, torch.bfloat16)
    eps = torch.finfo(torch.bfloat16).eps
    size = rms(exact.logits)
    assert rms(ours.logits - exact.logits) <= 1.5 * rms(stock.logits - exact.logits) + eps * size
    assert pooled(ours, exact) <= 1.5 * pooled(stock, exact) + eps
    assert worst(ours, exact)[0] <= 2 * worst(stock, exact)[0] + 2 * eps


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation(family: str) -> None:
    model = build(family).eval()
    data = batch(family)
    with torch.no_grad():
        own = model(**data).logits
        with pk.patched(model):
            ours = model(**data).logits
    assert rms(ours - own) <= 2e-5 * rms(own)


@pytest.mark.parametrize("family", [f for f in FAMILIES if {"causal_lm", "seq2seq_lm"} & {*heads(f)}])
def test_generation_with_a_cache(family: str) -> None:
    found = heads(family)
    head = "seq2seq_lm" if "seq2seq_lm" in found else "causal_lm"
    model = build(family, head=head).eval()
    ids = torch.randint(6, 97, (2, 7))
    for padding in (0, 3):  # on the left, as for generation
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        own = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        with pk.patched(model):
            ours = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(ours, own)


def test_coverage_is_as_documented() -> None:
    assert coverage.page() == coverage.PAGE.read_text(), "python -m tests.patch.coverage writes the page anew"
