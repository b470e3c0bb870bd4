"""Pattern `mlp`: a feed-forward block, or its first half, with the bias and the activation as one op.

A module that is called with x alone and holds an activation, one to three projections and perhaps a dropout:

    one     act(up(x))                                    BERT's intermediate
    two     down(act(up(x)))                              ViT, T5, DistilBERT
    two     down(act(u) * g), [u g] = both(x)             ModernBERT
    three   down(act(gate(x)) * up(x))                    Llama, T5 1.1

with a dropout before the last projection or after it. Which reading is right, its own forward says on a sample. A
projection that is no plain nn.Linear (PEFT's LoRA layer, one with hooks) is called, with its own bias.

With parts["coded"] an activation whose output no projection keeps for its own gradients keeps a code (ops/bias_act.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.bias_act import bias_act
from . import activation, linear, pattern, shared_input
from .pattern import Parts, Pattern, is_plain
from .trace import Call


def _widths(module: nn.Module) -> tuple[int, int] | None:
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return widths if all(isinstance(n, int) for n in widths) else None  # type: ignore[return-value]


def _parts(module: nn.Module, call: Call | None) -> Sequence[Parts]:
    widths = {name: w for name, child in module.named_children() if (w := _widths(child))}
    drops = [name for name, child in module.named_children() if type(child) in (nn.Dropout, pattern.Marker)]
    acts = {name: activation.name_of(c) for name, c in module.named_children() if name not in (*widths, *drops)}
    if len(acts) != 1 or None in acts.values() or not widths or len(drops) > 1 or len(widths) > 3:
        return ()
    (act, fn), names = next(iter(acts.items())), list(widths)
    kind, approximate = type(getattr(module, act)), getattr(module, act).__dict__.get("approximate")
    base: dict[str, Any] = {"act": act, "fn": fn, "kind": kind, "approximate": approximate, "coded": False}
    base["next"] = tuple(m for m in call.next if shared_input.is_projection(m)) if call else ()
    if len(names) == 1:
        return () if drops else ({**base, "up": names[0]},)
    down = [n for n in names if all(n == m or widths[n][0] in (widths[m][1], widths[m][1] // 2) for m in names)]
    readings: list[dict[str, Any]] = []
    for last in down:
        first = [n for n in names if n != last]
        if len(first) == 1 and widths[first[0]][1] == 2 * widths[last][0]:
            readings += [{**base, "both": first[0], "down": last, "swap": swap} for swap in (False, True)]
        elif len(first) == 1 and widths[first[0]][1] == widths[last][0]:
            readings.append({**base, "up": first[0], "down": last})
        elif len(first) == 2 and all(widths[n][1] == widths[last][0] for n in first):
            readings += [{**base, "gate": g, "up": u, "down": last} for g, u in (first, reversed(first))]
    return [r | {place: d} for r in readings for d in drops for place in ("mid", "end")] if drops else readings


def _sample(module: nn.Module, parts: Parts, generator: torch.Generator, call: Call | None) -> tuple[Tensor, ...]:
    first: Any = getattr(module, parts.get("both") or parts["up"])
    w = next(first.parameters())
    x = pattern.random_rows(w, first.in_features, generator)
    if w.is_meta:
        return (x,)
    return (x * (8 / first(x).float().std().clamp_min(1e-3)).to(x.dtype),)  # some blocks clamp at 7 or 10


def _project(dense: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """dense(x), its bias apart where that can be fused."""
    if is_plain(dense, nn.Linear):
        return linear.run(dense.weight, None, x), dense.bias
    return dense(x), None


def _halves(dense: Any, x: Tensor, swap: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """What is activated, its bias, and what it is multiplied with: each contiguous, without a copy."""
    if is_plain(dense, nn.Linear):
        w, c = dense.weight.chunk(2), (None, None) if dense.bias is None else dense.bias.chunk(2)
        a, g = (1, 0) if swap else (0, 1)
        return linear.run(w[a], None, x), c[a], linear.run(w[g], c[g], x)
    u, gate = dense(x).chunk(2, -1)
    return (gate, None, u) if swap else (u, None, gate)


def _forward(module: nn.Module, parts: Parts, *args: Tensor, **kwargs: Tensor) -> Tensor:
    if kwargs or len(args) != 1 or _changed(getattr(module, parts["act"]), parts):
        return type(module).forward(module, *args, **kwargs)
    (x,), gate = args, None
    if "both" in parts:
        u, bias, gate = _halves(getattr(module, parts["both"]), x, parts["swap"])
    elif "gate" in parts:
        u, bias = _project(getattr(module, parts["gate"]), x)
        gate = getattr(module, parts["up"])(x)
    else:
        u, bias = _project(getattr(module, parts["up"]), x)
    h = bias_act(u, bias, parts["fn"], gate, coded=parts["coded"] and _spare(module, parts))
    if "mid" in parts:
        h = getattr(module, parts["mid"])(h)
    if "down" in parts:
        h = getattr(module, parts["down"])(h)
    return getattr(module, parts["end"])(h) if "end" in parts else h


def _changed(act: nn.Module, parts: Parts) -> bool:
    """Whether somebody listens to the activation, changed it or put another in its place."""
    own = act.__dict__
    same = type(act) is parts["kind"] and own.get("approximate") == parts["approximate"]
    return not same or "forward" in own or pattern.has_hooks(act)


def _spare(module: nn.Module, parts: Parts) -> bool:
    """Whether every projection that takes h is known and needs no h for its gradients."""
    takers = (getattr(module, parts["down"]),) if "down" in parts else parts["next"]
    found = [shared_input.projection(m) if shared_input.is_projection(m) else None for m in takers]
    return bool(found) and all(
        it is not None and not any(t is not None and t.requires_grad for t in (it.w, it.a, it.b)) for it in found
    )


def _claims(module: nn.Module, parts: Parts) -> Sequence[str]:
    """What is called as a module stays a candidate of its own."""
    fused = "both" if "both" in parts else "gate" if "gate" in parts else "up"
    return ("act", *((fused,) if type(getattr(module, parts[fused])) is nn.Linear else ()))


PATTERN = Pattern("mlp", _forward, _parts, _sample, claims=_claims, sure=False)
