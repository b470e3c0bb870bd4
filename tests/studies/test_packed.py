"""Packed runs are the runs that tune_once gives: histories, checkpoints, scores, early stops and failures."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import petune_kernels as pk
from petune_kernels.studies import packed, runner
from petune_kernels.studies.errors import InputError, StudyError
from petune_kernels.studies.methods import METHODS, method
from petune_kernels.studies.recipe import Recipe, Seeds
from petune_kernels.studies.single import Outcome, Tuning, tune_once
from petune_kernels.studies.study import Study, parse

from .test_analysis import folder_of
from .test_runner import study
from .test_single import SMALL, make_task
from .test_study import CONTENT

RECIPE = Recipe(
    lr=1e-2, batch=8, length=16, steps=18, evaluate_every=6, patience=None, clip=1.0, weight_decay=0.01, pad="longest"
)
SEEDS = [Seeds(0, 3), Seeds(1, 4), Seeds(1, 5)]


def together(folder: Path, name: str, recipe: Recipe = RECIPE, seeds: Sequence[Seeds] = SEEDS, **more: Any) -> Any:
    return packed.tune_packed(folder, method(name, **SMALL.get(name, {})), make_task(), recipe, seeds, **more)


def alone(folder: Path, name: str, recipe: Recipe = RECIPE, seeds: Sequence[Seeds] = SEEDS, **more: Any) -> Any:
    options = SMALL.get(name, {})
    return [tune_once(folder, method(name, **options), make_task(), recipe, one, **more) for one in seeds]


def assert_same(ours: Sequence[Outcome], own: Sequence[Outcome]) -> None:
    for a, b in zip(ours, own, strict=True):
        assert a.packed == len(ours) and b.packed == 1 and a.failed == b.failed and a.total == b.total
        assert [(s["name"], s["trained"], s["head"], s["steps"]) for s in a.stages] == [
            (s["name"], s["trained"], s["head"], s["steps"]) for s in b.stages
        ]
        assert a.stages[0]["peak_bytes"] >= a.stages[0]["loaded_bytes"] > 0 and a.seconds > 0
        for x, y in zip(a.history, b.history, strict=True):
            assert x.keys() == y.keys() and (x["stage"], x["step"]) == (y["stage"], y["step"])
            assert x["train_loss"] == pytest.approx(y["train_loss"], rel=1e-5)
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert a.validation == pytest.approx(b.validation, rel=1e-5)
        assert a.test == b.test
        json.dumps(dataclasses.asdict(dataclasses.replace(a, model=None)), allow_nan=False)


@pytest.mark.parametrize("name", [n for n in packed.METHODS if n != "lp"])  # which is frozen by another name
def test_every_method_gives_what_its_runs_alone_give(tiny_model: Path, name: str) -> None:
    ours, own = together(tiny_model, name), alone(tiny_model, name)
    assert_same(ours, own)
    assert len({o.history[0]["train_loss"] for o in ours}) == 3


def test_runs_that_stop_early_leave_and_are_scored_at_their_best(tiny_model: Path) -> None:
    recipe = dataclasses.replace(RECIPE, lr=5e-2, steps=40, evaluate_every=2, patience=2)
    ours = together(tiny_model, "layernorm", recipe)
    assert len({o.stages[0]["steps"] for o in ours}) > 1, "they stop at different steps"
    assert_same(ours, alone(tiny_model, "layernorm", recipe))


def test_the_recipes_memory_level_is_that_of_the_kernels(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, levels, patch = dataclasses.replace(RECIPE, memory="checkpoint"), [], pk.patch

    def watched(*args: Any, **more: Any) -> pk.PatchReport:
        levels.append(more["memory"])
        return patch(*args, **more)

    for module in (pk, pk.replicas):
        monkeypatch.setattr(module, "patch", watched)
    assert_same(together(tiny_model, "bitfit", recipe), alone(tiny_model, "bitfit", recipe))
    packed.fitting(tiny_model, method("bitfit"), make_task(), recipe, True, "cpu", 3)
    assert levels == ["checkpoint"] * 6


def test_without_dropout_batches_of_any_width_pack(tiny_model: Path) -> None:
    recipe = dataclasses.replace(RECIPE, pad="batch")
    ours = together(tiny_model, "bitfit", recipe, dropout=False)
    assert_same(ours, alone(tiny_model, "bitfit", recipe, dropout=False))


def test_a_run_whose_loss_is_no_number_fails_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Tuning.loss

    def spoiled(self: Tuning, logits: Tensor, labels: Tensor) -> Tensor:
        bad = self.seeds.do == 4 and torch.is_grad_enabled() and len(self.history) == 1
        return loss(self, logits * float("nan") if bad else logits, labels)

    monkeypatch.setattr(Tuning, "loss", spoiled)
    ours = together(tiny_model, "layernorm")
    assert [o.failed for o in ours] == [None, "the loss of step 7 is nan", None] and ours[1].test == {}
    assert_same(ours, alone(tiny_model, "layernorm"))


REASONS = {
    "full": ("full", {}, True, "full trains what replicas would share"),
    "mixout": ("mixout", {}, True, "mixout trains"),
    "padding": ("layernorm", {"pad": "batch"}, True, "ties dropout masks to it"),
    "cached": ("lp", {}, False, "the head's input is computed once"),
    "grouped": ("layernorm", {"group_by_length": True}, True, "batches of two sizes"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_does_not_pack_says_why(tiny_model: Path, case: str) -> None:
    name, changes, dropout, reason = REASONS[case]
    recipe = dataclasses.replace(RECIPE, **changes)
    assert reason in packed.why_not(method(name), make_task(), recipe, dropout)
    with pytest.raises(InputError, match=f"method '{name}' does not pack: .*{reason}"):
        packed.tune_packed(tiny_model, method(name), make_task(), recipe, SEEDS, dropout=dropout)


def test_the_number_of_runs_follows_the_free_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(free: int, runs: int = 20, processes: int = 1, recipe: Recipe = RECIPE) -> int:
        monkeypatch.setattr(packed, "free_memory", lambda device: free)
        return packed.fitting(tiny_model, method("layernorm"), make_task(), recipe, True, "cpu", runs, processes)

    sizes = [size(2**n) for n in range(18, 36)]
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == 20
    middle = next(n for n in range(18, 36) if 1 < size(2**n) < 20)
    assert size(2**middle) > size(2**middle, processes=4)
    assert size(2**middle) > size(2**middle, recipe=dataclasses.replace(RECIPE, batch=32))
    assert size(2**40, runs=50) == 25, "even packs of at most 32"


def test_out_of_memory_is_halved_without_losing_a_run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    own = packed.tune_packed

    def small_machine(folder: Path, m: Any, task: Any, recipe: Any, seeds: Sequence[Seeds], **more: Any) -> Any:
        tried.append(len(seeds))
        if len(seeds) > 2:
            torch.empty(2**60)
        return own(folder, m, task, recipe, seeds, **more)

    monkeypatch.setattr(packed, "tune_packed", small_machine)
    seeds, lines = [Seeds(0, i) for i in range(5)], list[str]()
    recipe = dataclasses.replace(RECIPE, steps=2)
    found = [
        o
        for os in packed.halving(tiny_model, method("layernorm"), make_task(), recipe, seeds, lines.append)
        for o in os
    ]
    assert tried == [5, 3, 2, 1, 2] and [o.packed for o in found] == [2, 2, 1, 2, 2]
    assert lines == [
        "out of memory with 5 runs packed: 3 and 2 instead", "out of memory with 3 runs packed: 2 and 1 instead"
    ]  # fmt: skip
    for one, outcome in zip(alone(tiny_model, "layernorm", recipe, seeds), found, strict=True):
        assert outcome.test == one.test and outcome.history[-1]["loss"] == pytest.approx(
            one.history[-1]["loss"], rel=1e-5
        )


def test_only_a_lack_of_memory_is_halved(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(packed, "tune_packed", breaks)
    with pytest.raises(RuntimeError, match="no such luck"):
        list(packed.halving(tiny_model, method("layernorm"), make_task(), RECIPE, SEEDS))
    assert packed.out_of_memory(MemoryError()) and packed.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def small_study(model: Path, data: Path, **changes: Any) -> Study:
    runner.load_task.cache_clear()
    content: dict[str, Any] = {
        "model": str(model),
        "tasks": [{"name": "tiny", "file": str(data), "train_rows": 48, "test_rows": 32}],
        "methods": [{"name": "full", "label": "FT"}, {"name": "lora", "options": {"r": 2}}],
        "recipe": {"lr": 1e-3, "steps": 4, "length": 16, "evaluate_every": 2, "pad": "longest"},
        "seeds": {"runs": 3},
        "patched": [True, False],
    }
    return study(**content | changes)


def rows(records: Sequence[dict[str, Any]]) -> list[Any]:
    """What must not depend on packing."""
    kept = []
    for r in sorted(records, key=lambda r: r["id"]):
        o = r["outcome"]
        history = [
            {k: v for k, v in entry.items() if k not in ("seconds", "loss", "train_loss")} for entry in o["history"]
        ]
        stages = [
            {k: v for k, v in s.items() if k not in ("seconds", "loaded_bytes", "peak_bytes")} for s in o["stages"]
        ]
        rest = {k: v for k, v in r.items() if k not in ("outcome", "finished")}
        kept.append([rest, history, stages, o["test"], o["total"], o["failed"], sorted(o)])
    return kept


@pytest.mark.parametrize("jobs", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_a_study_packs_by_itself_with_the_same_rows(
    tiny_model: Path, tiny_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: int
) -> None:
    from rich.console import Console

    which = small_study(tiny_model, tiny_csv)
    plain = runner.run(which, tmp_path / "alone", pack=False)
    ours = runner.run(which, tmp_path / "packed", jobs=jobs, console=Console(width=200))
    assert rows(ours) == rows(plain)
    for a, b in zip(*(sorted(found, key=lambda r: r["id"]) for found in (ours, plain)), strict=True):
        for x, y in zip(a["outcome"]["history"], b["outcome"]["history"], strict=True):
            assert (x["loss"], x["train_loss"]) == pytest.approx((y["loss"], y["train_loss"]), rel=1e-5)
        packs = a["method"] == "lora" and a["patched"]
        assert a["outcome"]["packed"] == (3 if packs else 1) and b["outcome"]["packed"] == 1
    said = capsys.readouterr().out
    assert "tiny, lora: 3 runs packed, 3 at a time" in said
    assert "tiny, FT: 3 runs one by one: full trains what replicas would share" in said
    again = runner.run(which, tmp_path / "packed")
    assert again == ours


def test_a_pack_that_breaks_is_named_and_the_others_are_kept(
    tiny_model: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = small_study(tiny_model, tiny_csv, patched=[True])

    def breaks(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patched:
        patched.setattr(packed, "tune_packed", breaks)
        with pytest.raises(
            StudyError, match="run tiny/.*/lora/global/0-0/patched and 2 packed with it: .*no such luck"
        ):
            runner.run(which, tmp_path)
    assert len(runner.run(which, tmp_path)) == 6


@pytest.mark.parametrize("tried_first", [True, False])
def test_a_model_that_does_not_pack_is_tuned_run_by_run(
    tried_first: bool, tiny_model: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.load_task.cache_clear()
    if not tried_first:
        monkeypatch.setattr(packed, "fitting", lambda *args: 2)
    which = parse(
        CONTENT
        | {
            "model": str(folder_of("gpt2", tiny_model, tmp_path / "model")),
            "tasks": [{"name": "tiny", "file": str(tiny_csv), "train_rows": 32, "test_rows": 16}],
            "methods": [{"name": "bitfit", "label": "FT"}],
            "recipe": {"lr": 1e-3, "steps": 2, "length": 12, "pad": "longest"},
            "seeds": {"runs": 2},
        }
    )
    console = Console(file=io.StringIO(), record=True, width=400)
    found = runner.run(which, tmp_path / "out", console=console)
    assert [r["outcome"]["packed"] for r in found] == [1, 1]
    assert console.export_text().count("one by one: replicate: transformer.h.0.attn.c_attn.bias trains, but") == 1


def test_a_method_that_does_not_fit_ends_a_study_before_its_first_run(
    tiny_model: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    content = CONTENT | {
        "model": str(folder_of("gpt2", tiny_model, tmp_path / "model")),
        "tasks": [{"name": "tiny", "file": str(tiny_csv)}],
        "methods": [{"name": "full", "label": "FT"}, {"name": "lora"}],
        "recipe": {"lr": 1e-3, "steps": 2, "length": 12, "pad": "longest"},
    }
    with pytest.raises(InputError, match="method 'lora': targets is 'qv', but no linear of the attention looks like"):
        runner.run(parse(content), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="method 'lora': targets is 'qv'"):
        packed.fitting(tmp_path / "model", method("lora"), make_task(), RECIPE, True, "cpu", 2)


@pytest.mark.parametrize("kind", ["bart", "albert"])
def test_a_method_that_fits_is_not_refused_for_what_a_model_without_values_cannot_show(
    kind: str, tiny_model: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    runner.load_task.cache_clear()
    chosen = [name for name in METHODS if name not in ("eh-ft", "topk")]
    content = CONTENT | {
        "model": str(folder_of(kind, tiny_model, tmp_path)),
        "tasks": [{"name": "tiny", "file": str(tiny_csv)}],
        "methods": [{"name": name, "options": {"reduction": 4} if name == "adapter" else {}} for name in chosen],
        "reference": "",
    }
    assert len(runner.plan(parse(content))) == 3 * len(chosen)
