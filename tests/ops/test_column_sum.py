"""column_sum: against float64, deterministic, differentiable, and loud on bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import petune_kernels as pk
from petune_kernels.ops.column_sum import column_sum

from .table import DTYPES, SHAPES, no_worse_than_eager, row_sum_floor, run_under_isa


@pytest.mark.parametrize("G", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,N", (*SHAPES, (5000, 33), (5003, 2), (5000, 63)))
def test_error_no_worse_than_eager(T: int, N: int, dtype: torch.dtype, G: int) -> None:
    T += -T % G
    x = torch.randn(T, N, dtype=dtype)
    ours = column_sum(x, G)
    assert ours.shape == (G, N) and ours.dtype == torch.float32
    exact, eager = (v.reshape(G, T // G, N).sum(1) for v in (x.double(), x))
    no_worse_than_eager("sum", ours, eager, exact, row_sum_floor(torch.float32, T))
    with pk.backend("reference"):
        assert column_sum(x.double(), G).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_whatever_the_threads(dtype: torch.dtype) -> None:
    x = torch.randn(5000, 50, dtype=dtype)
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            runs.append(column_sum(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[1], runs[2])


def test_many_dimensions_and_strides() -> None:
    x = torch.randn(3, 4, 10)
    torch.testing.assert_close(column_sum(x, 2)[1], x.reshape(12, 10)[6:].sum(0))
    torch.testing.assert_close(column_sum(x.transpose(0, 1), 4)[0], x[:, 0].sum(0))
    torch.testing.assert_close(column_sum(x[..., ::2])[0], x[..., ::2].sum((0, 1)))
    torch.testing.assert_close(column_sum(x[0, :1].expand(7, 10))[0], 7 * x[0, 0])


def test_gradient() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    with pk.backend("reference"):
        assert torch.autograd.gradcheck(lambda x: column_sum(x, 3), (x,))
        assert torch.autograd.gradgradcheck(lambda x: column_sum(x, 3), (x,))
    narrow = torch.randn(6, 5, dtype=torch.bfloat16, requires_grad=True)
    (dx,) = torch.autograd.grad(column_sum(narrow, 2)[1].sum(), narrow)
    assert torch.equal(dx, torch.tensor([0.0] * 3 + [1.0] * 3, dtype=torch.bfloat16)[:, None].expand(6, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    x = torch.randn(6, 16, dtype=dtype)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.petune.column_sum, (x, 2), test_utils=checks)

    def f(x: Tensor) -> Tensor:
        return column_sum(x, 3).square().sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(f(x), x))


@pytest.mark.parametrize("isa", ("baseline", "avx2"))  # the best one is what every other test runs on
def test_every_instruction_set(isa: str) -> None:
    code = """if True:
        import torch, petune_kernels as pk
        from petune_kernels.ops.column_sum import column_sum
        for dtype in (torch.float32, torch.bfloat16):
            for T, N in ((9, 64), (300, 50), (17, 7)):
                x = torch.randn(T, N, dtype=dtype)
                with pk.backend("cpu"):
                    torch.testing.assert_close(column_sum(x)[0].double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
    """
    run_under_isa(code, isa)


BAD = {
    "an integer tensor": (lambda x: column_sum(x.long()), TypeError, "x is torch.int64"),
    "no groups": (lambda x: column_sum(x, 0), ValueError, "groups is 0; accepted is an integer of at least 1"),
    "groups as a float": (lambda x: column_sum(x, 2.0), ValueError, "groups is 2.0"),
    "groups that do not divide": (lambda x: column_sum(x, 3), ValueError, "groups is 3, which does not divide the 4"),
    "no width": (lambda x: column_sum(x[:, :0]), ValueError, "must not be empty"),
    "a scalar": (lambda x: column_sum(x[0, 0]), ValueError, "x has no dimension"),
}


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    call_it, error, message = BAD[case]
    with pk.backend(backend), pytest.raises(error, match=message) as caught:
        call_it(torch.ones(4, 8))
    assert "column_sum" in str(caught.value)
