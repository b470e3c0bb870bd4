"""The peers, none of which runs here: their calls over stand-ins with their signatures, and what is said of no peer."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness, op_runs, ops

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CASES = {f"{case.op} {case.use}": case for case in ops.CASES}
NAMES = {"LowMemoryBP": "lomem", "unsloth": "unsloth", "lorafusion": "lorafusion"}
SERVED = [(peer, name) for peer in NAMES for name, case in CASES.items() if peer in case.peers]


class Overwriting(torch.autograd.Function):
    """A norm whose backward writes dx over dy and gives its vectors no gradient, as Unsloth's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return Overwriting.normed(x, weight, bias, eps)

    @staticmethod
    def normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if bias is None:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(Overwriting.normed(x, *rest, ctx.eps), x, dy)
        return dy.copy_(dx), None, None, None


class Stepped(torch.autograd.Function):
    """An activation whose derivative is taken for a step, as LowMemoryBP's."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, act: Any) -> Tensor:
        ctx.save_for_backward(u > 0)
        return act(u)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        return dh * ctx.saved_tensors[0], None


class LoRA_W:
    @staticmethod
    def apply(X: Tensor, W: Tensor, W_quant: None, A: Tensor, B: Tensor, S: float) -> Tensor:
        assert X.dim() == 3 and W_quant is None
        return F.linear(X, W) + S * F.linear(F.linear(X, A.to(X.dtype)), B.to(X.dtype))


def fast_layernorm(layernorm: Any, X: Tensor) -> Tensor:
    assert layernorm.elementwise_affine is True
    return Overwriting.apply(X, layernorm.weight, layernorm.bias, layernorm.eps)


def fast_rms_layernorm(layernorm: Any, X: Tensor, gemma: bool = False) -> Tensor:
    return Overwriting.apply(X, layernorm.weight, None, layernorm.eps)


def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None) -> Tensor:
    assert x.dim() == 3 and dropout_p == 0 and lora_a.shape[0] >= 16
    return F.linear(x, linear_w, linear_bias) + alpha * F.linear(F.linear(x, lora_a), lora_b)


MODULES = {
    "lomem.functional": SimpleNamespace(
        layer_norm=lambda input, normalized_shape, eps: F.layer_norm(input, normalized_shape, eps=eps),
        rms_norm=lambda input, normalized_shape, eps: F.rms_norm(input, normalized_shape, eps=eps),
        regelu2=lambda input: Stepped.apply(input, F.gelu),
        resilu2=lambda input: Stepped.apply(input, F.silu),
    ),
    "unsloth.kernels": SimpleNamespace(fast_layernorm=fast_layernorm, fast_rms_layernorm=fast_rms_layernorm),
    "unsloth.kernels.fast_lora": SimpleNamespace(LoRA_W=LoRA_W),
    "lorafusion.ops.lora_v1": SimpleNamespace(fused_linear_lora=fused_linear_lora),
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in MODULES:
        parts = path.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[0]))
    for path, holds in MODULES.items():
        module = ModuleType(path)
        module.__dict__.update(vars(holds))
        monkeypatch.setitem(sys.modules, path, module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("peer", "name"), SERVED)
def test_a_peer_is_called_as_its_package_asks(peer: str, name: str, dtype: torch.dtype, stand_ins: None) -> None:
    case, letters = CASES[name], ops.sizes(2, 8, 64, dtype)
    row = harness.new_row({})
    found = op_runs.providers(case, GPU, (), row["refused"])
    assert peer in found and peer not in row["refused"]
    calls = {harness.EAGER: found[harness.EAGER], peer: found[peer]}
    op_runs.check_op(case, calls, letters, dtype, CPU, row)
    if case.op == "bias_act":
        assert row["refused"][peer].startswith("wrong: ") and peer not in calls
        assert "gradient of " in row["refused"][peer]
    else:
        assert peer in calls, row["refused"]
        assert row["gate"][peer]["compared"] == 1 + len(case.shapes) - len(case.frozen)
        sets = [ops.inputs(case, letters, dtype, CPU, seed) for seed in (0, 1)]
        op_runs.Turn(peer, calls[peer], case.p, sets, CPU, repeats=2).run()


def test_every_binding_has_been_called() -> None:
    assert [peer for peer, _ in SERVED].count("LowMemoryBP") == 4
    assert [peer for peer, _ in SERVED].count("unsloth") == 2 + 4 + 4 + 1  # norms; factors like x, float32, rank 16
    assert [name for peer, name in SERVED if peer == "lorafusion"] == ["lora_linear H to H p=0.0 rank 16"]


def test_trained_vectors_are_nothing_for_unsloth(stand_ins: None) -> None:
    case = CASES["residual_norm layernorm"]
    row = harness.new_row({})
    call = ops._unsloth_layer_norm()
    calls = {harness.EAGER: lambda t, p, seed: case.eagerly(t, p), "unsloth": lambda t, p, seed: call(t)}
    op_runs.check_op(case, calls, ops.sizes(2, 8, 64, torch.float32), torch.float32, CPU, row)
    wordings = ("RuntimeError: The differentiated Tensor", "RuntimeError: One of the differentiated Tensors")
    assert "unsloth" not in calls and row["refused"]["unsloth"].startswith(wordings)


@pytest.mark.parametrize("peer", NAMES)
def test_an_absent_package_is_named_and_not_called(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAMES[peer], None)
    case = next(case for case in ops.CASES if peer in case.peers)
    refused: dict[str, str] = {}
    assert peer not in op_runs.providers(case, GPU, (), refused)
    assert refused[peer].startswith("not importable: ModuleNotFoundError: ")


@pytest.mark.parametrize("raised", ["NotImplementedError", "ImportError", "OSError"])
def test_an_import_that_breaks_is_reported(raised: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").write_text(f"raise {raised}('no accelerator')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    refused: dict[str, str] = {}
    found = op_runs.providers(CASES["residual_norm rmsnorm frozen"], GPU, (), refused)
    assert refused["unsloth"] == f"not importable: {raised}: no accelerator"
    assert set(found) == {harness.EAGER, harness.OURS, f"{harness.OURS}, triton"}


def test_unsloth_does_not_run_beside_torch_compile(stand_ins: None) -> None:
    refused: dict[str, str] = {}
    found = op_runs.providers(CASES["residual_norm rmsnorm frozen"], GPU, op_runs.MODES, refused)
    assert {harness.compiled(mode) for mode in op_runs.MODES} < set(found)
    assert "unsloth" not in found and "--compile" in refused["unsloth"]


def test_the_reason_of_a_kernel_that_does_not_compile_is_its_cause() -> None:
    class CompilationError(Exception):
        """Derives from Exception alone, as Triton's."""

    def call(t: ops.Tensors, p: float, seed: Tensor | None) -> Tensor:
        try:
            raise AssertionError("K >= 16")
        except AssertionError as error:
            raise CompilationError("at 60:22:\n  tl.dot(s, b)") from error

    case = CASES["column_sum bias gradient"]
    row = harness.new_row({})
    calls = {harness.EAGER: lambda t, p, seed: case.eagerly(t, p), "peer": call}
    op_runs.check_op(case, calls, ops.sizes(2, 8, 64, torch.float32), torch.float32, CPU, row)
    assert row["refused"] == {"peer": "CompilationError: K >= 16"} and "peer" not in calls
