"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021) in transformer blocks, post-norm or pre-norm.

    y = dense(x);    dense'(x) = y + up(relu(down(y))),    down [H/r, H], up [H, H/r], both with biases

stands in the place of a block's closing projection, so it comes before the dropout, the residual sum and, in post-norm
blocks, the LayerNorm: Houlsby's has one after attention and one after the feed-forward network, Pfeiffer's the latter
only. (AdapterHub's Pfeiffer configuration runs the pretrained LayerNorm once more before its adapter; it has the same
parameters.) Per block and place that is 2 H (H/r) + H/r + H parameters. `pk.patch` may come before or after.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from petune_kernels.patch import trace
from petune_kernels.regimes.structure import Anatomy, read

PLACEMENTS = {"pfeiffer": ("ffn",), "houlsby": ("attention", "ffn")}
_CONFIG, _WEIGHTS, _BASE = "bottlenecks.json", "bottlenecks.safetensors", "base"


class Adapted(nn.Module):
    """A projection [.., K] -> [.., H] followed by a bottleneck with a residual of its own."""

    def __init__(self, dense: nn.Linear, width: int, std: float):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.dense = dense
        self.down = nn.Linear(dense.out_features, width).to(dense.weight)
        self.act = nn.ReLU()
        self.up = nn.Linear(width, dense.out_features).to(dense.weight)
        for linear in (self.down, self.up):  # small, so that tuning starts near the pretrained function
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x)
        return y + self.up(self.act(self.down(y)))

    def new_parameters(self) -> list[nn.Parameter]:
        return [*self.down.parameters(), *self.up.parameters()]


def insert(model: nn.Module, placement: str = "pfeiffer", reduction: int = 64, std: float = 0.02) -> list[nn.Parameter]:
    """Puts an adapter into every block; gives their parameters. What trains is left for the caller to choose.

    reduction: the bottleneck is H // reduction wide. std: of the initial weights, from torch's generator.
    Raises ValueError for an unknown placement, a reduction outside 1 to H, a model that has adapters already, and one
    whose blocks do not close with an nn.Linear of their own (experts; GPT-2's Conv1D). The model is then as before.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; accepted are {', '.join(PLACEMENTS)}")
    if type(reduction) is not int or reduction < 1:
        raise ValueError(f"reduction is {reduction!r}; accepted is an int from 1")
    if adapters(model):
        raise ValueError("model: it has adapters already; remove() takes them out")
    places = _places(model, PLACEMENTS[placement])
    if narrow := [path for path, tail, name in places if _linear(tail, name).out_features < reduction]:
        raise ValueError(f"reduction is {reduction}, more than the width of {narrow[0]}")
    added: list[nn.Parameter] = []
    for _, tail, name in places:
        dense = _linear(tail, name)
        adapted = Adapted(dense, dense.out_features // reduction, std).train(tail.training)
        setattr(tail, name, adapted)
        added += adapted.new_parameters()
    return added


def remove(model: nn.Module) -> None:
    """Takes all adapters out again: the very same projections as before `insert`."""
    for path in adapters(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, model.get_submodule(path).dense)


def adapters(model: nn.Module) -> dict[str, Adapted]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def save(model: nn.Module, folder: Path) -> None:
    """Writes the adapters alone: bottlenecks.safetensors and bottlenecks.json. ValueError without adapters."""
    found = adapters(model)
    if not found:
        raise ValueError("model: it has no adapter to save")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in _state(found).items()}, folder / _WEIGHTS)
    widths = {path: module.down.out_features for path, module in found.items()}
    (folder / _CONFIG).write_text(json.dumps({"bottleneck": widths}, indent=1) + "\n", encoding="utf-8")


def save_pretrained(model: Any, folder: Path) -> None:
    """`save`, and the transformers model without its adapters in the folder `base`. ValueError without adapters.

    A folder of its own, or transformers' from_pretrained(folder) would give a model that lacks the adapters.
    """
    save(model, folder)
    plain = copy.deepcopy(model)
    remove(plain)
    plain.save_pretrained(folder / _BASE)


def from_pretrained(folder: str | Path, auto: Any = AutoModelForSequenceClassification) -> Any:
    """The model of `save_pretrained`, adapters and head included, in evaluation mode.

    auto: the class of transformers that loads the base. Raises OSError where files are missing, ValueError where they
    do not fit.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {_CONFIG}; it is no folder that adapter.save_pretrained has written")
    model = auto.from_pretrained(folder / _BASE, local_files_only=True, use_safetensors=True)
    load(model, folder)
    return model


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> list[nn.Parameter]:
    """Puts the adapters of `save` into a model without any. ValueError where they do not fit; it is then as before."""
    if adapters(model):
        raise ValueError("model: it has adapters already; remove() takes them out")
    widths = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["bottleneck"]
    tensors = load_file(folder / _WEIGHTS)
    places = {path: (tail, name) for path, tail, name in _places(model, PLACEMENTS["houlsby"])}
    if unknown := sorted(widths.keys() - places.keys()):
        raise ValueError(f"{folder} has an adapter for {unknown[0]}, which this model lacks")
    built = {path: Adapted(_linear(*places[path]), width, 0.0) for path, width in widths.items()}
    wanted = _state(built)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if shapes != {key: tuple(value.shape) for key, value in wanted.items()}:
        raise ValueError(f"{folder / _WEIGHTS} does not fit this model: other names or shapes")
    for key, value in wanted.items():
        value.copy_(tensors[key])
    for path, module in built.items():
        tail, name = places[path]
        setattr(tail, name, module.train(tail.training))
    return [p for module in built.values() for p in module.new_parameters()]


