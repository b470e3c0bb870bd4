"""Pattern `attention`: transformers' attention modules call `ops.attention` through AttentionInterface.

transformers asks the model's config, at every call, which attention function to use and which mask to build for it. The
pattern names ours there, for a whole transformers model at a time, and puts the former names back on unpatch. As with
set_attn_implementation, models that were built from one config object share the choice.

A query that sees no key (padding before a text) gets what the former function gave it: zeros after "sdpa" (on a GPU,
where that differs between torch's kernels, what it would get without a mask), the mean of all values after "eager".
Taken over are these two; another choice (flash, flex) is the user's. On CUDA the op calls torch's fused attention, with
a mask that is made once, and keeps none of it where a part of the model runs again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _frames as frames
from ..ops import attention as op
from . import pattern, trace
from .trace import Trace

NAMES = {"sdpa": "petune", "eager": "petune-eager"}
_OWN = {ours: own for own, ours in NAMES.items()}
_MARK = "_petune_attention"
_SDPA_BY_NAME = re.compile(r"""_attn_implementation\s*(==|!=|in\b|not in\b)[^\n]*["']sdpa["']""")


def marked(root: nn.Module) -> bool:
    return _MARK in root.__dict__


def bound(root: nn.Module) -> bool:
    """Whether it still is: somebody may have chosen another attention since."""
    return marked(root) and any(c._attn_implementation_internal in _OWN for c, _ in root.__dict__[_MARK].before)


def unfit(root: nn.Module) -> str:
    """Why this model's attention is none of ours, or ''."""
    model: Any = root
    own = getattr(model.config, "_attn_implementation", None)
    own = _OWN.get(str(own), own)  # from the config of a patched model
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if own not in ("eager", "sdpa", None):
        return f"attn_implementation is {own!r}, which is kept"
    if any(_asks_for_sdpa(type(m).__module__) for m in root.modules()):
        return "its code does something for attention that is called 'sdpa' alone"
    if any(getattr(config, "output_attentions", False) for config in _configs(root)):
        return "its config asks for output_attentions, which transformers allows with eager attention alone"
    return ""


@functools.cache
def _asks_for_sdpa(module: str) -> bool:
    """Whether a model's file asks for the name (DeepSeek V3.2, to hide keys), under which ours would not be known."""
    if module.startswith("torch.") or not hasattr(sys.modules.get(module), "ALL_ATTENTION_FUNCTIONS"):
        return False
    try:
        return bool(_SDPA_BY_NAME.search(inspect.getsource(sys.modules[module])))
    except OSError:  # installed without its source; then verification alone decides
        return False


def verify(root: nn.Module, seen: Trace) -> tuple[str, list[nn.Module]]:
    """('', the modules whose attention it would run), or what differs. The model is as it was."""
    if root in seen.failed:
        return seen.failed[root], []
    twin, twins = trace.twin_of(seen.ran[root])
    original = {copy: module for module, copy in twins.items()}
    called: list[nn.Module] = []
    configs = _named(root)
    _switch(root)
    try:
        with _listening(called):
            fused = trace.run(twin)
    except Exception as error:  # what the op does not compute, it says: soft caps, sinks
        return f"{type(error).__name__}: {error}", []
    finally:  # also where the names are ours, in a model that shares its config with this one
        _restore(configs)
    if any(module not in original for module in called):
        return "forwards were replaced on instances in it (by accelerate's hooks, say): patch it before that", []
    reason = "; ".join(filter(None, map(pattern.difference, seen.outputs[root], fused)))
    if not reason and not called:
        reason = "none of its modules called the attention function"
    return reason, [original[module] for module in dict.fromkeys(called)]


class _Bound:
    """What is bound in a model: its configs with what they named before, and the modules served, as long as they live.
    A copy that is read in another process makes our names known there."""

    def __init__(self, before: list[tuple[Any, Any]], modules: list[nn.Module]):
        self.before, self._modules = before, [weakref.ref(m) for m in modules]

    @property
    def modules(self) -> list[nn.Module]:
        return [m for ref in self._modules if (m := ref()) is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {"before": self.before, "modules": self.modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        _register(attention_interface)


def bind(root: nn.Module, modules: list[nn.Module]) -> None:
    root.__dict__[_MARK] = _Bound(_switch(root), modules)


def unbind(root: nn.Module) -> None:
    _restore(root.__dict__.pop(_MARK).before)


def disown(model: nn.Module) -> None:
    """Puts transformers' names back wherever ours still stand: in a copied part of a patched model, say."""
    _restore([(config, _OWN.get(name, name)) for config, name in _named(model)])


def served(root: nn.Module) -> list[nn.Module]:
    """The modules whose attention a bound model runs here."""
    return root.__dict__[_MARK].modules


def _configs(root: nn.Module) -> list[Any]:
    """Every config that a module of the model reads, and those inside them, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [
        c for m in root.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")
    ]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [c for name in config.sub_configs if (c := getattr(config, name, None)) is not None]
    return list(found.values())


def _named(root: nn.Module) -> list[tuple[Any, Any]]:
    """(config, the attention function it names)."""
    return [(config, config._attn_implementation_internal) for config in _configs(root)]


def _register(function: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for own, name in NAMES.items():
        masked = -torch.inf if own == "sdpa" else None
        AttentionInterface.register(name, function if own == "sdpa" else functools.partial(_by_its_mask, function))
        AttentionMaskInterface.register(name, functools.partial(attention_mask_interface, masked=masked))


def _switch(root: nn.Module) -> list[tuple[Any, Any]]:
    """Names our functions in every config; returns (config, what it named before)."""
    _register(attention_interface)
    before = [(config, _OWN.get(name, name)) for config, name in _named(root)]
    for config, name in before:
        config._attn_implementation_internal = NAMES.get(name or "sdpa", name)
    return before


def _restore(before: list[tuple[Any, Any]]) -> None:
    for config, name in before:
        if config._attn_implementation_internal in _OWN:  # or what somebody chose since stays
            config._attn_implementation_internal = name


@contextlib.contextmanager
def _listening(called: list[nn.Module]) -> Iterator[None]:
    """Within it, `called` collects the modules that call our attention function."""

    def listen(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        called.append(module)
        return attention_interface(module, *args, **kwargs)

    _register(listen)
    try:
        yield
    finally:
        _register(attention_interface)


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention` as a transformers attention function: AttentionInterface.register("petune", attention_interface).

    query [B, h, S, D]; key, value [B, h_kv, K, D] with h a multiple of h_kv. Returns (o [B, S, h, D], None). Whether a
    causal mask is needed is decided as transformers decides it for SDPA: only without a mask and for more than one row.
    Register `attention_mask_interface` under the same name, too.

    A position_bias (T5's) is added to the mask. While it or the mask itself (Doge's) trains torch's own attention runs,
    which gives its gradient, and with a dropout of 1.

    With output_attentions, which needs the [S, K] tensor, the eager function of the model's own file runs. What a query
    that sees no key gets stays the same.

    Raises:
        ValueError: for what eager attention adds and this op does not: softcap, s_aux (sinks), a cache of pages.
    """
    for name in ("softcap", "s_aux", "cache"):
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(f"attention_interface: {name} is given; not supported, use attn_implementation='eager'")
    S, K, mask = query.shape[2], key.shape[2], attention_mask
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    causal = S > 1 and mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if frames.decided(bool(kwargs.get("output_attentions")) or _collected(module)):
        return _with_weights(module, query, key, value, mask, scale, dropout, causal, **kwargs)
    if causal and K > S:  # filling an empty static cache: the columns past S hold nothing yet
        key, value = key[:, :, :S], value[:, :, :S]
    bias = kwargs.get("position_bias")
    if bias is not None and mask is not None:  # transformers adds the dtype's minimum to a bias, never -inf
        mask = op.additive_mask(mask, query.dtype).clamp_min(torch.finfo(query.dtype).min)
        mask = bias + mask[..., : key.shape[2]]
    elif bias is not None:
        mask = bias[..., : key.shape[2]]
    if dropout >= 1.0 or mask is not None and frames.decided(mask.requires_grad and torch.is_grad_enabled()):
        mask = None if mask is None else op.additive_mask(mask, query.dtype)
        return op.native(query, key, value, mask, dropout, scale, causal).transpose(1, 2), None
    mask = None if mask is None else mask.detach()
    return op.attention(query, key, value, mask, dropout, scale, causal).transpose(1, 2), None


def _by_its_mask(
    function: Any, *args: Any, is_causal: bool | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Eager attention sees what its mask shows, whatever a module says of itself; a mask that hides is always made."""
    return function(*args, is_causal=False, **kwargs)


def _collected(module: nn.Module) -> bool:
    """Whether transformers collects attentions in this call, by hooks on the modules, which get no argument. A compiler
    can ask that only within the model's own forward; elsewhere a module without hooks has none to collect."""
    theirs = sys.modules.get("transformers.utils.output_capturing")
    if theirs is None:
        return False
    collector = theirs._active_collector
    if torch.compiler.is_compiling() and not module._forward_hooks and not getattr(collector, "compiling", True):
        return False
    return "attentions" in (collector.get() or ())


def _with_weights(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float,
    causal: bool, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' eager attention for this module, with the causal mask that it expects and SDPA does without."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"attention_interface: output_attentions is given, and {type(module).__module__} has no eager form"
        )
    if causal:
        S, K = query.shape[2], key.shape[2]
        hidden = torch.ones(S, K, dtype=torch.bool, device=query.device).triu(1 + K - S)
        mask = query.new_zeros(1, 1, S, K).masked_fill(hidden, torch.finfo(query.dtype).min)
    blind = None
    if mask is not None:
        mask = op.additive_mask(mask, query.dtype)
        blind = (mask == -torch.inf).all(-1, keepdim=True)  # of those eager's softmax makes NaN
        mask = mask.clamp_min(torch.finfo(query.dtype).min)
    o, weights = eager(module, query, key, value, mask, scaling=scale, dropout=dropout, **kwargs)
    if blind is not None:
        o = o.masked_fill(blind.transpose(1, 2), 0.0)
        weights = None if weights is None else weights.masked_fill(blind, 0.0)
    return o, weights


def attention_mask_interface(
    dtype: torch.dtype = torch.float32, masked: float | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask to go with it: AttentionMaskInterface.register("petune", attention_mask_interface).

    None where nothing is masked; else one additive mask in the model's dtype, made once a forward: [B, 1, 1, K] where
    every query sees the same keys (an encoder's padding), [B, 1, S, K] otherwise. `masked` is added to a masked score:
    -inf, with which a query that sees nothing gets zeros, as in SDPA (on a GPU `ops.attention.hidden`, with which
    it is as without a mask); None for the dtype's finite minimum, with which it sees every key alike, as in eager.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if kwargs.get("mask_function") is bidirectional_mask_function and not kwargs.get("use_vmap"):
        kwargs["q_length"] = 1
    if masked is None:
        kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(**kwargs)
    if mask is None:
        return None
    if masked is None:
        masked = torch.finfo(dtype).min
    elif masked == -torch.inf:
        masked = op.hidden(mask.device)
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, masked)
