"""Every op on a GPU, compiled and in Triton, against the float64 reference on the CPU; masks bit-equal to the CPU's.

`make gpu-test` on a machine with an NVIDIA GPU. Without one the CUDA and Triton cases are skipped; the same kernels are
then proved by the host emulator, the interpreter and ahead-of-time compilation in tests/kernels. The CPU's kernels run
the same cases everywhere, so that a mistake in a case is not first seen on a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import petune_kernels as pk
from petune_kernels import reference
from petune_kernels.backends import pick
from petune_kernels.cuda_graph import Recorder
from petune_kernels.ops.attention import attention, hidden
from petune_kernels.ops.bias_act import bias_act
from petune_kernels.ops.column_sum import column_sum
from petune_kernels.ops.dropout import dropout
from petune_kernels.ops.frozen_linear import frozen_linear
from petune_kernels.ops.lora_linear import lora_linear
from petune_kernels.ops.packed_linear import packed_linear
from petune_kernels.ops.residual_norm import residual_norm

from .table import UNIT

gpu = pytest.mark.gpu

P = 0.25
SHAPES = ((1, 8), (3, 7), (37, 100), (66, 384), (130, 769), (64, 4096), (0, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Tensors = dict[str, Tensor]


def norm(t: Tensors) -> tuple[Tensor, ...]:
    out = residual_norm(
        t["x"], t["gamma"], t["beta"], bias=t["bias"], residual=t["residual"], p=P, return_z=True, seed=t["seed"]
    )
    assert isinstance(out, tuple)
    return out


def rms_norm(t: Tensors) -> tuple[Tensor, ...]:
    out = residual_norm(t["x"], t["gamma"], residual=t["residual"], rms=True)
    assert isinstance(out, Tensor)
    return (out,)


def gelu(t: Tensors) -> tuple[Tensor, ...]:
    return (bias_act(t["x"], t["bias"], act="gelu"),)


def gated(t: Tensors) -> tuple[Tensor, ...]:
    return (bias_act(t["x"], act="silu", gate=t["residual"]),)


def coded(t: Tensors) -> tuple[Tensor, ...]:
    """h, bit for bit bias_act's, and the gradients that follow from one code: a tie may round either way in another."""
    x, bias = t["x"], t["bias"]
    h, code = pick("bias_act_coded", x)(x, bias, 0)
    assert torch.equal(h, pick("bias_act", x)(x, bias, None, 0))
    lo, step = reference.SLOPE_CODES[0]
    wide = (x.cpu().double(), bias.cpu().double())
    slope = reference.bias_act_backward(torch.ones_like(wide[0]), *wide, None, 0, True, False, False)[0]
    # what the CPU's activation of 16-bit rows is off by (csrc/cpu/vec_math.h)
    off = 2.0**-13 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else 0.0
    assert ((slope - lo - step * code.cpu().double()).abs() <= 0.501 * step + off).all()
    exact = reference.bias_act_coded(*wide, 0)[1].to(x.device)
    return (h, *pick("bias_act_coded_backward", x)(t["residual"], exact, bias, 0, True, True))


def total(t: Tensors) -> tuple[Tensor, ...]:
    return (column_sum(t["x"]),)


def drop(t: Tensors) -> tuple[Tensor, ...]:
    return (dropout(t["x"], P, seed=t["seed"]),)


def replicas(t: Tensor) -> Tensor:
    """Three differing replicas of a small parameter."""
    return torch.stack([t, 0.5 * t, -t])


def rows_of_replicas(t: Tensors) -> Tensor:
    return torch.cat([t["x"], t["residual"], t["x"]])


def norm_replicas(t: Tensors) -> tuple[Tensor, ...]:
    small = {name: replicas(t[name]) for name in ("gamma", "beta", "bias")}
    out = residual_norm(rows_of_replicas(t), **small, p=P, seed=t["seed"])
    assert isinstance(out, Tensor)
    return (out,)


def gelu_replicas(t: Tensors) -> tuple[Tensor, ...]:
    return (bias_act(rows_of_replicas(t), replicas(t["bias"]), act="gelu_tanh"),)


def total_replicas(t: Tensors) -> tuple[Tensor, ...]:
    return (column_sum(rows_of_replicas(t), 3),)


def lora(t: Tensors) -> tuple[Tensor, ...]:
    return (lora_linear(t["x"], t["w"], t["bias"], t["a"], t["b"], p=P, scale=0.5, seed=t["seed"]),)


def lora_plain(t: Tensors) -> tuple[Tensor, ...]:
    return (lora_linear(t["x"], t["w"], None, t["a"], t["b"]),)


