"""Loading a classifier, training it step by step, and the check that two variants of it compute the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from petune_kernels.patch.memory import runs_again
from petune_kernels.regimes.sampled import VALUES
from petune_kernels.regimes.structure import read

from .errors import InputError, StudyError, first_line
from .whole_step import WholeStep

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARMUP = 0.1
STRIDE = 1_000_003  # a prime above any number of steps: no two (seed, step) pairs share a dropout stream

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model")
"""Patterns, one of which every tokenizer that was saved has."""

Batch = Mapping[str, torch.Tensor]


def read_config(folder: Path, labels: int, dropout: bool = True) -> Any:
    """The model's config with `labels` classes; without `dropout`, every dropout rate in it is 0."""
    try:
        config = AutoConfig.from_pretrained(folder, num_labels=labels, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {folder} is not a folder with a transformers model: {first_line(error)}") from error
    if not dropout:
        without_dropout(config)
    return config


def without_dropout(config: Any) -> None:
    """Sets every dropout rate in a config to 0."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


def load_model(
    folder: Path, labels: int, seed: int, dtype: torch.dtype, device: torch.device, dropout: bool = True
) -> nn.Module:
    """The pretrained encoder with a new head of `labels` classes; `seed` alone decides the head. In training mode.

    A head that stands in the folder is not used, or its values would take the place of the seed's. Raises InputError
    where the folder has no config, no weights as safetensors (pickled ones are not read), or not all of the backbone's.
    """
    config = read_config(folder, labels, dropout)
    torch.manual_seed(seed)
    try:
        with _quiet():  # transformers reports the new head, which is what we asked for
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                output_loading_info=True,
                config=config,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                use_safetensors=True,  # never a pickle
            )
    except (OSError, ValueError) as error:
        raise InputError(f"--model {folder} cannot be loaded as a classifier: {first_line(error)}") from error
    names = set(read(model).head)
    _check_backbone(folder, set(info["missing_keys"]) - names, "weights of the backbone are missing")
    other = {key for key, *_ in info["mismatched_keys"]} - names
    _check_backbone(folder, other, "weights of the backbone have not the shapes of its config")
    torch.manual_seed(seed)
    for path, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(path, recurse=False) if name in names}
        for p in own.values():
            p._is_hf_initialized = False  # transformers leaves alone what it has loaded
        if own:
            model._init_weights(module)
    return model.to(device=device, dtype=dtype).train()


def _check_backbone(folder: Path, keys: set[str], how: str) -> None:
    """Raises InputError where there are such keys: transformers gives them random values."""
    if keys:
        listed = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        hint = "; models for masked words are saved without the pooler, which a classifier reads"
        pooler = all(".pooler." in key for key in keys)
        raise InputError(f"--model {folder}: {how}: {listed}{hint if pooler else ''}")


def random_model(config: Any, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of this config's shape with `layers` layers and random weights, in training mode."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).to(device=device, dtype=dtype).train()


def checkpoint_layers(model: Any) -> None:
    """transformers' own checkpointing of every layer, by the name that this version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def load_tokenizer(folder: Path) -> Any:
    """Raises InputError where the folder has none: for some models transformers makes one up that knows no word."""
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise InputError(f"--model {folder} has no tokenizer: none of the files {', '.join(TOKENIZER_FILES)} is there")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {folder} has no tokenizer that can be loaded: {first_line(error)}") from error


def loss_of(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, in float32 or better whatever the model's dtype, and the logits."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, batch["labels"]), logits


class Updates:
    """AdamW with warm-up and linear decay over groups of parameters, each (parameters, learning rate).

    In bfloat16 it updates float32 copies of what trains: at 1e-3 most steps of a LayerNorm weight near 1 are below
    bfloat16's resolution of 2^-8. Step i of `steps`, from 0, has the rate
    lr min((i + 1) / w, (steps - i) / (steps - w)), with w = warmup * steps, rounded, at least 1. clip bounds the norm
    of all gradients together. `adamw`: betas, eps, weight_decay (of all that trains). capturable: rates are tensors on
    the device, so that `apply` can be captured in a CUDA graph; `advance` stays outside.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[nn.Parameter], float]],
        steps: int,
        warmup: float = WARMUP,
        clip: float | None = None,
        capturable: bool = False,
        **adamw: Any,
    ):
        self._trained = [p for parameters, _ in groups for p in parameters]
        self._wide = [p if p.dtype == torch.float32 else p.detach().float() for p in self._trained]
        self._clip = clip
        wide, listed = iter(self._wide), []
        self._rates, self._done = [rate for _, rate in groups], 0
        for parameters, rate in groups:
            lr = torch.tensor(rate, device=parameters[0].device) if capturable else rate
            listed.append({"params": [next(wide) for _ in parameters], "lr": lr})
        fused = not any(p.is_meta for p in self._wide)  # on a CPU a fifth of the default's time; not there on meta
        self.optimizer = torch.optim.AdamW(listed, fused=fused, capturable=capturable, **adamw)
        if capturable:  # the first step runs plainly, of which torch warns
            self.optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        self._steps, self._warm = steps, max(1, round(warmup * steps))
        self._set_rates()

    def step(self) -> None:
        """Applies and then drops the gradients."""
        self.apply()
        self.advance()

    def apply(self) -> None:
        """A step at the present rates, without the schedule."""
        with torch.no_grad():
            for p, wide in zip(self._trained, self._wide, strict=True):
                if wide is not p:
                    wide.grad = None if p.grad is None else p.grad.float()
            if self._clip is not None:
                nn.utils.clip_grad_norm_(self._wide, self._clip)
            self.optimizer.step()
            for p, wide in zip(self._trained, self._wide, strict=True):
                if wide is not p:
                    p.copy_(wide)
                p.grad = wide.grad = None

    def advance(self) -> None:
        """To the next step's rates."""
        self._done += 1
        self._set_rates()

    def _set_rates(self) -> None:
        i, left = self._done, max(1, self._steps - self._warm)
        factor = min((i + 1) / self._warm, max(0.0, (self._steps - i) / left))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor


class Run:
    """A training run: AdamW over the parameters that require a gradient, warm-up over a tenth of `steps`, linear decay.

    Two runs with the same weights, batches and seed see the same data in the same order, and the generators are seeded
    before every step, so they can be stepped in turn in one process.

    whole: replay each step as one CUDA graph (whole_step.py). For a model on an NVIDIA GPU, whose parameters, modes and
    rates of dropout stay as they are while it runs, patched without cuda_graphs of its own, with memory "exact" or
    "coded".
    """

    def __init__(
        self, model: nn.Module, batches: Iterator[Batch], steps: int, lr: float, seed: int, whole: bool = False
    ):
        self.model, self.losses = model, list[float]()
        self._batches, self._seed = batches, seed
        if whole and (again := runs_again(model)):  # it sets the generator back, which no graph can
            raise StudyError(f"a whole step as one graph: backward runs a forward again ({again}), which no graph may")
        trained = [p for p in model.parameters() if p.requires_grad]
        self._updates = Updates([(trained, lr)], steps, capturable=whole)
        self._step = WholeStep(self._once, trained[0].device) if whole else self._once

    def step(self) -> None:
        torch.manual_seed(self._seed * STRIDE + len(self.losses))
        loss = self._step(next(self._batches))
        self._updates.advance()
        self.losses.append(loss.item())

    def _once(self, batch: Batch) -> torch.Tensor:
        loss, _ = loss_of(self.model, batch)
        loss.backward()
        self._updates.apply()
        return loss.detach()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The share of rows whose largest logit is their label, dropout off; the model's mode is left as it was."""
    training, right, rows = model.training, 0, 0
    model.eval()
    for batch in batches:
        _, logits = loss_of(model, batch)
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        rows += len(logits)
    model.train(training)
    return right / rows


@dataclass(frozen=True)
class Deviation:
    """How far one tensor of each variant lies from float64, relative to its size (RMS), and the bound on `patched`."""

    name: str
    stock: float
    patched: float
    bound: float

    @property
    def within(self) -> bool:
        return self.patched <= self.bound < math.inf  # false for NaN


def deviations(stock: nn.Module, patched: nn.Module, batch: Batch) -> list[Deviation]:
    """Logits, loss and every gradient of both variants against a float64 copy of `stock`, with dropout off.

    The bound on `patched` is 3 times the error of `stock` (two roundings of the same sum differ by chance) plus 8
    units of the dtype. A tensor much smaller than the others (the key bias of attention has no gradient but rounding)
    is taken relative to a thousandth of their common size. The loss is one number, which `stock` may have right by
    chance: its error counts as at least that of the logits. So may be the few scalars that regime random has of a
    parameter: those of all parameters are one tensor here.
    """
    exact = _results(copy.deepcopy(stock).double(), batch)
    ours, theirs = _results(patched, batch), _results(stock, batch)
    if ours.keys() != exact.keys():
        different = sorted(ours.keys() ^ exact.keys())
        raise InputError(f"stock and patched model do not give the same gradients: {', '.join(different[:5])}")
    dtype = next(stock.parameters()).dtype
    by_chance = {"loss": _rms(theirs["logits"] - exact["logits"]) / (_rms(exact["logits"]) or 1.0)}
    common = 1e-3 * _rms(torch.cat([g.flatten() for name, g in exact.items() if name.startswith("gradient")]))
    rows = []
    for name, value in exact.items():
        size = max(_rms(value), common) or 1.0
        own, other = _rms(theirs[name] - value) / size, _rms(ours[name] - value) / size
        bound = 3 * max(own, by_chance.get(name, 0.0)) + 8 * torch.finfo(dtype).eps
        rows.append(Deviation(name, own, other, bound))
    return rows


def _results(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    training = model.training
    model.eval()  # no dropout; the backward of these models is the same in both modes
    loss, logits = loss_of(model, batch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    model.train(training)
    results = {"loss": loss, "logits": logits}
    found = {n: g for n, g in zip(trained, gradients, strict=True) if g is not None}
    drawn = [found.pop(n).flatten() for n in list(found) if n.endswith(VALUES)]
    results |= {f"gradient of {n}": g for n, g in found.items()}
    if drawn:
        results["gradient of all sampled scalars"] = torch.cat(drawn)
    return {name: tensor.detach().double() for name, tensor in results.items()}


@contextmanager
def _quiet():
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _rms(tensor: torch.Tensor) -> float:
    return tensor.norm().item() / math.sqrt(max(1, tensor.numel()))
