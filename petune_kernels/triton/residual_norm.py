"""residual_norm and its backward; the derivation is in ops/residual_norm.py.

A program holds whole rows: H is at most a few thousand, and a row in registers is read once. Backward programs walk
over many rows and keep the sums for dgamma, dbeta and dbias beside them; what nobody wants is compiled out.

Bytes forward: T H (reads of x and residual, writes of y, z, x-hat, each where present) * sizeof(x).
Bytes backward: T H (dy, row, dz where present; dresidual, dx where wanted) * sizeof(x).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import finish, keep_tile, nothing, processors, serve, threshold


@triton.jit
def _small(pointer, group, col, H: tl.constexpr, STEP: tl.constexpr):
    """A small parameter beside rows: one row for all of them (STEP 0), or the row of each one's replica, STEP apart."""
    at = group * STEP + col if STEP else col
    return tl.load(pointer + at, mask=col < H, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["limit"])
def forward_kernel(
    x, bias, residual, gamma, beta, seed, y, z, xhat, rstd, T, rows_per_group, rows_per_seed, limit, keep, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, BIAS_STEP: tl.constexpr,
    GAMMA_STEP: tl.constexpr, BETA_STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside, at, group = (row < T) & (col < H), row * H + col, row // rows_per_group
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += _small(bias, group, col, H, BIAS_STEP)
    if seed is not None:
        # rows of one program may belong to different seeds; the key broadcasts over the row
        key = tl.load(seed + row // rows_per_seed, mask=row < T, other=0)
        value = tl.where(keep_tile(key, limit, row % rows_per_seed, 0, H, BLOCK), value * keep, 0.0)
    if residual is not None:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        tl.store(z + at, value, mask=inside)
    centred = value
    if not RMS:
        centred = value - tl.sum(value, 1, keep_dims=True) / H
    centred = tl.where(col < H, centred, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / H + eps)
    tl.store(rstd + row, inverse, mask=row < T)
    out = centred * inverse
    if xhat is not None:
        tl.store(xhat + at, out, mask=inside)
    if gamma is not None:
        out *= _small(gamma, group, col, H, GAMMA_STEP)
    if beta is not None:
        out += _small(beta, group, col, H, BETA_STEP)
    tl.store(y + at, out, mask=inside)


def _shape(H: int) -> tuple[int, int, int]:
    """BLOCK, rows a program, warps: about eight elements a thread, so that 16-bit loads are 16 bytes wide."""
    block = max(64, triton.next_power_of_2(H))
    warps = min(16, max(4, block // 256))
    return block, max(1, 1024 // block), warps


def _many(*params: Tensor | None) -> int:
    return max((p.shape[0] for p in params if p is not None and p.dim() == 2), default=1)


def _step(param: Tensor | None) -> int:
    """From one replica's values to the next one's; 0 where there is one for all."""
    return param.shape[1] if param is not None and param.dim() == 2 and param.shape[0] > 1 else 0


def residual_norm(x, bias, residual, gamma, beta, seed, p, eps, rms, want_z, want_xhat):
    serve("residual_norm", x)
    H = x.shape[-1]
    T = x.numel() // H
    y, rstd = x.new_empty(x.shape), x.new_empty([T], dtype=torch.float32)
    z = x.new_empty(x.shape) if want_z else None
    xhat = x.new_empty(x.shape) if want_xhat else None
    if T:
        G = _many(bias, gamma, beta)
        block, rows, warps = _shape(H)
        forward_kernel[(triton.cdiv(T, rows),)](
            x, bias, residual, gamma, beta, seed, y, z, xhat, rstd, T, T // G,
            T // (1 if seed is None else seed.numel()), threshold(p), 1.0 / (1.0 - p), eps, H=H, BLOCK=block,
            ROWS=rows, RMS=rms, BIAS_STEP=_step(bias), GAMMA_STEP=_step(gamma), BETA_STEP=_step(beta), num_warps=warps,
        )  # fmt: skip
    return y, nothing(x) if z is None else z, nothing(x) if xhat is None else xhat, rstd


@triton.jit
def _add(total, partial, value, mask, IN_MEMORY: tl.constexpr):
    """Adds a tile to a running column sum: in registers, or in the program's own partial where the row is too wide."""
    if IN_MEMORY:
        tl.store(partial, tl.load(partial, mask=mask, other=0.0) + value, mask=mask)
        tl.debug_barrier()  # another thread may load an element next: loads and stores can have different layouts
        return total
    return total + value


@triton.jit(do_not_specialize=["limit"])
def backward_kernel(
    dy, dz, row_saved, rstd, gamma, seed, dresidual, dx, dbias, dgamma, dbeta, rows_per_group, rows_per_seed,
    limit, keep, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, ROW_IS_Z: tl.constexpr,
    GAMMA_STEP: tl.constexpr, IN_MEMORY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    group, col = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    inside_row = col < H
    scale = 1.0
    if gamma is not None:
        scale = tl.load(gamma + group * GAMMA_STEP + col, mask=inside_row, other=1.0).to(tl.float32)
    # partials [program, group, H]
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group) * H + col
    sum_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_gamma = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_beta = tl.zeros([ROWS, BLOCK], tl.float32)
    # rows are loaded ahead, but not sums in memory, which this loop writes
    for first in tl.range(tl.program_id(0) * ROWS, rows_per_group, tl.num_programs(0) * ROWS, num_stages=STAGES):
        within = first + tl.arange(0, ROWS)[:, None]
        row = group * rows_per_group + within
        inside, at = (within < rows_per_group) & inside_row, row * H + col
        inverse = tl.load(rstd + row, mask=within < rows_per_group, other=0.0)
        up = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        hat = tl.load(row_saved + at, mask=inside, other=0.0).to(tl.float32)
        if ROW_IS_Z:
            if not RMS:
                hat = tl.where(inside_row, hat - tl.sum(hat, 1, keep_dims=True) / H, 0.0)
            hat *= inverse
        if dbeta is not None:
            sum_beta = _add(sum_beta, dbeta + part, up, inside, IN_MEMORY)
        if dgamma is not None:
            sum_gamma = _add(sum_gamma, dgamma + part, up * hat, inside, IN_MEMORY)
        if (dresidual is not None) or (dx is not None) or (dbias is not None):
            d = up * scale
            project = tl.sum(d * hat, 1, keep_dims=True) / H
            if RMS:
                d = (d - hat * project) * inverse
            else:
                d = (d - hat * project - tl.sum(d, 1, keep_dims=True) / H) * inverse
            if dz is not None:
                d += tl.load(dz + at, mask=inside, other=0.0).to(tl.float32)
            if dresidual is not None:
                tl.store(dresidual + at, d, mask=inside)
            if seed is not None:
                key = tl.load(seed + row // rows_per_seed, mask=within < rows_per_group, other=0)
                d = tl.where(keep_tile(key, limit, row % rows_per_seed, 0, H, BLOCK), d * keep, 0.0)
            if dx is not None:
                tl.store(dx + at, d, mask=inside)
            if dbias is not None:
                sum_bias = _add(sum_bias, dbias + part, tl.where(inside, d, 0.0), inside, IN_MEMORY)
    if not IN_MEMORY:
        if dbias is not None:
            tl.store(dbias + part, tl.sum(sum_bias, 0)[None, :], mask=inside_row)
        if dgamma is not None:
            tl.store(dgamma + part, tl.sum(sum_gamma, 0)[None, :], mask=inside_row)
        if dbeta is not None:
            tl.store(dbeta + part, tl.sum(sum_beta, 0)[None, :], mask=inside_row)


def residual_norm_backward(
    dy, dz, row, rstd, bias, gamma, beta, seed, p, rms, row_is_z, want_dresidual, want_dx, want_dbias, want_dgamma,
    want_dbeta,
):  # fmt: skip
    serve("residual_norm_backward", dy)
    H = dy.shape[-1]
    T = dy.numel() // H
    dresidual = dy.new_empty(dy.shape) if want_dresidual else None
    dx = dy.new_empty(dy.shape) if want_dx else None
    wanted = ((want_dbias, bias), (want_dgamma, gamma), (want_dbeta, beta))
    small = [like.new_empty(like.shape) if want else None for want, like in wanted]
    if T:
        G = _many(bias, gamma, beta)
        block, rows, warps = _shape(H)
        in_memory = block > 4096
        each = max(2, 16 // warps)  # with two rows ahead some 24 KB in flight on a multiprocessor
        programs = max(1, min(triton.cdiv(T // G, 4 * rows), each * processors(dy.device) // G))
        make = dy.new_zeros if in_memory else dy.new_empty
        parts = [None if s is None else make([programs, G, H], dtype=torch.float32) for s in small]
        passes = [(dresidual, dx, *parts)]
        if block > 8192:  # one pass would not fit in registers
            passes = [(dresidual, dx, parts[0], None, None), (None, None, None, *parts[1:])]
        for outputs in passes:
            if any(t is not None for t in outputs):
                backward_kernel[(programs, G)](
                    dy, dz, row, rstd, gamma, seed, *outputs, T // G, T // (1 if seed is None else seed.numel()),
                    threshold(p), 1.0 / (1.0 - p), H=H, BLOCK=block, ROWS=rows, RMS=rms, ROW_IS_Z=row_is_z,
                    GAMMA_STEP=_step(gamma), IN_MEMORY=in_memory, STAGES=1 if in_memory else 3, num_warps=warps,
                )  # fmt: skip
        for partial, out in zip(parts, small, strict=True):
            if partial is not None and out is not None:
                finish(partial, out)
    else:
        small = [None if s is None else s.zero_() for s in small]
    return tuple(nothing(dy) if t is None else t for t in (dresidual, dx, *small))
