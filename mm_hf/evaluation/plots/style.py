"""Style of all plots: colors, markers, print sizes, and layout of panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..files import remove_link

# The colorblind-safe palette of Okabe and Ito, after a gray for the baseline.
COLORS = ("#6b7280", "#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Ten colors for classes: Petroff, "Accessible Color Sequences for Data Visualization", 2021.
CLASS_COLORS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
KNOWN, OTHER = COLORS[2], COLORS[1]
WIDTH = 6.9  # inches, the text width of most papers
COLUMN = 3.4  # inches, one of two columns
RC_PARAMS: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # TrueType: publishers require editable text
    "savefig.dpi": 300,
}


def method_styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a color and a marker for each method, in order. The first 49 pairs are distinct."""
    n = len(COLORS)
    return {name: (COLORS[i % n], MARKERS[(i + i // n) % n]) for i, name in enumerate(names)}


@contextmanager
def saved_figure(path: str | Path | None) -> Iterator[list[Figure]]:
    """Apply the print style, then write the figure appended to the yielded list to `path`, if given, and close it."""
    holder: list[Figure] = []
    with plt.rc_context(RC_PARAMS):
        try:
            yield holder
            if path is not None:
                remove_link(path)
                holder[0].savefig(path)
        finally:
            for figure in holder:
                plt.close(figure)


def panel_layout(panels: int, columns: int = 3) -> tuple[int, int]:
    """Return the rows and columns for a number of panels. Four panels form a square."""
    columns = 2 if panels == 4 and columns == 3 else min(panels, columns)
    return math.ceil(panels / columns), columns


def panel_grid(panels: int, height: float, columns: int = 3, **options: Any) -> tuple[Figure, list[Any]]:
    """Create a figure with a grid of panels.

    Args:
        panels: Number of panels.
        height: Height of a panel in inches.
        columns: Maximum number of columns. A figure with one column has the width of a column, others that of a page.
        options: Keyword arguments of `matplotlib.pyplot.subplots`.

    Returns:
        The figure and the axes of the panels; unused axes are removed.
    """
    rows, columns = panel_layout(panels, columns)
    width = COLUMN if columns == 1 else WIDTH
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height * rows), layout="constrained", squeeze=False, **options
    )
    cells = list(axes.flat)
    for cell in cells[panels:]:
        cell.remove()
    return figure, cells[:panels]


def legend_below(figure: Figure, handles: list[Any], texts: list[str], *, around: float = 0.62, **options: Any) -> None:
    """Add a legend below all panels with as many columns as fit. An entry takes `around` inches beside its text."""
    rows = legend_rows(texts, figure.get_figwidth(), around)
    figure.legend(handles, texts, loc="outside lower center", ncols=math.ceil(len(texts) / rows), **options)


def legend_rows(texts: Iterable[str], width: float, around: float = 0.62) -> int:
    """Return the number of rows of a legend below the panels of a figure that is `width` inches wide."""
    texts = list(texts)
    column = around + 0.065 * max(map(len, texts))
    return math.ceil(len(texts) / max(int((width - 0.1) / column), 1))


def plain_text(name: str, length: int | None = None) -> str:
    r"""Return the name of a method or a class as plain text of a figure, shortened to a number of characters.

    Matplotlib reads text between two dollar signs as a formula and leaves names that begin with an underscore out of
    legends.

    Example:
        >>> plain_text("_price in $ or $")
        ' _price in \\$ or \\$'
        >>> plain_text("abcdef", 4)
        'abc…'
    """
    if length is not None and len(name) > length:
        name = f"{name[: length - 1]}…"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def check_not_empty(runs: Any, name: str) -> None:
    """Raise a ValueError if there is nothing to plot."""
    if not len(runs):
        raise ValueError(f"{name} is empty: there is nothing to plot.")


def history_curve(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a metric in `trainer.state.log_history`, keeping the last value of each step.

    A resumed training run logs some steps twice.

    Example:
        >>> history_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 3.0}], "loss")
        ([1, 2], [2.0, 1.0])
    """
    points = {entry["step"]: entry[name] for entry in history if name in entry}
    return list(points), list(points.values())
