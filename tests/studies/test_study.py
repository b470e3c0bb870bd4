"""Study files: strict keys, the runs they make, and seeds that vary apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from petune_kernels.studies import runner
from petune_kernels.studies.errors import InputError
from petune_kernels.studies.study import parse, read

CONTENT: dict[str, Any] = {
    "kind": "stability",
    "name": "small",
    "model": "minilm",
    "reference": "FT",
    "recipe": {"lr": 1e-3, "epochs": 1},
    "seeds": {"runs": 3, "first": 10},
    "tasks": [{"name": "movie", "train_rows": 100}, {"name": "amazon"}],
    "methods": [{"name": "full", "label": "FT"}, {"name": "lora", "options": {"r": 8}, "recipe": {"lr": 1e-2}}],
}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    content = copy.deepcopy(CONTENT)
    table: Any = content
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = to
    return content


def test_runs_are_every_combination_seed_by_seed_with_ids_of_their_own() -> None:
    runs = parse(CONTENT).runs()
    assert len(runs) == 3 * 2 * 2 and len({run.id for run in runs}) == 12
    assert [run.wi for run in runs] == [10] * 4 + [11] * 4 + [12] * 4
    assert runs[0].id == "movie/train-split/FT/global/10-10/patched"
    both = parse(changed("patched", to=[True, False])).runs()
    assert [run.patched for run in both[:2]] == [True, False] and both[0].method == both[1].method


def test_wi_do_and_global_seeds_vary_apart() -> None:
    runs = parse(changed("seeds", to={"runs": 3, "first": 5, "vary": ["global", "wi", "do"]})).runs()
    seeds = {
        v: [(r.wi, r.do) for r in runs if r.vary == v and r.task.name == "movie" and r.method.label]
        for v in ("global", "wi", "do")
    }
    assert seeds == {
        "global": [(5, 5), (6, 6), (7, 7)],
        "wi": [(5, 5), (6, 5), (7, 5)],
        "do": [(5, 5), (5, 6), (5, 7)],
    }


def test_the_protocol_study_runs_both_splits_and_both_stopping_rules() -> None:
    runs = parse(changed("kind", to="protocol")).runs()
    kinds = {(run.task.protocol, run.stop_on) for run in runs}
    assert kinds == {(p, s) for p in ("dev1-dev2", "dev2-dev2") for s in ("loss", "metric")}
    assert len({run.id for run in runs}) == len(runs) == 3 * 2 * 2 * 2 * 2


def test_each_layer_makes_a_method_per_layer() -> None:
    study = parse(changed("methods", to=[{"name": "layernorm", "each_layer": True}, {"name": "full", "label": "FT"}]))
    assert [m.title for m in study.methods_of(3)] == ["layernorm #1", "layernorm #2", "layernorm #3", "FT"]
    assert [m.options for m in study.methods_of(3)][:2] == [{"layers": [0]}, {"layers": [1]}]
    with pytest.raises(InputError, match="number of the model's layers"):
        study.runs()


def test_no_two_runs_have_one_name() -> None:
    one, all_ = ({"name": "layernorm", "label": "LN #1"}, {"name": "layernorm", "label": "LN", "each_layer": True})
    study = parse(CONTENT | {"methods": [all_, one], "reference": ""})
    with pytest.raises(InputError, match="two runs would be called '.*/LN #1/.*'; a `label` keeps two apart"):
        study.runs(3)


def test_a_method_can_take_away_what_the_study_or_the_default_sets() -> None:
    methods = [
        {"name": "full", "label": "FT", "recipe": {"steps": 7, "patience": "none", "clip": "none"}},
        {"name": "random", "options": {"budget": "none", "layers": "none"}, "recipe": {"lr": 1e-2}},
    ]
    study = parse(CONTENT | {"methods": methods, "recipe": {"lr": 1e-3, "epochs": 2, "clip": 1.0}})
    first, second = study.runs()[:2]
    found = runner.recipe_of(study, first)
    assert (found.steps, found.epochs, found.patience, found.clip) == (7, None, None, None)
    found = runner.recipe_of(study, second)
    assert (found.steps, found.epochs, found.patience, found.clip) == (None, 2, 10, 1.0)
    assert runner.method_of(second).options["budget"] is runner.method_of(second).options["layers"] is None
    wrong = parse(CONTENT | {"recipe": {"lr": "none", "epochs": 1}})
    with pytest.raises(InputError, match="lr is None; accepted is a number"):
        runner.recipe_of(wrong, wrong.runs()[0])


def test_the_hash_is_of_what_is_said_not_of_how(tmp_path: Path) -> None:
    text = 'kind="stability"\nname="n"\nmodel="m"\nrecipe={lr=1e-3}\ntasks=[{name="movie"}]\nmethods=[{name="full"}]\n'
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "b.toml").write_text("# a comment\n" + text.replace("=", " = ").replace("{name", "{ name"))
    (tmp_path / "c.toml").write_text(text.replace("1e-3", "2e-3"))
    defaults = "{lr=1e-3, batch=16, betas=[0.9, 0.999], clip='none'}"
    (tmp_path / "d.toml").write_text(text.replace("{lr=1e-3}", defaults))
    (tmp_path / "e.toml").write_text(text.replace("1e-3", "2e-3").replace('"full"', '"full", recipe={lr=1e-3}'))
    a, b, c, d, e = (read(tmp_path / f"{name}.toml").hash for name in "abcde")
    assert a == b == d == e != c


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed("sedes", to={}), "study: unknown key 'sedes'; did you mean 'seeds'"),
        (
            changed("tasks", 0, "train_row", to=5),
            r"study.tasks\[0\]: unknown key 'train_row'; did you mean 'train_rows'",
        ),
        (changed("methods", 1, "optoins", to={}), r"study.methods\[1\]: unknown key 'optoins'; did you mean 'options'"),
        (changed("seeds", "run", to=3), "study.seeds: unknown key 'run'; did you mean 'runs'"),
        (changed("kind", to="stabilty"), "kind is 'stabilty'; accepted: transferability, stability"),
        (changed("tasks", 0, "name", to="moive"), "unknown task 'moive'"),
        (changed("tasks", 0, "train_rows", to="many"), "train_rows is 'many'; accepted is int"),
        (changed("tasks", 0, "train_rows", to=True), "train_rows is True; accepted is int"),
        (changed("tasks", 1, "name", to="movie"), "'movie' occurs more than once; a `label`"),
        (changed("tasks", to=[]), "tasks is empty"),
        (changed("tasks", to="movie"), "study.tasks is 'movie'; accepted is tuple"),
        (changed("reference", to="BERT"), "reference is 'BERT'; the methods are FT, lora"),
        (changed("seeds", to={"runs": 0}), "runs is 0"),
        (changed("seeds", to={"vary": ["both"]}), "vary has 'both'; accepted: global, wi, do"),
        (changed("alpha", to=2), "alpha is 2"),
        ({k: v for k, v in CONTENT.items() if k != "model"}, "the key 'model' is missing"),
    ],
)
def test_bad_content_is_named_with_the_nearest_that_is_accepted(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(content)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("kind = ")
    with pytest.raises(InputError, match="x.toml cannot be read as TOML"):
        read(tmp_path / "x.toml")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "bench" / "studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_studies_of_the_project_can_be_read(path: Path) -> None:
    assert read(path).runs(layers=6)
