"""Which tile a Triton matmul takes: a small table for each chip, and what `tune` has recorded for a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .common import arch, processors


@dataclass(frozen=True)
class Config:
    """Tile of the result (rows, cols), depth of one step, warps, pipeline stages."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# Widest first. Chosen by resources (no spill, shared memory below each chip's limit); not measured.
CONFIGS: dict[int, tuple[Config, ...]] = {
    80: (Config(128, 128, 32, 8, 4), Config(64, 128, 32, 4, 4), Config(64, 64, 32, 4, 4)),
    90: (Config(128, 128, 64, 8, 4), Config(64, 128, 64, 4, 4), Config(64, 64, 64, 4, 4)),
    100: (Config(128, 128, 64, 8, 4), Config(128, 64, 64, 4, 4), Config(64, 64, 64, 4, 4)),
}

Key = tuple[int, int, int, int, int]
TUNED: dict[Key, Config] = {}
"""Recorded choices by (depth of the product, N, T rounded up to a power of two, item size, arch); `tune` fills it."""

_chosen: dict[Key, Config] = {}


def candidates(device: torch.device) -> tuple[Config, ...]:
    chip = arch(device)
    return CONFIGS[max((known for known in CONFIGS if known <= chip), default=80)]


def configure(T: int, C: int, N: int, itemsize: int, device: torch.device) -> Config:
    """The tile for [T, C] @ [C, N]: a tuned one, else the widest that still gives every multiprocessor a tile."""
    key = (C, N, triton.next_power_of_2(max(T, 1)), itemsize, arch(device))
    if key in TUNED:
        return TUNED[key]
    if key not in _chosen:
        options = candidates(device)
        wide = [c for c in options if triton.cdiv(T, c.rows) * triton.cdiv(N, c.cols) >= processors(device)]
        _chosen[key] = _fitting((wide or options[-1:])[0], itemsize)
    return _chosen[key]


def _fitting(config: Config, itemsize: int) -> Config:
    """The same bytes a step; a float32 product has no room for the widest tile."""
    return Config(min(config.rows, 64), min(config.cols, 64), 32, 4, 3) if itemsize == 4 else config


def tune(
    run: Callable[[], Any], T: int, C: int, N: int, itemsize: int, device: torch.device,
    bench: Callable[..., float] | None = None,
) -> dict[Config, float]:  # fmt: skip
    """Times `run`, a call whose matmul is [T, C] @ [C, N], with every configuration and records the fastest."""
    measure = triton.testing.do_bench if bench is None else bench
    key = (C, N, triton.next_power_of_2(max(T, 1)), itemsize, arch(device))
    before, times = TUNED.get(key), dict[Config, float]()
    try:
        for config in dict.fromkeys(_fitting(c, itemsize) for c in candidates(device)):
            TUNED[key] = config
            times[config] = measure(run)
        before = min(times, key=lambda c: times[c])
        return times
    finally:  # after an error what was there before
        del TUNED[key]
        if before is not None:
            TUNED[key] = before
