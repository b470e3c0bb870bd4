"""What a model's ordinary call skips: the checks one by one, which must have nothing to say of it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels import meta
from petune_kernels.ops import _checks as check
from petune_kernels.ops import _saving as saving
from petune_kernels.ops.bias_act import bias_act
from petune_kernels.ops.frozen_linear import faster, frozen_linear
from petune_kernels.ops.lora_linear import Projection, _replicas, are_rows, lora_linear, project, usual
from petune_kernels.ops.residual_norm import residual_norm
from petune_kernels.patch import linear, shared_input

GPU = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def some(rng: random.Random, *shape: int, likely: torch.dtype = torch.float32) -> torch.Tensor | None:
    """A tensor that is nearly always of this shape and dtype, dense, on the CPU."""
    kind = rng.randrange(24)
    if kind == 0:
        return None
    if kind == 1:
        shape = (*shape[:-1], shape[-1] + 1)
    if kind == 2:
        shape = (3, *shape)
    if kind == 3:
        shape = (*shape[:-1], 0)
    t = torch.zeros(shape, dtype=rng.choice(DTYPES) if kind == 4 else likely, device="meta" if kind == 5 else "cpu")
    return t.mT if kind == 6 and t.dim() > 1 else t


def test_row_ops() -> None:
    rng, seen = random.Random(0), {True: 0, False: 0}
    for _ in range(4000):
        x, alike = some(rng, 2, 3, 4), some(rng, 2, 3, 4)
        small = [some(rng, 4) for _ in range(2)]
        quick = check.usual(x, (alike,), tuple(small))  # type: ignore[arg-type]
        seen[quick] += 1
        if quick:
            check.floating("op", x=x, alike=alike, a=small[0], b=small[1])
            check.same_device("op", x, alike=alike, a=small[0], b=small[1])
            T, H = check.rows("op", "x", x)
            check.same_shape("op", x, alike=alike)
            assert check.small("op", T, H, a=small[0], b=small[1]) == 1
            kept = check.per_replica(1, *check.one_dtype(x, *small))
            assert all(a is b for a, b in zip(kept, small, strict=True)) and check.dense(x) is x
            assert check.dense(alike) is alike and (alike is None or alike.dtype == x.dtype)
    assert min(seen.values()) > 500


def test_projections() -> None:
    rng, seen = random.Random(0), {True: 0, False: 0}
    for _ in range(8000):
        x, factor = some(rng, 3, 4), rng.choice((torch.float32, torch.bfloat16))
        rows = torch.float32 if x is None else x.dtype
        it = Projection(
            some(rng, 5, 4, likely=rows), some(rng, 5, likely=rows),  # type: ignore[arg-type]
            *(some(rng, *shape, likely=factor) for shape in ((2, 4), (5, 2), (5,))),
        )  # fmt: skip
        quick = are_rows(x) and usual(x, it)
        seen[quick] += 1
        if quick:
            assert _replicas("op", x, [it], autocast=False) == 1 and it.takes(x)
    assert min(seen.values()) > 500


@pytest.mark.parametrize("backend", ("reference", "cpu", *(pytest.param(b, marks=pytest.mark.gpu) for b in GPU)))
@pytest.mark.parametrize("shape", ((8,), (3, 8), (2, 3, 8), (2, 1, 3, 8)), ids=str)
def test_results_have_their_inputs_shape_and_may_be_changed(shape: tuple[int, ...], backend: str) -> None:
    if pk.backends.MISSING.get(backend):
        pytest.skip(pk.backends.MISSING[backend])
    device = "cuda" if backend in GPU else "cpu"
    x, residual, vector, a, b = (
        torch.randn(s, device=device, requires_grad=True) for s in (shape, shape, (8,), (2, 8), (8, 2))
    )
    w = torch.randn(8, 8, device=device)
    runs = {
        "norm": lambda: residual_norm(x, vector, vector),
        "tail": lambda: residual_norm(x, vector, vector, bias=vector, residual=residual, p=0.5),
        "z": lambda: residual_norm(x, vector, residual=residual, rms=True, return_z=True)[0],
        "act": lambda: bias_act(x, vector),
        "gated": lambda: bias_act(x, None, "silu", residual),
        "linear": lambda: frozen_linear(x, w, vector),
        "lora": lambda: lora_linear(x, w, None, a, b),
    }
    if backend == "triton":
        del runs["act"], runs["gated"], runs["linear"]  # which it has no kernel for
    with pk.backend(backend):
        for name, run in runs.items():
            (grad,) = torch.autograd.grad(run().sum(), x)
            y = run()
            assert y.shape == x.shape, name
            (changed,) = torch.autograd.grad(y.mul_(2.0).sum(), x)
            if name != "tail":  # another mask
                torch.testing.assert_close(changed, 2.0 * grad, msg=name)


def test_small_frozen_projections_are_torchs_own() -> None:
    """Below the size from which the op pays for its call; above it, in float32 on a CPU, it is the op."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(512, 512), nn.Linear(512, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(x)

    model = Pair().requires_grad_(False)
    group = pk.patch(model)
    assert group.patched
    for rows in (4, 64):
        x = torch.randn(rows, 512, requires_grad=True)
        y = model(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, (model.q.weight + model.k.weight).sum(0).expand(rows, -1))
        nodes, waiting = set(), [y.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting += [following for following, _ in node.next_functions]
        assert any("PackedLinear" in type(n).__name__ or "LoraLinear" in type(n).__name__ for n in nodes) == faster(
            x, model.q.weight
        )
    assert not faster(torch.empty(4, 512), model.q.weight)


def test_torchs_own_linear_takes_any_dtype_under_autocast() -> None:
    x, layer = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True), nn.Linear(8, 8).requires_grad_(False)
    assert "PackedLinear" in type(linear.run(layer.weight.to(x.dtype), layer.bias, x).grad_fn).__name__
    with torch.autocast("cpu", torch.bfloat16):
        assert "PackedLinear" not in type(linear.run(layer.weight, layer.bias, x).grad_fn).__name__


def test_float64_stays_float64_under_autocast() -> None:
    x, w = torch.randn(2, 8).double(), torch.randn(8, 8).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear(x, w).dtype == nn.functional.linear(x, w).dtype == torch.float64
        assert not Projection(w).takes(x.float())


def test_other_devices_take_torchs_own_linear() -> None:
    with meta.standing_for("mps"):
        assert not faster(torch.empty(64, 512, device="meta"), torch.empty(512, 512, device="meta"))


def test_a_projection_called_alone_is_alone() -> None:
    layers = nn.Linear(8, 8), nn.Linear(8, 8)
    y = shared_input._forward(layers[1], shared_input.Group(layers), torch.randn(2, 8))
    assert "LoraLinear" not in type(y.grad_fn).__name__


@pytest.mark.parametrize("p", (-0.5, 1.5))
def test_a_probability_is_one(p: float) -> None:
    it = Projection(torch.zeros(5, 4), None, torch.zeros(2, 4), torch.zeros(5, 2), p=p)
    with pytest.raises(ValueError, match="p is"):
        project(torch.zeros(3, 4), [it])


def test_a_recipe_gives_the_shape_that_was() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    for y in (residual_norm(x, torch.ones(8)), bias_act(x)):
        made = saving.known(y)
        assert isinstance(made, saving.Recipe)
        torch.testing.assert_close(made.again(made.leaves()), y.detach())
        part = saving.known(y[1])
        assert isinstance(part, saving.Recipe)
        torch.testing.assert_close(part.again(part.leaves()), y[1].detach())
