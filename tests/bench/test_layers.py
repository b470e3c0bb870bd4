"""Whole layers, called as their model calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from bench import harness, layers, models, op_runs
from bench.harness import EAGER, OURS
from petune_kernels.studies.shapes import SHAPES

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sizes in (("minilm", SMALL), ("tinyllama", LLAMA)):
        monkeypatch.setitem(SHAPES, name, (SHAPES[name][0], sizes))


def measured(shape: str, regime: str, dtype: str = "float32", **settings) -> harness.Row:
    chosen = op_runs.Settings((shape,), (dtype,), (), 3, 16, "cpu", rounds=2, **settings)
    return layers.measure(models.Case(shape, regime, dtype, 3, 16), chosen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("regime", ["layernorm", "full", "lora-qv p=0.1", "lora-all p=0.0"])
@pytest.mark.parametrize("shape", ["minilm", "tinyllama"])
def test_a_layer_is_gated_and_timed(shape: str, regime: str, dtype: str) -> None:
    row = measured(shape, regime, dtype)
    assert row["refused"] == {} and set(row["seconds"]) == {EAGER, OURS} and row["gate"][OURS]["compared"] > 2


def test_the_regimes_are_those_that_a_shape_has_unless_they_are_named() -> None:
    def regimes(*given: Any) -> list[str]:
        return [case.regime for case in models.cases(("tinyllama",), models.Settings(dtypes=("float32",)), *given)]

    assert regimes() == [name for name in models.REGIMES if name != "bitfit"]
    assert regimes((), ("bitfit", "full")) == ["full"] and regimes(("bitfit",)) == ["bitfit"]


def test_a_layer_gets_what_its_model_gives_it() -> None:
    case = models.Case("tinyllama", "layernorm", "float32", 3, 16)
    model = models.build(case, EAGER, torch.device("cpu"), 1).eval()
    batch = models.random_batch(case, torch.device("cpu"))
    layer = layers.Layer(case, EAGER, torch.device("cpu"))
    layer.module.eval()
    (args, kwargs), hidden = layer.whole, model.model.embed_tokens(batch["input_ids"])
    assert torch.equal(args[0], hidden) and kwargs["position_embeddings"][0].shape[-2:] == (16, 16)
    assert kwargs["past_key_values"] is None and layer.some[0][0].shape[0] == 3
    alone = model.model.norm(layer(hidden, layer.whole))
    whole = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert torch.allclose(alone, whole, atol=1e-6)


def test_a_wrong_layer_and_a_regime_without_parameters_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build

    def wrong(case, provider, device, count):
        model = build(case, provider, device, count)
        if provider == OURS:
            next(p for p in model.model.layers.parameters() if p.requires_grad).data.mul_(1.5)
        return model

    monkeypatch.setattr(models, "build", wrong)
    row = measured("tinyllama", "layernorm")
    assert row["refused"][OURS].startswith("wrong: ") and set(row["seconds"]) == {EAGER}
    row = measured("tinyllama", "bitfit")
    assert row["seconds"] == {} and "matches nothing" in row["refused"][EAGER] and OURS in row["refused"]


def test_a_layer_is_gated_at_the_size_that_is_timed_and_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    init = layers.Layer.__init__

    def wrong(self: layers.Layer, case: models.Case, provider: str, device: torch.device) -> None:
        init(self, case, provider, device)
        if provider == OURS:
            self.module.register_forward_hook(fault)

    def right_on_two_rows(module: nn.Module, args: Any, made: Any) -> Any:
        return tree_map(lambda t: 1.1 * t, made) if len(args[0]) > 2 else made

    def right_in_evaluation(module: nn.Module, args: Any, made: Any) -> Any:
        return tree_map(lambda t: 2 * t, made) if module.training else made

    monkeypatch.setattr(layers.Layer, "__init__", wrong)
    for fault in (right_on_two_rows, right_in_evaluation):
        assert measured("minilm", "layernorm")["refused"][OURS].startswith("wrong: "), fault


def test_compiled_layers_are_static_and_compiled_anew_after_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: done.append(options))
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(layers, "time_turns", lambda *_: done.append("timed"))
    row = measured("minilm", "layernorm", compile=op_runs.MODES)
    assert done == [*({"dynamic": False, "mode": mode} for mode in op_runs.MODES), "reset", "timed"]
    assert set(row["gate"]) == {OURS, *map(harness.compiled, op_runs.MODES)}


def test_a_layer_that_does_not_compile_costs_no_other_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(self: nn.Module, mode: str, dynamic: bool) -> None:
        if mode == "reduce-overhead":
            raise OSError("no compiler")
        self.register_forward_pre_hook(fails)

    def fails(module: nn.Module, args: object) -> None:
        raise NotImplementedError("in the gate")

    monkeypatch.setattr(nn.Module, "compile", compile)
    row = measured("minilm", "layernorm", compile=("default", "reduce-overhead"))
    assert set(row["seconds"]) == {EAGER, OURS}
    assert row["refused"] == {
        "torch.compile": "NotImplementedError: in the gate", "torch.compile, reduce-overhead": "OSError: no compiler"
    }  # fmt: skip
