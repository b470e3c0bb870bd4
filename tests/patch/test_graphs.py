"""patch(model, cuda_graphs=True): everything but CUDA itself, over a recorder of CPU ops (tests/recorder.py)."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels import cuda_graph
from petune_kernels.patch import graphs

from ..recorder import Recorder
from . import models

FIRST = "of a shape for the first time"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)


def graphed(family: str = "bert", regime: str | None = "layernorm", lengths: Any = True, **more: Any) -> nn.Module:
    model = models.build(family, **more).train()
    if regime is not None:
        pk.tune(model, regime)
    pk.patch(model, cuda_graphs=lengths)
    return model


def plain(family: str = "bert", regime: str | None = "layernorm", **more: Any) -> nn.Module:
    model = models.build(family, **more).train()
    if regime is not None:
        pk.tune(model, regime)
    pk.patch(model)
    return model


def only(model: nn.Module) -> graphs.Graphs:
    (found,) = graphs.of(model).values()
    return found


def close(a: models.Step, b: models.Step) -> None:
    torch.testing.assert_close(a.loss, b.loss)
    assert a.grads.keys() == b.grads.keys()
    for name, grad in a.grads.items():
        torch.testing.assert_close(grad, b.grads[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def steps(model: nn.Module, batches: list[dict[str, Any]], seed: int = 7) -> list[models.Step]:
    found = []
    for i, data in enumerate(batches):
        torch.manual_seed(seed + i)
        found.append(models.step(model, data))
    return found


@pytest.mark.parametrize("regime", ("layernorm", "bitfit", "full", "frozen"))
def test_steps_are_those_of_the_plain_run(regime: str) -> None:
    """With dropout: the same generator gives the same masks. Lengths differ within and between buckets of 8."""
    batches = [models.batch(S=S) for S in (9, 9, 12, 10, 5, 6, 16, 9, 12)]
    model = graphed(regime=regime, lengths=8, dropout=False)
    for a, b in zip(steps(model, batches), steps(plain(regime=regime, dropout=False), batches), strict=True):
        close(a, b)
    found = only(model)
    assert (found.captured, found.replayed) == (2, 7) and found.plain == {FIRST: 2}


def test_dropout_is_fresh_and_seeded() -> None:
    data = [models.batch(S=8)] * 4
    ours, theirs = steps(graphed(lengths=1), data), steps(plain(), data)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    assert len({float(s.loss) for s in ours}) == 4


def test_generator_stands_where_the_plain_run_leaves_it() -> None:
    data = models.batch(S=8)
    left = []
    for model in (graphed(lengths=1), plain()):
        torch.manual_seed(0)
        for _ in range(3):
            models.step(model, data)
        left.append(torch.get_rng_state())
    assert torch.equal(*left)


EXACT = ("vit", "deberta.encoder", "esm.encoder", "transformer.decoder", "model.decoder#bart")
"""Stacks whose lengths are not padded: no mask, a convolution over tokens, tables of positions given as an argument."""


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family(family: str) -> None:
    """Replayed with the plain run's numbers, or refused for a reason."""
    head = "sequence" if family in ("gpt2", "opt", "opt post-norm", "llama", "mistral", "qwen3", "gemma") else None
    data = [models.batch(family, S=8)] * 3
    own = models.build(family, dropout=False, head=head, use_cache=False).train()
    pk.tune(own, "full")
    try:
        pk.patch(own, cuda_graphs=True)
    except pk.PatchError as error:
        assert family in ("albert", "mpnet") and "no stack of layers is seen" in str(error)
        return
    other = models.build(family, dropout=False, head=head, use_cache=False).train()
    pk.patch(other)
    for a, b in zip(steps(own, data), steps(other, data), strict=True):
        close(a, b)
    for found in graphs.of(own).values():
        if family == "esm":
            assert found.plain == {"whose position_embeddings is a tuple": 3}
        else:
            assert found.replayed == 2 and found.plain == {FIRST: 1}
        assert bool(found.exact) == (f"{found.path}#{family}" in EXACT or found.path in EXACT), found.exact


