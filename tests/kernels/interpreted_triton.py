"""The Triton launchers against the reference: in Triton's interpreter on the CPU, or on a GPU where there is one.

Run by test_triton_interpreter.py in a process of its own, because TRITON_INTERPRET must be set before triton is
imported. tl.dot is wrong for bfloat16 in the interpreter, so matmul kernels run in float32 and float16 there.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from petune_kernels import backends, reference
from petune_kernels.triton import column_sum as t_column_sum
from petune_kernels.triton import common, tiles
from petune_kernels.triton import dropout as t_dropout
from petune_kernels.triton import lora_adapter as t_adapter
from petune_kernels.triton import lora_linear as t_lora
from petune_kernels.triton import residual_norm as t_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MATMUL_DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
ROW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RELATIVE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def seeds(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def close(got, want, dtype, terms=1):
    """RMS error relative to the RMS value; sums of `terms` rounded values err with their square root."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.numel() == 0:
        return
    assert got.isfinite().all()
    got, want = got.double(), want.double()
    off = (got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-6)
    assert off <= RELATIVE[dtype] * max(1.0, terms**0.5 / 8), off


def same(got, want, dtype, terms=1):
    for g, w in zip(got, want, strict=True):
        if isinstance(g, (list, tuple)):
            same(g, w, dtype, terms)
        else:
            close(g, w, dtype, terms)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (12, 96), (3, 1366)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_mask_is_the_reference_bit_for_bit(p, shape, count):
    if shape[0] % count:
        shape = (shape[0] * count, shape[1])
    seed = seeds(-7, 2**40 + 3, 5)[:count]
    x = torch.ones(shape, device=DEVICE)
    assert torch.equal(t_dropout.dropout(x, seed, p), reference.dropout(x, seed, p))
    assert torch.equal(t_dropout.dropout(x.bfloat16(), seed, p), reference.dropout(x.bfloat16(), seed, p))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shape", [(3, 1), (66, 40), (1200, 200)], ids=str)
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_column_sum(dtype, shape, groups):
    x = randn(*shape, dtype=dtype)
    got = t_column_sum.column_sum(x, groups)
    close(got, reference.column_sum(x, groups), torch.float32)
    assert torch.equal(got, t_column_sum.column_sum(x, groups)), "deterministic"
    close(t_column_sum.column_sum(x[:0], groups), reference.column_sum(x[:0], groups), torch.float32)


def norm_problem(T, H, dtype, G, some=True, affine=torch.float32):
    lead = (G,) if G > 1 else ()
    return {
        "x": randn(T, H, dtype=dtype),
        "bias": randn(*lead, H, dtype=affine) if some else None,
        "residual": randn(T, H, dtype=dtype) if some else None,
        "gamma": (randn(*lead, H) + 3).to(affine) if some else None,
        "beta": randn(*lead, H, dtype=affine) if some else None,
    }


NORM_CASES = [  # T, H, replicas, seeds
    (1, 64, 1, 0),
    (6, 30, 1, 1),
    (33, 96, 3, 3),
    (12, 200, 3, 1),
    (6, 72, 1, 3),
]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", NORM_CASES, ids=str)
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_residual_norm(dtype, shape, rms):
    run_residual_norm(dtype, shape, rms, some=shape[1] != 30)


@pytest.mark.parametrize("shared", [("gamma",), ("bias", "beta")], ids=str)
def test_residual_norm_of_replicas_that_share_parameters(shared):
    run_residual_norm(torch.float32, (12, 40, 3, 3), False, shared=shared)


@pytest.mark.parametrize("rms, count", [(False, 1), (True, 0)])
def test_residual_norm_wide_rows(rms, count):
    """Rows whose column sums do not fit in registers."""
    run_residual_norm(torch.float32, (9, 4100, 1, count), rms)


def test_rows_keep_their_shape():
    made, seed = norm_problem(6, 40, torch.float32, 1), seeds(5)
    flat = t_norm.residual_norm(*made.values(), seed, 0.3, 1e-5, False, True, True)
    made |= {k: made[k].view(2, 3, 40) for k in ("x", "residual")}
    got = t_norm.residual_norm(*made.values(), seed, 0.3, 1e-5, False, True, True)
    assert all(t.shape == (2, 3, 40) and torch.equal(t.view(6, 40), f) for t, f in zip(got[:3], flat[:3], strict=True))
    wanted = (seed, 0.3, False, False, True, True, True, True, True)
    rest = (made["bias"], made["gamma"], made["beta"], *wanted)
    dy = randn(2, 3, 40)
    want = t_norm.residual_norm_backward(dy.view(6, 40), None, flat[2], flat[3], *rest)
    back = t_norm.residual_norm_backward(dy, None, got[2], got[3], *rest)
    assert back[0].shape == back[1].shape == dy.shape
    assert all(torch.equal(t.reshape(f.shape), f) for t, f in zip(back, want, strict=True))


