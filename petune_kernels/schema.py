"""Every op of the library: its schema, its fake (meta) implementation and its flops. Read this file first.

Shapes: T rows (tokens), H width, N features, G replicas, B batch, h heads, S query and K key positions, D head width.
Rows are [T, H]; in `residual_norm` and `bias_act` [..., H], and what is like them has their shape. Small parameters
(gamma, beta, bias) are [H] (one replica) or [G, H]; rows are replica-major, so replica g owns rows
g*T/G to (g+1)*T/G. In `residual_norm` [H] may stand beside [G, H]: all replicas share it, and it gets no gradient.
`seed` is an int64 tensor of 1 or G elements on x's device; None means no dropout. The fixed arity is deliberate: an
output nobody asked for is an empty tensor of shape [0].

Implementations: reference.py for every device, csrc/ for the CPU and CUDA keys (they win where they are loaded), and
triton/ through `backend`. Argument checks live in ops/, once for all of them.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from . import reference

NAMESPACE = "petune"

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
"""The activations of `bias_act`; an op takes the index."""

# The saved row of residual_norm holds x-hat, or with row_is_z the sum z that it normalised.
SCHEMAS = {
    "residual_norm": "(Tensor x, Tensor? bias, Tensor? residual, Tensor? gamma, Tensor? beta, Tensor? seed, float p, "
    "float eps, bool rms, bool want_z, bool want_xhat) -> (Tensor y, Tensor z, Tensor xhat, Tensor rstd)",
    "residual_norm_backward": "(Tensor dy, Tensor? dz, Tensor row, Tensor rstd, Tensor? bias, Tensor? gamma, "
    "Tensor? beta, Tensor? seed, float p, bool rms, bool row_is_z, bool want_dresidual, bool want_dx, bool want_dbias, "
    "bool want_dgamma, bool want_dbeta) "
    "-> (Tensor dresidual, Tensor dx, Tensor dbias, Tensor dgamma, Tensor dbeta)",
    "bias_act": "(Tensor u, Tensor? bias, Tensor? gate, int act) -> Tensor",
    "bias_act_backward": "(Tensor dh, Tensor u, Tensor? bias, Tensor? gate, int act, bool want_du, bool want_dbias, "
    "bool want_dgate) -> (Tensor du, Tensor dbias, Tensor dgate)",
    # code [T, N], uint8, stands for act'(u + bias) in uniform steps (reference.SLOPE_CODES); NaN has code 0. Backward
    # reads it instead of u, and of bias only what dbias is like.
    "bias_act_coded": "(Tensor u, Tensor? bias, int act) -> (Tensor h, Tensor code)",
    "bias_act_coded_backward": "(Tensor dh, Tensor code, Tensor? bias, int act, bool want_du, bool want_dbias) "
    "-> (Tensor du, Tensor dbias)",
    "column_sum": "(Tensor x, int groups) -> Tensor",
    "dropout": "(Tensor x, Tensor seed, float p) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, float p, float scale, bool causal) "
    "-> Tensor",
    "attention_backward": "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, "
    " float p, float scale, bool causal) -> (Tensor dq, Tensor dk, Tensor dv)",
    # One list entry per projection; a, b, bias_b, seed are None where it has no adapter.
    "lora_linear": "(Tensor x, Tensor[] w, Tensor?[] bias, Tensor?[] a, Tensor?[] b, Tensor?[] bias_b, Tensor?[] seed, "
    "float[] p, float[] scale, bool merged) -> Tensor[]",
    # dsum is the column sum of dy per replica, [groups, N]: both bias gradients follow from it.
    "lora_linear_backward": "(Tensor?[] dy, Tensor? x, Tensor[] w, Tensor?[] a, Tensor?[] b, Tensor?[] seed, "
    "float[] p, float[] scale, int groups, bool want_dx, bool[] want_da, bool[] want_db, bool[] want_dsum) "
    "-> (Tensor dx, Tensor[] da, Tensor[] db, Tensor[] dsum)",
    # y += scale (dropout(x) a^T b^T + bias_b), and its backward, where dx += mask (scale dy b a) unless it is None:
    # what lora_linear's matmul kernels call after each frozen matmul.
    "lora_adapter": "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor? bias_b, Tensor? seed, float p, float scale) "
    "-> ()",
    "lora_adapter_backward": "(Tensor(a!)? dx, Tensor dy, Tensor? x, Tensor a, Tensor b, Tensor? seed, float p, "
    "float scale, bool want_da, bool want_db) -> (Tensor da, Tensor db)",
    # y is [T, sum of N]: the projections side by side.
    "packed_linear": "(Tensor x, Tensor[] w, Tensor?[] bias) -> Tensor",
    "packed_linear_backward": "(Tensor dy, Tensor[] w) -> Tensor",
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op of this dtype accumulates: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty([0])


def _residual_norm(x, bias, residual, gamma, beta, seed, p, eps, rms, want_z, want_xhat):
    z = x.new_empty(x.shape) if want_z else _nothing(x)
    xhat = x.new_empty(x.shape) if want_xhat else _nothing(x)
    return x.new_empty(x.shape), z, xhat, x.new_empty([x.numel() // x.shape[-1]], dtype=accumulator(x.dtype))


def _residual_norm_backward(
    dy, dz, row, rstd, bias, gamma, beta, seed, p, rms, row_is_z, want_dresidual, want_dx, want_dbias, want_dgamma,
    want_dbeta,
):  # fmt: skip
    dresidual, dx = (dy.new_empty(dy.shape) if want else _nothing(dy) for want in (want_dresidual, want_dx))
    small = (
        like.new_empty(like.shape) if want else _nothing(dy)
        for want, like in ((want_dbias, bias), (want_dgamma, gamma), (want_dbeta, beta))
    )
    return (dresidual, dx, *small)


def _bias_act(u, bias, gate, act):
    return u.new_empty(u.shape)


def _bias_act_backward(dh, u, bias, gate, act, want_du, want_dbias, want_dgate):
    return (
        u.new_empty(u.shape) if want_du else _nothing(u),
        bias.new_empty(bias.shape) if want_dbias else _nothing(u),
        u.new_empty(u.shape) if want_dgate else _nothing(u),
    )


def _bias_act_coded(u, bias, act):
    return u.new_empty(u.shape), u.new_empty(u.shape, dtype=torch.uint8)


def _bias_act_coded_backward(dh, code, bias, act, want_du, want_dbias):
    return (
        dh.new_empty(dh.shape) if want_du else _nothing(dh),
        bias.new_empty(bias.shape) if want_dbias else _nothing(dh),
    )


def _column_sum(x, groups):
    return x.new_empty([groups, x.shape[1]], dtype=accumulator(x.dtype))


def _dropout(x, seed, p):
    return x.new_empty(x.shape)


def _attention(q, k, v, mask, seed, p, scale, causal):
    # o is laid out [B, S, h, D] in memory: the projection after it reads rows of h*D without a copy.
    return q.new_empty([q.shape[0], q.shape[2], q.shape[1], v.shape[3]]).transpose(1, 2)


def _attention_backward(do, q, k, v, mask, seed, p, scale, causal):
    return tuple(t.new_empty([t.shape[0], t.shape[2], t.shape[1], t.shape[3]]).transpose(1, 2) for t in (q, k, v))


def _lora_linear(x, w, bias, a, b, bias_b, seed, p, scale, merged):
    return [x.new_empty([x.shape[0], m.shape[0]]) for m in w]


def _lora_linear_backward(dy, x, w, a, b, seed, p, scale, groups, want_dx, want_da, want_db, want_dsum):
    like = next(d for d in dy if d is not None)
    dx = like.new_empty([like.shape[0], w[0].shape[1]]) if want_dx else _nothing(like)
    da = [m.new_empty(m.shape) if want else _nothing(like) for m, want in zip(a, want_da, strict=True)]
    db = [m.new_empty(m.shape) if want else _nothing(like) for m, want in zip(b, want_db, strict=True)]
    wide = accumulator(like.dtype)
    dsum = [
        m.new_empty([groups, m.shape[0]], dtype=wide) if want else _nothing(like)
        for m, want in zip(w, want_dsum, strict=True)
    ]
    return dx, da, db, dsum


def _lora_adapter(y, x, a, b, bias_b, seed, p, scale):
    pass


def _lora_adapter_backward(dx, dy, x, a, b, seed, p, scale, want_da, want_db):
    return a.new_empty(a.shape if want_da else [0]), b.new_empty(b.shape if want_db else [0])


def _packed_linear(x, w, bias):
    return x.new_empty([x.shape[0], sum(m.shape[0] for m in w)])


def _packed_linear_backward(dy, w):
    return dy.new_empty([dy.shape[0], w[0].shape[1]])


# What torch.utils.flop_counter.FlopCounterMode counts: the products, as for torch's own ops, of shapes in place of
# tensors. What backward computes again is counted there, as in torch's attention.


def _attention_flops(q, k, v, *_, out_shape=None):
    B, h, S, D = q
    return 2 * B * h * S * k[2] * (D + v[3])  # q k^T, p v


def _attention_backward_flops(do, q, k, v, *_, out_shape=None):
    B, h, S, D = q
    return 2 * B * h * S * k[2] * (3 * D + 2 * v[3])  # q k^T again, dq, dk; dp, dv


def _lora_linear_flops(x, w, bias, a, b, bias_b, seed, p, scale, merged, out_shape=None):
    T, K = x
    total = 0
    for (N, _), m in zip(w, a, strict=True):
        total += 2 * T * K * N
        if m is not None:
            total += 2 * m[-2] * (N * K if merged else T * (K + N))
    return total


def _lora_linear_backward_flops(
    dy, x, w, a, b, seed, p, scale, groups, want_dx, want_da, want_db, want_dsum, out_shape=None
):
    total = 0
    for d, (N, K), m, da, db in zip(dy, w, a, want_da, want_db, strict=True):
        if d is None:
            continue
        T, r = d[0], 0 if m is None else m[-2]
        total += 2 * T * N * K * want_dx
        total += 2 * T * r * (N * (want_dx or da) + K * want_dx + K * da + (K + N) * db)  # dy b, dx, da; x a^T, db
    return total


def _packed_linear_flops(rows, w, *_, out_shape=None):
    return sum(2 * rows[0] * N * K for N, K in w)


_packed_linear_backward_flops = _packed_linear_flops


def _define() -> None:
    here = globals()
    for name, schema in SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "CompositeExplicitAutograd", getattr(reference, name))
        torch.library.register_fake(qualified, here[f"_{name}"])
        if flops := here.get(f"_{name}_flops"):
            register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(flops)


_define()
