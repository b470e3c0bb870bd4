"""lora_adapter, which adds the low-rank term: the CPU kernel, and the functions of torch's matmuls that CUDA takes."""

from __future__ import annotations

import itertools

import pytest
import torch

from petune_kernels import matmul, reference

from .table import UNIT, rms, run_under_isa

SHAPES = [  # T, K, N, r: one row; odd everything; whole blocks; more columns than a panel; a high rank
    (1, 8, 4, 1),
    (7, 10, 13, 3),
    (32, 64, 48, 4),
    (150, 384, 100, 8),
    (39, 1541, 1600, 5),
    (66, 40, 24, 70),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
OPS = ("lora_adapter", "lora_adapter_backward")
KERNELS = {
    "cpu": (torch.ops.petune.lora_adapter, torch.ops.petune.lora_adapter_backward),
    "matmul": (matmul.lora_adapter, matmul.lora_adapter_backward),
    "blocks": (matmul._by_blocks, matmul._backward_by_blocks),
}


def problem(T, K, N, r, dtype, adapter, G=1):
    lead = () if G == 1 else (G,)
    return {
        "x": torch.randn(T, K).to(dtype),
        "y": torch.randn(T, N).to(dtype),
        "a": (torch.randn(*lead, r, K) / K**0.5).to(adapter),
        "b": (torch.randn(*lead, N, r) / r**0.5).to(adapter),
        "bias_b": torch.randn(*lead, N).to(adapter),
        "dy": torch.randn(T, N).to(dtype),
        "dx": torch.randn(T, K).to(dtype),
    }


def wide(made):
    return {name: t.double() for name, t in made.items()}


def near(name, got, want, units):
    assert not got.isnan().any(), name
    assert rms(got.double() - want) <= units * rms(want), name


def bound(dtype, terms, of_rounded):
    """A rounding of the result and a float32 sum; of torch's 16-bit matmuls also the thin factors' roundings."""
    return UNIT[dtype] * (4 if of_rounded else 1) + UNIT[torch.float32] * (8 + terms**0.5)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(matmul, "_BLOCK", 1 << 12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("G, seeds", [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3)])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtypes, G, seeds, kernel):
    if kernel == "blocks" and dtypes[0] == dtypes[1]:
        pytest.skip("blocks are for factors wider than their rows")
    T, K, N, r = shape
    T *= G
    made, p = problem(T, K, N, r, *dtypes, G=G), 0.3 if seeds else 0.0
    exact = wide(made)
    seed = torch.randint(2**62, (seeds,)) if seeds else None
    forward, backward = KERNELS[kernel]
    forward(made["y"], made["x"], made["a"], made["b"], made["bias_b"], seed, p, 0.5)
    reference.lora_adapter(exact["y"], exact["x"], exact["a"], exact["b"], exact["bias_b"], seed, p, 0.5)
    rounded = kernel != "cpu" and dtypes[1] != torch.float32
    near("y", made["y"], exact["y"], bound(dtypes[0], K, rounded))
    names = ("dx", "dy", "x", "a", "b")
    da, db = backward(*(made[name] for name in names), seed, p, 0.5, True, True)
    want = reference.lora_adapter_backward(*(exact[name] for name in names), seed, p, 0.5, True, True)
    near("dx", made["dx"], exact["dx"], bound(dtypes[0], N, rounded))
    for name, got, w in zip("ab", (da, db), want, strict=True):
        assert got.shape == made[name].shape and got.dtype == made[name].dtype and got.is_contiguous()
        near(f"d{name}", got, w, bound(dtypes[1], T + K + N, rounded))


