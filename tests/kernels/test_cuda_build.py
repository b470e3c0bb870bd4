"""The CUDA C++ kernels through nvcc and ptxas: no spill, no stack frame, rows read and written 16 bytes at
a time. Needs no GPU.

By default sm_90, with residual_norm's bf16 kernels; `--slow` builds every kernel for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(p.stem for p in (CSRC / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90", "sm_100")
NVCC = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if "CUDA_HOME" in os.environ else None)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is neither in CUDA_HOME nor in PATH")


@dataclass(frozen=True)
class Kernel:
    name: str  # residual_norm_rows<__nv_bfloat16, 3>
    registers: int
    stack: int
    spills: int


def cuobjdump() -> str | None:
    """The toolkit's disassembler, or the one that triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    return str(path) if path and path.exists() else None


def demangled(symbols: list[str]) -> list[str]:
    out = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [re.search(r"(\w+<.*?>)\(", line.replace("(anonymous namespace)::", ""))[1] for line in out.splitlines()]


@cache
def compiled(source: str, arch: str, *defines: str) -> tuple[str, Path]:
    """ptxas' report and the cubin, kept in the temporary directory by the hash of everything that went in."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    command = [NVCC, "-std=c++20", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin", *defines]
    headers = sorted([*(CSRC / "cuda").glob("*.cuh"), *(CSRC / "common").glob("*.h")])
    path = CSRC / "cuda" / f"{source}.cu"
    parts = [version, *command, *(p.read_text() for p in (path, *headers))]
    folder = Path(tempfile.gettempdir()) / f"petune_cuda_build_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    base = folder / f"{source}_{arch}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}"
    cubin, report = base.with_suffix(".cubin"), base.with_suffix(".txt")
    if not report.exists():
        partial = base.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, str(path), "-o", str(partial)], capture_output=True, text=True)
        if result.returncode != 0 and "Value 'sm_" in result.stderr:
            pytest.skip(f"this nvcc does not know {arch}")
        assert result.returncode == 0, result.stderr
        partial.replace(cubin)
        report.write_text(result.stderr)
    return report.read_text(), cubin


def kernels(report: str) -> list[Kernel]:
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, re.DOTALL)
    assert len(found) == report.count("Compiling entry function") > 0, report[:2000]
    names = demangled([f[0] for f in found])
    return [
        Kernel(name, int(registers), int(stack), int(stores) + int(loads))
        for name, (_, stack, stores, loads, registers) in zip(names, found, strict=True)
    ]


def check_resources(report: str) -> None:
    bad = [k for k in kernels(report) if k.stack or k.spills]
    assert not bad, "spills or stack frames:\n" + "\n".join(map(str, bad))


WORDS = re.compile(  # column sums; dropout's last elements; an activation's codes, four a word
    r"column_sum|residual_norm_backward_(any|rows<\w+, \d+, [1-7])|bias_act_backward_kernel<\w+, true, true"
    r"|dropout_kernel<float|bias_act_kernel<float, true, true"
)


def check_accesses(cubin: Path) -> None:
    """Vector kernels read and write rows 16 bytes at a time, never by elements or words; nothing touches local memory.

    What they may write by words: a norm's rstd, and what WORDS names.
    """
    if (tool := cuobjdump()) is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor triton's")
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\S+)\n", text)[1:]
    assert parts, text[:2000]
    for name, code in zip(demangled(parts[::2]), parts[1::2], strict=True):
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        if "_any<" in name and "true" not in name or re.search(r"_kernel<\w+, false", name):
            continue  # element by element on purpose
        assert re.search(r"\bLDG\.E\.(\w+\.)*128\b", code), f"{name} has no 16-byte load"
        if not name.startswith("dropout"):  # which ends element by element
            assert not re.search(r"\bLDG\.E\.(\w+\.)*U(8|16)\b", code), f"{name} loads single elements"
        if not name.startswith("column_sum"):
            assert re.search(r"\bSTG\.E\.(\w+\.)*128\b", code), f"{name} has no 16-byte store"
        if not WORDS.match(name):
            words = len(re.findall(r"\bSTG\.E(?:\.STRONG\.\w+)? ", code))
            assert words <= ("norm" in name), f"{name} stores {words} words"


def test_a_report_is_read_right():
    """A kernel that must use its stack is seen to."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stack.cu"
        source.write_text(
            "template <int N> __global__ void stack(float* p, int i) {\n"
            "  float a[N];\n"
            "  for (int k = 0; k < N; ++k) a[k] = p[k];\n"
            "  for (int k = 0; k < N; ++k) a[k * i % N] += a[(k + i) % N];\n"
            "  for (int k = 0; k < N; ++k) p[k] = a[k];\n"
            "}\n"
            "template __global__ void stack<64>(float*, int);\n"
        )
        command = [NVCC, "-arch=sm_90", "-Xptxas", "-v", "-cubin", str(source), "-o", str(source.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert kernels(report)[0].name == "stack<64>"
        with pytest.raises(AssertionError, match="spills or stack frames"):
            check_resources(report)
        with pytest.raises(AssertionError, match="local memory"):
            check_accesses(source.with_suffix(".cubin"))


def quick(source: str) -> tuple[str, ...]:
    return ("-DPETUNE_ONLY_BF16",) if source == "residual_norm" else ()


@pytest.mark.parametrize("source", SOURCES)
def test_sm_90(source):
    report, cubin = compiled(source, "sm_90", *quick(source))
    check_resources(report)
    check_accesses(cubin)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_architecture(source, arch):
    report, cubin = compiled(source, arch)
    check_resources(report)
    check_accesses(cubin)
