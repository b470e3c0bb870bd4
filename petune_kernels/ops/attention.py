r"""attention: softmax(q k^T * scale + mask), dropout, times v, with no [S, K] tensor kept.

Forward, for one (batch, head), q [S, D], k and v [K, D] (Vaswani et al. 2017):

    Z = scale * q k^T + mask        P = softmax_rows(Z)        o = (keep * P) v

Backward. With P~ = keep * P (keep scaled by 1/(1-p)) and dP~ = do v^T:

    dv = P~^T do        dP = keep * dP~        dZ = P * (dP - delta)        dq = scale * dZ k        dk = scale * dZ^T q

where delta_i = sum_j P_ij dP_ij, summed from the tile at hand, so that neither o nor the rows' logsumexp is needed.
Z and keep are computed again, tile by tile, from q, k and the seed; element ((b*h + head)*S + row)*K + column of the
dropout mask is that of Z[b, head, row, column]. With G seeds the batch is that of G replicas, one after the other, and
b counts within each: a replica's mask is the one that its own B/G batch rows would get alone.

A row that sees nothing (every column -inf) has o = 0 and no gradient, where eager has NaN. A row whose mask
holds the dtype's finite minimum everywhere, as Hugging Face writes it, sees every column alike, as in eager. On a GPU
every mask made here is finite (`hidden`): a row that sees nothing gets what it would get without a mask.

Saved: q, k, v (grouped heads once), the mask and the seed; in a frame (_frames.py) not q, k and v. Eager keeps the
softmax, its dropped copy and the mask: three [B, h, S, K] tensors. The mask gets no gradient: it would be the [S, K]
tensor this op avoids.

On CUDA PyTorch's own fused attention (the kernel of its that it chooses) does the work unless a seed or a backend is
asked for by name, or a packed run drops (its masks are each replica's own, which torch's are not: the reference then).
In a frame it runs once more in backward, since its own backward takes what only it can save.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, meta
from ..backends import pick
from . import _checks as check
from . import _frames as frames
from . import _saving as saving
from ._seeds import new_seed, packed, rewound, state


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        p: float,
        scale: float,
        causal: bool,
        place: frames.Place | None,
    ) -> Tensor:
        saving.save(ctx, *(place.slots(3) if place else (q, k, v)), mask, seed)
        ctx.p, ctx.scale, ctx.causal = p, scale, causal
        return pick("attention", q)(q, *_per_head(q, k, v), mask, seed, p, scale, causal)

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, seed = saving.load(ctx)
        dq, *dkv = pick("attention_backward", q)(
            _dense_rows(do), q, *_per_head(q, k, v), mask, seed, ctx.p, ctx.scale, ctx.causal
        )
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            dkv = [d.unflatten(1, (-1, groups)).sum(2) for d in dkv]
        wants = ctx.needs_input_grad[:3]
        return (*(grad if want else None for grad, want in zip((dq, *dkv), wants, strict=True)), *(None,) * 6)


class NativeAgain(torch.autograd.Function):
    """PyTorch's fused attention in a frame: it keeps nothing, and runs once more in backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scale: float, causal: bool,
        place: frames.Place,
    ) -> Tensor:  # fmt: skip
        saving.save(ctx, *place.slots(3), mask)
        ctx.p, ctx.scale, ctx.causal, ctx.state = p, scale, causal, state(q.device)
        return native(q, k, v, mask, p, scale, causal)

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *qkv, mask = saving.load(ctx)
        wants = ctx.needs_input_grad[:3]
        with torch.enable_grad(), rewound(do.device, ctx.state):
            q, k, v = (t.detach().requires_grad_(want) for t, want in zip(qkv, wants, strict=True) if t is not None)
            o = native(q, k, v, mask, ctx.p, ctx.scale, ctx.causal)
            grads = iter(torch.autograd.grad(o, [t for t in (q, k, v) if t.requires_grad], do))
        return (*(next(grads) if want else None for want in wants), *(None,) * 5)


def _per_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with a copy of each head for every query head that reads it."""
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def _native(q: Tensor) -> bool:
    return meta.kind(q.device) == "cuda" and backends._forced is None


def _dense_rows(t: Tensor) -> Tensor:
    """Kernels take any strides but the last: rows of D stand together."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4 or t.shape[3] == 0:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; accepted is [B, h, S, D] with D at least 1")
        if t.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {t.dtype}, q is {q.dtype}; they must be equal")
    B, h, _, D = q.shape
    for name, t in (("k", k), ("v", v)):
        if t.shape != (B, k.shape[1], k.shape[2], D) or k.shape[1] == 0 or h % k.shape[1]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(t.shape)}, q has {tuple(q.shape)}; accepted is [B, h_kv, K, D] with "
                f"q's B and D, one K, and heads that divide q's {h}"
            )


