"""The coverage report: for every module, which pattern runs it, or why none does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

if TYPE_CHECKING:
    from .graphs import Graphs


@dataclass(frozen=True)
class Entry:
    """One module. pattern: what runs it ('' for none); part: it runs inside another module's fused forward; reason:
    why nothing runs it; candidate: a pattern recognised it, so that leaving it alone is worth a look."""

    path: str
    kind: str
    pattern: str = ""
    reason: str = ""
    part: bool = False
    candidate: bool = False


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did. Printing it gives a table; `patched`, `left_alone` and `backends` are for programs."""

    entries: tuple[Entry, ...]
    backends: dict[str, str]
    """op -> backend ("cpu", "cuda", "triton" or "reference") on the model's device"""
    memory: str = "exact"
    graphs: dict[str, Graphs] = field(default_factory=dict)
    """Path of a stack of layers -> its CUDA graphs: how often they served, why not, their bytes; as it is when read."""

    @property
    def patched(self) -> dict[str, str]:
        """Module path -> pattern bound to it."""
        return {e.path: e.pattern for e in self.entries if e.pattern and not e.part}

    @property
    def parts(self) -> dict[str, str]:
        """Module path -> pattern, for modules that run inside another module's fused forward."""
        return {e.path: e.pattern for e in self.entries if e.part}

    @property
    def left_alone(self) -> dict[str, str]:
        """Module path -> reason, for modules that no pattern runs."""
        return {e.path: e.reason for e in self.entries if not e.pattern}

    @property
    def refused(self) -> dict[str, str]:
        """The part of `left_alone` that a pattern recognised and then refused."""
        return {e.path: e.reason for e in self.entries if not e.pattern and e.candidate}

    def _title(self) -> str:
        level = "" if self.memory == "exact" else f', memory="{self.memory}"'
        counts = (
            f"{len(self.patched)} modules patched (with {len(self.parts)} parts), {len(self.left_alone)} left alone"
        )
        return counts + level

    def __str__(self) -> str:
        rows = (f"  {count:4d}  {kind:16s} {path}: {what}" for path, kind, count, what in self._rows())
        return "\n".join([self._title(), *rows, *map(str, self.graphs.values())])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=self._title(), title_justify="left", show_edge=False)
        table.add_column("n", justify="right")
        for column in ("class", "modules", "pattern, or why it was left alone"):
            table.add_column(column, overflow="fold")
        for path, kind, count, what in self._rows():
            table.add_row(str(count), kind, path, what)
        yield table
        yield "backend: " + ", ".join(f"{op} on {name}" for op, name in self.backends.items())
        yield from map(str, self.graphs.values())

    def _rows(self) -> list[tuple[str, str, int, str]]:
        """(path, class, count, what): layers are counted together, and so are modules of one class that no pattern
        knows or that are parts of one; what is bound comes first, then what was refused."""

        def general(text: str) -> str:
            return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", text)

        groups: dict[tuple[str, ...], list[str]] = {}
        for e in sorted(self.entries, key=lambda e: (not e.pattern, e.part, not e.candidate)):
            path, reason = general(e.path), general(e.reason)
            alone = (e.pattern or e.candidate) and not e.part
            key = (path if alone else "", e.kind, e.pattern, reason)
            groups.setdefault((*key, "part of " if e.part else ""), []).append(path)
        rows = []
        for (_, kind, pattern, reason, part), paths in groups.items():
            different = list(dict.fromkeys(paths))
            shown = ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")
            rows.append((shown or "(the model)", kind, len(paths), f"{part}{pattern}" if pattern else reason))
        return rows
