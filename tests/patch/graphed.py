"""patch(model, cuda_graphs=True) over a recorder of CPU ops (tests/recorder.py): models for its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels import cuda_graph
from petune_kernels.patch import graphs

from ..recorder import Recorder
from . import models

FIRST = "of a shape for the first time"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)


def graphed(family: str = "bert", regime: str | None = "layernorm", lengths: Any = True, **more: Any) -> nn.Module:
    model = models.build(family, **more).train()
    if regime is not None:
        pk.tune(model, regime)
    pk.patch(model, cuda_graphs=lengths)
    return model


def plain(family: str = "bert", regime: str | None = "layernorm", **more: Any) -> nn.Module:
    return graphed(family, regime, False, **more)


def only(model: nn.Module) -> graphs.Graphs:
    (found,) = graphs.of(model).values()
    return found


def close(a: models.Step, b: models.Step) -> None:
    torch.testing.assert_close(a.loss, b.loss)
    assert a.grads.keys() == b.grads.keys()
    for name, grad in a.grads.items():
        torch.testing.assert_close(grad, b.grads[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def steps(model: nn.Module, batches: list[dict[str, Any]], seed: int = 7) -> list[models.Step]:
    found = []
    for i, data in enumerate(batches):
        torch.manual_seed(seed + i)
        found.append(models.step(model, data))
    return found
