"""Patched models in the set-ups people train in: stock's numbers, or bit-equal where only memory is traded."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import petune_kernels as pk

from . import models
from .models import Step, batch, build, step
from .test_families import quiet, worst
from .test_peft import lora

FAMILIES = ("bert", "llama")


def data(family: str, B: int = 4) -> dict[str, Any]:
    torch.manual_seed(1)
    return batch(family, B=B)


def make(family: str, what: str) -> nn.Module:
    if what.startswith("lora"):
        return lora(family, lora_dropout=0.1 if what == "lora p=.1" else 0.0)
    model = quiet(build(family, dropout=False))
    pk.tune(model, what)
    return model


def assert_same(ours: Step, own: Step, bound: float = 2e-4) -> None:
    error, name = worst(ours, own)
    assert error <= bound, (name, error)


def halves(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v[i : i + 2] for k, v in inputs.items()} for i in (0, 2)]


def grads(model: nn.Module) -> Step:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(torch.zeros(()), torch.zeros(()), found)


@pytest.mark.parametrize("what", ("full", "layernorm", "lora"))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_flop_counter_counts_what_stock_counts_and_what_runs_again(family: str, what: str) -> None:
    model, inputs = make(family, what), data(family)
    model.set_attn_implementation("eager")

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**inputs).loss.backward()
        return int(counter.get_total_flops())

    stock = flops()
    pk.patch(model)
    (B, S), config = inputs["input_ids"].shape, model.config
    scores = config.num_hidden_layers * 2 * B * S * S * config.hidden_size
    xa = sum(2 * B * S * m.numel() for n, m in model.named_parameters() if "lora_A" in n)
    assert stock + xa <= flops() <= stock + xa + 1.5 * scores  # the op gives dq, dk and dv together, where asked at all


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_and_clipping(family: str) -> None:
    results = []
    for patched in (False, True):
        model = make(family, "full")
        if patched:
            pk.patch(model)
        for part in halves(data(family)):
            (model(**part).loss / 2).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1, "nothing to clip"
        results.append(grads(model))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate(family: str) -> None:
    """Accumulation, clipping and the optimizer through accelerate, three steps."""
    from accelerate import Accelerator

    weights = []
    for patched in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make(family, "layernorm")
        if patched:
            pk.patch(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        for part in halves(data(family)) * 3:
            with accelerator.accumulate(model):
                accelerator.backward(model(**part).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, own in weights[0].items():
        torch.testing.assert_close(weights[1][name], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("what", ("full", "lora p=.1"))
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_draws_the_same_masks(family: str, what: str, reentrant: bool) -> None:
    """With dropout on, bit-equal to the run without recomputation; another seed shows that the masks matter."""
    model = make(family, what)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
        if isinstance(getattr(module, "attention_dropout", None), float):  # Llama's
            module.attention_dropout = 0.2
    pk.patch(model)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    calls: list[int] = []  # recomputation may stop before a forward ends, hence hooks before it
    for name, module in layers[0].named_children():
        if "norm" not in name:  # with a hook on it the layer would not be fused
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs, runs, counts = data(family), [], []
    for checkpointing, seed in ((False, 2), (True, 2), (True, 3)):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(seed)
        runs.append(step(model, inputs))
        counts.append(len(calls))
    assert counts[1] - counts[0] > counts[0], "with checkpointing a layer runs twice"
    plain, again, other = runs
    assert plain.grads.keys() == again.grads.keys()
    assert torch.equal(plain.loss, again.loss)
    assert all(torch.equal(g, again.grads[n]) for n, g in plain.grads.items())
    assert not torch.equal(again.loss, other.loss)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("what", ("layernorm", "full", "lora"))
def test_autocast_with_a_grad_scaler(what: str, dtype: torch.dtype) -> None:
    """The error against float32 without autocast is stock's, but for chance."""
    model, inputs = make("bert", what), data("bert")
    exact = step(model, inputs)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    errors = []
    for patched in (False, True):
        if patched:
            pk.patch(model)
        model.zero_grad()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        errors.append(worst(grads(model), exact)[0])
        scaler.step(optimizer)
        scaler.update()
    assert errors[1] <= 2 * errors[0] + 2 * torch.finfo(dtype).eps, errors


AUTOCASTS = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("weights,dtype", AUTOCASTS, ids=str)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_autocast_in_every_family(family: str, weights: torch.dtype, dtype: torch.dtype) -> None:
    """Rotary embeddings, norms of q and k, embeddings and residual sums leave dtypes that differ inside a layer.

    In a batch a ReLU may be on its edge, and one rounding opens it; not in each of three.
    """
    model = models.build(family, dropout=False).to(weights).train()
    wide, twin = copy.deepcopy(model).double(), copy.deepcopy(model)
    pk.patch(twin)

    def holds(seed: int) -> bool:
        torch.manual_seed(seed)
        inputs, errors = models.cast(models.batch(family), weights), []
        exact = step(wide, models.cast(inputs, torch.float64))
        for one in (model, twin):
            one.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = one(**inputs).loss
            loss.backward()
            errors.append(worst(grads(one), exact)[0])
        return errors[1] <= 2 * errors[0] + 2 * torch.finfo(dtype).eps

    assert any(map(holds, range(3)))


