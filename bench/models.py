"""Whole training steps: forward, backward and AdamW of a classifier, stock (eager, PEFT), patched and compiled."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, repeat
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig

import petune_kernels as pk
from petune_kernels.patch import graphs
from petune_kernels.studies import measure, train
from petune_kernels.studies.errors import StudyError
from petune_kernels.studies.result import Files
from petune_kernels.studies.shapes import SHAPES

from . import harness
from .harness import COMPILED, EAGER, OURS

LORA = {"lora-qv": None, "lora-all": "all-linear"}  # None: PEFT's own choice for the model, query and value in BERT
REGIMES = ("layernorm", "bitfit", "full", *(f"{name} p={p}" for name in LORA for p in ("0.1", "0.0")))

GRAPHED, WHOLE = f"{OURS}, CUDA graphs", f"{OURS}, whole step a CUDA graph"

# How much faster than a peer the step must be: MiniLM, 16 x 128, on a CPU.
TARGETS = {
    ("layernorm", "bfloat16"): {EAGER: 1.9, COMPILED: 2.0},
    ("layernorm", "float32"): {EAGER: 1.4, COMPILED: 2.0},
    ("bitfit", "bfloat16"): {EAGER: 1.9, COMPILED: 2.0},
    ("bitfit", "float32"): {EAGER: 1.4, COMPILED: 2.0},
    ("lora-all p=0.1", "bfloat16"): {EAGER: 3.5},
    ("lora-all p=0.1", "float32"): {EAGER: 1.9},
    ("lora-qv p=0.1", "bfloat16"): {EAGER: 2.4},
}


@dataclass(frozen=True)
class Case:
    """One model shape with random weights, what trains in it, and the batch."""

    shape: str
    regime: str
    dtype: str
    batch: int
    length: int


@dataclass(frozen=True)
class Settings:
    """`layers` cuts the models short (None: as many as the shape has); `memory` takes a fresh process per provider;
    `graphs` (on a GPU) times CUDA graphs of the layers and of the whole step, too."""

    shapes: Sequence[str] = ("minilm",)
    regimes: Sequence[str] = REGIMES
    dtypes: Sequence[str] = tuple(train.DTYPES)
    batch: int = 16
    length: int = 128
    device: str = "cpu"
    rounds: int = 15
    layers: int | None = None
    compile: bool = False
    memory: bool = False
    saved: bool = True
    graphs: bool = False


def run(settings: Settings, files: Files, console: Console) -> dict[str, Any]:
    """Every case of the settings, written after each. Raises StudyError in the end where petune failed its gate."""
    device = torch.device(settings.device)
    harness.check_names("--shape", settings.shapes, list(SHAPES))
    harness.check_names("--regime", settings.regimes, REGIMES)
    result = harness.Result(files, "models", dataclasses.asdict(settings), device)
    asked = cases(settings)
    with harness.progress(console, len(asked)) as begin:
        for case in asked:
            begin(harness.title(dataclasses.asdict(case)))
            result.add(measure_case(case, settings))
    result.finish(console)
    return result.data


def cases(settings: Any) -> list[Case]:
    """Every shape, dtype and regime of the settings, in this order of loops."""
    asked = product(settings.shapes, settings.dtypes, settings.regimes)
    return [Case(shape, regime, dtype, settings.batch, settings.length) for shape, dtype, regime in asked]


def measure_case(case: Case, settings: Settings) -> harness.Row:
    device = torch.device(settings.device)
    batch = random_batch(case, device)
    names = [EAGER, OURS, *([GRAPHED, WHOLE] if settings.graphs else []), *([COMPILED] if settings.compile else [])]
    models = {name: build(case, name, device, settings.layers) for name in names}
    row: harness.Row = {"case": dataclasses.asdict(case), "gate": {}, "refused": {}}
    small = {name: tensor[:4, :64] if tensor.dim() > 1 else tensor[:4] for name, tensor in batch.items()}
    for name in names[1:]:
        row["gate"][name], wrong = gate(models[EAGER], models[name], small)
        if wrong:
            row["refused"][name] = wrong
            del models[name]
    steps = settings.rounds + 3
    runs = {
        name: train.Run(model, repeat(batch), steps, lr=1e-4, seed=0, whole=name == WHOLE)
        for name, model in models.items()
    }
    row |= harness.turns({name: run.step for name, run in runs.items()}, settings.rounds, device, warm=3)
    row["losses"] = {name: run.losses[-1] for name, run in runs.items()}
    row["graphs"] = {name: str(found) for name, found in graphs_of(models.get(GRAPHED)).items()}
    row["targets"] = targets(case, settings, row["petune_over"])
    del models, runs
    if COMPILED in names:
        torch.compiler.reset()
    gc.collect()
    if settings.saved:
        row["saved_bytes_per_token_per_layer"] = {
            name: measure.saved_bytes_per_token_per_layer(functools.partial(build, case, name, device), batch)
            for name in row["seconds"]
            if name in (EAGER, OURS)
        }
    if settings.memory:
        peaks = {
            name: measure.fresh_process(step_memory, case, name, settings)
            for name in row["seconds"]
            if name not in (GRAPHED, WHOLE)
        }
        row["memory"] = {name: dataclasses.asdict(peak) | {"rise": peak.rise} for name, peak in peaks.items()}
    return row


def build(case: Case, provider: str, device: torch.device, layers: int | None = None) -> nn.Module:
    """The case's model in training mode, tuned and, by the provider, patched or compiled. Always the same weights.

    LoRA's B is random instead of zero, or A would have no gradient that the gate could compare.
    """
    shape = config(case)
    model = train.random_model(shape, layers or shape.num_hidden_layers, train.DTYPES[case.dtype], device)
    name, _, p = case.regime.partition(" p=")
    if name in LORA:
        from peft import LoraConfig, TaskType, get_peft_model

        torch.manual_seed(1)
        chosen = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=float(p), target_modules=LORA[name],
            init_lora_weights=False,
        )  # fmt: skip
        model = get_peft_model(model, chosen).train()
    else:
        pk.tune(model, name)
    if provider in (OURS, GRAPHED, WHOLE):
        pk.patch(model, cuda_graphs=provider == GRAPHED)
    elif provider == COMPILED:
        model.compile()  # in place: the parameters keep their names
    return model


def graphs_of(model: nn.Module | None) -> dict[str, Any]:
    """What became of a model's CUDA graphs. The gate sees a model in evaluation, which replays none: the losses of the
    timed steps are in the row for that, the same for every patched provider but for the masks of the whole step, whose
    attention takes another kernel."""
    return {} if model is None else graphs.of(model)


def config(case: Case) -> Any:
    kind, sizes = SHAPES[case.shape]
    return AutoConfig.for_model(kind, num_labels=2, **sizes)


def random_batch(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """Full-length sentences of random tokens, no padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (case.batch, case.length), generator=generator)
    labels = torch.randint(0, 2, (case.batch,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def gate(stock: nn.Module, other: nn.Module, batch: train.Batch) -> tuple[dict[str, Any], str]:
    """What was compared, and '' or why `other` gets no time: logits, loss and gradients against float64, no dropout."""
    rows = train.deviations(stock, other, batch)
    wrong = [row for row in rows if not row.within]
    worst = max(wrong or rows, key=lambda row: row.patched / row.bound)
    fact = {"compared": len(rows), "dropout": "off", "worst": worst.name, "error": worst.patched, "bound": worst.bound}
    if any(value != value for value in (worst.patched, worst.bound)):
        fact |= {"error": str(worst.patched), "bound": str(worst.bound)}  # JSON has no NaN
    reason = f"wrong: {worst.name} is {worst.patched:.1e} off float64, allowed {worst.bound:.1e}" if wrong else ""
    return fact, reason


def targets(case: Case, settings: Settings, over: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets that hold for this case, what was reached, and by how much it falls short (negative: met)."""
    if (case.shape, case.batch, case.length, settings.device, settings.layers) != ("minilm", 16, 128, "cpu", None):
        return []
    wanted = TARGETS.get((case.regime, case.dtype), {})
    return [
        {"over": peer, "target": goal, "reached": over[peer]["median"], "short_by": goal - over[peer]["median"]}
        for peer, goal in wanted.items()
        if peer in over
    ]


def step_memory(case: Case, provider: str, settings: Settings) -> measure.Peak:
    """One step of a provider, for a process that has done nothing else, after a tiny step that sets up what stays."""
    device = torch.device(settings.device)
    model, batch = build(case, provider, device, settings.layers), random_batch(case, device)
    small = {name: tensor[:1, :8] if tensor.dim() > 1 else tensor[:1] for name, tensor in batch.items()}
    # A compiled step is set up by its own shape: another one would be compiled while it is measured.
    batches = [copy.copy(batch), batch] if provider == COMPILED else [small, batch]
    step = train.Run(model, iter(batches), 2, lr=1e-4, seed=0).step
    step()
    if not torch.isfinite(next(model.parameters())).all():
        raise StudyError(f"{harness.title(dataclasses.asdict(case))}, {provider}: a weight is not finite after a step")
    return measure.peak_memory(step, device)