def lora_wide(t: Tensors) -> tuple[Tensor, ...]:
    """PEFT's default: factors in float32 beside 16-bit rows."""
    a, b = (t[name].to(torch.promote_types(t[name].dtype, torch.float32)) for name in ("a", "b"))
    return (lora_linear(t["x"], t["w"], t["bias"], a, b, p=P, scale=2.0, seed=t["seed"]),)


def lora_shared(t: Tensors) -> tuple[Tensor, ...]:
    """Projections that share x: one without an adapter, one with a bias of lora_B, base biases that train."""
    x, w, a, b, bias, seed = (t[name] for name in ("x", "w", "a", "b", "bias", "seed"))
    return lora_linear(
        x, [w, w.T.contiguous(), -w], [bias, None, 2 * bias], [a, None, 0.5 * a], [b, None, -b],
        bias_b=[None, None, t["beta"]], scale=[0.5, 1.0, 2.0], p=[P, 0.0, P], seed=[seed, None, seed + 1],
    )  # fmt: skip


def lora_replicas(t: Tensors) -> tuple[Tensor, ...]:
    a, b = replicas(t["a"]), replicas(t["b"])
    return (lora_linear(rows_of_replicas(t), t["w"], replicas(t["bias"]), a, b, p=P, scale=0.5, seed=t["seed"]),)


def frozen(t: Tensors) -> tuple[Tensor, ...]:
    return (frozen_linear(t["x"], t["w"], t["bias"]),)


def packed(t: Tensors) -> tuple[Tensor, ...]:
    return packed_linear(t["x"], [t["w"], t["w"].T.contiguous()], [t["bias"], t["beta"]])


EVERYWHERE, COMPILED = ("cpu", "cuda", "triton"), ("cpu", "cuda")
CASES: dict[str, tuple[Callable[[Tensors], tuple[Tensor, ...]], tuple[str, ...], tuple[str, ...]]] = {
    "residual_norm": (norm, ("x", "residual", "bias", "gamma", "beta"), EVERYWHERE),
    "rms_norm": (rms_norm, ("x", "residual", "gamma"), EVERYWHERE),
    "norm_replicas": (norm_replicas, ("x", "residual", "bias", "gamma", "beta"), EVERYWHERE),
    "bias_gelu": (gelu, ("x", "bias"), COMPILED),
    "bias_gelu_replicas": (gelu_replicas, ("x", "residual", "bias"), COMPILED),
    "bias_act_coded": (coded, (), COMPILED),
    "gated_silu": (gated, ("x", "residual"), COMPILED),
    "column_sum": (total, (), EVERYWHERE),
    "column_sum_replicas": (total_replicas, (), EVERYWHERE),
    "dropout": (drop, ("x",), EVERYWHERE),
    "lora_linear": (lora, ("x", "a", "b"), EVERYWHERE),
    "lora_linear plain": (lora_plain, ("x", "a", "b"), EVERYWHERE),
    "lora_linear wide": (lora_wide, ("x", "a", "b"), EVERYWHERE),
    "lora_linear shared": (lora_shared, ("x", "a", "b", "bias", "beta"), EVERYWHERE),
    "lora_linear replicas": (lora_replicas, ("x", "residual", "a", "b", "bias"), EVERYWHERE),
    "frozen_linear": (frozen, ("x", "bias"), COMPILED),
    "packed_linear": (packed, ("x", "bias", "beta"), COMPILED),
}
DTYPES_OF = {"cpu": (torch.float32, torch.bfloat16), "cuda": DTYPES, "triton": DTYPES}
RUNS = [
    pytest.param(
        name, backend, T, H, dtype, marks=() if backend == "cpu" else gpu, id=f"{name}-{backend}-{T}-{H}-{dtype}"
    )
    for name, case in CASES.items()
    for backend in case[2]
    for T, H in SHAPES
    for dtype in DTYPES_OF[backend]
    if backend != "cpu" or H < 4096  # the reference's matmuls take minutes there
]


def make(T: int, H: int, dtype: torch.dtype) -> Tensors:
    t = {name: torch.randn(T, H) for name in ("x", "residual")}
    t |= {"bias": torch.randn(H), "gamma": 1 + 0.3 * torch.randn(H), "beta": torch.randn(H)}
    t |= {"w": torch.randn(H, H) / H**0.5, "a": torch.randn(8, H) / H**0.5, "b": torch.randn(H, 8)}
    return {name: v.to(dtype) for name, v in t.items()} | {"seed": torch.randint(2**62, (1,))}


