"""What every memory level keeps and costs, beside eager PyTorch and PEFT, transformers' checkpointing and torch.compile
with an activation memory budget.

kept: bytes a token and hidden unit of one layer in bfloat16 with dropout, without padding: three layers minus two,
every tensor saved for backward counted once (studies/measure.py). With the CPU's kernels on real tensors; with CUDA's
on the meta device, which takes the ways of PyTorch on a GPU (studies/footprint.py). Time: whole steps in turn. Peak: a
whole step in a fresh process, with freed blocks given back at once and as glibc is by default (studies/report.py). What
raises, or is wrong (the gate of `models`), is refused with the reason and costs no other its numbers.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import petune_kernels as pk
from petune_kernels import meta
from petune_kernels.studies import footprint, measure, report, train
from petune_kernels.studies.errors import InputError
from petune_kernels.studies.result import Files

from . import harness, models
from .harness import EAGER

HF = report.CHECKPOINTED
LEVELS = ("exact", "coded", "recompute", "checkpoint")
KINDS, PARTS = ("cuda", "cpu"), ("kept", "floor")
BUDGETS = {f"torch.compile, budget {budget}": budget for budget in (0.8, 0.5, 0.2)}
REGIMES = {
    "bert-base": ("full", "layernorm", "bitfit", "lora-qv p=0.1", "lora-all p=0.1"),
    "tinyllama": ("full", "layernorm", "lora-qv p=0.1", "lora-all p=0.1"),
}


@dataclass(frozen=True)
class Settings:
    """timed: the shapes of which steps are run, cut to so many layers, in `rounds` turns, and their peaks taken; the
    others are only counted. budgets: the regimes in which torch.compile is there too, of the timed shapes: it takes
    minutes a model."""

    shapes: Sequence[str] = tuple(REGIMES)
    regimes: Sequence[str] = ()
    batch: int = 16
    length: int = 128
    layers: int = 3
    timed: Sequence[str] = ("bert-base",)
    rounds: int = 10
    budgets: Sequence[str] = ()
    device: str = "cpu"


def run(settings: Settings, files: Files, console: Console) -> dict[str, Any]:
    """Every shape and regime, written after each."""
    models.check_shapes(settings.shapes, settings.length, list(REGIMES))
    harness.check_names("--time", settings.timed, settings.shapes)
    known = dict.fromkeys(name for shape in settings.shapes for name in REGIMES[shape])
    harness.check_names("--regime", settings.regimes, list(known))
    if settings.budgets and not settings.timed:
        raise InputError("--compile takes its times from whole steps: it needs --time SHAPE")
    timed = dict.fromkeys(name for shape in settings.timed for name in REGIMES[shape])
    harness.check_names("--compile", settings.budgets, [n for n in timed if n in (settings.regimes or timed)])
    result = harness.Result(files, "memory", dataclasses.asdict(settings), torch.device(settings.device))
    cases = [
        models.Case(shape, regime, "bfloat16", settings.batch, settings.length)
        for shape in settings.shapes
        for regime in REGIMES[shape]
        if not settings.regimes or regime in settings.regimes
    ]
    with harness.progress(console, len(cases)) as begin:
        for case in cases:
            begin(harness.title(dataclasses.asdict(case)))
            result.add(measure_case(case, settings))
    result.data["complete"] = True
    result.write()
    write_csv(result.data, files.json.with_suffix(".csv"))
    for shown in tables(result.data):
        console.print(shown)
    chart(result.data, files.figure)
    for path in (files.json, files.json.with_suffix(".csv"), files.figure):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    refused = [(row, name, why) for row in result.data["rows"] for name, why in row["refused"].items()]
    for row, name, why in refused:
        console.print(f"{harness.title(row['case'])}, {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    harness.complain({  # a level that a model has nothing for is no fault
        f"{harness.title(row['case'])} {name}": why
        for row, name, why in refused
        if name in LEVELS and not why.startswith(pk.PatchError.__name__)
    })  # fmt: skip
    return result.data


def points(case: models.Case, settings: Settings) -> list[str]:
    compiled = case.shape in settings.timed and case.regime in settings.budgets
    return [EAGER, HF, *LEVELS, *(BUDGETS if compiled else ())]


def measure_case(case: models.Case, settings: Settings) -> harness.Row:
    row: harness.Row = {"case": dataclasses.asdict(case), "kept": {}, "gate": {}, "refused": {}}
    for kind in KINDS:  # a budget is spent on a whole model, so no layer has its own bytes: see `times`
        counted = {p: kind for p in points(case, settings) if p not in BUDGETS and p not in row["refused"]}
        row["kept"][kind] = harness.attempt(counted, row["refused"], lambda point, kind: kept(case, point, kind))
    row["floor"] = {kind: floor(case, kind) for kind in KINDS}
    if case.shape in settings.timed:
        with harness.reported(row, LEVELS):
            row |= times(case, settings, row)
            row["against_peers"] = against_peers(row)
            row["memory"] = peaks(case, settings, row)
    return row


def build(case: models.Case, point: str, device: torch.device, layers: int) -> nn.Module:
    """The case's model, always the same weights, with what the point adds to it."""
    with torch.device(device):
        model: Any = models.build(case, EAGER, device, layers)
    if point == HF:
        train.checkpoint_layers(model)
    elif point in BUDGETS:
        model.compile(backend=Budget(BUDGETS[point]))
    elif point != EAGER:
        pk.patch(model, memory=point)
    return model


