"""A part that backward runs again is what it was in forward, or backward says what is not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForSequenceClassification

import petune_kernels as pk

from .models import BASE, batch, build
from .test_families import quiet

LEVELS = ("recompute", "checkpoint")
Gradients = dict[str, torch.Tensor]


def gradients(model: nn.Module) -> Gradients:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def functional_call(model: nn.Module, data: dict[str, Any]) -> Gradients:
    lent = {n: (p.detach() * 1.5).requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, lent, (), data).loss.backward()
    return {n: p.grad for n, p in lent.items() if p.grad is not None}


def values(model: nn.Module) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if n.endswith((".value", ".v_proj"))]


def a_hook_in_forward(model: nn.Module, data: dict[str, Any]) -> Gradients:
    hooks = [m.register_forward_hook(lambda m, a, o: o * 1.5) for m in values(model)]
    loss = model(**data).loss
    for hook in hooks:
        hook.remove()
    loss.backward()
    return gradients(model)


def a_hook_on_all_modules(model: nn.Module, data: dict[str, Any]) -> Gradients:
    listened = values(model)
    hook = nn.modules.module.register_module_forward_hook(lambda m, a, o: o * 1.5 if m in listened else None)
    loss = model(**data).loss
    hook.remove()
    loss.backward()
    return gradients(model)


def a_hook_before_backward(model: nn.Module, data: dict[str, Any]) -> Gradients:
    loss = model(**data).loss
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, a, o: o * 1.5)
    loss.backward()
    return gradients(model)


def another_module(model: nn.Module, data: dict[str, Any]) -> Gradients:
    loss = model(**data).loss
    named = dict(model.named_parameters())
    for module in list(model.modules()):
        for name in ("value", "v_proj"):
            if hasattr(module, name):
                setattr(module, name, nn.Linear(48, 48))
    loss.backward()
    return {n: p.grad for n, p in named.items() if p.grad is not None}


def a_step_in_backward(model: nn.Module, data: dict[str, Any]) -> Gradients:
    def step(p: torch.Tensor) -> None:
        seen[names[p]] = p.grad.clone()
        with torch.no_grad():
            p.sub_(p.grad)

    seen: Gradients = {}
    names = {p: n for n, p in model.named_parameters()}
    for p in filter(operator.attrgetter("requires_grad"), names):
        p.register_post_accumulate_grad_hook(step)
    model(**data).loss.backward()
    return seen


def backward_hooks_on_all_modules(model: nn.Module, data: dict[str, Any]) -> Gradients:
    """Under which every module gets a tensor of its own, so that no two projections share x."""
    hook = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        model(**data).loss.backward()
    finally:
        hook.remove()
    return gradients(model)


def checkpoints_inside(model: nn.Module, data: dict[str, Any]) -> Gradients:
    for module in model.modules():
        if type(module).__name__ in ("BertIntermediate", "LlamaMLP", "BartAttention"):
            own = module.forward
            module.forward = lambda *a, own=own, **k: checkpoint(own, *a, use_reentrant=False, **k)
    model(**data).loss.backward()
    return gradients(model)


def linears_compiled_one_by_one(model: nn.Module, data: dict[str, Any]) -> Gradients:
    torch._dynamo.reset()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.compile(backend="eager")
    model(**data).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("family", "regime"),
    [
        ("bert", "full"),
        ("llama", "full"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("bert", "bitfit"), ("bart", "full"), ("bart", "bitfit"))
        ),
    ],
)
@pytest.mark.parametrize(
    "work",
    (
        functional_call, a_hook_in_forward, a_hook_on_all_modules, a_hook_before_backward, another_module,
        a_step_in_backward, backward_hooks_on_all_modules, checkpoints_inside, linears_compiled_one_by_one,
    ),
)  # fmt: skip
def test_what_was_lent_for_a_forward_is_there_again(
    work: Callable[..., Gradients], family: str, regime: str, level: str
) -> None:
    found = []
    for patched in (False, True):
        model = quiet(build(family, torch.float64)).train()
        if regime == "bitfit":
            pk.tune(model, regime)
        if patched:
            pk.patch(model, memory=level)
        torch.manual_seed(0)
        found.append(work(model, batch(family)))
    stock, ours = found
    assert stock.keys() == ours.keys()
    for n, g in stock.items():
        torch.testing.assert_close(ours[n], g, rtol=1e-9, atol=1e-12, msg=n)


def scaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def disabled(model: Any) -> None:
    for module in model.modules():
        if "_disable_adapters" in vars(module):
            module.enable_adapters(False)


def other_rates(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.3


@torch.no_grad()
def stepped(model: nn.Module) -> None:
    """Stock's graph needs no bias."""
    for name, p in model.named_parameters():
        if name.endswith("query.base_layer.bias"):
            p.add_(1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.set_adapter("other"), "an adapter was chosen, disabled, merged or scaled"),
        (lambda model: model.merge_adapter(), "an adapter was chosen, disabled, merged or scaled"),
        (disabled, "an adapter was chosen, disabled, merged or scaled"),
        (scaled, "an adapter was chosen, disabled, merged or scaled"),
        (other_rates, "a dropout's rate or another number was changed"),
        (stepped, r"a parameter of shape \[\d+\] was changed in place"),
        (lambda model: model.eval(), r"train\(\) or eval\(\) was called"),
    ],
)
def test_what_cannot_be_had_again_raises(change: Callable[[Any], None], message: str, level: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = dict(r=4, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(build("bert"), LoraConfig(**config)).train()
    model.add_adapter("other", LoraConfig(**config))
    pk.patch(model, memory=level)
    loss = model(**batch()).loss
    change(model)
    with pytest.raises(
        RuntimeError, match=message + " between forward and backward; backward runs .* again, which was"
    ):
        loss.backward()


def test_what_is_there_again_is_gone_after_it() -> None:
    model = build("bert").train()
    pk.patch(model, memory="checkpoint")
    before = {m: {n: dict(v) for n, v in vars(m).items() if isinstance(v, dict)} for m in model.modules()}
    functional_call(model, batch())
    a_hook_in_forward(model, batch())
    assert all(vars(m)[n] == v for m, held in before.items() for n, v in held.items() if n != "_parameters")
    assert all(v is vars(m)["_parameters"][n] for m, held in before.items() for n, v in held["_parameters"].items())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_rows_with_adapters_of_their_own(family: str, level: str) -> None:
    """Which PEFT tells its layers by hooks that are gone after forward."""
    from peft import LoraConfig, get_peft_model

    config: Any = dict(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(quiet(build(family, torch.float64)), LoraConfig(**config)).eval()  # PEFT insists
    model.add_adapter("other", LoraConfig(**config))
    model.double().requires_grad_(True)
    data = batch(family) | {"adapter_names": ["default", "other", "__base__"]}
    found = []
    for patched in (False, True):
        if patched:
            pk.patch(model, memory=level)
        model.zero_grad()
        model(**data).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, rtol=1e-9, atol=1e-12, msg=n)


@pytest.mark.parametrize("level", LEVELS)
def test_a_child_that_is_compiled_by_itself(level: str) -> None:
    """torch.compile's wrapper of a module holds no mode of its own."""
    model, data = build("bert", dropout=False).train(), batch()
    model(**data).loss.backward()
    own = gradients(model)
    model.zero_grad()
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense = torch.compile(layer.intermediate.dense, backend="eager")
    pk.patch(model, memory=level)
    model(**data).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, own[name.replace("._orig_mod", "")], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_hook_lends_for_a_forward_is_given_back(level: str) -> None:
    """The second run ends in the middle, past hooks that put back what others lent: regime random's weights."""
    config = AutoConfig.for_model("roberta-prelayernorm", **BASE)
    model = AutoModelForSequenceClassification.from_config(config).train()
    pk.tune(model, "random", fraction=0.3)
    pk.patch(model, memory=level)
    held = {name: dict(m._parameters) for name, m in model.named_modules()}
    model(input_ids=batch()["input_ids"]).logits.sum().backward()
    for name, module in model.named_modules():
        assert all(module._parameters[k] is p for k, p in held[name].items()), name


@pytest.mark.parametrize("level", LEVELS)
def test_a_buffer_that_is_lent_for_a_forward(level: str) -> None:
    model, data = build("bert", dropout=False).train(), batch()
    norm = model.bert.encoder.layer[0].attention.output.LayerNorm
    norm.register_buffer("factor", torch.ones(48))
    norm.register_forward_hook(lambda m, args, out: out * m.factor)

    def lent() -> Gradients:
        model.zero_grad()
        with_it = {"bert.encoder.layer.0.attention.output.LayerNorm.factor": torch.full((48,), 1.5)}
        torch.func.functional_call(model, with_it, (), data).loss.backward()
        return gradients(model)

    own = lent()
    pk.patch(model, memory=level)
    for name, grad in lent().items():
        torch.testing.assert_close(grad, own[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_a_number_of_a_module_with_children(level: str) -> None:
    model = build("llama").train()
    pk.patch(model, memory=level)
    loss = model(**batch("llama")).loss
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(RuntimeError, match="another number was changed"):
        loss.backward()