def run_residual_norm(dtype, shape, rms, some=True, shared=()):
    T, H, G, count = shape
    made = norm_problem(T, H, dtype, G, some=some, affine=dtype if G == 1 else torch.float32)
    made |= {k: made[k][0] for k in shared}
    seed, p = (seeds(11, -3, 2**50)[:count], 0.3) if count else (None, 0.0)
    args = (*made.values(), seed, p, 1e-5, rms, True, True)
    got, want = t_norm.residual_norm(*args), reference.residual_norm(*args)
    same(got[:3], want[:3], dtype)
    close(got[3], want[3], torch.float32)
    _, z, xhat, rstd = want
    dy, dz = randn(T, H, dtype=dtype), randn(T, H, dtype=dtype)
    small = [made[k] is not None and k not in shared for k in ("bias", "gamma", "beta")]
    for row_is_z, row in ((False, xhat), (True, z)):
        back = (
            dy, dz if row_is_z else None, row, rstd, made["bias"], made["gamma"], made["beta"], seed, p, rms, row_is_z,
            True, True, *small,
        )  # fmt: skip
        same(t_norm.residual_norm_backward(*back), reference.residual_norm_backward(*back), dtype, T)


@pytest.mark.parametrize("want", list(itertools.product([False, True], repeat=5)), ids=str)
def test_residual_norm_gradient_subsets(want):
    made, seed = norm_problem(12, 40, torch.float32, 3), seeds(1, 2, 3)
    y, z, xhat, rstd = reference.residual_norm(*made.values(), seed, 0.5, 1e-5, False, True, True)
    back = (randn(12, 40), None, xhat, rstd, made["bias"], made["gamma"], made["beta"], seed, 0.5, False, False, *want)
    got = t_norm.residual_norm_backward(*back)
    same(got, reference.residual_norm_backward(*back), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, t_norm.residual_norm_backward(*back), strict=True))


def lora_problem(T, K, N, r, dtype, adapter, G=1, n=1):
    lead = (G,) if G > 1 else ()
    return {
        "x": randn(T, K, dtype=dtype),
        "w": [(randn(N + 3 * i, K) / K**0.5).to(dtype) for i in range(n)],
        "bias": [randn(*lead, N + 3 * i, dtype=dtype) for i in range(n)],
        "a": [(randn(*lead, r + i, K) / K**0.5).to(adapter) for i in range(n)],
        "b": [(randn(*lead, N + 3 * i, r + i) / r**0.5).to(adapter) for i in range(n)],
        "bias_b": [randn(*lead, N + 3 * i, dtype=adapter) for i in range(n)],
    }


def dropout_of(p, n, count):
    if not p:
        return [None] * n, [0.0] * n
    return [seeds(*(17 * i + j for j in range(count))) for i in range(n)], [p] * n


LORA_CASES = [  # T, K, N, r, dropout, replicas
    (1, 8, 4, 1, 0.3, 1),
    (6, 10, 7, 3, 0.3, 3),
    (150, 72, 76, 8, 0.0, 1),
    (150, 72, 76, 8, 0.3, 1),
    (66, 40, 24, 6, 0.0, 3),
    (30, 24, 20, 80, 0.3, 1),
    (40, 24, 20, 27, 0.0, 1),
    (6, 10, 7, 70, 0.0, 3),
]


@pytest.mark.parametrize(
    "dtype, adapter", [*((d, "same") for d in MATMUL_DTYPES), *((d, "float32") for d in MATMUL_DTYPES[1:])], ids=str
)
@pytest.mark.parametrize("case", LORA_CASES, ids=str)
def test_lora_linear(case, dtype, adapter):
    T, K, N, r, p, G = case
    n = 2
    wide = dtype if adapter == "same" else torch.float32
    made = lora_problem(T, K, N, r, dtype, wide, G, n)
    seed, ps = dropout_of(p, n, G)
    scale = [0.5, 3.0]
    args = (*made.values(), seed, ps, scale, False)
    want_y = reference.lora_linear(*args)
    same(t_lora.lora_linear(*args), want_y, dtype)
    dy = [torch.randn_like(t) for t in want_y]
    back = (dy, made["x"], made["w"], made["a"], made["b"], seed, ps, scale, G, True, *([[True] * n] * 3))
    dx, da, db, dsum = t_lora.lora_linear_backward(*back)
    want = reference.lora_linear_backward(*back)
    close(dx, want[0], dtype)
    same((da, db), want[1:3], wide, T)
    same(dsum, want[3], torch.float32, T)


