"""Pattern `norm`: any nn.LayerNorm over the last dimension."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops.residual_norm import residual_norm
from .pattern import Pattern


def _parts(module: nn.Module) -> Mapping[str, str] | None:
    return {} if isinstance(module, nn.LayerNorm) else None


def _refuse(module: nn.Module, parts: Mapping[str, str]) -> str:
    assert isinstance(module, nn.LayerNorm)
    if type(module).forward is not nn.LayerNorm.forward:
        return f"{type(module).__name__} has a forward of its own"
    if len(module.normalized_shape) != 1:
        return f"it normalises over {len(module.normalized_shape)} dimensions; the kernel takes one"
    return ""


def _sample(module: nn.Module, parts: Mapping[str, str], generator: torch.Generator) -> tuple[Tensor, ...]:
    assert isinstance(module, nn.LayerNorm)
    H, like = module.normalized_shape[0], next(module.parameters())
    return (torch.randn(3, H, generator=generator, device=like.device).to(like.dtype),)


def _forward(module: nn.LayerNorm, parts: Mapping[str, str], input: Tensor) -> Tensor:
    y = residual_norm(input, module.weight, module.bias, eps=module.eps)
    assert isinstance(y, Tensor)
    return y


PATTERN = Pattern("norm", _parts, _refuse, _sample, _forward)
