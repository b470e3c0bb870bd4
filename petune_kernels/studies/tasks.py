"""What a task is: labelled texts, their parts, and how predictions are scored.

`sources.py` reads texts, `splits.py` makes a `TaskData` of them by one of the protocols. Every metric here is better
when higher. GLUE's and SuperGLUE's choices are in `NAMED`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as scores

from .data import normalised
from .errors import InputError

CLASSIFICATION = ("accuracy", "f1", "matthews")
REGRESSION = ("pearson", "spearman")


@dataclass(frozen=True)
class Examples:
    """Row i is `texts[i]`, for a pair task with `pairs[i]`; `labels[i]` is a class index, or a score in regression."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.texts) or (self.pairs is not None and len(self.pairs) != len(self.texts)):
            pairs = "no" if self.pairs is None else len(self.pairs)
            raise InputError(f"{len(self.texts)} texts, {pairs} pairs and {len(self.labels)} labels do not match")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Examples:
        pairs = None if self.pairs is None else [self.pairs[i] for i in rows]
        return Examples([self.texts[i] for i in rows], pairs, [self.labels[i] for i in rows])

    def keys(self) -> list[tuple[str, str]]:
        """Each row's text and pair without case and spare white space: equal keys are the same example."""
        pairs = self.pairs if self.pairs is not None else [""] * len(self)
        return [(normalised(text), normalised(pair)) for text, pair in zip(self.texts, pairs, strict=True)]