@pytest.mark.parametrize("want", list(itertools.product([False, True], repeat=4)), ids=str)
def test_lora_gradient_subsets(want, p=0.5):
    """Two projections: one with an adapter, one without; the second output unused in one case."""
    made = lora_problem(12, 20, 18, 4, torch.float32, torch.float32, n=2)
    for name in ("a", "b", "bias_b"):
        made[name][1] = None
    seed, ps = dropout_of(p, 2, 1)
    seed[1], ps[1] = None, 0.0
    args = (*made.values(), seed, ps, [2.0, 1.0], False)
    y = reference.lora_linear(*args)
    same(t_lora.lora_linear(*args), y, torch.float32)
    want_dx, want_da, want_db, want_dsum = want
    for unused in (False, True):
        dy = [torch.randn_like(y[0]), None if unused else torch.randn_like(y[1])]
        back = (
            dy, made["x"] if want_da or want_db else None, made["w"], made["a"], made["b"], seed, ps, [2.0, 1.0], 1,
            want_dx, [want_da, False],
            [want_db, False], [want_dsum, want_dsum],
        )  # fmt: skip
        got = t_lora.lora_linear_backward(*back)
        same(got, reference.lora_linear_backward(*back), torch.float32)
        again = t_lora.lora_linear_backward(*back)
        assert all(
            torch.equal(g, h) for g, h in zip([got[0], *got[1], *got[3]], [again[0], *again[1], *again[3]], strict=True)
        )


def test_lora_reads_weights_of_any_strides():
    made = lora_problem(20, 24, 18, 4, torch.float32, torch.float32)
    made["bias"] = [torch.randn(1, device=DEVICE).expand(18)]
    strided = {name: [m.mT.contiguous().mT if m.dim() > 1 else m for m in made[name]] for name in ("w", "a", "b")}
    assert not any(m.is_contiguous() for ms in strided.values() for m in ms)
    args = (*(made | strided).values(), [None], [0.0], [2.0], False)
    y = reference.lora_linear(*args)
    same(t_lora.lora_linear(*args), y, torch.float32)
    back = ([torch.randn_like(y[0])], made["x"], *strided.values(), [None], [0.0], [2.0], 1, True, *[[True]] * 3)
    same(t_lora.lora_linear_backward(*back), reference.lora_linear_backward(*back), torch.float32)


def test_small_float32_factors_beside_float16_rows():
    """Early in a run s dy B is a millionth: split into float16 terms it would lose its last digits."""
    made = lora_problem(64, 24, 18, 4, torch.float16, torch.float32)
    made["b"] = [1e-4 * m for m in made["b"]]
    dy = [1e-2 * torch.randn(64, 18, device=DEVICE).half()]
    back = (dy, made["x"], made["w"], made["a"], made["b"], [None], [0.0], [1.0], 1, False, *[[True]] * 3)
    for got, want in zip(
        t_lora.lora_linear_backward(*back)[1:3], reference.lora_linear_backward(*back)[1:3], strict=True
    ):
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5 * want[0].abs().max().item())


