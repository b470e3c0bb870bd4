"""A study's records as tables in the papers' layout: for the terminal, as Markdown and as CSV.

A column whose validation part is also its test part says "leaks" in its name, everywhere.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from .statistics import ARROWS, Comparison, Summary, average, compare, correct, summarise
from .study import Study

Record = dict[str, Any]
BANDS = (("low", 0, 1000), ("medium", 1000, 10_000), ("high", 10_000, 10**12))
"""Of the second paper: name, least and first too large number of training rows."""


@dataclass(frozen=True)
class Grid:
    """A table of texts. strong: (row, column) of cells to stress, the best (1) and the second-best (2)."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    strong: dict[tuple[int, int], int] = field(default_factory=dict)

    def __rich__(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="right" if i else "left")
        styles = {0: "", 1: "bold", 2: "underline"}
        for r, row in enumerate(self.rows):
            table.add_row(*(Text(cell, style=styles[self.strong.get((r, c), 0)]) for c, cell in enumerate(row)))
        return table

    def markdown(self) -> str:
        marks = {0: "", 1: "**", 2: "_"}
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---"] + ["---:"] * (len(self.columns) - 1))]
        for r, row in enumerate(self.rows):
            marked = [(marks[self.strong.get((r, c), 0)], cell) for c, cell in enumerate(row)]
            lines.append(_line([f"{mark}{cell}{mark}" for mark, cell in marked]))
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])


@dataclass(frozen=True)
class Cell:
    """All runs of one method on one column. column: task, protocol and test part in words; rows: of training."""

    column: str
    method: str
    vary: str
    stop_on: str
    patched: bool
    summary: Summary
    values: tuple[float | None, ...]
    records: tuple[Record, ...]

    @property
    def rows(self) -> int:
        return self.records[0]["rows"]["train"]

    @property
    def by_seed(self) -> dict[tuple[int, int], float | None]:
        return {(r["wi"], r["do"]): v for r, v in zip(self.records, self.values, strict=True)}

    @property
    def percents(self) -> list[float]:
        """Of the pretrained model's scalars, those that train in each stage, as the papers count (see _percent)."""
        outcome = self.records[0]["outcome"]
        return [_percent(stage["trained"], stage["head"], outcome["total"]) for stage in outcome["stages"]]

    @property
    def trains_all(self) -> bool:
        return self.percents[-1] >= 100


def _percent(trained: int, head: int, total: int) -> float:
    """The head counts only where it trains alone, or with everything else."""
    return 100 * (head if not trained else trained + head if trained + head == total else trained) / total


def _share(percent: float) -> str:
    return f"{percent:.2f}%" if percent >= 1 else f"{percent:.4f}%"


def value(record: Record, part: str = "test") -> float | None:
    """The primary metric of a test part at the selected checkpoint; None for a run that diverged."""
    outcome = record["outcome"]
    return None if outcome["failed"] else outcome["test"].get(part, {}).get(record["primary"])


def column_name(record: Record, part: str) -> str:
    halves = {"dev1-dev2": " 1-2", "dev2-dev2": " 2-2 (leaks)", "dev-dev": " (leaks)"}.get(record["protocol"], "")
    return record["task"] + halves + ("" if part == "test" else f" → {part}")


def cells(records: Iterable[Record]) -> list[Cell]:
    """The records grouped, in the order in which they first occur; seeds in order within a group."""
    groups: dict[tuple[Any, ...], list[tuple[Record, str]]] = {}
    for record in records:
        for part in record["baseline"]:
            key = (column_name(record, part), record["method"], record["vary"], record["stop_on"], record["patched"])
            groups.setdefault(key, []).append((record, part))
    found = []
    for key, group in groups.items():
        group.sort(key=lambda pair: (pair[0]["wi"], pair[0]["do"]))
        values = tuple(value(record, part) for record, part in group)
        floor = group[0][0]["baseline"][group[0][1]]
        found.append(Cell(*key, summarise(values, floor), values, tuple(record for record, _ in group)))
    return found


def ordered(study: Study, records: Iterable[Record]) -> list[Record]:
    """The records in the study's order of tasks, methods and layers, whatever order the runs ended in."""
    tasks, methods = [t.title for t in study.tasks], [m.title for m in study.methods]

    def place(record: Record) -> tuple[Any, ...]:
        title = record["method"]
        method = title if title in methods else title.rsplit(" #", 1)[0]  # one layer of a method with each_layer
        places = (tasks.index(record["task"]), record["protocol"], methods.index(method), record["layer"] or [])
        return (*places, record["stop_on"], study.seeds.vary.index(record["vary"]), not record["patched"])

    return sorted(records, key=place)


