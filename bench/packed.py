"""Packed runs: one step of G replicas of a classifier at once, per run, beside stock and patched steps of one run.

A time is that of one step of one run, so that N seeds take N times it whatever G is, and rows compare. The optimizer is
each run's own AdamW, as in the studies.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import petune_kernels as pk
from petune_kernels.studies import measure, train
from petune_kernels.studies.result import Files

from . import harness, models
from .gate import shown
from .harness import EAGER, OURS

REGIMES = tuple(regime for regime in models.REGIMES if regime != "full")
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2}
"""Of a replica's losses against its solo run's, relative, over the steps of the gate."""

_GATE_STEPS = 3


@dataclass(frozen=True)
class Settings:
    """`regimes`: all that a shape has if empty; `replicas`: each G that is timed; `layers` cuts the models short;
    `memory` takes a fresh process per variant."""

    shapes: Sequence[str] = ("minilm",)
    regimes: Sequence[str] = ()
    dtypes: Sequence[str] = tuple(train.DTYPES)
    replicas: Sequence[int] = (1, 2, 4, 8, 20)
    batch: int = 16
    length: int = 128
    device: str = "cpu"
    rounds: int = 7
    layers: int | None = None
    memory: bool = False


class Packed:
    """Training of a packed model, a batch a replica; like train.Run, every replica with its own seed."""

    def __init__(self, model: nn.Module, G: int, batches: Iterator[train.Batch], steps: int, lr: float):
        self.runs = pk.replicate(model, range(G), init="keep")
        self.losses: list[list[float]] = []
        self._batches = batches
        self._updates = [train.Updates([(self.runs.parameters(g), lr)], steps) for g in range(G)]

    def step(self) -> None:
        runs, batch = self.runs, dict(next(self._batches))
        labels = batch.pop("labels")
        for g in runs.active:
            runs.manual_seed(g, g * train.STRIDE + len(self.losses))
        logits = runs.split(runs.model(**runs.repeat(batch)).logits)
        losses = torch.stack([nn.functional.cross_entropy(one.float(), labels) for one in logits])
        losses.sum().backward()
        for updates in self._updates:
            updates.step()
        self.losses.append(losses.tolist())


def run(settings: Settings, files: Files, console: Console) -> dict[str, Any]:
    """Every case of the settings, written after each. Raises StudyError in the end where petune failed its gate."""
    device = torch.device(settings.device)
    models.check_shapes(settings.shapes, settings.length)
    harness.check_names("--regime", settings.regimes, REGIMES)
    result = harness.Result(files, "packed", dataclasses.asdict(settings), device)
    asked = models.cases(settings.shapes, settings, settings.regimes, REGIMES)
    with harness.progress(console, len(asked)) as begin:
        for case in asked:
            begin(harness.title(dataclasses.asdict(case)))
            row = harness.new_row(dataclasses.asdict(case))
            with harness.reported(row):
                measure_case(case, settings, row)
            result.add(row)
    result.finish(console, chart)
    return result.data


def measure_case(case: models.Case, settings: Settings, row: harness.Row) -> None:
    device, batch = torch.device(settings.device), models.random_batch(case, torch.device(settings.device))
    check(case, settings, batch, row)
    if OURS in row["refused"]:
        return
    steps = settings.rounds + 3
    calls = {EAGER: 1, OURS: 1} | {packed_name(G): G for G in settings.replicas}

    def ready(name: str, G: int) -> Callable[[], None]:
        model = models.build(case, EAGER if name == EAGER else OURS, device, settings.layers)
        alone, batches = name in (EAGER, OURS), repeat(batch)
        run = train.Run(model, batches, steps, 1e-4, seed=0) if alone else Packed(model, G, batches, steps, 1e-4)
        run.step()
        return run.step

    runs = harness.attempt(calls, row["refused"], ready)
    harness.needed(runs)
    row |= harness.turns(runs, settings.rounds, device, calls=calls)
    del runs
    gc.collect()
    if settings.memory:
        peaks = harness.attempt(
            row["seconds"], row["refused"], lambda name, _: measure.fresh_process(step_memory, case, name, settings)
        )
        row["memory"] = {name: dataclasses.asdict(peak) | {"rise": peak.rise} for name, peak in peaks.items()}


def packed_name(G: int) -> str:
    return f"{OURS} packed {G}"


def check(case: models.Case, settings: Settings, batch: train.Batch, row: harness.Row) -> None:
    """Whether ours is right, into the row: the patched model by `models.judge`, and a few steps of three replicas by
    the same solo runs, dropout on, at the size that is timed."""
    device = batch["input_ids"].device
    built = {name: models.build(case, name, device, settings.layers) for name in (EAGER, OURS)}
    models.judge(built, batch, row)
    if OURS not in built:
        return
    together = Packed(built[OURS], 3, repeat(batch), _GATE_STEPS, lr=1e-3)
    for _ in range(_GATE_STEPS):
        together.step()
    worst = 0.0
    for g, losses in enumerate(zip(*together.losses, strict=True)):
        model = models.build(case, OURS, device, settings.layers)
        alone = train.Run(model, repeat(batch), _GATE_STEPS, lr=1e-3, seed=g)
        for _ in range(_GATE_STEPS):
            alone.step()
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(losses, alone.losses, strict=True)))
    bound = BOUNDS[case.dtype]
    fact = {"compared": 3 * _GATE_STEPS, "worst": "a replica's loss", "error": shown(worst), "bound": bound}
    row["gate"][OURS] = {"stock": row["gate"][OURS]} | fact
    if not worst <= bound:
        row["refused"][OURS] = f"wrong: a replica's loss is {worst:.1e} off its solo run's, allowed {bound}"


def step_memory(case: models.Case, name: str, settings: Settings) -> measure.Peak:
    """One step of a variant, for a process that has done nothing else, after a tiny step that sets up what stays."""
    device = torch.device(settings.device)
    batch = models.random_batch(case, device)
    batches = iter([models.part(batch, 1, 8), copy.copy(batch)])
    model = models.build(case, EAGER if name == EAGER else OURS, device, settings.layers)
    if name.startswith(packed_name(0)[:-1]):
        step = Packed(model, int(name.rsplit(" ", 1)[1]), batches, 2, lr=1e-4).step
    else:
        step = train.Run(model, batches, 2, lr=1e-4, seed=0).step
    step()
    return measure.peak_memory(step, device)


def chart(result: Mapping[str, Any], path: Path) -> None:
    """Steps of a run per second against G, a panel a dtype and a colour a regime; solo patched and stock as lines."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["seconds"]]
    dtypes = list(dict.fromkeys(row["case"]["dtype"] for row in rows)) or [""]
    figure = Figure(figsize=(5 * len(dtypes), 4.2), dpi=150, layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        for i, row in enumerate(r for r in rows if r["case"]["dtype"] == dtype):
            colour = harness.COLOURS[i % len(harness.COLOURS)]
            timed = {G: row["seconds"].get(packed_name(G)) for G in result["settings"]["replicas"]}
            packs = {G: one for G, one in timed.items() if one is not None}
            speed = [1 / one["median"] for one in packs.values()]
            spread = [[v - 1 / one["high"] for v, one in zip(speed, packs.values(), strict=True)],
                      [1 / one["low"] - v for v, one in zip(speed, packs.values(), strict=True)]]  # fmt: skip
            axes.errorbar(list(packs), speed, spread, marker="o", capsize=2, color=colour, label=row["case"]["regime"])
            for name, style in ((OURS, "--"), (EAGER, ":")):
                axes.axhline(1 / row["seconds"][name]["median"], color=colour, linestyle=style, linewidth=1)
        axes.set(
            title=dtype, xlabel="runs packed together", ylim=(0, None), xticks=list(result["settings"]["replicas"])
        )
        axes.grid(alpha=0.25)
    first = figure.axes[0]
    first.set_ylabel("steps of a run per second")
    first.plot([], [], "k--", label="alone, patched")
    first.plot([], [], "k:", label="alone, stock")
    machine, settings = result["machine"], result["settings"]
    figure.suptitle(
        f"{settings['batch']} x {settings['length']} on {machine['device']}, {machine['threads']} threads", fontsize=10
    )
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
