"""One tuning run: a method on a task with a recipe and seeds, from the pretrained folder to metrics of the test parts.

A step's batch and dropout depend on `Seeds.do` and the step's number alone, initial values on `Seeds.wi` alone.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from .measure import Peak, peak_memory
from .methods import Method, Setting, Stage, head_of
from .recipe import Recipe, Seeds
from .tasks import Examples, TaskData

Progress = Callable[[int, int, float], None]


class Step(NamedTuple):
    """Asked for by a run: the loss of these training rows, dropout seeded so, its gradients in what trains."""

    rows: list[int]
    seed: int


class Evaluate(NamedTuple):
    """Asked for by a run: mean loss and metrics of a part."""

    part: Examples


Work = Generator[Step | Evaluate, Any, None]
"""A run asks for losses and scores, so that it may compute them alone or together with others (packed.py)."""


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    validation: loss and metrics at the selected checkpoint; test: metrics by test part, there too. history: one entry
    per evaluation (stage, step over all stages, train_loss since the last one, loss and metrics, seconds). stages:
    name, trained (scalars that train, without the head's), head (those of the head), steps, seconds, and loaded_bytes
    and peak_bytes: resident (CPU, the whole process) or allocated (GPU) memory before the stage's first step, with the
    model loaded and patched, and at most while it trains. memory: how they were read. total: scalars of the pretrained
    model with its head. seconds: everything from the loaded model to the trained one, patching and evaluations too;
    without loading and the test. packed: how many runs shared the training (packed.py); then seconds is this run's
    share, while history, stages and memory are of the whole pack. failed: why the run gave no result (a loss that is
    not finite), with empty metrics. model: with keep_model, unpatched and in evaluation mode.
    """

    validation: dict[str, float]
    test: dict[str, dict[str, float]]
    history: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    total: int
    seconds: float
    memory: str
    packed: int = 1
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
    run = Tuning(Path(folder), method, task, recipe, seeds, patched, dropout, torch.device(device), progress)
    try:
        run.train()
        test = {name: run.evaluate(part)[1] for name, part in task.tests.items()} if run.failed is None else {}
    except InputError:
        raise
    except (ValueError, pk.PatchError) as error:
        raise InputError(f"method {method.name!r}: {error}") from error
    assert run.model is not None
    if keep_model and patched:
        pk.unpatch(run.model)
    return run.outcome(test, model=run.model.eval() if keep_model else None)


