"""Where dropout seeds come from: torch's own generator of the device, so that torch.manual_seed and activation
checkpointing rule them; in a packed run, one generator a replica. One place, so that what runs a forward again can draw
the same seeds again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class Sources:
    """One stream of seeds a replica, each what torch's own generator gives after torch.manual_seed(seed).

    active: the replicas that draw, in the order of the batch.
    """

    def __init__(self, seeds: Sequence[int]):
        self._seeds = list(seeds)
        self.active = list(range(len(seeds)))
        self._generators: dict[torch.device, list[torch.Generator]] = {}

    def __len__(self) -> int:
        return len(self.active)

    def manual_seed(self, g: int, seed: int) -> None:
        self._seeds[g] = seed
        for generators in self._generators.values():
            generators[g].manual_seed(seed)

    def draw(self, device: torch.device, n: int) -> torch.Tensor:
        """int64 [n, G]: for each active replica the n that it alone would draw now."""
        if device not in self._generators:
            self._generators[device] = [torch.Generator(device).manual_seed(s) for s in self._seeds]
        each = torch.stack([_draw(device, n, self._generators[device][g]) for g in self.active])
        return each.T.contiguous()

    def state(self) -> Any:
        return list(self._seeds), {d: [g.get_state() for g in gs] for d, gs in self._generators.items()}

    def set_state(self, state: Any) -> None:
        self._seeds = list(state[0])
        self._generators = {
            device: [torch.Generator(device).set_state(one) for one in states] for device, states in state[1].items()
        }


class _Here(threading.local):
    """A thread's own: beside a packed model, another may run in another thread. What runs again in autograd's threads
    brings its sources along (`rewound`)."""

    sources: Sources | None = None


_here = _Here()


@contextlib.contextmanager
def replicated(sources: Sources | None) -> Iterator[None]:
    """Within it every op draws a seed a replica from `sources`; None: one from torch's own generator."""
    before, _here.sources = _here.sources, sources
    try:
        yield
    finally:
        _here.sources = before


def packed() -> bool:
    """Whether each replica draws for itself now."""
    return _here.sources is not None


def _draw(device: torch.device, count: int, generator: torch.Generator | None) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device, generator=generator)


def new_seeds(n: int, device: torch.device, count: int = 1) -> Sequence[torch.Tensor]:
    """n seeds, each int64 [count] on `device`; [G] in a packed run of G replicas, where count is 1 or G.

    Drawn at once: on a GPU a draw is a launch.
    """
    sources = _here.sources
    if sources is None:
        drawn = _draw(device, n * count, None)
        return drawn.view(n, count).unbind() if n > 1 else (drawn,)
    if count not in (1, len(sources)):
        raise ValueError(f"{count} replicas of a parameter in a packed run of {len(sources)}; they must agree")
    return sources.draw(device, n).unbind()


def new_seed(device: torch.device, count: int = 1) -> torch.Tensor:
    return new_seeds(1, device, count)[0]


def state(device: torch.device) -> Any:
    """What `rewound` needs to draw again from here on: the generators of the CPU, of `device` and of the replicas."""
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        _here.sources,
        None if _here.sources is None else _here.sources.state(),
    )


@contextlib.contextmanager
def rewound(device: torch.device, to: Any) -> Iterator[None]:
    """Within it every generator stands where it stood at `state`; afterwards where it stood before."""
    sources, then = to[2], to[3]
    now = None if sources is None else sources.state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), replicated(sources):
        torch.set_rng_state(to[0])
        if to[1] is not None:
            torch.cuda.set_rng_state(to[1], device)
        if sources is not None:
            sources.set_state(then)
        try:
            yield
        finally:
            if sources is not None:
                sources.set_state(now)
