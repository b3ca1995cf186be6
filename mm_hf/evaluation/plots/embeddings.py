"""Plots of the embedding space: two-dimensional projections, and alignment against uniformity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..metrics.base import as_tensor, vectors_and_labels
from ..metrics.registry import get_metric
from .style import (
    CLASS_COLORS,
    COLUMN,
    MARKERS,
    check_not_empty,
    legend_below,
    legend_rows,
    method_styles,
    panel_grid,
    plain_text,
    saved_figure,
)

PROJECTIONS = ("pca", "tsne")


def plot_embeddings(
    runs: Mapping[str, tuple[Any, Any]],
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    projection: str = "tsne",
    seed: int = 0,
) -> Figure:
    """Plot features projected to two dimensions, one panel per method, with a color per class.

    With more than ten classes, markers distinguish classes of the same color.

    Args:
        runs: Features (n, d) and labels (n,) of each method, as returned by [`~mm_hf.evaluation.metrics.features`];
            examples with label -100 are ignored.
        path: Image file to write, .png or .pdf.
        class_names: Names of all classes. Default: their indices.
        projection: "tsne" or "pca". The axis labels of "pca" include the explained variance.
        seed: Seed of t-SNE, which is initialized with the principal components.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no methods, the projection is unknown, there are fewer than three examples, or the shapes
            of features and labels do not match.

    Example:
        >>> import tempfile, torch
        >>> features, labels = torch.randn(60, 8), torch.arange(60) % 3
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_embeddings({"plain": (features, labels)}, f"{directory}/map.png", projection="pca")
        >>> len(figure.axes[0].collections)
        3
    """
    check_not_empty(runs, "runs")
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}.")
    maps = {name: (*_project(*pair, projection, seed),) for name, pair in runs.items()}
    classes = sorted({int(y) for _, labels, _ in maps.values() for y in labels})
    if class_names is not None and classes[-1] >= len(class_names):
        raise ValueError(f"class_names has {len(class_names)} names, but the largest label is {classes[-1]}.")
    with saved_figure(path) as figures:
        figure, panels = panel_grid(len(runs), 2.3 if len(runs) > 1 else 3.2)
        figures.append(figure)
        for panel, (name, (points, labels, (x_label, y_label))) in zip(panels, maps.items(), strict=True):
            for k, label in enumerate(classes):
                x, y = points[labels == label].T
                panel.scatter(
                    x, y, s=5, color=CLASS_COLORS[k % 10], marker=MARKERS[k // 10 % len(MARKERS)], linewidths=0,
                    label=str(label) if class_names is None else plain_text(class_names[label]),
                )  # fmt: skip
            panel.set_title(plain_text(name))
            panel.set_xlabel(x_label)
            panel.set_ylabel(y_label)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.margins(0.04)
        legend_below(
            figure,
            *panels[0].get_legend_handles_labels(),
            around=0.36,
            markerscale=2.2,
            handletextpad=0.1,
            columnspacing=1,
        )
    return figure


def _project(features: Any, labels: Any, projection: str, seed: int) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x, y = (tensor.numpy() for tensor in vectors_and_labels(features, labels, "features"))
    if len(x) < 3 or x.shape[1] < 2:
        raise ValueError(
            f"A projection requires at least three examples and two features, but features have the shape {x.shape}."
        )
    if projection == "pca":
        pca = PCA(2, svd_solver="full")
        points = pca.fit_transform(x)
        first, second = 100 * pca.explained_variance_ratio_
        return points, y, (f"component 1 ({first:.0f} % of variance)", f"component 2 ({second:.0f} % of variance)")
    # The perplexity must be smaller than the number of examples; 30 is scikit-learn's default.
    tsne = TSNE(2, perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(x), y, ("t-SNE 1", "t-SNE 2")


def plot_alignment_uniformity(runs: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> Figure:
    """Plot uniformity against alignment: a small point per seed, a large point for each method's mean.

    Args:
        runs: `(alignment, uniformity)` of each seed of each method ([`~mm_hf.evaluation.metrics.alignment`],
            [`~mm_hf.evaluation.metrics.uniformity`]).
        path: Image file to write, .png or .pdf.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no methods, or the values of a method are not pairs.

    Source:
        Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_alignment_uniformity({"plain": [(0.5, -2.0), (0.7, -2.2)]}, f"{directory}/plane.png")
        >>> figure.axes[0].collections[1].get_offsets().round(6).tolist()  # the mean
        [[0.6, -2.1]]
    """
    check_not_empty(runs, "runs")
    points = {name: as_tensor(pairs, f"runs[{name!r}]").double().numpy() for name, pairs in runs.items()}
    for name, pairs in points.items():
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
            raise ValueError(
                f"runs[{name!r}] must have one pair (alignment, uniformity) per seed, "
                f"but has the shape {tuple(pairs.shape)}."
            )
    with saved_figure(path) as figures:
        height = 2.5 + 0.18 * legend_rows(points, COLUMN)  # the legend reduces the height of the axes
        figure, axes = plt.subplots(figsize=(COLUMN, height), layout="constrained")
        figures.append(figure)
        for name, (color, marker) in method_styles(runs).items():
            x, y = points[name].T
            axes.scatter(x, y, s=14, color=color, marker=marker, alpha=0.4, linewidths=0)
            axes.scatter(
                x.mean(),
                y.mean(),
                s=55,
                color=color,
                marker=marker,
                edgecolors="black",
                linewidths=0.7,
                label=plain_text(name),
            )
        horizontal, vertical = get_metric("alignment"), get_metric("uniformity")
        axes.set_xlabel(f"{horizontal.title} ({horizontal.better} is better)")
        axes.set_ylabel(f"{vertical.title} ({vertical.better} is better)")
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.margins(0.1)
        legend_below(figure, *axes.get_legend_handles_labels())
    return figure
