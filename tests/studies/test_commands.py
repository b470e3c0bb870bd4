"""`petune data`, `petune study` and `petune tune` as commands; the training of a run is a stand-in here."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from petune_kernels.cli import app
from petune_kernels.studies import commands, result, runner, train
from petune_kernels.studies.errors import InputError


@dataclass
class Seeds:
    wi: int
    do: int


@dataclass
class Recipe:
    lr: float
    batch: int = 16
    epochs: int = 1
    stop_on: str = "loss"
    length: int = 16
    dtype: str = "float32"


@dataclass
class Outcome:
    test: dict[str, dict[str, float]]
    validation: dict[str, float] = field(default_factory=dict)
    total: int = 100
    seconds: float = 1.0
    stages: list[dict[str, Any]] = field(
        default_factory=lambda: [{"trained": 5, "head": 2, "loaded_bytes": 2**19, "peak_bytes": 2**20}]
    )
    failed: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    model: Any = None


class Model(torch.nn.Module):
    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")


def tune_once(
    folder: Path, method: Any, task: Any, recipe: Recipe, seeds: Seeds, *, patched: bool, **more: Any
) -> Outcome:
    assert (folder / "config.json").is_file() and len(task.train) and isinstance(recipe, Recipe)
    value = 0.6 + 0.01 * seeds.wi + 0.1 * (method == "full")
    return Outcome(
        {part: {task.primary: value} for part in task.tests}, model=Model() if more.get("keep_model") else None
    )


def method(name: str, **options: Any) -> str:
    if name not in ("full", "bitfit"):
        raise ValueError(f"method {name!r} is unknown")
    return name


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    single, recipe, methods = (types.ModuleType(name) for name in ("single", "recipe", "methods"))
    vars(single).update(tune_once=tune_once)
    vars(recipe).update(Seeds=Seeds, Recipe=Recipe)
    vars(methods).update(method=method)
    monkeypatch.setitem(sys.modules, "petune_kernels.studies.single", single)
    monkeypatch.setitem(sys.modules, "petune_kernels.studies.recipe", recipe)
    monkeypatch.setitem(sys.modules, "petune_kernels.studies.methods", methods)
    monkeypatch.setattr(runner, "_check_fits", lambda *args: None)  # the stand-ins have no stages
    monkeypatch.setenv("COLUMNS", "160")
    runner.load_task.cache_clear()


def study_file(folder: Path, model: Path, data: Path, more: str = "", methods: str = "full bitfit") -> Path:
    path = folder / "small.toml"
    tables = "".join(f'[[methods]]\nname = "{name}"\n' for name in methods.split())
    path.write_text(
        f'kind = "stability"\nname = "small"\nmodel = "{model}"\nreference = "full"\n{more}\n'
        f'[recipe]\nlr = 1e-3\n[seeds]\nruns = 3\n[[tasks]]\nname = "tiny"\nfile = "{data}"\n{tables}'
    )
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_study_from_the_file_to_tables_and_pictures(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    file, to = study_file(tmp_path, tiny_model, tiny_csv), tmp_path / "out"
    done = run("study", "--no-pack", file, "--out", to)
    assert done.exit_code == 0, done.output
    assert {p.name for p in to.iterdir()} >= {"runs.jsonl", "tables.md", "tables.csv", "seeds.png", "best.png"}
    assert "71.0±1.0" in done.output and "61.0±1.0↓" in (to / "tables.md").read_text()
    before = (to / "runs.jsonl").read_bytes()
    assert (
        run("study", "--no-pack", file, "--out", to).exit_code == 0
        and run("study", "--no-pack", file, "--out", to, "--show").exit_code == 0
    )
    assert (to / "runs.jsonl").read_bytes() == before and before.count(b"\n") == 1 + 6


def test_analyse_shows_what_tuning_did(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(folder: Path, method: Any, task: Any, *rest: Any, keep_model: bool = False, **more: Any) -> Outcome:
        model = train.load_model(folder, task.labels, 0, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight[0] += 32.0 * (method == "full")
        return Outcome({"test": {"accuracy": 0.5}}, model=model if keep_model else None)

    monkeypatch.setattr(sys.modules["petune_kernels.studies.single"], "tune_once", moved)
    to = tmp_path / "out"
    done = run("study", "--no-pack", study_file(tmp_path, tiny_model, tiny_csv), "--out", to, "--analyse")
    assert done.exit_code == 0, done.output
    stem = "analysis-tiny-train-split"
    assert {p.name for p in to.glob("analysis*.png")} == {
        f"{stem}-{name}.png" for name in ("tsne", "weights", "features", "magnitudes")
    }
    numbers = json.loads((to / f"{stem}.json").read_text())
    assert numbers["full"]["features"]["train"] > 0.01 and numbers["bitfit"]["features"]["train"] < 1e-5
    assert numbers["full"]["weights"]["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("more", "methods", "message"),
    [
        ("dropuot = true", "full", "unknown key 'dropuot'; did you mean 'dropout'"),
        ("", "full bitfti", "petune: error: method 'bitfti' is unknown"),
        ("[seeds]", "full", "cannot be read as TOML"),
    ],
)
def test_what_a_study_file_has_wrong_ends_it_before_the_first_run(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path, more: str, methods: str, message: str
) -> None:
    ran = run("study", study_file(tmp_path, tiny_model, tiny_csv, more, methods), "--out", tmp_path / "out")
    assert ran.exit_code == 2 and message in ran.stderr and not (tmp_path / "out").exists()


def test_a_misspelt_recipe_and_a_missing_result_are_named(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    file = study_file(tmp_path, tiny_model, tiny_csv)
    assert "holds no results" in run("study", "--no-pack", file, "--out", tmp_path / "none", "--show").stderr
    file.write_text(file.read_text().replace("lr = 1e-3", "lr = 1e-3\nepcohs = 3"))
    ran = run("study", "--no-pack", file, "--out", tmp_path / "out")
    assert ran.exit_code == 2 and "recipe of 'full': unknown key 'epcohs'; did you mean 'epochs'" in ran.stderr


def test_tune_writes_the_outcome_and_the_model_and_overwrites_nothing(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path
) -> None:
    arguments = ("tune", "full", "--task", "tiny", "--file", tiny_csv, "--model", tiny_model, "--out", tmp_path / "out")
    done = run(*arguments, "--wi", 4, "--recipe", "lr=1e-4")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert result["outcome"]["test"]["test"]["accuracy"] == pytest.approx(0.74) and result["wi"] == 4
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    again = run(*arguments)
    assert again.exit_code == 2 and "is not empty; nothing there is overwritten" in again.stderr


def test_a_file_of_scores_is_a_regression_where_the_user_says_so(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "scores.csv"
    data.write_text("text,label\n" + "".join(f"sentence {i},{i / 7:.3f}\n" for i in range(200)))
    arguments = (
        "tune",
        "full",
        "--file",
        data,
        "--model",
        tiny_model,
        "--recipe",
        "lr=1e-4",
        "--out",
        tmp_path / "out",
    )
    refused = run(*arguments)
    assert refused.exit_code == 2 and "--regression with `petune tune`" in " ".join(refused.stderr.split())
    done = run(*arguments, "--regression")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "outcome.json").read_text())["primary"] == "pearson"


def test_a_diverged_run_is_no_success(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = Outcome({}, failed="the loss became infinite at step 3", model=Model())
    monkeypatch.setattr(sys.modules["petune_kernels.studies.single"], "tune_once", lambda *a, **k: diverged)
    out = tmp_path / "out"
    ran = run("tune", "full", "--task", "tiny", "--file", tiny_csv, "--model", tiny_model, "--out", out,
              "--recipe", "lr=1e-4")  # fmt: skip
    assert ran.exit_code == 1 and "the loss became infinite at step 3; the model was not saved" in ran.stderr
    assert json.loads((out / "outcome.json").read_text())["outcome"]["failed"] and not (out / "model").exists()


def test_where_nothing_can_be_written_nothing_is_trained(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["petune_kernels.studies.single"], "tune_once", lambda *a, **k: pytest.fail("ran"))
    (tmp_path / "file").touch()
    ran = run("tune", "full", "--task", "tiny", "--file", tiny_csv, "--model", tiny_model, "--out",
              tmp_path / "file" / "out", "--recipe", "lr=1e-4")  # fmt: skip
    assert ran.exit_code == 2 and "cannot be written: Not a directory" in ran.stderr


def test_a_run_that_fails_leaves_no_folder(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["petune_kernels.studies.single"], "tune_once", interrupted)
    given = ("--task", "tiny", "--file", tiny_csv, "--model", tiny_model, "--recipe", "lr=1e-4")
    ran = run("tune", "full", *given, "--out", tmp_path / "a" / "b")
    assert ran.exit_code == 130 and not (tmp_path / "a").exists()
    assert run("report", "nothing", "--out", tmp_path / "a").exit_code == 2 and not (tmp_path / "a").exists()
    files = result.Files.new(tmp_path / "a" / "b", "x")
    assert not (tmp_path / "a").exists()
    files.write({"x": 1})
    assert json.loads(files.json.read_text()) == {"x": 1}


def test_an_unknown_task_is_answered_in_the_commands_own_words(tmp_path: Path) -> None:
    ran = run("tune", "full", "--task", "moive", "--out", tmp_path / "out")
    assert ran.exit_code == 2 and "or give --file; did you mean 'movie'?" in ran.stderr
    assert "dataset" not in ran.stderr and not (tmp_path / "out").exists()


def test_data_names_what_it_knows() -> None:
    ran = run("data", "moive")
    assert ran.exit_code == 2 and "'moive' is not in the package index; accepted: movie, amazon" in ran.stderr


def test_settings_are_read_as_toml() -> None:
    found = commands.parse_settings("--option", ["r=8", "layers=[3]", "stage1=lora", "a=true", "lr = 1e-3"])
    assert found == {"r": 8, "layers": [3], "stage1": "lora", "a": True, "lr": 1e-3}
    with pytest.raises(InputError, match="--option is 'r'; accepted is key=value"):
        commands.parse_settings("--option", ["r"])
    with pytest.raises(InputError, match="--device is 'tpu'"):
        commands.chosen_device("tpu")
