r"""`lora_linear` and `packed_linear` by torch's own matmuls (oneDNN, MKL, cuBLAS): their CPU and default CUDA kernels.

A frozen matmul on an x86 CPU is oneDNN's where it is large enough to pay for the call. torch's own linear takes MKL in
float32, which does without AVX-512 on processors that are not Intel's, and copies the bias into y first in bf16.

Everything around the frozen matmul is arranged so that a result is written at most twice: once by the matmul (with the
bias where its dtype allows) and once by `lora_adapter`, which adds the low-rank term: on the CPU csrc/cpu/
lora_adapter.cpp, on CUDA and for some factors of a high rank the functions here.

Low-rank terms in float32 beside 16-bit activations. An adapter in float32 must not lose its low bits, yet the result is
16-bit and so is its matmul. Few rows are widened whole, as PEFT widens them, and forgotten. Of many there never is a
float32 copy: each float32 factor u is two 16-bit terms, u = high + low with an error of 2^-17 for bf16, and
u v^T = high_u high_v^T + low_u high_v^T + high_u low_v^T: one 16-bit matmul of rank 3r with float32 accumulation, which
costs next to nothing beside the pass over the result. Where the result itself is float32 (x A^T, dA, dB) the 16-bit
rows are widened block by block. Many rows on CUDA are Triton's where it is installed (triton/lora_adapter.py): a mask
and a widened block that go through memory cost more bytes than the rows themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import meta
from .meta import no_autocast
from .schema import NAMESPACE

_AT_ONCE = 1 << 24
"""Elements of rows up to which they are widened whole, 64 MiB: a third of the launches that blocks and split factors
take, for as many bytes. On a GPU a training step of small batches waits for its launches."""
_BLOCK = 1 << 26
"""Elements widened to float32 at a time, 256 MiB: a block costs a dozen launches."""

OP_FROM = {"cpu": 1 << 24, "cuda": 1 << 32}
"""Multiplications from which one of our ops can be faster than torch's linears. CPU: below, its call costs more than
its matmul gains (docs/decisions.md, "What a call costs"). CUDA, not measured: below, a step waits for its launches."""
_ONEDNN_FROM = 1 << 23
"""Multiplications from which oneDNN is called by itself: 64 rows of 384 x 384 gain by it, of 64 x 64 they lose."""
_ONEDNN = (
    {torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])}
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    else set()
)


def onednn_pays(x: Tensor, features: int) -> bool:
    """Whether the product of x [.., K] and a matrix of K x features, of x's dtype, is oneDNN's: on a CPU, and large.

    Called by itself it takes memory for dense, whatever the strides say: who calls it looks at them.
    """
    if x.numel() * features < _ONEDNN_FROM or x.dtype not in _ONEDNN:
        return False
    return meta.kind(x.device) == "cpu" and bool(torch.backends.mkldnn.enabled)


def _linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias; x [T, K], w [N, K], bias [N]."""
    if onednn_pays(x, w.shape[0]) and w.is_contiguous() and (bias is None or bias.is_contiguous()):
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)


def _times(dy: Tensor, w: Tensor) -> Tensor:
    """dy w; dy [T, N], w [N, K]."""
    if onednn_pays(dy, w.shape[1]) and w.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise(dy, w.T, None, "none", [], "")
    return dy @ w


def _add_times(dx: Tensor, dy: Tensor, w: Tensor) -> None:
    """dx += dy w."""
    if dx.dtype == torch.float32 and onednn_pays(dy, w.shape[1]):
        dx.add_(_times(dy, w))
    else:
        _accumulate(dx, dy, w)


