"""The memory dial: every level gives the gradients of the level above it, and keeps what it says."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import petune_kernels as pk
from petune_kernels.patch import PatchError, memory
from petune_kernels.patch.memory import LEVELS
from petune_kernels.studies.measure import saved_bytes, saved_bytes_per_token_per_layer

from .models import FAMILIES, batch, build, cast, step
from .test_families import pooled, tune

REGIMES = ("full", "layernorm", "layernorm-ffn", "bitfit", "layernorm of layer 1", "lora-qv", "lora-all")
FAMILY = (
    "bert", "roberta", "electra", "distilbert", "modernbert", "gpt2", "llama", "qwen3", "gemma", "t5 gated", "bart",
)  # fmt: skip
CASES = [
    (f, r) for f in FAMILY for r in REGIMES
    if r not in FAMILIES[f].unfit and not (f == "gpt2" and "lora" in r)
]  # fmt: skip
SEED = 5


def prepare(model: nn.Module, regime: str, **lora: Any) -> nn.Module:
    """The model in training mode with what the regime trains."""
    if not regime.startswith("lora"):
        tune(model, regime)
        return model.train()
    from peft import LoraConfig, get_peft_model

    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear and "classif" not in n and "score" not in n]
    wanted = linears if regime == "lora-all" else [n for n in linears if n.split(".")[-1][0] in "qvW"]
    dtype = next(model.parameters()).dtype
    torch.manual_seed(3)
    given: dict[str, Any] = dict(task_type="SEQ_CLS", r=4, lora_dropout=0.1, init_lora_weights=False) | lora
    return get_peft_model(model, LoraConfig(target_modules=wanted, **given)).to(dtype).train()


def at(model: nn.Module, level: str | None, data: dict[str, Any]) -> Any:
    """One step at a level, dropout drawn from the same seed."""
    if level is not None:
        pk.patch(model, memory=level)
    torch.manual_seed(SEED)
    return step(model, data)


@pytest.mark.parametrize(("family", "regime"), CASES)
def test_every_level_gives_the_same_gradients(family: str, regime: str) -> None:
    """In float64, dropout on: to rounding. The generator stands where it stood, whatever ran again in backward."""
    torch.manual_seed(1)
    model, data = prepare(build(family, torch.float64), regime), batch(family)
    exact = at(model, "exact", data)
    drawn = torch.get_rng_state()
    for level in LEVELS[1:]:
        if level == "coded" and family in ("gpt2", "bart"):  # no feed-forward block that a pattern knows
            with pytest.raises(PatchError, match="has no activation"):
                pk.patch(model, memory=level)
            continue
        one = at(model, level, data)
        assert torch.equal(drawn, torch.get_rng_state())
        torch.testing.assert_close(one.loss, exact.loss, rtol=1e-13, atol=0)
        assert one.grads.keys() == exact.grads.keys()
        assert pooled(one, exact) < 1e-13, level
    pk.unpatch(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("regime", [r for r in REGIMES if r != "layernorm of layer 1"])
def test_gradients_against_stock(regime: str) -> None:
    """In float64 with dropout off, every level gives stock's gradients to 1e-13."""
    torch.manual_seed(1)
    model, data = prepare(build("bert", torch.float64, dropout=False), regime, lora_dropout=0.0), batch()
    stock = at(model, None, data)
    for level in LEVELS:
        assert pooled(at(model, level, data), stock) < 1e-13


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("family", "regime"), [("bert", r) for r in REGIMES] + [("llama", "lora-all")])
def test_bfloat16_is_no_worse_than_stock(family: str, regime: str, level: str) -> None:
    """The error of all gradients together against float64, over a few inputs, is at most 1.1 times stock's."""
    model = prepare(build(family, dropout=False, hidden_size=96, intermediate_size=192), regime, lora_dropout=0.0)
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        data = batch(family, B=8, S=16)
        exact = step(copy.deepcopy(model).double(), cast(data, torch.float64))
        narrow = copy.deepcopy(model).bfloat16()
        stock = at(narrow, None, data)
        ours = at(narrow, level, data)
        ratios.append(pooled(ours, exact) / pooled(stock, exact))
    assert sorted(ratios)[1] <= 1.1, ratios


