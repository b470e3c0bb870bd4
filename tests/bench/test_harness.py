"""Rows: what is refused, what is no peer, what JSON cannot hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import harness
from bench.harness import EAGER, MATMULS, OURS
from petune_kernels.studies.result import Files

CPU = torch.device("cpu")


def test_the_floor_is_no_peer() -> None:
    run = {name: lambda: None for name in (EAGER, OURS, MATMULS, "peer")}
    found = harness.turns(run, 3, CPU)
    assert set(found["petune_over"]) == {EAGER, "peer"} and found["best_peer"] in (EAGER, "peer")
    assert set(found["over_matmuls"]) == {EAGER, OURS, "peer"}


def test_turns_are_warm_and_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def interleave(run: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
        asked.append(rounds)
        return {EAGER: [8.0] * rounds, OURS: [2.0] * rounds, "peer": [9.0] * rounds}

    monkeypatch.setattr(harness.measure, "interleave", interleave)
    calls = {EAGER: 4, OURS: 2, "peer": 3}
    found = harness.turns(dict.fromkeys(calls, print), 3, CPU, warm=5, calls=calls)
    assert asked == [5, 3] and found["best_peer"] == EAGER
    assert {name: spread["median"] for name, spread in found["seconds"].items()} == {EAGER: 2, OURS: 1, "peer": 3}
    assert {name: ratio["median"] for name, ratio in found["petune_over"].items()} == {EAGER: 2, "peer": 3}
    assert found["speedup"][OURS]["median"] == 2


@pytest.mark.parametrize(
    ("place", "left", "refused"),
    [(EAGER, set(), {EAGER, OURS}), (OURS, set(), {OURS}), ("peer", {EAGER, OURS}, {"peer"})],
)
def test_a_number_that_is_not_finite_is_a_refusal(place: str, left: set, refused: set, tmp_path: Path, text) -> None:
    row = harness.new_row({"n": 1}) | harness.turns({name: lambda: None for name in (EAGER, OURS, "peer")}, 2, CPU)
    row["losses"] = {EAGER: 1.0, OURS: 1.0, "peer": 1.0} | {place: float("nan")}
    row["more"] = [1.0, (2.0, {"peer": 3.0})]
    result = harness.Result(Files.new(tmp_path, "x"), "x", {}, CPU)
    result.add(row)
    (found,) = json.loads(result.files.json.read_text())["rows"]
    assert set(found["seconds"]) == left and set(found["refused"]) == refused
    assert found["refused"][place] == f"not finite: losses, {place}" and found["losses"][place] == "nan"
    assert set(found["petune_over"]) == left - {OURS} and found["best_peer"] in (None, *left)
    assert found["more"] == [1.0, [2.0, {"peer": 3.0}]] and "not finite" in text([found])


def test_the_reason_of_a_broken_capture_names_what_broke_it() -> None:
    try:
        try:
            raise ValueError("a copy to the host")
        finally:
            raise RuntimeError("CUDA error: a previous error during capture\nmore")
    except RuntimeError as error:
        found = harness.reason(error)
    assert found == "RuntimeError: CUDA error: a previous error during capture (after ValueError: a copy to the host)"


def test_a_row_in_which_eager_adds_a_bias_says_so(text) -> None:
    rows = [harness.new_row({"op": "a", "use": use}) for use in ("bias gradient", "p=0.1")]
    assert harness.notes({"rows": rows}) == []
    assert "Eager adds a bias in a pass of its own" in text([*rows, harness.new_row({"op": "a", "use": "gelu bias"})])


def test_eager_and_the_floor_are_not_judged() -> None:
    given, refused = {harness.EAGER: 1, harness.MATMULS: 2, harness.OURS: 3, "a": 4, "b": 5}, {}

    def verdict(name: str, value: int) -> str:
        if name == "a":
            raise LookupError("nothing")
        return "wrong" if name == "b" else ""

    harness.judge(given, refused, verdict)
    assert list(given) == [harness.EAGER, harness.MATMULS, harness.OURS]
    assert refused == {"a": "LookupError: nothing", "b": "wrong"}
