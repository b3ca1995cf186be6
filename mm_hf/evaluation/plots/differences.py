"""Plots that compare methods: differences from a baseline, cost, and validation curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..metrics.registry import get_metric
from ..statistics import Interval
from .style import (
    WIDTH,
    check_not_empty,
    history_curve,
    legend_below,
    method_styles,
    panel_grid,
    plain_text,
    saved_figure,
)

BETTER = {"higher": "better →", "lower": "← better", "": ""}


def plot_differences(
    runs: Mapping[str, Mapping[str, Interval]],
    path: str | Path,
    *,
    baseline: str,
    better: Mapping[str, str] | None = None,
    scales: Mapping[str, float] | None = None,
) -> Figure:
    """Plot each method's difference from a baseline with its confidence interval, one panel per metric.

    Intervals that exclude zero have filled markers.

    Args:
        runs: For each metric (title with unit), the difference and interval of each method, as returned by
            [`~mm_hf.evaluation.statistics.paired_bootstrap`].
        path: Image file to write, .png or .pdf.
        baseline: Name of the baseline.
        better: Direction of improvement, "higher" or "lower", of the metrics for which it is known.
        scales: Factors that the differences of a metric are multiplied by, for example 100 for percent. Default: 1.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no metrics or methods, or metrics have different methods.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_differences({"accuracy": {"mixup": Interval(0.1, -0.1, 0.3)}},
        ...                               f"{directory}/differences.png", baseline="erm")
        >>> figure.axes[0].get_title()
        'accuracy'
    """
    check_not_empty(runs, "runs")
    methods = list(next(iter(runs.values())))
    check_not_empty(methods, "runs[...]")
    if any(list(each) != methods for each in runs.values()):
        raise ValueError("All metrics must have the same methods in the same order.")
    # Include the baseline, so that a method has the same style in every plot.
    colors = method_styles([baseline, *methods])
    columns = min(len(runs), 2)
    rows = -(-len(runs) // columns)
    with saved_figure(path) as figures:
        figure, axes = plt.subplots(
            rows, columns, figsize=(WIDTH if columns > 1 else WIDTH / 1.6, (0.75 + 0.24 * len(methods)) * rows + 0.1),
            layout="constrained", squeeze=False, sharey=True,
        )  # fmt: skip
        figures.append(figure)
        for cell in list(axes.flat)[len(runs) :]:
            cell.remove()
        for cell, (metric, each) in zip(axes.flat, runs.items(), strict=False):
            scale = (scales or {}).get(metric, 1)
            cell.axvline(0, color="black", linewidth=0.8)
            for y, name in enumerate(methods):
                interval, (color, marker) = each[name], colors[name]
                value, low, high = (scale * x for x in (interval.value, interval.low, interval.high))
                cell.plot([low, high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
                cell.plot(
                    [value], [y], marker=marker, markersize=5.5, color=color, linewidth=0, markeredgewidth=1.2,
                    markerfacecolor=color if interval.excludes_zero else "white",
                )  # fmt: skip
            cell.set_title(metric)
            cell.set_yticks(range(len(methods)), [plain_text(method) for method in methods])
            cell.set_ylim(len(methods) - 0.5, -0.5)
            cell.tick_params(axis="y", length=0)
            cell.spines["left"].set_visible(False)
            cell.grid(True, axis="x")
            cell.set_axisbelow(True)
            cell.xaxis.set_major_locator(MaxNLocator(5))
            side = BETTER[(better or {}).get(metric, "")]
            cell.set_xlabel(f"difference from {baseline}" + (f"   ({side})" if side else ""))
            cell.margins(x=0.08)
    return figure


def plot_cost(
    runs: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path, *, baseline: str, units: Mapping[str, str]
) -> Figure:
    """Plot the cost of methods relative to a baseline: a bar for the mean over seeds, a point per seed.

    Args:
        runs: For each kind of cost, the values of each method, one per seed. The baseline must be among the methods.
        path: Image file to write, .png or .pdf.
        baseline: Name of the baseline, whose mean is 1.
        units: Unit of each kind of cost.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no costs, or the baseline's mean is not positive.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_cost({"training time": {"erm": [1.0], "mixup": [2.0]}}, f"{directory}/cost.png",
        ...                        baseline="erm", units={"training time": "s"})
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [1.0, 2.0]
    """
    check_not_empty(runs, "runs")
    methods = list(next(iter(runs.values())))
    colors = method_styles([baseline, *(name for name in methods if name != baseline)])
    with saved_figure(path) as figures:
        figure, axes = plt.subplots(
            1, len(runs), figsize=(WIDTH if len(runs) > 1 else WIDTH / 1.6, 0.75 + 0.25 * len(methods)),
            layout="constrained", squeeze=False, sharey=True,
        )  # fmt: skip
        figures.append(figure)
        for cell, (kind, each) in zip(axes.flat, runs.items(), strict=True):
            one = float(np.mean(each[baseline]))
            if not one > 0:
                raise ValueError(f"The mean {kind} of the baseline {baseline!r} must be positive, but is {one}.")
            farthest = max(max(values) for values in each.values()) / one
            for y, name in enumerate(methods):
                relative, (color, _) = np.asarray(each[name]) / one, colors[name]
                cell.barh(y, relative.mean(), height=0.62, color=color, alpha=0.75, linewidth=0)
                cell.plot(relative, np.full(len(relative), y), "o", color="black", markersize=1.8, alpha=0.7)
                cell.text(
                    max(relative.max(), relative.mean()) + 0.02 * farthest, y, f" {relative.mean():.2f} x",
                    va="center", fontsize=7,
                )  # fmt: skip
            cell.axvline(1, color="black", linewidth=0.8, linestyle="--")
            cell.set_yticks(range(len(methods)), [plain_text(method) for method in methods])
            cell.set_ylim(len(methods) - 0.4, -0.6)
            cell.tick_params(axis="y", length=0)
            cell.set_xlim(0, 1.17 * farthest)
            cell.set_xlabel(f"{kind}, relative to {baseline} ({one:,.3g} {units[kind]})")
    return figure


def plot_validation(
    runs: Mapping[str, Sequence[list[dict[str, Any]]]], path: str | Path, *, baseline: str | None = None
) -> Figure:
    """Plot validation NLL and accuracy against training steps.

    Args:
        runs: For each method, the `trainer.state.log_history` of its seeds, with `eval_nll` and `eval_accuracy`. Thin
            lines are seeds, thick lines their means.
        path: Image file to write, .png or .pdf.
        baseline: Method plotted in the style of the baseline. Default: the first.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no methods, or a run was not evaluated during training.

    Example:
        >>> import tempfile
        >>> history = [{"step": s, "eval_nll": 1 / s, "eval_accuracy": 1 - 1 / s} for s in (1, 2)]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_validation({"erm": [history]}, f"{directory}/training.png")
        >>> figure.axes[1].lines[-1].get_ydata().tolist()
        [0.0, 50.0]
    """
    check_not_empty(runs, "runs")
    names = list(runs) if baseline is None else [baseline, *(name for name in runs if name != baseline)]
    colors = method_styles(names)
    panels = [get_metric("nll"), get_metric("accuracy")]
    with saved_figure(path) as figures:
        figure, cells = panel_grid(2, 2.4)
        figures.append(figure)
        for cell, info in zip(cells, panels, strict=True):
            key = f"eval_{info.name}"
            for name in names:
                color, _ = colors[name]
                curves = [history_curve(history, key) for history in runs[name]]
                if not all(steps for steps, _ in curves):
                    raise ValueError(f"A run of {name!r} was not evaluated during training: it has no {key}.")
                for steps, values in curves:
                    cell.plot(steps, info.scale * np.array(values), color=color, alpha=0.25, linewidth=0.6)
                mean = np.mean([values for _, values in curves], axis=0)
                cell.plot(curves[0][0], info.scale * mean, color=color, linewidth=1.5, label=plain_text(name))
            cell.set_xlabel("training step")
            cell.set_ylabel(f"validation {info.label}")
            cell.grid(True)
            cell.set_axisbelow(True)
        # The first evaluations are far from the others: a logarithmic axis shows where the methods differ.
        nll = np.concatenate([history_curve(h, "eval_nll")[1] for each in runs.values() for h in each])
        nll = nll[np.isfinite(nll)]
        if len(nll) and nll.min() > 0 and nll.max() > 5 * nll.min():
            cells[0].set_yscale("log")
            cells[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            cells[0].yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        legend_below(figure, *cells[0].get_legend_handles_labels())
    return figure
