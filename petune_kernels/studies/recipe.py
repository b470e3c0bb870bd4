"""How a run trains, and its seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from petune_kernels.patch.memory import LEVELS

from . import train
from .errors import InputError


@dataclass(frozen=True)
class Seeds:
    """wi: weight initialisation (head, adapters, which scalars). do: data order and dropout."""

    wi: int
    do: int

    def __post_init__(self) -> None:
        for name in ("wi", "do"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**40:
                raise InputError(f"seeds: {name} is {value!r}; accepted is an int from 0 below 2**40")


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are mostly the second paper's.

    epochs or steps: one of them, for all stages together; a last smaller batch of an epoch counts. length: tokens, at
    most. group_by_length: a batch holds rows of like length, which saves padding. pad: a training batch is as wide as
    its own longest row ("batch") or as the longest row of the training part ("longest"), so that dropout masks do not
    depend on what else is in a batch, as packed runs need. warmup: share of a stage's steps.
    memory: the level of `pk.patch` in a patched run.
    weight_decay: of all that trains. clip: norm of all gradients. evaluate_every: "epoch" or a number of steps.
    stop_on: "loss" or "metric" (the task's primary one) of the validation part chooses the checkpoint; after `patience`
    evaluations without a better one training stops (None: never). keep: "best" or "last". Checkpoints and patience
    belong to the last stage.
    """

    lr: float
    batch: int = 16
    length: int = 128
    group_by_length: bool = False
    pad: str = "batch"
    epochs: float | None = None
    steps: int | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    dtype: str = "float32"
    memory: str = "exact"
    evaluate_every: str | int = "epoch"
    stop_on: str = "loss"
    patience: int | None = 10
    keep: str = "best"

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise InputError(f"epochs is {self.epochs} and steps {self.steps}; give exactly one of them")
        whole, real = (int,), (int, float)
        every = self.evaluate_every
        betas, pair = self.betas, isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        rules: list[tuple[str, bool, str]] = [
            ("lr", _is(self.lr, real) and 0 < self.lr < math.inf, "a number over 0"),
            ("batch", _is(self.batch, whole) and self.batch >= 1, "an int from 1"),
            ("group_by_length", type(self.group_by_length) is bool, "true or false"),
            ("pad", self.pad in ("batch", "longest"), "batch or longest"),
            ("length", _is(self.length, whole) and self.length >= 2, "an int from 2"),
            ("epochs", self.epochs is None or _is(self.epochs, real) and 0 < self.epochs < math.inf, "over 0"),
            ("steps", self.steps is None or _is(self.steps, whole) and self.steps >= 1, "an int from 1"),
            ("warmup", _is(self.warmup, real) and 0 <= self.warmup <= 1, "a share from 0 to 1"),
            ("weight_decay", _is(self.weight_decay, real) and 0 <= self.weight_decay < math.inf, "a number from 0"),
            (
                "clip",
                self.clip is None or _is(self.clip, real) and 0 < self.clip < math.inf,
                "a number over 0, or none",
            ),
            ("eps", _is(self.eps, real) and 0 < self.eps < math.inf, "a number over 0"),
            ("betas", pair and all(_is(b, real) and 0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
            ("dtype", self.dtype in train.DTYPES, " or ".join(train.DTYPES)),
            ("memory", self.memory in LEVELS, ", ".join(LEVELS)),
            ("evaluate_every", every == "epoch" or type(every) is int and every >= 1, "epoch, or an int from 1"),
            ("stop_on", self.stop_on in ("loss", "metric"), "loss or metric"),
            (
                "patience",
                self.patience is None or _is(self.patience, whole) and self.patience >= 1,
                "an int from 1, or none",
            ),
            ("keep", self.keep in ("best", "last"), "best or last"),
        ]
        for name, fits, accepted in rules:
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted is {accepted}")
        object.__setattr__(self, "betas", tuple(betas))  # a TOML file gives a list


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
