"""A study's records as the papers' figures (PNG). Colours are of the Okabe-Ito palette; shape or line tells as much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from .cells import Cell, Record, cells
from .study import Study

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
VARIED = {"global": "WI and DO", "wi": "WI", "do": "DO"}
LINES = ("-", "--", ":", "-.")
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
WIDEST = 14.0
"""Inches; a row of panels is not wider."""
LEAST = 5
"""Runs of which a density says something."""


def draw(study: Study, records: Sequence[Record], folder: Path) -> list[Path]:
    """Every figure that the records allow, as PNG files in `folder`; returns their paths."""
    found = [c for c in cells(study, records) if c.summary.n]
    variant = max((c.patched for c in found), default=True)
    shown = [c for c in found if c.patched == variant]
    first = [c for c in shown if c.vary == shown[0].vary]
    layered = [c for c in first if c.layers_of]
    whole = [c for c in first if not c.layers_of]
    written = []

    def save(figure: Figure | None, name: str) -> None:
        if figure is not None:
            figure.savefig(folder / name)
            written.append(folder / name)

    with matplotlib.rc_context(STYLE):
        save(seed_points([c for c in shown if not c.layers_of]), "seeds.png")
        save(best_of_runs(whole, study.reference), "best.png")
        save(densities(whole), "densities.png")
        save(layer_curve(layered, whole), "layers.png")
        if curves := by_samples(whole):
            save(iterations(curves), "iterations.png")
    return written


def _panels(count: int, width: float, height: float = 3.2, most: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most `most` in a row, each `width` x `height` inches."""
    across = min(count, most, max(1, int(WIDEST / width)))
    if count == 4:
        across = min(across, 2)
    down = -(-count // across)
    figure = Figure(figsize=(max(5.0, across * width), down * height), dpi=150, layout="constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(count)]


def _alike(axes: Sequence[Axes], tasks: Sequence[str], across: bool = False) -> None:
    """Gives the panels of one task, which are there to be compared, the same limits of y (across: of x too)."""
    for task in _unique(tasks):
        mine = [axis for axis, other in zip(axes, tasks, strict=True) if other == task]
        lower, upper = zip(*(axis.get_ylim() for axis in mine), strict=True)
        left, right = zip(*(axis.get_xlim() for axis in mine), strict=True)
        for axis in mine:
            axis.set_ylim(min(lower), max(upper))
            if across:
                axis.set_xlim(min(left), max(right))


def _name_ticks(axis: Axes, names: Sequence[str]) -> None:
    """Names under the ticks, slanted where they are too long to stand side by side."""
    spec, figure = axis.get_subplotspec(), axis.get_figure()
    assert spec is not None and isinstance(figure, Figure)
    room = 0.75 * figure.get_figwidth() / spec.get_gridspec().ncols  # inches; a letter has about .075
    slanted = 0.075 * len(names) * (2 + max(map(len, names))) > room
    look: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axis.set_xticklabels(names, **look)


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _percent(values: Sequence[float | None]) -> list[float]:
    return [100 * v for v in values if v is not None and math.isfinite(v)]


def seed_points(found: Sequence[Cell]) -> Figure | None:
    """Figure 4 and 12 of the second paper: a point a run, a diamond from the mean by one standard deviation each way.

    A panel a task; where seeds vary in several ways, or runs stop by loss and by metric, one group of points each.
    """
    columns = _unique(c.column for c in found)
    if not columns:
        return None
    ways = _unique((c.vary, c.stop_on) for c in found)
    methods = _unique(c.method for c in found)
    figure, axes = _panels(len(columns), max(3.4, 0.5 * len(methods) + 0.3 * len(ways)))
    for axis, column in zip(axes, columns, strict=True):
        for c in (c for c in found if c.column == column):
            way = ways.index((c.vary, c.stop_on))
            place = methods.index(c.method) + (way - (len(ways) - 1) / 2) * 0.8 / len(ways)
            colour = COLOURS[way % len(COLOURS)]
            values = _percent(c.values)
            spread = np.linspace(-0.25, 0.25, len(values)) / len(ways) if len(values) > 1 else [0.0]
            axis.scatter(place + np.asarray(spread), values, s=16, color=colour, alpha=0.7, linewidths=0)
            mean, std = 100 * c.summary.mean, 100 * c.summary.std
            if not math.isnan(std):
                half = 0.33 / len(ways)
                corners = [(place - half, mean), (place, mean + std), (place + half, mean), (place, mean - std)]
                axis.plot(*zip(*corners, corners[0], strict=True), color="black", linestyle="--", linewidth=0.9)
            axis.plot([place - 0.33 / len(ways), place + 0.33 / len(ways)], [mean, mean], color="black", linewidth=0.9)
        metric = next(c for c in found if c.column == column).records[0]["primary"]
        axis.set(title=column, ylabel=f"{metric}, %", xticks=range(len(methods)))
        _name_ticks(axis, methods)
        axis.grid(axis="y", alpha=0.25)
    _alike(axes, [next(c for c in found if c.column == column).records[0]["task"] for column in columns])
    figure.suptitle("point: a run; diamond: mean ± 1 standard deviation", fontsize=8)
    if len(ways) > 1:
        handles = [
            matplotlib.lines.Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o", linestyle="")
            for i in range(len(ways))
        ]
        several = len({vary for vary, _ in ways}) > 1
        names = [
            ", ".join(filter(None, [VARIED[vary] * several, f"stop on {stop}" * bool(stop)])) for vary, stop in ways
        ]
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(ways)), frameon=False)
    return figure


