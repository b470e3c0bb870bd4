"""patch(model, cuda_graphs=True): what runs plainly, what is refused, and a model's life with graphs."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.flop_counter import FlopCounterMode

import petune_kernels as pk
from petune_kernels.patch import graphs

from . import models
from .graphed import FIRST, close, graphed, on_the_cpu, only, plain, steps  # noqa: F401 (a fixture)


def test_evaluation_and_calls_without_gradients_run_plainly() -> None:
    model, data = graphed(lengths=1, dropout=False), models.batch(S=8)
    with torch.no_grad():
        model(**data)
    model.eval()
    model(**data)
    assert only(model).plain == {"without gradients": 1, "in evaluation": 1} and not only(model).captured


def test_recorded_outputs() -> None:
    """output_hidden_states makes transformers hook every layer, for good; only while it records is there no graph."""
    model, data = graphed(lengths=1, dropout=False), models.batch(S=8)
    model(**data)
    assert len(model(**data, output_hidden_states=True).hidden_states) == 3
    reason = "with hooks on modules inside, which no graph calls"
    assert only(model).plain == {FIRST: 1, reason: 1}
    for _ in range(2):
        model(**data)
    assert only(model).replayed == 2
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: None)
    model(**data)
    assert only(model).plain[reason] == 2


@pytest.mark.parametrize("watched", (lambda: FlopCounterMode(display=False), save_on_cpu), ids=("mode", "hooks"))
def test_who_watches_ops_or_saved_tensors_sees_them(watched: Callable[[], AbstractContextManager[Any]]) -> None:
    model, data = graphed(lengths=1, dropout=False), models.batch(S=8)
    model(**data)
    with watched():
        model(**data).loss.backward()
    assert only(model).plain == {FIRST: 1, "under a dispatch mode or hooks on saved tensors": 1}
    assert not only(model).captured


def test_hooks_on_parameters_and_on_the_stack_run_once() -> None:
    model, data, seen = graphed(lengths=1), models.batch(S=8), list[str]()
    model.bert.encoder.register_forward_hook(lambda *_: seen.append("forward"))
    p = model.bert.encoder.layer[0].output.LayerNorm.weight
    p.register_hook(lambda g: seen.append("gradient"))
    p.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    for _ in range(3):
        model(**data).loss.backward()
        assert seen == ["forward", "gradient", "accumulated"]
        seen.clear()
    assert only(model).replayed == 2


def test_another_backend_is_another_graph() -> None:
    model, data = graphed(lengths=1, dropout=False), models.batch(S=8)
    for name in ("cpu", "reference"):
        with pk.backend(name):
            model(**data)
            model(**data)
    assert only(model).captured == 2


def test_autocast_on_and_off() -> None:
    """In turn: each is a graph of its own."""
    data, found = models.batch(S=8), []
    for lengths in (1, False):
        model, rows = (graphed(lengths=1, dropout=False) if lengths else plain(dropout=False)), []
        for i in range(6):
            with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 0):
                rows.append(models.step(model, data))
        found.append(rows)
        assert not lengths or (only(model).captured, only(model).replayed) == (2, 4)
    for i, (own, other) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(own.loss, other.loss, rtol=1e-5 if i % 2 else 0.02, atol=1e-5)
        for name, grad in own.grads.items():
            tol = dict(rtol=1e-4, atol=1e-5) if i % 2 else dict(rtol=0.05, atol=0.02)
            torch.testing.assert_close(grad, other.grads[name], **tol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ("bert", "deberta-v2"))
def test_autocast_while_weights_train(family: str) -> None:
    """A cast of a weight that was made while capturing is made again at every replay."""
    found = []
    for lengths in (1, False):
        model = models.build(family, dropout=False).train()
        pk.patch(model, cuda_graphs=lengths)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), list[float]()
        torch.manual_seed(1)
        data = models.batch(family, S=8)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**data).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=0.02) and abs(found[1][0] - found[1][-1]) > 0.1


def test_outputs_that_nobody_used() -> None:
    """DeBERTa's stack gives every hidden state: a gradient of an earlier step is not left in one."""
    found = []
    for lengths in (1, False):
        model = models.build("deberta-v2", dropout=False).train()
        pk.patch(model, cuda_graphs=lengths)
        torch.manual_seed(1)
        data = models.batch("deberta-v2", S=8)
        for used in (-1, 1, -1, 1):
            model.zero_grad()
            model(**data, output_hidden_states=True).hidden_states[used].square().sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert not lengths or only(model).replayed == 3
    for own, other in zip(found[:4], found[4:], strict=True):
        for name in own.keys() | other.keys():
            a, b = (g.get(name, torch.zeros(())) for g in (own, other))  # one graph for all: zeros in place of nothing
            torch.testing.assert_close(a, b.expand_as(a), rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_what_was_there_stays() -> None:
    """Capturing moves neither gradients nor buffers nor generators; see also the generator's test above."""
    model, data = graphed(lengths=1), models.batch(S=8)
    model.bert.encoder.layer[0].register_buffer("count", torch.zeros(()))
    own = type(model.bert.encoder.layer[0]).forward

    def counting(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(layer, "count"):
            layer.count.add_(1)
        return own(layer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.bert.encoder.layer[0]), "forward", counting)
        for step in range(1, 4):
            model(**data)
            assert model.bert.encoder.layer[0].count == step
    assert only(model).replayed == 2 and all(p.grad is None for p in model.parameters())


def test_lengths_without_a_mask_stay() -> None:
    """A full batch has no mask to hide padding behind; a padded one is another shape of the bucket."""
    model = graphed(lengths=16, dropout=False)
    full = models.batch(S=9)
    full["attention_mask"] = torch.ones_like(full["attention_mask"])
    for _ in range(2):
        model(**full)
        model(**models.batch(S=9))
    assert [k[1] is None for k in only(model)._graphs] == [True, False]
    assert only(model).captured == 2


def test_buckets_end_where_positions_do() -> None:
    model = graphed("gpt2", None, lengths=48, use_cache=False)
    data = [models.batch("gpt2", S=60)] * 2
    for a, b in zip(steps(model, data), steps(plain("gpt2", None, use_cache=False), data), strict=True):
        assert a.loss.isfinite() and b.loss.isfinite()
    assert only(model).replayed == 1  # 96 has no position embeddings; 64 does


def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    model = graphed(lengths=1, dropout=False)
    for S in (5, 6, 7, 5):
        for _ in range(2):
            model(**models.batch(S=S))
    found = only(model)
    assert found.captured == 4 and found.replayed == 4
    assert sum(not isinstance(g, str) for g in found._graphs.values()) == 2
    for S in range(4, 50):
        model(**models.batch(B=S, S=5))
    assert len(found._graphs) <= 32


def test_toggling_copying_and_unpatching() -> None:
    model, data = graphed(lengths=1), models.batch(S=8)
    for _ in range(2):
        model(**data)
    found, keys = only(model), list(model.state_dict())
    assert found.bytes > 0
    assert only(model) is found and pk.patch(model, cuda_graphs=1).graphs["bert.encoder"] is found
    again = pickle.loads(pickle.dumps(model))
    for other in (copy.deepcopy(model), again):
        assert only(other) is not found and not only(other).bytes and only(other).lengths == 1
        for _ in range(2):
            other(**data)
        assert only(other).replayed == 1 and found.replayed == 1
        pk.unpatch(other)
    torch.save(model.state_dict(), io.BytesIO())
    assert pk.patch(model, cuda_graphs=[8, 16]).graphs["bert.encoder"] is not found
    report = pk.patch(model, memory="coded", cuda_graphs=[8, 16])
    assert "CUDA graphs of bert.encoder: 0 of 0.0 MiB together, 0 calls replayed" in str(report)
    assert not pk.patch(model).graphs and "forward" not in model.bert.encoder.__dict__
    pk.patch(model, cuda_graphs=True)
    pk.unpatch(model)
    assert not any("forward" in m.__dict__ or graphs.bound(m) for m in model.modules())
    assert list(model.state_dict()) == keys
    with pk.patched(model, cuda_graphs=True) as inside:
        assert list(inside.graphs) == ["bert.encoder"]
    assert not graphs.of(model)


def test_unpatch_between_call_and_backward() -> None:
    model, data = graphed(lengths=1, dropout=False), models.batch(S=8)
    model(**data)
    loss = model(**data).loss
    pk.unpatch(model)
    gc.collect()
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, grad in models.step(plain(dropout=False), data).grads.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5)