def _by_replica(x: Tensor, G: int) -> Tensor:
    """Rows [T, H] as [G, T/G, H]; for G = 1 as they are, since mm is faster than bmm with one batch."""
    return x if G == 1 else x.reshape(G, x.shape[0] // G, x.shape[1])


def _count(m: Tensor) -> int:
    """G of [G, .., ..]; 1 of a matrix."""
    return m.shape[0] if m.dim() == 3 else 1


def _small(m: Tensor) -> Tensor:
    return m[0] if m.dim() == 3 and m.shape[0] == 1 else m


def _product(u: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """scale * u @ v, the scale applied before rounding."""
    multiply = torch.addmm if u.dim() == 2 else torch.baddbmm
    return multiply(u.new_empty([1] * u.dim()), u, v, beta=0.0, alpha=scale)  # with beta 0 it is not read


def _columns(terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U and V of `dtype` with U V^T = sum of u v^T over the terms; see the top of the file for the split."""
    us, vs = [], []
    for u, v in terms:
        if u.dtype == dtype and v.dtype == dtype:
            us.append(u)
            vs.append(v)
            continue
        high_u, high_v = u.to(dtype), v.to(dtype)
        low_u, low_v = ((t - high).to(dtype) for t, high in ((u, high_u), (v, high_v)))
        us += [high_u, low_u, high_u]
        vs += [high_v, high_v, low_v]
    return (us[0], vs[0]) if len(us) == 1 else (torch.cat(us, -1), torch.cat(vs, -1))


def _fold(out: Tensor, terms: list[tuple[Tensor, Tensor]]) -> None:
    """out += sum of u v^T, in one pass over out."""
    if terms:
        u, v = _columns(terms, out.dtype)
        _accumulate(out, u, v.mT)


def _blocks(G: int, rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(1, G * width))
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def _project(x: Tensor, a: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x A^T in A's dtype, float32: [.., r]. x [.., K], a [.., r, K]."""
    xa = torch.empty([*x.shape[:-1], a.shape[-2]], dtype=a.dtype, device=x.device)
    for start, n in _blocks(_count(a), x.shape[-2], x.shape[-1]):
        xa.narrow(-2, start, n).copy_(_product(x.narrow(-2, start, n).float(), a.mT, scale))
    return xa


def lora_linear(x, w, bias, a, b, bias_b, seed, p, scale, merged):
    with no_autocast(x.device):
        return [_forward(x, *one, merged) for one in zip(w, bias, a, b, bias_b, seed, p, scale, strict=True)]


def _forward(x, w, bias, a, b, bias_b, seed, p, scale, merged):
    fits = bias is not None and bias.dim() == 1 and bias.dtype == x.dtype
    if merged and a is not None:
        if w.dtype == b.dtype:
            w = torch.addmm(w, _small(b), _small(a), alpha=scale)
        else:
            w = torch.add(w, _small(b) @ _small(a), alpha=scale).to(w.dtype)
    y = _linear(x, w, bias if fits else None)
    columns = [(bias, 1.0)] if bias is not None and not fits else []
    columns += [(bias_b, scale)] if bias_b is not None and merged else []
    if columns:
        G = max(1 if c.dim() == 1 else c.shape[0] for c, _ in columns)
        rows = _by_replica(y, G)
        _fold(rows, [(_ones(rows, c.dtype) * factor, _column(c, G)) for c, factor in columns])
    if a is not None and not merged:
        bias_b = None if bias_b is None else bias_b.contiguous()
        _adapter_kernels(x, a, seed)[0](y, x, a.contiguous(), b.contiguous(), bias_b, seed, p, scale)
    return y


_KERNEL_RANK = 16
"""Rank up to which bf16 factors without a mask are the CPU kernel's. From twice it on torch's bf16 products are faster
(docs/kernels.md, "lora_linear against PEFT's layer")."""


def _adapter_kernels(x: Tensor, a: Tensor, seed: Tensor | None) -> tuple[Callable, Callable]:
    """lora_adapter and its backward: the ops on a CPU, but for bf16 factors of a high rank; else the functions below,
    which are CUDA's kernels, without a way through the dispatcher and back."""
    many = x.dtype == a.dtype == torch.bfloat16 and seed is None and a.shape[-2] > _KERNEL_RANK
    if meta.kind(x.device) == "cuda" or (many and _small(a).dim() == 2):
        return lora_adapter, lora_adapter_backward
    return torch.ops.petune.lora_adapter, torch.ops.petune.lora_adapter_backward


def lora_adapter(y, x, a, b, bias_b, seed, p, scale):
    G, wide = _count(a), a.dtype != x.dtype
    if wide and max(x.numel(), y.numel()) > _AT_ONCE:
        MANY_ROWS["lora_adapter"](y, x, a, b, bias_b, seed, p, scale)
        return
    rows, y, a, b = x.to(a.dtype), _by_replica(y, G), _small(a), _small(b)
    if seed is not None:
        rows = torch.ops.petune.dropout(rows, seed, p)
    xa = _by_replica(rows, G) @ a.mT
    if bias_b is not None:
        add = torch.addmm if G == 1 else torch.baddbmm
        y.add_(add(bias_b.reshape(-1, 1, y.shape[-1]) if G > 1 else bias_b.reshape(-1), xa, b.mT), alpha=scale)
    elif wide:
        y.add_(xa @ b.mT, alpha=scale)
    else:
        _accumulate(y, xa, b.mT, scale)


def _by_blocks(y, x, a, b, bias_b, seed, p, scale):
    """lora_adapter with float32 factors, and no float32 copy of x or y."""
    G = _count(a)
    x, y, a, b = _by_replica(x, G), _by_replica(y, G), _small(a), _small(b)
    if seed is None:
        xa = _project(x, a)
    else:  # float32 arithmetic must not see x rounded after the factor 1/(1-p)
        xa = _project(x * _by_replica(_mask(x, x.shape[-1], seed, p), G), a, 1.0 / (1.0 - p))
    terms = [(xa * scale, b)]
    if bias_b is not None:
        terms.append((_ones(x, bias_b.dtype) * scale, _column(bias_b, G)))
    _fold(y, terms)


def _ones(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A column of ones [.., T, 1] beside rows [.., T, H]: it carries a bias through a low-rank term."""
    return rows.new_ones([1] * rows.dim(), dtype=dtype).expand(*rows.shape[:-1], 1)


def _column(bias: Tensor, G: int) -> Tensor:
    """A bias [N] or [G, N] as a factor [N, 1] or [G, N, 1]."""
    bias = bias.reshape(-1, bias.shape[-1], 1)
    return bias[0] if G == 1 else bias.expand(G, -1, -1)


def lora_linear_backward(dy, x, w, a, b, seed, p, scale, groups, want_dx, want_da, want_db, want_dsum):
    like = next(d for d in dy if d is not None)
    with no_autocast(like.device):
        return _backward(like, dy, x, w, a, b, seed, p, scale, groups, want_dx, want_da, want_db, want_dsum)


def _backward(like, dy, x, w, a, b, seed, p, scale, groups, want_dx, want_da, want_db, want_dsum):
    n, dx = len(w), None
    da, db, dsum = ([None] * n for _ in range(3))
    for i in range(n):
        dy_i = dy[i]
        if dy_i is None:  # this output was not used
            da[i], db[i] = (
                torch.zeros_like(m) if want else None for m, want in ((a[i], want_da[i]), (b[i], want_db[i]))
            )
            if want_dsum[i]:
                dsum[i] = like.new_zeros([groups, w[i].shape[0]], dtype=torch.float32)
            continue
        if want_dx and dx is None:
            dx = _times(dy_i, w[i])
        elif want_dx:
            _add_times(dx, dy_i, w[i])
        if want_dsum[i]:
            dsum[i] = torch.ops.petune.column_sum(dy_i, groups)
        if a[i] is not None and (want_dx or want_da[i] or want_db[i]):
            da[i], db[i] = _adapter_kernels(dy_i, a[i], seed[i])[1](
                dx, dy_i, x, a[i].contiguous(), b[i].contiguous(), seed[i], p[i], scale[i], want_da[i], want_db[i]
            )
    da, db, dsum = ([like.new_empty([0]) if g is None else g for g in grads] for grads in (da, db, dsum))
    return (dx if want_dx else like.new_empty([0])), da, db, dsum


def lora_adapter_backward(dx, dy, x, a, b, seed, p, scale, want_da, want_db):
    G, wide = _count(a), a.dtype != dy.dtype
    if wide and max(dy.numel(), dy.numel() // b.shape[-2] * a.shape[-1]) > _AT_ONCE:
        return MANY_ROWS["lora_adapter_backward"](dx, dy, x, a, b, seed, p, scale, want_da, want_db)
    da, db, rows, inner = dy.new_empty([0]), dy.new_empty([0]), _by_replica(dy.to(a.dtype), G), _small(a)
    if dx is not None or want_da:
        dxa = _product(rows, _small(b), scale)
    if want_da or want_db:
        dropped = x.to(a.dtype)
        if seed is not None:
            dropped = torch.ops.petune.dropout(dropped, seed, p)
        dropped = _by_replica(dropped, G)
    if want_da:
        da = (dxa.mT @ dropped).view(a.shape)
    if want_db:
        db = _product(rows.mT, dropped @ inner.mT, scale).view(b.shape)
    if dx is not None and seed is None and not wide:
        _accumulate(_by_replica(dx, G), dxa, inner)
    elif dx is not None:
        update = (dxa @ inner).view(dx.shape)
        dx.add_(update if seed is None else torch.ops.petune.dropout(update, seed, p))
    return da, db


def _backward_by_blocks(dx, dy, x, a, b, seed, p, scale, want_da, want_db):
    """The same with float32 factors, and no float32 copy of x, dy or dx: one pass over dy and one over dropout(x)."""
    G, K = _count(a), a.shape[-1]
    shape_a, shape_b, a, b = a.shape, b.shape, _small(a), _small(b)
    mask = None if seed is None else _by_replica(_mask(dy, K, seed, p), G)
    keep = 1.0 if mask is None else 1.0 / (1.0 - p)
    dy = _by_replica(dy, G)
    if want_da or want_db:
        x = _by_replica(x, G)
        x = x if mask is None else x * mask
    xa = _project(x, a, keep) if want_db else None
    dxa = torch.empty([*dy.shape[:-1], a.shape[-2]], dtype=a.dtype, device=dy.device)
    da = torch.zeros_like(a) if want_da else None
    db = torch.zeros_like(b) if want_db else None
    for start, n in _blocks(G, dy.shape[-2], max(K, b.shape[-2])):
        rows, part = dy.narrow(-2, start, n).float(), dxa.narrow(-2, start, n)
        if dx is not None or want_da:
            part.copy_(_product(rows, b, scale))
        if want_da:
            _accumulate(da, part.mT, x.narrow(-2, start, n).float(), keep)
        if want_db:
            _accumulate(db, rows.mT, xa.narrow(-2, start, n), scale)
    if dx is not None and mask is None:
        _fold(_by_replica(dx, G), [(dxa, a.mT)])
    elif dx is not None:
        _add_masked(_by_replica(dx, G), dxa, a, mask, p)
    nothing = dy.new_empty([0])
    return nothing if da is None else da.view(shape_a), nothing.clone() if db is None else db.view(shape_b)


MANY_ROWS: dict[str, Callable] = {"lora_adapter": _by_blocks, "lora_adapter_backward": _backward_by_blocks}
"""What takes wider factors beside more than _AT_ONCE elements of rows: Triton's kernels where it is (backends.py)."""


def _mask(like: Tensor, K: int, seed: Tensor, p: float) -> Tensor:
    """The dropout mask of [T, K], T the rows of `like`: 0 and 1."""
    return torch.ops.petune.dropout(like.new_ones([like.numel() // like.shape[-1], K]), seed, p).sign_()


def _add_masked(dx: Tensor, dxa: Tensor, a: Tensor, mask: Tensor, p: float) -> None:
    """dx += D * (dxa A), float32 until it is added."""
    for start, n in _blocks(_count(dx), dx.shape[-2], dx.shape[-1]):
        product = _product(dxa.narrow(-2, start, n), a, 1.0 / (1.0 - p))
        dx.narrow(-2, start, n).add_(product.mul_(mask.narrow(-2, start, n).float()))


def _accumulate(out: Tensor, u: Tensor, v: Tensor, scale: float = 1.0) -> None:
    (out.addmm_ if out.dim() == 2 else out.baddbmm_)(u, v, alpha=scale)


def behind_one_another(parts: list[Tensor]) -> Tensor | None:
    """The one matrix whose consecutive row blocks the matrices `parts` are in memory, or None."""
    first = parts[0]
    if len(parts) == 1:
        return first if first.is_contiguous() else None
    offset = first.storage_offset()
    for t in parts:
        if not t.is_contiguous() or (t.dtype, t.device, t.shape[1]) != (first.dtype, first.device, first.shape[1]):
            return None
        if t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or t.storage_offset() != offset:
            return None
        offset += t.numel()
    return first.as_strided((sum(t.shape[0] for t in parts), first.shape[1]), first.stride(), first.storage_offset())


def packed_linear(x, w, bias):
    fits = all(c is not None and c.dim() == 1 and c.dtype == x.dtype for c in bias)
    with no_autocast(x.device):
        whole = behind_one_another(w)
        if whole is not None:
            y = _linear(x, whole, None if not fits else bias[0] if len(bias) == 1 else torch.cat(bias))
        else:
            y = torch.cat([_linear(x, m, c if fits else None) for m, c in zip(w, bias, strict=True)], 1)
        given = [c for c in bias if c is not None]
        if given and not fits:
            G, dtype = max(1 if c.dim() == 1 else c.shape[0] for c in given), given[0].dtype
            columns = [
                _column(x.new_zeros([m.shape[0]], dtype=dtype) if c is None else c, G)
                for m, c in zip(w, bias, strict=True)
            ]
            rows = _by_replica(y, G)
            _fold(rows, [(_ones(rows, dtype), torch.cat(columns, -2))])
    return y


def packed_linear_backward(dy, w):
    with no_autocast(dy.device):
        whole = behind_one_another(w)
        if whole is not None:
            return _times(dy, whole)
        first, *rest = zip(dy.split([m.shape[0] for m in w], 1), w, strict=True)
        dx = _times(*first)
        for part, m in rest:
            _add_times(dx, part, m)
        return dx


_EVERYWHERE: tuple[Callable, ...] = (lora_linear, lora_linear_backward, packed_linear, packed_linear_backward)
KERNELS: dict[str, tuple[Callable, ...]] = {
    "cpu": _EVERYWHERE,  # the CPU's lora_adapter is csrc/cpu/lora_adapter.cpp
    "cuda": (*_EVERYWHERE, lora_adapter, lora_adapter_backward),
}
"""Device -> the functions of this file that are its kernels."""


def _register() -> None:
    for device, kernels in KERNELS.items():
        for kernel in kernels:
            torch.library.impl(f"{NAMESPACE}::{kernel.__name__}", device.upper(), kernel)


_register()
