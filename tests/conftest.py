"""Fills every uninitialised allocation with NaN, so that an output nobody wrote cannot pass a test."""

from __future__ import annotations

import pytest
import torch

torch.use_deterministic_algorithms(True, warn_only=True)  # also makes torch poison empty tensors, C++ ones included
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no NVIDIA GPU"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow (make test-slow)"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
