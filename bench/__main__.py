"""The benchmark's commands; `python -m bench COMMAND --help` lists the options of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from petune_kernels.studies.errors import InputError, StudyError
from petune_kernels.studies.result import Files

app = typer.Typer(
    name="bench", help=__doc__, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)
console = Console(width=None if sys.stdout.isatty() else 160)

Out = Annotated[Path, typer.Option("--out", help="Folder for JSON, CSV and PNG.", file_okay=False)]
Rounds = Annotated[int, typer.Option(min=2, help="Turns of each provider.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; the GPU if there is one.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in a batch.")]
Length = Annotated[int, typer.Option(min=8, help="Tokens in a sequence.")]
DTypes = Annotated[list[str], typer.Option("--dtype", help="bfloat16 or float32; may be repeated.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile, too; compiling takes minutes.")]
CompileMode = Annotated[
    list[str] | None,
    typer.Option(help="In this mode, too: reduce-overhead, max-autotune, max-autotune-no-cudagraphs; may be repeated."),
]
AUTO = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ["bfloat16", "float32"]
RESULTS = Path("bench_results")


def _check(device: str, dtypes: list[str]) -> None:
    from . import harness

    harness.check_names("--device", [device], ["cpu", "cuda"])
    harness.check_names("--dtype", dtypes, DTYPES)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but PyTorch sees no NVIDIA GPU; accepted here: cpu")


def _modes(compile: bool, asked: list[str] | None) -> tuple[str, ...]:
    """torch.compile's modes that take turns; --compile is the default one."""
    from . import harness, op_runs

    harness.check_names("--compile-mode", asked or (), op_runs.MODES)
    return tuple(dict.fromkeys([*(["default"] if compile else []), *(asked or [])]))


@app.callback()
def _commands() -> None:
    """Side by side with what people would use instead."""


@app.command()
def models(
    shape: Annotated[list[str], typer.Option(help="Model shape, random weights; may be repeated.")] = ["minilm"],  # noqa: B006
    regime: Annotated[list[str] | None, typer.Option(help="Such as 'lora-all p=0.1'; all of them.")] = None,
    dtype: DTypes = DTYPES,
    batch: Batch = 16,
    length: Length = 128,
    device: Device = AUTO,
    rounds: Rounds = 15,
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the model to so many layers.")] = None,
    compile: Compile = False,
    compile_mode: CompileMode = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory in fresh processes, too.")] = False,
    saved: Annotated[bool, typer.Option(help="Count the bytes saved for backward.")] = True,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Captured layers and steps, too (GPU).")] = False,
    trainer: Annotated[int, typer.Option(min=0, help="Steps of each turn in transformers' Trainer, too; 0: none.")] = 0,
    out: Out = RESULTS,
) -> None:
    """Whole training steps: eager PyTorch or PEFT, patched, and torch.compile if asked for."""
    from . import models as benchmark

    _check(device, dtype)
    if cuda_graphs and device != "cuda":
        raise InputError(f"--cuda-graphs needs --device cuda; it is {device}")
    settings = benchmark.Settings(
        tuple(shape), tuple(regime or ()), tuple(dtype), batch, length, device, rounds, layers,
        _modes(compile, compile_mode), memory, saved, cuda_graphs, trainer,
    )  # fmt: skip
    benchmark.run(settings, Files.new(out, "models"), console)


@app.command()
def packed(
    shape: Annotated[list[str], typer.Option(help="Model shape, random weights; may be repeated.")] = ["minilm"],  # noqa: B006
    regime: Annotated[list[str] | None, typer.Option(help="Such as 'lora-qv p=0.1'; all that pack.")] = None,
    dtype: DTypes = DTYPES,
    replicas: Annotated[list[int] | None, typer.Option(min=1, help="Runs packed together; 1, 2, 4, 8, 20.")] = None,
    batch: Batch = 16,
    length: Length = 128,
    device: Device = AUTO,
    rounds: Rounds = 7,
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the model to so many layers.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory in fresh processes, too.")] = False,
    out: Out = RESULTS,
) -> None:
    """A step of many runs packed over one frozen backbone, per run, beside one run alone, patched and stock."""
    from . import packed as benchmark

    _check(device, dtype)
    settings = benchmark.Settings(
        tuple(shape), tuple(regime or ()), tuple(dtype), tuple(replicas or (1, 2, 4, 8, 20)), batch,
        length, device, rounds, layers, memory,
    )  # fmt: skip
    benchmark.run(settings, Files.new(out, "packed"), console)


