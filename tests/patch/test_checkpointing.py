"""transformers' own checkpointing of patched layers: what is kept, beside memory levels, offloading and threads."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import petune_kernels as pk
from petune_kernels.studies.measure import saved_bytes_of_model

from . import models
from .models import batch, build, step
from .test_families import quiet, worst
from .test_peft import lora


@pytest.mark.parametrize("memory", ("exact", "checkpoint"))
@pytest.mark.parametrize("family", ("llama", "gpt2", "vit", "bert"))
def test_transformers_own_checkpointing_keeps_no_more_than_stock(family: str, memory: str) -> None:
    model = build(family).train()
    inputs = batch(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stock = saved_bytes_of_model(model, inputs)
    pk.patch(model, memory=memory)
    assert saved_bytes_of_model(model, inputs) <= 1.1 * stock


def test_threads_share_a_checkpointed_model() -> None:
    model = build("llama").train()
    inputs = batch("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pk.patch(model)
    barrier = threading.Barrier(2)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: barrier.wait(10))  # both inside the layer at once
    with ThreadPoolExecutor(2) as threads:
        assert len(list(threads.map(lambda _: model(**inputs), range(2)))) == 2  # or raises what a thread has raised


def test_a_layer_that_checkpoints_in_a_way_of_its_own_keeps_it() -> None:
    model, data = quiet(build("llama")).train(), batch("llama") | {"use_cache": False}
    kind = type(model.model.layers[0])

    class Own(nn.Module):
        gradient_checkpointing = False

        def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            z = hidden_states + h
            y = self.post_attention_layernorm(z)
            if self.gradient_checkpointing and self.training:
                return z + self._gradient_checkpointing_func(self.mlp, y)
            return z + self.mlp(y)

    for layer in model.modules():
        if type(layer) is kind:
            layer.__class__ = Own
    own = step(model, data)
    assert "pre_norm" in {entry.pattern for entry in pk.patch(model).entries}
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda f, *args: torch.utils.checkpoint.checkpoint(
            f, *args, use_reentrant=False
        )
    assert worst(step(model, data), own)[0] < 1e-4


@pytest.mark.parametrize("adapted", (False, True))
def test_a_compiled_layer_that_is_checkpointed_is_one_graph(adapted: bool) -> None:
    model = lora("llama", target_modules="all-linear") if adapted else quiet(build("llama")).train()
    data = batch("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():  # PEFT's, which asks for gradients of the embeddings' output
        module._forward_hooks.clear()
    own = step(model, data)
    pk.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(**data, use_cache=False)
    out.loss.backward()
    assert (out.logits - own.logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_layers_that_a_user_checkpoints_and_compiles_are_one_graph(family: str) -> None:
    model = quiet(build(family)).train()
    inner: Any = model.bert.encoder if family == "bert" else model.model
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    more = {} if family == "bert" else {"position_embeddings": inner.rotary_emb(x, torch.arange(5)[None])}

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in inner.layer if family == "bert" else inner.layers:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, **more)
            x = y[0] if isinstance(y, tuple) else y
        return x

    own = run(x)
    pk.patch(model)
    torch._dynamo.reset()
    ours = torch.compile(run, backend="aot_eager", fullgraph=True)(x.requires_grad_())
    assert (ours - own).abs().max() < 1e-4
    ours.sum().backward()


@pytest.mark.parametrize("regime", ["layernorm", "full"])
@pytest.mark.parametrize("level", ["exact", "recompute"])
def test_transformers_checkpointing_under_hooks_on_saved_tensors(level: str, regime: str) -> None:
    """Offloaded activations, which come back in backward as other tensors."""
    data = models.batch()

    def gradients(level: str | None) -> list[torch.Tensor]:
        model = models.build("bert", dropout=False).train()
        pk.tune(model, regime)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if level:
            pk.patch(model, memory=level)
        with torch.autograd.graph.save_on_cpu():
            loss = model(**data).loss
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(level), gradients(None), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("regime", ["layernorm", "full"])
def test_transformers_checkpointing_leaves_no_row_beside_its_own(regime: str) -> None:
    """What is alive between forward and backward, also what no hook on saved tensors sees."""
    model = models.build("bert", dropout=False, num_hidden_layers=6).train()
    pk.tune(model, regime)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    data, row = models.batch(B=4, S=32), 4 * 32 * 48 * 4

    def alive() -> int:
        model(**data).loss.backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            loss = model(**data).loss
        loss.backward()
        return sum(event.self_cpu_memory_usage for event in seen.events())

    stock = alive()
    pk.patch(model)
    assert alive() < stock + row


def test_a_frame_given_one_tensor_twice_gets_one_tensor_again() -> None:
    """MobileBERT's query and key read one tensor, which hooks on saved tensors give back as another."""
    config = transformers.AutoConfig.for_model(
        "mobilebert", vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        embedding_size=24, intra_bottleneck_size=24, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).train()
    pk.tune(model, "full")
    pk.patch(model, memory="recompute")
    with torch.autograd.graph.save_on_cpu():
        loss = model(input_ids=torch.arange(6, 24).view(2, 9), labels=torch.tensor([0, 1])).loss
    loss.backward()


@pytest.mark.parametrize(
    "family, level, checkpointed", [("bert", "exact", True), ("bert", "recompute", False), ("llama", "exact", True)]
)
def test_threads_train_what_runs_again_in_backward(family: str, level: str, checkpointed: bool) -> None:
    model, data = models.build(family, dropout=False).train(), models.batch(family)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pk.patch(model, memory=level)
    steps: list[int] = []

    def work(thread: int) -> None:
        for _ in range(10):
            model(**data).loss.backward()
            steps.append(thread)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(work, range(3)))  # raises what a thread has raised
    finally:
        sys.setswitchinterval(interval)
    assert sorted(steps) == [0] * 10 + [1] * 10 + [2] * 10
