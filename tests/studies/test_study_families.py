"""Averages and corrections of a study's tables: what is averaged over, and what is one family of tests."""

from __future__ import annotations

from typing import Any

from petune_kernels.studies import layouts, runner
from petune_kernels.studies.tasks import Examples, TaskData

from .test_study_tables import records, study


def test_an_average_is_over_runs_that_all_tasks_have_and_a_mean_of_fewer_runs_is_no_best() -> None:
    which = study()
    found = records(which)
    for r in found:
        if (r["method"], r["task"], r["wi"]) == ("FT", "movie", 0):
            r["outcome"]["failed"] = True
        if r["method"] == "FT":
            r["outcome"]["test"]["test"]["accuracy"] += 0.2 * (r["wi"] == 0 and r["task"] == "amazon") + 0.0002
    main = layouts.tables(which, found)[0]
    assert main.rows[0][2:] == ["80.3±0.5 (3/4)", "75.0±9.5", "75.3±0.5 (3/4)"]
    assert main.rows[1][4] == "65.0±0.6"
    assert main.strong[1, 2] == main.strong[0, 3] == main.strong[1, 4] == 1  # lora leads where FT lacks a run
    assert (0, 2) not in main.strong and (0, 4) not in main.strong


def test_the_verdicts_of_all_bands_are_one_family_under_a_correction() -> None:
    """Two bands, two methods, two tails: a p-value counts 8 times, not 4 times as in a table of one band."""
    methods = [{"name": "full", "label": "FT"}, {"name": "lora"}, {"name": "bitfit"}]
    verdicts = {}
    for correction in ("none", "bonferroni"):
        which = study(methods=methods, correction=correction)
        found = records(which)
        for r in found:
            r["rows"]["train"] = 400 if r["task"] == "movie" else 20_000
            if r["method"] == "lora":
                r["outcome"]["test"]["test"]["accuracy"] += 0.1 - 0.0146  # p_down is .009
        grids = {grid.title: grid for grid in layouts.tables(which, found)}
        verdicts[correction] = grids["Against FT, by training rows"].rows
    assert verdicts["none"] == [["low", "↘", "↘"], ["high", "↘", "↘"]]
    assert verdicts["bonferroni"] == [["low", "→", "↘"], ["high", "→", "↘"]]


def test_a_test_part_may_have_any_name() -> None:
    """What the protocol is about is the first test part, and one called "validation" is not counted as that part."""
    which = study(methods=[{"name": "full", "label": "FT"}])

    def rows(count: int) -> Examples:
        return Examples(["a"] * count, None, [0, 1] * (count // 2))

    found: list[dict[str, Any]] = records(which)
    data = TaskData(rows(8), rows(2), {"validation": rows(4), "test": rows(6)}, 2, "accuracy")
    for run, r in zip(which.runs(), found, strict=True):
        r |= {key: value for key, value in runner.describe(run, data).items() if key in ("rows", "baseline")}
        r["outcome"]["test"]["validation"] = {"accuracy": 0.9}
    assert found[0]["rows"]["validation"] == 2 and found[0]["rows"]["tests"] == {"validation": 4, "test": 6}
    main, bands = layouts.tables(which, found)[:2]
    assert main.columns[2:6] == ["movie", "movie → test", "amazon", "amazon → test"]
    assert [row[1] for row in bands.rows] == ["90.0±0.0"] * 3