def hidden(device: torch.device) -> float:
    """What is added to a score that is not seen. On a GPU finite, and what torch itself makes of a boolean mask for
    cuDNN's attention, which may give NaN for a row of -inf."""
    return -65504.0 if meta.kind(device) == "cuda" else -torch.inf


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as attention adds it: in dtype, 0 where a boolean mask is True and `hidden` where it is False.

    An additive mask in a wider dtype keeps its -inf; finite values beyond dtype's range become its finite limits, so
    that a row masked by the wider dtype's minimum everywhere still sees every column alike.
    """
    if mask.dtype == torch.bool:
        return torch.zeros((), dtype=dtype, device=mask.device).where(mask, hidden(mask.device))
    if mask.dtype == dtype:
        return mask
    finite, narrow = torch.finfo(dtype), mask.to(dtype)
    return narrow.clamp(finite.min, finite.max).where(mask.isfinite(), narrow)


def _check_mask(op: str, mask: Tensor, q: Tensor, K: int) -> Tensor:
    """The mask in q's dtype, expanded to [B, h, S, K] without a copy: its repeated dimensions have stride 0."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask is {type(mask).__name__}; accepted is a torch.Tensor")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: mask requires grad; accepted is a mask that does not, because its gradient is the [S, K] tensor "
            "this op never builds. Use eager attention for a learned bias"
        )
    if mask.dtype != torch.bool:
        check.floating(op, mask=mask)
    full = (*q.shape[:3], K)
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}; accepted is one that broadcasts to {full}")
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    mask = additive_mask(_once(mask).expand(-1, -1, -1, K), q.dtype)  # converted once, not once a repetition
    if K > 1 and mask.stride(3) != 1:
        mask = mask.contiguous()
    return mask.expand(full)


def _once(mask: Tensor) -> Tensor:
    """An expanded mask [B, h, S, K] without its repetitions over the first three dimensions."""
    for dim in range(3):
        if mask.stride(dim) == 0 and mask.shape[dim]:
            mask = mask.narrow(dim, 0, 1)
    return mask


def native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scale: float, causal: bool) -> Tensor:
    S, K = q.shape[2], k.shape[2]
    if causal and (mask is not None or S != K):  # SDPA aligns its causal mask at the first column, and takes only one
        later = torch.ones(S, K, dtype=torch.bool, device=q.device).triu(1 + K - S)
        mask = torch.zeros((), dtype=q.dtype, device=q.device) if mask is None else _once(mask)
        mask, causal = mask.masked_fill(later, hidden(q.device)), False
    elif mask is not None:
        mask = _once(mask)  # torch pads a mask to its alignment as it is given, repetitions and all
    # Flash attention reads grouped heads as they are; the others take a copy for each head.
    grouped = q.shape[1] != k.shape[1] and mask is None and q.dtype in (torch.float16, torch.bfloat16)
    if not grouped:
        k, v = _per_head(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
    causal: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """o = dropout(softmax(q k^T * scale + mask)) v; see the top of this file.

    Args:
        q: [B, h, S, D], float16, bfloat16, float32 or float64.
        k, v: [B, h_kv, K, D] in q's dtype, h_kv a divisor of h: each head serves h / h_kv query heads that follow one
            another. Any strides: a [B, S, h, D] tensor transposed costs no copy.
        mask: broadcasts to [B, h, S, K]; boolean (True is seen) or additive, used in q's dtype. None for none. It gets
            no gradient.
        p: dropout probability in [0, 1), in effect whenever it is not 0 (callers pass 0 in evaluation).
        scale: of the scores; D^(-1/2) when None.
        causal: row i sees columns up to i + K - S, the last row all of them.
        seed: int64 [1], or [G] for G replicas with B/G batch rows each; drawn from torch's generator of q's device when
            None.

    Returns:
        o [B, h, S, D], laid out [B, S, h, D] in memory, so that the projection after it needs no copy. Under autocast
        everything is computed in autocast's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    op = "attention"
    check.floating(op, q=q, k=k, v=v)
    dtype = check.autocast_dtype(q)
    if dtype is not None:  # rotary embeddings and norms of q and k leave them wider than v
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check.same_device(op, q, k=k, v=v, mask=mask)
    check.probability(op, p)
    _check_heads(op, q, k, v)
    seed = check.seeds(op, seed, q.shape[0], 1, q.device)
    if scale is None:
        scale = q.shape[3] ** -0.5
    if mask is not None:
        mask = _check_mask(op, mask, q, k.shape[2])
    place = frames.place(op)
    if place:
        place.leave(q, k, v)
    tracked = check.tracked(q, k, v)
    if _native(q) and seed is None and not (p and packed()):
        if place and tracked:
            o = NativeAgain.apply(q, k, v, mask, p, scale, causal, place)
        else:
            o = native(q, k, v, mask, p, scale, causal)
        return _left(o)
    if p == 0.0:
        seed = None
    elif seed is None:
        seed = new_seed(q.device)
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    if tracked:
        return _left(Attention.apply(q, k, v, mask, seed, p, scale, causal, place))
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1 and seed is None and (mask is None or mask.stride(1) == 0):
        # the one row of heads that share keys (a decoder that generates) as rows of one head: no copy of the cache
        rows = q.unflatten(1, (k.shape[1], groups)).squeeze(3)
        seen = None if mask is None else mask[:, : rows.shape[1]].expand(-1, -1, groups, -1)
        o = pick(op, q)(rows, k, v, seen, None, p, scale, False)
        return _left(o.reshape(q.shape))
    return _left(pick(op, q)(q, *_per_head(q, k, v), mask, seed, p, scale, causal))


def _left(o: Tensor) -> Tensor:
    """o, which a layer that runs again makes again; elsewhere the projection after it keeps it, if it must."""
    if frames.whole_layer() and (place := frames.place("attention's output")):
        place.leave(o)
        if o.requires_grad:
            saving.describe(o, place.slots(1)[0])
    return o
