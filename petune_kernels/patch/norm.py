"""Pattern `norm`: any LayerNorm or RMSNorm over the last dimension.

A module without children and with one vector of weights (and, for a LayerNorm, perhaps a bias) is one of: nn.LayerNorm;
an RMSNorm that multiplies by its weight (Llama, T5); an RMSNorm that multiplies by one plus its weight (Gemma). Which
of them it is, its own forward says on a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.residual_norm import residual_norm
from . import pattern
from .pattern import Parts, Pattern
from .trace import Call

_EPS = ("eps", "variance_epsilon", "epsilon")


def readings(module: nn.Module, call: Call | None = None) -> Sequence[Parts]:
    if isinstance(module, nn.LayerNorm):
        return ({"kind": "layer"},)
    if module._modules or module._buffers or list(module._parameters) != ["weight"] or module.weight is None:
        return ()
    eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    if eps is None and not isinstance(module, nn.RMSNorm):
        return ()
    return tuple({"kind": kind, "eps": eps} for kind in ("rms", "rms+1"))


def _refuse(module: nn.Module, parts: Parts) -> str:
    weight: Any = module.weight
    if isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward:
        return f"{type(module).__name__} has a forward of its own"
    dims = len(module.normalized_shape) if isinstance(module, nn.LayerNorm) else weight.dim()
    if dims != 1:
        return f"it normalises over {dims} dimensions; the kernel takes one"
    return ""


def _sample(module: nn.Module, parts: Parts, generator: torch.Generator, call: Call | None) -> tuple[Tensor, ...]:
    H = module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else module.weight.shape[0]  # type: ignore
    like = next(module.parameters(), torch.empty(0, device=generator.device))
    return (pattern.random_rows(like, int(H), generator),)


def settings(module: Any, parts: Parts, x: Tensor) -> dict[str, Any]:
    """What residual_norm needs to do this norm's work on x."""
    if parts["kind"] == "layer":
        return {"gamma": module.weight, "beta": module.bias, "eps": module.eps}
    eps = getattr(module, parts["eps"]) if parts["eps"] else module.eps
    if eps is None:  # torch's own default
        eps = torch.finfo(x.dtype).eps
    gamma = module.weight if parts["kind"] == "rms" else 1.0 + module.weight.float()
    return {"gamma": gamma, "eps": eps, "rms": True}


def serves(module: Any, parts: Parts, x: Tensor) -> bool:
    """Whether the op's result has this norm's dtype: an RMSNorm's product with a wider weight has the weight's, the
    op's result x's."""
    return parts["kind"] == "layer" or module.weight.dtype == x.dtype


def widened(x: Tensor) -> Tensor:
    """x as torch's layer_norm takes it: CUDA's autocast runs it in float32."""
    return x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") else x


def _forward(module: Any, parts: Parts, *args: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or len(args) != 1 or not serves(module, parts, args[0]):
        return type(module).forward(module, *args, **kwargs)
    (x,) = args
    x = widened(x) if parts["kind"] == "layer" else x
    y = residual_norm(x, **settings(module, parts, x))
    assert isinstance(y, Tensor)
    return y


PATTERN = Pattern("norm", _forward, readings, _sample, _refuse)
