"""The device "cuda:0" in host memory (host_gpu.cpp), for a process that has no GPU.

`enable(library)` before torch is imported. Host code then goes its way for a GPU: patching, choices of kernels,
autograd in the device's own thread, with tensors whose device is cuda; mixing devices raises as on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

COMPILED = (
    "residual_norm", "residual_norm_backward", "bias_act", "bias_act_backward", "bias_act_coded",
    "bias_act_coded_backward", "column_sum", "dropout",
)  # fmt: skip
"""The ops of csrc/cuda."""
SOURCE = Path(__file__).with_name("host_gpu.cpp")


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build(to: Path) -> None:
    include, lib = _torch() / "include", _torch() / "lib"
    subprocess.run(
        ["c++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", f"-I{include}", f"-I{include}/torch/csrc/api/include",
         str(SOURCE), "-o", str(to), f"-L{lib}", "-ltorch_cpu", "-lc10"],
        check=True,
    )  # fmt: skip


class _Nothing(contextlib.nullcontext):
    """A stream, an event, the choice of a device."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def enable(library: Path) -> None:
    assert "torch" not in sys.modules, "the device must be there before torch looks for one"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    host = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch

    load = torch.ops.load_library

    def load_library(path: str) -> None:
        """Of the compiled library its ops, each run by the kernel that the CPU has."""
        if Path(path).name != "_cuda.so":
            return load(path)
        ops = (ctypes.c_char_p * len(COMPILED))(*map(str.encode, COMPILED))
        host.host_gpu_kernels(ops, len(COMPILED))

    torch.ops.load_library = load_library
    properties = type("Properties", (), dict(
        name="host", major=9, minor=0, multi_processor_count=132, total_memory=1 << 36, L2_cache_size=50 << 20,
        warp_size=32))()  # fmt: skip
    stand_ins: dict[str, Any] = dict(
        _lazy_init=lambda: None, is_available=lambda: True, is_initialized=lambda: True, init=lambda: None,
        device_count=lambda: 1, current_device=lambda: 0, set_device=lambda device: None,
        get_device_name=lambda device=None: "host", get_device_capability=lambda device=None: (9, 0),
        get_device_properties=lambda device=None: properties, synchronize=lambda device=None: None,
        device=_Nothing, device_of=_Nothing, stream=_Nothing, Stream=_Nothing, Event=_Nothing,
        current_stream=lambda device=None: _Nothing(), is_current_stream_capturing=lambda: False,
        get_rng_state=lambda device=None: torch.get_rng_state(), get_rng_state_all=lambda: [torch.get_rng_state()],
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        manual_seed=lambda seed: None, manual_seed_all=lambda seed: None, is_bf16_supported=lambda *a, **k: True,
        empty_cache=lambda: None, memory_allocated=lambda device=None: 0, max_memory_allocated=lambda device=None: 0,
        memory_reserved=lambda device=None: 0, reset_peak_memory_stats=lambda device=None: None,
        mem_get_info=lambda device=None: (1 << 36, 1 << 36), get_sync_debug_mode=lambda: 0,
        set_sync_debug_mode=lambda mode: None,
    )  # fmt: skip
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)

    def clone(storage: Any) -> Any:
        t = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return t.clone().untyped_storage()

    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
    torch.UntypedStorage.clone = clone  # type: ignore[method-assign]

    class Generator(torch.Generator):
        """Draws as the CPU's; says that it is the device's where that was asked for."""

        def __new__(cls, device: Any = "cpu") -> Any:
            made = super().__new__(cls, "cpu")
            made.place = torch.device("cuda", 0) if torch.device(device).type == "cuda" else torch.device("cpu")
            return made

        device = property(lambda self: self.place)

    torch.Generator = Generator  # type: ignore[misc]
