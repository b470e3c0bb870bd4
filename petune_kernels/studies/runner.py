"""Runs a study: what is already done is skipped, the rest goes over processes or ranks, each result to disk at once.

Patched runs that differ only in their seeds are trained together where their method packs (packed.py). With `jobs`
processes the parent alone writes. Under torchrun every rank takes each world_size-th run and writes a file
of its own, so ranks need no talk; a later start with another number of ranks, or none, goes on where they stopped.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import petune_kernels as pk
from petune_kernels.regimes.structure import read

from . import cache, machine, splits, store
from .errors import InputError, StudyError
from .study import Run, Study, check_keys
from .tasks import TaskData

Execute = Callable[[Study, Run, str, Callable[[int, int, float], None] | None], dict[str, Any]]
"""(study, run, device, progress) -> record; progress(steps done, steps in all, loss) or None."""


def rank() -> tuple[int, int]:
    """This process's place among those that torchrun started, and their number; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device(device: str) -> str:
    """The device of this rank: under torchrun, "cuda" is the GPU of its local rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def model_folder(model: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder that a study's `model` names; "minilm" is fetched where the cache lacks it."""
    if model == "minilm":
        return cache.fetch(cache.MINILM, say)
    if not Path(model).is_dir():
        raise InputError(f"model is {model!r}; accepted is a folder of a transformers model, or minilm")
    return Path(model)


