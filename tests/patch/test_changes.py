"""What a user does to a model after `patch`, or has done to it before, that a fused forward could miss."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petune_kernels as pk
from petune_kernels.patch import pattern

from .models import build


def ids(rows: int = 2) -> Tensor:
    return torch.randint(5, 97, (rows, 6))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def as_stock(model: nn.Module, **inputs: Any) -> None:
    """The same logits as without the patch."""
    ours = logits(model, **inputs)
    pk.unpatch(model)
    close(ours, logits(model, **inputs))


@torch.no_grad()
@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("family", ("bert", "llama", "mistral", "gpt2", "opt"))
def test_attentions_on_request(family: str, attention: str) -> None:
    """Weights as eager's; logits as without the request, rows that see nothing among them."""
    model = build(family).eval()
    model.set_attn_implementation(attention)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    inputs = dict(input_ids=ids(), attention_mask=mask)
    pk.patch(model)
    plain, asked = (model(**inputs, output_hidden_states=True, **more) for more in ({}, {"output_attentions": True}))
    assert len(asked.attentions) == model.config.num_hidden_layers
    assert all(w is not None and w.isfinite().all() for w in asked.attentions)
    for ours, theirs in zip((asked.logits, *asked.hidden_states), (plain.logits, *plain.hidden_states), strict=True):
        close(ours, theirs)
    pk.unpatch(model)
    model.set_attn_implementation("eager")
    own = model(**inputs, output_attentions=True)
    seen = mask.bool()[:, None, :, None].expand_as(own.attentions[0])
    for ours, theirs in zip(asked.attentions, own.attentions, strict=True):
        close(ours[seen], theirs[seen])


def test_gradients_with_attentions_on_request() -> None:
    """Where rows see nothing they are finite, too."""
    model = build("llama", dropout=False).train()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    pk.patch(model)
    logits(model, input_ids=ids(), attention_mask=mask, output_attentions=True).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_config_that_asks_for_attentions_keeps_eager(tmp_path: Any) -> None:
    """transformers allows it with eager attention alone, and looks when the model is saved."""
    model = build("bert").eval()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    report = pk.patch(model)
    reasons = [e.reason for e in report.entries if e.path == ""]
    assert any("asks for output_attentions" in reason for reason in reasons) and "attention" not in {
        e.pattern for e in report.entries
    }
    assert len(model(input_ids=ids()).attentions) == 2
    model.save_pretrained(tmp_path)


@torch.no_grad()
def test_a_parametrized_model() -> None:
    model = build("bert").eval()
    nn.utils.parametrizations.weight_norm(model.classifier)
    pk.patch(model)
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].output.dense)
    as_stock(model, input_ids=ids())
    pk.patch(model)
    as_stock(model, input_ids=ids())


class Quantised(Tensor):
    """A weight that only torch's linear understands, as torchao's."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, w, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return F.linear(x, w.as_subclass(Tensor), None if bias is None else bias)
        if func.__name__.startswith(("_linear_pointwise", "matmul", "mm", "addmm", "__matmul__")):
            raise NotImplementedError(f"{func.__name__} of a quantised weight")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_that_only_torchs_linear_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any size: here every size is one from which the op is faster."""
    from petune_kernels import matmul
    from petune_kernels.patch import linear, shared_input

    monkeypatch.setattr(matmul, "onednn_pays", lambda x, features: x.dtype == torch.float32)
    for module in (linear, shared_input):
        monkeypatch.setattr(module, "faster", lambda x, w, bias=None: True)
    model = build("bert").eval().requires_grad_(False)
    for module in model.bert.encoder.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.data.as_subclass(Quantised), requires_grad=False)
    model.classifier.requires_grad_(True)
    pk.patch(model)
    inputs = dict(input_ids=ids())
    logits(model, **inputs).sum().backward()
    ours = model.classifier.weight.grad.clone()
    model.zero_grad()
    pk.unpatch(model)
    logits(model, **inputs).sum().backward()
    close(ours, model.classifier.weight.grad)


