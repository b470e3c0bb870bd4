"""One table of shapes, dtypes and tolerances for every op, and the comparison with eager against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# (T, H): one row, a width below / off / on the vector of 16, a model's width, no rows at all
SHAPES = ((1, 8), (3, 7), (5, 1), (37, 100), (66, 384), (130, 769), (0, 64))
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

SLACK = 1.1
"""How much larger than eager's an op's RMS error against float64 may be (design, section 3)."""


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def forward_floor(dtype: torch.dtype) -> float:
    """Relative RMS error below which nothing is compared with eager: rounding one result, and a few fp32 steps."""
    return 0.35 * UNIT[dtype] + 4 * UNIT[torch.float32]


def row_sum_floor(dtype: torch.dtype, T: int) -> float:
    """The same for a sum over T rows: its fp32 rounding errors add up like a random walk, so they grow with sqrt(T)."""
    return 0.35 * UNIT[dtype] + (4 + 0.5 * math.sqrt(T)) * UNIT[torch.float32]


def no_worse_than_eager(name: str, ours: Tensor, eager: Tensor, exact: Tensor, floor: float) -> None:
    """Fails where our RMS error against float64 exceeds 1.1x eager's (or the floor, whichever is larger).

    The ratio of two RMS over n values itself scatters by about 1/sqrt(n); three of that are added.
    """
    assert not ours.isnan().any(), f"{name} has NaN"
    slack = SLACK + 3.0 / math.sqrt(max(ours.numel(), 1))
    error, allowed = rms(ours.double() - exact), slack * max(rms(eager.double() - exact), floor * rms(exact))
    assert error <= allowed, f"{name}: RMS error {error:.3e}, allowed {allowed:.3e}"


def run_under_isa(code: str, isa: str) -> None:
    """Runs `code`, indented by eight below `if True:`, in a process whose CPU kernels use at most this instruction set.

    PETUNE_ISA lowers the choice and never raises it, so a machine without `isa` runs on what it has.
    """
    code += "\n        from petune_kernels.backends import build_info; print('isa', build_info()['isa'])\n"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PETUNE_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    order = ("baseline", "avx2", "avx512")
    assert order.index(done.stdout.split()[-1]) <= order.index(isa)
