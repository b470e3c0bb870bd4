"""What capturing does beside torch.cuda.graph, as far as a CPU shows it; and what its stand-in must not miss."""

from __future__ import annotations

import contextlib
import gc
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from petune_kernels import cuda_graph
from petune_kernels.patch import memory

from .patch import models
from .recorder import Recorder

CPU = torch.device("cpu")


@pytest.fixture
def scaled() -> Any:
    def scaled(x: Tensor, y: float) -> Tensor:
        return torch.tensor(y).log() * x

    return _script(scaled)


def _script(function: Any) -> Any:
    with pytest.warns((DeprecationWarning, FutureWarning)):
        return torch.jit.script(function)


def test_a_number_made_by_torchscript_is_replayed(scaled: Any) -> None:
    """The suite poisons fresh memory, which the recorder sees, and not what TorchScript writes over it."""
    x, y = torch.ones(3), torch.zeros(3)
    replay = Recorder(CPU).record(lambda: y.copy_(scaled(x, 8.0)))
    for value in (1.0, 2.0):
        x.fill_(value)
        replay()
        torch.testing.assert_close(y, x * torch.tensor(8.0).log())


def test_torchscript_does_not_specialise_in_a_capture(scaled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second run with a shape it would, and on a GPU compile and load kernels."""
    recorder = _without_a_gpu(monkeypatch)

    def run() -> None:
        scaled(torch.ones(3), 2.0)

    run()
    recorder.record(run)
    assert not _specialised(scaled)
    run()
    assert _specialised(scaled)


def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> cuda_graph.Recorder:
    for name in ("graph", "device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    recorder = cuda_graph.Recorder.__new__(cuda_graph.Recorder)
    recorder._device, recorder._pool, recorder._stream = CPU, None, None  # type: ignore[assignment]
    return recorder


@pytest.mark.parametrize("real", (False, True))
@pytest.mark.parametrize("enabled", (False, True))
@pytest.mark.parametrize("fails", (False, True))
def test_nothing_is_collected_in_a_capture(
    fails: bool, enabled: bool, real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cycle that holds a graph or an event would end in it."""
    recorder, was = _without_a_gpu(monkeypatch) if real else Recorder(CPU), gc.isenabled()
    ended: list[str] = []

    class Cycle:
        def __init__(self, name: str) -> None:
            self.name, self.me = name, self

        def __del__(self) -> None:
            ended.append(self.name)

    def run() -> None:
        assert ended == ["before"] and not gc.isenabled()
        Cycle("within")
        for _ in range(20_000):  # enough for the collector of what is young
            _ = [[]]
        assert ended == ["before"]
        if fails:
            raise RuntimeError("not captured")

    Cycle("before")
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(RuntimeError, match="not captured") if fails else contextlib.nullcontext():
            recorder.record(run)
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was else gc.disable()


@pytest.mark.parametrize("fails", (False, True))
def test_the_mode_of_a_probe_is_taken_back(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """torch warns that it is a prototype, which is an error under -W error."""
    modes = ["default"]

    def choose(mode: str) -> None:
        modes.append(mode)
        warnings.warn("a prototype feature", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", choose)
    recorder = cuda_graph.Recorder.__new__(cuda_graph.Recorder)
    monkeypatch.setattr(recorder, "warm", lambda function, times: function(), raising=False)

    def run() -> None:
        assert modes[-1] == "error"
        if fails:
            raise RuntimeError("called a synchronizing CUDA operation")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="synchronizing") if fails else contextlib.nullcontext():
            recorder.probe(run)
    assert modes == ["default", "error", "default"]


def test_whether_a_step_waits_is_seen_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs to its end, and its other warnings are its own."""
    for name in ("get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: "default")
    recorder = cuda_graph.Recorder.__new__(cuda_graph.Recorder)
    monkeypatch.setattr(recorder, "warm", lambda function, times: function(), raising=False)
    ran = []

    def run(*said: str) -> None:
        for text in said:
            warnings.warn(text, UserWarning, stacklevel=1)
        ran.append(1)

    with pytest.warns(UserWarning, match="of its own"):
        assert "called a synchronizing" in recorder.waits(
            lambda: run("of its own", "called a synchronizing CUDA operation")
        )
    assert recorder.waits(run) == "" and len(ran) == 2


def test_a_capture_that_fails_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own context ends the capture before it leaves the stream, and raises there."""
    stream = "the user's"

    class Breaks:
        def __init__(self, *_: Any, **more: Any) -> None:
            self._to = more["stream"]

        def __enter__(self) -> None:
            nonlocal stream
            stream = self._to

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("capture_end")

    @contextlib.contextmanager
    def restoring(to: Any) -> Any:
        nonlocal stream
        before = stream
        try:
            yield
        finally:
            stream = before

    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", restoring)
    monkeypatch.setattr(torch.cuda, "graph", Breaks)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    recorder = cuda_graph.Recorder.__new__(cuda_graph.Recorder)
    recorder._device, recorder._pool, recorder._stream = CPU, None, "its own"  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="capture_end"):
        recorder.record(lambda: None)
    assert stream == "the user's"


def test_warming_up_makes_the_masks_of_a_capture() -> None:
    """In a capture transformers may not ask the GPU whether a mask hides anything, so it keeps it."""
    from transformers.utils import import_utils

    seen: list[bool] = []
    recorder = Recorder(CPU)
    recorder.warm(lambda: seen.append(import_utils.is_cuda_stream_capturing()), times=2)
    recorder.record(lambda: seen.append(import_utils.is_cuda_stream_capturing()))
    assert seen == [True] * 3 and not import_utils.is_cuda_stream_capturing()


def _specialised(function: Any) -> bool:
    try:
        return bool(function.get_debug_state().execution_plans)
    except RuntimeError as error:  # it asserts that there is a plan
        assert "optimized_plan_" in str(error)
        return False


class _Crossing(TorchDispatchMode):
    """Ops from the host to the device or back: no capture takes them, but for a number that a kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ({t.device for t in tree_leaves(x) if isinstance(t, Tensor)} for x in ((args, kwargs), out))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default) and len(given | made) > 1:
            self.ops.append(str(func))
        return out


@pytest.mark.parametrize("family", ("bert", "roberta", "electra", "distilbert", "deberta-v2", "esm", "vit"))
def test_no_host_memory_is_copied_in_a_stack(family: str) -> None:
    """On the meta device, which stands for a GPU. (Other stacks ask for values of their mask outside of a capture.)"""
    model, calls = models.build(family, dropout=False).train(), list[Any]()
    layer = next(filter(memory.is_layer, model.modules()))
    parents = {child: m for m in model.modules() for child in m.children()}
    stack = parents[parents[layer]]
    stack.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(**models.batch(family, S=8))
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().to("meta"), calls[0])
    stack.to("meta")
    with _Crossing() as seen, cuda_graph.HostNumbers():
        stack(*args, **kwargs)
    with _Crossing() as otherwise:
        stack(*args, **kwargs)
    assert not seen.ops and bool(otherwise.ops) == (family == "deberta-v2")


def test_numbers_of_the_host_keep_value_shape_and_dtype() -> None:
    with cuda_graph.HostNumbers():
        here = torch.tensor([2.5]).to(torch.float64)
        there = torch.tensor([[3]]).to("meta", torch.bfloat16)
        many = torch.arange(3.0).to("meta")
    assert here.equal(torch.tensor([2.5], dtype=torch.float64))
    assert there.shape == (1, 1) and there.dtype == torch.bfloat16 and there.is_meta
    assert many.shape == (3,) and many.is_meta


def test_a_compiled_function_stays_compiled_among_numbers_of_the_host() -> None:
    ran = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: ran.append(1) or graph(*args)

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with cuda_graph.HostNumbers():
        assert double(torch.ones(2)).equal(torch.full((2,), 2.0))
    assert ran
