"""attention: against float64 and eager, its mask bit for bit, rows that see nothing, and as transformers calls it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import petune_kernels as pk
from petune_kernels import reference
from petune_kernels.ops.attention import attention

from .table import DTYPES, forward_floor, no_worse_than_eager, row_sum_floor, run_under_isa

P = 0.25
# (B, h, S, K, D): a model's, odd everything, one of everything, more rows than columns and the reverse, no rows,
# several tiles and pieces
SHAPES = (
    (2, 3, 128, 128, 32), (1, 2, 37, 53, 25), (1, 1, 1, 1, 1), (2, 2, 70, 70, 64), (1, 2, 53, 37, 40),
    (1, 2, 0, 5, 16), (1, 1, 170, 270, 72),
)  # fmt: skip


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q laid out as models have it, k contiguous, v with gaps between its rows."""
    B, h, S, K, D = shape
    q = torch.randn(B, S, h, D).transpose(1, 2)
    k, v = torch.randn(B, h, K, D), torch.randn(B, K, h, 2 * D)[..., :D].transpose(1, 2)
    return tuple(t.to(dtype).detach().requires_grad_() for t in (q, k, v))  # type: ignore[return-value]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor | None, causal: bool) -> Tensor:
    """The expression transformers' eager attention is, each step rounded to the dtype."""
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if mask is not None:
        scores = scores + mask.to(q.dtype)
    if causal:
        S, K = scores.shape[2:]
        scores = scores.masked_fill(torch.ones(S, K, dtype=torch.bool).triu(1 + K - S), -torch.inf)
    weights = scores.softmax(-1)
    if causal and S > K:  # the first rows see nothing
        weights = weights.nan_to_num(0.0)
    return (weights if keep is None else weights * keep.to(q.dtype) / (1 - P)) @ v


