"""What tuning did to a model: features at the head, their change, the change of weights, the size of weights.

`analyse` does all of it for a study: the first seed of every method is tuned once more, and its model is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from petune_kernels.regimes.structure import read

from . import pictures, runner
from .errors import InputError
from .study import Study
from .tasks import Examples
from .tuned_model import weights

ROWS = 200
"""Rows of each part whose features are read; t-SNE of more is slow and hard to look at."""


@torch.no_grad()
def features(model: nn.Module, tokenizer: Any, examples: Examples, length: int = 128, batch: int = 32) -> np.ndarray:
    """What the model's head is given, as float32 [rows, width], dropout off: the backbone's work, not the head's.

    Of a sequence [B, S, H] the first position where the head reads no other one, else the mean over the tokens. Raises
    InputError for a model without a head.
    """
    unwrap: Any = getattr(model, "get_base_model", lambda: model)  # what PEFT has wrapped
    plain: nn.Module = unwrap()
    base = getattr(plain, "base_model", plain)
    heads = [m for m in plain.children() if base is not plain and m is not base and any(True for _ in m.parameters())]
    if not heads:
        raise InputError(f"{type(model).__name__} has no head whose input could be read")
    texts = (examples.texts,) if examples.pairs is None else (examples.texts, examples.pairs)
    found, first_alone = list[Tensor](), None
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in range(0, len(examples), batch):
            part = [column[start : start + batch] for column in texts]
            made = tokenizer(*part, truncation=True, max_length=length, padding=True, return_tensors="pt").to(device)
            given, logits = _head_input(model, heads[0], made)
            if given.dim() == 3 and first_alone is None:
                first_alone = torch.equal(logits, _head_input(model, heads[0], made, first_alone=True)[1])
            if given.dim() == 3:
                mask = made["attention_mask"].unsqueeze(-1).to(given)
                given = given[:, 0] if first_alone else (given * mask).sum(1) / mask.sum(1)
            found.append(given.float().cpu())
    finally:
        model.train(training)
    return torch.cat(found).numpy()


def _head_input(model: nn.Module, head: nn.Module, inputs: Any, first_alone: bool = False) -> tuple[Tensor, Tensor]:
    """What the head's first module is given, and the logits; first_alone: of a sequence whose other positions are 0."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen.append(given[0])
        rest = torch.zeros_like(given[0][:, 1:])
        return (torch.cat([given[0][:, :1], rest], 1), *given[1:]) if first_alone else None

    handle = head.register_forward_pre_hook(hook)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return seen[0], logits


def feature_change(before: np.ndarray, after: np.ndarray) -> float:
    """The mean over rows of the L2 distance between two models' features of the same rows."""
    if before.shape != after.shape:
        raise InputError(f"features have the shapes {before.shape} and {after.shape}; expected the same")
    return float(np.linalg.norm(after - before, axis=-1).mean())


