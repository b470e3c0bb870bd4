"""Pictures hold every cell of a study, under names that are its own."""

from __future__ import annotations

from typing import Any

from petune_kernels.studies import pictures
from petune_kernels.studies.cells import Cell, cells
from petune_kernels.studies.study import Study

from .test_study_tables import records, study


def grouped(which: Study, rows: dict[str, int], primary: dict[str, str]) -> list[Cell]:
    found = records(which)
    for r in found:
        r["rows"]["train"] = rows.get(r["task"], 50)
        metric = primary.get(r["task"], "accuracy")
        r["primary"] = metric
        tested: Any = r["outcome"]["test"]["test"]
        tested[metric] = tested.pop("accuracy")
        for entry in r["outcome"]["history"]:
            entry[metric] = entry.pop("accuracy")
    return cells(which, found)


def test_the_best_runs_of_a_protocol_study_have_a_bar_for_each_stopping_rule() -> None:
    which = study(kind="protocol", methods=[{"name": "full", "label": "FT"}, {"name": "lora"}])
    found = records(which)
    for r in found:
        if r["method"] == "lora" and r["stop_on"] == "metric":
            r["outcome"]["test"]["test"]["accuracy"] += 0.1
    figure = pictures.best_of_runs(cells(which, found), "FT")
    assert figure is not None
    (axis,) = figure.axes
    names = [tick.get_text() for tick in axis.get_xticklabels()]
    heights = {name: bar.get_height() for name, bar in zip(names, axis.patches, strict=True)}
    assert len(heights) == 2 * 2 * 2
    assert heights["movie 1-2, stop on loss"] < -10 < -1 < heights["movie 1-2, stop on metric"]


def test_curves_of_iterations_are_of_one_data_set_under_its_metric() -> None:
    tasks = [
        {"name": "cola"},
        *({"name": "movie", "label": label, "train_rows": 1} for label in ("1k", "2k")),
        *({"name": "mine", "label": label, "file": f"{label}.csv"} for label in ("a", "b")),
    ]
    which = study(tasks=tasks, methods=[{"name": "full", "label": "FT"}])
    found = grouped(which, {"1k": 1000, "2k": 2000, "a": 10}, {"cola": "matthews", "1k": "f1", "2k": "f1"})
    curves = pictures.by_samples(found)
    assert {panel: list(lines) for panel, lines in curves.items()} == {
        ("FT", "movie", "f1"): ["1k (1,000 rows)", "2k (2,000 rows)"]  # a.csv and b.csv are no samples of one set
    }
    assert pictures.iterations(curves).axes[0].get_ylabel() == "f1, %"


def test_curves_of_iterations_are_kept_apart_by_protocol_and_stopping_rule() -> None:
    tasks = [{"name": "movie", "label": label} for label in ("1k", "2k")]
    which = study(kind="protocol", tasks=tasks, methods=[{"name": "full", "label": "FT"}])
    (lines,) = pictures.by_samples(grouped(which, {"1k": 1000, "2k": 2000}, {})).values()
    assert len(lines) == 8 and "1k 2-2 (leaks), stop on metric (1,000 rows)" in lines


def test_what_a_bar_of_deviation_means_stands_in_the_picture() -> None:
    which = study(methods=[{"name": "full", "label": "FT"}, {"name": "layernorm", "each_layer": True}])
    found = cells(which, records(which))
    layered = [c for c in found if c.layers_of]
    for figure in (pictures.seed_points(found), pictures.layer_curve(layered, found)):
        assert figure is not None and "± 1 standard deviation" in figure.get_suptitle()
