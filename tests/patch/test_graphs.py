"""patch(model, cuda_graphs=True): what is replayed is the plain run, over a recorder of CPU ops (tests/recorder.py)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels.patch import graphs

from . import models
from .graphed import FIRST, close, graphed, on_the_cpu, only, plain, steps  # noqa: F401 (a fixture)


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


def _waits_for_a_number(stack: nn.Module) -> bool:
    """transformers 5.17 draws for layerdrop, and looks at what it drew, also where nothing is ever dropped."""
    source = inspect.getsource(type(stack))
    return "dropout_probability = torch.rand" in source and "self.layerdrop > 0.0" not in source


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
        elif _waits_for_a_number(own.get_submodule(found.path)):
            assert found.plain == {FIRST: 1, "that no graph takes (called a synchronizing operation)": 2}
            continue
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


def test_a_second_derivative_is_refused() -> None:
    """Also of a sum, whose gradient needs none."""
    model, data = graphed(lengths=1, dropout=False), models.batch(S=8)
    model(**data)
    with pytest.raises(RuntimeError, match="Replay: backward with create_graph=True"):
        model(**data).logits.sum().backward(create_graph=True)
    assert only(model).replayed == 1


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
    "forward": lambda model: setattr(
        model.base_model.model.bert.encoder.layer[0].intermediate.intermediate_act_fn, "forward", torch.tanh
    ),
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
