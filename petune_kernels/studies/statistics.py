"""Statistics over repeated runs: summaries with failed runs, one-tailed t-tests, corrections for many comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from .errors import InputError

ARROWS = {"up": "↑", "down": "↓", "none": ""}
CORRECTIONS = ("none", "bonferroni", "holm", "bh")
TESTS = ("student", "welch")
ROUNDING = 1e-12
"""Values that differ by less than this share are equal: 0.1 + 0.2 is 0.3."""


@dataclass(frozen=True)
class Summary:
    """`n` runs with a value, their mean, sample standard deviation (n - 1; NaN for one run), best and worst.

    failed: runs that diverged, or whose value is not above that of a constant answer. The diverged ones have no value
    and are in `failed` and `total` only; the others are in the mean too, as in the papers.
    """

    n: int
    mean: float
    std: float
    best: float
    worst: float
    failed: int = 0
    total: int = 0

    @property
    def failed_rate(self) -> float:
        return self.failed / self.total if self.total else 0.0


@dataclass(frozen=True)
class Comparison:
    """One-tailed t-tests of a method against the reference.

    p_up: of the null hypothesis that the method is not better; p_down: that it is not worse. arrow: "up", "down" or
    "none". t is positive where the method is better.
    """

    t: float
    p_up: float
    p_down: float
    arrow: str


def summarise(values: Sequence[float | None], floor: float | None = None) -> Summary:
    """Of one value a run; None or NaN is a run that diverged. floor: a value at or below it is a failed run, too."""
    if not values:
        raise InputError("no runs to summarise")
    kept = [float(v) for v in values if v is not None and math.isfinite(v)]
    failed = len(values) - len(kept) + sum(v <= floor for v in kept if floor is not None)
    if not kept:
        nan = float("nan")
        return Summary(0, nan, nan, nan, nan, failed, len(values))
    equal = max(kept) - min(kept) <= ROUNDING * max(map(abs, kept))  # then exactly 0, whatever the mean's rounding
    std = float("nan") if len(kept) == 1 else 0.0 if equal else float(np.std(kept, ddof=1))
    mean = kept[0] if equal else float(np.mean(kept))
    return Summary(len(kept), mean, std, max(kept), min(kept), failed, len(values))


def compare(method: Summary, reference: Summary, test: str = "student", alpha: float = 0.05) -> Comparison:
    """Whether `method` beats or falls behind `reference`: two one-tailed t-tests from means, deviations and counts.

    test: "student" (equal variances) or "welch". Where neither side varies, equal means are a tie (both p are 1), and
    of different means the p of the better side is 1 / C(n + m, n), the least that an exact permutation test of as many
    runs could give: two runs a side prove nothing. Raises InputError for fewer than 2 runs on a side.
    """
    if test not in TESTS:
        raise InputError(f"test is {test!r}; accepted: {', '.join(TESTS)}")
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; accepted is a number between 0 and 1")
    if min(method.n, reference.n) < 2:
        raise InputError(f"a t-test needs at least 2 runs on each side, got {method.n} and {reference.n}")
    difference, rounding = method.mean - reference.mean, ROUNDING * max(abs(method.mean), abs(reference.mean))
    if max(method.std, reference.std) <= rounding:
        if abs(difference) <= rounding:
            return Comparison(0.0, 1.0, 1.0, "none")
        t, least = math.copysign(math.inf, difference), 1 / math.comb(method.n + reference.n, method.n)
        return _arrow(Comparison(t, *((least, 1.0) if difference > 0 else (1.0, least)), "none"), alpha)
    sides = (method.mean, method.std, method.n, reference.mean, reference.std, reference.n)
    up = stats.ttest_ind_from_stats(*sides, equal_var=test == "student", alternative="greater")
    down = stats.ttest_ind_from_stats(*sides, equal_var=test == "student", alternative="less")
    return _arrow(Comparison(float(up.statistic), float(up.pvalue), float(down.pvalue), "none"), alpha)


def correct(comparisons: Sequence[Comparison], method: str = "none", alpha: float = 0.05) -> list[Comparison]:
    """The comparisons with p-values corrected for their number, and new arrows.

    method: "bonferroni" and "holm" bound the chance of one false arrow, "bh" (Benjamini-Hochberg) the share of false
    ones among the arrows. The family is both tails of every comparison: the side is not chosen after a look at it.
    """
    if method not in CORRECTIONS:
        raise InputError(f"correction is {method!r}; accepted: {', '.join(CORRECTIONS)}")
    if not comparisons or method == "none":
        return list(comparisons)
    flat = np.array([p for c in comparisons for p in (c.p_up, c.p_down)])
    adjusted = {"bonferroni": _bonferroni, "holm": _holm, "bh": stats.false_discovery_control}[method](flat)
    pairs = adjusted.reshape(-1, 2)
    return [
        _arrow(replace(c, p_up=float(up), p_down=float(down)), alpha)
        for c, (up, down) in zip(comparisons, pairs, strict=True)
    ]


def average(tasks: Sequence[Mapping[Any, float | None]]) -> Summary:
    """A row "Avg." of the papers: the tasks are averaged within each run, then the runs are summarised.

    tasks: for each task, run (its seeds) -> value. Only runs that every task has count; one that diverged on any task
    has no value.
    """
    if not tasks:
        raise InputError("no tasks to average")
    runs = [run for run in tasks[0] if all(run in task for task in tasks)]
    values: list[float | None] = []
    for run in runs:
        row = [task[run] for task in tasks]
        finite = [v for v in row if v is not None]
        values.append(sum(finite) / len(row) if len(finite) == len(row) else None)
    if not values:
        raise InputError("the tasks have no run in common")
    return summarise(values)


def _arrow(c: Comparison, alpha: float) -> Comparison:
    return replace(c, arrow="up" if c.p_up < alpha else "down" if c.p_down < alpha else "none")


def _bonferroni(p: np.ndarray) -> np.ndarray:
    return np.minimum(1, p * len(p))


def _holm(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
