"""bias_act_coded: its h is bias_act's, its code is within half a step of act', its gradients follow from the code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from petune_kernels import reference
from petune_kernels.backends import pick
from petune_kernels.reference import SLOPE_CODES
from petune_kernels.schema import ACTIVATIONS

from .table import DTYPES, SHAPES, UNIT, run_under_isa
from .test_bias_act import exact_and_slope

CURVED = tuple(act for act in ACTIVATIONS if act != "relu")
BACKENDS = ("reference", "compiled")


def op(name: str, backend: str, like: Tensor):
    """The op as ops/ calls it: torch.ops.petune, or the reference itself."""
    return getattr(reference, name) if backend == "reference" else pick(name, like)


def make(T: int, N: int, dtype: torch.dtype, G: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """u, bias [N] or [G, N], dh."""
    bias = torch.randn((N,) if G == 1 else (G, N))
    return (2 * torch.randn(T, N)).to(dtype), bias.to(dtype), torch.randn(T, N).to(dtype)


def rows(bias: Tensor | None, T: int) -> Tensor | float:
    """The bias of every row, in float64."""
    if bias is None:
        return 0.0
    return bias.double() if bias.dim() == 1 else bias.double().repeat_interleave(T // len(bias), 0)


@pytest.mark.parametrize("act", CURVED)
def test_the_range_is_that_of_the_slope(act: str) -> None:
    """lo and hi are the least and greatest act' that a fine grid finds; act' is still where lo is taken."""
    lo, step = SLOPE_CODES[ACTIVATIONS.index(act)]
    v = torch.linspace(-8, 8, 4_000_001, dtype=torch.float64)
    _, slope = exact_and_slope(v, act)
    # the grid is 4e-6 wide and misses the flat extremum by at most act''' * (2e-6)^2 / 2
    assert lo == pytest.approx(slope.min().item(), abs=1e-11) and lo <= slope.min() + 1e-15
    assert lo + 255 * step == pytest.approx(slope.max().item(), abs=1e-11)
    place = {"gelu": -math.sqrt(2), "gelu_tanh": -1.4185040087908284, "silu": -2.3993572805154677}[act]
    assert exact_and_slope(torch.tensor([place], dtype=torch.float64), act)[1].item() == pytest.approx(lo, abs=1e-15)
    if act == "gelu":
        assert lo == pytest.approx(math.erfc(1) / 2 - 1 / (math.e * math.sqrt(math.pi)), abs=1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("G", (1, 3))
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,N", SHAPES)
def test_against_float64(T: int, N: int, dtype: torch.dtype, act: str, G: int, backend: str) -> None:
    """h bit for bit, the code's slope within half a step, du and dbias within that of the exact gradients."""
    T, index = T + -T % G, ACTIVATIONS.index(act)
    u, bias, dh = make(T, N, dtype, G)
    h, code = op("bias_act_coded", backend, u)(u, bias, index)
    assert torch.equal(h, op("bias_act", backend, u)(u, bias, None, index))
    assert (code.dtype, code.shape) == (torch.uint8, u.shape)
    _, slope = exact_and_slope(u.double() + rows(bias, T), act)
    lo, step = SLOPE_CODES[index]
    decoded = lo + step * code.double()
    half = 0.0 if act == "relu" else step / 2
    if act == "relu":
        assert torch.equal(decoded, slope)
    # v = u + bias and act' are computed in fp32 (1e-6 at most, |act''| < 1.1), for 16 bits on the CPU to 2^-15
    off = 2e-6 if dtype == torch.float32 else 2.0**-15
    assert not T or (decoded - slope).abs().max() <= half + off

    du, dbias = op("bias_act_coded_backward", backend, dh)(dh, code, bias, index, True, True)
    assert (du.dtype, dbias.dtype, dbias.shape) == (dtype, bias.dtype, bias.shape)
    exact = dh.double() * decoded
    # one rounding to the dtype, and of the slope in fp32
    assert ((du.double() - exact).abs() <= UNIT[dtype] * exact.abs() + 2.0**-22 * dh.double().abs()).all()
    assert ((du.double() - dh.double() * slope).abs() <= (half + 4e-6 + 2 * UNIT[dtype]) * dh.double().abs()).all()
    # summed from du before its rounding: the sum is rounded once, and T slopes and steps in fp32
    total, size = (t.reshape(G, -1, N).sum(1).reshape(bias.shape) for t in (exact, dh.double().abs()))
    assert ((dbias.double() - total).abs() <= UNIT[dtype] * total.abs() + (T + 4) * 2.0**-24 * size).all()


