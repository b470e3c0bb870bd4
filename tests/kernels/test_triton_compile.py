"""Compiles every Triton kernel ahead of time, as the launchers launch it, for each architecture; needs no GPU.

A launcher is called with tensors that have shapes and no memory; what it would have launched (constants, warps, stages,
divisibilities) is compiled instead. cuobjdump then says what the binary uses, nvdisasm which instructions it holds.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from petune_kernels.triton import (  # noqa: E402
    column_sum,
    common,
    dropout,
    lora_adapter,
    lora_linear,
    residual_norm,
    tiles,
)

ARCHS = (80, 90, 100)
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
T, H = 16384, 768
DIVISIBLE = [["tt.divisibility", 16]]

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="the interpreter is on in this process: nothing is compiled"
)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def describe(value, constant, path, constants, attributes):
    """The type of one argument as Triton's own launcher would specialise it."""
    if isinstance(value, tuple) and not constant:
        return tuple(describe(v, False, (*path, i), constants, attributes) for i, v in enumerate(value))
    if constant or value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        attributes[path] = DIVISIBLE
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attributes[path] = DIVISIBLE
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launches(call, arch):
    """What a launcher launches: [(kernel, source, options)]."""
    found = {}

    def record(kernel, *args, grid, warmup=False, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants, attributes, signature = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            signature[parameter.name] = describe(value, parameter.is_constexpr, (i,), constants, attributes)
        found.setdefault(str((kernel.__name__, signature, sorted(constants.items(), key=str), options)),
                         (kernel, ASTSource(kernel, signature, constants, attributes), options))  # fmt: skip

    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", record),
        mock.patch.object(tiles, "arch", lambda device: arch),
        mock.patch.object(common, "arch", lambda device: arch),
    ):
        tiles._chosen.clear()
        call()
        tiles._chosen.clear()
    return list(found.values())


@dataclass(frozen=True)
class Binary:
    """What the compiled kernel uses, and its machine code as text."""

    registers: int
    stack: int
    local: int
    code: str

    def count(self, instruction):
        return len(re.findall(instruction, self.code))


def read(cubin, folder):
    path, knobs = Path(folder) / "kernel.cubin", triton.knobs.nvidia
    path.write_bytes(cubin)

    def tool(command, *options):
        return subprocess.run([command.path, *options, str(path)], capture_output=True, text=True, check=True).stdout

    used = {
        k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", tool(knobs.cuobjdump, "--dump-resource-usage"))
    }
    return Binary(used["REG"], used["STACK"], used["LOCAL"], tool(knobs.nvdisasm, "-c"))


def compiled(call, arch, folder):
    """{kernel name: [Binary]} of all kernels of a call; a spill or a stack frame fails."""
    kernels = {}
    for kernel, source, options in launches(call, arch):
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        name, binary = kernel.__name__, read(made.asm["cubin"], folder)
        print(f"sm_{arch} {name}: {binary.registers} registers, {made.metadata.shared} bytes shared, {options}")
        spills = binary.count(r"\b(?:STL|LDL)\b")
        assert (spills, binary.stack, binary.local) == (0, 0, 0), (
            f"{name} on sm_{arch}: {spills} spilling instructions, {binary.stack} bytes of stack"
        )
        assert made.metadata.shared <= {80: 163, 90: 227, 100: 227}[arch] * 1024, name
        kernels.setdefault(name, []).append(binary)
    return kernels


WIDE, NARROW = r"\bLDG(?:STS)?\.E[\w.]*\.128", r"\bLDG\.E[\w.]*\.[US](?:8|16)\b"


