"""The benchmark of the memory dial: what it counts is what was accounted; its result becomes tables and a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import harness, memory, models, readme
from bench.__main__ import main
from petune_kernels.studies.errors import StudyError
from petune_kernels.studies.result import Files
from petune_kernels.studies.shapes import SHAPES

TINY = {"vocab_size": 20001, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> memory.Settings:
    monkeypatch.setitem(SHAPES, "tiny", ("bert", TINY))
    monkeypatch.setitem(memory.REGIMES, "tiny", ("layernorm", "lora-all p=0.1"))
    return memory.Settings(("tiny",), (), 2, 16, 2, ("tiny",), rounds=2)


@pytest.mark.parametrize(("regime", "published"), [("full", 34.1), ("bitfit", 22.1), ("lora-all p=0.1", 67.3)])
def test_eager_on_cuda_keeps_what_is_published(regime: str, published: float) -> None:
    case = models.Case("bert-base", regime, "bfloat16", 16, 128)
    assert memory.kept(case, harness.EAGER, "cuda") == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize("shape", memory.REGIMES)
def test_every_level_is_at_its_floor_on_cuda_and_keeps_of_a_bert_layer_what_was_asked(shape: str) -> None:
    asked = {"exact": 20.1, "coded": 16.1, "recompute": 6.1, "checkpoint": 2.1} if shape == "bert-base" else {}
    for regime in memory.REGIMES[shape]:
        case = models.Case(shape, regime, "bfloat16", 16, 128)
        for level, floor in memory.floor(case, "cuda").items():
            kept = memory.kept(case, level, "cuda")
            assert kept == pytest.approx(floor, abs=0.05), (regime, level)
            assert kept <= asked.get(level, math.inf) + 0.05, (regime, level)


def test_every_level_is_at_its_floor_on_the_cpu(tiny: memory.Settings) -> None:
    for regime in memory.REGIMES["tiny"]:
        case = models.Case("tiny", regime, "bfloat16", 2, 16)
        for level, floor in memory.floor(case, "cpu").items():
            assert memory.kept(case, level, "cpu") == pytest.approx(floor, abs=0.05), (regime, level)


def test_a_run_is_written_drawn_and_shown(tiny: memory.Settings, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory.measure, "fresh_process", lambda function, *args: function(*args))  # it knows no "tiny"
    monkeypatch.setattr(memory.measure, "give_blocks_back", lambda: None)  # it would slow this process for good
    console = Console(record=True, width=160)
    tiny = dataclasses.replace(tiny, batch=4, length=64)  # fewer tokens give a step no rise
    result = memory.run(tiny, Files.new(tmp_path, "memory"), console)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result)) and result["complete"]
    assert path.with_suffix(".png").stat().st_size > 10_000
    for row in result["rows"]:
        assert set(row["seconds"]) == set(row["memory"]) == {harness.EAGER, memory.HF, *memory.LEVELS}
        assert all(found["rise"] > 0 for found in row["memory"].values())
        (peer,) = row["against_peers"]
        assert peer["peer"] == memory.HF and row["held"][peer["level"]] <= 1.05 * row["held"][memory.HF]
    with path.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12 and float(lines[2]["kept_cpu"]) == result["rows"][0]["kept"]["cpu"]["exact"]
    shown = readme.render_memory(result)
    assert "| tiny | layernorm | lora-all p=0.1 |" in shown and "| recompute |" in shown
    assert "keeps at most 5 % more:" in shown
    (tmp_path / "bench" / "results").mkdir(parents=True)
    newest = tmp_path / "bench" / "results" / "2026-01-02-memory.json"
    newest.write_text(json.dumps(result))
    (newest.parent / "2026-01-03-memory.json").write_text(json.dumps(result | {"complete": False}))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.memory_result() == json.loads(json.dumps(result))
    assert "step time over eager's" in console.export_text()


def test_a_peer_is_met_by_the_fastest_level_that_keeps_at_most_5_percent_more() -> None:
    row = {
        "held": {memory.HF: 20, "exact": 180, "recompute": 22, "checkpoint": 21},
        "raw": {memory.HF: [3.0, 3.0], "exact": [1.0, 1.0], "recompute": [1.5, 1.5], "checkpoint": [2.0, 2.0]},
    }
    (found,) = memory.against_peers(row)
    assert found["level"] == "checkpoint" and found["median"] == 1.5


def test_a_level_that_a_model_has_nothing_for_is_a_dash(tiny: memory.Settings, monkeypatch) -> None:
    import petune_kernels as pk

    own = pk.patch

    def patch(model, memory="exact"):
        if memory == "coded":
            raise pk.PatchError("no activation")
        return own(model, memory=memory)

    monkeypatch.setattr(pk, "patch", patch)
    case = models.Case("tiny", "layernorm", "bfloat16", 2, 16)
    row = memory.measure_case(case, dataclasses.replace(tiny, timed=()))
    assert row["refused"] == {"coded": "PatchError: no activation"} and "coded" not in row["kept"]["cpu"]
    assert ["coded", "-"] in memory.grid([row], memory.kept_cell("cpu"))


def test_what_raises_or_is_wrong_is_refused_and_costs_no_other_its_numbers(tiny, tmp_path, monkeypatch) -> None:
    build = memory.build

    def breaks(case: models.Case, point: str, device: torch.device, layers: int) -> torch.nn.Module:
        if (case.regime, point) == ("layernorm", "coded") or (case.regime != "layernorm" and point == harness.EAGER):
            raise ZeroDivisionError("in the kernel")
        model = build(case, point, device, layers)
        if point == "exact":
            model.classifier.weight.data.mul_(1.5)
        return model

    def peak(function, case, point, *_):
        if point == "recompute":
            raise MemoryError("too much")
        return memory.measure.Peak(1, 2, "")

    monkeypatch.setattr(memory, "build", breaks)
    monkeypatch.setattr(memory, "kept", lambda case, point, kind: 1.0)
    monkeypatch.setattr(memory.measure, "fresh_process", peak)
    with pytest.raises(StudyError, match="petune has no time in 7 cases:\n.* coded: ZeroDivisionError: in the kernel"):
        memory.run(tiny, Files.new(tmp_path, "memory"), Console(quiet=True))
    (path,) = tmp_path.glob("*.json")
    one, other = json.loads(path.read_text())["rows"]
    assert list(one["seconds"]) == [harness.EAGER, memory.HF, "recompute", "checkpoint"]
    assert set(one["refused"]) == {"coded", "exact", "recompute"} and one["refused"]["exact"].startswith("wrong: ")
    assert list(one["memory"]) == [harness.EAGER, memory.HF, "checkpoint"]
    assert set(other["refused"]) == {harness.EAGER, *memory.LEVELS} and other["seconds"] == {}


def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, capsys) -> None:
    assert main("memory", "--shape", "bert", "--out", str(tmp_path)) == 2
    assert "--shape is 'bert'; accepted are bert-base, tinyllama" in capsys.readouterr().err
    assert main("memory", "--compile", "layernorm", "--out", str(tmp_path)) == 2
    assert "it needs --time SHAPE" in capsys.readouterr().err
    assert main("memory", "--time", "tinyllama", "--compile", "bitfit", "--out", str(tmp_path)) == 2
    assert "--compile is 'bitfit'; accepted are full, layernorm, lora" in capsys.readouterr().err
    assert main("memory", "--shape", "tinyllama", "--regime", "bitfit", "--out", str(tmp_path)) == 2
    assert "--regime is 'bitfit'" in capsys.readouterr().err


def test_every_budget_compiles_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of one class, each with its budget: dynamo must not run the first one's code for the second."""
    import torch._functorch.config as config
    from torch._inductor import compile_fx

    class Square(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    seen: list[float] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(config.activation_memory_budget)
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", note)
    torch.compiler.reset()
    x = torch.randn(2, 3, requires_grad=True)
    for share in (0.8, 0.2):
        model = Square()
        model.compile(backend=memory.Budget(share))
        model(x)
    torch.compiler.reset()
    assert seen == [0.8, 0.2]
