"""Runs interpreted_triton.py in a process of its own: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=pytest.mark.gpu)])
def test_launchers_against_the_reference(interpret):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if interpret == "0" and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # 700 kernels to compile
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted_triton.py"))],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
