"""Turns: the backend in force in backward, too, graphs over a recorder of CPU ops, and providers that break."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from bench import harness, op_runs, ops
from bench.__main__ import app
from bench.harness import EAGER, MATMULS, OURS
from petune_kernels import backends, cuda_graph, reference
from petune_kernels.studies.errors import StudyError
from petune_kernels.studies.result import Files
from tests.recorder import Recorder

CPU, QUIET = torch.device("cpu"), Console(quiet=True)
TINY = op_runs.Settings(("tiny",), ("float32",), (), 2, 8, "cpu", rounds=2, rotate=1)
CEILING = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e10}
LETTERS = ops.sizes(2, 8, 64, torch.float32)
NORM, LORA, DROPOUT = (
    next(case for case in ops.CASES if case.op == op) for op in ("residual_norm", "lora_linear", "dropout")
)


def sets(case: ops.OpCase, count: int = 2) -> list[ops.Tensors]:
    return [ops.inputs(case, LETTERS, torch.float32, CPU, seed) for seed in range(count)]


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that take the forced backend "triton", where the reference stands in for its launchers."""
    pytest.importorskip("triton")
    seen: list[str] = []

    def launcher(op: str) -> Any:
        seen.append(op)
        return getattr(reference, op)

    monkeypatch.setattr(backends, "_triton_launcher", launcher)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # or Triton would serve no CPU
    return seen


@pytest.mark.parametrize("case", [NORM, LORA], ids=lambda case: case.op)
def test_the_backend_is_in_force_in_backward_too(case: ops.OpCase, picked: list[str], monkeypatch) -> None:
    both = [case.op, f"{case.op}_backward"]
    turn = op_runs.Turn(op_runs.TRITON, case.ours, 0.0, sets(case, 1), CPU)
    picked.clear()
    turn.run()
    assert picked == both
    picked.clear()
    calls = {EAGER: lambda t, p, seed: case.eagerly(t, p), op_runs.TRITON: case.ours}
    row = harness.new_row({})
    op_runs.check_op(case, calls, LETTERS, torch.float32, CPU, row)
    assert picked == both and not row["refused"]
    monkeypatch.setattr(Recorder, "warm", lambda self, function, times: None)  # what is left is the capture's
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    for record in (turn.recorded, turn.recorded_backward):
        picked.clear()
        record()
        assert picked == both
    picked.clear()
    op_runs.Turn(OURS, case.ours, 0.0, sets(case), CPU).run()
    assert picked == []


