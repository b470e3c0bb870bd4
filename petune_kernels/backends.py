"""Which implementation an op takes, and `pk.backend(...)` to choose one by hand.

By default every op goes through `torch.ops.petune.*`, where the dispatcher takes the compiled kernel of x's device if
it is loaded and the reference otherwise. `describe()` says which it is and why; nothing falls back in silence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import matmul, reference, schema  # noqa: F401  (matmul registers before Triton may)

BACKENDS = ("reference", "cpu", "cuda", "triton")
COMPILED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")

_forced: str | None = None


class BackendError(RuntimeError):
    """The backend asked for cannot run here; the message says why and what to do."""


def _load() -> dict[str, str]:
    """Loads what is installed; returns for each compiled backend '' or the reason why it is not there."""
    missing = {"cpu": "", "cuda": ""}
    try:
        importlib.import_module("petune_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "petune_kernels._C":
            raise
        missing["cpu"] = (
            "the compiled extension is not installed; install a C++ compiler and run "
            "`pip install --no-build-isolation .` again"
        )
    if not torch.cuda.is_available():
        missing["cuda"] = "torch sees no NVIDIA GPU"
    elif not _CUDA_LIBRARY.exists():
        missing["cuda"] = "the CUDA library was not built; install the CUDA toolkit (nvcc), set CUDA_HOME and reinstall"
    else:
        try:
            torch.ops.load_library(str(_CUDA_LIBRARY))
        except OSError as error:  # built for another torch: Triton and the reference go on, and say so
            missing["cuda"] = (
                f"the CUDA library cannot be loaded ({error.__cause__ or error}); install again on this machine"
            )
    return missing


MISSING = _load()


def build_info() -> dict[str, Any] | None:
    """The build report of the compiled extension, or None where it is not installed."""
    if MISSING["cpu"]:
        return None
    return importlib.import_module("petune_kernels._C").build_info()


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{schema.NAMESPACE}::{op}", key.upper())


@functools.cache
def cannot_run(device: torch.device) -> str:
    """Why the CUDA library's kernels do not run on this GPU, '' where they do or none is loaded. It loads beside any
    driver and on any GPU; only a launch shows whether it was built for them."""
    if MISSING["cuda"]:
        return ""
    x, seed = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        torch.ops.petune.dropout(x, seed, 0.0)
    except RuntimeError as error:
        info = build_info() or {}
        return (
            f"the CUDA library, built by CUDA {info.get('cuda')} for {info.get('cuda_architectures')}, does not run on "
            f"{torch.cuda.get_device_name(device)} ({str(error).splitlines()[0]}); set TORCH_CUDA_ARCH_LIST to its "
            "compute capability, use a CUDA that its driver knows, and install again"
        )
    return ""


@functools.cache
def _triton_launcher(op: str) -> Callable[..., Any] | None:
    """The launcher petune_kernels/triton/<op>.py has for this op (backward ops live in their forward's file), on the
    device of its tensors: Triton itself launches on the current one."""
    module = f"petune_kernels.triton.{op.removesuffix('_backward')}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(module) is None:
        return None
    launcher = getattr(importlib.import_module(module), op, None)
    if launcher is None:
        return None

    @functools.wraps(launcher)
    def there(*args: Any) -> Any:
        given = (t for arg in args for t in (arg if isinstance(arg, list) else [arg]))
        with torch.cuda.device_of(next(t for t in given if isinstance(t, torch.Tensor))):
            return launcher(*args)

    return there


def _triton_lacks() -> str:
    """Why Triton's kernels cannot be built here, or ''. Its launchers are C, which it compiles at their first call."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if "CC" in os.environ or any(map(shutil.which, ("cc", "gcc", "clang"))):
        return ""
    return "Triton finds no C compiler (CC, gcc or clang)"


def _register_triton() -> frozenset[str]:
    """On a GPU Triton adds LoRA's term to many rows and, without the compiled library, serves every op it has; returns
    which these are."""
    if not torch.cuda.is_available() or _triton_lacks():
        return frozenset()
    served = set()
    for op in schema.SCHEMAS:
        launcher = None if _has_kernel(op, "cuda") else _triton_launcher(op)
        if launcher is not None:
            torch.library.impl(f"{schema.NAMESPACE}::{op}", "CUDA", launcher)
            served.add(op)
    for op in matmul.MANY_ROWS:
        matmul.MANY_ROWS[op] = _triton_launcher(op) or matmul.MANY_ROWS[op]
    return frozenset(served)


_ON_TRITON = _register_triton()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Makes every op inside the `with` take one implementation: "reference", "cpu", "cuda" or "triton".

    Meant for tests and benchmarks. Raises ValueError for another name and BackendError where that backend cannot run
    here. An op called inside on a device or dtype the backend does not serve raises BackendError, too.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}; accepted are {', '.join(BACKENDS)}")
    if MISSING.get(name):
        raise BackendError(f"backend {name!r} cannot run here: {MISSING[name]}")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise BackendError("backend 'triton' cannot run here: the package triton is not installed")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


