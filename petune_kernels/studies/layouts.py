"""A study's records as tables in the papers' layout: for the terminal, as Markdown and as CSV.

A column whose validation part is also its test part says "leaks" in its name, everywhere.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .cells import Cell, Key, Record, arrow, cells, compared, mean_std, most_runs
from .statistics import Comparison, Summary, average, compare, correct
from .study import Study

Compared = Mapping[Key, Comparison]
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

    @property
    def labels(self) -> int:
        """How many of the first columns say what a row is."""
        return sum(name in ("task", "method", "rows") for name in self.columns[:2])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Too wide for the terminal: the rest of the columns below, behind the same labels."""
        for separator in ("\n", None):  # headings as they are; else broken between words, which a cell never is
            texts = [[*name.split(separator), *(row[c] for row in self.rows)] for c, name in enumerate(self.columns)]
            widths = [max(map(cell_len, column)) for column in texts]
            parts = self._parts(widths, options.max_width)
            if len(parts) == 1:
                break
        styles = {0: "", 1: "bold", 2: "underline"}
        for number, part in enumerate(parts):
            table = Table(title=None if number else self.title, title_justify="left", caption_justify="left")
            for c in part:
                table.add_column(self.columns[c], justify="left" if c < self.labels else "right", width=widths[c])
            for r, row in enumerate(self.rows):
                table.add_row(*(Text(row[c], style=styles[self.strong.get((r, c), 0)]) for c in part))
            if number == len(parts) - 1:
                table.caption = "\n".join(self.notes)
            yield table

    def _parts(self, widths: list[int], room: int) -> list[list[int]]:
        labels = list(range(self.labels))
        parts = [labels.copy()]
        for c in range(self.labels, len(widths)):
            if len(parts[-1]) > len(labels) and sum(widths[i] + 3 for i in (*parts[-1], c)) >= room:
                parts.append(labels.copy())
            parts[-1].append(c)
        return parts

    def markdown(self) -> str:
        marks = {0: "", 1: "**", 2: "_"}
        rules = ["---" if c < self.labels else "---:" for c in range(len(self.columns))]
        lines = [f"### {self.title}", "", _line(self.columns), _line(rules)]
        for r, row in enumerate(self.rows):
            marked = [(marks[self.strong.get((r, c), 0)], cell) for c, cell in enumerate(row)]
            lines.append(_line([f"{mark}{cell}{mark}" for mark, cell in marked]))
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])


def _share(percent: float) -> str:
    return f"{percent:.2f}%" if percent >= 1 else f"{percent:.4f}%"


def tables(study: Study, records: Sequence[Record]) -> list[Grid]:
    """Every table that the study's kind has. Records may be a part of the study's; what has no run is a dash."""
    if not records:
        return []
    everything = cells(study, records)
    comparisons = compared(study, everything)
    variant = max(cell.patched for cell in everything)
    shown = [cell for cell in everything if cell.patched == variant]
    vary = [v for v in study.seeds.vary if any(c.vary == v for c in shown)]
    chosen = [cell for cell in shown if cell.vary == vary[0]]
    layered = [cell for cell in chosen if cell.layers_of]
    whole = [cell for cell in chosen if not cell.layers_of]
    if study.kind == "protocol":
        grids = [_protocol(chosen)]
    else:
        grids = [_main(study, whole, comparisons)] if whole else []
        if layered:
            grids.append(_layers(layered, whole))
        if study.kind == "stability":
            if whole:
                grids += _bands(study, whole, comparisons)
            if len(vary) > 1:
                grids += _varied(shown, vary)
    grids.append(_spread(study, shown))
    if len(study.patched) > 1 and {cell.patched for cell in everything} == {True, False}:
        grids.append(_cost(study, everything, comparisons))
    return grids


def to_csv(study: Study, records: Sequence[Record]) -> str:
    """One line a group of runs, with everything that the tables are made of; values as fractions, not percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names, tested = ["n", "mean", "std", "best", "worst", "failed_rate"], ["t", "p_up", "p_down", "arrow"]
    head = ["task", "method", "vary", "stop_on", "patched", "percent", "metric"]
    writer.writerow([*head, *names, "test", "correction", *tested])
    found = cells(study, records)
    comparisons = compared(study, found)
    for cell in found:
        percents = ";".join(f"{p:.6g}" for p in cell.percents)
        row = [cell.column, cell.method, cell.vary, cell.stop_on, cell.patched, percents, cell.records[0]["primary"]]
        row += [getattr(cell.summary, name) for name in names]
        if (c := comparisons.get(cell.key)) is not None:
            row += [study.test, study.correction, *(getattr(c, name) for name in tested)]
        writer.writerow(row + [""] * (len(head) + len(names) + 2 + len(tested) - len(row)))
    return out.getvalue()


def _main(study: Study, found: Sequence[Cell], comparisons: Compared) -> Grid:
    """Methods down, tasks across (the first and the third paper's Table 1)."""
    columns, methods = _order(c.column for c in found), _order(c.method for c in found)
    at, most = {(c.method, c.column): c for c in found}, most_runs(found)
    outside = tuple(f"→ {name}" for task in study.tasks for name in task.out_of_domain)
    own = [i for i, column in enumerate(columns) if not column.endswith(outside or "\n")]
    rows, ranked = [], list[list[Summary | None]]()
    for method in methods:
        mine = [at.get((method, column)) for column in columns]
        present = [cell for cell in mine if cell is not None]
        texts = [mean_std(c.summary, most, arrow(comparisons, c)) if c else "-" for c in mine]
        ranked.append([c.summary if c else None for c in mine])
        if len(own) > 1:
            ranked[-1].append(_average([mine[i] for i in own]))
            texts.append(mean_std(ranked[-1][-1], most) if ranked[-1][-1] else "-")
        rows.append([method, ", then ".join(_share(p) for p in present[0].percents), *texts])
    strong: dict[tuple[int, int], int] = {}
    for c, column in enumerate(zip(*ranked, strict=True)):
        whole = {r: s for r, s in enumerate(column) if s and s.n == most}  # a mean of fewer runs is no best
        shown = {r: round(100 * s.mean, 1) for r, s in whole.items()}
        places = {r: 1 + sum(other > mean for other in shown.values()) for r, mean in shown.items()}  # equal: one place
        strong |= {(r, c + 2): place for r, place in places.items() if place <= 2}
    head = ["method", "% trained", *columns, *(["Avg."] if len(own) > 1 else [])]
    notes = _notes(study, found)
    notes.insert(1, "% trained: of the pretrained model, stage by stage, without the head where more than it trains.")
    return Grid(study.name, head, rows, notes, strong)


def _average(found: Sequence[Cell | None]) -> Summary | None:
    """Of the tasks within each run, then over runs; None where a task has no runs, or the tasks share none."""
    by_seed = [cell.by_seed for cell in found if cell is not None]
    return average(by_seed) if len(by_seed) == len(found) and set.intersection(*map(set, by_seed)) else None


def _notes(study: Study, found: Sequence[Cell]) -> list[str]:
    metrics = {c.column: c.records[0]["primary"] for c in found}
    notes = [f"Mean and standard deviation of {most_runs(found)} runs, in percent: "]
    notes[0] += ", ".join(f"{column} {metric}" for column, metric in metrics.items()) + "."
    notes += _fewer(found)
    if study.reference:
        corrected = "" if study.correction == "none" else f", corrected by {study.correction}"
        notes.append(
            f"↑ ↓: better or worse than {study.reference}, one-tailed {study.test} t-test, p < {study.alpha:g}"
            f"{corrected}."
        )
    if any(c.records[0]["leaky"] for c in found):
        notes.append("leaks: stopped on the very rows that test, so these values are too good.")
    return notes


def _fewer(found: Sequence[Cell]) -> list[str]:
    """What mean_std says of cells that have fewer runs than others, where there are any."""
    most = most_runs(found)
    fewer = any(0 < c.summary.n < most for c in found)
    return [f"(n/{most}): of n runs only; the others diverged, or are not done."] * fewer


def _layers(layered: Sequence[Cell], whole: Sequence[Cell]) -> Grid:
    """Tasks down, layers across (the first paper's Table 3)."""
    columns, methods = _order(c.column for c in layered), _order(c.method for c in layered)
    full = [m for m in _order(c.method for c in whole) if any(c.method == m and c.trains_all for c in whole)]
    most = most_runs([*layered, *whole])
    at = {(c.method, c.column): mean_std(c.summary, most) for c in [*layered, *whole]}
    rows = [[column, *(at.get((m, column), "-") for m in [*methods, *full])] for column in columns]
    return Grid("One layer at a time", ["task", *methods, *full], rows, _fewer([*layered, *whole]))


def _bands(study: Study, found: Sequence[Cell], comparisons: Compared) -> list[Grid]:
    """Tasks down in bands of training rows, methods across, and arrows of the band averages (Tables 2 and 3).

    The averages' comparisons of all bands are one family of a correction: one table shows them.
    """
    methods, most = _order(c.method for c in found), most_runs(found)
    bands: dict[str, list[Cell]] = {}
    for band, least, over in BANDS:
        if mine := [c for c in found if c.own and least <= c.rows < over]:
            bands[band] = mine
    averages: dict[tuple[str, str], Summary] = {}
    for band, mine in bands.items():
        at = {(c.method, c.column): c for c in mine}
        for method in methods:
            if mean := _average([at.get((method, column)) for column in _order(c.column for c in mine)]):
                averages[band, method] = mean
    pairs = {
        (band, method): compare(mean, base, study.test, study.alpha)
        for (band, method), mean in averages.items()
        if method != study.reference and (base := averages.get((band, study.reference))) and min(mean.n, base.n) > 1
    }
    verdict = dict(zip(pairs, correct(list(pairs.values()), study.correction, study.alpha), strict=True))
    rows, verdicts = [], []
    for band, mine in bands.items():
        at = {(c.method, c.column): c for c in mine}
        for column in _order(c.column for c in mine):
            row = [at.get((method, column)) for method in methods]
            rows.append([column, *(mean_std(c.summary, most, arrow(comparisons, c)) if c else "-" for c in row)])
        arrows = {m: verdict[band, m].arrow for m in methods if (band, m) in verdict}
        means = [averages.get((band, m)) for m in methods]
        texts = [mean_std(s, most, arrows.get(m, "")) if s else "-" for m, s in zip(methods, means, strict=True)]
        rows.append([f"Avg. ({band})", *texts])
        words = {"up": "↗", "down": "↘", "none": "→"}
        verdicts.append([band, *(words[arrows[m]] if m in arrows else "-" for m in methods if m != study.reference)])
    grids = [Grid("By training rows", ["task", *methods], rows, _notes(study, found))]
    if study.reference:
        others = [m for m in methods if m != study.reference]
        grids.append(Grid(f"Against {study.reference}, by training rows", ["rows", *others], verdicts))
    return grids


def _varied(found: Sequence[Cell], vary: Sequence[str]) -> list[Grid]:
    """Methods down; what the seeds vary across (the second paper's Table 4), one table a column."""
    grids = []
    for column in _order(c.column for c in found):
        mine = [c for c in found if c.column == column]
        at = {(c.method, c.vary): mean_std(c.summary, most_runs(mine)) for c in mine}
        rows = [[m, *(at.get((m, v), "-") for v in vary)] for m in _order(m for m, _ in at)]
        grids.append(Grid(f"{column}: what the seeds vary", ["method", *(v.upper() for v in vary)], rows, _fewer(mine)))
    return grids


def _protocol(found: Sequence[Cell]) -> Grid:
    """Methods down; stopping rule and split across (the second paper's Table 1)."""
    places = _order((c.stop_on, c.column) for c in sorted(found, key=lambda c: c.stop_on))
    at = {(c.method, c.stop_on, c.column): mean_std(c.summary, most_runs(found)) for c in found}
    rows = [[m, *(at.get((m, *place), "-") for place in places)] for m in _order(c.method for c in found)]
    head = ["method", *(f"{column}, stop on {stop}" for stop, column in places)]
    note = "2-2 leaks: validated on the very half that tests. 1-2 validates on the other half."
    return Grid("The broken protocol beside the fair one", head, rows, [note, *_fewer(found)])


def _spread(study: Study, found: Sequence[Cell]) -> Grid:
    several = len(study.seeds.vary) > 1
    rows = []
    for c in found:
        name, s = _titled(c.method, f"({c.vary})" if several else "", c.stop_on), c.summary
        numbers = [f"{100 * x:.1f}" if not math.isnan(x) else "-" for x in (s.mean, s.std, s.best, s.worst)]
        runs = f"{s.n}/{s.total}" if s.n < s.total else str(s.total)
        rows.append([c.column, name, runs, *numbers, f"{100 * s.failed_rate:.0f}%"])
    note = "Failed: diverged, or not above a constant answer."
    if any(c.summary.n < c.summary.total for c in found):
        note += " Runs n/total: n have a value, and the others diverged."
    return Grid(
        "Spread over the runs", ["task", "method", "runs", "mean", "std", "best", "worst", "failed"], rows, [note]
    )


def _cost(study: Study, found: Sequence[Cell], comparisons: Compared) -> Grid:
    """What a run reaches, its wall time and its peak memory, stock beside patched, and the medians of the ratios.

    What it reaches is of the first way of varying seeds, as in the main table, and its costs are of all.
    """
    rows: list[list[str]] = []
    own = [c for c in found if c.own]
    for column, method, stop_on in _order((c.column, c.method, c.stop_on) for c in own):
        mine = [c for c in own if (c.column, c.method, c.stop_on) == (column, method, stop_on)]
        pairs: dict[tuple[Any, ...], dict[bool, dict[str, Any]]] = {}
        for c in mine:
            for r in c.records:
                pairs.setdefault((c.vary, r["wi"], r["do"]), {})[c.patched] = r["outcome"]
        both = [pair for pair in pairs.values() if len(pair) == 2]
        if not both:
            continue
        first = [next(c for c in mine if c.patched == which) for which in (False, True)]
        reached = [mean_std(c.summary, most_runs(own), arrow(comparisons, c)) for c in first]
        row = [column, _titled(method, "", stop_on), *reached]
        for cost, form in ((_seconds, "{:,.1f}"), (_rise, "{:,.0f}"), (_peak, "")):
            stock, patched = ([cost(pair[which]) for pair in both] for which in (False, True))
            row += [form.format(median(values)) for values in (stock, patched) if form]
            row.append(f"{median(p / s for p, s in zip(patched, stock, strict=True)):.2f}" if all(stock) else "-")
        rows.append(row)
    head = ["task", "method", "stock", "patched"]
    for name in ("s", "MiB above the model"):
        head += [f"{name}: {what}" for what in ("stock", "patched", "ratio")]
    notes = [
        "Medians over the runs; the ratios are medians of the ratios of a patched run and the stock run beside it.",
        "Seconds: training and its evaluations. Memory: at most while training, resident on a CPU, allocated on a GPU; "
        "above what it was with the model loaded, and the ratio of the whole.",
    ]
    most = max((r["outcome"].get("packed", 1) for c in found for r in c.records), default=1)
    if most > 1:
        notes.append(f"Up to {most} runs were trained together: seconds are then a run's share, memory is that of all.")
    notes += _fewer(own)
    if comparisons:
        notes.insert(0, f"↑ ↓: as above, each variant beside the same variant of {study.reference}.")
    return Grid(f"{study.name}: stock and patched", [*head, "whole peak: ratio"], rows, notes)


def _titled(method: str, vary: str, stop_on: str) -> str:
    return " ".join(filter(None, [method, vary, f"stop on {stop_on}" if stop_on else ""]))


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