@pytest.mark.gpu
@pytest.mark.parametrize("G, seeds", [(1, 0), (1, 1), (3, 0), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_rows_on_a_gpu(shape, dtype, G, seeds, monkeypatch):
    """What takes them, and torch's products whole and by blocks, from one seed."""
    T, K, N, r = shape
    T *= G
    made, p = problem(T, K, N, r, dtype, torch.float32, G=G), 0.3 if seeds else 0.0
    seed, exact = (torch.randint(2**62, (seeds,)) if seeds else None), wide(made)
    names = ("dx", "dy", "x", "a", "b")
    reference.lora_adapter(exact["y"], exact["x"], exact["a"], exact["b"], exact["bias_b"], seed, p, 0.5)
    want = reference.lora_adapter_backward(*(exact[name] for name in names), seed, p, 0.5, True, True)
    for at_once, kernels in ((0, matmul.MANY_ROWS), (1 << 24, {}), (0, dict(zip(OPS, KERNELS["blocks"], strict=True)))):
        monkeypatch.setattr(matmul, "_AT_ONCE", at_once)
        monkeypatch.setattr(matmul, "MANY_ROWS", kernels)
        t = {name: tensor.cuda() for name, tensor in made.items()}
        key = None if seed is None else seed.cuda()
        torch.ops.petune.lora_adapter(t["y"], t["x"], t["a"], t["b"], t["bias_b"], key, p, 0.5)
        da, db = torch.ops.petune.lora_adapter_backward(*(t[name] for name in names), key, p, 0.5, True, True)
        for name, got, w in zip(
            "y dx da db".split(), (t["y"], t["dx"], da, db), (exact["y"], exact["dx"], *want), strict=True
        ):
            near(name, got.cpu(), w, bound(torch.float32 if name in ("da", "db") else dtype, T + K + N, False))


@pytest.mark.parametrize("K, N", [(24, 20), (20, 24)])
def test_many_rows_are_not_widened_whole(K, N, monkeypatch):
    """Whichever of x and y is the wider."""
    made, seed = problem(40, K, N, 4, torch.bfloat16, torch.float32), torch.tensor([3])
    y, dx = made["y"].clone(), made["dx"].clone()
    rest = (made["a"], made["b"])
    matmul._by_blocks(y, made["x"], *rest, None, seed, 0.3, 2.0)
    grads = matmul._backward_by_blocks(dx, made["dy"], made["x"], *rest, seed, 0.3, 2.0, True, True)
    monkeypatch.setattr(matmul, "_AT_ONCE", 40 * 24 - 1)
    matmul.lora_adapter(made["y"], made["x"], *rest, None, seed, 0.3, 2.0)
    again = matmul.lora_adapter_backward(made["dx"], made["dy"], made["x"], *rest, seed, 0.3, 2.0, True, True)
    for got, want in zip((made["y"], made["dx"], *again), (y, dx, *grads), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("want_dx, want_da, want_db", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradient_subsets(want_dx, want_da, want_db, p):
    """Each gradient is the same whatever else is asked for; x is not needed for dx alone."""
    made, seed = problem(40, 24, 20, 4, torch.bfloat16, torch.float32), torch.tensor([3]) if p else None
    full = made["dx"].clone()
    rest = (made["a"], made["b"], seed, p, 2.0)
    da, db = torch.ops.petune.lora_adapter_backward(full, made["dy"], made["x"], *rest, True, True)
    dx = made["dx"] if want_dx else None
    x = made["x"] if want_da or want_db else None
    some = torch.ops.petune.lora_adapter_backward(dx, made["dy"], x, *rest, want_da, want_db)
    if want_dx:
        assert torch.equal(dx, full)
    for got, whole, want in zip(some, (da, db), (want_da, want_db), strict=True):
        assert torch.equal(got, whole) if want else got.shape == (0,)


@pytest.mark.parametrize("K", [12, 50, 1601])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mask_is_that_of_dropout(dtype, K):
    """Through factors that pass a single column: forward, dx and dA each show the mask bit for bit."""
    T, p, seed = 37, 0.3, torch.tensor([2**40 + 7])
    ones = torch.ones(T, K, dtype=dtype)
    keep = torch.ops.petune.dropout(ones, seed, p) > 0
    one = torch.ones(1, 1)
    for column in (0, 1, K // 2, K - 1):
        pick = torch.zeros(1, K)
        pick[0, column] = 1.0
        y = torch.zeros(T, 1, dtype=dtype)
        torch.ops.petune.lora_adapter(y, ones, pick, one, None, seed, p, 1.0)
        assert torch.equal(y[:, 0] > 0, keep[:, column])
    dx = torch.zeros(T, K, dtype=dtype)
    torch.ops.petune.lora_adapter_backward(
        dx, torch.ones(T, 1, dtype=dtype), None, torch.ones(1, K), one, seed, p, 1.0, False, False
    )
    assert torch.equal(dx > 0, keep)
    for row in (0, T - 1):
        dy = torch.zeros(T, 1, dtype=dtype)
        dy[row] = 1.0
        da, _ = torch.ops.petune.lora_adapter_backward(None, dy, ones, torch.ones(1, K), one, seed, p, 1.0, True, False)
        assert torch.equal(da[0] > 0, keep[row])


def test_a_dropped_nan_is_zero():
    x, seed = torch.full((64, 16), torch.nan), torch.tensor([1])
    keep = torch.ops.petune.dropout(torch.ones_like(x), seed, 0.5) > 0
    x[keep] = 1.0
    y = torch.zeros(64, 4)
    torch.ops.petune.lora_adapter(y, x, torch.ones(2, 16), torch.ones(4, 2), None, seed, 0.5, 1.0)
    da, db = torch.ops.petune.lora_adapter_backward(
        None, y, x, torch.ones(2, 16), torch.ones(4, 2), seed, 0.5, 1.0, True, True
    )
    assert not any(t.isnan().any() for t in (y, da, db))


def run(made, seed):
    y, dx = made["y"].clone(), made["dx"].clone()
    torch.ops.petune.lora_adapter(y, made["x"], made["a"], made["b"], made["bias_b"], seed, 0.2, 2.0)
    grads = torch.ops.petune.lora_adapter_backward(
        dx, made["dy"], made["x"], made["a"], made["b"], seed, 0.2, 2.0, True, True
    )
    return [y, dx, *grads]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_number_of_threads_changes_nothing(dtypes):
    made, seed, before = problem(900, 100, 70, 9, *dtypes, G=3), torch.tensor([1, 2, 3]), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(run(made, seed))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(s, t) for s, t in zip(results[0], other, strict=True))


@pytest.mark.parametrize("G", [1, 2])
def test_no_rows(G):
    made = problem(0, 24, 20, 4, torch.bfloat16, torch.float32, G=G)
    _, dx, da, db = run(made, torch.tensor([4]))
    assert dx.shape == (0, 24) and not da.any() and not db.any()


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa):
    run_under_isa(
        """if True:
        import torch
        from tests.ops.test_lora_adapter import DTYPES, SHAPES, test_against_float64, test_the_mask_is_that_of_dropout
        torch.manual_seed(0)
        for dtypes in DTYPES:
            test_the_mask_is_that_of_dropout(dtypes[0], 50)
            for shape in SHAPES:
                test_against_float64(shape, dtypes, 1, 1, "cpu")
                test_against_float64(shape, dtypes, 3, 3, "cpu")
        """,
        isa,
    )


@pytest.mark.parametrize("G", [1, 2])
def test_opcheck(G):
    made, seed = problem(6, 8, 5, 2, torch.bfloat16, torch.float32, G=G), torch.tensor([3])
    tests = ("test_schema", "test_faketensor")
    forward = [made[name] for name in ("y", "x", "a", "b", "bias_b")]
    torch.library.opcheck(torch.ops.petune.lora_adapter.default, (*forward, seed, 0.5, 2.0), test_utils=tests)
    backward = [made[name] for name in ("dx", "dy", "x", "a", "b")]
    for want in (True, False):
        torch.library.opcheck(
            torch.ops.petune.lora_adapter_backward.default, (*backward, seed, 0.5, 2.0, want, True), test_utils=tests
        )


def test_what_would_read_out_of_bounds_is_refused():
    made = problem(6, 8, 5, 2, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="a and b do not match"):
        torch.ops.petune.lora_adapter(made["y"], made["x"], made["a"], made["b"][:, :1], None, None, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="contiguous rows of one dtype"):
        torch.ops.petune.lora_adapter(made["y"][:, :4], made["x"], made["a"], made["b"], None, None, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="bias_b does not match"):
        torch.ops.petune.lora_adapter(made["y"], made["x"], made["a"], made["b"], made["bias_b"][:3], None, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="need x"):
        torch.ops.petune.lora_adapter_backward(
            None, made["dy"], None, made["a"], made["b"], None, 0.0, 1.0, True, False
        )