@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes_and_devices_after_patching(family: str) -> None:
    model, inputs = make(family, "full").eval(), data(family)
    with torch.no_grad():
        own = model(**inputs).logits
        pk.patch(model)
        for dtype, bound in ((torch.float16, 2e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-4)):
            logits = copy.deepcopy(model).to(dtype)(**inputs).logits
            assert logits.dtype == dtype
            torch.testing.assert_close(logits.float(), own, rtol=bound, atol=bound)
        assert model.half()(**inputs).logits.dtype == torch.float16


@pytest.mark.parametrize("copied_by", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_live_on_their_own(family: str, copied_by: Any) -> None:
    model, inputs = make(family, "layernorm"), data(family)
    own = step(model, inputs)
    pk.patch(model)
    twin = copied_by(model)
    assert_same(step(twin, inputs), own)
    pk.unpatch(twin)
    assert twin.config._attn_implementation == "sdpa" and model.config._attn_implementation == "petune"
    assert not any("forward" in m.__dict__ for m in twin.modules())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_same(step(model, inputs), own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickle_runs_in_another_process(family: str, tmp_path: Path) -> None:
    """One that has never patched: the attention that the model's config names is not known there yet."""
    model, inputs = make(family, "layernorm").eval(), data(family)
    pk.patch(model)
    inputs.pop("labels")
    with torch.no_grad():
        torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    read = "model, inputs, own = torch.load(sys.argv[1], weights_only=False); found = model(**inputs).logits; "
    code = f"import sys, torch; {read}torch.testing.assert_close(found, own)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_regimes_and_modes_switch_after_patching(family: str) -> None:
    model, twin, inputs = make(family, "layernorm"), make(family, "layernorm"), data(family)
    pk.patch(model)
    for regime in ("layernorm", "attention", "full", "frozen"):
        for m in (model, twin):
            pk.tune(m, regime)
            m.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits, rtol=1e-4, atol=1e-5)
        for m in (model, twin):
            m.train()
        assert_same(step(model, inputs), step(twin, inputs))


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("what", ("layernorm", "full", "lora", "lora p=.1"))
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_without_a_graph_break(family: str, what: str, padded: bool) -> None:
    model, inputs = make(family, what), data(family)
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    pk.patch(model)
    torch.manual_seed(4)
    own = step(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    torch.manual_seed(4)
    out = compiled(**inputs)
    out.loss.backward()
    torch.testing.assert_close(out.loss, own.loss)
    assert_same(grads(model), own)


def test_threads_share_a_model() -> None:
    """shared_input hands results from one projection to its siblings: not to another thread's."""
    model = make("bert", "full").eval()
    batches = [{k: v.roll(i, 0) for k, v in data("bert").items()} for i in range(4)]
    with torch.no_grad():
        own = [model(**b).logits for b in batches]
    pk.patch(model)
    wrong: list[int] = []

    def serve(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                if not torch.allclose(model(**batches[i]).logits, own[i], rtol=1e-4, atol=1e-5):
                    wrong.append(i)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(serve, range(4)))  # raises what a thread has raised
    assert not wrong


def test_models_of_one_config_object() -> None:
    """They share the choice of attention, as with set_attn_implementation; each gives its own numbers throughout."""
    first = make("bert", "full")
    second, inputs = copy.deepcopy(first), data("bert")
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    own = step(second, inputs)
    pk.patch(first)
    assert_same(step(second, inputs), own)
    pk.unpatch(first)
    assert_same(step(second, inputs), own)


def test_a_block_gets_its_input_by_the_name_that_the_layer_gives_it() -> None:
    model = build("llama").eval()
    inputs = batch("llama")

    def given() -> list[tuple[int, bool]]:
        seen: list[tuple[int, bool]] = []
        hook = model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((len(args), "hidden_states" in kwargs)), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        return seen

    stock = given()
    pk.patch(model)
    assert given() == stock


@pytest.mark.parametrize("family", ("llama", "bert"))
def test_patched_behind_a_forward_around_the_whole_model(family: str) -> None:
    model = build(family).eval()
    inputs = batch(family)
    own, before = model.forward, model(**inputs).logits
    model.forward = lambda **kwargs: own(**kwargs)  # accelerate's autocast is one
    assert any(e.pattern == "attention" for e in pk.patch(model).entries)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-4)


def test_forwards_replaced_inside_are_a_reason_and_no_crash() -> None:
    model = build("llama").eval()
    for layer in model.model.layers:
        layer.forward = layer.forward  # as accelerate's hooks on every module do
    report = pk.patch(model)
    assert any("replaced on instances" in reason for reason in report.refused.values())
