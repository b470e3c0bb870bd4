"""lora_linear beside PEFT's own LoRA layer: no less exact, the same under autocast."""

from __future__ import annotations

import importlib
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from petune_kernels import matmul, meta, reference
from petune_kernels.ops.lora_linear import Projection, lora_linear, project

from .test_lora_linear import DTYPES, error

lora_module: Any = importlib.import_module("petune_kernels.ops.lora_linear")


def peft_layer(K, N, r, p, dtype, adapter, lora_bias):
    base = nn.Linear(K, N).to(dtype)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, lora_bias=lora_bias, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    for m in (layer.lora_A, layer.lora_B):
        m.to(adapter)
    nn.init.normal_(layer.lora_B["default"].weight, std=r**-0.5)
    if lora_bias:
        nn.init.normal_(layer.lora_B["default"].bias)
    layer.base_layer.bias.requires_grad_(True)
    return layer


def of_peft(layer):
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    return {
        "w": layer.base_layer.weight, "bias": layer.base_layer.bias, "a": A.weight, "b": B.weight, "bias_b": B.bias,
        "scale": layer.scaling["default"],
    }  # fmt: skip


class OurMask(nn.Module):
    """nn.Dropout with our mask in place of torch's."""

    def __init__(self, seed, p):
        super().__init__()
        self.seed, self.p = seed, p

    def forward(self, x):
        return torch.where(reference.keep_mask(self.seed, self.p, x.numel()).reshape(x.shape), x / (1 - self.p), 0)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_no_less_exact_than_peft(dtypes, lora_bias, p):
    """Error against float64 at most 1.1 times that of PEFT's own module, output and every gradient.

    In float32 both err by the order in which a matmul sums, a fraction of 6e-8, so the ratio itself means nothing.
    """
    dtype, adapter = dtypes
    T, K, N, r = 512, 192, 160, 8
    layer = peft_layer(K, N, r, 0.0, dtype, adapter, lora_bias)
    seed = [torch.tensor([11])] if p else None
    if p:
        layer.lora_dropout["default"] = OurMask(seed[0], p)
    x, dy = torch.randn(T, K).to(dtype), torch.randn(T, N).to(dtype)

    def gradients(run, x, *parameters):
        x = x.clone().requires_grad_(True)
        y = run(x)
        return [y, *torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))]

    args = of_peft(layer)
    tensors = {k: v for k, v in args.items() if isinstance(v, torch.Tensor)}
    trained = [v for v in tensors.values() if v.requires_grad]
    assert len(trained) == 3 + lora_bias
    theirs = gradients(layer, x, *trained)
    ours = gradients(lambda v: lora_linear(v, **args, p=p, seed=seed), x, *trained)
    wide = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in tensors.items()}
    run = lambda v: lora_linear(v, **wide, scale=args["scale"], p=p, seed=seed)  # noqa: E731
    exact = gradients(run, x.double(), *(v for v in wide.values() if v.requires_grad))
    for got, eager, want in zip(ours, theirs, exact, strict=True):
        floor = 5e-8 if got.dtype == torch.float32 else 0.0
        assert error(got, want) <= 1.1 * error(eager, want) + floor


def test_autocast_matches_peft_under_autocast():
    layer = peft_layer(32, 24, 4, 0.0, torch.float32, torch.float32, False)
    x, results = torch.randn(2, 8, 32), []
    for run in (layer, lambda v: lora_linear(v, **of_peft(layer))):
        v = x.clone().requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(v)
        assert y.dtype == torch.bfloat16
        parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [v, *parameters])])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert error(got, want.double()) < 2e-2


_ONE_DROPOUT = {"bernoulli_", "div_"}  # with a mul that stays: one launch on CUDA


class Launches(TorchDispatchMode):
    """How many launches on CUDA the calls within it stand for: every op but views and allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not (view or "empty" in name or name in _ONE_DROPOUT)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_no_more_launches_than_peft(dtypes, p):
    """On CUDA at a paper's batch, 16 x 128 of width 768, a step waits for them."""
    T, K, N, r = 2048, 768, 768, 8
    layer = peft_layer(K, N, r, p, *dtypes, False).to("meta").train()
    layer.base_layer.requires_grad_(False)
    x = torch.empty(T, K, dtype=dtypes[0], device="meta", requires_grad=True)
    with Launches() as theirs:
        y = layer(x)
        y.backward(torch.empty_like(y))
    it = of_peft(layer)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if p else None
    rest = [it["w"]], [it["a"].detach()], [it["b"].detach()], [seed], (p,), (2.0,)
    with meta.standing_for("cuda"), Launches() as ours, torch.no_grad():
        w, a, b, seeds, ps, scales = rest
        (y,) = matmul.lora_linear(x.detach(), w, [it["bias"]], a, b, [None], seeds, ps, scales, False)
        wants = 1, True, [True], [True], [False]
        matmul.lora_linear_backward([torch.empty_like(y)], x.detach(), *rest, *wants)
    drawn = 1 if p else 0  # the seed
    assert 8 < ours.count + drawn <= theirs.count


@pytest.mark.parametrize("lora_bias", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_row_of_a_model_that_generates_takes_torchs_ops(
    dtype: torch.dtype, lora_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what they give is the op's; with gradients, dropout or many rows it is the op."""
    layer = peft_layer(24, 40, 3, 0.0, dtype, dtype, lora_bias)
    one, x = Projection(**of_peft(layer)), torch.randn(1, 2, 24, dtype=dtype)
    with torch.no_grad():
        op, theirs = lora_linear(x, **of_peft(layer)), layer(x)
    calls: list[int] = []
    run = lora_module._run
    monkeypatch.setattr(lora_module, "_run", lambda x, *args: calls.append(x.numel()) or run(x, *args))
    with torch.no_grad():
        (ours,) = project(x, [one])
        assert not calls
        project(x, [one._replace(p=0.5)])
        project(x.expand(20_000, 2, 24).contiguous(), [one])
    project(x, [one])
    assert calls == [48, 48 * 20_000, 48]
    for other in (op, theirs):
        torch.testing.assert_close(ours, other, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
