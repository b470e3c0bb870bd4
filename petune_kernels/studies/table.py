"""The demo's result as a table for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MIB = 2**20
VARIANTS = ("stock", "patched")


def summary(result: dict[str, Any]) -> RenderableType:
    """Coverage, cost of a step and what was learned, stock beside patched. Fits 80 columns."""
    settings = result["settings"]
    table = Table(title=f"{settings['regime']}, {settings['batch']} x {settings['length']} tokens, {settings['dtype']}")
    for name in ("", *VARIANTS, "ratio"):
        table.add_column(name, justify="right" if name else "left")
    _cost(table, result)
    table.add_section()
    _learning(table, result)
    return Group(*_facts(result), table, Text("\n".join(_notes(result)), style="dim"))


def _cost(table: Table, result: dict[str, Any]) -> None:
    table.add_row(Text("one training step", style="bold"))
    saved = result["saved_bytes_per_token_per_layer"]
    table.add_row("saved bytes/token/layer", *(f"{saved[v]:,.0f}" for v in VARIANTS), ratio(saved))
    table.add_row("  per hidden unit", *(f"{saved[v] / saved['hidden_size']:.1f}" for v in VARIANTS), "")
    peak, rise = ({v: result["memory"][v][key] for v in VARIANTS} for key in ("peak", "rise"))
    where = "GPU" if result["settings"]["device"] == "cuda" else "resident"
    table.add_row(f"peak {where} memory", *(f"{peak[v] / MIB:,.0f} MiB" for v in VARIANTS), ratio(peak))
    table.add_row("  due to the step", *(f"{rise[v] / MIB:,.0f} MiB" for v in VARIANTS), ratio(rise))
    time = result["time"]
    medians = (f"{_milliseconds(time[v]['median'])} ms" for v in VARIANTS)
    table.add_row("step time, median", *medians, f"{time['ratio']['median']:.2f}")
    quartiles = (f"{_milliseconds(time[v]['low'])}-{_milliseconds(time[v]['high'])}" for v in VARIANTS)
    table.add_row("  quartiles", *quartiles, f"{time['ratio']['low']:.2f}-{time['ratio']['high']:.2f}")


def _learning(table: Table, result: dict[str, Any]) -> None:
    runs, exact = result["runs"], result.get("without_dropout")
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0]['seed']}"
    table.add_row(Text(f"{result['task']['steps']} steps, {seeds}", style="bold"))
    accuracy = {v: mean_and_deviation([run["accuracy"][v] for run in runs]) for v in (*VARIANTS, "untrained")}
    table.add_row("test accuracy", *(accuracy[v] for v in VARIANTS), "")
    table.add_row("  untrained head", accuracy["untrained"], accuracy["untrained"], "")
    table.add_row("largest loss difference")
    largest = max(run["largest_loss_difference"] for run in runs)
    masks = "on (other masks)" if result["settings"]["dropout"] else "off"
    table.add_row(f"  dropout {masks}", "", f"{largest:.1e}", "")
    if exact:
        difference = f"{exact['largest_loss_difference']:.1e}"
        table.add_row(f"  dropout off, {len(exact['losses']['stock'])} steps", "", difference, "")


def ratio(values: dict[str, float]) -> str:
    """Patched over stock; empty where stock is 0 (the frozen regime saves nothing in its layers)."""
    return f"{values['patched'] / values['stock']:.2f}" if values["stock"] else ""


def mean_and_deviation(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def _facts(result: dict[str, Any]) -> list[Text]:
    coverage, trainable, task = result["coverage"], result["trainable"], result["task"]
    patterns = ", ".join(f"{count} {name}" for name, count in coverage["by_pattern"].items())
    backends = ", ".join(f"{op} on {backend}" for op, backend in coverage["backends"].items())
    head = f" and the head ({trainable['head_count']:,})" if trainable["head_count"] else ""
    dropped = f" ({task['dropped']} dropped: they stand in both)" if task["dropped"] else ""
    share = f"{trainable['count']:,} of {trainable['total']:,} parameters ({trainable['percent']:.4f} %)"
    covered, apart = len(coverage["patched"]), len(coverage["left_alone"])
    facts = {
        "coverage": f"{covered} modules patched ({patterns}), {apart} left alone",
        "backends": backends,
        "trainable": share + head,
        "data": f"{task['train']:,} training and {task['test']:,} test sentences{dropped}; {', '.join(task['labels'])}",
        "gate": f"logits, loss and gradients of both agree ({result['gate']['compared']} tensors against float64)",
    }
    return [Text.assemble((f"{name:<11}", "bold"), value) for name, value in facts.items()]


def _notes(result: dict[str, Any]) -> list[str]:
    notes = [f"Always answering the larger class is right {result['task']['majority']:.3f} of the time."]
    method = result["memory"]["stock"]["method"]
    if "lower bound" in method:
        notes.append(f"Memory read as {method}.")
    return notes


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}"
