"""CUDA graphs on a GPU: what tests/patch/test_graphs.py cannot see on a CPU. `pytest -m gpu tests/patch`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels import cuda_graph
from petune_kernels.patch import graphs
from petune_kernels.studies import train

from . import models
from .graphed import FIRST, steps

pytestmark = pytest.mark.gpu

FAMILIES = (
    "bert",
    "roberta",
    "distilbert",
    "deberta-v2",
    "modernbert",
    "t5",
    "bart",
    "gpt2",
    "llama",
    "mistral",
    "vit",
)


def build(family: str, regime: str, dtype: torch.dtype, lengths: Any, dropout: bool = True) -> nn.Module:
    more = {} if family == "vit" else {"use_cache": False}
    model = models.build(family, dropout=dropout, **more).to("cuda", dtype).train()
    pk.tune(model, regime)
    pk.patch(model, cuda_graphs=lengths)
    return model


def put(data: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return models.cast({k: v.cuda() for k, v in data.items()}, dtype)


def close(a: models.Step, b: models.Step, tol: float) -> None:
    torch.testing.assert_close(a.loss, b.loss, rtol=tol, atol=tol)
    assert a.grads.keys() == b.grads.keys()
    for name, grad in a.grads.items():
        assert grad.isfinite().all(), name
        size = b.grads[name].float().square().mean().sqrt() + 1e-3
        assert (grad.float() - b.grads[name].float()).square().mean().sqrt() <= 10 * tol * size, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("regime", ("layernorm", "full"))
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_the_plain_run(family: str, regime: str, dtype: torch.dtype) -> None:
    """With dropout: a replay draws what the plain run would draw, and leaves the generator where that would."""
    tol = 1e-4 if dtype == torch.float32 else 3e-2
    batches = [put(models.batch(family, S=S), dtype) for S in (8, 8, 8, 12, 12, 8, 12)]
    dropout = family not in MASKED
    own, other = (build(family, regime, dtype, lengths, dropout) for lengths in (1, False))
    found = steps(own, batches)
    left = torch.cuda.get_rng_state()
    for a, b in zip(found, steps(other, batches), strict=True):
        close(a, b, tol)
    assert not dropout or torch.equal(left, torch.cuda.get_rng_state())
    for stack in graphs.of(own).values():
        assert stack.captured == (1 if family == "vit" else 2) and stack.plain.keys() == {FIRST}
        assert stack.bytes > 0


MASKED = ("gpt2", "llama", "mistral", "modernbert", "t5", "bart")
"""Stacks that build their masks themselves: while captured they never leave one out, so another kernel may draw."""


@pytest.mark.parametrize("family", ("bert", "llama", "t5"))
def test_padded_lengths(family: str) -> None:
    batches = [put(models.batch(family, S=S)) for S in (9, 9, 12, 10, 5, 16, 9)]
    own, other = (build(family, "layernorm", torch.float32, lengths, False) for lengths in (16, False))
    for a, b in zip(steps(own, batches), steps(other, batches), strict=True):
        close(a, b, 1e-4)


def test_dropout_is_fresh_at_every_replay() -> None:
    model, data = build("bert", "layernorm", torch.bfloat16, 1), put(models.batch(S=8))
    assert len({float(model(**data).loss) for _ in range(8)}) > 4
    assert next(iter(graphs.of(model).values())).replayed == 7


def test_lora_under_autocast_with_accumulation() -> None:
    from peft import LoraConfig, get_peft_model

    found = []
    for lengths in (True, False):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False, lora_dropout=0.0)
        model = get_peft_model(models.build("bert", dropout=False), config).cuda().train()
        pk.patch(model, cuda_graphs=lengths)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for i, S in enumerate((8, 9, 8, 30, 31, 8, 9, 12)):
            torch.manual_seed(i)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**put(models.batch(S=S))).loss
            loss.backward()
            losses.append(loss.item())
            if i % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=3e-2)


def test_graphs_of_one_pool_do_not_disturb_each_other() -> None:
    """Shapes in turn, calls whose backward never comes, two calls before one backward."""
    shapes = [put(models.batch(B=B, S=S)) for B, S in ((2, 8), (4, 16), (3, 24), (2, 40))]
    found = []
    for lengths in (1, False):
        model = build("bert", "full", torch.float32, lengths, False)
        grads = []
        for data in itertools.chain(shapes, shapes, reversed(shapes), shapes):
            model.zero_grad()
            model(**shapes[1])
            first, second = model(**data), model(**shapes[0])
            (first.loss + second.loss).backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        found.append(grads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_memory_comes_back() -> None:
    model, data = build("bert", "layernorm", torch.bfloat16, 1), put(models.batch(B=64, S=48))
    for _ in range(3):
        model(**data).loss.backward()
    (found,) = graphs.of(model).values()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held, stated = torch.cuda.memory_reserved(), found.bytes
    pk.unpatch(model)
    del found
    torch.cuda.empty_cache()
    freed = held - torch.cuda.memory_reserved()
    assert stated > 0 and freed >= stated / 2, (stated, freed)


def batches() -> Iterator[train.Batch]:
    for i in itertools.count():
        torch.manual_seed(i)
        data = put(models.batch(S=(8, 8, 12)[i % 3]))
        data["labels"] = data["labels"] % 3
        yield data


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_whole_step_is_the_plain_one(dtype: torch.dtype) -> None:
    """Without dropout, since a captured model never leaves its mask out; then with it: fresh, and ruled by the seed."""
    losses = []
    for whole in (True, False):
        run = train.Run(build("bert", "full", dtype, False, False), batches(), 12, 1e-3, 0, whole=whole)
        for _ in range(12):
            run.step()
        losses.append(run.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 3e-2)
    again = []
    for _ in range(2):
        run = train.Run(build("bert", "layernorm", dtype, False), itertools.repeat(next(batches())), 6, 0.0, 0, True)
        for _ in range(6):
            run.step()
        again.append(run.losses)
    assert again[0] == again[1] and len(set(again[0][1:])) > 2


def test_a_model_on_the_cpu_is_refused() -> None:
    assert cuda_graph.Recorder.device_type == "cuda"
    with pytest.raises(pk.PatchError, match="is on cpu"):
        pk.patch(models.build("bert"), cuda_graphs=True)
