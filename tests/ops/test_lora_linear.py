"""lora_linear against float64, against PEFT's own module, and against bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

import petune_kernels as pk
from petune_kernels import matmul, reference
from petune_kernels.ops.lora_linear import MERGE_ROWS, choose_path, lora_linear
from petune_kernels.schema import SCHEMAS

SHAPES = [(1, 8, 4, 1), (6, 10, 7, 3), (66, 40, 24, 8), (300, 64, 96, 32)]  # T, K, N, r
DTYPES = [  # x and W, adapters
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
NAMES = ("x", "bias", "a", "b", "bias_b")


def problem(T, K, N, r, dtype, adapter, G=1, n=1, update=1.0):
    """Random arguments of n projections; `update` is the size of the low-rank term beside x W^T."""
    lead = () if G == 1 else (G,)
    made = {
        "x": torch.randn(T, K).to(dtype),
        "w": [(torch.randn(N + i, K) / K**0.5).to(dtype) for i in range(n)],
        "bias": [torch.randn(*lead, N + i).to(dtype) for i in range(n)],
        "a": [(torch.randn(*lead, r, K) / K**0.5).to(adapter) for _ in range(n)],
        "b": [(update * torch.randn(*lead, N + i, r) / r**0.5).to(adapter) for i in range(n)],
        "bias_b": [torch.randn(*lead, N + i).to(adapter) for i in range(n)],
    }
    return made


def leaves(made, wide=False):
    def one(t):
        return (t.double() if wide else t.clone()).requires_grad_(True)

    return {k: one(v) if isinstance(v, torch.Tensor) else [one(t) for t in v] for k, v in made.items()}


def expected(leaf, seed, p, scale):
    """The formula in float64 with autograd, one projection; x, w, .. as leaves."""
    x = leaf["x"]
    T = x.shape[0]
    G = 1 if leaf["a"][0].dim() == 2 else leaf["a"][0].shape[0]
    ys = []
    for i, w in enumerate(leaf["w"]):
        dropped = x
        if seed is not None:
            keep = reference.keep_mask(seed[i], p, x.numel() // seed[i].numel()).reshape(x.shape)
            dropped = x * keep / (1 - p)
        xa = dropped.reshape(G, T // G, -1) @ leaf["a"][i].reshape(G, -1, x.shape[1]).mT
        update = xa @ leaf["b"][i].reshape(G, w.shape[0], -1).mT + leaf["bias_b"][i].reshape(G, 1, -1)
        base = (x @ w.T).reshape(G, T // G, -1) + leaf["bias"][i].reshape(-1, 1, w.shape[0])
        ys.append((base + scale * update).reshape(T, -1))
    return ys


def error(got, want):
    """RMS of the difference over the RMS of the value."""
    return ((got.double() - want).square().mean() / want.square().mean().clamp_min(1e-30)).sqrt().item()


def tolerance(dtype, terms=1):
    """Relative RMS error: a few roundings of the dtype; a float32 sum of `terms` grows with its square root."""
    return {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype] * max(1.0, terms**0.5 / 8)


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtypes, p, G):
    T, K, N, r = shape
    T *= G if T % G else 1
    made = problem(T, K, N, r, *dtypes, G=G, n=2)
    seed = [torch.randint(2**62, (G,)) for _ in range(2)] if p else None
    leaf, wide = leaves(made), leaves(made, wide=True)
    y = lora_linear(**leaf, p=p, scale=0.5, seed=seed)
    want = expected(wide, seed, p, 0.5)
    dy = [torch.randn_like(t) for t in y]
    torch.autograd.backward(list(y), dy)
    torch.autograd.backward(want, [d.double() for d in dy])
    for i in range(2):
        assert y[i].dtype == dtypes[0]
        assert error(y[i], want[i]) < tolerance(dtypes[0])
        for name in ("w", "bias", "a", "b", "bias_b"):
            got = leaf[name][i]
            assert got.grad.dtype == got.dtype
            assert error(got.grad, wide[name][i].grad) < tolerance(got.dtype, T), name
    assert error(leaf["x"].grad, wide["x"].grad) < tolerance(dtypes[0])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)), ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradient_subsets(wanted, p):
    """Each gradient only if asked for, and the same whatever else is asked for."""
    made = problem(6, 8, 5, 2, torch.float32, torch.float32)
    seed = [torch.tensor([7])]
    full = leaves(made)
    lora_linear(**full, p=p, scale=2.0, seed=seed)[0].square().sum().backward()
    some = leaves(made)
    some["w"][0].requires_grad_(False)
    for name, want in zip(NAMES, wanted, strict=True):
        (some[name] if name == "x" else some[name][0]).requires_grad_(want)
    y = lora_linear(**some, p=p, scale=2.0, seed=seed)[0]
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.square().sum().backward()
    for name, want in zip(NAMES, wanted, strict=True):
        got, ref = (some[name], full[name]) if name == "x" else (some[name][0], full[name][0])
        if want:
            torch.testing.assert_close(got.grad, ref.grad)
        else:
            assert got.grad is None


def test_nothing_is_computed_unasked(monkeypatch):
    """With only the bias training, backward is a column sum: no matmul."""
    made = problem(6, 8, 5, 2, torch.float32, torch.float32)
    made["bias"][0].requires_grad_(True)
    y = lora_linear(**made)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.sum().backward()
    ran = {e.key for e in profile.key_averages()}
    assert not ran & {"aten::mm", "aten::addmm", "aten::addmm_", "aten::matmul", "aten::linear"}, ran
    torch.testing.assert_close(made["bias"][0].grad, torch.full((5,), 6.0))


def saved_bytes(run):
    """Bytes that the graph of run()'s result keeps, by storage, without parameters and without x."""
    kept, parameters, x = {}, set(), set()

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(parameters, x)
    return sum(n for ptr, n in kept.items() if ptr not in parameters | x), any(ptr in kept for ptr in x), out


