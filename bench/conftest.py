"""`pytest bench` collects the op cases; plain `pytest` collects tests/ only."""

from __future__ import annotations

import pytest


def pytest_collect_file(file_path, parent):
    if file_path.name == "bench_ops.py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None
