"""Methods by name: what trains, how many, from which initial values; Mixout and Child-Tuning by their formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from petune_kernels.regimes.structure import read
from petune_kernels.studies import train
from petune_kernels.studies.methods import METHODS, Setting, head_of, method
from petune_kernels.studies.regularize import ChildTuning, Mixout, fisher_masks

CPU = torch.device("cpu")
BATCH = {"input_ids": torch.arange(5, 17).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def losses_of(model: nn.Module):
    yield lambda: model(**BATCH, labels=torch.tensor([0, 1])).loss


def setting(folder: Path, wi: int = 0) -> Setting:
    def load() -> nn.Module:
        return train.load_model(folder, 2, wi, torch.float32, CPU, dropout=False)

    return Setting(load, wi, losses_of, read(load()).head)


def on_meta(kind: Callable[..., nn.Module], config: Any) -> Setting:
    def load() -> nn.Module:
        with torch.device("meta"):
            return kind(config)

    return Setting(load, 0, losses_of, read(load()).head)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in trained(model).values())


def first(name: str, where: Setting, **options: Any) -> nn.Module:
    return method(name, **options).stages()[0].prepare(where)[0]


SMALL = {"adapter": {"reduction": 4}, "topk": {"k": 1}, "prefix": {"tokens": 3}}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_head_and_shares_add_up(tiny_model: Path, name: str) -> None:
    where, stages = setting(tiny_model), method(name, **SMALL.get(name, {})).stages()
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    for stage in stages:
        where.model, _ = stage.prepare(where)
        head = head_of(where.model, where.head)
        assert list(head) == ["classifier.weight", "classifier.bias"] and all(p.requires_grad for p in head.values())
        where.model(**BATCH).logits.sum().backward()
        assert all(p.grad is not None for p in head.values())


ROBERTA_HEAD = 592_130


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lora", {"r": 8}, 294_912),
        ("lora", {"r": 16}, 589_824),
        ("prefix", {"tokens": 8}, 147_456),
        ("prefix", {"tokens": 64}, 1_179_648),
        ("adapter", {"reduction": 64}, 230_544),
        ("adapter", {"reduction": 16}, 894_528),
        ("frozen", {}, 0),
        ("layernorm", {"layers": [3]}, 3_072),
        ("bitfit", {}, 101_376),
    ],
)
def test_counts_on_robertas_shape(name: str, options: dict[str, Any], expected: int) -> None:
    where = on_meta(RobertaForSequenceClassification, RobertaConfig())
    assert count(first(name, where, **options)) == expected + ROBERTA_HEAD


def test_lora_targets_are_found_by_structure() -> None:
    def targets(**options: Any) -> set[str]:
        model = first("lora", on_meta(BertForSequenceClassification, BertConfig(num_hidden_layers=1)), **options)
        return {n.split("layer.0.")[1].split(".lora")[0] for n in trained(model) if "lora_A" in n}

    attention = {f"attention.self.{name}" for name in ("query", "key", "value")} | {"attention.output.dense"}
    assert targets() == {"attention.self.query", "attention.self.value"}
    assert targets(targets="qkvo") == attention
    assert targets(targets="all-linear") == attention | {"intermediate.dense", "output.dense"}


def test_the_same_wi_gives_the_same_initial_values_whatever_was_built_before(tiny_model: Path) -> None:
    names = ["lora", "prefix", "adapter", "random", "full"]
    built: dict[str, list[dict[str, Tensor]]] = {name: [] for name in names}
    for order in (names, names[::-1]):
        for name in order:
            model = first(name, setting(tiny_model, wi=3), **SMALL.get(name, {}))
            head = head_of(model, ["classifier.weight", "classifier.bias"])
            built[name].append({k: v.detach().clone() for k, v in (trained(model) | head).items()})
    for a, b in built.values():
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    heads = [runs[0]["classifier.weight"] for runs in built.values()]
    assert all(head.equal(heads[0]) for head in heads)
    other = first("lora", setting(tiny_model, wi=4))
    assert not any(p.equal(built["lora"][0][n]) for n, p in trained(other).items() if "lora_A" in n)
    drawn = {n: p for n, p in trained(first("random", setting(tiny_model, wi=4))).items() if n.endswith("_sampled")}
    before = {n: p for n, p in built["random"][0].items() if n.endswith("_sampled")}
    assert drawn.keys() != before.keys() or not all(p.equal(before[n]) for n, p in drawn.items())


@pytest.mark.parametrize("pooler", [True, False])
def test_topk_trains_the_pooler_where_it_should(tiny_model: Path, pooler: bool) -> None:
    model = first("topk", setting(tiny_model), k=1, pooler=pooler)
    assert any("pooler" in name for name in trained(model)) == pooler


def test_mixout_mixes_the_matrices_of_the_blocks_alone(tiny_model: Path) -> None:
    model, around = method("mixout").stages()[0].prepare(setting(tiny_model))
    assert isinstance(around, Mixout)
    matrices = [p for name, p in model.named_parameters() if "encoder" in name and p.dim() == 2]
    assert {*map(id, around._parameters)} == {*map(id, matrices)}


@pytest.mark.parametrize("pet", ["lora", "prefix", "bitfit"])
@pytest.mark.parametrize("reserve", [False, True])
def test_eh_ft_restarts_from_the_pretrained_backbone_with_the_head(tiny_model: Path, pet: str, reserve: bool) -> None:
    where = setting(tiny_model)
    stages = method("eh-ft", pet=pet, reserve=reserve).stages()
    assert [stage.share for stage in stages] == pytest.approx([0.1, 0.9])
    where.model, _ = stages[0].prepare(where)
    with torch.no_grad():
        for p in trained(where.model).values():
            p.add_(torch.randn_like(p))
    head = {name: p.detach().clone() for name, p in head_of(where.model, where.head).items()}
    tuned = where.model(**BATCH).logits
    second, _ = stages[1].prepare(where)
    assert all(p.equal(head[name]) for name, p in head_of(second, where.head).items())
    if reserve:
        assert second(**BATCH).logits.equal(tuned)
        assert len(trained(second)) >= len(list(where.load().parameters()))
        return
    pretrained = where.load().state_dict()
    state = second.state_dict()
    assert state.keys() == pretrained.keys()  # no PET parameter is left
    assert all(state[name].equal(value) for name, value in pretrained.items() if name not in head)
    assert len(trained(second)) == len(list(second.parameters()))


@pytest.mark.parametrize("regime", ["layernorm", "bitfit", "ffn"])
def test_a_single_layer_keeps_nothing_below_it_for_backward(tiny_model: Path, regime: str) -> None:
    def kept(**options: Any) -> int:
        model, sizes = first(regime, setting(tiny_model), **options), []
        own = {p.data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(0 if tensor.data_ptr() in own else tensor.numel())
            return tensor

        layer = model.bert.encoder.layer  # type: ignore[union-attr]
        starts: list[int] = []
        layer[1].register_forward_pre_hook(lambda *_: starts.append(sum(sizes)))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**BATCH)
        return starts[0]

    assert kept(layers=[1]) == 0 and kept(layers=[0]) > 0


def test_mixout_is_its_formula_in_value_and_gradient() -> None:
    start = torch.randn(40, 30, dtype=torch.float64)
    w, p = nn.Parameter(start.clone()), 0.4
    mixout = Mixout([w], p)
    with torch.no_grad():
        w.add_(torch.randn_like(w))
    value, x = w.detach().clone(), torch.randn(30, dtype=torch.float64)
    mixout.before(seed=5)
    mixed = w.detach().clone()
    keep = (mixed - (value - p * start) / (1 - p)).abs() < 1e-12  # where m is 1
    m = keep.double()
    torch.testing.assert_close(mixed, ((1 - m) * start + m * value - p * start) / (1 - p))
    assert 0.5 < m.mean() < 0.7
    (w @ x).square().sum().backward()
    mixout.after()
    assert w.equal(value)
    leaf = value.clone().requires_grad_()
    ((((1 - m) * start + m * leaf - p * start) / (1 - p)) @ x).square().sum().backward()
    torch.testing.assert_close(w.grad, leaf.grad)
    mixout.before(seed=5)
    assert w.equal(mixed)
    mixout.after()
    mixout.before(seed=6)
    assert not w.equal(mixed)


@pytest.mark.parametrize("p", [0, 1])
def test_mixouts_limits(p: float) -> None:
    w = nn.Parameter(torch.randn(5, 4))
    start, mixout = w.detach().clone(), Mixout([w], p)
    with torch.no_grad():
        w.add_(1)
    value = w.detach().clone()
    mixout.before(0)
    assert w.equal(start if p else value)
    w.sum().backward()
    mixout.after()
    assert w.equal(value) and w.grad is not None and w.grad.equal(torch.full_like(w, 1 - p))


def test_child_tuning_keeps_the_share_with_the_largest_mean_square_gradient(tiny_model: Path) -> None:
    a, b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(20))
    slopes = [(torch.randn(6, 5), torch.randn(20)) for _ in range(3)]
    losses = [lambda s=s: (a * s[0]).sum() + (b * s[1]).sum() for s in slopes]
    masks = fisher_masks([a, b], losses, 0.3)
    fisher = torch.cat([sum(s[i] ** 2 for s in slopes).flatten() for i in (0, 1)])
    kept = torch.cat([masks[a].flatten(), masks[b]])
    assert kept.sum() == 15 and fisher[kept].min() > fisher[~kept].max()
    (a.sum() + b.sum()).backward()
    ChildTuning(masks).after()
    assert a.grad is not None and a.grad.equal(masks[a].float())
    model, around = method("child-tuning-d", share=0.25).stages()[0].prepare(setting(tiny_model))
    masks = around._masks  # type: ignore[union-attr]
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in masks} == {n for n in names.values() if ".encoder.layer." in n}
    sizes = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == round(0.25 * sizes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lorra", {}, "did you mean lora"),
        ("lora", {"rank": 8}, "no option 'rank'; it has r, alpha"),
        ("lora", {"r": 0}, "r is 0; accepted is an int from 1"),
        ("lora", {"targets": "qk"}, "accepted is qv, qkvo, all-linear"),
        ("layernorm", {"layers": []}, "a list of layers"),
        ("mixout", {"p": 1.5}, "a number from 0 to 1"),
        ("eh-ft", {"share": 1}, "between 0 and 1"),
        ("eh-ft", {"reserve": 1}, "true or false"),
        ("frozen", {"layers": [1]}, "it has pooler"),
    ],
)
def test_bad_names_and_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(name, **options)


def test_options_have_defaults_and_every_method_a_line_of_help() -> None:
    assert method("lora", r=4).options == {"r": 4, "alpha": 16, "dropout": 0.0, "targets": "qv"}
    assert all(text and "\n" not in text for text in METHODS.values())
