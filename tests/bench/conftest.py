"""What the benchmark's tests share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from bench import harness


@pytest.fixture
def text() -> Callable[[Sequence[harness.Row]], str]:
    """The printed table of rows."""

    def printed(rows: Sequence[harness.Row]) -> str:
        machine = {"device": "here", "threads": 1}
        console = Console(record=True, width=400, file=io.StringIO())
        console.print(harness.table({"benchmark": "ops", "machine": machine, "rows": rows}))
        return console.export_text()

    return printed
