"""What a projection computes for others that are not called: not again, and not kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels.patch import shared_input

from .models import batch, build, step
from .test_families import quiet, worst


def bert() -> Any:
    model = quiet(build("bert")).train()
    pk.tune(model, "full")
    return model


def replace_values(model: Any) -> None:
    torch.manual_seed(1)
    for layer in model.bert.encoder.layer:
        layer.attention.self.value = nn.Linear(48, 48)


def put(attentions: list[Any], values: list[nn.Module]) -> None:
    for attention, value in zip(attentions, values, strict=True):
        attention.value = value


def watch_rows(model: Any) -> list[Any]:
    seen: list[Any] = []
    model.bert.embeddings.register_forward_hook(lambda m, a, o: seen.append(weakref.ref(o)))
    return seen


def test_who_is_not_called_is_not_computed_for_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    project = shared_input.project
    monkeypatch.setattr(shared_input, "project", lambda x, its: sizes.append(len(its)) or project(x, its))
    model, data = bert(), batch()
    attentions = [layer.attention.self for layer in model.bert.encoder.layer]
    olds = [attention.value for attention in attentions]
    replace_values(model)
    news = [attention.value for attention in attentions]
    own = step(model, data)
    put(attentions, olds)
    pk.patch(model)
    put(attentions, news)
    for expected in (3, 2, 2):
        sizes.clear()
        assert worst(step(model, data), own)[0] < 1e-4
        assert sizes == [expected] * 2
    put(attentions, olds)
    for _ in range(2):
        sizes.clear()
        step(model, data)
    assert sizes == [3] * 2


def test_a_forward_without_backward_leaves_nothing() -> None:
    model = bert()
    pk.patch(model)
    replace_values(model)
    seen = watch_rows(model)
    model(**batch())
    gc.collect()
    assert seen[-1]() is None


def test_a_forward_that_raises_leaves_nothing() -> None:
    model, data = bert(), batch()
    own = step(model, data)
    pk.patch(model)
    seen = watch_rows(model)
    hook = model.bert.encoder.layer[1].attention.self.key.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**data)
    hook.remove()
    gc.collect()
    assert seen[-1]() is None
    for _ in range(3):
        assert worst(step(model, data), own)[0] < 1e-4


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_replaced_projection_of_a_checkpointed_layer(reentrant: bool) -> None:
    """What is saved when it runs again is what was saved at first."""
    model, data = bert(), batch()
    pk.patch(model)
    replace_values(model)
    step(model, data)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(3):
        step(model, data)
    with torch.no_grad():
        model(**data)
    step(model, data)