@torch.no_grad()
@pytest.mark.parametrize("family", ("bert", "llama", "vit"))
def test_another_activation_after_patch(family: str) -> None:
    model = build(family).eval()
    inputs = dict(input_ids=ids())
    if family == "vit":
        inputs = dict(pixel_values=torch.randn(2, 3, *[model.config.image_size] * 2))
    pk.patch(model)
    blocks = [m for m in model.modules() if pattern.pattern_of(m) == "mlp"]
    before = logits(model, **inputs)
    for block in blocks:
        setattr(block, pattern.bound_parts(block)["act"], nn.ReLU())
    assert blocks and (logits(model, **inputs) - before).norm() > 1e-3 * before.norm()
    as_stock(model, **inputs)


@pytest.mark.parametrize("change", (nn.Module.eval, lambda drop: setattr(drop, "p", 1.0)), ids=("mode", "rate"))
@pytest.mark.parametrize("family", ("bert", "vit"))
def test_dropouts_changed_after_patch(family: str, change: Callable[[nn.Module], Any]) -> None:
    """Each by itself, in a model that trains: those that drop nothing, and those that drop all."""
    model = build(family, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0).train()
    inputs = dict(input_ids=ids())
    if family == "vit":
        inputs = dict(pixel_values=torch.randn(2, 3, *[model.config.image_size] * 2))
    pk.patch(model)
    for module in model.modules():
        if type(module) is nn.Dropout:
            change(module)
    as_stock(model, **inputs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    (
        lambda act: setattr(act, "approximate", "tanh"),
        lambda act: setattr(act, "forward", torch.tanh),
        lambda act: act.register_forward_hook(lambda module, args, out: 2 * out),
    ),
    ids=("formula", "forward", "hook"),
)
def test_an_activation_changed_after_patch(change: Callable[[nn.Module], Any]) -> None:
    model, x = nn.Sequential(Block()), 3 * torch.randn(4, 8)
    assert pk.patch(model).patched["0"] == "mlp"
    change(model[0].act)
    ours = model(x)
    pk.unpatch(model)
    torch.testing.assert_close(ours, model(x))


