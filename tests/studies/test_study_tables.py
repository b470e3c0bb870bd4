"""Tables and pictures of made-up runs whose means are known."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from rich.console import Console

from petune_kernels.studies import analysis, layouts, pictures
from petune_kernels.studies.cells import cells
from petune_kernels.studies.errors import InputError
from petune_kernels.studies.runner import describe
from petune_kernels.studies.statistics import compare
from petune_kernels.studies.study import Run, Study, parse
from petune_kernels.studies.tasks import Examples

from .test_study import CONTENT

LEVELS = {"FT": 0.8, "lora": 0.7, "bitfit": 0.6, "frozen": 0.5}


def record(run: Run, value: float | None, rows: int = 400, **outcome: Any) -> dict[str, Any]:
    trained = {"FT": 998, "frozen": 0}.get(run.method.title, 50)
    cost = 10 if run.patched else 20
    stage = {"trained": trained, "head": 2, "loaded_bytes": 2**20 * 10, "peak_bytes": 2**20 * 2 * cost}
    parts = {"test": value, **{name: None if value is None else value - 0.1 for name in run.task.out_of_domain}}
    task = SimpleNamespace(primary="accuracy", baseline=dict.fromkeys(parts, 0.5), fingerprint="")
    task.train, task.validation, task.dropped, task.tests = range(rows), (), 0, {}
    return describe(run, task) | {  # type: ignore[arg-type]
        "outcome": {
            "failed": value is None,
            "test": {part: {"accuracy": v} for part, v in parts.items()},
            "stages": [stage],
            "total": 1000,
            "history": [{"step": s, "accuracy": None if value is None else value - 1 / s} for s in (10, 20)],
            "seconds": float(cost),
        }
        | outcome,
    }


def records(study: Study, layers: int = 3) -> list[dict[str, Any]]:
    """Method levels as above, seed i of n spread evenly within 0.02, tasks after the first 0.1 lower."""
    found = []
    for run in study.runs(layers):
        i = max(run.wi, run.do) - study.seeds.first - (study.seeds.runs - 1) / 2
        level = LEVELS.get(run.method.title, 0.65) - 0.1 * (run.task.title != study.tasks[0].title)
        found.append(record(run, level + 0.02 * i / study.seeds.runs))
    return found


def study(**changes: Any) -> Study:
    methods = [{"name": "full", "label": "FT"}, {"name": "lora"}, {"name": "bitfit"}, {"name": "frozen"}]
    return parse(CONTENT | {"methods": methods, "seeds": {"runs": 4}} | changes)


def shown(grid: layouts.Grid, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(grid)
    return console.export_text()


def test_methods_against_tasks_with_arrows_shares_and_averages() -> None:
    which = study()
    main = layouts.tables(which, records(which))[0]
    assert main.columns == ["method", "% trained", "movie", "amazon", "Avg."]
    assert main.rows[0] == ["FT", "100.00%", "80.0±0.6", "70.0±0.6", "75.0±0.6"]
    assert main.rows[1] == ["lora", "5.00%", "70.0±0.6↓", "60.0±0.6↓", "65.0±0.6"]
    assert main.strong[0, 2] == 1 and main.strong[1, 2] == 2 and (2, 2) not in main.strong
    assert "| **80.0±0.6** |" in main.markdown() and "one-tailed student t-test" in main.markdown()
    assert "70.0±0.6↓" in shown(main)


@pytest.mark.parametrize("width", (50, 80, 120))
def test_a_terminal_breaks_no_cell_and_repeats_the_labels_of_what_goes_below(width: int) -> None:
    which = study(patched=[True, False])
    cost = layouts.tables(which, records(which))[-1]
    text = shown(cost, width)
    parts = text.count("task")
    assert parts == {50: 4, 80: 2, 120: 1}[width] and text.count("movie") == text.count("amazon") == 4 * parts
    assert all(text.count(cell) >= 1 for row in cost.rows for cell in row) and "…" not in text
    assert text.count(cost.title) == 1 and text.count("Medians over the") == 1


def test_tables_are_the_same_whatever_order_the_runs_ended_in() -> None:
    which = study(
        methods=[{"name": "layernorm", "each_layer": True}, {"name": "full", "label": "FT"}, {"name": "lora"}]
    )
    found = records(which, layers=12)
    expected = layouts.tables(which, found)
    assert [row[0] for row in expected[0].rows] == ["FT", "lora"] and expected[1].columns[2] == "layernorm #2"
    assert layouts.tables(which, found[::-1]) == expected
    assert layouts.to_csv(which, found[::-1]) == layouts.to_csv(which, found)


def test_the_average_leaves_out_of_domain_tests_out() -> None:
    tasks = [{"name": "movie", "out_of_domain": ["amazon"]}, {"name": "tweets"}]
    which = study(kind="classification-head", tasks=tasks)
    main = layouts.tables(which, records(which))[0]
    assert main.columns[2:] == ["movie", "movie → amazon", "tweets", "Avg."]
    assert [cell[:4] for cell in main.rows[0][2:]] == ["80.0", "70.0", "70.0", "75.0"]


def test_bands_and_their_verdicts() -> None:
    which = study()
    found = records(which)
    for r in found:
        r["rows"]["train"] = 400 if r["task"] == "movie" else 20_000
    grids = {grid.title: grid for grid in layouts.tables(which, found)}
    assert [row[0] for row in grids["By training rows"].rows] == ["movie", "Avg. (low)", "amazon", "Avg. (high)"]
    assert grids["Against FT, by training rows"].rows == [["low", "↘", "↘", "↘"], ["high", "↘", "↘", "↘"]]


def test_failed_runs_are_counted_and_a_column_without_runs_is_a_dash() -> None:
    which = study()
    found = [r for r in records(which) if (r["method"], r["task"]) != ("lora", "amazon")]
    for r in found:
        if (r["method"], r["task"], r["wi"]) == ("bitfit", "movie", 0):
            r["outcome"]["failed"] = True
    grids = layouts.tables(which, found)
    assert grids[0].rows[1][3:] == ["-", "-"]
    spread = {(row[0], row[1]): row for row in grids[-1].rows}
    assert spread["movie", "bitfit"][2] == "3/4" and spread["movie", "bitfit"][-1] == "25%"
    assert spread["movie", "frozen"][-1] == "50%"  # two of four are below the constant answer


def test_the_protocol_table_names_the_leak_everywhere() -> None:
    which = study(kind="protocol")
    found = records(which)
    grid = layouts.tables(which, found)[0]
    assert grid.columns[1:5] == [
        f"{task} {half}, stop on loss" for task in ("movie", "amazon") for half in ("1-2", "2-2 (leaks)")
    ]
    rows = list(csv.DictReader(io.StringIO(layouts.to_csv(which, found))))
    assert {row["task"] for row in rows} >= {"movie 1-2", "movie 2-2 (leaks)"}


def test_layers_seeds_cost_and_out_of_domain() -> None:
    methods = [{"name": "full", "label": "FT"}, {"name": "layernorm", "each_layer": True}]
    task = [{"name": "movie", "out_of_domain": ["amazon"]}]
    which = study(
        kind="stability", methods=methods, tasks=task, patched=[True, False], seeds={"runs": 2, "vary": ["wi", "do"]}
    )
    grids = {grid.title: grid for grid in layouts.tables(which, records(which))}
    assert grids["One layer at a time"].columns == ["task", *(f"layernorm #{k}" for k in (1, 2, 3)), "FT"]
    assert [row[0] for row in grids["One layer at a time"].rows] == ["movie", "movie → amazon"]
    assert grids["movie: what the seeds vary"].columns == ["method", "WI", "DO"]
    cost = grids[f"{which.name}: stock and patched"]
    assert cost.rows[0] == [
        *("movie", "FT"),
        *("80.0±0.7", "80.0±0.7"),
        *("20.0", "10.0", "0.50"),
        *("30", "10", "0.33"),
        "0.50",
    ]
    assert not any("trained together" in note for note in cost.notes)
    packed = records(which)
    for r in packed:
        r["outcome"]["packed"] = 4 if r["patched"] else 1
    assert "Up to 4 runs were trained together" in layouts.tables(which, packed)[-1].notes[-1]


def test_stock_and_patched_have_arrows_of_their_own() -> None:
    which = study(patched=[True, False])
    found = records(which)
    for r in found:
        if not r["patched"] and r["method"] == "lora":
            r["outcome"]["test"]["test"]["accuracy"] += 0.1  # as good as the stock reference
    grid = layouts.tables(which, found)[-1]
    assert grid.rows[0][1:4] == ["FT", "80.0±0.6", "80.0±0.6"]
    assert grid.rows[1][1:4] == ["lora", "80.0±0.6", "70.0±0.6↓"]
    assert "each variant beside the same variant of FT" in grid.notes[0]


def test_a_mean_of_fewer_runs_says_so() -> None:
    which = study()
    found = [r for r in records(which) if (r["method"], r["task"], r["wi"]) != ("lora", "amazon", 0)]
    for r in found:
        r["outcome"]["failed"] = (r["method"], r["task"]) == ("bitfit", "movie") and r["wi"] < 2
    grids = {grid.title: grid for grid in layouts.tables(which, found)}
    for rows in ([row[2:] for row in grids[which.name].rows], list(zip(*grids["By training rows"].rows, strict=True))):
        assert any("70.0±0.6↓" in row for row in rows)
        assert any("60.5±0.4↓ (2/4)" in row for row in rows) and any("60.2±0.5↓ (3/4)" in row for row in rows)
    protocol = study(kind="protocol")
    halves = layouts.tables(protocol, records(protocol)[:-1])[0]
    assert halves.rows[-1][-1].endswith("(3/4)")
    for grid in (grids[which.name], grids["By training rows"], halves):
        assert "(n/4): of n runs only; the others diverged, or are not done." in grid.notes


def test_the_csv_has_the_arrows_of_the_tables_under_a_correction() -> None:
    which = study(correction="bonferroni", patched=[True, False], seeds={"runs": 4, "vary": ["global", "wi"]})
    found = records(which)
    cost = {tuple(row[:2]): row for row in layouts.tables(which, found)[-1].rows}
    rows = list(csv.DictReader(io.StringIO(layouts.to_csv(which, found))))
    for row in rows:
        if row["vary"] == "global":
            shown = cost[row["task"], row["method"]][3 if row["patched"] == "True" else 2]
            assert ("↓" in shown) == (row["arrow"] == "down")
    compared = [row for row in rows if row["arrow"]]
    assert {(row["metric"], row["test"], row["correction"]) for row in compared} == {
        ("accuracy", "student", "bonferroni")
    }
    lora = next(row for row in compared if row["method"] == "lora")
    method, reference = (
        next(c.summary for c in cells(which, found) if (c.method, c.column) == (name, lora["task"]))
        for name in ("lora", "FT")
    )
    alone = compare(method, reference)
    assert float(lora["t"]) == pytest.approx(alone.t)
    assert float(lora["p_down"]) == pytest.approx(12 * alone.p_down)  # two tails, three methods, two tasks: one table


def test_single_layers_are_a_family_of_their_own_under_a_correction() -> None:
    methods = [{"name": "full", "label": "FT"}, {"name": "lora"}, {"name": "layernorm", "each_layer": True}]
    counts = {}
    for correction in ("none", "bonferroni"):
        which = study(methods=methods, correction=correction, seeds={"runs": 4}, alpha=0.01)
        rows = csv.DictReader(io.StringIO(layouts.to_csv(which, records(which))))
        counts[correction] = {row["method"]: float(row["p_down"]) for row in rows if row["arrow"]}
    family = {name: p / counts["none"][name] for name, p in counts["bonferroni"].items()}
    assert family == pytest.approx({"lora": 4, "layernorm #1": 12, "layernorm #2": 12, "layernorm #3": 12})


def test_a_list_of_layers_is_one_method_and_single_layers_keep_their_scale(tmp_path: Path) -> None:
    upper = {"name": "layernorm", "label": "upper", "options": {"layers": [1, 2]}}
    each = {"name": "layernorm", "scale": "small", "each_layer": True}
    which = study(methods=[{"name": "full", "label": "FT"}, upper, each], seeds={"runs": 2, "vary": ["wi", "do"]})
    found = records(which)
    grids = {grid.title: grid for grid in layouts.tables(which, found)}
    assert [row[0] for row in grids[which.name].rows] == ["FT", "upper"]
    singles = [f"layernorm #{k} small" for k in (1, 2, 3)]
    assert grids["One layer at a time"].columns == ["task", *singles, "FT"]
    curve = pictures.layer_curve([c for c in cells(which, found) if c.layers_of and c.vary == "wi"], [])
    assert curve is not None
    assert [text.get_text() for text in curve.legends[0].get_texts()] == ["layernorm small"]
    assert "seeds.png" in [path.name for path in pictures.draw(which, found, tmp_path)]
    only = study(reference="", methods=[each], seeds={"runs": 2})
    assert [grid.title for grid in layouts.tables(only, records(only))] == [
        "One layer at a time",
        "Spread over the runs",
    ]


def test_partial_results_whose_tasks_share_no_seed_have_no_average() -> None:
    which = study(seeds={"runs": 2})
    found = [r for r in records(which) if (r["task"] == "movie") == (r["wi"] == 0)]
    bands = {grid.title: grid for grid in layouts.tables(which, found)}["By training rows"]
    assert bands.rows[-1] == ["Avg. (low)", "-", "-", "-", "-"]
    stock_only = [r | {"patched": False} for r in found]
    assert layouts.tables(study(seeds={"runs": 2}, patched=[True, False]), stock_only)[0].title == which.name


def test_ties_rank_equally() -> None:
    which = study()
    found = records(which)
    for r in found:
        if r["method"] == "bitfit" and r["task"] == "movie":
            r["outcome"]["test"]["test"]["accuracy"] += 0.1  # as lora
    assert {place: rank for place, rank in layouts.tables(which, found)[0].strong.items() if place[1] == 2} == {
        (0, 2): 1,
        (1, 2): 2,
        (2, 2): 2,
    }


def test_panels_of_one_task_have_the_same_axes() -> None:
    which = study(kind="protocol", seeds={"runs": 5})
    found = records(which)
    for r in found:
        if r["leaky"]:
            r["outcome"]["test"]["test"]["accuracy"] += 0.1
    grouped = cells(which, found)
    for figure, axis in ((pictures.seed_points(grouped), "y"), (pictures.densities(grouped), "x")):
        assert figure is not None
        limits = {panel.get_title(): getattr(panel, f"get_{axis}lim")() for panel in figure.axes}
        assert limits["movie 1-2"] == limits["movie 2-2 (leaks)"] != limits["amazon 1-2"]


def test_no_records_give_no_tables() -> None:
    assert layouts.tables(study(), []) == [] and pictures.draw(study(), [], Path("/nowhere")) == []


@pytest.mark.filterwarnings("error")
def test_pictures_are_drawn_for_what_the_records_hold(tmp_path: Path) -> None:
    methods = [{"name": "full", "label": "FT"}, *({"name": "lora", "scale": s} for s in ("small", "large"))]
    which = study(methods=[*methods, {"name": "layernorm", "each_layer": True}], seeds={"runs": 5})
    found = records(which)
    for r in found:
        if r["scale"] == "small":
            r["outcome"]["test"]["test"]["accuracy"] = 0.5  # no variance: no density
    few = pictures.draw(which, [r for r in found if r["wi"] < which.seeds.first + 4], tmp_path)
    assert [path.name for path in few] == ["seeds.png", "best.png", "layers.png"]
    drawn = pictures.draw(which, found, tmp_path)
    assert [path.name for path in drawn] == ["seeds.png", "best.png", "densities.png", "layers.png"]
    for path in drawn:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 200 and np.ptp(image) > 0.5


@pytest.mark.parametrize("name", ["lora", "prefix", "adapter", "random"])
def test_the_change_of_weights_of_peft_adapter_and_sampled_models(tiny_model: Path, name: str) -> None:
    """A LoRA model's change is that of its merged weights; what no weight holds changes none."""
    from transformers import AutoModelForSequenceClassification

    from petune_kernels.studies.methods import Setting, method

    def load() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(tiny_model).bfloat16()

    head = ("classifier.weight", "classifier.bias")
    options = {"reduction": 4} if name == "adapter" else {"budget": 90} if name == "random" else {}
    model, _ = method(name, **options).stages()[0].prepare(Setting(load, 0, lambda _: [], head))
    state = load().state_dict()
    assert analysis.weight_change(model, state).keys() == {n for n, w in state.items() if w.is_floating_point()}
    assert not any(analysis.weight_change(model, state).values())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.25
    names = list(dict(model.named_parameters()))
    changes = analysis.weight_change(model, state)
    assert names == list(dict(model.named_parameters()))
    moved = {n for n, change in changes.items() if change > 0}
    inside = {n for n in moved if n not in head}
    assert moved >= set(head) and changes["classifier.bias"] == pytest.approx(0.25)
    if name == "lora":
        assert inside == {
            f"bert.encoder.layer.{i}.attention.self.{m}.weight" for i in (0, 1) for m in ("query", "value")
        }
        lora = dict(model.named_modules())["base_model.model.bert.encoder.layer.0.attention.self.query"]
        product = (lora.lora_B["default"].weight.float() @ lora.lora_A["default"].weight.float()) * 2
        assert changes["bert.encoder.layer.0.attention.self.query.weight"] == pytest.approx(
            product.abs().mean().item(), rel=1e-4
        )
    assert inside if name == "random" else (name == "lora") == bool(inside)


