"""Solo patched runs and packed ones, stepped through the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

import petune_kernels as pk
from petune_kernels.studies import adapter

from ..patch.models import batch, build

TUNED = ("layernorm", "layernorm-attention", "layernorm-ffn", "bitfit", "frozen")
REGIMES = (*TUNED, "lora", "prefix", "adapter")
QV = {"bert": ["query", "value"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}
CASES = [(family, regime) for family in QV for regime in REGIMES]


def make(family: str, regime: str, **changes: Any) -> nn.Module:
    """A small random model with what trains chosen, every dropout on."""
    if family == "llama":
        biases = regime == "bitfit"
        changes = {"attention_dropout": 0.1, "attention_bias": biases, "mlp_bias": biases} | changes
    model: Any = build(family, **changes)
    torch.manual_seed(1)
    if regime == "lora":
        return get_peft_model(
            model, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=QV[family], task_type="SEQ_CLS")
        )
    if regime == "prefix":
        return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS"))
    pk.tune(model, "frozen" if regime == "adapter" else regime)
    if regime == "adapter":
        for p in adapter.insert(model, "houlsby", reduction=8):
            p.requires_grad_(True)
    return model


def init(model: nn.Module, wi: int) -> None:
    """Moves everything that trains a little, so that no two replicas start alike and no adapter starts at zero."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def data(family: str, order: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches whose contents depend on `order`; all have one shape."""
    step = 0
    while True:
        with torch.random.fork_rng([]):
            torch.manual_seed(1000 * order + step)
            inputs = batch(family, B=3, S=9)
        yield inputs
        step += 1


@dataclass
class Trainer:
    """What a solo run and a replica do alike: AdamW at its own rate, a schedule, its own clipping."""

    parameters: list[nn.Parameter]
    lr: float
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, eps=1e-6, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: min(1.0, (i + 1) / 5))

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def unlabelled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if k != "labels"}


def solo(model: nn.Module, family: str, do: int, lr: float, steps: int) -> list[float]:
    """A patched run from the model's values; returns its losses."""
    model.train()
    pk.patch(model)
    trainer = Trainer([p for p in model.parameters() if p.requires_grad], lr)
    torch.manual_seed(do)
    for _, inputs in zip(range(steps), data(family, do), strict=False):
        loss = loss_of(model(**unlabelled(inputs)).logits, inputs["labels"])
        loss.backward()
        trainer.step(loss.item())
    pk.unpatch(model)
    return trainer.losses


def packed(
    runs: pk.Replicas,
    family: str,
    lr: Callable[[int], float],
    steps: int,
    stop: dict[int, int],
    clip: float | None = 0.5,
) -> list[list[float]]:
    """All replicas of the packed model; stop: replica -> after how many steps it leaves."""
    runs.model.train()
    trainers = {g: Trainer(runs.parameters(g), lr(g)) for g in runs.active}
    streams = {g: data(family, runs.seeds[g][1]) for g in runs.active}
    for step in range(steps):
        for g in [g for g in runs.active if stop.get(g) == step]:
            runs.stop(g)
        batches = [next(streams[g]) for g in runs.active]
        logits = runs.split(runs.model(**runs.stack([unlabelled(b) for b in batches])).logits)
        losses = [loss_of(one, b["labels"]) for one, b in zip(logits, batches, strict=True)]
        torch.stack(losses).sum().backward()
        for g, loss in zip(runs.active, losses, strict=True):
            trainers[g].step(loss.item())
    return [trainers[g].losses for g in sorted(trainers)]
