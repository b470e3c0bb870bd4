"""Averages and corrections of a study's tables: what is averaged over, and what is one family of tests."""

from __future__ import annotations

from petune_kernels.studies import layouts

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
