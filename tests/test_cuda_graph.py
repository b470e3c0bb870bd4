"""What capturing does beside torch.cuda.graph, as far as a CPU shows it; and what its stand-in must not miss."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from petune_kernels import cuda_graph

from .recorder import Recorder

CPU = torch.device("cpu")


@pytest.fixture
def scaled() -> Any:
    def scaled(x: Tensor, y: float) -> Tensor:
        return torch.tensor(y).log() * x

    return _script(scaled)


def _script(function: Any) -> Any:
    with pytest.warns(DeprecationWarning):
        return torch.jit.script(function)


def test_a_number_made_by_torchscript_is_replayed(scaled: Any) -> None:
    """The suite poisons fresh memory, which the recorder sees, and not what TorchScript writes over it."""
    x, y = torch.ones(3), torch.zeros(3)
    replay = Recorder(CPU).record(lambda: y.copy_(scaled(x, 8.0)))
    for value in (1.0, 2.0):
        x.fill_(value)
        replay()
        torch.testing.assert_close(y, x * torch.tensor(8.0).log())


def test_torchscript_does_not_specialise_in_a_capture(scaled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second run with a shape it would, and on a GPU compile and load kernels."""
    for name in ("graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    recorder = cuda_graph.Recorder.__new__(cuda_graph.Recorder)
    recorder._device, recorder._pool, recorder._stream = CPU, None, None  # type: ignore[assignment]

    def run() -> None:
        scaled(torch.ones(3), 2.0)

    run()
    recorder.record(run)
    assert not _specialised(scaled)
    run()
    assert _specialised(scaled)


def _specialised(function: Any) -> bool:
    try:
        return bool(function.get_debug_state().execution_plans)
    except RuntimeError as error:  # it asserts that there is a plan
        assert "optimized_plan_" in str(error)
        return False