def _state(found: dict[str, Adapted]) -> dict[str, Tensor]:
    return {
        f"{path}.{part}.{name}": p
        for path, module in found.items()
        for part in ("down", "up")
        for name, p in getattr(module, part).named_parameters()
    }


def _places(model: nn.Module, parts: tuple[str, ...]) -> list[tuple[str, nn.Module, str]]:
    """Path of each closing projection of the blocks' `parts`, the module that holds it and its name there."""
    anatomy = read(model)
    part_of = {member.name: member for member in anatomy.members}
    places: dict[tuple[int, str], str] = {}
    for path, module in model.named_modules():
        names = {type(child): name for name, child in module.named_children()}
        if names.keys() != {nn.Linear, nn.Dropout, nn.LayerNorm} or len(module._modules) != 3:
            continue
        name = f"{path}.{names[nn.Linear]}"
        member = part_of.get(f"{name}.weight")
        if member is not None and member.part in parts:
            places[member.block, member.part] = name
    wanted = [(block, part) for block in range(len(anatomy.blocks)) for part in parts]
    if places.keys() < set(wanted):
        places |= _last_called(model, anatomy)
    if missing := [key for key in wanted if key not in places]:
        block, part = missing[0]
        raise ValueError(
            f"model: block {block} of {type(model).__name__} does not close its {part} with one nn.Linear that is as "
            "wide as what the block reads; adapters stand after such projections"
        )
    split = [places[key].rpartition(".") for key in wanted]
    return [(places[key], model.get_submodule(path), name) for key, (path, _, name) in zip(wanted, split, strict=True)]


def _last_called(model: nn.Module, anatomy: Anatomy) -> dict[tuple[int, str], str]:
    """The last linear that each part of each block calls, where it closes the part: it gives what the first one reads.

    One of several linears of one name (experts) closes nothing.
    """
    linears: dict[tuple[int, str], list[str]] = {}
    names = {module: name for name, module in model.named_modules()}
    part_of = {member.name: member for member in anatomy.members}
    for module in trace.observe(model).calls:
        member = part_of.get(f"{names[module]}.weight")
        if type(module) is nn.Linear and member is not None:
            linears.setdefault((member.block, member.part), []).append(names[module])
    found = {}
    for key, paths in linears.items():
        first, last = (model.get_submodule(path) for path in (paths[0], paths[-1]))
        alone = len({path.rpartition(".")[2] for path in paths}) == len(paths)
        if alone and first.in_features == last.out_features:
            found[key] = paths[-1]
    return found


def _linear(tail: nn.Module, name: str) -> nn.Linear:
    linear = getattr(tail, name)
    assert isinstance(linear, nn.Linear)
    return linear
