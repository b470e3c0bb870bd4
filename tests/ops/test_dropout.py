"""dropout: the reference's mask bit for bit, exact values, the seed as the only thing kept, and loud on bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import petune_kernels as pk
from petune_kernels import reference
from petune_kernels.ops.dropout import dropout
from petune_kernels.ops.lora_linear import lora_linear
from petune_kernels.ops.residual_norm import residual_norm
from petune_kernels.studies.measure import saved_bytes

from .table import DTYPES, run_under_isa

P = 0.25
SIZES = (0, 1, 3, 16, 63, 100, 4096, 4099, 20_001)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("G", (1, 3))
def test_mask_and_values_are_the_reference_s(n: int, dtype: torch.dtype, G: int) -> None:
    seed = torch.randint(-(2**63), 2**63 - 1, (G,))
    x = torch.randn(G, n, dtype=dtype)
    x = torch.where(x == 0, torch.ones_like(x), x).requires_grad_()
    keep = reference.keep_mask(seed, P, n).reshape(G, n)
    y = dropout(x, P, seed=seed)
    assert torch.equal(y != 0, keep)
    exact = torch.where(keep, x.detach().float() * torch.tensor(1 / (1 - P), dtype=torch.float32), 0.0).to(dtype)
    assert torch.equal(y, exact)
    dy = torch.randn(G, n, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, dropout(dy, P, seed=seed)) and torch.equal(dx[~keep], torch.zeros_like(dx[~keep]))


def test_counters_beyond_32_bits_and_every_p() -> None:
    """The op's own counters stop at memory's end, so the first elements stand for all; p reaches both ends."""
    x, seed = torch.ones(4096), torch.tensor([-1])
    for p in (1e-9, 0.1, 0.5, 1 - 2.0**-24):
        y = dropout(x, p, seed=seed)
        keep = reference.keep_mask(seed, p, x.numel())
        assert torch.equal(y, torch.where(keep, torch.tensor(1 / (1 - p), dtype=torch.float32), torch.zeros(())))


def test_dropped_infinities_are_zero() -> None:
    x, seed = torch.full((256,), math.inf), torch.tensor([3])
    y = dropout(x, P, seed=seed)
    assert torch.equal(y, torch.where(reference.keep_mask(seed, P, 256), x, torch.zeros(())))
    assert torch.equal(dropout(x * math.nan, P, seed=seed).isnan(), reference.keep_mask(seed, P, 256))


def test_rate_seeding_and_the_identity() -> None:
    x = torch.ones(512, 768)
    torch.manual_seed(1)
    first, second = dropout(x, 0.1), dropout(x, 0.1)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.1), first) and not torch.equal(first, second)
    assert abs((first == 0).float().mean().item() - 0.1) < 5 * (0.1 * 0.9 / x.numel()) ** 0.5
    assert dropout(x, 0.0) is x and dropout(x, 0.5, training=False) is x


def test_keeps_only_the_seed() -> None:
    saved: list[Tensor] = []
    x = torch.randn(64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        dropout(x, P)
    assert [(s.dtype, s.numel()) for s in saved] == [(torch.int64, 1)]


def test_activation_checkpointing_sees_the_same_mask() -> None:
    x = torch.randn(16, 64, requires_grad=True)
    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(5)
        y = dropout(x, P) if reentrant is None else checkpoint(lambda x: dropout(x, P), x, use_reentrant=reentrant)
        x.grad = None
        y.square().sum().backward()
        results.append((y, x.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strides_do_not_change_the_mask() -> None:
    x, seed = torch.randn(12, 50), torch.tensor([5])
    dense = dropout(x, P, seed=seed)
    assert torch.equal(dropout(x.t().contiguous().t(), P, seed=seed), dense)
    assert torch.equal(dropout(x[:1].expand(12, 50), P, seed=seed), dropout(x[:1].repeat(12, 1), P, seed=seed))
    leaf = x.clone().requires_grad_()
    dy = torch.randn(50, 12).t()
    (dx,) = torch.autograd.grad(dropout(leaf, P, seed=seed), leaf, dy)
    assert torch.equal(dx, dropout(dy.contiguous(), P, seed=seed))


def test_same_result_whatever_the_threads() -> None:
    x, seed, threads = torch.randn(100_003), torch.tensor([5]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = dropout(x, P, seed=seed)
        torch.set_num_threads(2)
        assert torch.equal(dropout(x, P, seed=seed), one)
    finally:
        torch.set_num_threads(threads)


def test_gradcheck_of_the_reference() -> None:
    x, seed = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2, 3])
    with pk.backend("reference"):
        assert torch.autograd.gradcheck(lambda x: dropout(x, P, seed=seed), (x,))


def test_double_backward_is_refused() -> None:
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True, and this op has no second derivative"):
        torch.autograd.grad(dropout(x, P).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    x = torch.randn(6, 16, dtype=dtype)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.petune.dropout, (x, torch.tensor([1, 2]), P), test_utils=checks)

    def f(x: Tensor) -> Tensor:
        return dropout(x, P).square().sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    torch.manual_seed(3)
    own = torch.autograd.grad(f(x), x)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), own)


@pytest.mark.parametrize("isa", ("baseline", "avx2"))  # the best one is what every other test runs on
def test_every_instruction_set(isa: str) -> None:
    code = """if True:
        import torch, petune_kernels as pk
        from petune_kernels.ops.dropout import dropout
        for dtype in (torch.float32, torch.bfloat16):
            for n in (64, 5003):
                x, seed = torch.randn(3, n, dtype=dtype), torch.randint(-2**63, 2**63 - 1, (3,))
                with pk.backend("cpu"):
                    ours = dropout(x, .3, seed=seed)
                with pk.backend("reference"):
                    assert torch.equal(ours, dropout(x, .3, seed=seed))
    """
    run_under_isa(code, isa)


BAD = {
    "an integer tensor": (lambda x: dropout(x.long()), TypeError, "x is torch.int64"),
    "p = 1": (lambda x: dropout(x, 1.0), ValueError, r"p is 1.0; accepted is a probability in \[0, 1\)"),
    "p < 0": (lambda x: dropout(x, -0.1), ValueError, "p is -0.1"),
    "p as text": (lambda x: dropout(x, "0.1"), ValueError, "p is '0.1'"),
    "p = 1 in evaluation": (lambda x: dropout(x, 1.0, training=False), ValueError, "p is 1.0"),
    "a seed of floats": (lambda x: dropout(x, 0.1, seed=torch.ones(1)), TypeError, "seed is"),
    "seeds that do not divide": (lambda x: dropout(x, 0.1, seed=torch.tensor([1, 2, 3])), ValueError, "seed has 3"),
    "a seed elsewhere": (
        lambda x: dropout(x, 0.1, seed=torch.zeros(1, dtype=torch.int64, device="meta")), ValueError, "seed is on meta"
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    call_it, error, message = BAD[case]
    with pk.backend(backend), pytest.raises(error, match=message) as caught:
        call_it(torch.ones(4, 8))
    assert "dropout" in str(caught.value)


def test_what_reads_a_norm_through_dropout_keeps_the_norms_row_alone() -> None:
    T, H = 64, 32
    x, gamma, beta = torch.randn(T, H, requires_grad=True), torch.ones(H, requires_grad=True), torch.zeros(H)
    w, a, b = torch.randn(H, H), torch.randn(4, H, requires_grad=True), torch.randn(H, 4, requires_grad=True)

    def forward() -> Tensor:
        return lora_linear(dropout(residual_norm(x, gamma, beta), 0.1), w, None, a, b)

    kept = saved_bytes(forward, (gamma, beta, w, a, b))
    assert T * H * 4 <= kept <= T * (H + 1) * 4 + 64  # x, rstd, the seed: no second row
