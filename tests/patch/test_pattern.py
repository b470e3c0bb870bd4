"""What a pattern takes for its own, and what only looks like it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import petune_kernels as pk
from petune_kernels.patch import pattern

from .models import batch, build, cast, step


class Lookalike(nn.Module):
    """Holds what a BERT tail holds, in another order of work."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(24, 16), nn.LayerNorm(16), nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states))) + input_tensor


class OtherSignature(Lookalike):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.LayerNorm(self.dense(hidden_states[..., :3] @ mask))


class OneInput(Lookalike):
    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return self.LayerNorm(self.dropout(self.dense(hidden_states)))


def test_lookalikes_are_left_alone_and_say_why() -> None:
    model = nn.ModuleDict({"swapped": Lookalike(), "other": OtherSignature(), "one": OneInput()})
    report = pk.patch(model)
    assert {p: n for p, n in report.patched.items() if n in ("norm", "post_norm_tail")} == {
        "swapped.LayerNorm": "norm",  # their norms still are norms
        "other.LayerNorm": "norm",
        "one.LayerNorm": "norm",
    }
    assert "differs from the fused one" in report.refused["swapped"]
    assert "does not take this pattern's input" in report.refused["other"]
    with pytest.raises(pk.PatchError, match="strict=True and 2 candidates.*swapped"):
        pk.patch(copy.deepcopy(pk_unpatched(model)), strict=True)


def pk_unpatched(model: nn.Module) -> nn.Module:
    pk.unpatch(model)
    return model


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("family", ("gemma", "llama", "gpt2", "vit", "modernbert", "t5 gated", "bart"))
def test_what_a_block_adds_is_seen_however_little_it_is(family: str, dtype: torch.dtype) -> None:
    """Weights of .02 at width 48: a block adds thousandths to its residual, which 16 bits hardly show. A norm that is
    read wrongly (Gemma's 1 + weight) or a gate taken for the other half would hide there."""
    model = build(family, dtype, dropout=False, initializer_range=0.02, init_std=0.02).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(0.02 / p.float().std().clamp_min(1e-6))
    data, wide = cast(batch(family), dtype), copy.deepcopy(model).double()
    exact, own = step(wide, cast(data, torch.float64)), step(model, data)
    pk.patch(model)
    ours = step(model, data)
    norms = {n: g.norm().clamp_min(1e-12) for n, g in exact.grads.items()}
    for name, size in norms.items():
        off, stock = ((run.grads[name].double() - exact.grads[name]).norm() / size for run in (ours, own))
        if stock < 0.3:  # a gradient that is no rounding
            assert off <= 2 * stock + 8 * torch.finfo(dtype).eps, (name, off, stock)


class ParallelLayer(GradientCheckpointingLayer):
    """Llama's layer but for one thing: its feed-forward block reads what its attention reads, and adds a hundredth."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = self.input_layernorm(hidden_states)
        z = hidden_states + self.self_attn(hidden_states=x, **kwargs)[0]
        self.post_attention_layernorm(z)
        return z + self.mlp(x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("limit", (pattern._WIDE_LIMIT, 0), ids=("small", "large"))
def test_a_parallel_layer_is_no_sequential_one(limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the layer is too large to be verified in float32: around stand-ins of its blocks."""
    monkeypatch.setattr(pattern, "_WIDE_LIMIT", limit)
    model: Any = build("llama", dtype, dropout=False).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.003)
    model.model.layers = nn.ModuleList(ParallelLayer(layer) for layer in model.model.layers)
    report = pk.patch(model)
    assert "pre_norm" not in report.patched.values()
    assert "differs from the fused one" in report.left_alone["model.layers.0"]


def test_norms_that_no_kernel_serves_are_left_alone() -> None:
    class Shifted(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm((4, 8)), Shifted(8), nn.LayerNorm(8, elementwise_affine=False))
    report = pk.patch(model)
    assert list(report.patched) == ["0", "3"]
    assert "over 2 dimensions" in report.left_alone["1"] and "forward of its own" in report.left_alone["2"]
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(model(x), F.layer_norm(model[2](model[1](model[0](x))), (8,)))


@torch.no_grad()
def test_a_norm_with_a_wider_weight_promotes_as_before() -> None:
    model, x = build("llama").eval(), torch.randn(1, 3, 48).bfloat16()
    own = model.model.norm(x)
    pk.patch(model)
    assert own.dtype == torch.float32 and torch.equal(model.model.norm(x), own)


def test_a_dropout_in_place_is_left_alone() -> None:
    report = pk.patch(nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5, inplace=True)))
    assert "it works in place" in report.refused["1"]


def test_layer_norm_without_bias() -> None:
    norm = nn.LayerNorm(8, bias=False)
    model, x = nn.Sequential(norm), torch.randn(3, 8)
    own = model(x)
    pk.patch(model)
    torch.testing.assert_close(model(x), own)
