"""The one place that talks to torch.cuda.CUDAGraph: a function is recorded once and replayed with one launch."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WARM = 3


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """One a device for all captures: torch keeps workspaces for every stream that a matmul ran on, for good."""
    return torch.cuda.Stream(index)


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """Within it transformers makes the masks of a capture, in which it may not ask whether they hide anything: what
    warms up then runs the kernels that are captured."""
    from transformers.utils import import_utils

    own = import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = lambda: True
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = own


@contextlib.contextmanager
def _waiting(mode: str) -> Iterator[None]:
    """Within it torch warns or raises where the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _debug(mode)
        yield
    finally:
        _debug(before)


def _debug(mode: str | int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before it, none within it: a cycle may hold a CUDA graph or an event, whose end no capture
    takes."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Recorder:
    """Records functions that take nothing, give nothing and work on tensors that stay where they are.

    All graphs of one recorder share a memory pool: what one keeps between its kernels the next may overwrite. So two
    functions that hand something to each other (forward and backward) are replayed with no other between them.

    A capture is of the calling thread alone ("thread_local"), so that a loader that pins memory does not spoil it.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _stream(torch.cuda.current_device() if device.index is None else device.index)

    @staticmethod
    def recording() -> bool:
        """Whether the current stream is being captured, by this recorder or anybody else."""
        return torch.cuda.is_current_stream_capturing()

    def warm(self, function: Callable[[], None], times: int = WARM) -> None:
        """Runs it as it is, on the stream of the captures: compiles kernels, makes libraries choose and allocate."""
        with torch.cuda.device(self._device):
            now = torch.cuda.current_stream()
            self._stream.wait_stream(now)
            with torch.cuda.stream(self._stream), as_captured():
                for _ in range(times):
                    function()
            now.wait_stream(self._stream)

    def probe(self, function: Callable[[], None]) -> None:
        """Warms up once more and raises RuntimeError where that waits for the GPU, which no capture may. To try it in a
        capture would leave torch's generator there: nothing could be drawn any more in this process."""
        with _waiting("error"):
            self.warm(function, times=1)

    def waits(self, function: Callable[[], None]) -> str:
        """Runs it once to its end, as `warm` does, and returns '' or what torch says where that waits for the GPU: for
        functions that no second run may follow."""
        with warnings.catch_warnings(record=True) as seen, _waiting("warn"):
            warnings.simplefilter("always")
            self.warm(function, times=1)
        said = [str(w.message) for w in seen]
        for w in seen:
            if "synchronizing" not in str(w.message):
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return next((text for text in said if "synchronizing" in text), "")

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Captures it, which runs none of its kernels; returns what replays them.

        TorchScript specialises a function at its second run with a shape, which on a GPU compiles and loads kernels.
        Meanwhile it does not: what is specialised already runs so, all else op by op.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            no_collection(),
            torch.jit.optimized_execution(False),
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),  # a capture that fails stays on its own
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()
        return graph.replay

    def reserved(self) -> int:
        """Bytes that torch holds on the device and cannot give back; what a capture adds is what its graph keeps."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)


class HostNumbers(TorchDispatchMode):
    """Within it a number that a model makes on the host and copies to the device is written there by a kernel.

    A capture takes no copy of memory that is not pinned, and DeBERTa's positions make one, torch.tensor(n).type_as(x).
    The number becomes part of the graph, as one on the host that a kernel is given always does.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # a compiled function inside stays compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            source: Tensor = args[0]
            if source.device.type == "cpu" != kwargs["device"].type and source.numel() == 1:
                dtype = kwargs.get("dtype") or source.dtype
                return torch.full(source.shape, source.item(), dtype=dtype, device=kwargs["device"])
        return func(*args, **kwargs)
