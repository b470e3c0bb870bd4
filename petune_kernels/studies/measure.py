"""What a training step costs: bytes saved for backward, peak memory, time in turn. For any model and any variants.

Saved bytes are counted, so they are the same on every machine; memory is taken in a fresh process, so nothing another
variant left behind counts; times are taken in turn (A B A B), so a busy machine slows every variant alike.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import StudyError


class _Saved:
    """Holds one saved tensor and what was noted beside it; dies with the graph node that saved it."""

    __slots__ = ("__weakref__", "note", "tensor")

    def __init__(self, tensor: torch.Tensor, note: Any):
        self.tensor, self.note = tensor, note


class Saving:
    """While entered, every tensor that autograd saves is seen; what of it is still alive can be asked at any time.

    note: called at each saving; what it returns is kept beside the tensor. A tensor that an autograd.Function keeps as
    an attribute instead of by save_for_backward is not seen, as autograd does not see it either.
    """

    def __init__(self, note: Callable[[], Any] = lambda: None):
        self._note, self._kept = note, list[weakref.ref[_Saved]]()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        holder = _Saved(tensor.detach(), self._note())  # not the tensor: an output would keep its own graph alive
        self._kept.append(weakref.ref(holder))
        return holder

    def __enter__(self) -> Saving:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def alive(self, exclude: Iterable[torch.Tensor] = ()) -> dict[int, list[_Saved]]:
        """Storage -> who holds it, without the storages of `exclude`.

        A storage goes by its address in PyTorch, not by that of its bytes: the meta device has none.
        """
        apart = {storage_key(tensor) for tensor in exclude}
        found: dict[int, list[_Saved]] = {}
        for ref in self._kept:
            if (holder := ref()) is not None and (key := storage_key(holder.tensor)) not in apart:
                found.setdefault(key, []).append(holder)
        return found

    def bytes(self, exclude: Iterable[torch.Tensor] = ()) -> int:
        return sum(holders[0].tensor.untyped_storage().nbytes() for holders in self.alive(exclude).values())


def storage_key(tensor: torch.Tensor) -> int:
    """The same for every view of a storage, and another one for every other storage that is alive."""
    return tensor.untyped_storage()._cdata


def saved_bytes(forward: Callable[[], object], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that stay alive for backward once `forward()` has returned its loss (or anything that holds the graph).

    Every storage counts once and whole, however many views of it were saved. Storages of `exclude` (parameters,
    buffers, inputs: alive with or without the graph) do not count. On any device, the meta device included.
    """
    with Saving() as saving:
        graph = forward()
    count = saving.bytes(exclude)
    del graph  # only now: the count is of what the graph keeps
    return count


def saved_bytes_of_model(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """The same for a model called as model(**batch), without its parameters, its buffers and the batch."""
    return saved_bytes(lambda: model(**batch)["loss"], [*model.parameters(), *model.buffers(), *batch.values()])


def saved_bytes_per_token_per_layer(
    build: Callable[[int], nn.Module], batch: Mapping[str, torch.Tensor], layers: tuple[int, int] = (2, 3)
) -> float:
    """Saved bytes of the model with layers[1] layers minus those with layers[0], over the added layers and the tokens.

    The difference leaves out embeddings, pooler, head and whatever the first layer adds once (a mask, say). `build(n)`
    gives a model of n layers in training mode, ready to be called as model(**batch); tokens are all positions of
    batch["input_ids"], padding included.
    """
    few, many = layers
    if not 0 < few < many:
        raise ValueError(f"layers must be two increasing numbers above 0, got {layers}")

    added = saved_bytes_of_model(build(many), batch) - saved_bytes_of_model(build(few), batch)
    return added / (many - few) / batch["input_ids"].numel()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` measurements."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, len(values))


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | str = "cpu",
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Runs every variant once a round, in turn, and returns the seconds of each run.

    On a GPU each run ends with a synchronisation, inside the time taken. `after_round` runs outside of it. Warm up by a
    call of its own: the first run of anything is not like the others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
        after_round()
    return seconds


def paired_ratio(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> Spread:
    """The time of `of` over that of `to`, round by round, so that a drift of the machine cancels."""
    return Spread.of([a / b for a, b in zip(seconds[of], seconds[to], strict=True)])


@dataclass(frozen=True)
class Peak:
    """Bytes held before and at most during a call, and how they were read."""

    before: int
    peak: int
    method: str

    @property
    def rise(self) -> int:
        return self.peak - self.before


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a process could still allocate: of a GPU, or of the machine within this control group's limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux: half of what there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file():
        most, now = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        if most != "max":  # files that nobody reads any more give way
            free = min(free, int(most) - int(now) + int(stat["inactive_file"]))
    return max(0, free)


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu") -> Peak:
    """Peak memory while `run()` runs: allocated by PyTorch on a GPU, resident in this process otherwise.

    Call it through `fresh_process`, after one small run for what is set up once. On Linux the kernel's high-water mark
    is reset first; elsewhere it is that of the whole life of the process, so the rise is a lower bound.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return Peak(before, torch.cuda.max_memory_allocated(device), "torch.cuda.max_memory_allocated")
    gc.collect()
    _return_free_memory()
    if _reset_high_water():
        before = _status_bytes("VmRSS")
        run()
        return Peak(before, _status_bytes("VmHWM"), "VmHWM, reset before the step")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    run()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Peak(before, after, "ru_maxrss of the whole process; the rise is a lower bound")


def give_blocks_back(size: int = 1 << 16) -> None:
    """From now on this process gives every freed block of `size` bytes or more back at once, so that resident memory is
    what is held. By default glibc keeps and splits blocks of up to 32 MiB: a step then needs 1.2 to 3 times as much.

    Raises StudyError where the C library has no mallopt.
    """
    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or libc.mallopt(M_MMAP_THRESHOLD, size) != 1:
        raise StudyError("this C library has no mallopt: memory cannot be measured with freed blocks given back")


def fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a new interpreter that has imported and run nothing else; returns its (pickled) result.

    `function` must be importable by name. Its exception is raised here; a child that dies raises StudyError.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, args), daemon=True)
    with _no_interrupt():  # inherited: Ctrl-C ends this process, which ends the child
        child.start()
    sender.close()
    try:
        value = receiver.recv()
    except EOFError:
        child.join()
        hint = " (out of memory?)" if child.exitcode == -signal.SIGKILL else ""
        raise StudyError(f"the process measuring {function.__name__} died, exit code {child.exitcode}{hint}") from None
    except BaseException:  # Ctrl-C: the child does not hear it
        child.kill()
        raise
    finally:
        child.join()
        receiver.close()
    if isinstance(value, BaseException):
        raise value
    return value


def _answer(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send(function(*args))
    except Exception as error:  # handed to the parent, which raises it
        sender.send(error)


@contextmanager
def _no_interrupt():
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _return_free_memory() -> None:
    """Makes glibc give freed pages back, or the step would fill them without a rise of resident memory."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or a container that forbids it: the caller reads another mark and says so
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise StudyError(f"/proc/self/status has no {field}")
