"""frozen_linear against float64, its memory, and bad input."""

from __future__ import annotations

import pytest
import torch

from petune_kernels import matmul
from petune_kernels.ops.frozen_linear import frozen_linear
from petune_kernels.ops.lora_linear import lora_linear


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize(
    "dtype, bias_dtype",
    [
        *((d, b) for d in (torch.float32, torch.bfloat16, torch.float64) for b in (None, d)),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("T, K, N", [(3, 5, 1), (66, 40, 24), (72, 384, 320)])
def test_against_float64(T, K, N, dtype, bias_dtype, G):
    x = torch.randn(T, K).to(dtype).requires_grad_(True)
    w = torch.randn(N, K).to(dtype).requires_grad_(True)
    b = None
    if bias_dtype is not None:
        b = torch.randn(*(() if G == 1 else (G,)), N).to(bias_dtype)
        b.requires_grad_(True)
    y, dy = frozen_linear(x, w, b), torch.randn(T, N).to(dtype)
    y.backward(dy)
    x64, w64, dy64 = x.detach().double(), w.detach().double(), dy.double()
    want = x64 @ w64.T
    if b is not None:
        want = want + b.detach().double().reshape(-1, N).repeat_interleave(T // b.reshape(-1, N).shape[0], 0)
    close = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(y.double(), want, **close)
    torch.testing.assert_close(x.grad.double(), dy64 @ w64, **close)
    torch.testing.assert_close(w.grad.double(), dy64.T @ x64, **close)
    if b is not None:
        assert b.grad.dtype == b.dtype
        sums = dy64.reshape(b.reshape(-1, N).shape[0], -1, N).sum(1).reshape(b.shape)
        torch.testing.assert_close(b.grad.double(), sums, rtol=1e-2 if b.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_bias_gradient_is_accumulated_in_float32():
    """Sixty-four thousand times 0.01 in bfloat16: a running bfloat16 sum would stop at about 4."""
    b = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    y = frozen_linear(torch.zeros(65536, 2, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.bfloat16), b)
    y.backward(torch.full_like(y, 0.01))
    torch.testing.assert_close(b.grad.float(), torch.full((3,), 65536 * 0.01), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_products_are_onednns(dtype):
    """Three projections that share x, each way; every product is the one call, and dx is their sum."""
    T, K, N = 144, 384, 256
    x = torch.randn(T, K, dtype=dtype, requires_grad=True)
    w, b = ([torch.randn(*shape, dtype=dtype) for _ in range(3)] for shape in ((N, K), (N,)))
    dy = [torch.randn(T, N, dtype=dtype) for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        y = lora_linear(x, w, b)
        torch.autograd.backward(y, dy)
    calls = {event.key: event.count for event in seen.key_averages()}
    expected = 6 if dtype == torch.float32 else 4  # bf16 adds up dx by addmm, which rounds the sum once
    if matmul.onednn_pays(x, N):
        assert calls.get("mkldnn::_linear_pointwise") == expected
    close = {"rtol": 2e-2, "atol": 1.0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-4}
    for one, m, c in zip(y, w, b, strict=True):
        torch.testing.assert_close(one.double(), x.detach().double() @ m.double().T + c.double(), **close)
    want = sum(d.double() @ m.double() for d, m in zip(dy, w, strict=True))
    torch.testing.assert_close(x.grad.double(), want, **close)


def test_onednn_is_not_called_where_torch_may_not():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not matmul.onednn_pays(torch.empty(64, 512), 512)


def test_one_projection_is_not_split_off():
    """The backward of a split copies the gradient, also where there is nothing to put together."""
    y = frozen_linear(torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4))
    node, names = y.grad_fn, []
    while node is not None:
        names.append(type(node).__name__)
        node = next((before for before, _ in node.next_functions if before is not None), None)
    assert "PackedLinearBackward" in names and not any("Split" in name for name in names)


def test_saves_nothing_but_parameters():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    b, kept = torch.zeros(5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        frozen_linear(x, w, b)
    assert set(kept) == {w.data_ptr(), b.data_ptr()}


def test_fullgraph_compile():
    x, w, b = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8), torch.zeros(5, requires_grad=True)
    results = []
    for f in (frozen_linear, torch.compile(frozen_linear, fullgraph=True, backend="aot_eager")):
        y = f(x, w, b)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, b])])
    torch.testing.assert_close(*results)


def test_gradcheck():
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (2, 5))]
    assert torch.autograd.gradcheck(frozen_linear, tensors)


def test_bad_input():
    x, w = torch.zeros(4, 8), torch.zeros(5, 8)
    for args, kind, message in (
        ((x, torch.zeros(5, 7)), ValueError, r"frozen_linear: w\[0\] has shape \(5, 7\)"),
        ((x, w.half()), TypeError, r"frozen_linear: w\[0\] is torch.float16, x is torch.float32"),
        ((x, w, torch.zeros(3, 5)), ValueError, "3 replicas, which does not divide"),
        ((x, w, torch.zeros(5).half()), TypeError, r"bias\[0\] is torch.float16"),
        ((x, None), TypeError, r"w\[0\] is NoneType"),
    ):
        with pytest.raises(kind, match=message):
            frozen_linear(*args)
