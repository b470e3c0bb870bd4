"""The measures against cases whose answer is known."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from petune_kernels.studies import machine, measure
from petune_kernels.studies.errors import StudyError
from petune_kernels.studies.measure import Spread

MIB = 2**20


def test_saved_bytes_of_a_linear_are_its_input_only_when_the_weight_trains() -> None:
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(10, 64, requires_grad=True)
    middle = nn.Linear(64, 64, bias=False).requires_grad_(False)  # makes an input that nobody else holds

    def forward() -> torch.Tensor:
        return layer(middle(x)).sum()

    apart = [*layer.parameters(), *middle.parameters(), x]
    assert measure.saved_bytes(forward, apart) == 10 * 64 * 4
    layer.requires_grad_(False)
    assert measure.saved_bytes(forward, apart) == 0
    assert measure.saved_bytes(forward) == (64 * 64 + 64 * 32) * 4  # the weights themselves


def test_a_storage_counts_once_and_whole() -> None:
    x = torch.randn(8, 100, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # saves its result, 3200 bytes
        return (y[:, :10].square() + y[:, 5:15].square()).sum()  # both save views of it

    assert measure.saved_bytes(forward, [x]) == 8 * 100 * 4


def test_what_dies_before_backward_does_not_count() -> None:
    x = torch.randn(50, requires_grad=True)

    def forward() -> torch.Tensor:
        x.exp().square().sum()  # a graph that nobody keeps
        return x.exp().sum()

    assert measure.saved_bytes(forward, [x]) == 50 * 4


class Stack(nn.Module):
    """n layers of exp, whose result is saved, under an embedding that saves as much as it likes."""

    def __init__(self, layers: int):
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.layers = layers

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(input_ids).sin().cos()
        for _ in range(self.layers):
            x = x.exp()
        return {"loss": x.sum()}


def test_bytes_per_token_per_layer_is_the_cost_of_a_layer() -> None:
    batch = {"input_ids": torch.zeros(3, 7, dtype=torch.int64)}
    assert measure.saved_bytes_per_token_per_layer(Stack, batch) == 16 * 4
    assert measure.saved_bytes_per_token_per_layer(Stack, batch, layers=(1, 5)) == 16 * 4
    with pytest.raises(ValueError, match="layers must be"):
        measure.saved_bytes_per_token_per_layer(Stack, batch, layers=(2, 2))


def test_variants_run_in_turn_and_are_timed_apart() -> None:
    ran: list[str] = []

    def slow() -> None:
        time.sleep(0.02)
        ran.append("slow")

    seconds = measure.interleave(
        {"slow": slow, "fast": lambda: ran.append("fast")}, 3, after_round=lambda: ran.append("|")
    )
    assert ran == ["slow", "fast", "|"] * 3
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert min(seconds["slow"]) >= 0.02 > max(seconds["fast"])


def test_spread_and_paired_ratio() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    drifting = {"stock": [1.0, 2.0, 4.0, 8.0], "patched": [0.5, 1.0, 2.0, 4.0]}
    assert measure.paired_ratio(drifting, of="patched", to="stock") == Spread(0.5, 0.5, 0.5, 4)


def fill(mebibytes: int) -> measure.Peak:
    return measure.peak_memory(lambda: torch.ones(mebibytes * MIB, dtype=torch.uint8))


def fill_after_more(mebibytes: int) -> measure.Peak:
    torch.ones(2 * mebibytes * MIB, dtype=torch.uint8)  # the life-time peak is higher than the call's
    return fill(mebibytes)


def fill_what_was_freed(mebibytes: int) -> measure.Peak:
    blocks = [bytes(16 * 1024) for _ in range(64 * mebibytes)]  # so small that glibc keeps their pages when freed
    last = blocks.pop()
    del blocks
    return measure.peak_memory(lambda: [bytes(16 * 1024) for _ in range(64 * mebibytes)] and last)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the high-water mark cannot be reset here")
@pytest.mark.parametrize("run", [fill, fill_after_more, fill_what_was_freed])
def test_peak_memory_of_a_fresh_process_is_what_the_call_fills(run: object) -> None:
    ballast = torch.ones(100 * MIB, dtype=torch.uint8)  # here, so not in the child
    peak = measure.fresh_process(run, 64)
    assert 60 * MIB <= peak.rise < 80 * MIB
    assert "reset" in peak.method and len(ballast)


@pytest.mark.parametrize(("most", "now", "free"), [("max", 0, 65536), ("40960", 30720, 20480), ("40960", 60000, 0)])
def test_free_memory_is_what_machine_and_control_group_leave(
    most: str, now: int, free: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 128 kB\nMemFree: 1 kB\nMemAvailable: 64 kB\n")
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", most), ("current", str(now)), ("stat", "anon 1\ninactive_file 10240")):
        (group / f"memory.{name}").write_text(text + "\n")
    monkeypatch.setattr(measure, "Path", lambda path: tmp_path / path[1:])
    assert measure.free_memory() == free


def test_a_gpu_is_waited_for_before_and_after_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(measure, "_synchronize", lambda device: seen.append("wait"))
    measure.interleave({"a": lambda: seen.append("run")}, 2, "cuda")
    assert seen == ["wait", "run", "wait"] * 2


def test_without_the_reset_the_method_says_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_reset_high_water", lambda: False)
    peak = fill(8)
    assert "lower bound" in peak.method and peak.peak >= peak.before > 0


def process_id() -> int:
    return os.getpid()


def fail(message: str) -> None:
    raise KeyError(message)


def die() -> None:
    os._exit(7)


def test_a_fresh_process_is_another_one_and_passes_on_errors() -> None:
    assert measure.fresh_process(process_id) != os.getpid()
    with pytest.raises(KeyError, match="what went wrong"):
        measure.fresh_process(fail, "what went wrong")
    with pytest.raises(StudyError, match="measuring die died, exit code 7"):
        measure.fresh_process(die)


def test_on_a_gpu_the_allocator_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fake = SimpleNamespace(
        synchronize=lambda d: None,
        reset_peak_memory_stats=lambda d: calls.append("reset"),
        memory_allocated=lambda d: 5,
        max_memory_allocated=lambda d: 9,
    )
    monkeypatch.setattr(measure.torch, "cuda", fake)
    peak = measure.peak_memory(lambda: calls.append("run"), "cuda")
    assert calls == ["reset", "run"] and (peak.before, peak.peak, peak.rise) == (5, 9, 4)


def test_a_copy_without_git_may_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.delenv("PETUNE_COMMIT", raising=False)
    assert machine.git_commit() is None
    monkeypatch.setenv("PETUNE_COMMIT", "4f1a")
    assert machine.git_commit() == {"commit": "4f1a", "changed": None}
