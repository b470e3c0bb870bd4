"""The package as it is installed: stable ABI, a wheel that carries no torch, and installs without compiler or CUDA."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from petune_kernels import backends

ROOT = Path(__file__).parent.parent
USE = """if True:
    import sys, warnings
    # an editable install would lend its own _C to the package under test
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
    import torch
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        import petune_kernels as pk
        from petune_kernels.backends import build_info, describe
        model = torch.nn.Sequential(torch.nn.LayerNorm(16))
        report = pk.patch(model)
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), torch.nn.functional.layer_norm(x, (16,)))
    print(pk.__file__, report.backends["residual_norm"], [str(w.message) for w in seen if "petune" in str(w.message)])
"""


def run(*command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | (env or {}), cwd=cwd, capture_output=True, text=True)


def build_wheel(into: Path, source: Path = ROOT, **env: str) -> Path:
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(into), env=env, cwd=source)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(into.glob("*.whl"))


def copy_of_the_sources(into: Path) -> Path:
    skip = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, into, ignore=skip)
    return into


def use(wheel: Path, into: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    done = run(sys.executable, "-c", USE, env={"PYTHONPATH": str(into)}, cwd=into)
    assert done.returncode == 0, done.stderr
    assert str(into) in done.stdout
    return done.stdout


@pytest.mark.skipif(bool(backends.MISSING["cpu"]), reason="the extension is not installed")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_stable_abi() -> None:
    """Every shared object uses nothing of torch but its stable ABI of 2.10."""
    libraries = sorted((ROOT / "petune_kernels").glob("*.so"))
    assert any(library.name.startswith("_C") for library in libraries)
    for library in libraries:
        done = run(str(Path(sys.executable).with_name("torch-abi-audit")), "--json", str(library))
        audit = json.loads(done.stdout)
        (found,) = audit["extensions"] + audit["bundled_libs"]  # _cuda.so is no Python module
        torch_use = found["torch"]
        assert torch_use["uses_torch"] and torch_use["stable"] and not torch_use["unstable_symbols"], torch_use
        assert torch_use["min_torch_version"] == "2.10.0"


@pytest.mark.skipif(bool(backends.MISSING["cpu"]), reason="the extension is not installed")
def test_a_raw_call_reads_nothing_out_of_bounds() -> None:
    """What petune_kernels.ops makes alike before it calls: dtypes and sizes of what is read beside x."""
    x, other, small = torch.zeros(4, 64), torch.zeros(3, 64), torch.ones(64)
    raw = torch.ops.petune
    with pytest.raises(RuntimeError, match="parameters are in the rows' dtype or float32"):
        raw.residual_norm(x, None, None, small.bfloat16(), None, None, 0.0, 1e-5, False, False, False)
    for rows in (other, x.bfloat16()):
        with pytest.raises(RuntimeError, match="one size and one dtype"):
            raw.residual_norm(x, None, rows, small, None, None, 0.0, 1e-5, False, False, False)
        with pytest.raises(RuntimeError, match="one size and one dtype"):
            raw.bias_act(x, None, rows, 0)
    wanted = (False, True, False, False, False)
    with pytest.raises(RuntimeError, match="rstd is float32, one a row"):
        raw.residual_norm_backward(x, None, x, small[:3], None, small, None, None, 0.0, False, False, *wanted)


@pytest.mark.skipif(bool(backends.MISSING["cpu"]), reason="the extension is not installed")
def test_wheel_runs_and_carries_no_torch(tmp_path: Path) -> None:
    info = backends.build_info()
    assert info is not None
    as_installed = {"TORCH_CUDA_ARCH_LIST": info["cuda_architectures"]} if info["cuda"] else {"NO_CUDA": "1"}
    wheel = build_wheel(tmp_path / "dist", **as_installed)  # the same flags: nothing is compiled twice
    audit = run(sys.executable, "-m", "auditwheel", "show", str(wheel))
    assert audit.returncode == 0, audit.stderr
    repaired = run(
        sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*", "--exclude", "libc10*",
        "--exclude", "libcu*", "-w", str(tmp_path / "house"), str(wheel),
        env={"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert repaired.returncode == 0, repaired.stderr
    final = next((tmp_path / "house").glob("*.whl"))
    assert "manylinux" in final.name
    names = zipfile.ZipFile(final).namelist()
    assert any(n.startswith("petune_kernels/_C.") for n in names)
    assert not any("libtorch" in n or "libc10" in n for n in names)
    assert ("petune_kernels/_cuda.so" in names) == bool(info["cuda"])
    if info["cuda"]:  # through libtorch.so it finds libtorch_cuda.so, which the CPU build of torch beside it now lacks
        assert b"\0libtorch.so\0" in zipfile.ZipFile(final).read("petune_kernels/_cuda.so")
    assert " cpu []" in use(final, tmp_path / "site")


def test_install_without_a_compiler(tmp_path: Path) -> None:
    """No compiler on PATH: a pure-Python install that works on the reference ops and says so."""
    source = copy_of_the_sources(tmp_path / "source")
    (tmp_path / "bin").mkdir()
    wheel = build_wheel(tmp_path / "dist", source, PATH=str(tmp_path / "bin"), CXX="")
    assert not any(n.endswith(".so") for n in zipfile.ZipFile(wheel).namelist())
    said = use(wheel, tmp_path / "site")
    assert " reference " in said and "install a C++ compiler" in said


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), env={"CXX": "no-such-compiler -m64"})
    assert done.returncode != 0 and "CXX=no-such-compiler -m64: there is no such command" in done.stderr


def test_force_cuda_fails_loudly_without_nvcc(tmp_path: Path) -> None:
    done = run(
        sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path),
        env={"FORCE_CUDA": "1", "NO_CUDA": "0", "CUDA_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode != 0 and "FORCE_CUDA=1, but no nvcc in" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    done = run(
        sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path),
        env={"TORCH_CUDA_ARCH_LIST": "9.0;42.0", "NO_CUDA": "0"},
    )  # fmt: skip
    assert done.returncode != 0 and "TORCH_CUDA_ARCH_LIST=9.0;42.0: this nvcc knows only" in done.stderr