@torch.no_grad()
def weight_change(model: nn.Module, pretrained: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean |delta w| of each weight (see `weights`) that stands in `pretrained`, a state dict, with the same shape.

    What is new, such as a head or an adapter, has no pretrained value and is left out. Raises InputError where no name
    is shared.
    """
    found = {n: w for n, w in weights(model).items() if n in pretrained and pretrained[n].shape == w.shape}
    if not found:
        raise InputError("the model and the pretrained state share no weight")
    return {n: (w.double().cpu() - pretrained[n].double().cpu()).abs().mean().item() for n, w in found.items()}


@torch.no_grad()
def weight_magnitude(model: nn.Module) -> dict[str, float]:
    """Mean |w| of the blocks' weights by kind of module, biases apart: "attention norm", "ffn linear", ...

    The first paper's explanation of why LayerNorms transfer: their weights are the largest.
    """
    parameters = dict(model.named_parameters())
    sums: dict[str, list[float]] = {}
    for member in read(model).members:
        kind = f"{member.part} {member.kind}{' bias' if member.is_bias else ''}"
        weight = parameters[member.name].double().abs()
        total = sums.setdefault(kind, [0.0, 0.0])
        total[0] += weight.sum().item()
        total[1] += weight.numel()
    return {kind: total / count for kind, (total, count) in sorted(sums.items())}


def analyse(study: Study, folder: Path, device: str, say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Tunes the first seed of each method on each task again and writes what it did to the model; returns the files.

    For each task: t-SNE of features of the training and the test part (classification), mean |delta w| by block, the
    features' mean L2 change, and the numbers as JSON. For the study: mean |w| by kind of module before tuning.
    """
    from .train import DTYPES, load_model, load_tokenizer

    source = runner.model_folder(study.model)
    tokenizer = load_tokenizer(source)
    written: list[Path] = []
    first = study.seeds.first
    runs = [r for r in runner.plan(study) if r.wi == r.do == first and r.patched == max(study.patched)]
    runs = [r for r in runs if r.vary == study.seeds.vary[0] and r.stop_on in ("", "loss")]
    for title in dict.fromkeys((r.task.title, r.task.protocol) for r in runs):
        mine = [r for r in runs if (r.task.title, r.task.protocol) == title]
        task = runner.load_task(mine[0].task)
        parts = {"train": task.train, "test": next(iter(task.tests.values()))}
        parts = {name: part.take(range(min(ROWS, len(part)))) for name, part in parts.items()}
        before: nn.Module | None = None
        points: dict[str, tuple[np.ndarray, Any]] = {}
        moved: dict[str, dict[str, float]] = {}
        numbers: dict[str, Any] = {}
        for one in mine:
            say(f"analysing {one.id}")
            model = runner.tuned(study, one, device, keep_model=True).model
            recipe = runner.recipe_of(study, one)
            before = load_model(source, task.labels, first, DTYPES[recipe.dtype], torch.device(device))
            length = recipe.length
            head = read(before).head  # random: nothing that tuning could start from
            state = {name: value for name, value in before.state_dict().items() if name not in head}
            numbers[one.method.title] = {"features": {}, "weights": weight_change(model, state)}
            moved[one.method.title] = _by_block(numbers[one.method.title]["weights"], before)
            for name, part in parts.items():
                now = features(model, tokenizer, part, length)
                change = feature_change(features(before, tokenizer, part, length), now)
                numbers[one.method.title]["features"][name] = change
                points[f"{one.method.title}, {name}"] = (now, part.labels)
        assert before is not None
        stem = "analysis-" + re.sub(r"\W+", "-", "-".join(title)).strip("-")
        figures = {
            "weights": pictures.bars(moved, f"{title[0]}: change of weights", "mean |Δw|"),
            "features": pictures.bars(
                {name: values["features"] for name, values in numbers.items()},
                f"{title[0]}: change of features",
                "mean L2 distance",
            ),
            "magnitudes": pictures.bars({"pretrained": weight_magnitude(before)}, "Size of weights", "mean |w|"),
        }
        if not task.regression:
            figures["tsne"] = pictures.tsne(points, task.names)
        for name, figure in figures.items():
            written.append(folder / f"{stem}-{name}.png")
            figure.savefig(written[-1])
        written.append(folder / f"{stem}.json")
        written[-1].write_text(json.dumps(numbers | {"magnitudes": weight_magnitude(before)}, indent=1) + "\n")
    return written


def _by_block(changes: Mapping[str, float], model: nn.Module) -> dict[str, float]:
    """Mean change of a block's scalars, from its parameters' means; what is in no block is left out."""
    anatomy = read(model)
    means = {}
    for k in range(len(anatomy.blocks)):
        mine = {m.name: anatomy.parameters[m.name].numel() for m in anatomy.members if m.block == k}
        found = {name: count for name, count in mine.items() if name in changes}
        if found:
            means[f"block {k + 1}"] = sum(changes[n] * count for n, count in found.items()) / sum(found.values())
    return means
