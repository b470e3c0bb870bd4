"""Mixout and Child-Tuning: what two baselines do around the optimizer's step. They leave the model's modules alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class Around(Protocol):
    """Called in each step: before the forward, and between backward and the update."""

    def before(self, seed: int) -> None: ...

    def after(self) -> None: ...


class Mixout:
    """Mixout (Lee, Cho and Kang, ICLR 2020): each step computes with

        W' = ((1 - m) W0 + m W - p W0) / (1 - p),    m ~ Bernoulli(1 - p) per scalar,    dW = dW' m / (1 - p)

    in W's own memory; W0 is W now. p = 0 is W' = W, and p = 1 is W' = W0, which does not train.
    Costs W0, one copy of W and one mask byte per scalar.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], p: float):
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p!r}; accepted is 0 to 1")
        self.p = p
        self._parameters = list(parameters)
        self._start = [w.detach().clone() for w in self._parameters]
        self._held: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, seed: int) -> None:
        """Puts W' in W's place; `seed` alone decides the masks."""
        assert not self._held, "before() twice without after()"
        for i, (w, w0) in enumerate(zip(self._parameters, self._start, strict=True)):
            generator = torch.Generator(w.device).manual_seed((seed * 1_000_003 + i) % 2**63)
            keep = torch.rand(w.shape, generator=generator, device=w.device) >= self.p
            self._held.append((w.clone(), keep))
            if self.p == 1:
                w.copy_(w0)
            else:
                w.copy_((torch.where(keep, w, w0) - self.p * w0) / (1 - self.p))

    @torch.no_grad()
    def after(self) -> None:
        """Puts W back and turns the gradient of W' into that of W."""
        for w, (value, keep) in zip(self._parameters, self._held, strict=True):
            w.copy_(value)
            if w.grad is not None:
                w.grad.mul_(keep / (1 - self.p) if self.p < 1 else 0.0)
        self._held.clear()


class ChildTuning:
    """Child-Tuning_D (Xu et al., EMNLP 2021): only masked scalars of the backbone get a gradient."""

    def __init__(self, masks: Mapping[nn.Parameter, Tensor]):
        self._masks = masks

    def before(self, seed: int) -> None:
        pass

    @torch.no_grad()
    def after(self) -> None:
        for w, mask in self._masks.items():
            if w.grad is not None:
                w.grad.mul_(mask)


def fisher_masks(
    parameters: Iterable[nn.Parameter], losses: Iterable[Callable[[], Tensor]], share: float
) -> dict[nn.Parameter, Tensor]:
    """For each parameter a bool mask; together they keep the `share` (0, 1] of scalars with the largest

        F = mean over batches of (d loss / d w)^2,

    the diagonal of the empirical Fisher information, of batches as in the authors' code. Ties keep the first ones.
    losses: one for each batch of an epoch. All gradients are None afterwards.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share!r}; accepted is over 0 and up to 1")
    listed = list(parameters)
    fisher = [torch.zeros_like(w, dtype=torch.float32) for w in listed]
    for loss in losses:
        grads = torch.autograd.grad(loss(), listed, allow_unused=True)
        for f, g in zip(fisher, grads, strict=True):
            if g is not None:
                f.add_(g.float() ** 2)
    flat = torch.cat([f.flatten() for f in fisher])
    keep = torch.zeros_like(flat, dtype=torch.bool)
    order = flat.argsort(descending=True, stable=True)
    keep[order[: max(1, round(share * flat.numel()))]] = True
    parts = keep.split([f.numel() for f in fisher])
    return {w: part.view(w.shape) for w, part in zip(listed, parts, strict=True)}
