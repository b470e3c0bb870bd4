"""attention as a transformers attention function, against eager on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from petune_kernels.patch.attention import attention_interface, attention_mask_interface

from .test_attention import make


@pytest.fixture
def registered() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("petune", attention_interface)
    AttentionMaskInterface.register("petune", attention_mask_interface)


def tiny(kind: str) -> Any:
    """A two-layer model with dropout off, built as its users name it."""
    import transformers

    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    torch.manual_seed(1)
    if kind == "bert":
        off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return transformers.BertModel(transformers.BertConfig(**sizes, **off))
    return transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=2))


@pytest.mark.parametrize("padding", ("none", "right", "left", "a whole sequence"))
@pytest.mark.parametrize("kind", ("bert", "llama"))
def test_transformers_models_as_with_eager(kind: str, padding: str, registered: None) -> None:
    """The hidden states of every token, padding too, and every gradient."""
    model = tiny(kind).train()
    ids, seen = torch.randint(50, (3, 11)), torch.ones(3, 11, dtype=torch.int64)
    if padding == "right":
        seen[1, 6:] = 0
    elif padding == "left":
        seen[1, :4] = 0
    elif padding == "a whole sequence":
        seen[2] = 0
    results = []
    for implementation in ("eager", "petune"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=seen).last_hidden_state
        out.square().mean().backward()
        results.append((out, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(results[0]) == len(results[1]) > 20
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_transformers_generation_with_a_cache(registered: None) -> None:
    """One row against many columns, and a second piece of a prompt after a cached first: no wrong causal mask."""
    model = tiny("llama").eval()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        whole = model(input_ids=ids).last_hidden_state
        model.set_attn_implementation("petune")
        for cut in (3, 8):
            first = model(input_ids=ids[:, :cut], use_cache=True)
            rest = model(input_ids=ids[:, cut:], past_key_values=first.past_key_values).last_hidden_state
            torch.testing.assert_close(torch.cat([first.last_hidden_state, rest], 1), whole, rtol=1e-4, atol=1e-5)


def test_transformers_dropout_follows_the_module(registered: None) -> None:
    model = tiny("bert")
    model.set_attn_implementation("petune")
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    ids = torch.randint(50, (2, 8))
    assert torch.equal(model.eval()(ids).last_hidden_state, model(ids).last_hidden_state)
    torch.manual_seed(1)
    first, second = model.train()(ids).last_hidden_state, model(ids).last_hidden_state
    torch.manual_seed(1)
    assert torch.equal(model(ids).last_hidden_state, first) and not torch.equal(first, second)


def test_encoder_padding_makes_one_row_of_mask(registered: None) -> None:
    """[B, 1, 1, K] in the model's dtype, not a boolean [B, 1, S, K] converted in every layer; None without padding."""
    seen_masks: list[Tensor | None] = []
    model = tiny("bert").bfloat16()

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
        seen_masks.append(mask)
        return attention_interface(module, q, k, v, mask, **kwargs)

    from transformers import AttentionInterface

    AttentionInterface.register("petune", spy)
    try:
        model.set_attn_implementation("petune")
        ids, seen = torch.randint(50, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
        model(input_ids=ids, attention_mask=seen)
        seen[0, 5:] = 0
        model(input_ids=ids, attention_mask=seen)
    finally:
        AttentionInterface.register("petune", attention_interface)
    assert seen_masks[:2] == [None, None]
    assert all(m is not None and m.shape == (2, 1, 1, 8) and m.dtype == torch.bfloat16 for m in seen_masks[2:])


@pytest.mark.parametrize("name", ("softcap", "s_aux"))
def test_interface_refuses_what_it_would_leave_out(name: str) -> None:
    q, k, v = make((1, 2, 3, 3, 4), torch.float32)
    with pytest.raises(ValueError, match=f"{name} is given"):
        attention_interface(torch.nn.Module(), q, k, v, None, **{name: torch.ones(1)})


@pytest.mark.parametrize("trains", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_interface_adds_a_position_bias(masked: bool, trains: bool) -> None:
    q, k, v = make((2, 2, 3, 5, 4), torch.float64)
    bias = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=trains)
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64) if masked else None
    if mask is not None:
        mask[0, ..., 3:] = torch.finfo(torch.float64).min
    results = []
    for fused in (False, True):
        if fused:
            module = torch.nn.Module()
            o, _ = attention_interface(module, q, k, v, mask, scaling=1.0, is_causal=False, position_bias=bias)
        else:
            scores = q @ k.mT + bias + (0 if mask is None else mask)
            o = (scores.softmax(-1) @ v).transpose(1, 2)
        wanted = [t for t in (q, k, v, bias) if t.requires_grad]
        results.append((o, *torch.autograd.grad(o.square().sum(), wanted)))
    assert len(results[0]) == (5 if trains else 4)
    for own, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, own)


def test_a_mask_that_trains_takes_torchs_attention() -> None:
    """Doge's: its gradient is the [S, K] tensor that the op never builds."""
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    mask = torch.randn(2, 1, 5, 5, requires_grad=True)
    o, _ = attention_interface(torch.nn.Module(), q, k, v, mask, scaling=0.5, is_causal=False)
    (found,) = torch.autograd.grad(o.square().sum(), mask)
    wide = mask.detach().double().requires_grad_()
    exact = torch.softmax(q.double() @ k.double().mT * 0.5 + wide, -1) @ v.double()
    torch.testing.assert_close(found.double(), torch.autograd.grad(exact.square().sum(), wide)[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again, _ = attention_interface(torch.nn.Module(), q, k, v, mask, scaling=0.5, is_causal=False)
    torch.testing.assert_close(again, o.detach(), rtol=1e-5, atol=1e-5)
