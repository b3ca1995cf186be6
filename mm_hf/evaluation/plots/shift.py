"""Plot of accuracy on corrupted images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..statistics import has_interval, seed_spread
from .style import check_not_empty, legend_below, method_styles, panel_grid, panel_layout, plain_text, saved_figure

Curves = Mapping[str, Sequence[float]]


def plot_corruptions(
    runs: Mapping[str, Sequence[Curves]],
    path: str | Path,
    *,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    each: bool = True,
) -> Figure:
    """Plot accuracy against the severity of corruptions: the mean over seeds with its 95 % confidence interval, or
    with the range of two seeds.

    Args:
        runs: For each method, the result of [`~mm_hf.evaluation.metrics.corruption_accuracy`] for each seed. All must
            have the same corruptions.
        path: Image file to write, .png or .pdf.
        severities: Severities of the accuracies, in order.
        each: Add a panel for each corruption after the panel with the mean over all corruptions.

    Returns:
        The figure, written and closed. Bands are Student's t intervals of the mean, or the range of two seeds.

    Raises:
        ValueError: There are no methods, a method has no seeds, or corruptions or severities differ.

    Example:
        >>> import tempfile
        >>> seeds = [{"contrast": [0.9, 0.5]}, {"contrast": [0.8, 0.6]}]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_corruptions({"plain": seeds}, f"{directory}/corruptions.png", severities=[1, 2])
        >>> [float(y) for y in figure.axes[0].lines[0].get_ydata().round(6)]
        [85.0, 55.0]
    """
    check_not_empty(runs, "runs")
    for name, seeds in runs.items():
        check_not_empty(seeds, f"runs[{name!r}]")
    names = list(next(iter(runs.values()))[0])
    for method, seeds in runs.items():
        for curves in seeds:
            if set(curves) != set(names) or any(len(y) != len(severities) for y in curves.values()):
                raise ValueError(
                    f"Every run must have accuracies for {', '.join(names)} at {len(severities)} severities, but one "
                    f"of {method!r} has " + ", ".join(f"{k} at {len(y)}" for k, y in curves.items()) + "."
                )
    panels = {"mean over corruptions": names} if len(names) > 1 else {}
    if each or len(names) == 1:
        panels |= {name.replace("_", " "): [name] for name in names}
    columns = panel_layout(len(panels))[1]
    x = np.asarray(severities)
    with saved_figure(path) as figures:
        figure, cells = panel_grid(len(panels), 1.75 if len(panels) > 1 else 2.6, sharex=True, sharey=True)
        figures.append(figure)
        for i, (cell, (title, members)) in enumerate(zip(cells, panels.items(), strict=True)):
            for method, (color, marker) in method_styles(runs).items():
                accuracy = 100 * np.array([np.mean([curves[m] for m in members], axis=0) for curves in runs[method]])
                mean, ends = accuracy.mean(axis=0), seed_spread(accuracy)
                cell.plot(x, mean, color=color, marker=marker, markersize=3.5, linewidth=1.3, label=plain_text(method))
                if ends is not None:
                    low, high = np.clip(ends, 0, 100)  # the limits of an accuracy
                    cell.fill_between(x, low, high, color=color, alpha=0.2 if len(runs) < 4 else 0.08, linewidth=0)
            cell.set_title(title, fontweight="bold" if len(members) > 1 else "normal")
            cell.set_xticks(x)
            cell.grid(True, axis="y")
            # The panels of a column share their horizontal axis: only the lowest panel labels it.
            if i + columns >= len(panels):
                cell.tick_params(labelbottom=True)
                cell.set_xlabel("severity (1 to 5)" if 0 not in severities else "severity (0: clean)")
            if i % columns == 0:
                cell.set_ylabel("accuracy (%)")
        counts = sorted({len(seeds) for seeds in runs.values()})
        seeds_text = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
        joint = "; " if len(panels) > 1 else "\n"
        bands = ["95 % confidence interval of the mean"] * has_interval(counts[-1])
        bands += ["range of two seeds"] * (2 in counts)
        title = f"mean of {seeds_text}{joint}bands: {' or '.join(bands)}"
        legend_below(figure, *cells[0].get_legend_handles_labels())
        figure.suptitle(title if counts[-1] > 1 else "one seed", fontsize=7.5)
    return figure
