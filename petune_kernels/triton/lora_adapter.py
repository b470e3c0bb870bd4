r"""lora_adapter and its backward: the low-rank term beside a frozen matmul that torch does; see ops/lora_linear.py.

Beside low_rank.py's `project` and `outer` one kernel, with "low" for x A^T forward and s dy B backward:

    update    out[T, N] += D * (low @ outer) + s bias_b                 out read and written once

Forward is project + update; backward project and outer for dA, project and outer for dB, update for dx. No float32 copy
of a row and no mask reaches memory.

Bytes: forward T (K + 2N), backward T (2K + 2N) for dA and dB and 2 T K for dx, times the element size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import nothing, serve, threshold
from .low_rank import dense, groups_of, masked, outer, precision, project, rank_block, seeds_of, split_dot


@triton.jit(do_not_specialize=["limit"])
def update_kernel(
    out, low, outer, bias, seed, rows_per_group, rows_per_seed, limit, factor, scale, stride_r, stride_n,
    R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out += factor * mask(low @ outer) + scale * bias, outer[r, n] at r*stride_r + n*stride_n."""
    group = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row, here = group * rows_per_group + within, within < rows_per_group
    first = tl.program_id(2) * COLS
    col = first + tl.arange(0, COLS)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, R, RANK):
        along, down = start + tl.arange(0, RANK)[None, :], start + tl.arange(0, RANK)[:, None]
        left = tl.load(low + row * R + along, mask=here & (along < R), other=0.0)
        at = group * R * N + down * stride_r + col * stride_n
        right = tl.load(outer + at, mask=(down < R) & (col < N), other=0.0)
        total = split_dot(left, right, total, out.dtype.element_ty, 2, PRECISION)
    total *= factor
    if seed is not None:
        key = tl.load(seed + row // rows_per_seed, mask=here, other=0)
        total = masked(total, key, limit, row % rows_per_seed, first, N, COLS)
    if bias is not None:
        total += scale * tl.load(bias + group * N + col, mask=col < N, other=0.0)
    inside = here & (col < N)
    total += tl.load(out + row * N + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + col, total, mask=inside)


def _update(
    out: Tensor, low: Tensor, factors: Tensor, by_column: bool, seed: Tensor | None, p: float, factor: float,
    bias: Tensor | None = None, scale: float = 0.0,
) -> None:  # fmt: skip
    """factors is [.., N, r] if by_column, else [.., r, N]."""
    (T, N), R, G = out.shape, low.shape[1], groups_of(factors)
    rows, cols = 64, 64
    update_kernel[(triton.cdiv(T // G, rows), G, triton.cdiv(N, cols))](
        out, low, factors, bias, seed, T // G, T // seeds_of(seed), threshold(p), factor, scale,
        1 if by_column else N, R if by_column else 1, R=R, N=N, ROWS=rows, COLS=cols, RANK=rank_block(R),
        PRECISION=precision(), num_warps=8,
    )  # fmt: skip


def lora_adapter(y, x, a, b, bias_b, seed, p, scale):
    serve("lora_adapter", x)
    a, b, bias_b = dense([a, b, bias_b])
    if len(x):
        _update(y, project(x, a, True, seed, p, scale), b, True, None, 0.0, 1.0, bias_b, scale)


def lora_adapter_backward(dx, dy, x, a, b, seed, p, scale, want_da, want_db):
    serve("lora_adapter_backward", dy)
    a, b = dense([a, b])
    da, db = (m.new_zeros(m.shape) if want else nothing(m) for m, want in ((a, want_da), (b, want_db)))
    if not len(dy):
        return da, db
    G, keep = groups_of(a), 1.0 if seed is None else 1.0 / (1.0 - p)
    if dx is not None or want_da:
        low = project(dy, b, False, None, 0.0, scale)
    if want_da:
        outer(x, [low], [seed], [p], [da], [keep], None, G, transposed=False)
    if want_db:
        outer(dy, [project(x, a, True, seed, p, 1.0)], [None], [0.0], [db], [scale], None, G, transposed=True)
    if dx is not None:
        _update(dx, low, a, False, seed, p, keep)
    return da, db