def test_a_failed_capture_says_so() -> None:
    model, data = graphed(lengths=1), models.batch(S=8)
    model(**data)

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("operation not permitted when stream is capturing")

    model.bert.encoder.layer[0].forward = fail
    with pytest.raises(ValueError):
        model(**data)
    with pytest.raises(RuntimeError, match=r"bert.encoder cannot be captured with hidden_states \(3, 8, .*not perm"):
        model(**data)


class Coming(nn.Linear):
    """Its second parameter takes part in every other call, or from call `since` on."""

    calls, since = 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = super().forward(x)
        return y + self.extra if (self.calls >= self.since if self.since else self.calls % 2) else y


@pytest.mark.parametrize("since", (0, 6))
def test_gradients_that_come_and_go(since: int) -> None:
    """Seen while warming up the layers run plainly; seen in the capture itself it is an error."""
    model, data = graphed(lengths=1, dropout=False), models.batch(S=8)
    dense = model.bert.encoder.layer[0].output.dense
    dense.__class__, dense.since, dense.extra = Coming, since, nn.Parameter(torch.ones(48))
    model(**data)
    if since:
        with pytest.raises(RuntimeError, match="cannot be captured with .* whose gradients come and go"):
            model(**data)
        return
    model(**data).loss.backward()
    assert only(model).plain["whose gradients come and go"] == 1 and not only(model).captured


