"""What capturing does beside torch.cuda.graph, as far as a CPU shows it; and what its stand-in must not miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