@pytest.mark.parametrize("frozen", ["", "a", "b", "both"])
def test_saves_x_and_the_seed_only(frozen):
    T, K, N, r = 64, 32, 48, 4
    made = problem(T, K, N, r, torch.bfloat16, torch.float32, n=2)
    made["x"].requires_grad_(True)
    for name in ("a", "b"):
        for t in made[name]:
            t.requires_grad_(frozen not in (name, "both"))

    def run(parameters, x):
        x.add(made["x"].untyped_storage().data_ptr())
        for name in ("w", "bias", "a", "b", "bias_b"):
            parameters.update(t.untyped_storage().data_ptr() for t in made[name])
        return lora_linear(**made, p=0.1)

    extra, x_kept, _ = saved_bytes(run)
    assert x_kept == (frozen != "both")
    assert extra == 2 * 8


def test_masks_are_drawn_per_projection_and_follow_manual_seed():
    made = problem(32, 16, 8, 4, torch.float32, torch.float32)
    twice = {k: v if k == "x" else [v[0], v[0].clone()] for k, v in made.items()}
    first = lora_linear(**twice, p=0.5)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(3)
    again = lora_linear(**twice, p=0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(lora_linear(**twice, p=0.5), again, rtol=0, atol=0)


def test_checkpoint_gives_the_same_gradients():
    made = leaves(problem(32, 16, 8, 4, torch.float32, torch.float32))
    grads = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        run = lambda x: lora_linear(**{**made, "x": x}, p=0.5)[0]  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(run, made["x"], use_reentrant=False) if checkpoint else run(made["x"])
        grads.append(torch.autograd.grad(y.square().sum(), [made["x"], made["a"][0]]))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_a_group_may_hold_plain_projections_and_unused_outputs():
    made = problem(6, 8, 5, 2, torch.float32, torch.float32, n=3)
    for name in ("a", "b", "bias_b"):
        made[name][1] = None
    for t in (made["x"], *made["bias"], made["a"][0], made["a"][2], made["b"][0], made["b"][2]):
        t.requires_grad_(True)
    y = lora_linear(**made)
    torch.testing.assert_close(y[1], torch.nn.functional.linear(made["x"], made["w"][1], made["bias"][1]))
    y[0].sum().backward()  # projections 1 and 2 get no gradient
    assert made["a"][0].grad.abs().sum() > 0
    assert not made["a"][2].grad.any() and not made["bias"][1].grad.any()
    torch.testing.assert_close(
        made["x"].grad, (made["w"][0].sum(0) + made["b"][0].sum(0) @ made["a"][0]).expand(6, -1).detach()
    )


@pytest.mark.parametrize("dtype, adapter", DTYPES[:3], ids=str)
def test_merged_path(dtype, adapter):
    made = problem(66, 40, 24, 8, dtype, adapter)
    grads, ys = [], []
    for path in ("adapter", "merged"):
        leaf = leaves(made)
        y = lora_linear(**leaf, path=path, scale=0.5)[0]
        y.backward(torch.ones_like(y))
        ys.append(y)
        grads.append([leaf["x"].grad, *(leaf[n][0].grad for n in ("a", "b", "bias", "bias_b"))])
    for one, two in zip([ys[0], *grads[0]], [ys[1], *grads[1]], strict=True):
        assert error(one, two.double()) < tolerance(dtype, 66)


def test_the_choice_of_path(monkeypatch):
    x = torch.zeros(1, 8)
    assert not choose_path("auto", x, 10**6, 1, [0.0]), "merged nowhere yet"
    monkeypatch.setitem(MERGE_ROWS, "cpu", 2.0)
    assert choose_path("auto", x, 16, 1, [0.0]) and not choose_path("auto", x, 15, 1, [0.0])
    assert not choose_path("auto", x, 10**6, 1, [0.1]), "dropout cannot be merged"
    assert not choose_path("auto", x, 10**6, 3, [0.0]), "replicas cannot share one merged weight"
    assert not choose_path("auto", x.bfloat16(), 10**6, 1, [0.0]), "a small update would round away"
    assert choose_path("merged", x.bfloat16(), 1, 1, [0.0])
    with pytest.raises(ValueError, match="path 'merged' needs p = 0"):
        choose_path("merged", x, 1, 1, [0.1])
    with pytest.raises(ValueError, match="accepted are auto, adapter, merged"):
        choose_path("fast", x, 1, 1, [0.0])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("G", [1, 2])
def test_gradcheck(p, G):
    leaf = leaves(problem(4, 5, 3, 2, torch.float64, torch.float64, G=G, n=2))
    names = ("x", "w", "bias", "a", "b", "bias_b")
    seed = [torch.tensor([5]), torch.tensor([6])] if p else None

    def run(x, *rest):
        return lora_linear(x, *(rest[2 * i : 2 * i + 2] for i in range(4)), bias_b=rest[8:], p=p, scale=0.7, seed=seed)

    flat = [leaf["x"], *(t for n in names[1:] for t in leaf[n])]
    assert torch.autograd.gradcheck(run, flat)


def test_double_backward_is_refused():
    leaf = leaves(problem(4, 5, 3, 2, torch.float32, torch.float32))
    with pytest.raises(RuntimeError, match="create_graph=True, and this op has no second derivative"):
        torch.autograd.grad(lora_linear(**leaf)[0].square().sum(), leaf["x"], create_graph=True)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merged, G", [(False, 1), (False, 2), (True, 1)])
def test_opcheck(merged, G, adapter):
    made = problem(6, 8, 5, 2, torch.bfloat16, adapter, G=G, n=2)
    made["a"][1] = made["b"][1] = made["bias_b"][1] = None
    seed = [None if merged else torch.tensor([3]), None]
    p, scale = [0.0 if merged else 0.5, 0.0], [2.0, 1.0]
    args = (*(made[k] for k in ("x", "w", "bias", "a", "b", "bias_b")), seed, p, scale, merged)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.petune.lora_linear.default, args, test_utils=tests)
    y = torch.ops.petune.lora_linear(*args)
    torch.library.opcheck(
        torch.ops.petune.lora_linear_backward.default,
        ([torch.ones_like(t) for t in y], made["x"], made["w"], made["a"], made["b"], seed, p, scale, G,
         True, [True, False], [True, False], [True, True]),
        test_utils=tests,
    )  # fmt: skip