def test_a_varying_number_is_not_captured_each_time() -> None:
    model = graphed(lengths=1)
    for i in range(4):
        model(**models.batch(S=8), num_items_in_batch=i)
    assert only(model).plain == {FIRST: 4} and not only(model).captured


def test_inside_torch_compile() -> None:
    model = graphed(lengths=1, dropout=False)
    step = torch.compile(model, backend="eager")
    torch.testing.assert_close(step(**models.batch(S=8)).loss.isfinite(), torch.tensor(True))
    assert not only(model).plain and not only(model).replayed


@pytest.mark.parametrize("level", ("recompute", "checkpoint"))
def test_levels_that_set_the_generator_back_are_refused(level: str) -> None:
    model = models.build("bert")
    with pytest.raises(ValueError, match=f"cuda_graphs is True and memory '{level}'; accepted with it are exact"):
        pk.patch(model, memory=level, cuda_graphs=True)
    _untouched(model)


@pytest.mark.parametrize("value", ("yes", 2.5, [8, "x"], None))
def test_wrong_types(value: Any) -> None:
    model = models.build("bert")
    with pytest.raises(TypeError, match="patch: cuda_graphs is .*; accepted are True, False, a number"):
        pk.patch(model, cuda_graphs=value)
    _untouched(model)


@pytest.mark.parametrize("value", (-1, 0, [], [0, 8]))
def test_wrong_lengths(value: Any) -> None:
    with pytest.raises(ValueError, match="patch: cuda_graphs is .*; accepted are lengths of at least 1"):
        pk.patch(models.build("bert"), cuda_graphs=value)


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = models.build("bert")
    with pytest.raises(pk.PatchError, match="cuda_graphs is True, and bert.*is on cpu; accepted is a model on"):
        pk.patch(model, cuda_graphs=True)
    _untouched(model)
    pk.patch(model)
    with pytest.raises(pk.PatchError, match="is on cpu"):
        pk.patch(model, cuda_graphs=True)
    assert models.step(model.train(), models.batch()).loss.isfinite()


def test_needs_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with pytest.raises(pk.PatchError, match="no stack of layers is seen in this Sequential"):
        pk.patch(model, cuda_graphs=True)
    _untouched(model)


def _untouched(model: nn.Module) -> None:
    assert not any("forward" in m.__dict__ or graphs.bound(m) for m in model.modules())
    assert getattr(getattr(model, "config", None), "_attn_implementation_internal", None) in (None, "sdpa")


@pytest.mark.parametrize("where", ("module", "config"))
def test_layerdrop_runs_plainly(where: str) -> None:
    """transformers draws on the host which layers to leave out: a graph would leave out the same for ever."""
    model, data = graphed("bart", dropout=False), models.batch("bart")
    named = [m for m in model.modules() if "layerdrop" in vars(m)]
    assert named
    if where == "module":
        for module in named:
            module.layerdrop = 0.05
    else:
        model.config.encoder_layerdrop = 0.05
    for _ in range(3):
        model(**data)
    for found in graphs.of(model).values():
        assert not found.captured and any("layerdrop" in reason for reason in found.plain)
