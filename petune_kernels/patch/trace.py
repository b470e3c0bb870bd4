"""One small forward of the whole model, watched: which module is called with what.

Some patterns depend on how modules are used together: which projections read the same x, what a layer hands to its
attention. transformers' models say what input they take (`dummy_inputs`), so one forward of five tokens shows it. It
runs on a bare copy (pattern.bare): no hook fires, no mode is switched, no random state moves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import meta
from . import pattern


@dataclass(frozen=True)
class Call:
    """How a module was called.

    args, kwargs: of the first call. times: how often. next: the modules that were called with its result. by_name: of
    each child that it calls with keywords only, the first keyword."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    times: int = 1
    next: tuple[nn.Module, ...] = ()
    by_name: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Trace:
    """calls: module -> its Call, in the order of first calls. failed: root module -> why it could not be run."""

    calls: dict[nn.Module, Call] = field(default_factory=dict)
    failed: dict[nn.Module, str] = field(default_factory=dict)
    ran: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """root -> the module that was run for it: the root itself, or its base model"""
    outputs: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    """root -> what that run gave"""
    made: dict[nn.Module, Tensor] = field(default_factory=dict)
    """module -> the first tensor of what it gave"""

    def unused(self, module: nn.Module) -> bool:
        """True where everything could be run and this module was not called."""
        return (
            not self.failed and bool(self.ran) and module not in self.calls and all(r is b for r, b in self.ran.items())
        )


def roots(model: nn.Module) -> list[nn.Module]:
    """The outermost transformers models in `model`."""
    if hasattr(type(model), "dummy_inputs") and hasattr(model, "config"):
        return [model]
    return [root for child in model.children() for root in roots(child)]


def observe(model: nn.Module) -> Trace:
    trace = Trace()
    for root in roots(model):
        reasons = []
        for module in dict.fromkeys(m for m in (root, root.base_model) if isinstance(m, nn.Module)):
            twin, twins = twin_of(module)
            calls: dict[nn.Module, Call] = {}
            made: dict[nn.Module, Tensor] = {}
            for original, copy in twins.items():
                _watch(original, copy, calls, made)
            try:
                trace.outputs[root] = run(twin)
            except Exception as error:  # the reason goes into the report of every pattern that needs the trace
                reasons.append(f"{type(module).__name__} does not run on its own dummy input: {_line(error)}")
                continue
            trace.calls.update(_follow(calls, made))
            trace.made.update(made)
            trace.ran[root] = module
            break
        else:
            trace.failed[root] = "; ".join(reasons)
    return trace


def twin_of(module: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A bare twin of a whole model, and module -> twin for all in it. Somebody's forward around the model (accelerate's
    autocast) is not asked."""
    twins: dict[nn.Module, nn.Module] = {}
    twin = pattern.bare(module, twins)
    twin.__dict__.pop("forward", None)
    return twin, twins


def run(root: nn.Module) -> list[Tensor]:
    """The floating tensors that the model gives for a short input, one of its five tokens padded."""
    device = _device(root)
    unmoved = torch.random.fork_rng([device] if device.type == "cuda" else [])
    valued = meta.Values() if device.type == "meta" else contextlib.nullcontext()
    with torch.no_grad(), unmoved, meta.no_autocast(device), valued:
        return floats(root(**inputs(root)))


def floats(out: Any) -> list[Tensor]:
    """The floating tensors of a model's output."""
    values = list(out.values()) if isinstance(out, Mapping) else list(out) if isinstance(out, tuple) else [out]
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _watch(original: nn.Module, twin: nn.Module, calls: dict[nn.Module, Call], made: dict[nn.Module, Tensor]) -> None:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = calls.get(original, Call(args, kwargs, 0))
        calls[original] = Call(first.args, first.kwargs, first.times + 1)

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, Tensor):
            made.setdefault(original, first)

    twin.register_forward_pre_hook(before, with_kwargs=True)
    twin.register_forward_hook(after)


def _follow(calls: dict[nn.Module, Call], made: dict[nn.Module, Tensor]) -> dict[nn.Module, Call]:
    """The calls, with what was called next. All tensors are alive here, so that an id is one tensor's."""
    takers: dict[int, list[nn.Module]] = {}
    for module, call in calls.items():
        for value in (*call.args[:1], *list(call.kwargs.values())[:1]):
            takers.setdefault(id(value), []).append(module)
    return {
        module: dataclasses.replace(
            call, next=tuple(takers.get(id(made.get(module)), ())), by_name=_by_name(module, calls)
        )
        for module, call in calls.items()
    }


def _by_name(module: nn.Module, calls: dict[nn.Module, Call]) -> dict[str, str]:
    inner = {name: calls[child] for name, child in module.named_children() if child in calls}
    return {name: next(iter(call.kwargs)) for name, call in inner.items() if call.kwargs and not call.args}


def _device(root: nn.Module) -> torch.device:
    return next((p.device for p in root.parameters()), torch.device("cpu"))


def inputs(root: Any) -> dict[str, Any]:
    """A short input: five tokens, or one image."""
    device = _device(root)
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    taken = inspect.signature(root.forward).parameters
    if root.main_input_name == "pixel_values":
        size = root.config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        pixels = torch.linspace(-1, 1, root.config.num_channels * height * width, dtype=torch.float32)
        return {"pixel_values": pixels.view(1, -1, height, width).to(device, dtype)}
    ids = torch.tensor([[7, 6, 5, 4, 3]]).to(device) % max(8, getattr(root.config, "vocab_size", 8))
    found: dict[str, Any] = {name: ids for name in root.dummy_inputs if name.endswith("input_ids")} or {
        "input_ids": ids
    }
    if "attention_mask" in taken:
        found["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0]]).to(device)
    if "use_cache" in taken:
        found["use_cache"] = False
    return found


def _line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:160]}"
