"""The emulated CUDA backend, built once for the tests that run on it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cuda_emulator import build
from tests.cuda_emulator.ops import Emulator


@pytest.fixture(scope="session")
def library() -> Emulator:
    return Emulator(build.build_ops(os.environ.get("PETUNE_SANITIZE", "0") not in ("", "0")))


@pytest.fixture
def emulator(library: Emulator) -> Iterator[Emulator]:
    yield library
    library.configure()
    library.runs = 1
