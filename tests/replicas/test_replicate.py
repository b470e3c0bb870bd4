"""What `replicate` takes and refuses, and how it leaves a model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import petune_kernels as pk
from petune_kernels import cuda_graph, replicas
from petune_kernels.ops import _seeds, attention
from petune_kernels.patch import graphs

from ..recorder import Recorder
from .runs import data, init, make, unlabelled


def condition(model: nn.Module) -> list[Any]:
    """All that a refusal must leave alone."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [
        [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()],
        [(n, id(m), sorted(m.__dict__), id(m.__dict__.get("forward")), m.training) for n, m in model.named_modules()],
        [getattr(c, "_attn_implementation_internal", None) for c in configs.values()],
        torch.get_rng_state().tolist(),
    ]


class OwnDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, self.training)


class Mixer(nn.Module):
    """A norm with a gate, whose forward nobody knows."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(norm.normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.weight


class OverBatch(nn.Linear):
    """Sees the whole batch: replicas would not be alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def refused_model(case: str) -> nn.Module:
    model: Any = make("bert", "full" if case == "full" else "layernorm")
    if case == "random":
        pk.tune(model, "random", fraction=0.01)
    if case == "own dropout":
        model.dropout = OwnDropout()
    if case == "unknown module":
        model.bert.embeddings.LayerNorm = Mixer(model.bert.embeddings.LayerNorm)
    if case == "over the batch":
        dense = model.bert.pooler.dense
        model.bert.pooler.dense = OverBatch(dense.in_features, dense.out_features)
        model.bert.pooler.dense.requires_grad_(False)
    if case == "a replaced forward":
        model.classifier.forward = model.classifier.forward
    if case == "nothing trains":
        model.requires_grad_(False)
    if case == "lora on an embedding":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["word_embeddings"], task_type="SEQ_CLS"))
    return model


