"""dropout: y = keep ? x / (1-p) : 0, the mask from the seed. 2 * n * sizeof(x) bytes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import keep_tile, serve, threshold


@triton.jit(do_not_specialize=["limit"])
def dropout_kernel(x, seed, y, per_seed, limit, keep, BLOCK: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    col = first + tl.arange(0, BLOCK)[None, :]
    at, inside = group * per_seed + col, col < per_seed
    # one row as wide as the block: element e of the seed is column e
    mask = keep_tile(tl.load(seed + group), limit, tl.zeros([1, 1], tl.int64), first, BLOCK, BLOCK)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, tl.where(mask, value * keep, 0.0), mask=inside)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    serve("dropout", x)
    y, seeds = x.new_empty(x.shape), seed.numel()
    if x.numel():
        per_seed = x.numel() // seeds
        grid = (triton.cdiv(per_seed, 1024), seeds)
        dropout_kernel[grid](x, seed, y, per_seed, threshold(p), 1.0 / (1.0 - p), BLOCK=1024, num_warps=4)
    return y
