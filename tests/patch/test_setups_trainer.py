"""transformers.Trainer with a patched model and nothing else changed, and PetuneCallback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import petune_kernels as pk
from petune_kernels import cuda_graph
from petune_kernels.patch import pattern

from ..recorder import Recorder
from . import models

FAMILIES = ("bert", "llama")


def build(family: str) -> nn.Module:
    """Without dropout, in training mode. The generator is left as it was: Trainer calls this from model_init, after it
    has seeded the data order."""
    with torch.random.fork_rng([]):
        return models.build(family, dropout=False).train()


def examples(count: int, S: int = 11, seed: int = 0) -> list[dict[str, Tensor]]:
    """A data set: `count` sequences of S ids with right padding of 0 to S/2, and labels of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = S - int(torch.randint(S // 2, (), generator=generator))
        ids = torch.randint(6, 97, (S,), generator=generator)
        ids[length:] = 1
        mask = (torch.arange(S) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids[0] % 3})
    return rows


def trainer(model: nn.Module | None, out: Path, callbacks: Any = None, **arguments: Any) -> Trainer:
    more = {key: arguments.pop(key) for key in ("model_init", "optimizers") if key in arguments}
    settings: dict[str, Any] = dict(
        output_dir=str(out), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=4, max_steps=6, learning_rate=5e-3, seed=3,
    )  # fmt: skip
    args = TrainingArguments(**settings | arguments)
    return Trainer(model, args, train_dataset=examples(32), eval_dataset=examples(8), callbacks=callbacks, **more)


def history(run: Trainer, key: str = "loss") -> torch.Tensor:
    return torch.tensor([entry[key] for entry in run.state.log_history if key in entry], dtype=torch.float64)


def is_patched(model: nn.Module) -> bool:
    return any(pattern.pattern_of(module) for module in model.modules())


# the second is the name before transformers renamed it
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))


def train(family: str, fused: bool, out: Path, regime: str = "layernorm", **arguments: Any) -> Trainer:
    model = build(family)
    pk.tune(model, regime)
    if fused:
        pk.patch(model)
    run = trainer(model, out, **arguments)
    run.train()
    assert is_patched(model) == fused, "nobody but unpatch takes the fused forwards off"
    return run


