"""How all plots look: colours, markers, sizes for print, and panels side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people of every kind of colour vision can tell apart, after a grey for the baseline.
COLOURS = ("#6b7280", "#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Ten for classes: Petroff, "Accessible Color Sequences for Data Visualization", 2021.
CLASS_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
KNOWN, OTHER = COLOURS[2], COLOURS[1]
WIDTH = 6.9  # inches, the text width of most papers
COLUMN = 3.4  # one column of two
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
    "pdf.fonttype": 42,  # letters that can be edited, as publishers ask for
    "savefig.dpi": 300,
}


def method_styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method, in order; none comes twice together before 49 methods."""
    n = len(COLOURS)
    return {name: (COLOURS[i % n], MARKERS[(i + i // n) % n]) for i, name in enumerate(names)}


@contextmanager
def saved_figure(path: str | Path | None) -> Iterator[list[Figure]]:
    """Sizes for print inside the block; the figure put into the list is written to `path`, if there is one, and closed."""
    holder: list[Figure] = []
    with plt.rc_context(RC_PARAMS):
        try:
            yield holder
            if path is not None:
                holder[0].savefig(path)
        finally:
            for figure in holder:
                plt.close(figure)


def grid_of(panels: int, columns: int = 3) -> tuple[int, int]:
    """Rows and columns for so many panels: four make a square."""
    columns = 2 if panels == 4 and columns == 3 else min(panels, columns)
    return math.ceil(panels / columns), columns


def panel_grid(panels: int, height: float, columns: int = 3, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure of panels, `height` inches each, as wide as text (one panel: as a column), unused ones left out."""
    rows, columns = grid_of(panels, columns)
    width = COLUMN if columns == 1 else WIDTH
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height * rows), layout="constrained", squeeze=False, **options
    )
    cells = list(axes.flat)
    for cell in cells[panels:]:
        cell.remove()
    return figure, cells[:panels]


def legend_below(figure: Figure, handles: list[Any], texts: list[str], *, around: float = 0.62, **options: Any) -> None:
    """A legend under all panels, in as many columns as fit; `around` is what a column needs beside its text, in inches."""
    rows = legend_rows(texts, figure.get_figwidth(), around)
    figure.legend(handles, texts, loc="outside lower center", ncols=math.ceil(len(texts) / rows), **options)


def legend_rows(texts: Iterable[str], width: float, around: float = 0.62) -> int:
    """How many rows a legend under panels takes in a figure of this width in inches."""
    texts = list(texts)
    column = around + 0.065 * max(map(len, texts))
    return math.ceil(len(texts) / max(int((width - 0.1) / column), 1))


def not_empty(runs: Any, name: str) -> None:
    """Refuse a plot of nothing."""
    if not len(runs):
        raise ValueError(f"{name} is empty: there is nothing to draw.")
