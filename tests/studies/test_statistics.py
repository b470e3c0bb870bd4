"""Summaries, t-tests and corrections; the published Table 3 is the golden test."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from petune_kernels.studies.errors import InputError
from petune_kernels.studies.statistics import Comparison, Summary, average, compare, correct, summarise

METHODS = ("Adapter", "PT", "LoRA", "BitFit")
TABLE_3 = {  # Revisiting Parameter-Efficient Tuning
    "low": ("up", "down", "up", "up"),
    "medium": ("none", "down", "down", "none"),
    "high": ("down", "down", "down", "down"),
}


def published() -> dict[tuple[str, str, str], Summary]:
    with (Path(__file__).parent / "data" / "table2_revisiting.csv").open(newline="") as stream:
        return {
            (r["band"], r["task"], r["method"]): Summary(20, float(r["mean"]), float(r["std"]), 0, 0)
            for r in csv.DictReader(stream)
        }


@pytest.mark.parametrize("test", ["student", "welch"])
@pytest.mark.parametrize("band", TABLE_3)
def test_the_published_averages_give_the_published_arrows(band: str, test: str) -> None:
    rows = published()
    found = tuple(compare(rows[band, "Avg", m], rows[band, "Avg", "FT"], test).arrow for m in METHODS)
    assert found == TABLE_3[band]


def test_tasks_are_averaged_within_a_run_and_then_over_runs() -> None:
    found = average([{0: 0.5, 1: 0.7, 2: None, 3: 0.1}, {1: 0.5, 0: 0.7, 2: 0.2}])  # runs 0 and 1 undo each other
    assert (found.n, found.total, found.mean, found.std) == (2, 3, 0.6, 0.0)
    with pytest.raises(InputError, match="no run in common"):
        average([{0: 0.5}, {1: 0.5}])


@pytest.mark.parametrize(("test", "equal"), [("student", True), ("welch", False)])
def test_the_t_test_from_runs_is_scipys(test: str, equal: bool) -> None:
    draw = np.random.default_rng(0)
    ours, theirs = draw.normal(0.7, 0.05, 20), draw.normal(0.66, 0.1, 12)
    found = compare(summarise(list(ours)), summarise(list(theirs)), test)
    for p, side in ((found.p_up, "greater"), (found.p_down, "less")):
        assert p == pytest.approx(stats.ttest_ind(ours, theirs, equal_var=equal, alternative=side).pvalue)


def test_sides_without_variance_are_a_tie_or_as_certain_as_their_runs_allow() -> None:
    wsc = Summary(20, 63.46, 0.0, 63.46, 63.46)
    assert compare(wsc, wsc) == Comparison(0.0, 1.0, 1.0, "none")
    for test in ("student", "welch"):
        better = compare(Summary(20, 64.0, 0.0, 64, 64), wsc, test)
        assert (better.arrow, better.p_up, better.p_down) == ("up", 1 / math.comb(40, 20), 1.0)
        few = compare(Summary(2, 60.0, 0.0, 60, 60), Summary(2, 63.46, 0.0, 63.46, 63.46), test)
        assert (few.arrow, few.p_up, few.p_down) == ("none", 1.0, 1 / 6)
        assert compare(Summary(20, 58.7, 4.69, 0, 0), wsc, test).arrow == "down"


def test_what_differs_by_rounding_alone_is_a_tie() -> None:
    assert compare(summarise([0.1 + 0.2] * 20), summarise([0.3] * 20)) == Comparison(0.0, 1.0, 1.0, "none")
    rounded = summarise([0.1 + 0.2, 0.3] * 10)
    assert rounded.std == 0.0 and compare(rounded, summarise([0.3] * 20)).arrow == "none"
    assert compare(rounded, summarise([0.3 + 1e-9] * 20)).arrow == "down"


def test_one_side_without_variance_is_still_tested() -> None:
    ours, theirs = [0.7] * 5, [0.6, 0.65, 0.7, 0.75, 0.8]
    found = compare(summarise(ours), summarise(theirs))
    assert found.p_up == pytest.approx(stats.ttest_ind(ours, theirs, alternative="greater").pvalue)


def test_equal_values_have_no_spread_at_all() -> None:
    assert summarise([-0.1] * 7).std == 0.0
    same = summarise([0.1] * 7)
    assert same.std == 0.0 and same.mean == 0.1


def test_a_summary_counts_diverged_runs_and_those_no_better_than_a_constant() -> None:
    found = summarise([0.9, 0.5, None, math.nan, 0.8], floor=0.5)
    assert (found.n, found.total, found.failed, found.failed_rate) == (3, 5, 3, 0.6)
    assert (found.best, found.worst) == (0.9, 0.5)
    assert found.std == pytest.approx(np.std([0.9, 0.5, 0.8], ddof=1))
    nothing = summarise([None, None])
    assert nothing.n == 0 and math.isnan(nothing.mean) and nothing.failed_rate == 1
    assert math.isnan(summarise([0.5]).std)
    with pytest.raises(InputError, match="no runs"):
        summarise([])


def test_corrections() -> None:
    raw = [Comparison(2, p, 1 - p, "up") for p in (0.001, 0.004, 0.012, 0.2)]
    assert [c.arrow for c in correct(raw)] == ["up"] * 4  # untouched
    flat = [p for c in raw for p in (c.p_up, c.p_down)]
    bonferroni = correct(raw, "bonferroni")
    assert [c.p_up for c in bonferroni] == pytest.approx([0.008, 0.032, 0.096, 1])
    assert [c.arrow for c in bonferroni] == ["up", "up", "none", "none"]
    assert [c.arrow for c in correct(raw, "bonferroni", alpha=0.01)] == ["up", "none", "none", "none"]
    assert [c.p_up for c in correct(raw, "holm")] == pytest.approx([0.008, 0.028, 0.072, 1])  # times 8, 7, 6, 5
    expected = stats.false_discovery_control(flat)
    assert [p for c in correct(raw, "bh") for p in (c.p_up, c.p_down)] == pytest.approx(list(expected))
    assert correct([], "holm") == []


def test_bad_input_is_named() -> None:
    good = Summary(20, 1, 1, 1, 1)
    with pytest.raises(InputError, match="at least 2 runs on each side, got 1 and 20"):
        compare(Summary(1, 1, math.nan, 1, 1), good)
    with pytest.raises(InputError, match="got 20 and 1"):
        compare(good, Summary(1, 1, math.nan, 1, 1))
    with pytest.raises(InputError, match="'anova'; accepted: student, welch"):
        compare(good, good, "anova")
    with pytest.raises(InputError, match="alpha is 5"):
        compare(good, good, alpha=5)
    with pytest.raises(InputError, match="'sidak'; accepted: none, bonferroni"):
        correct([], "sidak")
