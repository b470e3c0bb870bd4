"""The machine, the versions and the code that a result was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import petune_kernels as pk

ENVIRONMENT = ("LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "OMP_NUM_THREADS", "KMP_BLOCKTIME")
"""What changes times or memory from outside."""
PACKAGES = ("triton", "transformers", "peft", "numpy")


def describe() -> dict[str, Any]:
    """What a result file must hold to be compared with another one: hardware, versions, commit; plain JSON values."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"petune_kernels": pk.__version__, "torch": torch.__version__}  # an index's torch hides its +cu130
        | {name: version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "git": git_commit(),
    }


def version(package: str) -> str | None:
    """The installed version, or None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command(program: str = "petune") -> str:
    """What was called, as it can be pasted."""
    return shlex.join([program, *sys.argv[1:]])


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in and whether it is changed; of a copy without .git what PETUNE_COMMIT
    in the environment says, or None."""
    root = Path(__file__).resolve().parents[2]
    if shutil.which("git") is None or not (root / ".git").exists():
        told = os.environ.get("PETUNE_COMMIT")
        return {"commit": told, "changed": None} if told else None

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)

    head, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if head.returncode or status.returncode:  # a repository without a commit, or one git refuses to read
        return None
    return {"commit": head.stdout.strip(), "changed": bool(status.stdout.strip())}
