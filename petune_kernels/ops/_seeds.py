"""Where dropout seeds come from: torch's own generator of the device, so that torch.manual_seed and activation
checkpointing rule them. One place, so that what runs a forward again can draw the same seeds again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def new_seed(device: torch.device, count: int = 1) -> torch.Tensor:
    """int64 [count] on `device`."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)


def state(device: torch.device) -> Any:
    """What `rewound` needs to draw again from here on: the generators of the CPU and of `device`."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def rewound(device: torch.device, to: Any) -> Iterator[None]:
    """Within it every generator stands where it stood at `state`; afterwards where it stood before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(to[0])
        if to[1] is not None:
            torch.cuda.set_rng_state(to[1], device)
        yield
