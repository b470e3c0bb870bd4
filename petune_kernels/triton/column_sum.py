"""column_sum: [T, H] to float32 [G, H], each replica's rows apart. T * H * sizeof(x) bytes read, once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import finish, processors, serve

_BLOCK, _ROWS = 128, 32


@triton.jit
def column_sum_kernel(
    x, partial, rows_per_group, rows_per_program, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    part, group = tl.program_id(1), tl.program_id(2)
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_per_group)
    start = group.to(tl.int64) * rows_per_group
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for at in range(first, last, ROWS):
        row = at + tl.arange(0, ROWS)[:, None]
        total += tl.load(x + (start + row) * H + col, mask=(row < last) & (col < H), other=0.0).to(tl.float32)
    out = partial + (part.to(tl.int64) * tl.num_programs(2) + group) * H + col
    tl.store(out, tl.sum(total, 0)[None, :], mask=col < H)


def column_sum(x: Tensor, groups: int) -> Tensor:
    serve("column_sum", x)
    T, H = x.shape
    out = x.new_empty([groups, H], dtype=torch.float32)
    if T == 0:
        return out.zero_()
    rows = T // groups
    columns = triton.cdiv(H, _BLOCK)
    # about four programs a processor, at least 64 rows each, so that the partials stay a small share of the bytes
    parts = max(1, min(triton.cdiv(rows, 64), 4 * processors(x.device) // (columns * groups)))
    per = triton.cdiv(triton.cdiv(rows, parts), _ROWS) * _ROWS
    parts = triton.cdiv(rows, per)
    partial = x.new_empty([parts, groups, H], dtype=torch.float32)
    column_sum_kernel[(columns, parts, groups)](x, partial, rows, per, H=H, BLOCK=_BLOCK, ROWS=_ROWS, num_warps=4)
    return finish(partial, out)