@dataclass(frozen=True, eq=False)
class Budget:
    """torch.compile's own backend with a budget. Each is another backend to dynamo, which would otherwise run what it
    compiled for the first budget with every model of the class."""

    share: float

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        import torch._functorch.config as config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=self.share):  # type: ignore[attr-defined]
            return compile_fx(graph, inputs)


def kept(case: models.Case, point: str, kind: str) -> float:
    """Bytes a token and hidden unit of one layer, with the kernels of that kind of device."""
    case = dataclasses.replace(case, batch=2)
    width = models.config(case).hidden_size
    if kind == "cpu":
        cpu = torch.device("cpu")
        batch = models.random_batch(case, cpu)
        return measure.saved_bytes_per_token_per_layer(lambda layers: build(case, point, cpu, layers), batch) / width
    empty = torch.device("meta")
    with meta.standing_for(kind), meta.Values(), footprint.ways_of_device():
        batch = models.random_batch(case, empty)
        return measure.saved_bytes_per_token_per_layer(lambda layers: build(case, point, empty, layers), batch) / width


def floor(case: models.Case, kind: str) -> dict[str, float]:
    """The account of what a layer must keep, in bytes a token and hidden unit H, with F inner features in its
    feed-forward block, h heads of which h_kv are kept, 2 bytes an element:

        q, k, v         2 (1 + 2 h_kv / h)
        o               2 where the projection after attention trains or has an adapter, or PyTorch's fused attention
                        runs (CUDA), which keeps o and 4 bytes a head
        norms           2 rows of 2, and 4 bytes a token (8 a layer) of 1/sigma
        inner           2 F/H (BERT's u), 4 F/H (gate and up); 1 F/H where a code serves

    exact keeps all of it; recompute only o and the norms (on CUDA o is left to the frame, too); checkpoint one row.
    """
    config = models.config(case)
    H, F, h = config.hidden_size, config.intermediate_size, config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", h) / h
    gated = config.model_type == "llama"
    adapted = case.regime.startswith(("full", "lora-all"))
    qkv, inner = 2 * (1 + 2 * shared), (4 if gated else 2) * F / H
    o = 2.0 if adapted or kind == "cuda" else 0.0
    lse = 4 * h / H if kind == "cuda" else 0.0
    norms = 4 + 8 / H
    exact = qkv + o + lse + norms + inner
    found = {"exact": exact, "recompute": norms + (2.0 if adapted else 0.0), "checkpoint": 2 + 4 / H}
    if not adapted and not gated:
        found["coded"] = exact - inner + F / H
    return found


