"""Regime random: single scalars train, all others stay bit-identical, and nothing else in a model's life changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from regime_families import FAMILIES, SHAPE, Plain, build
from sampled_helpers import BLOCKS, fit, gradients, machinery, masks, weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from petune_kernels.regimes import sampled, tune
from petune_kernels.regimes.sampled import draw


@pytest.fixture(params=["product", "columns"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a linear's sampled gradient comes about: cut out of dW', or summed from columns alone."""
    if request.param == "columns":
        monkeypatch.setattr(sampled, "_FEW", 1)
    return request.param


@pytest.mark.parametrize(("total", "count"), [(1, 1), (10, 10), (1000, 1), (1000, 400), (1000, 501), (1000, 999)])
def test_draw_has_no_repeats_and_stays_in_range(total: int, count: int) -> None:
    numbers = draw(total, count, 0)
    assert numbers.dtype == torch.int64 and len(numbers) == count
    assert bool((numbers.diff() > 0).all()) and int(numbers[0]) >= 0 and int(numbers[-1]) < total


def test_draw_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = draw(85_054_464, 36_864, 7)
    torch.manual_seed(6)
    assert torch.equal(first, draw(85_054_464, 36_864, 7))
    assert not torch.equal(first, draw(85_054_464, 36_864, 8))
    assert draw(1000, 5, 0).tolist() == [87, 120, 455, 619, 891]  # the same on every machine and release


@pytest.mark.parametrize("count", [3, 8])
def test_draw_is_uniform(count: int) -> None:
    """Over 4,000 seeds each of 10 numbers comes up count/10 of the time, within 4.5 standard deviations."""
    hits = torch.zeros(10)
    for seed in range(4000):
        hits[draw(10, count, seed)] += 1
    p = count / 10
    assert float((hits / 4000 - p).abs().max()) < 4.5 * (p * (1 - p) / 4000) ** 0.5


@pytest.mark.parametrize("count", [1, 5_000, 5_001, 9_999])
def test_draw_draws_little(monkeypatch, count: int) -> None:
    """Near the total, drawing until nothing repeats would take about total rounds for the last number."""
    drawn = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda high, size, **kw: drawn.append(size[0]) or randint(high, size, **kw))
    assert len(draw(10_000, count, 0)) == count
    assert len(drawn) < 30 and sum(drawn) < 10_000


def test_no_copy_of_the_weight(small_bert, batch) -> None:
    model = small_bert()
    tune(model, "random", fraction=0.3)
    dense = model.bert.encoder.layer[0].output.dense
    home = dense.weight
    seen = []
    dense.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    model(**batch)
    assert seen[0] is not home and seen[0].requires_grad and seen[0].data_ptr() == home.data_ptr()
    assert dense.weight is home


def test_budget_fraction_and_seed(small_bert) -> None:
    model = small_bert()
    report = tune(model, "random")
    assert report.count == tune(model, "layernorm").count == 128
    assert report.trainable == 128 + 34
    pool = sum(p.numel() for n, p in model.named_parameters() if n.startswith(BLOCKS))
    assert tune(model, "random", budget=77).count == 77
    assert tune(model, "random", fraction=0.25).count == round(0.25 * pool)
    assert tune(model, "random", fraction=1e-9).count == 1
    assert tune(model, "random", fraction=1).count == pool == sum(int(m.sum()) for m in masks(model).values())
    report = tune(model, "random", layers=[1])
    assert report.count == 64 and report.per_layer == (0, 64)
    assert all(n.startswith(BLOCKS + "1.") and n.endswith("_sampled") for n in report.names)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {*report.names, *report.head_names}
    picks = []
    for seed in (1, 1, 2):
        tune(model, "random", seed=seed)
        picks.append({n: m.nonzero().tolist() for n, m in masks(model).items()})
    assert picks[0] == picks[1] != picks[2]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.1),
    "all-parameters": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_sampled_scalars_train(small_bert, batch, way: str, name: str) -> None:
    model = small_bert()
    before = weights(model)
    report = tune(model, "random", budget=300, seed=4)
    where = masks(model)
    given = [p for p in model.parameters() if p.requires_grad or name == "all-parameters"]
    optimizer = OPTIMIZERS[name](given)
    fit(model, optimizer, batch)
    after = weights(model)
    assert after.keys() == before.keys()
    assert sum(int(m.sum()) for m in where.values()) == 300
    for n, old in before.items():
        if n.startswith("classifier"):
            assert not torch.equal(after[n], old)
            continue
        changed = after[n] != old
        assert torch.equal(changed, where.get(n, torch.zeros_like(changed))), n
    sizes = sorted(p.numel() for p in optimizer.state)
    assert sum(sizes) == report.trainable == 334