def ready(name: str, t: Tensors, backend: str, device: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """What gives the outputs and every gradient, the same at every call."""
    op, wanted, _ = CASES[name]
    moved = {k: v.to(device) if k == "seed" else v.to(device, dtype) for k, v in t.items()}
    for k in wanted:
        moved[k].requires_grad_()
    d: list[Tensor] = []

    def once() -> list[Tensor]:
        with pk.backend(backend):
            out = op(moved)
            if not d:
                torch.manual_seed(1)
                d.extend(torch.randn(o.shape).to(t["x"].dtype).to(o) for o in out)
            grads = torch.autograd.grad(out, [moved[k] for k in wanted], d) if wanted else ()
        return [r.detach() for r in (*out, *grads)]

    return once


def run(name: str, t: Tensors, backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and every gradient, on the CPU in float64."""
    return [r.double().cpu() for r in ready(name, t, backend, device, dtype)()]


def check_near(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for got, want in zip(ours, exact, strict=True):
        scale = want.square().mean().sqrt() if want.numel() else torch.tensor(0.0)
        # one rounding to the dtype, and those of the rounded intermediate results and fp32 sums
        allowed = (3 * UNIT[dtype] + 64 * UNIT[torch.float32]) * scale
        assert got.shape == want.shape and not got.isnan().any()
        if got.numel():
            assert (got - want).square().mean().sqrt() <= allowed


@pytest.mark.parametrize("name,backend,T,H,dtype", RUNS)
def test_against_float64(name: str, backend: str, T: int, H: int, dtype: torch.dtype) -> None:
    t, device = make(T, H, dtype), "cpu" if backend == "cpu" else "cuda"
    exact = run(name, t, "reference", "cpu", torch.float64)
    ours = run(name, t, backend, device, dtype)
    again = run(name, t, backend, device, dtype)
    assert all(torch.equal(got, same) for got, same in zip(ours, again, strict=True)), "two runs differ"
    check_near(ours, exact, dtype)


SUMMED = [
    pytest.param(name, backend, H, marks=() if backend == "cpu" else gpu, id=f"{name}-{backend}-{H}")
    for name, case in CASES.items()
    if name.startswith(("residual_norm", "norm", "bias_gelu", "column_sum"))
    for backend in case[2]
    for H in (768, 769)
]


@pytest.mark.parametrize("name,backend,H", SUMMED)
def test_sums_of_a_full_grid(name: str, backend: str, H: int) -> None:
    """Every multiprocessor at work and both levels of a column sum: the same bits in a hundred runs, from two streams
    at once and from replays of a graph. compute-sanitizer's racecheck watches shared memory alone."""
    device, rows, runs = ("cpu", 300, 3) if backend == "cpu" else ("cuda", 16383, 100)
    t = make(rows // 3 if "replicas" in name else rows, H, torch.bfloat16)
    once = ready(name, t, backend, device, torch.bfloat16)
    first = once()
    check_near([r.double() for r in first], ready(name, t, "reference", device, torch.float64)(), torch.bfloat16)

    def differing(ours: list[Tensor]) -> Tensor:
        return torch.stack([(a != b).any() for a, b in zip(ours, first, strict=True)]).any()

    found = [differing(once()) for _ in range(runs)]
    if device == "cuda":
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        for stream in streams * (runs // 2):
            with torch.cuda.stream(stream):
                found.append(differing(once()))
        torch.cuda.synchronize()
        held = [torch.empty_like(r) for r in first]
        recorder = Recorder(torch.device("cuda", torch.cuda.current_device()))

        def copied() -> None:
            for a, b in zip(held, once(), strict=True):
                a.copy_(b)

        recorder.warm(copied)
        replay = recorder.record(copied)
        for _ in range(runs):
            replay()
            found.append(differing(held))
    assert not torch.stack(found).any()


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT * q.shape[3] ** -0.5
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("h,kv", ((4, 4), (4, 2)))
@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=gpu)))
def test_attention(device: str, h: int, kv: int, dtype: torch.dtype, masked: bool) -> None:
    """On CUDA torch's fused attention, with heads that share keys, and a mask as it comes from a batch."""
    q, k, v = (torch.randn(2, n, 37, 64).to(dtype) for n in (h, kv, kv))
    mask = torch.zeros(2, 1, 1, 37, dtype=dtype).index_fill(3, torch.arange(30, 37), -torch.inf) if masked else None
    do = torch.randn(2, h, 37, 64).to(dtype)

    def run(op: Callable[..., Tensor], wide: bool) -> list[Tensor]:
        where = {"device": "cpu", "dtype": torch.float64} if wide else {"device": device}
        leaves = [t.to(**where).requires_grad_() for t in (q, k, v)]
        o = op(*leaves, None if mask is None else mask.to(**where))
        return [t.double().cpu() for t in (o, *torch.autograd.grad(o, leaves, do.to(o)))]

    def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return eager_attention(q, *(t.repeat_interleave(h // kv, 1) for t in (k, v)), mask)

    for got, own, exact in zip(run(attention, False), run(eager, False), run(eager, True), strict=True):
        size = exact.square().mean().sqrt()
        error, eagers = ((t - exact).square().mean().sqrt() for t in (got, own))
        assert error <= 1.5 * eagers + 2 * UNIT[dtype] * size


@pytest.mark.parametrize("boolean", (False, True), ids=("additive", "boolean"))
@pytest.mark.parametrize("p", (0.0, 0.1))
@pytest.mark.parametrize("S", (37, 64, 128, 192))
@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=gpu)))
def test_attention_of_texts_with_padding_before_them(device: str, S: int, p: float, boolean: bool) -> None:
    """A decoder's mask, whose padded rows see nothing, in a size that any of torch's fused kernels takes: no NaN, and
    what the others get does not depend on it."""
    seen = torch.ones(S, S, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[0, ..., : S // 3] = False
    q, k, v = (torch.randn(2, 4, S, 64).bfloat16().to(device).requires_grad_() for _ in range(3))
    mask = seen.to(device) if boolean else torch.zeros(2, 1, S, S).where(seen, hidden(q.device)).bfloat16().to(device)
    o = attention(q, k, v, mask, p)
    rows = seen.any(-1, keepdim=True).to(device)
    grads = torch.autograd.grad((o * rows).float().square().sum(), (q, k, v))
    assert all(t.isfinite().all() for t in (o, *grads))
    if p == 0.0:
        exact = eager_attention(*(t.detach().double().cpu() for t in (q, k, v)), torch.zeros(()).where(seen, -1e30))
        off = (o.double().cpu() - exact)[rows.cpu().expand_as(exact)]
        assert off.abs().max() < 2e-2


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=gpu)))
def test_attention_drops_by_the_seed(device: str) -> None:
    q, k, v = (torch.randn(2, 3, 20, 16) for _ in range(3))
    seed = torch.tensor([12345])
    exact = reference.attention(*(t.double() for t in (q, k, v)), None, seed, P, 0.25, False)
    found = attention(*(t.to(device) for t in (q, k, v)), p=P, scale=0.25, seed=seed.to(device))
    torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-5, atol=1e-5)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows_in_triton(dtype: torch.dtype) -> None:
    """Rows whose sums are kept in memory: gamma alone, as RMSNorm tuning wants it."""
    t = make(300, 16384, dtype)
    dys = t["residual"].cuda()
    found = []
    for backend in ("triton", "triton", "reference"):
        kind = torch.float64 if backend == "reference" else dtype
        x, gamma = t["x"].to("cuda", kind), t["gamma"].to("cuda", kind).requires_grad_()
        with pk.backend(backend):
            y = residual_norm(x, gamma, rms=True)
            assert isinstance(y, Tensor)
            found.append(torch.autograd.grad(y, gamma, dys.to(kind))[0].double())
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).norm() <= (3 * UNIT[dtype] + 64 * UNIT[torch.float32]) * found[2].norm()


@gpu
@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.parametrize("T,H", ((5, 64), (7, 50), (6, 33), (3, 1000)))
def test_masks_are_the_cpu_s(T: int, H: int, backend: str) -> None:
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    keep = reference.keep_mask(seed, P, T * H).reshape(T, H)
    with pk.backend(backend):
        dropped = dropout(torch.ones(T, H, device="cuda"), P, seed=seed.cuda())
        _, z = residual_norm(torch.ones(T, H, device="cuda"), p=P, seed=seed.cuda(), return_z=True)
    assert torch.equal(dropped.cpu() != 0, keep) and torch.equal(z.cpu() != 0, keep)


@gpu
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer(tool: str) -> None:
    """One shape of every op under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    command: list[Any] = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
    ]
    command += [__file__, "-k", "test_against_float64 and 37-100 and bfloat16 and not cpu"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    said = done.stdout + done.stderr
    if refused := next((line for line in said.splitlines() if "Device not supported" in line), ""):
        pytest.skip(refused)
    assert done.returncode == 0, said[-4000:]