@pytest.mark.parametrize("case", [NORM, LORA, ops.CASES[-1]], ids=lambda case: case.op)
def test_backward_alone_reads_what_forward_left(case: ops.OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Counting(Recorder):
        def record(self, function: Any) -> Any:
            replay = super().record(function)
            return lambda: (ran.append(function.__name__), replay())

    monkeypatch.setattr(cuda_graph, "Recorder", Counting)
    turn = op_runs.Turn(OURS, case.ours, 0.0, sets(case), CPU)
    replay = turn.recorded_backward()
    assert ran == ["forward"]  # a capture computes nothing
    replay()
    assert len(turn._gradients) == 2 and not torch.equal(turn._work[0][2][0], turn._work[1][2][0])  # a dy for each
    for found, (tensors, leaves, dys) in zip(turn._gradients, turn._work, strict=True):
        want = torch.autograd.grad(case.expression(tensors, lambda x: x), leaves, dys)
        for one, other in zip(found, want, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
            one.zero_()
    replay()
    assert all(one.any() for found in turn._gradients for one in found)


def test_a_row_of_a_gpu_has_graphs_and_backward_alone(monkeypatch: pytest.MonkeyPatch, text) -> None:
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    row = op_runs.measure_op(LORA, 64, "float32", dataclasses.replace(TINY, rotate=100_000), CEILING)
    assert row["rotated_bytes"] > 100_000 and row["refused"] == {"unsloth": "needs a GPU"}
    for part in (row, row["graph"], row["backward"]):
        assert set(part["seconds"]) == {EAGER, OURS, MATMULS} and set(part["over_matmuls"]) == {EAGER, OURS}
        assert set(part["petune_over"]) == {EAGER} and part["best_peer"] == EAGER
        assert set(part["share_of_floor"]) == {EAGER, OURS}
        share = part["floor_seconds"] / part["seconds"][OURS]["median"]
        assert part["share_of_floor"][OURS] == pytest.approx(share)  # of the very time it stands beside
    assert row["backward"]["formula"]["bytes"] == LORA.back_bytes
    (line,) = (line for line in harness.lines(row) if line["provider"] == OURS)
    assert line["share"] == row["share_of_floor"][OURS] and line["graph_rate"].endswith("/s")
    assert line["backward_median"] == row["backward"]["seconds"][OURS]["median"]
    shown = text([row])
    assert "Only backward alone has a cold floor" in shown and "adds a bias" not in shown
    assert "CUDA graph " in shown and "backward alone " in shown and " x the frozen matmuls alone" in shown
    norm = op_runs.measure_op(NORM, 64, "float32", TINY, CEILING)
    assert set(norm["backward"]["share_of_copy"]) == {EAGER, OURS} and "over_matmuls" not in norm
    without = op_runs.measure_op(NORM, 64, "float32", dataclasses.replace(TINY, graphs=False), CEILING)
    assert "graph" not in without and "backward" not in without


def test_what_cannot_be_captured_is_named_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch, text) -> None:
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)

    def timid(t: ops.Tensors, p: float, seed: Tensor | None) -> Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise NotImplementedError("not in a graph")
        return NORM.ours(t, p, seed)

    calls = {EAGER: timid, OURS: NORM.ours} | dict.fromkeys(op_runs.OWN_GRAPHS, NORM.ours)
    turns = {name: op_runs.Turn(name, call, 0.0, sets(NORM), CPU) for name, call in calls.items()}
    found = op_runs.graph_times(turns, op_runs.Turn.recorded, TINY, calls=2)
    assert set(found["seconds"]) == {OURS} and found["speedup"] == {}
    assert found["refused"][EAGER] == "NotImplementedError: not in a graph"
    for name in ("torch.compile, reduce-overhead", "torch.compile, max-autotune"):
        assert "of its own" in found["refused"][name]
    row = harness.new_row({"n": 1}) | harness.turns({n: t.run for n, t in turns.items()}, 2, CPU) | {"graph": found}
    assert "no CUDA graph: NotImplementedError: not in a graph" in text([row])


@pytest.mark.parametrize(("width", "heads"), [("minilm", (12, 32)), ("bert-large", (16, 64)), ("llama", (32, 128))])
def test_attention_has_the_heads_of_its_model_and_moves_no_output_twice(width: str, heads: tuple[int, int]) -> None:
    case = next(case for case in ops.CASES if case.op == "attention")
    letters = ops.sizes(2, 8, op_runs.WIDTHS[width], torch.float32)
    assert (letters["h"], letters["D"]) == heads and set(op_runs.WIDTHS.values()) == set(ops.HEADS)
    one = 16 * op_runs.WIDTHS[width] * 4  # q, k, v and o; then those without o, d_o, and three gradients
    assert ops.evaluate(case.bytes, letters) == 11 * one and ops.evaluate(case.back_bytes, letters) == 7 * one
    row = op_runs.measure_op(case, 64, "float32", TINY, CEILING)
    assert row["case"]["use"] == "p=0.0 2 x 1 x 8 x 64"


@pytest.mark.parametrize("at", range(2, 6))
def test_a_provider_that_breaks_costs_no_other_its_times(at: int) -> None:
    """At its second call, the first after the gate's, and later; once turns are timed, nobody's are whole."""
    count = 0

    def breaks(t: ops.Tensors, p: float, seed: Tensor | None) -> Tensor:
        nonlocal count
        count += 1
        if count == at:
            raise LookupError("gone")
        return LORA.ours(t, p, seed)

    row = op_runs.measure_op(dataclasses.replace(LORA, ours=breaks), 64, "float32", TINY, CEILING)
    assert row["refused"][OURS] == "LookupError: gone"
    assert set(row["seconds"]) == ({EAGER, MATMULS} if at < 5 else set())