@dataclass(frozen=True)
class TaskData:
    """A task cut into parts, ready to train on.

    labels: number of classes, 1 in a regression. primary: the metric that tables show and that stopping "on the metric"
    reads. name: for tables. protocol: how validation and test were cut; leaky: the validation part is also the test
    part. dropped: rows of the training and validation parts left out because they also stand in a later part. names: of
    the classes.
    """

    train: Examples
    validation: Examples
    tests: dict[str, Examples]
    labels: int
    primary: str
    name: str = "task"
    protocol: str = "train-split"
    leaky: bool = False
    dropped: int = 0
    names: tuple[str, ...] = ()
    baseline: dict[str, float] = field(init=False)
    """Per test part, the best `primary` that always answering one class could reach (regression: 0)."""

    def __post_init__(self) -> None:
        for part, examples in {"train": self.train, "validation": self.validation, **self.tests}.items():
            if not len(examples):
                raise InputError(f"task {self.name!r}: the {part} part is empty")
            _check_labels(self.name, part, examples.labels, self.labels, self.regression)
        if not self.tests:
            raise InputError(f"task {self.name!r} has no test part")
        if not self.regression and len(set(self.train.labels)) < 2:
            raise InputError(f"task {self.name!r}: the training part has one class only; more rows are needed")
        object.__setattr__(self, "baseline", {part: self._constant(rows) for part, rows in self.tests.items()})

    @property
    def regression(self) -> bool:
        return self.labels == 1

    def metrics(self, logits: Any, references: Any) -> dict[str, float]:
        """Every metric's value, of logits [rows, labels] and references [rows]."""
        return (regression_metrics if self.regression else classification_metrics)(logits, references)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the texts and labels of every part: equal ones mean the same data, wherever it was read from."""
        parts = {"train": self.train, "validation": self.validation} | {f"test {n}": p for n, p in self.tests.items()}
        rows = {name: [part.texts, part.pairs, part.labels] for name, part in parts.items()}
        return hashlib.sha256(json.dumps(rows, sort_keys=True, default=float).encode()).hexdigest()[:16]

    def _constant(self, rows: Examples) -> float:
        if self.regression:
            return 0.0
        answers = (np.tile(answer, (len(rows), 1)) for answer in np.eye(self.labels))
        return max(self.metrics(constant, rows.labels)[self.primary] for constant in answers)


@dataclass(frozen=True)
class Named:
    """A task known by name: its data set on the hub, the columns that hold texts and the metric that is usual.

    tests: (name of the test part, split of the data set). subset: the data set's configuration.
    """

    dataset: str
    subset: str
    columns: tuple[str, ...]
    primary: str = "accuracy"
    tests: tuple[tuple[str, str], ...] = (("test", "validation"),)
    compose: str = ""
    """For fields that are not texts to be fed as they are: which function of `sources.py` makes texts of them."""

    @property
    def regression(self) -> bool:
        return self.primary in REGRESSION


def _glue(subset: str, *columns: str, primary: str = "accuracy", **more: Any) -> Named:
    return Named("nyu-mll/glue", subset, columns, primary, **more)


def _superglue(subset: str, *columns: str, primary: str = "accuracy", **more: Any) -> Named:
    return Named("aps/super_glue", subset, columns, primary, **more)


_MNLI = (("test", "validation_matched"), ("mismatched", "validation_mismatched"))
NAMED: dict[str, Named] = {
    "cola": _glue("cola", "sentence", primary="matthews"),
    "sst2": _glue("sst2", "sentence"),
    "mrpc": _glue("mrpc", "sentence1", "sentence2", primary="f1"),
    "stsb": _glue("stsb", "sentence1", "sentence2", primary="pearson"),
    "qqp": _glue("qqp", "question1", "question2", primary="f1"),
    "mnli": _glue("mnli", "premise", "hypothesis", tests=_MNLI),
    "qnli": _glue("qnli", "question", "sentence"),
    "rte": _glue("rte", "sentence1", "sentence2"),
    "wnli": _glue("wnli", "sentence1", "sentence2"),
    "boolq": _superglue("boolq", "question", "passage"),
    "cb": _superglue("cb", "premise", "hypothesis", primary="f1"),
    "copa": _superglue("copa", "premise", "choice1", compose="copa"),
    "wic": _superglue("wic", "sentence1", "sentence2", compose="wic"),
    "wsc": _superglue("wsc", "text", "span2_text", compose="wsc"),
    "multirc": _superglue("multirc", "paragraph", "question", primary="f1", compose="multirc"),
}
"""Metrics are those of the papers' tables; `primary` of a task's entry in a study file chooses another one (stsb:
Pearson in the second paper, Spearman in the first; qqp and mrpc: F1 or accuracy)."""


def classification_metrics(logits: Any, references: Any) -> dict[str, float]:
    """Accuracy, F1 (of class 1 with two classes, macro average with more), Matthews correlation. All in [-1, 1].

    logits [rows, classes] and references [rows], as tensors or arrays. Logits that are not all finite give NaN, which
    a study counts as a failed run.
    """
    values, truth = _arrays(logits, references)
    if values.ndim != 2 or values.shape[1] < 2:
        raise InputError(f"logits have the shape {values.shape}; expected [rows, classes] with at least 2 classes")
    if not np.isfinite(values).all():
        return dict.fromkeys(CLASSIFICATION, float("nan"))
    answers = values.argmax(-1)
    average = "binary" if values.shape[1] == 2 else "macro"
    return {
        "accuracy": float((answers == truth).mean()),
        "f1": float(scores.f1_score(truth, answers, average=average, zero_division=0)),
        "matthews": float(scores.matthews_corrcoef(truth, answers)),
    }


def regression_metrics(logits: Any, references: Any) -> dict[str, float]:
    """Pearson and Spearman correlation of logits [rows, 1] (or [rows]) and references [rows].

    A constant prediction has no correlation; it counts as 0, as Matthews' does. Values that are not finite give NaN.
    """
    values, truth = _arrays(logits, references)
    values = values.reshape(-1)
    if not np.isfinite(values).all():
        return dict.fromkeys(REGRESSION, float("nan"))
    if np.ptp(values) == 0 or np.ptp(truth) == 0:
        return dict.fromkeys(REGRESSION, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pearson = stats.pearsonr(values, truth).statistic
    return {"pearson": float(pearson), "spearman": float(stats.spearmanr(values, truth).statistic)}


def _arrays(logits: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    values = logits.detach().double().cpu().numpy() if hasattr(logits, "detach") else np.asarray(logits, dtype=float)
    truth = references.detach().cpu().numpy() if hasattr(references, "detach") else np.asarray(references)
    if not len(truth) or len(values) != len(truth):
        raise InputError(f"{len(values)} predictions for {len(truth)} references; expected as many, and at least one")
    return values, truth


def _check_labels(task: str, part: str, labels: Sequence[float], classes: int, regression: bool) -> None:
    for row, label in enumerate(labels):
        if regression:
            right = isinstance(label, (int, float)) and np.isfinite(label)
        else:
            right = isinstance(label, (int, np.integer)) and 0 <= label < classes
        if not right:
            accepted = "a finite number" if regression else f"an integer from 0 to {classes - 1}"
            raise InputError(f"task {task!r}, {part} part, row {row}: the label is {label!r}; accepted is {accepted}")
