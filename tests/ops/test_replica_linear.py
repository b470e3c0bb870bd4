"""replica_linear: each replica's rows by its own weight, as one linear layer a replica would."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from petune_kernels.ops.replica_linear import replica_linear

from .table import DTYPES, forward_floor, no_worse_than_eager, row_sum_floor


@pytest.mark.parametrize("bias", ("none", "each", "shared"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((1, 6, 40, 3), (3, 4, 33, 17), (5, 1, 1, 1), (2, 0, 8, 4)), ids=str)
def test_error_no_worse_than_a_linear_layer_each(shape: tuple[int, ...], dtype: torch.dtype, bias: str) -> None:
    G, rows, K, N = shape
    b = {"none": None, "each": torch.randn(G, N), "shared": torch.randn(N)}[bias]
    given = [torch.randn(G * rows, 2, K), torch.randn(G, N, K), *([] if b is None else [b])]
    ours = [t.to(dtype).requires_grad_() for t in given]
    plain = [t.detach().clone().requires_grad_() for t in ours]
    exact = [t.detach().double().requires_grad_() for t in ours]

    def each(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        parts = x.reshape(G, rows, 2, K)
        return torch.cat([F.linear(parts[g], w[g], b if b is None or b.dim() == 1 else b[g]) for g in range(G)])

    results = [f(*t) for f, t in ((replica_linear, ours), (each, plain), (each, exact))]
    assert results[0].shape == (G * rows, 2, N) and results[0].dtype == dtype
    no_worse_than_eager("y", *results, forward_floor(dtype) + row_sum_floor(torch.float32, K))
    dy = torch.randn(G * rows, 2, N, dtype=dtype)
    grads = [torch.autograd.grad(y, t, dy.to(y.dtype)) for y, t in zip(results, (ours, plain, exact), strict=True)]
    for name, *values in zip(("dx", "dw", "db"), *grads, strict=False):
        floor = (
            forward_floor(dtype) + row_sum_floor(torch.float32, K) if name == "dx" else row_sum_floor(dtype, G * rows)
        )
        no_worse_than_eager(name, *values, floor)


def test_under_autocast_it_computes_in_autocasts_dtype() -> None:
    x, w, b = torch.randn(6, 8), torch.randn(3, 4, 8), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = replica_linear(x, w, b)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), replica_linear(x, w, b), rtol=3e-2, atol=3e-2)


BAD = {
    "a list": (lambda x, w: replica_linear([1.0], w), TypeError, "x is list"),
    "a matrix": (lambda x, w: replica_linear(x, w[0]), ValueError, r"w has shape \(4, 8\); accepted is \[G, N, 8\]"),
    "another width": (lambda x, w: replica_linear(x[:, :7], w), ValueError, "w has shape"),
    "rows": (lambda x, w: replica_linear(x[:5], w), ValueError, "3 replicas, which does not divide the 5 rows"),
    "bias": (lambda x, w: replica_linear(x, w, x[:2, :4]), ValueError, r"bias has shape \(2, 4\); accepted is \[3, 4"),
    "devices": (lambda x, w: replica_linear(x, w.to("meta")), ValueError, "w is on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(torch.randn(6, 8), torch.randn(3, 4, 8))
