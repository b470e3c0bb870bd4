"""What `tune` returns and what `counts` lists; both print as a table in rich and as plain text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TuneReport:
    """What trains after `tune`.

    names: the regime's parameters, as `named_parameters()` knows them; the head is in it only in regime full.
    count: their number of scalars. total: the model's scalars. head_names, head_count: the head's that train.
    pooler: "trained", "frozen" or "none" (the model has none). trainable: all scalars that train.
    per_layer: the regime's scalars in each block, encoder blocks first.
    """

    regime: str
    names: tuple[str, ...]
    count: int
    total: int
    head_names: tuple[str, ...]
    head_count: int
    pooler: str
    trainable: int
    per_layer: tuple[int, ...]

    @property
    def percent(self) -> float:
        """count in percent of total."""
        return 100 * self.count / self.total

    def _lines(self) -> list[tuple[str, str]]:
        layers = [i for i, count in enumerate(self.per_layer) if count]
        return [
            ("regime", self.regime),
            ("parameters", f"{self.count:,} of {self.total:,} ({self.percent:.4f} %) in {len(self.names)} tensors"),
            ("layers", f"{len(layers)} of {len(self.per_layer)}: {_ranges(layers)}" if layers else "none"),
            ("head", f"{self.head_count:,} in {len(self.head_names)} tensors" if self.head_names else "not trained"),
            ("pooler", self.pooler),
            ("trainable", f"{self.trainable:,}"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{key:<12}{value}" for key, value in self._lines())

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(show_header=False)
        table.add_column(style="bold")
        table.add_column()
        for key, value in self._lines():
            table.add_row(key, value)
        return table


@dataclass(frozen=True)
class CountRow:
    """One regime's row. count leaves the head out, except in regime frozen; note says why a count is 0, else ""."""

    regime: str
    count: int
    percent: float
    note: str


@dataclass(frozen=True)
class CountTable:
    """All regimes of one model."""

    model: str
    total: int
    rows: tuple[CountRow, ...]

    def __iter__(self) -> Iterator[CountRow]:
        return iter(self.rows)

    def __getitem__(self, regime: str) -> CountRow:
        for row in self.rows:
            if row.regime == regime:
                return row
        raise KeyError(f"regime: {regime!r}; accepted are {', '.join(row.regime for row in self.rows)}")

    def __str__(self) -> str:
        head = f"{self.model}, {self.total:,} parameters"
        rows = [f"{row.regime:<20}{row.count:>16,}{row.percent:>11.4f} %  {row.note}".rstrip() for row in self.rows]
        return "\n".join([head, *rows])

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.model}, {self.total:,} parameters")
        table.add_column("regime")
        table.add_column("parameters", justify="right")
        table.add_column("%", justify="right")
        table.add_column("note")
        for row in self.rows:
            table.add_row(row.regime, f"{row.count:,}", f"{row.percent:.4f}", row.note)
        return table


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
