"""Host code on its way for a GPU, without one: tests/host_gpu/steps.py in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import host_gpu

SCRIPT = Path(host_gpu.__file__).with_name("steps.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_models_patch_and_train_on_a_device_in_host_memory(tmp_path: Path) -> None:
    host_gpu.build(tmp_path / "host_gpu.so")
    families = ("bert", "llama", "gpt2", "t5", "vit", "modernbert")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "host_gpu.so"), *families]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout[-4000:] + done.stderr[-4000:]
