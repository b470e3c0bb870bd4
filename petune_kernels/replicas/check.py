"""The proof that a model packs, on the model itself: two replicas at once beside the same two alone.

A copy that shares every frozen parameter is run in training mode on a short input, with perturbed values of what trains
(PEFT's B is zero at first) and one seed a replica. Each replica's outputs must be those of a solo run with its values
and seed, and torch's own generator must not move: then every dropout is drawn for each replica, and nothing mixes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from .. import meta
from ..ops import _seeds
from ..patch import PatchReport, pattern, trace

Binders = Mapping[str, Callable[[nn.Module], None]]

_SEEDS = (11, 12)
_ROWS = 2  # of each replica


def twin(model: nn.Module, values: Mapping[int, nn.Parameter], share: bool, forget: Any = None) -> nn.Module:
    """A deep copy without `forget`. values: id of a parameter -> what stands in its place; share: the others are the
    same objects."""
    memo: dict[int, Any] = dict(values)
    if share:
        memo = {id(p): p for p in model.parameters()} | memo
    if forget is not None:
        memo[id(forget)] = None
    return copy.deepcopy(model, memo)


def check(model: nn.Module, trained: Mapping[str, nn.Parameter], binders: Binders, report: PatchReport) -> str:
    """'' where two replicas run as they would alone, else what differs. The model and all generators are as before."""
    roots = trace.roots(model)
    if len(roots) != 1:
        return f"it holds {len(roots)} transformers models; packing is checked on the dummy input of exactly one"
    device = next(model.parameters()).device
    if device.type == "meta":
        return "it is on the meta device"
    inputs = _inputs(roots[0])
    generator = torch.Generator(device).manual_seed(0)
    values = {
        name: torch.stack([p.detach() + 0.1 * _noise(p, generator) for _ in _SEEDS]) for name, p in trained.items()
    }
    cuda = [device] if device.type == "cuda" else []
    try:
        alone = [_twin(model, {id(p): nn.Parameter(values[n][g]) for n, p in trained.items()}) for g in (0, 1)]
        packed = _twin(model, {id(p): nn.Parameter(values[n]) for n, p in trained.items()})
    except Exception as error:  # a module that cannot be copied; nothing was changed
        return f"it cannot be copied: {type(error).__name__}: {error}"
    for path, binder in binders.items():
        binder(packed.get_submodule(path))
    with torch.random.fork_rng(cuda), meta.no_autocast(device):
        own = []
        for g, one in enumerate(alone):
            try:
                own.append(_packed(one, {k: v[_ROWS * g : _ROWS * (g + 1)] for k, v in inputs.items()}, _SEEDS[g]))
            except Exception as error:
                return f"it does not run on a short input: {type(error).__name__}: {_first(error)}"
        before = _state(device)
        try:
            together = _packed(packed, inputs, *_SEEDS)
        except Exception as error:
            return f"packed, it does not run: {type(error).__name__}: {_first(error)}"
        if not _same(before, _state(device)):
            return _culprits(packed, inputs, device, report)
    if any(len(outputs) != len(together) for outputs in own):
        return "packed, it gives other outputs"
    for g, outputs in enumerate(own):
        for i, output in enumerate(outputs):
            rows = together[i].chunk(2)[g] if together[i].dim() else together[i]
            if output.dim() and pattern.difference(output, rows):
                off = (
                    f"by {(output - rows).abs().max():.2g}" if output.shape == rows.shape else f"in shape {rows.shape}"
                )
                return f"two replicas in a batch are not what they are alone: replica {g} differs {off}"
    return ""


def _twin(model: nn.Module, values: Mapping[int, nn.Parameter]) -> nn.Module:
    copied = twin(model, values, share=True)
    for module in copied.modules():
        pattern.drop_hooks(module)
    return copied.train()


def _noise(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(p.shape, generator=generator, device=generator.device).to(p.dtype)


def _inputs(root: Any) -> dict[str, Tensor]:
    """The trace's short input with different contents in every row, each closed by the model's end token."""
    found: dict[str, Tensor] = {}
    end = getattr(root.config, "eos_token_id", None)  # T5 and BART look for it
    for name, value in trace.inputs(root).items():
        if not isinstance(value, Tensor):
            continue
        if value.is_floating_point():
            found[name] = torch.cat([value * (1 - 0.2 * i) for i in range(2 * _ROWS)])
        else:
            rolls = 0 if name == "attention_mask" else 1
            found[name] = torch.cat([value.roll(rolls * i, -1) for i in range(2 * _ROWS)])
            if isinstance(end, int) and name.endswith("input_ids"):
                found[name] = found[name].masked_fill(found[name] == end, end + 1 if end else 1)
                found[name][:, 3] = end
    return found


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return trace.floats(model(**inputs))


def _packed(model: nn.Module, inputs: Mapping[str, Tensor], *seeds: int) -> list[Tensor]:
    with _seeds.replicated(_seeds.Sources(seeds)):
        return _run(model, inputs)


def _state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _culprits(packed: nn.Module, inputs: Mapping[str, Tensor], device: torch.device, report: PatchReport) -> str:
    """Which innermost modules draw from torch's own generator."""
    paths = {module: path for path, module in packed.named_modules()}
    starts: dict[nn.Module, list[Tensor]] = {}
    moved: list[str] = []

    def before(module: nn.Module, args: Any) -> None:
        starts[module] = _state(device)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        path = paths.get(module, "")
        if not _same(starts[module], _state(device)) and not any(m.startswith(path) for m in moved):
            moved.append(path)

    # for all modules at once: hooks on the modules themselves would take them out of the fused forwards
    handles = [hooks.register_module_forward_pre_hook(before), hooks.register_module_forward_hook(after)]
    try:
        _packed(packed, inputs, *_SEEDS)
    finally:
        for handle in handles:
            handle.remove()
    named = []
    for path in moved[:3]:
        reason = report.left_alone.get(path, "")
        named.append(f"{path} ({type(packed.get_submodule(path)).__name__}{', ' + reason if reason else ''})")
    return (
        f"{', '.join(named)} draws torch's own random numbers in training, which are no replica's own; set its dropout "
        "rate to 0"
    )


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
