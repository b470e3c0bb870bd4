r"""lora_linear and its backward; the derivation is in ops/lora_linear.py.

Three kernels, with "low" for the thin matrix between the two adapter factors (x A^T forward, s dy B backward):

    project   low[T, r] = D * in[T, C] @ inner                          one read of the wide side
    matmul    out[T, N] = sum_i in_i @ W_i + D_i * (low_i @ outer_i) + bias    out written once
    outer     d[R, C] = low^T @ (D * in), and the column sum of in      one read of the wide side

The forward is project + matmul, one matmul a projection; the backward matmul (dx, over all projections at once) and
outer, once for each dy (dB and the bias sums) and once for x (every dA), with a project of x before every dB: nothing
of rank r is kept in between. With everything in one dtype, and forward without dropout, matmul computes low itself as
it walks over its input.

Bytes: forward T (2K + N) + N K, backward T (2 sum N + (2 + n) K) + K sum N, times the element size, later reads of x
and dy mostly from L2; flops 2 T K N each way, and 2 T r (K + N) a low-rank product.

Precision. float32 adapters beside 16-bit rows: a float32 tile is two (16-bit result) or three (float32 result) 16-bit
tiles whose sum it is to 2^-17 or 2^-24, so that all of it runs on the 16-bit tensor cores with float32 accumulation.
float16 has too few exponents for three terms; there a float32 result comes from tf32's tensor cores, thrice.
Row blocks are summed by `finish` in a fixed order: deterministic. Rows of a replica never share a block with another's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import column_sum as columns
from .common import finish, keep_tile, nothing, processors, serve, threshold
from .tiles import Config, configure

RANK_BLOCK = 32
"""Ranks handled at a time. A rank up to this can be computed inside the matmul."""


@triton.jit
def _split_dot(u, v, total, dtype: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """total + u @ v with tensor cores of `dtype`; a float32 factor is the sum of up to TERMS tiles of that dtype."""
    if dtype == tl.float32:
        total = tl.dot(u.to(tl.float32), v.to(tl.float32), total, input_precision=PRECISION)
    elif TERMS == 1:
        total = tl.dot(u.to(dtype), v.to(dtype), total)
    elif dtype == tl.float16 and TERMS == 3:  # float16 has no room below a small factor for what it rounds away
        total = tl.dot(u.to(tl.float32), v.to(tl.float32), total, input_precision="tf32x3")
    else:
        u0 = u.to(dtype)
        v0 = v.to(dtype)
        if u.dtype == tl.float32:
            u1 = (u - u0.to(tl.float32)).to(dtype)
            total = tl.dot(u1, v0, total)
            if TERMS == 3:
                u2 = (u - u0.to(tl.float32) - u1.to(tl.float32)).to(dtype)
                total = tl.dot(u2, v0, total)
        if v.dtype == tl.float32:
            v1 = (v - v0.to(tl.float32)).to(dtype)
            total = tl.dot(u0, v1, total)
            if TERMS == 3:
                v2 = (v - v0.to(tl.float32) - v1.to(tl.float32)).to(dtype)
                total = tl.dot(u0, v2, total)
        total = tl.dot(u0, v0, total)
    return total


@triton.jit
def _masked(tile, key, limit, row, first, WIDTH: tl.constexpr, COLS: tl.constexpr):
    return tl.where(keep_tile(key, limit, row, first, WIDTH, COLS), tile, 0.0)


@triton.jit(do_not_specialize=["limit"])
def project_kernel(
    source, inner, low, seed, rows_per_group, rows_per_seed, limit, scale, stride_c, stride_r, stride_group,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """low = scale * mask(source) @ inner, inner[c, r] at c*stride_c + r*stride_r."""
    group = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row, here = group * rows_per_group + within, within < rows_per_group
    rank = tl.program_id(2) * RANK + tl.arange(0, RANK)[None, :]
    dtype: tl.constexpr = source.dtype.element_ty
    if seed is not None:
        key = tl.load(seed + row // rows_per_seed, mask=here, other=0)
    total = tl.zeros([ROWS, RANK], tl.float32)
    for first in range(0, C, COLS):
        col = first + tl.arange(0, COLS)
        tile = tl.load(source + row * C + col[None, :], mask=here & (col[None, :] < C), other=0.0)
        if seed is not None:
            tile = _masked(tile, key, limit, row % rows_per_seed, first, C, COLS)
        at = group * stride_group + col[:, None] * stride_c + rank * stride_r
        factor = tl.load(inner + at, mask=(col[:, None] < C) & (rank < R), other=0.0)
        total = _split_dot(tile, factor, total, dtype, TERMS, PRECISION)
    tl.store(low + row * R + rank, total * scale, mask=here & (rank < R))


@triton.jit(do_not_specialize=["limits"])
def matmul_kernel(
    sources, weights, lows, inners, outers, seeds, bias, bias_low, out, rows_per_group, rows_per_seed, limits, scales,
    factors, stride_bias, bias_scale, widths: tl.constexpr, ranks: tl.constexpr, DEEPEST: tl.constexpr, N: tl.constexpr,
    TRANSPOSED: tl.constexpr, FUSED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    RANK: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = sum_i source_i @ W_i + factor_i mask_i(low_i @ outer_i) + bias + bias_scale * bias_low.

    W_i[c, n], inner_i[c, r] and outer_i[r, n] are stored as [n, c], [r, c], [n, r] (TRANSPOSED: forward, with W, A, B)
    or as [c, n], [c, r], [r, n] (backward, with W, B, A); inner_i and outer_i are None where there is no adapter.
    FUSED: low_i = scale_i * source_i @ inner_i is made here and, unless lows[i] is None, stored by the first column of
    programs; else it is read.
    """
    tiles_n: tl.constexpr = (N + COLS - 1) // COLS
    dtype: tl.constexpr = out.dtype.element_ty
    tiles_m = tl.cdiv(rows_per_group, ROWS)
    # eight row tiles share a stretch of W in L2
    pid, band = tl.program_id(0), 8 * tiles_n
    top = pid // band * 8
    height = tl.minimum(tiles_m - top, 8)
    pid_m, pid_n = top + pid % band % height, pid % band // height
    group = tl.program_id(1).to(tl.int64)
    within = pid_m * ROWS + tl.arange(0, ROWS)[:, None]
    row, here = group * rows_per_group + within, within < rows_per_group
    col = pid_n * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for i in tl.static_range(len(sources)):
        rank = tl.arange(0, RANK)[None, :]
        low = tl.zeros([ROWS, RANK], tl.float32)
        for first in range(0, widths[i], DEPTH):
            step = first + tl.arange(0, DEPTH)
            near = step[None, :] < widths[i]
            tile = tl.load(sources[i] + row * widths[i] + step[None, :], mask=here & near, other=0.0)
            step = step[:, None]
            at = col.to(tl.int64) * widths[i] + step if TRANSPOSED else step.to(tl.int64) * N + col
            weight = tl.load(weights[i] + at, mask=(step < widths[i]) & (col < N), other=0.0)
            total = tl.dot(tile, weight, total, input_precision=PRECISION)
            if FUSED and inners[i] is not None:
                inner_at = rank * widths[i] + step if TRANSPOSED else step * ranks[i] + rank
                fits = (step < widths[i]) & (rank < ranks[i])
                inner = tl.load(inners[i] + group * ranks[i] * widths[i] + inner_at, mask=fits, other=0.0)
                low = tl.dot(tile, inner, low, input_precision=PRECISION)
        if outers[i] is not None:
            change = tl.zeros([ROWS, COLS], tl.float32)
            for start in tl.range(0, DEEPEST, RANK, num_stages=1):
                along = start + tl.arange(0, RANK)[None, :]
                low_at = row * ranks[i] + along
                if FUSED:
                    low *= scales[i]
                    if lows[i] is not None:
                        if pid_n == 0:
                            tl.store(lows[i] + low_at, low, mask=here & (along < ranks[i]))
                else:
                    low = tl.load(lows[i] + low_at, mask=here & (along < ranks[i]), other=0.0).to(tl.float32)
                down = start + tl.arange(0, RANK)[:, None]
                outer_at = col * ranks[i] + down if TRANSPOSED else down * N + col
                within_outer = (down < ranks[i]) & (col < N)
                factor = tl.load(outers[i] + group * ranks[i] * N + outer_at, mask=within_outer, other=0.0)
                if seeds[i] is None:  # straight into the result: no second tile of accumulators
                    total = _split_dot(low * factors[i], factor, total, dtype, TERMS, PRECISION)
                else:
                    change = _split_dot(low * factors[i], factor, change, dtype, TERMS, PRECISION)
            if seeds[i] is not None:
                key = tl.load(seeds[i] + row // rows_per_seed[i], mask=here, other=0)
                total += _masked(change, key, limits[i], row % rows_per_seed[i], pid_n * COLS, N, COLS)
    if bias is not None:
        total += tl.load(bias + group * stride_bias + col, mask=col < N, other=0.0).to(tl.float32)
    if bias_low is not None:
        total += bias_scale * tl.load(bias_low + group * N + col, mask=col < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + col, total, mask=here & (col < N))


@triton.jit(do_not_specialize=["limits"])
def outer_kernel(
    source, lows, seeds, partials, sums, rows_per_group, rows_per_program, rows_per_seed, limits, G,
    ranks: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    RANK: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial_i = mask_i(source)^T @ low_i over one stretch of rows, stored [r, c] (or [c, r] if TRANSPOSED), and the
    column sums of source over the same rows."""
    part, group, stretch = tl.program_id(1), tl.program_id(2) % G, tl.program_id(2) // G
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    slot = part.to(tl.int64) * G + group
    dtype: tl.constexpr = source.dtype.element_ty
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_per_group)
    rank = stretch * RANK + tl.arange(0, RANK)[None, :]
    totals = ()
    for _ in tl.static_range(len(lows)):
        totals = totals + (tl.zeros([COLS, RANK], tl.float32),)  # type: ignore[assignment]
    total = tl.zeros([COLS], tl.float32)
    for at in range(first, last, ROWS):
        within = at + tl.arange(0, ROWS)
        here = (within < last)[:, None]
        row = group.to(tl.int64) * rows_per_group + within[:, None]
        tile = tl.load(source + row * C + col[None, :], mask=here & (col[None, :] < C), other=0.0)
        if sums is not None:
            total += tl.sum(tile.to(tl.float32), 0)
        updated = ()
        for i in tl.static_range(len(lows)):
            kept = tile
            if seeds[i] is not None:
                key = tl.load(seeds[i] + row // rows_per_seed[i], mask=here, other=0)
                kept = _masked(tile, key, limits[i], row % rows_per_seed[i], tl.program_id(0) * COLS, C, COLS)
            low = tl.load(lows[i] + row * ranks[i] + rank, mask=here & (rank < ranks[i]), other=0.0)
            product = _split_dot(tl.trans(kept), low, totals[i], dtype, TERMS, PRECISION)
            updated = updated + (product,)  # type: ignore[assignment]
        totals = updated
    for i in tl.static_range(len(lows)):
        at = col[:, None] * ranks[i] + rank if TRANSPOSED else rank * C + col[:, None]
        fits = (col[:, None] < C) & (rank < ranks[i])
        tl.store(partials[i] + slot * ranks[i] * C + at, totals[i], mask=fits)
    if sums is not None:
        if stretch == 0:
            tl.store(sums + slot * C + col, total, mask=col < C)


def _precision() -> str:
    """float32 products round their factors to tf32 only where torch is allowed to, too."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _rank_block(*ranks: int) -> int:
    return min(RANK_BLOCK, max(16, triton.next_power_of_2(max(ranks, default=1))))


def _groups(*adapters: Tensor | None) -> int:
    return max((t.shape[0] for t in adapters if t is not None and t.dim() == 3), default=1)


def _dense(given: list[Tensor | None]) -> list:
    """Kernels make addresses from shapes."""
    return [t if t is None else t.contiguous() for t in given]


def _seeds(seed: Tensor | None) -> int:
    return 1 if seed is None else seed.numel()


def _project(source: Tensor, inner: Tensor, by_rank: bool, seed: Tensor | None, p: float, scale: float) -> Tensor:
    """low [T, r] in inner's dtype; inner is [.., r, C] if by_rank, else [.., C, r]."""
    T, C = source.shape
    R, G = inner.shape[-2] if by_rank else inner.shape[-1], _groups(inner)
    mixed, narrow = inner.dtype != source.dtype, source.element_size() == 2
    low, block = source.new_empty([T, R], dtype=inner.dtype), _rank_block(R)
    narrow = narrow and not (mixed and source.dtype == torch.float16)  # whose products are float32's
    rows, cols = 64 if narrow else 32, 64 if narrow and seed is None else 32
    project_kernel[(triton.cdiv(T // G, rows), G, triton.cdiv(R, block))](
        source, inner, low, seed, T // G, T // _seeds(seed), threshold(p), scale / (1.0 - p), 1 if by_rank else R,
        C if by_rank else 1, R * C, R=R, C=C, ROWS=rows, COLS=cols, RANK=block,
        TERMS=3 if mixed else 1, PRECISION=_precision(), num_warps=8 if mixed and block > 16 else 4, num_stages=4,
    )  # fmt: skip
    return low


def _matmul(
    sources: list, weights: list, lows: list, inners: list, outers: list, seeds: list, p: list[float],
    scales: list[float], factors: list[float], out: Tensor, G: int, *, transposed: bool, fused: bool,
    bias: Tensor | None = None, bias_low: Tensor | None = None, bias_scale: float = 0.0,
) -> None:  # fmt: skip
    """Launches matmul_kernel: low_i is scaled by scales[i], its product with outer_i by factors[i]."""
    T, N = out.shape
    ranks = tuple(0 if m is None else m.shape[-1 if transposed else -2] for m in outers)
    config = configure(T, max(s.shape[1] for s in sources), N, out.element_size(), out.device)
    mixed, narrow = any(m is not None and m.dtype != out.dtype for m in outers), out.element_size() == 2
    rank = 16 if mixed or not (fused or narrow) else _rank_block(*ranks)
    masks = sum(s is not None for s in seeds)
    if masks > 1 or (len(sources) > 1 and not narrow):  # ptxas keeps what masks and products share alive across them
        stages = 2 if fused and not narrow else config.stages
        config = Config(min(config.rows, 64), min(config.cols, 64), config.depth, 8, stages)
    elif max(ranks) > (rank if masks else 2 * rank):  # and the addresses of a product's steps
        config = Config(config.rows, min(config.cols, 64), config.depth, config.warps, config.stages)
    tiles = triton.cdiv(T // G, config.rows) * triton.cdiv(N, config.cols)
    matmul_kernel[(tiles, G)](
        tuple(sources), tuple(weights), tuple(lows), tuple(inners), tuple(outers), tuple(seeds), bias, bias_low, out,
        T // G, tuple(T // _seeds(s) for s in seeds), tuple(threshold(q) for q in p), tuple(scales), tuple(factors),
        0 if bias is None or bias.dim() == 1 else N, bias_scale, widths=tuple(s.shape[1] for s in sources),
        ranks=ranks, DEEPEST=max(ranks), N=N, TRANSPOSED=transposed, FUSED=fused, ROWS=config.rows, COLS=config.cols,
        DEPTH=config.depth, RANK=rank, TERMS=2 if mixed else 1, PRECISION=_precision(), num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip


def _fusable(source: Tensor, inner: Tensor, rank: int) -> bool:
    """Whether matmul may make low itself: one dtype, and a rank that fits a tile."""
    return inner.dtype == source.dtype and rank <= RANK_BLOCK


def lora_linear(x, w, bias, a, b, bias_b, seed, p, scale, merged):
    serve("lora_linear", x)
    w, bias, a, b, bias_b = map(_dense, (w, bias, a, b, bias_b))
    T, ys = x.shape[0], []
    for i, m in enumerate(w):
        y, xa, a_i, b_i = x.new_empty([T, m.shape[0]]), None, a[i], b[i]
        if merged and a_i is not None:
            update = b_i.reshape(-1, b_i.shape[-1]) @ a_i.reshape(-1, a_i.shape[-1])
            m, a_i, b_i = torch.add(m, update, alpha=scale[i]).to(m.dtype), None, None
        fused = a_i is not None and seed[i] is None and _fusable(x, a_i, a_i.shape[-2])
        if T:
            if a_i is not None and not fused:
                xa = _project(x, a_i, True, seed[i], p[i], 1.0)
            G = _groups(a[i], None if bias[i] is None else bias[i].unsqueeze(-1))
            _matmul(
                [x], [m], [xa], [a_i], [b_i], [None], [0.0], [1.0], [scale[i]], y, G, transposed=True, fused=fused,
                bias=bias[i], bias_low=bias_b[i], bias_scale=scale[i],
            )  # fmt: skip
        ys.append(y)
    return ys


def lora_linear_backward(dy, x, w, a, b, seed, p, scale, groups, want_dx, want_da, want_db, want_dsum):
    like = next(d for d in dy if d is not None)
    serve("lora_linear_backward", like)
    w, a, b = map(_dense, (w, a, b))
    T, n = like.shape[0], len(w)
    dx = like.new_empty([T, w[0].shape[1]]) if want_dx else nothing(like)
    da = [m.new_zeros(m.shape) if want else nothing(like) for m, want in zip(a, want_da, strict=True)]
    db = [m.new_zeros(m.shape) if want else nothing(like) for m, want in zip(b, want_db, strict=True)]
    dsum = [
        like.new_zeros([groups, m.shape[0]], dtype=torch.float32) if want else nothing(like)
        for m, want in zip(w, want_dsum, strict=True)
    ]
    used = [i for i in range(n) if dy[i] is not None and T]
    if not used:
        return dx, da, db, dsum
    lows: list[Tensor | None] = [None] * n
    # dx's matmul walks over dy anyway and makes s dy B on the way; otherwise project does
    fused = want_dx and all(a[i] is None or _fusable(dy[i], b[i], b[i].shape[-1]) for i in used)
    for i in used:
        if a[i] is not None and fused:
            lows[i] = like.new_empty([T, b[i].shape[-1]], dtype=b[i].dtype)
        elif a[i] is not None and (want_dx or want_da[i]):
            lows[i] = _project(dy[i], b[i], False, None, 0.0, scale[i])
    keep = [1.0 if s is None else 1.0 / (1.0 - q) for s, q in zip(seed, p, strict=True)]
    if want_dx:
        picked = ([values[i] for i in used] for values in (dy, w, lows, b, a, seed, p, scale, keep))
        _matmul(*picked, dx, _groups(*a), transposed=False, fused=fused)
    trained = [i for i in used if want_da[i]]
    # float32 tiles of several projections do not fit the registers beside their masks
    apart = any(seed[i] is not None for i in trained) and x.element_size() == 4
    for part in filter(None, [[i] for i in trained] if apart else [trained]):
        picked = ([values[i] for i in part] for values in (lows, seed, p, da, keep))
        _outer(x, *picked, None, _groups(*a), transposed=False)
    for i in used:
        if want_db[i]:
            low = _project(x, a[i], True, seed[i], p[i], 1.0)
            sums = dsum[i] if want_dsum[i] else None
            _outer(dy[i], [low], [None], [0.0], [db[i]], [scale[i]], sums, groups, transposed=True)
        elif want_dsum[i]:
            dsum[i] = columns.column_sum(dy[i], groups)
    return dx, da, db, dsum


def _outer(
    source: Tensor, lows: list, seeds: list, p: list[float], outs: list, factors: list[float], sums: Tensor | None,
    G: int, *, transposed: bool,
) -> None:  # fmt: skip
    """outs[i] = factors[i] * low_i^T @ (source where the mask keeps) per replica; sums = column sums of source."""
    T, C = source.shape
    rows, ranks = T // G, tuple(m.shape[1] for m in lows)
    mixed, narrow = any(m.dtype != source.dtype for m in lows), source.element_size() == 2
    block = 16 if len(lows) > 1 and (mixed or not narrow) else _rank_block(*ranks)
    plain = len(lows) == 1 and seeds[0] is None and narrow and not mixed
    cols = 128 if plain else 64  # a mask, several products or split ones need the registers
    tiles, stretches = triton.cdiv(C, cols), triton.cdiv(max(ranks), block)
    # about two programs a processor; at least 256 rows each, so that the partials stay small beside the rows
    parts = max(1, min(triton.cdiv(rows, 256), 2 * processors(source.device) // (tiles * G * stretches)))
    per = triton.cdiv(triton.cdiv(rows, parts), 64) * 64
    parts = triton.cdiv(rows, per)
    partials = [source.new_empty([parts, G, m.shape[1], C], dtype=torch.float32) for m in lows]
    partial_sums = None if sums is None else source.new_empty([parts, G, C], dtype=torch.float32)
    outer_kernel[(tiles, parts, G * stretches)](
        source, tuple(lows), tuple(seeds), tuple(partials), partial_sums, rows, per,
        tuple(T // _seeds(s) for s in seeds), tuple(threshold(q) for q in p), G, ranks=ranks, C=C,
        TRANSPOSED=transposed, ROWS=64 if narrow else 32, COLS=cols, RANK=block,
        TERMS=3 if mixed else 1, PRECISION=_precision(), num_stages=3 if len(lows) > 1 or (narrow and not mixed) else 2,
        num_warps=8 if mixed or len(lows) > 1 or not narrow else 4,
    )  # fmt: skip
    for partial, out, factor in zip(partials, outs, factors, strict=True):
        finish(partial, out, factor)
    if sums is not None and partial_sums is not None:
        finish(partial_sums, sums)