REFUSED = {
    "full": "word_embeddings.weight trains, but an embedding with a padding row",
    "random": "_sampled trains, but the forward of .* is not known to read it",
    "own dropout": r"dropout \(OwnDropout.*torch's own random numbers in training",
    "unknown module": "LayerNorm.weight trains, but the forward of Mixer takes no replica axis",
    "over the batch": "two replicas in a batch are not what they are alone: replica 0 differs by",
    "a replaced forward": "classifier.weight trains, but the forward of this Linear was replaced",
    "nothing trains": "no parameter requires a gradient",
    "lora on an embedding": "lora_embedding_A.* trains, but",
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("patched", (None, "exact", "checkpoint"))
def test_a_refusal_leaves_the_model_as_it_was(case: str, patched: str | None) -> None:
    model = refused_model(case)
    if patched:
        pk.patch(model, memory=patched)
    before = condition(model)
    with pytest.raises(pk.ReplicaError, match=REFUSED[case]):
        pk.replicate(model, [0, 1], init=init)
    assert condition(model) == before


def test_an_init_that_fails_leaves_the_model_as_it_was() -> None:
    model = make("bert", "layernorm")
    before = condition(model)

    def fails(model: nn.Module, wi: int) -> None:
        init(model, wi)
        if wi == 1:
            raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        pk.replicate(model, [0, 1], init=fails)
    after = condition(model)
    assert [x[:3] for x in after[0]] == [x[:3] for x in before[0]] and after[1:] == before[1:]


@pytest.mark.parametrize("patched", (None, "exact", "checkpoint"))
def test_release_gives_the_model_back(patched: str | None) -> None:
    model = make("roberta", "bitfit")
    if patched:
        pk.patch(model, memory=patched)
    own, before = dict(model.named_parameters()), condition(model)
    values = {n: p.detach().clone() for n, p in own.items()}
    runs = pk.replicate(model, [0, 1], init=init)
    assert condition(model) != before
    runs.release()
    assert condition(model)[1:] == before[1:] and all(p is own[n] for n, p in model.named_parameters())
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    runs = pk.replicate(model, [0, 1], init=init)
    runs.release(1)
    for name, p in runs.named_parameters(1).items():
        assert torch.equal(p, own[name]) and not torch.equal(p, values[name])
    with pytest.raises(pk.ReplicaError, match="released"):
        runs.replica(0)


def test_frozen_parameters_stay_the_same_objects() -> None:
    model = make("bert", "bitfit")
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    runs = pk.replicate(model, range(4), init=init)
    now = dict(model.named_parameters())
    assert all(now[n] is p for n, p in frozen.items())
    assert {n: tuple(p.shape[1:]) for n, p in now.items() if p.requires_grad} == {
        n: tuple(p.shape) for n, p in runs.named_parameters(0).items()
    }
    for g in range(4):
        for name, p in runs.named_parameters(g).items():
            assert p.data_ptr() == now[name][g].data_ptr()


def test_load_sets_values_and_names_what_does_not_fit() -> None:
    runs = pk.replicate(make("bert", "layernorm"), [0, 1], init=init)
    value = torch.arange(3.0)
    runs.load(1, {"classifier.bias": value})
    assert torch.equal(dict(runs.model.named_parameters())["classifier.bias"][1], value)
    with pytest.raises(ValueError, match="'classifier.bais' does not train"):
        runs.load(1, {"classifier.bais": value})
    with pytest.raises(ValueError, match=r"classifier.bias has shape \(2,\); accepted is \(3,\)"):
        runs.load(1, {"classifier.bias": value[:2]})
    with pytest.raises(TypeError, match="classifier.bias is list; accepted is a tensor"):
        runs.load(1, {"classifier.bias": [1.0, 2.0, 3.0]})  # type: ignore[dict-item]
    runs.release()
    with pytest.raises(pk.ReplicaError, match="load: the model was released already"):
        runs.load(1, {"classifier.bias": value})


def test_a_call_that_would_mix_replicas_is_refused() -> None:
    model: Any = make("bert", "layernorm")
    runs, inputs = pk.replicate(model, [0, 1], init=init), next(data("bert", 0))
    whole = runs.repeat(inputs)
    ids, labels = whole["input_ids"], whole["labels"]
    for call in (lambda: model(**whole), lambda: model(ids, None, None, None, None, labels)):
        with pytest.raises(ValueError, match="labels are given"):
            call()
    for name in replicas._LOSS_OF_ALL:
        with pytest.raises(ValueError, match="labels are given"):
            model(ids, **{name: labels})
    assert model(position_ids=torch.arange(9)[None], input_ids=ids).logits.shape == (6, 3)
    word = next(p for p in model.parameters() if not p.requires_grad).requires_grad_()
    with pytest.raises(pk.ReplicaError, match="that all replicas share was set to train"):
        model(ids)
    word.requires_grad_(False)
    with pytest.raises(ValueError, match=r"split: rows has shape \(5, 3\); accepted is a multiple of 2 rows"):
        runs.split(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="stack: label has no dimension"):
        runs.stack([{"label": torch.tensor(1)}] * 2)
    with pytest.raises(ValueError, match="manual_seed: seed is -1; accepted is an int from 0"):
        runs.manual_seed(0, -1)
    with pytest.raises(ValueError, match="the batch has 3 rows; accepted is a multiple of the 2"):
        model(**unlabelled(inputs))
    shorter = {k: v[:, :5] for k, v in unlabelled(inputs).items()}
    with pytest.raises(ValueError, match=r"stack: input_ids has the shapes \[\(3, 5\), \(3, 9\)\]; pad them alike"):
        runs.stack([unlabelled(inputs), shorter])
    with pytest.raises(ValueError, match="stack: 1 batches; accepted is one for each of 2"):
        runs.stack([inputs])
    model.gradient_checkpointing_enable()
    with pytest.raises(pk.ReplicaError, match="gradient checkpointing"):
        model.train()(**unlabelled(whole))
    model.eval().gradient_checkpointing_disable()
    runs.stop(0)
    assert runs.active == (1,) and model(**unlabelled(inputs)).logits.shape == (3, 3)
    for misuse in (runs.stop, lambda g: runs.manual_seed(g, 0)):
        with pytest.raises(pk.ReplicaError, match="replica 0 was stopped"):
            misuse(0)
    runs.resume(0)
    one = model(**runs.repeat(unlabelled(inputs))).logits
    assert runs.active == (1, 0)
    with torch.no_grad():
        own = runs.replica(0)(**unlabelled(inputs)).logits
    torch.testing.assert_close(runs.split(one)[1], own, rtol=1e-4, atol=1e-5)
    with pytest.raises(pk.ReplicaError, match="replica 0 was not stopped"):
        runs.resume(0)
    runs.stop(0)
    with pytest.raises(IndexError, match="replica 7; there are 0 to 1"):
        runs.parameters(7)
    runs.stop(1)
    with pytest.raises(pk.ReplicaError, match="no replica is left"):
        model(**unlabelled(inputs))


def test_a_stopped_replica_holds_its_own_memory_alone() -> None:
    runs = pk.replicate(make("bert", "layernorm"), [0, 1, 2], init=init)
    runs.stop(1)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in runs.parameters(1))


