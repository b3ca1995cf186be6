"""Where a model puts its examples: maps in two dimensions, and the plane of alignment and uniformity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..metrics.base import as_tensor, vectors_and_labels
from .style import (
    CLASS_COLOURS,
    COLUMN,
    MARKERS,
    legend_below,
    legend_rows,
    method_styles,
    not_empty,
    panel_grid,
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
    """Features in two dimensions, one panel a method, classes by colour (and marker, from eleven classes on).

    Args:
        runs: For each method, features (n, d) and labels (n,), as [`~mm_hf.evaluation.metrics.features`] gives them; -100 is left
            out.
        path: Image file to write, .png or .pdf.
        class_names: Of all classes. Default: their indices.
        projection: "tsne", or "pca", whose axes say how much of the variance they hold.
        seed: Of t-SNE, which starts from the principal components.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There is no method, another projection, fewer than three examples, or features and labels that do not
            fit.

    Example:
        >>> import tempfile, torch
        >>> features, labels = torch.randn(60, 8), torch.arange(60) % 3
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_embeddings({"plain": (features, labels)}, f"{directory}/map.png", projection="pca")
        >>> len(figure.axes[0].collections)
        3
    """
    not_empty(runs, "runs")
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}.")
    maps = {name: (*_project(*pair, projection, seed),) for name, pair in runs.items()}
    classes = sorted({int(y) for _, labels, _ in maps.values() for y in labels})
    if class_names is not None and classes[-1] >= len(class_names):
        raise ValueError(f"class_names has {len(class_names)} names, and there are labels up to {classes[-1]}.")
    with saved_figure(path) as figures:
        figure, panels = panel_grid(len(runs), 2.3 if len(runs) > 1 else 3.2)
        figures.append(figure)
        for panel, (name, (points, labels, axes_said)) in zip(panels, maps.items(), strict=True):
            for k, which in enumerate(classes):
                x, y = points[labels == which].T
                panel.scatter(
                    x, y, s=5, color=CLASS_COLOURS[k % 10], marker=MARKERS[k // 10 % len(MARKERS)], linewidths=0,
                    label=str(which) if class_names is None else class_names[which],
                )  # fmt: skip
            panel.set_title(name)
            panel.set_xlabel(axes_said[0])
            panel.set_ylabel(axes_said[1])
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
        raise ValueError(f"A map needs three examples and two features at least, got the shape {x.shape}.")
    if projection == "pca":
        pca = PCA(2, svd_solver="full")
        points = pca.fit_transform(x)
        first, second = 100 * pca.explained_variance_ratio_
        return points, y, (f"component 1 ({first:.0f} % of variance)", f"component 2 ({second:.0f} %)")
    # Perplexity must be below the number of examples; 30 is what is usual for many.
    tsne = TSNE(2, perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(x), y, ("t-SNE 1 (no unit)", "t-SNE 2 (no unit)")


def plot_alignment_uniformity(runs: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> Figure:
    """The plane of alignment and uniformity: one faint point a seed, one large one for each method's mean.

    Args:
        runs: For each method, `(alignment, uniformity)` of each of its seeds ([`~mm_hf.evaluation.metrics.alignment`],
            [`~mm_hf.evaluation.metrics.uniformity`]).
        path: Image file to write, .png or .pdf.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There is no method, or a method's values are no pairs.

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
    not_empty(runs, "runs")
    points = {name: as_tensor(pairs, f"runs[{name!r}]").double().numpy() for name, pairs in runs.items()}
    for name, pairs in points.items():
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
            raise ValueError(f"runs[{name!r}] must be pairs (alignment, uniformity), one a seed, got {pairs.shape}.")
    with saved_figure(path) as figures:
        height = 2.5 + 0.18 * legend_rows(points, COLUMN)  # the legend takes from the height
        figure, axes = plt.subplots(figsize=(COLUMN, height), layout="constrained")
        figures.append(figure)
        for name, (colour, marker) in method_styles(runs).items():
            x, y = points[name].T
            axes.scatter(x, y, s=14, color=colour, marker=marker, alpha=0.4, linewidths=0)
            axes.scatter(
                x.mean(), y.mean(), s=55, color=colour, marker=marker, edgecolors="black", linewidths=0.7, label=name
            )
        axes.set_xlabel("alignment (squared distance, ← better)")
        axes.set_ylabel("uniformity (logarithm, ↓ better)")
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.margins(0.1)
        legend_below(figure, *axes.get_legend_handles_labels())
    return figure
