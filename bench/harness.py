"""What every benchmark shares: turns after a gate, the growing result file, table, CSV and chart.

A row of a result is one case: {"case": ..., "gate": {provider: ...}, "refused": {provider: reason}, "seconds":
{provider: Spread}, "speedup": {provider: eager's time over the provider's, turn by turn}, "petune_over": {peer: the
peer's time over petune's}, "best_peer": name}. Eager is called "eager" and this package "petune" in every benchmark.
A provider that raises is refused with the reason and costs no other its times; without eager's a case has none.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from petune_kernels import backends
from petune_kernels.studies import machine, measure
from petune_kernels.studies.errors import StudyError
from petune_kernels.studies.result import Files

EAGER, OURS, COMPILED = "eager", "petune", "torch.compile"
MATMULS = "floor: frozen matmuls"  # no peer: it computes less, what a projection with frozen weights cannot do without
PEERS = ("liger-kernel", "flash-attn", "quack-kernels", "apex", "lorafusion", "lomem", "unsloth")  # lomem: LowMemoryBP
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")  # Okabe-Ito

Row = dict[str, Any]
Given = TypeVar("Given")
Made = TypeVar("Made")


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
            "backends": taken(device),
            "complete": False,
            "rows": [],
        }
        if device.type == "cuda":  # every capture of a graph collects garbage; what is here by now is none
            gc.collect()
            gc.freeze()

    def add(self, row: Row) -> None:
        self.data["rows"].append(finite(row))
        self.write()

    def replace(self, row: Row) -> None:
        """The last row, of which more is there now."""
        self.data["rows"][-1] = finite(row)
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
        complain({title(row["case"]): row["refused"][OURS] for row in self.data["rows"] if OURS in row["refused"]})


def complain(reasons: Mapping[str, str]) -> None:
    """Raises StudyError where a case of this package has no time, with the reason of each."""
    if reasons:
        lines = "\n".join(f"{case}: {why}" for case, why in reasons.items())
        raise StudyError(f"petune has no time in {len(reasons)} cases:\n{lines}")


def new_row(case: Mapping[str, Any]) -> Row:
    return {"case": dict(case), "gate": {}, "refused": {}, **_untimed()}


def _untimed() -> dict[str, Any]:
    return {"seconds": {}, "speedup": {}, "petune_over": {}, "best_peer": None}


@contextmanager
def reported(row: Row, ours: Sequence[str] = (OURS,)) -> Iterator[None]:
    """Whatever raises within is why this case has no times, neither eager nor `ours`; the next one goes on."""
    try:
        yield
    except Exception as error:  # in the table, and petune's ends the run in an error
        why = reason(error)
        row.update(_untimed(), refused=dict.fromkeys((EAGER, *ours), why) | row["refused"])


def attempt(given: Mapping[str, Given], refused: dict[str, str], do: Callable[[str, Given], Made]) -> dict[str, Made]:
    """do(name, value) for every provider; one that raises is refused with the reason, and the others go on."""
    made = {}
    for name, value in given.items():
        try:
            made[name] = do(name, value)
        except Exception as error:  # in table and result
            refused[name] = reason(error)
    return made


def judge(given: dict[str, Given], refused: dict[str, str], verdict: Callable[[str, Given], str]) -> None:
    """Takes the providers that `verdict` (or what they raise) says are wrong out of `given` and into `refused`."""
    judged = {name: value for name, value in given.items() if name not in (EAGER, MATMULS)}
    verdicts = attempt(judged, refused, verdict)
    refused |= {name: wrong for name, wrong in verdicts.items() if wrong}
    for name in judged:
        if verdicts.get(name) != "":
            del given[name]


def needed(given: Mapping[str, Given]) -> Given:
    """Eager's entry, without which there is nothing to compare with."""
    if EAGER not in given:
        raise StudyError(f"without {EAGER} nothing is timed")
    return given[EAGER]


def reason(error: BaseException) -> str:
    """Class and first line; of Triton's CompilationError, whose first line is a place in the source, the cause's.

    A CUDA graph's capture that broke says so at its end only: what it was raised after is named, too.
    """
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    before = None if cause.__suppress_context__ else cause.__context__
    after = "" if before is None else f" (after {type(before).__name__}: {_first_line(before)})"
    return f"{type(error).__name__}: {_first_line(cause)}{after}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def finite(row: Row) -> Row:
    """The row without NaN and infinity, which JSON does not have: they become text, and their provider is refused."""
    wrong: list[tuple[str, ...]] = []

    def clean(value: Any, place: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item, (*place, str(key))) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item, place) for item in value]
        if not isinstance(value, float) or math.isfinite(value):
            return value
        wrong.append(place)
        return str(value)

    cleaned = clean(row, ())
    for place in wrong:
        provider = next((part for part in place if part in row.get("seconds", {})), EAGER)
        for name in (EAGER, OURS) if provider == EAGER else (provider,):
            cleaned.setdefault("refused", {}).setdefault(name, f"not finite: {', '.join(place)}")
        if provider in (EAGER, OURS):
            cleaned.update(_untimed())
        for part in ("seconds", "speedup", "petune_over"):
            cleaned[part].pop(provider, None)
        cleaned["best_peer"] = None if cleaned["best_peer"] == provider else cleaned["best_peer"]
    return cleaned


def taken(device: torch.device) -> dict[str, Any]:
    """Whether the compiled libraries are loaded, or why not, and which implementation every op takes on the device."""
    libraries = {name: why or "loaded" for name, why in backends.MISSING.items()}
    ops = {choice.op: choice.backend for choice in backends.describe() if choice.device == device.type}
    return {"libraries": libraries, "ops": ops}


def compiled(mode: str) -> str:
    """What torch.compile in this mode is called."""
    return COMPILED if mode == "default" else f"{COMPILED}, {mode}"


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

    peers = [name for name in variants if not name.startswith(OURS) and name != MATMULS and OURS in variants]
    best = min(peers, key=lambda name: statistics.median(seconds[name])) if peers else None
    found = {
        "seconds": {name: dataclasses.asdict(measure.Spread.of(values)) for name, values in seconds.items()},
        "speedup": ratios({name: (EAGER, name) for name in variants if name != EAGER and EAGER in variants}),
        "petune_over": ratios({name: (name, OURS) for name in peers}),
        "best_peer": best,
    }
    if MATMULS in variants:
        found["over_matmuls"] = ratios({name: (name, MATMULS) for name in variants if name != MATMULS})
    return found


def title(case: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in case.values())


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the result's shares and ratios must know."""
    found, rows = [], result["rows"]
    if any("share_of_floor" in row for row in rows):
        found.append(
            "Only backward alone has a cold floor: elsewhere backward may find in cache what forward has read."
        )
    if any(" bias" in row["case"].get("use", "") for row in rows):
        found.append("Eager adds a bias in a pass of its own, which a stock model's linear does as it writes.")
    return found


def table(result: Mapping[str, Any]) -> RenderableType:
    """One line for each case and provider: median and quartiles, speed-up over eager, share of the floor."""
    shown = Table(
        title=f"{result['benchmark']} on {result['machine']['device']}, {result['machine']['threads']} threads",
        caption="\n".join(notes(result)),
        caption_justify="left",
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
        facts.append(_share(row, provider))
    for part, name in (("graph", "CUDA graph"), ("backward", "backward alone")):
        found = row.get(part, _untimed() | {"refused": {}})
        if provider in found["seconds"]:
            facts.append(f"{name} {_time(found['seconds'][provider]['median'])}")
        if provider in found.get("share_of_floor", {}):
            facts[-1] += f", {_share(found, provider)}"
        if provider in found["refused"]:
            facts.append(f"no {name}: {found['refused'][provider]}")
    if over := row.get("graph", {}).get("over_matmuls") or row.get("over_matmuls"):
        if provider in over:
            facts.append(f"{over[provider]['median']:.2f} x the frozen matmuls alone")
    if provider in row.get("saved_bytes_per_token_per_layer", {}):
        facts.append(f"saved {row['saved_bytes_per_token_per_layer'][provider]:,.0f} B/token/layer")
    if provider in row.get("trainer", {}).get("seconds", {}):
        facts.append(f"in Trainer {_time(row['trainer']['seconds'][provider]['median'])}")
    if provider in row.get("memory", {}):
        facts.append(f"peak {row['memory'][provider]['peak'] / 2**20:,.0f} MiB")
    for target in row.get("targets", []):
        if target["of"] == provider:
            met = "met" if target["short_by"] <= 0 else f"short by {target['short_by']:.2f}"
            facts.append(f"target {target['target']} x {target['over']}: {met}")
    if provider == OURS:
        best = row["best_peer"]
        if best not in (None, EAGER):
            facts.append(f"{row['petune_over'][best]['median']:.2f} x the best peer, {best}")
    return "; ".join(facts)


def _share(found: Mapping[str, Any], provider: str) -> str:
    return f"{100 * found['share_of_floor'][provider]:.0f} % of floor, {found['rate'][provider]}"


def lines(row: Row) -> list[dict[str, Any]]:
    """The row as flat lines, one for each provider that has a time; a share is that of the floor."""
    found = []
    for provider, spread in row["seconds"].items():
        ratio = row["speedup"].get(provider, {"median": None, "low": None, "high": None})
        line = {"provider": provider, **spread, "speedup": ratio["median"], "speedup_low": ratio["low"],
                "speedup_high": ratio["high"]}  # fmt: skip
        for place, part in (("", row), ("graph_", row.get("graph")), ("backward_", row.get("backward"))):
            if part and place and provider in part["seconds"]:
                line[f"{place}median"] = part["seconds"][provider]["median"]
            if part and provider in part.get("rate", {}):
                line |= {f"{place}rate": part["rate"][provider], f"{place}share": part["share_of_floor"][provider]}
        found.append(line)
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
                          textcoords="offset points", bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip
    widest = max([1.0, *(ratio["high"] for row in rows for ratio in row["speedup"].values())])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], [title(row["case"]) for row in rows])
    axes.set(xlabel="speed-up over eager PyTorch, for LoRA PEFT (1 = as fast)", xlim=(0, 1.15 * widest))
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