def best_of_runs(found: Sequence[Cell], reference: str) -> Figure | None:
    """Figure 3 of the second paper: how far a method's best run lies above the reference's best, relatively."""
    best = {(c.method, _place(c)): c.summary.best for c in found}
    methods = [m for m in _unique(c.method for c in found) if m != reference]
    columns = [c for c in _unique(map(_place, found)) if best.get((reference, c), 0) > 0]
    if not columns or not methods:
        return None
    figure, (axis,) = _panels(1, max(5.0, 0.28 * len(columns) * len(methods) + 2))
    for i, method in enumerate(methods):
        places = [k + (i - (len(methods) - 1) / 2) * 0.8 / len(methods) for k in range(len(columns))]
        heights = [100 * (best.get((method, c), math.nan) - best[reference, c]) / best[reference, c] for c in columns]
        hatch = "/" * (i // len(COLOURS))
        axis.bar(places, heights, 0.8 / len(methods), color=COLOURS[i % len(COLOURS)], hatch=hatch, label=method)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title=f"Best of the runs, relative to {reference}", ylabel="difference, %", xticks=range(len(columns)))
    _name_ticks(axis, columns)
    axis.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _place(cell: Cell) -> str:
    """A column of a study whose runs stop in several ways is one for each of them."""
    return f"{cell.column}, stop on {cell.stop_on}" if cell.stop_on else cell.column


def densities(found: Sequence[Cell]) -> Figure | None:
    """Figure 5 of the second paper: the density of the values over the runs, a curve for each parameter scale.

    A panel a task and method with several scales; without scales, a panel a task with a curve a method. Runs that all
    reach the same value have no density: a vertical line. Fewer than LEAST runs are left out.
    """
    scaled = [c for c in found if c.records[0]["scale"]]
    groups: dict[str, list[tuple[str, Cell]]] = {}
    for c in scaled or found:
        title = f"{c.column}, {c.records[0]['label']}" if scaled else c.column
        if c.summary.n >= LEAST:
            name = c.records[0]["scale"] or c.method
            groups.setdefault(title, []).append((f"{name}, stop on {c.stop_on}" if c.stop_on else name, c))
    if not groups:
        return None
    figure, axes = _panels(len(groups), 4.2)
    names = _unique(name for curves in groups.values() for name, _ in curves)
    handles: dict[str, Any] = {}
    for axis, (title, curves) in zip(axes, groups.items(), strict=True):
        for name, c in curves:
            i = names.index(name)
            values = _percent(c.values)
            look: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": LINES[i % len(LINES)],
                "label": name,
            }
            if len(set(values)) == 1:
                handles[name] = axis.axvline(values[0], **look)
                continue
            margin = 2 * max(c.summary.std * 100, 1e-6)
            x = np.linspace(min(values) - margin, min(100.0, max(values) + margin), 300)
            (handles[name],) = axis.plot(x, stats.gaussian_kde(values)(x), **look)
        axis.set(title=title, xlabel=f"{curves[0][1].records[0]['primary']}, %", ylabel="density", ylim=(0, None))
    _alike(axes, [curves[0][1].records[0]["task"] for curves in groups.values()], across=True)
    figure.legend(handles=[handles[name] for name in names], loc="outside lower center", ncols=4, frameon=False)
    return figure


def layer_curve(layered: Sequence[Cell], whole: Sequence[Cell]) -> Figure | None:
    """The first paper's Table 3 as curves: one layer tuned at a time, and full fine-tuning as a line."""
    columns = _unique(c.column for c in layered)
    if not columns:
        return None
    figure, axes = _panels(len(columns), 4.0)
    for axis, column in zip(axes, columns, strict=True):
        mine = [c for c in layered if c.column == column]
        for i, label in enumerate(_unique(c.layers_of for c in mine)):
            curve = [c for c in mine if c.layers_of == label]
            x = [c.records[0]["layer"][0] + 1 for c in curve]
            error = [0.0 if math.isnan(c.summary.std) else 100 * c.summary.std for c in curve]
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
            axis.errorbar(x, [100 * c.summary.mean for c in curve], error, marker="o", capsize=3, label=label, **style)
        for c in whole:
            if c.column == column and c.trains_all:
                axis.axhline(100 * c.summary.mean, color="black", linewidth=0.9, linestyle=":", label=c.method)
        axis.set(title=column, xlabel="layer", ylabel=f"{mine[0].records[0]['primary']}, %", xticks=x)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("mean ± 1 standard deviation", fontsize=8)
    return figure


