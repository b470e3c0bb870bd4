"""bias_act: against float64 over its whole range, every subset of gradients, deterministic, loud on bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import petune_kernels as pk
from petune_kernels.ops.bias_act import bias_act
from petune_kernels.schema import ACTIVATIONS

from .table import DTYPES, SHAPES, forward_floor, no_worse_than_eager, row_sum_floor, run_under_isa

NAMES = ("u", "bias", "gate")
EAGER = {"gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def make(T: int, N: int, dtype: torch.dtype, G: int = 1) -> dict[str, Tensor]:
    every = {"u": 2 * torch.randn(T, N), "bias": torch.randn((N,) if G == 1 else (G, N)), "gate": torch.randn(T, N)}
    return {name: t.to(dtype).requires_grad_() for name, t in every.items()}


def eager(t: dict[str, Tensor | None], act: str) -> Tensor:
    """The expression a model has, each step rounded to the dtype."""
    v, bias, gate = (t[n] for n in NAMES)
    if bias is not None:
        v = v + (bias.repeat_interleave(len(v) // len(bias), 0) if bias.dim() == 2 else bias)
    h = EAGER[act](v)
    return h if gate is None else h * gate


@pytest.mark.parametrize("G,gated", ((1, False), (3, True)), ids=("plain", "gated-G3"))
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,N", SHAPES)
def test_error_no_worse_than_eager(T: int, N: int, dtype: torch.dtype, G: int, act: str, gated: bool) -> None:
    T += -T % G
    t: dict[str, Tensor | None] = dict(make(T, N, dtype, G))
    if not gated:
        t["gate"] = None
    there = [n for n in NAMES if t[n] is not None]
    leaves = {n: None if v is None else v.detach().double().requires_grad_() for n, v in t.items()}
    dh = torch.randn(T, N, dtype=dtype)
    ours, plain, exact = bias_act(t["u"], t["bias"], act, t["gate"]), eager(t, act), eager(leaves, act)
    no_worse_than_eager("h", ours, plain, exact, forward_floor(dtype))
    every = [
        torch.autograd.grad(h, [x[n] for n in there], dh.to(h.dtype))
        for h, x in ((ours, t), (plain, t), (exact, leaves))
    ]
    for name, *values in zip(there, *every, strict=True):
        floor = row_sum_floor(dtype, T) if name == "bias" else forward_floor(dtype)
        no_worse_than_eager(f"d{name}", *values, floor)


def exact_and_slope(v: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """act and act' in float64 by formulas that do not cancel in the tails."""
    if act == "gelu":
        cdf = 0.5 * torch.special.erfc(-v * 0.5**0.5)
        return v * cdf, cdf + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    if act == "relu":
        return v.clamp_min(0), (v > 0).double()
    w, dw = v, torch.ones_like(v)
    if act == "gelu_tanh":
        k = 2 * math.sqrt(2 / math.pi)
        w, dw = k * (v + 0.044715 * v**3), k * (1 + 3 * 0.044715 * v * v)
    s = torch.sigmoid(w)
    return v * s, s + v * s * torch.sigmoid(-w) * dw


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_accurate_to_a_few_ulp_over_the_whole_range(act: str) -> None:
    """The lower tail too, where 1 + erf cancels: its relative error stays at rounding level to exp's underflow."""
    lowest = {"gelu": -12.9, "gelu_tanh": -5.4, "silu": -80.0, "relu": -1e30}[act]
    tiny = torch.logspace(-44, 0, 3001)
    u = torch.cat([torch.linspace(lowest, 20, 200_001), tiny, -tiny, torch.logspace(0, 37, 1001)])
    u = u.reshape(-1, 14)[:, :7] if u.numel() % 14 == 0 else u[: u.numel() // 7 * 7].reshape(-1, 7)
    exact, slope = exact_and_slope(u.double(), act)
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-126))) - 23)
    ulps = (bias_act(u, act=act).double() - exact).abs() / spacing
    # the relative error of sigma(2w) is the absolute one of 2w: |2w| reaches 20 for gelu_tanh, with three roundings
    assert ulps.max() < {"gelu": 5, "gelu_tanh": 64, "silu": 5, "relu": 0.1}[act]
    assert ulps.square().mean().sqrt() < {"gelu": 1, "gelu_tanh": 4, "silu": 1, "relu": 0.1}[act]
    (du,) = torch.autograd.grad(bias_act(u.requires_grad_(), act=act).sum(), u)
    near = u.abs() < 1e15  # beyond, float64's own v^2 * 0 decides
    assert (du.double() - slope)[near].abs().max() < 4e-7


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_16_bit_value(act: str) -> None:
    """All 65,536 of bfloat16: what is computed for 16 bits adds a thirty-second of their rounding."""
    u = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).reshape(-1, 64).requires_grad_()
    h = bias_act(u, act=act)
    (du,) = torch.autograd.grad(h, u, torch.ones_like(h))
    exact, slope = exact_and_slope(u.detach().double(), act)
    at_minus_infinity = (u.detach() == -math.inf) & (act != "relu")  # -inf * 0, as in torch
    assert torch.equal(h.isnan(), exact.isnan() | at_minus_infinity)
    finite = u.detach().abs() < 1e15  # beyond, float64's own v^2 * 0 decides
    half_unit, beside = 2.0**-8, 2.0**-13
    off = (h.double() - exact).abs() - (half_unit + beside) * exact.abs()
    assert off[finite].max() < beside * 2.0**-10
    assert ((du.double() - slope).abs() - half_unit * slope.abs())[finite].max() < beside


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_follow_torch(act: str, dtype: torch.dtype) -> None:
    """inf, NaN, zeros, subnormals, the largest numbers: as torch's scalar code gives them (its vector code differs)."""
    values = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38]
    u = torch.tensor(values, dtype=dtype)
    scalar = torch.stack([EAGER[act](v) for v in u.double()]).to(dtype)
    ours = bias_act(u[None], act=act)[0]
    rtol = 4 * 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours, scalar, rtol=rtol, atol=2e-45, equal_nan=True)


