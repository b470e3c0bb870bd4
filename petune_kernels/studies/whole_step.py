"""A whole training step as one CUDA graph a shape of batch: forward, loss, backward, clipping and optimizer.

What the step reads must stay where it is: parameters, the optimizer's state (capturable) and its rates, which are
tensors. What comes from outside is the batch, copied into static tensors, and the generator, whose seed and offset a
graph reads anew at each replay: torch.manual_seed before a step gives that step's dropout.

The first step with a shape runs plainly, and for good: it makes the optimizer's state, lets libraries choose, and shows
whether a step waits for the GPU. The second is captured, which runs nothing, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from petune_kernels import cuda_graph

from .errors import StudyError

MOST = 32
"""Shapes that are captured; steps with further ones run plainly."""

Batch = Mapping[str, Tensor]


class WholeStep:
    """Calls `step(batch)`, which changes its model in place, leaves no gradients and gives the loss [].

    Attributes: captured, graphs; replayed and plain, steps. Raises StudyError for a device that is no GPU, and for a
    step that waits for it, which no graph may: a capture that fails leaves torch's generator in it for good.
    """

    def __init__(self, step: Callable[[Batch], Tensor], device: torch.device):
        kind = cuda_graph.Recorder.device_type
        if device.type != kind:
            raise StudyError(f"a whole step as one graph needs a model on an NVIDIA GPU; this one is on {device}")
        self._step, self._recorder, self._device = step, cuda_graph.Recorder(device), device
        self._graphs: dict[Any, _Graph | None] = {}
        self._waits = ""
        self.captured = self.replayed = self.plain = 0

    def __call__(self, batch: Batch) -> Tensor:
        key = tuple((name, t.shape, t.dtype) for name, t in batch.items())
        if key not in self._graphs:
            if len(self._graphs) < MOST:
                self._graphs[key] = None
            self.plain += 1
            return self._plainly(batch)
        graph = self._graphs[key]
        if graph is None:
            if self._waits:
                raise StudyError(f"a whole step as one graph: this one waits for the GPU ({self._waits})")
            self._graphs[key] = graph = _Graph(self._step, batch, self._device, self._recorder)
            self.captured += 1
        self.replayed += 1
        return graph(batch)

    def _plainly(self, batch: Batch) -> Tensor:
        losses: list[Tensor] = []
        self._waits = self._recorder.waits(lambda: losses.append(self._step(batch))) or self._waits
        return losses[0]


class _Graph:
    def __init__(
        self, step: Callable[[Batch], Tensor], batch: Batch, device: torch.device, recorder: cuda_graph.Recorder
    ):
        self._step, self._batch = step, {name: t.clone() for name, t in batch.items()}
        self._loss: Tensor | None = None
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._replay = recorder.record(self._run)

    def _run(self) -> None:
        self._loss = self._step(self._batch)

    def __call__(self, batch: Batch) -> Tensor:
        assert self._loss is not None
        for name, static in self._batch.items():
            static.copy_(batch[name])
        self._replay()
        return self._loss.clone()
