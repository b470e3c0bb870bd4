"""The op cases under pytest-benchmark, to compare commits: `pytest bench --benchmark-only --benchmark-autosave`.

PETUNE_BENCH_TOKENS (default 16x128) and PETUNE_BENCH_WIDTH (default minilm) choose the shape.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench import harness, op_runs, ops

BATCH, LENGTH = (int(n) for n in os.environ.get("PETUNE_BENCH_TOKENS", "16x128").split("x"))
WIDTH = op_runs.WIDTHS[os.environ.get("PETUNE_BENCH_WIDTH", "minilm")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("provider", [harness.EAGER, harness.OURS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("case", ops.CASES, ids=lambda case: f"{case.op} {case.use}".replace(" ", "-"))
def test_op(case: ops.OpCase, dtype: torch.dtype, provider: str, benchmark) -> None:
    letters = ops.sizes(BATCH, LENGTH, WIDTH, dtype)
    row = harness.new_row({})
    calls = {harness.EAGER: lambda t, p, seed: case.eagerly(t, p), harness.OURS: case.ours}
    op_runs.check_op(case, calls, letters, dtype, DEVICE, row)
    assert not row["refused"], row["refused"]
    sets = [ops.inputs(case, letters, dtype, DEVICE, 0)]
    run = op_runs.Turn(provider, calls[provider], case.p, sets, DEVICE).run
    benchmark.group = f"{case.op} {case.use} {dtype}"

    def once() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(once)
