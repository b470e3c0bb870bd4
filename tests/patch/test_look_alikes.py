"""Modules that look like a pattern, or answer like one on an ordinary sample, and are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForQuestionAnswering
from transformers.activations import ACT2FN

import petune_kernels as pk

from . import models


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 64), act, nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class Drops(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.act(self.first(x)), 0.5, self.training))


class Clamps(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x).clamp(-7, 7)))


def test_a_block_as_it_is_thought_of_is_fused():
    assert pk.patch(nn.Sequential(Block(nn.GELU()))).patched["0"] == "mlp"


@pytest.mark.parametrize("block", [Drops(nn.GELU()), Clamps(nn.SiLU()), Block(nn.ReLU6()), Block(ACT2FN["gelu_10"])])
def test_what_a_block_does_in_training_or_to_large_numbers_is_seen(block: Block):
    block.train()
    x = 30 * torch.randn(5, 8)
    torch.manual_seed(1)
    own = block(x)
    before = torch.get_rng_state()
    report = pk.patch(nn.Sequential(block))
    assert torch.equal(torch.get_rng_state(), before)  # trying it in training draws nothing of the user's
    assert "mlp" not in report.patched.values()
    torch.manual_seed(1)
    torch.testing.assert_close(block(x), own)


def test_a_layer_that_drops_by_itself_is_no_pre_norm_layer():
    sizes: dict[str, Any] = dict(models.BASE, num_key_value_heads=2, head_dim=12)
    config = AutoConfig.for_model("seed_oss", **sizes, residual_dropout=0.5, attention_dropout=0.0)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(6, 97, (2, 8))
    torch.manual_seed(1)
    own = model(input_ids=ids).logits
    pk.patch(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(input_ids=ids).logits, own, rtol=1e-4, atol=1e-4)


def test_eager_attention_has_no_causality_but_its_masks():
    """Splinter has eager attention alone, reads both ways, and its modules do not say so."""
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model("splinter", **models.BASE)).eval()
    ids = torch.randint(6, 97, (2, 8))
    own = model(input_ids=ids).start_logits
    assert "attention" in pk.patch(model).patched.values()
    torch.testing.assert_close(model(input_ids=ids).start_logits, own, rtol=1e-4, atol=1e-5)


def test_a_causal_model_with_eager_attention_is_causal():
    config = AutoConfig.for_model("llama", **models.BASE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(6, 97, (2, 8))
    own = model(input_ids=ids).logits
    assert "attention" in pk.patch(model).patched.values()
    torch.testing.assert_close(model(input_ids=ids).logits, own, rtol=1e-4, atol=1e-5)


def test_a_model_that_hides_keys_from_sdpa_by_name_keeps_it():
    """DeepSeek V3.2's top-k: with five tokens, which a pattern is verified with, it hides nothing."""
    sizes: dict[str, Any] = dict(
        models.BASE, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, head_dim=8, index_topk=6, index_head_dim=16, index_n_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v32", **sizes)).eval()
    ids = torch.randint(6, 97, (2, 16))
    own = model(input_ids=ids).logits
    report = pk.patch(model)
    assert any("called 'sdpa' alone" in entry.reason for entry in report.entries if not entry.path)
    torch.testing.assert_close(model(input_ids=ids).logits, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("level", ["recompute", "checkpoint"])
def test_attentions_of_a_layer_that_runs_again(level: str):
    """transformers collects them while forward runs; backward's second run must go the same way without."""
    model, data = models.build("opt", dropout=False), models.batch("opt")
    out = model.train()(**data, output_attentions=True)
    out.loss.backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    pk.patch(model, memory=level)
    out = model(**data, output_attentions=True)
    assert len(out.attentions) == 2
    out.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, own[name], rtol=1e-3, atol=1e-5)