class Tuning:
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
        data: dict[int, Encoded] | None = None,
    ):
        self.task, self.recipe, self.seeds = task, recipe, seeds
        self.device, self._folder, self._progress = device, folder, progress
        self._patched, self._dropout, self.plan = patched, dropout, method.stages()
        self._tokenizer = train.load_tokenizer(folder)
        room = getattr(train.read_config(folder, task.labels), "max_position_embeddings", recipe.length)
        room = min(room, self._tokenizer.model_max_length)
        if recipe.length + method.prefix > room:
            prefix = f", {method.prefix} of them the prefix's" if method.prefix else ""
            raise InputError(
                f"length is {recipe.length}, but the model takes at most {room} tokens{prefix}; the recipe sets it "
                "(petune tune: --recipe length=...)"
            )
        self.data: dict[int, Encoded] = {} if data is None else data
        self.train_data = self.encoded(task.train)
        self.encoded(task.validation)  # now, or the first evaluation's time would have it
        self.per_epoch = -(-len(task.train) // recipe.batch)
        self.steps = recipe.steps or max(1, round((recipe.epochs or 0) * self.per_epoch))
        if self.steps < len(self.plan):
            raise InputError(f"{self.steps} steps are too few for {len(self.plan)} stages")
        self.model: nn.Module | None = None
        self.own: dict[str, nn.Parameter] | None = None
        """In a pack, this run's parameters by their names in the model."""
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

    def begin(self) -> Setting:
        """What the first stage starts from."""
        first = self.load()
        self.total = sum(p.numel() for p in first.parameters())
        return Setting(self.load, self.seeds.wi, self._losses, read(first).head, first)

    def train(self) -> None:
        setting = self.begin()
        batches = self.batches()
        start, self._loading = time.perf_counter(), 0.0
        for i, stage in enumerate(self.plan):
            last = i == len(self.plan) - 1
            left = self.steps - self._done
            steps = left if last else min(max(1, round(stage.share * self.steps)), left - (len(self.plan) - 1 - i))
            if self.model is not None and self._patched:
                pk.unpatch(self.model)
            self._head = None
            self.model, around = stage.prepare(setting)
            setting.model = self.model
            gc.collect()
            if self._patched:
                pk.patch(self.model, memory=self.recipe.memory)
            self.model.train()
            if stage.head_only and not self._dropout:
                self._head = HeadOnly.of(self.model, setting.head, self.train_data, self.recipe.batch)
            work = self.stage(stage, around, steps, batches, setting.head, last, start)
            self.note(peak_memory(functools.partial(self._alone, work), self.device))
            if self.failed:
                break
        self.seconds = time.perf_counter() - start - self._loading

    def note(self, peak: Peak) -> None:
        """The memory of the last stage."""
        self.stages[-1] |= {"loaded_bytes": peak.before, "peak_bytes": peak.peak}
        self.memory = peak.method

    def outcome(self, test: dict[str, dict[str, float]], **more: Any) -> Outcome:
        return Outcome(
            validation=self.selected if self.failed is None else {},
            test=test,
            history=self.history,
            stages=self.stages,
            total=self.total,
            seconds=self.seconds,
            memory=self.memory,
            failed=self.failed,
            **more,
        )

    def _alone(self, work: Work) -> None:
        """Gives a run what it asks for."""
        answer: Any = None
        try:
            while True:
                asked = work.send(answer)
                answer = self.evaluate(asked.part) if isinstance(asked, Evaluate) else self._step(asked)
        except StopIteration:
            pass

    def _step(self, asked: Step) -> float:
        torch.manual_seed(asked.seed)
        loss = self.loss(self._logits(self.train_data, asked.rows, self.width), self.train_data.labels(asked.rows))
        loss.backward()
        return loss.item()

    @functools.cached_property
    def width(self) -> int | None:
        """Of every training batch; None: that of its own longest row."""
        return self.train_data.width(range(len(self.train_data))) if self.recipe.pad == "longest" else None

    def stage(
        self, stage: Stage, around: Any, steps: int, batches: Iterator[list[int]], head: tuple[str, ...], last: bool,
        start: float,
    ) -> Work:  # fmt: skip
        assert self.model is not None
        recipe, model, began = self.recipe, self.model, time.perf_counter()
        in_model = {name: p for name, p in model.named_parameters() if p.requires_grad}
        mine = in_model if self.own is None else self.own
        trained = list(mine.values())
        rate = stage.lr or recipe.lr
        of_head = {id(p) for p in head_of(model, head).values()}
        heads, others = ([p for n, p in mine.items() if (id(in_model[n]) in of_head) == own] for own in (True, False))
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
            if around is not None:
                around.before(seed)
            losses.append((yield Step(next(batches), seed)))
            if around is not None:
                around.after()
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
            found = self._validated((yield Evaluate(self.task.validation)), stage, losses, start)
            losses.clear()
            if self.failed:
                break
            if not last:
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

    def _validated(
        self, scores: tuple[float, dict[str, float]], stage: Stage, losses: list[float], start: float
    ) -> dict[str, float]:
        loss, metrics = scores
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
        data, training = self.encoded(part), self.model.training
        self.model.eval()
        outputs = [self._logits(data, rows) for rows in self.chunks(part)]
        self.model.train(training)
        return self.scores(part, outputs)

    def chunks(self, part: Examples) -> list[list[int]]:
        """Rows of like length, as an evaluation takes them."""
        data = self.encoded(part)
        return list(chunks(data.by_length(range(len(data))), self.recipe.batch))

    def scores(self, part: Examples, outputs: list[Tensor]) -> tuple[float, dict[str, float]]:
        """From the logits of each of `chunks(part)`."""
        data, listed = self.encoded(part), self.chunks(part)
        losses = (
            self.loss(logits, data.labels(rows)).item() * len(rows)
            for logits, rows in zip(outputs, listed, strict=True)
        )
        order = torch.tensor([row for rows in listed for row in rows]).argsort()
        logits = torch.cat([logits.float().cpu() for logits in outputs])[order]
        return sum(losses) / len(part), self.task.metrics(logits.numpy(), np.asarray(part.labels))

    def _logits(self, data: Encoded, rows: list[int], width: int | None = None) -> Tensor:
        assert self.model is not None
        if self._head is not None:
            return self._head(data, rows)
        logits: Tensor = self.model(**data.inputs(rows, width)).logits
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or for a regression the mean square error, in float32."""
        if self.task.regression:
            return F.mse_loss(logits.float().squeeze(-1), labels.float())
        return F.cross_entropy(logits.float(), labels)

    def _losses(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """For each batch of the first epoch, what gives `model`'s loss with that step's dropout."""
        batches = self.batches()
        model.train()

        def loss(rows: list[int], step: int) -> Tensor:
            torch.manual_seed(self.seeds.do * train.STRIDE + step)
            return self.loss(model(**self.train_data.inputs(rows, self.width)).logits, self.train_data.labels(rows))

        for step in range(self.per_epoch):
            rows = next(batches)
            yield lambda rows=rows, step=step: loss(rows, step)  # type: ignore[misc]

    def batches(self) -> Iterator[list[int]]:
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

    def encoded(self, part: Examples) -> Encoded:
        if id(part) not in self.data:
            self.data[id(part)] = Encoded(part, self._tokenizer, self.recipe.length, self.device)
        return self.data[id(part)]
