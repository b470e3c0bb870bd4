"""What the Triton kernels share: the dropout mask, sums of partials, and facts about the device.

Reductions over rows are deterministic: a fixed number of programs each write one partial, and `finish` adds the
partials in order. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SERVED = (torch.float16, torch.bfloat16, torch.float32)


def serve(op: str, x: Tensor) -> None:
    if x.dtype not in SERVED:
        raise TypeError(f"{op} on the triton backend: x is {x.dtype}; accepted are float16, bfloat16, float32")


def threshold(p: float) -> int:
    """An element is kept iff its random word is at least this."""
    return int(p * 2.0**32)


def arch(device: torch.device) -> int:
    """Compute capability as 80, 90, 100; 90 where there is no GPU to ask (interpreter, compiling ahead)."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 132 where there is no GPU to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def nothing(x: Tensor) -> Tensor:
    return x.new_empty([0])


@triton.jit
def keep_tile(seed, threshold, row, first, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The dropout mask of rows `row` (int64 [R, 1], counted within the seed's own rows), columns first to first+COLS.

    Element e = row * WIDTH + column takes lane e % 4 of philox(seed, e // 4). Where rows start on a multiple of four,
    one Philox call gives four neighbours; otherwise every element computes its own.
    """
    if WIDTH % 4 == 0:
        counter = (row * WIDTH + first) // 4 + tl.arange(0, COLS // 4)[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, counter)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([counter.shape[0], COLS])
    else:
        element = row * WIDTH + first + tl.arange(0, COLS)[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, element // 4)
        lane = element % 4
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return words.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["count"])  # it follows T: one kernel for every length of a batch
def finish_kernel(partial, out, scale, count, SIZE, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """out[SIZE] = scale * sum over `count` partials [count, SIZE], always in the same order."""
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([DEPTH, BLOCK], tl.float32)
    for start in range(0, count, DEPTH):
        at = start + tl.arange(0, DEPTH)
        inside = (at[:, None] < count) & (col[None, :] < SIZE)
        total += tl.load(partial + at[:, None].to(tl.int64) * SIZE + col[None, :], mask=inside, other=0.0)
    tl.store(out + col, tl.sum(total, 0) * scale, mask=col < SIZE)


def finish(partial: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """Sums float32 partials [S, ...] into out, scaled and cast to its dtype."""
    size = out.numel()
    finish_kernel[(triton.cdiv(size, 128),)](
        partial, out, scale, partial.shape[0], SIZE=size, BLOCK=128, DEPTH=32, num_warps=4
    )
    return out
