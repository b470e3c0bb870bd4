"""What every benchmark shares: turns after a gate, the growing result file, table, CSV and chart.

A row of a result is one case: {"case": ..., "gate": {provider: ...}, "refused": {provider: reason}, "seconds":
{provider: Spread}, "speedup": {provider: eager's time over the provider's, turn by turn}, "petune_over": {peer: the
peer's time over petune's}, "best_peer": name}. Eager is called "eager" and this package "petune" in every benchmark.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from petune_kernels.studies import machine, measure
from petune_kernels.studies.errors import StudyError
from petune_kernels.studies.result import Files

EAGER, OURS, COMPILED = "eager", "petune", "torch.compile"
PEERS = ("liger-kernel", "flash-attn", "quack-kernels", "apex", "lorafusion", "lomem", "unsloth")  # lomem: LowMemoryBP
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")  # Okabe-Ito

Row = dict[str, Any]


class Result:
    """A result that is on disk after every case, so that a run cut short keeps what it measured."""

    def __init__(self, files: Files, benchmark: str, settings: Mapping[str, Any], device: torch.device):
        described = machine.describe()
        described["versions"] |= {name: found for name in PEERS if (found := machine.version(name))}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else described["cpu"]
        self.files = files
        self.data: dict[str, Any] = {
            "benchmark": benchmark,
            "settings": dict(settings),
            "command": command(),
            "machine": described | {"device": name},
            "complete": False,
            "rows": [],
        }

    def add(self, row: Row) -> None:
        self.data["rows"].append(row)
        self.write()

    def write(self) -> None:
        """Replaces the file in one step: a reader never sees half of it."""
        half = self.files.json.with_suffix(".part")
        dataclasses.replace(self.files, json=half).write(self.data)
        os.replace(half, self.files.json)

    def finish(self, console: Console, draw: Callable[[Mapping[str, Any], Path], None] | None = None) -> None:
        """Marks the result complete, prints its table, and writes the CSV and the chart (or `draw`'s) beside it."""
        self.data["complete"] = True
        self.write()
        console.print(table(self.data))
        write_csv(self.data, self.files.json.with_suffix(".csv"))
        (draw or chart)(self.data, self.files.figure)
        for path in (self.files.json, self.files.json.with_suffix(".csv"), self.files.figure):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
        if wrong := [row for row in self.data["rows"] if OURS in row["refused"]]:
            reasons = "\n".join(f"{title(row['case'])}: {row['refused'][OURS]}" for row in wrong)
            raise StudyError(f"petune has no time in {len(wrong)} cases:\n{reasons}")


def command() -> str:
    """What was typed, so that it can be typed again."""
    program = "petune" if Path(sys.argv[0]).name == "petune" else "python -m bench"
    return f"{program} {shlex.join(sys.argv[1:])}"


def turns(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm: int = 2,
    calls: int | Mapping[str, int] = 1,
) -> dict[str, Any]:
    """Times the variants in turn; one run makes `calls` calls, whose time it gives. The timing part of a row."""
    measure.interleave(variants, warm, device)
    seconds = {
        name: [second / (calls if isinstance(calls, int) else calls[name]) for second in values]
        for name, values in measure.interleave(variants, rounds, device).items()
    }

    def ratios(pairs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
        return {
            name: dataclasses.asdict(measure.paired_ratio(seconds, of=slow, to=fast))
            for name, (slow, fast) in pairs.items()
        }

    peers = [name for name in variants if not name.startswith(OURS) and OURS in variants]
    best = min(peers, key=lambda name: statistics.median(seconds[name])) if peers else None
    return {
        "seconds": {name: dataclasses.asdict(measure.Spread.of(values)) for name, values in seconds.items()},
        "speedup": ratios({name: (EAGER, name) for name in variants if name != EAGER}),
        "petune_over": ratios({name: (name, OURS) for name in peers}),
        "best_peer": best,
    }


def title(case: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in case.values())


def table(result: Mapping[str, Any]) -> RenderableType:
    """One line for each case and provider: median and quartiles, speed-up over eager, share of the floor."""
    shown = Table(
        title=f"{result['benchmark']} on {result['machine']['device']}, {result['machine']['threads']} threads"
    )
    for name in ("case", "provider", "median", "quartiles", "x eager", "quartiles", "also"):
        shown.add_column(name, justify="left" if name in ("case", "provider", "also") else "right")
    for row in result["rows"]:
        label = title(row["case"])
        for line in lines(row):
            quartiles = f"{_time(line['low'])} to {_time(line['high'])}"
            ratio = ("", "") if line["speedup"] is None else (
                f"{line['speedup']:.2f}", f"{line['speedup_low']:.2f} to {line['speedup_high']:.2f}"
            )  # fmt: skip
            shown.add_row(
                label, line["provider"], _time(line["median"]), quartiles, *ratio, _also(row, line["provider"])
            )
            label = ""
        for provider, reason in row["refused"].items():
            shown.add_row(label, provider, "-", "", "", "", reason)
            label = ""
        shown.add_section()
    return shown


def _also(row: Row, provider: str) -> str:
    facts = []
    if provider in row.get("share_of_floor", {}):
        facts.append(f"{100 * row['share_of_floor'][provider]:.0f} % of floor, {row['rate'][provider]}")
    if provider in row.get("graph_seconds", {}):
        facts.append(f"CUDA graph {_time(row['graph_seconds'][provider]['median'])}")
    if provider in row.get("saved_bytes_per_token_per_layer", {}):
        facts.append(f"saved {row['saved_bytes_per_token_per_layer'][provider]:,.0f} B/token/layer")
    if provider in row.get("memory", {}):
        facts.append(f"peak {row['memory'][provider]['peak'] / 2**20:,.0f} MiB")
    if provider == OURS:
        best = row["best_peer"]
        if best not in (None, EAGER):
            facts.append(f"{row['petune_over'][best]['median']:.2f} x the best peer, {best}")
        for target in row.get("targets", []):
            met = "met" if target["short_by"] <= 0 else f"short by {target['short_by']:.2f}"
            facts.append(f"target {target['target']} x {target['over']}: {met}")
    return "; ".join(facts)


def lines(row: Row) -> list[dict[str, Any]]:
    """The row as flat lines, one for each provider that has a time."""
    found = []
    for provider, spread in row["seconds"].items():
        ratio = row["speedup"].get(provider, {"median": None, "low": None, "high": None})
        found.append(
            {"provider": provider, **spread}
            | {"speedup": ratio["median"], "speedup_low": ratio["low"], "speedup_high": ratio["high"]}
        )
    return found


def write_csv(result: Mapping[str, Any], path: Path) -> None:
    flat = [{**row["case"], **line} for row in result["rows"] for line in lines(row)]
    names = list(dict.fromkeys(name for line in flat for name in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)


def chart(result: Mapping[str, Any], path: Path) -> None:
    """Speed-up over eager of every provider in every case, median and quartiles, as horizontal bars in a PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["speedup"]]
    providers = list(dict.fromkeys(name for row in rows for name in row["speedup"]))
    figure = Figure(figsize=(9, 1.6 + 0.28 * max(1, len(rows)) * max(1, len(providers))), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / max(1, len(providers))
    for i, provider in enumerate(providers):
        have = [(place, row["speedup"][provider]) for place, row in enumerate(rows) if provider in row["speedup"]]
        places = [place + i * height for place, _ in have]
        medians = [ratio["median"] for _, ratio in have]
        spread = [[r["median"] - r["low"] for _, r in have], [r["high"] - r["median"] for _, r in have]]
        axes.barh(places, medians, height, xerr=spread, color=COLOURS[i % len(COLOURS)], label=provider, capsize=2)
        for place, (_, ratio) in zip(places, have, strict=True):
            axes.annotate(f"{ratio['median']:.2f}", (ratio["high"], place), xytext=(4, 0), va="center", fontsize=8,
                          textcoords="offset points")  # fmt: skip
    widest = max([1.0, *(ratio["high"] for row in rows for ratio in row["speedup"].values())])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], [title(row["case"]) for row in rows])
    axes.set(xlabel="speed-up over eager PyTorch (1 = as fast)", xlim=(0, 1.15 * widest))
    axes.invert_yaxis()
    machine_ = result["machine"]
    axes.set_title(f"{result['benchmark']} on {machine_['device']}, torch {machine_['versions']['torch']}", fontsize=10)
    if providers:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.1f} us"


@contextmanager
def progress(console: Console, total: int):
    """A bar over the cases; yields a function that names the case that begins."""
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=total)
        done = -1

        def begin(name: str) -> None:
            nonlocal done
            done += 1
            bars.update(bar, completed=done, description=name)

        yield begin
        bars.update(bar, completed=total)


def check_names(option: str, given: Sequence[str], accepted: Sequence[str]) -> None:
    from petune_kernels.studies.errors import InputError

    for name in given:
        if name not in accepted:
            raise InputError(f"{option} is {name!r}; accepted are {', '.join(accepted)}")