def test_training_equals_masked_training(small_bert, batch, way: str) -> None:
    """SGD on the samples is SGD on the whole weights with all other gradients set to zero."""
    model, twin = small_bert(), small_bert()
    tune(model, "random", budget=300)
    tune(twin, "full")
    where = masks(model)
    names = {*where, "classifier.weight", "classifier.bias"}
    for n, p in twin.named_parameters():
        p.requires_grad_(n in names)
        if n in where:
            p.register_hook(lambda g, m=where[n]: g * m)
    for m in (model, twin):
        fit(m, torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9), batch, 5)
    got, wanted = weights(model), weights(twin)
    for n in wanted:
        exact = {"rtol": 0, "atol": 0} if way == "product" else {}
        torch.testing.assert_close(got[n], wanted[n], **exact, msg=n)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, op: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **kwargs or {})
        self.seen |= {t.shape for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, Tensor)}
        return made


@pytest.mark.parametrize("few", [True, False])
def test_few_samples_need_no_gradient_of_the_weight_and_not_all_of_its_input(
    small_bert, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    model = small_bert(hidden_size=64, intermediate_size=96)
    tune(model, "random", budget=60, train_head=False)
    dense = model.bert.encoder.layer[1].output.dense  # [64, 96]
    n, x, kept = len(dense.weight_sampled), torch.randn(50, 96), list[int]()
    assert 0 < n * sampled._FEW <= dense.weight.numel()
    if not few:
        monkeypatch.setattr(sampled, "_FEW", 10**9)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = dense(x)
    with Shapes() as made:
        y.square().sum().backward()
    # besides y, which square() keeps
    assert (x.numel() not in kept and 50 * n in kept) == few and (dense.weight.shape not in made.seen) == few
    assert dense.weight_sampled.grad.shape == (n,)


def test_gradients_of_16_bit_samples_are_summed_in_float32() -> None:
    x, dy = (torch.tensor(rows).bfloat16()[:, None] for rows in ([1 + 2**-7, 1 + 2**-6], [1 + 2**-7, -1.0]))
    values = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    y = sampled._Gather.apply(torch.zeros_like(x), x, torch.tensor([0]), values)
    assert torch.autograd.grad(y, values, dy)[0].item() == 2**-14  # the products differ by it


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_gathered_from_the_full_ones(name: str, way: str) -> None:
    """In every family, so that no family reads a weight where the samples cannot reach."""
    torch.manual_seed(0)
    model = build(name, "cpu").double().eval()
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    else:
        ids = torch.randint(5, SHAPE["vocab_size"], (2, 6))
        ids[:, -1] = model.config.eos_token_id
        inputs = {"input_ids": ids}

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).logits.pow(2).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    tune(model, "full")
    full = run()
    logits = model(**inputs).logits
    tune(model, "random", fraction=0.3, train_head=False)
    assert torch.equal(model(**inputs).logits, logits)
    got = run()
    where = masks(model)
    assert where and {n for n, p in model.named_parameters() if p.requires_grad} == {n + "_sampled" for n in where}
    for n, mask in where.items():
        if n in full:  # T5's decoder and Phi's padding aside, every weight takes part
            torch.testing.assert_close(got[n + "_sampled"], full[n][mask], msg=n)
        else:
            assert n + "_sampled" not in got
    assert len(got) > 0.8 * len(where)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(small_bert, batch, reentrant: bool, way: str) -> None:
    model = small_bert().train()
    tune(model, "random", fraction=0.3)
    wanted = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model, batch)
    assert got.keys() == wanted.keys() and any(n.endswith("_sampled") for n in got)
    for n in wanted:
        assert torch.equal(got[n], wanted[n]), n
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)


def test_two_forwards_before_one_backward(small_bert, batch, way: str) -> None:
    model = small_bert().eval()
    tune(model, "random", fraction=0.3)
    once = gradients(model, batch)
    model.zero_grad()
    (model(**batch).loss + model(**batch).loss).backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * once[n])


