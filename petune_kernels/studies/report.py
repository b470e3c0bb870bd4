"""`petune report`: what a training step keeps and needs at most, predicted without a run, and measured beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import MODEL_MAPPING

import petune_kernels as pk
from petune_kernels import meta
from petune_kernels.regimes.structure import read

from . import footprint, machine, measure, methods, shapes, train
from .errors import InputError, first_line

STOCK = "stock"
CHECKPOINTED = "HF checkpointing"
LEVELS = (STOCK, CHECKPOINTED, "exact", "coded", "recompute", "checkpoint")
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """model: as for shapes.read_shape. regime: a method of one stage, with its options. device: whose kernels count.

    levels: of memory, each a bar. head: one of shapes.HEADS. padded: half of the sentences are half as long.
    """

    model: str
    regime: str = "layernorm"
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 16
    length: int = 128
    dtype: str = "float32"
    levels: Sequence[str] = LEVELS
    device: str = "cpu"
    head: str = "auto"
    labels: int = 2
    padded: bool = False
    dropout: bool = True


def run(settings: Settings, measured: bool, console: Console) -> dict[str, Any]:
    """A prediction of every level and, if `measured`, what a run of it takes; plain JSON values.

    Raises InputError for what does not fit; a level that does not fit the regime has its reason instead, unless it is
    the only one.
    """
    settings = _of_images(settings)
    result: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "command": machine.command(),
        "machine": machine.describe(),
        "levels": {},
        "refused": {},
    }
    for level in settings.levels:
        with console.status(f"following a step, {level}"):
            try:
                found = predict(settings, level)
            except pk.PatchError as error:
                if len(settings.levels) == 1:
                    raise InputError(f"--memory {level}: {error}") from error
                result["refused"][level] = str(error)
                continue
        row: dict[str, Any] = {"predicted": dataclasses.asdict(found) | {"total": found.total}}
        if measured:
            with console.status(f"running a step, {level}"):
                row["measured"] = measure_level(settings, level)
        result["levels"][level] = row
    return result


def _of_images(settings: Settings) -> Settings:
    """For a model of images with the patches of one as its length. Raises InputError for other models than of token ids
    or images."""
    config = shapes.read_shape(settings.model, settings.labels)
    kind = MODEL_MAPPING.get(type(config), None)
    reads = getattr(kind[0] if isinstance(kind, tuple) else kind, "main_input_name", "input_ids")
    if reads == "input_ids" and hasattr(config, "vocab_size"):
        return settings
    size = getattr(config, "image_size", None)
    if reads != "pixel_values" or size is None:
        raise InputError(f"{settings.model} reads {reads} and more; accepted: models of token ids, or of images alone")
    if settings.padded:
        raise InputError(f"--padded: {settings.model} reads images of one size")
    height, width = (size, size) if isinstance(size, int) else size
    patch = getattr(config, "patch_size", None)
    side = patch if isinstance(patch, int) else 16
    return dataclasses.replace(settings, length=(height // side) * (width // side))


def predict(settings: Settings, level: str) -> footprint.Footprint:
    """Raises InputError where the model does not do without values, and PatchError where the level does not fit."""
    values = meta.Values()
    with meta.standing_for(settings.device):
        with values:
            model, blocks = build(settings, level, torch.device("meta"))
            batch = make_batch(settings, model, torch.device("meta"))
        try:
            return footprint.follow(model, blocks, batch, loss_of, values)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            why = first_line(error)
            raise InputError(f"{settings.model}: a step cannot be followed without values: {why}") from error


def build(settings: Settings, level: str, device: torch.device) -> tuple[nn.Module, list[nn.Module]]:
    """The model with random weights (none on the meta device), in training mode, tuned, and patched by the level; and
    its layers."""
    for option, given, accepted in (("dtype", settings.dtype, train.DTYPES), ("memory", level, LEVELS)):
        if given not in accepted:
            raise InputError(f"--{option} is {given!r}; accepted: {', '.join(accepted)}")
    config = shapes.read_shape(settings.model, settings.labels)
    room = getattr(config, "max_position_embeddings", None) or settings.length
    if settings.length > room:
        raise InputError(f"--length is {settings.length}, but the model takes at most {room} positions")
    if not settings.dropout:
        train.without_dropout(config)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # decoders need one to classify a batch
    torch.manual_seed(0)
    with torch.device(device):
        model = shapes.model_class(config, settings.head).from_config(config).to(train.DTYPES[settings.dtype]).train()
        try:
            anatomy = read(model)
            blocks = [model.get_submodule(name) for name in anatomy.blocks]
            stages = methods.method(settings.regime, **settings.options).stages()
            if len(stages) > 1:
                raise InputError(
                    f"--regime {settings.regime} has stages ({', '.join(s.name for s in stages)}); ask for one"
                )
            setting = methods.Setting(lambda: model, 0, _no_losses, anatomy.head, model)
            model, around = stages[0].prepare(setting)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"--regime {settings.regime}: {error}") from error
    if around is not None:
        raise InputError(f"--regime {settings.regime} changes the update itself, which is not followed")
    model.train()
    if level == CHECKPOINTED:
        train.checkpoint_layers(model)
    elif level != STOCK:
        pk.patch(model, memory=level)
    return model, blocks


def _no_losses(model: nn.Module) -> Any:
    raise InputError("a method that needs the task's losses cannot be followed")


def make_batch(settings: Settings, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Random tokens (pixels for a vision model), a mask, and labels where the model has a head for them."""
    B, S = settings.batch, settings.length
    base: Any = model
    config, generator = base.config, torch.Generator().manual_seed(0)
    labels: Tensor | None = torch.randint(0, settings.labels, (B,), generator=generator)
    if base.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        pixels = torch.randn(B, config.num_channels, size, size, generator=generator)
        batch = {"pixel_values": pixels.to(train.DTYPES[settings.dtype])}
    else:
        low, high = min(1000, config.vocab_size // 4), config.vocab_size
        ids = torch.randint(low, high, (B, S), generator=generator)
        mask = torch.ones_like(ids)
        if settings.padded:
            mask[: -(-B // 2), S // 2 :] = 0
            ids = torch.where(mask.bool(), ids, config.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        if settings.head.endswith("lm"):
            labels = torch.where(mask.bool(), ids, -100)
    if shapes.has_labels(config, settings.head):
        assert labels is not None
        batch["labels"] = labels
    return {name: t.to(device) for name, t in batch.items()}


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the classes; a language model's own loss; of a model without a head, the mean square."""
    labels = batch.get("labels")
    if labels is None:
        return model(**batch)[0].float().square().mean()
    return train.loss_of(model, batch)[0] if labels.dim() == 1 else model(**batch).loss


def measure_level(settings: Settings, level: str) -> dict[str, Any]:
    """Saved bytes, and the rise of memory by a step, in fresh processes; on a CPU also with freed blocks given back."""
    found = measure.fresh_process(run_step, settings, level, False)
    if settings.device == "cpu":
        found["rise_given_back"] = measure.fresh_process(run_step, settings, level, True)["rise"]
    return found


def run_step(settings: Settings, level: str, give_back: bool) -> dict[str, Any]:
    """The second of two steps, for a process that has done nothing else: the first sets up what stays.

    give_back: see measure.give_blocks_back.
    """
    device = torch.device(settings.device)
    if give_back:
        measure.give_blocks_back()
    model, _ = build(settings, level, device)
    batch = make_batch(settings, model, device)
    updates = train.Updates([([p for p in model.parameters() if p.requires_grad], 1e-3)], steps=3)

    def step() -> None:
        loss_of(model, batch).backward()
        updates.step()

    step()
    peak = measure.peak_memory(step, device)
    apart = [*model.parameters(), *model.buffers(), *batch.values()]
    saved = measure.saved_bytes(lambda: loss_of(model, batch), apart)
    return {"saved": saved, "before": peak.before, "rise": peak.rise, "method": peak.method}


def table(result: Mapping[str, Any]) -> list[Table | Text]:
    """Saved bytes by tensor and the peak by category, one column a level; then predicted beside measured."""
    s, levels = result["settings"], result["levels"]
    rows = {name: row["predicted"] for name, row in levels.items()}
    tokens = s["batch"] * s["length"]
    what = f"{s['model']}, {s['regime']}, {s['batch']} x {s['length']} tokens, {s['dtype']}, {s['device']}"
    saved = Table(title=f"{what}: saved for backward, MiB", title_justify="left")
    _columns(saved, rows)
    for group in footprint.GROUPS:
        if any(group in row["groups"] for row in rows.values()):
            saved.add_row(group, *(_mib(row["groups"].get(group, 0)) for row in rows.values()))
    saved.add_section()
    saved.add_row("total", *(_mib(row["saved"]) for row in rows.values()))
    saved.add_row("  outside the layers", *(_mib(row["outside"]) for row in rows.values()))
    middle = [row["layers"][len(row["layers"]) // 2] for row in rows.values()]
    saved.add_row("  a layer, bytes a token", *(f"{size / tokens:,.0f}" for size in middle))
    peak = Table(title="at the worst moment of a step, MiB", title_justify="left")
    _columns(peak, rows)
    for name in footprint.PARTS:
        if any(name in row["peak"] for row in rows.values()):
            peak.add_row(name, *(_mib(row["peak"].get(name, 0)) for row in rows.values()))
    peak.add_section()
    peak.add_row("total", *(_mib(row["total"]) for row in rows.values()))
    peak.add_row("  rise by the step", *(_mib(row["rise"]) for row in rows.values()))
    shown: list[Table | Text] = [saved, peak]
    if any("measured" in row for row in levels.values()):
        shown.append(_beside(levels, s["device"]))
    shown += [Text(f"{level}: {reason}", style="yellow") for level, reason in result["refused"].items()]
    return shown


def _beside(levels: Mapping[str, Any], device: str) -> Table:
    beside = Table(title="predicted beside measured, MiB", title_justify="left")
    _columns(beside, levels)
    measured = [row["measured"] for row in levels.values()]
    predicted = [row["predicted"] for row in levels.values()]
    for name, key in (("saved", "saved"), ("rise by the step", "rise_given_back" if device == "cpu" else "rise")):
        own = [p["saved" if key == "saved" else "rise"] for p in predicted]
        beside.add_row(f"{name}, predicted", *map(_mib, own))
        beside.add_row(f"{name}, measured", *(_mib(m[key]) for m in measured))
        off = (f"{100 * (p / m[key] - 1):+.1f} %" if m[key] else "" for p, m in zip(own, measured, strict=True))
        beside.add_row("  predicted is off by", *off)
        beside.add_section()
    if device == "cpu":
        beside.caption = (
            "measured with freed blocks of 64 KiB or more given back; smaller ones add to what is predicted"
        )
        beside.add_row("rise with glibc as it is by default", *(_mib(m["rise"]) for m in measured))
    return beside


def _columns(shown: Table, levels: Mapping[str, Any]) -> None:
    for name in ("", *levels):
        shown.add_column(name, justify="right" if name else "left")


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f}" if size >= MIB / 20 or size == 0 else f"{size / MIB:.3f}"
