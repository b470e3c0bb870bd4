r"""lora_linear and its backward; the derivation is in ops/lora_linear.py.

Beside low_rank.py's `project` and `outer` one kernel, with "low" for the thin matrix between the two adapter factors
(x A^T forward, s dy B backward):

    matmul    out[T, N] = sum_i in_i @ W_i + D_i * (low_i @ outer_i) + bias    out written once

The forward is project + matmul, one matmul a projection; the backward matmul (dx, over all projections at once) and
outer, once for each dy (dB and the bias sums) and once for x (every dA), with a project of x before every dB: nothing
of rank r is kept in between. With everything in one dtype, and forward without dropout, matmul computes low itself as
it walks over its input.

Bytes: forward T (2K + N) + N K, backward T (2 sum N + (2 + n) K) + K sum N, times the element size, later reads of x
and dy mostly from L2; flops 2 T K N each way, and 2 T r (K + N) a low-rank product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import column_sum as columns
from .common import nothing, serve, threshold
from .low_rank import RANK_BLOCK, dense, groups_of, masked, outer, precision, project, rank_block, seeds_of, split_dot
from .tiles import Config, configure


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
                    total = split_dot(low * factors[i], factor, total, dtype, TERMS, PRECISION)
                else:
                    change = split_dot(low * factors[i], factor, change, dtype, TERMS, PRECISION)
            if seeds[i] is not None:
                key = tl.load(seeds[i] + row // rows_per_seed[i], mask=here, other=0)
                total += masked(change, key, limits[i], row % rows_per_seed[i], pid_n * COLS, N, COLS)
    if bias is not None:
        total += tl.load(bias + group * stride_bias + col, mask=col < N, other=0.0).to(tl.float32)
    if bias_low is not None:
        total += bias_scale * tl.load(bias_low + group * N + col, mask=col < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + col, total, mask=here & (col < N))


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
    rank = 16 if mixed or not (fused or narrow) else rank_block(*ranks)
    masks = sum(s is not None for s in seeds)
    if masks > 1 or (len(sources) > 1 and not narrow):  # ptxas keeps what masks and products share alive across them
        stages = 2 if fused and not narrow else config.stages
        config = Config(min(config.rows, 64), min(config.cols, 64), config.depth, 8, stages)
    elif max(ranks) > (rank if masks else 2 * rank):  # and the addresses of a product's steps
        config = Config(config.rows, min(config.cols, 64), config.depth, config.warps, config.stages)
    tiles = triton.cdiv(T // G, config.rows) * triton.cdiv(N, config.cols)
    matmul_kernel[(tiles, G)](
        tuple(sources), tuple(weights), tuple(lows), tuple(inners), tuple(outers), tuple(seeds), bias, bias_low, out,
        T // G, tuple(T // seeds_of(s) for s in seeds), tuple(threshold(q) for q in p), tuple(scales), tuple(factors),
        0 if bias is None or bias.dim() == 1 else N, bias_scale, widths=tuple(s.shape[1] for s in sources),
        ranks=ranks, DEEPEST=max(ranks), N=N, TRANSPOSED=transposed, FUSED=fused, ROWS=config.rows, COLS=config.cols,
        DEPTH=config.depth, RANK=rank, TERMS=2 if mixed else 1, PRECISION=precision(), num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip


def _fusable(source: Tensor, inner: Tensor, rank: int) -> bool:
    """Whether matmul may make low itself: one dtype, and a rank that fits a tile."""
    return inner.dtype == source.dtype and rank <= RANK_BLOCK


def lora_linear(x, w, bias, a, b, bias_b, seed, p, scale, merged):
    serve("lora_linear", x)
    w, bias, a, b, bias_b = map(dense, (w, bias, a, b, bias_b))
    T, ys = x.shape[0], []
    for i, m in enumerate(w):
        y, xa, a_i, b_i = x.new_empty([T, m.shape[0]]), None, a[i], b[i]
        if merged and a_i is not None:
            update = b_i.reshape(-1, b_i.shape[-1]) @ a_i.reshape(-1, a_i.shape[-1])
            m, a_i, b_i = torch.add(m, update, alpha=scale[i]).to(m.dtype), None, None
        fused = a_i is not None and seed[i] is None and _fusable(x, a_i, a_i.shape[-2])
        if T:
            if a_i is not None and not fused:
                xa = project(x, a_i, True, seed[i], p[i], 1.0)
            G = groups_of(a[i], None if bias[i] is None else bias[i].unsqueeze(-1))
            _matmul(
                [x], [m], [xa], [a_i], [b_i], [None], [0.0], [1.0], [scale[i]], y, G, transposed=True, fused=fused,
                bias=bias[i], bias_low=bias_b[i], bias_scale=scale[i],
            )  # fmt: skip
        ys.append(y)
    return ys


def lora_linear_backward(dy, x, w, a, b, seed, p, scale, groups, want_dx, want_da, want_db, want_dsum):
    like = next(d for d in dy if d is not None)
    serve("lora_linear_backward", like)
    w, a, b = map(dense, (w, a, b))
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
            lows[i] = project(dy[i], b[i], False, None, 0.0, scale[i])
    keep = [1.0 if s is None else 1.0 / (1.0 - q) for s, q in zip(seed, p, strict=True)]
    if want_dx:
        picked = ([values[i] for i in used] for values in (dy, w, lows, b, a, seed, p, scale, keep))
        _matmul(*picked, dx, groups_of(*a), transposed=False, fused=fused)
    trained = [i for i in used if want_da[i]]
    # float32 tiles of several projections do not fit the registers beside their masks
    apart = any(seed[i] is not None for i in trained) and x.element_size() == 4
    for part in filter(None, [[i] for i in trained] if apart else [trained]):
        picked = ([values[i] for i in part] for values in (lows, seed, p, da, keep))
        outer(x, *picked, None, groups_of(*a), transposed=False)
    for i in used:
        if want_db[i]:
            low = project(x, a[i], True, seed[i], p[i], 1.0)
            sums = dsum[i] if want_dsum[i] else None
            outer(dy[i], [low], [None], [0.0], [db[i]], [scale[i]], sums, groups, transposed=True)
        elif want_dsum[i]:
            dsum[i] = columns.column_sum(dy[i], groups)
    return dx, da, db, dsum