@pytest.mark.parametrize("N", (96, 50))
@pytest.mark.parametrize("act", ("gelu", "silu"))
def test_every_subset_of_inputs_and_gradients(N: int, act: str) -> None:
    everything, dh = make(33, N, torch.float32), torch.randn(33, N)
    for present in itertools.product((False, True), repeat=2):
        names = [n for n, there in zip(NAMES, (True, *present), strict=True) if there]
        full = {n: everything[n] if n in names else None for n in NAMES}
        with pk.backend("reference"):
            h = bias_act(full["u"], full["bias"], act, full["gate"])
            expected = dict(zip(names, torch.autograd.grad(h, [everything[n] for n in names], dh), strict=True))
        for want in itertools.product((False, True), repeat=len(names)):
            wanted = dict(zip(names, want, strict=True))
            t = {n: everything[n].detach().requires_grad_(wanted[n]) if n in names else None for n in NAMES}
            out = bias_act(t["u"], t["bias"], act, t["gate"])
            torch.testing.assert_close(out, h, rtol=1e-5, atol=1e-5)  # torch's own gelu cancels in its tail
            assert out.requires_grad == any(want)
            if any(want):
                out.backward(dh)
            for n in names:
                if wanted[n]:
                    torch.testing.assert_close(t[n].grad, expected[n], rtol=1e-4, atol=1e-5)
                else:
                    assert t[n].grad is None