@pytest.mark.parametrize("op", [op for op in SCHEMAS if op.startswith(("lora", "packed"))])
def test_matmul_kernels_serve_the_ops(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"petune::{op}", "CPU")
    assert hasattr(matmul, op)


@pytest.mark.parametrize("mode", ["plain", "autocast"])
def test_fullgraph_compile(mode):
    made = problem(6, 8, 5, 2, torch.float32, torch.float32, n=2)
    seed = [torch.tensor([3]), torch.tensor([4])]

    def run(x, w, bias, a, b, bias_b):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            return lora_linear(x, w, bias, a, b, bias_b=bias_b, p=0.25, scale=2.0, seed=seed)

    results = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = leaves(made)
        y = f(*(leaf[k] for k in ("x", "w", "bias", "a", "b", "bias_b")))
        sum(t.float().square().sum() for t in y).backward()
        results.append([*y, leaf["x"].grad, *(leaf[n][0].grad for n in ("w", "bias", "a", "b", "bias_b"))])
    assert results[0][0].dtype == (torch.bfloat16 if mode == "autocast" else torch.float32)
    torch.testing.assert_close(results[1], results[0])


def test_compile_draws_fresh_masks():
    made = problem(32, 16, 8, 4, torch.float32, torch.float32)
    f = torch.compile(lambda x: lora_linear(**{**made, "x": x}, p=0.5)[0], fullgraph=True, backend="aot_eager")
    assert not torch.equal(f(made["x"]), f(made["x"]))