@pytest.mark.parametrize("bias_dtype", (None, torch.float32), ids=str)
@pytest.mark.parametrize("act", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_against_reference(dtype: torch.dtype, act: int, bias_dtype: torch.dtype | None) -> None:
    """The same code but for ties, where rounding errors may decide for the neighbour."""
    u, dh = 3 * torch.randn(130, 769), torch.randn(130, 769).to(dtype)
    bias, u = None if bias_dtype is None else torch.randn(769), u.to(dtype)
    _, code = op("bias_act_coded", "compiled", u)(u, bias, act)
    _, expected = op("bias_act_coded", "reference", u)(u, bias, act)
    apart = (code.int() - expected.int()).abs()
    assert apart.max() <= 1 and (apart != 0).float().mean() < 1e-3
    assert ACTIVATIONS[act] != "relu" or (apart == 0).all()
    wants = (True, bias is not None)
    ours, theirs = (op("bias_act_coded_backward", b, dh)(dh, expected, bias, act, *wants) for b in BACKENDS[::-1])
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol if a.dtype == dtype else 1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_error_is_a_uniform_code_s(backend: str) -> None:
    """step / sqrt 12 = 0.0014, the size of bf16's own rounding of a slope near 1 (0.0013), and no bias to speak of."""
    v = torch.linspace(-6, 6, 400_000).reshape(-1, 100)
    for act in CURVED:
        lo, step = SLOPE_CODES[ACTIVATIONS.index(act)]
        _, code = op("bias_act_coded", backend, v)(v, None, ACTIVATIONS.index(act))
        _, slope = exact_and_slope(v.double(), act)
        inner = v.abs() < 3  # outside, act' is flat and its error with it
        error = (lo + step * code.double() - slope)[inner]
        assert 0.9 < error.square().mean().sqrt() / (step / math.sqrt(12)) < 1.1
        assert error.mean().abs() < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, act: int, backend: str) -> None:
    """Both ends of the range, far tails, zeros; a slope that is NaN has code 0."""
    ends = [-math.sqrt(2), math.sqrt(2), -1.4185, 1.4185, -2.39936, 2.39936]
    u = torch.tensor([[*ends, 0.0, -0.0, 90.0, -90.0, 1e15, -1e15, 1e-40]], dtype=dtype)
    _, code = op("bias_act_coded", backend, u)(u, None, act)
    lo, step = SLOPE_CODES[act]
    _, slope = exact_and_slope(u.double().clamp(-50, 50), ACTIVATIONS[act])
    assert (lo + step * code.double() - slope).abs().max() <= step / 2 * (ACTIVATIONS[act] != "relu") + 1e-6
    h, code = op("bias_act_coded", backend, u)(torch.full_like(u, math.nan), None, act)
    # relu's slope is 0 or 1 even there
    assert h.isnan().all() and code.max() <= (ACTIVATIONS[act] == "relu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_subset_of_gradients(backend: str) -> None:
    u, bias, dh = make(66, 37, torch.bfloat16, G=3)
    code = op("bias_act_coded", backend, u)(u, bias, 0)[1]
    backward = op("bias_act_coded_backward", backend, dh)
    full = backward(dh, code, bias, 0, True, True)
    for want in itertools.product((False, True), repeat=2):
        for given, wanted, all_of_it in zip(backward(dh, code, bias, 0, *want), want, full, strict=True):
            assert torch.equal(given, all_of_it) if wanted else given.shape == (0,)
    assert torch.equal(backward(dh, code, None, 0, True, False)[0], full[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_whatever_the_threads(dtype: torch.dtype) -> None:
    u, bias, dh = make(1002, 96, dtype, G=3)
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            h, code = op("bias_act_coded", "compiled", u)(u, bias, 0)
            runs.append((h, code, *op("bias_act_coded_backward", "compiled", dh)(dh, code, bias, 0, True, True)))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    u, bias, dh = make(6, 16, dtype, G=3)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for b in (bias, None):
        torch.library.opcheck(torch.ops.petune.bias_act_coded, (u, b, 0), test_utils=checks)
        code = torch.ops.petune.bias_act_coded(u, b, 0)[1]
        for want_du in (True, False):
            args = (dh, code, b, 0, want_du, b is not None)
            torch.library.opcheck(torch.ops.petune.bias_act_coded_backward, args, test_utils=checks)


def test_what_would_read_out_of_bounds_is_refused() -> None:
    u, bias, dh = make(6, 16, torch.float32)
    backward = torch.ops.petune.bias_act_coded_backward
    code = torch.zeros(6, 16, dtype=torch.uint8)
    for bad in (code[:3], code.int(), code.repeat(1, 2)[:, :16]):
        with pytest.raises(RuntimeError, match="uint8 of dh's shape|contiguous"):
            backward(dh, bad, bias, 0, True, True)
    with pytest.raises(RuntimeError, match="a parameter that is not there"):
        backward(dh, code, None, 0, True, True)
    with pytest.raises(RuntimeError, match="a parameter's last dimension"):
        torch.ops.petune.bias_act_coded(u, bias[:8].contiguous(), 0)


@pytest.mark.parametrize("isa", ("baseline", "avx2"))  # the best one is what every other test runs on
def test_every_instruction_set(isa: str) -> None:
    code = """if True:
        import torch
        from petune_kernels import reference
        from petune_kernels.backends import pick
        torch.manual_seed(0)
        for dtype, tol in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
            for N in (64, 50, 7, 3):
                u, dh, b = 2 * torch.randn(9, N).to(dtype), torch.randn(9, N).to(dtype), torch.randn(N).to(dtype)
                for act in range(4):
                    h, code = pick("bias_act_coded", u)(u, b, act)
                    assert torch.equal(h, pick("bias_act", u)(u, b, None, act))
                    expected = reference.bias_act_coded(u, b, act)[1]
                    assert (code.int() - expected.int()).abs().max() <= 1
                    args = (dh, code, b, act, True, True)
                    ours = pick("bias_act_coded_backward", dh)(*args)
                    for a, c in zip(ours, reference.bias_act_coded_backward(*args), strict=True):
                        torch.testing.assert_close(a, c, rtol=tol, atol=10 * tol)
    """
    run_under_isa(code, isa)