def times(case: models.Case, settings: Settings, row: harness.Row) -> harness.Row:
    """Seconds of a whole step of each point that is right, in turn, its time over eager's, and what its model keeps for
    backward."""
    device, refused = torch.device(settings.device), row["refused"]
    batch = models.random_batch(case, device)
    wanted = dict.fromkeys(point for point in points(case, settings) if point not in refused)

    def ready(name: str, model: nn.Module) -> Callable[[], object]:
        step = train.Run(model, repeat(batch), settings.rounds + 3, lr=1e-4, seed=0).step
        measure.interleave({name: step}, 3, device)
        return step

    built = harness.attempt(wanted, refused, lambda name, _: build(case, name, device, settings.layers))
    models.judge(built, batch, row)
    steps = harness.attempt(built, refused, ready)
    harness.needed(steps)
    seconds = measure.interleave(steps, settings.rounds, device)
    held = {name: measure.saved_bytes_of_model(built[name], batch) for name in steps}
    steps.clear()
    built.clear()
    torch.compiler.reset()
    gc.collect()

    def over(of: str, to: str) -> dict[str, float]:
        return dataclasses.asdict(measure.paired_ratio(seconds, of, to))

    return {
        "seconds": {name: dataclasses.asdict(measure.Spread.of(values)) for name, values in seconds.items()},
        "over_eager": {name: over(name, EAGER) for name in seconds if name != EAGER},
        "held": held,
        "raw": seconds,
    }


def against_peers(row: harness.Row) -> list[dict[str, Any]]:
    """For every peer: the fastest level whose model keeps at most 5 % more, and the peer's time over that level's."""
    found, held = [], row["held"]
    for peer in (HF, *BUDGETS):
        levels = [name for name in LEVELS if name in held and held[name] <= 1.05 * held.get(peer, 0)]
        if levels:
            best = min(levels, key=lambda name: statistics.median(row["raw"][name]))
            ratio = measure.paired_ratio(row["raw"], of=peer, to=best)
            found.append({"peer": peer, "level": best, **dataclasses.asdict(ratio)})
    return found


def peaks(case: models.Case, settings: Settings, row: harness.Row) -> dict[str, dict[str, int]]:
    """The rise of memory by a step of each point that has a time, in fresh processes."""
    ways = {"rise": False} | ({"rise_given_back": True} if settings.device == "cpu" else {})

    def rises(name: str, _: object) -> dict[str, int]:
        return {
            key: measure.fresh_process(step_peak, case, name, settings, give_back).rise
            for key, give_back in ways.items()
        }

    return harness.attempt(row["seconds"], row["refused"], rises)


def step_peak(case: models.Case, point: str, settings: Settings, give_back: bool) -> measure.Peak:
    """The second of two steps, for a process that has done nothing else."""
    if give_back:
        measure.give_blocks_back()
    device = torch.device(settings.device)
    model, batch = build(case, point, device, settings.layers), models.random_batch(case, device)
    run = train.Run(model, repeat(batch), 2, lr=1e-4, seed=0)
    run.step()
    return measure.peak_memory(run.step, device)


def by_shape(result: Mapping[str, Any]) -> dict[str, list[harness.Row]]:
    found: dict[str, list[harness.Row]] = {}
    for row in result["rows"]:
        found.setdefault(row["case"]["shape"], []).append(row)
    return found


def points_of(row: harness.Row) -> list[str]:
    return list(dict.fromkeys((*row["kept"]["cpu"], *row.get("seconds", ()))))


def grid(rows: Sequence[harness.Row], cell: Callable[[harness.Row, str], str]) -> list[list[str]]:
    """A line for each point, a cell for each regime; lines without any content are left out."""
    names = dict.fromkeys(name for row in rows for name in (*points_of(row), *row["refused"]))
    lines = [[name, *(cell(row, name) for row in rows)] for name in names]
    return [line for line in lines if any(line[1:])]


