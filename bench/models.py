"""Whole training steps: forward, backward and AdamW of a classifier, stock (eager, PEFT), patched and compiled."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from petune_kernels.studies.errors import InputError, StudyError
from petune_kernels.studies.result import Files
from petune_kernels.studies.shapes import SHAPES

from . import harness, trainer_loop
from .gate import InTraining, shown
from .harness import COMPILED, EAGER, OURS

LORA = {"lora-qv": None, "lora-all": "all-linear"}  # None: PEFT's own choice for the model, query and value in BERT
REGIMES = ("layernorm", "bitfit", "full", *(f"{name} p={p}" for name in LORA for p in ("0.1", "0.0")))
ABSENT = {"tinyllama": ("bitfit",)}  # a Llama has no biases

GRAPHED, WHOLE = f"{OURS}, CUDA graphs", f"{OURS}, whole step a CUDA graph"

# How much faster than a peer the step must be. MiniLM, 16 x 128, on a CPU:
TARGETS = {
    ("layernorm", "bfloat16"): {EAGER: 1.9, COMPILED: 2.0},
    ("layernorm", "float32"): {EAGER: 1.4, COMPILED: 2.0},
    ("bitfit", "bfloat16"): {EAGER: 1.9, COMPILED: 2.0},
    ("bitfit", "float32"): {EAGER: 1.4, COMPILED: 2.0},
    ("lora-all p=0.1", "bfloat16"): {EAGER: 3.5},
    ("lora-all p=0.1", "float32"): {EAGER: 1.9},
    ("lora-qv p=0.1", "bfloat16"): {EAGER: 2.4},
}
# On a GPU: BERT-base and RoBERTa-large at 32 x 512, where kernels decide, and at 128 tokens, where launches do.
LARGE_ON_GPU = {EAGER: 1.5, COMPILED: 1.15, harness.compiled("reduce-overhead"): 1.15}
SMALL_ON_GPU = {OURS: 1.5, GRAPHED: 4.0}  # over eager; ours in Trainer's loop
WARM = 3  # steps before timing: a shape is captured, and a compiled model compiled, by then


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
    """`regimes`: all that a shape has if empty; `layers` cuts the models short (None: as many as the shape has);
    `compile`: torch.compile's modes; `memory` takes a fresh process per provider; `graphs` (on a GPU) times CUDA graphs
    of the layers and of the whole step, too; `trainer`: steps of each turn of transformers' Trainer (0: none)."""

    shapes: Sequence[str] = ("minilm",)
    regimes: Sequence[str] = ()
    dtypes: Sequence[str] = tuple(train.DTYPES)
    batch: int = 16
    length: int = 128
    device: str = "cpu"
    rounds: int = 15
    layers: int | None = None
    compile: Sequence[str] = ()
    memory: bool = False
    saved: bool = True
    graphs: bool = False
    trainer: int = 0


def run(settings: Settings, files: Files, console: Console) -> dict[str, Any]:
    """Every case of the settings, written as it grows. Raises StudyError in the end where petune has no time."""
    device = torch.device(settings.device)
    check_shapes(settings.shapes, settings.length)
    harness.check_names("--regime", settings.regimes, REGIMES)
    result = harness.Result(files, "models", dataclasses.asdict(settings), device)
    asked = cases(settings.shapes, settings, settings.regimes)
    with harness.progress(console, len(asked)) as begin:
        for case in asked:
            begin(harness.title(dataclasses.asdict(case)))
            row = harness.new_row(dataclasses.asdict(case))
            result.add(row)
            for _ in measure_case(case, settings, row):
                result.replace(row)
    result.finish(console)
    return result.data


def cases(
    shapes: Sequence[str], settings: Any, regimes: Sequence[str] = (), known: Sequence[str] = REGIMES
) -> list[Case]:
    """Every shape, dtype and regime, in this order of loops; without `regimes` all `known` ones that the shape has."""
    return [
        Case(shape, regime, dtype, settings.batch, settings.length)
        for shape, dtype in product(shapes, settings.dtypes)
        for regime in regimes or [name for name in known if name not in ABSENT.get(shape, ())]
    ]