def kept(model: nn.Module, data: dict[str, Any], apart: list[torch.Tensor], level: str | None = None) -> int:
    if level is not None:
        pk.patch(model, memory=level)
    return saved_bytes(lambda: model(**data).loss, apart)


def per_token(family: str, regime: str, level: str | None, H: int = 64, **changes: Any) -> float:
    """Saved bytes per token and hidden unit of one layer in bfloat16, dropout on, no padding."""

    def make(layers: int) -> nn.Module:
        shape = dict(hidden_size=H, intermediate_size=4 * H, num_hidden_layers=layers) | changes
        model = prepare(build(family, torch.bfloat16, **shape), regime)
        if level is not None:
            pk.patch(model, memory=level)
        return model

    data = {"input_ids": torch.randint(6, 97, (4, 32)), "labels": torch.arange(4) % 3}
    return saved_bytes_per_token_per_layer(make, data) / H


FLOOR = {  # q, k, v 6; attention's output 2; the rows of both norms 4; u 8, or a code of 4
    "layernorm": dict(exact=18, coded=14, recompute=4, checkpoint=2),
    "bitfit": dict(exact=18, coded=14, recompute=4, checkpoint=2),
    "lora-qv": dict(exact=18, coded=14, recompute=4, checkpoint=2),
    "lora-all": dict(exact=20, coded=20, recompute=6, checkpoint=2),
    "full": dict(exact=20, coded=20, recompute=6, checkpoint=2),
}


@pytest.mark.parametrize("regime", FLOOR)
def test_bytes_of_a_layer(regime: str) -> None:
    """rstd of two rows and seeds are all there is besides: under a tenth of a byte at width 768, here up to 0.2."""
    for level, floor in FLOOR[regime].items():
        assert floor <= per_token("bert", regime, level) <= floor + 0.2, level


@pytest.mark.parametrize("regime", ("layernorm", "lora-all", "full"))
def test_bytes_of_a_decoder_layer(regime: str) -> None:
    """z before each norm 4, q, k, v 6, gate and up 2 * 2 * 4; with grouped heads k and v once; o where it is needed."""
    o = 0 if regime == "layernorm" else 2
    heads = dict(num_key_value_heads=4)
    for level, floor in dict(exact=26 + o, recompute=4 + o, checkpoint=2).items():
        assert floor <= per_token("llama", regime, level, **heads) <= floor + 0.2, level
    assert per_token("llama", regime, "exact", num_key_value_heads=2) <= 24 + o + 0.2


def test_padding_costs_nothing_per_layer() -> None:
    for level in LEVELS:
        model = prepare(build("bert", torch.bfloat16), "layernorm")
        pk.patch(model, memory=level)
        data = batch(B=4, S=32)
        whole = {k: v for k, v in data.items() if k != "attention_mask"}
        apart = [*model.parameters(), *model.buffers(), *data.values()]
        padded, full = (kept(model, d, apart) for d in (data, whole))
        assert padded - full <= 2 * 4 * 32 * 2, level  # one mask [B, 1, 1, S], and its like, for all layers


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reentrant", (False, True))
def test_inside_activation_checkpointing(level: str, reentrant: bool) -> None:
    model, data = prepare(build("bert", torch.float64), "lora-all"), batch()
    plain = at(model, level, data)
    model.base_model.model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    if reentrant:
        model.enable_input_require_grads()
    again = at(model, level, data)
    assert {n for n in again.grads if "embeddings" not in n} == plain.grads.keys()
    assert all((again.grads[n] - g).norm() <= 1e-12 * g.norm() + 1e-15 for n, g in plain.grads.items())