def masks(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    B, h, S, K, _ = shape
    padding = torch.zeros(B, 1, 1, K, dtype=dtype)
    padding[..., (K + 1) // 2 :] = torch.finfo(dtype).min
    return {"none": None, "padding": padding, "full": torch.randn(1, h, S, K, dtype=dtype)}


@pytest.mark.parametrize("causal,dropout,kind", ((False, True, "padding"), (True, False, "none"), (True, True, "full")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_no_worse_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, causal: bool, dropout: bool, kind: str
) -> None:
    B, h, S, K, D = shape
    qkv, mask = make(shape, dtype), masks(shape, dtype)[kind]
    seed = torch.randint(2**62, (1,)) if dropout else None
    keep = None if seed is None else reference.keep_mask(seed, P, B * h * S * K).reshape(B, h, S, K)
    do = torch.randn(B, h, S, D, dtype=dtype)
    leaves = tuple(t.detach().double().requires_grad_() for t in qkv)
    ours = attention(*qkv, mask, P if dropout else 0.0, causal=causal, seed=seed)
    plain = eager(*qkv, mask, keep, causal)
    exact = eager(*leaves, None if mask is None else mask.double(), keep, causal)
    no_worse_than_eager("o", ours, plain, exact, forward_floor(dtype) + row_sum_floor(torch.float32, K))
    results = [torch.autograd.grad(o, t, do.to(o.dtype)) for o, t in ((ours, qkv), (plain, qkv), (exact, leaves))]
    for name, *values in zip(("dq", "dk", "dv"), *results, strict=True):
        no_worse_than_eager(name, *values, forward_floor(dtype) + row_sum_floor(torch.float32, max(S, K)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_is_laid_out_for_the_projection(dtype: torch.dtype) -> None:
    o = attention(*make((2, 3, 5, 7, 16), dtype))
    assert o.shape == (2, 3, 5, 16) and o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", ((1, 1, 4, 16, 8), (2, 3, 5, 37, 8), (1, 2, 3, 129, 8), (1, 1, 2, 3, 8)), ids=str)
def test_mask_is_the_reference_mask_bit_for_bit(shape: tuple[int, ...]) -> None:
    """With q = 0 every weight is 1/K; with v the unit vectors of 8 columns at a time, o shows which were kept."""
    B, h, S, K, D = shape
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    keep = reference.keep_mask(seed, P, B * h * S * K).reshape(B, h, S, K)
    for dtype in DTYPES:
        q, k = torch.zeros(B, h, S, D, dtype=dtype), torch.randn(B, h, K, D, dtype=dtype)
        for start in range(0, K, D):
            v = torch.zeros(B, h, K, D, dtype=dtype)
            v[:, :, start : start + D] = torch.eye(D, dtype=dtype)[: K - start]
            o = attention(q, k, v, p=P, seed=seed)[..., : K - start]
            assert torch.equal(o != 0, keep[..., start : start + D])


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_seed_a_replica_is_each_replica_alone(dtype: torch.dtype, backend: str) -> None:
    """G runs of the batch with a seed each: every replica's results are those of its own rows alone, bit for bit."""
    G, shape = 3, (6, 2, 37, 53, 24)
    qkv, do, seed = make(shape, dtype), torch.randn(6, 2, 37, 24, dtype=dtype), torch.randint(2**62, (G,))
    mask = masks(shape, dtype)["padding"]
    assert mask is not None
    with pk.backend(backend):
        o = attention(*qkv, mask, P, causal=True, seed=seed)
        grads = torch.autograd.grad(o, qkv, do)
        for g in range(G):
            rows = slice(2 * g, 2 * g + 2)
            own = tuple(t[rows].detach().requires_grad_() for t in qkv)
            alone = attention(*own, mask[rows], P, causal=True, seed=seed[g : g + 1])
            expected = torch.autograd.grad(alone, own, do[rows])
            assert all(torch.equal(a[rows], b) for a, b in zip((o, *grads), (alone, *expected), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seeing", ("nothing", "finfo.min"))
def test_rows_whose_every_column_is_masked(dtype: torch.dtype, seeing: str) -> None:
    """-inf everywhere: o = 0, no gradients. finfo.min everywhere (Hugging Face's padding): as eager."""
    q, k, v = make((2, 2, 40, 50, 16), dtype)
    mask = torch.zeros(2, 1, 40, 50, dtype=dtype)
    mask[0, :, 3] = mask[1] = -math.inf if seeing == "nothing" else torch.finfo(dtype).min
    o = attention(q, k, v, mask)
    grads = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    if seeing == "nothing":
        blind = (mask == -math.inf).all(-1).expand(2, 2, 40)
        assert not o[blind].any() and o[~blind].all()
        assert not grads[0][blind].any() and not any(g[1].any() for g in grads)
        assert all(g[0].isfinite().all() and g[0].any() for g in grads)
    else:
        plain = eager(q, k, v, mask, None, False)
        expected = torch.autograd.grad(plain, (q, k, v), torch.ones_like(o))
        tol = 1e-5 if dtype == torch.float32 else 3e-2
        for a, b in zip((o, *grads), (plain, *expected), strict=True):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_dropout_of_a_row_after_rows_that_see_nothing() -> None:
    """Multipliers are drawn for several rows at once, by the first that needs them."""
    q, k, v = make((2, 2, 40, 50, 16), torch.float32)
    mask, seed, do = torch.zeros(2, 1, 40, 50), torch.tensor([7]), torch.randn(2, 2, 40, 16)
    mask[:, :, :3] = mask[:, :, 32:34] = mask[1, :, 20] = -math.inf
    results = []
    for name in ("cpu", "reference"):
        with pk.backend(name):
            o = attention(q, k, v, mask, P, seed=seed)
            results.append((o, *torch.autograd.grad(o, (q, k, v), do)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_masks_in_every_form_agree() -> None:
    q, k, v = make((2, 3, 6, 9, 8), torch.float32)
    seen = torch.rand(2, 1, 1, 9) < 0.7
    seen[..., 0] = True
    added = torch.zeros(2, 1, 1, 9).masked_fill(~seen, -math.inf)
    expected = attention(q, k, v, added)
    forms = {
        "boolean": seen,
        "expanded": added.expand(2, 3, 6, 9),
        "dense": added.repeat(1, 3, 6, 1),
        "strided": torch.stack([added] * 2, -1)[..., 0],
        "double": added.double(),
        "boolean, expanded": seen.expand(2, 3, 6, 9),
    }
    for form, mask in forms.items():
        assert torch.equal(attention(q, k, v, mask), expected), form
    row = torch.randn(6, 9)
    assert torch.equal(attention(q, k, v, row), attention(q, k, v, row.expand(2, 3, 6, 9)))
    column = torch.randn(6, 1)  # the same for every column: no effect
    torch.testing.assert_close(attention(q, k, v, column), attention(q, k, v))
    narrow = tuple(t.detach().bfloat16() for t in (q, k, v))
    padding = torch.zeros(2, 1, 6, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    padding[0, :, 2] = torch.finfo(torch.float32).min  # a row of padding: every column alike, in bfloat16 too
    low = torch.zeros(2, 1, 6, 9).masked_fill(padding != 0, torch.finfo(torch.bfloat16).min).bfloat16()
    assert torch.equal(attention(*narrow, padding), attention(*narrow, low))
    torch.testing.assert_close(
        attention(*narrow, padding)[0, :, 2].float(), narrow[2][0].float().mean(1), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("want", list(itertools.product((False, True), repeat=3)), ids=str)
def test_every_subset_of_gradients(want: tuple[bool, ...]) -> None:
    whole, do, seed = make((2, 2, 20, 33, 24), torch.float32), torch.randn(2, 2, 20, 24), torch.tensor([7])
    with pk.backend("reference"):
        o = attention(*whole, p=P, seed=seed, causal=True)
        expected = torch.autograd.grad(o, whole, do)
    some = tuple(t.detach().requires_grad_(w) for t, w in zip(whole, want, strict=True))
    out = attention(*some, p=P, seed=seed, causal=True)
    torch.testing.assert_close(out, o, rtol=1e-5, atol=1e-5)
    assert out.requires_grad == any(want)
    if any(want):
        out.backward(do)
    for t, wanted, d in zip(some, want, expected, strict=True):
        if wanted:
            torch.testing.assert_close(t.grad, d, rtol=1e-4, atol=1e-5)
        else:
            assert t.grad is None


def test_saves_nothing_of_the_size_of_the_scores() -> None:
    saved: list[Tensor] = []
    B, h, S, K, D = 2, 3, 64, 80, 16
    q, k, v = make((B, h, S, K, D), torch.bfloat16)
    mask = torch.zeros(B, 1, 1, K, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        o = attention(q, k, v, mask, p=P)
    inputs = {t.untyped_storage().data_ptr() for t in (q, k, v, mask)}
    own = {s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in saved}
    assert sorted(n for pointer, n in own.items() if pointer not in inputs) == [8] and o.requires_grad


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
def test_grouped_heads_as_repeated_ones(dtype: torch.dtype) -> None:
    """The same values and gradients as for heads repeated outside, and no repeated head is kept."""
    q = make((2, 6, 20, 20, 16), dtype)[0]
    k, v = (t.detach()[:, :2].contiguous().requires_grad_() for t in make((2, 6, 20, 30, 16), dtype)[1:])
    seed, do = torch.tensor([3]), torch.randn(2, 6, 20, 16).to(dtype)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        o = attention(q, k, v, p=P, seed=seed)
    assert {s.untyped_storage().data_ptr() for s in saved} == {t.untyped_storage().data_ptr() for t in (q, k, v, seed)}
    apart = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), p=P, seed=seed)
    assert torch.equal(o, apart)
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), do) for y in (o, apart)), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_activation_checkpointing_and_seeding() -> None:
    q, k, v = make((2, 2, 16, 16, 8), torch.float32)
    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(5)
        q.grad = None
        o = attention(q, k, v, p=P) if reentrant is None else checkpoint(
            lambda q: attention(q, k, v, p=P), q, use_reentrant=reentrant
        )  # fmt: skip
        o.square().sum().backward()
        results.append((o, q.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not torch.equal(attention(q, k, v, p=P), results[0][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_whatever_the_threads(dtype: torch.dtype) -> None:
    qkv, do, seed = make((3, 3, 300, 70, 24), dtype), torch.randn(3, 3, 300, 24, dtype=dtype), torch.tensor([11])
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            o = attention(*qkv, p=P, seed=seed)
            runs.append((o, *torch.autograd.grad(o, qkv, do)))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_nan_is_not_hidden() -> None:
    q, k, v = (t.detach() for t in make((1, 1, 40, 40, 16), torch.float32))
    for spoiled in (q, k, v):
        bad = spoiled.clone()
        bad[0, 0, 5, 3] = math.nan
        o = attention(*(bad if t is spoiled else t for t in (q, k, v)))
        assert torch.equal(
            o.isnan(), eager(*(bad if t is spoiled else t for t in (q, k, v)), None, None, False).isnan()
        )


def test_overlapping_input_is_read_as_it_is() -> None:
    row = torch.randn(1, 1, 1, 16)
    q = k = row.expand(2, 3, 9, 16)
    v = torch.randn(9 + 15).as_strided((2, 3, 9, 16), (0, 0, 1, 1))
    torch.testing.assert_close(attention(q, k, v), eager(q, k, v.contiguous(), None, None, False))


def test_gradcheck_of_the_reference() -> None:
    qkv = tuple(t.detach().double().requires_grad_() for t in make((1, 2, 4, 5, 3), torch.float32))
    mask, seed = torch.randn(4, 5, dtype=torch.float64), torch.tensor([1])
    with pk.backend("reference"):
        for causal in (False, True):
            assert torch.autograd.gradcheck(
                lambda q, k, v, causal=causal: attention(q, k, v, mask, P, causal=causal, seed=seed), qkv
            )


def test_double_backward_is_refused() -> None:
    q, k, v = make((1, 1, 3, 3, 4), torch.float32)
    with pytest.raises(RuntimeError, match="create_graph=True, and this op has no second derivative"):
        torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v = (t.detach() for t in make((2, 2, 6, 7, 8), dtype))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    mask = torch.zeros(2, 1, 1, 7, dtype=dtype).expand(2, 2, 6, 7)
    for extra in ((mask, torch.tensor([3])), (mask, torch.tensor([3, 4])), (None, None)):
        args = (q, k, v, *extra, P, 0.3, False)
        o = torch.ops.petune.attention(*args)
        torch.library.opcheck(torch.ops.petune.attention, args, test_utils=checks)
        torch.library.opcheck(torch.ops.petune.attention_backward, (o, q, k, v, *args[3:]), test_utils=checks)


def test_compiles_in_one_graph() -> None:
    q, k, v = make((2, 2, 6, 7, 8), torch.float32)
    mask = torch.zeros(2, 1, 1, 7)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, P, causal=True).square().sum()

    torch.manual_seed(3)
    own = torch.autograd.grad(f(q, k, v), (q, k, v))
    torch.manual_seed(3)
    traced = torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(own, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("isa", ("baseline", "avx2"))  # the best one is what every other test runs on
def test_every_instruction_set(isa: str) -> None:
    code = """if True:
        import torch, petune_kernels as pk
        from petune_kernels.ops.attention import attention
        torch.manual_seed(0)
        for dtype, tol in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
            for S, K, D in ((40, 80, 64), (37, 53, 20), (3, 2, 7)):
                qkv = [torch.randn(2, 2, n, D, dtype=dtype, requires_grad=True) for n in (S, K, K)]
                wide = [t.detach().double().requires_grad_() for t in qkv]
                mask, do = torch.randn(2, 1, 1, K, dtype=dtype), torch.randn(2, 2, S, D, dtype=dtype)
                out = {}
                for name, t in (("cpu", qkv), ("reference", wide)):
                    with pk.backend(name):
                        o = attention(*t, mask.to(t[0].dtype), .3, seed=torch.tensor([5]))
                        out[name] = (o, *torch.autograd.grad(o, t, do.to(o.dtype)))
                for a, c in zip(out["cpu"], out["reference"]):
                    torch.testing.assert_close(a.double(), c, rtol=tol, atol=tol)
    """
    run_under_isa(code, isa)


def _learned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, torch.zeros(3, 5, requires_grad=True))


BAD = {
    "a list": (lambda q, k, v: attention([1.0], k, v), TypeError, "q is list"),
    "an integer tensor": (lambda q, k, v: attention(q, k.long(), v), TypeError, "k is torch.int64"),
    "three dimensions": (lambda q, k, v: attention(q[0], k, v), ValueError, r"q has shape \(2, 3, 4\)"),
    "two dtypes": (lambda q, k, v: attention(q, k, v.bfloat16()), TypeError, "v is torch.bfloat16, q is torch.float32"),
    "two devices": (lambda q, k, v: attention(q, k.to("meta"), v), ValueError, "k is on meta"),
    "other heads": (lambda q, k, v: attention(q, k[:, :1], v), ValueError, r"v has shape \(1, 2, 5, 4\)"),
    "heads that do not divide": (
        lambda q, k, v: attention(q, *(t.repeat_interleave(2, 1)[:, :3] for t in (k, v))), ValueError, "that divide q"
    ),
    "other columns": (lambda q, k, v: attention(q, k, v[:, :, :4]), ValueError, r"v has shape \(1, 2, 4, 4\)"),
    "another head width": (lambda q, k, v: attention(q, k, v[..., :3]), ValueError, r"v has shape \(1, 2, 5, 3\)"),
    "no head width": (lambda q, k, v: attention(q[..., :0], k, v), ValueError, "D at least 1"),
    "a mask that does not fit": (lambda q, k, v: attention(q, k, v, q.new_zeros(5, 3)), ValueError, "mask has shape"),
    "an integer mask": (lambda q, k, v: attention(q, k, v, torch.ones(3, 5).int()), TypeError, "mask is torch.int32"),
    "a learned mask": (_learned, ValueError, "mask requires grad"),
    "a mask elsewhere": (
        lambda q, k, v: attention(q, k, v, torch.zeros(3, 5, device="meta")), ValueError, "mask is on meta"
    ),
    "p = 1": (lambda q, k, v: attention(q, k, v, p=1.0), ValueError, r"p is 1.0; accepted is a probability"),
    "a seed of floats": (lambda q, k, v: attention(q, k, v, p=0.1, seed=torch.ones(1)), TypeError, "seed is"),
    "two seeds": (lambda q, k, v: attention(q, k, v, p=0.1, seed=torch.tensor([1, 2])), ValueError, "seed has 2"),
    "no seed": (lambda q, k, v: attention(q, k, v, p=0.1, seed=torch.tensor([]).long()), ValueError, "seed has 0"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    call_it, error, message = BAD[case]
    with pk.backend(backend), pytest.raises(error, match=message) as caught:
        call_it(*(t.detach() for t in make((1, 2, 3, 5, 4), torch.float32)))
    assert "attention" in str(caught.value)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_takes_what_rotary_embeddings_widened(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        o = attention(q, k, v.to(dtype))
    o.sum().backward()
    assert o.dtype == dtype and q.grad is not None and q.grad.dtype == torch.float32
    assert torch.equal(o, attention(q.to(dtype), k.to(dtype), v.to(dtype)))