def model_digest(model: str) -> str:
    """Of the config and the weights that a study's `model` names, so that no study goes on with others."""
    if model == "minilm":
        return cache.MINILM.sha256[:16]
    digest = hashlib.sha256()
    for path in sorted([*Path(model).glob("config.json"), *Path(model).glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def plan(study: Study, say: Callable[[str], None] = lambda line: None) -> list[Run]:
    """All runs of the study, after a check of its methods, recipes and data, so that no run finds a fault in them."""
    layers = None
    folder = model_folder(study.model, say)
    if any(method.each_layer for method in study.methods):
        from . import shapes

        layers = len(read(shapes.empty_model(str(folder), 2)).blocks)
    runs = study.runs(layers)
    for run in {run.method.title + run.stop_on: run for run in runs}.values():
        recipe_of(study, run)
        _check_fits(folder, method_of(run), run.method.title)
    for task in {run.task.title + run.task.protocol: run.task for run in runs}.values():
        load_task(task)
    return runs


def _check_fits(folder: Path, method: Any, title: str) -> None:
    """Raises InputError where the method's first stage does not fit the model, as far as one without values tells."""
    from . import shapes
    from .methods import Setting

    if method.name in ("adapter", "random"):  # they look at what a model computes, or at its values
        return
    try:
        model = shapes.empty_model(str(folder), 2)
        with torch.device("meta"):
            method.stages()[0].prepare(Setting(lambda: model, 0, lambda model: [], read(model).head, model))
    except InputError:
        raise
    except RuntimeError:  # some models do not do without values; the first run will tell
        return
    except ValueError as error:
        raise InputError(f"method {title!r}: {error}") from error


def tuned(study: Study, run: Run, device: str, **more: Any) -> Any:
    """The `Outcome` of one run; `more` goes to `tune_once`."""
    from .recipe import Seeds
    from .single import tune_once

    recipe, seeds = recipe_of(study, run), Seeds(wi=run.wi, do=run.do)
    more |= {"patched": run.patched, "dropout": study.dropout, "device": device}
    return tune_once(model_folder(study.model), method_of(run), load_task(run.task), recipe, seeds, **more)


def units(
    study: Study, todo: list[Run], device: str, processes: int, say: Callable[[str], None]
) -> list[tuple[Run, ...]]:
    """The runs as they are done: alone, or a pack of those that differ only in their seeds. Says what packs, and why
    the others do not."""
    from . import packed

    alike: dict[tuple[Any, ...], list[Run]] = {}
    for run in todo:
        key = (run.task.title, run.task.protocol, run.method.title, run.stop_on)
        alike.setdefault((*key, None if run.patched else run.id), []).append(run)
    found: list[tuple[Run, ...]] = []
    for runs in alike.values():
        size, first = 1, runs[0]
        if len(runs) > 1:
            method, task, recipe = method_of(first), load_task(first.task), recipe_of(study, first)
            kind = f"{first.task.title}, {first.method.title}: {len(runs)} runs"
            reason = packed.why_not(method, task, recipe, study.dropout)
            if not reason:
                folder = model_folder(study.model)
                try:
                    size = packed.fitting(folder, method, task, recipe, study.dropout, device, len(runs), processes)
                except pk.ReplicaError as error:
                    reason = str(error)
            say(f"{kind} one by one: {reason}" if reason else f"{kind} packed, {size} at a time")
        found += [tuple(runs[i : i + size]) for i in range(0, len(runs), size)]
    place = {run.id: i for i, run in enumerate(todo)}
    return sorted(found, key=lambda unit: place[unit[0].id])


def execute_packed(
    study: Study, runs: Sequence[Run], device: str, progress: Callable[[int, int, float], None] | None, say: Any
) -> Iterator[dict[str, Any]]:
    """The records of runs that differ only in their seeds, as `execute` gives each."""
    from . import packed
    from .recipe import Seeds

    first, task = runs[0], load_task(runs[0].task)
    seeds = [Seeds(wi=run.wi, do=run.do) for run in runs]
    more: dict[str, Any] = {"dropout": study.dropout, "device": device, "progress": progress}
    args = (model_folder(study.model), method_of(first), task, recipe_of(study, first), seeds, say)
    waiting, failed = iter(runs), ""
    try:
        for outcomes in packed.halving(*args, **more):
            for outcome in outcomes:
                record = describe(next(waiting), task) | {"outcome": plain(outcome)}
                yield record | {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    except pk.ReplicaError as error:  # with these seeds, where those that were tried did pack
        failed = str(error)  # what it holds, a whole pack, is let go before the next run
    if failed:
        say(f"{first.task.title}, {first.method.title} one by one: {failed}")
        for run in waiting:
            yield execute(study, run, device, progress)


def execute(
    study: Study, run: Run, device: str, progress: Callable[[int, int, float], None] | None = None
) -> dict[str, Any]:
    """One run, as a record for the result file."""
    record = describe(run, load_task(run.task)) | {"outcome": plain(tuned(study, run, device, progress=progress))}
    return record | {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def plain(outcome: Any) -> dict[str, Any]:
    """An `Outcome` as a dict, without the model."""
    return {f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome) if f.name != "model"}


def describe(run: Run, task: TaskData) -> dict[str, Any]:
    """What a record says about its run beside the outcome."""
    return {
        "id": run.id,
        "task": run.task.title,
        "source": run.task.source,
        "data": task.fingerprint,
        "method": run.method.title,
        "label": run.method.label or run.method.name,
        "scale": run.method.scale,
        "layer": run.method.options.get("layers"),
        "protocol": run.task.protocol,
        "leaky": run.task.leaky,
        "stop_on": run.stop_on,
        "vary": run.vary,
        "wi": run.wi,
        "do": run.do,
        "patched": run.patched,
        "primary": task.primary,
        "baseline": task.baseline,
        "version": pk.__version__,
        "rows": {
            "train": len(task.train),
            "validation": len(task.validation),
            "dropped": task.dropped,
            "tests": {name: len(part) for name, part in task.tests.items()},
        },
    }


def run(
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    device: str = "cpu",
    console: Console | None = None,
    execute: Execute = execute,
    runs: list[Run] | None = None,
    pack: bool = True,
) -> list[dict[str, Any]]:
    """Carries the study out in `folder` and returns the records of all its runs that are done.

    jobs: processes that share this machine's threads. pack: train runs that differ only in their seeds together.
    Whatever ends this early, runs that were finished are on disk, and the same call goes on with the rest. Raises
    InputError before the first run for anything a study file has wrong; StudyError, naming the run, when one could not
    be carried out.
    """
    console = console or Console(quiet=True)
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}; accepted is at least 1")
    runs = plan(study, console.print) if runs is None else runs
    place, world = rank()
    device = local_device(device)
    path = folder / ("runs.jsonl" if world == 1 else f"runs.{place}.jsonl")
    header = {"command": machine.command(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    digest = model_digest(study.model)
    with store.Store(path, study, header | {"machine": machine.describe()}) as results:
        if results.recovered:
            console.print(f"{path}: half a line at the end was cut off; its run is done again", markup=False)
        done = store.collect(folder, study)
        todo = [r for i, r in enumerate(runs) if i % world == place and r.id not in done]
        if todo:
            _same_data(runs, done)
            _same_model(study, done, digest)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
            mine = len([r for i, r in enumerate(runs) if i % world == place])
            bar = progress.add_task(study.name, total=mine, completed=mine - len(todo))
            steps = progress.add_task("steps of this run", total=None, visible=jobs == 1)

            def advance(done: int, total: int, loss: float) -> None:
                progress.update(steps, completed=done, total=total)

            say = functools.partial(console.print, markup=False, highlight=False)
            alone: list[tuple[Run, ...]] = [(one,) for one in todo]
            listed = units(study, todo, device, jobs, say) if pack else alone
            work: Iterator[dict[str, Any]]
            if jobs == 1:
                work = (record for unit in listed for record in _named(study, unit, device, execute, advance, say))
            else:
                work = _apart(study, listed, device, execute, jobs, say)
            for record in work:
                results.append(record | {"model_digest": digest})
                progress.update(bar, advance=1, description=record["id"])
    return list(store.collect(folder, study).values())


def _same_data(runs: list[Run], done: dict[str, dict[str, Any]]) -> None:
    """Raises InputError if a task's texts or labels are not those of its runs in `done`; older records do not tell."""
    found = {(run.task, done[run.id]["data"]) for run in runs if "data" in done.get(run.id, {})}
    for task, fingerprint in found:
        if (now := load_task(task).fingerprint) != fingerprint:
            raise InputError(
                f"task {task.title!r} ({task.protocol}): its texts or labels are not those that earlier runs read "
                f"({now}, not {fingerprint}); restore the data or choose another --out"
            )


def _same_model(study: Study, done: dict[str, dict[str, Any]], digest: str) -> None:
    """Raises InputError if a run in `done` is of a model with another config or weights; older records do not tell."""
    for name, record in done.items():
        if (before := record.get("model_digest", digest)) != digest:
            raise InputError(
                f"model {study.model!r}: its config or weights are not those of the run {name} ({digest}, not "
                f"{before}); restore the model or choose another --out"
            )


def _apart(
    study: Study, todo: list[tuple[Run, ...]], device: str, execute: Execute, jobs: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_worker, initargs=(threads, os.getpid()))
    try:
        waiting = iter(todo)
        flying = {
            pool.submit(_whole, study, one, device, execute) for _, one in zip(range(jobs), waiting, strict=False)
        }
        while flying:
            landed, flying = wait(flying, return_when=FIRST_COMPLETED)
            for future in landed:
                records, lines = future.result()
                for line in lines:
                    say(line)
                yield from records
                if (one := next(waiting, None)) is not None:
                    flying.add(pool.submit(_whole, study, one, device, execute))
    except BrokenProcessPool as error:
        raise StudyError("a process of the study died (out of memory?); fewer --jobs may help") from error
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _whole(
    study: Study, unit: tuple[Run, ...], device: str, execute: Execute
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a unit, and what is to be said about it."""
    lines: list[str] = []
    return list(_named(study, unit, device, execute, None, lines.append)), lines


def _named(
    study: Study, unit: tuple[Run, ...], device: str, execute: Execute, progress: Any, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    try:
        if len(unit) == 1:
            yield execute(study, unit[0], device, progress)
        else:
            yield from execute_packed(study, unit, device, progress, say)
    except Exception as error:
        kind = InputError if isinstance(error, InputError) else StudyError
        which = f"run {unit[0].id}" + (f" and {len(unit) - 1} packed with it" if len(unit) > 1 else "")
        raise kind(f"{which}: {type(error).__name__}: {error}") from error


def _worker(threads: int, parent: int) -> None:
    """A process of `--jobs`: its share of the threads, deaf to Ctrl-C (the parent ends it), gone with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed parent cannot end it any more
        if os.getppid() != parent:
            sys.exit(1)
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=8)
def load_task(task: splits.TaskSpec) -> TaskData:
    """The task's data; the last few stay in memory for the next run."""
    return splits.load(task)


def method_of(run: Run) -> Any:
    """The run's `Method`; InputError for a name or option that methods.py does not know."""
    from .methods import method

    try:
        return method(run.method.name, **run.method.options)
    except (ValueError, TypeError) as error:
        label = "" if run.method.title == run.method.name else f"method {run.method.title!r}: "
        raise InputError(f"{label}{error}") from error


def recipe_of(study: Study, run: Run) -> Any:
    """The run's `Recipe`: the study's with the method's changes; keys are strict."""
    from .recipe import Recipe

    changes = study.recipe_of(run.method) | ({"stop_on": run.stop_on} if run.stop_on else {})
    check_keys(changes, [f.name for f in dataclasses.fields(Recipe)], f"recipe of {run.method.title!r}")
    try:
        return Recipe(**changes)
    except (ValueError, TypeError) as error:
        raise InputError(f"recipe of {run.method.title!r}: {error}") from error
