r"""residual_norm: bias, dropout, residual sum and LayerNorm or RMSNorm in one pass each way.

Forward, for a row of width H (keep is the dropout mask, scaled by 1/(1-p)):

    z = residual + keep * (x + bias)        mu = mean(z) (0 for RMSNorm)
    rstd = (mean((z - mu)^2) + eps)^(-1/2)  xhat = (z - mu) * rstd        y = xhat * gamma + beta

Backward. With g = dy * gamma, from d mu / dz = 1/H and d rstd / dz = -rstd^2 * xhat / H (Ba et al. 2016; Zhang and
Sennrich 2019 without the mean):

    dz = rstd * (g - mean(g) - xhat * mean(g * xhat))  [+ what flows into z itself, where z is an output]
    dresidual = dz      dx = keep * dz      dbias = sum_rows dx
    dgamma = sum_rows dy * xhat             dbeta = sum_rows dy

All five come from one pass over dy and ONE saved row; mean(g) drops out for RMSNorm. The saved row is

    z      where z exists as a tensor anyway: it is an output, or x itself when there is no bias, dropout or residual.
           mu is then summed again from the row, which is exact: xhat is not rounded a second time.
    x-hat  otherwise. Rounding x-hat to bf16 costs what eager pays for rounding z.

y itself is never a saved tensor: a projection after the norm that needs it keeps the same row, and makes y again from
it (_saving.py). In a frame the row is not kept either.

The dropout mask is never stored: the seed is (8 bytes), and Philox gives the mask again. Eager keeps the LayerNorm's
input, two statistics and a mask byte per element; this op keeps one row and one float a row.
"""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..backends import pick
from . import _checks as check
from . import _frames as frames
from . import _saving as saving
from ._seeds import new_seed


class ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        seed: Tensor | None,
        how: tuple[float, float, bool, bool],
        place: frames.Place | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        p, eps, rms, want_z = how
        keep_z = want_z or is_z(bias, residual, seed)
        y, z, xhat, rstd = pick("residual_norm", x)(
            x, bias, residual, gamma, beta, seed, p, eps, rms, want_z, not keep_z
        )
        row: saving.Item = xhat if not keep_z else z if want_z else x
        if place:
            row, rstd = place.slots(2)
        saving.save(ctx, row, rstd, bias, gamma, beta, seed)
        again = partial(_normed_again, eps, rms) if keep_z else _affine
        saving.describe(y, saving.Recipe(again, row, saving.small(gamma), saving.small(beta)))
        ctx.p, ctx.rms, ctx.row_is_z = p, rms, keep_z
        ctx.set_materialize_grads(False)
        return (y, z) if want_z else y

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        row, rstd, bias, gamma, beta, seed = saving.load(ctx)
        want_x, want_bias, want_residual, want_gamma, want_beta = ctx.needs_input_grad[:5]
        if dy is None:
            if dz is None:
                return (None,) * 8
            dy = torch.zeros_like(dz)
        dy, dz = check.dense(dy), check.dense(dz)
        # without dropout dx is dresidual: one tensor, written once
        want_dx = want_x and seed is not None
        want_dresidual = want_residual or (want_x and not want_dx)
        dresidual, dx, dbias, dgamma, dbeta = pick("residual_norm_backward", dy)(
            dy, dz, row, rstd, bias, gamma, beta,
            seed, ctx.p, ctx.rms, ctx.row_is_z, want_dresidual, want_dx, want_bias, want_gamma, want_beta,
        )  # fmt: skip
        return (
            (dx if want_dx else dresidual) if want_x else None,
            dbias if want_bias else None,
            dresidual if want_residual else None,
            dgamma if want_gamma else None,
            dbeta if want_beta else None,
            None,
            None,
            None,
        )


def is_z(bias: Tensor | None, residual: Tensor | None, seed: Tensor | None) -> bool:
    """Whether x itself is what is normalised."""
    return bias is None and residual is None and seed is None


def _affine(xhat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """y from x-hat, rounded once more."""
    H = xhat.shape[-1]
    G = max((t.numel() // H for t in (gamma, beta) if t is not None), default=1)
    y = xhat.view(G, -1, H)
    gamma, beta = (None if t is None else t.view(-1, 1, H) for t in (gamma, beta))
    if gamma is not None and beta is not None:
        y = torch.addcmul(beta, y, gamma)
    elif gamma is not None:
        y = y * gamma
    elif beta is not None:
        y = y + beta
    return y.view_as(xhat).to(xhat.dtype)


def _normed_again(eps: float, rms: bool, z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """y from z, as it was."""
    return pick("residual_norm", z)(z, None, None, gamma, beta, None, 0.0, eps, rms, False, False)[0]


def residual_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-5,
    rms: bool = False,
    return_z: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = norm(residual + dropout(x + bias)) * gamma + beta, fused; see the top of this file.

    Args:
        x: [..., H], float16, bfloat16, float32 or float64; its T rows are all but the last dimension.
        gamma, beta, bias: [G, H] for G replicas whose rows follow one another (G divides T), or [H] for all. Any
            floating dtype; those that differ from x are used in float32. Each may be None and each may be frozen: a
            gradient that autograd does not ask for is not computed.
        residual: same shape as x. Where its dtype differs, both are promoted as torch.add promotes them.
        p: dropout probability in [0, 1), in effect whenever it is not 0 (callers pass 0 in evaluation).
        eps: added to the variance (or mean square).
        rms: RMSNorm instead of LayerNorm.
        return_z: also return z, the sum that was normalised, as pre-norm models need it.
        seed: int64 [1], or [G] for one seed a replica; drawn from torch's generator of x's device when None.

    Returns:
        y like x, or (y, z).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    op = "residual_norm"
    G = 1
    if not check.usual(x, (residual,), (gamma, beta, bias)):
        check.floating(op, x=x, gamma=gamma, beta=beta, bias=bias, residual=residual)
        check.same_device(op, x, gamma=gamma, beta=beta, bias=bias, residual=residual)
        T, H = check.rows(op, "x", x)
        check.same_shape(op, x, residual=residual)
        G = check.small(op, T, H, gamma=gamma, beta=beta, bias=bias)
        if residual is not None and residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        bias, gamma, beta = check.per_replica(G, *check.one_dtype(x, bias, gamma, beta))
        x, residual = check.dense(x), check.dense(residual)
    check.probability(op, p)
    if not isinstance(eps, (int, float, Real)) or not eps >= 0.0:
        raise ValueError(f"{op}: eps is {eps!r}; accepted is a number of at least 0")
    seed = check.seeds(op, seed, x.numel() // x.shape[-1], G, x.device)
    if p == 0.0:
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    place = frames.place(op)
    if check.tracked(x, bias, residual, gamma, beta):
        return ResidualNorm.apply(x, bias, residual, gamma, beta, seed, (p, eps, rms, return_z), place)
    keep_z = return_z or is_z(bias, residual, seed)
    y, z, xhat, rstd = pick(op, x)(
        x, bias, residual, gamma, beta, seed, p, eps, rms, return_z, place is not None and not keep_z
    )
    if place:
        place.leave(xhat if not keep_z else z if return_z else x, rstd)
    return (y, z) if return_z else y
