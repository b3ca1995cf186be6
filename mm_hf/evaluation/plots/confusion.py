"""Plots of mistakes: confusion matrices, and the images that are misclassified with the most confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .style import COLUMN, WIDTH, check_not_empty, panel_layout, plain_text, saved_figure

WITH_NUMBERS = 12  # classes, up to which cells show their number
WITH_NAMES = 30  # classes, up to which axes show their names


def plot_confusion(
    matrices: Mapping[str, np.ndarray], path: str | Path, *, class_names: Sequence[str] | None = None
) -> Figure:
    """Plot confusion matrices, a panel per method: how often each class is predicted as each other one.

    Args:
        matrices: For each method, the number of examples (c, c) by class and by predicted class. Rows are shown in
            percent of their sum; a class without examples stays empty.
        path: Image file to write, .png or .pdf.
        class_names: Names of all classes. Default: their indices.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no methods.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_confusion({"erm": np.array([[3, 1], [0, 0]])}, f"{directory}/confusion.png")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['75', '25']
    """
    check_not_empty(matrices, "matrices")
    classes = len(next(iter(matrices.values())))
    names = [str(i) for i in range(classes)] if class_names is None else [plain_text(name, 18) for name in class_names]
    rows, columns = panel_layout(len(matrices), columns=2 if classes > WITH_NUMBERS else 3)
    width = COLUMN + 0.4 if len(matrices) == 1 else WIDTH
    with saved_figure(path) as figures:
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, (width / columns + 0.35) * rows), layout="constrained", squeeze=False
        )
        figures.append(figure)
        for cell in list(axes.flat)[len(matrices) :]:
            cell.remove()
        for k, (cell, (method, counts)) in enumerate(zip(axes.flat, matrices.items(), strict=False)):
            total = counts.sum(axis=1, keepdims=True)
            shares = np.where(total > 0, 100 * counts / np.maximum(total, 1), np.nan)
            cell.imshow(shares, cmap="Blues", vmin=0, vmax=100)
            cell.set_title(plain_text(method, 100 // columns))
            if classes <= WITH_NUMBERS:
                for y, x in zip(*np.nonzero(shares > 0), strict=True):
                    if np.isfinite(shares[y, x]) and round(shares[y, x]):
                        color = "white" if shares[y, x] > 55 else "black"
                        cell.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", fontsize=5.5, color=color)
            if classes <= WITH_NAMES:
                cell.set_xticks(range(classes), names, rotation=90, fontsize=5.5)
                cell.set_yticks(range(classes), names if k % columns == 0 else [""] * classes, fontsize=5.5)
            cell.tick_params(length=0)
            cell.set_xlabel("predicted class")
            if k % columns == 0:
                cell.set_ylabel("class")
    return figure


@dataclass(frozen=True)
class Mistake:
    """A misclassified example.

    Attributes:
        label: Its class.
        prediction: The predicted class.
        probability: Probability of the predicted class, in [0, 1].
        image: (h, w, channels) or (h, w), in [0, 1].
    """

    label: str
    prediction: str
    probability: float
    image: Any


def plot_mistakes(mistakes: Mapping[str, Sequence[Mistake]], path: str | Path) -> Figure:
    """Plot misclassified images, a row per method, with class, predicted class and its probability.

    Args:
        mistakes: For each method, its mistakes; a method without any has an empty row.
        path: Image file to write, .png or .pdf.

    Returns:
        The figure, written and closed.

    Raises:
        ValueError: There are no mistakes.

    Example:
        >>> import tempfile
        >>> mistake = Mistake("cat", "dog", 0.93, np.zeros((8, 8)))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     figure = plot_mistakes({"erm": [mistake]}, f"{directory}/mistakes.png")
        >>> figure.axes[0].get_title()
        'cat\\n→ dog, 93 %'
    """
    columns = max(map(len, mistakes.values()), default=0)
    if not columns:
        raise ValueError("mistakes is empty: there is nothing to plot.")
    with saved_figure(path) as figures:
        figure, axes = plt.subplots(
            len(mistakes), columns, figsize=(WIDTH, (WIDTH / max(columns, 6) + 0.42) * len(mistakes)),
            layout="constrained", squeeze=False,
        )  # fmt: skip
        figures.append(figure)
        for row, (method, found) in zip(axes, mistakes.items(), strict=True):
            for cell in row[len(found) :]:
                cell.set_axis_off()
            for cell, mistake in zip(row, found, strict=False):
                cell.imshow(mistake.image, cmap="gray", vmin=0, vmax=1)
                texts = (plain_text(mistake.label, 18), plain_text(mistake.prediction, 18))
                cell.set_title(f"{texts[0]}\n→ {texts[1]}, {100 * mistake.probability:.0f} %", fontsize=5.5)
                cell.set_xticks([])
                cell.set_yticks([])
            row[0].set_axis_on()
            row[0].set_ylabel(plain_text(method, 18), fontsize=6.5)
            if not found:
                row[0].set_xticks([])
                row[0].set_yticks([])
                row[0].text(0.5, 0.5, "no mistakes", ha="center", va="center", fontsize=6)
    return figure
