"""The `petune` command: help, tables, and errors in one line with the right exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from petune_kernels import backends, cli
from petune_kernels.cli import app

COUNTS = {  # the bert-base shape with two labels, as published
    "full": "109,483,778",
    "ffn": "56,669,184",
    "attention": "28,348,416",
    "layernorm": "36,864",
    "layernorm-attention": "18,432",
    "layernorm-ffn": "18,432",
    "bitfit": "101,376",
    "random": "36,864",
    "frozen": "1,538",
}


@pytest.fixture(autouse=True)
def wide_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_without_arguments_it_lists_the_commands_that_exist() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert set(re.findall(r"^│ (\w+)", shown.output, re.M)) == {
        "demo",
        "data",
        "tune",
        "study",
        "report",
        "regimes",
        "doctor",
        "bench",
    }


@pytest.mark.parametrize("command", ["demo", "data", "tune", "study", "report", "regimes", "doctor", "bench"])
def test_every_command_has_help(command: str) -> None:
    shown = run(command, "--help")
    assert shown.exit_code == 0 and "Usage" in shown.output and len(shown.output.splitlines()) > 5


def test_regimes_of_bert_base_are_the_published_counts() -> None:
    shown = run("regimes")
    assert shown.exit_code == 0 and "109,483,778 parameters" in shown.output
    for regime, count in COUNTS.items():
        assert re.search(rf"│ {regime} +│.*│ +{count} │", shown.output), regime
    assert "38,400" in run("regimes", "bert-base", "--embedding-norm").output


@pytest.mark.parametrize(
    ("model", "total"), [("minilm", "22,713,986"), ("roberta-base", "124,647,170"), ("electra", "ElectraFor")]
)
def test_regimes_of_other_shapes(model: str, total: str) -> None:
    shown = run("regimes", model)
    assert shown.exit_code == 0 and total in shown.output


def test_regimes_of_a_folder(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64).save_pretrained(
        tmp_path
    )
    shown = run("regimes", str(tmp_path), "--labels", "5")
    assert shown.exit_code == 0, shown.output
    assert re.search(r"layernorm +│.*│ +384 │", shown.output) and re.search(r"frozen +│.*│ +165 │", shown.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["regimes", "bert-bse"], "did you mean bert-base"),
        (["regimes", "someone/some-model"], "models are not fetched"),
        (["regimes", "/tmp"], "/tmp holds no transformers model"),
        (["regimes", "--labels", "0"], "labels"),
        (["demo", "--regime", "layernrom"], "the regimes are full, ffn"),
        (["demo", "--steps", "5", "--epochs", "1"], "--steps and --epochs"),
        (["demo", "--epochs", "-1"], "accepted is a number above 0"),
        (["demo", "--lr", "nan"], "accepted is a number above 0"),
        (["demo", "--dtype", "float16"], "float16"),
        (["demo", "--data", "/nowhere.csv"], "/nowhere.csv"),
        (["demo", "--model", "/nowhere"], "/nowhere"),
        (["demo", "--out", "/dev/null/out"], "--out /dev/null/out cannot be written"),
        pytest.param(
            ["demo", "--out", "/proc"],
            "--out /proc cannot be written",
            marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to"),
        ),
        (["demo", "--batch", "0"], "batch"),
        (["train"], "train"),
    ],
)
def test_bad_usage_is_one_clear_message_and_exit_2(arguments: list[str], message: str) -> None:
    ran = run(*arguments)
    assert ran.exit_code == 2, ran.output
    assert message in ran.stderr and "Traceback" not in ran.stderr


def test_doctor_names_versions_build_and_backends() -> None:
    shown = run("doctor")
    assert shown.exit_code == 0, shown.output
    for needed in ("python", "torch", "triton", "transformers", "peft", "GPU", "C++ compiler", "nvcc"):
        assert needed in shown.output
    for choice in backends.describe():
        assert re.search(rf"{choice.op} +│ {choice.device} +│ {choice.backend}", shown.output)


def test_doctor_says_what_to_do_about_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = backends.Choice("residual_norm", "cpu", "reference", "no kernel", "install a C++ compiler")
    monkeypatch.setattr(backends, "describe", lambda: [missing, missing])
    monkeypatch.setattr(backends, "build_info", lambda: None)
    shown = run("doctor")
    assert shown.exit_code == 0 and shown.output.count("install a C++ compiler") == 1
    assert "Nothing is missing" not in shown.output and "compiled extension" not in shown.output


def test_the_command_starts_without_transformers_and_honours_no_color() -> None:
    script = "import sys, petune_kernels.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    environment = os.environ | {"NO_COLOR": "1", "FORCE_COLOR": "", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "petune_kernels.cli", "regimes", "bert-bse"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.startswith("petune: error:") and "\x1b" not in ran.stderr


def test_a_command_hides_transformers_deprecations_from_those_who_cannot_mend_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warn = (
        "exec('import warnings; warnings.warn(\"`is_gradient_checkpointing` is deprecated\", FutureWarning)', "
        "{'__name__': 'transformers.modeling_utils'})"
    )
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with cli._without_warnings():
            exec(warn)
            done = subprocess.run([sys.executable, "-c", warn], capture_output=True, text=True)
        assert not caught and done.returncode == 0 and not done.stderr
        exec(warn)
        assert len(caught) == 1 and "PYTHONWARNINGS" not in os.environ


def test_a_wrong_benchmark_is_answered_as_it_was_asked() -> None:
    done = subprocess.run([sys.executable, "-m", "petune_kernels.cli", "bench", "foo"], capture_output=True, text=True)
    assert done.returncode == 2 and "Usage: petune bench [OPTIONS] COMMAND" in done.stderr
