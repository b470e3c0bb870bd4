"""Runs the op cases: gate, ceilings, turns with rotating inputs, CUDA graphs, and backward alone."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import petune_kernels as pk
from petune_kernels import cuda_graph
from petune_kernels.studies import measure, train
from petune_kernels.studies.errors import StudyError
from petune_kernels.studies.result import Files

from . import gate, harness, ops
from .harness import COMPILED, EAGER, MATMULS, OURS

WIDTHS = {"minilm": 384, "bert-base": 768, "bert-large": 1024, "roberta-large": 1024, "llama": 4096, "tiny": 64}
ROTATE = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # more than the last-level cache: 32 MiB of L3, 50 MB of L2
SETS = 64  # at most so many sets of inputs; the result says how many bytes they are
GATE_ELEMENTS = 2**26
CEILING_BYTES, CEILING_WIDTH = {"cpu": 2**27, "cuda": 2**30}, {"cpu": 1024, "cuda": 8192}
CEILING_CALLS = {"cpu": 1, "cuda": 10}  # a turn: on a GPU launch and synchronisation would count
TRITON = f"{OURS}, triton"
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
OWN_GRAPHS = tuple(map(harness.compiled, ("reduce-overhead", "max-autotune")))

Run = Callable[[], object]
Call = Callable[[ops.Tensors, float, Tensor | None], Any]


@dataclass(frozen=True)
class Settings:
    """`compile`: torch.compile's modes. `rotate` (bytes) and `calls` (least number in a turn) are 0 for what suits the
    device; `graphs` (on a GPU): CUDA graphs and, of ops, backward alone, too."""

    widths: Sequence[str] = ("minilm",)
    dtypes: Sequence[str] = tuple(train.DTYPES)
    names: Sequence[str] = ()
    batch: int = 16
    length: int = 128
    device: str = "cpu"
    rounds: int = 15
    compile: Sequence[str] = ()
    rotate: int = 0
    calls: int = 0
    graphs: bool = True


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a copy (read and written) and flops per second of a square matmul; medians of three."""
    count, calls = CEILING_BYTES[device.type] // dtype.itemsize, CEILING_CALLS[device.type]
    source = torch.ones(count, dtype=dtype, device=device)
    target, n = torch.empty_like(source), CEILING_WIDTH[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def repeated(call: Run) -> Run:
        def run() -> None:
            for _ in range(calls):
                call()

        return run

    runs = {"copy": repeated(lambda: target.copy_(source)), "matmul": repeated(lambda: a @ b)}
    measure.interleave(runs, 1, device)
    seconds = {name: statistics.median(values) / calls for name, values in measure.interleave(runs, 3, device).items()}
    return {
        "copy_bytes_per_second": 2 * count * dtype.itemsize / seconds["copy"],
        "matmul_flops_per_second": 2 * n**3 / seconds["matmul"],
    }


def run_ops(settings: Settings, files: Files, console: Console, benchmark: str = "ops") -> dict[str, Any]:
    """Every op case of the settings; raises StudyError in the end where petune has no time."""
    device = torch.device(settings.device)
    harness.check_names("--width", settings.widths, list(WIDTHS))
    known = list(dict.fromkeys(case.op for case in ops.CASES))
    harness.check_names("--op", settings.names, known)
    result = harness.Result(files, benchmark, dataclasses.asdict(settings), device)
    chosen = [case for case in ops.CASES if not settings.names or case.op in settings.names]
    todo = [
        (w, d, case)
        for w in settings.widths
        for d in settings.dtypes
        for case in chosen
        if case.comes_in(train.DTYPES[d])
    ]
    best: dict[str, dict[str, float]] = {name: {} for name in settings.dtypes}
    result.data["ceilings"] = best

    def look(dtype: str) -> None:
        """Before every fifth case and at the end: a busy moment lowers no ceiling, a higher one is every row's."""
        for name, rate in ceilings(device, train.DTYPES[dtype]).items():
            best[dtype][name] = max(rate, best[dtype].get(name, 0.0))
        for row in result.data["rows"]:
            if row["case"]["dtype"] == dtype:
                set_against(row, best[dtype])

    with harness.progress(console, len(todo)) as begin:
        for i, (width, dtype, case) in enumerate(todo):
            begin(f"{case.op} {case.use} {width} {dtype}")
            if i % 5 == 0 or not best[dtype]:
                look(dtype)
            result.add(measure_op(case, WIDTHS[width], dtype, settings, best[dtype]))
            torch.compiler.reset()
        for dtype in settings.dtypes:
            look(dtype)
    result.finish(console)
    return result.data


def measure_op(
    case: ops.OpCase, hidden: int, dtype_name: str, settings: Settings, ceiling: Mapping[str, float]
) -> harness.Row:
    dtype, device = train.DTYPES[dtype_name], torch.device(settings.device)
    letters = ops.sizes(settings.batch, settings.length, hidden, dtype)
    heads = " {B} x {h} x {S} x {D}".format_map(letters) if case.op == "attention" else ""
    row = harness.new_row(
        {"op": case.op, "use": case.use + heads, "tokens": letters["T"], "hidden": hidden, "dtype": dtype_name}
    )
    with harness.reported(row):
        calls = providers(case, device, settings.compile, row["refused"])
        check_op(case, calls, letters, dtype, device, row)
        first = ops.inputs(case, letters, dtype, device, seed=0)
        with torch.no_grad():
            outs = gate.outputs(case.eagerly(first, case.p))
        one = sum(t.numel() * t.element_size() for t in (*first.values(), *outs))  # a dy for each output
        del first, outs
        count = min(SETS, -(-(settings.rotate or ROTATE[device.type]) // one))
        row["rotated_bytes"] = one * count
        repeats = max(1, -(-settings.calls // count))

        def ready(name: str, call: Call) -> Turn:  # inputs of its own: a peer may write over what it is given
            sets = [ops.inputs(case, letters, dtype, device, seed) for seed in range(count)]
            return Turn(name, call, case.p, sets, device, repeats)

        turns = harness.attempt(calls, row["refused"], ready)
        time_turns(turns, row, settings, repeats * count)
        amounts(row, case.bytes, case.flops, letters)
        if "graph" in row:
            amounts(row["graph"], case.bytes, case.flops, letters)
            if case.back_bytes:
                row["backward"] = graph_times(turns, Turn.recorded_backward, settings, count)
                amounts(row["backward"], case.back_bytes, case.back_flops, letters)
        set_against(row, ceiling)
    return row


def providers(case: ops.OpCase, device: torch.device, modes: Sequence[str], refused: dict[str, str]) -> dict[str, Call]:
    """What takes turns, as calls of inputs, p and seed; why a peer does not goes into `refused`."""
    calls: dict[str, Any] = {EAGER: lambda t, p, seed: case.eagerly(t, p), OURS: case.ours}
    if device.type == "cuda":
        calls[TRITON] = case.ours
    if case.matmuls is not None:
        calls[MATMULS] = lambda t, p, seed: case.matmuls(t)
    for mode in modes:
        fast = torch.compile(case.eagerly, dynamic=False, mode=mode)
        calls[harness.compiled(mode)] = lambda t, p, seed, fast=fast: fast(t, p)
    for name, load in case.peers.items():
        if device.type != "cuda":
            refused[name] = "needs a GPU"
            continue
        if modes and name == "unsloth":
            refused[name] = "its import changes torch.compile's settings: measured without --compile"
            continue
        try:
            call = load()
        except Exception as error:  # a package's import may raise anything; the others go on
            refused[name] = f"not importable: {harness.reason(error)}"
        else:
            calls[name] = lambda t, p, seed, call=call: call(t)
    return calls


def within(name: str) -> contextlib.AbstractContextManager[None]:
    """To be in force around all of a provider's work: an op picks its backend in backward anew."""
    return pk.backend("triton") if name == TRITON else contextlib.nullcontext()


class Turn:
    """A provider's forward and backward of every one of its sets of inputs, each with a dy of its own.

    Runs three times here, as often as torch.compile's CUDA graphs take to be replayed: what breaks is seen before any
    turn is timed.
    """

    def __init__(
        self, name: str, call: Call, p: float, sets: Sequence[ops.Tensors], device: torch.device, repeats: int = 1
    ):
        self._name, self._call, self._p, self._device, self._repeats = name, call, p, device, repeats
        leaves = [[t for t in tensors.values() if t.requires_grad] for tensors in sets]
        generator = torch.Generator(device).manual_seed(0)
        with within(name):
            made = call(sets[0], p, None)
            outs = gate.outputs(made)  # a dy is laid out as the provider lays out its output
            dys = [[torch.empty_like(out).normal_(generator=generator) for out in outs] for _ in sets]
            if leaves[0]:  # a forward without it would leave torch.compile's CUDA graphs waiting
                torch.autograd.grad(made, leaves[0], dys[0], allow_unused=True)
        del made, outs
        self._work = list(zip(sets, leaves, dys, strict=True))
        measure.interleave({name: self.run}, 2, device)

    def run(self) -> None:
        with within(self._name):
            for _ in range(self._repeats):
                for tensors, leaves, dys in self._work:
                    made = self._call(tensors, self._p, None)
                    if leaves:  # the gate has seen a gradient for each; the bare matmuls have one for x alone
                        torch.autograd.grad(made, leaves, dys, allow_unused=True)

    def recorded(self) -> Run:
        """The same as one CUDA graph."""
        recorder = cuda_graph.Recorder(self._device)
        recorder.probe(self.run)
        return recorder.record(self.run)

    def recorded_backward(self) -> Run:
        """Backward of all sets as one CUDA graph, after the forward of all of them has run in another.

        So what a backward reads has left the cache since it was written. Gradients are kept, for the same reason.
        torch.compile's backward may write over what its forward kept, and is not asked to keep it.
        """
        keep = not self._name.startswith(COMPILED)

        def forward() -> None:
            self._made = [self._call(tensors, self._p, None) for tensors, _, _ in self._work]

        def backward() -> None:
            self._gradients = [
                torch.autograd.grad(made, leaves, dys, retain_graph=keep, allow_unused=True)
                for made, (_, leaves, dys) in zip(self._made, self._work, strict=True)
            ]

        recorder = cuda_graph.Recorder(self._device)
        recorder.probe(self.run)
        with within(self._name):
            self._forward = recorder.record(forward)  # lives as long as what backward reads
            replay = recorder.record(backward)
        self._forward()
        return replay


def time_turns(turns: Mapping[str, Turn], row: harness.Row, settings: Settings, calls: int = 1) -> None:
    """The turns' times and, on a GPU, those of their CUDA graphs into the row; `calls`: of one run."""
    harness.needed(turns)
    device = torch.device(settings.device)
    runs = {name: turn.run for name, turn in turns.items()}
    row |= harness.turns(runs, settings.rounds, device, warm=1, calls=calls)
    if settings.graphs and device.type == cuda_graph.Recorder.device_type:
        row["graph"] = graph_times(turns, Turn.recorded, settings, calls)


def graph_times(
    turns: Mapping[str, Turn], record: Callable[[Turn], Run], settings: Settings, calls: int
) -> dict[str, Any]:
    """Times of what `record` captures of every turn, in turn; what cannot be captured is named with the reason."""
    device, refused = torch.device(settings.device), dict[str, str]()

    def ready(name: str, turn: Turn) -> Run:
        if name in OWN_GRAPHS:
            raise StudyError("replays CUDA graphs of its own, which no other can hold")
        replay = record(turn)
        measure.interleave({name: replay}, 1, device)
        return replay

    graphs = harness.attempt(turns, refused, ready)
    return harness.turns(graphs, settings.rounds, device, warm=1, calls=calls) | {"refused": refused}


def amounts(part: harness.Row, moved: str, flops: str, letters: Mapping[str, int]) -> None:
    """What the times of a row, or of a part of it, are for: bytes and flops of one call."""
    part["formula"] = {"bytes": moved, "flops": flops}
    part["amount"] = {name: ops.evaluate(formula, letters) for name, formula in part["formula"].items()}


def set_against(row: harness.Row, ceiling: Mapping[str, float]) -> None:
    """Rates and shares of these ceilings into the row and its parts, each of its own times."""
    for part in (row, row.get("graph", {}), row.get("backward", {})):
        if "amount" in part:
            part |= shares(part, ceiling)


def shares(part: Mapping[str, Any], ceiling: Mapping[str, float]) -> dict[str, Any]:
    """Rates and the share of the floor: the larger of bytes over the copy's rate and flops over the matmul's."""
    amount, work = part["amount"]["bytes"], part["amount"]["flops"]
    by_bytes, by_flops = amount / ceiling["copy_bytes_per_second"], work / ceiling["matmul_flops_per_second"]
    floor = max(by_bytes, by_flops)
    medians = {name: spread["median"] for name, spread in part["seconds"].items() if name != MATMULS}

    def rate(second: float) -> str:
        return f"{work / second / 1e12:.3g} TFLOP/s" if by_flops > by_bytes else f"{amount / second / 1e9:.3g} GB/s"

    return {
        "floor_seconds": floor,
        "share_of_floor": {name: floor / second for name, second in medians.items()},
        "share_of_copy": {name: by_bytes / second for name, second in medians.items()},
        "rate": {name: rate(second) for name, second in medians.items()},
    }


def check_op(
    case: ops.OpCase,
    calls: dict[str, Any],
    letters: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    row: harness.Row,
) -> None:
    """Takes every provider whose outputs or gradients are wrong out of `calls` and says why in the row.

    A case too large for float64 is checked on fewer and then shorter sequences. Dropout: ours is compared with the mask
    of its own seed; the others have masks of their own and are compared without dropout. Everyone gets inputs of its
    own: a peer may write over them.
    """
    batch, length = letters["B"], letters["S"]
    row_elements = length * letters["h"] if case.op == "attention" else letters["N"]
    while batch * length * row_elements > GATE_ELEMENTS and (batch > 1 or length > 64):
        batch, length = (batch // 2, length) if batch > 1 else (1, length // 2)
        row_elements = length * letters["h"] if case.op == "attention" else letters["N"]
    smaller, seed = ops.sizes(batch, length, letters["H"], dtype), torch.tensor([7], device=device)

    def trained(t: ops.Tensors) -> dict[str, Tensor]:
        return {name: x for name, x in t.items() if x.requires_grad}

    t = ops.inputs(case, smaller, dtype, device, seed=0)
    wide = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in t.items()}
    made = case.expression(wide, lambda x: x)
    dys = gate.projections(made)
    exact = {0.0: gate.gradients(made, trained(wide), dys)}
    # On a GPU attention without a seed is torch's own, whose mask nobody can name: compared without dropout there.
    own_p = 0.0 if case.op == "attention" and device.type == "cuda" else case.p
    if own_p:
        exact[own_p] = gate.gradients(case.expression(wide, ops.masked(seed, own_p)), trained(wide), dys)
    eager = gate.gradients(case.eagerly(t, 0.0), trained(t), dys)

    def verdict(name: str, call: Call) -> str:
        p = own_p if name.startswith(OURS) else 0.0
        t = ops.inputs(case, smaller, dtype, device, seed=0)
        with within(name):
            found = gate.gradients(call(t, p, seed if p else None), trained(t), dys)
        fact = {"p": p, "tokens": batch * length}
        row["gate"][name], wrong = gate.compare(found, eager, exact[p], exact[0.0], dtype, fact)
        return wrong

    harness.judge(calls, row["refused"], verdict)
