"""Tables of a report: means of metrics, differences from the baseline, and settings of the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from ...evaluation.metrics.registry import Group, MetricInfo, compared_metrics, metrics_of
from ...evaluation.statistics import Interval
from ...evaluation.templates import escape_markdown, markdown_table
from ..compare import Comparison

GROUPS: tuple[Group, ...] = ("classification", "robustness", "ood", "representation", "cost")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: The content.
        mark: The side of a significant difference, which is highlighted.
    """

    text: str
    mark: Literal["", "better", "worse"] = ""

    @property
    def markdown(self) -> Markup:
        """The content as Markdown, in bold if it is marked."""
        text = escape_markdown(self.text)
        return Markup("**") + text + Markup("**") if self.mark else text


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings.

    Args:
        headings: One for each column.
        rows: The cells of each row.
        align: "l" (text) or "r" (numbers) for each column.
        caption: What the cells contain.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    align: str
    caption: str = ""

    @property
    def markdown(self) -> Markup:
        """The table, without its caption, as Markdown."""
        return markdown_table(self.headings, [[cell.markdown for cell in row] for row in self.rows], self.align)


def report_tables(comparison: Comparison) -> dict[str, Table | None]:
    """Return the tables of a report by name; None in place of an empty one."""
    return {
        **{group: mean_table(comparison, group) for group in GROUPS},
        "differences": difference_table(comparison),
        "settings": settings_table(comparison),
    }


def mean_table(comparison: Comparison, group: Group) -> Table | None:
    """Return the means over seeds of a group's metrics, one row for each method; None if no metric was measured.

    Args:
        comparison: The finished runs.
        group: A group of the metric registry.
    """
    means = {info: mean for info in metrics_of(group) if (mean := comparison.mean(info.name))}
    if not means:
        return None
    rows = [
        [Cell(name), *(Cell(info.format_mean(mean[name]) if name in mean else "n/a") for info, mean in means.items())]
        for name in (comparison.runs if group == "classification" else comparison.trained)
    ]
    seeds = len(comparison.seeds)
    caption = f"Mean over {seeds} seeds ± half-width of Student's 95 % interval." if seeds > 1 else ""
    return _metric_table(list(means), rows, caption)


def difference_table(comparison: Comparison) -> Table | None:
    """Return the differences of all other methods from the baseline, with intervals; None without other methods."""
    if not comparison.differences:
        return None
    metrics = compared_metrics()
    rows = [
        [Cell(name), *(_difference_cell(info, comparison.differences[info.name][name]) for info in metrics)]
        for name in comparison.runs
        if name != comparison.baseline
    ]
    return _metric_table(
        metrics, rows, f"Difference from {comparison.baseline} [95 % interval of the paired bootstrap]."
    )


def settings_table(comparison: Comparison) -> Table | None:
    """Return the settings of each method; None if they are unknown."""
    rows = [
        [Cell(name), Cell(", ".join(f"{key}={value}" for key, value in method.to_dict().items()))]
        for name, method in comparison.methods.items()
        if method is not None
    ]
    return Table(["Method", "Settings"], rows, "ll") if rows else None


def _metric_table(metrics: Sequence[MetricInfo], rows: Sequence[Sequence[Cell]], caption: str) -> Table:
    return Table(["Method", *(info.heading for info in metrics)], rows, "l" + "r" * len(metrics), caption)


def _difference_cell(info: MetricInfo, interval: Interval) -> Cell:
    text = info.format_difference(interval)
    if not interval.excludes_zero:
        return Cell(text)
    return Cell(text, "better" if info.is_improvement(interval.value) else "worse")
