"""One run: seeds kept apart, stages and their steps, the selected checkpoint, failure, cached features, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from petune_kernels.studies import single, train
from petune_kernels.studies.errors import InputError
from petune_kernels.studies.methods import METHODS, method
from petune_kernels.studies.single import Outcome, Recipe, Seeds, tune_once
from petune_kernels.studies.tasks import Examples, TaskData

from .conftest import WORDS

SMALL: dict[str, dict[str, Any]] = {"adapter": {"reduction": 4}, "topk": {"k": 1}, "prefix": {"tokens": 3}}
QUICK = Recipe(lr=1e-2, batch=8, length=16, steps=12, evaluate_every=4, patience=None)


def examples(rows: int, seed: int, scores: bool = False, pairs: bool = False) -> Examples:
    draw = random.Random(seed)
    labels = [i % 2 for i in range(rows)]
    texts = [" ".join(draw.choice(WORDS[draw.choice([y, y, 2])]) for _ in range(draw.randint(3, 9))) for y in labels]
    second = [draw.choice(WORDS[2]) for _ in labels] if pairs else None
    return Examples(texts, second, [2.0 * y - 1 for y in labels] if scores else labels)


def make_task(scores: bool = False, pairs: bool = False) -> TaskData:
    parts = [examples(rows, i, scores, pairs) for i, rows in enumerate((50, 20, 24, 9))]
    labels = 1 if scores else 2
    primary = "spearman" if scores else "accuracy"
    tests = {"test": parts[2], "other": parts[3]}
    return TaskData(parts[0], parts[1], tests, labels, primary)


def run(
    folder: Path, name: str = "layernorm", recipe: Recipe = QUICK, wi: int = 0, do: int = 0, **more: Any
) -> Outcome:
    options = more.pop("options", SMALL.get(name, {}))
    return tune_once(folder, method(name, **options), make_task(), recipe, Seeds(wi, do), **more)


def results(outcome: Outcome) -> list[Any]:
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in outcome.history]
    sizes = [(stage["name"], stage["trained"], stage["head"], stage["steps"]) for stage in outcome.stages]
    return [outcome.validation, outcome.test, history, sizes, outcome.total]


QUICKLY = ("random", "lora", "prefix", "adapter", "mixout", "child-tuning-d", "eh-ft")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICKLY else pytest.mark.slow) for n in METHODS])
def test_every_method_runs_and_patched_agrees_with_stock(tiny_model: Path, name: str) -> None:
    outcome, stock = (run(tiny_model, name, dropout=False, patched=p) for p in (True, False))
    assert outcome.failed is None and set(outcome.test) == {"test", "other"}
    assert sum(stage["steps"] for stage in outcome.stages) == 12
    for a, b in zip(outcome.history, stock.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-3) and a["step"] == b["step"]
    fields = {f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)}
    json.dumps(fields, allow_nan=False)


def test_it_learns(tiny_model: Path) -> None:
    recipe = Recipe(lr=5e-3, batch=8, length=16, epochs=8, patience=None)
    outcome = run(tiny_model, "full", recipe)
    assert outcome.test["test"]["accuracy"] > 0.75
    assert [entry["step"] for entry in outcome.history] == [7 * i for i in range(1, 9)]  # 50 rows are 7 batches
    (stage,) = outcome.stages
    assert outcome.seconds >= stage["seconds"] > 0 and stage["peak_bytes"] >= stage["loaded_bytes"] > 10**6
    assert stage["head"] == 2 * 32 + 2 and stage["trained"] + stage["head"] == outcome.total


def test_a_run_repeats_itself_and_each_seed_matters(tiny_model: Path) -> None:
    base = results(run(tiny_model, wi=1, do=2))
    torch.manual_seed(99)
    assert results(run(tiny_model, wi=1, do=2)) == base
    assert results(run(tiny_model, wi=2, do=2)) != base
    assert results(run(tiny_model, wi=1, do=3)) != base


def test_do_alone_gives_batches_and_dropout(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(name: str, wi: int, do: int) -> list[Any]:
        record: list[Any] = []
        inputs = single.Encoded.inputs

        def watched(self: Any, rows: list[int], width: int | None = None) -> Any:
            if torch.is_grad_enabled():
                record.append((rows, torch.initial_seed()))
            return inputs(self, rows, width)

        monkeypatch.setattr(single.Encoded, "inputs", watched)
        run(tiny_model, name, wi=wi, do=do)
        monkeypatch.setattr(single.Encoded, "inputs", inputs)
        return record

    base = seen("layernorm", 0, 4)
    assert len(base) == 12 and seen("lora", 1, 4) == base
    other = seen("layernorm", 0, 5)
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in zip(base, other, strict=True))


def test_the_best_checkpoint_is_selected_restored_and_tested(tiny_model: Path) -> None:
    recipe = dataclasses.replace(QUICK, lr=0.1, steps=20, evaluate_every=2, dtype="float32")
    best, last = (
        run(tiny_model, "full", dataclasses.replace(recipe, keep=k), keep_model=True) for k in ("best", "last")
    )
    losses = [entry["loss"] for entry in best.history]
    assert best.validation["loss"] == min(losses) < losses[-1] == last.validation["loss"]
    task = make_task()
    folder = train.load_tokenizer(tiny_model)
    with torch.no_grad():
        inputs = folder(task.validation.texts, padding=True, return_tensors="pt")
        for outcome in (best, last):
            assert outcome.model is not None and not outcome.model.training
            logits = outcome.model(**inputs).logits
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(task.validation.labels))
            assert loss.item() == pytest.approx(outcome.validation["loss"], rel=1e-4)
            assert "forward" not in vars(outcome.model.bert.encoder.layer[0].output)  # unpatched
    by_metric = run(tiny_model, "full", dataclasses.replace(recipe, stop_on="metric"))
    assert by_metric.validation["accuracy"] == max(entry["accuracy"] for entry in by_metric.history)


@pytest.mark.parametrize(
    ("name", "options", "rates"),
    [
        ("eh-ft", {"pet": "bitfit", "stage_lr": 2e-3, "head_lr": 3e-3}, [[3e-3, 2e-3], [1e-2]]),
        ("eh-ft", {"pet": "bitfit"}, [[5e-4], [1e-2]]),
        ("lp-ft", {"stage_lr": 2e-3}, [[2e-3], [1e-2]]),
    ],
)
def test_updates_are_those_of_recipe_and_stage(
    tiny_model: Path, name: str, options: dict[str, Any], rates: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Watched(train.Updates):
        def __init__(self, groups: Any, *more: Any, **adamw: Any) -> None:
            seen.append(([rate for _, rate in groups], *more, adamw))
            super().__init__(groups, *more, **adamw)

    monkeypatch.setattr(train, "Updates", Watched)
    adamw = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.02}
    outcome = run(
        tiny_model, name, dataclasses.replace(QUICK, steps=2, warmup=0.25, clip=0.5, **adamw), options=options
    )
    steps = [stage["steps"] for stage in outcome.stages]
    assert seen == [(lr, n, 0.25, 0.5, adamw) for lr, n in zip(rates, steps, strict=True)]


def test_patience_counts_evaluations_without_a_better_one(tiny_model: Path) -> None:
    recipe = dataclasses.replace(QUICK, lr=0.3, steps=60, evaluate_every=1, patience=3)
    outcome = run(tiny_model, "full", recipe)
    losses = [entry["loss"] for entry in outcome.history]
    assert len(losses) < 60 and losses.index(min(losses)) == len(losses) - 4


def test_batches_of_like_length_hold_every_row_once_an_epoch_and_less_padding(tiny_model: Path) -> None:
    def batches(grouped: bool, do: int) -> list[list[int]]:
        recipe = dataclasses.replace(QUICK, batch=4, group_by_length=grouped)
        device = torch.device("cpu")
        state = single.Tuning(tiny_model, method("full"), make_task(), recipe, Seeds(0, do), False, True, device, None)
        source = state.batches()
        return [next(source) for _ in range(2 * state.per_epoch)]

    lengths = [len(text.split()) for text in make_task().train.texts]

    def padding(found: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in rows) - lengths[k] for rows in found for k in rows)

    plain, grouped = batches(False, 1), batches(True, 1)
    assert grouped == batches(True, 1) != batches(True, 2)
    for epoch in (grouped[:13], grouped[13:]):
        assert sorted(i for rows in epoch for i in rows) == list(range(50)) and max(map(len, epoch)) == 4
    assert padding(grouped) < 0.6 * padding(plain)


@pytest.mark.parametrize("name", ["eh-ft", "lp-ft"])
def test_the_first_stage_has_a_tenth_of_the_steps(tiny_model: Path, name: str) -> None:
    outcome = run(tiny_model, name, dataclasses.replace(QUICK, steps=30))
    assert [stage["steps"] for stage in outcome.stages] == [3, 27]
    assert outcome.stages[0]["trained"] < outcome.stages[1]["trained"] == outcome.total - outcome.stages[1]["head"]
    assert outcome.stages[0]["head"] == outcome.stages[1]["head"] == 66
    assert [entry["stage"] for entry in outcome.history][:2] == [outcome.stages[0]["name"], "full"]


def test_a_loss_that_is_not_finite_is_reported(tiny_model: Path) -> None:
    outcome = run(tiny_model, "full", dataclasses.replace(QUICK, lr=1e30, warmup=0.0))
    assert outcome.failed is not None and "loss" in outcome.failed
    assert outcome.test == {} and outcome.validation == {}


def test_a_validation_loss_that_is_not_finite_ends_the_run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single.Tuning, "evaluate", lambda self, part: (math.inf, {"accuracy": 0.5}))
    outcome = run(tiny_model)
    assert outcome.failed == "the validation loss after step 4 is inf"
    assert outcome.stages[0]["steps"] == 4 and len(outcome.history) == 1


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_linear_probing_computes_features_once_and_the_same(
    tiny_model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model
    if kind == "roberta":  # its head reads the first position of a sequence
        folder = tmp_path
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        ids = {"vocab_size": 17, "pad_token_id": 0, "max_position_embeddings": 40}
        RobertaForSequenceClassification(RobertaConfig(**sizes, **ids)).save_pretrained(folder)
        train.load_tokenizer(tiny_model).save_pretrained(folder)
    rows: list[int] = []
    inputs = single.Encoded.inputs

    def watched(self: Any, given: list[int], width: int | None = None) -> Any:
        rows.extend(given)
        return inputs(self, given, width)

    monkeypatch.setattr(single.Encoded, "inputs", watched)
    cached = run(folder, "lp", dropout=False)
    assert len(rows) == 50 + 20 + 24 + 9 + 2  # every row once, and two to see that the head may run alone
    monkeypatch.setattr(single.HeadOnly, "of", staticmethod(lambda *_: None))
    plain = run(folder, "lp", dropout=False)
    assert len(rows) > 105 + 12 * 8 and plain.test.keys() == cached.test.keys()
    for a, b in zip(cached.history, plain.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert [s["trained"] for s in cached.stages] == [s["trained"] for s in plain.stages] == [0]


@pytest.mark.parametrize("name", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("prefix", "adapter"))])
def test_a_run_in_bfloat16(tiny_model: Path, name: str) -> None:
    outcome = run(tiny_model, name, dataclasses.replace(QUICK, dtype="bfloat16"), keep_model=True)
    assert outcome.failed is None and outcome.model is not None
    assert {p.dtype for p in outcome.model.parameters()} == {torch.bfloat16}


def test_regression_and_pairs(tiny_model: Path) -> None:
    task = make_task(scores=True, pairs=True)
    recipe = Recipe(lr=5e-3, batch=8, length=20, epochs=4)
    outcome = tune_once(tiny_model, method("full"), task, recipe, Seeds(0, 0))
    assert outcome.history[-1]["loss"] < outcome.history[0]["loss"] and "spearman" in outcome.test["other"]
    constant = np.asarray(task.validation.labels).var()
    assert min(entry["loss"] for entry in outcome.history) < constant


def test_progress_is_told_of_every_step(tiny_model: Path) -> None:
    calls: list[tuple[int, int, float]] = []
    outcome = run(tiny_model, "lp-ft", progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(i, 12) for i in range(1, 13)]
    ends = [entry["step"] for entry in outcome.history]
    means = [np.mean([call[2] for call in calls[start:end]]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert [entry["train_loss"] for entry in outcome.history] == pytest.approx(means)  # since the evaluation before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": None}, "exactly one"),
        ({"epochs": 3}, "exactly one"),
        ({"lr": 0}, "lr is 0; accepted is a number over 0"),
        ({"batch": True}, "batch is True"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"memory": "low"}, "memory is 'low'; accepted is exact, coded, recompute, checkpoint"),
        ({"stop_on": "accuracy"}, "loss or metric"),
        ({"evaluate_every": "step"}, "epoch, or an int"),
        ({"betas": (0.9, 1.0)}, "two numbers"),
        ({"warmup": 2}, "share from 0 to 1"),
    ],
)
def test_a_bad_recipe_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(QUICK, **given)


def test_what_does_not_fit_the_model_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="length is 64, .* at most 32 tokens; the recipe sets it .*--recipe length="):
        run(tiny_model, recipe=dataclasses.replace(QUICK, length=64))
    for name, options in (("prefix", {"tokens": 17}), ("eh-ft", {"pet": "prefix", "tokens": 17})):
        with pytest.raises(InputError, match="length is 16, .* at most 32 tokens, 17 of them the prefix's"):
            run(tiny_model, name, options=options)
    with pytest.raises(InputError, match="method 'layernorm': layers"):
        run(tiny_model, options={"layers": [7]})
    with pytest.raises(InputError, match="^method 'topk': k is 3; the model has 2 layers"):
        run(tiny_model, "topk", options={})
    with pytest.raises(InputError, match="too few for 2 stages"):
        run(tiny_model, "lp-ft", dataclasses.replace(QUICK, steps=1))
    with pytest.raises(InputError, match="not a folder|no tokenizer"):
        run(tmp_path)
    with pytest.raises(InputError, match="wi is -1"):
        Seeds(-1, 0)
