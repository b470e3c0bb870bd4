"""On the meta device patch binds what it binds elsewhere, and refuses what it refuses elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels.meta import Values

from .models import FAMILIES, batch, build


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_is_that_of_the_real_model(family: str) -> None:
    real = build(family)
    empty = copy.deepcopy(real).to("meta")
    found, wanted = pk.patch(empty), pk.patch(real)
    assert found.patched == wanted.patched and found.parts == wanted.parts
    assert found.left_alone.keys() == wanted.left_alone.keys()


def test_a_large_layer_is_verified_around_stand_ins() -> None:
    from transformers import LlamaConfig, LlamaModel

    with torch.device("meta"):  # 200 million parameters a layer
        model = LlamaModel(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, vocab_size=99))
    found = pk.patch(model)
    assert {path: p for path, p in found.patched.items() if path.startswith("layers.") and path.count(".") == 1} == {
        "layers.0": "pre_norm",
        "layers.1": "pre_norm",
    }


def test_large_blocks_are_read_by_their_shapes() -> None:
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig(num_hidden_layers=1))
    real = ViTModel(ViTConfig(num_hidden_layers=1))
    assert pk.patch(model).patched == pk.patch(real).patched
    model(pixel_values=torch.empty(1, 3, 224, 224, device="meta"))


def test_a_look_alike_is_left_alone_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    class Other(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) + 0.1 * hidden_states

    real = build("llama")
    for layer in real.model.layers:
        layer.__class__ = Other
    empty = copy.deepcopy(real).to("meta")
    for model in (real, empty):
        refused = pk.patch(model).left_alone["model.layers.0"]
        assert "pre_norm: its forward differs from the fused one" in refused


def test_a_model_decides_by_values_on_the_meta_device_what_it_decides_elsewhere() -> None:
    values, seen = Values(), []
    model = build("llama").to("meta")
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    for data in (batch("llama"), {k: torch.ones_like(v) for k, v in batch("llama").items()}):
        with values:
            model(input_ids=data["input_ids"].to("meta"), attention_mask=data["attention_mask"].to("meta"))
    assert seen[0].shape == (3, 1, 9, 9) and seen[1] is None


def test_values_follow_the_ops() -> None:
    with Values():
        x = torch.arange(6).to("meta").view(2, 3)
        y = x[:, 1:] * 2
        x[0, 0] = 5
        assert int(x.sum()) == 20 and bool((y >= 2).all()) and x.is_meta
        assert x.nonzero().shape == (6, 2)
        x += 1
        assert y.tolist() == [[2, 4], [8, 10]]
        noise = torch.rand(3, device="meta")
        with pytest.raises(RuntimeError, match="meta tensors"):
            noise.sum().item()
        x.copy_(torch.zeros(2, 3, device="meta").normal_())
        with pytest.raises(RuntimeError, match="meta tensors"):
            x.sum().item()
    state = torch.get_rng_state()
    with Values():
        torch.randint(5, (3,), device="meta")
        nn.init.normal_(torch.empty(3, device="meta"))
    assert torch.equal(state, torch.get_rng_state())
