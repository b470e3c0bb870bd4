"""Arguments whose strides overlap give what a copy of them gives: outputs, and gradients of what lies behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from petune_kernels.ops.attention import attention
from petune_kernels.ops.bias_act import bias_act
from petune_kernels.ops.column_sum import column_sum
from petune_kernels.ops.dropout import dropout
from petune_kernels.ops.frozen_linear import frozen_linear
from petune_kernels.ops.lora_linear import lora_linear
from petune_kernels.ops.packed_linear import packed_linear
from petune_kernels.ops.residual_norm import residual_norm

T, H, R = 24, 16, 4
SEED = torch.tensor([5])


def heads(t: Tensor) -> Tensor:
    """[T, H] as [B, h, S, D], with whatever strides it has."""
    return t.unflatten(0, (2, T // 2)).unflatten(2, (2, H // 2)).transpose(1, 2)


OPS = {  # each of rows t [T, H], again as the other argument, a vector v [H] and a matrix m [R, H]
    "residual_norm": lambda t, v, m: residual_norm(t, v, v, bias=v, residual=t, p=0.3, seed=SEED, return_z=True),
    "residual_norm rms": lambda t, v, m: residual_norm(t, v, rms=True),
    "bias_act": lambda t, v, m: bias_act(t, v, "gelu"),
    "bias_act coded": lambda t, v, m: bias_act(t, v, "gelu", coded=True),
    "bias_act gated": lambda t, v, m: bias_act(t, act="silu", gate=t),
    "column_sum": lambda t, v, m: column_sum(t),
    "dropout": lambda t, v, m: dropout(t, 0.3, seed=SEED),
    "attention": lambda t, v, m: attention(heads(t), heads(t), heads(t), p=0.3, seed=SEED),
    "attention mask": lambda t, v, m: attention(
        heads(t), heads(t), heads(t), mask=v.detach()[: T // 2].expand(2, 1, 1, -1)
    ),
    "frozen_linear": lambda t, v, m: frozen_linear(t, m, v[:R]),
    "packed_linear": lambda t, v, m: packed_linear(t, (m, m), (v[:R], None)),
    "lora_linear": lambda t, v, m: lora_linear(t, m, v[:R], m, m[:, :R], bias_b=v[:R], p=0.3, seed=SEED),
}
OVERLAPS = {  # how a vector in memory becomes n rows of width H
    "one row, expanded": lambda base, n: base[:H].expand(n, H),
    "one element, expanded": lambda base, n: base[:1].expand(n, H),
    "windows": lambda base, n: base.as_strided((n, H), (1, 1)),
    "windows of every other": lambda base, n: base.as_strided((n, H), (3, 2)),
}


def same(one: Tensor | None, two: Tensor | None) -> bool:
    """Equal but for the order of sums of values around one: a matmul of other strides may be another one."""
    if one is None or two is None:
        return one is two
    unit = torch.finfo(one.dtype).eps
    return bool((one - two).abs().max() <= 8 * unit * max(1.0, two.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("op", OPS)
def test_read_like_a_copy(op, overlap, dtype):
    bases = [torch.randn(4 * (T + H)).to(dtype) for _ in range(3)]
    results = []
    for copy in (False, True):
        rows, vector, matrix = leaves = [base.clone().requires_grad_(True) for base in bases]
        vector = vector[:1].expand(H) if "expanded" in overlap else vector[:H]
        made = [OVERLAPS[overlap](rows, T), vector, OVERLAPS[overlap](matrix, R)]
        out = OPS[op](*(t.clone() if copy else t for t in made))
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in out]
        grads = []
        if any(t.requires_grad for t in out):
            grads = torch.autograd.grad(out, leaves, weights, allow_unused=True)
        assert all(torch.equal(leaf, base) for leaf, base in zip(leaves, bases, strict=True)), "an argument was written"
        results.append([*out, *grads])
    for one, two in zip(*results, strict=True):
        assert same(one, two), (one - two, two)