Panel = tuple[str, str, str]
"""Of the study of training iterations: method, data set and metric."""


def by_samples(found: Sequence[Cell]) -> dict[Panel, dict[str, list[tuple[int, float]]]]:
    """Panel -> task -> validation curve, mean over the runs, of tasks that are samples of one data set.

    Steps that only some of the runs reached are left out.
    """
    panels: dict[Panel, list[Cell]] = {}
    for c in sorted(found, key=lambda c: c.rows):
        if c.own:
            panels.setdefault((c.method, c.records[0]["source"], c.records[0]["primary"]), []).append(c)
    curves: dict[Panel, dict[str, list[tuple[int, float]]]] = {}
    for panel, samples in panels.items():
        if len({c.rows for c in samples}) < 2:
            continue
        for c in samples:
            at: dict[int, list[float]] = {}
            for record in c.records:
                for entry in record["outcome"]["history"]:
                    if (reached := entry.get(record["primary"])) is not None:
                        at.setdefault(entry["step"], []).append(100 * reached)
            whole = max((len(values) for values in at.values()), default=0)
            points = [(step, sum(v) / len(v)) for step, v in sorted(at.items()) if len(v) == whole]
            if len(points) > 1:
                curves.setdefault(panel, {})[f"{_place(c)} ({c.rows:,} rows)"] = points
    return curves


def iterations(curves: Mapping[Panel, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """Validation against training steps; panel -> curve -> (step, value in percent) pairs. Lines differ by curve.

    The second paper's study of training iterations has a panel a method and the curves 1k (solid) and 2k (dashed).
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(curves), 4.0)
        for axis, ((method, _, metric), lines) in zip(axes, curves.items(), strict=True):
            for i, (name, points) in enumerate(lines.items()):
                style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
                axis.plot(*zip(*points, strict=True), label=name, **style)
            axis.set(title=method, xlabel="training steps", ylabel=f"{metric}, %")
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=8)
        return figure


def tsne(features: Mapping[str, tuple[np.ndarray, Sequence[int]]], names: Sequence[str], seed: int = 0) -> Figure:
    """Figure 4 of the third paper: panel -> (features [rows, width], class of each row), each cut to two dimensions.

    t-SNE keeps neighbourhoods only: distances between clusters and the axes' units mean nothing.
    """
    from sklearn.manifold import TSNE

    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(features), 3.0, 3.0, most=2)
        for axis, (title, (points, labels)) in zip(axes, features.items(), strict=True):
            perplexity = min(30.0, max(2.0, (len(points) - 1) / 3))
            flat = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(
                np.asarray(points, np.float32)
            )
            for k, name in enumerate(names):
                mine = flat[np.asarray(labels) == k]
                axis.scatter(
                    mine[:, 0],
                    mine[:, 1],
                    s=10,
                    marker="o^sDv"[k % 5],
                    color=COLOURS[k % len(COLOURS)],
                    label=name,
                    alpha=0.7,
                )
            axis.set(title=title, xticks=[], yticks=[])
        handles, labels_ = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels_, loc="outside lower center", ncols=len(names), frameon=False)
        return figure


def bars(groups: Mapping[str, Mapping[str, float]], title: str, unit: str) -> Figure:
    """Group -> bar -> value: |delta w| or the features' L2 change by method, mean |w| by kind of module."""
    with matplotlib.rc_context(STYLE):
        names = _unique(name for group in groups.values() for name in group)
        figure, (axis,) = _panels(1, max(5.0, 0.3 * len(names) * len(groups) + 2), 3.6)
        for i, (group, values) in enumerate(groups.items()):
            places = [k + (i - (len(groups) - 1) / 2) * 0.8 / len(groups) for k in range(len(names))]
            heights = [values.get(name, math.nan) for name in names]
            hatch = "/" * (i // len(COLOURS))
            axis.bar(places, heights, 0.8 / len(groups), color=COLOURS[i % len(COLOURS)], hatch=hatch, label=group)
        axis.set(title=title, ylabel=unit, xticks=range(len(names)))
        _name_ticks(axis, names)
        axis.grid(axis="y", alpha=0.25)
        if len(groups) > 1:
            figure.legend(loc="outside right upper", frameon=False)
        return figure