@pytest.mark.parametrize("set_to_none", (True, False))
def test_micro_batches_add_up(set_to_none: bool) -> None:
    """A gradient that autograd keeps is not what the next replay writes."""
    sums = []
    for model in (graphed(lengths=1, dropout=False), plain(dropout=False)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            for _ in range(3):
                model(**models.batch(S=8)).loss.backward()
            sums.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    for own, other in zip(sums[:3], sums[3:], strict=True):
        assert own.keys() == other.keys()
        for name in own:
            torch.testing.assert_close(own[name], other[name], rtol=1e-4, atol=1e-5)


def test_two_calls_before_a_backward() -> None:
    """A siamese step: the second call would overwrite what the first one's backward reads."""
    found = []
    for model in (graphed(lengths=1, dropout=False), plain(dropout=False)):
        torch.manual_seed(1)
        for _ in range(3):
            first, second = (model(**models.batch(S=8)) for _ in range(2))
            (first.loss + (first.logits - second.logits).square().mean()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        if graphs.of(model):
            reason = "while an earlier call waits for its backward"
            assert only(model).replayed == 3 and only(model).plain == {FIRST: 1, reason: 2}
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-5)


def test_a_call_without_backward_blocks_nothing() -> None:
    model, data = graphed(lengths=1), models.batch(S=8)
    for _ in range(4):
        model(**data)
    assert only(model).replayed == 3


def test_a_second_backward_raises() -> None:
    model, data = graphed(lengths=1), models.batch(S=8)
    model(**data)
    loss = model(**data).loss
    loss.backward(retain_graph=True)
    model(**data).loss.backward()
    with pytest.raises(RuntimeError, match="cuda_graphs: a second backward through the same call of bert.encoder"):
        loss.backward()


def test_results_are_the_caller_s() -> None:
    model = graphed(lengths=1, regime="full")
    model(**models.batch(S=8))
    first = model.bert(**{k: v for k, v in models.batch(S=8).items() if k != "labels"}).last_hidden_state
    kept = first.detach().clone()
    first.sum().backward()
    grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**models.batch(S=8)).loss.backward()
    assert only(model).replayed == 2
    assert torch.equal(first, kept) and all(torch.equal(*pair) for pair in grads.values())


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["classifier"], init_lora_weights=False)
    config.modules_to_save = ["classifier"]
    model = get_peft_model(model, config).train()
    model.base_model.model.bert.embeddings.LayerNorm.weight.requires_grad_()  # trains also without an adapter
    return model


def _replace(model: Any) -> None:
    layer = model.base_model.model.bert.encoder.layer[0].output.LayerNorm
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)


def _same_memory(model: Any) -> None:
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None and p.requires_grad:
                m._parameters[name] = nn.Parameter(p.data)


def _add_adapter(model: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(4)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    model.set_adapter("b")


def _scale(model: Any) -> None:
    for m in model.modules():
        if hasattr(m, "scaling") and isinstance(m.scaling, dict):
            m.scaling = {name: 3.0 for name in m.scaling}


CHANGES: dict[str, Any] = {
    "parameter": _replace,
    "moved": lambda model: model.double().float(),
    "data": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
    "adapter": _add_adapter,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "scaling": _scale,
    "frozen": lambda model: [p.requires_grad_("lora_B" in n) for n, p in model.named_parameters() if "lora_" in n],
    "same memory": _same_memory,
    "mode": lambda model: model.base_model.model.bert.encoder.layer[0].eval(),
    "rate": lambda model: [setattr(m, "p", 0.5) for m in model.modules() if isinstance(m, nn.Dropout)],
    "module": lambda model: model.base_model.model.bert.encoder.layer.pop(1),
    "attention": lambda model: setattr(model.config, "_attn_implementation_internal", "eager"),
    "hook": lambda model: model.base_model.model.bert.encoder.layer[0].register_forward_hook(lambda m, a, out: 2 * out),
    "checkpointing": lambda model: model.gradient_checkpointing_enable(dict(use_reentrant=False)),
}  # fmt: skip


SAME = ("moved", "data", "same memory", "frozen", "merged", "checkpointing")
"""Changes that leave the loss as it was."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_not_replayed_as_it_was(name: str) -> None:
    """After each change the steps are those of a model that has no graphs, and the graph of before is gone."""
    data, found = [models.batch(S=8)] * 3, []
    if name == "attention":  # without a mask, whose form is the attention function's
        data[0]["attention_mask"] = torch.ones_like(data[0]["attention_mask"])
    for cuda_graphs in (1, False):
        model = lora(models.build("bert"))
        pk.patch(model, cuda_graphs=cuda_graphs)
        before = steps(model, data)
        CHANGES[name](model)
        found.append((before, steps(model, data)))
        if cuda_graphs and name not in ("hook", "checkpointing"):
            assert only(model).captured == 2 and only(model).replayed == 4
        elif cuda_graphs:
            assert only(model).captured == 1 and only(model).replayed == 2 and len(only(model).plain) == 2
    for own, other in zip(*found, strict=True):
        for a, b in zip(own, other, strict=True):
            close(a, b)
    assert abs(float(found[1][0][0].loss - found[1][1][0].loss)) > 1e-6 or name in SAME


def test_distributed_data_parallel(tmp_path: Any) -> None:
    """Its hooks sit on the parameters, which get their gradients from autograd as ever. One process stands for more."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        data = [models.batch(S=8)] * 3
        model = graphed(lengths=1, dropout=False)
        wrapped, seen = nn.parallel.DistributedDataParallel(model), list[int]()

        def halved(_, bucket):  # DDP reads annotations
            seen.append(bucket.buffer().numel())
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer() / 2)
            return done

        wrapped.register_comm_hook(None, halved)
        for own, other in zip(steps(wrapped, data), steps(plain(dropout=False), data), strict=True):
            assert len(own.grads) == len(other.grads)
            for name, grad in own.grads.items():
                torch.testing.assert_close(2 * grad, other.grads[name.removeprefix("module.")], rtol=1e-4, atol=1e-5)
        assert only(model).replayed == 2 and seen
    finally:
        dist.destroy_process_group()


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
