"""Every replica of a packed model is the solo run with its seeds: losses, parameters, dropout masks, saved models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

import petune_kernels as pk
from petune_kernels.ops import _seeds
from petune_kernels.studies import adapter

from .runs import CASES, data, init, make, packed, solo, unlabelled

SEEDS = [(1, 5), (2, 6), (3, 7)]
STEPS = 30


def lr(g: int) -> float:
    return (1e-3, 3e-3, 2e-3)[g]


def no_gradient(name: str) -> bool:
    """Softmax does not see the keys' bias: its gradient is rounding alone, which Adam scales up to steps."""
    return name.endswith(("key.bias", "k_proj.bias"))


LIKE_LAYERNORM = ("layernorm-attention", "layernorm-ffn")


@pytest.mark.parametrize(
    "family,regime",
    [pytest.param(f, r, marks=pytest.mark.slow if f != "bert" and r in LIKE_LAYERNORM else ()) for f, r in CASES],
)
def test_every_replica_is_its_solo_run(family: str, regime: str) -> None:
    """Own initial values, data order, dropout, learning rate and clipping; replica 1 stops early."""
    model = make(family, regime)
    runs = pk.replicate(model, SEEDS, init=init)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.shape[0] == 3 for p in model.parameters() if p.requires_grad) and frozen
    starts = [runs.replica(g) for g in range(3)]
    stop = {1: 20}
    losses = packed(runs, family, lr, STEPS, stop)
    assert [len(one) for one in losses] == [30, 20, 30]
    assert len({loss for one in losses for loss in one}) > 70, "replicas and steps differ"
    inputs = unlabelled(next(data(family, 99)))
    for g, alone in enumerate(starts):
        expected = solo(alone, family, SEEDS[g][1], lr(g), stop.get(g, STEPS))
        assert losses[g] == pytest.approx(expected, rel=1e-5, abs=0)
        trained = {n: p for n, p in alone.named_parameters() if p.requires_grad}
        assert runs.named_parameters(g).keys() == trained.keys()
        for name, p in runs.named_parameters(g).items():
            if not no_gradient(name):
                assert (p - trained[name]).norm() <= 1e-5 * trained[name].norm(), (name, g)
        result = runs.replica(g)
        assert type(result) is type(alone) and list(result.state_dict()) == list(alone.state_dict())
        assert not any("forward" in m.__dict__ for m in result.modules())
        with torch.no_grad():
            own, ours = (m.eval()(**inputs).logits for m in (alone, result))
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ("coded", "recompute", "checkpoint"))
@pytest.mark.parametrize("family,regime", (("bert", "bitfit"), ("llama", "lora")))
def test_every_memory_level_draws_each_replicas_masks_again(family: str, regime: str, memory: str) -> None:
    runs = pk.replicate(make(family, regime), SEEDS, init=init, memory=memory)
    starts = [runs.replica(g) for g in range(3)]
    losses = packed(runs, family, lr, 5, {1: 3})
    for g, alone in enumerate(starts):
        assert losses[g] == pytest.approx(solo(alone, family, SEEDS[g][1], lr(g), len(losses[g])), rel=1e-5)


@pytest.mark.parametrize("family", ("electra", "albert", "modernbert", "t5 gated", "gpt2", "gemma", "vit"))
def test_other_families_pack_as_well(family: str) -> None:
    runs = pk.replicate(make(family, "layernorm"), SEEDS, init=init)
    starts = [runs.replica(g) for g in range(3)]
    losses = packed(runs, family, lr, 4, {0: 2})
    for g, alone in enumerate(starts):
        assert losses[g] == pytest.approx(solo(alone, family, SEEDS[g][1], lr(g), len(losses[g])), rel=1e-5)


def test_in_bfloat16_losses_agree_to_its_rounding() -> None:
    model = make("bert", "lora", dtype=torch.bfloat16)
    runs = pk.replicate(model, SEEDS, init=init)
    starts = [runs.replica(g) for g in range(3)]
    losses = packed(runs, "bert", lr, 5, {})
    for g, alone in enumerate(starts):
        assert losses[g] == pytest.approx(solo(alone, "bert", SEEDS[g][1], lr(g), 5), rel=3e-2)


