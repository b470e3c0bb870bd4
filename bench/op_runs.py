"""Runs the op cases and whole encoder layers: gate, ceilings, turns with rotating inputs, CUDA graphs."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import petune_kernels as pk
from petune_kernels.studies import measure, train
from petune_kernels.studies.result import Files
from petune_kernels.studies.shapes import SHAPES

from . import harness, models, ops
from .harness import COMPILED, EAGER, OURS

WIDTHS = {"minilm": 384, "bert-base": 768, "bert-large": 1024, "roberta-large": 1024, "llama": 4096, "tiny": 64}
ROTATE = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # more than the last-level cache: 32 MiB of L3, 50 MB of L2
SETS = 64  # at most so many sets of inputs; the result says how many bytes they are
GATE_ELEMENTS = 2**26
CEILING_BYTES, CEILING_WIDTH = {"cpu": 2**27, "cuda": 2**30}, {"cpu": 1024, "cuda": 8192}

Run = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """`rotate` (bytes) and `calls` (least number in a turn) are 0 for what suits the device."""

    widths: Sequence[str] = ("minilm",)
    dtypes: Sequence[str] = tuple(train.DTYPES)
    names: Sequence[str] = ()
    batch: int = 16
    length: int = 128
    device: str = "cpu"
    rounds: int = 15
    compile: bool = False
    rotate: int = 0
    calls: int = 0


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a copy (read and written) and flops per second of a square matmul; medians."""
    count = CEILING_BYTES[device.type] // dtype.itemsize
    source = torch.ones(count, dtype=dtype, device=device)
    target, n = torch.empty_like(source), CEILING_WIDTH[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    measure.interleave(runs, 2, device)
    seconds = {name: statistics.median(values) for name, values in measure.interleave(runs, 7, device).items()}
    return {
        "copy_bytes_per_second": 2 * count * dtype.itemsize / seconds["copy"],
        "matmul_flops_per_second": 2 * n**3 / seconds["matmul"],
    }


def run_ops(settings: Settings, files: Files, console: Console, benchmark: str = "ops") -> dict[str, Any]:
    """Every op case of the settings; raises StudyError in the end where petune failed its gate."""
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
        if not (case.wide and train.DTYPES[d].itemsize > 2)
    ]
    result.data["ceilings"] = {name: ceilings(device, train.DTYPES[name]) for name in settings.dtypes}
    with harness.progress(console, len(todo)) as begin:
        for width, dtype, case in todo:
            begin(f"{case.op} {case.use} {width} {dtype}")
            result.add(measure_op(case, WIDTHS[width], dtype, settings, result.data["ceilings"][dtype]))
            torch.compiler.reset()
    result.finish(console)
    return result.data


