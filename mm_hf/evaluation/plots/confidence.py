"""Plots of confidence: reliability diagrams, and scores of known and unknown classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..metrics.classification import NUM_BINS, calibration_error, reliability
from ..metrics.ood import SCORES, auroc, fpr95, threshold95
from ..metrics.registry import METRICS
from .style import (
    COLUMN,
    KNOWN,
    OTHER,
    WIDTH,
    check_not_empty,
    legend_below,
    panel_grid,
    panel_layout,
    plain_text,
    saved_figure,
)

SCORE_NAMES = {"max_softmax": "maximum softmax probability", "energy": "negative energy (nats)"}
OOD_BINS = 40


def plot_reliability(runs: Mapping[str, tuple[Any, Any]], path: str | Path, *, num_bins: int = NUM_BINS) -> Figure:
    """Plot reliability diagrams, one panel per method.

    Bars are the accuracy in each confidence bin; the hatched part is the gap to the mean confidence of the bin. A
    histogram below shows the share of examples in each bin.

    Args:
        runs: Logits (n, c) and labels (n,) of each method; examples with label -100 are ignored.
        path: Image file to write, .png or .pdf.
        num_bins: Number of bins of equal width, also used for the calibration error in each title.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no methods, or the shapes of logits and labels do not match.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Example:
        >>> import tempfile, torch
        >>> logits, labels = torch.randn(100, 5), torch.randint(5, (100,))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_reliability({"plain": (logits, labels)}, f"{directory}/reliability.png")
        >>> figure.axes[0].get_ylabel()
        'accuracy'
    """
    check_not_empty(runs, "runs")
    rows, columns = panel_layout(len(runs))
    with saved_figure(path) as figures:
        figure = plt.figure(figsize=(COLUMN if columns == 1 else WIDTH, 2.9 * rows + 0.3), layout="constrained")
        figures.append(figure)
        cells = figure.add_gridspec(2 * rows, columns, height_ratios=[4, 1] * rows)
        for i, (name, (logits, labels)) in enumerate(runs.items()):
            bins = reliability(logits, labels, num_bins)
            row, column = divmod(i, columns)
            top = figure.add_subplot(cells[2 * row, column])
            bottom = figure.add_subplot(cells[2 * row + 1, column], sharex=top)
            left, width = bins.edges[:-1], np.diff(bins.edges)
            filled = bins.share > 0
            accuracy, confidence = np.nan_to_num(bins.accuracy), np.nan_to_num(bins.confidence)
            top.bar(left, accuracy, width, align="edge", color=KNOWN, edgecolor="white", linewidth=0.5)
            top.bar(
                left[filled], (confidence - accuracy)[filled], width[filled], accuracy[filled], align="edge",
                facecolor="none", edgecolor=OTHER, hatch="//////", linewidth=0.7,
            )  # fmt: skip
            top.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
            info = METRICS["calibration_error"]
            top.set_title(
                f"{plain_text(name)}\n{info.title} {info.with_unit(calibration_error(logits, labels, num_bins))}"
            )
            top.set_xlim(0, 1)
            top.set_ylim(0, 1)
            top.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
            top.tick_params(labelbottom=False)
            bottom.bar(left, 100 * bins.share, width, align="edge", color="#9ca3af", edgecolor="white", linewidth=0.5)
            bottom.set_xlabel("confidence")
            bottom.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
            bottom.locator_params(axis="y", nbins=2)
            if column == 0:
                top.set_ylabel("accuracy")
                bottom.set_ylabel("examples\n(%)")
                figure.align_ylabels([top, bottom])
        handles = [
            Patch(facecolor=KNOWN, label="accuracy"),
            Patch(facecolor="none", edgecolor=OTHER, hatch="//////", label="gap to confidence"),
            plt.Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="perfectly calibrated"),
        ]
        legend_below(figure, handles, [str(handle.get_label()) for handle in handles])
    return figure


def plot_ood(runs: Mapping[str, tuple[Any, Any]], path: str | Path, *, score: str = "max_softmax") -> Figure:
    """Plot histograms of a confidence score for known and unknown classes, one panel per method.

    Args:
        runs: Logits (n, c) of examples of the known classes and logits (m, c) of examples of unknown classes, for each
            method.
        path: Image file to write, .png or .pdf.
        score: "max_softmax" or "energy".

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no methods, the score is unknown, or the shapes of the logits do not match.

    Example:
        >>> import tempfile, torch
        >>> known, others = 3 * torch.randn(100, 5), torch.randn(80, 5)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_ood({"plain": (known, others)}, f"{directory}/ood.png", score="energy")
        >>> figure.axes[0].get_xlabel()
        'negative energy (nats)'
    """
    check_not_empty(runs, "runs")
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
    with saved_figure(path) as figures:
        figure, panels = panel_grid(len(runs), 2.35)
        figures.append(figure)
        scores = {name: [SCORES[score](x).numpy() for x in logits] for name, logits in runs.items()}
        everything = np.concatenate([x for pair in scores.values() for x in pair])
        for i, (panel, (name, (known, others))) in enumerate(zip(panels, scores.items(), strict=True)):
            # Probabilities of all methods share a scale; energies do not.
            scale = everything if score == "max_softmax" else np.concatenate([known, others])
            edges = np.linspace(scale.min(), scale.max() + 1e-9, OOD_BINS + 1)
            for values, options in (
                (known, {"facecolor": KNOWN, "alpha": 0.55, "label": "known classes"}),
                (others, {"facecolor": "none", "edgecolor": OTHER, "linewidth": 1.2, "label": "unknown classes"}),
            ):
                panel.hist(
                    values, edges, weights=np.full(len(values), 100 / len(values)), histtype="stepfilled", **options
                )
            panel.axvline(
                threshold95(known), color="black", linestyle="--", linewidth=0.8, label="threshold at 95 % recall"
            )
            panel.set_title(
                f"{plain_text(name)}\n"
                f"AUROC {100 * auroc(known, others):.1f} %, FPR95 {100 * fpr95(known, others):.1f} %"
            )
            panel.set_xlabel(SCORE_NAMES[score])
            panel.set_ylim(bottom=0)
            if i % panel_layout(len(runs))[1] == 0:
                panel.set_ylabel("examples (% of each group)")
        legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure
