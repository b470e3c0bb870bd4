"""A study's records grouped into the cells of its tables and pictures, and each cell compared with the reference's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .statistics import ARROWS, Comparison, Summary, compare, correct, summarise
from .study import MethodSpec, Study

Record = dict[str, Any]
Key = tuple[str, str, str, str, bool]
"""Column, method, what the seeds vary, stopping rule and variant: what no other cell of a study has."""


@dataclass(frozen=True)
class Cell:
    """All runs of one method on one column. column: task, protocol and test part in words; rows: of training.

    layers_of: the title of the method with each_layer of which this is one layer; "" for every other method. own: on
    the test part that the task's protocol cuts, not on a further one or another task's.
    """

    column: str
    method: str
    vary: str
    stop_on: str
    patched: bool
    layers_of: str
    own: bool
    summary: Summary
    values: tuple[float | None, ...]
    records: tuple[Record, ...]

    @property
    def key(self) -> Key:
        return (self.column, self.method, self.vary, self.stop_on, self.patched)

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


def value(record: Record, part: str) -> float | None:
    """The primary metric of a test part at the selected checkpoint; None for a run that diverged."""
    outcome = record["outcome"]
    return None if outcome["failed"] else outcome["test"].get(part, {}).get(record["primary"])


def _is_own(record: Record, part: str) -> bool:
    """The first test part, which the protocol is about, whatever its name."""
    return part == next(iter(record["baseline"]))


def column_name(record: Record, part: str) -> str:
    halves = {"dev1-dev2": " 1-2", "dev2-dev2": " 2-2 (leaks)", "dev-dev": " (leaks)"}.get(record["protocol"], "")
    return record["task"] + halves + ("" if _is_own(record, part) else f" → {part}")


def cells(study: Study, records: Iterable[Record]) -> list[Cell]:
    """The records grouped, in the study's order whatever order the runs ended in; seeds in order within a group."""
    groups: dict[Key, list[tuple[Record, str]]] = {}
    for record in _ordered(study, records):
        for part in record["baseline"]:
            key = (column_name(record, part), record["method"], record["vary"], record["stop_on"], record["patched"])
            groups.setdefault(key, []).append((record, part))
    found = []
    for key, group in groups.items():
        group.sort(key=lambda pair: (pair[0]["wi"], pair[0]["do"]))
        values = tuple(value(record, part) for record, part in group)
        first, part = group[0]
        method, summary = _method_of(study, first), summarise(values, first["baseline"][part])
        layers_of = method.title if method.each_layer else ""
        own, of = _is_own(first, part), tuple(record for record, _ in group)
        found.append(Cell(*key, layers_of, own, summary, values, of))
    return found


def _ordered(study: Study, records: Iterable[Record]) -> list[Record]:
    """The records in the study's order of tasks, methods and layers."""
    tasks, methods = [t.title for t in study.tasks], list(study.methods)

    def place(record: Record) -> tuple[Any, ...]:
        method = methods.index(_method_of(study, record))
        places = (tasks.index(record["task"]), record["protocol"], method, record["layer"] or [])
        return (*places, record["stop_on"], study.seeds.vary.index(record["vary"]), not record["patched"])

    return sorted(records, key=place)


def _method_of(study: Study, record: Record) -> MethodSpec:
    """The study's method that made the record, for one layer of a method with each_layer the latter."""
    layers = record["layer"] or []
    return next(
        method
        for method in study.methods
        if record["method"] in ([method.of_layer(k).title for k in layers] if method.each_layer else [method.title])
    )


def compared(study: Study, found: Sequence[Cell]) -> dict[Key, Comparison]:
    """Key of a cell -> its comparison with the reference's cell of the same column, seeds and variant.

    found: all cells of the study. A correction's family is what one table shows: the cells of one variant and one way
    of varying seeds, without or with single layers only.
    """

    def setting(cell: Cell) -> tuple[Any, ...]:
        return (cell.column, cell.vary, cell.stop_on, cell.patched)

    references = {setting(cell): cell for cell in found if study.reference and cell.method == study.reference}
    families: dict[tuple[Any, ...], dict[Key, Comparison]] = {}
    for cell in found:
        other = references.get(setting(cell))
        if other is None or other is cell or min(cell.summary.n, other.summary.n) < 2:
            continue
        family = families.setdefault((cell.patched, cell.vary, bool(cell.layers_of)), {})
        family[cell.key] = compare(cell.summary, other.summary, study.test, study.alpha)
    return {
        key: comparison
        for family in families.values()
        for key, comparison in zip(family, correct(list(family.values()), study.correction, study.alpha), strict=True)
    }


def mean_std(summary: Summary, most: int, arrow: str = "") -> str:
    """ "52.8±2.0" in percent, with the arrow; "-" without a value. most: runs that a cell of this table can have, of
    which "(2/20)" says that fewer have a value."""
    if not summary.n:
        return "failed" if summary.total else "-"
    spread = "" if math.isnan(summary.std) else f"±{100 * summary.std:.1f}"
    fewer = f" ({summary.n}/{most})" if summary.n < most else ""
    return f"{100 * summary.mean:.1f}{spread}{ARROWS[arrow or 'none']}{fewer}"


def most_runs(found: Iterable[Cell]) -> int:
    return max((cell.summary.total for cell in found), default=0)


def arrow(comparisons: Mapping[Key, Comparison], cell: Cell) -> str:
    return comparisons[cell.key].arrow if cell.key in comparisons else ""
