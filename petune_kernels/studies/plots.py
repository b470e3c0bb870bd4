"""Figures of a study. Colours are of the Okabe-Ito palette, and nothing is told by colour alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .table import MIB, VARIANTS, mean_and_deviation, ratio

COLOURS = {"stock": "#0072B2", "patched": "#D55E00"}
LINES = {"stock": "-", "patched": "--"}
WIDTHS = {"stock": 2.6, "patched": 1.6}  # both stay visible where they coincide
HATCHES = {"stock": "", "patched": "//"}


def demo_figure(result: dict[str, Any], path: Path) -> None:
    """Both loss curves, with and without dropout, over bars of saved bytes, memory and time of one step; as a PNG."""
    settings, run, exact = result["settings"], result["runs"][0], result.get("without_dropout")
    dropout = "on" if settings["dropout"] else "off"
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 6.4), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, 6, height_ratios=[1.15, 1])
        wide = grid[0, :4] if exact else grid[0, :]
        _losses(figure.add_subplot(wide), run["losses"], f"Training loss, seed {run['seed']}, dropout {dropout}")
        if exact:
            _losses(figure.add_subplot(grid[0, 4:]), exact["losses"], "Training loss, dropout off")
        saved = result["saved_bytes_per_token_per_layer"]
        axes = figure.add_subplot(grid[1, :2])
        _bars(axes, "Saved for backward", "bytes / token / layer", saved, ratio(saved))
        memory = {v: result["memory"][v]["rise"] / MIB for v in VARIANTS}
        axes = figure.add_subplot(grid[1, 2:4])
        _bars(axes, "Memory due to one step", "MiB above the loaded model", memory, ratio(memory))
        time = {v: {k: 1e3 * result["time"][v][k] for k in ("low", "median", "high")} for v in VARIANTS}
        median = {v: time[v]["median"] for v in VARIANTS}
        axes = figure.add_subplot(grid[1, 4:])
        paired = f"{result['time']['ratio']['median']:.2f}"
        _bars(axes, "Time of one step", "ms, median and quartiles", median, paired, time)
        figure.suptitle(_title(result))
        figure.savefig(path)


def _title(result: dict[str, Any]) -> str:
    settings = result["settings"]
    reached = {v: mean_and_deviation([run["accuracy"][v] for run in result["runs"]]) for v in VARIANTS}
    what = f"{Path(result['task']['model']).name}, {settings['regime']} tuning"
    shape = f"{settings['batch']} x {settings['length']} tokens, {settings['dtype']}, on {result['machine']['device']}"
    accuracy = f"test accuracy: stock {reached['stock']}, patched {reached['patched']}"
    return f"{what}, {shape}\n{accuracy}"


def _losses(axes: Axes, losses: Mapping[str, Sequence[float]], title: str) -> None:
    window = max(1, len(losses["stock"]) // 15)
    for variant in VARIANTS:
        raw, colour = losses[variant], COLOURS[variant]
        steps = range(1, len(raw) + 1)
        label = variant if window == 1 else f"{variant}, mean of {window} steps"
        if window > 1:
            axes.plot(steps, raw, color=colour, alpha=0.25, linewidth=0.8)
        smooth = _running_mean(raw, window)
        axes.plot(steps, smooth, color=colour, linestyle=LINES[variant], linewidth=WIDTHS[variant], label=label)
    axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats)", xlim=(1, len(losses["stock"])))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values, of as many as there are at the start."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]


def _bars(
    axes: Axes,
    title: str,
    unit: str,
    values: Mapping[str, float],
    to_stock: str,
    quartiles: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    for place, variant in enumerate(VARIANTS):
        value, top = values[variant], values[variant]
        axes.bar(place, value, 0.6, color=COLOURS[variant], hatch=HATCHES[variant], edgecolor="white")
        if quartiles:
            top = quartiles[variant]["high"]
            axes.errorbar(place, value, [[value - quartiles[variant]["low"]], [top - value]], color="black", capsize=4)
        label = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        if variant != "stock" and to_stock:
            label += f"  ({to_stock} x stock)"
        axes.annotate(label, (place, top), xytext=(0, 5), textcoords="offset points", ha="center")
    axes.set(title=title, ylabel=unit, xticks=range(len(VARIANTS)), xticklabels=VARIANTS)
    axes.margins(x=0.25, y=0.15)


PARTS = {
    "weights": ("#000000", ""),
    "optimizer": ("#000000", "//"),
    "gradients": ("#000000", ".."),
    "q k v": ("#0072B2", ""),
    "attention output": ("#56B4E9", ""),
    "attention scores": ("#0072B2", "//"),
    "norm rows": ("#009E73", ""),
    "feed-forward u": ("#E69F00", ""),
    "dropout masks": ("#D55E00", ""),
    "low-rank products": ("#CC79A7", "//"),
    "projection inputs": ("#CC79A7", ""),
    "layer inputs": ("#009E73", "//"),
    "other": ("#999999", ""),
    "transients": ("#F0E442", ""),
    "inputs": ("#F0E442", "//"),
}
"""Colour and hatch of a part of memory, from the bottom of a bar up."""


def report_figure(result: dict[str, Any], path: Path) -> None:
    """A stacked bar for every memory level: what is saved for backward, and what is held at the worst moment; as a PNG.

    A diamond is what was measured.
    """
    s, levels = result["settings"], result["levels"]
    predicted = {name: row["predicted"] for name, row in levels.items()}
    measured = {name: row["measured"] for name, row in levels.items() if "measured" in row}
    saved = {name: m["saved"] for name, m in measured.items()}
    peak = {
        name: m.get("rise_given_back", m["rise"]) + predicted[name]["total"] - predicted[name]["rise"]
        for name, m in measured.items()
    }
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4 + 1.5 * len(levels), 5.2), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        _stacks(left, "Saved for backward", {name: row["groups"] for name, row in predicted.items()}, saved)
        _stacks(right, "Held at the worst moment of a step", {n: row["peak"] for n, row in predicted.items()}, peak)
        handles = {
            label: bar for axes in (left, right) for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        order = [name for name in (*PARTS, "measured") if name in handles]
        figure.legend([handles[n] for n in order], order, loc="outside right center", frameon=False, reverse=True)
        tokens = f"{s['batch']} x {s['length']} tokens{', padded' if s['padded'] else ''}"
        figure.suptitle(
            f"{Path(s['model']).name}, {s['regime']} tuning, {tokens}, {s['dtype']}, on {s['device']}: predicted"
        )
        figure.savefig(path)


def _stacks(axes: Axes, title: str, bars: Mapping[str, Mapping[str, int]], measured: Mapping[str, int]) -> None:
    top = max([sum(parts.values()) for parts in bars.values()] + list(measured.values())) / MIB
    for name, (colour, hatch) in PARTS.items():
        sizes = [parts.get(name, 0) / MIB for parts in bars.values()]
        if max(sizes) < top / 500:
            continue
        below = [sum(parts.get(n, 0) for n in list(PARTS)[: list(PARTS).index(name)]) / MIB for parts in bars.values()]
        axes.bar(
            range(len(bars)),
            sizes,
            0.65,
            below,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.6,
            label=name,
        )
    for place, (name, parts) in enumerate(bars.items()):
        total = sum(parts.values()) / MIB
        above = max(total, measured.get(name, 0) / MIB)  # of the diamond, too
        axes.annotate(f"{total:,.0f}", (place, above), xytext=(0, 5), textcoords="offset points", ha="center")
        if name in measured:
            axes.plot(place, measured[name] / MIB, "D", color="white", markeredgecolor="black", label="measured")
    axes.set(title=title, ylabel="MiB", xticks=range(len(bars)), xticklabels=[n.replace(" ", "\n") for n in bars])
    axes.set_ylim(0, 1.08 * top or 1)
