"""Whole layers, called as their model calls them, forward and backward to their input: gate, turns and CUDA graphs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from petune_kernels.studies import train
from petune_kernels.studies.result import Files

from . import gate, harness, models
from .harness import EAGER, OURS
from .op_runs import GATE_ELEMENTS, Settings, Turn, time_turns


def run(settings: Settings, regimes: Sequence[str], files: Files, console: Console) -> dict[str, Any]:
    """One layer of each shape in the regimes of `models`. Raises StudyError in the end where petune has no time."""
    device = torch.device(settings.device)
    models.check_shapes(settings.widths, settings.length)
    harness.check_names("--regime", regimes, models.REGIMES)
    result = harness.Result(files, "layers", dataclasses.asdict(settings) | {"regimes": list(regimes)}, device)
    cases = models.cases(settings.widths, settings, regimes)
    with harness.progress(console, len(cases)) as begin:
        for case in cases:
            begin(harness.title(dataclasses.asdict(case)))
            result.add(measure(case, settings))
            torch.compiler.reset()
    result.finish(console)
    return result.data


def measure(case: models.Case, settings: Settings) -> harness.Row:
    device, dtype = torch.device(settings.device), train.DTYPES[case.dtype]
    row = harness.new_row(dataclasses.asdict(case))
    modes = {harness.compiled(mode): mode for mode in settings.compile}

    def build(name: str, mode: str | None) -> Layer:
        layer = Layer(case, OURS if name == OURS else EAGER, device)
        if mode is not None:  # static: after the gate's shape, torch would take the timed one for dynamic
            layer.module.compile(dynamic=False, mode=mode)
        return layer

    def ready(name: str, layer: Layer) -> Turn:
        inputs = {"x": layer.random(layer.whole, dtype), **layer.trained()}
        return Turn(name, lambda t, p, seed: layer(t["x"], layer.whole), 0.0, [inputs], device)

    with harness.reported(row):
        built = harness.attempt({EAGER: None, OURS: None, **modes}, row["refused"], build)
        check(built, dtype, row)
        torch.compiler.reset()  # nothing compiled for evaluation is timed
        check_training(built, dtype, row)
        time_turns(harness.attempt(built, row["refused"], ready), row, settings)
    return row


class Layer:
    """The only layer of a model built with one, and how the model calls it: in the `whole` batch, or for the gate in
    `some` of it, as many sequences as have scores that float64 can hold.

    What a model gives its layer beside the hidden states (positions, masks) is its own affair: it is recorded.
    """

    def __init__(self, case: models.Case, provider: str, device: torch.device):
        model: Any = models.build(case, provider, device, 1)
        model.config.use_cache = False  # a cache would grow from call to call
        (self.module,) = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 1)
        batch = {name: t for name, t in models.random_batch(case, device).items() if name != "labels"}
        self.whole = self._recorded(model, batch)
        rows = max(1, GATE_ELEMENTS // (model.config.num_attention_heads * case.length**2))
        self.some = self._recorded(model, {name: t[:rows] for name, t in batch.items()})

    def _recorded(self, model: nn.Module, batch: train.Batch) -> tuple[Any, Any]:
        """The layer's arguments and keywords in a forward of the model."""
        seen = []
        hook = self.module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            model(**batch)
        hook.remove()
        (call,) = seen
        return call

    def __call__(self, x: Tensor, call: tuple[Any, Any]) -> Tensor:
        args, kwargs = call
        return gate.outputs(self.module(x, *args[1:], **kwargs))[0]

    def random(self, call: tuple[Any, Any], dtype: torch.dtype) -> Tensor:
        """An input of the shape of this call's."""
        like = call[0][0]
        generator = torch.Generator(like.device).manual_seed(0)
        return torch.randn(like.shape, generator=generator, device=like.device).to(dtype).requires_grad_()

    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def check(layers: dict[str, Layer], dtype: torch.dtype, row: harness.Row) -> None:
    """Takes every layer whose output or gradients are wrong out of `layers` and says why in the row; no dropout."""
    stock = harness.needed(layers)
    wide = copy.copy(stock)
    wide.module = copy.deepcopy(stock.module).double()
    wide.some = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, stock.some)
    x = stock.random(stock.some, dtype).detach()
    dys = gate.projections(x)  # the output is as the input

    def results(layer: Layer, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        layer.module.eval()
        found = gate.gradients(layer(x, layer.some), {"x": x, **layer.trained()}, dys)
        layer.module.train()
        return found

    exact, eager = results(wide, x.double()), results(stock, x)

    def verdict(name: str, layer: Layer) -> str:
        row["gate"][name], wrong = gate.compare(results(layer, x), eager, exact, exact, dtype, {"dropout": "off"})
        return wrong

    harness.judge(layers, row["refused"], verdict)


def check_training(layers: dict[str, Layer], dtype: torch.dtype, row: harness.Row) -> None:
    """The same for outputs in training mode, dropout on, at the size that is timed."""

    def output(layer: Layer) -> Callable[[], Tensor]:
        return lambda: layer(x, layer.whole)

    def verdict(name: str, layer: Layer) -> str:
        row["gate"][name]["training"], wrong = in_training.verdict(output(layer))
        return wrong

    stock = harness.needed(layers)
    x = stock.random(stock.whole, dtype)
    in_training = gate.InTraining(stock.module, output(stock))
    harness.judge(layers, row["refused"], verdict)
