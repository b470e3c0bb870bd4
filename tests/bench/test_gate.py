"""The gate: what is right passes, and one wrong block does not, however large the tensor around it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from bench import gate

UNIT = torch.finfo(torch.bfloat16).eps


def verdict(found: Tensor, exact: Tensor, eager: Tensor | None = None) -> str:
    eager = exact.bfloat16().double() if eager is None else eager
    fact, wrong = gate.compare({"y": found}, {"y": eager}, {"y": exact}, {"y": exact}, torch.bfloat16, {"p": 0.0})
    json.dumps(fact, allow_nan=False)
    assert fact["compared"] == 1 and fact["p"] == 0.0
    return wrong


def whole(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [(16384, 64), (2, 3, 100, 64), (1, 70), (777,), (130, 8), (65, 65), ()], ids=str)
def test_rounding_passes(shape: tuple[int, ...]) -> None:
    exact = torch.randn(shape, dtype=torch.float64)
    assert verdict(exact.bfloat16().double(), exact) == ""


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((65536, 8), (slice(-8, None),)),  # a tail that nobody wrote
        ((65536, 8), (slice(640, 648),)),
        ((8192, 512), (slice(64, 128), slice(-8, None))),
        ((4100,), (slice(-4, None),)),
        ((64, 8192), (slice(None), slice(-1, None))),
    ],
    ids=["tail", "block", "tile", "vector", "column"],
)
def test_a_block_of_zeros_does_not(shape: tuple[int, ...], block: tuple[slice, ...]) -> None:
    exact = torch.randn(shape, dtype=torch.float64)
    found = exact.bfloat16().double()
    found[block] = 0.0
    assert whole(found, exact) <= UNIT + 3 * whole(exact.bfloat16().double(), exact)  # as a whole it would pass
    assert verdict(found, exact).startswith("wrong: a tile of y is ")


def test_an_error_of_four_units_is_wrong_and_one_of_half_a_unit_is_not() -> None:
    exact = torch.randn(200, 64, dtype=torch.float64)
    assert verdict(exact * (1 + UNIT / 2), exact, eager=exact) == ""
    assert "wrong: " in verdict(exact * (1 + 4 * UNIT), exact, eager=exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong_whosever_it_is(value: float) -> None:
    exact = torch.randn(10, 10, dtype=torch.float64)
    broken = exact.clone()
    broken[3, 3] = value
    assert "wrong" in verdict(broken, exact) and "wrong" in verdict(exact, exact, eager=broken)


def test_a_gradient_that_is_nothing_but_rounding_is_taken_relative_to_the_others() -> None:
    exact = {
        "gradient of w": torch.randn(64, 64, dtype=torch.float64),
        "gradient of key.bias": torch.zeros(64).double(),
        "output 0": 1e6 * torch.randn(64, 64, dtype=torch.float64),  # which says nothing of gradients
    }
    ours, eager = ({name: value + 1e-8 * torch.randn_like(value) for name, value in exact.items()} for _ in range(2))
    assert gate.compare(ours, eager, exact, exact, torch.float32, {})[1] == ""
    wrong = ours | {"gradient of key.bias": torch.full([64], 1e-6).double()}
    assert "key.bias" in gate.compare(wrong, eager, exact, exact, torch.float32, {})[1]


def test_projections_are_the_same_for_everybody_and_exact_in_every_dtype() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    dys = gate.projections((x, x[:, :4]))
    assert [dy.shape for dy in dys] == [(8, 16), (8, 4)] and torch.equal(dys[0], gate.projections(x)[0])
    found = gate.gradients((x * 2, x[:, :4]), {"x": x}, dys)
    want = 2 * dys[0].double()
    want[:, :4] += dys[1].double()
    assert torch.allclose(found["gradient of x"], want) and set(found) == {"output 0", "output 1", "gradient of x"}