def measure_case(case: Case, settings: Settings, row: harness.Row) -> Iterator[None]:
    """Fills the row part by part, what is soonest there first: a run that is cut short keeps the parts before."""
    device = torch.device(settings.device)
    batch = random_batch(case, device)
    own: dict[str, str | None] = dict.fromkeys([EAGER, OURS, *([GRAPHED, WHOLE] if settings.graphs else [])])
    with harness.reported(row):
        time_steps(case, own, batch, settings, row)
    yield
    if settings.compile and row["seconds"]:
        left: dict[str, str | None] = {name: None for name in own if name in row["seconds"]}
        modes: dict[str, str | None] = {harness.compiled(mode): mode for mode in settings.compile}
        # what fails here costs none of the times that are there
        harness.attempt(
            {COMPILED: left | modes}, row["refused"], lambda _, wanted: time_steps(case, wanted, batch, settings, row)
        )
        torch.compiler.reset()
        yield
    gc.collect()
    timed = [name for name in own if name in row["seconds"]]
    if settings.trainer and timed:
        row |= harness.attempt(
            {"trainer": [name for name in timed if name != WHOLE]},
            row["refused"],
            lambda _, names: trainer_loop.times(case, names, settings.trainer, device, settings.layers),
        )
        yield
    row["targets"] = targets(case, settings, row)
    if settings.saved:
        row["saved_bytes_per_token_per_layer"] = {
            name: measure.saved_bytes_per_token_per_layer(functools.partial(build, case, name, device), batch)
            for name in timed
            if name in (EAGER, OURS)
        }
    if settings.memory:
        # a GPU's allocator counts what is allocated; a process's resident memory also depends on what it did before
        apart = measure.fresh_process if device.type == "cpu" else lambda function, *args: function(*args)
        peaks = harness.attempt(
            {name: None for name in row["seconds"] if name not in (GRAPHED, WHOLE)},
            row["refused"],
            lambda name, _: apart(step_memory, case, name, settings),
        )
        row["memory"] = {name: dataclasses.asdict(peak) | {"rise": peak.rise} for name, peak in peaks.items()}
    yield


def time_steps(
    case: Case, wanted: Mapping[str, str | None], batch: train.Batch, settings: Settings, row: harness.Row
) -> None:
    """Gate and whole steps of these providers (and torch.compile's modes), in turn."""
    device, refused = torch.device(settings.device), row["refused"]

    def ready(name: str, model: nn.Module) -> Callable[[], object]:
        run = runs[name] = train.Run(model, repeat(batch), settings.rounds + WARM, 1e-4, seed=0, whole=name == WHOLE)

        def step() -> None:
            if wanted[name] is not None:
                torch.compiler.cudagraph_mark_step_begin()
            run.step()

        for _ in range(WARM):
            step()
        if not math.isfinite(run.losses[-1]):
            raise StudyError(f"its loss is {run.losses[-1]}")
        return step

    runs: dict[str, train.Run] = {}
    models = harness.attempt(wanted, refused, lambda name, mode: build(case, name, device, settings.layers, mode))
    judge(models, batch, row)
    steps = harness.attempt(models, refused, ready)
    harness.needed(steps)
    row |= harness.turns(steps, settings.rounds, device, warm=0)
    row["losses"] = {name: runs[name].losses[-1] for name in steps}
    row["graphs"] = {name: str(found) for name, found in graphs_of(models.get(GRAPHED)).items()}


def build(
    case: Case, provider: str, device: torch.device, layers: int | None = None, mode: str | None = None
) -> nn.Module:
    """The case's model in training mode, tuned and, by the provider, patched, or compiled in this mode of
    torch.compile. Always the same weights.

    LoRA's B is random instead of zero, or A would have no gradient that the gate could compare.
    """
    shape = config(case)
    with torch.device(device):  # where a GPU draws a large model's weights in no time
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
    elif mode is not None:
        # in place: the parameters keep their names; for the shape that comes, or the gate's would make all dynamic
        model.compile(dynamic=False, mode=mode)
    return model


def graphs_of(model: nn.Module | None) -> dict[str, Any]:
    """What became of a model's CUDA graphs. The gate sees gradients in evaluation only, which replays none: the losses
    of the timed steps are in the row for that, the same for every patched provider but for the masks of the whole step,
    whose attention takes another kernel."""
    return {} if model is None else graphs.of(model)


def check_shapes(shapes: Sequence[str], length: int, known: Sequence[str] = tuple(SHAPES)) -> None:
    """Raises InputError for a shape that is not known, or has fewer positions than `length`."""
    harness.check_names("--shape", shapes, known)
    for shape in shapes:
        kind, sizes = SHAPES[shape]
        found = AutoConfig.for_model(kind, **sizes)
        places = found.max_position_embeddings - (found.pad_token_id + 1 if kind == "roberta" else 0)
        if length > places:
            raise InputError(f"--length is {length}, but {shape} has {places} positions")


