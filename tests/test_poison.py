"""The suite's own safety net: uninitialised memory reads as NaN, in Python and in the compiled ops' outputs."""

from __future__ import annotations

import torch


def test_uninitialised_memory_is_nan() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        empty = torch.empty(4, dtype=dtype)
        for t in (empty, torch.empty_like(empty), empty.new_empty(3), torch.empty_strided((2, 2), (2, 1), dtype=dtype)):
            assert t.isnan().all()