@pytest.mark.parametrize(
    "dtype, adapter", [(d, d) for d in MATMUL_DTYPES] + [(d, torch.float32) for d in MATMUL_DTYPES[1:]], ids=str
)
@pytest.mark.parametrize("case", [*LORA_CASES, (0, 24, 20, 4, 0.3, 1)], ids=str)
def test_lora_adapter(case, dtype, adapter):
    T, K, N, r, p, G = case
    made = {k: v[0] if isinstance(v, list) else v for k, v in lora_problem(T, K, N, r, dtype, adapter, G).items()}
    a, b, x, seed = made["a"], made["b"], made["x"], seeds(*range(7, 7 + G)) if p else None
    y, dx, dy = randn(T, N, dtype=dtype), randn(T, K, dtype=dtype), randn(T, N, dtype=dtype)
    want_y, want_dx = y.clone(), dx.clone()
    t_adapter.lora_adapter(y, x, a, b, made["bias_b"], seed, p, 0.5)
    reference.lora_adapter(want_y, x, a, b, made["bias_b"], seed, p, 0.5)
    close(y, want_y, dtype)
    got = t_adapter.lora_adapter_backward(dx, dy, x, a, b, seed, p, 0.5, True, True)
    same(got, reference.lora_adapter_backward(want_dx, dy, x, a, b, seed, p, 0.5, True, True), adapter, T)
    close(dx, want_dx, dtype)
    backward = backends._triton_launcher("lora_adapter_backward")  # as the library calls it
    for wanted in itertools.product([False, True], repeat=3):
        into = torch.zeros_like(dx) if wanted[0] else None
        rows = x if wanted[1] or wanted[2] else None
        some = backward(into, dy, rows, a, b, seed, p, 0.5, *wanted[1:])
        for one, whole, want in zip(some, got, wanted[1:], strict=True):
            assert torch.equal(one, whole) if want else one.shape == (0,)


@pytest.mark.parametrize("dtype", MATMUL_DTYPES, ids=str)
def test_lora_merged(dtype):
    made = lora_problem(66, 40, 24, 8, dtype, dtype)
    args = (*made.values(), [None], [0.0], [0.5], True)
    y = t_lora.lora_linear(*args)
    same(y, reference.lora_linear(*args), dtype)
    dy = [torch.randn_like(y[0])]
    back = (dy, made["x"], made["w"], made["a"], made["b"], [None], [0.0], [0.5], 1, True, [True], [True], [True])
    same(t_lora.lora_linear_backward(*back), reference.lora_linear_backward(*back), dtype)


def test_many_row_blocks_and_no_rows():
    made = lora_problem(1100, 24, 20, 4, torch.float32, torch.float32)
    seed, ps = dropout_of(0.2, 1, 1)
    for rows in (1100, 0):
        made["x"] = made["x"][:rows]
        args = (*made.values(), seed, ps, [1.0], False)
        y = reference.lora_linear(*args)
        same(t_lora.lora_linear(*args), y, torch.float32)
        back = ([torch.ones_like(y[0])], made["x"], made["w"], made["a"], made["b"], seed, ps, [1.0], 1,
                True, [True], [True], [True])  # fmt: skip
        same(t_lora.lora_linear_backward(*back), reference.lora_linear_backward(*back), torch.float32, 1100)


def test_configurations_are_chosen_by_shape_and_tuned_on_request():
    device = torch.device(DEVICE)
    wide, narrow = (tiles.configure(T, 768, 768, 2, device) for T in (65536, 64))
    assert wide.rows * wide.cols > narrow.rows * narrow.cols
    costs = iter(range(len(tiles.candidates(device)), 0, -1))
    try:
        times = tiles.tune(lambda: None, 64, 768, 768, 2, device, bench=lambda run: next(costs))
        best = min(times, key=lambda c: times[c])
        assert best == tiles.candidates(device)[-1]
        assert tiles.configure(64, 768, 768, 2, device) == best
        assert tiles.configure(64, 768, 768, 4, device).rows <= 64, "a tile of 16 bits has no room for float32"
        with pytest.raises(RuntimeError, match="out of resource"):
            tiles.tune(lambda: None, 64, 768, 768, 2, device, bench=_fails)
        assert tiles.configure(64, 768, 768, 2, device) == best, "what was tuned before stays"
        with pytest.raises(RuntimeError):
            tiles.tune(lambda: None, 32, 768, 768, 2, device, bench=_fails)
        wide_steps = tiles.tune(lambda: None, 64, 768, 768, 4, device, bench=lambda run: 1.0)
        assert list(tiles.TUNED) == [(768, 768, 64, size, tiles.arch(device)) for size in (2, 4)]
        assert all(config.rows <= 64 and config.depth <= 32 for config in wide_steps)
    finally:
        tiles.TUNED.clear()


def _fails(run):
    raise RuntimeError("out of resource: shared memory")


def test_other_dtypes_are_refused():
    x = torch.zeros(4, 8, device=DEVICE, dtype=torch.float64)
    with pytest.raises(TypeError, match="x is torch.float64; accepted are float16, bfloat16, float32"):
        t_column_sum.column_sum(x, 1)
    assert common.threshold(0.5) == 2**31