def test_rows_of_any_shape():
    made = problem(24, 10, 7, 3, torch.float32, torch.float32)
    flat = lora_linear(**made)[0]
    x = made["x"].reshape(2, 3, 4, 10).transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    torch.testing.assert_close(lora_linear(**{**made, "x": x})[0], flat.reshape(2, 3, 4, 7))
    leaf = leaves({**made, "x": made["x"][:0]})
    y = lora_linear(**leaf, p=0.5)[0]
    y.sum().backward()
    assert y.shape == (0, 7) and not leaf["a"][0].grad.any() and not leaf["bias"][0].grad.any()


def test_same_result_twice():
    made = problem(300, 64, 96, 16, torch.bfloat16, torch.float32)
    runs = []
    for _ in range(2):
        leaf = leaves(made)
        y = lora_linear(**leaf, p=0.3, seed=[torch.tensor([9])])[0]
        y.float().square().sum().backward()
        runs.append([y, leaf["x"].grad, leaf["a"][0].grad, leaf["b"][0].grad, leaf["bias"][0].grad])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_backend_reference_agrees():
    made = leaves(problem(12, 8, 6, 2, torch.float32, torch.float32, G=3))
    results = []
    for name in ("cpu", "reference"):
        with pk.backend(name):
            y = lora_linear(**made, p=0.5, seed=[torch.tensor([1, 2, 3])])[0]
            results.append([y, *torch.autograd.grad(y.square().sum(), [made["x"], made["a"][0], made["b"][0]])])
    torch.testing.assert_close(*results)


BAD = [
    ({"x": torch.zeros(4, 9)}, ValueError, r"w\[0\] has shape \(5, 8\)"),
    ({"x": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "x is torch.int64"),
    ({"w": []}, ValueError, "w is empty"),
    ({"w": [torch.zeros(5, 8).half()]}, TypeError, r"w\[0\] is torch.float16, x is torch.float32"),
    ({"w": [torch.zeros(5, 8, device="meta")]}, ValueError, r"w\[0\] is on meta"),
    ({"bias": [torch.zeros(6)]}, ValueError, r"bias\[0\] has shape \(6,\)"),
    ({"bias": [torch.zeros(5).double()]}, TypeError, r"bias\[0\] is torch.float64"),
    ({"bias": [torch.zeros(2, 5)]}, ValueError, r"a\[0\] has shape \(2, 8\); another parameter has 2 replicas"),
    ({"bias": [torch.zeros(3, 5)]}, ValueError, "3 replicas, which does not divide the 4 rows"),
    ({"a": [torch.zeros(0, 8)], "b": [torch.zeros(5, 0)]}, ValueError, "r and G of at least 1"),
    ({"a": [torch.zeros(2, 7)]}, ValueError, r"a\[0\] has shape \(2, 7\)"),
    ({"b": [torch.zeros(5, 3)]}, ValueError, r"b\[0\] has shape \(5, 3\)"),
    ({"b": [torch.zeros(5, 2).bfloat16()]}, TypeError, r"b\[0\] is torch.bfloat16"),
    ({"b": None}, ValueError, r"a\[0\] is given without"),
    ({"a": [torch.zeros(3, 2, 8)], "b": [torch.zeros(3, 5, 2)], "bias_b": None}, ValueError, r"a\[0\] has 3 replicas"),
    ({"bias_b": [torch.zeros(4)]}, ValueError, r"bias_b\[0\] has shape \(4,\)"),
    ({"bias_b": [torch.zeros(5), torch.zeros(5)]}, ValueError, "bias_b has 2 entries for 1 projections"),
    ({"p": 1.0}, ValueError, "p is 1.0"),
    ({"p": -0.1}, ValueError, "p is -0.1"),
    ({"p": [0.1, 0.2]}, ValueError, "p has 2 entries for 1 projections"),
    ({"seed": [torch.tensor([1.0])], "p": 0.5}, TypeError, "seed is"),
    ({"seed": [torch.tensor([1, 2, 3])], "p": 0.5}, ValueError, "seed has 3 elements"),
    ({"path": "best"}, ValueError, "path is 'best'"),
]


@pytest.mark.parametrize("change, kind, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, kind, message):
    made = problem(4, 8, 5, 2, torch.float32, torch.float32)
    lora_linear(**made)
    with pytest.raises(kind, match=message):
        lora_linear(**{**made, **change})