@pytest.mark.parametrize("move", (nn.Module.half, lambda model: model.half().float()), ids=("cast", "there and back"))
def test_a_model_that_was_moved_is_refused(move: Any) -> None:
    """Its packed parameters are others then than those whose rows the runs' optimizers hold."""
    model: Any = make("bert", "layernorm")
    runs = pk.replicate(model, [0, 1], init=init)
    batch = runs.repeat(unlabelled(next(data("bert", 0))))
    model(**batch)
    move(model)
    with pytest.raises(
        pk.ReplicaError, match="no rows of the model.s: it is a copy, or was moved or cast since `replicate`"
    ):
        model(**batch)


def test_packing_again_and_unpatching_are_refused() -> None:
    model: Any = make("llama", "layernorm")
    runs = pk.replicate(model, [0, 1], init=init)
    with pytest.raises(pk.ReplicaError, match="is it packed already"):
        pk.replicate(model, [0, 1])
    with pytest.raises(pk.PatchError, match="unpatch: the model is replicated"):
        pk.unpatch(model)
    del model.model.norm.forward
    with pytest.raises(pk.ReplicaError, match="replaced or taken off since"):
        model(**runs.repeat(unlabelled(next(data("llama", 0)))))


BAD_SEEDS = {
    "none": ([], "seeds is empty"),
    "negative": ([-1], "seeds has -1"),
    "three": ([(1, 2, 3)], r"seeds has \(1, 2, 3\)"),
    "text": (["a"], "seeds has 'a'"),
    "a flag": ([True], "seeds has True"),
    "a float": ([(1, 2.0)], "seeds has"),
    "a number": (20, "seeds is 20; accepted is one entry a replica"),
    "a word": ("12", "seeds is '12'; accepted is one entry a replica"),
}