def test_saves_its_inputs_only() -> None:
    saved: list[Tensor] = []
    t = make(32, 64, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        bias_act(t["u"], t["bias"], "gelu", t["gate"])
    assert {s.data_ptr() for s in saved} == {v.data_ptr() for v in t.values()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_whatever_the_threads(dtype: torch.dtype) -> None:
    t, dh = make(1000, 96, dtype), torch.randn(1000, 96, dtype=dtype)
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            h = bias_act(t["u"], t["bias"], "gelu", t["gate"])
            runs.append((h, *torch.autograd.grad(h, [t[n] for n in NAMES], dh)))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_strided_input_many_dimensions_and_mixed_dtypes() -> None:
    t = make(12, 64, torch.float32)
    u, gate = (t[n].detach().reshape(3, 4, 64) for n in ("u", "gate"))
    dense = bias_act(u, t["bias"], "silu", gate)
    assert dense.shape == (3, 4, 64)
    strided = bias_act(
        u.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([t["bias"]] * 2, 1)[:, 0], "silu", gate
    )
    assert torch.equal(dense, strided)
    row = t["u"].detach()[:1]
    assert torch.equal(bias_act(row.expand(5, 64), t["bias"]), bias_act(row.repeat(5, 1), t["bias"]))
    narrow = u.bfloat16().requires_grad_()
    h = bias_act(narrow, t["bias"])
    db, du = torch.autograd.grad(h.sum(), (t["bias"], narrow))
    assert (h.dtype, db.dtype, du.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert bias_act(narrow, None, "silu", gate).dtype == torch.float32


def test_gradcheck_of_the_reference() -> None:
    t = {n: v.detach().double().requires_grad_() for n, v in make(6, 5, torch.float32, G=3).items()}
    with pk.backend("reference"):
        for act in ACTIVATIONS:
            assert torch.autograd.gradcheck(lambda u, b, g, act=act: bias_act(u, b, act, g), tuple(t.values()))


def test_double_backward_is_refused() -> None:
    t = make(4, 8, torch.float32)
    with pytest.raises(RuntimeError, match="create_graph=True, and this op has no second derivative"):
        torch.autograd.grad(bias_act(t["u"]).square().sum(), t["u"], create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    u, bias, gate = (v.detach() for v in make(6, 16, dtype).values())
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for b, g in itertools.product((bias, None), (gate, None)):
        torch.library.opcheck(torch.ops.petune.bias_act, (u, b, g, 0), test_utils=checks)
        wants = (True, b is not None, g is not None)
        torch.library.opcheck(torch.ops.petune.bias_act_backward, (u, u, b, g, 0, *wants), test_utils=checks)
    torch.library.opcheck(
        torch.ops.petune.bias_act_backward, (u, u, bias, gate, 0, False, False, False), test_utils=checks
    )


def test_compiles_in_one_graph() -> None:
    t = make(6, 32, torch.float32)

    def f(u: Tensor, gate: Tensor) -> Tensor:
        return bias_act(u, t["bias"], "gelu_tanh", gate).square().sum()

    own = torch.autograd.grad(f(t["u"], t["gate"]), list(t.values()))
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    traced = torch.autograd.grad(compiled(t["u"], t["gate"]), list(t.values()))
    for a, b in zip(own, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("isa", ("baseline", "avx2"))  # the best one is what every other test runs on
def test_every_instruction_set(isa: str) -> None:
    code = """if True:
        import torch, petune_kernels as pk
        from petune_kernels.ops.bias_act import bias_act
        from petune_kernels.schema import ACTIVATIONS
        torch.manual_seed(0)
        for dtype, tol in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
            for N in (64, 50, 7):
                u, g = (torch.randn(9, N, dtype=dtype, requires_grad=True) for _ in range(2))
                b = torch.randn(N, dtype=dtype, requires_grad=True)
                for act in ACTIVATIONS:
                    out = {}
                    for name in ("reference", "cpu"):
                        with pk.backend(name):
                            h = bias_act(u, b, act, g)
                            out[name] = (h, *torch.autograd.grad(h.float().square().sum(), (u, b, g)))
                    for a, c in zip(out["reference"], out["cpu"]):
                        torch.testing.assert_close(a, c, rtol=tol, atol=10 * tol)
    """
    run_under_isa(code, isa)


BAD = {
    "an integer tensor": (lambda u: bias_act(u.long()), TypeError, "u is torch.int64"),
    "a list": (lambda u: bias_act([1.0]), TypeError, "u is list"),
    "an unknown act": (
        lambda u: bias_act(u, act="elu"),
        ValueError,
        "act is 'elu'; accepted are gelu, gelu_tanh",
    ),
    "bias of another width": (lambda u: bias_act(u, torch.ones(9)), ValueError, r"bias has shape \(9,\)"),
    "an integer bias": (lambda u: bias_act(u, torch.ones(8).int()), TypeError, "bias is torch.int32"),
    "replicas": (lambda u: bias_act(u, torch.ones(3, 8)), ValueError, "3 replicas, which does not divide the 4"),
    "another gate": (lambda u: bias_act(u, gate=torch.ones(2, 8)), ValueError, r"gate has shape \(2, 8\)"),
    "two devices": (lambda u: bias_act(u, torch.ones(8, device="meta")), ValueError, "bias is on meta"),
    "no width": (lambda u: bias_act(u[:, :0]), ValueError, "must not be empty"),
    "a scalar": (lambda u: bias_act(u[0, 0]), ValueError, "u has no dimension"),
}


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    call_it, error, message = BAD[case]
    with pk.backend(backend), pytest.raises(error, match=message) as caught:
        call_it(torch.ones(4, 8))
    assert "bias_act" in str(caught.value)