@pytest.mark.parametrize("family,regime", (("bert", "lora"), ("roberta", "layernorm"), ("llama", "prefix")))
def test_every_mask_is_the_solo_runs_mask(family: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is a function of its seed and shape: the seeds of all dropouts, in order, are what solo runs draw."""
    drawn: dict[int, list[int]] = {}
    own = _seeds._draw

    def record(device: Any, count: int, generator: Any) -> Tensor:
        seed = own(device, count, generator)
        drawn.setdefault(id(generator), []).extend(seed.tolist())
        return seed

    monkeypatch.setattr(_seeds, "_draw", record)
    runs = pk.replicate(make(family, regime), SEEDS, init=init)
    starts = [runs.replica(g) for g in range(3)]
    drawn.clear()
    packed(runs, family, lr, 2, {})
    together = [seeds for generator, seeds in drawn.items() if generator != id(None)]
    assert len(together) == 3 and id(None) not in drawn
    for g, alone in enumerate(starts):
        drawn.clear()
        solo(alone, family, SEEDS[g][1], lr(g), 2)
        (seeds,) = drawn.values()
        assert seeds == together[g] and len(set(seeds)) == len(seeds) >= 4


@pytest.mark.parametrize("regime", ("layernorm", "lora", "prefix", "adapter"))
def test_a_replica_is_saved_as_a_solo_run_is(regime: str, tmp_path: Path) -> None:
    model = make("bert", regime)
    runs = pk.replicate(model, SEEDS, init=init)
    packed(runs, "bert", lr, 2, {0: 1})
    inputs = unlabelled(next(data("bert", 99)))
    for g in (0, 2):
        result = runs.replica(g).eval()
        folder = tmp_path / str(g)
        if regime == "adapter":
            adapter.save(result, folder)
            again: Any = copy.deepcopy(result)
            adapter.remove(again)
            adapter.load(again, folder)
        else:
            result.save_pretrained(folder)
            base = make("bert", "frozen")
            again = (
                AutoModelForSequenceClassification.from_pretrained(folder)
                if regime == "layernorm"
                else PeftModel.from_pretrained(base, folder)
            )
        torch.testing.assert_close(again.eval()(**inputs).logits, result(**inputs).logits)
        with torch.no_grad():
            rows = runs.split(model.eval()(**runs.repeat(inputs)).logits)
        if g in runs.active:
            torch.testing.assert_close(rows[runs.active.index(g)], result(**inputs).logits, rtol=1e-4, atol=1e-5)


class Ops(TorchDispatchMode):
    """Collects the names of all ops that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "family,regime", (("bert", "layernorm"), ("bert", "bitfit"), ("bert", "lora"), ("llama", "lora"))
)
def test_no_loop_over_replicas(family: str, regime: str) -> None:
    """The ops of a forward are the same for two replicas and for five."""
    counts = []
    for G in (2, 5):
        runs = pk.replicate(make(family, regime), range(G), init=init)
        inputs = runs.repeat(unlabelled(next(data(family, 0))))
        with Ops() as ops:
            runs.model.eval()(**inputs)
        counts.append(ops.seen)
    assert counts[0] == counts[1]


def test_gradients_add_up_over_backward_passes() -> None:
    model = make("bert", "layernorm", dropout=False)
    runs = pk.replicate(model, SEEDS, init=init)
    inputs = [unlabelled(next(data("bert", g))) for g in range(3)]
    found = []
    for _ in range(2):
        model(**runs.stack(inputs)).logits.square().sum().backward()
        found.append([p.grad.clone() for g in range(3) for p in runs.parameters(g)])
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(2 * once, twice)
    assert all(p.grad is None for p in model.parameters())


def test_a_users_own_save_pretrained_comes_back() -> None:
    model = make("bert", "layernorm")
    model.save_pretrained = own = lambda *args, **kwargs: None
    pk.replicate(model, [0, 1]).release()
    assert model.save_pretrained is own
    next(m for m in model.modules() if isinstance(m, torch.nn.Embedding)).requires_grad_(True)
    with pytest.raises(pk.ReplicaError):
        pk.replicate(model, [0, 1])
    assert model.save_pretrained is own
