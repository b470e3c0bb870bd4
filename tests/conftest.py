"""Fills every uninitialised allocation with NaN, so that an output nobody wrote cannot pass a test."""

from __future__ import annotations

import pytest
import torch

torch.use_deterministic_algorithms(True, warn_only=True)  # also makes torch poison empty tensors, C++ ones included
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_poison() -> None:
    assert torch.empty(4).isnan().all()
