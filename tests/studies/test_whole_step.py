"""A whole step as one graph against the plain run, over a recorder of CPU ops (tests/recorder.py)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels import cuda_graph
from petune_kernels.studies import train, whole_step
from petune_kernels.studies.errors import StudyError

from ..recorder import Recorder

CPU = torch.device("cpu")


def batches() -> Iterator[train.Batch]:
    """Of two widths, and now and then a smaller one."""
    generator = torch.Generator().manual_seed(0)
    for rows, width in itertools.cycle(((4, 9), (4, 9), (4, 12), (2, 9), (4, 9), (4, 12))):
        ids = torch.randint(5, 17, (rows, width), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, width // 2 :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def run(folder: Path, regime: str, dtype: torch.dtype, whole: bool) -> tuple[train.Run, nn.Module]:
    model = train.load_model(folder, 2, 0, dtype, CPU)
    pk.tune(model, regime)
    pk.patch(model)
    return train.Run(model, batches(), 20, 1e-2, seed=5, whole=whole), model


@pytest.mark.parametrize("regime", ("layernorm", "bitfit", "full", "random"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_step_is_the_plain_run_s(
    regime: str, dtype: torch.dtype, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, with dropout, and in the end parameters: warm-up, decay, float32 copies, one seed a step."""
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    (own, model), (other, stock) = (run(tiny_model, regime, dtype, whole) for whole in (True, False))
    before = copy.deepcopy(model.state_dict())
    for _ in range(20):
        own.step()
        other.step()
    assert own.losses == pytest.approx(other.losses, rel=1e-5)
    step = own._step
    assert isinstance(step, whole_step.WholeStep) and (step.captured, step.plain, step.replayed) == (3, 3, 17)
    for (name, p), q in zip(model.state_dict().items(), stock.state_dict().values(), strict=True):
        if name.endswith("key.bias"):  # its gradient is rounding, which Adam brings to the size of the others
            continue
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any(not p.equal(before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_clipping_is_in_the_graph(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    found = []
    for whole, clip in ((True, 1e-3), (False, 1e-3), (True, None)):
        model = train.load_model(tiny_model, 2, 0, torch.float32, CPU, dropout=False)
        trained = list(model.parameters())
        updates = train.Updates([(trained, 1e-2)], 6, clip=clip, capturable=whole, eps=1e-3)

        def once(batch: train.Batch, model: nn.Module = model, updates: train.Updates = updates) -> torch.Tensor:
            loss, _ = train.loss_of(model, batch)
            loss.backward()
            updates.apply()
            return loss.detach()

        step, losses = whole_step.WholeStep(once, CPU) if whole else once, []
        for batch in itertools.islice(batches(), 6):
            losses.append(step(batch).item())
            updates.advance()
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(found[2], rel=1e-3)


def test_shapes_are_bounded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    monkeypatch.setattr(whole_step, "MOST", 1)
    own, _ = run(tiny_model, "layernorm", torch.float32, True)
    for _ in range(6):
        own.step()
    assert isinstance(own._step, whole_step.WholeStep)
    assert (own._step.captured, own._step.plain, own._step.replayed) == (1, 4, 2)


def test_needs_a_gpu(tiny_model: Path) -> None:
    with pytest.raises(StudyError, match="needs a model on an NVIDIA GPU; this one is on cpu"):
        run(tiny_model, "layernorm", torch.float32, True)


def test_a_step_that_waits_for_the_gpu_is_refused_before_its_capture(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture that fails takes the process's random numbers with it. The first step ran, and counts."""
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    monkeypatch.setattr(Recorder, "record", lambda *_: pytest.fail("captured"))
    model = train.load_model(tiny_model, 2, 0, torch.float32, CPU)
    losses = []

    def once(batch: train.Batch) -> torch.Tensor:
        loss, _ = train.loss_of(model, batch)
        losses.append(loss.item())
        return loss.detach()

    step, batch = whole_step.WholeStep(once, CPU), next(batches())
    assert step(batch).item() == losses[0]
    with pytest.raises(StudyError, match="this one waits for the GPU"):
        step(batch)
    assert len(losses) == 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("how", ("recompute", "checkpoint", "transformers"))
def test_a_step_that_runs_forwards_again_is_refused(
    how: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward would set the generator back in the capture, and leave it there."""
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    model = train.load_model(tiny_model, 2, 0, torch.float32, CPU)
    pk.tune(model, "layernorm")
    pk.patch(model, memory="exact" if how == "transformers" else how)
    if how == "transformers":
        model.gradient_checkpointing_enable()
    by = "gradient checkpointing" if how == "transformers" else f"memory='{how}'"
    with pytest.raises(StudyError, match=f"backward runs a forward again .*, by {by}.*which no graph may"):
        train.Run(model, batches(), 20, 1e-2, seed=5, whole=True)
    train.Run(model, batches(), 20, 1e-2, seed=5).step()
    model.gradient_checkpointing_disable()
    pk.patch(model, memory="coded")
    train.Run(model, batches(), 20, 1e-2, seed=5, whole=True).step()