def tables(study: Study, records: Sequence[Record]) -> list[Grid]:
    """Every table that the study's kind has. Records may be a part of the study's; what has no run is a dash."""
    if not records:
        return []
    everything = cells(ordered(study, records))
    shown = [cell for cell in everything if cell.patched == max(study.patched)]
    if study.kind == "protocol":
        grids = [_protocol(shown)]
    else:
        vary = [v for v in study.seeds.vary if any(c.vary == v for c in shown)]
        chosen = [cell for cell in shown if cell.vary == vary[0]]
        layered = [cell for cell in chosen if cell.records[0]["layer"]]
        whole = [cell for cell in chosen if not cell.records[0]["layer"]]
        grids = [_main(study, whole)] if whole else []
        if layered:
            grids.append(_layers(layered, whole))
        if study.kind == "stability":
            grids += _bands(study, whole)
            if len(vary) > 1:
                grids += _varied(shown, vary)
    grids.append(_spread(study, shown))
    if len(study.patched) > 1 and {cell.patched for cell in everything} == {True, False}:
        grids.append(_cost(study, everything))
    return grids


def to_csv(study: Study, records: Sequence[Record]) -> str:
    """One line a group of runs, with everything that the tables are made of; values as fractions, not percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["n", "mean", "std", "best", "worst", "failed_rate"]
    writer.writerow(["task", "method", "vary", "stop_on", "patched", "percent", *names, "p_up", "p_down", "arrow"])
    found = cells(ordered(study, records))
    compared = _compared(study, found)
    for i, cell in enumerate(found):
        c = compared.get(i)
        tests = (c.p_up, c.p_down, c.arrow) if c else ("", "", "")
        row = [
            cell.column,
            cell.method,
            cell.vary,
            cell.stop_on,
            cell.patched,
            ";".join(f"{p:.6g}" for p in cell.percents),
        ]
        writer.writerow([*row, *(getattr(cell.summary, name) for name in names), *tests])
    return out.getvalue()


def mean_std(summary: Summary, arrow: str = "") -> str:
    """ "52.8±2.0" in percent, with the arrow; "-" without a value."""
    if not summary.n:
        return "failed" if summary.total else "-"
    spread = "" if math.isnan(summary.std) else f"±{100 * summary.std:.1f}"
    return f"{100 * summary.mean:.1f}{spread}{ARROWS.get(arrow, '')}"


def _compared(study: Study, found: Sequence[Cell]) -> dict[int, Comparison]:
    """Position of a cell -> its comparison with the reference's cell of the same column, corrected as one family."""
    if not study.reference:
        return {}

    def key(cell: Cell) -> tuple[Any, ...]:
        return (cell.column, cell.vary, cell.stop_on, cell.patched)

    references = {key(cell): cell for cell in found if cell.method == study.reference}
    pairs = {
        i: compare(cell.summary, other.summary, study.test, study.alpha)
        for i, cell in enumerate(found)
        if cell.method != study.reference
        and (other := references.get(key(cell))) is not None
        and min(cell.summary.n, other.summary.n) > 1
    }
    return dict(zip(pairs, correct(list(pairs.values()), study.correction, study.alpha), strict=True))


def _main(study: Study, found: Sequence[Cell]) -> Grid:
    """Methods down, tasks across (the first and the third paper's Table 1)."""
    columns, methods = _order(c.column for c in found), _order(c.method for c in found)
    at = {(c.method, c.column): c for c in found}
    arrows = {(found[i].method, found[i].column): c.arrow for i, c in _compared(study, found).items()}
    outside = tuple(f"→ {name}" for task in study.tasks for name in task.out_of_domain)
    own = [i for i, column in enumerate(columns) if not column.endswith(outside or "\n")]
    rows, means = [], []
    for method in methods:
        mine = [at.get((method, column)) for column in columns]
        present = [cell for cell in mine if cell is not None]
        texts = [mean_std(c.summary, arrows.get((method, c.column), "")) if c else "-" for c in mine]
        means.append([c.summary.mean if c else math.nan for c in mine])
        if len(own) > 1:
            mean = sum(means[-1][i] for i in own) / len(own)
            means[-1].append(mean)
            texts.append("-" if math.isnan(mean) else f"{100 * mean:.1f}")
        rows.append([method, ", then ".join(_share(p) for p in present[0].percents), *texts])
    strong: dict[tuple[int, int], int] = {}
    for c in range(len(means[0])):
        ranked = sorted((r for r in range(len(rows)) if not math.isnan(means[r][c])), key=lambda r: -means[r][c])
        strong |= {(r, c + 2): place for place, r in enumerate(ranked[:2], 1)}
    head = ["method", "% trained", *columns, *(["Avg."] if len(own) > 1 else [])]
    return Grid(study.name, head, rows, _notes(study, found), strong)


