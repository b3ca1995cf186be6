"""Map of methods against lengths of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..metrics.registry import MetricInfo
from ..statistics import Interval
from .style import WIDTH, check_not_empty, plain_text, saved_figure


def plot_lengths(
    means: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, Mapping[str, Interval]],
    path: str | Path,
    *,
    baseline: str,
    info: MetricInfo,
) -> Figure:
    """Plot a metric of methods at several lengths of training as a map, colored by the difference from a baseline.

    A cell shows the metric and below it the difference, in bold if its interval excludes zero. The best method of each
    length has a frame.

    Args:
        means: For each length (title of a column), the metric of each method that was trained.
        differences: For each length, the differences of the other methods from the baseline.
        path: Image file to write, .png or .pdf.
        baseline: Name of the baseline.
        info: The metric.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no lengths.

    Example:
        >>> import tempfile
        >>> from mm_hf.evaluation.metrics import get_metric
        >>> means = {"1x": {"erm": 0.9, "mixup": 0.91}, "4x": {"erm": 0.9, "mixup": 0.94}}
        >>> differences = {"1x": {"mixup": Interval(0.01, -0.01, 0.03)}, "4x": {"mixup": Interval(0.04, 0.02, 0.06)}}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_lengths(means, differences, f"{directory}/lengths.png", baseline="erm",
        ...                           info=get_metric("accuracy"))
        >>> [text.get_text() for text in figure.axes[0].texts][-1]
        '94.00\\n+4.00'
    """
    check_not_empty(means, "means")
    methods = list(dict.fromkeys(name for each in means.values() for name in each))
    gains = np.full((len(methods), len(means)), np.nan)
    sign = -1 if info.better == "lower" else 1
    for x, length in enumerate(means):
        for y, name in enumerate(methods):
            if name == baseline and name in means[length]:
                gains[y, x] = 0
            elif name in differences[length]:
                gains[y, x] = sign * differences[length][name].value
    finite = np.abs(gains[np.isfinite(gains)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    with saved_figure(path) as figures:
        names = [plain_text(name, 32) for name in methods]
        width = min(WIDTH, 0.4 + 0.062 * max(20, *map(len, names)) + 0.95 * len(means))
        figure, cell = plt.subplots(figsize=(width, 0.75 + 0.36 * len(methods)), layout="constrained")
        figures.append(figure)
        cell.imshow(gains, cmap="PuOr_r", vmin=-1.6 * limit, vmax=1.6 * limit, aspect="auto")
        for x, length in enumerate(means):
            known = {name: sign * value for name, value in means[length].items() if np.isfinite(value)}
            best = max(known, key=lambda name: known[name]) if known else None
            for y, name in enumerate(methods):
                if name not in means[length]:
                    continue
                interval = differences[length].get(name)
                text, bold = info.format(means[length][name]), False
                if interval is not None and name != baseline:
                    text, bold = f"{text}\n{info.format(interval.value, sign=True)}", interval.excludes_zero
                cell.text(
                    x, y, text, ha="center", va="center", fontsize=7, linespacing=1.05,
                    fontweight="bold" if bold else "normal",
                )  # fmt: skip
                if name == best:
                    cell.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, linewidth=1.4))
        cell.set_xticks(range(len(means)), list(means))
        cell.set_yticks(range(len(methods)), names)
        cell.tick_params(length=0)
        cell.set_xlabel("length of training")
        figure.suptitle(f"{info.label}\nand difference from {plain_text(baseline, 32)}", fontsize=8)
        for side in cell.spines.values():
            side.set_visible(False)
    return figure
