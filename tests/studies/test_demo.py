"""The main job from end to end on a tiny model and a small CSV file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from petune_kernels.cli import app
from petune_kernels.studies import demo, measure, train

FAST = ["--batch", "8", "--length", "16", "--steps", "20", "--seeds", "2", "--lr", "1e-2", "--device", "cpu"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures memory in this process: the numbers mean nothing, but no interpreter has to start."""
    monkeypatch.setattr(measure, "fresh_process", lambda function, *args: function(*args))


def invoke(model: Path, data: Path, to: Path, *options: str) -> Any:
    where = ["demo", "--quick", "--model", str(model), "--data", str(data), "--out", str(to)]
    return CliRunner().invoke(app, [*where, *FAST, *options])


def result_of(to: Path) -> dict[str, Any]:
    (path,) = to.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.usefixtures("in_process")
def test_it_measures_trains_and_writes(
    tiny_model: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/petune", "demo", "--data", "my sentences.csv"])
    to = tmp_path / "deep" / "out"
    ran = invoke(tiny_model, tiny_csv, to)
    assert ran.exit_code == 0, ran.output
    found = result_of(to)
    (figure,) = to.glob("*.png")
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 20_000
    for shown in ("saved bytes/token/layer", "step time, median", "test accuracy", str(figure), "post_norm_tail"):
        assert shown in ran.output.replace("\n", "") or shown in ran.output

    assert found["coverage"]["by_pattern"]["post_norm_tail"] == 4
    assert found["trainable"]["count"] == 2 * 4 * 32 and found["trainable"]["head_count"] == 2 * 32 + 2
    saved = found["saved_bytes_per_token_per_layer"]
    # float32; what a layer keeps, exactly
    H, intermediate = 32, 64
    per_token = 4 * (2 * H + intermediate + 3 * H + 2)  # x-hat twice; u; q, k and v; rstd twice
    assert per_token <= saved["patched"] < per_token + 1 < 0.7 * saved["stock"]  # and a few seeds
    assert found["without_dropout"]["largest_loss_difference"] < 1e-5
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    for run in found["runs"]:
        assert len(run["losses"]["stock"]) == len(run["losses"]["patched"]) == 20
        assert run["losses"]["stock"] != found["runs"][1 - run["seed"]]["losses"]["stock"]
    assert found["time"]["stock"]["n"] == 4 and found["time"]["ratio"]["median"] > 0
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["settings"]["model"] == str(tiny_model)
    assert found["command"] == "petune demo --data 'my sentences.csv'"  # can be pasted


@pytest.mark.usefixtures("in_process")
def test_without_dropout_the_runs_themselves_are_equal(tiny_model: Path, tiny_csv: Path, tmp_path: Path) -> None:
    ran = invoke(
        tiny_model,
        tiny_csv,
        tmp_path,
        "--no-dropout",
        "--regime",
        "full",
        "--lr",
        "3e-3",
        "--seed",
        "5",
        "--seeds",
        "1",
        "--steps",
        "60",
    )
    assert ran.exit_code == 0, ran.output
    found = result_of(tmp_path)
    assert "without_dropout" not in found and found["runs"][0]["seed"] == 5
    assert found["runs"][0]["largest_loss_difference"] < 1e-5
    assert found["trainable"]["regime"] == "full"
    assert found["runs"][0]["accuracy"]["stock"] > 0.8  # the labels show in the words


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("options", [["--regime", "frozen", "--epochs", "0.5"], ["--dtype", "bfloat16"]])
def test_other_regimes_and_dtypes(tiny_model: Path, tiny_csv: Path, tmp_path: Path, options: list[str]) -> None:
    chosen = [option for option in FAST if "--epochs" not in options or option not in ("--steps", "20")]
    where = ["demo", "--quick", "--model", str(tiny_model), "--data", str(tiny_csv), "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, [*where, *chosen, *options])
    assert ran.exit_code == 0, ran.output
    found = result_of(tmp_path)
    if "frozen" in options:
        assert found["saved_bytes_per_token_per_layer"]["stock"] == 0
        assert found["task"]["steps"] == round(0.5 * (found["task"]["train"] // 8))
    else:
        assert found["saved_bytes_per_token_per_layer"]["bytes_per_element"] == 2


@pytest.mark.usefixtures("in_process")
def test_nothing_is_measured_or_written_when_the_variants_differ(
    tiny_model: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = demo.prepare

    def spoil(model: torch.nn.Module, variant: str, *rest: Any) -> Any:
        prepared = prepare(model, variant, *rest)
        if variant == "patched":
            torch.nn.init.normal_(model.bert.encoder.layer[1].output.LayerNorm.bias)
        return prepared

    monkeypatch.setattr(demo, "prepare", spoil)
    ran = invoke(tiny_model, tiny_csv, tmp_path)
    assert ran.exit_code == 1
    assert "stock and patched model differ" in ran.stderr and "logits" in ran.stderr
    assert "step time" not in ran.output and list(tmp_path.glob("demo-*")) == []


@pytest.mark.usefixtures("in_process")
def test_ctrl_c_ends_it_in_one_line(
    tiny_model: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: train.Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "step", interrupt)
    ran = invoke(tiny_model, tiny_csv, tmp_path)
    assert ran.exit_code == 130 and "interrupted" in ran.stderr and "Traceback" not in ran.output
    assert list(tmp_path.glob("demo-*")) == []


def test_a_model_shorter_than_the_length_is_refused(tiny_model: Path, tiny_csv: Path, tmp_path: Path) -> None:
    ran = invoke(tiny_model, tiny_csv, tmp_path, "--length", "64")
    assert ran.exit_code == 2 and "--length is 64, but the model takes at most 32" in ran.stderr


def test_without_network_it_says_what_to_do_instead(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path)])
    assert ran.exit_code == 1 and "What to do" in ran.stderr and "PETUNE_CACHE" in ran.stderr


@pytest.mark.slow
def test_the_command_itself_with_fresh_processes(tiny_model: Path, tiny_csv: Path, tmp_path: Path) -> None:
    where = ["--model", str(tiny_model), "--data", str(tiny_csv), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "petune_kernels.cli", "demo", "--quick", *where, *FAST]
    ran = subprocess.run(command, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "" and "\x1b[3" not in ran.stdout
    memory = result_of(tmp_path)["memory"]
    assert memory["stock"]["before"] < memory["stock"]["peak"] < 4 * 2**30
