"""residual_norm: against float64, for every subset of gradients, deterministic, compiled, and loud on bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import petune_kernels as pk
from petune_kernels import reference
from petune_kernels.ops import _saving as saving
from petune_kernels.ops.residual_norm import residual_norm

from .table import DTYPES, SHAPES, UNIT, forward_floor, no_worse_than_eager, row_sum_floor, run_under_isa

P, EPS = 0.25, 1e-6
NAMES = ("x", "residual", "bias", "gamma", "beta")


def make(T: int, H: int, dtype: torch.dtype, G: int = 1) -> dict[str, Tensor]:
    small = (H,) if G == 1 else (G, H)
    gamma = 1 + 0.3 * torch.randn(small)
    rows = {name: torch.randn(T, H) for name in ("x", "residual")}
    every = rows | {"bias": 0.5 * torch.randn(small), "gamma": gamma, "beta": torch.randn(small)}
    return {name: t.to(dtype).requires_grad_() for name, t in every.items()}


def eager(t: dict[str, Tensor], keep: Tensor | None, rms: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The expression a model has: linear's bias, dropout, sum, norm, each rounded to dtype."""
    t = {name: v.to(dtype) for name, v in t.items()}
    T, H = t["x"].shape
    wide = {n: v.repeat_interleave(T // len(v), 0) if n in NAMES[2:] and v.dim() == 2 else v for n, v in t.items()}
    x = wide["x"] + wide["bias"]
    if keep is not None:
        x = x * keep.to(dtype) / (1 - P)
    z = x + wide["residual"]
    xhat = F.rms_norm(z, (H,), eps=EPS) if rms else F.layer_norm(z, (H,), eps=EPS)
    return xhat * wide["gamma"] + wide["beta"], z


def grads(out: tuple[Tensor, ...], t: dict[str, Tensor], d: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, [t[n] for n in NAMES], [g.to(o.dtype) for g, o in zip(d, out, strict=True)])


@pytest.mark.parametrize("rms", (False, True), ids=("layernorm", "rmsnorm"))
@pytest.mark.parametrize("dropout", (False, True), ids=("nodrop", "drop"))
@pytest.mark.parametrize("G", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,H", [shape for shape in SHAPES if shape[1] > 1])
def test_error_no_worse_than_eager(T: int, H: int, dtype: torch.dtype, G: int, dropout: bool, rms: bool) -> None:
    if T % G:
        T += G - T % G
    t = make(T, H, dtype, G)
    seed = torch.randint(2**62, (G,)) if dropout else None
    keep = reference.keep_mask(seed, P, T * H // G).reshape(T, H) if dropout else None
    d = (torch.randn(T, H, dtype=dtype), torch.randn(T, H, dtype=dtype))
    ours = residual_norm(
        t["x"], t["gamma"], t["beta"], bias=t["bias"], residual=t["residual"], p=P if dropout else 0.0, eps=EPS,
        rms=rms, return_z=True, seed=seed,
    )  # fmt: skip
    leaves = {n: v.detach().double().requires_grad_() for n, v in t.items()}
    exact, plain = eager(leaves, keep, rms, torch.float64), eager(t, keep, rms, dtype)
    for name, *values in zip(("y", "z"), ours, plain, exact, strict=True):
        no_worse_than_eager(name, *values, forward_floor(dtype))
    every = zip(NAMES, grads(ours, t, d), grads(plain, t, d), grads(exact, leaves, d), strict=True)
    for name, *values in every:
        floor = forward_floor(dtype) if name in ("x", "residual") else row_sum_floor(dtype, T)
        no_worse_than_eager(f"d{name}", *values, floor)


@pytest.mark.parametrize("rms", (False, True))
def test_rows_of_one_element(rms: bool) -> None:
    """H = 1: x-hat is 0 (LayerNorm) or almost +-1 (RMSNorm): dx is a difference of equals; only its size is bound."""
    t = make(5, 1, torch.float32)
    y = residual_norm(t["x"], t["gamma"], t["beta"], residual=t["residual"], rms=rms, eps=EPS)
    assert isinstance(y, Tensor)
    (dx,) = torch.autograd.grad(y.sum(), t["x"])
    z = (t["x"] + t["residual"]).detach()
    exact = EPS / (z.square() + EPS) ** 1.5 * t["gamma"] if rms else torch.zeros(5, 1)
    assert ((dx - exact).abs() <= 4 * UNIT[torch.float32] * t["gamma"].abs() / (z.square() + EPS).sqrt()).all()


@pytest.mark.parametrize("shape", ((33, 96), (33, 50)))
@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=4)))
def test_every_subset_of_inputs_and_gradients(shape: tuple[int, int], present: tuple[bool, ...]) -> None:
    """Each optional input there or not, each gradient wanted or frozen: values never depend on what else is wanted."""
    seed = torch.tensor([7])
    everything = make(*shape, torch.float32)
    there = {"x": True} | dict(zip(NAMES[1:], present, strict=True))
    dy = torch.randn(shape)
    with pk.backend("reference"):
        full = {n: (v if there[n] else None) for n, v in everything.items()}
        y = call(full, seed)
        wanted_all = dict(
            zip((n for n in NAMES if there[n]), torch.autograd.grad(y, [v for v in full.values() if v is not None], dy),
                strict=True)
        )  # fmt: skip
    for want in itertools.product((False, True), repeat=sum(there.values())):
        wanted = dict(zip((n for n in NAMES if there[n]), want, strict=True))
        t = {n: everything[n].detach().requires_grad_(wanted[n]) if there[n] else None for n in NAMES}
        out = call(t, seed)
        torch.testing.assert_close(out, y, rtol=2e-5, atol=2e-5)
        assert out.requires_grad == any(want)
        if any(want):
            out.backward(dy)
        for n in wanted:
            if wanted[n]:
                torch.testing.assert_close(t[n].grad, wanted_all[n], rtol=1e-4, atol=1e-4)
            else:
                assert t[n].grad is None


def call(t: dict[str, Tensor | None], seed: Tensor) -> Tensor:
    return residual_norm(t["x"], t["gamma"], t["beta"], bias=t["bias"], residual=t["residual"], p=P, eps=EPS, seed=seed)


@pytest.mark.parametrize("frozen", (True, False))
@pytest.mark.parametrize("shared", list(itertools.product((False, True), repeat=3))[1:-1], ids=str)
def test_replicas_may_share_some_parameters(shared: tuple[bool, ...], frozen: bool) -> None:
    """[H] beside [G, H] is as if every replica had it; while it trains, its gradient is the sum of theirs."""
    G, T, H = 3, 12, 50
    t, seed, dy = make(T, H, torch.float32, G), torch.tensor([1, 2, 3]), torch.randn(T, H)
    whole = {n: v.detach() for n, v in t.items()}
    for n, one in zip(NAMES[2:], shared, strict=True):
        whole[n] = whole[n][:1].expand(G, H).contiguous() if one else whole[n]
        t[n] = whole[n][0].clone().requires_grad_(not frozen) if one else t[n]
    own = {n: v.requires_grad_(True) for n, v in whole.items()}
    expected = call(own, seed)
    for backend in ("reference", "cpu"):
        with pk.backend(backend):
            y = call(t, seed)
            torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)
            if isinstance(again := saving.known(y), saving.Recipe):
                torch.testing.assert_close(again.again(iter(list(again.leaves()))), y, rtol=2e-5, atol=2e-5)
            trained = [n for n in NAMES if t[n].requires_grad]
            found = torch.autograd.grad(y, [t[n] for n in trained], dy)
            for n, d in zip(trained, found, strict=True):
                (exact,) = torch.autograd.grad(expected, own[n], dy, retain_graph=True)
                torch.testing.assert_close(d, exact.sum(0) if exact.dim() > d.dim() else exact, rtol=1e-4, atol=1e-4)


