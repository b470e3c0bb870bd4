"""Every op in plain PyTorch: the specification, the fallback where nothing compiled is at hand, and the tests' oracle.

Signatures and shapes are those of schema.py. Everything is computed in float32 (float64 for float64) and rounded once,
whatever autocast prescribes around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from .meta import no_autocast

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _as_written(op: Callable[..., Any]) -> Callable[..., Any]:
    """For ops with matmuls, which autocast would run in its own dtype."""

    @functools.wraps(op)
    def run(*args: Any) -> Any:
        with no_autocast(next(t for t in tree_leaves(args) if isinstance(t, torch.Tensor)).device):
            return op(*args)

    return run


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty([0])


def _rows(param: torch.Tensor | None, T: int) -> torch.Tensor | float:
    """A small parameter [H] or [G, H] as something that broadcasts over [T, H]."""
    if param is None:
        return 0.0
    param = _wide(param)
    return param if param.dim() == 1 else param.repeat_interleave(T // param.shape[0], 0)


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """[..., H] as rows [T, H]."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _shaped(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Rows [T, H] as [..., H], and not as a view: a Function's views may not be changed in place."""
    return torch.ops.aten._unsafe_view.default(rows, shape)


def _sum_rows(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum [.., H] over the rows of each replica, into the shape and dtype of the small parameter `like`."""
    G = 1 if like.dim() == 1 else like.shape[0]
    return x.reshape(G, -1, x.shape[-1]).sum(1).reshape(like.shape).to(like.dtype)


def _mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a*b for 32-bit values held in int64, without overflowing its sign bit."""
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    carried = high + (low >> 16)
    return (carried >> 16) & _LOW, ((carried << 16) | (low & 0xFFFF)) & _LOW


def philox(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): [n, 4] words below 2^32, as int64.

    seed: int64, one element; counter: int64 [n]. Key words are the seed's low and high half, counter words are the
    counter's low and high half and two zeros.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(10):
        high0, low0 = _mulhilo(_M0, c0)
        high1, low1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack([c0, c1, c2, c3], -1)


def keep_mask(seed: torch.Tensor, p: float, n: int) -> torch.Tensor:
    """The dropout contract: bool [len(seed) * n], n elements under each seed; True is kept.

    Element e is kept iff lane e % 4 of philox(seed, e // 4) is at least floor(p * 2^32).
    """
    counter = torch.arange((n + 3) // 4, device=seed.device)
    words = [philox(s, counter).reshape(-1)[:n] for s in seed.reshape(-1)]
    return torch.cat(words) >= int(p * 2.0**32)


def _drop(x: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    if seed is None:
        return x
    keep = keep_mask(seed, p, x.numel() // seed.numel()).reshape(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def residual_norm(x, bias, residual, gamma, beta, seed, p, eps, rms, want_z, want_xhat):
    shape, x, residual = x.shape, _flat(x), _flat(residual)
    T = x.shape[0]
    z = _drop(_wide(x) + _rows(bias, T), seed, p)
    if residual is not None:
        z = z + _wide(residual)
    centred = z if rms else z - z.mean(1, keepdim=True)
    rstd = (centred.square().mean(1) + eps).rsqrt()
    xhat = centred * rstd[:, None]
    y = xhat if gamma is None else xhat * _rows(gamma, T)
    y = _shaped((y + _rows(beta, T)).to(x.dtype), shape)
    # a result may be x itself (nothing to do in z): an op must not return its input
    z = _shaped(z.to(x.dtype, copy=True), shape) if want_z else _nothing(x)
    return y, z, _shaped(xhat.to(x.dtype), shape) if want_xhat else _nothing(x), rstd


def residual_norm_backward(
    dy, dz, row, rstd, bias, gamma, beta, seed, p, rms, row_is_z, want_dresidual, want_dx, want_dbias, want_dgamma,
    want_dbeta,
):  # fmt: skip
    shape, dy, dz, row = dy.shape, _flat(dy), _flat(dz), _flat(row)
    T = dy.shape[0]
    wide_dy, xhat = _wide(dy), _wide(row)
    if row_is_z:
        xhat = (xhat if rms else xhat - xhat.mean(1, keepdim=True)) * rstd[:, None]
    g = wide_dy if gamma is None else wide_dy * _rows(gamma, T)
    d = g - xhat * (g * xhat).mean(1, keepdim=True)
    if not rms:
        d = d - g.mean(1, keepdim=True)
    d = d * rstd[:, None]
    if dz is not None:
        d = d + _wide(dz)
    dropped = _drop(d, seed, p)
    return (
        _shaped(d.to(dy.dtype), shape) if want_dresidual else _nothing(dy),
        _shaped(dropped.to(dy.dtype, copy=True), shape) if want_dx else _nothing(dy),
        _sum_rows(dropped, bias) if want_dbias else _nothing(dy),
        _sum_rows(wide_dy * xhat, gamma) if want_dgamma else _nothing(dy),
        _sum_rows(wide_dy, beta) if want_dbeta else _nothing(dy),
    )


def _activate(u: torch.Tensor, act: int) -> torch.Tensor:
    return (F.gelu, lambda v: F.gelu(v, approximate="tanh"), F.relu, F.silu)[act](u)


def _activate_grad(u: torch.Tensor, act: int) -> torch.Tensor:
    if act == 0:
        cdf = 0.5 * (1.0 + torch.erf(u * 0.5**0.5))
        return cdf + u * torch.exp(-0.5 * u * u) * 0.3989422804014327
    if act == 1:
        k, c = 0.7978845608028654, 0.044715
        t = torch.tanh(k * (u + c * u**3))
        return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * k * (1.0 + 3.0 * c * u * u)
    if act == 2:
        return (u > 0).to(u.dtype)
    s = torch.sigmoid(u)
    return s * (1.0 + u * (1.0 - s))


def _biased(u, bias):
    flat = _flat(_wide(u))
    return _shaped(flat + _rows(bias, flat.shape[0]), u.shape)


def bias_act(u, bias, gate, act):
    h = _activate(_biased(u, bias), act)
    if gate is not None:
        h = h * _wide(gate)
    return h.to(u.dtype)


def bias_act_backward(dh, u, bias, gate, act, want_du, want_dbias, want_dgate):
    wide_dh, v = _wide(dh), _biased(u, bias)
    du = (wide_dh if gate is None else wide_dh * _wide(gate)) * _activate_grad(v, act)
    return (
        du.to(u.dtype) if want_du else _nothing(u),
        _sum_rows(du, bias) if want_dbias else _nothing(u),
        (wide_dh * _activate(v, act)).to(u.dtype) if want_dgate else _nothing(u),
    )


# The least act' of gelu, gelu_tanh and silu. Each act(v) = v F(v) with F(-v) = 1 - F(v), so act'(-v) = 1 - act'(v): the
# greatest is 1 - lo, at the mirrored place. On the negative side act'' has one zero:
#   gelu       act'' = phi(v) (2 - v^2), v = -sqrt 2: lo = erfc(1) / 2 - 1 / (e sqrt pi)
#   gelu_tanh  v = -1.4185040087908284, by Newton's method in 40 digits, as is
#   silu       act'' = s (1 - s) (2 - v tanh(v / 2)), v = -2.3993572805154677
_LEAST_SLOPES = (-0.12890414518515479, -0.12899306865877177, -0.09983932012886692)
_gelu, _gelu_tanh, _silu = ((lo, (1 - 2 * lo) / 255) for lo in _LEAST_SLOPES)

SLOPE_CODES = (_gelu, _gelu_tanh, (0.0, 1.0), _silu)
"""(lo, step) of each activation: code c stands for act' = lo + step * c. relu's act' is 0 or 1, its own code."""


def bias_act_coded(u, bias, act):
    v = _biased(u, bias)
    lo, step = SLOPE_CODES[act]
    code = ((_activate_grad(v, act) - lo) / step).round().clamp(0, 255).nan_to_num(0.0)
    return _activate(v, act).to(u.dtype), code.to(torch.uint8)


def bias_act_coded_backward(dh, code, bias, act, want_du, want_dbias):
    wide_dh = _wide(dh)
    lo, step = SLOPE_CODES[act]
    du = wide_dh * (lo + step * code.to(wide_dh.dtype))
    return du.to(dh.dtype) if want_du else _nothing(dh), _sum_rows(du, bias) if want_dbias else _nothing(dh)


def column_sum(x, groups):
    return _wide(x).reshape(groups, -1, x.shape[1]).sum(1)


def dropout(x, seed, p):
    return _drop(_wide(x), seed, p).to(x.dtype)


def _softmax(q, k, mask, scale, causal):
    """Probabilities [B, h, S, K] under the mask; a row that sees nothing has zeros."""
    scores = _wide(q) @ _wide(k).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + _wide(mask)
    if causal:
        S, K = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(S, K, dtype=torch.bool, device=q.device).triu(1 + K - S), -torch.inf)
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.where(sees_nothing, 0.0, torch.softmax(scores, -1))


@_as_written
def attention(q, k, v, mask, seed, p, scale, causal):
    prob = _softmax(q, k, mask, scale, causal)
    o = (_drop(prob, seed, p) @ _wide(v)).to(q.dtype)
    return o.transpose(1, 2).contiguous().transpose(1, 2)


@_as_written
def attention_backward(do, q, k, v, mask, seed, p, scale, causal):
    prob = _softmax(q, k, mask, scale, causal)
    wide_do = _wide(do)
    dv = _drop(prob, seed, p).transpose(-1, -2) @ wide_do
    dprob = _drop(wide_do @ _wide(v).transpose(-1, -2), seed, p)
    delta = (prob * dprob).sum(-1, keepdim=True)  # equals (do * o).sum(-1), without o's rounding
    dscores = prob * (dprob - delta) * scale
    dq, dk = dscores @ _wide(k), dscores.transpose(-1, -2) @ _wide(q)
    return tuple(
        d.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2) for d, like in ((dq, q), (dk, k), (dv, v))
    )


def _by_replica(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[T, H] as [G, T/G, H]; a small matrix [m, n] or [G, m, n] as something that multiplies it."""
    return _wide(x).reshape(groups, -1, x.shape[-1])


def _update(x, a, b, bias_b, seed, p, scale):
    """scale (dropout(x) a^T b^T + bias_b), wide."""
    G, T = 1 if a.dim() == 2 else a.shape[0], x.shape[0]
    xa = _by_replica(_drop(_wide(x), seed, p), G) @ _by_replica(a, G).mT
    return scale * ((xa @ _by_replica(b, G).mT).reshape(T, b.shape[-2]) + _rows(bias_b, T))


def _update_backward(dy, x, a, b, seed, p, scale, want_dx, want_da, want_db):
    """The update's share of dx, wide, and da, db; None where not wanted."""
    G, T, K = 1 if a.dim() == 2 else a.shape[0], dy.shape[0], a.shape[-1]
    wide_dy = scale * _by_replica(dy, G)
    dxa, dx, da, db = wide_dy @ _by_replica(b, G), None, None, None
    if want_dx:
        dx = _drop((dxa @ _by_replica(a, G)).reshape(T, K), seed, p)
    if want_da or want_db:
        dropped = _by_replica(_drop(_wide(x), seed, p), G)
        da = (dxa.mT @ dropped).reshape(a.shape).to(a.dtype)
        db = (wide_dy.mT @ (dropped @ _by_replica(a, G).mT)).reshape(b.shape).to(b.dtype)
    return dx, da if want_da else None, db if want_db else None


@_as_written
def lora_adapter(y, x, a, b, bias_b, seed, p, scale):
    y.copy_(_wide(y) + _update(x, a, b, bias_b, seed, p, scale))


@_as_written
def lora_adapter_backward(dx, dy, x, a, b, seed, p, scale, want_da, want_db):
    share, da, db = _update_backward(dy, x, a, b, seed, p, scale, dx is not None, want_da, want_db)
    if dx is not None:
        dx.copy_(_wide(dx) + share)
    return _nothing(a) if da is None else da, _nothing(b) if db is None else db


@_as_written
def lora_linear(x, w, bias, a, b, bias_b, seed, p, scale, merged):
    ys = []
    for i, w_i in enumerate(w):
        y = _wide(x) @ _wide(w_i).T + _rows(bias[i], x.shape[0])
        if a[i] is not None:
            y = y + _update(x, a[i], b[i], bias_b[i], seed[i], p[i], scale[i])
        ys.append(y.to(x.dtype))
    return ys


@_as_written
def lora_linear_backward(dy, x, w, a, b, seed, p, scale, groups, want_dx, want_da, want_db, want_dsum):
    like = next(d for d in dy if d is not None)
    wide = _wide(like)
    # zeros stay where an output was not used
    dx = wide.new_zeros([like.shape[0], w[0].shape[1]])
    da = [torch.zeros_like(m) if want else _nothing(like) for m, want in zip(a, want_da, strict=True)]
    db = [torch.zeros_like(m) if want else _nothing(like) for m, want in zip(b, want_db, strict=True)]
    dsum = [
        wide.new_zeros([groups, m.shape[0]]) if want else _nothing(like) for m, want in zip(w, want_dsum, strict=True)
    ]
    for i, dy_i in enumerate(dy):
        if dy_i is None:
            continue
        if want_dsum[i]:
            dsum[i] = column_sum(dy_i, groups)
        if want_dx:
            dx = dx + _wide(dy_i) @ _wide(w[i])
        if a[i] is None:
            continue
        share, da_i, db_i = _update_backward(
            dy_i, x, a[i], b[i], seed[i], p[i], scale[i], want_dx, want_da[i], want_db[i]
        )
        if want_dx:
            dx = dx + share
        if want_da[i]:
            da[i] = da_i
        if want_db[i]:
            db[i] = db_i
    return dx.to(like.dtype) if want_dx else _nothing(like), da, db, dsum


@_as_written
def packed_linear(x, w, bias):
    T = x.shape[0]
    parts = [_wide(x) @ _wide(m).T + _rows(c, T) for m, c in zip(w, bias, strict=True)]
    return torch.cat(parts, 1).to(x.dtype)


@_as_written
def packed_linear_backward(dy, w):
    return (_wide(dy) @ _wide(torch.cat(w))).to(dy.dtype)
