"""Builds the CUDA sources for the host emulator. `python tests/cuda_emulator/build.py [--sanitize]` prints the library.

Objects are kept by the hash of what went into them, in the user's temporary directory, so a rebuild compiles only what
changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler() -> str | None:
    """A C++20 compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def build(sources: list[Path], kernels: Path, sanitize: bool = False) -> Path:
    """Compiles the sources, .cu files with `kernels` (csrc/cuda or a copy) on their path, into a shared library."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler: set CXX or install g++ 11 or newer")
    flags = FLAGS + (SANITIZE if sanitize else [])
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout

    def compile_one(source: Path) -> Path:
        folders = [HERE, *([kernels] if source.suffix == ".cu" else [])]
        command = [cxx, *flags, *(f"-I{path}" for path in folders)]
        headers = sorted(h for path in (*folders, CSRC / "common") for h in path.glob("*.*h"))
        parts = [version, *command, *(h.read_text() for h in headers), str(source), source.read_text()]
        target = cache() / f"{source.stem}_{digest(parts)}.o"
        if not target.exists():
            run([*command, "-x", "c++", "-c", str(source), "-o", str(target)], target)
        return target

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    library = cache() / f"lib_{digest(map(str, objects))}.so"
    if not library.exists():
        run([cxx, *flags, "-shared", *map(str, objects), "-o", str(library)], library)
    return library


def cache() -> Path:
    path = Path(tempfile.gettempdir()) / f"petune_cuda_emulator_{os.getuid()}"
    path.mkdir(exist_ok=True)
    return path


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def run(command: list[str], target: Path) -> None:
    """Runs a compiler and moves its result into place whole: two test runs may build at once."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    command = [str(partial) if word == str(target) else word for word in command]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    partial.replace(target)


def build_ops(sanitize: bool = False) -> Path:
    """Every op of the CUDA backend, with C functions for ctypes."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "entry.cpp", HERE / "emulator.cpp"]
    return build(sources, CSRC / "cuda", sanitize)


def build_stage(old: str = "", new: str = "", sanitize: bool = False) -> Path:
    """row_sum.cu over csrc/cuda/reduce.cuh with the text `old`, which must be there once, replaced by `new`."""
    header = (CSRC / "cuda" / "reduce.cuh").read_text()
    if old and header.count(old) != 1:
        raise ValueError(f"{old!r} is in reduce.cuh {header.count(old)} times: plant the bug elsewhere")
    root = cache() / f"stage_{digest([header, old, new])}"
    for folder in ("common", "cuda"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for path in (CSRC / folder).glob("*.*h"):
            shutil.copy(path, root / folder)
    if old:
        (root / "cuda" / "reduce.cuh").write_text(header.replace(old, new))
    return build([HERE / "row_sum.cu", HERE / "emulator.cpp"], root / "cuda", sanitize)


if __name__ == "__main__":
    print(build_ops("--sanitize" in sys.argv))