def measure_op(
    case: ops.OpCase, hidden: int, dtype_name: str, settings: Settings, ceiling: Mapping[str, float]
) -> harness.Row:
    dtype, device = train.DTYPES[dtype_name], torch.device(settings.device)
    letters = ops.sizes(settings.batch, settings.length, hidden, dtype)
    row: harness.Row = {
        "case": {"op": case.op, "use": case.use, "tokens": letters["T"], "hidden": hidden, "dtype": dtype_name},
        "gate": {}, "refused": {},
    }  # fmt: skip
    calls = providers(case, device, settings.compile, row["refused"])
    check_op(case, calls, letters, dtype, device, row)
    one = sum(math.prod(letters[i] for i in shape.split()) * dtype.itemsize for shape in case.shapes.values())
    rotate = settings.rotate or ROTATE[device.type]
    sets = [ops.inputs(case, letters, dtype, device, seed) for seed in range(min(SETS, -(-rotate // one)))]
    row["rotated_bytes"] = one * len(sets)
    repeats = max(1, -(-settings.calls // len(sets)))
    runs = {name: turn(call, case.p, sets, repeats) for name, call in calls.items()}
    count = repeats * len(sets)
    row |= harness.turns(runs, settings.rounds, device, calls=count)
    if device.type == "cuda":
        row |= graph_times(runs, settings.rounds, device, count)
    return row | shares(case, letters, row, ceiling)


def providers(
    case: ops.OpCase, device: torch.device, compiled: bool, refused: dict[str, str]
) -> dict[str, Callable[[ops.Tensors, float, Tensor | None], Any]]:
    """What takes turns, as calls of inputs, p and seed; why a peer does not goes into `refused`."""
    calls: dict[str, Any] = {EAGER: lambda t, p, seed: case.eagerly(t, p), OURS: case.ours}
    if device.type == "cuda":
        calls[f"{OURS}, triton"] = _forced("triton", case.ours)
    if compiled:
        fast = torch.compile(case.eagerly, dynamic=False)
        calls[COMPILED] = lambda t, p, seed: fast(t, p)
        if device.type == "cuda":
            tuned = torch.compile(case.eagerly, dynamic=False, mode="max-autotune-no-cudagraphs")
            calls[f"{COMPILED}, max-autotune"] = lambda t, p, seed: tuned(t, p)
    for name, load in case.peers.items():
        if device.type != "cuda":
            refused[name] = "needs a GPU"
            continue
        if compiled and name == "unsloth":
            refused[name] = "its import changes torch.compile's settings: measured without --compile"
            continue
        try:
            call = load()
        except Exception as error:  # a package's import may raise anything; the others go on
            refused[name] = f"not importable: {reason(error)}"
        else:
            calls[name] = lambda t, p, seed, call=call: call(t)
    return calls


def _forced(backend: str, call: Any) -> Any:
    def run(*args: Any) -> Any:
        with pk.backend(backend):
            return call(*args)

    return run


def turn(call: Any, p: float, sets: Sequence[ops.Tensors], repeats: int) -> Run:
    """One run: forward and backward once for every set of inputs, `repeats` times over."""
    with torch.no_grad():
        out = call(sets[0], p, None)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in outs]
    wanted = [[t for t in tensors.values() if t.requires_grad] for tensors in sets]

    def run() -> None:
        for _ in range(repeats):
            for tensors, leaves in zip(sets, wanted, strict=True):
                made = call(tensors, p, None)
                if leaves:
                    torch.autograd.grad(made, leaves, grads if isinstance(made, tuple) else grads[0])

    return run


def graph_times(runs: Mapping[str, Run], rounds: int, device: torch.device, calls: int) -> dict[str, Any]:
    """The same runs replayed from CUDA graphs, in turn; what cannot be captured is named with the reason."""
    graphs: dict[str, Run] = {}
    refused = {}
    for name, run in runs.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
        else:
            graphs[name] = graph.replay
    if not graphs:
        return {"graph_refused": refused}
    timed = harness.turns(graphs, rounds, device, calls=calls) if EAGER in graphs else {"seconds": {}, "speedup": {}}
    return {"graph_seconds": timed["seconds"], "graph_speedup": timed["speedup"], "graph_refused": refused}


def shares(
    case: ops.OpCase, letters: Mapping[str, int], row: harness.Row, ceiling: Mapping[str, float]
) -> dict[str, Any]:
    """Rates and the share of the floor: the larger of bytes over the copy's rate and flops over the matmul's."""
    moved, flops = ops.evaluate(case.bytes, letters), ops.evaluate(case.flops, letters)
    by_bytes, by_flops = moved / ceiling["copy_bytes_per_second"], flops / ceiling["matmul_flops_per_second"]
    floor = max(by_bytes, by_flops)
    seconds = {name: spread["median"] for name, spread in (row.get("graph_seconds") or row["seconds"]).items()}

    def rate(second: float) -> str:
        bound_by_flops = by_flops > by_bytes
        return f"{flops / second / 1e12:.3g} TFLOP/s" if bound_by_flops else f"{moved / second / 1e9:.3g} GB/s"

    return {
        "formula": {"bytes": case.bytes, "flops": case.flops},
        "floor_seconds": floor,
        "share_of_floor": {name: floor / second for name, second in seconds.items()},
        "rate": {name: rate(second) for name, second in seconds.items()},
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
    of its own seed; the others have masks of their own and are compared without dropout.
    """
    batch, length = letters["B"], letters["S"]
    row_elements = length * letters["h"] if case.op == "attention" else letters["N"]
    while batch * length * row_elements > GATE_ELEMENTS and (batch > 1 or length > 64):
        batch, length = (batch // 2, length) if batch > 1 else (1, length // 2)
        row_elements = length * letters["h"] if case.op == "attention" else letters["N"]
    t = ops.inputs(case, ops.sizes(batch, length, letters["H"], dtype), dtype, device, seed=0)
    wide = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in t.items()}
    seed = torch.tensor([7], device=device)

    def results(made: Any, tensors: ops.Tensors) -> dict[str, Tensor]:
        return gradients(made, {name: x for name, x in tensors.items() if x.requires_grad})

    exact = {0.0: results(case.expression(wide, lambda x: x), wide)}
    # On a GPU attention without a seed is torch's own, whose mask nobody can name: compared without dropout there.
    own_p = 0.0 if case.op == "attention" and device.type == "cuda" else case.p
    if own_p:
        exact[own_p] = results(case.expression(wide, ops.masked(seed, own_p)), wide)
    eager = results(case.eagerly(t, 0.0), t)
    for name in [name for name in calls if name != EAGER]:
        p = own_p if name.startswith(OURS) else 0.0
        try:
            found = results(calls[name](t, p, seed if p else None), t)
        except Exception as error:  # reported in table and result; the provider has no time
            row["refused"][name] = reason(error)
            del calls[name]
            continue
        fact = {"p": p, "tokens": batch * length}
        row["gate"][name], wrong = compare(found, eager, exact[p], exact[0.0], dtype, fact)
        if wrong:
            row["refused"][name] = wrong
            del calls[name]


def reason(error: BaseException) -> str:
    """Class and first line; of Triton's CompilationError, whose first line is a place in the source, the cause's."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(error).__name__}: {(str(cause).splitlines() or [''])[0]}"


def gradients(made: Any, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed random projection of them, in float64."""
    outs = made if isinstance(made, tuple) else (made,)
    found = {f"output {i}": out for i, out in enumerate(outs)}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        dys = [torch.randn(out.shape, generator=generator).to(out.device, torch.bfloat16).to(out.dtype) for out in outs]
        wanted = torch.autograd.grad(outs, list(leaves.values()), dys)
        found |= {f"gradient of {name}": grad for name, grad in zip(leaves, wanted, strict=True)}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def compare(
    found: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    eager_exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    fact: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """The bound of `studies.train.deviations`: three times eager's error and eight units of the dtype, relative RMS."""
    rows = []
    for name, value in exact.items():
        rows.append((name, _error(found[name], value), 3 * _error(eager[name], eager_exact[name])
                     + 8 * torch.finfo(dtype).eps))  # fmt: skip
    wrong = [(name, error, bound) for name, error, bound in rows if not error <= bound]
    name, error, bound = max(wrong or rows, key=lambda row: row[1] / row[2])
    shown = {"error": error if math.isfinite(error) else str(error), "bound": bound}
    reason = f"wrong: {name} is {error:.1e} off float64, allowed {bound:.1e}" if wrong else ""
    return {**fact, "compared": len(rows), "worst": name, **shown}, reason


def _error(value: Tensor, exact: Tensor) -> float:
    size = exact.norm().item()
    return (value - exact).norm().item() / (size or 1.0)


def run_layers(settings: Settings, regimes: Sequence[str], files: Files, console: Console) -> dict[str, Any]:
    """One encoder layer of each shape, forward and backward to its input, in the regimes of `models`."""
    device = torch.device(settings.device)
    harness.check_names("--shape", settings.widths, list(SHAPES))
    harness.check_names("--regime", regimes, models.REGIMES)
    result = harness.Result(files, "layers", dataclasses.asdict(settings) | {"regimes": list(regimes)}, device)
    shape = (settings.batch, settings.length)
    cases = [models.Case(w, r, d, *shape) for w in settings.widths for d in settings.dtypes for r in regimes]
    with harness.progress(console, len(cases)) as begin:
        for case in cases:
            begin(harness.title(dataclasses.asdict(case)))
            result.add(measure_layer(case, settings))
            torch.compiler.reset()
    result.finish(console)
    return result.data


def measure_layer(case: models.Case, settings: Settings) -> harness.Row:
    device, dtype = torch.device(settings.device), train.DTYPES[case.dtype]
    names = [EAGER, OURS, *([COMPILED] if settings.compile else [])]
    layers = {name: layer_of(models.build(case, OURS if name == OURS else EAGER, device, 1)) for name in names}
    if COMPILED in layers:
        layers[COMPILED].compile()
    hidden = SHAPES[case.shape][1].get("hidden_size", 768)
    x = torch.randn(case.batch, case.length, hidden, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype).requires_grad_()
    row: harness.Row = {"case": dataclasses.asdict(case), "gate": {}, "refused": {}}

    def results(layer: nn.Module, value: Tensor) -> dict[str, Tensor]:
        layer.eval()  # no dropout
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        found = gradients(_first(layer(value)), {"x": value, **trained})
        layer.train()
        return found

    small = x.detach()[:2].clone().requires_grad_()
    exact = results(copy.deepcopy(layers[EAGER]).double(), small.detach().double().requires_grad_())
    eager = results(layers[EAGER], small)
    for name in names[1:]:
        row["gate"][name], wrong = compare(results(layers[name], small), eager, exact, exact, dtype, {"dropout": "off"})
        if wrong:
            row["refused"][name] = wrong
            del layers[name]
    runs = {name: turn(_layer_call(layer), 0.0, [_leaves(layer, x)], 1) for name, layer in layers.items()}
    row |= harness.turns(runs, settings.rounds, device)
    return row | (graph_times(runs, settings.rounds, device, 1) if device.type == "cuda" else {})


def layer_of(model: nn.Module) -> nn.Module:
    """The only layer of a model built with one."""
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 1)
    return stack[0]


def _layer_call(layer: nn.Module) -> Any:
    return lambda t, p, seed: _first(layer(t["x"]))


def _leaves(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}


def _first(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made
