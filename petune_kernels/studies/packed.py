"""Runs that differ only in their seeds, trained together over one frozen backbone (`pk.replicate`).

Each is the run that `tune_once` would be, computed by the same code (single.Tuning): it asks for its losses and scores,
and here all of them are computed in one forward. A run that stops early leaves the batch and comes back to be scored.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import petune_kernels as pk

from .errors import InputError
from .measure import free_memory, peak_memory, saved_bytes
from .methods import Method, Stage
from .recipe import Recipe, Seeds
from .single import Outcome, Progress, Step, Tuning, Work
from .tasks import Examples, TaskData

METHODS = (
    "layernorm", "layernorm-attention", "layernorm-ffn", "bitfit", "frozen", "lp", "lora", "prefix", "adapter"
)  # fmt: skip
"""What packs: nothing of the backbone's matrices trains."""

MOST = 32
"""Runs in a pack; docs/decisions.md has the throughput against their number."""

_SHARE = 0.5  # of the free memory that a pack may be estimated to need
_SLACK = 2.0  # a step's peak over what its graph keeps: gradients and results on their way


def why_not(method: Method, task: TaskData, recipe: Recipe, dropout: bool) -> str:
    """Why runs of this kind are not packed, or ''."""
    if method.name not in METHODS:
        return f"{method.name} trains what replicas would share"
    if method.stages()[0].head_only and not dropout:
        return "without dropout the head's input is computed once, which is cheaper still"
    if dropout and recipe.pad != "longest":
        return 'padding a batch to its own longest row ties dropout masks to it; the recipe\'s pad = "longest" packs'
    if recipe.group_by_length and len(task.train) % recipe.batch:
        return "group_by_length deals batches of two sizes in another order to each run"
    return ""


