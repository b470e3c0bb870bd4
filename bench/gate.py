"""What counts as right: outputs and gradients against float64, as a whole and by tiles, bound by eager's own error; and
in training mode, at the size that is timed, outputs that dropout moves as far as eager's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 64  # rows and columns: a kernel that leaves a tail unwritten or one block wrong is off in one tile


def outputs(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def projections(made: Any) -> list[Tensor]:
    """A fixed random dy for each output; of bfloat16 values, so that every dtype can hold it."""
    device = outputs(made)[0].device
    generator = torch.Generator(device).manual_seed(1)
    return [torch.randn(out.shape, generator=generator, device=device).bfloat16() for out in outputs(made)]


def gradients(made: Any, leaves: Mapping[str, Tensor], dys: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of leaves for these dys, in float64."""
    outs = outputs(made)
    found = {f"output {i}": out for i, out in enumerate(outs)}
    if leaves:
        given = [dy.to(out.dtype) for dy, out in zip(dys, outs, strict=True)]
        wanted = torch.autograd.grad(outs, list(leaves.values()), given)
        found |= {f"gradient of {name}": grad for name, grad in zip(leaves, wanted, strict=True)}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def compare(
    found: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    eager_exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    fact: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """What was compared, and '' or why it is wrong.

    The bound is three times eager's error and one unit of the dtype, relative RMS. It holds of every tensor and of its
    worst tile, both relative to the size of the whole tensor. A gradient much smaller than the others is taken relative
    to a thousandth of their common size, as in `studies.train.deviations`.
    """
    rows = []
    small = 1e-3 * _common(exact)
    for name, value in exact.items():
        ours = _errors(found[name], value, small)
        theirs = _errors(eager[name], eager_exact[name], small)
        for part, error, other in zip((name, f"a tile of {name}"), ours, theirs, strict=True):
            rows.append((part, error, 3 * other + torch.finfo(dtype).eps))
    wrong = [row for row in rows if not row[1] <= row[2] < math.inf]
    name, error, bound = max(wrong or rows, key=lambda row: row[1] / row[2])
    reason = f"wrong: {name} is {error:.1e} off float64, allowed {bound:.1e}" if wrong else ""
    return {**fact, "compared": len(exact), "worst": name, "error": shown(error), "bound": shown(bound)}, reason


class InTraining:
    """Compares others with `stock`, which `call` calls, in training mode and at the size that is timed.

    Masks differ, so it is the distance, RMS over seeds, to what `stock` gives without dropout. It is off by more than
    half where dropout is off or has another rate, and where numbers are wrong at this size. Rounding is `compare`'s.
    """

    def __init__(self, stock: nn.Module, call: Callable[[], Tensor]):
        stock.eval()
        with torch.no_grad():
            self._still = call().float()
        stock.train()
        self._moved, self._rounding = self._distance(call), _rms(self._still) / 16

    def verdict(self, call: Callable[[], Tensor]) -> tuple[dict[str, Any], str]:
        """How far dropout moves the output of `call`, and '' or why that is wrong."""
        moved, stock, slack = self._distance(call), self._moved, self._rounding
        wrong = not stock / 1.5 - slack <= moved <= 1.5 * stock + slack
        reason = f"wrong: in training it is {moved:.1e} off stock without dropout, stock {stock:.1e}" if wrong else ""
        return {"moved": shown(moved), "stock": shown(stock)}, reason

    def _distance(self, call: Callable[[], Tensor]) -> float:
        squares = []
        for seed in range(max(4, 64 // len(self._still))):  # fewer rows need more masks
            torch.manual_seed(seed)
            if self._still.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()  # or torch.compile's graphs would wait for a backward
            squares.append((call().detach().float() - self._still).square().mean())
        return torch.stack(squares).mean().sqrt().item()


def _errors(value: Tensor, exact: Tensor, small: float) -> tuple[float, float]:
    size = max(_rms(exact), small) or 1.0
    difference = value - exact
    return _rms(difference) / size, _worst_tile(difference) / size


def _rms(value: Tensor) -> float:
    return value.square().mean().sqrt().item()


def _worst_tile(value: Tensor) -> float:
    """The largest RMS of a tile; a vector's are of TILE elements."""
    rows = value.reshape(-1, value.shape[-1]) if value.dim() > 1 else value.reshape(1, -1)
    return F.avg_pool2d(rows.square()[None], TILE, ceil_mode=True).max().sqrt().item()


def _common(exact: Mapping[str, Tensor]) -> float:
    """The RMS of all gradients together."""
    squares = [(value.square().sum().item(), value.numel()) for name, value in exact.items() if "gradient" in name]
    return math.sqrt(sum(s for s, _ in squares) / max(1, sum(n for _, n in squares)))


def shown(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN
