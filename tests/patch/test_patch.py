"""patch and unpatch: the same numbers, the same objects, the truth in the report, and nothing half-done."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import petune_kernels as pk
from petune_kernels.patch import pattern

from .models import batch, build, step


def off(model: nn.Module) -> nn.Module:
    """Training mode with every dropout at 0, so that two runs can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.train()


def assert_same_step(own: Any, fused: Any, dtype: torch.dtype) -> None:
    tol = 2e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(fused[0], own[0], rtol=tol, atol=tol)
    torch.testing.assert_close(fused[1], own[1], rtol=tol, atol=tol)
    assert fused[2].keys() == own[2].keys()
    for name, grad in own[2].items():
        scale = max(grad.float().norm().item(), 5e-3)
        difference = (fused[2][name].float() - grad.float()).norm().item()
        if name.endswith(("key.bias", "key_proj.bias", "attn.k.bias")):
            continue  # analytically zero: what is there is rounding
        assert difference <= (1e-4 if dtype == torch.float32 else 6e-2) * scale, (name, difference, scale)


@pytest.mark.parametrize("regime", ("layernorm", "bitfit", "ffn", "random", "frozen", "full"))
def test_regime_switches_after_patching(regime: str) -> None:
    model, data = off(build("bert")), batch()
    pk.patch(model)
    pk.tune(model, regime)
    fused = step(model, data)
    pk.unpatch(model)
    assert_same_step(step(model, data), fused, torch.float32)


def test_evaluation_mode_drops_nothing() -> None:
    model, data = build("bert").eval(), batch()
    own = model(**data).logits
    pk.patch(model)
    torch.testing.assert_close(model(**data).logits, own, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(**data).logits, own, rtol=1e-5, atol=1e-5)


def test_identity_of_everything() -> None:
    """Keys, parameter objects, modules, methods and flags: the same before, during and after."""
    model = build("bert")

    def look(m: nn.Module) -> dict[str, Any]:
        return {
            "state": list(m.state_dict()),
            "params": {n: id(p) for n, p in m.named_parameters()},
            "modules": {n: id(c) for n, c in m.named_modules()},
            "flags": [p.requires_grad for p in m.parameters()],
            "training": [c.training for c in m.modules()],
        }

    before, dicts = look(model), {n: dict(m.__dict__) for n, m in model.named_modules()}
    forwards = {n: m.forward.__func__ for n, m in model.named_modules()}
    rng = torch.get_rng_state()
    pk.patch(model)
    assert look(model) == before
    assert torch.equal(torch.get_rng_state(), rng), "verification must not draw from the global generator"
    pk.unpatch(model)
    assert look(model) == before
    for name, module in model.named_modules():
        assert module.__dict__.keys() == dicts[name].keys(), name
        assert all(module.__dict__[k] is v for k, v in dicts[name].items() if k != "training"), name
        assert module.forward.__func__ is forwards[name] and module.forward.__self__ is module
    pk.unpatch(model)  # a no-op


def test_patching_twice_is_a_no_op() -> None:
    model = build("bert")
    first = pk.patch(model)
    bound = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    second = pk.patch(model)
    assert first == second
    assert all(m.__dict__.get("forward") is bound[n] for n, m in model.named_modules())


def test_patched_context() -> None:
    model = build("bert")
    with pk.patched(model) as report:
        assert (
            report.patched["bert.encoder.layer.0.output"] == "post_norm_tail"
            and "forward" in model.bert.embeddings.LayerNorm.__dict__
        )
    assert "forward" not in model.bert.embeddings.LayerNorm.__dict__
    with pytest.raises(KeyError), pk.patched(model):
        raise KeyError("in the middle")
    assert "forward" not in model.bert.embeddings.LayerNorm.__dict__


def test_save_patched_load_unpatched(tmp_path: Any) -> None:
    model, data = build("bert").eval(), batch()
    pk.patch(model)
    logits = model(**data).logits
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(fresh(**data).logits, logits, rtol=1e-5, atol=1e-5)
    assert list(fresh.state_dict()) == list(model.state_dict())


def test_copies_carry_their_own_binding() -> None:
    """deepcopy and pickle: the copy runs fused on its own parameters and unpatches on its own."""
    model, data = build("bert").eval(), batch()
    own = model(**data).logits
    pk.patch(model)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    for twin in (copy.deepcopy(model), pickle.loads(buffer.getvalue())):
        with torch.no_grad():
            twin.bert.encoder.layer[0].output.LayerNorm.weight.zero_()
        assert not torch.allclose(twin(**data).logits, own)
        torch.testing.assert_close(model(**data).logits, own, rtol=1e-5, atol=1e-5)
        layer = twin.bert.encoder.layer[0]
        one, other = (m.__dict__["forward"].args[1] for m in (layer.attention.self.query, layer.attention.self.key))
        assert one is other and one.modules[0] is layer.attention.self.query
        pk.unpatch(twin)
        assert "forward" not in twin.bert.embeddings.LayerNorm.__dict__
        assert "forward" in model.bert.embeddings.LayerNorm.__dict__


