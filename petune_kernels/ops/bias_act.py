r"""bias_act: a bias and an activation, plain or gated, in one pass each way.

Forward, for rows u [T, N], with v = u + bias:

    h = act(v)                      or, gated (Shazeer 2020), h = act(v) * gate

    gelu       v Phi(v), Phi the normal distribution (Hendrycks and Gimpel 2016)
    gelu_tanh  v sigma(2w), w = sqrt(2/pi) (v + 0.044715 v^3), since (1 + tanh w) / 2 = sigma(2w)
    relu       max(v, 0)
    silu       v sigma(v), sigma the logistic function

Backward:

    du = dh * gate * act'(v)        dgate = dh * act(v)        dbias = sum_rows du

    gelu       act' = Phi(v) + v phi(v), phi the normal density
    gelu_tanh  act' = s + v s (1 - s) 2w',  s = sigma(2w), w' = sqrt(2/pi) (1 + 3 * 0.044715 v^2)
    relu       act' = 1 where v > 0, else 0
    silu       act' = s + v s (1 - s),  s = sigma(v)

All three gradients come from one pass over dh, u and gate. dbias is summed from du before du is rounded, in fp32, over
pieces of rows that depend on T and G alone; the pieces are added in order.

Saved: u and gate, the inputs themselves; in a frame (_frames.py) not even these. h is never a saved tensor: a
projection after it that needs it makes it again from u and gate, as dgate does.

coded: in place of u a byte an element, act'(v) in 256 uniform steps over its range; du is then off by the code's
rounding, 0.0014 in act' (rms), about what bf16's own rounding does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import pick
from ..schema import ACTIVATIONS
from . import _checks as check
from . import _frames as frames
from . import _saving as saving


class BiasAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, bias: Tensor | None, gate: Tensor | None, act: int, place: frames.Place | None
    ) -> Tensor:
        kept_u, kept_gate = place.slots(2) if place else (u, gate)
        saving.save(ctx, kept_u, bias, kept_gate)
        ctx.act = act
        h = _again(act, u, bias, gate)
        saving.describe(h, saving.Recipe(partial(_again, act), kept_u, saving.small(bias), kept_gate))
        return h

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        u, bias, gate = saving.load(ctx)
        want_u, want_bias, want_gate = ctx.needs_input_grad[:3]
        du, dbias, dgate = pick("bias_act_backward", u)(
            check.dense(dh), u, bias, gate, ctx.act, want_u, want_bias, want_gate
        )
        return du if want_u else None, dbias if want_bias else None, dgate if want_gate else None, None, None


class BiasActCoded(torch.autograd.Function):
    """The same, keeping act' in a byte an element instead of u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor | None, act: int) -> Tensor:
        h, code = pick("bias_act_coded", u)(u, bias, act)
        ctx.save_for_backward(code, bias)
        ctx.act = act
        return h

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        code, bias = ctx.saved_tensors
        want_u, want_bias = ctx.needs_input_grad[:2]
        du, dbias = pick("bias_act_coded_backward", dh)(check.dense(dh), code, bias, ctx.act, want_u, want_bias)
        return du if want_u else None, dbias if want_bias else None, None


def _again(act: int, u: Tensor, bias: Tensor | None, gate: Tensor | None) -> Tensor:
    return pick("bias_act", u)(u, bias, gate, act)


def bias_act(
    u: Tensor, bias: Tensor | None = None, act: str = "gelu", gate: Tensor | None = None, *, coded: bool = False
) -> Tensor:
    """h = act(u + bias), times gate if there is one; see the top of this file.

    Args:
        u: [..., N], float16, bfloat16, float32 or float64; its T rows are all but the last dimension.
        bias: [N], or [G, N] for G replicas whose rows follow one another (G divides T); None for none. A floating
            dtype that is neither u's nor float32 is used in float32.
        act: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        gate: same shape as u. Where its dtype differs, both are promoted as torch.mul promotes them.
        coded: keep a code of act' (a byte an element) for backward instead of u. In effect in 16 bits only, where its
            error is that of rounding, and without a gate, whose gradient needs u.

    Returns:
        h, like u.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    op = "bias_act"
    if not check.usual(u, (gate,), (bias,)):
        check.floating(op, u=u, bias=bias, gate=gate)
        check.same_device(op, u, bias=bias, gate=gate)
        T, N = check.rows(op, "u", u)
        check.same_shape(op, u, gate=gate)
        check.small(op, T, N, bias=bias)
        if gate is not None and gate.dtype != u.dtype:
            dtype = torch.promote_types(u.dtype, gate.dtype)
            u, gate = u.to(dtype), gate.to(dtype)
        (bias,) = check.one_dtype(u, bias)
        u, gate = check.dense(u), check.dense(gate)
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act is {act!r}; accepted are {', '.join(ACTIVATIONS)}")
    index = ACTIVATIONS.index(act)
    place = frames.place(op)
    if place:
        place.leave(u, gate)
    if check.tracked(u, bias, gate):
        if coded and gate is None and place is None and u.dtype in (torch.bfloat16, torch.float16):
            return BiasActCoded.apply(u, bias, index)
        return BiasAct.apply(u, bias, gate, index, place)
    return _again(index, u, bias, gate)