def _notes(study: Study, found: Sequence[Cell]) -> list[str]:
    metrics = {c.column: c.records[0]["primary"] for c in found}
    notes = [f"Mean and standard deviation of {max(c.summary.total for c in found)} runs, in percent: "]
    notes[0] += ", ".join(f"{column} {metric}" for column, metric in metrics.items()) + "."
    notes.append("% trained: of the pretrained model, stage by stage, without the head where more than it trains.")
    if study.reference:
        corrected = "" if study.correction == "none" else f", corrected by {study.correction}"
        notes.append(
            f"↑ ↓: better or worse than {study.reference}, one-tailed {study.test} t-test, p < {study.alpha:g}"
            f"{corrected}."
        )
    if any(c.records[0]["leaky"] for c in found):
        notes.append("leaks: stopped on the very rows that test, so these values are too good.")
    return notes


def _layers(layered: Sequence[Cell], whole: Sequence[Cell]) -> Grid:
    """Tasks down, layers across (the first paper's Table 3)."""
    columns, methods = _order(c.column for c in layered), _order(c.method for c in layered)
    full = [m for m in _order(c.method for c in whole) if any(c.method == m and c.trains_all for c in whole)]
    at = {(c.method, c.column): mean_std(c.summary) for c in [*layered, *whole]}
    rows = [[column, *(at.get((m, column), "-") for m in [*methods, *full])] for column in columns]
    return Grid("One layer at a time", ["task", *methods, *full], rows)


def _bands(study: Study, found: Sequence[Cell]) -> list[Grid]:
    """Tasks down in bands of training rows, methods across, and arrows of the band averages (Tables 2 and 3)."""
    methods = _order(c.method for c in found)
    arrows = {(found[i].method, found[i].column): c.arrow for i, c in _compared(study, found).items()}
    rows, verdicts = [], []
    for band, least, over in BANDS:
        mine = [c for c in found if least <= c.rows < over and "→" not in c.column]  # a task's own test part
        if not mine:
            continue
        at = {(c.method, c.column): c for c in mine}
        columns = _order(c.column for c in mine)
        for column in columns:
            row = [at.get((method, column)) for method in methods]
            rows.append([column, *(mean_std(c.summary, arrows.get((c.method, column), "")) if c else "-" for c in row)])
        whole = [m for m in methods if all((m, c) in at for c in columns)]
        averages = {m: average([at[m, c].by_seed for c in columns]) for m in whole}
        verdict = {}
        if base := averages.get(study.reference):
            others = [m for m in averages if m != study.reference and min(averages[m].n, base.n) > 1]
            pairs = [compare(averages[m], base, study.test, study.alpha) for m in others]
            verdict = dict(zip(others, [c.arrow for c in correct(pairs, study.correction, study.alpha)], strict=True))
        average_row = [mean_std(averages[m], verdict.get(m, "")) if m in averages else "-" for m in methods]
        rows.append([f"Avg. ({band})", *average_row])
        words = {"up": "↗", "down": "↘", "none": "→"}
        verdicts.append([band, *(words[verdict[m]] if m in verdict else "-" for m in methods if m != study.reference)])
    grids = [Grid("By training rows", ["task", *methods], rows, _notes(study, found))]
    if study.reference:
        others = [m for m in methods if m != study.reference]
        grids.append(Grid(f"Against {study.reference}, by training rows", ["rows", *others], verdicts))
    return grids