def config(case: Case) -> Any:
    """With weights of a size that keeps that of rows: the usual 0.02 makes attention uniform, a wrong one unseen."""
    kind, sizes = SHAPES[case.shape]
    found = AutoConfig.for_model(kind, num_labels=2, **sizes)
    found.initializer_range = found.hidden_size**-0.5
    return found


def random_batch(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """Full-length sentences of random tokens, no padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (case.batch, case.length), generator=generator)
    labels = torch.randint(0, 2, (case.batch,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def judge(models: dict[str, nn.Module], batch: train.Batch, row: harness.Row) -> None:
    """Takes every model that is wrong out of `models`, by `gate` on a part of the batch or in training on all of it."""

    def logits(model: nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: train.loss_of(model, batch)[1]

    def verdict(name: str, model: nn.Module) -> str:
        fact, wrong = gate(stock, model, small)
        training, wrong_there = in_training.verdict(logits(model))
        row["gate"][name] = fact | {"training": training}
        return wrong or wrong_there

    stock, small = harness.needed(models), part(batch, 4, 64)
    in_training = InTraining(stock, logits(stock))
    harness.judge(models, row["refused"], verdict)


def part(batch: train.Batch, rows: int, length: int) -> train.Batch:
    return {name: t[:rows, :length] if t.dim() > 1 else t[:rows] for name, t in batch.items()}


def gate(stock: nn.Module, other: nn.Module, batch: train.Batch) -> tuple[dict[str, Any], str]:
    """What was compared, and '' or why `other` gets no time: logits, loss and gradients against float64, no dropout."""
    rows = train.deviations(stock, other, batch)
    wrong = [row for row in rows if not row.within]
    worst = max(wrong or rows, key=lambda row: row.patched / row.bound)
    fact = {"compared": len(rows), "dropout": "off", "worst": worst.name}
    fact |= {"error": shown(worst.patched), "bound": shown(worst.bound)}
    reason = f"wrong: {worst.name} is {worst.patched:.1e} off float64, allowed {worst.bound:.1e}" if wrong else ""
    return fact, reason


def targets(case: Case, settings: Settings, row: harness.Row) -> list[dict[str, Any]]:
    """The targets that hold for this case, what was reached, and by how much it falls short (negative: met)."""
    found: list[tuple[str, str, float, float]] = []
    over, shape = row["petune_over"], (case.batch, case.length)
    if settings.layers is not None:
        return []
    if settings.device == "cpu" and (case.shape, shape) == ("minilm", (16, 128)):
        wanted = TARGETS.get((case.regime, case.dtype), {})
        found = [(OURS, peer, goal, over[peer]["median"]) for peer, goal in wanted.items() if peer in over]
    elif settings.device == "cuda" and case.dtype == "bfloat16":
        if case.shape in ("bert-base", "roberta-large") and shape == (32, 512):
            found = [(OURS, peer, goal, over[peer]["median"]) for peer, goal in LARGE_ON_GPU.items() if peer in over]
        elif shape in ((16, 128), (32, 128)):
            reached = {GRAPHED: row["speedup"], OURS: row.get("trainer", {}).get("speedup", {})}
            found = [(n, EAGER, g, reached[n][n]["median"]) for n, g in SMALL_ON_GPU.items() if n in reached[n]]
    return [
        {"of": of, "over": peer, "target": goal, "reached": got, "short_by": goal - got}
        for of, peer, goal, got in found
    ]


def step_memory(case: Case, provider: str, settings: Settings) -> measure.Peak:
    """One step of a provider, for a process that has done nothing else, after a tiny step that sets up what stays."""
    device = torch.device(settings.device)
    mode = {harness.compiled(m): m for m in settings.compile}.get(provider)
    model, batch = build(case, provider, device, settings.layers, mode), random_batch(case, device)
    # A compiled step is set up by its own shape: another one would be compiled while it is measured.
    batches = [copy.copy(batch), batch] if mode is not None else [part(batch, 1, 8), batch]
    step = train.Run(model, iter(batches), 2, lr=1e-4, seed=0).step
    step()
    if not torch.isfinite(next(model.parameters())).all():
        raise StudyError(f"{harness.title(dataclasses.asdict(case))}, {provider}: a weight is not finite after a step")
    return measure.peak_memory(step, device)
