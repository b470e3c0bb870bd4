"""DDP and FSDP2 on two gloo processes: the patched model's gradients are those of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from petune_kernels.regimes import regimes

EXPECTED = [
    *(f"ddp bert {regime} patched before" for regime in (*regimes(), "lora")),
    "ddp bert layernorm patched after",
    "ddp llama layernorm patched before",
    "ddp llama lora patched before",
    *(f"fsdp2 bert {regime} exact by linear" for regime in ("layernorm", "full", "lora")),
    *(
        f"fsdp2 bert {regime} {level} by layer"
        for regime in ("layernorm", "full", "lora")
        for level in ("exact", "recompute", "checkpoint")
    ),
    "fsdp2 bert full refused after",
]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_give_the_gradients_of_one() -> None:
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
        + ["tests.patch.distributed_worker"],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-6000:]
    for rank in (0, 1):
        for name in EXPECTED:
            assert f"rank {rank}: {name} holds" in ran.stdout, name
    assert "find_unused_parameters" not in ran.stderr
