"""Map of training regimes: training examples against epochs, with the best method and its gain: regimes.png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.evidence.methods import BASELINE, MIXING
from benchmarks.evidence.results import Row, difference_of
from benchmarks.evidence.runs import Paths
from benchmarks.markdown import replace_section, table_lines
from mm_hf.evaluation.metrics.registry import METRICS
from mm_hf.evaluation.plots.style import COLUMN, legend_below, method_styles, saved_figure
from mm_hf.evaluation.statistics import Interval

METRIC = "accuracy"


@dataclass(frozen=True)
class Cell:
    """Best mixing method of a task at one length.

    Attributes:
        task: Name of the task.
        epochs: Number of epochs.
        examples: Number of training examples.
        method: The method with the highest mean accuracy on the test examples; the baseline if no method is
            significantly better.
        gain: Its accuracy minus that of plain training.
    """

    task: str
    epochs: float
    examples: float
    method: str
    gain: Interval


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Return the cells of the map, in the order of the rows."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["metric"] == METRIC and (row["method"] in MIXING or row["method"] == BASELINE):
            groups.setdefault((row["task"], row["length"]), []).append(row)
    cells = []
    for (task, _), own in groups.items():
        mixed = [row for row in own if row["method"] != BASELINE and not math.isnan(row["mean"])]
        if mixed:
            best = max(mixed, key=lambda row: row["mean"])
            gain = difference_of(best)
            method = best["method"] if gain.low > 0 else BASELINE
            cells.append(Cell(task, best["epochs"], best["train_examples"], method, gain))
    return cells


def summarize(paths: Paths, rows: Sequence[Row]) -> list[Path]:
    """Draw the map and write its table into evidence.md."""
    cells = cells_of(rows)
    if not cells:
        return []
    path = paths.image("regimes.png")
    draw(cells, path)
    accuracy = METRICS[METRIC]
    table = [["Task", "Training examples", "Epochs", "Best method", "Accuracy minus plain training"]]
    for cell in cells:
        gain = accuracy.format_difference(cell.gain)
        name = "none" if cell.method == BASELINE else cell.method
        table.append([cell.task, f"{cell.examples:,.0f}", f"{cell.epochs:,.0f}", name, gain])
    lines = ["![Best method by number of training examples and epochs](images/regimes.png)", "", *table_lines(table)]
    replace_section(paths.page, "regimes", [*lines, ""])
    return [path]


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw a point per cell, colored by the best method, with its gain in points."""
    styles: Mapping[str, tuple[str, str]] = method_styles([BASELINE, *MIXING])
    with saved_figure(path) as figures:
        figure, axes = plt.subplots(figsize=(2 * COLUMN, COLUMN), layout="constrained")
        figures.append(figure)
        for method in dict.fromkeys([BASELINE, *(cell.method for cell in cells)]):
            own = [cell for cell in cells if cell.method == method]
            color, marker = styles[method]
            label = "no significant gain" if method == BASELINE else method
            x, y = [cell.examples for cell in own], [cell.epochs for cell in own]
            axes.scatter(x, y, s=36, color=color, marker=marker, label=label, zorder=2)
        scale = METRICS[METRIC].scale
        for cell in cells:
            text = f"{scale * cell.gain.value:+.1f} {cell.task}".replace("-", "\u2212")
            axes.annotate(text, (cell.examples, cell.epochs), (5, 3), textcoords="offset points", fontsize=6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.18, y=0.1)
        axes.set_xlabel("training examples")
        axes.set_ylabel("epochs")
        axes.set_title("best method and its accuracy minus plain training's, in points")
        axes.grid(True)
        legend_below(figure, *axes.get_legend_handles_labels())