class Halving(nn.Module):
    """As a norm has it, and something else."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * self.weight


@torch.no_grad()
@pytest.mark.parametrize("other", (nn.Identity, lambda norm: nn.LayerNorm(48), Halving), ids=("none", "layer", "own"))
def test_another_norm_after_patch(other: Callable[..., nn.Module]) -> None:
    model = build("llama").eval()
    pk.patch(model)
    for layer in model.model.layers:
        layer.post_attention_layernorm = other(layer.post_attention_layernorm)
    as_stock(model, input_ids=ids())


@torch.no_grad()
@pytest.mark.parametrize("first", (False, True), ids=("patched first", "wrapped first"))
def test_layer_norms_that_peft_wraps(first: bool) -> None:
    import peft

    model = build("llama").eval()
    if not first:
        pk.patch(model)
    model = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["post_attention_layernorm"]))
    if first:
        pk.patch(model)
    as_stock(model, input_ids=ids())


def steered(module: nn.Module, args: tuple[Tensor]) -> None:
    args[0].mul_(1.5)


@torch.no_grad()
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_a_hook_that_changes_a_shared_input(family: str) -> None:
    model = build(family).eval()
    lora = [name for name, m in model.named_modules() if type(m) is nn.Linear and "score" not in name]
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=lora[:-1], init_lora_weights=False)).eval()
    pk.patch(model)
    key = next(m for name, m in model.named_modules() if name.endswith(("self.key", "self_attn.k_proj")))
    key.register_forward_pre_hook(steered)
    as_stock(model, input_ids=ids())


def sharing() -> Any:
    """Attention of a new patched model whose query, key and value train."""
    model = build("llama").eval()
    model.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        part.weight.requires_grad_(True)
    pk.patch(model)
    return attention


def left(attention: Any) -> int:
    """For how many projections something is left."""
    pending = attention.q_proj.__dict__["forward"].args[1].pending
    return 0 if pending is None else len(pending.left)


def test_what_a_projection_leaves_for_another_is_of_now() -> None:
    x, other = torch.randn(2, 1, 3, 48)
    attention = sharing()
    attention.q_proj(x)
    assert left(attention) == 2
    close(attention.v_proj(other), other @ attention.v_proj.weight.T)
    attention = sharing()
    attention.q_proj(x)
    with torch.no_grad():
        attention.k_proj.weight.zero_()
    assert left(attention) == 2 and not attention.k_proj(x).any()
    attention = sharing()
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.v_proj(x).requires_grad
    attention = sharing()
    attention.q_proj(x)
    assert left(attention) == 2
    with torch.no_grad():
        assert not attention.v_proj(x).requires_grad
    attention = sharing()
    with torch.inference_mode():
        x = torch.randn(1, 3, 48)
        attention.q_proj(x)
        x.zero_()
        assert not attention.v_proj(x).any()


@torch.no_grad()
def test_arguments_by_name() -> None:
    model = build("bert").train()
    pk.patch(model)
    layer, x = model.bert.encoder.layer[0], torch.randn(2, 3, 48)
    wide = layer.intermediate(hidden_states=x)
    close(wide, layer.intermediate(x))
    norm = layer.output.LayerNorm
    close(norm(input=x), norm(x))
    for projection in (layer.attention.self.query, model.classifier):
        close(projection(input=x), projection(x))
    assert model.dropout(input=x).shape == x.shape
    model.eval()
    close(layer.output(hidden_states=wide, input_tensor=x), layer.output(wide, x))
    llama = build("llama").eval()
    pk.patch(llama)
    close(llama.model.norm(hidden_states=x), llama.model.norm(x))
    close(llama.model.layers[0].mlp(x=x), llama.model.layers[0].mlp(x))


def test_names_in_configs_never_outlive_the_patch() -> None:
    model = build("bert").eval()
    pk.patch(model)
    part = copy.deepcopy(model.bert)
    pk.unpatch(part)
    assert part.config._attn_implementation == "sdpa" and model.config._attn_implementation == "petune"
    again = type(model)(copy.deepcopy(model.config)).eval()
    report = pk.patch(again)
    assert {"attention"} & {e.pattern for e in report.entries}
    pk.unpatch(again)
    assert again.config._attn_implementation == "sdpa"
    other = build("bert").eval()
    other.bert = model.bert
    pk.patch(other)
    pk.unpatch(model)
    pk.unpatch(other)
    assert {c.config._attn_implementation for c in (model, other, model.bert)} == {"sdpa"}


def test_a_config_of_two_models() -> None:
    """from_config gives both the same object."""
    model = build("bert").eval()
    other = type(model)(model.config).eval()
    assert other.config is model.config
    pk.patch(model)
    pk.unpatch(other)
    other.bert.encoder.layer[0].output.LayerNorm = nn.LayerNorm((1, 48))
    with pytest.raises(pk.PatchError, match="strict=True"):
        pk.patch(other, strict=True)
    assert model.config._attn_implementation == "petune"
    pk.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_attention_chosen_after_patch_is_kept() -> None:
    model = build("bert").eval()
    pk.patch(model)
    model.set_attn_implementation("eager")
    pk.unpatch(model)
    assert model.config._attn_implementation == "eager"
    pk.patch(model)
    model.set_attn_implementation("sdpa")
    pk.patch(model)
    assert model.config._attn_implementation == "petune"
    pk.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_mode_changed_between_forward_and_backward() -> None:
    model = build("bert").train()
    pk.patch(model, memory="checkpoint")
    loss = logits(model, input_ids=ids()).sum()
    model.eval()
    with pytest.raises(RuntimeError, match=r"train\(\) or eval\(\) was called between forward and backward"):
        loss.backward()
    model.train()
    logits(model, input_ids=ids()).sum().backward()


@torch.no_grad()
def test_a_text_of_padding_alone_beside_a_position_bias() -> None:
    model = build("t5", head="seq2seq_lm").eval()
    model.set_attn_implementation("sdpa")
    mask = torch.tensor([[0] * 6, [1] * 6])
    pk.patch(model)
    as_stock(model, input_ids=ids(), attention_mask=mask, decoder_input_ids=ids())


@pytest.mark.parametrize("family", ("bert", "gpt2"))
def test_patched_where_new_tensors_are_meta(family: str) -> None:
    model = build(family).eval()
    with torch.device("meta"):
        pk.patch(model)
    with torch.no_grad():
        as_stock(model, input_ids=ids())


def test_layers_that_are_dropped_are_let_go() -> None:
    model = build("bert")
    pk.patch(model)
    dropped = [weakref.ref(p) for p in model.bert.encoder.layer[1].parameters()]
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    gc.collect()
    assert not any(ref() is not None for ref in dropped)
    as_stock(model.eval(), input_ids=ids())
    assert "attention" in pk.patch(copy.deepcopy(model)).patched.values()