@pytest.mark.parametrize("seeds,message", BAD_SEEDS.values(), ids=BAD_SEEDS.keys())
def test_seeds_that_are_none_are_named(seeds: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pk.replicate(make("bert", "frozen"), seeds)


def test_seeds_and_replicas_may_be_numpys() -> None:
    runs = pk.replicate(make("bert", "frozen"), np.arange(2), init=init)
    assert runs.seeds == ((0, 0), (1, 1)) and runs.parameters(np.int64(1))[0] is runs.parameters(1)[0]


def test_other_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="model is str"):
        pk.replicate("bert", [0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init is 'random'; accepted are 'draw', 'keep'"):
        pk.replicate(make("bert", "frozen"), [0], init="random")


def test_nothing_packs_a_released_model_again() -> None:
    model = make("bert", "layernorm")
    own = [(id(p), p.shape) for p in model.parameters()]
    runs = pk.replicate(model, [0, 1], init=init)
    runs.stop(1)
    runs.release()
    for call in (lambda: runs.stop(0), lambda: runs.resume(1), lambda: runs.replica(0), runs.release):
        with pytest.raises(pk.ReplicaError, match="the model was released already"):
            call()
    assert [(id(p), p.shape) for p in model.parameters()] == own


def test_batches_that_differ_in_more_than_their_rows_are_named() -> None:
    runs = pk.replicate(make("bert", "layernorm"), [0, 1], init=init)
    one = unlabelled(next(data("bert", 0)))
    with pytest.raises(ValueError, match="stack: a batch has input_ids, .* the first input_ids"):
        runs.stack([{"input_ids": one["input_ids"]}, one])
    with pytest.raises(ValueError, match="stack: use_cache is True in the first batch only"):
        runs.stack([one | {"use_cache": True}, one | {"use_cache": False}])


def test_masks_of_torchs_own_attention_are_no_replica_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where torch's fused attention serves: a packed run draws its own there, too."""
    monkeypatch.setattr(attention, "_native", lambda q: True)
    model = make("bert", "layernorm", attention_probs_dropout_prob=0.3)
    runs = pk.replicate(model, [3, 4], init="keep")
    batch = unlabelled(next(data("bert", 0)))
    solo = make("bert", "layernorm", attention_probs_dropout_prob=0.3)
    pk.patch(solo)
    state = torch.get_rng_state()
    together = runs.split(model(**runs.repeat(batch)).logits)
    assert torch.equal(torch.get_rng_state(), state)
    for g, seed in enumerate((3, 4)):
        with _seeds.replicated(_seeds.Sources([seed])):
            torch.testing.assert_close(together[g], solo(**batch).logits)


def test_a_model_with_graphs_has_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    for give_back in ("release", "refusal"):
        model = make("bert", "layernorm").train()
        pk.patch(model, cuda_graphs=True)
        before = condition(model)
        if give_back == "release":
            pk.replicate(model, [0, 1], init="keep").release()
        else:
            with pytest.raises(pk.ReplicaError, match="init: "):
                pk.replicate(model, [0, 1], init=fails)
        assert [(n, i, d) for n, i, d, *_ in condition(model)[1]] == [(n, i, d) for n, i, d, *_ in before[1]]
        batch = next(data("bert", 0))
        for _ in range(3):
            model(**batch).loss.backward()
        (found,) = graphs.of(model).values()
        assert found.replayed == 2


def fails(model: nn.Module, wi: int) -> None:
    raise ValueError("no such luck")


def test_gradients_go_to_the_replicas_of_their_forward() -> None:
    """Also where one was stopped, or came back, between forward and backward."""
    model = make("bert", "layernorm", dropout=False)
    runs = pk.replicate(model, [0, 1], init=init)
    batch = runs.repeat(unlabelled(next(data("bert", 0))))
    for change in (lambda: None, lambda: runs.stop(0), lambda: (runs.stop(0), runs.resume(0))):
        rows = runs.split(model(**batch).logits)
        change()
        rows[1].sum().backward()
        assert not any(p.grad.any() for p in runs.parameters(0)) and any(p.grad.any() for p in runs.parameters(1))
        if 0 not in runs.active:
            runs.resume(0)
        runs.stop(1), runs.resume(1)
        for p in (*runs.parameters(0), *runs.parameters(1)):
            p.grad = None


@pytest.mark.parametrize("regime", ("layernorm", "lora"))
def test_a_replicated_model_is_released_before_it_is_changed_or_saved(regime: str, tmp_path: Any) -> None:
    model = make("bert", regime)
    runs = pk.replicate(model, [0, 1], init="keep")
    before = condition(model)
    for call, error in (
        (pk.patch, pk.PatchError), (pk.unpatch, pk.PatchError), (lambda m: pk.tune(m, "full"), ValueError),
        (lambda m: m.save_pretrained(tmp_path), pk.ReplicaError),
    ):  # fmt: skip
        if regime == "layernorm" or error is not ValueError:  # what PEFT has chosen is not tuned at all
            with pytest.raises(error, match="the model is replicated"):
                call(model)
    assert condition(model) == before and not any(tmp_path.iterdir())
    with pytest.raises(pk.ReplicaError, match="it is a copy"):
        copy.deepcopy(model)(**runs.repeat(unlabelled(next(data("bert", 0)))))
    runs.replica(1).save_pretrained(tmp_path / "one")
    runs.release().save_pretrained(tmp_path / "released")
    assert any((tmp_path / "one").iterdir()) and any((tmp_path / "released").iterdir())
