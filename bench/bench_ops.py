"""The op cases under pytest-benchmark, to compare commits: `pytest bench --benchmark-only --benchmark-autosave`.

PETUNE_BENCH_TOKENS (default 16x128) and PETUNE_BENCH_WIDTH (default minilm) choose the shape.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

from bench import harness, op_runs, ops

TOKENS, NAME = os.environ.get("PETUNE_BENCH_TOKENS", "16x128"), os.environ.get("PETUNE_BENCH_WIDTH", "minilm")
if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", TOKENS):
    raise pytest.Collector.CollectError(f"PETUNE_BENCH_TOKENS is {TOKENS!r}; accepted is BATCHxLENGTH, such as 16x128")
if NAME not in op_runs.WIDTHS:
    raise pytest.Collector.CollectError(f"PETUNE_BENCH_WIDTH is {NAME!r}; accepted are {', '.join(op_runs.WIDTHS)}")
BATCH, LENGTH = map(int, TOKENS.split("x"))
WIDTH = op_runs.WIDTHS[NAME]
CASES = [(case, dtype) for case in ops.CASES for dtype in (torch.bfloat16, torch.float32) if case.comes_in(dtype)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("provider", [harness.EAGER, harness.OURS])
@pytest.mark.parametrize(
    ("case", "dtype"), CASES, ids=lambda x: f"{x.op} {x.use}".replace(" ", "-") if isinstance(x, ops.OpCase) else str(x)
)
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
