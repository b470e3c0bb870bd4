"""Values for the emulated kernels, and how near to float64 their results must be."""

from __future__ import annotations

import math

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
UNIT = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}


def rand(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def small(G: int, H: int, dtype: torch.dtype) -> torch.Tensor:
    """A parameter away from 0, where x-hat from y would lose its digits."""
    sign = torch.randint(0, 2, (G, H)) * 2 - 1
    value = (torch.rand(G, H) + 0.5) * sign
    return (value[0] if G == 1 else value).to(dtype)


def seeds(n: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (n,))


def double(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def close(name: str, ours: torch.Tensor | None, exact: torch.Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    """Every element is within one rounding to `dtype` of float64, plus fp32 steps, which random-walk over `terms`."""
    if ours is None:
        assert exact.numel() == 0, f"{name} was wanted"
        return
    assert ours.shape == exact.shape, f"{name}: {tuple(ours.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    allowed = UNIT[dtype] * exact.abs() + (12 + 2 * math.sqrt(terms)) * UNIT[F32] * (exact.abs().max() + 1)
    error = (ours.double() - exact).abs()
    worst = (error / allowed).nan_to_num(nan=math.inf).argmax()
    assert (error <= allowed).all(), (
        f"{name}[{worst}]: {ours.flatten()[worst]}, float64 says {exact.flatten()[worst]}; "
        f"{(~(error <= allowed)).sum()} of {error.numel()} are off"
    )