_COMPOSED = {(device, kernel.__name__): kernel for device, kernels in matmul.KERNELS.items() for kernel in kernels}
"""(device, op) -> the Python function that is its kernel there."""
_modes = torch._C._len_torch_dispatch_stack
_OPS = getattr(torch.ops, schema.NAMESPACE)


def pick(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """The implementation of `op` for tensors like x, under the current `backend` choice."""
    device = x.device.type
    if _forced is not None and (chosen := _chosen(op, x, device)) is not None:
        return chosen
    if device in COMPILED_DTYPES and x.dtype not in COMPILED_DTYPES[device]:
        return getattr(reference, op)  # float64: compiled kernels accumulate in float32
    own = _COMPOSED.get((device, op))
    if own is not None and type(x) is torch.Tensor and not (torch.compiler.is_compiling() or _modes()):
        return own  # without a way through the dispatcher and back into Python
    return getattr(_OPS, op)


def _chosen(op: str, x: torch.Tensor, device: str) -> Callable[..., Any] | None:
    """What `backend` asks for where it is not what this device takes anyway."""
    if _forced == "reference":
        return getattr(reference, op)
    if _forced == "triton":
        launcher = _triton_launcher(op)
        if launcher is None:
            raise BackendError(f"backend 'triton' has no kernel for {op}")
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if x.dtype not in COMPILED_DTYPES["cuda"] or not (device == "cuda" or interpreted):
            raise BackendError(f"backend 'triton' has no kernel for {op} on {device} in {x.dtype}")
        return launcher
    if not (device == _forced and x.dtype in COMPILED_DTYPES[device] and _has_kernel(op, device)):
        raise BackendError(f"backend {_forced!r} has no kernel for {op} on {device} in {x.dtype}")
    return None


def composed(op: str, device: str) -> Callable[..., Any] | None:
    """The Python function that runs `op` there by torch's own ops, or None where a compiled kernel runs it."""
    if (device, op) in _COMPOSED:
        return _COMPOSED[device, op]
    return getattr(reference, op) if device == "cpu" and not _has_kernel(op, device) else None


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


_TORCHS = ("attention", "attention_backward")
"""What PyTorch has itself on CUDA: the op calls it (ops/attention.py)."""


@dataclass(frozen=True)
class Choice:
    """What one op takes on one device. `todo` is empty where nothing is missing."""

    op: str
    device: str
    backend: str
    why: str
    todo: str = ""


def describe(*devices: str) -> list[Choice]:
    """For every op and device type (default: all of this machine) the backend it takes, why, and what to do about what
    is missing."""
    rows = []
    for device in devices or (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)):
        for op in schema.SCHEMAS:
            dtypes = ", ".join(str(d).removeprefix("torch.") for d in COMPILED_DTYPES[device])
            if device == "cuda" and op in _TORCHS:
                rows.append(
                    Choice(op, device, "torch", "PyTorch's fused attention; the reference where a seed is given")
                )
            elif _has_kernel(op, device) and device == "cuda" and (why := cannot_run(_current())):
                rows.append(Choice(op, device, "none", "the kernel loaded does not run on this GPU", why))
            elif _has_kernel(op, device):
                name = "triton" if device == "cuda" and op in _ON_TRITON else device
                rows.append(Choice(op, device, name, f"kernel loaded, for {dtypes}; other dtypes take the reference"))
            elif MISSING[device]:
                why = "no compiled kernel is loaded"
                if device == "cuda" and (lacks := _triton_lacks()):
                    why += f", and {lacks}"
                rows.append(Choice(op, device, "reference", why, MISSING[device]))
            else:
                rows.append(Choice(op, device, "reference", "this op has no compiled kernel for this device"))
    return rows


def warn_if_slow(device: str) -> None:
    """One warning where ops of this device run on the reference for want of something that can be installed."""
    slow = [choice for choice in describe(device) if choice.todo]
    if slow:
        ops = "all ops" if len(slow) == len(schema.SCHEMAS) else ", ".join(choice.op for choice in slow)
        warnings.warn(f"petune_kernels runs {ops} on its reference: {slow[0].todo}", RuntimeWarning, stacklevel=3)
