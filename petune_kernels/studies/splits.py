"""Which rows train, validate and test: the papers' protocols, samples, out-of-domain tests, no leaks by accident."""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import sources
from .errors import InputError
from .sources import Source
from .tasks import CLASSIFICATION, NAMED, REGRESSION, Examples, TaskData

PROTOCOLS = {
    "train-split": "the last 10 % of the training part validate, the held-out part tests",
    "dev1-dev2": "half of the held-out part validates, the other half tests",
    "dev2-dev2": "the second half of the held-out part both validates and tests: LEAKS",
    "dev-dev": "the whole held-out part both validates and tests: LEAKS",
}
LEAKY = ("dev2-dev2", "dev-dev")
_COLUMNS = ("text", "pair", "label_column", "regression")
READ = {
    "file": ("file", "held_out", *_COLUMNS),
    "dataset": ("dataset", "subset", "train_split", "test_splits", *_COLUMNS),
    "a task of GLUE or SuperGLUE": ("path",),
    "a task of the package index": ("held_out",),
}
"""What a task is read from -> the keys that say how."""


def check_known(name: str, otherwise: str = "") -> None:
    """Raises InputError, with the nearest name and with what can be done `otherwise`, for no task that has a name."""
    known = (*NAMED, *sources.INDEXED)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"unknown task {name!r}; known are {', '.join(known)}{otherwise}{hint}")


@dataclass(frozen=True)
class TaskSpec:
    """A task as a study file names it.

    name: a task of GLUE or SuperGLUE or of `sources.INDEXED`; or any name where `file` or `dataset` says what it is.
    path: a local copy of a named GLUE or SuperGLUE task. file: CSV or JSONL with the columns text, pair, label.
    dataset, subset, train_split, test_splits: a data set of the hub, or a folder. primary: another metric than the
    usual one. protocol: one of PROTOCOLS. held_out: the share of a source without test part that is cut off as one.
    validation_share: of the training part, in protocol train-split. *_rows: at most so many, drawn from split_seed.
    out_of_domain: tasks whose held-out part is tested beside this task's own. leaks: rows of an earlier part that
    also stand in a later one are dropped ("drop") or an error ("refuse").
    """

    name: str
    label: str = ""
    path: str | None = None
    file: str | None = None
    dataset: str | None = None
    subset: str | None = None
    text: str = "text"
    pair: str | None = None
    label_column: str = "label"
    train_split: str = "train"
    test_splits: tuple[str, ...] = ("validation",)
    regression: bool = False
    primary: str | None = None
    protocol: str = "train-split"
    held_out: float = 0.2
    validation_share: float = 0.1
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    split_seed: int = 0
    out_of_domain: tuple[str, ...] = ()
    leaks: str = "drop"

    def __post_init__(self) -> None:
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        for key in sorted(given & {key for keys in READ.values() for key in keys} - set(READ[self.origin])):
            raise InputError(
                f"task {self.name!r}: {key} is {getattr(self, key)!r}, and nothing reads it: the texts come from "
                f"{self.origin}, with which {', '.join(READ[self.origin])} may stand"
            )
        for field, accepted in (("protocol", tuple(PROTOCOLS)), ("leaks", ("drop", "refuse"))):
            if getattr(self, field) not in accepted:
                raise InputError(
                    f"task {self.name!r}: {field} is {getattr(self, field)!r}; accepted: {', '.join(accepted)}"
                )
        for field in ("held_out", "validation_share"):
            if not 0 < getattr(self, field) < 1:
                raise InputError(f"task {self.name!r}: {field} is {getattr(self, field)}; accepted is between 0 and 1")
        for field in ("train_rows", "validation_rows", "test_rows"):
            if (rows := getattr(self, field)) is not None and rows < 1:
                raise InputError(f"task {self.name!r}: {field} is {rows}; accepted is at least 1")
        if not (self.file or self.dataset):
            check_known(self.name, ", or give `file` or `dataset`")
        for name in self.out_of_domain:
            check_known(name)

    @property
    def origin(self) -> str:
        """Which of READ it is."""
        if self.file or self.dataset:
            return "file" if self.file else "dataset"
        return f"a task of {'GLUE or SuperGLUE' if self.name in NAMED else 'the package index'}"

    @property
    def source(self) -> str:
        """Which texts: the same for samples of one data set, whatever the tasks' names."""
        named = self.name if self.path is None else f"{self.name} in {self.path}"
        return self.file or " ".join(filter(None, [self.dataset, self.subset])) or named

    @property
    def title(self) -> str:
        return self.label or self.name

    @property
    def leaky(self) -> bool:
        return self.protocol in LEAKY


