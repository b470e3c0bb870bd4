"""Arguments in any layout and dtype that PyTorch reads, and modes of autograd: right, or refused by name."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import petune_kernels as pk
from petune_kernels import reference
from petune_kernels.ops.attention import attention
from petune_kernels.ops.bias_act import bias_act
from petune_kernels.ops.column_sum import column_sum
from petune_kernels.ops.dropout import dropout
from petune_kernels.ops.frozen_linear import frozen_linear
from petune_kernels.ops.lora_linear import lora_linear
from petune_kernels.ops.replica_linear import replica_linear
from petune_kernels.ops.residual_norm import residual_norm

BIASES: dict[str, Callable[[], Tensor]] = {
    "every other": lambda: torch.randn(512)[::2],
    "a column": lambda: torch.randn(256, 3)[:, 1],
    "expanded": lambda: torch.randn(1).expand(256),
}
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.randn(256, 256),
    "transposed": lambda: torch.randn(256, 256).T,
    "a window": lambda: torch.randn(256, 300)[:, 20:276],
    "overlapping": lambda: torch.randn(600).as_strided((256, 256), (1, 1)),
    "expanded": lambda: torch.randn(256).expand(256, 256),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("bias", BIASES)
def test_large_products_read_strides(bias: str, weight: str, dtype: torch.dtype) -> None:
    """From 2^23 multiplications on oneDNN is called by itself, which takes its arguments for dense."""
    x, b = torch.randn(512, 256, dtype=dtype), BIASES[bias]().to(dtype)
    made = WEIGHTS[weight]()
    w = made.to(dtype) if dtype == made.dtype else made.to(dtype).as_strided(made.shape, made.contiguous().stride())
    x.requires_grad_()
    exact = F.linear(x.double(), w.double(), b.double())
    (dx,) = torch.autograd.grad(exact.sum(), x)
    for y in (frozen_linear(x, w, b), lora_linear(x, w, b)):
        assert (y.double() - exact).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()
        (ours,) = torch.autograd.grad(y.sum(), x)
        assert (ours - dx).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * dx.norm()


def test_a_patched_model_with_a_strided_bias() -> None:
    model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 512)).requires_grad_(False)
    model[1].bias = nn.Parameter(torch.randn(512, 2)[:, 0], requires_grad=False)
    x = torch.randn(512, 256)
    own = model(x)
    pk.patch(model)
    torch.testing.assert_close(model(x), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", (
    lambda x: residual_norm(x), lambda x: bias_act(x), lambda x: dropout(x, 0.5), lambda x: column_sum(x),
    lambda x: attention(*(x[None, None],) * 3), lambda x: lora_linear(x, torch.ones(4, 8)),
))  # fmt: skip
@pytest.mark.parametrize("recording", (False, True))
def test_forward_mode_is_refused(op: Callable[[Tensor], Tensor], recording: bool) -> None:
    x = torch.randn(3, 8)
    with torch.set_grad_enabled(recording), pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(op, (x,), (torch.ones_like(x),))
    with torch.set_grad_enabled(recording), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            op(dual)


def test_a_second_derivative_of_a_sum_of_outputs_is_refused() -> None:
    """dy needs no gradient there, and torch's own guard lets it through, wrong."""
    x = torch.randn(4, 8, requires_grad=True)
    y = residual_norm(torch.tanh(x))
    with pytest.raises(RuntimeError, match="ResidualNorm: backward with create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))
    pk.patch(model)
    with pytest.raises(RuntimeError, match=r"pk\.unpatch\(model\) gives stock's"):
        model(x).sum().backward(create_graph=True)
    pk.unpatch(model)
    model(x).sum().backward(create_graph=True)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("given", FLOATS, ids=str)
def test_masks_in_any_dtype(dtype: torch.dtype, given: torch.dtype) -> None:
    """A row of the mask's own minimum sees every column alike (float16's is not far enough away for that), one of -inf
    none."""
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=dtype) for _ in range(3))
    mask = torch.zeros(3, 3, dtype=given)
    mask[0], mask[1], mask[2, :2] = torch.finfo(given).min, -torch.inf, -torch.inf
    o = attention(q, k, v, mask)[0, 0]
    tolerance = 8 * torch.finfo(dtype).eps
    if torch.float16 not in (given, dtype):
        torch.testing.assert_close(o[0], v[0, 0].mean(0), rtol=tolerance, atol=tolerance)
    assert not o[1].any()
    torch.testing.assert_close(o[2], v[0, 0, 2], rtol=tolerance, atol=tolerance)