def fitting(
    folder: Path,
    method: Method,
    task: TaskData,
    recipe: Recipe,
    dropout: bool,
    device: str | torch.device,
    runs: int,
    processes: int = 1,
) -> int:
    """How many of `runs` are packed at a time, by an estimate of what one needs; 1 for none.

    processes: that share the memory. Raises ReplicaError where the model does not pack with this method, InputError
    where the method does not fit it.
    """
    with _fits(method):
        one = Tuning(folder, method, task, recipe, Seeds(0, 0), True, dropout, torch.device(device), None)
        model, _, _ = _prepared(one)
        pk.patch(model, memory=recipe.memory)
        longest = one.train_data.by_length(range(len(task.train)))[-recipe.batch :]
        inputs = one.train_data.inputs(longest)
        given = [*model.parameters(), *model.buffers(), *inputs.values()]
        step = saved_bytes(lambda: one.loss(model.train()(**inputs).logits, one.train_data.labels(longest)), given)
        # value, packed and own gradient, two moments and the kept checkpoint
        own = sum(p.numel() * (p.element_size() + 5 * 4) for p in model.parameters() if p.requires_grad)
        most = min(runs, MOST, int(_SHARE * free_memory(device) / processes / (_SLACK * step + own)))
        if most > 1:
            pk.replicate(model, [(0, 0), (1, 1)], init="keep", memory=recipe.memory)  # raises where it does not pack
        packs = -(-runs // max(1, most))
        return -(-runs // packs)  # even ones


def tune_packed(
    folder: Path,
    method: Method,
    task: TaskData,
    recipe: Recipe,
    seeds: Sequence[Seeds],
    *,
    dropout: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> list[Outcome]:
    """What `tune_once` gives for each of the seeds, patched, to rounding.

    Raises InputError as it does, and where such runs do not pack (see `why_not`); ReplicaError where this model does
    not; the device's own error when it is out of memory.
    """
    reason = why_not(method, task, recipe, dropout)
    if reason:
        raise InputError(f"method {method.name!r} does not pack: {reason}")
    with _fits(method):
        return _Pack(Path(folder), method, task, recipe, seeds, dropout, torch.device(device), progress).outcomes()


@contextmanager
def _fits(method: Method) -> Iterator[None]:
    """What says that a method does not fit the model becomes an InputError that names the method."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, pk.PatchError) as error:
        raise InputError(f"method {method.name!r}: {error}") from error


def halving(
    folder: Path,
    method: Method,
    task: TaskData,
    recipe: Recipe,
    seeds: Sequence[Seeds],
    say: Any = lambda line: None,
    **more: Any,
) -> Iterator[list[Outcome]]:
    """The outcomes of all seeds in their order, pack by pack; one that is out of memory is done as two halves."""
    try:
        yield tune_packed(folder, method, task, recipe, seeds, **more)
        return
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(seeds) == 1:
            raise
    gc.collect()  # the pack's tensors went with the exception
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(seeds) + 1) // 2
    say(f"out of memory with {len(seeds)} runs packed: {half} and {len(seeds) - half} instead")
    for part in (seeds[:half], seeds[half:]):
        yield from halving(folder, method, task, recipe, part, say, **more)


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        re.search("can't allocate memory|not enough memory", str(error))  # the CPU's allocator has no class for it
    )


def _prepared(run: Tuning) -> tuple[nn.Module, Stage, tuple[str, ...]]:
    """A run's model before its only stage, that stage, and the names of the head's parameters."""
    setting, (stage,) = run.begin(), run.plan
    model, _ = stage.prepare(setting)
    return model, stage, setting.head


class _Pack:
    def __init__(
        self,
        folder: Path,
        method: Method,
        task: TaskData,
        recipe: Recipe,
        seeds: Sequence[Seeds],
        dropout: bool,
        device: torch.device,
        progress: Progress | None,
    ):
        self.device, self.task = device, task
        common = (folder, method, task, recipe)
        self.runs: list[Tuning] = []
        for g, one in enumerate(seeds):
            data = self.runs[0].data if g else None
            own = progress if g == 0 else None
            self.runs.append(Tuning(*common, one, True, dropout, device, own, data))
        self.model, self.stage, self.head = _prepared(self.runs[0])
        values = [_trained(self.model)] + [_trained(_prepared(run)[0]) for run in self.runs[1:]]
        self.start = time.perf_counter()
        self.together = pk.replicate(self.model, [(s.wi, s.do) for s in seeds], init="keep", memory=recipe.memory)
        for g, run in enumerate(self.runs):
            self.together.load(g, values[g])
            run.model, run.own = self.model, self.together.named_parameters(g)
        self.model.train()

    def outcomes(self) -> list[Outcome]:
        peak = peak_memory(self._train, self.device)
        spent = time.perf_counter() - self.start
        for run in self.runs:
            run.note(peak)
            run.seconds = spent / len(self.runs)
        well = [g for g, run in enumerate(self.runs) if run.failed is None]
        for g in well:
            self.together.resume(g)
        tests: dict[int, dict[str, dict[str, float]]] = {g: {} for g in range(len(self.runs))}
        for name, part in self.task.tests.items():
            for g, (_, metrics) in (self._evaluate(part) if well else {}).items():
                tests[g][name] = metrics
        return [run.outcome(tests[g], packed=len(self.runs)) for g, run in enumerate(self.runs)]

    def _train(self) -> None:
        work: dict[int, Work] = {
            g: run.stage(self.stage, None, run.steps, run.batches(), self.head, True, self.start)
            for g, run in enumerate(self.runs)
        }
        asked = {g: next(one) for g, one in work.items()}
        while asked:
            steps = {g: one for g, one in asked.items() if isinstance(one, Step)}
            # all have the same number of steps between two evaluations, so that they ask for the same thing at a time
            answers: Mapping[int, Any] = self._step(steps) if steps else self._evaluate(self.task.validation)
            asked = {}
            for g, answer in answers.items():
                try:
                    asked[g] = work[g].send(answer)
                except StopIteration:
                    self.together.stop(g)

    def _step(self, asked: Mapping[int, Step]) -> dict[int, float]:
        active, data = self.together.active, self.runs[0].train_data
        assert list(active) == list(asked)
        width = self.runs[0].width or max(data.width(asked[g].rows) for g in active)
        for g in active:
            self.together.manual_seed(g, asked[g].seed)
        inputs = self.together.stack([data.inputs(asked[g].rows, width) for g in active])
        logits = self.together.split(self.model(**inputs).logits)
        losses = [self.runs[g].loss(logits[i], data.labels(asked[g].rows)) for i, g in enumerate(active)]
        torch.stack(losses).sum().backward()
        return dict(zip(active, torch.stack(losses).tolist(), strict=True))

    @torch.no_grad()
    def _evaluate(self, part: Examples) -> dict[int, tuple[float, dict[str, float]]]:
        active, first = self.together.active, self.runs[0]
        data, training = first.encoded(part), self.model.training
        self.model.eval()
        outputs: list[Tensor] = [
            self.together.split(self.model(**self.together.repeat(data.inputs(rows))).logits)
            for rows in first.chunks(part)
        ]
        self.model.train(training)
        return {g: self.runs[g].scores(part, [one[i] for one in outputs]) for i, g in enumerate(active)}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