def _varied(found: Sequence[Cell], vary: Sequence[str]) -> list[Grid]:
    """Methods down; what the seeds vary across (the second paper's Table 4), one table a column."""
    grids = []
    for column in _order(c.column for c in found):
        at = {(c.method, c.vary): mean_std(c.summary) for c in found if c.column == column}
        rows = [[m, *(at.get((m, v), "-") for v in vary)] for m in _order(m for m, _ in at)]
        grids.append(Grid(f"{column}: what the seeds vary", ["method", *(v.upper() for v in vary)], rows))
    return grids


def _protocol(found: Sequence[Cell]) -> Grid:
    """Methods down; stopping rule and split across (the second paper's Table 1)."""
    places = _order((c.stop_on, c.column) for c in sorted(found, key=lambda c: c.stop_on))
    at = {(c.method, c.stop_on, c.column): mean_std(c.summary) for c in found}
    rows = [[m, *(at.get((m, *place), "-") for place in places)] for m in _order(c.method for c in found)]
    head = ["method", *(f"{column}, stop on {stop}" for stop, column in places)]
    note = "2-2 leaks: validated on the very half that tests. 1-2 validates on the other half."
    return Grid("The broken protocol beside the fair one", head, rows, [note])


def _spread(study: Study, found: Sequence[Cell]) -> Grid:
    several = len(study.seeds.vary) > 1
    rows = []
    for c in found:
        name = " ".join(
            filter(None, [c.method, f"({c.vary})" if several else "", f"stop on {c.stop_on}" * bool(c.stop_on)])
        )
        s = c.summary
        numbers = [f"{100 * x:.1f}" if not math.isnan(x) else "-" for x in (s.mean, s.std, s.best, s.worst)]
        rows.append([c.column, name, str(s.total), *numbers, f"{100 * s.failed_rate:.0f}%"])
    note = "Failed: diverged, or not above a constant answer."
    return Grid(
        "Spread over the runs", ["task", "method", "runs", "mean", "std", "best", "worst", "failed"], rows, [note]
    )


def _cost(study: Study, found: Sequence[Cell]) -> Grid:
    """What a run reaches, its wall time and its peak memory, stock beside patched, and the medians of the ratios."""
    rows = []
    for column, method in _order((c.column, c.method) for c in found if "→" not in c.column):
        mine = [c for c in found if (c.column, c.method) == (column, method)]
        pairs: dict[tuple[Any, ...], dict[bool, dict[str, Any]]] = {}
        values: dict[bool, list[float | None]] = {False: [], True: []}
        for c in mine:
            values[c.patched] += c.values
            for r in c.records:
                pairs.setdefault((c.vary, c.stop_on, r["wi"], r["do"]), {})[c.patched] = r["outcome"]
        both = [pair for pair in pairs.values() if len(pair) == 2]
        if not both:
            continue
        row = [column, method, *(mean_std(summarise(values[which])) for which in (False, True))]
        for cost, form in ((_seconds, "{:,.1f}"), (_rise, "{:,.0f}"), (_peak, "")):
            stock, patched = ([cost(pair[which]) for pair in both] for which in (False, True))
            row += [form.format(median(values)) for values in (stock, patched) if form]
            row.append(f"{median(p / s for p, s in zip(patched, stock, strict=True)):.2f}" if all(stock) else "-")
        rows.append(row)
    head = ["task", "method", "stock", "patched"]
    for name in ("s", "MiB above the model"):
        head += [f"{name}: stock", "patched", "ratio"]
    notes = [
        "Medians over the runs; the ratios are medians of the ratios of a patched run and the stock run beside it.",
        "Seconds: training and its evaluations. Memory: at most while training, resident on a CPU, allocated on a GPU; "
        "above what it was with the model loaded, and the ratio of the whole.",
    ]
    most = max((r["outcome"].get("packed", 1) for c in found for r in c.records), default=1)
    if most > 1:
        notes.append(f"Up to {most} runs were trained together: seconds are then a run's share, memory is that of all.")
    return Grid(f"{study.name}: stock and patched", [*head, "whole peak: ratio"], rows, notes)


def _seconds(outcome: dict[str, Any]) -> float:
    return float(outcome["seconds"])


def _peak(outcome: dict[str, Any]) -> float:
    return max(stage["peak_bytes"] for stage in outcome["stages"]) / 2**20


def _rise(outcome: dict[str, Any]) -> float:
    return max(stage["peak_bytes"] - stage["loaded_bytes"] for stage in outcome["stages"]) / 2**20


def _order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