def test_a_mask_that_trains_elsewhere_serves_without_gradients() -> None:
    q, mask = torch.randn(1, 1, 3, 4), torch.zeros(3, 3, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, q, q, mask), attention(q, q, q))
    with pytest.raises(ValueError, match="mask requires grad"):
        attention(q, q, q, mask)


def test_results_are_saved_and_loaded() -> None:
    """Weights-only, as torch loads by default."""
    x, file = torch.randn(2, 8, requires_grad=True), io.BytesIO()
    y = residual_norm(x)
    torch.save(y, file)
    file.seek(0)
    again = torch.load(file)
    assert torch.equal(again, y)
    w = torch.randn(4, 8, requires_grad=True)
    assert torch.autograd.grad(lora_linear(again, w).sum(), w)[0].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("masked", (False, True))
def test_one_row_of_grouped_heads(masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a decoder generates: the cache of keys and values is not copied for each head."""
    import importlib

    module = importlib.import_module("petune_kernels.ops.attention")
    q, k, v = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33, 16)
    mask = torch.zeros(2, 1, 1, 33).masked_fill(torch.rand(2, 1, 1, 33) < 0.3, -torch.inf) if masked else None
    wide = (k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))
    exact = reference.attention(
        *(t.double() for t in (q, *wide)),
        None if mask is None else mask.double().expand(2, 8, 1, 33),
        None,
        0.0,
        0.25,
        False,
    )
    with monkeypatch.context() as patch:
        patch.setattr(module, "_per_head", lambda *_: pytest.fail("copied"))
        o = attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, causal=True)
    assert o.transpose(1, 2).is_contiguous()
    size = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(o.double(), exact, rtol=size, atol=size)
    by_head = torch.zeros(8, 1, 33).masked_fill(torch.rand(8, 1, 33) < 0.3, -torch.inf)
    exact = reference.attention(
        *(t.double() for t in (q, *wide)), by_head.double().expand(2, 8, 1, 33), None, 0.0, 0.25, False
    )
    torch.testing.assert_close(attention(q, k, v, by_head).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("S", (1, 3))
@pytest.mark.parametrize("masked", (False, True))
def test_attention_of_no_rows(S: int, masked: bool) -> None:
    q, k, v = (torch.zeros(0, heads, n, 8) for heads, n in ((4, S), (2, 5), (2, 5)))
    assert attention(q, k, v, torch.zeros(1, 1, S, 5).expand(0, 4, S, 5) if masked else None).shape == (0, 4, S, 8)


def test_seeds_in_any_layout() -> None:
    x, seeds = torch.randn(6, 8), torch.tensor([[1, 7], [2, 8], [3, 9]])
    dense = seeds[:, 1].contiguous()
    assert torch.equal(dropout(x, 0.5, seed=seeds[:, 1]), dropout(x, 0.5, seed=dense))
    gamma = torch.ones(3, 8)
    ours, own = (residual_norm(x, gamma, p=0.5, seed=seed) for seed in (seeds[:, 1], dense))
    assert torch.equal(ours, own)
    q = torch.randn(3, 1, 4, 8)
    assert torch.equal(attention(q, q, q, p=0.5, seed=seeds[:, 1]), attention(q, q, q, p=0.5, seed=dense))


@pytest.mark.parametrize("shapes", (((1, 8), (3, 8)), ((3, 8), (1, 8)), ((1, 8), (8,))), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_one_row_of_parameters_is_every_replica_s(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    x = torch.randn(6, 8, dtype=dtype)
    gamma, beta = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    y = residual_norm(x, gamma, beta)
    rows = [t.expand(6, 8) if t.numel() == 8 else t.repeat_interleave(2, 0) for t in (gamma, beta)]
    own = F.layer_norm(x, (8,)) * rows[0] + rows[1]
    torch.testing.assert_close(y, own, rtol=1e-5, atol=1e-5)
    do = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(t, (gamma, beta), do) for t in (y, own)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_parameters_are_widened_where_no_kernel_takes_them_as_they_are() -> None:
    x, gamma, beta = torch.randn(9, 40).bfloat16(), torch.randn(40), torch.randn(40)
    assert torch.equal(
        residual_norm(x, gamma.half(), beta.half()), residual_norm(x, gamma.half().float(), beta.half().float())
    )
    third, wide = gamma.double() / 3, x.double()
    assert torch.equal(residual_norm(wide, third, beta), residual_norm(wide, third, beta.double()))


def test_one_row_of_a_bias_is_every_replica_s() -> None:
    x, w = torch.randn(6, 8), torch.randn(4, 8)
    bias = [torch.randn(G, 4, requires_grad=True) for G in (1, 3)]
    ys = lora_linear(x, [w, w], bias)
    own = [x @ w.T + b.repeat_interleave(6 // len(b), 0) for b in bias]
    for ours, theirs in zip(ys, own, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(*(torch.autograd.grad(sum(map(torch.sum, t)), bias) for t in (ys, own)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("call,message", (
    (lambda: residual_norm(None), "residual_norm: x is NoneType"),
    (lambda: bias_act(None), "bias_act: u is NoneType"),
    (lambda: dropout(None, 0.1), "dropout: x is NoneType"),
    (lambda: column_sum(None), "column_sum: x is NoneType"),
    (lambda: attention(None, None, None), "attention: q is NoneType"),
    (lambda: lora_linear(None, torch.ones(2, 2)), "lora_linear: x is NoneType"),
    (lambda: lora_linear(torch.ones(2, 2), None), "lora_linear: w is NoneType; accepted is a torch.Tensor or a list"),
    (lambda: replica_linear(torch.ones(2, 2), None), "replica_linear: w is NoneType"),
), ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_nothing_in_the_place_of_a_tensor_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
    with pytest.raises(ValueError, match="eps is 'a'"):
        residual_norm(torch.ones(2, 2), eps="a")  # type: ignore[arg-type]


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _attention(x: Tensor, p: float) -> Tensor:
    q = x.view(2, 12, 4, 8).transpose(1, 2)
    return attention(q, q[:, :2], q[:, :2], p=p)


def _lora(x: Tensor, p: float) -> Tensor:
    w, a, b = torch.randn(48, 32), torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    return lora_linear(x, w, None, a, b, scale=2.0, p=p)


def _frozen(x: Tensor, p: float) -> Tensor:
    return frozen_linear(x, torch.randn(48, 32))


@pytest.mark.parametrize("wants_dx", (True, False), ids=("dx", "no dx"))
@pytest.mark.parametrize("p", (0.0, 0.1))
@pytest.mark.parametrize("op", (_lora, _frozen, _attention))
def test_flops_counted_are_the_references(op: Callable[[Tensor, float], Tensor], p: float, wants_dx: bool) -> None:
    def run() -> None:
        y = op(torch.randn(24, 32, requires_grad=wants_dx), p)
        if y.requires_grad:
            y.sum().backward()

    ours = flops(run)
    with pk.backend("reference"):
        assert 0 < ours == flops(run)


def test_flops_of_the_merged_weight() -> None:
    x, w, a, b = (torch.randn(*shape) for shape in ((24, 32), (48, 32), (4, 32), (48, 4)))
    assert flops(lambda: lora_linear(x, w, None, a, b, path="merged")) == 2 * 48 * 32 * (24 + 4)