def test_samples_of_one_data_set_give_curves_of_training_iterations(tmp_path: Path) -> None:
    tasks = [{"name": "movie", "label": name, "train_rows": rows} for name, rows in (("1k", 1000), ("2k", 2000))]
    which = study(tasks=[*tasks, {"name": "amazon"}], methods=[{"name": "full", "label": "FT"}])
    found = records(which)
    for r in found:
        r["rows"]["train"] = {"1k": 1000, "2k": 2000}.get(r["task"], 50)
    curves = pictures.by_samples([c for c in cells(which, found) if c.summary.n])
    assert list(curves) == [("FT", "movie", "accuracy")]
    assert list(curves["FT", "movie", "accuracy"]) == ["1k (1,000 rows)", "2k (2,000 rows)"]
    assert curves["FT", "movie", "accuracy"]["1k (1,000 rows)"] == [(10, pytest.approx(70)), (20, pytest.approx(75))]
    assert "iterations.png" in [path.name for path in pictures.draw(which, found, tmp_path)]


def test_features_and_weights_of_a_model(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model).train()
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = Examples(["good film", "bad plot", "dull", "great"], None, [1, 0, 0, 1])
    first = analysis.features(model, tokenizer, rows, batch=3)
    assert first.shape == (4, 32) and model.training
    assert analysis.features(model, tokenizer, rows, batch=4) == pytest.approx(first, abs=1e-5)  # dropout off
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0] += 16.0
    changes = analysis.weight_change(model, before)
    moved = {name for name, change in changes.items() if change > 0}
    assert moved == {"bert.encoder.layer.0.output.dense.weight"} and changes[moved.pop()] == pytest.approx(
        0.5, rel=1e-3
    )
    blocks = analysis._by_block(changes, model)
    scalars = sum(p.numel() for n, p in model.named_parameters() if ".layer.0." in n)
    assert blocks == {"block 1": pytest.approx(16.0 * 64 / scalars, rel=1e-3), "block 2": 0}
    assert analysis.feature_change(first, analysis.features(model, tokenizer, rows)) > 0.01
    assert analysis.feature_change(first, first + 2) == pytest.approx(2 * 32**0.5)
    sizes = analysis.weight_magnitude(model)
    assert sizes["attention norm"] == sizes["ffn norm"] == 1 and sizes["attention norm bias"] == 0
    assert 0 < sizes["attention linear"] < 0.1
    with pytest.raises(InputError, match="share no weight"):
        analysis.weight_change(model, {})
    labels = [0, 1] * 20
    points = np.random.default_rng(0).normal(size=(40, 8)) + 5 * np.array(labels)[:, None]
    pictures.tsne({"train": (points, labels), "dev": (points, labels)}, ["no", "yes"]).savefig(tmp_path / "tsne.png")
    pictures.bars({"FT": changes | {"other": 1.0}}, "Change of weights", "mean |Δw|").savefig(tmp_path / "bars.png")
    curves = {("LoRA", "movie", "accuracy"): {"1k": [(10, 50.0), (20, 60.0)], "2k": [(10, 52.0), (20, 64.0)]}}
    pictures.iterations(curves).savefig(tmp_path / "iterations.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("tsne", "bars", "iterations"))
