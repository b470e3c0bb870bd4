"""Patched PEFT models: the same numbers as stock PEFT, through every change of state that PEFT offers."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import petune_kernels as pk
from petune_kernels.patch import lora as patterns

from .models import batch, build
from .test_families import quiet, rms, step, worst

QV = {"bert": ["query", "value"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": dict(target_modules="all-linear"),
    "rslora": dict(use_rslora=True),
    "bias all": dict(bias="all"),
    "bias lora_only": dict(bias="lora_only"),
    "lora_bias": dict(lora_bias=True),
    "patterns": dict(rank_pattern={"layer.0": 2, "layers.0": 2}, alpha_pattern={"layer.1": 3, "layers.1": 3}),
    "modules_to_save": dict(modules_to_save=["pooler"]),
}


def lora(family: str = "bert", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A LoRA model whose B is not zero, dropouts of the base at 0."""
    config = dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=QV[family], task_type="SEQ_CLS") | options
    if family == "llama":
        config.pop("modules_to_save", None)
    model = get_peft_model(quiet(build(family, dtype, dropout=False)), LoraConfig(**config))
    return randomised(model).train()


def randomised(model: Any) -> Any:
    """PEFT starts at B = 0 and lora_bias = 0, which would hide the adapter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn_like(p))
    return model


def data(family: str = "bert") -> dict[str, Any]:
    torch.manual_seed(1)
    return batch(family)


def assert_same(own: Any, ours: Any, bound: float = 2e-4) -> None:
    assert rms(ours.logits - own.logits) <= bound * rms(own.logits)
    error, name = worst(ours, own)
    assert error <= bound, (name, error)


@pytest.mark.parametrize("family", QV)
@pytest.mark.parametrize("name", CONFIGS)
def test_same_step_as_stock(family: str, name: str) -> None:
    model = lora(family, **CONFIGS[name])
    own = step(model, data(family))
    assert any("lora_A" in n for n in own.grads)
    report = pk.patch(model)
    runs = set(report.patched.values())
    assert runs & {"lora", "shared_input"} and "attention" in runs
    assert_same(own, step(model, data(family)))


def test_fp32_adapters_over_a_bf16_base_keep_no_fp32_copy_of_x() -> None:
    model = lora(dtype=torch.bfloat16, target_modules="all-linear")
    assert (
        model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.default.weight.dtype == torch.float32
    )
    inputs, exact = data(), step(copy.deepcopy(model).double(), data())
    stock = step(model, inputs)
    wide: list[tuple[int, ...]] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.dtype == torch.float32 and t.dim() > 1 and t.shape[-1] >= 48 and t.numel() // t.shape[-1] == 27:
            wide.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(**inputs)
    assert wide, "stock PEFT keeps x in float32: the check must be able to see it"
    pk.patch(model)
    wide.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ours = step(model, inputs)
    assert not wide
    assert ours.logits.dtype == stock.logits.dtype
    assert worst(ours, exact)[0] <= 2 * worst(stock, exact)[0] + 0.02


def test_dropout_in_training_only_and_by_seed() -> None:
    model, inputs = lora(lora_dropout=0.5), data()
    model.eval()
    own = model(**inputs).logits
    pk.patch(model)
    torch.testing.assert_close(model(**inputs).logits, own, rtol=1e-4, atol=1e-5)
    model.train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(**inputs).logits)
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


def test_dropout_has_the_mean_of_no_dropout() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 24, bias=False))
    model = randomised(get_peft_model(layer, LoraConfig(r=4, lora_alpha=4, lora_dropout=0.4, target_modules=["0"])))
    x = torch.randn(5, 32)
    model.eval()
    own = model(x).detach()
    pk.patch(model)
    model.train()
    drawn = torch.stack([model(x).detach() for _ in range(3000)])
    assert drawn.std(0).max() > 0.1
    assert ((drawn.mean(0) - own).abs() <= 5 * drawn.std(0) / 3000**0.5).all()


def test_adapters_come_switch_and_go_after_patching() -> None:
    """Every state against stock PEFT in the same state."""
    model = lora(lora_dropout=0.0)
    twin, inputs = copy.deepcopy(model), data()
    pk.patch(model)

    def check() -> None:
        assert_same(step(twin, inputs), step(model, inputs))

    def both(change: Any) -> None:
        for m in (twin, model):
            change(m)
        check()

    def add(m: Any) -> None:
        torch.manual_seed(5)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "key"], lora_dropout=0.0, task_type="SEQ_CLS")
        m.add_adapter("second", config)
        torch.manual_seed(7)
        with torch.no_grad():
            for name, p in m.named_parameters():
                if "lora_B.second" in name:
                    p.normal_(0, 0.3)

    both(add)
    both(lambda m: m.set_adapter("second"))
    both(
        lambda m: [x.set_adapter(["default", "second"]) for x in m.modules() if isinstance(x, LoraLayer)]
    )  # both at once
    both(lambda m: m.set_adapter("default"))
    for m in (twin, model):
        m.eval()
    with torch.no_grad(), twin.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits, rtol=1e-4, atol=1e-5)
        disabled = model(**inputs).logits
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, disabled, rtol=1e-3)
    both(lambda m: m.merge_adapter())
    both(lambda m: m.unmerge_adapter())
    both(lambda m: m.delete_adapter("second"))
    with torch.no_grad():
        before = twin(**inputs).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, before, rtol=1e-4, atol=1e-5)
        pk.unpatch(merged)
        torch.testing.assert_close(merged(**inputs).logits, before, rtol=1e-4, atol=1e-5)
    assert not any("forward" in m.__dict__ for m in merged.modules())


@pytest.mark.parametrize("patched_saves", (True, False))
def test_round_trip_with_heads_and_biases(tmp_path: Path, patched_saves: bool) -> None:
    model = lora(bias="all", modules_to_save=["classifier"])
    if patched_saves:
        pk.patch(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, data())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        own = model(**data()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quiet(build("bert", dropout=False)), tmp_path).eval()
    if not patched_saves:
        pk.patch(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**data()).logits, own, rtol=1e-4, atol=1e-5)
    assert {n: v.shape for n, v in peft.get_peft_model_state_dict(loaded).items()} == {
        n: v.shape for n, v in peft.get_peft_model_state_dict(model).items()
    }


@pytest.mark.parametrize("method", ("ln_tuning", "prefix", "ia3", "dora"))
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_other_methods_give_their_own_numbers(family: str, method: str) -> None:
    llama = family == "llama"
    config: Any = {
        "ln_tuning": LNTuningConfig(task_type="SEQ_CLS", target_modules=r".*(norm|LayerNorm)$"),
        "prefix": PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        "ia3": IA3Config(
            task_type="SEQ_CLS",
            target_modules=["k_proj", "down_proj"] if llama else ["key", "output.dense"],
            feedforward_modules=["down_proj"] if llama else ["output.dense"],
        ),
        "dora": LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True, lora_dropout=0.0, target_modules=QV[family]),
    }[method]
    torch.manual_seed(0)
    model = randomised(get_peft_model(quiet(build(family, dropout=False)), config)).train()
    own = step(model, data(family))
    report = pk.patch(model)
    assert_same(own, step(model, data(family)))
    if method == "dora":
        assert any("variant" in reason for reason in report.refused.values())
    if method == "ia3":
        assert "lora" not in report.patched.values()


def test_a_base_that_only_looks_linear_is_left_to_peft() -> None:
    class Quantised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mul(2).round().div(2)

    model = nn.Sequential(nn.LayerNorm(8), Quantised(8, 8))
    model = randomised(get_peft_model(model, LoraConfig(r=2, target_modules=["1"])))  # type: ignore[arg-type]
    x = torch.randn(3, 8)
    model.eval()
    own = model(x)
    report = pk.patch(model)
    (reason,) = [r for p, r in report.refused.items() if p.endswith("model.1")]
    assert "Quantised" in reason
    torch.testing.assert_close(model(x), own)
    with pytest.raises(pk.PatchError, match="strict=True.*Quantised"):
        pk.patch(model, strict=True)


@pytest.mark.parametrize("part", ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"))
def test_hooks_inside_a_layer_keep_firing(part: str) -> None:
    model, seen = lora(), []
    pk.patch(model)
    for name, module in model.named_modules():
        if name.endswith(part):
            module.register_forward_hook(lambda *_: seen.append(1))
    model(**data())
    assert len(seen) == 4  # query and value of two layers


@pytest.mark.parametrize(
    "change",
    (
        lambda layer: setattr(layer.lora_dropout["default"], "inplace", True),
        lambda layer: setattr(layer.lora_dropout["default"], "p", 1.0),
        lambda layer: layer.lora_A.update({"default": nn.Linear(48, 4)}),
    ),
    ids=("in place", "p = 1", "a bias of A"),
)
def test_what_peft_does_not_make_is_left_to_peft(change: Any) -> None:
    layer = next(m for m in lora(lora_dropout=0.1).modules() if isinstance(m, LoraLayer))
    assert patterns.projection(layer) is not None
    change(layer)
    assert patterns.projection(layer) is None


def test_unpatch_leaves_no_trace() -> None:
    model = lora(target_modules="all-linear")
    before = {n: set(m.__dict__) for n, m in model.named_modules()}
    own = step(model, data())
    pk.patch(model)
    pk.unpatch(model)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before
    assert torch.equal(step(model, data()).logits, own.logits)


def test_importing_does_not_import_peft() -> None:
    code = "import sys, petune_kernels; assert not {'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