def load(spec: TaskSpec, say: Callable[[str], None] = lambda line: None) -> TaskData:
    """The task's data, read (and fetched where needed), cut by its protocol and checked for leaks."""
    source = _held_out(_read(spec, say), spec.held_out, spec.split_seed)
    others = {}
    for name in spec.out_of_domain:
        other = _held_out(_read(TaskSpec(name), say), spec.held_out, spec.split_seed)
        if other.names != source.names:
            raise InputError(
                f"task {spec.name!r}: out_of_domain {name!r} has the classes {other.names}, not {source.names}"
            )
        others[name] = next(iter(other.tests.values()))
    return cut(source, spec, others)


def cut(source: Source, spec: TaskSpec, out_of_domain: dict[str, Examples] | None = None) -> TaskData:
    """Train, validation and test parts of a source with held-out parts, by the spec's protocol.

    Leaks are removed before rows are drawn, so the numbers of rows are those asked for where the data suffice. Drawn
    rows keep their order, and a smaller sample of the same seed is a part of a larger one. No training row stands
    anywhere in the held-out part, whichever half is read, so that runs on either half train on the same rows.
    """
    if not source.tests:
        raise InputError(f"task {spec.name!r} has no held-out part")
    first, *more = source.tests
    held = source.tests[first]
    train, tests = source.train, dict(source.tests)
    if spec.protocol == "train-split":
        place = len(train) - max(1, round(len(train) * spec.validation_share))
        train, validation = train.take(range(place)), train.take(range(place, len(train)))
    elif spec.protocol == "dev-dev":
        validation = held
    else:
        order = _shuffled(len(held), spec.split_seed)
        dev1, dev2 = sorted(order[: len(held) // 2]), sorted(order[len(held) // 2 :])
        tests[first] = held.take(dev2)
        validation = held.take(dev1 if spec.protocol == "dev1-dev2" else dev2)
    tests |= out_of_domain or {}

    seen = {key for part in tests.values() for key in part.keys()}  # noqa: SIM118 (a method of Examples)
    dropped = 0
    if not spec.leaky:
        validation, count = _without(validation, seen)
        dropped += count
    train, count = _without(train, seen | set(validation.keys()) | set(held.keys()))
    dropped += count
    if dropped and spec.leaks == "refuse":
        raise InputError(
            f"task {spec.name!r}: {dropped} rows also stand in a later part (train, validation, test); "
            'leaks = "drop" leaves them out'
        )
    draw = spec.split_seed
    tests = {name: _sample(part, spec.test_rows, draw) for name, part in tests.items()}
    validation = tests[first] if spec.leaky else _sample(validation, spec.validation_rows, draw)
    return TaskData(
        train=_sample(train, spec.train_rows, draw),
        validation=validation,
        tests=tests,
        labels=1 if source.regression else max(2, len(source.names)),
        primary=_primary(spec, source),
        name=spec.title,
        protocol=spec.protocol,
        leaky=spec.leaky,
        dropped=dropped,
        names=source.names,
    )


def _primary(spec: TaskSpec, source: Source) -> str:
    usual = "pearson" if source.regression else "accuracy"
    if spec.name in NAMED and not (spec.file or spec.dataset):
        usual = NAMED[spec.name].primary
    accepted = REGRESSION if source.regression else CLASSIFICATION
    if (chosen := spec.primary or usual) not in accepted:
        raise InputError(f"task {spec.name!r}: primary is {chosen!r}; accepted: {', '.join(accepted)}")
    return chosen


def _read(spec: TaskSpec, say: Callable[[str], None]) -> Source:
    if spec.file:
        return sources.table(Path(spec.file), spec.text, spec.pair, spec.label_column, spec.regression)
    if spec.dataset:
        columns = (spec.text, spec.pair) if spec.pair else (spec.text,)
        where = (spec.label_column, spec.train_split, spec.test_splits, spec.regression)
        return sources.dataset(spec.dataset, spec.subset, columns, *where)
    if spec.name in NAMED:
        return sources.named(NAMED[spec.name], spec.path)
    return sources.indexed(spec.name, say)


def _held_out(source: Source, share: float, seed: int) -> Source:
    """A source of one table gets a held-out part by a seeded shuffle; others are left as they were released."""
    if source.tests:
        return source
    order = _shuffled(len(source.train), seed)
    place = max(1, round(len(order) * share))
    return dataclasses.replace(
        source, train=source.train.take(order[place:]), tests={"test": source.train.take(order[:place])}
    )


def _shuffled(rows: int, seed: int) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order


def _sample(examples: Examples, rows: int | None, seed: int) -> Examples:
    if rows is None or rows >= len(examples):
        return examples
    return examples.take(sorted(_shuffled(len(examples), seed)[:rows]))


def _without(examples: Examples, keys: set[tuple[str, str]]) -> tuple[Examples, int]:
    kept = [i for i, key in enumerate(examples.keys()) if key not in keys]
    return examples.take(kept), len(examples) - len(kept)