def test_a_step_between_forward_and_backward_raises(small_bert, batch, way: str) -> None:
    model = small_bert()
    tune(model, "random", fraction=0.3, train_head=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch).loss.backward()
    loss = model(**batch).loss
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_right_or_refused(small_bert, batch, way: str) -> None:
    model = small_bert()
    tune(model, "random", fraction=0.3, train_head=False)
    if way == "columns":
        with pytest.raises(RuntimeError, match="Gather: backward with create_graph=True"):
            model(**batch).logits.sum().backward(create_graph=True)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(model(**batch).logits.sum(), trained, create_graph=True)
        assert all(g.requires_grad for g in grads)


def test_shared_weights_share_their_samples() -> None:
    model = Plain().eval()
    first, second = model.encoder.layers
    second.linear1.weight = first.linear1.weight
    x = torch.randn(3, 2, 16)

    def run() -> None:
        model.zero_grad()
        model.out(model.encoder(x)).pow(2).sum().backward()

    tune(model, "full")
    run()
    wanted = first.linear1.weight.grad.clone()
    tune(model, "random", fraction=0.5)
    assert first.linear1.weight_sampled is second.linear1.weight_sampled
    run()
    torch.testing.assert_close(first.linear1.weight_sampled.grad, wanted.take(first.linear1.weight_sampled_index))


def test_multihead_attention_reads_out_proj_without_calling_it() -> None:
    model = Plain()
    x = torch.randn(3, 2, 16)
    tune(model, "full")
    for training in (True, False):
        model.train(training)
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        for layer in model.encoder.layers:
            layer.self_attn.dropout = 0.0
        tune(model, "full")
        model.zero_grad()
        model.out(model.encoder(x)).pow(2).sum().backward()
        projections = [layer.self_attn.out_proj for layer in model.encoder.layers]
        wanted = [p.weight.grad.clone() for p in projections]
        tune(model, "random", fraction=0.5)
        model.out(model.encoder(x)).pow(2).sum().backward()
        for p, full in zip(projections, wanted, strict=True):
            torch.testing.assert_close(p.weight_sampled.grad, full.take(p.weight_sampled_index))


def test_eval_without_grad_sees_the_trained_values(small_bert, batch, way: str) -> None:
    model = small_bert()
    tune(model, "random", fraction=0.3)
    fit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), batch, 2)
    plain = copy.deepcopy(model)
    tune(plain, "full")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(**batch).logits, plain(**batch).logits)
    fit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), batch, 1)


def test_deterministic_algorithms_and_other_layouts(small_bert, batch, way: str) -> None:
    model = small_bert()
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight.data = dense.weight.data.t().contiguous().t()
    before = weights(model)
    tune(model, "random", fraction=0.3)
    where = masks(model)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        fit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), batch, 3)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
    assert not dense.weight.is_contiguous()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(model.state_dict()[name] != before[name], where[name])


def test_dtype_moves_and_autocast(small_bert, batch, way: str) -> None:
    model = small_bert().eval()
    tune(model, "random", fraction=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    model.to(torch.bfloat16)
    got = gradients(model, batch)
    assert all(g.dtype == torch.bfloat16 for g in got.values())
    assert sum(n.endswith("_sampled") for n in got) == len(masks(model))


def test_data_parallel_is_refused(small_bert, batch) -> None:
    model = small_bert()
    tune(model, "random")
    for m in model.modules():
        m._is_replica = True  # as nn.DataParallel marks its copies
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        model(**batch)


def test_meta_model_is_refused() -> None:
    with pytest.raises(ValueError, match="meta device"):
        tune(build("bert"), "random")


def test_taken_name_is_refused(small_bert) -> None:
    model = small_bert()
    model.bert.encoder.layer[0].output.dense.weight_sampled = 1
    tune(model, "ffn")
    with pytest.raises(ValueError, match="bert.encoder.layer.0.output.dense.weight"):
        tune(model, "random", fraction=1)
    assert machinery(model) == [] and model.bert.encoder.layer[0].output.dense.weight.requires_grad


@pytest.mark.slow
def test_compiled_training_equals_eager_training(small_bert, batch, way: str) -> None:
    models = [small_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) for _ in range(2)]
    for model, run in zip(
        models, (models[0], torch.compile(models[1], backend="aot_eager", fullgraph=True)), strict=True
    ):
        tune(model, "random", fraction=0.3)
        fit(run, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), batch, 3)
    eager, compiled = map(weights, models)
    start = small_bert().state_dict()
    for n, mask in masks(models[0]).items():
        torch.testing.assert_close(compiled[n], eager[n], msg=n)
        assert torch.equal(compiled[n] != start[n], mask), n