@pytest.mark.parametrize("level", LEVELS[1:])
def test_autocast_and_two_backwards(level: str) -> None:
    """What runs again does so under the autocast of the forward; a graph that is kept gives its gradients twice."""
    model, data = prepare(build("bert"), "lora-all"), batch()
    results = {}
    for name in ("exact", level):
        pk.patch(model, memory=name)
        torch.manual_seed(SEED)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**data).loss
        loss.backward(retain_graph=True)
        once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        loss.backward()
        assert all(torch.equal(p.grad, 2 * once[n]) for n, p in model.named_parameters() if p.grad is not None)
        results[name] = once
    size = sum(g.square().sum() for g in results["exact"].values())
    off = sum((g - results[level][n]).square().sum() for n, g in results["exact"].items())
    assert off <= (0.02**2) * size


def test_levels_follow_one_another_and_come_off() -> None:
    model, data = prepare(build("bert", torch.bfloat16), "layernorm"), batch()
    bytes_at = {}
    for level in (*LEVELS, "exact", "checkpoint"):
        assert pk.patch(model, memory=level).memory == level
        bytes_at.setdefault(level, []).append(kept(model, data, list(model.parameters())))
    assert bytes_at["exact"][0] == bytes_at["exact"][1] and bytes_at["checkpoint"][0] == bytes_at["checkpoint"][1]
    assert bytes_at["exact"] > bytes_at["coded"] > bytes_at["recompute"] > bytes_at["checkpoint"]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    ours, theirs = (at(m, None, data) for m in (model, twin))
    assert torch.equal(ours.loss, theirs.loss) and all(torch.equal(g, theirs.grads[n]) for n, g in ours.grads.items())
    first = twin.bert.encoder.layer[0]
    assert first.__dict__["forward"].args[0] is first
    pk.unpatch(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_bad_levels() -> None:
    model = build("bert")
    with pytest.raises(ValueError, match="memory is 'low'; accepted are exact, coded, recompute, checkpoint"):
        pk.patch(model, memory="low")
    norms = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    pk.patch(norms)
    before = [m.__dict__["forward"] for m in norms]
    for level in ("coded", "recompute", "checkpoint"):
        with pytest.raises(PatchError, match=f"memory is '{level}', and this Sequential has no"):
            pk.patch(norms, memory=level)
        assert all(m.__dict__["forward"] is f for m, f in zip(norms, before, strict=True))


def test_a_filled_cache_is_read_and_an_empty_one_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Prefix tuning gives every layer keys and values of its own: nothing runs again. Llama's cache stays empty."""
    from peft import PrefixTuningConfig, get_peft_model

    def prefixed() -> nn.Module:
        torch.manual_seed(3)
        config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        return get_peft_model(build("bert", torch.float64), config).double().train()

    data = batch()
    results = [at(prefixed(), level, data) for level in LEVELS]
    for one in results[1:]:
        assert pooled(one, results[0]) < 1e-13
    model, data = prepare(build("llama"), "layernorm"), batch("llama")
    pk.patch(model, memory="recompute")
    with caplog.at_level(logging.WARNING):
        assert model(**data).past_key_values.get_seq_length() == 0
    model.eval()
    assert model(**data).past_key_values.get_seq_length() == data["input_ids"].shape[1]


@pytest.mark.parametrize("name", ("past_key_values", "cache"))
def test_an_empty_cache_is_left_out_under_either_name(name: str) -> None:
    from transformers import DynamicCache

    layer = build("llama").model.layers[0].train()
    empty, full = DynamicCache(), DynamicCache()
    full.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    assert memory._without_cache(layer, {name: empty, "use_cache": True}) == {name: None, "use_cache": False}
    assert memory._without_cache(layer, {name: full}) == {name: full}
    assert memory._without_cache(layer.eval(), {name: empty}) == {name: empty}


def test_a_model_that_does_something_else_the_second_time_is_told() -> None:
    model, data = prepare(build("bert"), "layernorm"), batch()
    pk.patch(model, memory="recompute")
    loss = model(**data).loss
    for block in model.modules():
        if block.__dict__.get("forward") and type(block).__name__ == "BertIntermediate":
            block.intermediate_act_fn.approximate = "not known"  # from now on torch's own runs
    with pytest.raises(RuntimeError, match="took another path than in forward"):
        loss.backward()


def test_a_tensor_changed_in_place_is_kept_as_it_is() -> None:
    norm, dense = nn.LayerNorm(8), nn.Linear(8, 4)
    model = nn.ModuleList([norm, dense]).double()
    pk.patch(model)
    x = torch.randn(5, 8, dtype=torch.float64)
    y = norm(x)
    y.data.mul_(2)  # not seen by autograd
    y = y.add_(1)
    dense(y).sum().backward()
    expected = torch.ones(5, 4, dtype=torch.float64).T @ y
    torch.testing.assert_close(dense.weight.grad, expected)


@pytest.mark.parametrize("level", ("recompute", "checkpoint"))
def test_torchs_own_attention_runs_again(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, where PyTorch's attention stays, taken here: nothing of it is kept, and dropout is the same."""
    from petune_kernels.ops import attention

    monkeypatch.setattr(attention, "_native", lambda q: True)
    model, data = prepare(build("bert", torch.float64), "lora-all"), batch()
    exact = at(model, "exact", data)
    one = at(model, level, data)
    assert pooled(one, exact) < 1e-13
    exact_bytes, bytes_ = (kept(model, data, list(model.parameters()), name) for name in ("exact", level))
    assert bytes_ < 0.7 * exact_bytes


@pytest.mark.parametrize("level", LEVELS)
def test_hooks_see_what_is_kept(level: str) -> None:
    """Everything goes through save_for_backward: with hooks that move tensors away and back, nothing else is needed."""
    model, data = prepare(build("bert", torch.float64), "lora-qv"), batch()
    plain = at(model, level, data)
    torch.manual_seed(SEED)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        loss = model(**data).loss
    loss.backward()
    for name, g in plain.grads.items():
        assert (model.get_parameter(name).grad - g).norm() <= 1e-13 * g.norm()


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_hooks_move_fewer_bytes_at_a_lower_level(family: str) -> None:
    """A frame's input is packed once for each op that needs it, not for each tensor that is made from it."""
    model, data = prepare(build(family), "layernorm"), batch(family, B=4, S=32)
    moved = dict.fromkeys(("exact", *LEVELS[2:]), 0)
    for level in moved:

        def pack(t: torch.Tensor, level: str = level) -> torch.Tensor:
            moved[level] += 0 if isinstance(t, nn.Parameter) else t.nbytes
            return t

        pk.patch(model, memory=level)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**data)
    assert moved["recompute"] < 0.8 * moved["exact"] and moved["checkpoint"] < moved["exact"], moved


def test_checkpoint_of_one_part() -> None:
    """torch's checkpoint around a piece of a patched model, as users write it."""
    model, data = prepare(build("bert", torch.float64), "layernorm"), batch()
    pk.patch(model, memory="recompute")
    layer = model.bert.encoder.layer[1]
    plain = at(model, None, data)
    own = layer.__dict__["forward"] if "forward" in layer.__dict__ else None
    assert own is None
    inner = type(layer).forward
    layer.forward = lambda *a, **k: checkpoint(lambda *b: inner(layer, *b, **k), *a, use_reentrant=False)
    again = at(model, None, data)
    del layer.forward
    for n, g in plain.grads.items():  # a checkpoint keeps the layer's input, a frame makes it again from a norm's row
        torch.testing.assert_close(g, again.grads[n], rtol=1e-10, atol=1e-12)