def kept_cell(kind: str) -> Callable[[harness.Row, str], str]:
    def cell(row: harness.Row, name: str) -> str:
        found = row["kept"][kind].get(name)
        return "-" if name in row["refused"] else "" if found is None else f"{found:.1f}"

    return cell


def time_cell(row: harness.Row, name: str) -> str:
    found = row.get("over_eager", {}).get(name)
    return "" if found is None else f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def held_cell(row: harness.Row, name: str) -> str:
    found = row.get("held", {}).get(name)
    return "" if found is None else f"{found / 2**20:,.0f}"


def peak_cell(row: harness.Row, name: str) -> str:
    found = row.get("memory", {}).get(name)
    return "" if found is None else f"{found.get('rise_given_back', found['rise']) / 2**20:,.0f}"


CELLS: dict[str, Callable[[harness.Row, str], str]] = {
    "bytes kept a token and hidden unit of one layer, CUDA's kernels (accounted on the meta device)": kept_cell("cuda"),
    "the same, this CPU's kernels (counted on real tensors)": kept_cell("cpu"),
    "step time over eager's, median and quartiles": time_cell,
    "what the timed model keeps for backward, MiB": held_cell,
    "memory that a whole step adds at its peak where freed blocks go back at once, MiB": peak_cell,
}
"""The tables of a result."""
MAIN = [title for title in CELLS if "this CPU" not in title and "timed model" not in title]
"""Those that README shows."""


def tables(result: Mapping[str, Any]) -> list[Table]:
    shown = []
    for shape, rows in by_shape(result).items():
        for title, cell in CELLS.items():
            if lines := grid(rows, cell):
                table = Table(title=f"{shape}: {title}", title_justify="left")
                for name in ("", *(row["case"]["regime"] for row in rows)):
                    table.add_column(name, justify="right" if name else "left")
                for line in lines:
                    table.add_row(*line)
                shown.append(table)
    return shown


def write_csv(result: Mapping[str, Any], path: Path) -> None:
    """A line for each case and point."""
    names = [*(f"{part}_{kind}" for part, kind in product(PARTS, KINDS)), "seconds", "over_eager", "held"]
    names += ["rise", "rise_given_back"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*result["rows"][0]["case"], "point", *names])
        writer.writeheader()
        for row in result["rows"]:
            for point in points_of(row):
                line = {f"{part}_{kind}": row[part][kind].get(point) for part, kind in product(PARTS, KINDS)}
                line["seconds"] = row.get("seconds", {}).get(point, {}).get("median")
                line["over_eager"] = row.get("over_eager", {}).get(point, {}).get("median")
                line["held"] = row.get("held", {}).get(point)
                writer.writerow({**row["case"], "point": point, **line, **row.get("memory", {}).get(point, {})})


def chart(result: Mapping[str, Any], path: Path) -> None:
    """Bytes kept by every point, a panel for each shape and a group of bars for each regime; as a PNG."""
    from matplotlib.figure import Figure

    shapes = by_shape(result)
    figure = Figure(figsize=(11, 1 + 3.2 * len(shapes)), dpi=150, layout="constrained")
    for axes, (shape, rows) in zip(figure.subplots(len(shapes), 1, squeeze=False)[:, 0], shapes.items(), strict=True):
        names = [name for name in (EAGER, HF, *LEVELS) if any(name in row["kept"]["cuda"] for row in rows)]
        width = 0.85 / len(names)
        for i, name in enumerate(names):
            heights = [row["kept"]["cuda"].get(name, 0) for row in rows]
            bars = axes.bar([x + i * width for x in range(len(rows))], heights, width * 0.92, color=harness.COLOURS[i],
                            label=name)  # fmt: skip
            axes.bar_label(bars, [f"{height:.1f}" if height else "" for height in heights], fontsize=7)
        ticks = [x + 0.425 - width / 2 for x in range(len(rows))]
        axes.set_xticks(ticks, [row["case"]["regime"] for row in rows])
        axes.set(title=f"A layer of {shape}, bfloat16, CUDA's kernels", ylabel="bytes / token / hidden unit")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path)
