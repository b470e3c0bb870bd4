"""Products with LoRA's thin factors, for lora_linear and lora_adapter; "low" is the thin matrix between two factors.

    project   low[T, r] = D * in[T, C] @ inner                          one read of the wide side
    outer     d[R, C] = low^T @ (D * in), and the column sum of in      one read of the wide side

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

from .common import finish, keep_tile, processors, threshold

RANK_BLOCK = 32
"""Ranks handled at a time. A rank up to this can be computed inside the matmul."""


@triton.jit
def split_dot(u, v, total, dtype: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
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
def masked(tile, key, limit, row, first, WIDTH: tl.constexpr, COLS: tl.constexpr):
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
            tile = masked(tile, key, limit, row % rows_per_seed, first, C, COLS)
        at = group * stride_group + col[:, None] * stride_c + rank * stride_r
        factor = tl.load(inner + at, mask=(col[:, None] < C) & (rank < R), other=0.0)
        total = split_dot(tile, factor, total, dtype, TERMS, PRECISION)
    tl.store(low + row * R + rank, total * scale, mask=here & (rank < R))


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
                kept = masked(tile, key, limits[i], row % rows_per_seed[i], tl.program_id(0) * COLS, C, COLS)
            low = tl.load(lows[i] + row * ranks[i] + rank, mask=here & (rank < ranks[i]), other=0.0)
            product = split_dot(tl.trans(kept), low, totals[i], dtype, TERMS, PRECISION)
            updated = updated + (product,)  # type: ignore[assignment]
        totals = updated
    for i in tl.static_range(len(lows)):
        at = col[:, None] * ranks[i] + rank if TRANSPOSED else rank * C + col[:, None]
        fits = (col[:, None] < C) & (rank < ranks[i])
        tl.store(partials[i] + slot * ranks[i] * C + at, totals[i], mask=fits)
    if sums is not None:
        if stretch == 0:
            tl.store(sums + slot * C + col, total, mask=col < C)


def precision() -> str:
    """float32 products round their factors to tf32 only where torch is allowed to, too."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rank_block(*ranks: int) -> int:
    return min(RANK_BLOCK, max(16, triton.next_power_of_2(max(ranks, default=1))))


def groups_of(*adapters: Tensor | None) -> int:
    return max((t.shape[0] for t in adapters if t is not None and t.dim() == 3), default=1)


def dense(given: list[Tensor | None]) -> list:
    """Kernels make addresses from shapes."""
    return [t if t is None else t.contiguous() for t in given]


def seeds_of(seed: Tensor | None) -> int:
    return 1 if seed is None else seed.numel()


def project(source: Tensor, inner: Tensor, by_rank: bool, seed: Tensor | None, p: float, scale: float) -> Tensor:
    """low [T, r] in inner's dtype; inner is [.., r, C] if by_rank, else [.., C, r]."""
    T, C = source.shape
    R, G = inner.shape[-2] if by_rank else inner.shape[-1], groups_of(inner)
    mixed, narrow = inner.dtype != source.dtype, source.element_size() == 2
    low, block = source.new_empty([T, R], dtype=inner.dtype), rank_block(R)
    narrow = narrow and not (mixed and source.dtype == torch.float16)  # whose products are float32's
    rows, cols = 64 if narrow else 32, 64 if narrow and seed is None else 32
    project_kernel[(triton.cdiv(T // G, rows), G, triton.cdiv(R, block))](
        source, inner, low, seed, T // G, T // seeds_of(seed), threshold(p), scale / (1.0 - p), 1 if by_rank else R,
        C if by_rank else 1, R * C, R=R, C=C, ROWS=rows, COLS=cols, RANK=block,
        TERMS=3 if mixed else 1, PRECISION=precision(), num_warps=8 if mixed and block > 16 else 4, num_stages=4,
    )  # fmt: skip
    return low


def outer(
    source: Tensor, lows: list, seeds: list, p: list[float], outs: list, factors: list[float], sums: Tensor | None,
    G: int, *, transposed: bool,
) -> None:  # fmt: skip
    """outs[i] = factors[i] * low_i^T @ (source where the mask keeps) per replica; sums = column sums of source."""
    T, C = source.shape
    rows, ranks = T // G, tuple(m.shape[1] for m in lows)
    mixed, narrow = any(m.dtype != source.dtype for m in lows), source.element_size() == 2
    block = 16 if len(lows) > 1 and (mixed or not narrow) else rank_block(*ranks)
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
        tuple(T // seeds_of(s) for s in seeds), tuple(threshold(q) for q in p), G, ranks=ranks, C=C,
        TRANSPOSED=transposed, ROWS=64 if narrow else 32, COLS=cols, RANK=block,
        TERMS=3 if mixed else 1, PRECISION=precision(), num_stages=3 if len(lows) > 1 or (narrow and not mixed) else 2,
        num_warps=8 if mixed or len(lows) > 1 or not narrow else 4,
    )  # fmt: skip
    for partial, out, factor in zip(partials, outs, factors, strict=True):
        finish(partial, out, factor)
    if sums is not None and partial_sums is not None:
        finish(partial_sums, sums)