def test_without_eager_a_case_has_no_times_and_the_next_one_has(tmp_path: Path, monkeypatch, text) -> None:
    def broken(t: ops.Tensors, p: float) -> Tensor:
        raise ZeroDivisionError("eager")

    monkeypatch.setattr(ops, "CASES", (dataclasses.replace(NORM, eager=broken), DROPOUT))
    monkeypatch.setattr(op_runs, "ceilings", lambda device, dtype: CEILING)
    with pytest.raises(StudyError, match="petune has no time in 1 cases:\nresidual_norm .*ZeroDivisionError: eager"):
        op_runs.run_ops(TINY, Files.new(tmp_path, "ops"), QUIET)
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    first, second = found["rows"]
    assert first["seconds"] == {} and first["refused"][EAGER] == "ZeroDivisionError: eager" and found["complete"]
    assert set(second["seconds"]) == {EAGER, OURS}
    assert path.with_suffix(".csv").read_text().count("\n") == 3 and path.with_suffix(".png").stat().st_size > 10_000
    assert "ZeroDivisionError" in text(found["rows"])
    assert (
        found["backends"]["ops"]["residual_norm"] in ("cpu", "reference") and "cuda" in found["backends"]["libraries"]
    )


def test_a_busy_moment_lowers_no_ceiling(tmp_path: Path, monkeypatch) -> None:
    rates = iter([1.0, 3.0, 2.0, 2.0])  # before and after each of two cases
    monkeypatch.setattr(ops, "CASES", (NORM, DROPOUT))
    monkeypatch.setattr(op_runs, "ceilings", lambda *_: {name: next(rates) * 1e9 for name in list(CEILING)[:1]} | {
        "matmul_flops_per_second": 1e10})  # fmt: skip
    found = op_runs.run_ops(TINY, Files.new(tmp_path, "ops"), QUIET)
    assert found["ceilings"]["float32"]["copy_bytes_per_second"] == 3e9
    for row in found["rows"]:
        assert row["floor_seconds"] == pytest.approx(row["amount"]["bytes"] / 3e9)
    assert json.loads(next(tmp_path.glob("*.json")).read_text()) == json.loads(json.dumps(found))


def test_ctrl_c_stops_a_case() -> None:
    def stopped(t: ops.Tensors, p: float, seed: Tensor | None) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        op_runs.measure_op(dataclasses.replace(NORM, ours=stopped), 64, "float32", TINY, CEILING)


def test_one_that_writes_over_its_inputs_spoils_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger's gated silu does in backward."""

    def writes(t: ops.Tensors, p: float, seed: Tensor | None) -> Tensor:
        made = NORM.ours(t, p, seed)
        with torch.no_grad():
            t["gamma"].zero_()
        return made

    monkeypatch.setattr(op_runs, "providers", lambda *_: {EAGER: lambda t, p, seed: NORM.eagerly(t, p), "first": writes,
                                                          "second": NORM.ours})  # fmt: skip
    row = op_runs.measure_op(NORM, 64, "float32", TINY, CEILING)
    assert row["refused"].keys() <= {"first"} and "second" in row["seconds"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], (256, 15)), (["--device", "cuda"], (32, 7)), (["--device", "cuda", "--rounds", "9"], (32, 9))],
)
def test_overhead_takes_less_on_a_gpu(arguments: list[str], expected: tuple[int, int], tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(op_runs, "run_ops", lambda settings, *_: asked.append(settings))
    arguments = arguments or ["--device", "cpu"]
    done = CliRunner().invoke(app, ["overhead", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.exception
    (settings,) = asked
    assert (settings.calls, settings.rounds) == expected and not settings.graphs


@pytest.mark.parametrize("command", ["ops", "layers"])
def test_compile_modes_are_the_default_and_those_asked_for(command: str, tmp_path, monkeypatch) -> None:
    from bench import layers

    asked = []
    monkeypatch.setattr(op_runs, "run_ops", lambda settings, *_: asked.append(settings))
    monkeypatch.setattr(layers, "run", lambda settings, *_: asked.append(settings))
    more = ["--compile-mode", "reduce-overhead", "--compile-mode", "default"]
    for arguments in ([], ["--compile"], more, ["--compile", *more]):
        CliRunner().invoke(app, [command, *arguments, "--device", "cpu", "--out", str(tmp_path)])
    modes = [settings.compile for settings in asked]
    assert modes == [(), ("default",), ("reduce-overhead", "default"), ("default", "reduce-overhead")]