NORM = {  # H, dtype of x, dropout, rms, whether the saved row is z
    "bert": (768, torch.bfloat16, True, False, False),
    "bert fp32": (768, torch.float32, False, False, True),
    "llama": (4096, torch.bfloat16, False, True, True),
    "wide": (16384, torch.bfloat16, False, True, True),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", NORM)
def test_residual_norm(case, arch, tmp_path):
    width, dtype, drop, rms, row_is_z = NORM[case]
    x, row = empty(T, width, dtype=dtype), empty(T, width, dtype=dtype)
    gamma, beta, bias = (empty(width, dtype=dtype) for _ in range(3))
    beta, bias = (None, None) if rms else (beta, bias)
    seed, p = (empty(1, dtype=torch.int64), 0.1) if drop else (None, 0.0)

    def call():
        residual_norm.residual_norm(x, bias, row, gamma, beta, seed, p, 1e-5, rms, row_is_z, not row_is_z)
        residual_norm.residual_norm_backward(
            x, x if row_is_z else None, row, empty(T, dtype=torch.float32), bias, gamma, beta, seed, p, rms, row_is_z,
            True, drop, not rms, True, not rms,
        )  # fmt: skip

    kernels = compiled(call, arch, tmp_path)
    assert set(kernels) == {"forward_kernel", "backward_kernel", "finish_kernel"}
    for name in ("forward_kernel", "backward_kernel"):
        for binary in kernels[name]:
            assert binary.count(WIDE) >= 2, f"{name}: fewer than two 16-byte loads"
            assert not binary.count(NARROW), f"{name}: {binary.count(NARROW)} loads of one 16-bit element"
    if case == "wide":  # sums kept in memory: the next row's load must not overtake this row's store
        sums = max(kernels["backward_kernel"], key=lambda binary: binary.count(r"\bSTG"))
        assert "BAR.SYNC" in sums.code[sums.code.rindex("STG") :]


@pytest.mark.parametrize("arch", ARCHS)
def test_column_sum_and_dropout(arch, tmp_path):
    def call():
        column_sum.column_sum(empty(T, H), 1)
        dropout.dropout(empty(T, H), empty(1, dtype=torch.int64), 0.1)

    kernels = compiled(call, arch, tmp_path)
    assert set(kernels) == {"column_sum_kernel", "dropout_kernel", "finish_kernel"}
    for name in ("column_sum_kernel", "dropout_kernel"):
        for binary in kernels[name]:
            assert binary.count(WIDE) and not binary.count(NARROW), name


LORA = {  # T, K, N of each projection, r, dtypes of x and adapters, dropout, replicas
    "bert qkv": (T, H, (H, H, H), 8, torch.bfloat16, torch.float32, 0.1, 1),
    "bert fc1": (T, H, (4 * H,), 8, torch.bfloat16, torch.bfloat16, 0.0, 1),
    "small batch": (512, H, (H,), 16, torch.float16, torch.float16, 0.1, 4),
    "rank 64": (T, 1024, (1024,), 64, torch.bfloat16, torch.float32, 0.0, 1),
    "rank 256": (T, 1024, (1024,), 256, torch.bfloat16, torch.bfloat16, 0.1, 1),
    "float32": (T, H, (H,), 8, torch.float32, torch.float32, 0.1, 1),
    "rank 32 qkv": (T, H, (H, H, H), 32, torch.bfloat16, torch.float32, 0.1, 1),
    "rank 64 qkv": (T, H, (H, H, H), 64, torch.bfloat16, torch.float32, 0.0, 1),
    "rank 16 qkv in float32": (T, H, (H, H, H), 16, torch.float32, torch.float32, 0.0, 1),
    "rank 16 qkv in float32, dropout": (T, H, (H, H, H), 16, torch.float32, torch.float32, 0.1, 1),
    "rank 64 in float32": (T, H, (H,), 64, torch.float32, torch.float32, 0.0, 1),
    "rank 16, split": (T, H, (H,), 16, torch.bfloat16, torch.float32, 0.0, 1),
    "rank 16, split float16": (T, H, (H,), 16, torch.float16, torch.float32, 0.0, 1),
    "rank 32 qkv in float32": (T, H, (H, H, H), 32, torch.float32, torch.float32, 0.1, 1),
}
TENSOR_CORES = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b|\bHMMA\b"}  # mma, wgmma, tcgen05


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", [c if c.startswith("bert") else pytest.param(c, marks=pytest.mark.slow) for c in LORA])
def test_lora_linear(case, arch, tmp_path):
    rows, K, widths, r, dtype, adapter, p, G = LORA[case]
    n, lead = len(widths), () if G == 1 else (G,)
    x, w = empty(rows, K, dtype=dtype), [empty(N, K, dtype=dtype) for N in widths]
    bias = [empty(*lead, N, dtype=dtype) for N in widths]
    a, b = [empty(*lead, r, K, dtype=adapter) for _ in widths], [empty(*lead, N, r, dtype=adapter) for N in widths]
    seed = [empty(G, dtype=torch.int64) if p else None for _ in widths]

    def call():
        y = lora_linear.lora_linear(x, w, bias, a, b, [None] * n, seed, [p] * n, [2.0] * n, False)
        yes = [True] * n
        lora_linear.lora_linear_backward(y, x, w, a, b, seed, [p] * n, [2.0] * n, G, True, yes, yes, yes)

    kernels = compiled(call, arch, tmp_path)
    assert {"project_kernel", "matmul_kernel", "outer_kernel", "finish_kernel"} == set(kernels)
    for name in set(kernels) - {"finish_kernel"}:
        for binary in kernels[name]:
            assert binary.count(WIDE), f"{name}: no 16-byte loads"
            if dtype != torch.float32:  # exact float32 products do not run on tensor cores
                # float16 beside float32 factors: float32 results by tf32, for which Triton takes mma everywhere
                cores = TENSOR_CORES[80 if (dtype, adapter) == (torch.float16, torch.float32) else arch]
                assert binary.count(cores) or binary.count(TENSOR_CORES[arch]), f"{name} on sm_{arch}: no tensor cores"


ADAPTER = {  # K, N, r, dtype of x, dropout, replicas; adapters in float32: what takes these kernels by itself
    "bert fc2": (4 * H, H, 8, torch.bfloat16, 0.1, 1),
    "rank 16": (H, H, 16, torch.bfloat16, 0.0, 1),
    "rank 64": (1024, 1024, 64, torch.bfloat16, 0.1, 1),
    "float16": (H, H, 16, torch.float16, 0.0, 1),
    "replicas": (H, 4 * H, 16, torch.bfloat16, 0.1, 4),
    "rank 256": (4096, 4096, 256, torch.bfloat16, 0.0, 1),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "case", [c if c.startswith("bert") else pytest.param(c, marks=pytest.mark.slow) for c in ADAPTER]
)
def test_lora_adapter(case, arch, tmp_path):
    K, N, r, dtype, p, G = ADAPTER[case]
    lead = () if G == 1 else (G,)
    x, y = empty(T, K, dtype=dtype), empty(T, N, dtype=dtype)
    a, b = empty(*lead, r, K, dtype=torch.float32), empty(*lead, N, r, dtype=torch.float32)
    seed = empty(G, dtype=torch.int64) if p else None

    def call():
        lora_adapter.lora_adapter(y, x, a, b, empty(*lead, N, dtype=torch.float32), seed, p, 2.0)
        lora_adapter.lora_adapter_backward(x, y, x, a, b, seed, p, 2.0, True, True)

    kernels = compiled(call, arch, tmp_path)
    assert {"project_kernel", "update_kernel", "outer_kernel", "finish_kernel"} == set(kernels)
    for binary in kernels["update_kernel"]:
        assert binary.count(WIDE) and not binary.count(NARROW), "update_kernel: loads of less than 16 bytes"
        assert binary.count(TENSOR_CORES[arch]) or binary.count(TENSOR_CORES[80]), "update_kernel: no tensor cores"


def test_the_check_can_fail(tmp_path):
    """A tile far beyond the register file must be seen to spill."""
    with (
        mock.patch.dict(tiles.CONFIGS, {90: (tiles.Config(128, 256, 32, 2, 2),)}),
        pytest.raises(AssertionError, match="spilling instructions"),
    ):
        test_lora_linear("bert fc1", 90, tmp_path)