@pytest.mark.parametrize(
    ("family", "arguments"),
    [(family, {}) for family in FAMILIES]
    + [
        ("bert", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}),
        ("bert", {CHECKPOINTING: True, "regime": "full"}),
        ("bert", {"bf16": True, "tol": 2e-2}),
        ("bert", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "plain",
)
def test_loss_history_of_the_stock_run(family: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    arguments = dict(arguments)
    tol = arguments.pop("tol", 1e-4)
    own, fused = (train(family, fused, tmp_path / str(fused), **arguments) for fused in (False, True))
    assert len(history(own)) == 6
    torch.testing.assert_close(history(fused), history(own), rtol=tol, atol=tol)
    torch.testing.assert_close(history(fused, "grad_norm"), history(own, "grad_norm"), rtol=5 * tol, atol=5 * tol)
    a, b = own.evaluate()["eval_loss"], fused.evaluate()["eval_loss"]
    assert a == pytest.approx(b, rel=tol)
    assert a != pytest.approx(trainer(build(family), tmp_path).evaluate()["eval_loss"], rel=1e-3), (
        "it must have learned"
    )


@pytest.mark.parametrize(
    "arguments",
    ({}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}, {"regime": "full"}, {"bf16": True, "tol": 2e-2}),
    ids=lambda value: ",".join(value) or "plain",
)
def test_loss_history_with_cuda_graphs(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a recorder of CPU ops: Trainer's loop, its clipping and accumulation, and an evaluation amid the graphs."""
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    arguments = dict(arguments)
    tol, regime = arguments.pop("tol", 1e-4), arguments.pop("regime", "layernorm")
    own = train("bert", False, tmp_path / "own", regime=regime, **arguments)
    callback = pk.PetuneCallback(regime, cuda_graphs=True, keep=True)
    run = trainer(build("bert"), tmp_path / "fused", [callback], eval_strategy="steps", eval_steps=2, **arguments)
    run.train()
    torch.testing.assert_close(history(run), history(own), rtol=tol, atol=tol)
    torch.testing.assert_close(history(run, "grad_norm"), history(own, "grad_norm"), rtol=5 * tol, atol=5 * tol)
    assert callback.report is not None
    (found,) = callback.report.graphs.values()
    assert found.captured == 1 and found.replayed == 6 * arguments.get("gradient_accumulation_steps", 1) - 1


@pytest.mark.parametrize("regime", ("layernorm", "random"))
def test_resume_from_checkpoint(regime: str, tmp_path: Path) -> None:
    """A patched run saved half-way and resumed, patched or not, ends where the unbroken stock run ends."""
    own = train("bert", False, tmp_path / "own", regime=regime)
    # max_steps stays 6, or the learning rate would decay otherwise
    first = train("bert", True, tmp_path / "fused", regime=regime, save_strategy="steps", save_steps=3)
    for fused in (True, False):
        model = build("bert")
        pk.tune(model, regime)
        if fused:
            pk.patch(model)
        again = trainer(model, tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / "fused" / "checkpoint-3"))
        torch.testing.assert_close(history(again), history(own), rtol=1e-4, atol=1e-4)
        for (name, p), (_, q) in zip(model.state_dict().items(), own.model.state_dict().items(), strict=True):
            if name.endswith("key.bias"):  # its gradient is rounding, which Adam brings to the size of the others
                continue
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert first.state.global_step == 6


def test_best_model_is_loaded_into_the_patched_model(tmp_path: Path) -> None:
    ends = {}
    for fused in (False, True):
        run = train(
            "bert", fused, tmp_path / str(fused), save_strategy="steps", save_steps=2, eval_strategy="steps",
            eval_steps=2, load_best_model_at_end=True, learning_rate=5e-2,
        )  # fmt: skip
        ends[fused] = run.state.best_global_step, run.evaluate()["eval_loss"]
    assert ends[True][0] == ends[False][0] and ends[True][1] == pytest.approx(ends[False][1], rel=1e-3)


# -- PetuneCallback ---------------------------------------------------------------------------------------------------


def test_callback_tunes_patches_and_unpatches(tmp_path: Path) -> None:
    own = train("bert", False, tmp_path / "own")
    model, callback = build("bert"), pk.PetuneCallback("layernorm")
    assert callback.report is None and callback.tuned is None
    run = trainer(model, tmp_path / "fused", [callback])
    assert callback.report is not None and callback.report.patched and is_patched(model)
    assert callback.tuned is not None and callback.tuned.regime == "layernorm"
    before = run.evaluate()["eval_loss"]
    run.train()
    held = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    assert held == callback.tuned.trainable, "the optimizer must hold what trains and nothing else"
    torch.testing.assert_close(history(run), history(own), rtol=1e-4, atol=1e-4)
    assert not is_patched(model), "unpatched when training ends"
    assert run.evaluate()["eval_loss"] < before
    run.train()  # a second call patches again
    torch.testing.assert_close(run.evaluate()["eval_loss"], own_again(own), rtol=1e-3, atol=1e-4)


def test_callback_refuses_several_gpus_in_one_process(tmp_path: Path) -> None:
    """Trainer would use nn.DataParallel, whose copies of a module keep the forward that is bound to the first."""
    model = build("bert")
    run = trainer(model, tmp_path)
    run.args._n_gpu = 2
    with pytest.raises(RuntimeError, match="2 GPUs .*torchrun"):
        pk.PetuneCallback("layernorm").on_init_end(run.args, run.state, run.control, model=model)
    assert not is_patched(model) and all(p.requires_grad for p in model.parameters())


def own_again(own: Trainer) -> float:
    own.train()
    return own.evaluate()["eval_loss"]


def test_callback_runs_patched_between_begin_and_end(tmp_path: Path) -> None:
    """Every step of both calls of train() goes through the fused forwards, and keep=True leaves them on."""
    from transformers import TrainerCallback

    seen: list[bool] = []

    class Spy(TrainerCallback):
        def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            seen.append(is_patched(model))

    model = build("bert")
    run = trainer(model, tmp_path, [pk.PetuneCallback, Spy()], max_steps=2)  # the class will do: Trainer makes one
    run.train()
    run.train()
    assert seen == [True] * 4 and not is_patched(model)
    model = build("bert")
    run = trainer(model, tmp_path, [pk.PetuneCallback(keep=True)], max_steps=1)
    run.train()
    assert is_patched(model)
    pk.unpatch(model)  # between two calls of train(): patched again
    seen.clear()
    run.add_callback(Spy())
    run.train()
    assert seen == [True] and is_patched(model)


def test_callback_with_model_init(tmp_path: Path) -> None:
    """train() makes a new model then: it is patched; a regime would come after the optimizer and is refused."""

    def tuned() -> nn.Module:
        model = build("bert")
        pk.tune(model, "layernorm")
        return model

    own = train("bert", False, tmp_path / "own", max_steps=2)
    callback = pk.PetuneCallback(keep=True)
    run = trainer(None, tmp_path, [callback], model_init=tuned, max_steps=2)
    run.train()
    assert is_patched(run.model)
    torch.testing.assert_close(history(run), history(own), rtol=1e-4, atol=1e-4)
    run = trainer(None, tmp_path, [pk.PetuneCallback("layernorm")], model_init=lambda: build("bert"), max_steps=2)
    with pytest.raises(RuntimeError, match="regime='layernorm' cannot be set here.*model_init"):
        run.train()


def test_callback_added_later(tmp_path: Path) -> None:
    model = build("bert")
    run = trainer(model, tmp_path, max_steps=1)
    run.add_callback(callback := pk.PetuneCallback(keep=True))
    run.train()
    assert is_patched(model) and callback.report is not None
    run = trainer(build("bert"), tmp_path, max_steps=1)
    run.add_callback(pk.PetuneCallback("bitfit"))
    with pytest.raises(RuntimeError, match="regime='bitfit' cannot be set here.*add_callback"):
        run.train()


def test_memory_levels_in_trainer(tmp_path: Path) -> None:
    """The same losses and parameters at every level, dropout on, with nothing else to set."""
    runs = []
    for level in ("exact", "coded", "recompute", "checkpoint"):
        callback = pk.PetuneCallback("layernorm", memory=level)
        run = trainer(build("bert"), tmp_path, [callback], max_steps=4)
        runs.append((run.train().training_loss, [p for p in run.model.parameters() if p.requires_grad]))
        assert callback.report is not None and callback.report.memory == level
    for loss, parameters in runs[1:]:
        assert abs(loss - runs[0][0]) < 1e-5
        for p, q in zip(parameters, runs[0][1], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_callback_says_what_is_wrong(tmp_path: Path) -> None:
    model = build("bert")
    frozen = [p.requires_grad_(False) for p in model.parameters()]
    optimizer, names = torch.optim.AdamW([frozen[0]]), dict(model.named_parameters()).keys()
    for regime in ("layernorm", "random"):
        with pytest.raises(ValueError, match=f"regime='{regime}' trains .* optimizer given to Trainer does not hold"):
            trainer(model, tmp_path, [pk.PetuneCallback(regime)], optimizers=(optimizer, None))
        assert dict(model.named_parameters()).keys() == names and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="regime"):
        trainer(build("bert"), tmp_path, [pk.PetuneCallback("layer_norm")])
    model = build("bert")
    model.bert.embeddings.LayerNorm = nn.LayerNorm((1, 48))
    with pytest.raises(pk.PatchError, match="strict=True"):
        trainer(model, tmp_path, [pk.PetuneCallback(strict=True)])


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, petune_kernels as pk; assert 'transformers' not in sys.modules; pk.PetuneCallback"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "PetuneCallback" in pk.__all__
    with pytest.raises(AttributeError, match="no attribute 'PetuneCallbacks'"):
        pk.PetuneCallbacks  # noqa: B018
