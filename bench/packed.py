"""Packed runs: one step of G replicas of a classifier at once, per run, beside stock and patched steps of one run.

A time is that of one step of one run, so that N seeds take N times it whatever G is, and rows compare. The optimizer is
each run's own AdamW, as in the studies.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
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
from petune_kernels.studies.shapes import SHAPES

from . import harness, models
from .harness import EAGER, OURS

REGIMES = tuple(regime for regime in models.REGIMES if regime != "full")
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2}
"""Of a replica's losses against its solo run's, relative, over the steps of the gate."""

_GATE_STEPS = 3


@dataclass(frozen=True)
class Settings:
    """replicas: each G that is timed. `layers` cuts the models short; `memory` takes a fresh process per variant."""

    shapes: Sequence[str] = ("minilm",)
    regimes: Sequence[str] = REGIMES
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
    harness.check_names("--shape", settings.shapes, list(SHAPES))
    harness.check_names("--regime", settings.regimes, REGIMES)
    result = harness.Result(files, "packed", dataclasses.asdict(settings), device)
    asked = models.cases(settings)
    with harness.progress(console, len(asked)) as begin:
        for case in asked:
            begin(harness.title(dataclasses.asdict(case)))
            result.add(measure_case(case, settings))
    result.finish(console, chart)
    return result.data


def measure_case(case: models.Case, settings: Settings) -> harness.Row:
    device, batch = torch.device(settings.device), models.random_batch(case, torch.device(settings.device))
    row: harness.Row = {"case": dataclasses.asdict(case), "gate": {}, "refused": {}}
    small = {name: tensor[:4, :32] if tensor.dim() > 1 else tensor[:4] for name, tensor in batch.items()}
    row["gate"][OURS], wrong = gate(case, settings, device, small)
    if wrong:
        return row | {"refused": {OURS: wrong}, "seconds": {}, "speedup": {}, "petune_over": {}, "best_peer": None}
    steps = settings.rounds + 2
    variants: dict[str, Any] = {
        name: train.Run(models.build(case, name, device, settings.layers), repeat(batch), steps, lr=1e-4, seed=0)
        for name in (EAGER, OURS)
    }
    calls = {EAGER: 1, OURS: 1}
    for G in settings.replicas:
        name = packed_name(G)
        model = models.build(case, OURS, device, settings.layers)
        variants[name], calls[name] = Packed(model, G, repeat(batch), steps, lr=1e-4), G
    row |= harness.turns({n: one.step for n, one in variants.items()}, settings.rounds, device, calls=calls)
    del variants
    gc.collect()
    if settings.memory:
        peaks = {name: measure.fresh_process(step_memory, case, name, settings) for name in row["seconds"]}
        row["memory"] = {name: dataclasses.asdict(peak) | {"rise": peak.rise} for name, peak in peaks.items()}
    return row


def packed_name(G: int) -> str:
    return f"{OURS} packed {G}"


def gate(case: models.Case, settings: Settings, device: torch.device, batch: train.Batch) -> tuple[dict[str, Any], str]:
    """What was compared, and '' or why nothing is timed: a few steps of three replicas and of the same solo runs,
    dropout on; and the patched model against the stock one, dropout off."""
    stock, patched = (models.build(case, name, device, settings.layers) for name in (EAGER, OURS))
    fact, reason = models.gate(stock, patched, batch)
    if reason:
        return fact, reason
    together = Packed(patched, 3, repeat(batch), _GATE_STEPS, lr=1e-3)
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
    fact = {"stock": fact, "compared": 3 * _GATE_STEPS, "worst": "a replica's loss", "error": worst, "bound": bound}
    return fact, "" if worst <= bound else f"wrong: a replica's loss is {worst:.1e} off its solo run's, allowed {bound}"


def step_memory(case: models.Case, name: str, settings: Settings) -> measure.Peak:
    """One step of a variant, for a process that has done nothing else, after a tiny step that sets up what stays."""
    device = torch.device(settings.device)
    batch = models.random_batch(case, device)
    small = {n: tensor[:1, :8] if tensor.dim() > 1 else tensor[:1] for n, tensor in batch.items()}
    batches = iter([small, copy.copy(batch)])
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
            packs = {G: row["seconds"][packed_name(G)] for G in result["settings"]["replicas"]}
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