def test_only_the_stream_z_reaches_the_loss() -> None:
    """Pre-norm models can drop y (the last norm unused): z alone must carry gradients."""
    t = make(4, 16, torch.float32)
    _, z = residual_norm(t["x"], t["gamma"], t["beta"], bias=t["bias"], residual=t["residual"], return_z=True)
    z.sum().backward()
    torch.testing.assert_close(t["residual"].grad, torch.ones(4, 16))
    torch.testing.assert_close(t["bias"].grad, torch.full((16,), 4.0))


@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("row_is_z", (False, True))
@pytest.mark.parametrize("H", (64, 50))
def test_backward_from_either_row(row_is_z: bool, rms: bool, H: int) -> None:
    T = 70
    z, dy, dz = torch.randn(3, T, H)
    gamma, beta = 1 + 0.2 * torch.randn(H), torch.randn(H)
    _, _, xhat, rstd = reference.residual_norm(z, None, None, gamma, beta, None, 0.0, EPS, rms, False, True)
    args = (z if row_is_z else xhat, rstd, None, gamma, beta, torch.tensor([3]), P, rms, row_is_z)
    wants = (True, True, False, True, True)
    for ours, exact in zip(
        torch.ops.petune.residual_norm_backward(dy, dz, *args, *wants),
        reference.residual_norm_backward(dy, dz, *args, *wants),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_saves_one_row_rstd_and_a_seed() -> None:
    """z itself where it exists anyway (so it costs nothing beside x), x-hat otherwise; no mask, no second row."""
    saved: list[Tensor] = []
    T, H = 32, 64
    t = make(T, H, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        residual_norm(t["x"], t["gamma"], t["beta"], bias=t["bias"], residual=t["residual"], p=P)
        inputs = {v.data_ptr() for v in t.values()}
        kept = {s.data_ptr(): s.untyped_storage().nbytes() for s in saved if s.data_ptr() not in inputs}
        assert sorted(kept.values()) == sorted((T * H * 2, T * 4, 8))
        saved.clear()
        residual_norm(t["x"], t["gamma"], t["beta"])
        assert [s.data_ptr() for s in saved if s.shape == (T, H)] == [t["x"].data_ptr()]


def test_mask_is_the_reference_mask_bit_for_bit() -> None:
    for T, H, G in ((5, 64, 1), (7, 50, 1), (6, 33, 3), (3, 1000, 1), (2, 3, 2)):
        seed = torch.randint(-(2**63), 2**63 - 1, (G,))
        for dtype in DTYPES:
            _, z = residual_norm(torch.ones(T, H, dtype=dtype), p=P, seed=seed, return_z=True)
            assert torch.equal(z != 0, reference.keep_mask(seed, P, T * H // G).reshape(T, H))


def test_dropout_rate_and_seeding() -> None:
    x = torch.ones(512, 768)
    torch.manual_seed(1)
    _, first = residual_norm(x, p=0.1, return_z=True)
    _, second = residual_norm(x, p=0.1, return_z=True)
    torch.manual_seed(1)
    _, again = residual_norm(x, p=0.1, return_z=True)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert abs((first == 0).float().mean().item() - 0.1) < 5 * (0.1 * 0.9 / x.numel()) ** 0.5


def test_activation_checkpointing_sees_the_same_mask() -> None:
    t = make(16, 64, torch.float32)

    def block(x: Tensor) -> Tensor:
        y = residual_norm(x, t["gamma"], t["beta"], bias=t["bias"], residual=t["residual"], p=P)
        assert isinstance(y, Tensor)
        return y

    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(5)
        t["x"].grad = None
        y = block(t["x"]) if reentrant is None else checkpoint(block, t["x"], use_reentrant=reentrant)
        y.square().sum().backward()
        results.append((y, t["x"].grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_whatever_the_threads(dtype: torch.dtype) -> None:
    t = make(1000, 96, dtype)
    dy, seed = torch.randn(1000, 96, dtype=dtype), torch.tensor([11])
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            y = call(t, seed)
            runs.append((y, *grads((y,), t, (dy,))))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_non_contiguous_and_many_dimensions() -> None:
    t = make(12, 64, torch.float32)
    dense = residual_norm(t["x"].reshape(3, 4, 64), t["gamma"], t["beta"], residual=t["residual"].reshape(3, 4, 64))
    strided = residual_norm(
        t["x"].reshape(3, 4, 64).transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([t["gamma"], t["beta"]], 1)[:, 0],
        t["beta"],
        residual=t["residual"].reshape(3, 4, 64),
    )
    assert isinstance(dense, Tensor) and dense.shape == (3, 4, 64) and torch.equal(dense, strided)
    torch.testing.assert_close(
        torch.autograd.grad(strided.sum(), t["x"])[0], torch.autograd.grad(dense.sum(), t["x"])[0]
    )


def test_mixed_dtypes_follow_torch() -> None:
    """bf16 activations with fp32 parameters; bf16 x on an fp32 residual is promoted as torch.add promotes."""
    t = make(8, 64, torch.float32)
    x = t["x"].detach().bfloat16().requires_grad_()
    y = residual_norm(x, t["gamma"], t["beta"])
    assert isinstance(y, Tensor) and y.dtype == torch.bfloat16
    dgamma, dx = torch.autograd.grad(y.sum(), (t["gamma"], x))
    assert dgamma.dtype == torch.float32 and dx.dtype == torch.bfloat16
    wide = residual_norm(x, t["gamma"], t["beta"], residual=t["residual"])
    assert isinstance(wide, Tensor) and wide.dtype == torch.float32
    mixed = residual_norm(x, t["gamma"].detach().bfloat16(), t["beta"])
    torch.testing.assert_close(mixed, y, rtol=2e-2, atol=2e-2)


def test_gradcheck_of_the_reference() -> None:
    t = {n: v.double().detach().requires_grad_() for n, v in make(6, 5, torch.float32, G=3).items()}
    seed = torch.tensor([1, 2, 3])
    for rms in (False, True):

        def op(
            x: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, rms: bool = rms
        ) -> tuple[Tensor]:
            return residual_norm(x, gamma, beta, bias=bias, residual=residual, p=P, rms=rms, return_z=True, seed=seed)  # type: ignore[return-value]

        with pk.backend("reference"):
            assert torch.autograd.gradcheck(op, tuple(t[n] for n in NAMES))


def test_double_backward_is_refused() -> None:
    t = make(4, 8, torch.float32)
    with pytest.raises(RuntimeError, match="create_graph=True, and this op has no second derivative"):
        torch.autograd.grad(call(t, torch.tensor([1])).square().sum(), t["x"], create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    t = {n: v.detach() for n, v in make(6, 16, dtype).items()}
    seed = torch.tensor([5])
    y, z, xhat, rstd = torch.ops.petune.residual_norm(
        t["x"], t["bias"], t["residual"], t["gamma"], t["beta"], seed, P, EPS, False, True, True
    )
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for wants in ((t["bias"], t["residual"], True, True), (None, None, False, False)):
        torch.library.opcheck(
            torch.ops.petune.residual_norm,
            (t["x"], wants[0], wants[1], t["gamma"], t["beta"], seed, P, EPS, False, wants[2], wants[3]),
            test_utils=checks,
        )
    for want in (True, False):
        torch.library.opcheck(
            torch.ops.petune.residual_norm_backward,
            (y, z, xhat, rstd, t["bias"], t["gamma"], t["beta"], seed, P, False, False) + (want,) * 5,
            test_utils=checks,
        )


def test_compiles_in_one_graph() -> None:
    t = make(6, 32, torch.float32)

    def f(x: Tensor, residual: Tensor) -> Tensor:
        y = residual_norm(x, t["gamma"], t["beta"], bias=t["bias"], residual=residual, p=P)
        assert isinstance(y, Tensor)
        return y.square().sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    own = torch.autograd.grad(f(t["x"], t["residual"]), [t[n] for n in NAMES])
    torch.manual_seed(3)
    traced = torch.autograd.grad(compiled(t["x"], t["residual"]), [t[n] for n in NAMES])
    for a, b in zip(own, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"))
def test_every_instruction_set(isa: str) -> None:
    """The clones this machine can run agree with the reference (PETUNE_ISA lowers the choice, never raises it)."""
    code = """if True:
        import torch, petune_kernels as pk
        from petune_kernels.ops.residual_norm import residual_norm
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16):
            for H in (64, 50, 7):
                x, r = (torch.randn(9, H, dtype=dtype, requires_grad=True) for _ in range(2))
                b, g, e = (torch.randn(H, dtype=dtype, requires_grad=True) for _ in range(3))
                out = {}
                for name in ("reference", "cpu"):
                    with pk.backend(name):
                        y = residual_norm(x, g, e, bias=b, residual=r, p=.3, seed=torch.tensor([5]))
                        out[name] = (y, *torch.autograd.grad(y.float().square().sum(), (x, r, b, g, e)))
                tol = 1e-4 if dtype == torch.float32 else 3e-2
                for a, c in zip(out["reference"], out["cpu"]):
                    torch.testing.assert_close(a, c, rtol=tol, atol=tol)
    """
    run_under_isa(code, isa)


BAD = {
    "an integer tensor": (lambda t: residual_norm(torch.ones(2, 8, dtype=torch.int64)), TypeError, "x is torch.int64"),
    "a list": (lambda t: residual_norm([1.0]), TypeError, "x is list"),
    "gamma of another width": (lambda t: residual_norm(t, torch.ones(9)), ValueError, r"gamma has shape \(9,\)"),
    "beta of another width": (lambda t: residual_norm(t, None, torch.ones(7)), ValueError, r"beta has shape \(7,\)"),
    "bias as a matrix": (lambda t: residual_norm(t, bias=torch.ones(1, 1, 8)), ValueError, "bias has shape"),
    "another residual": (lambda t: residual_norm(t, residual=torch.ones(3, 8)), ValueError, "residual has shape"),
    "p = 1": (lambda t: residual_norm(t, p=1.0), ValueError, r"p is 1.0; accepted is a probability in \[0, 1\)"),
    "p < 0": (lambda t: residual_norm(t, p=-0.1), ValueError, "p is -0.1"),
    "p = nan": (lambda t: residual_norm(t, p=float("nan")), ValueError, "p is nan"),
    "eps < 0": (lambda t: residual_norm(t, eps=-1.0), ValueError, "eps is -1.0"),
    "two devices": (lambda t: residual_norm(t, torch.ones(8, device="meta")), ValueError, "gamma is on meta"),
    "replicas": (lambda t: residual_norm(t, torch.ones(3, 8)), ValueError, "3 replicas, which does not divide the 4"),
    "differing replicas": (lambda t: residual_norm(t, torch.ones(2, 8), torch.ones(4, 8)), ValueError, "must agree"),
    "a seed of floats": (lambda t: residual_norm(t, p=0.1, seed=torch.ones(1)), TypeError, "seed is"),
    "too many seeds": (lambda t: residual_norm(t, p=0.1, seed=torch.tensor([1, 2, 3])), ValueError, "seed has 3"),
    "no width": (lambda t: residual_norm(torch.ones(4, 0)), ValueError, "must not be empty"),
    "a scalar": (lambda t: residual_norm(torch.tensor(1.0)), ValueError, "x has no dimension"),
}


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    call_it, error, message = BAD[case]
    with pk.backend(backend), pytest.raises(error, match=message) as caught:
        call_it(torch.ones(4, 8))
    assert "residual_norm" in str(caught.value)


@pytest.mark.slow
def test_more_than_2_to_31_elements() -> None:
    """int64 addressing: the last rows of a tensor with over 2^31 elements, and their dropout counters."""
    H = 4096
    T = 2**31 // H + 3
    x = torch.zeros(T, H, dtype=torch.bfloat16)
    x[-2:] = torch.randn(2, H)
    y = residual_norm(x)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y[-2:].float(), F.layer_norm(x[-2:].float(), (H,)), rtol=1e-2, atol=1e-2)
    assert not y[:-2].any()
    del y
    x.fill_(1.0)
    seed = torch.tensor([99])
    _, z = residual_norm(x, p=P, seed=seed, return_z=True)
    start = (T - 2) * H
    words = reference.philox(seed, torch.arange(start // 4, T * H // 4)).reshape(2, H)
    assert torch.equal(z[-2:] != 0, words >= int(P * 2**32))