def test_dtype_and_device_moves_after_patching() -> None:
    model, data = build("bert").eval(), batch()
    pk.patch(model)
    assert model.bfloat16()(**data).logits.dtype == torch.bfloat16
    assert model.double()(**data).logits.dtype == torch.float64
    assert model.to("meta")(input_ids=data["input_ids"].to("meta")).logits.shape == (3, 3)


def test_patches_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build("bert")
    meta = pk.patch(model).patched
    assert meta == pk.patch(build("bert")).patched and {"attention", "shared_input", "mlp"} <= set(meta.values())


def test_hooks_keep_firing() -> None:
    """Hooks on a patched module run around the fused forward; a part with hooks is called, not gone around."""
    model, data, seen = build("bert").eval(), batch(), []
    own = model(**data).logits
    layer = model.bert.encoder.layer[0]
    for name in ("output", "output.dense", "output.LayerNorm", "attention.output.dropout"):
        layer.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    pk.patch(model)
    assert not seen, "verification must not run hooks"
    torch.testing.assert_close(model(**data).logits, own, rtol=1e-5, atol=1e-5)
    assert sorted(seen) == ["attention.output.dropout", "output", "output.LayerNorm", "output.dense"]


def test_nothing_to_patch() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Tanh())
    with pytest.raises(pk.PatchError, match="nothing in this Sequential.*Embedding.*Tanh"):
        pk.patch(model)
    with pytest.raises(TypeError, match="model is str"):
        pk.patch("bert-base")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is None"):
        pk.unpatch(None)  # type: ignore[arg-type]


def test_foreign_forwards_are_respected() -> None:
    """A forward set on the instance before patching is left alone; one set afterwards blocks unpatch, all of it."""
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    report = pk.patch(model)
    assert "replaced on the instance" in report.left_alone["0"] and list(report.patched) == ["1"]
    ours = model[1].__dict__["forward"]
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(pk.PatchError, match="1 was replaced after patching"):
        pk.unpatch(model)
    model[1].forward = ours
    pk.unpatch(model)
    assert "forward" in model[0].__dict__ and "forward" not in model[1].__dict__


def test_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:

    model, calls = build("bert"), []

    def broken(*args: Any) -> str:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return ""

    monkeypatch.setattr(pattern, "verify", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        pk.patch(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_report_is_data_and_a_table() -> None:
    model = build("bert")
    report = pk.patch(model)
    assert report.patched["bert.encoder.layer.1.output"] == "post_norm_tail"
    assert report.parts["bert.encoder.layer.1.output.dense"] == "post_norm_tail"
    assert "no pattern" in report.left_alone["bert.embeddings.word_embeddings"]
    assert "only its rate is read" in report.left_alone["bert.encoder.layer.0.attention.self.dropout"]
    assert not report.refused and report.backends["residual_norm"] in ("cpu", "reference")
    every = report.patched.keys() | report.parts.keys() | report.left_alone.keys()
    leaves = {n for n, m in model.named_modules() if not m._modules}
    assert leaves <= every
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "bert.encoder.layer.*.output" in text and "post_norm_tail" in text and "19 modules patched" in text
    assert "19 modules patched" in str(report)


@pytest.mark.parametrize("mode", ("layernorm", "full"))
def test_compiles_in_one_graph(mode: str) -> None:
    model, data = off(build("bert")), batch()
    data["attention_mask"] = torch.ones_like(data["attention_mask"])
    pk.tune(model, mode)
    own = step(model, data)
    pk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(**data)
    model.zero_grad()
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_step(own, (out.loss.detach(), out.logits.detach(), grads), torch.float32)


def test_gradient_checkpointing_with_dropout_is_exact() -> None:
    model, data = build("bert").train(), batch()
    pk.patch(model)
    pk.tune(model, "layernorm")
    torch.manual_seed(2)
    plain = step(model, data)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(2)
    again = step(model, data)
    assert torch.equal(plain[0], again[0]) and all(torch.equal(plain[2][n], again[2][n]) for n in plain[2])


def test_autocast() -> None:
    model, data = off(build("bert")), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = step(model, data)
        pk.patch(model)
        fused = step(model, data)
    assert own[1].dtype == fused[1].dtype
    assert_same_step(own, fused, torch.bfloat16)


def losses(model: nn.Module, steps: int, data: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = model(**data[i % len(data)]).loss
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def test_fifty_steps_follow_the_stock_run() -> None:
    data = [batch() for _ in range(5)]
    curves = {}
    for fused in (False, True):
        model = off(build("bert"))
        pk.tune(model, "layernorm")
        if fused:
            pk.patch(model)
        curves[fused] = torch.tensor(losses(model, 50, data))
    assert curves[False][-1] < 0.9 * curves[False][0], "the run must learn, or the comparison shows nothing"
    torch.testing.assert_close(curves[True], curves[False], rtol=1e-4, atol=1e-5)


def test_a_part_is_pickled_without_the_layer_around_it() -> None:
    model = build("bert")
    pk.tune(model, "full")
    pk.patch(model)
    attention = model.bert.encoder.layer[0].attention.self
    assert len(pickle.dumps(attention.query)) <= len(pickle.dumps(attention))
