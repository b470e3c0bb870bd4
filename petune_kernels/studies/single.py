"""One tuning run: a method on a task with a recipe and seeds, from the pretrained folder to metrics of the test parts.

A step's batch and dropout depend on `Seeds.do` and the step's number alone, initial values on `Seeds.wi` alone.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petune_kernels as pk
from petune_kernels.regimes.structure import read

from . import train
from .data import POOL, chunks
from .encoded import Encoded, HeadOnly
from .errors import InputError
from .measure import peak_memory
from .methods import Method, Setting, Stage, head_of
from .tasks import Examples, TaskData

Progress = Callable[[int, int, float], None]


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
    most. group_by_length: a batch holds rows of like length, which saves padding. warmup: share of a stage's steps.
    weight_decay: of all that trains. clip: norm of all gradients. evaluate_every: "epoch" or a number of steps.
    stop_on: "loss" or "metric" (the task's primary one) of the validation part chooses the checkpoint; after `patience`
    evaluations without a better one training stops (None: never). keep: "best" or "last". Checkpoints and patience
    belong to the last stage.
    """

    lr: float
    batch: int = 16
    length: int = 128
    group_by_length: bool = False
    epochs: float | None = None
    steps: int | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    dtype: str = "float32"
    evaluate_every: str | int = "epoch"
    stop_on: str = "loss"
    patience: int | None = 10
    keep: str = "best"

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise InputError(f"epochs is {self.epochs} and steps {self.steps}; give exactly one of them")
        whole, real = (int,), (int, float)
        every = self.evaluate_every
        betas = self.betas
        rules: list[tuple[str, bool, str]] = [
            ("lr", _is(self.lr, real) and 0 < self.lr < math.inf, "a number over 0"),
            ("batch", _is(self.batch, whole) and self.batch >= 1, "an int from 1"),
            ("group_by_length", type(self.group_by_length) is bool, "true or false"),
            ("length", _is(self.length, whole) and self.length >= 2, "an int from 2"),
            ("epochs", self.epochs is None or _is(self.epochs, real) and 0 < self.epochs < math.inf, "over 0"),
            ("steps", self.steps is None or _is(self.steps, whole) and self.steps >= 1, "an int from 1"),
            ("warmup", _is(self.warmup, real) and 0 <= self.warmup <= 1, "a share from 0 to 1"),
            ("weight_decay", _is(self.weight_decay, real) and self.weight_decay >= 0, "a number from 0"),
            ("clip", self.clip is None or _is(self.clip, real) and self.clip > 0, "a number over 0, or none"),
            ("eps", _is(self.eps, real) and self.eps > 0, "a number over 0"),
            ("betas", len(betas) == 2 and all(_is(b, real) and 0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
            ("dtype", self.dtype in train.DTYPES, " or ".join(train.DTYPES)),
            ("evaluate_every", every == "epoch" or type(every) is int and every >= 1, "epoch, or an int from 1"),
            ("stop_on", self.stop_on in ("loss", "metric"), "loss or metric"),
            ("patience", self.patience is None or _is(self.patience, whole) and self.patience >= 1, "an int from 1"),
            ("keep", self.keep in ("best", "last"), "best or last"),
        ]
        for name, fits, accepted in rules:
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted is {accepted}")
        object.__setattr__(self, "betas", tuple(betas))  # a TOML file gives a list


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    validation: loss and metrics at the selected checkpoint; test: metrics by test part, there too. history: one entry
    per evaluation (stage, step over all stages, train_loss since the last one, loss and metrics, seconds). stages:
    name, trained (scalars that train, without the head's), head (those of the head), steps, seconds, and loaded_bytes
    and peak_bytes: resident (CPU, the whole process) or allocated (GPU) memory before the stage's first step, with the
    model loaded and patched, and at most while it trains. memory: how they were read. total: scalars of the pretrained
    model with its head. seconds: everything from the loaded model to the trained one, patching and evaluations too;
    without loading and the test. failed: why the run gave no result (a loss that is not finite), with empty metrics.
    model: with keep_model, unpatched and in evaluation mode.
    """

    validation: dict[str, float]
    test: dict[str, dict[str, float]]
    history: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    total: int
    seconds: float
    memory: str
    failed: str | None = None
    model: nn.Module | None = None


def tune_once(
    folder: Path,
    method: Method,
    task: TaskData,
    recipe: Recipe,
    seeds: Seeds,
    *,
    patched: bool = True,
    dropout: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    keep_model: bool = False,
) -> Outcome:
    """Trains the model of `folder` by `method` and scores it at the selected checkpoint.

    patched: on fused kernels. dropout: False sets every rate to 0. progress(steps done, steps in all, loss).
    Raises InputError for a model, method or recipe that do not fit. A loss that is not finite is no error: see Outcome.
    """
    run = _Run(Path(folder), method, task, recipe, seeds, patched, dropout, torch.device(device), progress)
    try:
        run.train()
        test = {name: run.evaluate(part)[1] for name, part in task.tests.items()} if run.failed is None else {}
    except (ValueError, pk.PatchError) as error:
        raise error if isinstance(error, InputError) else InputError(f"method {method.name!r}: {error}") from error
    assert run.model is not None
    if keep_model and patched:
        pk.unpatch(run.model)
    return Outcome(
        validation=run.selected if run.failed is None else {},
        test=test,
        history=run.history,
        stages=run.stages,
        total=run.total,
        seconds=run.seconds,
        memory=run.memory,
        failed=run.failed,
        model=run.model.eval() if keep_model else None,
    )


class _Run:
    """The state of a run: the model of the present stage, its data and what has been seen."""

    def __init__(
        self,
        folder: Path,
        method: Method,
        task: TaskData,
        recipe: Recipe,
        seeds: Seeds,
        patched: bool,
        dropout: bool,
        device: torch.device,
        progress: Progress | None,
    ):
        self.task, self.recipe, self.seeds = task, recipe, seeds
        self.device, self._folder, self._progress = device, folder, progress
        self._patched, self._dropout, self._plan = patched, dropout, method.stages()
        self._tokenizer = train.load_tokenizer(folder)
        room = getattr(train.read_config(folder, task.labels), "max_position_embeddings", recipe.length)
        if recipe.length > min(room, self._tokenizer.model_max_length):
            raise InputError(
                f"length is {recipe.length}, but the model takes at most {min(room, self._tokenizer.model_max_length)}"
            )
        self._data: dict[int, Encoded] = {}
        self.train_data = self._encoded(task.train)
        self._encoded(task.validation)  # now, or the first evaluation's time would have it
        self.per_epoch = -(-len(task.train) // recipe.batch)
        self.steps = recipe.steps or max(1, round((recipe.epochs or 0) * self.per_epoch))
        if self.steps < len(self._plan):
            raise InputError(f"{self.steps} steps are too few for {len(self._plan)} stages")
        self.model: nn.Module | None = None
        self.history: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self.selected: dict[str, float] = {}
        self.failed: str | None = None
        self.seconds, self.total, self.memory = 0.0, 0, ""
        self._loading, self._done = 0.0, 0
        self._head: HeadOnly | None = None

    def load(self) -> nn.Module:
        start, dtype = time.perf_counter(), train.DTYPES[self.recipe.dtype]
        labels, wi = self.task.labels, self.seeds.wi
        model = train.load_model(self._folder, labels, wi, dtype, self.device, self._dropout)
        self._loading += time.perf_counter() - start
        return model

    def train(self) -> None:
        first: nn.Module | None = self.load()
        assert first is not None
        self.total = sum(p.numel() for p in first.parameters())
        setting = Setting(self.load, self.seeds.wi, self._losses, read(first).head, first)
        del first
        batches = self._batches()
        start, self._loading = time.perf_counter(), 0.0
        for i, stage in enumerate(self._plan):
            last = i == len(self._plan) - 1
            left = self.steps - self._done
            steps = left if last else min(max(1, round(stage.share * self.steps)), left - (len(self._plan) - 1 - i))
            if self.model is not None and self._patched:
                pk.unpatch(self.model)
            self._head = None
            self.model, around = stage.prepare(setting)
            setting.model = self.model
            gc.collect()
            if self._patched:
                pk.patch(self.model)
            self.model.train()
            if stage.head_only and not self._dropout:
                self._head = HeadOnly.of(self.model, setting.head, self.train_data, self.recipe.batch)
            work = functools.partial(self._stage, stage, around, steps, batches, setting.head, last, start)
            peak = peak_memory(work, self.device)
            self.stages[-1] |= {"loaded_bytes": peak.before, "peak_bytes": peak.peak}
            self.memory = peak.method
            if self.failed:
                break
        self.seconds = time.perf_counter() - start - self._loading

    def _stage(
        self, stage: Stage, around: Any, steps: int, batches: Iterator[list[int]], head: tuple[str, ...], last: bool,
        start: float,
    ) -> None:  # fmt: skip
        assert self.model is not None
        recipe, model, began = self.recipe, self.model, time.perf_counter()
        trained = [p for p in model.parameters() if p.requires_grad]
        rate = stage.lr or recipe.lr
        of_head = {id(p) for p in head_of(model, head).values()}
        heads, others = ([p for p in trained if (id(p) in of_head) == own] for own in (True, False))
        groups = [(trained, rate)] if stage.head_lr is None else [(heads, stage.head_lr), (others, rate)]
        updates = train.Updates(
            groups, steps, recipe.warmup, recipe.clip,
            betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay,
        )  # fmt: skip
        sizes = {"trained": sum(p.numel() for p in others), "head": sum(p.numel() for p in heads)}
        report: dict[str, Any] = {"name": stage.name, **sizes, "steps": 0, "seconds": 0.0}
        self.stages.append(report)
        best, stale, kept, losses = math.inf, 0, list[Tensor](), list[float]()
        every = self.per_epoch if recipe.evaluate_every == "epoch" else int(recipe.evaluate_every)
        for step in range(1, steps + 1):
            seed = self.seeds.do * train.STRIDE + self._done
            torch.manual_seed(seed)
            if around is not None:
                around.before(seed)
            rows = next(batches)
            loss = self._loss(self._logits(self.train_data, rows), self.train_data.labels(rows))
            loss.backward()
            if around is not None:
                around.after()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                self.failed = f"the loss of step {self._done + 1} is {losses[-1]}"
                break
            updates.step()
            self._done += 1
            report["steps"] = step
            if self._progress is not None:
                self._progress(self._done, self.steps, losses[-1])
            if step < steps and (not last or self._done % every):
                continue
            found = self._evaluate_validation(stage, losses, start)
            losses.clear()
            if self.failed or not last:
                continue
            score = found["loss"] if recipe.stop_on == "loss" else -found[self.task.primary]
            if score < best or recipe.keep == "last" or not self.selected:
                self.selected = found
                if recipe.keep == "best":
                    kept = [p.detach().clone() for p in trained]
            best, stale = min(best, score), 0 if score < best else stale + 1
            if recipe.patience is not None and stale >= recipe.patience:
                break
        report["seconds"] = time.perf_counter() - began
        if kept:
            with torch.no_grad():
                for p, value in zip(trained, kept, strict=True):
                    p.copy_(value)

    def _evaluate_validation(self, stage: Stage, losses: list[float], start: float) -> dict[str, float]:
        loss, metrics = self.evaluate(self.task.validation)
        found = {"loss": loss} | metrics
        past = {"stage": stage.name, "step": self._done, "train_loss": sum(losses) / len(losses)}
        self.history.append(past | found | {"seconds": time.perf_counter() - start - self._loading})
        if not math.isfinite(loss):
            self.failed = f"the validation loss after step {self._done} is {loss}"
        return found

    @torch.no_grad()
    def evaluate(self, part: Examples) -> tuple[float, dict[str, float]]:
        """Mean loss and metrics over the part, dropout off; the model's mode is left as it was."""
        assert self.model is not None
        data, training = self._encoded(part), self.model.training
        self.model.eval()
        outputs, total = list[Tensor](), 0.0
        order = data.by_length(range(len(data)))
        for rows in chunks(order, self.recipe.batch):
            logits = self._logits(data, rows)
            total += self._loss(logits, data.labels(rows)).item() * len(rows)
            outputs.append(logits.float().cpu())
        self.model.train(training)
        logits = torch.cat(outputs)[torch.tensor(order).argsort()]
        return total / len(part), self.task.metrics(logits.numpy(), np.asarray(part.labels))

    def _logits(self, data: Encoded, rows: list[int]) -> Tensor:
        assert self.model is not None
        if self._head is not None:
            return self._head(data, rows)
        logits: Tensor = self.model(**data.inputs(rows)).logits
        return logits

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or for a regression the mean square error, in float32."""
        if self.task.regression:
            return F.mse_loss(logits.float().squeeze(-1), labels.float())
        return F.cross_entropy(logits.float(), labels)

    def _losses(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """For each batch of the first epoch, what gives `model`'s loss with that step's dropout."""
        batches = self._batches()
        model.train()

        def loss(rows: list[int], step: int) -> Tensor:
            torch.manual_seed(self.seeds.do * train.STRIDE + step)
            return self._loss(model(**self.train_data.inputs(rows)).logits, self.train_data.labels(rows))

        for step in range(self.per_epoch):
            rows = next(batches)
            yield lambda rows=rows, step=step: loss(rows, step)  # type: ignore[misc]

    def _batches(self) -> Iterator[list[int]]:
        """Rows of batches without end, reshuffled every epoch, one of which may be smaller (as a rule the last).

        With group_by_length the rows of POOL batches together are sorted by length and cut into batches, whose order
        is shuffled again.
        """
        shuffle, size = random.Random(self.seeds.do), self.recipe.batch
        order = list(range(len(self.task.train)))
        while True:
            shuffle.shuffle(order)
            if not self.recipe.group_by_length:
                yield from chunks(list(order), size)
                continue
            for pool in chunks(list(order), POOL * size):
                batches = list(chunks(self.train_data.by_length(pool), size))
                shuffle.shuffle(batches)
                yield from batches

    def _encoded(self, part: Examples) -> Encoded:
        if id(part) not in self._data:
            self._data[id(part)] = Encoded(part, self._tokenizer, self.recipe.length, self.device)
        return self._data[id(part)]


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