@app.command()
def ops(
    width: Annotated[list[str], typer.Option(help="Hidden size by model; may be repeated.")] = ["minilm"],  # noqa: B006
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    dtype: DTypes = DTYPES,
    batch: Batch = 16,
    length: Length = 128,
    device: Device = AUTO,
    rounds: Rounds = 15,
    compile: Compile = False,
    compile_mode: CompileMode = None,
    out: Out = RESULTS,
) -> None:
    """Every op, forward and backward: GB/s or TFLOP/s and the share of the floor, eager, peers, torch.compile."""
    from . import op_runs

    _check(device, dtype)
    modes = _modes(compile, compile_mode)
    settings = op_runs.Settings(tuple(width), tuple(dtype), tuple(op or ()), batch, length, device, rounds, modes)
    op_runs.run_ops(settings, Files.new(out, "ops"), console)


@app.command()
def overhead(
    device: Device = AUTO,
    rounds: Annotated[int | None, typer.Option(min=2, help="Turns of each provider; 15, on a GPU 7.")] = None,
    out: Out = RESULTS,
) -> None:
    """What a call costs before the kernel: every op on 8 x 64 elements, float32, 256 calls a turn (on a GPU 32)."""
    from . import op_runs

    _check(device, [])
    calls, turns = (32, 7) if device == "cuda" else (256, 15)
    settings = op_runs.Settings(
        ("tiny",), ("float32",), (), 1, 8, device, rounds or turns, rotate=1, calls=calls, graphs=False
    )
    op_runs.run_ops(settings, Files.new(out, "overhead"), console, "overhead")


@app.command()
def layers(
    shape: Annotated[list[str], typer.Option(help="Model shape, random weights; may be repeated.")] = ["minilm"],  # noqa: B006
    regime: Annotated[list[str] | None, typer.Option(help="Such as 'lora-all p=0.1'; all of them.")] = None,
    dtype: DTypes = DTYPES,
    batch: Batch = 16,
    length: Length = 128,
    device: Device = AUTO,
    rounds: Rounds = 15,
    compile: Compile = False,
    compile_mode: CompileMode = None,
    out: Out = RESULTS,
) -> None:
    """One layer as its model calls it, forward and backward to its input, in every regime."""
    from . import layers as benchmark
    from . import op_runs

    _check(device, dtype)
    modes = _modes(compile, compile_mode)
    settings = op_runs.Settings(tuple(shape), tuple(dtype), (), batch, length, device, rounds, modes)
    benchmark.run(settings, tuple(regime or ()), Files.new(out, "layers"), console)


@app.command()
def memory(
    shape: Annotated[list[str] | None, typer.Option(help="bert-base or tinyllama; both.")] = None,
    regime: Annotated[list[str] | None, typer.Option(help="Such as 'lora-all p=0.1'; all of them.")] = None,
    batch: Batch = 16,
    length: Length = 128,
    time: Annotated[list[str] | None, typer.Option("--time", help="Shapes of which steps are run; none.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of the models of which steps are run.")] = 3,
    device: Device = AUTO,
    rounds: Rounds = 15,
    compile: Annotated[
        list[str] | None, typer.Option(help="Regimes in which timed shapes meet torch.compile with a memory budget.")
    ] = None,
    out: Out = RESULTS,
) -> None:
    """Every memory level: bytes kept, and with --time step time and peak, beside eager, PEFT and checkpointing.

    With --compile REGIME torch.compile with an activation memory budget, too; it compiles for minutes.
    """
    from . import memory as benchmark

    _check(device, [])
    settings = benchmark.Settings(
        tuple(shape or benchmark.REGIMES), tuple(regime or ()), batch, length, layers, tuple(time or ()), rounds,
        tuple(compile or ()), device,
    )  # fmt: skip
    benchmark.run(settings, Files.new(out, "memory"), console)


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(help="Where the benchmarks wrote their results.", exists=True)],
    file: Annotated[Path, typer.Argument(help="The one JSON file to write.")],
) -> None:
    """Put all results of a folder into one file, the unfinished ones marked so; what is no result is named."""
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}, where {file.name} is to be written, is no folder")
    parts = []
    for path in sorted(path for path in folder.glob("*.json") if path.resolve() != file.resolve()):
        try:
            parts.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            print(f"bench: left out {path}: {error}", file=sys.stderr)
    if not parts:
        raise InputError(f"{folder} holds no result")
    half = file.with_suffix(".part")
    half.write_text(json.dumps({"parts": parts}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    half.replace(file)


def main(*arguments: str, name: str | None = None) -> int:
    """Runs a command and returns the exit code: 2 for bad input, 1 where a result is wrong or Ctrl-C cut it short.

    name: what it was called by, for "Usage:".
    """
    try:
        app(args=list(arguments) or None, prog_name=name)
    except SystemExit as done:  # usage errors and Ctrl-C have had their message
        return done.code if isinstance(done.code, int) else 0
    except (InputError, StudyError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
