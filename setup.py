"""Builds the compiled part; everything else about the package is in pyproject.toml.

_C       the CPU ops and the pybind11 module, on every machine with a C++ compiler
_cuda    the CUDA ops, a shared object of its own, where nvcc is found (CUDA_HOME or PATH)

Environment: NO_CUDA=1 leaves CUDA out, FORCE_CUDA=1 fails without nvcc, TORCH_CUDA_ARCH_LIST (8.0;9.0;10.0+PTX as far
as nvcc knows them), MAX_JOBS, CXX, PETUNE_NO_EXTENSION=1 installs pure Python.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FLAGS = ["-O3", "-fPIC", "-fno-math-errno", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def find_nvcc() -> str | None:
    if flag("NO_CUDA"):
        if flag("FORCE_CUDA"):
            raise SystemExit("NO_CUDA=1 and FORCE_CUDA=1 exclude each other")
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None and flag("FORCE_CUDA"):
        raise SystemExit(f"FORCE_CUDA=1, but no nvcc in {home + '/bin' if home else 'PATH'}; set CUDA_HOME")
    return nvcc


def find_compiler() -> str | None:
    """The command of the C++ compiler: CXX as it is given ("ccache g++"), else what is there."""
    asked = os.environ.get("CXX", "").strip()
    if asked and shutil.which(shlex.split(asked)[0]) is None:
        raise SystemExit(f"CXX={asked}: there is no such command")
    return asked or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def cuda_architectures(nvcc: str) -> list[tuple[str, bool]]:
    """[('80', False), ('90', False), ('100', True)]: architecture and whether to add its PTX."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";")
    known = printed(nvcc, "--list-gpu-arch")
    wanted = [(a.removesuffix("+PTX").replace(".", ""), a.endswith("+PTX")) for a in asked.split(";") if a]
    usable = [(arch, ptx) for arch, ptx in wanted if f"compute_{re.sub('[a-z]', '', arch)}\n" in known]
    if "TORCH_CUDA_ARCH_LIST" in os.environ and len(usable) < len(wanted):
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={asked}: this nvcc knows only {known.split()}")
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and usable:
        usable[-1] = (usable[-1][0], True)  # later GPUs run the newest PTX this nvcc can make
    return usable


class Build(build_ext):
    """Compiles with ninja, straight from the sources: the CUDA part builds against a CPU build of torch too."""

    def run(self) -> None:
        compiler, unwanted = find_compiler(), flag("PETUNE_NO_EXTENSION")
        if unwanted or compiler is None:
            if flag("FORCE_CUDA"):
                raise SystemExit("FORCE_CUDA=1 needs a C++ compiler and an extension build")
            why = "PETUNE_NO_EXTENSION is set" if unwanted else "no C++ compiler"
            print(f"petune_kernels: {why}: pure-Python install on the reference ops", file=sys.stderr)
            self.extensions = []
            return
        self.compiler_path, self.nvcc = compiler, find_nvcc()
        if self.nvcc is None:
            self.extensions = [e for e in self.extensions if not e.name.endswith("_cuda")]
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        # _cuda is no Python module: torch loads it as a plain library
        if fullname.endswith("_cuda"):
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = printed(*shlex.split(self.compiler_path), "--version").splitlines()[0]
        version, archs = "", []
        if self.nvcc:
            version = re.search(r"release ([\d.]+)", printed(self.nvcc, "--version"))[1]
            archs = cuda_architectures(self.nvcc)
        facts = {
            "PETUNE_VERSION": self.distribution.get_version(),
            "PETUNE_COMPILER": compiler,
            "PETUNE_TORCH": torch.__version__,
            "PETUNE_CUDA_VERSION": version,
            "PETUNE_CUDA_ARCHS": ";".join(f"{a[:-1]}.{a[-1]}{'+PTX' * ptx}" for a, ptx in archs),
        }
        includes = [f"-isystem{p}" for p in [pybind11.get_include(), *include_paths(), sysconfig.get_path("include")]]
        cxx = [*FLAGS, "-std=c++20", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", *includes]
        report = " ".join(f"-D{key}='\"{value}\"'" for key, value in facts.items())
        libraries = [*(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
        if ext.name.endswith("_cuda"):  # libtorch leads to libtorch_cuda: keep it although that of a CPU build is empty
            libraries = ["-Xlinker --no-as-needed", *libraries]
        lines = [
            f"rule cxx\n  command = {self.compiler_path} -MMD -MF $out.d {' '.join(cxx)} $flags -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
        ]
        if ext.name.endswith("_cuda"):
            home = Path(self.nvcc).resolve().parent.parent
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a, _ in archs]
            codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a, ptx in archs if ptx]
            options = f"-O3 -std=c++17 -lineinfo --threads 2 -Xcompiler -fPIC,-fvisibility=hidden {' '.join(codes)}"
            lines += [
                f"rule cuda\n  command = {self.nvcc} {options} -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
            ]
            lines += ["  deps = gcc", f"rule link\n  command = {self.nvcc} -shared $in -o $out {' '.join(libraries)}"]
            extra = f"-DPETUNE_CUDA -DUSE_CUDA -isystem{home}/include"
        else:
            lines += [f"rule link\n  command = {self.compiler_path} -shared $in -o $out {' '.join(libraries)}"]
            extra = ""
        objects = []
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT.resolve() / "build" / f"{ext.name}-{sys.implementation.cache_tag}"
        for source in ext.sources:
            objects.append(f"{build / Path(source).name}.o")
            rule = "cuda" if source.endswith(".cu") else "cxx"
            flags = f"{extra} {report}" if source.endswith("bindings.cpp") else extra
            lines += [f"build {objects[-1]}: {rule} {ROOT.resolve() / source}", f"  flags = {flags}"]
        lines += [f"build {target}: link {' '.join(objects)}", ""]
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text("\n".join(lines))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build), *(["-j", jobs] if jobs else [])], check=True)


def sources(pattern: str) -> list[str]:
    return ["csrc/bindings.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))]


setup(
    ext_modules=[
        Extension("petune_kernels._C", sources("csrc/cpu/*.cpp")),
        Extension("petune_kernels._cuda", sources("csrc/cuda/*.cu")),
    ],
    cmdclass={"build_ext": Build},
)
