"""The benchmark of packed runs at its smallest: its gate, its rows and its chart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import harness, models, packed
from bench.__main__ import app
from petune_kernels.studies.errors import StudyError
from petune_kernels.studies.result import Files

QUIET = Console(quiet=True)
TINY = packed.Settings(
    regimes=("layernorm", "lora-qv p=0.1"), dtypes=("bfloat16",), replicas=(1, 3), batch=2, length=8, rounds=2, layers=1
)


def test_every_variant_has_the_time_of_a_step_of_one_run(tmp_path: Path) -> None:
    result = packed.run(TINY, Files.new(tmp_path, "packed"), QUIET)
    assert [row["case"]["regime"] for row in result["rows"]] == ["layernorm", "lora-qv p=0.1"] and result["complete"]
    for row in result["rows"]:
        assert list(row["seconds"]) == ["eager", "petune", "petune packed 1", "petune packed 3"]
        assert (
            row["gate"]["petune"]["error"] <= row["gate"]["petune"]["bound"] and row["gate"]["petune"]["compared"] == 9
        )
        assert 0 < row["speedup"]["petune packed 3"]["median"] and list(row["petune_over"]) == ["eager"]
    (json_file,) = tmp_path.glob("*.json")
    assert json.loads(json_file.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert json_file.with_suffix(".png").stat().st_size > 10_000 and json_file.with_suffix(".csv").is_file()


def test_replicas_that_are_not_their_solo_runs_get_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = packed.Packed.step

    def drifts(self: packed.Packed) -> None:
        step(self)
        with torch.no_grad():
            self.runs.parameters(1)[0].mul_(1.5)

    monkeypatch.setattr(packed.Packed, "step", drifts)
    with pytest.raises(StudyError, match="petune has no time in 2 cases"):
        packed.run(dataclasses.replace(TINY, dtypes=("float32",)), Files.new(tmp_path, "packed"), QUIET)
    (json_file,) = tmp_path.glob("*.json")
    rows = json.loads(json_file.read_text())["rows"]
    assert all("a replica's loss is" in row["refused"][harness.OURS] and not row["seconds"] for row in rows)


def test_a_variant_or_a_case_that_raises_costs_no_other_its_times(tmp_path: Path, monkeypatch) -> None:
    replicate = packed.pk.replicate

    def breaks(model, seeds, init):
        if len(seeds) == 4:
            raise MemoryError("too many")
        return replicate(model, seeds, init=init)

    monkeypatch.setattr(packed.pk, "replicate", breaks)
    check = packed.check
    monkeypatch.setattr(packed, "check", lambda case, *rest: 1 / 0 if "lora" in case.regime else check(case, *rest))
    with pytest.raises(StudyError, match=r"petune has no time in 1 cases:\n.*lora-qv.* ZeroDivisionError"):
        packed.run(dataclasses.replace(TINY, replicas=(1, 4)), Files.new(tmp_path, "packed"), QUIET)
    one, other = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert list(one["seconds"]) == ["eager", "petune", "petune packed 1"] and other["seconds"] == {}
    assert one["refused"] == {"petune packed 4": "MemoryError: too many"}


@pytest.mark.slow
def test_memory_of_every_variant_in_a_process_of_its_own() -> None:
    case = models.Case("minilm", "layernorm", "float32", 2, 32)
    one, many = (packed.step_memory(case, packed.packed_name(G), TINY) for G in (1, 8))
    assert many.rise > one.rise > 0


def test_the_command_names_what_does_not_fit() -> None:
    done = CliRunner().invoke(app, ["packed", "--regime", "full"])
    assert done.exit_code != 0 and "--regime is 'full'; accepted are layernorm" in str(done.exception)
